r"""How far a proxy has run ahead of gold, on the held-out prompts.

A source is read in standard deviations of the untrained policy's samples,

.. math:: z_k=\frac{E_\pi[r_k]-E_{\pi_0}[r_k]}{\mathrm{sd}_{\pi_0}[r_k]},\qquad gap_k=z_k-z_{gold}

so that scales and offsets mean nothing: a reward model that learns anew has other ones each time. Such a source scores
the untrained policy's samples again with what it has become.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object

from rlkl import recording
from rlkl.evaluate import Evaluation
from rlkl.lane import Lane
from rlkl.reduce import masked_mean, masked_std

CHANGING = ("learn", "at")  # methods of sources whose rewards of the same completion may change


def begin(lane: Lane, result: Evaluation, folder: Path, main: bool) -> None:
    """Keep what the sources gave the untrained policy's samples, and the samples where one will score them again."""
    if lane.config.evaluate.gold is None:
        return
    lane.base = {name: _moments(share_BT.sum(-1)) for name, share_BT in result.rewards.shares.items()}
    if not _changing(lane):
        return
    lane.untrained = result.rollout
    columns = {name: values for name, values in result.rollout.columns.items() if _json(values)}
    parts = gather_object([replace(result.rollout.to(torch.device("cpu")), decode=None, columns=columns)])
    if main:
        recording.save(recording.joined(parts), folder / "untrained", 0, {})


def resume(lane: Lane, folder: Path) -> None:
    """Read those samples again."""
    if lane.config.evaluate.gold is not None and _changing(lane):
        whole = recording.load(folder / "untrained", 0, tokenizer=lane.tokenizer)
        lane.untrained = recording.share(whole, lane.rank, lane.ranks).to(lane.device)


def measure(lane: Lane, result: Evaluation) -> dict[str, float]:
    """``reward/eval/gap/<source>`` for every source but gold; NaN where a source does not vary before training."""
    gold = lane.config.evaluate.gold
    if gold is None or lane.judge is None:
        return {}
    if lane.untrained is not None:
        for name in _changing(lane):
            lane.base[name] = _moments(lane.judge.share(name, lane.untrained).sum(-1))
    z = {}
    for name, share_BT in result.rewards.shares.items():
        mean, std = lane.base[name]
        z[name] = (_moments(share_BT.sum(-1))[0] - mean) / std if std > 0 else float("nan")
    return {f"reward/eval/gap/{name}": z[name] - z[gold] for name in z if name != gold}


def _changing(lane: Lane) -> list[str]:
    sources = {} if lane.judge is None else lane.judge.sources
    return [name for name, (source, _) in sources.items() if any(hasattr(source, how) for how in CHANGING)]


def _moments(sum_B: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation over the samples of all processes."""
    sum_B = sum_B.double()
    everyone = torch.ones_like(sum_B, dtype=torch.bool)
    return float(masked_mean(sum_B, everyone)), float(masked_std(sum_B, everyone))


def _json(values: list[object]) -> bool:
    try:
        json.dumps(values)
    except TypeError:
        return False
    return True
