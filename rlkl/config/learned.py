"""A reward model in the section ``rewards:``, ready-made or taught in the course of the run. Torch-free."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from rlkl.config.base import FUNCTION, Positive, RewardSource
from rlkl.config.reward_model import FitConfig

if TYPE_CHECKING:
    from rlkl.config import Config


class LearnedSource(RewardSource):
    """A reward model of one label, such as `rlkl reward-model` makes: it scores completions, their tokens or sentences.

    It may have a tokenizer of its own, and then reads the text. One query a completion; equal ones are scored once.
    """

    type: Literal["learned"]
    path: str = Field(
        description="local folder or Hub name; facts = the embedded reward model, trained once (about a minute). "
        "With a labeller: of the causal LM that learns to score, with a fresh head; facts = the base model of the task"
    )
    level: Literal["sequence", "token", "sentence"] = Field(
        "sequence",
        description="sequence: a sequence-classification model, read and paid at the last policy token; token: a "
        "causal token-classification model, whose score of a token is paid there, at every policy token; sentence: the "
        "same, read at the last token of every sentence and paid once that has ended",
    )
    missing_eos_penalty: float = Field(
        0.0,
        ge=0,
        description="taken off the score, after clip, of a completion that ended by the limit (level sequence)",
    )
    eos: bool = Field(
        True,
        description="level sequence: what is judged ends by one EOS, as in training by trl's RewardTrainer; false = "
        "without: for models that never saw one, or whose pad token is EOS, so that transformers read the token "
        "before it",
    )
    micro_batch: Positive = Field(64, description="completions scored together; changes memory, not results")
    labeller: str | None = Field(
        None,
        pattern=FUNCTION,
        description="module:function that stands for people, and the model learns from it during the run: level "
        "sequence: (completion, completion) -> 1 or 2 for the better, 0 for a tie; token: completion -> list of spans "
        "with start, end (code points) and label; null = the model is ready-made",
    )
    weights: dict[str, float] | None = Field(
        None, description="level token with a labeller: label -> score of a span's tokens; unmarked ones score 0"
    )
    budget: Positive | None = Field(
        None, description="labels of the whole run, at most; a comparison is one, and so are a completion's spans"
    )
    schedule: Literal["frozen", "online"] = Field(
        "frozen",
        description="frozen: all labels before the first step, of the untrained policy's samples; online: a share of "
        "them there, the others of the policy's own samples every N-th step, each time learning anew from all so far",
    )
    start: float = Field(0.5, gt=0, lt=1, description="online: share of the budget that is spent before the first step")
    every: Positive = Field(5, description="online: steps between two of which the samples are labelled, all of them")
    fit: FitConfig = Field(FitConfig(), description="the training from labels")
    timeout: float | None = Field(60, gt=0, description="seconds that the labeller may take an answer; null = any time")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("missing_eos_penalty", "eos") if self.level != "sequence" else ():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}={str(value).lower()} with level={self.level}: what is scored is as it ended; drop it"
                )
        self._check_labels()
        if self.level != "sequence" and self.path == "facts" and self.labeller is None:
            raise ValueError(f"path=facts with level={self.level}: the embedded model scores sequences; train another")
        return self

    def _check_labels(self) -> None:
        """Refuse keys that nothing reads, and a labeller without what it needs."""
        teaching = ("weights", "budget", "schedule", "start", "every", "fit", "timeout")
        if self.labeller is None:
            self._unread(teaching, "without labeller: a ready-made model learns nothing")
            return
        if self.schedule == "frozen":
            self._unread(("start", "every"), "with schedule=frozen: it asks once, before the first step")
        if self.budget is None:
            raise ValueError(f"labeller={self.labeller} without budget: say how many labels it may give in the run")
        if self.level == "sentence":
            raise ValueError("level=sentence with a labeller: models learn in a run at level=sequence or level=token")
        if (self.level == "token") != (self.weights is not None):
            what = "needs weights, label -> score" if self.level == "token" else "compares: drop weights"
            raise ValueError(f"labeller={self.labeller} with level={self.level}: {what}")

    def _unread(self, names: Sequence[str], why: str) -> None:
        for name in names:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                told = value if isinstance(value, (int, float, str)) else "..."
                raise ValueError(f"{name}={told} {why}; drop it")

    @property
    def origin(self) -> str:
        """Where the scores come from."""
        return self.path

    @property
    def taught(self) -> tuple[int, int]:
        """Frozen: all before the first step; online: a share of them."""
        if self.labeller is None or self.budget is None:
            return 0, 0
        return (self.budget if self.schedule == "frozen" else max(1, round(self.start * self.budget))), self.budget

    def labelled(self, prompts: int, samples: int) -> int:
        """Labels that the samples of a step can get: a pair of samples of a prompt, or a sample."""
        return prompts * (samples // 2 if self.level == "sequence" else samples)

    def lesson(self, step: int, prompts: int, samples: int) -> int:
        """Online: those of every N-th step."""
        return 0 if self.schedule == "frozen" or step % self.every else self.labelled(prompts, samples)


def check(config: "Config") -> None:
    """Refuse reward models that learn from samples of which there are none, and a gold that judges no new sample.

    Raises:
        ValueError: it names the source and the remedy.
    """
    for name, given in config.rewards.items():
        if given.type == "counterfactual" and given.predictor == "joint" and config.offline:
            raise ValueError(
                f"rewards.{name}.predictor=joint with data.type={config.data.type}: it learns what came of the "
                "policy's samples, and training has none; set predictor=control"
            )
    for name, source in _taught(config):
        if config.offline:
            raise ValueError(
                f"rewards.{name}.labeller with data.type={config.data.type}: it is asked about the policy's samples, "
                "and training has none; train the model before, with rlkl reward-model"
            )
        if not source.labelled(config.rollout.prompts, config.samples):
            raise ValueError(
                f"rewards.{name}.labeller with rollout.samples_per_prompt=1: it compares samples of a prompt; "
                "use 2 or more"
            )
    gold = config.evaluate.gold
    if gold is None:
        return
    if gold not in config.rewards:
        raise ValueError(f"evaluate.gold={gold}: no such reward; name one of {', '.join(config.rewards) or 'rewards'}")
    judge = config.rewards[gold]
    if judge.type == "annotations" and judge.labeller is None:
        raise ValueError(f"evaluate.gold={gold}: stored spans, which say nothing of new samples; name another")


def unspent(config: "Config") -> Iterator[str]:
    """Where a run is too short for an online reward model to ask for its whole budget."""
    for name, source in _taught(config):
        if source.schedule == "online" and source.budget is not None:
            each = source.labelled(config.rollout.prompts, config.samples)
            most = source.taught[0] + each * (config.train.steps // source.every)
            if most < source.budget:
                yield (
                    f"note: rewards.{name} can ask for {most} of its budget of {source.budget} labels in "
                    f"{config.train.steps} steps; lower every, or the budget"
                )


def _taught(config: "Config") -> list[tuple[str, LearnedSource]]:
    sources = config.rewards.items()
    return [(name, s) for name, s in sources if isinstance(s, LearnedSource) and s.labeller is not None]
