"""What annotations moved: means and errors computed by hand; and the warnings of losses without a good optimum."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tree, metrics, write_jsonl

import rlkl
from rlkl import moved, plots, settings, summary, terminal
from rlkl.sampling import given
from rlkl.types import PolicyOutput, Rollout

LOGP = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, 0.0], [-6.0, 0.0, 0.0]])
REF = torch.tensor([[-1.5, -2.0, -2.0], [-4.0, -7.0, 0.0], [-6.5, 0.0, 0.0]])


def rollout() -> Rollout:
    """Three completions of 3, 2 and 1 tokens."""
    return given([[1]] * 3, [[1, 1, 1], [1, 1], [1]], origin="data")


def policy(asked: Rollout, need: set[str]) -> PolicyOutput:
    """Log-probs from the table, by the number of the sample."""
    assert need == {"logp", "ref_logp"}
    return PolicyOutput(logp_BT=LOGP[asked.sample_id_B], ref_logp_BT=REF[asked.sample_id_B])


JUDGED: moved.Tokens = [[("bad", [1, 2]), ("bad", [2])], [("bad", [0]), ("good", [1])], []]


@pytest.mark.parametrize("micro_batch", [1, 2, 64])
def test_means_and_errors_are_those_computed_by_hand(micro_batch: int) -> None:
    marked = moved.mark(rollout(), {"spans": JUDGED})
    assert list(marked.mask_BT) == ["bad", "good", "marked", "unmarked"]
    assert torch.equal(marked.mask_BT["marked"], marked.mask_BT["bad"] | marked.mask_BT["good"])
    found = moved.measure(policy, marked, micro_batch)
    assert found["annotated/logp/bad"] == pytest.approx((-2 - 3 - 4) / 3), "a token in two spans of a label counts once"
    # sums -5 and -4 over 2 and 1 tokens, mean -3: residuals 1 and -1; C/(C-1) = 2
    assert found["annotated/logp/bad_stderr"] == pytest.approx(math.sqrt(2 * (1 + 1)) / 3)
    assert found["annotated/change/bad"] == pytest.approx((0 - 1 + 0) / 3)
    assert found["annotated/moved/bad"] == pytest.approx((0 + 1 + 0) / 3)
    assert found["annotated/change/bad_stderr"] == pytest.approx(math.sqrt(2 * ((1 / 3) ** 2 + (1 / 3) ** 2)) / 3)
    assert found["annotated/change/good"] == pytest.approx(2)
    assert math.isnan(found["annotated/logp/good_stderr"]), "one completion has no spread"
    assert found["annotated/logp/unmarked"] == pytest.approx((-1 - 6) / 2)
    assert found["annotated/moved/unmarked"] == pytest.approx((0.5 + 0.5) / 2)


def test_labels_of_two_sources_are_told_apart_and_unmarked_is_taken() -> None:
    others: moved.Tokens = [[("bad", [0])], [("odd", [0])], [("unmarked", [0])]]
    marked = moved.mark(rollout(), {"a": JUDGED, "b": others})
    assert list(marked.mask_BT) == ["a.bad", "good", "b.bad", "odd", "b.unmarked", "marked", "unmarked"]
    assert marked.mask_BT["b.bad"].tolist() == [[True, False, False], [False] * 3, [False] * 3]
    assert not marked.mask_BT["unmarked"].any(), "every token is in some span"


def test_only_policy_tokens_count_and_an_empty_label_is_left_out() -> None:
    marked = moved.mark(rollout(), {"a": [[], [("late", [2])], []]})
    assert not any("late" in key for key in moved.measure(policy, marked))


def test_what_is_kept_for_a_resumed_run_is_read_back_as_it_was(tmp_path: Path) -> None:
    marked = moved.mark(replace(rollout(), columns={"prompt": ["p"] * 3}), {"a": JUDGED, "b": [[("bad", [0])], [], []]})
    moved.keep(marked, tmp_path, main=True)
    again = moved.kept(tmp_path, 0, 1, torch.device("cpu"))
    assert again is not None and again.mask_BT.keys() == marked.mask_BT.keys()
    assert all(torch.equal(again.mask_BT[name], mask_BT) for name, mask_BT in marked.mask_BT.items())


def test_without_a_labeller_nothing_is_marked() -> None:
    assert moved.labelled(rollout(), {"f": (object(), 1.0)}) is None


def test_the_error_covers_the_mean_of_a_population() -> None:
    """Over many draws of 40 completions of unequal length, 95 % intervals hold the true ratio about as often."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(300):
        length_B = torch.randint(1, 8, (40,), generator=generator)
        level_B1 = torch.randn(40, 1, generator=generator) + 0.1 * length_B[:, None]  # clusters, informative sizes
        mask_BT = torch.arange(7) < length_B[:, None]
        found = moved._mean("x", (level_B1 + torch.randn(40, 7, generator=generator)).double(), mask_BT)
        sizes = torch.arange(1.0, 8.0)
        truth = float((0.1 * sizes * sizes).sum() / sizes.sum())
        hits += abs(found["x"] - truth) < 1.96 * found["x_stderr"]
    assert 0.90 < hits / 300 < 0.98


