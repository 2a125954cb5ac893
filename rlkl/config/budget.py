"""The section ``train.budget``: caps at which a run ends. Torch-free."""

from typing import TYPE_CHECKING

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


def asked(config: "Config", labels: bool = False) -> int:
    """Scores that a step asks for, at most: of every source that weighs, and of stored completions their labels.

    With ``labels`` only those that somebody judges: not a model's scores.
    """
    asking = [source for source in config.rewards.values() if source.weight]
    asking = [s for s in asking if not (s.type == "annotations" and s.labeller is None)]
    count = len(asking)
    if labels:  # a source that is taught on the way has all of a step's samples labelled, every few steps
        count = sum(s.judged for s in asking) + sum(s.taught[1] > s.taught[0] for s in asking)
    stored = config.rollout.prompts if config.offline else 0
    return config.rollout.prompts * config.samples * count + stored


def taught(config: "Config") -> tuple[int, int]:
    """Labels of the sources that learn in the run: before the first step, and in all, at most."""
    learned = [source.taught for source in config.rewards.values() if source.weight]
    return sum(before for before, _ in learned), sum(total for _, total in learned)


def labels(config: "Config", steps: int) -> int:
    """Labels of a run of so many steps, at most: what learns in the run stops at its own cap."""
    on_the_way = sum(s.taught[1] > s.taught[0] for s in config.rewards.values() if s.weight)
    a_step = asked(config, labels=True) - config.rollout.prompts * config.samples * on_the_way
    return steps * a_step + taught(config)[1]


def check(config: "Config") -> None:
    """Refuse a cap below a single step.

    Raises:
        ValueError: it names the cap and what a step may take.
    """
    budget = config.train.budget
    steps = {"tokens": drawn(config), "queries": asked(config), "labels": asked(config, labels=True)}
    for name, step in steps.items():
        cap = getattr(budget, name)
        if cap is not None and cap < step:
            raise ValueError(
                f"train.budget.{name}={cap}: a single step may take {step}; raise it, or make steps smaller"
            )
    before, cap = taught(config)[0], budget.labels
    if cap is not None and cap < before:
        raise ValueError(f"train.budget.labels={cap}: before the first step sources learn from {before}; raise it")
