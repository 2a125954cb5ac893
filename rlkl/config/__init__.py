"""The configuration of a run: strict models, one section a class. Torch-free.

Every key has its default, unit and constraint here; ``rlkl.settings`` reads YAML and overrides into it.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from rlkl.config import budget, direct, learned, stored
from rlkl.config.base import Positive, Section
from rlkl.config.budget import BudgetConfig
from rlkl.config.counterfactual import CounterfactualSource
from rlkl.config.data import (
    AnnotatedData,
    Data,
    DatasetsData,
    FactsData,
    FixData,
    JsonlData,
    PairsData,
    SplitData,
    StoredData,
    TableData,
)
from rlkl.config.learned import LearnedSource
from rlkl.config.model import FactsModel, FixModel, LoraConfig, Model, ModelSection, PretrainedModel, TinyModel
from rlkl.config.objective import (
    GRADIENT,
    REFUSED,
    AnnotationsSource,
    CreditConfig,
    DPOTrainer,
    FunctionSource,
    KLConfig,
    PPOTrainer,
    ReinforceTrainer,
    Source,
    TokenLikelihoodTrainer,
    TrainerConfig,
)
from rlkl.config.overseer import OverseerSource

Share = Annotated[float, Field(ge=0, lt=1)]
RESERVED = ("total", "queries", "labels")  # metrics beside those of the sources


class RolloutConfig(Section):
    """Sampling. Top-k, top-p and penalties have no key: they would change what the log-probs mean."""

    prompts: Positive = Field(16, description="prompts a step")
    samples_per_prompt: Positive = Field(4, description="completions a prompt")
    max_new_tokens: Positive = Field(64, description="tokens of a completion, at most")
    temperature: float = Field(1.0, gt=0, description="divides policy and reference logits alike")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="texts that end a completion and are no part of its text; the token that completes one trains"
    )
    record: bool = Field(False, description="keep the samples of every step in the run's rollouts/")
    replay: str | None = Field(None, description="folder of a recorded run, whose samples take the place of new ones")
    micro_batch: Positive = Field(256, description="completions sampled together; changes memory, not results")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.record and self.replay is not None:
            raise ValueError(f"record=true with replay={self.replay}: the samples are recorded there; set record=false")
        return self


class OptimiserConfig(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-4, gt=0, description="after the warm-up, before the schedule")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the warm-up; linear and cosine end at 0"
    )
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, steps")
    weight_decay: float = Field(0.0, ge=0, description="decoupled from the gradient (AdamW)")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="decay of Adam's first and second moment")
    max_grad_norm: float = Field(1.0, gt=0, description="global norm above which gradients are scaled down")


class TrainConfig(Section):
    """The loop."""

    steps: Positive = Field(100, description="each draws new completions")
    budget: BudgetConfig = Field(BudgetConfig(), description="caps; the first that is reached ends the run")
    mixed_precision: Literal["no", "bf16"] = Field("no", description="bf16: autocast; the weights keep their dtype")
    gradient_checkpointing: bool = Field(
        False, description="recompute layers in the backward pass: less memory, more time, same results"
    )
    shard: bool = Field(
        False, description="every process holds a part of policy, reference and optimiser; changes memory, not results"
    )
    micro_batch: Positive = Field(64, description="completions a forward/backward; changes memory, not results")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a gradient that is not finite: end the run, its batch kept; or leave that update out"
    )
    head_chunk: Positive = Field(
        1024, description="positions that pass the vocabulary head together; changes memory, not results"
    )


class EvaluateConfig(Section):
    """Evaluation on fixed held-out prompts, at temperature 1, with the same randomness every time."""

    every: Positive = Field(10, description="steps; the first and the last model are always evaluated")
    early: int = Field(0, ge=0, description="every step up to this one is evaluated too; KL moves fastest at first")
    prompts: Positive = Field(64, description="held-out prompts, at most")
    samples_per_prompt: Positive = Field(4, description="completions a prompt")
    gold: str | None = Field(
        None, description="a name under rewards: what the others stand for; the gap of each of them to it is logged"
    )


class SaveConfig(Section):
    """Checkpoints, from which ``--resume`` goes on."""

    every: Positive | None = Field(10, description="steps between two checkpoints; null = none")
    keep: Positive = Field(1, description="checkpoints that stay, the newest")


class LogConfig(Section):
    """What a run says while it goes."""

    every: Positive = Field(5, description="steps between two lines on the terminal")
    samples: int = Field(2, ge=0, description="completions shown and written at every evaluation")
    with_: list[Literal["trackio", "wandb", "tensorboard"]] = Field(
        default=["trackio"], alias="with", description="dashboards beside metrics.jsonl; [] = none"
    )
    project: str = Field("rlkl", pattern=r"^[\w-]+$", description="the project's name in the dashboards")
    group: str | None = Field(None, description="runs that belong together, in trackio and wandb")

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_by_name=True)


class Config(Section):
    """A run."""

    name: str = Field(pattern=r"^\.*[\w-][\w.,=-]*$", description="the run is written to <folder>/<name>")
    folder: str = Field("runs", description="where the runs are")
    seed: int = Field(0, ge=0, lt=2**32, description="of all samples, of the order of prompts and of the split")
    model: Model
    data: Data
    rewards: dict[str, Source] = Field(description="name -> source; weighted sum; {} for stored pairs alone")
    trainer: TrainerConfig
    credit: CreditConfig = CreditConfig()
    kl: KLConfig = KLConfig()
    rollout: RolloutConfig = RolloutConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        learned.check(self)
        for name in self.rewards:
            if not re.fullmatch(r"[\w.-]+", name) or name in RESERVED or name.endswith("_stderr"):
                raise ValueError(f"rewards.{name}: the metrics need this name, or it has odd characters; take another")
        if not self.rewards and not isinstance(self.data, PairsData):
            raise ValueError("rewards={}: name at least 1 source; only data.type=pairs needs none")
        window = self.kl.resolved_window(self.credit.horizon)
        if self.credit.advantage == "gae" and self.kl.placement == "reward" and window != "full":
            raise ValueError(f"kl.window={window} with credit.advantage=gae: GAE has no window; use window=full")
        stored.check(self)
        if (
            self.credit.baseline in ("leave_one_out", "group_norm")
            and self.rollout.samples_per_prompt < 2
            and self.trainer.type != "token_likelihood"  # which has no baseline
            and not self.offline
        ):
            raise ValueError(
                f"credit.baseline={self.credit.baseline} with rollout.samples_per_prompt=1: "
                "it compares samples of a prompt; use 2 or more"
            )
        if self.optimiser.warmup_steps > self.train.steps:
            raise ValueError(
                f"optimiser.warmup_steps={self.optimiser.warmup_steps} with train.steps={self.train.steps}: "
                "the learning rate would never be reached; warm up for fewer steps"
            )
        if self.credit.baseline == "batch_mean" and self.rollout.prompts * self.samples < 2:
            raise ValueError("credit.baseline=batch_mean with 1 completion a step; sample 2 or more")
        if self.trainer.type in ("ppo", "reinforce"):
            self._check_valued(self.trainer)
        if self.trainer.type == "ppo":
            self._check_ppo(self.trainer)
        direct.check(self)
        budget.check(self)
        if self.model.critic == "separate" and not self.needs_value:
            raise ValueError("model.critic=separate: no value is learned; set credit.baseline=value, or drop the key")
        if (task := self.data.type) in ("facts", "fix") and self.model.type == "tiny":
            raise ValueError(f"model.type=tiny with data.type={task}: {task} has a base model; use model.type={task}")
        return self

    @property
    def offline(self) -> bool:
        """Whether the run learns from stored completions; then nothing is sampled in training."""
        return isinstance(self.data, StoredData)

    @property
    def samples(self) -> int:
        """Completions of a prompt, or of a record, in a step."""
        return self.data.rows if isinstance(self.data, StoredData) else self.rollout.samples_per_prompt

    @property
    def needs_value(self) -> bool:
        """Whether a value head must be learned, for credit or as the offset of a likelihood loss."""
        if self.trainer.type == "token_likelihood":
            return self.trainer.learned_offset
        return self.credit.needs_value

    @property
    def holds_beta(self) -> bool:
        """Whether the loss holds ``kl.beta`` itself, so that a further KL penalty is refused."""
        if self.trainer.type == "token_likelihood":
            return self.trainer.loss in self.trainer.holding_beta
        return self.trainer.type == "dpo"

    def _check_valued(self, trainer: ReinforceTrainer | PPOTrainer) -> None:
        """Refuse keys of a value that nothing learns."""
        for name in {"value_clip", "value_coef"} & type(trainer).model_fields.keys():
            chosen = getattr(trainer, name)
            if chosen != type(trainer).model_fields[name].default and not self.credit.needs_value:
                raise ValueError(
                    f"trainer.{name}={chosen} with credit.baseline={self.credit.baseline}: "
                    "no value is learned; set credit.baseline=value, or drop the key"
                )

    def _check_ppo(self, ppo: PPOTrainer) -> None:
        """Refuse what means nothing once samples are reused."""
        drawn = ("k2", "k2_sequence", "k3")
        if ppo.updates > 1 and self.kl.placement == "loss" and self.kl.estimator in drawn and self.kl.beta > 0:
            raise ValueError(
                f"kl.estimator={self.kl.estimator} with {ppo.updates} updates a step: after the first, the samples are "
                "no longer the policy's; use k1_ratio, k3_ratio, exact or exact_local, or kl.placement=reward"
            )
        batch = self.rollout.prompts * self.rollout.samples_per_prompt
        if ppo.minibatches > batch:
            raise ValueError(f"trainer.minibatches={ppo.minibatches}: a step has {batch} completions; use fewer")


def dump(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain data, with the names used in YAML."""
    return config.model_dump(mode="json", by_alias=True)


__all__ = [
    "GRADIENT",
    "REFUSED",
    "AnnotatedData",
    "AnnotationsSource",
    "BudgetConfig",
    "Config",
    "CounterfactualSource",
    "CreditConfig",
    "DPOTrainer",
    "Data",
    "DatasetsData",
    "EvaluateConfig",
    "FactsData",
    "FactsModel",
    "FixData",
    "FixModel",
    "FunctionSource",
    "JsonlData",
    "KLConfig",
    "LearnedSource",
    "LogConfig",
    "LoraConfig",
    "Model",
    "ModelSection",
    "OptimiserConfig",
    "OverseerSource",
    "PPOTrainer",
    "PairsData",
    "PretrainedModel",
    "ReinforceTrainer",
    "RolloutConfig",
    "SaveConfig",
    "Section",
    "Source",
    "SplitData",
    "StoredData",
    "TableData",
    "TinyModel",
    "TokenLikelihoodTrainer",
    "TrainConfig",
    "TrainerConfig",
    "dump",
]
