"""What a comparison is made of: its keys, the runs that they name, and the mistakes that are found before the start."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Tree
from test_compare import SCORES, SHOWN, base, said, shows

from rlkl import settings, tracking
from rlkl.cli import main
from rlkl.config.compare import CompareConfig
from rlkl.grid import plan, results, workers

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = [FOLDER / "fix.yaml", *sorted((FOLDER / "compare").glob("*.yaml"))]
Make = Callable[..., plan.Plan]


@pytest.fixture(name="tree")
def tree_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A comparison of two objectives, in the test's own folder, which is the working one; nothing here trains."""
    monkeypatch.chdir(tmp_path)
    Path("scores.py").write_text(SCORES)
    return {
        "name": "two",
        "base": base(Path("model")),
        "arms": {"reinforce": {}, "ppo": {"trainer": {"type": "ppo", "epochs": 2}}},
        "seeds": [0],
    }


@pytest.fixture(name="refused")
def refused_(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``refused(words, **keys)``: what stands on stderr where these end in exit 2, with nothing written."""
    monkeypatch.setattr(workers, "work", lambda *_: pytest.fail("started"))

    def run(*words: str, **keys: Any) -> str:
        Path("c.yaml").write_text(yaml.safe_dump(tree | keys, sort_keys=False))
        there = set(Path().rglob("*"))
        code, _, err = said("c.yaml", *words)
        assert code == 2, err
        assert set(Path().rglob("*")) == there
        return err.removeprefix("rlkl: ").removesuffix("\n")

    return run


def names(made: plan.Plan) -> list[str]:
    return [run.config.name for run in made.runs]


@shows("axes")
def test_axes_are_crossed_with_arms_and_name_the_runs(tree):
    axes = {"kl.beta": [0.05, 0.1], "optimiser": {"betas": [[0.8, 0.9], [0.9, 0.99]]}}
    made = plan.make(tree | {"axes": axes, "seeds": [4, 2]})
    assert len(made.runs) == 2 * 2 * 2 * 2
    assert names(made)[:2] == ["reinforce,beta=0.05,betas=0.8-0.9,seed=4", "reinforce,beta=0.05,betas=0.9-0.99,seed=4"]
    assert list(made.arms)[-1] == "ppo,beta=0.1,betas=0.9-0.99"
    last = made.runs[-1].config
    assert (last.kl.beta, last.optimiser.betas, last.trainer.type, last.seed) == (0.1, (0.9, 0.99), "ppo", 2)
    assert [run.config.seed for run in made.runs] == [4] * 8 + [2] * 8  # every arm early


def test_axes_of_one_leaf_go_by_their_whole_keys(tree):
    made = plan.make(tree | {"axes": {"train.micro_batch": [2], "rollout.micro_batch": [4]}})
    assert names(made)[0] == "reinforce,train.micro_batch=2,rollout.micro_batch=4,seed=0"


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("optimiser.learning_rate", 1e-5, "learning_rate=1e-05"),
        ("kl.beta", 1e6, "beta=1e06"),
        ("kl.beta", 0.1000001, "beta=0.1000001"),
        ("credit.horizon", None, "horizon=null"),
        ("credit.whiten_rewards", True, "whiten_rewards=true"),
        ("model.path", "/some/where else", "path=-some-where-else"),
    ],
)
def test_values_make_names_of_folders(tree, key, value, name):
    tree["arms"] = {"a": {}}
    assert names(plan.make(tree | {"axes": {key: [value]}})) == [f"a,{name},seed=0"]


def test_values_that_differ_little_make_two_arms(tree):
    tree["arms"] = {"a": {}}
    made = plan.make(tree | {"axes": {"kl.beta": [0.1, 0.1000001, 0.1000002]}})
    assert names(made) == ["a,beta=0.1,seed=0", "a,beta=0.1000001,seed=0", "a,beta=0.1000002,seed=0"]


def test_an_arm_is_nested_or_dotted_and_a_changed_type_drops_the_keys_of_the_old(tree):
    tree["base"]["trainer"] = {"type": "reinforce", "entropy_coef": 0.5}
    tree["arms"] = {
        "nested": {"trainer": {"epochs": 3, "type": "ppo"}, "credit": {"gamma": 0.5}},
        "dotted": {"trainer.epochs": 3, "trainer.type": "ppo", "credit.gamma": 0.5, "kl.beta": 0.2},
        "same": {"trainer": {"type": "reinforce"}, "kl.beta": 0.1},
    }
    nested, dotted, same = (run.config for run in plan.make(tree).runs)
    assert (nested.trainer.type, nested.trainer.epochs, nested.trainer.entropy_coef) == ("ppo", 3, 0)
    assert nested.trainer == dotted.trainer
    assert nested.credit == dotted.credit
    assert same.trainer.entropy_coef == 0.5


def test_overrides_reach_into_the_base_and_the_arms(tree):
    words = ["base.train.steps=9", "arms.ppo.trainer.epochs=7", "seeds=[3]", "axes.kl.beta=[0.2]", "arms.more={}"]
    made = plan.make(tree | {"axes": {"kl.beta": [1, 2]}}, [*words, "arms.more.credit.gamma=0.5"])
    assert names(made) == [f"{arm},beta=0.2,seed=3" for arm in ("reinforce", "ppo", "more")]
    assert made.runs[1].config.trainer.epochs == 7
    assert all(run.config.train.steps == 9 for run in made.runs)


@shows("base")
def test_a_base_is_read_from_beside_its_file_and_interpolates_within_itself(tree, tmp_path):
    run = tree["base"] | {"seed": 5, "name": "its-own", "optimiser": {"warmup_steps": "${train.steps}"}}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/base.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "configs/c.yaml").write_text(yaml.safe_dump(tree | {"base": "base.yaml"}, sort_keys=False))
    made = plan.make("configs/c.yaml", ["base.train.steps=4"])
    config = made.runs[0].config
    assert (config.name, config.seed, config.optimiser.warmup_steps) == ("reinforce,seed=0", 0, 4)


@shows("folder", "name")
def test_runs_are_written_below_folder_and_name(tree):
    made = plan.make(tree | {"folder": "some/where", "name": "other"})
    assert made.runs[0].folder == Path("some/where/other/reinforce,seed=0")
    assert made.runs[0].config.log.group == "other"


@shows("gold")
def test_gold_is_the_first_source_unless_it_is_named(tree):
    assert plan.make(tree).gold == "letters"
    assert plan.make(tree | {"gold": "parity"}).gold == "parity"


@shows("workers")
def test_workers_share_the_cores_whatever_is_left_to_do(tree, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)

    def threads(wanted: int | None, runs: int) -> list[str]:
        return [slot["OMP_NUM_THREADS"] for slot in workers.slots(wanted, runs)]

    assert threads(None, 100) == ["1"] * 8
    assert threads(None, 4) == ["2"] * 4
    assert threads(3, 100) == ["2"] * 3
    assert threads(20, 100) == ["1"] * 20
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(2, 100) == ["5"] * 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    gpus = [slot["CUDA_VISIBLE_DEVICES"] for slot in workers.slots(None, 100)]
    assert gpus == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in workers.slots(3, 100)] == ["3", "5", "3"]


def test_an_unknown_key_of_an_arm_or_an_axis_names_the_arms(refused):
    arms = {"a": {"trainer": {"entropy": 1}}, "b": {}}
    assert refused(arms=arms) == "arm a: trainer.entropy: unknown key, did you mean trainer.entropy_coef?"
    told = refused(axes={"kl.betta": [1]})
    assert told == "arms reinforce,betta=1, ppo,betta=1: kl.betta: unknown key, did you mean kl.beta?"
    assert refused(axes={"trainer.epochs": [1]}).startswith("arm reinforce,epochs=1: trainer.epochs: unknown key")
    assert refused("base.kl.betta=1").startswith("arms reinforce, ppo: kl.betta: unknown key")


def test_mistakes_of_several_arms_are_all_told(refused):
    arms = {"a": {"kl.beta": -1}, "b": {"credit.gamma": 2}, "c": {"kl": {"placement": "loss"}}}
    lines = refused(arms=arms).splitlines()
    assert [line[:6] for line in lines] == ["arm a:", "rlkl: ", "rlkl: "]
    assert "gradient is zero" in lines[2]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"seeds": [1, 2, 1]}, "seeds=[1, 2, 1]: 1 twice"),
        ({"seeds": []}, "seeds=[]: list should have at least 1 item"),
        ({"seeds": [-1]}, "seeds.0=-1: input should be greater than or equal to 0"),
        ({"arms": {}}, "arms={}: dictionary should have at least 1 item"),
        ({"arms": {"a": None}}, "arms.a=None: input should be a valid dictionary"),
        ({"arms": {"a/b": {}}}, "arms.a/b: names of folders are made of it"),
        ({"arms": {"a": {}, "b": {"kl.beta": 0.05}}}, "arms a, b: equal in every key"),
        ({"arms": {"a": {}, "b": {"log.samples": 9, "save.keep": 3}}}, "arms a, b: equal in every key"),
        ({"axes": {"kl.beta": []}}, "axes.kl.beta=[]: list should have at least 1 item"),
        ({"axes": {"kl.beta": [0.1, 0.1]}}, "axes: reinforce,beta=0.1 comes twice"),
        ({"axes": {"seed": [1, 2]}}, "seed: the comparison sets it; use seeds: of the comparison"),
        ({"arms": {"a": {"name": "x"}}}, "arm a: name: the comparison sets it; use name:"),
        ({"arms": {"a": {"log": {"group": "x"}}}}, "arm a: log.group: the comparison sets it"),
        ({"arm": {"a": {}}}, "arm: unknown key, did you mean arms?"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"workers": 0}, "workers=0: input should be greater than or equal to 1"),
        ({"match_kl": 0}, "match_kl=0: input should be greater than 0"),
        ({"gold": "silver"}, "gold=silver: arm reinforce has no such reward (it has letters, parity)"),
        ({"columns": ["kl/sequense"]}, "columns: kl/sequense: no such metric, did you mean kl/sequence?"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: no such configuration file"),
        ({"base": 3}, "base=3: input should be a valid dictionary"),
        ({"base": "c.yaml"}, "base=c.yaml: this is a comparison itself"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_mistakes_are_one_line_each_before_the_start(refused, keys, told):
    said = refused(**keys)
    assert told in said
    assert len(said.splitlines()) == 1


def test_stored_spans_are_no_gold(refused, tree):
    tree["base"]["rewards"]["spans"] = {"type": "annotations", "weights": {"x": 1}, "weight": 0}
    assert "stored spans, which say nothing of new samples" in refused(gold="spans")


def test_a_run_is_no_comparison_and_a_comparison_no_run(tree, capsys):
    Path("run.yaml").write_text(yaml.safe_dump(tree["base"] | {"name": "run"}))
    Path("c.yaml").write_text(yaml.safe_dump(tree))
    assert main(["compare", "run.yaml"]) == 2
    assert capsys.readouterr().err.startswith("rlkl: run.yaml: this is a run, not a comparison; use rlkl train, or")
    assert main(["train", "c.yaml"]) == 2
    told = "rlkl: c.yaml: arms: this is a comparison of several runs, not a run; use rlkl compare\n"
    assert capsys.readouterr().err == told
    with pytest.raises(ValueError, match="use rlkl compare"):
        settings.load(tree)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_under_a_launcher_it_is_refused(refused, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    assert refused().startswith(f"{name}=2: rlkl compare starts its own processes; run it without a launcher")


def test_two_at_once_of_one_name_are_refused(refused):
    with tracking.lock(Path("runs/two"), "comparison"):
        told = refused()
    assert told.endswith("runs/two: another comparison is writing to it; give this one another name")


def test_a_folder_of_something_else_is_refused(refused):
    (Path("runs/two/ppo,seed=0")).mkdir(parents=True)
    Path("runs/two/ppo,seed=0/notes.txt").touch()
    assert "ppo,seed=0: not empty and not a run" in refused()
    Path("runs/two/config.yaml").touch()
    assert refused() == "runs/two: holds a run; give this comparison another name=..."


def test_a_missing_dashboard_is_refused(refused, monkeypatch):
    monkeypatch.setattr("rlkl.dashboards.importlib.util.find_spec", lambda name: None)
    assert "log.with=wandb: this package is not installed" in refused("base.log.with=[wandb]")


def test_a_dry_run_prints_the_plan_and_writes_nothing(tree, capsys):
    Path("c.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    assert main(["compare", "c.yaml", "workers=1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "two: 2 arms x 1 seeds = 2 runs in runs/two, 0 kept, 2 to do, 1 at a time; gold is letters" in out
    assert "trainer.epochs" in out
    assert sorted(path.name for path in Path().iterdir()) == ["c.yaml", "scores.py"]


def test_embedded_models_are_made_once_before_the_workers(tree, monkeypatch):
    from rlkl.grid import compare

    made: list[Any] = []
    monkeypatch.setattr("rlkl.models.path", lambda model, records: made.append((model.type, len(records))))
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Line {n}"}) + "\n" for n in range(8)))
    tree["base"]["model"] = {"type": "tiny", "texts": ["prompt"]}
    compare.prepare(plan.make(tree | {"seeds": [0, 1]}).runs)
    assert made == [("tiny", 6)] * 2  # one a seed, which splits the prompts, for both arms
    compare.prepare(plan.make(tree, ["base.model={type: pretrained, path: x}"]).runs)
    assert len(made) == 2


def test_counts_start_at_nothing_and_other_metrics_where_they_are_measured():
    before, after = {"reward/eval/g": 1.0}, {"reward/eval/g": 3.0, "tokens/generated": 100, "policy/clip_fraction": 0.5}
    assert results.between(before, after, 0.25, "reward/eval/g") == 1.5
    assert results.between(before, after, 0.25, "tokens/generated") == 25  # none at step 0
    assert results.between(before, after, 0.25, "policy/clip_fraction") == 0.5  # not measured there
    assert results.between(before, after, 0.25, "loss/value") is None


def rows(folder: Path, *points: tuple[float | None, float | None]) -> Path:
    """A metrics.jsonl with these (KL, gold)."""
    folder.mkdir()
    lines = [{"step": n, "kl/sequence": kl, "reward/eval/g": g, "time/step": 1} for n, (kl, g) in enumerate(points)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_that_is_not_finite_has_diverged_and_counts_in_no_mean(tmp_path):
    good = results.read(rows(tmp_path / "a", (0, 1), (4, 3)), "arm", 0, "g", None, [])
    bad = results.read(rows(tmp_path / "b", (0, 1), (None, 3), (4, 3)), "arm", 1, "g", None, [])
    assert (good.counted, good.values["gold"], good.seconds) == (True, 3, 2)
    assert (bad.counted, bad.error) == (False, "diverged: kl/sequence is not finite at step 1")
    absent = results.read(tmp_path / "a", "arm", 0, "h", None, [])
    assert absent.error == "reward/eval/h is not in its evaluations; name another gold"


def test_the_frontier_has_a_line_a_run_a_colour_an_arm_and_a_root_axis(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    from rlkl import plots

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    plain = {"one": [[(0.0, 0.5), (1.0, 0.8)], [(0.0, 0.4), (4.0, 0.9)]], "two": [[(0.0, 0.5), (2.0, 0.7)]]}
    arms = {
        arm: [[{"kl": kl, "gold": gold, "labels": 10 * kl} for kl, gold in run] for run in runs]
        for arm, runs in plain.items()
    }
    path = plots.frontier(tmp_path / "f.png", arms, "gold", match_kl=1.0)
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = kept
    axis = figure.axes[0]
    lines = [line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
    assert [list(line.get_xdata()) for line in lines] == [[0, 1], [0, 4], [0, 2]]
    assert len({line.get_color() for line in lines[:2]}) == 1
    assert lines[2].get_color() != lines[0].get_color()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["one", "two"]
    places = axis.transData.transform([(0, 0), (1, 0), (4, 0)])[:, 0]
    assert places[2] - places[0] == pytest.approx(2 * (places[1] - places[0]))
    assert [float(tick.get_text()) for tick in axis.get_xticklabels()] == [0, 0.05, 0.2, 0.5, 1, 2, 3, 4]
    assert "nats" in axis.get_xlabel()
    labels = [line for line in figure.axes[1].lines if len(line.get_xdata()) == 2]
    assert [list(line.get_xdata()) for line in labels] == [[0, 10], [0, 40], [0, 20]]
    assert "labels asked for" in figure.axes[1].get_xlabel()
    free = {arm: [[{**point, "labels": 0.0} for point in run] for run in runs] for arm, runs in arms.items()}
    plots.frontier(tmp_path / "f.png", free, "gold")
    assert len(kept[1].axes) == 1
    many = {f"arm {k}": runs for k in range(9) for runs in free.values()}
    plots.frontier(tmp_path / "f.png", many, "gold")
    assert kept[2].axes[0].get_legend() is None  # beside the panels, where it covers no line
    (legend,) = kept[2].legends
    assert [text.get_text() for text in legend.get_texts()] == list(many)
    assert legend.get_window_extent().x0 > kept[2].axes[0].get_window_extent().x1


@pytest.mark.parametrize("most", [1e-6, 0.03, 0.7, 1.0, 9.7, 25.0, 300.0])
def test_ticks_are_few_and_apart_at_every_scale(most):
    from rlkl.plots import square_ticks

    ticks = square_ticks(most)
    assert ticks[0] == 0
    assert 4 <= len(ticks) <= 12
    assert ticks[-1] > most / 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_committed_comparison_is_valid(path):
    assert plan.make(path).config.name == path.stem


def test_every_key_has_a_test_of_its_effect():
    assert set(CompareConfig.model_fields) == SHOWN


import test_compare_grid  # noqa: E402, F401 - its tests show keys too
import test_replay  # noqa: E402, F401
