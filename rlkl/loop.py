"""The one training loop: prompts -> sample -> reward -> KL -> credit -> loss -> step."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rlkl import (
    Outage,
    RunError,
    Stopped,
    artefacts,
    budget,
    card,
    checkpoint,
    credit,
    gap,
    kl,
    lessons,
    moved,
    pairs,
    plots,
    recording,
    samples,
    terminal,
    tracking,
)
from rlkl.evaluate import Evaluation, by_prompt, evaluate, join, outputs
from rlkl.lane import Lane, collect
from rlkl.reduce import finish, global_sum, masked_mean, masked_std
from rlkl.tasks import fix_mass
from rlkl.types import Batch, End, PolicyOutput, Rollout, TokenRewards
from rlkl.update import NotFinite, update


def run(
    lanes: list[Lane], trackers: list[tracking.Tracker], accelerator: Accelerator, asked: Callable[[], int] = int
) -> None:
    """Drive lanes, step by step, to their last step. An ordinary run is one lane.

    Raises:
        Stopped: ``asked()`` gave an exit code; every lane has a checkpoint of its last step.
        RunError: a step failed; where that was an outage, the same.
    """
    both = list(zip(lanes, trackers, strict=True))
    try:
        drive(both, accelerator, asked)
    except Outage as error:
        raise RunError(f"{error}; {checkpoint.keep(both)}") from error
    for lane, tracker in both:
        tracker.say(*(terminal.show(tracker.folder) if tracker.main else ()))
        if tracker.main:
            checkpoint.save_rewards(lane.reward.state_dict(), tracker.folder / "rewards")
        artefacts.save_final(lane.policy, lane.tokenizer, tracker.folder / "final", tracker.main)
        if tracker.main:
            tracker.say(f"figure: {plots.curves(tracker.folder)}", f"model:  {tracker.folder / 'final'}")
            card.write(tracker.folder, tracker.folder / "final", lane.policy.adapted)


def drive(both: list[tuple[Lane, tracking.Tracker]], accelerator: Accelerator, asked: Callable[[], int]) -> None:
    """Every step of every lane."""
    for lane, tracker in both:
        lane.place(accelerator)
        tracker.say(*terminal.notices(lane, accelerator), *tracker.notes)
        begin(lane, tracker, asked)
    for step in range(1, max(lane.config.train.steps for lane, _ in both) + 1):
        if code := asked():
            raise Stopped(checkpoint.keep(both), code, said=not both[0][1].main)
        for lane, tracker in both:
            if lane.step < step <= lane.config.train.steps and budget.reached(lane) is None:
                advance(lane, tracker, step, accelerator)


def begin(lane: Lane, tracker: tracking.Tracker, asked: Callable[[], int]) -> None:
    """Keep the reference and evaluate it; after a checkpoint there is nothing to do."""
    if lane.step:
        tracker.say(f"resumed after step {lane.step} of {lane.config.train.steps}")
        lane.marked = lane.marked or moved.kept(tracker.folder, lane.rank, lane.ranks, lane.device)
        gap.resume(lane, tracker.folder)
        if lane.due is not None:
            lane.reward.at(lane.step)
            assess(lane, tracker, lane.step, lane.due)
            lane.due = None
        return
    kept = tracker.folder / "reference"
    artefacts.save_reference(lane.policy, lane.config, lane.tokenizer, kept, tracker.main)
    before = assess(lane, tracker, 0, lessons.prepare(lane, asked, tracker.say))
    if lane.marked is not None and lane.stored is None:
        moved.keep(lane.marked, tracker.folder, tracker.main)
    tracker.say(*terminal.guidance(lane.config, before))
    check_start(lane, before)


def advance(lane: Lane, tracker: tracking.Tracker, step: int, accelerator: Accelerator) -> None:
    """One training step of a lane, with its line, its row and, when due, its evaluation and its checkpoint."""
    total, every = lane.config.train.steps, lane.config.save.every
    metrics = train_step(lane, step, accelerator)
    lane.step = step
    bound = budget.reached(lane) if step < total else None
    ends = bound is not None or step == total
    metrics |= {f"budget/ended/{bound}": 1.0} if bound else {}
    tracker.screen.step(step, metrics, lane.config.log.every)
    if step <= lane.config.evaluate.early or step % lane.config.evaluate.every == 0 or ends:
        lane.due = metrics  # should the evaluation find no judge
        assess(lane, tracker, step, metrics)
        lane.due = None
    else:
        tracker.metrics(step, metrics)
    tracker.say(*budget.told(lane, bound))
    if every is not None and step % every == 0 and not ends:
        checkpoint.save(lane, tracker.folder, lane.config.save.keep, tracker.main)


def train_step(lane: Lane, step: int, accelerator: Accelerator) -> dict[str, float]:
    """One step; the flow of the whole project, top to bottom."""
    config, clock = lane.config, tracking.Stopwatch()
    schedules = lane.reward.at(step)
    rollout = collect(lane, step)
    clock.lap("sample")
    try:
        rewards = lane.reward(rollout, training=True)
    except RunError as error:
        raise type(error)(f"step {step}: {error}") from error
    if config.trainer.type == "dpo" and rollout.pair_B is None:
        rollout = pairs.ranked(rollout, rewards)
    clock.lap("reward")
    scored, ema = score(lane, rollout), lane.ema
    batch = replace(assign(lane, rollout, rewards, scored), ref_logp_BT=scored.ref_logp_BT)
    clock.lap("score")
    try:
        metrics = update(lane, rollout, batch, step, accelerator)
    except NotFinite as error:
        folder = recording.inspect(rollout, batch, tracking.run_folder(config), step, lane.rank)
        raise RunError(f"{error}; its samples and what the loss read are in {folder}") from error
    clock.lap("update")
    stds = {f"reward/std/{name}": spread.std for name, spread in lane.reward.spreads.items()}
    learned = lessons.learn(lane, rollout, step)
    clock.lap("learn")
    sums = [float(rollout.length_B.sum()), float(rewards.queries), float(rewards.labels)]
    counts = torch.tensor(sums, dtype=torch.float64)
    generated, queries, labels = global_sum(counts.to(rollout.tokens_BT.device)).tolist()
    lane.generated += 0 if config.offline else int(generated)
    asked = lessons.count(lane, learned, queries, labels, step)
    lane.seconds += budget.together(clock.metrics()["time/step"], lane.device)
    values = {
        **finish(metrics),
        **schedules,
        **step_metrics(rollout, rewards, batch, scored),
        "kl/beta": lane.beta,
        "tokens/generated": float(lane.generated),
        **stds,
        **learned,
        **asked,
        **clock.metrics(),
    }
    if not config.offline:  # on tokens of others log-ratios estimate no KL
        values["kl/penalty"] = kl.measured(rollout, scored)
    if not math.isfinite(values["policy/grad_norm"]):
        lane.ema = ema  # what was left out leaves no trace in the baseline either
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
        best = config.trainer.imitate
        marked = pairs.imitated(rollout, rewards, best) if best else lane.reward.annotate(rollout)
        batch = credit.likelihood(marked, rewards, scored, config.credit)
    else:
        batch, lane.ema = credit.assign(rollout, rewards, scored, config.credit, config.kl, lane.beta, lane.ema)
    if config.rollout.replay is not None:  # ratios and importance weights are against the policy that drew the samples
        batch = replace(batch, behaviour_logp_BT=rollout.get("behaviour_logp_BT"))
    return batch


@torch.no_grad()
def score(lane: Lane, rollout: Rollout) -> PolicyOutput:
    """Policy and reference on the samples, as they are before the update."""
    parts = outputs(lane.forward, rollout, lane.score_need, lane.config.train.micro_batch)
    names = [f"{need}_BT" for need in lane.score_need]
    if lane.config.credit.bootstrap_truncated:
        names.append("bootstrap_B")
    return PolicyOutput(**{name: join(parts, name) for name in names})


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
    sizes = {name: global_sum((factor * rewards.shares[name]).abs().sum()) for name, factor in rewards.factors.items()}
    if len(sizes := {name: size for name, size in sizes.items() if rewards.factors[name]}) > 1:
        whole = torch.stack([*sizes.values()]).sum().clamp(min=1e-12)
        values |= {f"reward/share/{name}": size / whole for name, size in sizes.items()}
    return {name: float(x) for name, x in values.items()}


def judged(lane: Lane) -> Evaluation:
    """This process's part of the held-out prompts, evaluated as the lane's configuration says."""
    return evaluate(
        lane.forward,
        lane.judge,
        lane.held_out.part(lane.rank, lane.ranks),
        samples_per_prompt=lane.config.evaluate.samples_per_prompt,
        max_new_tokens=lane.config.rollout.max_new_tokens,
        eos_ids=lane.eos_ids,
        stop=lane.config.rollout.stop,
        seed=lane.config.seed,
        micro_batch=lane.config.train.micro_batch,
    )


def assess(lane: Lane, tracker: tracking.Tracker, step: int, metrics: Mapping[str, float] | None = None) -> Evaluation:
    """Evaluate, and write the step's row and some samples."""
    started = time.perf_counter()
    config = lane.config
    try:
        result = judged(lane)
        if step == 0 and lane.marked is None:
            lane.marked = moved.labelled(result.rollout, lane.reward.sources)
        if step == 0:
            gap.begin(lane, result, tracker.folder, tracker.main)
        result = replace(result, metrics=result.metrics | gap.measure(lane, result))
    except RunError as error:
        raise type(error)(f"evaluation at step {step}: {error}") from error
    if lane.marked is not None:
        shifts = moved.measure(lane.forward, lane.marked, config.train.micro_batch)
        result = replace(result, metrics=result.metrics | shifts)
    if config.data.type == "fix":
        asked = lane.held_out.part(lane.rank, lane.ranks)
        mass = fix_mass.measure(lane.forward, asked, lane.device, config.train.micro_batch)
        result = replace(result, metrics=result.metrics | mass)
    if lane.held_pairs is not None:
        preferred = pairs.measure(lane.forward, lane.held_pairs, lane.beta, config.train.micro_batch)
        result = replace(result, metrics=result.metrics | preferred)
    took = {"time/evaluate": time.perf_counter() - started}
    tracker.metrics(step, {**(metrics or {}), **result.metrics, **took})
    tracker.evaluation(step, by_prompt(result))
    first = list(samples.rows(result, config.log.samples, samples.advantages(result, config, lane.beta)))
    rows = gather_object(first)[: config.log.samples]  # the same ones whatever the processes
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
