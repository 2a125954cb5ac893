"""Pictures of one run, and of several side by side."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkl.data import files
from rlkl.tracking import read_metrics

MARKERS = "osD^vPX*"


def curves(folder: Path) -> Path:
    """Reward, what annotations moved, and canonical KL over steps, from metrics.jsonl to ``curves.png``.

    A run that evaluates no reward, or no annotated completions, has no such panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    evaluated = [r for r in rows if "kl/sequence" in r]
    panels = {
        "Reward": ("reward", _curves(evaluated, "reward/eval/", " (held out)")),
        "What annotations moved": ("Δ log p, nats a token", _curves(evaluated, "annotated/change/", "")),
        "KL to the reference": ("nats a sequence", {"kl/sequence": "exact, held out"}),
    }
    panels = {title: panel for title, panel in panels.items() if panel[1]}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.8), layout="constrained", squeeze=False)
    for axis, (title, (unit, named)) in zip(axes[0], panels.items(), strict=True):
        if title == "Reward":
            trained = [r for r in rows if r.get("tokens/generated")]  # stored completions only repeat themselves
            values = [r["reward/train/total"] for r in trained]
            axis.plot([r["step"] for r in trained], values, color="0.7", linewidth=1, label="training batch, total")
        for key, label in named.items():
            _band(axis, evaluated, key, label)
        axis.set(xlabel="step", ylabel=unit, title=title)
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path = folder / "curves.png"
    _save(figure, path)
    plt.close(figure)
    return path


def _curves(rows: list[dict[str, Any]], prefix: str, suffix: str) -> dict[str, str]:
    """The keys with a standard error, and how each is called."""
    keys = [key for key in rows[0] if key.startswith(prefix) and f"{key}_stderr" in rows[0]]
    return {key: key.removeprefix(prefix) + suffix for key in keys}


def frontier(
    path: Path,
    arms: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    gold: str,
    match_kl: float | None = None,
    exact: Mapping[str, Any] | None = None,
) -> Path:
    """Gold against KL on a square-root axis, and against labels asked for: a line a run, a colour an arm.

    A run is its evaluations, each with ``kl``, ``gold`` and ``labels``. Without labels there is one panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    asked = any(point["labels"] for runs in arms.values() for run in runs for point in run)
    figure, axes = plt.subplots(
        1, 2 if asked else 1, figsize=(11 if asked else 8, 5), layout="constrained", sharey=True
    )
    left, *right = axes if asked else [axes]
    for axis, key in zip((left, *right), ("kl", "labels"), strict=False):
        _runs(axis, arms, key)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    if match_kl is not None:
        left.axvline(match_kl, color="0.5", linestyle="--", linewidth=1)
        left.text(match_kl, 0.01, f" {match_kl:g} nats", transform=left.get_xaxis_transform(), color="0.3", fontsize=9)
    if exact is not None:
        _exact(left, exact)
    left.set_xscale("function", functions=(lambda x: x.clip(min=0) ** 0.5, lambda x: x**2))
    most = max([p["kl"] for runs in arms.values() for run in runs for p in run] + [match_kl or 0.0]) or 1.0
    left.set_xlim(0, most * 1.05)
    left.set_xticks(square_ticks(most))
    left.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="KL to the reference, nats a sequence (square-root scale)", ylabel=f"{gold} (held out)")
    if len(arms) <= 8:
        left.legend(frameon=False, fontsize=9)
    else:  # inside it would cover the lines
        columns = math.ceil(len(arms) / 24)
        figure.set_figwidth(figure.get_figwidth() + 4 * columns)
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, fontsize=9, loc="outside right upper", ncols=columns)
    for axis in right:
        axis.set(xlabel="labels asked for in training", xlim=(0, None))
    figure.suptitle("A line a run, a point an evaluation; the large one is the last", fontsize=10)
    _save(figure, path)
    plt.close(figure)
    return path


def cosines(path: Path, found: Mapping[str, Any]) -> Path:
    """Heat maps of what ``rlkl.grid.replay.summary`` says of gradients and updates, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = list(found["arms"])
    figure, axes = plt.subplots(1, 2, figsize=(4 + 1.6 * len(arms), 1.6 + 0.7 * len(arms)), layout="constrained")
    for axis, key, title in zip(axes, ("gradient_cosine", "update_cosine"), ("gradients", "updates"), strict=True):
        cells = [[(found[key][a][b] or {"mean": math.nan})["mean"] for b in arms] for a in arms]
        image = axis.imshow(cells, cmap="RdBu", vmin=-1, vmax=1)
        for i, row in enumerate(cells):
            for j, x in enumerate(row):
                shown = "–" if math.isnan(x) else f"{x:.2f}"
                axis.text(j, i, shown, ha="center", va="center", color="white" if abs(x) > 0.6 else "black", fontsize=9)
        axis.set(title=f"cosine of {title}", xticks=range(len(arms)), yticks=range(len(arms)))
        axis.set_xticklabels(arms, rotation=30, ha="right")
        axis.set_yticklabels(arms if axis is axes[0] else [])
    figure.colorbar(image, ax=axes, shrink=0.8)
    _save(figure, path)
    plt.close(figure)
    return path


