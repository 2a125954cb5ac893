"""Spans to tokens: by hand on awkward characters, and by brute force over bytes on random ones."""

import math
import unicodedata
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from annotations import TEXT, spans
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors

from rlkl.data.annotated import Annotated, Span
from rlkl.data.spans import Decoded, to_rollout, token_weights
from rlkl.tasks.pretrain import train_tokenizer
from rlkl.types import End

CORPUS = ["Paris is the capital of Canada. ", "naïve café 日本 😀 ", "Costa Rica "] * 3
WEIGHTS = {"right": 1.0, "wrong": -1.0, "é=😀": 0.25}


@cache
def make(kind: str = "plain") -> Any:
    """A byte-level tokenizer: plain, one that normalises, or one whose offsets leave spaces out."""
    tokenizer = train_tokenizer(CORPUS, 300)
    if "nfc" in kind:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    if "trimmed" in kind:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def record(completion: str, *marked: Span, **fields: Any) -> Annotated:
    return Annotated("1", completion, marked, prompt="Q:", **fields)


def span_of(completion: str, part: str, label: str = "wrong", weight: float = 1.0) -> Span:
    start = completion.index(part)
    return Span(start, start + len(part), label, weight)


def marked(tokenizer: Any, one: Annotated, **options: Any) -> list[str]:
    """The marked tokens, as text."""
    result = token_weights(one, tokenizer, WEIGHTS, **options)
    return [tokenizer.decode([i]) for i, m in zip(result.ids, result.marked_T.tolist(), strict=True) if m]


def both(tokenizer: Any, one: Annotated, **options: Any) -> list[list[str]]:
    """What is marked when the completion is tokenised, and when its tokens are known."""
    ids = tokenizer(one.completion, add_special_tokens=False)["input_ids"]
    return [marked(tokenizer, one, **options), marked(tokenizer, replace(one, token_ids=ids), **options)]


@pytest.mark.parametrize("kind", ["plain", "nfc", "trimmed"])
def test_a_token_with_a_leading_space_is_marked_by_its_word(kind):
    text = "Paris is the capital of Canada."
    assert both(make(kind), record(text, span_of(text, "Canada"))) == [[" Canada"]] * 2
    assert both(make(kind), record(text, span_of(text, "na"))) == [[" Canada"]] * 2
    assert both(make(kind), record(text, span_of(text, " is"))) == [[" is"]] * 2
    assert both(make(kind), record(text, span_of(text, " "))) == [[" is"]] * 2


@pytest.mark.parametrize("kind", ["plain", "nfc", "trimmed"])
@pytest.mark.parametrize("character", ["ö", "語", "𝄞"])
def test_every_token_that_writes_a_part_of_a_character_is_marked(kind, character):
    text = f"x{character}{character}y"
    tokenizer = make(kind)
    size = len(character.encode())
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 2 + 2 * size, "this test is about characters of several tokens"
    for start in (1, 2):
        one = record(text, Span(start, start + 1, "wrong"))
        expected = [False] * len(ids)
        expected[1 + (start - 1) * size : 1 + start * size] = [True] * size
        for known in (None, ids):
            assert token_weights(replace(one, token_ids=known), tokenizer, WEIGHTS).marked_T.tolist() == expected


@pytest.mark.parametrize("part", ["e\u0301", "e", "\u0301"])
def test_offsets_count_the_stored_text_where_the_tokenizer_composes_characters(part):
    text = "a be\u0301 xyz"
    assert unicodedata.normalize("NFC", text) != text
    tokenizer = make("nfc")
    one = record(text, span_of(text, part))
    tokens = token_weights(one, tokenizer, WEIGHTS)
    # the whole composed character, and nothing of what follows
    written = [i for i, m in zip(tokens.ids, tokens.marked_T.tolist(), strict=True) if m]
    assert tokenizer.decode(written) == "é"
    after = "".join(marked(tokenizer, record(text, span_of(text, "xyz"))))
    assert after.lstrip() == "xyz"
    known = token_weights(replace(one, token_ids=tokens.ids), tokenizer, WEIGHTS)
    assert torch.equal(known.marked_T, tokens.marked_T)


def test_spaces_that_offsets_leave_out_belong_to_the_token_behind_them():
    text = "e\u0301 is the Canada"
    for part in (" is", "is", " "):
        assert marked(make("nfc, trimmed"), record(text, span_of(text, part))) == [" is"]
    assert marked(make("nfc, trimmed"), record(text, span_of(text, "the Canada"))) == [" the", " Canada"]


