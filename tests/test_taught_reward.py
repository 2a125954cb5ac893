"""Reward models that learn from labels during a run: budgets, schedules, what they learn from, resuming, failures."""

import itertools
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import taught
import torch
import yaml
from conftest import Tree, metrics
from safetensors.torch import load_file
from taught import quick_fit
from test_distributed import torchrun

import rlkl
from rlkl import RunError, Stopped, cli, lessons, models, runs, scoring, search, settings
from rlkl.config import LearnedSource, dump
from rlkl.rewards.learned import LearnedReward
from rlkl.rewards.taught import TaughtReward

ONLINE: Tree = {"schedule": "online", "start": 0.5, "every": 2}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training takes no time."""
    monkeypatch.setattr("rlkl.rewards.taught.fit", quick_fit)
    taught.asked.clear()
    taught.fits.clear()
    yield
    taught.dies[0] = 10**9


@pytest.fixture
def config(tiny_config: Tree) -> Tree:
    """Six steps of 2 prompts x 4 samples, four pairs a step, on a model that learns from a dozen comparisons."""
    base = tiny_config["model"]["path"]
    rm = {"type": "learned", "path": base, "labeller": "taught:prefer", "budget": 12}
    varied = {**tiny_config["rewards"]["varied"], "weight": 0}
    rollout = {"prompts": 2, "samples_per_prompt": 4, "max_new_tokens": 6}
    watch = {"prompts": 2, "samples_per_prompt": 2, "every": 3, "gold": "varied"}
    more = {"rewards": {"rm": rm, "varied": varied}, "rollout": rollout, "evaluate": watch, "save": {"every": 2}}
    return {**tiny_config, **more, "train": {"steps": 6}}


def changed(config: Tree, **keys: Any) -> Tree:
    return {**config, "rewards": {**config["rewards"], "rm": {**config["rewards"]["rm"], **keys}}}


def column(rows: list[Tree], name: str) -> list[Any]:
    return [row.get(name) for row in rows]


@pytest.mark.usefixtures("quick")
def test_frozen_spends_its_budget_before_the_first_step_and_learns_once(config: Tree) -> None:
    rows = metrics(rlkl.train(config))
    assert column(rows, "reward/labels") == [12] * 7 and len(taught.asked) == 12 and len(taught.fits) == 1
    assert column(rows, "reward/queries")[1:] == [8 * n for n in range(1, 7)]
    ties = sum(taught.prefer(*texts) == 0 for texts in list(taught.asked))
    assert rows[0]["reward/learn/rm/rows"] == 12 - ties == taught.fits[0]["rows"]


@pytest.mark.usefixtures("quick")
def test_online_spends_the_same_budget_in_parts_and_learns_from_all_labels_so_far(config: Tree) -> None:
    rows = metrics(rlkl.train(changed(config, **ONLINE)))
    assert column(rows, "reward/labels") == [6, 6, 10, 10, 12, 12, 12] and len(taught.asked) == 12
    learned = column(rows, "reward/learn/rm/rows")
    assert [n for n, x in enumerate(learned) if x is not None] == [0, 2, 4]
    fits = [fit["rows"] for fit in taught.fits]  # where a batch has ties alone, there is nothing new to learn from
    assert fits == sorted({x for x in learned if x is not None}) and len(fits) > 1
    known = [n for n in (2, 4) if learned[n] != learned[n - 2]]
    assert all(0 <= rows[n]["reward/learn/rm/agreement"] <= 1 for n in known)
    later = json.loads(Path("runs/tiny/rewards/rewards.json").read_text())["rm"]
    assert len(later["rows"]) == learned[4] and later["spent"] == 12


@pytest.mark.usefixtures("quick")
def test_both_schedules_begin_with_the_same_samples_and_end_with_as_many_labels(config: Tree) -> None:
    frozen = metrics(rlkl.train(config))
    first = list(taught.asked)
    taught.asked.clear()
    online = metrics(rlkl.train(changed(config, **ONLINE), ["name=online"]))
    assert taught.asked[:6] == first[:6] and taught.asked[6:] != first[6:]
    assert frozen[-1]["reward/labels"] == online[-1]["reward/labels"] == 12


@pytest.mark.usefixtures("quick")
def test_a_whitened_model_that_learned_anew_is_divided_by_its_own_spread(config: Tree) -> None:
    folder = rlkl.train(changed(config, **ONLINE, whiten=True), ["save.keep=9"])
    counts = [
        json.loads((folder / "checkpoints" / f"step_{n}" / "rewards.json").read_text())["rm"]["spread"]["count"]
        for n in (2, 4)
    ]
    fitted = [row.get("reward/learn/rm/rows") for row in metrics(folder)]
    assert counts[0] == (0 if fitted[2] != fitted[0] else 16)
    assert counts[1] == (0 if fitted[4] != fitted[2] else counts[0] + 16) and 0 in counts
    assert all(row["reward/std/rm"] > 0 for row in metrics(folder)[1:])


@pytest.mark.usefixtures("quick")
def test_a_signal_while_it_learns_before_the_first_step_ends_the_run(
    config: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = taught.prefer

    def prefer(first: str, second: str) -> int:
        if len(taught.asked) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(first, second)

    monkeypatch.setattr(taught, "prefer", prefer)
    with pytest.raises(Stopped, match="stopped before the first step") as stopped:
        rlkl.train(changed(config, budget=4000))
    assert stopped.value.code == 143 and len(taught.asked) == 8  # those of the batch under way
    assert not taught.fits and not list(Path("runs/tiny/checkpoints").glob("*"))
    monkeypatch.setattr(taught, "prefer", ask)
    assert metrics(rlkl.train(changed(config, budget=4000), ["rewards.rm.budget=12"], overwrite=True))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("cap", "step", "labels"), [(10, 3, 10), (11, 3, 10), (12, 6, 12), (100, 6, 12)])
def test_a_cap_on_labels_knows_when_it_asks_and_for_how_many(config: Tree, cap: int, step: int, labels: int) -> None:
    """Six labels before the first step, four (pairs of 16 samples) at step 2, and the last two at step 4."""
    whole = {**changed(config, **ONLINE), "train": {"steps": 6, "budget": {"labels": cap}}}
    last = metrics(rlkl.train(whole))[-1]
    assert (last["step"], last["reward/labels"]) == (step, labels)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"labeller": "taught:letters"}, "taught:letters: is called with (completion_a, completion_b) and takes"),
        (
            {"labeller": "taught:prefer", "level": "token", "weights": {"letter": 1.0}},
            "taught:prefer: is called with (completion) and takes (first: str, second: str) -> int; let it take that",
        ),
    ],
)
def test_a_labeller_of_another_kind_is_refused_before_the_start(config: Tree, keys: Tree, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        rlkl.train(changed(config, **keys))
    assert not Path("runs").exists()


@pytest.mark.usefixtures("quick")
def test_how_far_the_labels_are_is_said_now_and_then(config: Tree, monkeypatch, capsys) -> None:
    ticks = itertools.count(0, 6)  # a batch of 8 samples and 4 labels takes 6 seconds
    monkeypatch.setattr(lessons, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    rlkl.train(changed(config, budget=40))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("before the first step")]
    assert said == [
        f"before the first step: asked about {n} samples so far; 40 labels are wanted" for n in (16, 32, 48, 64)
    ]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_what_it_could_not_read_costs_no_label(level: str, config: Tree) -> None:
    marks = {"level": "token", "labeller": "taught:letters", "weights": {"letter": 1.0}} if level == "token" else {}
    whole = settings.load(changed(config, **marks))
    from rlkl.lane import build

    lane = build(whole)
    lane.reward.sources["rm"][0].scorer.context = 9  # type: ignore[attr-defined]
    with pytest.raises(RunError, match=r"has \d+ tokens with its prompt, and the model reads at most 9"):
        lessons.prepare(lane)
    assert not taught.asked


@pytest.mark.usefixtures("quick")
def test_rows_are_what_the_model_reads_when_it_scores(config: Tree) -> None:
    rlkl.train(config)
    (rm,) = [json.loads(Path("runs/tiny/rewards/rewards.json").read_text())["rm"]]
    _, tokenizer = models.from_folder(config["model"]["path"])
    pairs = [(row["chosen_ids"], row["rejected_ids"]) for row in rm["rows"]]
    assert all(side[-1] == tokenizer.eos_token_id and side.count(side[-1]) == 1 for pair in pairs for side in pair)
    said = [[tokenizer.decode(ids[:-1]) for ids in pair] for pair in pairs]
    preferred = [(a, b) if taught.prefer(a, b) == 1 else (b, a) for a, b in list(taught.asked)[:12]]
    told = iter(said)
    for better, worse in preferred:
        if taught.prefer(better, worse):
            chosen, rejected = next(told)
            assert chosen.endswith(better) and rejected.endswith(worse) and chosen.startswith("Line ")


@pytest.mark.usefixtures("quick")
def test_a_token_model_learns_the_weights_of_marks(config: Tree) -> None:
    keys = {"level": "token", "labeller": "taught:letters", "weights": {"letter": -2.0}, "budget": 10}
    rows = metrics(rlkl.train(changed(config, **keys, schedule="online", every=2)))
    assert column(rows, "reward/labels") == [5, 5, 10, 10, 10, 10, 10] and len(taught.asked) == 10
    held = json.loads(Path("runs/tiny/rewards/rewards.json").read_text())["rm"]["rows"]
    _, tokenizer = models.from_folder(config["model"]["path"])
    assert len(held) == 10
    for row in held:
        assert len(row["ids"]) == len(row["target"])
        own = [(i, w) for i, w in zip(row["ids"], row["target"], strict=True) if w is not None]
        assert 0 < len(own) < len(row["ids"])
        said = [(tokenizer.decode([i]), w) for i, w in own]
        assert all(w == -2.0 * sum(map(str.isalpha, text)) for text, w in said if text.isascii() and text != "<eos>")
    assert any(w == -2.0 for row in held for w in row["target"])
    assert 0 <= rows[2]["reward/learn/rm/agreement"] <= 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("schedule", ["frozen", "online"])
@pytest.mark.parametrize("step", [3, 5])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(
    schedule: str, step: int, config: Tree, monkeypatch: Any
) -> None:
    config = changed(config, **(ONLINE if schedule == "online" else {}))
    whole = rlkl.train(config, ["name=whole"])
    from rlkl import loop

    own = loop.train_step

    def broken(lane: Any, at: int, accelerator: Any) -> dict[str, float]:
        if at == step:
            raise RunError("enough")
        return own(lane, at, accelerator)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", broken)
        with pytest.raises(RunError, match="enough"):
            rlkl.train(config, ["name=cut"])
    before = len(taught.fits)
    again = rlkl.train(config, ["name=cut"], resume=True)
    assert len(taught.fits) - before == (1 if (schedule, step) == ("online", 3) else 0)
    assert metrics(again) == metrics(whole)
    for name in ("rewards/rewards.json", "rewards/rewards.safetensors", "final/model.safetensors", "samples.jsonl"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.usefixtures("quick")
def test_the_gap_is_in_deviations_of_the_untrained_samples_whatever_the_scale(config: Tree) -> None:
    rows = metrics(rlkl.train(config := changed(config, **ONLINE)))
    watched = [row for row in rows if "reward/eval/rm" in row]
    assert watched[0]["reward/eval/gap/rm"] == pytest.approx(0, abs=1e-6) and "reward/eval/gap/varied" not in rows[0]
    from rlkl import lane

    reward = lane.build(settings.load(config)).reward
    assert isinstance(reward.sources["rm"][0], TaughtReward)
    state = load_file("runs/tiny/rewards/rewards.safetensors")
    assert {name.partition("/")[0] for name in state} == {"rm"}
    from rlkl import recording
    from rlkl.checkpoint import load_rewards

    reward.load_state_dict(load_rewards(Path("runs/tiny/rewards")))
    tokenizer = models.from_folder(config["model"]["path"])[1]
    untrained = recording.load(Path("runs/tiny/untrained"), 0, tokenizer=tokenizer)
    reward.sources["rm"][0].check(tokenizer)
    base = {name: reward.share(name, untrained).sum(-1).double() for name in ("rm", "varied")}
    z = {
        name: (watched[-1][f"reward/eval/{name}"] - float(x.mean())) / float(x.std(correction=0))
        for name, x in base.items()
    }
    assert watched[-1]["reward/eval/gap/rm"] == pytest.approx(z["rm"] - z["varied"], rel=1e-3)


@pytest.mark.usefixtures("quick")
def test_a_finished_run_is_evaluated_with_the_model_that_it_taught(config: Tree) -> None:
    folder = rlkl.train(changed(config, **ONLINE))
    found = runs.evaluate_run(folder, None, None, None)
    assert found["reward/eval/rm"] == pytest.approx(metrics(folder)[-1]["reward/eval/rm"], rel=1e-5)
    with pytest.raises(
        ValueError, match=r"rewards\.rm: it learns from labels in the course of a run, and a search trains"
    ):
        search.search(folder / "config.yaml", prompts=1, samples=2, best=1)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("schedule", ["frozen", "online"])
@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"labeller": "taught:dead"}, "labeller, samples 0 and 1: ConnectionError: nobody home"),
        ({"labeller": "taught:wrong"}, "returned 'a'; return 1 or 2 for the better, or 0 for a tie"),
        ({"labeller": "taught:tie"}, "comparisons are ties, so there is nothing to learn; raise budget"),
        ({"fit": {"learning_rate": 2.0}}, "reward rm: the reward model could not be trained: it went astray"),
        (
            {"labeller": "taught:dead", "level": "token", "weights": {"a": 1.0}},
            "reward rm: sample 0: ConnectionError: nobody home",
        ),
    ],
)
def test_what_fails_is_one_line_and_exit_1(
    schedule: str, keys: Tree, why: str, config: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(changed(config, schedule=schedule, **keys)))
    assert cli.main(["train", "c.yaml"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "before the first step:" in line]
    assert len(lines) == 1 and why in lines[0]


@pytest.mark.usefixtures("quick")
def test_a_labeller_that_leaves_stops_the_run_with_a_checkpoint(config: Tree) -> None:
    taught.dies[0] = 7
    with pytest.raises(RunError, match=r"step 2: reward rm: the labeller, samples .*the labeller left"):
        rlkl.train(changed(config, **ONLINE), ["save.every=1"])
    taught.dies[0] = 10**9
    assert [path.name for path in Path("runs/tiny/checkpoints").iterdir()] == ["step_1"]
    assert metrics(rlkl.train(changed(config, **ONLINE), ["save.every=1"], resume=True))[-1]["reward/labels"] == 12


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"budget": None}, "labeller=taught:prefer without budget"),
        ({"labeller": None}, "budget=12 without labeller"),
        ({"labeller": None, "budget": None, "schedule": "online"}, "schedule=online without labeller"),
        ({"labeller": None, "budget": None, "fit": {"epochs": 3}}, "fit=... without labeller"),
        ({"every": 3}, "every=3 with schedule=frozen"),
        ({"start": 0.1}, "start=0.1 with schedule=frozen"),
        ({"level": "sentence"}, "level=sentence with a labeller"),
        ({"level": "token"}, "level=token: needs weights"),
        ({"weights": {"a": 1.0}}, "level=sequence: compares: drop weights"),
        ({"labeller": "taught:nobody"}, "module taught has no function nobody"),
        ({"path": "./nowhere"}, "rewards.rm.path=./nowhere: no such folder"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_the_start(keys: Tree, why: str, config: Tree) -> None:
    with pytest.raises(ValueError, match=why.replace(".", r"\.")):
        rlkl.train(changed(config, **keys))
    assert not Path("runs").exists()


def test_single_samples_stored_data_and_an_unknown_gold_are_refused(config: Tree) -> None:
    single = {**config, "credit": {"baseline": "none"}}
    with pytest.raises(ValueError, match=r"rewards\.rm\.labeller with rollout\.samples_per_prompt=1"):
        settings.load(single, ["rollout.samples_per_prompt=1"])
    with pytest.raises(ValueError, match=r"evaluate\.gold=rmm: no such reward; name one of rm, varied"):
        settings.load(config, ["evaluate.gold=rmm"])
    spans = {"type": "annotations", "weights": {"a": 1.0}, "weight": 0.0}
    with pytest.raises(ValueError, match=r"evaluate\.gold=spans: stored spans"):
        settings.load({**config, "rewards": {**config["rewards"], "spans": spans}}, ["evaluate.gold=spans"])
    stored = {
        **config,
        "data": {"type": "annotated", "path": "a.jsonl"},
        "trainer": {"type": "token_likelihood"},
        "kl": {"placement": "loss", "estimator": "exact_local"},
        "rollout": {"prompts": 2, "max_new_tokens": 6},
    }
    stored["rewards"] = {**changed(config, weight=0.0)["rewards"], "s": {"type": "annotations", "weights": {"a": 1.0}}}
    with pytest.raises(ValueError, match=r"rewards\.rm\.labeller with data\.type=annotated"):
        settings.load(stored)


def test_a_run_too_short_for_its_budget_is_told_before_the_start(config: Tree) -> None:
    from rlkl import summary

    def told(**keys: Any) -> list[str]:
        return [text for text in summary.hazards(settings.load(changed(config, **keys))) if "budget" in text]

    assert told() == told(**ONLINE) == []  # 6, and 4 in each of steps 2, 4 and 6
    assert told(**ONLINE | {"every": 5}) == [
        "note: rewards.rm can ask for 10 of its budget of 12 labels in 6 steps; lower every, or the budget"
    ]


def test_its_configuration_reloads(config: Tree) -> None:
    for keys in ({}, ONLINE, {"level": "token", "weights": {"a": 1.0}}):
        loaded = settings.load(changed(config, **keys))
        assert settings.load(dump(loaded)) == loaded


def test_it_learns_what_the_labeller_likes(config: Tree) -> None:
    """The real training, in a process apart: the model agrees with the labeller about completions of its own run."""
    keys = {"budget": 200, "fit": {"epochs": 8, "learning_rate": 3e-3, "batch": 8}}
    folder = rlkl.train(changed(config, **keys), ["train.steps=1", "rollout.prompts=6", "rollout.samples_per_prompt=8"])
    held = json.loads((folder / "rewards/rewards.json").read_text())["rm"]["rows"]
    source = TaughtReward("rm", settings.load(changed(config, **keys)).rewards["rm"])  # type: ignore[arg-type]
    weights = load_file(folder / "rewards/rewards.safetensors")
    source.scorer.model.load_state_dict({name.removeprefix("rm/model."): x for name, x in weights.items()})
    model = source.scorer.model
    chosen, rejected = (scoring.scores(model, [row[f"{s}_ids"] for row in held], 64) for s in ("chosen", "rejected"))
    assert float((chosen > rejected).float().mean()) > 0.8
    assert isinstance(source.scorer, LearnedReward) and isinstance(source.config, LearnedSource)
    assert not any(p.requires_grad for p in model.parameters()) and torch.isfinite(chosen).all()


def test_two_processes_teach_as_one_does(config: Tree, tmp_path: Path) -> None:
    config = changed(config, **ONLINE)
    config["rollout"] = {**config["rollout"], "prompts": 3}
    config["train"] = {"steps": 3}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    torchrun(2, "-m", "rlkl", "train", "config.yaml", "name=two")
    one, two = metrics(rlkl.train(config, ["name=one"])), metrics(tmp_path / "runs" / "two")
    rows = [json.loads(Path(f"runs/{name}/rewards/rewards.json").read_text())["rm"]["rows"] for name in ("one", "two")]
    assert rows[0] == rows[1]
    for ours, theirs in zip(one, two, strict=True):
        known = {name: x for name, x in ours.items() if x is not None}
        assert known == pytest.approx({name: theirs[name] for name in known}, rel=1e-3, abs=1e-4)