def labels(text: str) -> list[dict[str, Any]]:
    """Every letter is marked."""
    ASKED.append(text)
    return [{"start": i, "end": i + 1, "label": "letter"} for i, c in enumerate(text) if c.isalpha()]


ASKED: list[str] = []


def test_a_watched_labeller_marks_the_base_samples_once(tiny_config: Tree) -> None:
    """Whatever the trainer: what reinforcement of something else did to the tokens that the labeller marks."""
    source = {"type": "annotations", "labeller": "test_moved:labels", "weights": {"letter": 1}, "weight": 0}
    tiny_config["rewards"]["letters"] = source
    tiny_config["evaluate"]["every"] = 1
    rows = metrics(rlkl.train(tiny_config))
    keys = {key for key in rows[0] if key.startswith("annotated/")}
    assert {"annotated/change/letter", "annotated/moved/unmarked_stderr"} <= keys
    assert all(keys <= row.keys() for row in rows)
    assert {
        rows[0][f"annotated/{kind}/{label}"] for kind in ("change", "moved") for label in ("letter", "unmarked")
    } == {0}
    assert rows[2]["annotated/moved/letter"] > rows[1]["annotated/moved/letter"] > 0
    shift = rows[2]["annotated/logp/letter"] - rows[0]["annotated/logp/letter"]
    assert rows[2]["annotated/change/letter"] == pytest.approx(shift, abs=1e-6), "the samples are the same ones"
    assert rows[2]["reward/queries"] == 8, "those of the function alone"


# What a run says


def test_the_line_of_an_evaluation_tells_what_moved() -> None:
    values = {"kl/sequence": 1.0, "kl/sequence_stderr": 0.1, "policy/eval/length": 3.0}
    values |= {"annotated/change/bad": -0.5, "annotated/change/bad_stderr": 0.25, "annotated/logp/bad": -3.0}
    assert "eval @ 2: Δlog p bad -0.500 ± 0.250  KL 1.000 ± 0.100" in terminal.evaluation_line(2, values)


def test_the_figure_of_a_run_without_rewards_has_a_panel_for_each_thing_it_has(
    tiny_config: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[list[str]] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: titles.append([a.get_title() for a in figure.axes]))
    rows = [{"step": 0, "kl/sequence": 0.0, "kl/sequence_stderr": None}]
    moves = {"annotated/change/bad": -1.0, "annotated/change/bad_stderr": None}
    reward = {"reward/eval/x": 1.0, "reward/eval/x_stderr": 0.1}
    for more in ({}, moves, reward):
        write_jsonl("metrics.jsonl", [{**row, **more} for row in rows])
        plots.curves(Path("."))
    assert titles == [
        ["KL to the reference"],
        ["What annotations moved", "KL to the reference"],
        ["Reward", "KL to the reference"],
    ]