def test_known_tokens_are_used_as_they_are():
    tokenizer = make()
    text = " Canada."
    usual = tokenizer(text)["input_ids"]
    single = [tokenizer.convert_tokens_to_ids("Ġ" if c == " " else c) for c in text]
    assert single != usual
    one = record(text, span_of(text, "Canada"), token_ids=single)
    result = token_weights(one, tokenizer, WEIGHTS, eos_id=tokenizer.eos_token_id)
    assert result.ids == single
    assert result.marked_T.tolist() == [False, *[True] * 6, False]


def test_special_tokens_and_what_follows_the_text_carry_no_mark():
    tokenizer = make()
    eos = tokenizer.eos_token_id
    text = " Canada"
    ids = tokenizer(text)["input_ids"]
    for one in (record(text, Span(0, 7, "wrong")), record(text, Span(0, 7, "wrong"), token_ids=[*ids, eos])):
        result = token_weights(one, tokenizer, WEIGHTS, eos_id=eos)
        assert result.ids == [*ids, eos]
        assert result.marked_T.tolist() == [*[True] * len(ids), False]
    stopped = record(text, Span(0, 7, "wrong"), token_ids=[*ids, *tokenizer("\nQ")["input_ids"]])
    assert marked(tokenizer, stopped) == [" Canada"]
    inside = record(
        "Paris is",
        Span(0, 8, "wrong"),
        token_ids=[*tokenizer("Paris")["input_ids"], eos, *tokenizer(" is")["input_ids"]],
    )
    assert marked(tokenizer, inside) == ["Paris", " is"], "an EOS in the middle is no part of the text"
    written = record("Paris<eos> is", Span(0, 13, "wrong"))
    assert marked(tokenizer, written) == ["Paris", " is"], "nor is one that the text spells out"


def test_a_replacement_character_in_the_text_is_a_character_like_others():
    text = "a\ufffdb"
    tokenizer = make()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 5
    for known in (None, ids, [*ids, tokenizer.eos_token_id]):
        result = token_weights(record(text, Span(1, 2, "wrong"), token_ids=known), tokenizer, WEIGHTS)
        assert result.marked_T.tolist()[:5] == [False, True, True, True, False]


def test_weights_multiply_over_label_and_span_and_add_up_over_spans():
    text = "Paris is the"
    one = record(text, span_of(text, "Paris is", "wrong", 0.5), span_of(text, "is the", "right", 3.0))
    result = token_weights(one, make(), WEIGHTS)
    assert result.weight_T.tolist() == [-0.5, 2.5, 3.0]
    assert result.marked_T.all()
    assert (result.covered, result.dropped) == ({"wrong": 1, "right": 1}, {})


def test_what_is_not_marked_is_masked_unless_it_is_given_a_weight():
    text = "Paris is the"
    one = record(text, span_of(text, " is", "wrong"))
    masked = token_weights(one, make(), WEIGHTS)
    assert (masked.weight_T.tolist(), masked.marked_T.tolist()) == ([0, -1, 0], [False, True, False])
    zero = token_weights(one, make(), WEIGHTS, 0.0)
    assert (zero.weight_T.tolist(), zero.marked_T.tolist()) == ([0, -1, 0], [True, True, True])
    assert token_weights(one, make(), WEIGHTS, 0.5).weight_T.tolist() == [0.5, -1, 0.5]


def test_overlaps_that_cancel_are_marked_and_weigh_nothing():
    one = record("Paris", Span(0, 5, "wrong"), Span(0, 5, "right"))
    result = token_weights(one, make(), WEIGHTS, 9.0)
    assert (result.weight_T.tolist(), result.marked_T.tolist()) == ([0.0], [True])


