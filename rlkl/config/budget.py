"""The section ``train.budget``: caps at which a run ends. Torch-free."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from rlkl.config.base import Positive, Section

if TYPE_CHECKING:
    from rlkl.config import Config


class BudgetConfig(Section):
    """Caps. A run ends before the step that could pass the first of them, with its evaluation and its final model.

    The learning rate's schedule follows ``train.steps`` all the same.
    """

    tokens: Positive | None = Field(
        None, description="tokens sampled in training; a step counts as the most that it can draw"
    )
    queries: Positive | None = Field(None, description="scores asked in training, as reward/queries counts them")
    labels: Positive | None = Field(None, description="labels asked in training, as reward/labels counts them")
    steps: Positive | None = Field(None, description="steps; unlike train.steps it does not stretch the schedule")
    seconds: float | None = Field(
        None, gt=0, description="of training steps, evaluations left out; a step counts as their mean so far"
    )


def drawn(config: "Config") -> int:
    """Tokens that a step samples, at most."""
    r = config.rollout
    return 0 if config.offline else r.prompts * config.samples * r.max_new_tokens


def asked(config: "Config") -> int:
    """Scores that a step asks for, at most: of every source that weighs, and of stored completions their labels."""
    return _step(config, len(_asking(config)))


def judged(config: "Config") -> int:
    """Labels that a step asks for: scores of sources that judge, not a model's; what learns on the way apart."""
    return _step(config, sum(source.judged for source in _asking(config)))


def learned(config: "Config", step: int, spent: Mapping[str, int] | None = None) -> int:
    """Labels that a step gives to sources that learn on the way, at most.

    Args:
        spent: source -> labels that it has had; without it those of before the first step.
    """
    count = 0
    for name, source in config.rewards.items():
        before, cap = source.taught
        left = cap - (before if spent is None else spent[name]) if source.weight else 0
        count += min(left, source.lesson(step, config.rollout.prompts, config.samples)) if left > 0 else 0
    return count


def _asking(config: "Config") -> list[Any]:
    weighing = [source for source in config.rewards.values() if source.weight]
    return [s for s in weighing if not (s.type == "annotations" and s.labeller is None)]


def _step(config: "Config", sources: int) -> int:
    """Scores of a step by so many sources, and the labels of stored completions."""
    return config.rollout.prompts * (config.samples * sources + config.offline)


def taught(config: "Config") -> tuple[int, int]:
    """Labels of the sources that learn in the run: before the first step, and in all, at most."""
    learned = [source.taught for source in config.rewards.values() if source.weight]
    return sum(before for before, _ in learned), sum(total for _, total in learned)


def labels(config: "Config", steps: int) -> int:
    """Labels of a run of so many steps, at most: what learns in the run stops at its own cap."""
    return steps * judged(config) + taught(config)[1]


def check(config: "Config") -> None:
    """Refuse a cap below a single step.

    Raises:
        ValueError: it names the cap and what a step may take.
    """
    budget = config.train.budget
    before = taught(config)[0]
    steps = {"tokens": drawn(config), "queries": asked(config), "labels": judged(config) + learned(config, 1)}
    for name, step in steps.items():
        cap = getattr(budget, name)
        if cap is not None and cap < step:
            raise ValueError(
                f"train.budget.{name}={cap}: a single step may take {step}; raise it, or make steps smaller"
            )
    if budget.labels is not None and budget.labels < before + steps["labels"]:
        raise ValueError(
            f"train.budget.labels={budget.labels}: before the first step sources learn from {before}, "
            f"and that step may take {steps['labels']}; raise it"
        )
