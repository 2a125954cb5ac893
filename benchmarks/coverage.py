"""How often the intervals of few seeds hold: ``python -m benchmarks.coverage`` (``--json`` writes the baseline).

Deterministic; about three minutes on one core.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rlkl.statistics import coverage
from rlkl.statistics.intervals import LEVEL, Method, Of

BASELINE = Path(__file__).parent / "baselines" / "coverage.json"
TRUTHS = (0.5, 0.75, 0.95)
CELLS = (1, 4)
"""Combinations of the other factors over which a factor's difference is averaged."""
Tree = dict[str, Any]


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description="Coverage of 95 % intervals.")
    parser.add_argument("--trials", type=int, default=4000, help="simulated sets of seeds (4000)")
    parser.add_argument("--json", action="store_true", help=f"write {BASELINE.name}")
    given = parser.parse_args(words)
    result = measure(given.trials)
    print(markdown(result))
    if given.json:
        BASELINE.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(BASELINE)


def measure(trials: int, seeds: Sequence[int] = coverage.SEEDS) -> Tree:
    """Everything that is printed, by interval, law and number of seeds."""
    result: Tree = {"level": LEVEL, "trials": trials, "resamples": coverage.RESAMPLES}
    for of in get_args(Of):
        for method in get_args(Method):
            result[f"{of}, {method}"] = {
                law: {n: coverage.coverage(method, n, law, trials, of) for n in seeds} for law in coverage.LAWS
            }
    result["difference, welch"] = {
        law: {n: coverage.coverage_of_difference(n, law, trials) for n in seeds} for law in coverage.LAWS
    }
    result["difference, paired t"] = {
        law if cells == 1 else f"{law}, {cells} combinations": {
            n: coverage.coverage_of_paired(n, law, cells, trials) for n in seeds
        }
        for cells in CELLS
        for law in coverage.LAWS
    }
    for name, bootstrap in (("newcombe", False), ("percentile", True)):
        result[f"improvement, {name}"] = {
            f"P = {truth:g}": {n: coverage.coverage_of_improvement(n, truth, trials, bootstrap) for n in seeds}
            for truth in TRUTHS
        }
    return result


def markdown(result: Tree) -> str:
    """A table, a row an interval and law."""
    rows = [(name, law, by) for name, laws in result.items() if isinstance(laws, dict) for law, by in laws.items()]
    seeds = list(rows[0][2])
    lines = [f"| interval | seeds from | {' | '.join(f'n = {n}' for n in seeds)} |", "| --- " * (2 + len(seeds)) + "|"]
    for name, law, by in rows:
        lines.append(f"| {name} | {law} | {' | '.join(f'{100 * by[n]:.1f} %' for n in seeds)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
