"""A reward model as a source: frozen, it scores prompt and completion at the last token, every token or sentence."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlkl import RunError, models, scoring
from rlkl.config import LearnedSource
from rlkl.rewards import reading
from rlkl.rewards.function import pay_at_end, probe_causality
from rlkl.types import End, Rollout, TokenRewards


class LearnedReward:
    """``level=sequence``: the score of a sequence-classification model with one label, paid at the last policy token.

    ``level=token``: the scores of a causal token-classification model, each paid at its own token, or where it is
    certain if the model has a tokenizer of its own: scores that are paid at the same token add up, so that the sum over
    a completion is what the model says of it, however the policy cuts it. ``level=sentence``: those at the last tokens
    of sentences alone, each paid once its sentence has ended.

    What is judged is laid out by :mod:`rlkl.rewards.reading`, as in training. The model is in evaluation mode, without
    gradients, in its own dtype; every process scores its own samples.
    """

    clips = True  # by itself: missing_eos_penalty is taken off the clipped score

    def __init__(self, name: str, config: LearnedSource, loaded: tuple[Any, Any] | None = None) -> None:
        self.name = name
        self.config = config
        self.policy: Any = None  # its tokenizer, if it is another one
        self.model, self.tokenizer = loaded or self._load()
        self.context = models.context_length(self.model)
        if config.level == "sequence" and config.eos and self.tokenizer.eos_token_id is None:
            raise ValueError(f"rewards.{name}.eos=true: the tokenizer of {config.path} has no EOS; set eos=false")

    def _load(self) -> tuple[Any, Any]:
        path = self.config.path
        if path == "facts":
            from rlkl.tasks import facts_reward

            path = str(facts_reward.load_path())
        return models.reward_model(path, f"rewards.{self.name}.path", self.config.level)

    def check(self, tokenizer: Any) -> None:
        """Learn whether the model is given the policy's token ids, or the text, cut by its own tokenizer.

        Raises:
            ValueError: its own tokenizer does not know offsets, by which scores of tokens and sentences are paid.
        """
        self.policy = None if tokenizer.get_vocab() == self.tokenizer.get_vocab() else tokenizer
        if self.policy is not None and self.config.level != "sequence" and not self.tokenizer.is_fast:
            raise ValueError(
                f"rewards.{self.name}.path={self.config.path}: its tokenizer is not the policy's and knows no offsets; "
                f"level={self.config.level} needs a fast one, or the policy's"
            )

    def __call__(self, rollout: Rollout) -> TokenRewards:
        """Rewards of a rollout; every completion is one query, and equal ones are scored once.

        Raises:
            RunError: a completion is longer than the model can read, or its score is not finite.
        """
        if self.config.level == "sequence":
            score_B = self._usable(torch.cat(self._scored(rollout, self.rows(rollout), scoring.scores)), rollout)
            return pay_at_end(score_B - self.config.missing_eos_penalty * (rollout.end_B == End.LIMIT), rollout)
        found = reading.dense(rollout, self.tokenizer, self.policy, self.config.level)
        self._fit(rollout, found.rows)
        return self._dense(rollout, found, self._scored(rollout, found.rows, scoring.token_scores))

    def probe(self, rollout: Rollout) -> None:
        """Check once that prompts can be read, and that scores of tokens or sentences are causal; this is no query.

        Raises:
            ValueError: a token model reads later tokens, or the model fails; no run has started yet.
        """
        if self.policy is None and self.config.level == "sequence":
            return
        try:
            value_BT = self(rollout).value_BT
            if self.config.level != "sequence":
                exact = self.model.dtype in (torch.float32, torch.float64)
                probe_causality(lambda r: self(r).value_BT, value_BT, rollout, self.name, 1e-4 if exact else 5e-2)
        except RunError as error:
            raise ValueError(f"{error} (on a few samples before the first step)") from error

    def rows(self, rollout: Rollout) -> list[list[int]]:
        """What the model reads of a rollout, each row of a length that it can read.

        Raises:
            RunError: one is empty, or longer than the model can read.
        """
        if self.config.level == "sequence":
            rows = reading.whole(rollout, self.tokenizer, self.policy, self.config.eos)
        else:
            rows = reading.dense(rollout, self.tokenizer, self.policy, self.config.level).rows
        self._fit(rollout, rows)
        return rows

    def _fit(self, rollout: Rollout, rows: Sequence[list[int]]) -> None:
        for i, row in enumerate(rows):
            at = f"reward {self.name}: sample {int(rollout.sample_id_B[i])}"
            if not row:
                raise RunError(f"{at} has no token with its prompt; leave such prompts out")
            if self.context is not None and len(row) > self.context:
                raise RunError(
                    f"{at} has {len(row)} tokens with its prompt, and the model reads at most {self.context}; "
                    "lower rollout.max_new_tokens"
                )

    def _scored(self, rollout: Rollout, rows: Sequence[list[int]], score: Callable[..., Any]) -> list[Tensor]:
        """The model's scores of rows, equal ones read once."""
        distinct = {row: place for place, row in enumerate(dict.fromkeys(map(tuple, rows)))}
        found = score(self.model.to(rollout.tokens_BT.device), list(distinct), self.config.micro_batch)
        return [found[distinct[tuple(row)]].reshape(-1) for row in rows]

    def _dense(self, rollout: Rollout, found: reading.Reading, scores: Sequence[Tensor]) -> TokenRewards:
        """Scores of tokens or sentences, summed where they are paid at the same policy token."""
        mask_BT = rollout.policy_mask_BT
        value_BT = torch.zeros(mask_BT.shape, dtype=scores[0].dtype, device=mask_BT.device)
        scored_BT = torch.zeros_like(mask_BT)
        for i, (score_S, read, paid) in enumerate(zip(scores, found.read, found.paid, strict=True)):
            at_N = torch.tensor(paid, dtype=torch.long, device=mask_BT.device)
            value_BT[i].index_add_(0, at_N, score_S[read])
            scored_BT[i, at_N] = True
        return TokenRewards(self._usable(value_BT, rollout) * mask_BT, scored_BT & mask_BT, queries=len(scores))

    def _usable(self, score: Tensor, rollout: Rollout) -> Tensor:
        """Scores, one or more a sample, clipped if asked; they must be finite."""
        bad = (~score.isfinite()).nonzero().tolist()
        if bad:
            raise RunError(
                f"reward {self.name}: sample {int(rollout.sample_id_B[bad[0][0]])} got {float(score[tuple(bad[0])])}; "
                "every completion needs a finite score"
            )
        clip = self.config.clip
        return score if clip is None else score.clamp(-clip, clip)
