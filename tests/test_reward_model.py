"""``rlkl reward-model``: what it reads, what it learns, what it measures and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tree, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlkl import RunError, models, scoring
from rlkl.cli import main
from rlkl.data.preferences import SIDES
from rlkl.reward_model import build, data, fit, measure

NO_TIES = np.array([0.9, 0.8, 0.4, 0.3, 0.1])


def config(tiny_model: Path, **changes: Any) -> Tree:
    """Pairs of which the one with "a" is preferred, on the tiny model."""
    held = {"type": "pairs", "path": "pairs.jsonl", "held_out": 0.25}
    return {
        "output": "rm",
        "kind": "sequence",
        "model": {"type": "pretrained", "path": str(tiny_model)},
        "data": held,
        "train": {"epochs": 5, "batch": 4, "learning_rate": 1e-2},
    } | changes


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tree]:
    """Sixteen prompts, in the test's own folder, which is the working one."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}:", "chosen": f" a{n % 3}a", "rejected": f" b{n % 5}b"} for n in range(16)]
    write_jsonl("pairs.jsonl", rows)
    return rows


def spans(count: int = 48) -> list[Tree]:
    """Completions in which every "z" is marked wrong, and every "q" half so."""
    rows = []
    for n in range(count):
        text = "".join("abzq"[hash((n, k)) // 7 % 4] + " " for k in range(8))
        marks = [{"start": k, "end": k + 1, "label": "wrong" if c == "z" else "half"} for k, c in enumerate(text) if c in "zq"]  # fmt: skip  # noqa: E501
        rows.append({"id": str(n), "prompt": f"{n}:", "completion": text, "spans": marks})
    return rows


def token_config(tiny_model: Path, **changes: Any) -> Tree:
    write_jsonl("spans.jsonl", spans())
    held = {"type": "annotated", "path": "spans.jsonl", "held_out": 0.25, "weights": {"wrong": -1, "half": -0.5}}
    fitted = {"epochs": 15, "batch": 8, "learning_rate": 1e-2}
    return config(tiny_model, kind="token", data=held, train=fitted) | changes


# What is measured, by hand


def test_average_precision_by_hand() -> None:
    bad = np.array([False, True, False, True, True])
    # From the lowest score: bad, bad, good, bad, good.
    assert measure.average_precision(NO_TIES, bad) == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert measure.average_precision(-NO_TIES, bad) == pytest.approx((1 / 2 + 2 / 4 + 3 / 5) / 3)
    assert measure.average_precision(np.zeros(5), bad) == pytest.approx(0.6)  # the base rate, whatever the order
    tied = np.array([0.0, 0.0, 1.0, 1.0])
    assert measure.average_precision(tied, np.array([True, False, True, True])) == pytest.approx(1 / 6 + 2 / 3 * 3 / 4)
    with pytest.raises(ValueError, match="nothing is marked bad"):
        measure.average_precision(NO_TIES, np.zeros(5, dtype=bool))


def test_accuracy_margin_log_loss_and_calibration_by_hand() -> None:
    margin = np.array([2.0, -1.0, 0.0, 2.1])
    found = measure.pairs(margin, ["x", "x", "y", "z"], seed=0)
    assert found["accuracy"] == pytest.approx(2.5 / 4) and found["margin"] == pytest.approx(3.1 / 4)
    assert found["log_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margin) / 4)
    sure = [1 / (1 + math.exp(-m)) for m in (2.0, 1.0, 0.0, 2.1)]
    assert [(b["pairs"], b["accuracy"]) for b in found["bins"]] == [(1, 0.5), (1, 0.0), (2, 1.0)]
    high = 2 - sure[0] - sure[3]
    assert found["ece"] == pytest.approx((0 + sure[1] + high) / 4) and found["records"] == 3
    assert measure.pairs(np.zeros(3), [1, 2, 3], 0)["log_loss"] == pytest.approx(math.log(2))


def test_intervals_resample_records_whole() -> None:
    value = np.array([0.0] * 50 + [1.0] * 50)
    alone = measure.interval(range(100), lambda i: float(value[i].mean()), 1)
    together = measure.interval([0] * 50 + [1] * 50, lambda i: float(value[i].mean()), 1)
    assert together == [0.0, 1.0] and 0.38 < alone[0] < 0.43 and 0.57 < alone[1] < 0.62
    assert measure.interval(range(100), lambda i: float(value[i].mean()), 2) != alone


def test_tokens_compare_with_the_best_constant_and_with_chance() -> None:
    target = np.array([-1.0, 0.0, 0.0, -0.5])
    found = measure.tokens(target, target, ["x", "x", "y", "y"], 0)
    assert (found["average_precision"], found["squared_error"], found["base_rate"]) == (1.0, 0.0, 0.5)
    assert found["variance"] == pytest.approx(target.var()) and found["lift"] == 0.5
    none = measure.tokens(target, abs(target), ["x", "x", "y", "y"], 0)
    assert none["average_precision"] is None and "lift" not in none["interval"]


# What is read


def read(source: Tree) -> tuple[list[Tree], list[Tree]]:
    return data.records(build.load(source).data, 0)


def test_dialogues_share_their_prompt_up_to_the_last_assistant(tiny_model: Path, pairs: Any) -> None:
    ask = "\n\nHuman: {}?\n\nAssistant:"
    rows = [{side: ask.format(n) + f" {side}" for side in SIDES} for n in range(3)]
    rows.append({"chosen": ask.format("a") + " yes" + ask.format("b") + " 1", "rejected": ask.format("a") + " yeah"})
    write_jsonl("hh.jsonl", rows)
    train, held = read(config(tiny_model, data={"type": "hh", "path": "hh.jsonl"}))
    found = sorted((r["prompt"], r["chosen"], r["rejected"]) for r in train + held)
    assert found[0] == (ask.format("0"), " chosen", " rejected")
    assert found[3] == (ask.format("a"), " yes" + ask.format("b") + " 1", " yeah")
    write_jsonl("hh.jsonl", [{"chosen": "x", "rejected": "y"}, rows[0]])
    with pytest.raises(ValueError, match=r"hh\.jsonl:1: chosen: shares no turn"):
        read(config(tiny_model, data={"type": "hh", "path": "hh.jsonl"}))


def qa(n: int, preference: list[int]) -> Tree:
    answers = {f"prediction {k}": f"answer {k}" for k in (1, 2, 3, 4)}
    feedback = {"errors": [], "missing-info": [], "corrected-prediction": "right"}
    held = {"question": f"what {n}", "passages": [["title", "words"]], "gold": "right"}
    return {**held, **answers, "feedback": feedback, "preference": preference}


def test_qa_feedback_gives_the_pairs_that_somebody_preferred(tiny_model: Path, pairs: Any) -> None:
    write_jsonl("qa.jsonl", [qa(0, [1, 2, 0, 0, 1, 2]), qa(1, [0, 0, 0, 0, 0, 0]), qa(2, [2, 0, 0, 0, 0, 0])])
    source = {"type": "qa-feedback", "path": "qa.jsonl", "held_out": 0.5, "prompt": "Q: {question} {{}}"}
    train, held = read(config(tiny_model, data=source))
    found = sorted((r["prompt"], r["chosen"][-1], r["rejected"][-1]) for r in train + held)
    first = [("1", "2"), ("2", "4"), ("3", "1"), ("4", "3")]
    assert found == [("Q: what 0 {}", *pair) for pair in first] + [("Q: what 2 {}", "2", "1")]
    assert {r["prompt"] for r in train}.isdisjoint({r["prompt"] for r in held})
    write_jsonl("qa.jsonl", [qa(0, [1, 3, 0, 0, 1, 2])])
    with pytest.raises(ValueError, match=r"qa\.jsonl: qa-feedback-1: preference: .*six numbers, each 0, 1 or 2"):
        read(config(tiny_model, data=source))


def test_rows_are_prompt_completion_and_one_eos(tiny_model: Path, pairs: list[Tree]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    row = {**pairs[0], "chosen": " a" + tokenizer.eos_token}
    (made,), _ = data.rows(build.load(config(tiny_model)).data, [row], tokenizer, 64)
    assert tokenizer.decode(made["chosen_ids"]) == "0: a" + tokenizer.eos_token
    assert tokenizer.decode(made["rejected_ids"]) == "0: b0b" + tokenizer.eos_token
    source = build.load(token_config(tiny_model)).data
    record = {"id": "0", "prompt": "p:", "completion": "azq", "spans": spans(1)[0]["spans"][:0]}
    record["spans"] = [{"start": 1, "end": 2, "label": "wrong"}, {"start": 2, "end": 3, "label": "half"}]
    (made,), _ = data.rows(source, [record], tokenizer, 64)
    assert tokenizer.decode(made["ids"]) == "p:azq" + tokenizer.eos_token
    asked = len(tokenizer("p:")["input_ids"])
    assert made["target"] == [None] * asked + [0.0, -1.0, -0.5, 0.0]


# What is learned


def test_a_sequence_model_learns_pairs_and_its_folder_is_an_ordinary_model(
    tiny_model: Path, pairs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yaml("rm.yaml", config(tiny_model))
    before = torch.get_rng_state()
    assert main(["reward-model", "rm.yaml"]) == 0 and torch.equal(torch.get_rng_state(), before)
    shown = capsys.readouterr()
    assert "accuracy" in shown.out and "12 pairs, 4 held out" in shown.err
    found = json.loads(Path("rm/evaluation.json").read_text())
    assert found["accuracy"] == 1.0 and found["log_loss"] < 0.3 and found["pairs"] == 4
    model = AutoModelForSequenceClassification.from_pretrained("rm")
    assert model.config.num_labels == 1 and models.reward_model("rm")[1].get_vocab()
    assert sorted(p.name for p in Path().iterdir()) == ["pairs.jsonl", "rm", "rm.yaml"]
    assert build.load("rm/reward_model.yaml") == build.load("rm.yaml")


def write_yaml(path: str, tree: Tree) -> None:
    Path(path).write_text(json.dumps(tree))  # JSON is YAML


def test_an_adapter_for_no_module_is_refused_before_the_training(tiny_model: Path, pairs: Any) -> None:
    lora = {"type": "pretrained", "path": str(tiny_model), "lora": {"targets": ["nope"]}}
    with pytest.raises(ValueError, match=r"model.lora.targets=\['nope'\]: .*; modules: .*q_proj"):
        build.train(config(tiny_model, model=lora))
    assert not Path(config(tiny_model)["output"]).exists()


def test_an_adapter_is_merged_and_trains_its_head(tiny_model: Path, pairs: Any) -> None:
    lora = {"type": "pretrained", "path": str(tiny_model), "lora": {"rank": 4}}
    found = build.train(config(tiny_model, model=lora, train={"epochs": 20, "batch": 4, "learning_rate": 3e-2}))
    assert found["accuracy"] == 1.0 and not Path("rm/adapter_config.json").exists()
    learned, base = models.reward_model("rm")[0], models.from_folder(tiny_model)[0]
    for name, weight in base.model.state_dict().items():
        assert torch.equal(weight, learned.model.state_dict()[name]) == ("proj" not in name), name


@pytest.mark.parametrize("pad", [None, "eos"])
def test_a_pad_token_that_is_eos_does_not_hide_the_end(
    tiny_model: Path, pairs: Any, pad: str | None, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token if pad else None
    folder = tmp_path / "base"
    models.from_folder(tiny_model)[0].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build.train(config(folder))
    model, own = models.reward_model("rm")
    rows = [[5, 6, own.eos_token_id], [7, own.eos_token_id]]
    batch = own.pad({"input_ids": rows}, return_tensors="pt")
    assert own.pad_token_id == model.config.pad_token_id != own.eos_token_id
    with torch.no_grad():
        theirs = model(**batch).logits.squeeze(-1)
    assert torch.allclose(theirs, scoring.scores(model, rows, 2), atol=1e-6)


def test_a_token_model_learns_marks_in_the_units_of_their_weights(tiny_model: Path, pairs: Any) -> None:
    found = build.train(token_config(tiny_model))
    assert found["average_precision"] > 0.95 and found["base_rate"] == pytest.approx(0.25, abs=0.1)
    assert found["squared_error"] < 0.25 * found["variance"]
    model, tokenizer = models.reward_model("rm", kind="token")
    rows, _ = data.rows(build.load(token_config(tiny_model)).data, spans(4), tokenizer, 64)
    scores = scoring.token_scores(model, [row["ids"] for row in rows], 4)
    for weight in (0.0, -0.5, -1.0):
        held = [s for x, r in zip(scores, rows, strict=True) for s, w in zip(x.tolist(), r["target"], strict=True) if w == weight]  # fmt: skip  # noqa: E501
        assert sum(held) / len(held) == pytest.approx(weight, abs=0.2)


def test_the_loss_of_tokens_by_hand() -> None:
    batch = fit.collate([{"ids": [1, 2, 3], "target": [None, -1.0, 0.5]}, {"ids": [4], "target": [0.0]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    logits = torch.tensor([[[9.0], [1.0], [0.0]], [[2.0], [9.0], [9.0]]])
    assert float(fit.regression({"logits": logits}, batch["labels"])) == pytest.approx((4 + 0.25 + 4) / 3)
    assert float(fit.regression({"logits": logits}, torch.full((2, 3), torch.nan))) == 0


# What is refused


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kind": "token"}, "data.type=pairs with kind=token: it learns from data.type=annotated"),
        ({"model.reference": "base"}, "model.reference=base: a reward model has none; drop the key"),
        ({"model.critic": "separate"}, "model.critic=separate: a reward model has none"),
        ({"data.held_out": 1.5}, "a share must lie between 0 and 1"),
        ({"data.max_tokens": 65}, "data.max_tokens=65: the model reads 64 at most; lower it"),
        ({"data.max_tokens": 3}, "data: 12 of 12 records are too long, the longest has"),
        ({"train.epoch": 1}, "train.epoch: unknown key, did you mean train.epochs?"),
        ({"model.path": "nowhere/at/all"}, "model.path=nowhere/at/all: no such folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    tiny_model: Path, pairs: Any, changes: Tree, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yaml("rm.yaml", config(tiny_model))
    assert main(["reward-model", "rm.yaml", *(f"{key}={value}" for key, value in changes.items())]) == 2
    said = capsys.readouterr().err
    assert why in said and len(said.splitlines()) == 1 and not Path("rm").exists()


def test_a_single_update_is_no_warm_up(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}] * 4
    settings = {"epochs": 1, "batch": 16, "learning_rate": 1e-2, "schedule": "cosine", "warmup": 0.1, "weight_decay": 0}
    fit.fit(tmp_path, tiny_model, rows, settings)
    (margin,) = (a - b for a, b in zip(*(score(tmp_path, rows[0][k]) for k in rows[0]), strict=True))
    begun, _ = models.beginner(tiny_model, "sequence", "path")
    learned, _ = models.reward_model(tmp_path)
    assert margin > 0 and not torch.equal(learned.base_model.norm.weight, begun.base_model.norm.weight)


def score(folder: Path, ids: list[int]) -> list[float]:
    return scoring.scores(models.reward_model(folder)[0], [ids], 1).tolist()


def test_a_training_that_diverges_writes_nothing(tiny_model: Path, pairs: list[Tree]) -> None:
    with pytest.raises(RunError, match=r"weights are not finite after it with learning_rate=1e\+30; lower it"):
        build.train(config(tiny_model, train={"epochs": 2, "batch": 4, "learning_rate": 1e30}))
    assert not Path("rm").exists()


def test_a_file_of_pairs_has_no_split(tiny_model: Path, pairs: list[Tree]) -> None:
    with pytest.raises(ValueError, match=r"data.split=test with data.path=.*jsonl: a .jsonl file is read whole; drop"):
        build.train(config(tiny_model), ["data.split=test"])


def test_an_output_that_cannot_be_made_names_its_key(
    tiny_model: Path, pairs: list[Tree], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    write_yaml("rm.yaml", config(tiny_model, output="file/rm"))
    assert main(["reward-model", "rm.yaml"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "rlkl: file/rm: cannot be written (File exists); choose another output=..."
    )


def test_a_full_folder_is_refused_and_only_a_reward_model_is_replaced(tiny_model: Path, pairs: Any) -> None:
    source = config(tiny_model, train={"epochs": 1})
    Path("rm").mkdir()
    Path("rm/mine.txt").write_text("dear")
    for overwrite, why in ((False, "output=rm: not empty; name another"), (True, "no reward model of ours")):
        with pytest.raises(ValueError, match=why):
            build.train(source, overwrite=overwrite)
    Path("rm/evaluation.json").write_text("{}")
    build.train(source, overwrite=True)
    assert not Path("rm/mine.txt").exists() and json.loads(Path("rm/evaluation.json").read_text())["pairs"] == 4


def test_a_training_that_fails_writes_nothing(
    tiny_model: Path, pairs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yaml("rm.yaml", config(tiny_model))
    monkeypatch.setattr(fit, "run_apart", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("one\ntwo: out of luck")))
    assert main(["reward-model", "rm.yaml"]) == 1
    assert "the reward model could not be trained: two: out of luck" in capsys.readouterr().err
    assert sorted(p.name for p in Path().iterdir()) == ["pairs.jsonl", "rm.yaml"]


def test_a_label_without_weight_is_refused(tiny_model: Path, pairs: Any) -> None:
    source = token_config(tiny_model)
    del source["data"]["weights"]["half"]
    with pytest.raises(ValueError, match=r"weights: none for 'half'"):
        build.train(source)


def test_a_trunk_that_looks_ahead_is_refused(tiny_model: Path) -> None:
    model = models.headed(tiny_model, "token").eval()
    scoring.check_causal(model, [5, 6, 7, 8])
    model.forward = lambda input_ids, **_: type("Out", (), {"logits": input_ids.flip(1)[..., None].float()})()
    with pytest.raises(ValueError, match="reads later tokens than the one it scores"):
        scoring.check_causal(model, [5, 6, 7, 8])


def test_a_head_of_another_name_learns_tokens_too(tiny_model: Path, pairs: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    for lora in (None, {"rank": 4}):
        base = {"type": "pretrained", "path": str(tmp_path / "gpt2"), "lora": lora}
        found = build.train(token_config(tiny_model, model=base, train={"epochs": 1}), overwrite=True)
        assert 0 < found["average_precision"] <= 1
