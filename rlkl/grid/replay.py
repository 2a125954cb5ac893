"""``mode: replay`` of a comparison: every objective takes one step from the same weights on the very same samples.

What is compared is the direction of its gradient, what its optimiser made of it, and what the step did to held-out
prompts. Samples are drawn from the base model once a seed, recorded, and replayed to every arm.
"""

import contextlib
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlkl import RunError, faults, launch, lessons, loop, settings
from rlkl.config import Config
from rlkl.data import files
from rlkl.evaluate import Evaluation
from rlkl.grid import listed
from rlkl.grid.plan import Plan, Run
from rlkl.lane import Lane, build, collect

SHARED = ("model", "data", "rollout", "evaluate")
"""Sections that all arms must have in common for their steps to be comparable."""
ENUMERATED = 200_000
"""Completions of all prompts of a step, at most, for its exact gradient to be computed."""
ONE_STEP = {
    "train.steps": 1,
    "train.budget": {},
    "optimiser.schedule": "constant",
    "optimiser.warmup_steps": 0,
    "log.with": [],
}


@dataclass(frozen=True)
class Step:
    """One arm's step on one seed's samples: gradient and change of the policy's parameters ``[D]``, and what it did.

    ``kl`` and ``gold`` are per held-out prompt ``[P]``: KL after the step, and gold after minus before.
    """

    gradient_D: Tensor
    change_D: Tensor
    norm: float
    kl_P: Tensor
    gold_P: Tensor


def check(made: Plan) -> None:
    """Refuse arms that could not learn from the same samples.

    Raises:
        ValueError: it names the key in which they differ.
    """
    first = made.runs[0]
    for run in made.runs:
        if run.config.offline:
            raise ValueError(
                f"arm {run.arm}: mode=replay with stored completions, which no policy drew; use data of prompts"
            )
        if run.config.rollout.replay is not None or run.config.rollout.record:
            raise ValueError(
                f"arm {run.arm}: mode=replay records and replays by itself; drop rollout.record and replay"
            )
        mine, theirs = (settings.decisive(one.config) for one in (run, first))
        for key in {**mine, **theirs}:
            if key.split(".")[0] in SHARED and mine.get(key) != theirs.get(key):
                pair = f"{settings.show(theirs.get(key))} in {first.arm}, {settings.show(mine.get(key))} in {run.arm}"
                raise ValueError(f"{key}: {pair}; mode=replay takes one step on the same samples, so make it equal")


def run(made: Plan) -> dict[str, Any]:
    """All steps, and what is said of them (see :func:`summary`); an arm that fails once is in no matrix.

    Raises:
        RunError: every arm failed.
    """
    steps: dict[str, dict[int, Step]] = {arm: {} for arm in made.arms}
    truth: dict[int, Tensor] = {}
    failed: dict[str, str] = {}
    for old in made.folder.glob("*,seed=*/error.txt"):  # of another time
        old.unlink()
        with contextlib.suppress(OSError):
            old.parent.rmdir()
    for seed in made.config.seeds:
        mine = [one for one in made.runs if one.config.seed == seed]
        drawn = record(made, mine[0])
        samples = made.folder / drawn.config.name
        if tokens := enumerable(drawn.config):
            places = drawn.train_prompts.places(1, drawn.config.rollout.prompts)
            truth[seed] = listed.exact_gradient(drawn, made.gold, places, tokens)
        for one in mine:
            print(f"{one.config.name}: one step", flush=True)
            try:
                lane, accelerator = ready(one.config, samples)
                steps[one.arm][seed] = finite(take(lane, made.gold, accelerator))
            except (Exception, SystemExit) as error:  # whatever torch or a reward raises; the other arms go on
                failed[one.config.name] = why(one, error)
    whole = {arm: mine for arm, mine in steps.items() if len(mine) == len(made.config.seeds)}
    if not whole:
        raise RunError(f"every arm failed: {'; '.join(f'{name}: {error}' for name, error in failed.items())}")
    return {**summary(made, whole, truth), "failed": failed}


