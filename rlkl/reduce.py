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


def global_max(x: Tensor) -> Tensor:
    """The largest ``x`` over ranks. Detached."""
    x = x.detach()
    if dist.is_available() and dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask``, over all ranks; 0 for an empty mask."""
    sums = global_sum(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)]))
    return sums[0] / sums[1].clamp(min=1)


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Population standard deviation of ``x`` where ``mask``, over all ranks."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask).sqrt()


def merge(a: Metrics, b: Metrics) -> Metrics:
    """The metrics of two micro-batches: sums and counts add, extremes (``*_min``, ``*_max``) are kept."""
    return {name: _pair(name, a[name], b[name]) if name in a and name in b else (a | b)[name] for name in a | b}


def _pair(name: str, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if name.endswith("_min"):
        return torch.minimum(a[0], b[0]), a[1]
    if name.endswith("_max"):
        return torch.maximum(a[0], b[0]), a[1]
    return a[0] + b[0], a[1] + b[1]


def finish(metrics: Metrics) -> dict[str, float]:
    """``(sum, count)`` pairs to global means, extremes to global extremes."""
    sums = sorted(name for name in metrics if not name.endswith(("_min", "_max")))
    values: dict[str, float] = {}
    if sums:
        pairs = torch.stack([torch.stack([p.double() for p in metrics[name]]) for name in sums])
        values = {n: float(s / c) if c else 0.0 for n, (s, c) in zip(sums, global_sum(pairs), strict=True)}
    for name in sorted(metrics.keys() - values.keys()):
        sign = -1.0 if name.endswith("_min") else 1.0
        values[name] = sign * float(global_max(sign * metrics[name][0]))
    return values
