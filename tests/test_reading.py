"""A reward model with a tokenizer of its own, and sentences: what is read as in training, and where it is paid."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES, Tree, metrics, random_llama, reward_model, write_jsonl
from models import make_rollout
from test_learned_reward import source, token_model
from test_reward_model import config, pairs, token_config  # noqa: F401 - a fixture
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import rlkl
from rlkl import scoring
from rlkl.data.sentences import last_tokens, sentences
from rlkl.data.spans import Decoded
from rlkl.reward_model import build, data
from rlkl.rewards import reading
from rlkl.tasks.pretrain import train_tokenizer
from rlkl.types import End, Rollout

TEXTS = (" é 中文 jumps.\nOver 😀 there. ", " reads. Yes", " arrives")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM over a coarser tokenizer that begins every text with a BOS."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = train_tokenizer([*SENTENCES * 4, "é 中文 jumps over there. reads. Yes"] * 3, 330, context=128)
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    bos = tokenizer.convert_tokens_to_ids("<pad>")
    inner["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<pad>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<pad>": {"id": "<pad>", "ids": [bos], "tokens": ["<pad>"]}},
    }
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(inner))
    random_llama(tokenizer, 3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == bos
    return folder


def rollout_of(tokenizer: Any, texts: Any = TEXTS, **changes: Any) -> Rollout:
    """Completions of the policy: the first ended by EOS, the others at the limit."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    ids[0] = [*ids[0], tokenizer.eos_token_id]
    made = make_rollout([tokenizer(f"Line {i}:")["input_ids"] for i in range(len(ids))], ids)
    ends = torch.tensor([int(End.EOS), *[int(End.LIMIT)] * (len(ids) - 1)])
    columns = {"prompt": [f"Line {i}:" for i in range(len(ids))]}
    return replace(made, end_B=ends, columns=columns, decode=lambda x: str(tokenizer.decode(x)), **changes)


def trained_rows(folder: Path, kind: str, **record: Any) -> Tree:
    """The row that `rlkl reward-model` makes of a record, with the tokenizer of a folder."""
    tree = config(folder) if kind == "sequence" else token_config(folder, kind=kind)
    (row,), _ = data.rows(build.load(tree).data, [record], AutoTokenizer.from_pretrained(folder), None, kind)
    return row


def test_a_whole_completion_is_read_as_the_trainer_read_it(tiny_model: Path, foreign: Path, tmp_path: Path) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(foreign)
    reward = source(reward_model(foreign, tmp_path / "rm"))
    reward.check(ours)
    rollout = rollout_of(ours)
    expected = [
        trained_rows(foreign, "sequence", prompt=f"Line {i}:", chosen=text, rejected="x")["chosen_ids"]
        for i, text in enumerate(TEXTS)
    ]
    assert reading.whole(rollout, theirs, ours, True) == expected
    assert reading.whole(rollout, theirs, ours, False) == [row[:-1] for row in expected]
    alone = [float(reward.model(input_ids=torch.tensor([row])).logits) for row in expected]
    found = reward(rollout)
    assert found.value_BT.sum(-1).tolist() == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert found.scored_BT.sum() == 3 and [
        bool(row[n - 1]) for row, n in zip(found.scored_BT, rollout.length_B, strict=True)
    ]
    stop = ours("\nOver")["input_ids"]
    ids = [*ours("A fox")["input_ids"], *stop]
    stopped = replace(rollout_of(ours, ["x"]), tokens_BT=torch.tensor([ids]), length_B=torch.tensor([len(ids)]))
    stopped = replace(stopped, end_B=torch.tensor([int(End.STOP)]), stop=("\nO",))
    assert theirs.decode(reading.whole(stopped, theirs, ours, True)[0]) == "<pad>Line 0:A fox<eos>"


