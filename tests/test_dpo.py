"""DPO: a golden number, invariance to padding and micro-batches, its optimum by enumeration, pairs, and refusals."""

import math
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from conftest import Tree, metrics
from models import make_policy, make_rollout
from torch import Tensor

import rlkl
from rlkl import exact, launch, loop, losses, pairs, settings, update
from rlkl.config import KLConfig, dump
from rlkl.lane import build
from rlkl.trainers import DPO
from rlkl.types import PolicyOutput, Rollout, TokenRewards

BETA = 0.4


def test_the_loss_by_hand() -> None:
    """Sums of log-ratios 0.3 and -0.5 make the margin 0.4 at beta 0.5; tokens of weight 0 and the third row are out."""
    logp = torch.tensor([[0.1, 0.2], [-0.5, 9.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.5, 0.5], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    loss, found = losses.dpo(logp, torch.zeros_like(logp), weight, 0.5)
    assert float(loss.detach()) == pytest.approx(0.5 * math.log(1 + math.exp(-0.4)))
    (gradient,) = torch.autograd.grad(loss, logp)
    slope = 0.5 * 0.5 / (1 + math.exp(0.4))
    assert gradient.flatten().tolist() == pytest.approx([-slope, -slope, slope, 0, 0, 0, 0, 0])
    assert {name: (round(float(x), 12), int(n)) for name, (x, n) in found.items()} == {
        "loss/preference": (round(math.log(1 + math.exp(-0.4)), 12), 1),
        "preference/margin": (0.4, 1),
        "preference/accuracy": (1.0, 1),
    }


def all_pairs(problem: oracle.Problem, reward_N: Tensor) -> tuple[Rollout, Tensor]:
    """Every ordered pair of completions, and the chance that two samples of the reference are it, chosen first."""
    count = len(problem.atoms)
    first, second = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    chosen, rejected = first.flatten(), second.flatten()
    rows = problem.atoms.rows(torch.stack([chosen, rejected], 1).flatten())
    law = (problem.ref[chosen] + problem.ref[rejected]).exp()
    return replace(rows, pair_B=torch.arange(len(rows))), law * (reward_N[chosen] - reward_N[rejected]).sigmoid()


def population_gradient(problem: oracle.Problem, reward_N: Tensor, beta: float) -> Tensor:
    """The expected gradient of DPO, through the library's own batch, forward and step loss."""
    rollout, chance_P = all_pairs(problem, reward_N)
    batch = pairs.assign(rollout, problem.policy(rollout, {"logp"}))
    share_B = (chance_P * len(chance_P)).repeat_interleave(2)
    batch = replace(batch, weight_BT=batch.weight_BT * share_B[:, None])
    trainer, held = DPO(beta), KLConfig(beta=beta)
    out = problem.policy(rollout, trainer.need)
    return problem.gradient(update.step_loss(trainer, KLConfig(beta=0.0), held.beta, out, batch)[0])


def test_its_optimum_on_bradley_terry_preferences_is_that_of_the_regularised_reward() -> None:
    problem = oracle.tabular(vocab=3, length=3)
    reward_N = oracle.random_rewards(problem.atoms).value_BT.sum(-1)
    away = population_gradient(problem, reward_N, BETA).norm()
    optimum_N, _ = exact.optimum(problem.ref, reward_N, BETA)
    load_law(problem, optimum_N)
    assert torch.allclose(problem.logp, optimum_N, atol=1e-12)
    assert population_gradient(problem, reward_N, BETA).norm() < 1e-10 * away
    assert population_gradient(problem, reward_N, 2 * BETA).norm() > 0.1 * away  # another beta, another optimum
    problem.load(problem.policy.reference.table)
    assert population_gradient(problem, reward_N, BETA).norm() > 0.1 * away  # nor is it the reference


def load_law(problem: oracle.Problem, logp_N: Tensor) -> None:
    """Make the table the policy with these sequence log-probs."""
    atoms, rows = problem.atoms, problem.rows()
    mass = torch.zeros_like(problem.policy.model.table)
    mask = atoms.policy_mask_BT
    mass.index_put_(
        (rows[mask], atoms.tokens_BT[mask]), logp_N.exp()[:, None].expand(rows.shape)[mask], accumulate=True
    )
    problem.load(torch.where(mass > 0, mass.clamp(min=1e-300).log(), 0))


def test_preferences_without_noise_have_no_finite_optimum() -> None:
    """Where one side always wins, a larger margin is always better."""
    logp = torch.tensor([[5.0], [-5.0]], dtype=torch.float64, requires_grad=True)
    loss, _ = losses.dpo(logp, torch.zeros_like(logp), torch.ones_like(logp), 1.0)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient[0, 0] < 0 < gradient[1, 0]


def rewarded(*totals: float) -> TokenRewards:
    return TokenRewards(torch.tensor([[x, 0.0] for x in totals]), torch.ones(len(totals), 2, dtype=torch.bool))


def test_samples_are_ranked_two_by_two_and_ties_are_left_out() -> None:
    rollout = make_rollout(prompts=[[1]] * 6, completions=[[2, 3]] * 6)
    rollout = replace(rollout, sample_id_B=torch.tensor([8, 5, 4, 9, 6, 7]))  # any order, any part of the batch
    ranked = pairs.ranked(rollout, rewarded(1.0, 0.5, 0.0, 2.0, 1.0, 1.0))
    assert ranked.get("pair_B").tolist() == [9, 4, 5, 8, -1, -1]
    rows, share = pairs.adjacent(ranked.get("pair_B"))
    assert rows.tolist() == [1, 2, 3, 0] and share == 1
    rows, share = pairs.adjacent(torch.tensor([-1, -1, -1]))
    assert rows.tolist() == [0, 0] and share == 0


def preferred(rollout: Rollout) -> Rollout:
    return pairs.ranked(rollout, rewarded(1.0, 0.0, 0.0, 1.0))


def gradient(rollout: Rollout, micro_batch: int) -> tuple[dict[str, Tensor], float]:
    """The accumulated gradient of a step, and its loss."""
    policy, trainer, total = make_policy("llama"), DPO(0.3), 0.0
    for rows in [pairs.adjacent(rollout.get("pair_B"))[0]]:
        batch, rollout = pairs.assign(rollout, policy(rollout, {"logp"})).rows(rows), rollout.rows(rows)
    for start in range(0, len(rollout), micro_batch):
        part = torch.arange(start, start + micro_batch)
        loss, _ = trainer.loss(policy(rollout.rows(part), trainer.need), batch.rows(part))
        loss.backward()
        total += float(loss.detach())
    return {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}, total


def test_padding_and_micro_batches_change_nothing() -> None:
    expected, loss = gradient(preferred(make_rollout()), 4)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for rollout, size in (
        (make_rollout(), 2),
        (make_rollout(wider=3, fill=5), 4),
        (make_rollout(wider=3, fill=9), 2),
    ):
        found, total = gradient(preferred(rollout), size)
        assert total == pytest.approx(loss, rel=1e-5)
        scale = max(float(g.abs().max()) for g in expected.values())
        for name, g in expected.items():
            assert torch.allclose(found[name], g, rtol=1e-5, atol=1e-5 * scale), name


def test_a_torn_pair_is_noticed() -> None:
    rollout = preferred(make_rollout())
    batch = pairs.assign(rollout, make_policy("llama")(rollout, {"logp"}))
    zeros = torch.zeros(rollout.tokens_BT.shape)
    with pytest.raises(AssertionError, match="torn apart"):
        DPO(0.3).loss(PolicyOutput(logp_BT=zeros, ref_logp_BT=zeros), batch.rows(torch.tensor([0, 2, 1, 3])))


def same(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0] * len(prompts)


def test_a_step_without_any_pair_changes_nothing(tiny_config: Tree) -> None:
    tiny_config["rewards"] = {"same": {"type": "function", "path": "test_dpo:same"}}
    rows = metrics(rlkl.train(tiny_config, ["trainer.type=dpo"]))
    assert [row["preference/tied"] for row in rows[1:]] == [1.0, 1.0]
    assert [row["policy/grad_norm"] for row in rows[1:]] == [0.0, 0.0]
    assert rows[-1]["kl/sequence"] == 0


def test_the_rows_that_train_are_pairs_of_one_prompt(tiny_config: Tree) -> None:
    tiny_config["rollout"] |= {"prompts": 3, "samples_per_prompt": 4}
    config = settings.load(tiny_config, ["trainer.type=dpo"])
    lane = build(config)
    lane.place(launch.accelerator(config))
    rollout = loop.collect(lane, 1)
    rewards = lane.reward(rollout)
    rollout = pairs.ranked(rollout, rewards)
    ((rows, share),) = lane.minibatches(rollout, 1, 0)
    assert share == 1 and len(rows) > 0
    total_B = rewards.value_BT.sum(-1)[rows]
    assert bool((total_B[0::2] > total_B[1::2]).all())
    assert torch.equal(rollout.group_B[rows][0::2], rollout.group_B[rows][1::2])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.samples_per_prompt=3", r"rollout\.samples_per_prompt=3 with trainer\.type=dpo.*even number"),
        ("train.micro_batch=3", r"train\.micro_batch=3 with trainer\.type=dpo.*even number"),
        ("credit.horizon=1", r"credit\.horizon=1 with trainer\.type=dpo"),
        ("credit.baseline=none", r"credit\.baseline=none with trainer\.type=dpo"),
        ("credit.normaliser=token_mean", r"credit\.normaliser=token_mean with trainer\.type=dpo"),
        ("kl.beta=0", r"kl with trainer\.type=dpo: this loss holds kl\.beta itself"),
        ("kl.target=1", r"kl with trainer\.type=dpo: this loss holds kl\.beta itself"),
        ("kl.window=own", r"kl with trainer\.type=dpo: this loss holds kl\.beta itself"),
    ],
)
def test_what_means_nothing_is_refused(override: str, message: str, tiny_config: Tree) -> None:
    with pytest.raises(ValueError, match=message):
        settings.load(tiny_config, ["trainer.type=dpo", override])
    config = settings.load(tiny_config, ["trainer.type=dpo"])
    assert settings.load(dump(config)) == config


@pytest.mark.parametrize("estimator", ["exact", "k2"])
def test_a_further_kl_is_refused(estimator: str, tiny_config: Tree) -> None:
    tiny_config["kl"] = {"placement": "loss", "estimator": estimator}
    with pytest.raises(ValueError, match="a further KL is refused"):
        settings.load(tiny_config, ["trainer.type=dpo"])


def test_a_run_says_who_holds_beta(tiny_config: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    run = rlkl.train(tiny_config, ["trainer.type=dpo"])
    said = capsys.readouterr().out
    assert "KL: beta 0.05, held by the loss itself; no further penalty" in said and "KL guidance" not in said
    card = (Path(run) / "final" / "README.md").read_text(encoding="utf-8")
    assert "β = 0.05, held by the loss itself" in card and "2305.18290" in card