def test_annotators_count_alike_and_one_who_marked_nothing_is_one():
    spans = (Span(0, 5, "wrong", 1.0, "ann"), Span(0, 2, "wrong", 0.5, "ann"), Span(3, 8, "right", 2.0, "bob"))
    record = Annotated("1", "Paris is", spans, prompt="Q", annotators=["ann", "bob", "cy"])
    weights = {"right": 1.0, "wrong": -1.0}
    made = token_weights(record, make(), weights)
    ids = make()("Paris is")["input_ids"]
    assert len(made.ids) == len(ids) == 2  # ann: -1.5 and nothing; bob: 2 and 2; cy: nothing
    assert made.weight_T.tolist() == pytest.approx([0.5 / 3, 2 / 3]) and made.marked_T.all()
    made = token_weights(record, make(), weights, unmarked=0.3)  # also for ann's second token, and both of cy's
    assert made.weight_T.tolist() == pytest.approx([(0.5 + 0.3) / 3, (2 + 0.6) / 3])
    alone = replace(record, spans=tuple(replace(s, annotator=None) for s in spans), annotators=None)
    assert token_weights(alone, make(), weights).weight_T.tolist() == pytest.approx([0.5, 2.0])


def test_spans_without_a_token_are_dropped_and_counted():
    text = "Paris is the"
    one = record(text, span_of(text, "the", "wrong"), span_of(text, "Paris", "right"))
    result = token_weights(one, make(), WEIGHTS, limit=2)
    assert (len(result.ids), result.covered, result.dropped) == (2, {"right": 1}, {"wrong": 1})
    spelled = record("Paris<eos>", span_of("Paris<eos>", "<eos>"))
    assert token_weights(spelled, make(), WEIGHTS).dropped == {"wrong": 1}


def test_a_label_without_a_weight_is_refused():
    with pytest.raises(ValueError, match=r"weights: none for 'odd' \(record '1'\); every label needs a weight"):
        token_weights(record("Paris", Span(0, 5, "odd")), make(), WEIGHTS)


def test_tokens_of_another_text_or_tokenizer_are_refused():
    tokenizer = make()
    other = record("Paris is", token_ids=tokenizer("Paris, the")["input_ids"])
    with pytest.raises(
        ValueError, match=r"record '1': token_ids: they decode to ', the' where .* ' is' \(from code point 5"
    ):
        token_weights(other, tokenizer, WEIGHTS)
    with pytest.raises(ValueError, match=r"token_ids: 999 is beyond the \d+ tokens of this tokenizer"):
        token_weights(record("Paris", token_ids=[999]), tokenizer, WEIGHTS)


def by_bytes(tokenizer: Any, ids: list[int], text: str, span: Span) -> list[bool]:
    """Brute force: every token writes its bytes, every character owns its bytes."""
    alphabet = {c: b for b, c in bytes_to_unicode().items()}
    owner = [i for i, c in enumerate(text) for _ in c.encode()]
    out, at = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        size = len([alphabet[c] for c in token])
        out.append(any(span.start <= owner[b] < span.end for b in range(at, at + size)))
        at += size
    assert at == len(owner)
    return out


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's alphabet of bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + n) for n, b in enumerate(others)}


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_spans_cover_the_tokens_that_share_their_bytes(data):
    text = data.draw(TEXT)
    one = record(text, data.draw(spans(text)))
    tokenizer = make()
    ids = tokenizer(text)["input_ids"]
    expected = by_bytes(tokenizer, ids, text, one.spans[0])
    assert token_weights(one, tokenizer, WEIGHTS).marked_T.tolist() == expected
    assert token_weights(replace(one, token_ids=ids), tokenizer, WEIGHTS).marked_T.tolist() == expected
    assume("\ufffd" not in text)  # which a character that is not finished looks like
    unusual = [tokenizer.convert_tokens_to_ids(bytes_to_unicode()[b]) for b in text.encode()]
    expected = by_bytes(tokenizer, unusual, text, one.spans[0])
    assert token_weights(replace(one, token_ids=unusual), tokenizer, WEIGHTS).marked_T.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tokenizers_that_normalise_or_trim_their_offsets_mark_the_same(data):
    units = data.draw(
        st.lists(st.sampled_from(["a", "b", " ", "é", "e\u0301", "日", "😀", "\n"]), min_size=1, max_size=9)
    )
    text, composed = "".join(units), "".join(unicodedata.normalize("NFC", unit) for unit in units)
    span = data.draw(spans(text))
    owner = [i for i, unit in enumerate(units) for _ in unit]
    touched = Span(owner[span.start], owner[span.end - 1] + 1, span.label)  # in composed characters: one a unit
    tokenizer = make("nfc")
    expected = by_bytes(tokenizer, tokenizer(text)["input_ids"], composed, touched)
    assert token_weights(record(text, span), tokenizer, WEIGHTS).marked_T.tolist() == expected
    tokenizer = make("trimmed")
    expected = by_bytes(tokenizer, tokenizer(text)["input_ids"], text, span)
    assert token_weights(record(text, span), tokenizer, WEIGHTS).marked_T.tolist() == expected


