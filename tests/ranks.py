"""One training step of each of several configurations: the gradients of the whole batch, written by rank 0.

Called in a single process, or by test_distributed.py as ``torchrun --nproc_per_node N ranks.py FOLDER CONFIG...``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlkl import launch, loop, settings
from rlkl.lane import build

torch.set_num_threads(1)


def gradients(folder: str, configs: Sequence[str]) -> None:
    """Write ``<folder>/<config>.safetensors`` for every configuration file."""
    for path in configs:
        config = settings.load(path)
        accelerator = launch.accelerator(config)
        lane = build(config)
        lane.place(accelerator)
        clip = accelerator.clip_grad_norm_

        def keep(parameters: Any, *rest: Any, lane: Any = lane, clip: Any = clip, path: str = path) -> Any:
            found = {n: p.grad.clone() for n, p in lane.policy.named_parameters() if p.requires_grad}
            if lane.rank == 0:
                save_file(found, Path(folder) / f"{Path(path).stem}.safetensors")
            return clip(parameters, *rest)

        accelerator.clip_grad_norm_ = keep
        loop.train_step(lane, 1, accelerator)


if __name__ == "__main__":
    gradients(sys.argv[1], sys.argv[2:])
    launch.close()
