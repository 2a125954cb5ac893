"""benchmarks/corrections.py: scores are the source's own, shares are counted right; what its scorer learns from."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, Tree, write_jsonl

from benchmarks import corrections
from rlkl import settings
from rlkl.tasks.pretrain import laid_out

ROWS = [
    {"question": f"Who is {n}?", "prediction": f"It is {n} and {n}.", "corrected_prediction": f"It is {n}."}
    for n in ("fox", "dog", "cat", "man", "bee", "owl", "elk", "emu", "ant")
] + [
    {"question": "Same?", "prediction": "Yes.", "corrected_prediction": "Yes."},
    {"question": "Empty?", "prediction": "Yes.", "corrected_prediction": " "},
    {"question": "Longer?", "prediction": "No.", "corrected_prediction": "No, it is not, and never was."},
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl("ann.jsonl", ROWS)
    tree: Tree = yaml.safe_load((ROOT / "configs" / "corrections.yaml").read_text())
    tree["model"] = {"type": "pretrained", "path": str(tiny_model)}
    tree["data"] |= {"path": "ann.jsonl", "held_out": 0.9}
    tree["rollout"] = {"max_new_tokens": 8}
    score = tree["rewards"]["score"]
    score |= {"template_conditional": "{question} {x_prime}", "template_marginal": "It: {x_prime}"}
    path = tmp_path / "corrections.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_shares_follow_from_the_scores_of_the_source(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cs = [0.0, 0.6, 1.0]
    found = corrections.measure(str(config), [], "corrected_prediction", "prediction", cs)
    assert [(row["score"], row["c"]) for row in found["rows"]] == [
        (kind, c) for kind in ("of the text", "a token") for c in cs
    ]
    loaded = settings.load(config)
    _, held = corrections.records(loaded.data, loaded.seed)
    kept = [row for row in held if row["question"] not in ("Same?", "Empty?")]
    assert found["notes"][0].startswith(f"{len(kept)} of {len(held)} held-out records") and len(kept) < len(held)
    model, _, tokenizer = corrections.models.load(loaded.model, [], 0)
    for row in found["rows"]:
        reward = corrections.CounterfactualReward("score", loaded.rewards["score"].model_copy(update={"c": row["c"]}))
        reward.check(tokenizer)
        reward.bind(corrections.Policy(model).eval())
        totals = []
        for column in ("corrected_prediction", "prediction"):
            rollout = corrections.stored(kept, column, tokenizer)
            total = reward(rollout).value_BT.sum(-1)
            totals.append((total / rollout.length_B if row["score"] == "a token" else total).numpy())
        assert row["share"] == pytest.approx(float(np.mean(totals[0] > totals[1])))
        assert row["interval"][0] <= row["share"] <= row["interval"][1]
    assert len({row["share"] for row in found["rows"]}) > 1
    corrections.main([str(config), "--c", "0.6"])
    assert "share of corrected_prediction above prediction" in " ".join(capsys.readouterr().out.split())


def test_swapped_columns_give_the_complement(config: Path) -> None:
    found, swapped = (
        corrections.measure(str(config), [], *columns, [0.5])["rows"]
        for columns in (("corrected_prediction", "prediction"), ("prediction", "corrected_prediction"))
    )
    assert [a["share"] + b["share"] for a, b in zip(found, swapped, strict=True)] == pytest.approx([1.0, 1.0])


def test_what_cannot_be_compared_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="nothing: no text in every record; name another column"):
        corrections.measure(str(config), [], "nothing", "prediction", [0.5])
    with pytest.raises(ValueError, match="needs one counterfactual source under rewards"):
        corrections.measure(str(config), ["rewards={f: {type: function, path: 'm:f'}}"], "a", "b", [0.5])
    for words, code, said in (
        (["data.path=nowhere.jsonl"], 2, "nowhere.jsonl: no such file"),
        (["--better", "prediction", "seed=1"], 2, "no held-out record has a prediction that is another text"),
        (["--c", "0.5", "-1", "--worse", "prediction"], 2, "--c -1: must be finite and at least 0"),
        (
            ["rewards.score.template_marginal=" + "It: " * 99 + "{x_prime}"],
            1,
            "tokens in template_marginal; the scorer",
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            corrections.main([str(config), *words])
        told = capsys.readouterr().err
        assert caught.value.code == code and said in told and told.count("\n") == 1


def test_a_tiny_model_may_learn_templates() -> None:
    rows = [{"q": "who?", "a": "she"}, {"q": "why?", "a": "so"}]
    assert laid_out(["q", "a"], rows) == ["who? she", "why? so"]
    assert laid_out(["Q: {q}\nA: {a}", "{a}"], rows) == [
        ("Q: who?\nA: ", "she"), ("Q: why?\nA: ", "so"), ("", "she"), ("", "so"),
    ]  # fmt: skip
    for texts, said in (
        (["{q}", "a"], "use one kind"),
        (["{q} {b}"], "'b' is not text in every record"),
        (["{a}."], "ends in text"),
    ):
        with pytest.raises(ValueError, match=said):
            laid_out(texts, rows)