def test_a_conversation_goes_through_the_models_own_template(tiny_model: Path, foreign: Path, tmp_path: Path) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(foreign)
    talk = [{"role": "user", "content": "why?"}]
    ours.chat_template = TEMPLATE.replace("[", "<")
    rollout = rollout_of(ours, [" so. "])
    rollout = replace(rollout, columns={"prompt": ["<user]why?</end><assistant]"], "messages": [talk]})
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        reading.whole(rollout, theirs, ours, True)
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(tmp_path)
    answers = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", " so. "), ("rejected", "x"))
    }
    (row,), _ = data.rows(build.load(config(tmp_path)).data, [{"messages": talk, **answers}], theirs, None)
    (found,) = reading.whole(rollout, theirs, ours, True)
    told = [*talk, {"role": "assistant", "content": "the answer"}]  # a column that made no prompt
    leaky = replace(rollout, columns={"prompt": ["why?"], "messages": [told]})
    assert theirs.decode(reading.whole(leaky, theirs, ours, True)[0]) == "<pad>why? so. <eos>"
    assert found == row["chosen_ids"] and theirs.decode(found) == "[user]why?</end>[assistant] so. </end><eos>"
    assert (
        theirs.decode(reading.dense(rollout, theirs, ours, "token").rows[0]) == "[user]why?</end>[assistant] so. <eos>"
    )


def words(reward: Any, rollout: Rollout, ours: Any) -> list[list[str]]:
    """What the policy had said where something was paid."""
    scored = reward(rollout).scored_BT
    ids = rollout.completion_ids()
    return [[ours.decode(ids[i][: int(t) + 1]) for t in row.nonzero()] for i, row in enumerate(scored)]


def test_scores_of_foreign_tokens_are_paid_once_certain_and_add_up(
    tiny_model: Path, foreign: Path, tmp_path: Path
) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(foreign)
    reward = source(token_model(foreign, tmp_path / "rm"), level="token")
    reward.check(ours)
    rollout = rollout_of(ours)
    found = reward(rollout)
    for i, text in enumerate(TEXTS):
        row = trained_rows(foreign, "token", id="1", prompt=f"Line {i}:", completion=text, spans=[])["ids"]
        row = row if i == 0 else row[:-1]  # EOS is read where the policy wrote one
        alone = reward.model(input_ids=torch.tensor([row])).logits[0, len(theirs(f"Line {i}:")["input_ids"]) :, 0]
        assert float(found.value_BT[i].sum()) == pytest.approx(float(alone.sum()), rel=1e-4)
        assert len(alone) != int(rollout.length_B[i]), "the tokenizers cut alike"
        assert found.value_BT[i, rollout.length_B[i] - 1] != 0
    assert torch.equal(found.value_BT != 0, found.scored_BT) and found.queries == 3
    said = words(reward, rollout, ours)
    whole = TEXTS[0] + ours.eos_token
    assert said[0] == [" é 中", " é 中文 j", " é 中文 jumps.\nO", " é 中文 jumps.\nOver 😀", whole[:21], whole]
    assert said[1:] == [[" reads. Y", " reads. Yes"], [" arrives"]]
    reward.probe(rollout)


def test_paying_a_foreign_word_before_it_is_over_is_found_out(
    tiny_model: Path, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = AutoTokenizer.from_pretrained(tiny_model)
    reward = source(token_model(foreign, tmp_path / "rm"), level="token")
    reward.check(ours)
    true = reading.settled

    def early(*given: Any) -> Any:
        found = true(*given)
        return replace(found, paid=[0 for _ in found.paid])

    monkeypatch.setattr(reading, "settled", early)
    with pytest.raises(ValueError, match="reward rm: not causal"):
        reward.probe(rollout_of(ours))


@pytest.mark.parametrize("level", ["token", "sentence"])
def test_a_tokenizer_without_offsets_is_refused(level: str, foreign: Path, tiny_model: Path, tmp_path: Path) -> None:
    reward = source(token_model(foreign, tmp_path / "rm"), level=level)
    own = reward.tokenizer

    class Slow:
        is_fast = False
        get_vocab = own.get_vocab

    reward.tokenizer = Slow()
    ours = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=rf"rewards\.rm\.path=.*knows no offsets; level={level} needs a fast one"):
        reward.check(ours)
    reward.check(own)
    assert reward.policy is None