def _save(figure: Any, path: Path) -> None:
    """Write a picture whole or not at all."""
    with files.whole(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix("."), dpi=150)


def _runs(axis: Any, arms: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], key: str) -> None:
    """Gold of every run against one quantity of its evaluations."""
    import matplotlib.pyplot as plt

    colours = plt.get_cmap("tab10" if len(arms) <= 10 else "turbo")
    for k, (arm, runs) in enumerate(arms.items()):
        colour = colours(k) if len(arms) <= 10 else colours(k / (len(arms) - 1))
        for n, run in enumerate(runs):
            x, golds = [max(point[key], 0.0) for point in run], [point["gold"] for point in run]
            style = {"color": colour, "marker": MARKERS[k % len(MARKERS)], "markersize": 4, "linewidth": 1.4}
            axis.plot(x, golds, label=arm if n == 0 else None, alpha=0.85, clip_on=False, **style)
            axis.plot(x[-1], golds[-1], **{**style, "markersize": 8})


def _exact(axis: Any, exact: Mapping[str, Any]) -> None:
    """The optimal policies where they can be listed, and what finite horizons reach (``rlkl.grid.listed``)."""
    points = exact["frontier"]
    axis.plot(
        [p["kl"] for p in points], [p["gold"] for p in points], color="black", linewidth=1.2, label="exact", zorder=1
    )
    for point in exact["horizons"]:
        axis.plot(point["kl"], point["gold"], marker="+", markersize=14, color="black", zorder=5)
        text = f" h={point['horizon'] or 'whole'}"
        axis.text(point["kl"], point["gold"], text, fontsize=9, va="top")


def square_ticks(most: float) -> list[float]:
    """Round numbers of nats that stand about evenly on a square-root scale."""
    unit = 10.0 ** math.floor(math.log10(most))
    rounds = (0, 0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 4, 6, 8, 10)
    ticks: list[float] = []
    for tick in (r * unit for r in rounds if r * unit <= most * 1.05):
        if not ticks or math.sqrt(tick) - math.sqrt(ticks[-1]) > 0.07 * math.sqrt(most):
            ticks.append(tick)
    return ticks


def _band(axis: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    """A curve with plus and minus one standard error."""
    steps, mean = [r["step"] for r in rows], [r[key] for r in rows]
    error = [r[f"{key}_stderr"] or 0.0 for r in rows]
    (drawn,) = axis.plot(steps, mean, marker="o", markersize=3, label=label)
    low = [m - e for m, e in zip(mean, error, strict=True)]
    high = [m + e for m, e in zip(mean, error, strict=True)]
    axis.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
