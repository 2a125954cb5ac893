"""The one training loop: prompts -> sample -> reward -> KL -> credit -> loss -> step."""

import itertools
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlkl import RunError, credit, kl, plots, settings, terminal, tracking
from rlkl.config import Config, KLConfig, OptimiserConfig
from rlkl.evaluate import Evaluation, chunks, evaluate, join, sample_rows
from rlkl.lane import Lane, build, draw
from rlkl.reduce import finish, masked_mean, masked_std
from rlkl.trainers import Reinforce
from rlkl.types import Batch, Metrics, PolicyOutput, Rollout, TokenRewards


def train(
    source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = (), *, overwrite: bool = False
) -> Path:
    """Train as the configuration says and return the run's folder.

    Raises:
        ValueError: a mistake in the configuration, data or folder; nothing was written.
        RunError: the run could not go on; the traceback is in its error.txt.
    """
    config = settings.load(source, overrides)
    folder = tracking.run_folder(config)
    tracking.check_folder(folder, overwrite)
    lane = build(config)
    tracking.create_folder(folder, config)
    try:
        run([lane], [tracking.Tracker(folder)])
    except Exception as error:
        (folder / "error.txt").write_text(traceback.format_exc())
        said = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        raise RunError(f"{said} (traceback in {folder / 'error.txt'})") from error
    return folder


def run(lanes: list[Lane], trackers: list[tracking.Tracker]) -> None:
    """Drive lanes to their last step. An ordinary run is one lane."""
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"{accelerator.num_processes} processes: a run uses one process so far; start a single one")
    for lane, tracker in zip(lanes, trackers, strict=True):
        lane.policy, lane.optimiser = accelerator.prepare(lane.policy, lane.optimiser)
        save_pretrained(lane.policy.reference, lane.tokenizer, tracker.folder / "reference")
        for notice in terminal.notices(lane):
            print(notice, flush=True)
        before = assess(lane, tracker, 0)
        check_start(before)
        total = lane.config.train.steps
        for step in range(1, total + 1):
            metrics = train_step(lane, step, accelerator)
            if step % lane.config.log.every == 0 or step == total:
                print(terminal.line(step, total, metrics), flush=True)
            if step % lane.config.evaluate.every == 0 or step == total:
                after = assess(lane, tracker, step, metrics)
            else:
                tracker.metrics(step, metrics)
        save_pretrained(lane.policy.model, lane.tokenizer, tracker.folder / "final")
        terminal.show(before, after, lane.config.log.samples)
        print(f"figure: {plots.curves(tracker.folder)}\nmodel:  {tracker.folder / 'final'}", flush=True)


def train_step(lane: Lane, step: int, accelerator: Accelerator) -> dict[str, float]:
    """One step; the flow of the whole project, top to bottom."""
    config, clock = lane.config, Stopwatch()
    prompts = lane.train_prompts.batch(step, config.rollout.prompts)
    rollout = draw(lane, prompts, step)
    clock.lap("sample")
    try:
        rewards = lane.reward(rollout)
    except RunError as error:
        raise RunError(f"step {step}: {error}") from error
    clock.lap("reward")
    scored = score(lane, rollout)
    penalty = kl.measured(rollout, scored)
    batch, lane.ema = credit.assign(rollout, rewards, scored, config.credit, config.kl, lane.beta, lane.ema)
    clock.lap("score")
    metrics = update(lane, rollout, batch, step, accelerator)
    clock.lap("update")
    lane.generated += int(rollout.length_B.sum())
    lane.queries += rewards.queries
    values = {
        **finish(metrics),
        **step_metrics(rollout, rewards, batch, scored),
        "kl/penalty": penalty,
        "kl/beta": lane.beta,
        "tokens/generated": float(lane.generated),
        "reward/queries": float(lane.queries),
        **clock.metrics(),
    }
    if config.kl.target is not None:
        lane.beta = kl.adapt(lane.beta, penalty, config.kl.target)
    return values


@torch.no_grad()
def score(lane: Lane, rollout: Rollout) -> PolicyOutput:
    """Policy and reference on the samples, as they are before the update."""
    rows = chunks(len(rollout), lane.config.train.micro_batch)
    parts = [lane.policy(rollout.rows(i), lane.score_need) for i in rows]
    names = [f"{need}_BT" for need in lane.score_need]
    if lane.config.credit.bootstrap_truncated:
        names.append("bootstrap_B")
    return PolicyOutput(**{name: join(parts, name) for name in names})


