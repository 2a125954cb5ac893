"""The configuration of a run: strict models, one section a class. Torch-free.

Every key has its default, unit and constraint here; ``rlkl.settings`` reads YAML and overrides into it.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from rlkl.data.config import Data
from rlkl.section import Positive, Section

GRADIENT: dict[tuple[str, str], str] = {
    ("reward", "k1"): "reverse KL of the sequence (window=full); token-conditional reverse KL (window=own)",
    ("loss", "exact"): "reverse KL of the sequence, Rao-Blackwellised (Amini et al. 2025)",
    ("loss", "k2_sequence"): "reverse KL of the sequence",
    ("loss", "exact_local"): "local: token-conditional reverse KL, blind to how a token changes later states",
    ("loss", "k2"): "local: token-conditional reverse KL",
    ("loss", "k1_ratio"): "local: token-conditional reverse KL",
    ("loss", "k3_ratio"): "local: token-conditional reverse KL",
    ("loss", "k3"): "forward KL(pi0||pi) on the visited states",
    ("loss", "exact_forward"): "forward KL(pi0||pi) on the visited states",
}
"""The expected on-policy gradient of each (placement, estimator) of the KL penalty."""

REFUSED: dict[tuple[str, str], str] = {
    ("loss", "k1"): "its gradient is zero in expectation",
    ("reward", "k2"): "its gradient is biased",
    ("reward", "k3"): "its gradient is biased (in one step: reverse minus forward KL)",
    ("reward", "exact"): "its gradient is biased: it misses the own token",
    ("reward", "exact_local"): "its gradient is biased: it misses the own token",
}
"""Why the other combinations are not offered."""


class LoraConfig(Section):
    """A LoRA adapter (Hu et al. 2021), through peft; the base stays frozen."""

    rank: Positive = 16
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


class TinyModel(ModelSection):
    """A tiny Llama and its tokenizer, trained on the spot on text columns of the training prompts."""

    type: Literal["tiny"]
    texts: list[str] = Field(min_length=1, description="columns joined by a space into one text a record")
    vocabulary: int = Field(1024, ge=260)
    hidden: int = Field(96, ge=8, multiple_of=8)
    layers: Positive = 2
    context: int = Field(256, ge=16, description="tokens")
    steps: Positive = 300
    learning_rate: float = Field(3e-3, gt=0)


class FunctionSource(Section):
    """A Python function as a reward: scalar in the manner of TRL, or one reward a token."""

    type: Literal["function"]
    path: str = Field(pattern=r"^[\w.]+:\w+$", description="module:function")
    level: Literal["sequence", "token"] = Field(
        "sequence",
        description="sequence: f(prompts, completions, **columns) -> list[float], paid at the last policy token; "
        "token: f(rollout) -> [B, T] tensor, causal",
    )
    weight: float = 1.0


class ReinforceTrainer(Section):
    """REINFORCE: the policy gradient on the samples that the policy just drew."""

    type: Literal["reinforce"]
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus, reward per nat")
    value_coef: float = Field(0.1, ge=0, description="weight of the value loss, where a value is learned")


class CreditConfig(Section):
    """How token rewards become advantages (rlkl/credit.py)."""

    horizon: Positive | None = Field(None, description="reward window in policy tokens; null = the episode")
    gamma: float = Field(1.0, ge=0, le=1, description="discount a token")
    advantage: Literal["returns", "gae"] = "returns"
    lambda_: float = Field(0.95, ge=0, le=1, alias="lambda", description="GAE's lambda")
    baseline: Literal["none", "batch_mean", "leave_one_out", "ema", "value", "group_norm"] = "leave_one_out"
    ema_decay: float = Field(0.9, ge=0, lt=1, description="share of the old EMA baseline kept a step")
    bootstrap_truncated: bool = Field(
        False, description="a truncated episode bootstraps V instead of 0 (its score was already paid)"
    )
    centre_rewards: bool = Field(False, description="subtract the mean score of the batch's other samples")
    whiten_rewards: bool = Field(False, description="divide rewards by their global std, before KL enters")
    whiten_advantages: bool = Field(False, description="standardise advantages; this rescales beta")
    normaliser: Literal["sequence", "token_mean", "sequence_mean"] = Field(
        "sequence", description="token_mean and sequence_mean are biased"
    )

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_by_name=True)

    @property
    def needs_value(self) -> bool:
        """Whether a value head must be learned."""
        return self.advantage == "gae" or self.baseline == "value" or self.bootstrap_truncated

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.horizon is not None and self.advantage == "gae" and self.lambda_ < 1:
            raise ValueError(
                f"horizon={self.horizon} with advantage=gae, lambda={self.lambda_}: GAE with lambda<1 would "
                "silently ignore the horizon; use advantage=returns"
            )
        if self.horizon is not None and (self.advantage == "gae" or self.bootstrap_truncated):
            raise ValueError(
                f"horizon={self.horizon}: a finite horizon takes G_t - b_t without bootstrap; "
                "use advantage=returns and bootstrap_truncated=false"
            )
        if self.advantage == "gae" and self.baseline != "value":
            raise ValueError(
                f"advantage=gae with baseline={self.baseline}: GAE's baseline is the learned value; set baseline=value"
            )
        return self


class KLConfig(Section):
    """The KL penalty (rlkl/kl.py)."""

    beta: float = Field(0.05, ge=0, description="reward per nat of a sequence's KL (of a token's, under a token mean)")
    placement: Literal["reward", "loss"] = "reward"
    estimator: Literal[
        "k1", "k2", "k3", "k2_sequence", "k1_ratio", "k3_ratio", "exact", "exact_local", "exact_forward"
    ] = "k1"
    window: Literal["own", "same", "full", "anchored"] | None = Field(
        None, description="KL window of k1 in the reward; null = full, or anchored for a finite horizon"
    )
    target: float | None = Field(None, gt=0, description="nats a sequence; set, beta adapts towards it")

    @model_validator(mode="after")
    def _check(self) -> Self:
        chosen = (self.placement, self.estimator)
        if chosen not in GRADIENT:
            why = REFUSED.get(chosen, "only k1 can be paid as a reward")
            good = ", ".join(e for p, e in GRADIENT if p == self.placement)
            raise ValueError(f"estimator={self.estimator} with placement={self.placement}: {why}; use {good}")
        if self.placement == "loss" and self.window is not None:
            raise ValueError(
                f"window={self.window} with placement=loss: a window cuts returns; it needs placement=reward"
            )
        if self.target is not None and self.beta == 0:
            raise ValueError(f"target={self.target} with beta=0: beta adapts by factors; start above 0")
        return self

    def resolved_window(self, horizon: int | None) -> str:
        """The KL window in force for a reward horizon."""
        return self.window or ("full" if horizon is None else "anchored")


class RolloutConfig(Section):
    """Sampling. Top-k, top-p and penalties have no key: they would change what the log-probs mean."""

    prompts: Positive = Field(16, description="prompts a step")
    samples_per_prompt: Positive = Field(4, description="completions a prompt")
    max_new_tokens: Positive = 64
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

    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the warm-up; linear and cosine end at 0"
    )
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, steps")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0, description="global norm above which gradients are scaled down")


class TrainConfig(Section):
    """The loop."""

    steps: Positive = 100
    mixed_precision: Literal["no", "bf16"] = Field("no", description="bf16: autocast; the weights keep their dtype")
    gradient_checkpointing: bool = Field(
        False, description="recompute layers in the backward pass: less memory, more time, same results"
    )
    micro_batch: Positive = Field(64, description="completions a forward/backward; changes memory, not results")
    head_chunk: Positive = Field(
        1024, description="positions that pass the vocabulary head together; changes memory, not results"
    )


class EvaluateConfig(Section):
    """Evaluation on fixed held-out prompts, at temperature 1, with the same randomness every time."""

    every: Positive = Field(10, description="steps; the first and the last model are always evaluated")
    prompts: Positive = Field(64, description="held-out prompts, at most")
    samples_per_prompt: Positive = 4


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


Model = Annotated[PretrainedModel | FactsModel | TinyModel, Field(discriminator="type")]
Source = Annotated[FunctionSource, Field()]
TrainerConfig = Annotated[ReinforceTrainer, Field()]


class Config(Section):
    """A run."""

    name: str = Field(pattern=r"^[\w.-]+$", description="the run is written to <folder>/<name>")
    folder: str = "runs"
    seed: int = Field(0, ge=0, lt=2**32)
    model: Model
    data: Data
    rewards: dict[str, Source] = Field(min_length=1, description="name -> source; weighted sum")
    trainer: TrainerConfig
    credit: CreditConfig = CreditConfig()
    kl: KLConfig = KLConfig()
    rollout: RolloutConfig = RolloutConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.rewards:
            if not re.fullmatch(r"[\w.-]+", name) or name in ("total", "queries") or name.endswith("_stderr"):
                raise ValueError(f"rewards.{name}: the metrics need this name, or it has odd characters; take another")
        window = self.kl.resolved_window(self.credit.horizon)
        if self.credit.advantage == "gae" and self.kl.placement == "reward" and window != "full":
            raise ValueError(f"kl.window={window} with credit.advantage=gae: GAE has no window; use window=full")
        if self.credit.baseline in ("leave_one_out", "group_norm") and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"credit.baseline={self.credit.baseline} with rollout.samples_per_prompt=1: "
                "it compares samples of a prompt; use 2 or more"
            )
        batch = self.rollout.prompts * self.rollout.samples_per_prompt
        if self.credit.baseline == "batch_mean" and batch < 2:
            raise ValueError("credit.baseline=batch_mean with 1 completion a step; sample 2 or more")
        if self.data.type == "facts" and self.model.type == "tiny":
            raise ValueError("model.type=tiny with data.type=facts: facts has a base model; use model.type=facts")
        return self


def dump(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain data, with the names used in YAML."""
    return config.model_dump(mode="json", by_alias=True)
