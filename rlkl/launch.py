"""Processes and devices: what a launcher asked for, what it got, and the accelerator that results."""

import atexit
import gc
import os
import re
import sys
import warnings
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from rlkl.config import Config


def accelerator(config: Config, **kwargs: Any) -> Accelerator:
    """The accelerator of this process: accelerate launch, torchrun, or a single process.

    Raises:
        ValueError: sharding by accelerate, or without a second process; fewer prompts than processes.
    """
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    made = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.train.mixed_precision,
        # Ranks decode different numbers of tokens, so their forwards must not meet in a broadcast of buffers.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        **kwargs,
    )
    kinds = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    asked = [k for k in kinds if k == made.distributed_type or os.environ.get(f"ACCELERATE_USE_{k.value}") == "true"]
    if asked:  # on a CPU accelerate would go on unsharded
        raise ValueError(
            f"launched with {asked[0].value}: rlkl shards by itself; launch with torchrun or "
            "configs/accelerate/multi_gpu.yaml and set train.shard=true"
        )
    if config.train.shard and made.num_processes == 1:
        raise ValueError(
            "train.shard=true with 1 process: there is none to share parameters with; "
            "start several (torchrun --nproc_per_node N -m rlkl ...) or drop the key"
        )
    for count, what in ((config.rollout.prompts, "rollout.prompts"), (config.evaluate.prompts, "evaluate.prompts")):
        if count < made.num_processes:
            raise ValueError(f"{what}={count} with {made.num_processes} processes: every process needs a prompt")
    return made


def close(code: int = 0) -> None:
    """Leave together: a rank that goes first would tear down connections that others still use."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # models that still hold the group
        dist.barrier()
        dist.destroy_process_group()
        atexit.register(_leave, code)


def fail(code: int) -> None:
    """Leave alone, once everything is said; the others notice."""
    if dist.is_available() and dist.is_initialized():
        atexit.register(_leave, code)


def _leave(code: int) -> None:
    """End at once: everything is written, and native threads of the group can abort the interpreter's teardown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def asked_processes() -> int | None:
    """How many processes the launcher above this process was told to start, where that can be read."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    if not any("accelerate" in word or "torchrun" in word or "torch.distributed" in word for word in words):
        return None
    found = re.search(r"--(?:num[_-]processes|nproc[_-]per[_-]node)[ =](\d+)", " ".join(words))
    return int(found.group(1)) if found else None


def mismatch(made: Accelerator) -> str | None:
    """A warning where fewer processes run than were asked for."""
    asked = asked_processes()
    if asked is None or asked == made.num_processes:
        return None
    return (
        f"warning: {asked} processes were asked for, {made.num_processes} run (accelerate launch --cpu starts one; "
        f"use torchrun --nproc_per_node {asked} -m rlkl ...)"
    )
