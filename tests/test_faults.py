"""What goes wrong while a run is running: one line that says so, nothing lost, and the run goes on with --resume."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Tree, metrics, varied
from safetensors.torch import load_file

import rlkl
from rlkl import RunError, checkpoint, cli, faults, recording, settings

ROOT = Path(__file__).parents[1]
calls = [0]


@pytest.fixture
def run(tiny_config: Tree, tmp_path: Path) -> Tree:
    """Six steps with a checkpoint each, also as config.yaml in the working folder."""
    calls[0] = 0
    more = {"train": {"steps": 6}, "save": {"every": 1}, "evaluate": {**tiny_config["evaluate"], "every": 3}}
    config = {**tiny_config, **more}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return config


def rewarded_by(config: Tree, name: str, **keys: Any) -> Tree:
    """The run with a reward of this module."""
    return {**config, "rewards": {"varied": {"type": "function", "path": f"test_faults:{name}", **keys}}}


def enormous(prompts: list[str], completions: list[str]) -> list[float]:
    """``varied``, but at the fourth call (step 3) more than a gradient can hold."""
    calls[0] += 1
    return [x * (3e38 if calls[0] == 4 else 1) for x in varied(prompts, completions)]


def slow(prompts: list[str], completions: list[str]) -> list[float]:
    """``varied``, but the fourth call hangs."""
    calls[0] += 1
    if calls[0] == 4:
        time.sleep(60)
    return varied(prompts, completions)


def same(config: Tree) -> None:
    """The run, resumed, is the run that was never interrupted."""
    calls[0] = 100
    resumed = rlkl.train(config, resume=True)
    assert metrics(resumed) == metrics(rlkl.train(config, ["name=whole"]))


def test_a_gradient_that_is_not_finite_stops_the_run_and_its_batch_is_kept(run: Tree) -> None:
    config = rewarded_by(run, "enormous")
    with pytest.raises(RunError, match=r"step 3: the gradient norm is (nan|inf).*nonfinite/rank_0"):
        rlkl.train(config)
    kept = Path("runs/tiny/nonfinite/rank_0")
    rollout = recording.load(kept, 3)
    batch = load_file(kept / "batch_3.safetensors")
    assert batch["adv_BT"].shape == rollout.tokens_BT.shape
    assert float(batch["adv_BT"].abs().max()) > 1e37
    assert rollout.columns["prompt"]
    assert checkpoint.steps(Path("runs/tiny")) == [2]
    same(config)


def test_an_update_whose_gradient_is_not_finite_can_be_left_out(run: Tree) -> None:
    rows = metrics(rlkl.train(rewarded_by(run, "enormous"), ["train.on_nonfinite=skip"]))
    assert [row["policy/skipped"] for row in rows[1:]] == [0, 0, 1, 0, 0, 0]
    assert rows[3]["policy/grad_norm"] is None  # not a number
    assert rows[3]["kl/sequence"] > 0  # the evaluation after it: the weights are those of step 2


def test_an_update_that_is_left_out_leaves_no_trace_in_the_baseline(run: Tree) -> None:
    rows = metrics(rlkl.train(rewarded_by(run, "enormous"), ["train.on_nonfinite=skip", "credit.baseline=ema"]))
    assert [row["policy/skipped"] for row in rows[1:]] == [0, 0, 1, 0, 0, 0]


def stubborn(prompts: list[str], completions: list[str]) -> list[float]:
    """``varied``, but the fourth call tries again for ever, whatever happens."""
    calls[0] += 1
    while calls[0] == 4:
        try:
            time.sleep(60)
        except Exception:
            continue
    return varied(prompts, completions)


def test_a_reward_that_tries_again_for_ever_ends_the_run_too(run: Tree) -> None:
    with pytest.raises(RunError, match=r"step 3: reward varied: no answer within 0\.5 s"):
        rlkl.train(rewarded_by(run, "stubborn", timeout=0.5))


def gone(prompts: list[str], completions: list[str]) -> list[float]:
    """``varied``, but from the fourth call on the labeller is gone: it fails once, then it hangs."""
    calls[0] += 1
    if calls[0] == 4:
        raise TimeoutError("no route to the labeller")
    if calls[0] > 4:
        time.sleep(60)
    return varied(prompts, completions)


def test_a_reward_that_fails_and_then_hangs_says_how_it_failed(run: Tree) -> None:
    said = r"step 3: reward varied: TimeoutError: no route to the labeller \(at which sample was not found in time\)"
    with pytest.raises(RunError, match=said):
        rlkl.train(rewarded_by(run, "gone", timeout=0.5))


def test_a_reward_that_hangs_ends_the_run(run: Tree) -> None:
    config = rewarded_by(run, "slow", timeout=0.5)
    started = time.perf_counter()
    with pytest.raises(RunError, match=r"step 3: reward varied: no answer within 0\.5 s"):
        rlkl.train(config)
    assert time.perf_counter() - started < 30
    same(config)


def test_out_of_memory_names_the_levers(run: Tree) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    said = faults.told(error, settings.load(run))
    for lever in (
        "lower train.micro_batch (now 4)",
        "train.gradient_checkpointing=true",
        "rollout.micro_batch (now 4)",
    ):
        assert lever in said
    spent = ["train.micro_batch=1", "train.gradient_checkpointing=true", "train.head_chunk=64", "rollout.micro_batch=1"]
    assert "take a smaller model" in faults.told(error, settings.load(run, spent))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_memory_runs_out_in_several_words(error: Exception) -> None:
    assert faults.out_of_memory(error)
    assert not faults.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not faults.out_of_memory(ValueError("out of memory"))


def test_a_step_that_runs_out_of_memory_ends_the_run_with_the_levers(run: Tree, monkeypatch: Any) -> None:
    import rlkl.update

    step, seen = rlkl.update.step_loss, [0]

    def burst(*given: Any) -> Any:
        seen[0] += 1
        if seen[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(rlkl.update, "step_loss", burst)
        with pytest.raises(RunError, match=r"out of memory: lower train\.micro_batch \(now 4\).*error\.txt"):
            rlkl.train(run)
    same(run)


def started(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """``rlkl train config.yaml`` in a process of its own, once it has made a checkpoint."""
    command = [sys.executable, "-m", "rlkl", "train", "config.yaml", "train.steps=100000", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not checkpoint.steps(folder / "runs/tiny"):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_finish_and_saves(number: int, code: int, run: Tree, tmp_path: Path) -> None:
    process = started(tmp_path, "save.every=3")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    step = int(re.findall(r"rlkl: stopped after step (\d+); go on with --resume\n$", said)[0])
    assert metrics(tmp_path / "runs/tiny")[-1]["step"] == step  # every row was followed by its checkpoint
    assert checkpoint.steps(tmp_path / "runs/tiny")[-1] == step
    assert not (tmp_path / "runs/tiny/error.txt").exists()


def test_a_second_signal_ends_at_once(run: Tree, tmp_path: Path) -> None:
    config = rewarded_by(run, "slow", timeout=None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    process = started(tmp_path)
    time.sleep(1)  # it hangs in step 3, or will
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert said.endswith("rlkl: interrupted\n")


@pytest.mark.parametrize("failed", [False, True])
def test_no_promise_to_finish_once_another_process_has_told_its_error(failed, tmp_path, capfd):
    if failed:
        faults.write_error(tmp_path, "why")
    with faults.requests(tmp_path) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == 143
    assert ("finishing the step" in capfd.readouterr().err) is not failed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_run_with_a_usable_checkpoint(run: Tree, small_disk: Path, tmp_path: Path) -> None:
    folder, ballast = small_disk / "tiny", small_disk / "ballast"
    overrides = [f"folder={small_disk}", "save.keep=1"]
    whole = metrics(rlkl.train(run, [f"folder={tmp_path}", "name=whole"]))

    def fill(prompts: list[str], completions: list[str]) -> list[float]:
        if checkpoint.steps(folder) == [2] and not ballast.exists():
            ballast.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 4096))
        return varied(prompts, completions)

    globals()["filling"] = fill
    config = rewarded_by(run, "filling")
    with pytest.raises(RunError, match=r"no space left on the disk.*make room, then go on with --resume"):
        rlkl.train(config, overrides)
    assert checkpoint.steps(folder) == [2]
    with pytest.raises((RunError, ValueError), match=r"[Nn]o space left on"):  # still
        rlkl.train(config, overrides, resume=True)
    ballast.unlink()
    globals()["filling"] = varied
    assert metrics(rlkl.train(config, overrides, resume=True)) == whole


def test_a_folder_that_cannot_be_written_is_refused_before_the_start(
    run: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "config.yaml", "folder=/proc/none"]) == 2
    assert "/proc/none" in capsys.readouterr().err


def test_every_line_of_the_table_of_faults_is_a_test() -> None:
    rows = re.findall(r"^\| .* \| `(test_\w+)` \|$", (ROOT / "docs/reliability.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 12
    known = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert [name for name in rows if f"def {name}(" not in known] == []
