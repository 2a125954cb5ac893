"""The one training loop: prompts -> sample -> reward -> KL -> credit -> loss -> step."""

import contextlib
import itertools
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlkl import (
    RunError,
    artefacts,
    card,
    checkpoint,
    credit,
    dashboards,
    kl,
    launch,
    moved,
    pairs,
    plots,
    settings,
    terminal,
    tracking,
)
from rlkl.config import Config, KLConfig, OptimiserConfig
from rlkl.evaluate import Evaluation, chunks, evaluate, join, sample_rows
from rlkl.lane import Lane, build, collect
from rlkl.reduce import finish, global_sum, masked_mean, masked_std, merge
from rlkl.screen import Screen
from rlkl.types import Batch, End, Metrics, PolicyOutput, Rollout, TokenRewards, Trainer


def train(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    resume: bool = False,
    screen: AbstractContextManager[Screen] | None = None,
) -> Path:
    """Train as the configuration says and return the run's folder.

    ``resume`` goes on from the last checkpoint of the run of this name, or begins it; a finished one stays as it is.
    ``screen`` takes the place of this terminal; it is entered once the folder is there.

    Raises:
        ValueError: a mistake in the configuration, data or folder; nothing was written.
        RunError: the run could not go on; the traceback is in its error.txt.
    """
    config = settings.load(source, overrides)
    dashboards.check(config.log)
    accelerator = launch.accelerator(config)
    folder = tracking.run_folder(config)
    if resume:
        checkpoint.check(folder, config)
    else:
        tracking.check_folder(folder, overwrite)
    if resume and (folder / "final").is_dir():
        Screen(accelerator.is_main_process).say(f"{folder}: finished already; nothing to resume")
        return folder
    with accelerator.main_process_first():  # an embedded model is trained once
        lane = build(config)
    main = accelerator.is_main_process
    with tracking.claim(folder, overwrite or resume, main):
        last = checkpoint.steps(folder)[-1:] if resume else []
        accelerator.wait_for_everyone()
        if main and last:
            checkpoint.cut(folder, last[0])
        elif main:
            dashboards.forget(folder)
            tracking.create_folder(folder, config)
        accelerator.wait_for_everyone()
        if last:
            checkpoint.load(lane, folder, last[0])
        try:
            with screen or Screen(main, config.train.steps) as shown, dashboards.opened(folder, config, main) as copies:
                run([lane], [tracking.Tracker(folder, main, shown, copies)], accelerator)
        except (Exception, SystemExit) as error:
            (folder / "error.txt").write_text(traceback.format_exc())
            said = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            raise RunError(f"{said} (traceback in {folder / 'error.txt'})") from error
    return folder


def run(lanes: list[Lane], trackers: list[tracking.Tracker], accelerator: Accelerator) -> None:
    """Drive lanes, step by step, to their last step. An ordinary run is one lane."""
    both = list(zip(lanes, trackers, strict=True))
    for lane, tracker in both:
        lane.place(accelerator)
        tracker.say(*terminal.notices(lane, accelerator), *tracker.notes)
        begin(lane, tracker)
    for step in range(1, max(lane.config.train.steps for lane in lanes) + 1):
        for lane, tracker in both:
            if lane.step < step <= lane.config.train.steps:
                advance(lane, tracker, step, accelerator)
    for lane, tracker in both:
        if tracker.main:
            tracker.say(*terminal.show(tracker.folder))
            artefacts.save_final(lane.policy, lane.tokenizer, tracker.folder / "final")
            tracker.say(f"figure: {plots.curves(tracker.folder)}", f"model:  {tracker.folder / 'final'}")
            card.write(tracker.folder, tracker.folder / "final", lane.policy.adapted)


def begin(lane: Lane, tracker: tracking.Tracker) -> None:
    """Keep the reference and evaluate it; or, after a checkpoint, take the reference that was kept."""
    kept = tracker.folder / "reference"
    if lane.step:
        tracker.say(f"resumed after step {lane.step} of {lane.config.train.steps}")
        lane.marked = lane.marked or moved.kept(tracker.folder, lane.rank, lane.ranks, lane.device)
        return artefacts.load_reference(lane.policy, lane.config, kept)
    if tracker.main:
        artefacts.save_reference(lane.policy, lane.config, lane.tokenizer, kept)
    before = assess(lane, tracker, 0)
    if lane.marked is not None and lane.stored is None:
        moved.keep(lane.marked, tracker.folder, tracker.main)
    tracker.say(*terminal.guidance(lane.config, before))
    check_start(lane, before)


