"""What test_distributed.py and test_processes.py do on several processes, by torchrun, and on one, by a call.

``ranks.py gradients FOLDER CONFIG...`` writes the gradients of one step of each configuration, of the whole batch;
``ranks.py held CONFIG...`` prints what the first process holds;
``ranks.py runs PLAN`` makes runs one after the other; PLAN is JSON: ``[[config, overrides, resume, stop at], ...]``.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import rlkl
from rlkl import RunError, launch, loop, settings, sharding
from rlkl.lane import build

torch.set_num_threads(1)
calls = [0]  # of a reward


def gradients(folder: str, configs: Sequence[str]) -> None:
    """Write ``<folder>/<config>.safetensors`` for every configuration file."""
    for path in configs:
        config = settings.load(path)
        accelerator = launch.accelerator(config)
        lane = build(config)
        lane.place(accelerator)
        assert sharding.sharded(lane.forward) == config.train.shard
        clip = accelerator.clip_grad_norm_

        def keep(parameters: Any, *rest: Any, lane: Any = lane, clip: Any = clip, path: str = path) -> Any:
            found = {n: sharding.whole(p.grad).clone() for n, p in lane.policy.named_parameters() if p.requires_grad}
            if lane.rank == 0:
                save_file(found, Path(folder) / f"{Path(path).stem}.safetensors")
            return clip(parameters, *rest)

        accelerator.clip_grad_norm_ = keep
        loop.train_step(lane, 1, accelerator)


def runs(plan: Sequence[Any]) -> None:
    """Make runs; those with a step to stop at fail before it, on every process alike."""
    whole = loop.train_step
    for config, overrides, resume, last in plan:

        def train_step(lane: Any, step: int, accelerator: Any, last: int | None = last) -> dict[str, float]:
            if step == last:
                raise RunError("enough")
            return whole(lane, step, accelerator)

        loop.train_step = train_step
        try:
            rlkl.train(config, overrides, resume=resume)
            assert last is None
        except RunError:
            if last is None:
                raise
        finally:
            loop.train_step = whole


def letters(texts: list[str]) -> list[float]:
    """The share of letters in each text, as ``conftest.varied``."""
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in texts]


def vowels(text: str) -> list[dict[str, Any]]:
    """Every letter is a span."""
    found = [(i, "good" if c in "aeiou" else "bad") for i, c in enumerate(text) if c.isalpha()]
    return [{"start": i, "end": i + 1, "label": label} for i, label in found]


def fated(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of letters; the process and the call that FATE names (``rank call raise|exit|sleep``) come to harm."""
    calls[0] += 1
    rank, call, what = os.environ.get("FATE", "-1 0 none").split()
    if (os.environ.get("RANK"), calls[0]) == (rank, int(call)):
        if what == "raise":
            raise OSError("the labeller left")
        if what == "exit":
            os._exit(9)
    if what == "sleep":
        time.sleep(0.3)
    return letters(completions)


def held(configs: Sequence[str]) -> None:
    """Print the share of policy and reference that the first process holds under every configuration."""
    for path in configs:
        config = settings.load(path)
        lane = build(config)
        size = sum(p.numel() for p in lane.policy.parameters())
        lane.place(launch.accelerator(config))
        parts = [p.to_local() if sharding.sharded(lane.forward) else p for p in lane.policy.parameters()]
        if lane.rank == 0:
            print(f"{sum(p.numel() for p in parts) / size:.3f}")


if __name__ == "__main__":
    if sys.argv[1] == "held":
        held(sys.argv[2:])
    elif sys.argv[1] == "runs":
        runs(json.loads(Path(sys.argv[2]).read_text()))
    else:
        gradients(sys.argv[2], sys.argv[3:])
    launch.close()
