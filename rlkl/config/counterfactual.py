"""The counterfactual score in the section ``rewards:``. Torch-free."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from rlkl.config.base import FUNCTION, Positive, RewardSource
from rlkl.config.templates import fields, parts

SCORED = ("x_prime", "completion")  # two names of the completion


class CounterfactualSource(RewardSource):
    """log p(x'|x) - c log p(x'), token by token, and what the outcome and an auditor say at the last one.

    In templates {x} is the column x, or else the prompt, {x_prime} or {completion} the completion, {name} any column;
    the text of the last placeholder is what is scored, and what stands before it is tokenised apart.
    """

    type: Literal["counterfactual"]
    scorer: str = Field(
        "reference",
        description="reference = the run's own, frozen; or a local folder or Hub name of a causal LM, frozen, whose "
        "tokenizer may be another; or fix, facts = an embedded base model",
    )
    c: float = Field(1.0, ge=0, description="weight of log p(x'): 0 = likelihood, 1 = pointwise mutual information")
    c_end: float | None = Field(None, ge=0, description="c moves there from c, linearly; null = c stays")
    c_steps: Positive | None = Field(None, description="steps after which c is c_end")
    lambda_y: float = Field(1.0, ge=0, description="weight of log p(y'|x'), where there is template_outcome")
    template_conditional: str = Field("{x}{x_prime}", description="x, and x' at its end")
    template_marginal: str = Field("{x_prime}", description="x' alone, at its end; text before it takes a BOS's place")
    template_outcome: str | None = Field(None, description="x', and a column with y' at its end; null = no outcome")
    auditor: str | None = Field(
        None,
        min_length=1,
        description="module:function, (x, x_prime or None) -> verdict; or folder or Hub name of a classifier of "
        "sequences, frozen, whose verdict is its likeliest label; where the verdict on x' is that on x, the sum of the "
        "brackets is taken back at the last token; null = no gate",
    )
    template_auditor: str = Field(
        "{x_prime}", description="what a classifying auditor reads of an edit; of an input it reads {x}"
    )
    predictor: Literal["control", "joint"] = Field(
        "control",
        description="of log p(y'|x'): control = the scorer, frozen; joint = a copy of it that learns what came of the "
        "policy's samples",
    )
    outcome: str | None = Field(
        None,
        pattern=FUNCTION,
        description="joint: module:function, (x, x_prime) -> the text y' that was observed; each answer is a label",
    )
    y_prime: str | None = Field(
        None, min_length=1, description="the outcome that is wanted of every record, as column y_prime; null = its own"
    )
    budget: Positive | None = Field(None, description="joint: labels of the whole run, at most")
    start: float = Field(
        0.5, ge=0, le=1, description="joint: share of the budget spent on the untrained policy's samples, before step 1"
    )
    every: Positive = Field(1, description="joint: steps between two whose samples' outcomes are observed, all of them")
    updates: Positive = Field(4, description="joint: AdamW steps on the outcomes of a batch")
    learning_rate: float = Field(1e-4, gt=0, description="joint: of those steps")
    timeout: float | None = Field(
        600, gt=0, description="seconds that auditor, or outcome, may take a batch; null = any time"
    )
    micro_batch: Positive = Field(64, description="completions scored together; changes memory, not results")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("template_conditional", "template_marginal"):
            names = fields(key, getattr(self, key))
            if not names or [n for n in names if n in SCORED] != names[-1:]:
                raise ValueError(f"{key}={getattr(self, key)!r}: must have {{x_prime}} once, at its end")
        if {"x", "prompt"} & {*fields("template_marginal", self.template_marginal)}:
            raise ValueError(f"template_marginal={self.template_marginal!r}: it is p(x') without x; take x out")
        if self.template_outcome is not None:
            names = fields("template_outcome", self.template_outcome)
            if not names or names[-1] in SCORED or not {*SCORED} & {*names}:
                raise ValueError(
                    f"template_outcome={self.template_outcome!r}: needs {{x_prime}}, and the column of y' at its end"
                )
        elif self.lambda_y != 1:
            raise ValueError(f"lambda_y={self.lambda_y:g} without template_outcome: there is no y'; drop lambda_y")
        read = {name for _, name in parts("template_auditor", self.template_auditor) if name is not None}
        if "x_prime" not in read or read - {"x", "x_prime"}:
            raise ValueError(
                f"template_auditor={self.template_auditor!r}: it lays out {{x_prime}}, beside {{x}} or alone"
            )
        if self.template_auditor != "{x_prime}" and not self.classifies:
            raise ValueError(
                f"template_auditor={self.template_auditor!r} with auditor={self.auditor}: only a classifier reads it; "
                "drop it"
            )
        self._check_predictor()
        if (self.c_end is None) != (self.c_steps is None):
            raise ValueError(f"c_end={self.c_end} with c_steps={self.c_steps}: a schedule of c needs both")
        return self

    def _check_predictor(self) -> None:
        """Refuse keys that nothing reads, and a predictor that has nothing to learn from."""
        if self.y_prime is not None and "{y_prime}" not in (self.template_outcome or ""):
            raise ValueError(
                f"y_prime={self.y_prime} without {{y_prime}} in template_outcome: nothing reads it; drop it"
            )
        if self.predictor == "control":
            for name in ("outcome", "budget", "start", "every", "updates", "learning_rate"):
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}={value} with predictor=control: it learns nothing; set predictor=joint")
            return
        for name in ("template_outcome", "outcome", "budget"):
            if getattr(self, name) is None:
                raise ValueError(f"predictor=joint without {name}: it learns outcomes from labels; set {name}")
        if self.scorer == "reference":
            raise ValueError("predictor=joint with scorer=reference: what learns is a copy; name the scorer's folder")

    @property
    def origin(self) -> str:
        """Where the scores come from."""
        return self.scorer

    @property
    def judged(self) -> bool:
        """Where a function audits; a classifier is a model."""
        return self.auditor is not None and not self.classifies

    @property
    def taught(self) -> tuple[int, int]:
        """What the joint predictor observes."""
        return (round(self.start * self.budget), self.budget) if self.budget is not None else (0, 0)

    def lesson(self, step: int, prompts: int, samples: int) -> int:
        """Outcomes of all samples of every N-th step."""
        return 0 if self.budget is None or step % self.every else prompts * samples

    @property
    def classifies(self) -> bool:
        """Whether the auditor is a model."""
        return self.auditor is not None and not re.fullmatch(FUNCTION, self.auditor)

    @property
    def contrasts(self) -> bool:
        """Whether log p(x') is ever read."""
        return self.c > 0 or bool(self.c_end)

    def c_at(self, step: int) -> float:
        """c at a training step; 0 is before the first."""
        if self.c_end is None or self.c_steps is None:
            return self.c
        return self.c + (self.c_end - self.c) * min(step / self.c_steps, 1)
