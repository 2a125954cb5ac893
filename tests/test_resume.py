"""A run that was interrupted goes on as if nothing had happened: equal files, bit for bit, whatever has state."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tree, metrics, varied
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlkl
from rlkl import RunError, checkpoint, cli, settings

STEPS = 7
LORA = ["model.lora.rank=2", "optimiser.learning_rate=0.05"]
MARKS = [
    "rewards.marks.type=annotations",
    "rewards.marks.labeller=test_resume:vowels",
    "rewards.marks.weights={good: 1, bad: -1}",
    "trainer.type=token_likelihood",
    "kl.placement=loss",
    "kl.estimator=exact",
]
GAE = ["credit.baseline=value", "credit.advantage=gae", "credit.lambda=1"]
RUNS = {
    "reinforce": ["credit.baseline=ema", "optimiser.schedule=cosine"],
    "adaptive beta": ["kl.target=0.5", "kl.beta=0.3", "optimiser.weight_decay=0.1"],
    "ppo": ["trainer.type=ppo", "trainer.minibatches=2", *GAE],
    "separate critic": ["trainer.type=ppo", "model.critic=separate", *GAE],
    "token likelihood": [*MARKS, "trainer.loss=npo"],
    "learned offset": [*MARKS, "trainer.loss=binary", "kl.placement=reward", "kl.estimator=k1"],
    "contrastive": [*MARKS, "trainer.loss=contrastive"],
    "watched marks": [*MARKS[:3], "rewards.marks.weight=0"],
    "dpo": ["trainer.type=dpo"],
    "lora": LORA,
    "lora and value": [*LORA, "trainer.type=ppo", *GAE],
}
left = [10**9]  # calls of the reward until it raises


def flaky(prompts: list[str], completions: list[str]) -> list[float]:
    """``conftest.varied``, until it raises."""
    left[0] -= 1
    if left[0] < 0:
        raise OSError("the labeller left")
    return varied(prompts, completions)


def vowels(text: str) -> list[dict[str, Any]]:
    """Every letter is a span."""
    letters = [(i, "good" if c in "aeiou" else "bad") for i, c in enumerate(text) if c.isalpha()]
    return [{"start": i, "end": i + 1, "label": label} for i, label in letters]


@pytest.fixture
def run(tiny_config: Tree) -> Tree:
    """A run with a checkpoint every other step and an evaluation every third."""
    rewards = {"varied": {"type": "function", "path": "test_resume:flaky"}}
    steps = {"train": {"steps": STEPS}, "save": {"every": 2}}
    return tiny_config | {"rewards": rewards} | steps | {"evaluate": {**tiny_config["evaluate"], "every": 3}}


def outcome(run: Path) -> tuple[list[Tree], str, dict[str, bytes]]:
    """What a run came to, bit for bit: its metrics, its samples, its evaluations and its weights."""
    weights = {path.name: path.read_bytes() for path in (run / "final").glob("*.safetensors")}
    assert weights
    written = "".join((run / name).read_text() for name in ("samples.jsonl", "evaluations.jsonl"))
    return metrics(run), written, weights


def interrupted(config: Tree, overrides: list[str], calls: int) -> None:
    """A run whose reward raises after so many calls."""
    left[0] = calls
    with pytest.raises(RunError, match="the labeller left"):
        rlkl.train(config, overrides)
    left[0] = 10**9


@pytest.mark.parametrize("kind", RUNS)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(kind: str, run: Tree) -> None:
    whole = rlkl.train(run, [*RUNS[kind], "name=whole"])
    overrides = [*RUNS[kind], "name=cut"]
    interrupted(run, overrides, 7)  # evaluations at 0 and 3, steps 1 to 5, interrupted in step 6
    assert [path.name for path in Path("runs/cut/checkpoints").iterdir()] == ["step_4"]
    assert (Path("runs/cut/error.txt")).is_file()
    assert outcome(rlkl.train(run, overrides, resume=True)) == outcome(whole)
    assert not Path("runs/cut/error.txt").exists()


def test_a_run_on_a_learned_reward_goes_on(run: Tree, tiny_reward_model: Path) -> None:
    learned = {"rm": {"type": "learned", "path": str(tiny_reward_model)}}
    config = {**run, "rewards": {"varied": {**run["rewards"]["varied"], "weight": 0}} | learned}
    whole = rlkl.train(config, ["name=whole"])
    interrupted(config, ["name=cut"], 7)
    assert outcome(rlkl.train(config, ["name=cut"], resume=True)) == outcome(whole)


def test_an_adapter_that_started_trained_keeps_its_frozen_copy(run: Tree, tiny_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "adapter")
    overrides = [f"model.path={tmp_path / 'adapter'}"]
    whole = rlkl.train(run, [*overrides, "name=whole"])
    interrupted(run, [*overrides, "name=cut"], 7)
    with torch.no_grad():  # the adapter on disk trains on elsewhere; this run keeps the one that it began with
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert outcome(rlkl.train(run, [*overrides, "name=cut"], resume=True)) == outcome(whole)


def test_the_reference_is_the_one_that_the_run_kept(run: Tree, tiny_model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(own)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(own)
    whole = rlkl.train(run, [f"model.path={own}", "name=whole"])
    interrupted(run, [f"model.path={own}", "name=cut"], 7)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(own)
    assert outcome(rlkl.train(run, [f"model.path={own}", "name=cut"], resume=True)) == outcome(whole)


def test_a_checkpoint_that_was_cut_short_is_none(run: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rlkl.train(run, ["name=whole"])
    kept, written = checkpoint.save_file, []

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        written.append(path)
        if len(written) == 4:  # the optimiser of the second checkpoint
            raise OSError(28, "No space left on device")
        kept(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises((OSError, RunError), match="No space left"):
        rlkl.train(run, ["name=cut"])
    assert checkpoint.steps(Path("runs/cut")) == [2]
    assert outcome(rlkl.train(run, ["name=cut"], resume=True)) == outcome(whole)


def test_a_run_without_a_checkpoint_begins_anew(run: Tree) -> None:
    whole = rlkl.train(run, ["name=whole", "save.every=null"])
    interrupted(run, ["name=cut", "save.every=null"], 5)
    assert not Path("runs/cut/checkpoints").exists()
    assert outcome(rlkl.train(run, ["name=cut", "save.every=null"], resume=True)) == outcome(whole)
    assert outcome(rlkl.train(run, ["name=first", "save.every=null"], resume=True)) == outcome(whole)


def test_a_finished_run_stays_as_it_is(run: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    folder = rlkl.train(run)
    before = (folder / "metrics.jsonl").read_bytes()
    assert rlkl.train(run, resume=True) == folder
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert "runs/tiny: finished already" in capsys.readouterr().out


def test_another_configuration_is_refused_with_the_difference(run: Tree) -> None:
    interrupted(run, [], 7)
    kept = {path: path.read_bytes() for path in Path("runs/tiny").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"another configuration: kl\.beta 0\.05, now 0\.1;"):
        rlkl.train(run, ["kl.beta=0.1"], resume=True)
    assert {path: path.read_bytes() for path in Path("runs/tiny").rglob("*") if path.is_file()} == kept
    rlkl.train(run, ["log.every=3", "save.keep=2", "save.every=1"], resume=True)  # these change no result


def test_a_kill_between_the_model_and_its_card_writes_both_again(run: Tree) -> None:
    folder = rlkl.train(run)
    weights = (folder / "final/model.safetensors").read_bytes()
    (folder / "final/README.md").unlink()
    rlkl.train(run, resume=True)
    assert (folder / "final/README.md").is_file()
    assert (folder / "final/model.safetensors").read_bytes() == weights


def test_only_the_newest_checkpoints_stay(run: Tree) -> None:
    rlkl.train(run, ["save.keep=2", "save.every=1"])
    assert checkpoint.steps(Path("runs/tiny")) == [5, 6]


@pytest.mark.parametrize("name", ["policy.safetensors", "optimiser.safetensors", "state.json"])
def test_a_broken_checkpoint_is_named(name: str, run: Tree) -> None:
    interrupted(run, [], 7)
    path = Path("runs/tiny/checkpoints/step_4") / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"checkpoints/step_4: cannot be read .*remove it"):
        rlkl.train(run, resume=True)


def test_training_records_that_were_edited_since_are_refused(run: Tree) -> None:
    interrupted(run, [], 7)
    prompts = Path("prompts.jsonl")
    kept = prompts.read_text()
    prompts.write_text(kept.replace("answer", "reply"))
    with pytest.raises(ValueError, match=r"the training records are not those that runs/tiny was begun with"):
        rlkl.train(run, resume=True)
    prompts.write_text(kept)
    assert metrics(rlkl.train(run, resume=True))[-1]["step"] == STEPS


def test_files_that_do_not_belong_together_are_refused(run: Tree) -> None:
    interrupted(run, [], 7)
    folder = Path("runs/tiny")
    state, rows = folder / "checkpoints/step_4/state.json", folder / "metrics.jsonl"
    moments = folder / "checkpoints/step_4/optimiser.safetensors"
    good = {path: path.read_bytes() for path in (state, rows, moments)}
    save_file({}, moments)
    with pytest.raises(ValueError, match=r"step_4: cannot be read \(its files do not belong together"):
        rlkl.train(run, resume=True)
    moments.write_bytes(good[moments])
    for broken in (b"{}", b"null"):
        state.write_bytes(broken)
        with pytest.raises(ValueError, match=r"step_4: cannot be read .*remove it"):
            rlkl.train(run, resume=True)
    state.write_bytes(good[state])
    rows.write_bytes(b"not a row\n" + good[rows])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: a line is no row of a run .*--overwrite"):
        rlkl.train(run, resume=True)
    rows.write_bytes(good[rows])
    (folder / "reference").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"reference: the reference of this run is gone"):
        rlkl.train(run, resume=True)


def test_resume_and_overwrite_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "x.yaml", "--resume", "--overwrite"]) == 2
    assert "--resume with --overwrite" in capsys.readouterr().err


def test_a_row_that_a_kill_cut_short_is_written_again(run: Tree) -> None:
    whole = rlkl.train(run, ["name=whole"])
    interrupted(run, ["name=cut"], 7)
    with open("runs/cut/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "kl/pen')
    with open("runs/cut/samples.jsonl", "a") as file:
        file.write(json.dumps({"step": 6}) + "\n")
    assert outcome(rlkl.train(run, ["name=cut"], resume=True)) == outcome(whole)


def killed(config: Tree, kind: str, seed: int, kills: int) -> tuple[Path, Path]:
    """Kill a run so many times, at random moments, then let it finish; the uninterrupted run, and this one."""
    started = time.perf_counter()
    whole = rlkl.train(config, [*RUNS[kind], f"name=whole-{seed}"])
    took, moments = time.perf_counter() - started, random.Random(seed)
    fork = multiprocessing.get_context("fork")
    arguments = (config, [*RUNS[kind], f"name=cut-{seed}"])
    for _ in range(kills):
        child = fork.Process(target=rlkl.train, args=arguments, kwargs={"resume": True})
        child.start()
        child.join(moments.uniform(0, 0.8 * took))
        if child.pid is not None and child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
    return whole, rlkl.train(*arguments, resume=True)


def test_a_kill_at_any_moment_loses_nothing(run: Tree) -> None:
    whole, cut = killed(run, "ppo", seed=0, kills=3)
    assert outcome(cut) == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_kills_at_any_moment_lose_nothing(kind: str, run: Tree) -> None:
    whole, cut = killed(run, kind, seed=sum(map(ord, kind)), kills=3)  # three for each kind: over thirty
    assert outcome(cut) == outcome(whole)


def test_the_configuration_of_a_run_can_be_resumed_as_it_is(run: Tree) -> None:
    interrupted(run, [], 7)
    assert cli.main(["train", "runs/tiny/config.yaml", "--resume"]) == 0
    assert settings.load("runs/tiny/config.yaml").train.steps == STEPS
