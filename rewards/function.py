"""A Python function as a reward: scalar in the manner of TRL, or causal and dense."""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlkl import RunError
from rlkl.config import FunctionSource
from rlkl.faults import limit
from rlkl.importing import resolve
from rlkl.types import End, Rollout, TokenRewards


class FunctionReward:
    """``level=sequence``: ``f(prompts, completions, **columns) -> list[float]``, paid at the last policy token.

    ``level=token``: ``f(rollout) -> [B, T]``, where column t may read tokens up to t only; it is probed once.
    A function that takes no ``**columns`` is given just the columns that it names.
    """

    def __init__(self, name: str, config: FunctionSource) -> None:
        self.name = name
        self.level = config.level
        self.timeout = config.timeout
        self.function = resolve(config.path, f"rewards.{name}.path")

    def __call__(self, rollout: Rollout) -> TokenRewards:
        """Rewards of a rollout.

        Raises:
            RunError: the function raises or takes too long, or returns None, a non-finite score or the wrong number
                of scores.
        """
        if self.level == "sequence":
            return self._sequence(rollout)
        judged = len(rollout)
        return TokenRewards(self._token(rollout), rollout.policy_mask_BT, queries=judged, labels=judged)

    def probe(self, rollout: Rollout) -> None:
        """Check once, on any rollout, that a token-level function is causal; its calls are no queries.

        Raises:
            ValueError: it reads later tokens, or fails; no run has started yet.
        """
        if self.level == "token":
            try:
                probe_causality(self._token, self._token(rollout), rollout, self.name)
            except RunError as error:
                raise ValueError(f"{error} (on a few samples before the first step)") from error

    def _sequence(self, rollout: Rollout) -> TokenRewards:
        prompts, completions = rollout.columns["prompt"], rollout.texts()
        columns = {k: v for k, v in rollout.columns.items() if k != "prompt"}
        parameters = inspect.signature(self.function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            columns = {k: v for k, v in columns.items() if k in parameters}

        def call(rows: list[int]) -> Any:
            chosen = {k: [v[i] for i in rows] for k, v in columns.items()}
            return self.function(
                prompts=[prompts[i] for i in rows], completions=[completions[i] for i in rows], **chosen
            )

        everyone = list(range(len(rollout)))
        try:
            with limit(self.timeout, f"reward {self.name}"):
                scores = call(everyone)
        except RunError:
            raise
        except (Exception, SystemExit) as error:
            raise RunError(self._raised(error, call, rollout)) from error
        if not hasattr(scores, "__len__") or len(scores) != len(rollout):
            got = f"{len(scores)} scores" if hasattr(scores, "__len__") else f"a {type(scores).__name__}"
            raise RunError(f"reward {self.name}: returned {got} for {len(rollout)} completions; one each, in order")
        for i, score in enumerate(scores):
            if not _is_finite(score):
                raise RunError(
                    f"reward {self.name}: sample {int(rollout.sample_id_B[i])} got {score!r}; "
                    "every completion needs a finite score"
                )
        dtype = torch.float64 if rollout.behaviour_logp_BT is None else rollout.behaviour_logp_BT.dtype
        score_B = torch.tensor([float(s) for s in scores], dtype=dtype, device=rollout.tokens_BT.device)
        return replace(pay_at_end(score_B, rollout), labels=len(rollout))

    def _raised(self, error: BaseException, call: Callable[[list[int]], Any], rollout: Rollout) -> str:
        """Which sample it was: the first one on which the function raises alone."""
        culprit = "only on the whole batch"
        try:
            with limit(self.timeout, "the search"):
                for i in range(len(rollout)):
                    try:
                        call([i])
                    except (Exception, SystemExit):
                        culprit = f"at sample {int(rollout.sample_id_B[i])}"
                        break
        except RunError:
            culprit = "at which sample was not found in time"
        return f"reward {self.name}: {type(error).__name__}: {error} ({culprit})"

    def _token(self, rollout: Rollout) -> Tensor:
        try:
            with limit(self.timeout, f"reward {self.name}"):
                value_BT = torch.as_tensor(self.function(rollout), device=rollout.tokens_BT.device)
        except RunError:
            raise
        except (Exception, SystemExit) as error:
            raise RunError(f"reward {self.name}: {type(error).__name__}: {error}") from error
        if value_BT.shape != rollout.tokens_BT.shape:
            raise RunError(
                f"reward {self.name}: returned shape {list(value_BT.shape)} for tokens {list(rollout.tokens_BT.shape)}"
            )
        value_BT = value_BT.detach() * rollout.policy_mask_BT.to(torch.get_default_dtype())
        bad = (~value_BT.isfinite()).nonzero()
        if len(bad):
            i, t = bad[0].tolist()
            raise RunError(
                f"reward {self.name}: sample {int(rollout.sample_id_B[i])} got {float(value_BT[i, t])} at token {t}; "
                "every reward must be finite"
            )
        return value_BT


def _is_finite(score: Any) -> bool:
    try:
        return math.isfinite(score)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # not one number
        return False


def pay_at_end(score_B: Tensor, rollout: Rollout) -> TokenRewards:
    """A sequence score, paid at the last policy token: it may have read everything before."""
    position_T = torch.arange(rollout.tokens_BT.shape[1], device=score_B.device)
    last_B1 = (position_T * rollout.policy_mask_BT).amax(1, keepdim=True)
    paid_BT = (position_T == last_B1) & rollout.policy_mask_BT
    return TokenRewards(score_B[:, None] * paid_BT, paid_BT, queries=len(score_B))


def probe_causality(
    score: Callable[[Rollout], Tensor], value_BT: Tensor, rollout: Rollout, name: str, tolerance: float = 1e-5
) -> None:
    """Replace and cut suffixes and check that earlier rewards stay: spreading a score backwards is refused.

    Raises:
        ValueError: the reward of a token changed with the tokens after it.
    """
    position_T = torch.arange(rollout.tokens_BT.shape[1], device=value_BT.device)
    others_BT = rollout.tokens_BT.roll(1, 0).flip(1)
    for share in (0.25, 0.5, 0.75):
        keep_B = (rollout.length_B * share).long().clamp(min=1)
        early_BT = position_T < keep_B[:, None]
        changed = replace(
            rollout,
            tokens_BT=torch.where(early_BT, rollout.tokens_BT, others_BT),
            end_B=rollout.end_B.where(keep_B == rollout.length_B, int(End.LIMIT)),
        )
        cut = replace(
            changed,
            tokens_BT=rollout.tokens_BT * early_BT,
            length_B=keep_B,
            policy_mask_BT=rollout.policy_mask_BT & early_BT,
        )
        # The last kept token may be paid for being the last one, so it is not compared after a cut.
        for variant, compared_BT in ((changed, early_BT), (cut, position_T < keep_B[:, None] - 1)):
            moved = ((score(variant) - value_BT).abs() > tolerance * (1 + value_BT.abs())) & compared_BT
            if bool(moved.any()):
                i, t = moved.nonzero()[0].tolist()
                raise ValueError(
                    f"reward {name}: not causal: the reward of token {t} of sample {int(rollout.sample_id_B[i])} "
                    "depends on later tokens; pay it at the last token that it reads"
                )
