"""The sections ``rewards:``, ``trainer:``, ``credit:`` and ``kl:``: what is optimised."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from rlkl.config.base import FUNCTION, Positive, RewardSource, Section
from rlkl.config.counterfactual import CounterfactualSource
from rlkl.config.learned import LearnedSource
from rlkl.config.overseer import OverseerSource

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


class FunctionSource(RewardSource):
    """A Python function as a reward: scalar in the manner of TRL, or one reward a token."""

    type: Literal["function"]
    path: str = Field(pattern=FUNCTION, description="module:function")
    level: Literal["sequence", "token"] = Field(
        "sequence",
        description="sequence: f(prompts, completions, **columns) -> list[float], paid at the last policy token; "
        "token: f(rollout) -> [B, T] tensor, causal",
    )
    timeout: float | None = Field(600, gt=0, description="seconds that a call may take; null = any time")

    @property
    def judged(self) -> bool:
        """The function stands for somebody who judges."""
        return True

    @property
    def origin(self) -> str:
        """Where the scores come from."""
        return self.path


class AnnotationsSource(RewardSource):
    """Spans as a reward: what a person marked is paid at its last token, what a labeller marks once it is certain."""

    type: Literal["annotations"]
    labeller: str | None = Field(
        None,
        pattern=FUNCTION,
        description="module:function, completion -> list of spans with start, end (code points) and label, one query a "
        "completion; null = the spans stored with annotated data, which new samples have not",
    )
    weights: dict[str, float] = Field(min_length=1, description="label -> reward of a span; every label needs one")
    lookahead: int = Field(
        1, ge=0, description="code points that the labeller reads behind a span; it is paid at the token of the last"
    )
    unmarked: float | None = Field(
        None, description="weight of tokens without a span as likelihood annotation; null = they are masked"
    )
    timeout: float | None = Field(
        60, gt=0, description="seconds that the labeller may take for a completion; null = any time"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.labeller is None and self.lookahead != 1:
            raise ValueError(
                f"lookahead={self.lookahead} without labeller: a stored span is paid at its last token; drop lookahead"
            )
        return self

    @property
    def judged(self) -> bool:
        """Where a labeller marks samples; stored spans are judgements of the data."""
        return self.labeller is not None

    @property
    def origin(self) -> str:
        """Where the spans come from."""
        return self.labeller or "spans stored with the data"


class ReinforceTrainer(Section):
    """REINFORCE: the policy gradient on the samples that the policy just drew."""

    type: Literal["reinforce"]
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus, reward per nat")
    value_coef: float = Field(0.1, ge=0, description="weight of the value loss, where a value is learned")


class PPOTrainer(Section):
    """PPO: several updates on the same samples, held near the sampling policy by a clip."""

    type: Literal["ppo"]
    clip: float = Field(0.2, gt=0, description="the ratio to the sampling policy gains nothing beyond 1 +- clip")
    value_clip: float | None = Field(0.2, gt=0, description="the same for values, around those at sampling; null = off")
    value_coef: float = Field(0.1, ge=0, description="weight of the value loss, where a value is learned")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus, reward per nat")
    epochs: Positive = Field(4, description="passes over the samples of a step")
    minibatches: Positive = Field(1, description="updates a pass")
    target_kl: float | None = Field(
        None, gt=0, description="no further pass once the mean KL(old||new) exceeds this, nats a token"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.target_kl is not None and self.epochs == 1:
            raise ValueError(f"target_kl={self.target_kl} with epochs=1: it only spares further passes; drop it")
        return self

    @property
    def updates(self) -> int:
        """Updates on the samples of a step."""
        return self.epochs * self.minibatches


class TokenLikelihoodTrainer(Section):
    """Likelihood losses on annotated tokens (rlkl/likelihood.py)."""

    type: Literal["token_likelihood"]
    loss: Literal["signed", "unlikelihood", "npo", "binary", "regression", "rwr", "contrastive"] = Field(
        "unlikelihood", description="binary, regression and rwr hold kl.beta themselves"
    )
    kappa: float = Field(1.0, gt=0, description="exponent of npo; below 1 it is metastable")
    offset: Literal["none", "prompt", "state"] = Field(
        "state", description="of binary and regression: nothing, or learned for a prompt or for a state"
    )
    imitate: Positive | None = Field(
        None,
        description="the so many samples of a prompt that the rewards put first are imitated: their tokens are marked "
        "+1, and no others (best-of-n, distilled); null = tokens are marked by annotations and rewards",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kappa != 1 and self.loss != "npo":
            raise ValueError(f"kappa={self.kappa} with loss={self.loss}: only npo reads it; drop the key")
        if self.offset != "state" and self.loss not in ("binary", "regression"):
            raise ValueError(
                f"offset={self.offset} with loss={self.loss}: only binary and regression have one; drop it"
            )
        if self.imitate is not None and self.loss != "unlikelihood":
            raise ValueError(
                f"imitate={self.imitate} with loss={self.loss}: what is marked is all good, for which "
                "loss=unlikelihood is the log-likelihood; drop loss"
            )
        return self

    @property
    def holding_beta(self) -> tuple[str, ...]:
        """The losses that hold beta themselves."""
        return ("binary", "regression", "rwr")

    @property
    def learned_offset(self) -> bool:
        """Whether the value head doubles as the offset."""
        return self.loss in ("binary", "regression") and self.offset != "none"


class DPOTrainer(Section):
    """DPO on preference pairs: of each two samples of a prompt, the one with the higher reward is preferred.

    ``kl.beta`` is the loss's own beta. ``rollout.samples_per_prompt`` must be even, and so must ``train.micro_batch``.
    """

    type: Literal["dpo"]


class CreditConfig(Section):
    """How token rewards become advantages (rlkl/credit.py)."""

    horizon: Positive | None = Field(None, description="reward window in policy tokens; null = the episode")
    gamma: float = Field(1.0, ge=0, le=1, description="discount a token")
    advantage: Literal["returns", "gae"] = Field("returns", description="returns - baseline, or GAE on a value")
    lambda_: float = Field(0.95, ge=0, le=1, alias="lambda", description="GAE's lambda")
    baseline: Literal["none", "batch_mean", "leave_one_out", "ema", "value", "group_norm"] = Field(
        "leave_one_out", description="what is subtracted from returns; group_norm (GRPO's) is biased"
    )
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
        if self.lambda_ != 0.95 and self.advantage != "gae":
            raise ValueError(f"lambda={self.lambda_} with advantage={self.advantage}: only gae reads it; drop the key")
        if self.ema_decay != 0.9 and self.baseline != "ema":
            raise ValueError(
                f"ema_decay={self.ema_decay} with baseline={self.baseline}: only ema reads it; drop the key"
            )
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
    placement: Literal["reward", "loss"] = Field("reward", description="paid by credit, or differentiated")
    estimator: Literal[
        "k1", "k2", "k3", "k2_sequence", "k1_ratio", "k3_ratio", "exact", "exact_local", "exact_forward"
    ] = Field("k1", description="see the table of gradients at the end")
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

    def gradient(self, horizon: int | None) -> str:
        """What the penalty's gradient is in expectation, on the policy's own samples."""
        if self.placement == "loss":
            return GRADIENT[self.placement, self.estimator]
        window = self.resolved_window(horizon)
        if window == "full" or (window in ("same", "anchored") and horizon is None):
            return "reverse KL of the sequence"
        if window == "own":
            return "local: token-conditional reverse KL, blind to how a token changes later states"
        where = " where a scored token is in reach, else of its own token" if window == "anchored" else ""
        return f"reverse KL of the next {horizon} tokens{where}"

    def resolved_window(self, horizon: int | None) -> str:
        """The KL window in force for a reward horizon."""
        return self.window or ("full" if horizon is None else "anchored")


Source = Annotated[
    FunctionSource | AnnotationsSource | LearnedSource | CounterfactualSource | OverseerSource,
    Field(discriminator="type"),
]
TrainerConfig = Annotated[
    ReinforceTrainer | PPOTrainer | TokenLikelihoodTrainer | DPOTrainer, Field(discriminator="type")
]
