"""The terminal of a run: a progress bar below the lines on a tty, lines alone elsewhere; the main process only."""

import sys
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Screen:
    """Says things, and shows how far ``total`` steps have come. Use as a context manager for the bar."""

    def __init__(self, main: bool = True, total: int = 0) -> None:
        self.main, self.total = main, total
        self.progress = _bar(total) if main and total and sys.stdout.isatty() else None

    def __enter__(self) -> Self:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress:
            self.progress.stop()

    def say(self, *lines: str) -> None:
        """Lines as they are, above the bar."""
        for text in lines if self.main else ():
            if self.progress:
                self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, flush=True)

    def step(self, step: int, metrics: Mapping[str, float], every: int) -> None:
        """A step is done: the bar moves, or every ``every`` steps and at the end there is a line."""
        if self.progress:
            keys = (
                ("reward", "reward/train/total", ".3f"),
                ("KL", "kl/penalty", ".2f"),
                ("loss", "loss/likelihood", ".3f"),
            )
            shown = "  ".join(f"{label} {metrics[key]:{form}}" for label, key, form in keys if key in metrics)
            self.progress.update(self.progress.task_ids[0], completed=step, shown=shown)
        elif step % every == 0 or step == self.total:
            self.say(line(step, self.total, metrics))


def line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """A step on one line of the terminal."""
    shown = [
        ("reward", "reward/train/total", "{:.3f}"),
        ("KL penalty", "kl/penalty", "{:.3f}"),
        ("loss", "loss/likelihood", "{:.3f}"),
        ("beta", "kl/beta", "{:.3g}"),
        ("entropy", "policy/entropy", "{:.2f}"),
        ("grad", "policy/grad_norm", "{:.3f}"),
        ("s", "time/step", "{:.2f}"),
    ]
    parts = [f"{label} {form.format(metrics[key])}" for label, key, form in shown if key in metrics]
    return f"step {step:>{len(str(total))}}/{total}  " + "  ".join(parts)


def _bar(total: int) -> Progress:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    progress = Progress(*columns, console=Console(file=sys.stdout, emoji=False))
    progress.add_task("", total=total, shown="")
    return progress
