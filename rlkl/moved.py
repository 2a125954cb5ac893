r"""What annotations moved: log-probs of marked and of unmarked tokens on a fixed set of annotated completions.

Nothing is sampled, so two evaluations differ by their policies alone. For the tokens of a label

.. math:: \bar x=\frac{\sum_i s_i}{\sum_i n_i},\qquad
   se^2=\frac{C}{C-1}\frac{\sum_i(s_i-\bar x n_i)^2}{(\sum_i n_i)^2}

with :math:`s_i` the sum of x over the :math:`n_i` such tokens of completion i, and C the completions that have any: a
ratio estimator, whose unit of chance is the completion. Everything is global over processes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlkl import recording
from rlkl.evaluate import join, outputs
from rlkl.reduce import global_sum
from rlkl.types import Rollout

UNMARKED, MARKED = "unmarked", "marked"
Tokens = list[list[tuple[str, Sequence[int]]]]
"""For every completion, labels with the places of the tokens that each marks."""


@dataclass(frozen=True)
class Marked:
    """Completions of this process, and the tokens that each label marks.

    ``unmarked`` are those of no label, ``marked``, where there are several, those of any.
    The names are the same on every process.
    """

    rollout: Rollout
    mask_BT: dict[str, Tensor]


def stored(rollout: Rollout) -> Marked:
    """Annotated data with its own spans (column ``spans``)."""
    return mark(rollout, {"data": [[(s["label"], s["tokens"]) for s in spans] for spans in rollout.columns["spans"]]})


def labelled(rollout: Rollout, sources: Mapping[str, tuple[Any, float]]) -> Marked | None:
    """New samples with the spans of every labeller, whatever its weight; None without a labeller.

    Raises:
        RunError: a labeller fails.
    """
    judged = {
        name: [[(span.label, tokens) for span, tokens in row] for row in source.judged(rollout)]
        for name, (source, _) in sources.items()
        if hasattr(source, "judged")
    }
    return mark(rollout, judged) if judged else None


def keep(marked: Marked, folder: Path, main: bool) -> None:
    """Write new samples with their marks to ``held_out/`` of a run's folder, for when it is resumed."""
    labels = {name: mask_BT for name, mask_BT in marked.mask_BT.items() if name not in (MARKED, UNMARKED)}
    places = {name: [row.nonzero().flatten().tolist() for row in mask_BT] for name, mask_BT in labels.items()}
    rows = [[{"label": n, "tokens": held[i]} for n, held in places.items()] for i in range(len(marked.rollout))]
    columns = {"prompt": marked.rollout.columns["prompt"], "spans": rows}
    mine = replace(marked.rollout.to(torch.device("cpu")), decode=None, columns=columns)
    parts = gather_object([mine])
    if main:
        recording.save(recording.joined(parts), folder / "held_out", 0, {})


def kept(folder: Path, rank: int, ranks: int, device: torch.device) -> Marked | None:
    """What :func:`keep` wrote, the part of this process; None where nothing was written."""
    if not (folder / "held_out").is_dir():
        return None
    return stored(recording.share(recording.load(folder / "held_out", 0), rank, ranks).to(device))


def mark(rollout: Rollout, judged: Mapping[str, Tokens]) -> Marked:
    """Completions with the spans of every source; a label that two sources give, or no other may, gets its source.

    To be called by all processes.
    """
    own = [(source, label) for source, rows in judged.items() for row in rows for label, _ in row]
    pairs = sorted(set(gather_object(own)))
    labels = [label for _, label in pairs]
    masks: dict[str, Tensor] = {}
    for source, label in pairs:
        clash = labels.count(label) > 1 or label in (UNMARKED, MARKED)
        mask_BT = torch.zeros(rollout.tokens_BT.shape, dtype=torch.bool)
        for i, row in enumerate(judged.get(source, [])):
            for given, places in row:
                if given == label:
                    mask_BT[i, list(places)] = True
        masks[f"{source}.{label}" if clash else label] = mask_BT.to(rollout.tokens_BT.device) & rollout.policy_mask_BT
    some_BT = torch.stack([*masks.values(), torch.zeros_like(rollout.policy_mask_BT)]).any(0)
    both = {MARKED: some_BT} if len(masks) > 1 else {}
    return Marked(rollout, {**masks, **both, UNMARKED: rollout.policy_mask_BT & ~some_BT})


@torch.no_grad()
def measure(policy: Any, marked: Marked, micro_batch: int = 64) -> dict[str, float]:
    """``annotated/logp/<label>``, ``change`` (log pi - log pi0) and ``moved`` (its absolute value), nats a token.

    Each with its standard error, NaN for a single completion. A label that marks no token has none.
    """
    rollout = marked.rollout
    parts = outputs(policy, rollout, {"logp", "ref_logp"}, micro_batch)
    x_BT = rollout.tokens_BT.new_zeros(rollout.tokens_BT.shape, dtype=torch.float64)
    logp_BT, ref_BT = (join(parts, name).double() if parts else x_BT for name in ("logp_BT", "ref_logp_BT"))
    change_BT = logp_BT - ref_BT
    found = {"logp": logp_BT, "change": change_BT, "moved": change_BT.abs()}
    values: dict[str, float] = {}
    for kind, x_BT in found.items():
        for label, mask_BT in marked.mask_BT.items():
            values |= _mean(f"annotated/{kind}/{label}", x_BT, mask_BT)
    return values


def _mean(name: str, x_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    """Mean over the masked tokens of all processes, with its standard error over completions."""
    s_B, n_B = (x_BT * mask_BT).sum(-1), mask_BT.sum(-1).double()
    sums = [s_B.sum(), n_B.sum(), (n_B > 0).sum().double(), (s_B**2).sum(), (s_B * n_B).sum(), (n_B**2).sum()]
    total, tokens, count, ss, sn, nn = global_sum(torch.stack(sums)).tolist()
    if not tokens:
        return {}
    mean = total / tokens
    square = max(ss - 2 * mean * sn + mean**2 * nn, 0.0)
    error = math.sqrt(count / (count - 1) * square) / tokens if count > 1 else math.nan
    return {name: mean, f"{name}_stderr": error}
