"""What every section of the configuration is made of. Torch-free."""

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
FUNCTION = r"^[\w.]+:\w+$"


class Section(BaseModel):
    """A section: unknown keys are errors, values are checked, nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, data: Any) -> Any:
        """Refuse true and false where a number or a text belongs; pydantic would read them as 1 and 0."""
        for name, field in cls.model_fields.items() if isinstance(data, Mapping) else ():
            value = data.get(field.alias or name)
            if isinstance(value, bool) and bool not in (field.annotation, *get_args(field.annotation)):
                raise ValueError(f"{field.alias or name}={str(value).lower()}: this key takes no true or false")
        return data


class RewardSource(Section):
    """What every source of rewards can be asked for."""

    weight: float = Field(1.0, description="in the sum of the sources; 0 = only watched")
    clip: float | None = Field(
        None, gt=0, description="rewards of a token beyond +-clip count as that, before whiten; null = as they are"
    )
    whiten: bool = Field(
        False,
        description="divide by the running standard deviation, over all training samples so far (since a labeller's "
        "model last learned anew), of what the source gives a completion in sum; nothing is subtracted "
        "(credit.whiten_rewards divides the total, by the batch's)",
    )

    @property
    def judged(self) -> bool:
        """Whether what it gives a sample is a judgement of somebody: a label."""
        return False

    @property
    def taught(self) -> tuple[int, int]:
        """Labels that it learns from during a run: before the first step, and in all, at most."""
        return 0, 0

    def lesson(self, step: int, prompts: int, samples: int) -> int:
        """Labels that it asks for to learn from the samples of a training step, while its budget lasts."""
        return 0
