"""Masked reductions that are global over ranks: every statistic of a batch goes through here."""

import torch
import torch.distributed as dist
from torch import Tensor

from rlkl.types import Metrics


def global_sum(x: Tensor) -> Tensor:
    """``x`` summed over ranks (``x`` itself in a single process). Detached."""
    x = x.detach()
    if dist.is_available() and dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def global_max(x: int, device: torch.device) -> int:
    """The largest ``x`` over ranks."""
    largest = torch.tensor(x, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask``, over all ranks; 0 for an empty mask."""
    sums = global_sum(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)]))
    return sums[0] / sums[1].clamp(min=1)


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Population standard deviation of ``x`` where ``mask``, over all ranks."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask).sqrt()


def finish(metrics: Metrics) -> dict[str, float]:
    """``(sum, count)`` pairs to global means."""
    names = sorted(metrics)
    if not names:
        return {}
    pairs = torch.stack([torch.stack([p.double() for p in metrics[n]]) for n in names])
    return {n: float(s / c) if c else 0.0 for n, (s, c) in zip(names, global_sum(pairs), strict=True)}
