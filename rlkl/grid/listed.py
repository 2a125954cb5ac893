"""Tasks so small that every completion is listed: the exact frontier of a comparison, and what its horizons can reach.

`exact.json` keeps them, since listing takes about a minute; it is made anew where what it depends on has changed.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkl import exact, settings
from rlkl.config import Config, dump
from rlkl.data import files
from rlkl.evaluate import chunks
from rlkl.grid.plan import Plan
from rlkl.lane import Lane, build
from rlkl.tasks import fix
from rlkl.types import Rollout

BETAS = [1e6, *(2.0 ** (k / 2) for k in range(6, -15, -1))]
"""From the reference to next to no penalty."""
ROWS = 4096
"""Completions a forward."""


def alphabet(config: Config) -> int | None:
    """How many tokens completions are made of, where all of them can be listed; their length is then fixed."""
    if config.data.type == "fix" and config.model.type == "fix" and config.rollout.max_new_tokens <= fix.LENGTH:
        return fix.VOCABULARY
    return None


def atoms(lane: Lane, place: int, tokens: int, held_out: bool = True) -> Rollout:
    """Every completion of a prompt, a row each, with its columns, so that rewards can read it."""
    prompts = lane.held_out if held_out else lane.train_prompts.take([place])
    at = place if held_out else 0
    rows = exact.enumerate_completions(prompts.ids[at], tokens, lane.config.rollout.max_new_tokens)
    columns = {name: [values[at]] * len(rows) for name, values in prompts.columns.items()}
    return replace(rows, columns=columns, decode=prompts.decode)


@torch.no_grad()
def reference_logp(lane: Lane, rows: Rollout) -> Tensor:
    """log pi0 of every token of every completion ``[N, T]``, float64."""
    parts = [lane.policy(rows.rows(i), {"ref_logp"}).get("ref_logp_BT") for i in chunks(len(rows), ROWS)]
    return torch.cat(parts).double()


def exact_points(made: Plan) -> dict[str, Any] | None:
    """KL and gold of the optimal policies of a comparison, mean over held-out prompts; None where nothing is listed.

    ``frontier``: of pi0 exp(gold/beta), normalised, for a range of beta. ``horizons``: of what a finite horizon with a
    reward at the end and the anchored window reaches, pi0 for the first T - h tokens and the optimum from there, for
    every beta and horizon of the arms. ``mass``: the least share of pi0 that the listed completions have.
    """
    first = made.runs[0].config
    tokens = alphabet(first)
    same = {json.dumps([dump(run.config)[key] for key in ("model", "data")]) for run in made.runs}
    if tokens is None or len(same) > 1 or any(alphabet(run.config) is None for run in made.runs):
        return None
    wanted = sorted({(c.credit.horizon or 0, c.kl.beta) for c in (run.config for run in made.runs) if c.kl.beta > 0})
    key = _key(first, made.gold, wanted)
    path = made.folder / "exact.json"
    if (kept := _kept(path)) and kept.get("key") == key:
        return kept
    found = {"key": key, **_points(build(first), made.gold, tokens, wanted)}
    _write(path, found)
    return found


def _points(lane: Lane, gold: str, tokens: int, wanted: Sequence[tuple[int, float]]) -> dict[str, Any]:
    count, length = len(lane.held_out.ids), lane.config.rollout.max_new_tokens
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in [*map(_name, BETAS), *map(str, wanted)]}
    mass = 1.0
    for place in range(count):
        rows = atoms(lane, place, tokens)
        ref_NT = reference_logp(lane, rows)
        left = ref_NT.sum(-1).logsumexp(0)
        mass = min(mass, float(left.exp()))
        ref_N = ref_NT.sum(-1) - left
        gold_N = lane.reward(rows).shares[gold].double().sum(-1)
        for beta in BETAS:
            sums[_name(beta)] += _place(exact.optimum(ref_N, gold_N, beta)[0], ref_N, gold_N)
        for horizon, beta in wanted:
            kept = length - (horizon or length)
            logp_N = _from(rows, ref_N, gold_N, beta, kept)
            sums[str((horizon, beta))] += _place(logp_N, ref_N, gold_N)
    points = {name: [float(x) for x in both / count] for name, both in sums.items()}
    frontier = [
        {"beta": beta, "kl": max(points[_name(beta)][0], 0.0), "gold": points[_name(beta)][1]} for beta in BETAS
    ]
    reached = [
        {
            "horizon": horizon or None,
            "beta": beta,
            "kl": points[str((horizon, beta))][0],
            "gold": points[str((horizon, beta))][1],
        }
        for horizon, beta in wanted
    ]
    return {"frontier": frontier, "horizons": reached, "mass": mass, "prompts": count}


def _from(rows: Rollout, ref_N: Tensor, gold_N: Tensor, beta: float, kept: int) -> Tensor:
    """log-probs of pi0 for the first ``kept`` tokens and of the optimum given them for the others ``[N]``."""
    _, group_N = torch.unique(rows.tokens_BT[:, :kept], dim=0, return_inverse=True) if kept else (None, None)
    if group_N is None:
        return exact.optimum(ref_N, gold_N, beta)[0]
    groups = int(group_N.max()) + 1

    def share(energy_N: Tensor) -> Tensor:
        top = energy_N.max()
        return (energy_N.new_zeros(groups).index_add(0, group_N, (energy_N - top).exp()).log() + top)[group_N]

    energy_N = ref_N + gold_N / beta
    return energy_N - share(energy_N) + share(ref_N)


def _place(logp_N: Tensor, ref_N: Tensor, gold_N: Tensor) -> Tensor:
    """KL to the reference, nats, and expected gold ``[2]``."""
    return torch.stack([exact.kl(logp_N, ref_N), (logp_N.exp() * gold_N).sum()])


def exact_gradient(lane: Lane, gold: str, places: Sequence[int], tokens: int) -> Tensor:
    """The gradient of J = E[gold] - beta KL in the policy's parameters ``[D]``, mean over training prompts."""
    parameters = shared(lane)
    total = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    for place in places:
        rows = atoms(lane, place, tokens, held_out=False).to(lane.device)
        gold_N = lane.reward.share(gold, rows).double().sum(-1)
        for i in chunks(len(rows), ROWS):
            part = rows.rows(i)
            out = lane.policy(part, {"logp", "ref_logp"})
            own_N, ref_N = (out.get(f"{name}_BT").double().sum(-1) for name in ("logp", "ref_logp"))
            value = exact.objective(own_N, ref_N, gold_N[i], lane.config.kl.beta)
            grads = torch.autograd.grad(value, list(parameters.values()))
            total += torch.cat([g.flatten().double().cpu() for g in grads])
    return total / len(places)


