"""The section ``data:`` of a configuration. Torch-free."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlkl.config.base import Positive, Section


class FactsData(Section):
    """The prompts of the embedded task ``facts``, with a held-out split of their own."""

    type: Literal["facts"]


class FixData(Section):
    """The failing experiments of the embedded task ``fix`` (columns ``prompt``, ``x``, ``y_prime``), with a split."""

    type: Literal["fix"]


class HeldData(Section):
    """Records, some of which are held out."""

    held_out: float | str = Field(
        0.1,
        description="share of the distinct prompts kept for evaluation (equal prompts stay together), "
        "or where other held-out records are: a second file, or another split (where datasets reads it)",
    )

    @model_validator(mode="after")
    def _check_share(self) -> Self:
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: a share must lie between 0 and 1, or name a file or split")
        return self


class SplitData(HeldData):
    """Records that are split, and whose prompts must fit the context."""

    max_prompt_tokens: Positive | None = Field(
        None, description="longest prompt, tokens; null = what the context leaves beside rollout.max_new_tokens"
    )
    overlong: Literal["refuse", "drop"] = Field(
        "refuse", description="longer prompts are an error, or are left out and counted"
    )


class TableData(SplitData):
    """Records with a prompt or a conversation; their other columns reach the reward functions by name."""

    columns: dict[Literal["prompt", "messages"], str] = Field(
        default={"prompt": "prompt"},
        description="prompt: column of texts, or messages: column of [{role, content}, ...], rendered with the "
        "tokenizer's chat template; the reward functions then find the conversation in their column `messages`",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.columns) != 1:
            raise ValueError(f"columns={self.columns}: prompts are texts or conversations; map prompt or messages")
        return self

    @property
    def column(self) -> tuple[str, str]:
        """The role, prompt or messages, and the column that plays it."""
        return next((role, name) for role, name in self.columns.items())


class StoredData(SplitData):
    """Records that hold completions, from which a run learns without sampling (rlkl/data/stored.py)."""

    trainers: ClassVar[tuple[str, ...]]  # which may learn from them
    rows: ClassVar[int] = 1  # completions of a record

    path: str = Field(description="a .jsonl file, one object a line")


class JsonlData(TableData):
    """Prompts from a JSONL file."""

    type: Literal["jsonl"]
    path: str = Field(description="a .jsonl file, one object a line")


class DatasetsData(TableData):
    """Prompts from anything that ``datasets.load_dataset`` or ``load_from_disk`` reads. No code of others is run."""

    type: Literal["datasets"]
    path: str = Field(description="local folder or file, Hub name, or a format such as parquet with data_files")
    name: str | None = Field(None, description="configuration of the dataset")
    split: str = Field("train", description="split, or a slice of one such as train[:1000]")
    data_files: str | list[str] | None = Field(None, description="files, where path is a format or a folder")


class AnnotatedData(StoredData):
    """Stored completions with spans that somebody judged, as `rlkl data import` writes them."""

    trainers = ("token_likelihood",)

    type: Literal["annotated"]
    prompt: str | None = Field(
        None, description="column of texts that takes the place of the prompt, such as a shorter one; null = the prompt"
    )


class PairsData(StoredData):
    """Stored preference pairs with TRL's columns: `prompt`, `chosen` and `rejected`, texts or conversations."""

    trainers = ("dpo",)
    rows = 2

    type: Literal["pairs"]
    path: str = Field(description="a .jsonl file, one object a line; or what `datasets` reads, as for type: datasets")
    split: str = Field("train", description="split where `datasets` reads it, or a slice of one such as train[:1000]")


Data = Annotated[
    FactsData | FixData | JsonlData | DatasetsData | AnnotatedData | PairsData, Field(discriminator="type")
]
