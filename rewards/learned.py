"""A reward model as a source: frozen, it scores prompt and completion at the last token, or every token."""

from typing import Any

import torch
from torch import Tensor

from rlkl import RunError, models, scoring
from rlkl.config import LearnedSource
from rlkl.data.spans import Decoded
from rlkl.rewards.function import pay_at_end, probe_causality
from rlkl.types import End, Rollout, TokenRewards


class LearnedReward:
    """``level=sequence``: the score of a sequence-classification model with one label, paid at the last policy token.

    ``level=token``: the scores of a causal token-classification model, each paid at its own token.

    What is judged as a whole are the token ids of prompt and completion, with one EOS at the end however the
    completion ended (``eos: true``), or none. The model is in evaluation mode, without gradients, in its own
    dtype; every process scores its own samples.
    """

    clips = True  # by itself: missing_eos_penalty is taken off the clipped score

    def __init__(self, name: str, config: LearnedSource) -> None:
        self.name = name
        self.config = config
        path = config.path
        if path == "facts":
            from rlkl.tasks import facts_reward

            path = str(facts_reward.load_path())
        self.model, self.tokenizer = models.reward_model(path, f"rewards.{name}.path", config.level)
        self.context = models.context_length(self.model)
        if config.level == "sequence" and config.eos and self.tokenizer.eos_token_id is None:
            raise ValueError(f"rewards.{name}.eos=true: the tokenizer of {config.path} has no EOS; set eos=false")

    def check(self, tokenizer: Any) -> None:
        """Compare the vocabularies: the model is given the policy's token ids.

        Raises:
            ValueError: a token has another id, or is missing, on one side.
        """
        ours, theirs = tokenizer.get_vocab(), self.tokenizer.get_vocab()
        if ours != theirs:
            token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
            raise ValueError(
                f"rewards.{self.name}.path={self.config.path}: its tokenizer is not the policy's (token {token!r} is "
                f"{theirs.get(token)} here and {ours.get(token)} there); use a reward model with the same tokenizer"
            )

    def __call__(self, rollout: Rollout) -> TokenRewards:
        """Rewards of a rollout; every completion is one query, and equal ones are scored once.

        Raises:
            RunError: a completion is longer than the model can read, or its score is not finite.
        """
        rows = self._judged(rollout)
        for i, row in enumerate(rows):
            if self.context is not None and len(row) > self.context:
                raise RunError(
                    f"reward {self.name}: sample {int(rollout.sample_id_B[i])} has {len(row)} tokens with its prompt, "
                    f"and the model reads at most {self.context}; lower rollout.max_new_tokens"
                )
        distinct = {tuple(row): place for place, row in enumerate(dict.fromkeys(map(tuple, rows)))}
        model, once = self.model.to(rollout.tokens_BT.device), list(distinct)
        again_B = [distinct[tuple(row)] for row in rows]
        if self.config.level == "token":
            scores = scoring.token_scores(model, once, self.config.micro_batch)
            return TokenRewards(
                self._dense(rollout, [scores[k] for k in again_B]), rollout.policy_mask_BT, queries=len(rows)
            )
        score_B = self._usable(scoring.scores(model, once, self.config.micro_batch)[again_B], rollout)
        return pay_at_end(score_B - self.config.missing_eos_penalty * (rollout.end_B == End.LIMIT), rollout)

    def probe(self, rollout: Rollout) -> None:
        """Check once that a token model is causal; this is no query.

        Raises:
            ValueError: it reads later tokens, or fails; no run has started yet.
        """
        if self.config.level == "token":
            exact = self.model.dtype in (torch.float32, torch.float64)
            try:
                value_BT = self(rollout).value_BT
                probe_causality(lambda r: self(r).value_BT, value_BT, rollout, self.name, 1e-4 if exact else 5e-2)
            except RunError as error:
                raise ValueError(f"{error} (on a few samples before the first step)") from error

    def _dense(self, rollout: Rollout, scores: list[Tensor]) -> Tensor:
        """The scores of the completions' own tokens, ``[B, T]``, those of prompts left out."""
        value_BT = torch.zeros(rollout.tokens_BT.shape, dtype=scores[0].dtype, device=scores[0].device)
        for i, (asked, length) in enumerate(
            zip(rollout.prompt_length_B.tolist(), rollout.length_B.tolist(), strict=True)
        ):
            value_BT[i, :length] = scores[i][asked : asked + length]
        return self._usable(value_BT, rollout) * rollout.policy_mask_BT

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

    def _judged(self, rollout: Rollout) -> list[list[int]]:
        prompts = zip(rollout.prompt_BP.tolist(), rollout.prompt_length_B.tolist(), strict=True)
        rows = zip(prompts, rollout.completion_ids(), rollout.end_B.tolist(), strict=True)
        if self.config.level == "token":
            return [[*ids[:n], *y] for (ids, n), y, _ in rows]
        end = [self.tokenizer.eos_token_id] if self.config.eos else []
        texts = rollout.texts() if rollout.stop else [""] * len(rollout)
        return [
            [*ids[:n], *self._said(y, how, text, rollout), *end]
            for ((ids, n), y, how), text in zip(rows, texts, strict=True)
        ]

    @staticmethod
    def _said(ids: list[int], how: int, text: str, rollout: Rollout) -> list[int]:
        """The tokens of a completion without the EOS or the stop string that ended it, which is no part of its text."""
        if how == End.STOP:
            assert rollout.decode is not None, "this rollout has no tokenizer"
            return ids[: max(Decoded(ids, rollout.decode, text).tokens(0, len(text)), default=-1) + 1] if text else []
        return ids[:-1] if how == End.EOS else ids