def shared(lane: Lane) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of the policy alone, which arms have in common; a value's are left out."""
    return {name: p for name, p in lane.policy.model.named_parameters() if p.requires_grad}


def tell(points: dict[str, Any]) -> Iterator[str]:
    """Lines for the terminal: what each horizon can reach."""
    yield f"exact: the listed completions of {points['prompts']} prompts have at least {points['mass']:.4f} of pi0"
    for point in points["horizons"]:
        name = f"horizon {point['horizon'] or 'whole'}, beta {point['beta']:g}"
        yield f"exact optimum, {name}: gold {point['gold']:.3f} at {point['kl']:.3f} nats"


def _key(config: Config, gold: str, wanted: Sequence[tuple[int, float]]) -> str:
    tree = dump(config)
    kept = [tree["model"], tree["data"], tree["rewards"][gold], config.rollout.max_new_tokens, config.evaluate.prompts]
    return settings.show([*kept, gold, config.seed if config.data.type != "fix" else 0, list(wanted), len(BETAS)])


def _name(beta: float) -> str:
    return f"beta {beta!r}"


def _kept(path: Path) -> dict[str, Any] | None:
    """What exact.json holds; None where there is none that can be read, so that it is made anew."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) else None


def _write(path: Path, found: dict[str, Any]) -> None:
    assert all(math.isfinite(point["gold"]) for point in found["frontier"])
    files.write(path, json.dumps(found, indent=2) + "\n", overwrite=True)
