"""The optimiser steps on one batch: epochs of minibatches, accumulated over micro-batches."""

import contextlib
import math
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from rlkl import RunError, kl, sharding
from rlkl.config import KLConfig, OptimiserConfig
from rlkl.evaluate import chunks
from rlkl.lane import Lane
from rlkl.reduce import finish, merge
from rlkl.types import Batch, Metrics, PolicyOutput, Rollout, Trainer


class NotFinite(RunError):
    """A loss or gradient that is not finite."""


def step_loss(
    trainer: Trainer, kl_config: KLConfig, beta: float, out: PolicyOutput, batch: Batch
) -> tuple[Tensor, Metrics]:
    """What is differentiated: the trainer's loss plus beta times the KL that is placed in the loss."""
    loss, metrics = trainer.loss(out, batch)
    penalty, more = kl.penalty(kl_config, out, batch)
    return loss + beta * penalty, metrics | more


def update(lane: Lane, rollout: Rollout, batch: Batch, step: int, accelerator: Accelerator) -> Metrics:
    """The optimiser steps on one batch: epochs of minibatches, until the trainer has had enough."""
    metrics: Metrics = {}
    for epoch in range(lane.trainer.epochs):
        this: Metrics = {}
        for rows, share in lane.minibatches(rollout, step, epoch):
            part = batch.rows(rows)
            weight_BT, mask_BT = part.weight_BT * share, part.mask_BT & (share > 0)
            part = replace(part, weight_BT=weight_BT, mask_BT=mask_BT, tokens=part.tokens / max(share, 1.0))
            this = merge(this, optimise(lane, rollout.rows(rows), part, step, accelerator))
        metrics = merge(metrics, this)
        if lane.trainer.stop(finish(this)):
            break
    passes = metrics["policy/grad_norm"][0].new_tensor(epoch + 1.0)
    return metrics | {"policy/epochs": (passes, torch.ones_like(passes))}


def optimise(lane: Lane, rollout: Rollout, batch: Batch, step: int, accelerator: Accelerator) -> Metrics:
    """One optimiser step, its gradient accumulated over micro-batches.

    Raises:
        NotFinite: the loss or its gradient is not finite, on any process, and ``train.on_nonfinite`` is ``stop``.
    """
    config = lane.config
    need = (lane.trainer.need | kl.needs(config.kl)) - {"ref_logp"}  # the reference has not changed since it was asked
    metrics: Metrics = {}
    pieces = chunks(len(rollout), config.train.micro_batch)
    for k, (rows, mine) in enumerate(sharding.together(lane.forward, pieces)):
        # Ranks may have different numbers of micro-batches: gradients meet in the last one only, or all step along.
        last = k == len(pieces) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(lane.forward):
            piece = batch.rows(rows)
            out = replace(lane.forward(rollout.rows(rows), need), ref_logp_BT=piece.ref_logp_BT)
            loss, part = step_loss(lane.trainer, config.kl, lane.beta, out, piece)
            # Gradients are averaged over ranks, the loss is a global sum.
            accelerator.backward(loss * (lane.ranks * mine))
        metrics = merge(metrics, part) if mine else metrics
    trained = [p for p in lane.policy.parameters() if p.requires_grad]
    norm = sharding.whole(accelerator.clip_grad_norm_(trained, config.optimiser.max_grad_norm))
    # The norm is that of the gradients of all processes, so that they all decide alike.
    if not (finite := bool(norm.isfinite())) and config.train.on_nonfinite == "stop":
        raise NotFinite(f"step {step}: the gradient norm is {float(norm)}; lower optimiser.learning_rate")
    rate = config.optimiser.learning_rate * schedule(config.optimiser, step, config.train.steps)
    for group in lane.optimiser.param_groups:
        group["lr"] = rate
    moves = finite and bool(norm > 0)  # where nothing pulls, momentum of other batches shall not
    if moves:
        lane.optimiser.step()
    lane.optimiser.zero_grad()
    one = torch.ones_like(norm)
    done = {"policy/grad_norm": (norm, one), "policy/learning_rate": (one * rate, one)}
    return metrics | done | {"policy/skipped": (one * (not moves), one)}


def schedule(config: OptimiserConfig, step: int, total: int) -> float:
    """Learning-rate factor of step 1..total: linear warm-up, then constant, or linear or cosine to 0."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / max(total - config.warmup_steps, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
