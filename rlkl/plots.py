"""Pictures of one run."""

from pathlib import Path
from typing import Any

from rlkl.tracking import read_metrics


def curves(folder: Path) -> Path:
    """Reward and canonical KL over steps, from metrics.jsonl to ``curves.png``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    evaluated = [r for r in rows if "kl/sequence" in r]
    trained = [r for r in rows if "reward/train/total" in r]
    names = [k for k in evaluated[0] if k.startswith("reward/eval/") and f"{k}_stderr" in evaluated[0]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(
        [r["step"] for r in trained],
        [r["reward/train/total"] for r in trained],
        color="0.7",
        linewidth=1,
        label="training batch, total",
    )
    for name in names:
        _band(left, evaluated, name, name.removeprefix("reward/eval/") + " (held out)")
    left.set(xlabel="step", ylabel="reward", title="Reward")
    left.legend(frameon=False, fontsize=9)
    _band(right, evaluated, "kl/sequence", "exact, held out")
    right.set(xlabel="step", ylabel="nats a sequence", title="KL to the reference")
    right.legend(frameon=False, fontsize=9)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path = folder / "curves.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _band(axis: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    """A curve with plus and minus one standard error."""
    steps, mean = [r["step"] for r in rows], [r[key] for r in rows]
    error = [r[f"{key}_stderr"] or 0.0 for r in rows]
    (drawn,) = axis.plot(steps, mean, marker="o", markersize=3, label=label)
    low = [m - e for m, e in zip(mean, error, strict=True)]
    high = [m + e for m, e in zip(mean, error, strict=True)]
    axis.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
