"""Spans as a reward: paid once, causally, at hand-computed tokens; whole for likelihood trainers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_spans import CORPUS, bytes_to_unicode

from rlkl import RunError, rewards, settings
from rlkl.config import AnnotationsSource
from rlkl.data.annotated import Annotated, Span
from rlkl.data.spans import to_rollout
from rlkl.rewards.annotations import AnnotationReward
from rlkl.sampling import given
from rlkl.tasks import facts
from rlkl.tasks.pretrain import train_tokenizer
from rlkl.types import Rollout

TEXTS = [
    " Paris is the capital of Canada. Cuba has its capital in Havana.",
    " Lima is the capital of Peru. Lima is the capital of Peru. x",
    " Lomé is the capital of Togo.",
]
WEIGHTS = {"right": 1.0, "wrong": -1.0}
TOKENIZER = train_tokenizer(CORPUS + TEXTS * 2, 300)


def sampled(texts: list[str] = TEXTS, eos: bool = True) -> Rollout:
    """Completions as the policy samples them."""
    records = [Annotated(str(i), text, (), prompt="Q:") for i, text in enumerate(texts)]
    made = to_rollout(records, TOKENIZER, {}, eos_id=TOKENIZER.eos_token_id if eos else None)
    return replace(made, origin="policy", annotation_BT=None, annotated_BT=None)


def reward(labeller: str | None = "rlkl.tasks.facts:annotate", **fields: Any) -> AnnotationReward:
    return AnnotationReward(
        "spans", AnnotationsSource(type="annotations", labeller=labeller, **{"weights": WEIGHTS} | fields)
    )


def paid(result: Any, rollout: Rollout, row: int) -> list[tuple[str, float]]:
    """The text up to and including each token that is paid, and its reward."""
    ids = rollout.completion_ids()[row]
    return [(TOKENIZER.decode(ids[: t + 1]), float(v)) for t, v in enumerate(result.value_BT[row, : len(ids)]) if v]


def test_a_labelled_span_is_paid_once_at_the_token_that_makes_it_certain():
    rollout = sampled()
    result = reward()(rollout)
    assert paid(result, rollout, 0) == [(" Paris is the capital of Canada.", -1.0), (TEXTS[0], 1.0)]
    assert paid(result, rollout, 1) == [(" Lima is the capital of Peru.", 1.0)]
    assert paid(result, rollout, 2) == [(TEXTS[2], 1.0)]
    assert torch.equal(result.scored_BT, result.value_BT != 0)
    assert result.queries == 3


def test_a_labeller_is_asked_once_about_a_completion_that_is_paid_and_then_read_whole(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(facts, "annotate", lambda text, real=facts.annotate: [asked.append(text), real(text)][1])
    source, rollout = reward(), sampled()
    source(rollout)
    source.annotate(rollout)
    assert asked == rollout.texts()
    source(sampled())  # as good, but another rollout
    assert len(asked) == 6


def test_rewards_of_the_facts_labeller_are_causal_and_those_paid_at_once_are_not():
    texts = [text for _, text in facts.corpus(64, seed=3)]
    for rollout in (sampled(texts), sampled([*texts, " Paris is the capital of Canada"], eos=False)):
        reward().probe(rollout)
        with pytest.raises(ValueError, match=r"reward spans: not causal: .* \(rewards\.spans\.lookahead=0: raise it"):
            reward(lookahead=0).probe(rollout)


def last_word(text: str) -> list[Span]:
    """A labeller that looks at no text behind its spans, and calls every capital letter right."""
    return [Span(i, i + 1, "right", 0.5) for i, c in enumerate(text) if c.isupper()]


def as_mappings(text: str) -> list[dict[str, Any]]:
    return [{"start": i, "end": i + 1, "label": "right"} for i, c in enumerate(text) if c.isupper()]


def byte_by_byte(text: str) -> Rollout:
    """A completion of which every byte is a token, ended by the limit."""
    ids = [TOKENIZER.convert_tokens_to_ids(bytes_to_unicode()[b]) for b in text.encode()]
    return given([[0]], [ids], columns={"prompt": ["x"]}, decode=TOKENIZER.decode)


@pytest.mark.parametrize(("lookahead", "expected"), [(0, ["P", "PaR"]), (1, ["Pa", "PaR"]), (2, ["PaR", "PaR"])])
def test_the_lookahead_delays_the_payment_up_to_the_last_token(lookahead, expected):
    rollout = byte_by_byte("PaR")
    source = reward("test_annotation_reward:last_word", lookahead=lookahead)
    source.probe(rollout)
    result = source(rollout)
    got = [(text, value) for text, value in paid(result, rollout, 0)]
    assert got == ([(expected[0], 0.5), (expected[1], 0.5)] if expected[0] != expected[1] else [(expected[0], 1.0)])


def test_a_character_of_several_tokens_is_paid_at_its_last():
    rollout = byte_by_byte("Éa")
    source = reward("test_annotation_reward:last_word", lookahead=0)
    source.probe(rollout)
    assert source(rollout).value_BT.tolist() == [[0.0, 0.5, 0.0]]
    assert source.annotate(rollout).annotation_BT.tolist() == [[0.5, 0.5, 0.0]]


def test_a_labeller_may_give_mappings_and_may_label_what_ends_the_text():
    rollout = sampled(["PaR"])
    result = reward("test_annotation_reward:as_mappings")(rollout)
    assert float(result.value_BT.sum()) == 2.0
    assert float(result.value_BT[0, rollout.length_B[0] - 1]) == 1.0, "the end of the text is seen at its last token"


def test_whole_spans_become_annotations_of_tokens():
    rollout = sampled()
    annotated = reward().annotate(rollout)
    ids = rollout.completion_ids()[0]
    written = [TOKENIZER.decode([i]) for i, w in zip(ids, annotated.annotation_BT[0].tolist(), strict=False) if w < 0]
    assert "".join(written) == " Canada"
    assert torch.equal(annotated.annotated_BT, annotated.annotation_BT != 0)
    assert annotated.annotation_BT.shape == rollout.tokens_BT.shape
    assert annotated.rows(torch.tensor([1])).texts() == [TEXTS[1]]


def test_tokens_without_a_span_are_masked_or_weigh_as_given():
    rollout = sampled()
    masked, given = reward().annotate(rollout), reward(unmarked=0.25).annotate(rollout)
    bare = rollout.policy_mask_BT & ~masked.annotated_BT
    assert bare.any() and torch.equal(given.annotated_BT, rollout.policy_mask_BT)
    assert torch.equal(given.annotation_BT, masked.annotation_BT + 0.25 * bare)
    assert torch.equal(reward(unmarked=0.25)(rollout).value_BT, reward()(rollout).value_BT), "it is no reward"


def test_only_policy_tokens_are_paid():
    rollout = sampled()
    muted = replace(rollout, policy_mask_BT=torch.zeros_like(rollout.policy_mask_BT))
    for result in (reward()(muted), reward(unmarked=1.0).annotate(muted)):
        tensors = [
            getattr(result, name)
            for name in ("value_BT", "scored_BT", "annotation_BT", "annotated_BT")
            if hasattr(result, name)
        ]
        assert not any(bool(x.any()) for x in tensors)


# Stored spans


def stored() -> Rollout:
    marked = (Span(25, 31, "wrong"), Span(56, 63, "right", 2.0), Span(59, 63, "wrong"))
    records = [Annotated("a", TEXTS[0], marked, prompt="Q:"), Annotated("b", TEXTS[2], (), prompt="Q:")]
    assert TEXTS[0][25:31] == "Canada" and TEXTS[0][56:63] == " Havana"
    return to_rollout(records, TOKENIZER, WEIGHTS, eos_id=TOKENIZER.eos_token_id)


def test_what_a_person_marked_is_paid_at_its_last_token():
    rollout = stored()
    result = reward(None)(rollout)
    assert paid(result, rollout, 0) == [(" Paris is the capital of Canada", -1.0), (TEXTS[0][:-1], 1.0)]
    assert not result.value_BT[1].any()
    assert result.queries == 0


def test_what_one_of_two_people_marked_is_paid_by_half():
    both = [
        Span(25, 31, "wrong", annotator="ann"),
        Span(25, 31, "wrong", annotator="bob"),
        Span(56, 63, "right", annotator="bob"),
    ]
    records = [
        Annotated("a", TEXTS[0], tuple(both), prompt="Q:", annotators=["ann", "bob"]),
        Annotated("b", "x", (), prompt="Q:"),
    ]
    rollout = to_rollout(records, TOKENIZER, WEIGHTS, eos_id=TOKENIZER.eos_token_id)
    expected = [(" Paris is the capital of Canada", -1.0), (TEXTS[0][:-1], 0.5)]
    assert paid(reward(None)(rollout), rollout, 0) == expected
    again = reward(None).annotate(replace(rollout, annotation_BT=None, annotated_BT=None))
    assert torch.equal(again.annotation_BT, rollout.annotation_BT)


def test_stored_spans_give_the_same_annotation_again():
    rollout = stored()
    bare = replace(rollout, annotation_BT=None, annotated_BT=None)
    again = reward(None).annotate(bare)
    assert torch.equal(again.annotation_BT, rollout.annotation_BT)
    assert torch.equal(again.annotated_BT, rollout.annotated_BT)


def test_new_samples_have_no_stored_spans():
    rollout = replace(stored(), origin="policy")
    with pytest.raises(RunError, match="samples of the policy have no stored spans; name a labeller"):
        reward(None)(rollout)
    with pytest.raises(ValueError, match=r"stored spans.* \(on a few samples before the first step\)"):
        reward(None).probe(rollout)


# Mistakes


def raises(text: str) -> list[Span]:
    raise KeyError("oops")


def outside(text: str) -> list[Span]:
    return [Span(0, len(text) + 1, "right")]


def unknown(text: str) -> list[Span]:
    return [Span(0, 1, "odd")]


def heavy(text: str) -> list[Span]:
    return [Span(0, 1, "right", float("nan"))]


def pairs(text: str) -> list[tuple[int, int]]:
    return [(0, 1)]


@pytest.mark.parametrize(
    ("labeller", "said"),
    [
        ("raises", r"reward spans: sample 0: KeyError: 'oops'"),
        ("outside", r"sample 0: Span\(.*\) is no span of its \d+ characters; correct start and end"),
        ("unknown", r"sample 0: no weight for label 'odd'; add it to rewards\.spans\.weights \(right, wrong\)"),
        ("heavy", r"sample 0: a span weighs nan; it must be a finite number"),
        ("pairs", r"sample 0: \(0, 1\) is no span; a span has start and end"),
    ],
)
def test_a_labeller_that_fails_stops_the_run_and_is_named(labeller, said):
    source = reward(f"test_annotation_reward:{labeller}")
    with pytest.raises(RunError, match=said):
        source(sampled())
    with pytest.raises(ValueError, match="before the first step"):
        source.probe(sampled())


CONFIG = {
    "name": "x",
    "model": {"type": "facts"},
    "data": {"type": "facts"},
    "trainer": {"type": "reinforce"},
    "rewards": {"spans": {"type": "annotations", "labeller": "rlkl.tasks.facts:annotate", "weights": WEIGHTS}},
}


def test_the_source_is_built_from_a_configuration():
    config = settings.load(CONFIG, ["rewards.spans.weights.wrong=-3", "rewards.spans.weight=2"])
    result = rewards.build(config.rewards)(sampled())
    assert result.value_BT.sum(1).tolist() == [2 * (1 - 3), 2.0, 2.0]
    assert result.shares["spans"].sum(1).tolist() == [-2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rewards.spans.weights={}", r"rewards\.spans\.weights"),
        ("rewards.spans.weights.wrong=bad", r"rewards\.spans\.weights\.wrong='bad'"),
        ("rewards.spans.lookahead=-1", r"rewards\.spans\.lookahead=-1"),
        ("rewards.spans.labeler=a:b", r"rewards\.spans\.labeler: unknown key, did you mean rewards\.spans\.labeller\?"),
        ("rewards.spans.labeller=facts", r"rewards\.spans\.labeller='facts'"),
    ],
)
def test_mistakes_in_the_section_are_named(override, said):
    with pytest.raises(ValueError, match=said):
        settings.load(CONFIG, [override])


def test_stored_spans_need_no_lookahead():
    with pytest.raises(ValueError, match="lookahead=3 without labeller: a stored span is paid at its last token"):
        settings.load(CONFIG, ["rewards.spans.labeller=null", "rewards.spans.lookahead=3"])
