"""Best-of-n, distilled: which samples are imitated, in which direction the policy moves, and what is refused."""

from dataclasses import replace

import pytest
import torch
from conftest import Tree, metrics
from models import make_policy, make_rollout

import rlkl
from rlkl import credit, pairs, settings
from rlkl.config import CreditConfig, TokenLikelihoodTrainer
from rlkl.trainers.token_likelihood import TokenLikelihood
from rlkl.types import Rollout, TokenRewards

IMITATION: Tree = {
    "trainer": {"type": "token_likelihood", "imitate": 1},
    "credit": {"horizon": 1},
    "kl": {"beta": 0.01, "placement": "loss", "estimator": "exact"},
}


def scored(rollout: Rollout, *scores: float) -> TokenRewards:
    """Each score in two halves, on the first two tokens."""
    value_BT = torch.zeros(rollout.tokens_BT.shape)
    value_BT[:, :2] = torch.tensor(scores)[:, None] / 2
    return TokenRewards(value_BT, rollout.policy_mask_BT)


def three_prompts() -> Rollout:
    """Samples of three prompts, mixed up: groups 2, 0, 2, 0, 0, 1."""
    rollout = make_rollout(prompts=[[1]] * 6, completions=[[2, 3], [4, 5, 6], [2, 2], [3, 3], [5, 5, 5], [6, 6]])
    return replace(rollout, group_B=torch.tensor([2, 0, 2, 0, 0, 1]))


def test_the_best_of_every_prompt_are_marked_whole_and_nothing_else() -> None:
    rollout = three_prompts()
    rewards = scored(rollout, 1.0, 0.5, 3.0, 2.0, 0.6, -4.0)
    for best, kept in ((1, [2, 3, 5]), (2, [0, 2, 3, 4, 5])):
        marked = pairs.imitated(rollout, rewards, best)
        rows = torch.zeros(6, 1, dtype=torch.bool)
        rows[kept] = True
        assert torch.equal(marked.get("annotated_BT"), rollout.policy_mask_BT & rows)
        assert torch.equal(marked.get("annotation_BT"), (rollout.policy_mask_BT & rows).float())


def test_of_equals_the_first_drawn_is_taken() -> None:
    rollout = three_prompts()
    marked = pairs.imitated(rollout, scored(rollout, *[1.0] * 6), 1)
    assert marked.get("annotated_BT").any(-1).tolist() == [True, True, False, False, False, True]


def test_its_gradient_is_that_of_the_likelihood_of_the_best() -> None:
    rollout, policy = three_prompts(), make_policy("llama")
    marked = pairs.imitated(rollout, scored(rollout, 1.0, 0.5, 3.0, 2.0, 0.6, -4.0), 1)
    trainer = TokenLikelihood(TokenLikelihoodTrainer(type="token_likelihood", imitate=1), 0.0)
    out = policy(rollout, {"logp", "ref_logp"})
    batch = credit.likelihood(marked, scored(rollout, *[0.0] * 6), out, CreditConfig(horizon=1))
    loss, _ = trainer.loss(out, batch)
    best = [2, 3, 5]
    tokens = int(rollout.length_B[best].sum())
    expected = -(out.get("logp_BT") * rollout.policy_mask_BT)[best].sum() / tokens
    found, wanted = (
        torch.autograd.grad(x, list(policy.model.parameters()), retain_graph=True) for x in (loss, expected)
    )
    assert max(float(g.abs().max()) for g in wanted) > 1e-3
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_run_raises_what_it_imitates_without_a_gradient_of_the_reward(tiny_config: Tree) -> None:
    train, sampled = {"steps": 30}, {"prompts": 6, "samples_per_prompt": 8, "max_new_tokens": 6}
    run = rlkl.train({**tiny_config, **IMITATION, "train": train, "rollout": sampled, "evaluate": {"every": 30}})
    first, last = metrics(run)[0], metrics(run)[-1]
    assert last["reward/eval/varied"] > first["reward/eval/varied"] + 5 * first["reward/eval/varied_stderr"]
    assert last["reward/queries"] == 30 * 6 * 8


REFUSED = {
    "rollout.samples_per_prompt=1": "imitate=1 with rollout.samples_per_prompt=1: all of them would be the best",
    "credit.horizon=null": "imitate=1 with credit.horizon=None: early tokens would weigh",
    "trainer.loss=signed": "imitate=1 with loss=signed: what is marked is all good",
    "data={type: annotated, path: x.jsonl}": "imitate=1 with data.type=annotated: it takes the best of several",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_cannot_be_imitated_is_refused(tiny_config: Tree, setting: str) -> None:
    config = {**tiny_config, **IMITATION}
    if "annotated" in setting:
        spans = {"type": "annotations", "weights": {"x": -1.0}}
        config |= {"rewards": {"spans": spans}, "rollout": {}, "kl": {**IMITATION["kl"], "estimator": "exact_local"}}
    with pytest.raises(ValueError, match=REFUSED[setting]) as caught:
        settings.load(config, [setting])
    assert "\n" not in str(caught.value).strip()
