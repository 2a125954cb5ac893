"""Every key of a reward model's configuration has an effect; those under ``model`` are a run's, and shown there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Tree, write_jsonl
from safetensors.torch import load_file
from test_config_effects import changed, keys
from test_reward_model import config, pairs, qa, token_config  # noqa: F401 - a fixture
from torch import Tensor
from transformers import AutoTokenizer

from rlkl import models
from rlkl.config.reward_model import RewardModelConfig
from rlkl.reward_model import build, data

SHOWN: set[str] = set()


def shows(*names: str) -> Callable[[Any], Any]:
    """This test shows what these keys do."""
    SHOWN.update(names)
    return lambda test: test


def head(tree: Tree) -> Tensor:
    build.train(tree, overwrite=True)
    return load_file(Path(tree["output"]) / "model.safetensors")["score.weight"]


FIT = {
    "train.epochs": 2,
    "train.batch": 3,
    "train.learning_rate": 2e-3,
    "train.schedule": "constant",
    "train.warmup": 0.9,
    "train.weight_decay": 10.0,
    "seed": 1,
}


@shows("output", *FIT)
def test_every_key_of_the_training_changes_the_weights(tiny_model: Path, pairs: Any) -> None:  # noqa: F811
    base = config(tiny_model, train={"epochs": 1, "batch": 4, "learning_rate": 1e-3})
    found = {"": head(base), "again": head({**base, "output": "other"})}
    assert found[""].equal(found["again"]) and Path("other/evaluation.json").is_file()
    held = {"data.held_out": "held.jsonl"}  # so that the seed moves no record
    write_jsonl("held.jsonl", [{"prompt": "other", "chosen": "a", "rejected": "b"}])
    same = head(changed(base, held))
    for key, value in FIT.items():
        assert not head(changed(base, {**held, key: value})).equal(same), key


def split(tree: Tree) -> tuple[list[Tree], list[Tree]]:
    loaded = build.load(tree)
    return data.records(loaded.data, loaded.seed)


@shows("data.held_out", "data.path", "data.pairs.type", "data.pairs.split")
def test_records_are_held_out_by_share_or_file_or_split(tiny_model: Path, pairs: Any) -> None:  # noqa: F811
    import datasets

    base = config(tiny_model)
    assert [len(x) for x in split(base)] == [12, 4]
    assert [len(x) for x in split(changed(base, {"data.held_out": 0.5}))] == [8, 8]
    write_jsonl("more.jsonl", [{"prompt": "other", "chosen": "a", "rejected": "b"}])
    assert [len(x) for x in split(changed(base, {"data.held_out": "more.jsonl"}))] == [16, 1]
    splits = {"one": datasets.Dataset.from_list(pairs[:6]), "two": datasets.Dataset.from_list(pairs[6:9])}
    datasets.DatasetDict(splits).save_to_disk("saved")
    both = {"data.path": "saved", "data.split": "one", "data.held_out": "two"}
    assert [len(x) for x in split(changed(base, both))] == [6, 3]


@shows("data.max_tokens", "data.overlong")
def test_longer_records_are_refused_or_left_out(tiny_model: Path, pairs: Any) -> None:  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [pairs[0], {**pairs[1], "chosen": " a" * 20}]

    def kept(**changes: Any) -> tuple[int, int]:
        source = build.load(changed(config(tiny_model), {f"data.{key}": x for key, x in changes.items()})).data
        made, left_out = data.rows(source, rows, tokenizer, 64)
        return len(made), left_out

    assert kept() == (2, 0) and kept(max_tokens=10, overlong="drop") == (1, 1)
    with pytest.raises(ValueError, match=r"1 of 2 records are too long.* at most 10 \(data\.max_tokens\)"):
        kept(max_tokens=10)


@shows("kind", "data.annotated.type", "data.annotated.weights", "data.annotated.unmarked", "data.annotated.prompt")
def test_what_tokens_are_to_score_and_after_which_prompt(tiny_model: Path, pairs: Any) -> None:  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    marks = [{"start": 0, "end": 1, "label": "wrong"}]
    write_jsonl("one.jsonl", [{"id": str(n), "prompt": f"{n}", "ask": "why", "completion": "ab", "spans": marks} for n in (0, 1)])  # fmt: skip  # noqa: E501

    def made(**changes: Any) -> Tree:
        changes = {"path": "one.jsonl", "held_out": "none", **changes}
        loaded = build.load(changed(token_config(tiny_model), {f"data.{key}": x for key, x in changes.items()}))
        (row, _), _ = data.rows(loaded.data, data._read(loaded.data, None), tokenizer, 64)
        return row

    assert made()["target"][-3:] == [-1.0, 0.0, 0.0] and made()["prompt"] == "0"
    assert made(weights={"wrong": -3})["target"][-3:] == [-3.0, 0.0, 0.0]
    assert made(unmarked=None)["target"][-3:] == [-1.0, None, None]
    assert made(prompt="ask")["prompt"] == "why"


@shows("data.hh.type", "data.qa-feedback.type", "data.qa-feedback.prompt")
def test_published_pairs_and_the_layout_of_their_prompt(tiny_model: Path, pairs: Any) -> None:  # noqa: F811
    write_jsonl("qa.jsonl", [qa(0, [1, 0, 0, 0, 0, 0]), qa(1, [1, 0, 0, 0, 0, 0])])
    source = {"type": "qa-feedback", "path": "qa.jsonl", "held_out": 0.5}
    (whole,), _ = split(config(tiny_model, data=source))
    (short,), _ = split(config(tiny_model, data={**source, "prompt": "{question}"}))
    assert whole["prompt"].startswith("title\nwords\n\nQuestion: what") and short["prompt"].startswith("what")
    for prompt in ("no field", "{gold}", "{question"):
        with pytest.raises(ValueError, match="prompt="):
            build.load(config(tiny_model, data={**source, "prompt": prompt}))
    dialogues = [{side: f"\n\nHuman: {n}\n\nAssistant: {side}" for side in ("chosen", "rejected")} for n in (0, 1)]
    write_jsonl("hh.jsonl", dialogues)
    (one,), _ = split(config(tiny_model, data={"type": "hh", "path": "hh.jsonl", "held_out": 0.5}))
    assert one["chosen"] == " chosen"


def test_a_tiny_base_is_made_of_the_training_records(
    tiny_model: Path,
    pairs: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RLKL_CACHE", "cache")
    tiny = {
        "type": "tiny",
        "texts": ["chosen"],
        "steps": 2,
        "hidden": 16,
        "layers": 1,
        "context": 32,
        "vocabulary": 260,
    }
    found = build.train(config(tiny_model, model=tiny, train={"epochs": 1}))
    assert found["pairs"] == 4 and models.context_length(models.reward_model("rm")[0]) == 32


def test_every_key_has_a_test_and_every_tested_key_exists() -> None:
    existing = {key for key in keys(RewardModelConfig) if not key.startswith("model.")}
    assert existing - SHOWN == set() and SHOWN - existing == set()
