"""Labellers and a quick training, for tests of reward models that learn during a run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rlkl import RunError, models

asked: list[tuple[str, ...]] = []
fits: list[dict[str, Any]] = []
dies = [10**9]  # after so many labels


def prefer(first: str, second: str) -> int:
    """The completion with more letters is better; equal ones tie."""
    _count(first, second)
    a, b = (sum(c.isalpha() for c in text) for text in (first, second))
    return (a > b) + 2 * (a < b)


def tie(first: str, second: str) -> int:
    """Nothing is better than anything."""
    return 0


def wrong(first: str, second: str) -> str:
    """No answer."""
    return "a"


def dead(text: str, other: str = "") -> Any:
    """A labeller that is not there."""
    raise ConnectionError("nobody home")


def letters(text: str) -> list[dict[str, Any]]:
    """Every letter is a span."""
    _count(text)
    return [{"start": i, "end": i + 1, "label": "letter"} for i, c in enumerate(text) if c.isalpha()]


def _count(*texts: str) -> None:
    asked.append(texts)
    if len(asked) > dies[0]:
        raise ConnectionError("the labeller left")


def quick_fit(
    folder: Path, base: str | Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], **keys: Any
) -> None:
    """In the place of the training: a head that is a function of rows and settings."""
    said = json.dumps([[dict(row) for row in rows], dict(settings), keys["seed"]])
    fits.append({"rows": len(rows), "settings": dict(settings), **keys})
    if settings["learning_rate"] > 1:
        raise RunError("the reward model could not be trained: it went astray")
    model = models.headed(base, keys["kind"])
    seed = int(hashlib.sha256(said.encode()).hexdigest()[:8], 16)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(seed)))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