def step_loss(
    trainer: Reinforce, kl_config: KLConfig, beta: float, out: PolicyOutput, batch: Batch
) -> tuple[Tensor, Metrics]:
    """What is differentiated: the trainer's loss plus beta times the KL that is placed in the loss."""
    loss, metrics = trainer.loss(out, batch)
    penalty, more = kl.penalty(kl_config, out, batch)
    return loss + beta * penalty, metrics | more


def update(lane: Lane, rollout: Rollout, batch: Batch, step: int, accelerator: Accelerator) -> Metrics:
    """One optimiser step on the whole batch, accumulated over micro-batches."""
    config = lane.config
    need = lane.trainer.need | kl.needs(config.kl)
    metrics: Metrics = {}
    for rows in chunks(len(rollout), config.train.micro_batch):
        out = lane.policy(rollout.rows(rows), need)
        loss, part = step_loss(lane.trainer, config.kl, lane.beta, out, batch.rows(rows))
        if not bool(loss.isfinite()):
            raise RunError(f"step {step}: the loss is {float(loss)}; lower optimiser.learning_rate")
        accelerator.backward(loss)
        metrics = {k: (metrics[k][0] + s, metrics[k][1] + n) if k in metrics else (s, n) for k, (s, n) in part.items()}
    trained = [p for p in lane.policy.parameters() if p.requires_grad]
    norm = accelerator.clip_grad_norm_(trained, config.optimiser.max_grad_norm)
    if not bool(norm.isfinite()):
        raise RunError(f"step {step}: the gradient norm is {float(norm)}; lower optimiser.learning_rate")
    for group in lane.optimiser.param_groups:
        group["lr"] = config.optimiser.learning_rate * schedule(config.optimiser, step, config.train.steps)
    lane.optimiser.step()
    lane.optimiser.zero_grad()
    one = torch.ones_like(norm)
    return metrics | {"policy/grad_norm": (norm, one), "policy/learning_rate": (one * group["lr"], one)}


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
    assert rollout.behaviour_logp_BT is not None
    gap_BT = (rollout.behaviour_logp_BT - scored.get("logp_BT")).abs()
    values = {
        "reward/train/total": masked_mean(rewards.value_BT.sum(-1), everyone),
        "policy/length": masked_mean(rollout.length_B.float(), everyone),
        "policy/terminated": masked_mean((rollout.end_B == 0).float(), everyone),
        "policy/sampling_gap": masked_mean(gap_BT, mask_BT),
        "credit/advantage_std": masked_std(batch.adv_BT, mask_BT),
        "credit/return": masked_mean(batch.return_BT, mask_BT),
    }
    values |= {f"reward/train/{name}": masked_mean(x.sum(-1), everyone) for name, x in rewards.shares.items()}
    return {name: float(x) for name, x in values.items()}


def assess(lane: Lane, tracker: tracking.Tracker, step: int, metrics: Mapping[str, float] | None = None) -> Evaluation:
    """Evaluate, and write the step's row and some samples."""
    started = time.perf_counter()
    config = lane.config
    try:
        result = evaluate(
            lane.policy,
            lane.reward,
            lane.held_out,
            samples_per_prompt=config.evaluate.samples_per_prompt,
            max_new_tokens=config.rollout.max_new_tokens,
            eos_ids=lane.eos_ids,
            seed=config.seed,
            micro_batch=config.train.micro_batch,
        )
    except RunError as error:
        raise RunError(f"evaluation at step {step}: {error}") from error
    took = {"time/evaluate": time.perf_counter() - started}
    tracker.metrics(step, {**(metrics or {}), **result.metrics, **took})
    for row in itertools.islice(sample_rows(result), config.log.samples):
        tracker.sample(step, row)
    print(terminal.evaluation_line(step, result.metrics), flush=True)
    return result


def check_start(result: Evaluation) -> None:
    """The reference is a snapshot of the policy, so KL must be 0 at the start, bit for bit in fp32."""
    if bool(result.kl_BT.any()):
        raise RunError(
            f"KL to the reference is {result.metrics['kl/sequence']:.3g} nats before the first step; "
            "the model's forward is not deterministic, or its weights changed"
        )


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    """A model folder that ``from_pretrained`` reads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Stopwatch:
    """Seconds of the stages of a step."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to ``name``."""
        now = time.perf_counter()
        self.laps[f"time/{name}"], self.last = now - self.last, now

    def metrics(self) -> dict[str, float]:
        """All laps and the whole step."""
        return {**self.laps, "time/step": self.last - self.started}