def why(run: Run, error: BaseException) -> str:
    """What ended an arm's step, on one line; with the place of its traceback, unless it was found here."""
    said = " ".join(faults.told(error, run.config).split())
    if isinstance(error, RunError) and error.__cause__ is None:
        return said
    with contextlib.suppress(OSError):
        run.folder.mkdir(exist_ok=True)
    return said + (faults.write_error(run.folder, "".join(traceback.format_exception(error))) or "")


def finite(step: Step) -> Step:
    """The step itself.

    Raises:
        RunError: its gradient, its change or what it did is not finite.
    """
    held_out = {"KL after the step": step.kl_P, "gold gained by the step": step.gold_P}
    for name, x in {"the gradient": step.gradient_D, "the change of the weights": step.change_D, **held_out}.items():
        if not bool(x.isfinite().all()):
            raise RunError(f"{name} is not finite; lower optimiser.learning_rate")
    return step


def record(made: Plan, run: Run) -> Lane:
    """Draw and record the samples of a seed's step from the base model; what drew them, in its folder."""
    name = f"samples,seed={run.config.seed}"
    lane = build(changed(run.config, {"name": name, "rollout.record": True}))
    lane.place(launch.accelerator(lane.config))
    collect(lane, 1)
    return lane


def ready(config: Config, samples: Path) -> tuple[Lane, Accelerator]:
    """A run at its first step, with the recorded samples in the place of its own."""
    lane = build(changed(config, {"rollout.replay": str(samples)}))
    accelerator = launch.accelerator(lane.config)
    lane.place(accelerator)
    lessons.prepare(lane)
    return lane, accelerator


def changed(config: Config, more: Mapping[str, Any]) -> Config:
    """A run's configuration for a single optimiser step; of PPO that is its first, on all samples."""
    tree = settings.read(config.model_dump(mode="json", by_alias=True))
    passes = {"trainer.epochs": 1, "trainer.minibatches": 1, "trainer.target_kl": None}
    for key, value in {**ONE_STEP, **(passes if config.trainer.type == "ppo" else {}), **more}.items():
        settings.put(tree, key, value)
    return settings.check(settings.resolve(tree), Config)


def enumerable(config: Config) -> int | None:
    """The alphabet, where all completions of a step's prompts are few enough to be listed."""
    tokens = listed.alphabet(config)
    if tokens is None or tokens**config.rollout.max_new_tokens * config.rollout.prompts > ENUMERATED:
        return None
    return tokens


def take(lane: Lane, gold: str, accelerator: Accelerator) -> Step:
    """Evaluate, step, evaluate again.

    Raises:
        RunError: a reward fails, or the gradient is not finite.
    """
    own, found = listed.shared(lane), {}

    def keep(*_: Any) -> None:  # clipping by the global norm changed its length, not its direction
        found["gradient"] = flat(p.grad if p.grad is not None else torch.zeros_like(p) for p in own.values())

    wrapped: Any = lane.optimiser  # by accelerate
    handle = wrapped.optimizer.register_step_pre_hook(keep)
    before, weights = measure(lane), flat(own.values())
    metrics = loop.train_step(lane, 1, accelerator)
    handle.remove()
    after = measure(lane)
    gradient_D = found.get("gradient", torch.zeros_like(weights))  # where nothing pulls there is no step
    gains = [by_prompt(x, x.rewards.shares[gold]) for x in (before, after)]
    norm = metrics["policy/grad_norm"]
    return Step(gradient_D, flat(own.values()) - weights, norm, by_prompt(after, after.kl_BT), gains[1] - gains[0])


def flat(tensors: Any) -> Tensor:
    """Tensors as one vector on the CPU, a copy."""
    return torch.cat([x.detach().float().flatten().cpu().clone() for x in tensors])


def measure(lane: Lane) -> Evaluation:
    """An evaluation as a run makes it."""
    try:
        return loop.judged(lane)
    except RunError as error:
        raise RunError(f"evaluation of {lane.config.name}: {error}") from error


def by_prompt(result: Evaluation, x_BT: Tensor) -> Tensor:
    """Means over a prompt's samples of a sum over tokens ``[P]``, float64."""
    group_B = result.rollout.group_B
    sums_P = torch.zeros(int(group_B.max()) + 1, dtype=torch.float64, device=x_BT.device)
    counts_P = sums_P.index_add(0, group_B, torch.ones_like(x_BT[:, 0], dtype=torch.float64))
    return (sums_P.index_add(0, group_B, x_BT.double().sum(-1)) / counts_P).cpu()


