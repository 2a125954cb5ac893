"""Comparisons as folders of files, written without training anything."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from conftest import write_jsonl

from rlkl import settings
from rlkl.config import dump
from rlkl.grid import plan
from rlkl.tracking import read_rows

HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)>'
BASE = {
    "name": "base",
    "model": {"type": "facts"},
    "data": {"type": "facts"},
    "rewards": {"gold": {"type": "function", "path": "rlkl.tasks.facts:gold"}},
    "trainer": {"type": "reinforce"},
    "train": {"steps": 20},
}
TWO = {"low": {}, "high": {"optimiser": {"learning_rate": 0.002}}}
PROXY = {"rewards": {"gold": {"weight": 0}, "proxy": {"type": "function", "path": "rlkl.tasks.facts:gold"}}}
"""Trained on another reward than gold."""
Law = Callable[[str, int, float], float]


def steady(arm: str, seed: int, kl: float) -> float:
    """``high`` is .2 above ``low`` at 4 nats, .1 at 1 nat; seeds differ by a hundredth."""
    return 0.3 + (0.2 if arm.startswith("high") else 0.1) * kl**0.5 + 0.01 * (seed - 1)


def alike(arm: str, seed: int, kl: float) -> float:
    """Arms that differ by less than their seeds."""
    return 0.3 + 0.1 * kl**0.5 + 0.05 * (seed - 1) + (0.001 if arm.startswith("high") else 0.0)


def compared(folder: Path, arms: dict[str, Any], seeds: Sequence[int], gold: Law, **more: Any) -> Path:
    """A finished comparison ``page`` below a folder: each run has ``gold(arm, seed, kl)`` up to 4 nats."""
    tree = {"name": "page", "folder": str(folder), "base": BASE, "arms": arms, "seeds": list(seeds), **more}
    made = plan.make(tree)
    made.folder.mkdir(parents=True)
    text = yaml.safe_dump(made.config.model_dump(mode="json"), sort_keys=False)
    (made.folder / "compare.yaml").write_text(text, encoding="utf-8")
    for run in made.runs:
        write(run.folder, dump(run.config), lambda kl, run=run: gold(run.arm, run.config.seed, kl), run.config.seed)
    return made.folder


def write(folder: Path, config: dict[str, Any], gold: Callable[[float], float], seed: int, prompts: int = 2) -> None:
    """A finished run of 20 steps and 5 evaluations, which end at 4 nats."""
    steps = (0, 5, 10, 15, 20)
    final = folder / "final"
    final.mkdir(parents=True)
    (final / "README.md").write_text("a card", encoding="utf-8")
    checked = dump(settings.load(config))
    (folder / "config.yaml").write_text(yaml.safe_dump(checked, sort_keys=False), encoding="utf-8")
    environment = {"rlkl": "0", "device": "cpu", "packages": {"torch": "1"}, "command": ["rlkl"]}
    (folder / "env.json").write_text(json.dumps(environment), encoding="utf-8")
    write_jsonl(folder / "metrics.jsonl", [_metrics(step, gold) for step in steps])
    write_jsonl(folder / "samples.jsonl", [_sample(step, k, seed) for step in (0, 10, 20) for k in range(prompts)])
    write_jsonl(folder / "evaluations.jsonl", [_evaluation(step, gold) for step in steps])


def rewrite(run: Path, changed: Callable[[dict[str, Any]], dict[str, Any]], name: str = "metrics") -> None:
    """Other rows of a run's file."""
    write_jsonl(run / f"{name}.jsonl", [changed(row) for row in read_rows(run / f"{name}.jsonl")])


def _metrics(step: int, gold: Callable[[float], float]) -> dict[str, Any]:
    kl = step / 5
    return {
        "step": step,
        "kl/sequence": kl,
        "reward/eval/gold": gold(kl),
        "reward/eval/proxy": 2 * kl,
        "reward/queries": 10.0 * step,
        "tokens/generated": 100.0 * step,
        "policy/eval/entropy": 2 - kl / 4,
        "policy/eval/distinct_2": 0.5,
        "policy/eval/self_bleu": 0.2 + kl / 10,
        "policy/eval/length": 30.0,
    }


def _evaluation(step: int, gold: Callable[[float], float]) -> dict[str, Any]:
    kl = step / 5
    return {
        "step": step,
        "prompts": ["a", "b"],
        "kl": [kl, kl],
        "reward/gold": [gold(kl) - 0.1, gold(kl) + 0.1],
        "kl_position": [kl / 2, kl / 4, kl / 4],
        "reached": [4, 4, 2],
    }


def _sample(step: int, k: int, seed: int) -> dict[str, Any]:
    draw = random.Random(f"{step} {k} {seed}")
    words = [f" word{draw.randrange(50)}" for _ in range(24)]
    pieces = [HOSTILE, *words, "", "☃", ""]
    length = len(pieces)
    tokens = {
        "text": pieces,
        "kl": [round(draw.random() * step / 20, 3) for _ in pieces],
        "logp": [-1.0] * length,
        "ref_logp": [-1.5] * length,
        "reward/gold": [*[0.0] * (length - 1), 1.0],
        "advantage": [draw.choice([-0.25, 0.5])] * length,
    }
    prompt = f"Prompt {k} of seed {seed} {HOSTILE}"
    row = {"step": step, "prompt": prompt, "completion": "".join(pieces), "end": "eos", "kl": sum(tokens["kl"])}
    return {**row, "reward/gold": 1.0, "tokens": tokens}
