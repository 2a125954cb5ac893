"""Rewards: functions in the manner of TRL, token rewards that must be causal, their sum, and word overlap."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkl import RunError, rewards
from rlkl.config import FunctionSource
from rlkl.rewards import WeightedSum
from rlkl.rewards.function import FunctionReward, pay_at_end, probe_causality
from rlkl.rewards.overlap import word_f1
from rlkl.types import End, Rollout, TokenRewards

EOS = 0
GIVEN: dict[str, Any] = {}


def rollout(
    tokens: Sequence[Sequence[int]], columns: dict[str, list[Any]] | None = None, mask: Tensor | None = None
) -> Rollout:
    """Completions of one-token prompts; one that holds ``EOS`` ends with it, any other at the limit."""
    length_B = torch.tensor([len(row) for row in tokens])
    tokens_BT = torch.zeros(len(tokens), int(length_B.max()), dtype=torch.long)
    for i, row in enumerate(tokens):
        tokens_BT[i, : len(row)] = torch.tensor(row)
    own_BT = torch.arange(tokens_BT.shape[1]) < length_B[:, None]
    mask_BT = own_BT if mask is None else own_BT & mask
    return Rollout(
        prompt_BP=torch.ones(len(tokens), 1, dtype=torch.long),
        prompt_length_B=torch.ones(len(tokens), dtype=torch.long),
        tokens_BT=tokens_BT,
        length_B=length_B,
        policy_mask_BT=mask_BT,
        end_B=torch.tensor([End.EOS if row[-1] == EOS else End.LIMIT for row in tokens]),
        behaviour_logp_BT=torch.zeros(tokens_BT.shape),
        group_B=torch.arange(len(tokens)) // 2,
        sample_id_B=torch.arange(len(tokens)) + 10,
        columns={"prompt": [f"p{i // 2}" for i in range(len(tokens))], **(columns or {})},
        decode=lambda ids: " ".join(map(str, ids)),
    )


def source(function: str, level: str = "sequence") -> FunctionReward:
    path = function if ":" in function else f"test_rewards:{function}"
    return FunctionReward("judge", FunctionSource(type="function", path=path, level=level))  # type: ignore[arg-type]


# The functions of a user, named by path.


def keywords(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    GIVEN.update(prompts=prompts, completions=completions, columns=columns)
    return [float(i) for i in range(len(prompts))]


def named(completions: list[str], prompts: list[str], gold: list[str]) -> list[float]:
    GIVEN.update(prompts=prompts, completions=completions, gold=gold)
    return [1.0] * len(prompts)


def as_tensor(prompts: list[str], completions: list[str]) -> Tensor:
    return torch.tensor([1.0, 2.0])


def scores(prompts: list[str], completions: list[str]) -> Any:
    return GIVEN["scores"]


def dense(rollout: Rollout) -> Any:
    return GIVEN["dense"](rollout)


def raises_at_the_second(prompts: list[str], completions: list[str], gold: list[str]) -> list[float]:
    if "b" in gold:
        raise LookupError("no verdict")
    return [0.0] * len(prompts)


def raises_on_many(prompts: list[str], completions: list[str]) -> list[float]:
    if len(prompts) > 1:
        raise MemoryError("too many")
    return [0.0]


def test_a_function_is_given_prompts_texts_without_eos_and_the_other_columns():
    paid = source("keywords")(rollout([[5, 6, EOS], [7, 8]], {"gold": ["a", "b"], "id": [1, 2]}))
    assert GIVEN["prompts"] == ["p0", "p0"]
    assert GIVEN["completions"] == ["5 6", "7 8"]
    assert GIVEN["columns"] == {"gold": ["a", "b"], "id": [1, 2]}
    assert paid.value_BT.sum(-1).tolist() == [0.0, 1.0]
    assert paid.queries == 2


def test_a_function_without_keyword_arguments_is_given_only_the_columns_that_it_names():
    source("named")(rollout([[5], [6]], {"gold": ["a", "b"], "id": [1, 2]}))
    assert GIVEN["gold"] == ["a", "b"]
    assert GIVEN["prompts"] == ["p0", "p0"]
    assert GIVEN["completions"] == ["5", "6"]


def test_scores_may_come_as_a_tensor():
    assert source("as_tensor")(rollout([[5], [6]])).value_BT.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "high", [1.0, 2.0], 1j], ids=repr)
def test_a_score_that_is_no_finite_number_names_source_and_sample(value):
    GIVEN["scores"] = [0.5, value]
    with pytest.raises(RunError, match=r"reward judge: sample 11 got .*finite"):
        source("scores")(rollout([[5], [6]]))


@pytest.mark.parametrize(
    ("given", "says"),
    [([1.0], "1 scores for 2"), ([1.0] * 3, "3 scores for 2"), (0.5, "a float"), (None, "a NoneType")],
)
def test_there_is_one_score_for_every_completion(given, says):
    GIVEN["scores"] = given
    with pytest.raises(RunError, match=f"reward judge: returned {says}"):
        source("scores")(rollout([[5], [6]]))


def test_a_function_that_raises_names_the_sample_on_which_it_does():
    with pytest.raises(RunError, match=r"reward judge: LookupError: no verdict \(at sample 11\)"):
        source("raises_at_the_second")(rollout([[5], [6], [7]], {"gold": ["a", "b", "c"]}))
    with pytest.raises(RunError, match=r"MemoryError: too many \(only on the whole batch\)"):
        source("raises_on_many")(rollout([[5], [6]]))


def test_a_score_is_paid_at_eos_or_at_the_limit():
    paid = pay_at_end(torch.tensor([2.0, 3.0, 4.0]), rollout([[5, EOS], [5, 6, 7, 8], [EOS]]))
    assert paid.value_BT.tolist() == [[0, 2, 0, 0], [0, 0, 0, 3], [4, 0, 0, 0]]
    assert torch.equal(paid.scored_BT, paid.value_BT != 0)
    assert paid.queries == 3


def test_a_score_is_paid_at_the_last_token_of_the_policy_before_those_of_an_environment():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    paid = pay_at_end(torch.tensor([2.0, 3.0, 4.0]), rollout([[5, 6, 7, 8], [5, 6, 7, EOS], [5, 6, 7]], mask=mask))
    assert paid.value_BT.tolist() == [[0, 2, 0, 0], [0, 0, 0, 3], [4, 0, 0, 0]]


def test_a_completion_without_any_token_of_the_policy_is_not_paid():
    paid = pay_at_end(torch.tensor([2.0]), rollout([[5, 6]], mask=torch.zeros(1, 2, dtype=torch.bool)))
    assert not paid.value_BT.any()
    assert not paid.scored_BT.any()


def test_a_score_of_zero_is_scored():
    paid = pay_at_end(torch.tensor([0.0]), rollout([[5, EOS]]))
    assert paid.scored_BT.tolist() == [[False, True]]


def test_a_token_function_is_paid_where_the_policy_wrote():
    batch = rollout([[5, 6, 7], [8, EOS]], mask=torch.tensor([[1, 0, 1], [1, 1, 1]]).bool())
    GIVEN["dense"] = lambda r: r.tokens_BT + 1
    paid = source("dense", "token")(batch)
    assert paid.value_BT.tolist() == [[6, 0, 8], [9, 1, 0]]
    assert torch.equal(paid.scored_BT, batch.policy_mask_BT)
    assert paid.queries == 2


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda r: torch.zeros(2), r"returned shape \[2\] for tokens \[2, 3\]"),
        (lambda r: torch.zeros(3, 2), r"returned shape \[3, 2\] for tokens \[2, 3\]"),
        (lambda r: torch.full((2, 3), float("nan")), "sample 10 got nan at token 0"),
        (lambda r: torch.tensor([[0.0, 0, 0], [0, float("inf"), 0]]), "sample 11 got inf at token 1"),
        (lambda r: None, "reward judge"),
        (lambda r: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["too few", "transposed", "NaN", "infinite", "None", "raises"],
)
def test_a_token_function_that_fails_names_source_and_sample(answer, says):
    GIVEN["dense"] = answer
    with pytest.raises(RunError, match=says):
        source("dense", "token")(rollout([[5, 6, 7], [8, 9, 1]]))


def test_whole_numbers_and_truth_values_are_rewards_too():
    batch = rollout([[5, 6], [7, 7]])
    for answer in (lambda r: r.tokens_BT > 5, lambda r: (r.tokens_BT > 5).long(), lambda r: (r.tokens_BT > 5).double()):
        GIVEN["dense"] = answer
        reward = source("dense", "token")
        reward.probe(batch)
        assert reward(batch).value_BT.tolist() == [[0, 1], [1, 1]]
        assert reward(batch).value_BT.is_floating_point()


# Causality.

COMPLETIONS = [[5, 6, 7, 8, 9, 3, EOS], [4, 4, 9, 2, 6, 5, 1, 3], [3, 8], [7, 1, 2, 6, 2], [EOS]]


def last(r: Rollout) -> Tensor:
    """Where a completion ends."""
    return torch.arange(r.tokens_BT.shape[1]) == r.length_B[:, None] - 1


def real(r: Rollout) -> Tensor:
    return torch.arange(r.tokens_BT.shape[1]) < r.length_B[:, None]


NOT_CAUSAL: dict[str, Callable[[Rollout], Tensor]] = {
    "a score of the whole spread backwards": lambda r: (r.tokens_BT * real(r)).sum(-1, keepdim=True) * real(r),
    "the length": lambda r: real(r) / r.length_B[:, None],
    "a gate on the next token": lambda r: (r.tokens_BT.roll(-1, 1) > 4) * real(r).roll(-1, 1) * 1.0,
    "a gate on the last token": lambda r: ((r.tokens_BT * last(r)).sum(-1, keepdim=True) % 2) * real(r),
    "reward to go": lambda r: (r.tokens_BT * real(r)).flip(1).cumsum(1).flip(1) * 1.0,
    "how it ended": lambda r: (r.end_B == End.EOS)[:, None] * real(r) * 1.0,
    "a hindsight only a hundredth strong": lambda r: real(r) + 0.01 * (r.tokens_BT * real(r)).sum(-1, keepdim=True),
    "a normalised score": lambda r: r.tokens_BT / (r.tokens_BT * real(r)).sum(-1, keepdim=True).clamp(min=1),
}
CAUSAL: dict[str, Callable[[Rollout], Tensor]] = {
    "each token": lambda r: (r.tokens_BT == 6) * 1.0,
    "a running count": lambda r: (r.tokens_BT == 6).cumsum(1) * 1.0,
    "the position": lambda r: torch.arange(r.tokens_BT.shape[1]).expand(r.tokens_BT.shape) * 1.0,
    "a gate on earlier tokens": lambda r: (r.tokens_BT.cumsum(1) - r.tokens_BT > 9) * 1.0,
    "a score paid at the end": lambda r: (r.tokens_BT * real(r)).sum(-1, keepdim=True) * last(r) * 1.0,
    "the length paid at the end": lambda r: r.length_B[:, None] * last(r) * 1.0,
    "how it ended, paid at the end": lambda r: (r.end_B == End.EOS)[:, None] * last(r) * 1.0,
    "nothing": lambda r: torch.zeros(r.tokens_BT.shape),
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_token_function_that_reads_later_tokens_is_refused(name):
    GIVEN["dense"] = NOT_CAUSAL[name]
    with pytest.raises(ValueError, match=r"reward judge: not causal: .*pay it at the last token that it reads"):
        source("dense", "token").probe(rollout(COMPLETIONS))


@pytest.mark.parametrize("name", CAUSAL)
def test_an_honest_token_function_passes(name):
    GIVEN["dense"] = CAUSAL[name]
    reward = source("dense", "token")
    reward.probe(rollout(COMPLETIONS))
    assert reward(rollout(COMPLETIONS)).queries == len(COMPLETIONS)


def test_the_refusal_names_a_token_whose_reward_moved():
    def gate(r: Rollout) -> Tensor:
        return ((torch.arange(8) == 1) & (r.tokens_BT[:, 6:7] == 1)) * 1.0

    batch = rollout(COMPLETIONS)
    with pytest.raises(ValueError, match="the reward of token 1 of sample 11"):
        probe_causality(gate, gate(batch), batch, "judge")


def test_a_score_of_the_sequence_needs_no_probe():
    GIVEN["scores"] = None
    batch = rollout(COMPLETIONS)
    source("scores").probe(batch)
    with pytest.raises(RunError):  # asked for scores, the same function fails
        source("scores")(batch)


def test_a_function_that_fails_in_the_probe_is_a_mistake_before_the_run():
    GIVEN["dense"] = lambda r: torch.zeros(2)
    with pytest.raises(ValueError, match="returned shape"):
        source("dense", "token").probe(rollout(COMPLETIONS))


# Their sum.


def constant(value: float, columns: Sequence[int], queries: int) -> Callable[[Rollout], TokenRewards]:
    def reward(r: Rollout) -> TokenRewards:
        scored_BT = torch.zeros(r.tokens_BT.shape, dtype=torch.bool)
        scored_BT[:, list(columns)] = True
        return TokenRewards(value * scored_BT, scored_BT, queries=queries)

    return reward


def test_rewards_add_up_by_weight_and_keep_what_each_gave():
    reward = WeightedSum({"a": (constant(2.0, [0], 3), 0.5), "b": (constant(1.0, [0, 2], 4), -2.0)})
    total = reward(rollout([[5, 6, 7]]))
    assert total.value_BT.tolist() == [[-1.0, 0.0, -2.0]]
    assert total.scored_BT.tolist() == [[True, False, True]]
    assert total.shares["a"].tolist() == [[2.0, 0.0, 0.0]]
    assert total.shares["b"].tolist() == [[1.0, 0.0, 1.0]]
    assert total.queries == 7


def test_a_source_of_weight_zero_is_watched():
    total = WeightedSum({"a": (constant(2.0, [0], 1), 1.0), "b": (constant(9.0, [1], 1), 0.0)})(rollout([[5, 6]]))
    assert total.value_BT.tolist() == [[2.0, 0.0]]
    assert total.shares["b"].tolist() == [[0.0, 9.0]]
    assert total.scored_BT.tolist() == [[True, False]]  # what is watched assigns no credit
    assert total.queries == 1


def test_the_weight_of_the_configuration_counts():
    config = FunctionSource(type="function", path="test_rewards:as_tensor", weight=3.0)
    total = rewards.build({"a": config})(rollout([[5], [6]]))
    assert total.value_BT.tolist() == [[3.0], [6.0]]
    assert total.shares["a"].tolist() == [[1.0], [2.0]]


def test_sources_of_different_precision_add_up():
    GIVEN["dense"] = lambda r: torch.ones(r.tokens_BT.shape, dtype=torch.float64)
    total = WeightedSum({"a": (source("dense", "token"), 1.0), "b": (source("as_tensor"), 1.0)})
    assert total(rollout([[5, 6], [7, EOS]])).value_BT.tolist() == [[1.0, 2.0], [1.0, 3.0]]


def test_the_sum_probes_all_its_sources():
    GIVEN["dense"] = NOT_CAUSAL["the length"]
    sources = {"a": (constant(1.0, [0], 1), 1.0), "judge": (source("dense", "token"), 1.0)}
    with pytest.raises(ValueError, match="reward judge: not causal"):
        WeightedSum(sources).probe(rollout(COMPLETIONS))


def test_a_permutation_of_the_batch_permutes_the_rewards():
    batch = rollout(COMPLETIONS)
    order = torch.tensor([3, 0, 4, 2, 1])
    GIVEN["dense"] = CAUSAL["a running count"]
    for reward in (source("dense", "token"), source("lengths")):
        plain, moved = reward(batch).value_BT, reward(batch.rows(order)).value_BT
        assert torch.equal(plain[order], moved)


def lengths(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def test_padding_changes_no_reward():
    batch = rollout(COMPLETIONS)
    wide = torch.full((len(COMPLETIONS), 11), 6)
    wide[:, :8] = torch.where(real(batch), batch.tokens_BT, 6)
    padded = replace(
        batch,
        tokens_BT=wide,
        policy_mask_BT=torch.arange(11) < batch.length_B[:, None],
        behaviour_logp_BT=torch.zeros(wide.shape),
    )
    GIVEN["dense"] = CAUSAL["each token"]
    for reward in (source("dense", "token"), source("lengths")):
        assert torch.equal(reward(padded).value_BT[:, :8], reward(batch).value_BT)
        assert not reward(padded).value_BT[:, 8:].any()


# Word overlap.


@pytest.mark.parametrize(
    ("completion", "gold", "f1"),
    [
        ("the red fox", "the red fox", 1.0),
        ("The Red, fox!", "the red fox", 1.0),
        ("a red fox", "the red fox", 2 / 3),
        ("fox", "the red fox", 0.5),
        ("fox fox fox", "fox", 0.5),
        ("one two", "three", 0.0),
        ("", "three", 0.0),
        ("three", "", 0.0),
        ("", "", 0.0),
        ("10 CAFÉS", "10 cafés", 1.0),
        ("b a", "a b", 1.0),
    ],
)
def test_word_f1_by_hand(completion, gold, f1):
    assert word_f1(["p"], [completion], [gold]) == [pytest.approx(f1, abs=1e-12)]


def test_word_f1_is_symmetric_and_scores_in_order():
    assert word_f1(["p", "p"], ["a b c", "x"], ["a d", "x"]) == [pytest.approx(0.4), 1.0]
    assert word_f1(["p"], ["a d"], ["a b c"]) == [pytest.approx(0.4)]


def test_word_f1_reads_the_column_gold():
    paid = source("rlkl.rewards.overlap:word_f1")(rollout([[5, 6], [7]], {"gold": ["5", "7"], "id": [0, 1]}))
    assert paid.value_BT.sum(-1).tolist() == [pytest.approx(2 / 3), 1.0]