def summary(made: Plan, steps: Mapping[str, Mapping[int, Step]], truth: Mapping[int, Tensor]) -> dict[str, Any]:
    """What replay.json holds: cosines of gradients and of updates between arms, and every step, by seed.

    ``exact`` is the cosine of minus the gradient with the exact one of E[gold] - beta KL, where that is known; ``snr``,
    with two seeds or more, the squared norm of an arm's expected gradient over the variance of a single one.
    """
    seeds = made.config.seeds
    parameters = len(next(iter(next(iter(steps.values())).values())).gradient_D)
    arms: dict[str, Any] = {}
    for arm, mine in steps.items():
        rows = {str(seed): told(step, truth.get(seed)) for seed, step in mine.items()}
        means = {name: mean([row[name] for row in rows.values()]) for name in rows[str(seeds[0])]}
        means["kl_per_gold"] = ratio(means)
        arms[arm] = {**means, "snr": snr([step.gradient_D for step in mine.values()]), "seeds": rows}
    names = list(steps)
    return {
        "name": made.config.name,
        "gold": made.gold,
        "seeds": list(seeds),
        "parameters": parameters,
        "arms": arms,
        "gradient_cosine": {a: {b: agree(steps[a], steps[b], "gradient_D") for b in names} for a in names},
        "update_cosine": {a: {b: agree(steps[a], steps[b], "change_D") for b in names} for a in names},
    }


def told(step: Step, truth: Tensor | None) -> dict[str, float | None]:
    """A step in numbers; standard errors are over held-out prompts, of gold of its change prompt by prompt."""
    kl, gold = float(step.kl_P.mean()), float(step.gold_P.mean())
    error = [float(x.std() / len(x) ** 0.5) if len(x) > 1 else None for x in (step.kl_P, step.gold_P)]
    found = {
        "gradient_norm": step.norm,
        "update_norm": float(step.change_D.double().norm()),
        "kl": kl,
        "kl_stderr": error[0],
        "gold": gold,
        "gold_stderr": error[1],
        "exact": None if truth is None else cosine(-step.gradient_D.double(), truth),
    }
    return {**found, "kl_per_gold": ratio(found)}


def ratio(row: Mapping[str, float | None]) -> float | None:
    """Nats moved a unit of gold gained; None where the gain is not above two standard errors."""
    kl, gold, error = (row[name] for name in ("kl", "gold", "gold_stderr"))
    return kl / gold if kl is not None and gold is not None and error is not None and gold > 2 * error else None


def agree(a: Mapping[int, Step], b: Mapping[int, Step], name: str) -> dict[str, float] | None:
    """Cosine of two arms' vectors on the samples of a seed: mean, least and most over seeds."""
    found = [cosine(getattr(a[seed], name), getattr(b[seed], name)) for seed in a]
    known = [x for x in found if x is not None]
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known)} if len(known) == len(found) else None


def cosine(a: Tensor, b: Tensor) -> float | None:
    """None where one of them is zero."""
    a, b = a.double(), b.double()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else None


def snr(gradients: Sequence[Tensor]) -> float | None:
    """Squared norm of the expected gradient over the variance of one, the former without bias; it may be negative."""
    if len(gradients) < 2:
        return None
    stacked = torch.stack([g.double() for g in gradients])
    mean_D = stacked.mean(0)
    noise = float(((stacked - mean_D) ** 2).sum() / (len(gradients) - 1))
    return (float(mean_D @ mean_D) - noise / len(gradients)) / noise if noise > 0 else None


def mean(values: Sequence[float | None]) -> float | None:
    """None where one is unknown."""
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def write(folder: Path, found: Mapping[str, Any]) -> Iterator[str]:
    """replay.json and its figure; lines that name them."""
    from rlkl import plots

    files.write(folder / "replay.json", json.dumps(found, indent=2, allow_nan=False) + "\n", overwrite=True)
    yield f"figure: {plots.cosines(folder / 'replay.svg', found)}"
    yield f"summary: {folder / 'replay.json'}"