def advance(lane: Lane, tracker: tracking.Tracker, step: int, accelerator: Accelerator) -> None:
    """One training step of a lane, with its line, its row and, when due, its evaluation and its checkpoint."""
    total, every = lane.config.train.steps, lane.config.save.every
    metrics = train_step(lane, step, accelerator)
    tracker.screen.step(step, metrics, lane.config.log.every)
    if step % lane.config.evaluate.every == 0 or step == total:
        assess(lane, tracker, step, metrics)
    else:
        tracker.metrics(step, metrics)
    lane.step = step
    if every is not None and step % every == 0 and step < total and tracker.main:
        checkpoint.save(lane, tracker.folder, lane.config.save.keep)


def train_step(lane: Lane, step: int, accelerator: Accelerator) -> dict[str, float]:
    """One step; the flow of the whole project, top to bottom."""
    config, clock = lane.config, tracking.Stopwatch()
    rollout = collect(lane, step)
    clock.lap("sample")
    try:
        rewards = lane.reward(rollout)
    except RunError as error:
        raise RunError(f"step {step}: {error}") from error
    if config.trainer.type == "dpo" and rollout.pair_B is None:
        rollout = pairs.ranked(rollout, rewards)
    clock.lap("reward")
    scored = score(lane, rollout)
    batch = assign(lane, rollout, rewards, scored)
    clock.lap("score")
    metrics = update(lane, rollout, batch, step, accelerator)
    clock.lap("update")
    counts = torch.tensor([float(rollout.length_B.sum()), float(rewards.queries)], dtype=torch.float64)
    generated, queries = global_sum(counts.to(rollout.tokens_BT.device)).tolist()
    lane.generated += 0 if config.offline else int(generated)
    lane.queries += int(queries)
    used = 0 if lane.stored is None else lane.stored.used(step, config.rollout.prompts)
    values = {
        **finish(metrics),
        **step_metrics(rollout, rewards, batch, scored),
        "kl/beta": lane.beta,
        "tokens/generated": float(lane.generated),
        "reward/queries": float(lane.queries + used),
        **clock.metrics(),
    }
    if not config.offline:  # on tokens of others log-ratios estimate no KL
        values["kl/penalty"] = kl.measured(rollout, scored)
    if config.kl.target is not None:
        lane.beta = kl.adapt(lane.beta, values["kl/penalty"], config.kl.target)
    return values


def assign(lane: Lane, rollout: Rollout, rewards: TokenRewards, scored: PolicyOutput) -> Batch:
    """Credit: advantages for policy gradients, windowed annotations for likelihood, a share of the pairs for DPO."""
    config = lane.config
    if config.trainer.type == "dpo":
        return pairs.assign(rollout, scored)
    if config.trainer.type != "token_likelihood" or kl.needs(config.kl):  # else the loss holds beta, or there is none
        kl.check_origin(config.kl, rollout.origin)
    if config.trainer.type == "token_likelihood":
        return credit.likelihood(lane.reward.annotate(rollout), rewards, scored, config.credit)
    batch, lane.ema = credit.assign(rollout, rewards, scored, config.credit, config.kl, lane.beta, lane.ema)
    return batch


@torch.no_grad()
def score(lane: Lane, rollout: Rollout) -> PolicyOutput:
    """Policy and reference on the samples, as they are before the update."""
    rows = chunks(len(rollout), lane.config.train.micro_batch)
    parts = [lane.forward(rollout.rows(i), lane.score_need) for i in rows]
    names = [f"{need}_BT" for need in lane.score_need]
    if lane.config.credit.bootstrap_truncated:
        names.append("bootstrap_B")
    return PolicyOutput(**{name: join(parts, name) for name in names})


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
    """One optimiser step, its gradient accumulated over micro-batches."""
    config = lane.config
    need = lane.trainer.need | kl.needs(config.kl)
    metrics: Metrics = {}
    pieces = chunks(len(rollout), config.train.micro_batch)
    for k, rows in enumerate(pieces):
        # Ranks may have different numbers of micro-batches: gradients meet in the last one only.
        last = k == len(pieces) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(lane.forward):
            out = lane.forward(rollout.rows(rows), need)
            loss, part = step_loss(lane.trainer, config.kl, lane.beta, out, batch.rows(rows))
            if not bool(loss.isfinite()):
                raise RunError(f"step {step}: the loss is {loss.item()}; lower optimiser.learning_rate")
            accelerator.backward(loss * lane.ranks)  # gradients are averaged over ranks, the loss is a global sum
        metrics = merge(metrics, part)
    trained = [p for p in lane.policy.parameters() if p.requires_grad]
    norm = accelerator.clip_grad_norm_(trained, config.optimiser.max_grad_norm)
    if not bool(norm.isfinite()):
        raise RunError(f"step {step}: the gradient norm is {float(norm)}; lower optimiser.learning_rate")
    rate = config.optimiser.learning_rate * schedule(config.optimiser, step, config.train.steps)
    for group in lane.optimiser.param_groups:
        group["lr"] = rate
    lane.optimiser.step()
    lane.optimiser.zero_grad()
    one = torch.ones_like(norm)
    return metrics | {"policy/grad_norm": (norm, one), "policy/learning_rate": (one * rate, one)}


