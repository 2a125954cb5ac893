"""The section ``model:``."""

from typing import Annotated, Literal

from pydantic import Field

from rlkl.config.base import Positive, Section


class LoraConfig(Section):
    """A LoRA adapter (Hu et al. 2021), through peft; the base stays frozen."""

    rank: Positive = Field(16, description="of the update of a weight matrix")
    alpha: int = Field(32, ge=1, description="the adapter's update is scaled by alpha / rank")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="names of modules; all-linear leaves the output embedding out"
    )


class ModelSection(Section):
    """What every kind of model can be asked for."""

    lora: LoraConfig | None = Field(None, description="train an adapter instead of the weights")
    reference: str = Field(
        "initial", description="initial = the model as it is at the start; or a folder or Hub name of another model"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the weights; log-probs and KL are computed in float32 at least"
    )
    critic: Literal["trunk", "separate"] = Field(
        "trunk", description="a learned value reads the policy's trunk, or a trained copy of it"
    )


class PretrainedModel(ModelSection):
    """Any causal LM of transformers, from a local folder or by its Hub name; a folder may hold a peft adapter."""

    type: Literal["pretrained"] = "pretrained"
    path: str = Field(description="local folder or Hub name")


class FactsModel(ModelSection):
    """The embedded base model of the task ``facts``; trained once (about a minute) and cached."""

    type: Literal["facts"]


class FixModel(ModelSection):
    """The embedded base model of the task ``fix``: one token a character; trained once (about a minute) and cached."""

    type: Literal["fix"]
    says: Literal["edits", "critiques"] = Field(
        "edits", description="after x: edits of it, by the task's law; or critiques, which never edit fields 1 and 2"
    )


class TinyModel(ModelSection):
    """A tiny Llama and its tokenizer, trained on the spot on text columns of the training prompts."""

    type: Literal["tiny"]
    texts: list[str] = Field(
        min_length=1,
        description="columns joined by a space into one text a record; or templates such as 'Q: {question} A: {gold}', "
        "each a text of its own, whose last placeholder is tokenised apart from what stands before it",
    )
    vocabulary: int = Field(1024, ge=260, description="tokens of its byte-level BPE, at most")
    hidden: int = Field(96, ge=8, multiple_of=8, description="width")
    layers: Positive = Field(2, description="depth")
    context: int = Field(256, ge=16, description="tokens")
    steps: Positive = Field(300, description="of its own training, 16 texts each")
    learning_rate: float = Field(3e-3, gt=0, description="of its own training")


Model = Annotated[PretrainedModel | FactsModel | FixModel | TinyModel, Field(discriminator="type")]
