"""Rows of samples.jsonl: each token's text and numbers."""

import json
from collections.abc import Sequence

import pytest
import torch
from conftest import Tree, metrics
from models import EOS, PROMPTS, build

import rlkl
from rlkl import samples, settings
from rlkl.config import Config
from rlkl.data.spans import Decoded
from rlkl.evaluate import Evaluation, evaluate
from rlkl.policy import Policy
from rlkl.sampling import Prompts
from rlkl.types import Rollout, TokenRewards

BYTES = [b"a", b" b", "☃".encode()[:1], "☃".encode()[1:2], "☃".encode()[2:], "é".encode(), b"<eos>", b"\xff"]
PAID = 3.0


def decode(ids: Sequence[int]) -> str:
    return b"".join(BYTES[i % len(BYTES)] for i in ids).decode("utf-8", "replace")


def even(rollout: Rollout) -> TokenRewards:
    """Even tokens pay 3."""
    value_BT = PAID * (rollout.tokens_BT % 2 == 0) * rollout.policy_mask_BT
    return TokenRewards(value_BT, rollout.policy_mask_BT, {"even": value_BT}, len(rollout))


@pytest.fixture(scope="module")
def result() -> Evaluation:
    model = build("llama")
    policy = Policy(model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    prompts = Prompts(PROMPTS, range(len(PROMPTS)), {"prompt": [str(p) for p in PROMPTS]}, decode)
    return evaluate(policy, even, prompts, samples_per_prompt=3, max_new_tokens=12, eos_ids=[EOS], seed=0)


def configured(tiny_config: Tree, **changes: Tree) -> Config:
    return settings.load({**tiny_config, **changes})


@pytest.mark.parametrize(
    ("ids", "text", "expected"),
    [
        ([0, 2, 3, 4, 1], "a☃ b", ["a", "", "", "☃", " b"]),
        ([0, 6], "a", ["a", ""]),  # EOS is not in the text
        ([0, 1, 0], "a ", ["a", " ", ""]),  # a stop string has taken the rest
        ([0, 2], "a\ufffd", ["a", "\ufffd"]),  # a character that never ends
        ([2, 3], "\ufffd", ["\ufffd", ""]),
        ([7, 0], "\ufffda", ["\ufffd", "a"]),
        ([6], "", [""]),
    ],
)
def test_pieces_are_what_each_token_writes(ids, text, expected):
    assert Decoded(ids, decode, text).pieces() == expected


def test_every_row_has_a_number_a_token_and_texts_that_are_the_completion(result):
    rows = list(samples.rows(result, 3))
    assert [row["prompt"] for row in rows] == [str(p) for p in PROMPTS[:3]]
    for row, index in zip(rows, (0, 3, 6), strict=True):
        tokens, length = row["tokens"], int(result.rollout.length_B[index])
        assert "".join(tokens["text"]) == row["completion"]
        assert {name: len(numbers) for name, numbers in tokens.items()} == dict.fromkeys(
            ("text", "kl", "logp", "ref_logp", "reward/even"), length
        )
        assert sum(tokens["kl"]) == pytest.approx(row["kl"], rel=1e-3)
        assert sum(tokens["reward/even"]) == row["reward/even"]


def test_log_probs_are_those_under_which_the_tokens_were_drawn(result):
    mask_BT = result.rollout.policy_mask_BT
    drawn_BT = result.rollout.get("behaviour_logp_BT")
    assert torch.allclose(result.logp_BT[mask_BT], drawn_BT[mask_BT], atol=1e-5)
    assert not torch.allclose(result.logp_BT[mask_BT], result.ref_logp_BT[mask_BT], atol=1e-3)


def test_the_advantage_is_the_run_s_return_less_that_of_the_prompt_s_other_samples(result, tiny_config):
    config = configured(tiny_config, credit={"horizon": 1}, kl={"beta": 0.5, "window": "own"})
    paid_BT = result.rewards.value_BT - 0.5 * (result.logp_BT - result.ref_logp_BT) * result.rollout.policy_mask_BT
    adv_BT = samples.advantages(result, config, 0.5)
    assert adv_BT is not None
    first = paid_BT[:3, 0]  # three samples of the first prompt at their first token
    expected = [float(x - (first.sum() - x) / 2) for x in first]
    assert adv_BT[:3, 0].tolist() == pytest.approx(expected, rel=1e-4)


def test_the_advantage_of_token_likelihood_is_its_window_of_rewards(result, tiny_config):
    likelihood = {"type": "token_likelihood", "loss": "signed"}
    kl = {"placement": "loss", "estimator": "exact_local"}
    config = configured(tiny_config, trainer=likelihood, credit={"horizon": 2}, kl=kl)
    paid = result.rewards.value_BT[0, : int(result.rollout.length_B[0])].tolist()
    adv_BT = samples.advantages(result, config, 1.0)
    assert adv_BT is not None
    assert adv_BT[0, : len(paid)].tolist() == [a + b for a, b in zip(paid, [*paid[1:], 0.0], strict=True)]


def test_a_run_writes_them(tiny_config):
    folder = rlkl.train({**tiny_config, "log": {"with": [], "samples": 1}})
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len([row for row in metrics(folder) if "kl/sequence" in row])
    assert all("".join(row["tokens"]["text"]) == row["completion"] for row in rows)
    assert all(len(row["tokens"]["advantage"]) == len(row["tokens"]["text"]) for row in rows)