def schedule(config: OptimiserConfig, step: int, total: int) -> float:
    """Learning-rate factor of step 1..total: linear warm-up, then constant, or linear or cosine to 0."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / max(total - config.warmup_steps, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]


@torch.no_grad()
def step_metrics(rollout: Rollout, rewards: TokenRewards, batch: Batch, scored: PolicyOutput) -> dict[str, float]:
    """Rewards, lengths, advantages, and how far sampling and scoring disagree about the same tokens."""
    mask_BT = batch.mask_BT
    everyone = torch.ones(len(rollout), dtype=torch.bool, device=mask_BT.device)
    values = {
        "reward/train/total": masked_mean(rewards.value_BT.sum(-1), everyone),
        "policy/length": masked_mean(rollout.length_B.float(), everyone),
        "policy/terminated": masked_mean((rollout.end_B != End.LIMIT).float(), everyone),
        "credit/advantage_std": masked_std(batch.adv_BT, mask_BT),
        "credit/return": masked_mean(batch.return_BT, mask_BT),
    }
    if batch.pair_B is not None:
        values["preference/tied"] = masked_mean((batch.pair_B < 0).float(), everyone)
    if rollout.behaviour_logp_BT is not None:
        gap_BT = (rollout.behaviour_logp_BT - scored.get("logp_BT")).abs()
        values["policy/sampling_gap"] = masked_mean(gap_BT, mask_BT)
    if batch.behaviour_value_BT is not None:
        residual = masked_std(batch.return_BT - batch.behaviour_value_BT, mask_BT)
        spread = masked_std(batch.return_BT, mask_BT)
        values["credit/explained_variance"] = 1 - (residual / spread.clamp(min=1e-8)) ** 2
    values |= {f"reward/train/{name}": masked_mean(x.sum(-1), everyone) for name, x in rewards.shares.items()}
    return {name: float(x) for name, x in values.items()}


def assess(lane: Lane, tracker: tracking.Tracker, step: int, metrics: Mapping[str, float] | None = None) -> Evaluation:
    """Evaluate, and write the step's row and some samples."""
    started = time.perf_counter()
    config = lane.config
    try:
        result = evaluate(
            lane.forward,
            lane.judge,
            lane.held_out.part(lane.rank, lane.ranks),
            samples_per_prompt=config.evaluate.samples_per_prompt,
            max_new_tokens=config.rollout.max_new_tokens,
            eos_ids=lane.eos_ids,
            stop=config.rollout.stop,
            seed=config.seed,
            micro_batch=config.train.micro_batch,
        )
        if step == 0 and lane.marked is None:
            lane.marked = moved.labelled(result.rollout, lane.reward.sources)
    except RunError as error:
        raise RunError(f"evaluation at step {step}: {error}") from error
    if lane.marked is not None:
        shifts = moved.measure(lane.forward, lane.marked, config.train.micro_batch)
        result = replace(result, metrics=result.metrics | shifts)
    if lane.held_pairs is not None:
        preferred = pairs.measure(lane.forward, lane.held_pairs, lane.beta, config.train.micro_batch)
        result = replace(result, metrics=result.metrics | preferred)
    took = {"time/evaluate": time.perf_counter() - started}
    tracker.metrics(step, {**(metrics or {}), **result.metrics, **took})
    rows = list(itertools.islice(sample_rows(result), config.log.samples))
    tracker.samples(step, rows)
    tracker.say(terminal.evaluation_line(step, result.metrics), *terminal.samples(rows))
    return result


def check_start(lane: Lane, result: Evaluation) -> None:
    """An initial reference is a snapshot of the policy: KL is 0 at the start (bit for bit in fp32).

    Raises:
        RunError: it is not.
    """
    exact = lane.config.model.dtype == "float32" and lane.config.train.mixed_precision == "no"
    largest = float(result.kl_BT.abs().max())
    if lane.config.model.reference == "initial" and largest > (0.0 if exact else 1e-4):
        raise RunError(
            f"KL to the reference is up to {largest:.3g} nats a token before the first step; "
            "the model's forward is not deterministic, or its weights changed"
        )
