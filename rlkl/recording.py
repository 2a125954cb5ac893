"""Rollouts on disk, so that several runs can learn from the very same samples.

A recording is a folder ``rollouts/`` in a run: for every step the tensors in ``step_N.safetensors``, and beside them
in ``step_N.json`` the columns, whatever else a rollout holds, and the signature of the run that sampled them.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rlkl.config import Config
from rlkl.data import files
from rlkl.data.prompts import PromptSet
from rlkl.types import Batch, Rollout

Signature = dict[str, Any]
SAMPLING = ("prompts", "samples_per_prompt", "max_new_tokens", "temperature", "stop")


def signature(config: Config, prompts: PromptSet) -> Signature:
    """What two runs must have in common for one to learn from the other's samples."""
    sampling = config.rollout.model_dump(mode="json")
    ids = hashlib.sha256()
    for row in prompts.ids:
        ids.update(json.dumps(row).encode())
    vocabulary = json.dumps(sorted(prompts.tokenizer.get_vocab().items()))
    return {
        **{f"rollout.{name}": sampling[name] for name in SAMPLING},
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "training prompts": ids.hexdigest(),
    }


def check(config: Config, prompts: PromptSet) -> Signature | None:
    """The signature where a run records or replays, having made sure before the start that it can.

    Raises:
        ValueError: a column that JSON cannot hold; a recording that is missing, lacks steps or is of another kind.
    """
    if config.rollout.record:
        for row in prompts.records:
            for name, value in row.items():
                _check_column(name, value)
        return signature(config, prompts)
    if config.rollout.replay is None:
        return None
    run, mine = Path(config.rollout.replay), signature(config, prompts)
    if run.resolve() == Path(config.folder, config.name).resolve():
        raise ValueError(f"rollout.replay={run}: this run's own folder; give the run another name")
    held = steps(run)
    if not held:
        raise ValueError(f"rollout.replay={run}: no recording in it; name a run that had rollout.record=true")
    if missing := sorted(set(range(1, config.train.steps + 1)) - set(held)):
        raise ValueError(
            f"rollout.replay={run}: holds {len(held)} steps up to {max(held)}, but not step {missing[0]} of the "
            f"train.steps={config.train.steps} asked for; lower train.steps or record more"
        )
    load(run, 1, mine)
    return mine


def _check_column(name: str, value: Any) -> None:
    try:
        json.dumps(value)
    except TypeError:
        raise ValueError(
            f"rollout.record: column {name!r} holds a {type(value).__name__}, which JSON cannot; make it text"
        ) from None


def steps(run: Path) -> list[int]:
    """The steps that a run's recording holds."""
    if not os.path.isdir(run / "rollouts"):
        return []
    found = (run / "rollouts").glob("step_*.json")
    return sorted(int(p.stem.removeprefix("step_")) for p in found if p.with_suffix(".safetensors").is_file())


def save(rollout: Rollout, run: Path, step: int, signed: Signature) -> None:
    """Write a rollout, all but its ``decode``; a step that is there already is replaced."""
    values = {f.name: getattr(rollout, f.name) for f in fields(rollout) if f.name != "decode"}
    tensors = {name: x.contiguous() for name, x in values.items() if isinstance(x, Tensor)}
    others = {name: x for name, x in values.items() if name not in tensors}
    path = run / "rollouts" / f"step_{step}"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path.with_suffix(".safetensors"), save_tensors(tensors))
    _write(path.with_suffix(".json"), json.dumps({"signature": signed, **others}).encode())


def inspect(rollout: Rollout, batch: Batch, run: Path, step: int, rank: int) -> Path:
    """Keep the samples of a step and what the loss read, to look at; this process's own, in ``nonfinite/rank_R/``."""
    folder = run / "nonfinite" / f"rank_{rank}"
    prompts = {"prompt": rollout.columns["prompt"]}
    save(replace(rollout.to(torch.device("cpu")), columns=prompts), folder, step, {})
    held = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {name: x.detach().cpu().contiguous() for name, x in held.items() if isinstance(x, Tensor)}
    _write(folder / f"batch_{step}.safetensors", save_tensors(tensors))
    return folder


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    with files.whole(path) as part:
        part.write_bytes(data)


def load(run: Path, step: int, signed: Signature | None = None, tokenizer: Any = None) -> Rollout:
    """A step of a recording, bit for bit, on the CPU; ``tokenizer`` lets it tell its texts.

    Raises:
        ValueError: the step is missing or broken, or its signature is not ``signed``.
    """
    path = Path(run) / "rollouts" / f"step_{step}"
    try:
        tensors = load_tensors(path.with_suffix(".safetensors").read_bytes())
        others = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); record the step again") from None
    found = others.pop("signature")
    for name, mine in (signed or {}).items():
        if found.get(name) != mine:
            pair = f"was {found.get(name)!r} when it was recorded, here it is {mine!r}"
            how = pair if name.startswith("rollout.") else "was another when it was recorded"
            raise ValueError(f"rollout.replay={run}: {name} {how}; both runs need the same")
    others["stop"] = tuple(others["stop"])
    decode = None if tokenizer is None else (lambda ids: str(tokenizer.decode(ids)))
    return Rollout(**tensors, **others, decode=decode)


def joined(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of one step, of several processes, as one: samples in order, padded to the longest."""
    first = parts[0]
    values: dict[str, Any] = {}
    for f in fields(first):
        pieces = [getattr(part, f.name) for part in parts]
        if isinstance(pieces[0], Tensor):
            width = max(x.shape[-1] for x in pieces) if pieces[0].dim() == 2 else 0
            grown = [x if x.dim() == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in pieces]
            values[f.name] = torch.cat(grown)
        elif f.name == "columns":
            values["columns"] = {name: [v for piece in pieces for v in piece[name]] for name in first.columns}
    return replace(first, **values)


def share(rollout: Rollout, rank: int, ranks: int) -> Rollout:
    """The samples of one of several processes: those whose prompts it would have sampled itself."""
    prompts = int(rollout.group_B.max()) + 1
    start, end = prompts * rank // ranks, prompts * (rank + 1) // ranks
    return rollout.rows(((rollout.group_B >= start) & (rollout.group_B < end)).nonzero().flatten())
