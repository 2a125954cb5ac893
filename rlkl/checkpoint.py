"""Save and resume, exactly: all that a run has learned so far, tensors as safetensors and the rest as JSON.

Randomness is counter-based and prompts are a function of the step, so weights, the optimiser and a few numbers are the
whole state. A checkpoint appears under its name only when it is complete; a kill at any moment leaves the one before.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlkl import artefacts, settings
from rlkl.config import Config
from rlkl.data import files
from rlkl.lane import STATE, Lane
from rlkl.sharding import gathered
from rlkl.tracking import Tracker, read_rows


def check(folder: Path, config: Config) -> None:
    """Refuse to go on with a run under another configuration.

    Raises:
        ValueError: it names every key that differs, with both values.
    """
    if not (folder / "config.yaml").is_file():
        return
    if differ := settings.differences(folder, config):
        raise ValueError(
            f"--resume: {folder} was begun with another configuration: {'; '.join(differ)}; give the same one, "
            "another name, or --overwrite"
        )


def save(lane: Lane, folder: Path, keep: int, main: bool = True) -> None:
    """Write ``checkpoints/step_N/`` of a run, whole or not at all, and drop all but the ``keep`` newest.

    To be called by all processes; the ``main`` one writes.
    """
    trained = gathered((n, p) for n, p in lane.policy.named_parameters() if p.requires_grad)
    moments = gathered(
        (f"{i}.{name}", torch.as_tensor(x))
        for i, values in lane.optimiser.state_dict()["state"].items()
        for name, x in values.items()
    )
    lane.saved = lane.step
    rewards = lane.reward.state_dict()
    if not main:
        return
    parent = folder / "checkpoints"
    new = parent / ".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(trained, new / "policy.safetensors")
    save_file(moments, new / "optimiser.safetensors")
    save_rewards(rewards, new)
    state = {**lane.state(), "moments": len(moments), "rewards": [*rewards], "records": fingerprint(lane)}
    (new / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for path in new.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    target = parent / f"step_{lane.step}"
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(parent / f"step_{old}")


def save_rewards(state: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write what sources of rewards have learned, tensors as ``rewards.safetensors``, the rest as ``rewards.json``."""
    if not state:
        return
    folder.mkdir(exist_ok=True)
    pairs = [(name, key, value) for name, held in state.items() for key, value in held.items()]
    tensors = {f"{name}/{key}": x.cpu().contiguous() for name, key, x in pairs if isinstance(x, torch.Tensor)}
    others = {name: {k: x for k, x in held.items() if not isinstance(x, torch.Tensor)} for name, held in state.items()}
    save_file(tensors, folder / "rewards.safetensors")
    (folder / "rewards.json").write_text(json.dumps(others) + "\n", encoding="utf-8")


def load_rewards(folder: Path) -> dict[str, dict[str, Any]]:
    """What :func:`save_rewards` wrote; nothing where it wrote nothing.

    Raises:
        OSError, SafetensorError, ValueError: the files cannot be read.
    """
    if not (folder / "rewards.json").is_file():
        return {}
    state: dict[str, dict[str, Any]] = json.loads((folder / "rewards.json").read_text(encoding="utf-8"))
    for key, x in load_file(folder / "rewards.safetensors").items():
        name, _, own = key.partition("/")
        state[name][own] = x
    return state


def keep(both: list[tuple[Lane, Tracker]]) -> str:
    """Save the last step of every lane, where it is not yet, and say so; to be called by all processes."""
    for lane, tracker in both:
        if lane.step > lane.saved:
            save(lane, tracker.folder, lane.config.save.keep, tracker.main)
    done = max(lane.step for lane, _ in both)
    return f"stopped after step {done}; go on with --resume" if done else "stopped before the first step"


def fingerprint(lane: Lane) -> str:
    """Of the training records in their order; of a value that JSON cannot hold, its type alone."""
    rows = json.dumps(list(lane.train_prompts.records), sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(rows.encode()).hexdigest()


def steps(folder: Path) -> list[int]:
    """The steps of a run's checkpoints, in order."""
    names = [path.name.removeprefix("step_") for path in (folder / "checkpoints").glob("step_*")]
    return sorted(int(name) for name in names if name.isdigit())


def load(lane: Lane, folder: Path, step: int) -> None:
    """Put a lane, as built from the configuration and not placed yet, into the state of a checkpoint.

    The reference is the one that the run kept, whatever has become of the model that it was made from.

    Raises:
        ValueError: the checkpoint cannot be read, or is of another model or of other training records.
    """
    path = folder / "checkpoints" / f"step_{step}"
    try:
        trained, moments = load_file(path / "policy.safetensors"), load_file(path / "optimiser.safetensors")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        rewards = load_rewards(path)
        if state["moments"] != len(moments) or set(STATE) - set(state) or state["rewards"] != [*rewards]:
            raise ValueError("its files do not belong together")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove it to resume from the one before") from None
    if state.get("records") != fingerprint(lane):
        raise ValueError(
            f"--resume: the training records are not those that {folder} was begun with; put them back, or begin anew "
            "with --overwrite"
        )
    own = {n: p for n, p in lane.policy.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in own.items()} != {n: x.shape for n, x in trained.items()}:
        raise ValueError(f"{path}: its weights are not those of this model; did model.path change?")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(trained[name])
    states: dict[int, dict[str, Any]] = {}
    for key, x in moments.items():
        index, _, name = key.partition(".")
        states.setdefault(int(index), {})[name] = x
    lane.optimiser.load_state_dict({**lane.optimiser.state_dict(), "state": states})
    lane.reward.load_state_dict(rewards)
    lane.restore(state)
    artefacts.load_reference(lane.policy, lane.config, folder / "reference")


def cut(folder: Path, step: int) -> None:
    """Cut what a run writes as it goes back to a step; what came after will be written again, the same."""
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        if (folder / name).is_file():
            try:
                kept = [row for row in read_rows(folder / name) if row["step"] <= step]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{folder / name}: a line is no row of a run ({error}); mend it, or begin anew with --overwrite"
                ) from None
            files.write(folder / name, files.jsonl(kept), overwrite=True)
    (folder / "error.txt").unlink(missing_ok=True)
