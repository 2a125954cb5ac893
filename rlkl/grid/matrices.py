"""The terminal of ``mode: replay``: how far objectives agree, and what a step of each buys."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

TITLES = {
    "gradient_cosine": "cosine of the gradients on the same samples, mean over seeds (least–most)",
    "update_cosine": "cosine of what the optimiser made of them",
}


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """Two matrices, and a row an arm."""
    arms = found["arms"]
    for key, title in TITLES.items():
        out = Table(title=title, title_justify="left")
        for head in ("", *arms):
            out.add_column(head, justify="right" if head else "left", overflow="fold")
        for arm in arms:
            out.add_row(arm, *(_cosine(found[key][arm][other], arm == other) for other in arms))
        yield out
    out = Table(title="one step, on held-out prompts (± a standard error over prompts)", title_justify="left")
    known = any(row["exact"] is not None for row in arms.values())
    heads = ["arm", "norm of gradient", "of update", "KL moved, nats", f"{found['gold']} gained", "nats per gold"]
    heads += ["signal to noise", *(["cosine with exact"] if known else [])]
    for head in heads:
        out.add_column(head, justify="left" if head == "arm" else "right", overflow="fold")
    for arm, row in arms.items():
        cells = [_number(row["gradient_norm"]), _number(row["update_norm"])]
        cells += [f"{_number(row[x])} ± {_number(row[f'{x}_stderr'])}" for x in ("kl", "gold")]
        cells += [_number(row["kl_per_gold"]), _number(row["snr"])]
        out.add_row(arm, *cells, *([_number(row["exact"])] if known else []))
    yield out


def _cosine(cell: Mapping[str, float] | None, same: bool) -> str:
    if cell is None:
        return "–"
    if same or cell["min"] == cell["max"]:
        return f"{cell['mean']:.2f}"
    return f"{cell['mean']:.2f} ({cell['min']:.2f}–{cell['max']:.2f})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
