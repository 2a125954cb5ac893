"""A reward model as a source: frozen, it scores prompt and completion at the last token."""

from typing import Any

from rlkl import RunError, models, scoring
from rlkl.config import LearnedSource
from rlkl.data.spans import Decoded
from rlkl.rewards.function import pay_at_end
from rlkl.types import End, Rollout, TokenRewards


class LearnedReward:
    """The score of a sequence-classification model with one label, paid at the last policy token.

    What is judged are the token ids of prompt and completion, with one EOS at the end however the completion ended
    (``eos: true``), or none. The model is in evaluation mode, without gradients, in its own dtype; every process
    scores its own samples.
    """

    def __init__(self, name: str, config: LearnedSource) -> None:
        self.name = name
        self.config = config
        path = config.path
        if path == "facts":
            from rlkl.tasks import facts_reward

            path = str(facts_reward.load_path())
        self.model, self.tokenizer = models.reward_model(path, f"rewards.{name}.path")
        self.context = models.context_length(self.model)
        if config.eos and self.tokenizer.eos_token_id is None:
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
        """Rewards of a rollout; every completion is one query.

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
        score_B = scoring.scores(self.model.to(rollout.tokens_BT.device), rows, self.config.micro_batch)
        bad = (~score_B.isfinite()).nonzero()
        if len(bad):
            i = int(bad[0])
            raise RunError(
                f"reward {self.name}: sample {int(rollout.sample_id_B[i])} got {float(score_B[i])}; "
                "every completion needs a finite score"
            )
        return pay_at_end(score_B, rollout)

    def _judged(self, rollout: Rollout) -> list[list[int]]:
        prompts = zip(rollout.prompt_BP.tolist(), rollout.prompt_length_B.tolist(), strict=True)
        rows = zip(prompts, rollout.completion_ids(), rollout.end_B.tolist(), strict=True)
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