def test_equal_texts_are_scored_once_however_they_are_cut(
    tiny_model: Path, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = AutoTokenizer.from_pretrained(tiny_model)
    reward = source(reward_model(foreign, tmp_path / "rm"))
    reward.check(ours)
    word = max(map(ours.decode, range(2, len(ours))), key=len)
    letters = [ours(c)["input_ids"][0] for c in word]
    rollout = rollout_of(ours, ["x", word, word])
    tokens = torch.zeros((3, 9), dtype=torch.long)
    rows = [ours("x")["input_ids"], ours(word)["input_ids"], letters]
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    length = torch.tensor([len(row) for row in rows])
    rollout = replace(rollout, tokens_BT=tokens, length_B=length, policy_mask_BT=torch.arange(9) < length[:, None])
    rollout = replace(rollout, end_B=torch.full((3,), int(End.LIMIT)), columns={"prompt": ["Line:"] * 3})
    seen: list[Any] = []
    monkeypatch.setattr(scoring, "pad", lambda rows, pad=scoring.pad: seen.extend(rows) or pad(rows))
    score = reward(rollout).value_BT.sum(-1)
    assert rows[1] != rows[2] and len(seen) == 2 and score[1] == score[2] != score[0]


@pytest.mark.parametrize("level", ["sequence", "token", "sentence"])
def test_a_run_learns_from_a_model_with_its_own_tokenizer(
    level: str, tiny_config: Tree, foreign: Path, tmp_path: Path
) -> None:
    folder = reward_model(foreign, tmp_path / "rm") if level == "sequence" else token_model(foreign, tmp_path / "rm")
    tiny_config["rewards"] = {"rm": {"type": "learned", "path": str(folder), "level": level}}
    rows = metrics(rlkl.train(tiny_config))
    assert rows[1]["policy/grad_norm"] > 0 and rows[0]["reward/eval/rm"] != 0


# Sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two!  Three", ["One.", "Two!", "Three"]),
        ('He said "no." (Yes?) 3.5 is.', ['He said "no."', "(Yes?)", "3.5 is."]),
        ("a\n\nb...\nc", ["a", "b...", "c"]),
        ("你好。」是！x", ["你好。」", "是！", "x"]),
        (" . . ", [".", "."]),
        ("  ", []),
        ("\n- a\n- b", ["- a", "- b"]),
        ("你好。」", ["你好。」"]),
    ],
)
def test_sentences_end_by_a_rule(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in sentences(text)] == expected


def test_what_follows_changes_no_sentence_that_is_over() -> None:
    text = 'Dr. A. said: "3.5 of 你好。」！ it?"\n\n(Yes.) \n. End... of'
    whole = sentences(text)
    for cut in range(len(text)):
        over = [(start, end) for start, end in whole if end < cut]
        assert sentences(text[:cut])[: len(over)] == over
    assert len(whole) == 9


def test_sentences_that_share_their_last_token_are_one() -> None:
    pieces = ["a", ".\n.", "\n", "b"]
    decoded = Decoded(range(4), lambda ids: "".join(pieces[i] for i in ids), "a.\n.\nb")
    assert last_tokens("a.\n.\nb", decoded) == {1: (0, 4), 3: (5, 6)}


