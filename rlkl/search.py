"""Best of n: samples of a run's model before any training, ranked by the run's rewards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlkl import settings
from rlkl.lane import build
from rlkl.sampling import EVALUATE, sample

Row = dict[str, Any]


def search(source: str | Path, overrides: Sequence[str] = (), *, prompts: int, samples: int, best: int) -> list[Row]:
    """The ``best`` of ``samples`` distinct completions of the first held-out prompts, ranked by the run's reward.

    ``prompts`` takes the place of ``evaluate.prompts``; where fewer are held out, all of them are searched.

    A row has ``prompt``, ``rank`` (from 1), ``completion``, ``drawn`` (how often), the total ``score``, and what every
    source gave under its name in ``shares``, watched ones too.

    Raises:
        ValueError: the configuration cannot be used, learns from stored completions, or has a source yet to be taught.
    """
    config = settings.load(source, [*overrides, f"evaluate.prompts={prompts}"])
    if config.offline:
        raise ValueError(f"data.type={config.data.type}: a search samples; give prompts, such as data.type=jsonl")
    for name, given in config.rewards.items():
        if given.taught[1]:
            raise ValueError(
                f"rewards.{name}: it learns from labels in the course of a run, and a search trains nothing; "
                "give what has learned, or predictor=control"
            )
    lane = build(config)
    rollout = sample(
        lane.policy,
        lane.held_out,
        samples_per_prompt=samples,
        max_new_tokens=config.rollout.max_new_tokens,
        eos_ids=lane.eos_ids,
        stop=config.rollout.stop,
        seed=config.seed,
        step=1,
        stream=EVALUATE,
        temperature=config.rollout.temperature,
        micro_batch=config.rollout.micro_batch,
    )
    texts, asked = rollout.texts(), rollout.columns["prompt"]
    groups = rollout.group_B.tolist()
    places: dict[tuple[int, str], list[int]] = {}
    for i, (group, text) in enumerate(zip(groups, texts, strict=True)):
        places.setdefault((group, text), []).append(i)
    chosen = [where[0] for where in places.values()]
    scored = lane.reward(rollout.rows(torch.tensor(chosen)))  # each distinct completion is asked about once
    score_B = scored.value_BT.sum(-1).tolist()
    shares = {name: value_BT.sum(-1).tolist() for name, value_BT in scored.shares.items()}
    rows: list[Row] = []
    for group in dict.fromkeys(groups):
        ours = [n for n, i in enumerate(chosen) if groups[i] == group]
        for rank, n in enumerate(sorted(ours, key=lambda n: -score_B[n])[:best], 1):
            i = chosen[n]
            rows.append(
                {
                    "prompt": asked[i],
                    "rank": rank,
                    "completion": texts[i],
                    "drawn": len(places[group, texts[i]]),
                    "score": score_B[n],
                    "shares": {name: values[n] for name, values in shares.items()},
                }
            )
    return rows


def table(rows: Sequence[Row]) -> Any:
    """Rows as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table("prompt", "rank", "completion", "drawn", "score", *rows[0]["shares"])
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = [escape(str(row[key])) for key in ("prompt", "rank", "completion", "drawn")]
        values = [f"{x:.3f}" for x in (row["score"], *row["shares"].values())]
        shown.add_row(*cells, *values, end_section=following is None or following["rank"] == 1)
    return shown
