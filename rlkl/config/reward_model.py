"""The configuration of ``rlkl reward-model``: a model that learns from people's judgements how to score. Torch-free."""

from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlkl.config.base import Positive, Section
from rlkl.config.data import HeldData
from rlkl.config.model import Model

QA_FIELDS = ("passages", "question")
Share = Annotated[float, Field(ge=0, lt=1)]


class JudgedData(HeldData):
    """What people judged. What is scored is prompt, completion and one EOS."""

    path: str = Field(description="a .jsonl file, one object a line")
    max_tokens: Positive | None = Field(
        None, description="prompt, completion and EOS, at most; null = what the model can read"
    )
    overlong: Literal["refuse", "drop"] = Field(
        "refuse", description="what is longer is an error, or is left out and counted; nothing is ever cut"
    )


class JudgedPairs(JudgedData):
    """Preference pairs with TRL's columns: `prompt`, `chosen` and `rejected`, texts or conversations."""

    type: Literal["pairs"]
    path: str = Field(description="a .jsonl file, one object a line; or what `datasets` reads")
    split: str = Field("train", description="split where `datasets` reads it, or a slice of one such as train[:1000]")


class HHData(JudgedData):
    """Pairs of whole dialogues, `chosen` and `rejected`: what they share, to its last `Assistant:`, is the prompt."""

    type: Literal["hh"]


class QAData(JudgedData):
    """Published qa-feedback (Wu et al. 2023): six pairs of four answers a record, those without preference left out."""

    type: Literal["qa-feedback"]
    prompt: str = Field(
        "{passages}\n\nQuestion: {question}\nAnswer:\n",
        description="what the answers follow; {passages} and {question} are filled in",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            names = [name for _, name, spec, how in Formatter().parse(self.prompt) if name is not None]
        except ValueError as error:
            raise ValueError(f"prompt={self.prompt!r}: {error}; write a brace as {{{{ or }}}}") from None
        if not names or set(names) - set(QA_FIELDS):
            raise ValueError(f"prompt={self.prompt!r}: it must name {{question}} or {{passages}}, and nothing else")
        return self


class SpansData(JudgedData):
    """Annotated completions, as `rlkl data import` writes them: tokens or sentences have the weights of spans."""

    type: Literal["annotated"]
    prompt: str | None = Field(
        None, description="column of texts that takes the place of the prompt; null = the prompt"
    )
    weights: dict[str, float] = Field(
        min_length=1, description="label -> score of what it marks; every label needs one"
    )
    unmarked: float | None = Field(
        0.0, description="score of tokens, or sentences, without a span; null = nothing is learned of them"
    )


class FitConfig(Section):
    """AdamW over the training pairs or completions."""

    epochs: Positive = Field(1, description="passes")
    batch: Positive = Field(16, description="pairs, or annotated completions, an update")
    learning_rate: float = Field(1e-4, gt=0, description="after the warm-up, before the schedule")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="after the warm-up; linear and cosine end at 0"
    )
    warmup: Share = Field(0.1, description="linear from 0, share of all updates; a single update has none")
    weight_decay: float = Field(0.0, ge=0, description="decoupled from the gradient (AdamW)")


JudgedSource = Annotated[JudgedPairs | HHData | QAData | SpansData, Field(discriminator="type")]


class RewardModelConfig(Section):
    """A reward model."""

    output: str = Field(min_length=1, description="folder of the model; whole or not at all")
    kind: Literal["sequence", "token", "sentence"] = Field(
        description="sequence: one score, from preference pairs; token: a score a token, from annotated completions; "
        "sentence: a score at the last token of every sentence, from annotated completions: the sum of the weights of "
        "the spans that touch it"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the split, the score head, the order and the bootstrap")
    model: Model = Field(description="a causal LM whose trunk gets a score head")
    data: JudgedSource
    train: FitConfig = FitConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind != "sequence") != (self.data.type == "annotated"):
            right = "annotated" if self.kind != "sequence" else "pairs, hh or qa-feedback"
            raise ValueError(f"data.type={self.data.type} with kind={self.kind}: it learns from data.type={right}")
        if self.model.reference != "initial" or self.model.critic != "trunk":
            key = "reference" if self.model.reference != "initial" else "critic"
            raise ValueError(f"model.{key}={getattr(self.model, key)}: a reward model has none; drop the key")
        return self
