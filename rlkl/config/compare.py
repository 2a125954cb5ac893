"""The configuration of a comparison: a base, arms, axes and seeds. Torch-free; ``rlkl.grid.plan`` makes runs of it."""

import re
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from rlkl.config.base import Positive, Section

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class CompareConfig(Section):
    """Runs that differ in what is compared, and in nothing else."""

    name: str = Field(
        pattern=r"^\.*[\w-][\w.-]*$",
        description="the runs are written to <folder>/<name>/<arm>,<axis>=<value>,seed=<seed>; their log.group too",
    )
    folder: str = Field("runs", description="where the comparison is written; the base's name and folder mean nothing")
    base: dict[str, Any] = Field(
        description="a run's sections, or the path of a run's YAML relative to this file; it is what the arms share"
    )
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1, description="name -> what it changes in base, nested or by dotted keys; {} = base as it is"
    )
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="dotted key of a run -> its values; every arm is run with every combination"
    )
    seeds: list[Seed] = Field(min_length=1, description="each for every arm; runs of a seed share its randomness")
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
    columns: list[str] = Field([], description="further metrics in the table, by their names in metrics.jsonl")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for arm in self.arms:
            if not re.fullmatch(r"[\w-][\w.-]*", arm):
                raise ValueError(f"arms.{arm}: names of folders are made of it; use letters, digits, '_', '-' and '.'")
        twice = {seed for seed in self.seeds if self.seeds.count(seed) > 1}
        if twice:
            raise ValueError(f"seeds={self.seeds}: {min(twice)} twice, which would count one run double; drop it")
        return self
