"""How often the counterfactual score puts a person's correction above what was corrected, against c.

``python -m benchmarks.corrections CONFIG [key.sub=value ...]`` (``--help``) reads a run's configuration with one
counterfactual source, makes its model if need be, and scores two stored texts of every held-out record as x′.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from rlkl import RunError, models, settings
from rlkl.config import CounterfactualSource
from rlkl.data.prompts import records
from rlkl.policy import Policy
from rlkl.reward_model.measure import interval
from rlkl.rewards.counterfactual import CounterfactualReward
from rlkl.sampling import given
from rlkl.types import End, Rollout

Row = dict[str, Any]
Floats = NDArray[np.float64]


def main(words: Sequence[str] | None = None) -> None:
    """Score, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corrections", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--better", default="corrected_prediction", help="column of the corrected text")
    parser.add_argument("--worse", default="prediction", help="column of the text that was corrected")
    parser.add_argument("--c", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    asked = parser.parse_intermixed_args(words)
    try:
        found = measure(asked.config, asked.overrides, asked.better, asked.worse, asked.c)
    except (ValueError, RunError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
    console = Console(highlight=False)
    table = Table("score", "c", "above", "95 %", title=f"share of {asked.better} above {asked.worse}")
    for row in found["rows"]:
        low, high = row["interval"]
        table.add_row(row["score"], f"{row['c']:g}", f"{row['share']:.3f}", f"{low:.3f} to {high:.3f}")
    console.print(table)
    for text in found["notes"]:
        console.print(text, soft_wrap=True)


def measure(source: str, overrides: Sequence[str], better: str, worse: str, cs: Sequence[float]) -> dict[str, Any]:
    """The share of held-out records whose ``better`` text scores above its ``worse`` one, for every c; ties count half.

    Records whose texts are equal or empty are left out. Intervals resample records.

    Raises:
        ValueError: there is not one counterfactual source; a column is no text, or two hold the same.
        RunError: a text is longer than the scorer reads.
    """
    config = settings.load(source, overrides)
    named = [(name, s) for name, s in config.rewards.items() if isinstance(s, CounterfactualSource)]
    if len(named) != 1 or named[0][1].auditor is not None:
        raise ValueError(f"{source}: needs one counterfactual source under rewards, without an auditor")
    if bad := [c for c in cs if not 0 <= c < float("inf")]:
        raise ValueError(f"--c {bad[0]:g}: must be finite and at least 0, as in a configuration; give another")
    train, held = records(config.data, config.seed)
    for column in (better, worse):
        if any(not isinstance(row.get(column), str) for row in held):
            raise ValueError(f"{column}: no text in every record; name another column with --better or --worse")
    kept = [row for row in held if row[better].strip() and row[worse].strip() and row[better] != row[worse]]
    if not kept:
        raise ValueError(f"no held-out record has a {better} that is another text than its {worse}; name two columns")
    model, _, tokenizer = models.load(config.model, train, config.seed)
    reward = CounterfactualReward(*named[0])
    reward.check(tokenizer)
    reward.bind(Policy(model).eval())
    first, second = (parts(reward, stored(kept, column, tokenizer)) for column in (better, worse))
    rows = []
    for kind in ("sum", "mean"):
        for c in cs:
            a, b = ((given - c * alone) / (size if kind == "mean" else 1) for given, alone, size in (first, second))
            above = (a > b) + 0.5 * (a == b)
            name = "of the text" if kind == "sum" else "a token"
            rows.append({"score": name, "c": c, **share(above, config.seed)})
    sizes = first[2], second[2]
    notes = [
        f"{len(kept)} of {len(held)} held-out records, the others being equal or empty; {len(train)} training records",
        f"{better} is shorter in {(sizes[0] < sizes[1]).mean():.3f} of them: {sizes[0].mean():.0f} tokens against "
        f"{sizes[1].mean():.0f}; log p a token after x {first[0].sum() / sizes[0].sum():.2f} against "
        f"{second[0].sum() / sizes[1].sum():.2f}, alone {first[1].sum() / sizes[0].sum():.2f} against "
        f"{second[1].sum() / sizes[1].sum():.2f} nats",
    ]
    return {"rows": rows, "notes": notes}


def share(above_N: Floats, seed: int) -> dict[str, Any]:
    """A mean over records with its interval."""

    def mean(i: Any) -> float:
        return float(above_N[i].mean())

    return {"share": float(above_N.mean()), "interval": interval(range(len(above_N)), mean, seed)}


def parts(reward: CounterfactualReward, rollout: Rollout) -> tuple[Floats, Floats, Floats]:
    """log p(x′|x) and log p(x′) in nats, and the tokens of x′ with its EOS; all ``[B]``."""
    found = []
    for c in (0.0, 1.0):
        reward.c = c
        found.append(reward(rollout).value_BT.double().sum(-1).numpy())
    return found[0], found[0] - found[1], rollout.length_B.numpy().astype(np.float64)


def stored(rows: Sequence[Row], column: str, tokenizer: Any) -> Rollout:
    """A column's texts as completions that end by EOS."""
    return given(
        [tokenizer(row["prompt"])["input_ids"] for row in rows],
        [[*tokenizer(row[column])["input_ids"], tokenizer.eos_token_id] for row in rows],
        end_B=torch.full((len(rows),), int(End.EOS)),
        origin="data",
        columns={name: [row[name] for row in rows] for name in rows[0]},
        decode=lambda tokens: str(tokenizer.decode(tokens)),
    )


if __name__ == "__main__":
    main()