def test_a_character_is_certain_once_no_token_can_change_it():
    tokenizer = make()
    text = "a中b"
    ids = [tokenizer.convert_tokens_to_ids(bytes_to_unicode()[b]) for b in text.encode()]
    decoded = Decoded(ids, tokenizer.decode, text)
    assert [decoded.certain(point) for point in range(5)] == [0, 3, 4, 4, 4]
    broken = ids[:2] + ids[4:]  # the first byte of three, then b
    decoded = Decoded(broken, tokenizer.decode, tokenizer.decode(broken))
    assert decoded.text == "a\ufffdb"
    assert decoded.certain(1) == 2, "until b comes, the byte may still become another character"


def rollout(records: list[Annotated], **options: Any) -> Any:
    return to_rollout(records, make(), WEIGHTS, **options)


def test_annotated_data_is_a_rollout():
    eos = make().eos_token_id
    text = "Paris is the"
    first = Annotated("a", text, (Span(6, 8, "wrong"),), prompt="Q:", columns={"gold": "x"})
    second = Annotated("b", "Paris", (), prompt="Another:")
    third = Annotated("c", "Paris", (Span(0, 5, "right", 2.0),), prompt="Q:")
    made = rollout([first, second, third], eos_id=eos)
    assert made.origin == "data" and made.behaviour_logp_BT is None
    assert made.texts() == [text, "Paris", "Paris"]
    assert made.end_B.tolist() == [End.EOS] * 3
    assert made.length_B.tolist() == [4, 2, 2]
    assert made.annotation_BT.tolist() == [[0, -1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    assert made.annotated_BT.tolist() == [[False, True, False, False], [False] * 4, [True, False, False, False]]
    assert made.policy_mask_BT.sum(1).tolist() == [4, 2, 2], "masked by annotation, yet policy tokens"
    assert made.group_B.tolist() == [0, 1, 0]
    assert made.columns["prompt"] == ["Q:", "Another:", "Q:"]
    assert made.columns["gold"] == ["x", None, None]
    assert made.columns["id"] == ["a", "b", "c"]
    assert made.columns["spans"][0] == [{"start": 6, "end": 8, "label": "wrong", "weight": 1.0, "tokens": [1]}]
    assert made.prompt_BP[0, : made.prompt_length_B[0]].tolist() == make()("Q:")["input_ids"]
    assert made.rows(torch.tensor([2])).annotated_BT.tolist() == [[True, False, False, False]]


def test_padding_and_marks_stay_off_where_unmarked_tokens_weigh():
    made = rollout([record("Paris is the"), replace(record("Paris"), id="2")], unmarked=0.5)
    assert made.annotation_BT.tolist() == [[0.5, 0.5, 0.5], [0.5, 0, 0]]
    assert made.annotated_BT.tolist() == [[True] * 3, [True, False, False]]
    assert made.end_B.tolist() == [End.LIMIT] * 2


def test_long_completions_are_cut_and_long_prompts_refused():
    eos = make().eos_token_id
    made = rollout([record("Paris is the")], eos_id=eos, max_completion_tokens=2)
    assert made.texts() == ["Paris is"]
    assert made.end_B.tolist() == [End.LIMIT]
    with pytest.raises(ValueError, match=r"record '1': its prompt has 2 tokens; it needs 1 or more, 1 at most"):
        rollout([record("Paris")], max_prompt_tokens=1)
    with pytest.raises(ValueError, match="at least one is needed"):
        rollout([])


def test_a_conversation_goes_through_the_chat_template():
    tokenizer = train_tokenizer(CORPUS, 300)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    messages = [{"role": "user", "content": "Hi"}]
    made = to_rollout([Annotated("1", "Paris", (), messages=messages)], tokenizer, WEIGHTS)
    assert made.columns["prompt"] == ["<user>Hi<bot>"]
    assert made.columns["messages"] == [messages]
    assert tokenizer.decode(made.prompt_BP[0]) == "<user>Hi<bot>"
    assert math.isfinite(float(made.annotation_BT.sum()))