def hazards(**changes: Any) -> list[str]:
    """Warnings of a configuration of token likelihood on stored data."""
    config: Tree = {
        "name": "x",
        "model": {"type": "facts"},
        "data": {"type": "annotated", "path": "x.jsonl"},
        "rewards": {"spans": {"type": "annotations", "weights": changes.pop("weights", {"a": 1, "b": -0.5})}},
        "trainer": {"type": "token_likelihood", **changes.pop("trainer", {})},
        "kl": {"placement": "loss", "estimator": "exact_local", "beta": 0.1, **changes.pop("kl", {})},
    }
    return list(summary.hazards(settings.load({**config, **changes})))


SIGNED = {"loss": "signed"}
OWN = {"credit": {"horizon": 1}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainer": SIGNED}, "down to -0.5: unbounded below; reverse KL does not bound it"),
        ({"trainer": SIGNED, "kl": {"beta": 0}}, "unbounded below, and kl.beta=0 holds nothing"),
        ({"trainer": SIGNED, "kl": {"estimator": "exact_forward"}}, "that is pi0 above 5, which no token has"),
        ({**OWN, "trainer": SIGNED, "kl": {"estimator": "exact_forward", "beta": 2}}, "that is pi0 above 0.25; raise"),
        (
            {"trainer": SIGNED, "kl": {"estimator": "exact_forward", "beta": 2}},
            "0.25 for a single mark, and more where",
        ),
        ({"trainer": {"loss": "npo", "kappa": 0.5}}, "kappa=0.5: below 1 its optimum is metastable"),
        ({"trainer": {"loss": "rwr"}, "kl": {"placement": "reward", "estimator": "k1"}}, "note: trainer.loss=rwr"),
        (
            {"trainer": {"loss": "binary"}, "kl": {"placement": "reward", "estimator": "k1"}},
            "note: trainer.offset=state",
        ),
    ],
)
def test_a_loss_without_a_good_optimum_is_announced(changes: Tree, said: str) -> None:
    (line,) = hazards(**changes)
    assert said in line


def test_what_is_only_watched_teaches_nothing_and_negative_weights_of_spans_count() -> None:
    source = {"type": "function", "path": "rlkl.tasks.facts:gold", "weight": 0}
    watched = {"name": "x", "model": {"type": "facts"}, "data": {"type": "facts"}, "rewards": {"gold": source}}
    (line,) = summary.hazards(settings.load({**watched, "trainer": {"type": "reinforce"}}))
    assert "nothing is learned from them" in line
    config = {"name": "x", "model": {"type": "facts"}, "data": {"type": "annotated", "path": "x.jsonl"}, "rewards": {}}
    config["rewards"] = {"spans": {"type": "annotations", "weights": {"a": 1}}}
    config |= {"trainer": {"type": "token_likelihood", **SIGNED}, "kl": {"beta": 0}}
    assert list(summary.hazards(settings.load(config))) == []
    assert "weights down to -3" in next(summary.hazards(settings.load(config), lightest=-3.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": {"loss": "unlikelihood"}},
        {"trainer": {"loss": "npo"}},
        {"trainer": SIGNED, "weights": {"a": 1.0, "b": 0.0}},
        {"trainer": {"loss": "npo", "kappa": 0.5}, "weights": {"a": 1.0}},
    ],
)
def test_losses_that_are_bounded_are_not(changes: Tree) -> None:
    assert hazards(**changes) == []


def test_warnings_come_before_the_first_step(tiny_config: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config["rewards"] = {"p": {"type": "function", "path": "test_metrics_doc:parity", "level": "token"}}
    tiny_config |= {"trainer": {"type": "token_likelihood", "loss": "signed"}}
    tiny_config["kl"] = {"placement": "loss", "estimator": "exact"}
    rlkl.train(tiny_config)
    lines = capsys.readouterr().out.splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith("warning: trainer.loss=signed")]
    assert place < next(i for i, line in enumerate(lines) if line.startswith("eval @ 0"))
    config = settings.load(tiny_config)
    assert "# warning: trainer.loss=signed" in summary.describe(config)
