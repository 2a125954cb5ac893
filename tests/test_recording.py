"""Rollouts come back from disk bit for bit, and a run on them is the run that wrote them."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from conftest import RECORDS, SENTENCES, Tree, metrics, write_jsonl
from models import EOS, PROMPTS, build, make_rollout
from safetensors.torch import load_file
from test_distributed import torchrun
from torch import Tensor
from transformers import AutoTokenizer

from rlkl import RunError, recording, settings, train
from rlkl.cli import main
from rlkl.data.prompts import PromptSet, records
from rlkl.policy import Policy
from rlkl.sampling import Prompts, sample
from rlkl.tasks.pretrain import train_tokenizer
from rlkl.types import Rollout


def assert_equal(one: Rollout, two: Rollout) -> None:
    """Every field but ``decode``, bit for bit."""
    for f in fields(Rollout):
        a, b = getattr(one, f.name), getattr(two, f.name)
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), f.name
        elif f.name != "decode":
            assert type(a) is type(b) and repr(a) == repr(b), f.name  # by repr, for NaN is not equal to itself


def every_field(dtype: torch.dtype) -> Rollout:
    awkward = {
        "prompt": ["é\u2028☃", "", "\ud800", "a\x00b"],
        "score": [0.1 + 0.2, math.nan, math.inf, -0.0],
        "messages": [[{"role": "user", "content": "hi"}], None, [], {"deep": {"er": [1, True, None]}}],
        "number": [2**70, -1, 0, 1],
    }
    return replace(
        make_rollout(wider=1, dtype=dtype),
        sample_id_B=torch.tensor([3, 0, 2**40, 1]),
        pair_B=torch.tensor([1, 0, 3, 2]),
        annotation_BT=torch.randn(4, 7, dtype=dtype),
        annotated_BT=torch.rand(4, 7) < 0.5,
        alt_u_BT=torch.rand(4, 7, dtype=torch.float64),
        end_B=torch.tensor([0, 1, 2, 1]),
        temperature=0.1 + 0.2,
        origin="reference",
        stop=("\n\n", "é"),
        columns=awkward,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_field_survives_the_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    rollout = every_field(dtype)
    assert all(getattr(rollout, f.name) is not None for f in fields(Rollout) if f.name != "decode"), "a field is new"
    recording.save(rollout, tmp_path, 7, {})
    assert_equal(recording.load(tmp_path, 7), rollout)
    bare = replace(make_rollout(), behaviour_logp_BT=None)
    recording.save(bare, tmp_path, 7, {})
    assert_equal(recording.load(tmp_path, 7), bare)
    assert recording.steps(tmp_path) == [7]


def test_a_tokenizer_gives_a_rollout_its_texts_again(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(SENTENCES, 270)
    ids = [[*tokenizer(text)["input_ids"], 9] for text in ("one", "é.", "a|b", "")]
    rollout = replace(make_rollout(completions=ids), end_B=torch.tensor([0, 0, 1, 0]), stop=("|",))
    recording.save(rollout, tmp_path, 1, {})
    assert recording.load(tmp_path, 1, tokenizer=tokenizer).texts() == ["one", "é.", "a", ""]


def test_a_step_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording.save(make_rollout(), tmp_path, 1, {"run": 1})
    before = {p.name: p.read_bytes() for p in (tmp_path / "rollouts").iterdir()}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        for step in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                recording.save(every_field(torch.float32), tmp_path, step, {"run": 2})
    assert {p.name: p.read_bytes() for p in (tmp_path / "rollouts").iterdir()} == before
    assert recording.steps(tmp_path) == [1]
    recording.save(make_rollout(), tmp_path, 2, {})
    (tmp_path / "rollouts/step_2.safetensors").unlink()
    assert recording.steps(tmp_path) == [1], "half a step is none"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_of_several_processes_join_into_the_rollout_of_one(ranks: int) -> None:
    policy = Policy(build("llama"))
    columns = {"prompt": [str(p) for p in PROMPTS], "n": [*range(4)]}
    prompts = Prompts(PROMPTS, range(len(PROMPTS)), columns)
    options: Tree = {"samples_per_prompt": 3, "max_new_tokens": 9, "eos_ids": [EOS], "seed": 0, "step": 1}
    whole = sample(policy, prompts, **options)
    parts = [sample(policy, prompts.part(rank, ranks), **options) for rank in range(ranks)]
    joined = recording.joined(parts)
    tensors = {f.name for f in fields(Rollout) if isinstance(getattr(whole, f.name), Tensor)}
    for name in tensors - {"behaviour_logp_BT"}:
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert torch.allclose(joined.behaviour_logp_BT, whole.behaviour_logp_BT, rtol=1e-4, atol=1e-5)
    assert joined.columns == whole.columns
    for rank, part in enumerate(parts):
        again = recording.share(whole, rank, ranks)
        assert again.completion_ids() == part.completion_ids() and again.columns == part.columns
        assert torch.equal(again.sample_id_B, part.sample_id_B)


# ---- runs


@pytest.fixture
def recorded(tiny_config: Tree) -> Path:
    """A recorded run of three steps, whose policy moves a lot."""
    tiny_config["train"]["steps"] = 3
    tiny_config["evaluate"]["every"] = 1
    tiny_config["log"] = {"with": []}
    return train(tiny_config, ["name=recorded", "rollout.record=true"])


@pytest.mark.parametrize(
    "objective", [{}, {"kl.target": 3.0}, {"credit.baseline": "ema"}, {"rollout.stop": ["a", "e"]}]
)
def test_the_run_on_a_recording_is_the_run_that_recorded(
    objective: Tree, tiny_config: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{key}={json.dumps(value)}" for key, value in objective.items()]
    tiny_config |= {"train": {"steps": 3}, "log": {"with": []}}
    live = train(tiny_config, ["name=live", "rollout.record=true", *words])
    again = train(tiny_config, ["name=again", f"rollout.replay={live}", *words])
    assert metrics(again) == metrics(live) and len(metrics(live)) == 4
    one, two = (load_file(run / "final/model.safetensors") for run in (live, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    out = capsys.readouterr().out
    assert out.count("samples replayed from runs/live") == 1 and "off-policy" in out and "kl/penalty and k1" in out


@pytest.mark.parametrize("words", [["trainer.type=ppo", "trainer.epochs=1"], ["trainer.type=token_likelihood"]])
def test_ratios_are_against_the_policy_that_drew_the_samples(
    words: list[str], tiny_config: Tree, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlkl import launch, loop, settings
    from rlkl.lane import build

    config = settings.load(tiny_config, ["name=ratio", f"rollout.replay={recorded}", "kl.beta=0", *words])
    lane = build(config)
    lane.place(launch.accelerator(config))
    rollout = loop.collect(lane, 3)  # two updates of the recording run later
    scored = loop.score(lane, rollout)
    batch = loop.assign(lane, rollout, lane.reward(rollout), scored)
    assert torch.equal(batch.behaviour_logp_BT, rollout.get("behaviour_logp_BT"))
    assert float((batch.behaviour_logp_BT - scored.get("logp_BT")).abs().max()) > 0.1


def test_another_objective_learns_from_the_very_same_samples(tiny_config: Tree, recorded: Path) -> None:
    other = ["optimiser.learning_rate=1e-4", "kl.beta=0.2", "credit.baseline=none"]
    replayed = metrics(train(tiny_config, ["name=replayed", f"rollout.replay={recorded}", *other]))
    fresh = metrics(train(tiny_config, ["name=fresh", *other]))
    kept = ("reward/train/varied", "policy/length", "tokens/generated")
    for mine, theirs in zip(replayed[1:], metrics(recorded)[1:], strict=True):
        assert [mine[name] for name in kept] == [theirs[name] for name in kept]
    assert [[r[name] for name in kept] for r in fresh[2:]] != [[r[name] for name in kept] for r in replayed[2:]]
    assert replayed[1]["policy/sampling_gap"] < 1e-4 < replayed[3]["policy/sampling_gap"], "off-policy after an update"


def test_a_recording_holds_training_prompts_only_in_the_order_of_the_seed(tiny_config: Tree, recorded: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_config["model"]["path"])
    train_rows, held = records(settings.load(tiny_config).data, 0)
    expected = PromptSet.tokenise(train_rows, tokenizer, 0, None, 6)
    for step in recording.steps(recorded):
        rollout = recording.load(recorded, step, tokenizer=tokenizer)
        assert rollout.columns["prompt"][::2] == expected.batch(step, 2).columns["prompt"]
        assert not set(rollout.columns["prompt"]) & {r["prompt"] for r in held}
        assert set(rollout.columns) == {"prompt", "gold"} and len(rollout.texts()) == 4


def test_nothing_is_recorded_unless_asked(tiny_config: Tree) -> None:
    assert not (train(tiny_config) / "rollouts").exists()


def drop_step(run: Path) -> None:
    (run / "rollouts/step_2.json").unlink()


def break_step(run: Path) -> None:
    (run / "rollouts/step_1.safetensors").write_bytes(b"nonsense")


def forget(run: Path) -> None:
    shutil.rmtree(run / "rollouts")


def another_tokenizer(_: Path) -> None:
    shutil.copytree(yaml.safe_load(Path("c.yaml").read_text())["model"]["path"], "other")
    tokenizer = train_tokenizer([*SENTENCES, "zebra zebra zebra"], 270)
    tokenizer.save_pretrained("other")


REFUSED: dict[str, tuple[Callable[[Path], None] | None, list[str], list[str]]] = {
    "no folder": (None, ["rollout.replay=nowhere"], ["rollout.replay=nowhere", "rollout.record=true"]),
    "a name too long": (None, ["rollout.replay=" + "x" * 300], ["no recording", "rollout.record=true"]),
    "no recording": (forget, [], ["rollout.replay=runs/recorded", "no recording", "rollout.record=true"]),
    "too few steps": (None, ["train.steps=5"], ["3 steps up to 3", "not step 4", "train.steps=5", "lower"]),
    "a hole": (drop_step, [], ["2 steps up to 3", "not step 2"]),
    "a broken file": (break_step, [], ["step_1", "cannot be read", "record the step again"]),
    "other prompts a step": (None, ["rollout.prompts=3"], ["rollout.prompts was 2", "here it is 3"]),
    "other samples": (None, ["rollout.samples_per_prompt=3"], ["rollout.samples_per_prompt was 2", "it is 3"]),
    "another temperature": (None, ["rollout.temperature=0.5"], ["rollout.temperature was 1.0", "it is 0.5"]),
    "other lengths": (None, ["rollout.max_new_tokens=5"], ["rollout.max_new_tokens was 6", "it is 5"]),
    "other stops": (None, ["rollout.stop=[x]"], ["rollout.stop was []", "it is ['x']"]),
    "another split": (None, ["seed=1"], ["training prompts was another", "need the same"]),
    "another vocabulary": (another_tokenizer, ["model.path=other"], ["vocabulary was another", "need the same"]),
    "its own folder": (None, ["name=recorded", "--overwrite"], ["this run's own folder", "another name"]),
    "recording it again": (None, ["rollout.record=true"], ["record=true with replay=runs/recorded"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_recording_that_does_not_fit_is_one_line_before_the_start(
    name: str, tiny_config: Tree, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(tiny_config))
    prepare, words, says = REFUSED[name]
    if prepare:
        prepare(recorded)
    capsys.readouterr()
    assert main(["train", "c.yaml", "name=new", "rollout.replay=runs/recorded", *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and all(part in said[0] for part in says), said
    assert not Path("runs/new").exists() and (recorded / "config.yaml").is_file()


def test_a_step_that_breaks_later_stops_the_run_with_one_line(tiny_config: Tree, recorded: Path) -> None:
    (recorded / "rollouts/step_3.json").write_text("{")
    with pytest.raises(RunError, match=r"step_3: cannot be read") as error:
        train(tiny_config, ["name=new", f"rollout.replay={recorded}"])
    assert len(str(error.value).splitlines()) == 1


def test_columns_that_json_cannot_hold_are_refused_before_the_start(
    tiny_config: Tree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list([{**row, "raw": b"\x00"} for row in RECORDS]).save_to_disk("disk")
    tiny_config["data"] = {"type": "datasets", "path": "disk"}
    Path("c.yaml").write_text(yaml.safe_dump(tiny_config))
    assert main(["train", "c.yaml", "rollout.record=true"]) == 2
    said = capsys.readouterr().err
    assert "column 'raw' holds a bytes" in said and "make it text" in said and not Path("runs").exists()


def test_equal_prompts_under_another_seed_may_be_replayed(tiny_config: Tree) -> None:
    write_jsonl("held.jsonl", [{"prompt": "held out", "gold": "x"}, {"prompt": "this too", "gold": "y"}])
    tiny_config["data"]["held_out"] = "held.jsonl"
    run = train(tiny_config, ["name=one", "rollout.record=true"])
    replayed = train(tiny_config, ["name=two", f"rollout.replay={run}", "seed=1"])
    first, second = (metrics(folder)[1] for folder in (run, replayed))
    assert first["tokens/generated"] == second["tokens/generated"]
    assert first["reward/train/total"] == second["reward/train/total"]


def test_two_processes_record_and_replay_what_one_does(tiny_config: Tree, recorded: Path) -> None:
    tiny_config["evaluate"]["every"] = 3
    Path("c.yaml").write_text(yaml.safe_dump(tiny_config))
    Path("twice.py").write_text(
        "import rlkl\n"
        "rlkl.train('c.yaml', ['name=two', 'rollout.record=true'])\n"
        "rlkl.train('c.yaml', ['name=again', 'rollout.replay=runs/recorded'])\n"
        "rlkl.launch.close()\n"
    )
    torchrun(2, "twice.py")
    assert recording.steps(Path("runs/two")) == [1, 2, 3]
    one, two = (recording.load(run, 1) for run in (recorded, Path("runs/two")))
    assert one.completion_ids() == two.completion_ids() and one.columns == two.columns
    for mine, theirs in zip(metrics(Path("runs/again")), metrics(recorded), strict=True):
        for name in mine.keys() & {"policy/length", "reward/train/varied", "kl/penalty", "credit/advantage_std"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
