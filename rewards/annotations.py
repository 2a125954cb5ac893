"""Spans as a reward: dense and causal. The same spans whole, as weights of tokens, for likelihood trainers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlkl import RunError
from rlkl.config import AnnotationsSource
from rlkl.data.annotated import Span
from rlkl.data.spans import Decoded, add_up
from rlkl.faults import limit
from rlkl.importing import function
from rlkl.rewards.function import probe_causality
from rlkl.types import Rollout, TokenRewards

KEYS = ("start", "end", "label", "weight")
Judged = tuple[Span, Sequence[int]]  # a span and tokens


class AnnotationReward:
    """The weight of a span's label times its own weight, paid once; spans that are paid at the same token add up.

    Stored spans (column ``spans`` of annotated data) are paid at their last token; those of several annotators count
    for a share each (:mod:`rlkl.data.spans`). A labeller's span [start, end) is
    paid at the token of code point ``end - 1 + lookahead``, when it is certain, or at the last token where the text
    ends first: only then may the labeller know of it.
    """

    def __init__(self, name: str, config: AnnotationsSource) -> None:
        self.name = name
        self.config = config
        self.labeller = function(name, config, "labeller")
        self._last: tuple[Rollout, list[list[Span]]] | None = None

    def __call__(self, rollout: Rollout) -> TokenRewards:
        """Rewards of a rollout; every completion is one query of the labeller, and one label.

        Raises:
            RunError: there are no stored spans; the labeller raises, or gives a span that is none or has no weight.
        """
        value_BT, scored_BT = self._add(rollout, whole=False, unmarked=None)
        asked = 0 if self.labeller is None else len(rollout)
        return TokenRewards(value_BT, scored_BT, queries=asked, labels=asked)

    def annotate(self, rollout: Rollout) -> Rollout:
        """The rollout with the same spans whole, as ``annotation_BT`` and ``annotated_BT``, which look ahead.

        Raises:
            RunError: as when called.
        """
        weight_BT, marked_BT = self._add(rollout, whole=True, unmarked=self.config.unmarked)
        return replace(rollout, annotation_BT=weight_BT, annotated_BT=marked_BT)

    @property
    def stored(self) -> bool:
        """Whether it reads spans stored with data, and can judge no new sample."""
        return self.labeller is None

    def judged(self, rollout: Rollout) -> list[list[Judged]]:
        """For every completion, its spans with all tokens that each marks.

        Raises:
            RunError: as when called.
        """
        return self._stored(rollout, True) if self.stored else self._labelled(rollout, True)

    def probe(self, rollout: Rollout) -> None:
        """Check once that rewards are causal as configured; these calls are no queries.

        Raises:
            ValueError: the labeller reads further ahead, or fails; no run has started yet.
        """

        def score(variant: Rollout) -> Tensor:
            return self(variant).value_BT

        try:
            value_BT = score(rollout)
        except RunError as error:
            raise ValueError(f"{error} (on a few samples before the first step)") from error
        if self.labeller is not None:
            try:
                probe_causality(score, value_BT, rollout, self.name)
            except ValueError as error:
                now = f"rewards.{self.name}.lookahead={self.config.lookahead}"
                raise ValueError(f"{error} ({now}: raise it if the labeller reads further behind a span)") from None

    def _add(self, rollout: Rollout, whole: bool, unmarked: float | None) -> tuple[Tensor, Tensor]:
        """Weights and marks of tokens: those of whole spans, or the one at which each is paid."""
        mask_BT = rollout.policy_mask_BT
        weight_BT, marked_BT = torch.zeros(mask_BT.shape), torch.zeros(mask_BT.shape, dtype=torch.bool)
        judged = self._stored(rollout, whole) if self.labeller is None else self._labelled(rollout, whole)
        people = rollout.columns.get("annotators") if self.stored else None
        for i, length in enumerate(rollout.length_B.tolist()):
            spans, tokens = zip(*judged[i], strict=True) if judged[i] else ((), ())
            judges = len(people[i]) if people and people[i] else 1
            added = add_up(spans, tokens, self.config.weights, length, unmarked, judges)
            weight_BT[i, :length], marked_BT[i, :length] = added
        return weight_BT.to(mask_BT.device) * mask_BT, marked_BT.to(mask_BT.device) & mask_BT

    def _stored(self, rollout: Rollout, whole: bool) -> list[list[Judged]]:
        if rollout.origin != "data" or "spans" not in rollout.columns:
            raise RunError(
                f"reward {self.name}: samples of the {rollout.origin} have no stored spans; name a labeller that marks "
                f"them in rewards.{self.name}.labeller"
            )
        judged: list[list[Judged]] = []
        for i in range(len(rollout)):
            judged.append([])
            for held in rollout.columns["spans"][i]:
                span = replace(self._span(self._at(rollout, i), held), annotator=held.get("annotator"))
                judged[-1].append((span, held["tokens"] if whole else held["tokens"][-1:]))
        return judged

    def _labelled(self, rollout: Rollout, whole: bool) -> list[list[Judged]]:
        assert rollout.decode is not None, "this rollout has no tokenizer"
        judged: list[list[Judged]] = []
        rows = zip(rollout.completion_ids(), rollout.texts(), self._spans(rollout), strict=True)
        for ids, text, spans in rows:
            decoded = Decoded(ids, rollout.decode, text)
            judged.append([])
            for span in spans:
                paid = [decoded.certain(span.end - 1 + self.config.lookahead)]
                judged[-1].append((span, decoded.tokens(span.start, span.end) if whole else paid))
        return judged

    def _spans(self, rollout: Rollout) -> list[list[Span]]:
        """The labeller's spans; it is asked once about a rollout, which is paid for and then read whole."""
        if self._last is None or self._last[0] is not rollout:
            rows = enumerate(rollout.texts())
            self._last = rollout, [self._ask(self._at(rollout, i), text) for i, text in rows]
        return self._last[1]

    def _at(self, rollout: Rollout, i: int) -> str:
        return f"reward {self.name}: sample {int(rollout.sample_id_B[i])}"

    def _ask(self, at: str, text: str) -> list[Span]:
        assert self.labeller is not None
        try:
            with limit(self.config.timeout, at):
                answer = list(self.labeller(text))
        except RunError:
            raise
        except (Exception, SystemExit) as error:  # whatever a stranger's function raises
            raise RunError(f"{at}: {type(error).__name__}: {error}") from error
        spans = [self._span(at, given) for given in answer]
        for span, given in zip(spans, answer, strict=True):
            if not 0 <= span.start < span.end <= len(text):
                raise RunError(f"{at}: {given!r} is no span of its {len(text)} characters; correct start and end")
        return spans

    def _span(self, at: str, given: Any) -> Span:
        """A span from an object or a mapping."""
        held = given if isinstance(given, Mapping) else {key: getattr(given, key, None) for key in KEYS}
        start, end, label, weight = (held.get(key) for key in KEYS)
        weight = 1.0 if weight is None else weight
        if type(start) is not int or type(end) is not int or not isinstance(label, str):
            raise RunError(f"{at}: {given!r} is no span; a span has start and end (whole numbers) and a label")
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise RunError(f"{at}: a span weighs {weight!r}; it must be a finite number")
        if label not in self.config.weights:
            known = ", ".join(self.config.weights)
            raise RunError(f"{at}: no weight for label {label!r}; add it to rewards.{self.name}.weights ({known})")
        return Span(start, end, label, weight)
