"""The configuration of a comparison: a base, arms, axes and seeds. Torch-free; ``rlkl.grid.plan`` makes runs of it."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rlkl.config.base import Positive, Section
from rlkl.config.budget import BudgetConfig

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Changes = dict[str, Any]


class CompareConfig(Section):
    """Runs that differ in what is compared, and in nothing else."""

    name: str = Field(
        pattern=r"^\.*[\w-][\w.-]*$",
        description="the runs are written to <folder>/<name>/<arm>,<axis>=<value>,seed=<seed>; their log.group too",
    )
    mode: Literal["train", "replay"] = Field(
        "train",
        description="train: whole runs; replay: one step of every arm on the very same samples of the base model, and "
        "how far their directions agree",
    )
    folder: str = Field("runs", description="where the comparison is written; the base's name and folder mean nothing")
    base: dict[str, Any] = Field(
        description="a run's sections, or the path of a run's YAML relative to this file; it is what the arms share"
    )
    arms: dict[str, Changes] = Field(
        min_length=1,
        description="name -> what it changes in base, nested or by dotted keys; {} = base as it is; its own `base:`, "
        "if it has one, takes the place of base",
    )
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="dotted key of a run -> its values; every arm is run with every combination"
    )
    bundles: dict[str, Annotated[dict[str, Changes], Field(min_length=1)]] = Field(
        {}, description="an axis of several keys: its name -> a name for each value -> what that changes"
    )
    include: list[Changes] = Field(
        [], description="combinations to run, each by some of arm, axes and bundles, such as {arm: ppo}; [] = all"
    )
    exclude: list[Changes] = Field([], description="combinations to leave out, written alike")
    seeds: list[Seed] = Field(min_length=1, description="each for every arm; runs of a seed share its randomness")
    budgets: BudgetConfig = Field(
        BudgetConfig(), description="caps for every run: its train.budget; the first that is reached ends it"
    )
    tuning: dict[str, Annotated[int, Field(ge=0, strict=True)]] = Field(
        {}, description="arm -> runs that were spent on choosing its settings, shown beside it; missing = not said"
    )
    compared: list[str] = Field(
        [], description="keys in which arms differ on purpose, of those that are flagged where they differ"
    )
    workers: Positive | None = Field(
        None, description="processes, at most one a run; null = one a GPU, or one a core where there is none"
    )
    gold: str | None = Field(
        None, description="the reward that table and figure show, a name under rewards:; null = the first"
    )
    match_kl: float | None = Field(
        None,
        gt=0,
        description="nats a sequence: the table is read where each run first passes this KL, between its evaluations "
        "linearly in the root of KL; null = at the end",
    )
    columns: list[str] = Field(
        [],
        description="further metrics in the table, by their names in metrics.jsonl; max(name) = the most over a run's "
        "evaluations, whatever its KL there",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for kind, names in (("arms", self.arms), *((f"bundles.{n}", v) for n, v in self.bundles.items())):
            _check_names(kind, names)
        _check_names("bundles", self.bundles)
        if taken := {"arm", "seed", *self.axes} & set(self.bundles):
            raise ValueError(f"bundles.{min(taken)}: this name is taken; give the bundle another")
        if strange := sorted(set(self.tuning) - set(self.arms)):
            raise ValueError(f"tuning.{strange[0]}: no such arm; the arms are {', '.join(self.arms)}")
        given = {
            "budgets": self.budgets != BudgetConfig(),
            "match_kl": self.match_kl is not None,
            "columns": self.columns,
        }
        if self.mode == "replay" and (named := [name for name, there in given.items() if there]):
            raise ValueError(f"{named[0]} with mode=replay: every arm takes one step; drop the key")
        twice = {seed for seed in self.seeds if self.seeds.count(seed) > 1}
        if twice:
            raise ValueError(f"seeds={self.seeds}: {min(twice)} twice, which would count one run double; drop it")
        return self


def _check_names(kind: str, names: Mapping[str, Any]) -> None:
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ValueError(f"{kind}.{name}: names of folders are made of it; use letters, digits, '_', '-' and '.'")
