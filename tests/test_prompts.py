"""Prompts: read from every kind of source, rendered, limited in length, split and served in a seeded order."""

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import yaml
from conftest import RECORDS, SENTENCES, Tree, metrics, write_jsonl
from pydantic import TypeAdapter
from tokenizers.processors import TemplateProcessing

from rlkl import train
from rlkl.cli import main
from rlkl.config.data import Data
from rlkl.data.prompts import PromptSet, records
from rlkl.tasks.pretrain import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHATS = [{"chat": [{"role": "user", "content": f"Say {n}."}], "gold": str(n)} for n in range(8)]


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, offline, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(SENTENCES, 270)


def section(**keys: Any) -> Any:
    return TypeAdapter(Data).validate_python(keys)


def both(seed: int = 0, **keys: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return records(section(**keys), seed)


# ---- sources


def folder(rows: list[dict[str, Any]]) -> Tree:
    Path("folder").mkdir()
    datasets.Dataset.from_list(rows).to_parquet("folder/train.parquet")
    return {"path": "folder"}


def csv(rows: list[dict[str, Any]]) -> Tree:
    datasets.Dataset.from_list(rows).to_csv("rows.csv")
    return {"path": "rows.csv"}


def named_format(rows: list[dict[str, Any]]) -> Tree:
    write_jsonl("one.txt", rows[:3])
    write_jsonl("two.txt", rows[3:])
    return {"path": "json", "data_files": ["one.txt", "two.txt"]}


def jsonl_file(rows: list[dict[str, Any]]) -> Tree:
    write_jsonl("rows.jsonl", rows)
    return {"path": "rows.jsonl"}


def on_disk(rows: list[dict[str, Any]]) -> Tree:
    datasets.Dataset.from_list(rows).save_to_disk("disk")
    return {"path": "disk"}


def splits_on_disk(rows: list[dict[str, Any]]) -> Tree:
    datasets.DatasetDict({"first": datasets.Dataset.from_list(rows)}).save_to_disk("disk")
    return {"path": "disk", "split": "first"}


@pytest.mark.parametrize("source", [folder, csv, named_format, jsonl_file, on_disk, splits_on_disk])
def test_every_source_gives_the_records_and_the_split_of_a_jsonl_file(source: Callable[..., Tree]) -> None:
    write_jsonl("plain.jsonl", RECORDS)
    plain = both(type="jsonl", path="plain.jsonl", held_out=0.25)
    assert [len(part) for part in plain] == [6, 2]
    assert both(type="datasets", **source(RECORDS), held_out=0.25) == plain


def test_the_named_split_configuration_and_column_are_read() -> None:
    for name, split, word in (("a", "train", "one"), ("a", "test", "two"), ("b", "train", "three")):
        Path("hub", name).mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": "wrong", "q": f"{word} {n}"} for n in range(4)]
        datasets.Dataset.from_list(rows).to_parquet(f"hub/{name}/{split}.parquet")
    configs = [{"config_name": name, "data_dir": name} for name in ("a", "b")]
    Path("hub/README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    rest = {"type": "datasets", "path": "hub", "columns": {"prompt": "q"}}
    train_rows, held = both(**rest, name="a", held_out="test")
    assert [r["prompt"] for r in train_rows] == [f"one {n}" for n in range(4)]
    assert [r["prompt"] for r in held] == [f"two {n}" for n in range(4)]
    train_rows, held = both(**rest, name="b", split="train[:3]", held_out=0.3)
    assert sorted(r["prompt"] for r in train_rows + held) == [f"three {n}" for n in range(3)]


BAD = {
    "Hub name while offline": ({"path": "nobody/nothing"}, ["data.path=nobody/nothing", "while online"]),
    "no such folder": ({"path": "./none"}, ["data.path=./none", "local file or folder"]),
    "no such split": ({"path": "folder", "split": "test"}, ["split test", "['train']"]),
    "no such held-out split": ({"path": "folder", "held_out": "dev"}, ["split dev", "['train']"]),
    "no such configuration": ({"path": "folder", "name": "big"}, ["'big' not found"]),
    "unknown kind of file": ({"path": "rows.xlsx"}, [".xlsx", ".parquet"]),
    "broken file": ({"path": "broken.csv"}, ["broken.csv", "cannot be read", "tokenizing"]),
    "no such column": ({"path": "folder", "columns": {"prompt": "q"}}, ["record 1", "'q'", "prompt, gold"]),
    "a null": ({"path": "null.jsonl"}, ["null.jsonl[train] record 2", "no text", "data.columns.prompt"]),
    "numbers": ({"path": "folder", "columns": {"prompt": "gold"}}, ["record 1", "no text in column 'gold'"]),
    "no conversation": ({"path": "folder", "columns": {"messages": "prompt"}}, ["no list of {role, content}"]),
    "half a message": ({"path": "half.jsonl", "columns": {"messages": "chat"}}, ["record 1", "data.columns.messages"]),
    "a name that is taken": ({"path": "taken.jsonl"}, ["'completions'", "rename"]),
    "one prompt": ({"path": "same.jsonl"}, ["same.jsonl", "1 prompt", "data.held_out"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_one_line_with_its_place_and_remedy(
    name: str, tiny_config: Tree, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder([{"prompt": f"p{n}", "gold": n} for n in range(4)])
    Path("rows.xlsx").write_text("")
    Path("broken.csv").write_text('prompt,b\n"1,2\n3,4,5,6\n')
    write_jsonl("null.jsonl", [{"prompt": "a"}, {"prompt": None}])
    write_jsonl("half.jsonl", [{"chat": [{"role": "user"}]}])
    write_jsonl("taken.jsonl", [{"prompt": "a", "completions": 1}])
    write_jsonl("same.jsonl", [{"prompt": "a", "x": n} for n in range(4)])
    keys, says = BAD[name]
    Path("c.yaml").write_text(yaml.safe_dump(tiny_config | {"data": {"type": "datasets", **keys}}))
    capsys.readouterr()
    assert main(["train", "c.yaml"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and all(part in said[0] for part in says), said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("columns", [{}, {"prompt": "a", "messages": "b"}])
def test_prompts_are_one_of_texts_and_conversations(columns: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="map prompt or messages"):
        section(type="jsonl", path="x.jsonl", columns=columns)


# ---- conversations


def with_bos(tokenizer: Any) -> Any:
    """A tokenizer that opens every text with ``<pad>`` as its BOS, and a template that writes it too."""
    bos = tokenizer.pad_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.pad_token_id)]
    )
    tokenizer.chat_template = bos + TEMPLATE
    return tokenizer


def test_a_conversation_is_rendered_once_and_opened_by_one_bos() -> None:
    tokenizer = with_bos(train_tokenizer(SENTENCES, 270))
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"messages": talk, "gold": "x"}, {"prompt": "Hi", "gold": "y"}]
    prompts = PromptSet.tokenise(rows, tokenizer, 0, None, 4).take([0, 1])
    text = "<system>Be brief.\n<user>Hi\n<assistant>"
    assert prompts.columns == {"messages": [talk, None], "gold": ["x", "y"], "prompt": [f"<pad>{text}", "Hi"]}
    for ids, rest in zip(prompts.ids, (text, "Hi"), strict=True):
        assert ids == [tokenizer.pad_token_id, *tokenizer(rest, add_special_tokens=False)["input_ids"]]


def test_an_answer_that_has_begun_goes_on(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    prompts = PromptSet.tokenise([{"messages": talk}], tokenizer, 0, None, 4)
    assert prompts.records[0]["prompt"] == "<user>Hi\n<assistant>Well"


def test_null_fields_that_a_table_adds_reach_neither_template_nor_reward(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.name is defined }}{{ m.content }} {% endfor %}"
    talk = [{"role": "system", "content": "a"}, {"role": "user", "content": "b", "name": "Eve"}]
    datasets.Dataset.from_list([{"m": talk}, {"m": talk[1:]}]).save_to_disk("disk")
    rows, held = both(type="datasets", path="disk", columns={"messages": "m"}, held_out=0.5)
    assert sorted((r["messages"] for r in rows + held), key=len) == [talk[1:], talk]
    texts = [r["prompt"] for r in PromptSet.tokenise(rows + held, tokenizer, 0, None, 4).records]
    assert sorted(texts) == ["Falsea Trueb ", "Trueb "]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template; use a chat model, or map a text column with data.columns.prompt"),
        (TEMPLATE, "the chat template refuses"),
        ("{{ oops", "the chat template refuses"),
    ],
)
def test_a_template_that_is_missing_or_refuses_is_one_line(template: str | None, says: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    talk = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(ValueError, match=says) as error:
        PromptSet.tokenise([{"messages": talk}], tokenizer, 0, None, 4)
    assert len(str(error.value).splitlines()) == 1


def knows_the_chat(prompts: list[str], completions: list[str], messages: list[Any], gold: list[str]) -> list[float]:
    for text, talk, answer in zip(prompts, messages, gold, strict=True):
        assert talk == [{"role": "user", "content": f"Say {answer}."}]
        assert text == f"<user>Say {answer}.\n<assistant>"
    return [float(len(set(text))) for text in completions]


@pytest.mark.parametrize("kind", ["jsonl", "datasets"])
def test_a_run_on_conversations(kind: str, tiny_config: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    chat_model(tiny_config)
    write_jsonl("chats.jsonl", CHATS)
    tiny_config["data"] = {"type": kind, "path": "chats.jsonl", "columns": {"messages": "chat"}, "held_out": 0.25}
    tiny_config["rewards"]["varied"]["path"] = "test_prompts:knows_the_chat"
    run = train(tiny_config)
    assert metrics(run)[-1]["reward/train/varied"] > 0
    capsys.readouterr()
    assert main(["sample", str(run), "--prompt", "Say 7."]) == 0
    assert "prompt: <user>Say 7.\n<assistant>" in capsys.readouterr().out


def chat_model(config: Tree) -> None:
    """The tiny model with a chat template, in the working folder."""
    shutil.copytree(config["model"]["path"], "chat-model")
    Path("chat-model/chat_template.jinja").write_text(TEMPLATE)
    config["model"]["path"] = "chat-model"


# ---- lengths

LONG = [{"prompt": "a" * n} for n in (3, 9, 12, 20)]  # a token a letter


def lengths(tokenizer: Any, context: int | None, **keys: Any) -> PromptSet:
    config = section(type="jsonl", path="x.jsonl", **keys)
    return PromptSet.tokenise(LONG, tokenizer, 0, context, 8, config)


def test_prompts_fill_what_the_context_leaves_and_no_more(tokenizer: Any) -> None:
    fit = lengths(tokenizer, 28)
    assert ([len(ids) for ids in fit.ids], fit.limit, fit.dropped) == ([3, 9, 12, 20], 20, 0)
    assert lengths(tokenizer, None).limit is None
    with pytest.raises(ValueError, match=r"1 of 4 prompts .* of 20 tokens: at most 19 \(context 27 - .*tokens 8\)"):
        lengths(tokenizer, 27)
    with pytest.raises(ValueError, match=r"context 8 - rollout.max_new_tokens 8 leaves no token"):
        lengths(tokenizer, 8)


def test_max_prompt_tokens_refuses_or_drops(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"2 of 4 prompts .*'aaaaaaaaaaaa' of 12 tokens: at most 11.*raise the limit"):
        lengths(tokenizer, 28, max_prompt_tokens=11)
    kept = lengths(tokenizer, 28, max_prompt_tokens=11, overlong="drop")
    assert ([len(ids) for ids in kept.ids], kept.limit, kept.dropped) == ([3, 9], 11, 2)
    assert kept.lengths() == "prompts of 3 to 9 tokens (limit 11); 2 longer ones left out"
    assert [len(r["prompt"]) for r in kept.records] == [3, 9]
    with pytest.raises(ValueError, match="4 of 4 prompts"):
        lengths(tokenizer, 28, max_prompt_tokens=2, overlong="drop")
    with pytest.raises(ValueError, match=r"max_prompt_tokens=21: context 28 - .* leaves 20 tokens"):
        lengths(tokenizer, 28, max_prompt_tokens=21)


def test_a_run_says_how_many_it_dropped(tiny_config: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl("prompts.jsonl", [{"prompt": c * n} for c in "abcdefgh" for n in (4, 30)])
    tiny_config["data"] |= {"max_prompt_tokens": 20, "overlong": "drop"}
    train(tiny_config)
    assert "prompts of 4 to 4 tokens (limit 20); 8 longer ones left out" in capsys.readouterr().out


# ---- split and order


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_equal_prompts_stay_on_one_side_of_the_split(seed: int, share: float) -> None:
    rows = [{"prompt": f"p{n % 10}", "n": n} for n in range(37)]
    write_jsonl("rows.jsonl", rows)
    train_rows, held = both(seed, type="jsonl", path="rows.jsonl", held_out=share)
    one, two = ({r["prompt"] for r in part} for part in (train_rows, held))
    assert not one & two and one and two
    assert len(two) == min(max(round(10 * share), 1), 9)
    assert sorted(train_rows + held, key=lambda r: r["n"]) == rows, "every record is on one side, once"
    assert (train_rows, held) == both(seed, type="jsonl", path="rows.jsonl", held_out=share)


def test_equal_conversations_stay_on_one_side() -> None:
    write_jsonl("chats.jsonl", CHATS * 3)
    rest = {"type": "jsonl", "path": "chats.jsonl", "columns": {"messages": "chat"}, "held_out": 0.5}
    train_rows, held = both(**rest)
    assert len(train_rows) == len(held) == 12 and not {r["gold"] for r in train_rows} & {r["gold"] for r in held}


def test_the_split_changes_with_the_seed() -> None:
    write_jsonl("rows.jsonl", [{"prompt": f"p{n}"} for n in range(20)])
    sides = {json.dumps(both(seed, type="jsonl", path="rows.jsonl", held_out=0.5)[1]) for seed in range(6)}
    assert len(sides) == 6


def test_a_held_out_file_may_hold_no_training_prompt() -> None:
    write_jsonl("a.jsonl", RECORDS)
    write_jsonl("b.jsonl", [*RECORDS[2:4], {"prompt": "new"}])
    with pytest.raises(ValueError, match=r"b\.jsonl: 2 of its prompts are training prompts too, such as 'Line 2:'"):
        both(type="jsonl", path="a.jsonl", held_out="b.jsonl")


def order(prompts: PromptSet, steps: range, count: int) -> list[str]:
    return [text for step in steps for text in prompts.batch(step, count).columns["prompt"]]


def numbered(tokenizer: Any, seed: int = 0) -> PromptSet:
    return PromptSet.tokenise([{"prompt": f"p{n}"} for n in range(12)], tokenizer, seed, None, 4)


@pytest.mark.parametrize("count", [1, 5, 12, 30])
def test_every_epoch_visits_every_prompt_once_in_an_order_of_its_own(count: int, tokenizer: Any) -> None:
    served = order(numbered(tokenizer), range(1, 61), count)
    epochs = [served[start : start + 12] for start in range(0, len(served) - 11, 12)]
    assert all(sorted(epoch) == sorted(f"p{n}" for n in range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_order_is_a_function_of_seed_and_step(tokenizer: Any) -> None:
    whole = order(numbered(tokenizer), range(1, 11), 5)
    assert order(numbered(tokenizer), range(7, 11), 5) == whole[30:], "a resumed run goes on where it was"
    assert order(numbered(tokenizer, seed=1), range(1, 11), 5) != whole


def test_columns_of_all_types_reach_the_rewards_from_a_table() -> None:
    when = datetime.datetime(2026, 1, 2)
    datasets.Dataset.from_list([{"prompt": f"p{n}", "when": when, "tags": ["a", "b"]} for n in range(2)]).save_to_disk(
        "d"
    )
    (row,), _ = both(type="datasets", path="d", held_out=0.5)
    assert row["when"] == when and row["tags"] == ["a", "b"]
