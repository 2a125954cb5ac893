"""A completion ends with the token that completes a stop string in its text, whatever the tokens are."""

import string
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import Tree, metrics
from models import EOS, PROMPTS, VOCAB, build

from rlkl import samples, train
from rlkl.cli import main
from rlkl.evaluate import evaluate
from rlkl.policy import Policy
from rlkl.rewards.function import pay_at_end
from rlkl.sampling import Prompts, sample
from rlkl.types import End, Rollout

Decode = Callable[[list[int]], str]
# Tokens overlap, hold line breaks and halves of characters, so a stop string is cut in many ways.
PIECES = [b"a", b"b", b"ab", b"ba", b"\n", b"\n\n", b" ", b" a", "é".encode(), "é".encode()[:1], "é".encode()[1:]]
PIECES += ["☃".encode()[:2], "☃".encode()[2:], "a☃".encode(), b"b\na", b"", b"<eos>"]


def byte_level(ids: Sequence[int]) -> str:
    return b"".join(PIECES[i % len(PIECES)] for i in ids).decode("utf-8", "replace")


def strips_a_space(ids: Sequence[int]) -> str:
    """As a sentencepiece tokenizer, which takes the first token's leading space away."""
    return byte_level(ids).removeprefix(" ")


def marks_the_start(ids: Sequence[int]) -> str:
    """As a tokenizer whose first token reads otherwise than the same token later."""
    return "^" + byte_level(ids)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(build("llama"))


@pytest.fixture(scope="module")
def free(policy: Policy) -> Rollout:
    """The same samples with nothing to end them."""
    return drawn(policy, [], eos_ids=[])


def drawn(policy: Policy, stop: Sequence[str], decode: Decode = byte_level, **options: object) -> Rollout:
    chosen = {"samples_per_prompt": 20, "max_new_tokens": 24, "eos_ids": [EOS], "seed": 0, "step": 1} | options
    columns = {"prompt": [str(p) for p in PROMPTS]}
    return sample(policy, Prompts(PROMPTS, range(len(PROMPTS)), columns, decode), stop=stop, **chosen)


def expected_end(ids: list[int], stop: Sequence[str], decode: Decode) -> tuple[int, End]:
    """Length and end by definition: the whole text is decoded after every token."""
    for t, token in enumerate(ids):
        if token == EOS:
            return t + 1, End.EOS
        if any(s in decode(ids[: t + 1]) for s in stop):
            return t + 1, End.STOP
    return len(ids), End.LIMIT


STOPS = [["a"], ["^a"], ["\n\n"], ["é"], ["☃"], ["aba", "\n"], [" a"], ["b\nab", "é a"], ["a é", "☃b", "☃a"]]
RARE = [["abababab"], ["nowhere"]]


@pytest.mark.parametrize("decode", [byte_level, strips_a_space, marks_the_start])
@pytest.mark.parametrize("stop", STOPS + RARE, ids=repr)
def test_a_completion_ends_where_its_whole_text_first_holds_a_stop_string(
    policy: Policy, free: Rollout, stop: list[str], decode: Decode
) -> None:
    rollout = drawn(policy, stop, decode, micro_batch=30)
    texts, ends = rollout.texts(), []
    for i, ids in enumerate(free.completion_ids()):
        length, end = expected_end(ids, stop, decode)
        ends.append(end)
        assert rollout.completion_ids()[i] == ids[:length], "the last token is kept"
        assert (int(rollout.length_B[i]), int(rollout.end_B[i])) == (length, end)
        assert rollout.policy_mask_BT[i].sum() == length, "and it trains"
        text = decode(ids[: length - (end == End.EOS)])
        if end == End.STOP:
            first = min(text.find(s) for s in stop if s in text)
            assert texts[i] == text[:first] and not any(s in texts[i] for s in stop)
        else:
            assert texts[i] == text
    if stop not in RARE and (stop != ["^a"] or decode is marks_the_start):
        assert ends.count(End.STOP) > 3, "too few to mean anything"
    assert rollout.tokens_BT.shape[1] == int(rollout.length_B.max())
    same = rollout.behaviour_logp_BT - free.behaviour_logp_BT[:, : rollout.tokens_BT.shape[1]]
    assert float((same * rollout.policy_mask_BT).abs().max()) < 1e-5, "stopping changes no probability"


