"""Pictures of one run."""

from pathlib import Path
from typing import Any

from rlkl.tracking import read_metrics


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
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _curves(rows: list[dict[str, Any]], prefix: str, suffix: str) -> dict[str, str]:
    """The keys with a standard error, and how each is called."""
    keys = [key for key in rows[0] if key.startswith(prefix) and f"{key}_stderr" in rows[0]]
    return {key: key.removeprefix(prefix) + suffix for key in keys}


def _band(axis: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    """A curve with plus and minus one standard error."""
    steps, mean = [r["step"] for r in rows], [r[key] for r in rows]
    error = [r[f"{key}_stderr"] or 0.0 for r in rows]
    (drawn,) = axis.plot(steps, mean, marker="o", markersize=3, label=label)
    low = [m - e for m, e in zip(mean, error, strict=True)]
    high = [m + e for m, e in zip(mean, error, strict=True)]
    axis.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