@pytest.mark.parametrize("own", [True, False])
def test_a_sentence_is_read_at_its_end_and_paid_once_it_has_ended(
    own: bool, tiny_model: Path, foreign: Path, tmp_path: Path
) -> None:
    ours = AutoTokenizer.from_pretrained(tiny_model)
    base = tiny_model if own else foreign
    theirs = AutoTokenizer.from_pretrained(base)
    reward = source(token_model(base, tmp_path / "rm"), level="sentence")
    reward.check(ours)
    rollout = rollout_of(ours)
    found, read = reward(rollout), reading.dense(rollout, theirs, None if own else ours, "sentence")
    prompts = [theirs(f"Line {i}:")["input_ids"] for i in range(3)]
    for i, text in enumerate(TEXTS):
        for k, (_, end) in enumerate(sentences(text)):
            row = [*prompts[i], *theirs(text, add_special_tokens=False)["input_ids"]][: read.read[i][k] + 1]
            assert theirs.decode(row).removeprefix("<pad>").rstrip() == f"Line {i}:{text[:end]}"
            alone = float(reward.model(input_ids=torch.tensor([row])).logits[0, -1, 0])
            assert float(found.value_BT[i, read.paid[i][k]]) == pytest.approx(alone, rel=1e-4, abs=1e-5)
    following = " é 中文 jumps.\n" + ("" if own else "O")
    assert words(reward, rollout, ours) == [
        [following, TEXTS[0] + ours.eos_token if not own else TEXTS[0]],
        [" reads. " if own and " Y" not in ours.get_vocab() else " reads. Y", " reads. Yes"],
        [" arrives"],
    ]
    assert torch.equal(found.value_BT != 0, found.scored_BT)
    reward.probe(rollout)


def test_paying_a_sentence_where_it_begins_is_found_out(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = source(token_model(tiny_model, tmp_path / "rm"), level="sentence")
    monkeypatch.setattr(Decoded, "certain", lambda self, point: 0)
    with pytest.raises(ValueError, match="reward rm: not causal"):
        reward.probe(rollout_of(AutoTokenizer.from_pretrained(tiny_model)))


def test_sentences_weigh_the_spans_that_touch_them(tiny_model: Path, pairs: Any) -> None:  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "One. Two two. Three."
    marks = [(0, 3, "wrong"), (5, 8, "half"), (9, 16, "wrong")]
    record = {"id": "1", "prompt": "p", "completion": text}
    record["spans"] = [{"start": s, "end": e, "label": label} for s, e, label in marks]
    row = trained_rows(tiny_model, "sentence", **record)
    asked = len(tokenizer("p")["input_ids"])
    targets = {tokenizer.decode(row["ids"][asked : t + 1]): w for t, w in enumerate(row["target"]) if w is not None}
    assert targets == {"One.": -1.0, "One. Two two.": -1.5, text: -1.0}
    assert tokenizer.decode(row["ids"][asked:]) == text + tokenizer.eos_token
    bare = trained_rows(tiny_model, "sentence", **{**record, "spans": record["spans"][:1]})
    assert [w for w in bare["target"] if w is not None] == [-1.0, 0.0, 0.0]
    named = [{**span, "annotator": who} for span, who in zip(record["spans"], "aba", strict=True)]
    shared = trained_rows(tiny_model, "sentence", **{**record, "spans": named, "annotators": ["a", "b"]})
    assert [w for w in shared["target"] if w is not None] == [-0.5, -0.75, -0.5]


def test_a_sentence_model_is_trained_measured_and_used(
    tiny_config: Tree, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for n in range(48):
        said = ["z." if (n >> k) % 2 else "a." for k in range(3)]
        text = " ".join(said)
        spans = [{"start": 3 * k, "end": 3 * k + 1, "label": "wrong"} for k in range(3) if said[k] == "z."]
        rows.append({"id": str(n), "prompt": f"{n}:", "completion": text, "spans": spans})
    tree = token_config(tiny_model, kind="sentence")
    write_jsonl("spans.jsonl", rows)
    tree["data"]["weights"] = {"wrong": -1}
    found = build.train(tree)
    assert found["kind"] == "sentence" and found["sentences"] == 36 and found["average_precision"] > 0.95
    tiny_config["rewards"] = {"rm": {"type": "learned", "path": "rm", "level": "sentence"}}
    assert metrics(rlkl.train(tiny_config))[1]["policy/grad_norm"] > 0
    for level in ("token", "sequence"):
        with pytest.raises(
            ValueError, match=rf"rewards\.rm\.path=rm: .*trained with kind=sentence, and is read as {level}"
        ):
            source(Path("rm"), level=level)