def test_eos_wins_where_its_own_text_completes_a_stop_string(policy: Policy) -> None:
    eos = next(i for i in range(VOCAB) if PIECES[i % len(PIECES)] == b"<eos>")
    rollout = drawn(policy, ["<eos>"], eos_ids=[eos])
    last = rollout.tokens_BT[torch.arange(len(rollout)), rollout.length_B - 1]
    assert ((rollout.end_B == End.EOS) == (last == eos)).all() and (rollout.end_B == End.EOS).any()
    others = (rollout.end_B == End.STOP).nonzero().flatten().tolist()
    assert others and all(PIECES[int(last[i]) % len(PIECES)] == b"<eos>" for i in others), "other tokens that read so"


def test_a_stop_string_completed_by_the_last_allowed_token_is_a_stop(policy: Policy, free: Rollout) -> None:
    i, at = next(
        (i, t)
        for i, ids in enumerate(free.completion_ids())
        for t in range(1, 8)
        if expected_end(ids, ["\n"], byte_level) == (t + 1, End.STOP)
    )
    rollout = drawn(policy, ["\n"], max_new_tokens=at + 1)
    assert int(rollout.length_B[i]) == at + 1 and rollout.end_B[i] == End.STOP


def test_only_a_short_tail_is_decoded_at_a_step_and_nothing_without_stop_strings(policy: Policy) -> None:
    seen: list[int] = []

    def counting(ids: list[int]) -> str:
        seen.append(len(ids))
        return "x" * len(ids)

    drawn(policy, [], counting)
    assert seen == []
    drawn(policy, ["é"], counting)
    assert seen and max(seen) <= 2 + 4
    assert len(seen) <= 80 * 24, "one decoding a step and open completion at most"


def test_a_sequence_reward_is_paid_at_the_token_that_completes_the_stop_string(policy: Policy) -> None:
    rollout = drawn(policy, ["a"])
    paid = pay_at_end(torch.ones(len(rollout)), rollout)
    assert torch.equal(paid.scored_BT.int().argmax(1), rollout.length_B - 1)


# ---- the whole way: rollout.stop in training, evaluation and samples


LETTERS = list(string.ascii_letters)


def no_letters(prompts: list[str], completions: list[str]) -> list[float]:
    assert not any(c in text for text in completions for c in LETTERS), "a reward sees no stop string"
    return [float(len(text)) for text in completions]


def test_runs_evaluations_and_samples_stop_alike(tiny_config: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config["rewards"]["varied"]["path"] = "test_stop:no_letters"
    tiny_config["rollout"] |= {"max_new_tokens": 8, "samples_per_prompt": 6}
    tiny_config["optimiser"]["learning_rate"] = 1e-6  # the same model throughout
    free = metrics(train(tiny_config, ["name=free", "rewards.varied.path=conftest:varied"]))
    tiny_config["rollout"]["stop"] = LETTERS
    run = train(tiny_config)
    rows = metrics(run)
    for name in ("policy/length", "policy/eval/length"):
        assert rows[-1][name] < free[-1][name]
    for name in ("policy/terminated", "policy/eval/terminated"):
        assert rows[-1][name] > free[-1][name], "a stop ends the episode as EOS does"
    capsys.readouterr()
    assert main(["sample", str(run), "--samples", "20"]) == 0
    said = [line.split(":", 1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(said) == 40 and not any(c in text for text in said for c in LETTERS)
    assert main(["eval", str(run), "--samples", "6"]) == 0


def test_an_evaluation_names_the_end(policy: Policy) -> None:
    columns = {"prompt": [str(p) for p in PROMPTS]}
    prompts = Prompts(PROMPTS, range(len(PROMPTS)), columns, byte_level)
    result = evaluate(
        policy,
        lambda rollout: pay_at_end(torch.ones(len(rollout)), rollout),
        prompts,
        samples_per_prompt=1,
        max_new_tokens=24,
        eos_ids=[EOS],
        stop=["a"],
        seed=0,
    )
    ends = result.rollout.end_B.tolist()
    assert [row["end"] for row in samples.rows(result, len(PROMPTS))] == [
        ["eos", "stop", "limit"][e] for e in ends
    ] and End.STOP in ends


@pytest.mark.parametrize("given", ['rollout.stop=[""]', "rollout.stop=x", "rollout.stop=[1]"])
def test_a_stop_that_is_no_list_of_texts_is_refused(
    given: str, tiny_config: Tree, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(str(tiny_config))
    assert main(["train", "c.yaml", given]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "rollout.stop" in said[0] and not (tmp_path / "runs").exists()
