"""Completions of an evaluation as the rows of samples.jsonl, each with numbers for every token."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from rlkl import credit
from rlkl.config import Config
from rlkl.data.spans import Decoded
from rlkl.evaluate import Evaluation
from rlkl.types import PolicyOutput, Rollout

ENDS = ("eos", "stop", "limit")


def rows(result: Evaluation, count: int, adv_BT: Tensor | None = None) -> Iterator[dict[str, Any]]:
    """Completions of an evaluation, the first of every prompt in turn, ``count`` of them.

    ``tokens`` holds a list a number, one entry a token: its ``text``, exact ``kl`` (nats), ``logp`` and ``ref_logp``
    (nats), what each source pays there (``reward/<name>``, before its weight) and, where given, its ``advantage``; all
    to four digits.
    """
    rollout, shares = result.rollout, result.rewards.shares
    texts, ids, ends = rollout.texts(), rollout.completion_ids(), rollout.end_B.tolist()
    groups = rollout.group_B.tolist()
    first = [i for i, g in enumerate(groups) if g not in groups[:i]][:count]
    lists = {"kl": result.kl_BT, "logp": result.logp_BT, "ref_logp": result.ref_logp_BT}
    lists |= {f"reward/{name}": x_BT for name, x_BT in shares.items()}
    lists |= {} if adv_BT is None else {"advantage": adv_BT}
    for i in first:
        yield {
            "prompt": rollout.columns["prompt"][i],
            "completion": texts[i],
            "end": ENDS[ends[i]],
            "kl": float(result.kl_BT[i].sum()),
            **{f"reward/{name}": float(x_BT[i].sum()) for name, x_BT in shares.items()},
            "tokens": {
                "text": pieces(rollout, ids[i], texts[i]),
                **{name: short(x_BT[i, : len(ids[i])].tolist()) for name, x_BT in lists.items()},
            },
        }


def pieces(rollout: Rollout, ids: Sequence[int], text: str) -> list[str]:
    """What each token writes of its completion, found by decoding prefixes; together they are the completion.

    A character whose bytes several tokens share is written by the last of them, whose predecessors write nothing; so
    does a token behind the text: EOS, or what a stop string took.
    """
    assert rollout.decode is not None, "this rollout has no tokenizer"
    return Decoded(ids, rollout.decode, text).pieces()


def advantages(result: Evaluation, config: Config, beta: float) -> Tensor | None:
    """What the run's credit would assign to the tokens of an evaluation, ``[B, T]``; None where no reward is there.

    Returns with the run's window, discount, centring of rewards and, where it is paid as a reward, KL penalty. The
    baseline is always the mean of the prompt's other samples (none, where there are none; none for token likelihood),
    and neither a value nor whitening of advantages enters: they would be another scale a run. To be called by all
    processes.
    """
    if not result.rewards.shares:
        return None
    alone = len(result.rollout) == len(set(result.rollout.group_B.tolist()))
    plain = alone or config.trainer.type == "token_likelihood"
    fixed = {"advantage": "returns", "bootstrap_truncated": False, "whiten_advantages": False, "normaliser": "sequence"}
    chosen = config.credit.model_copy(update={**fixed, "baseline": "none" if plain else "leave_one_out"})
    paid = 0.0 if config.trainer.type in ("token_likelihood", "dpo") else beta
    out = PolicyOutput(logp_BT=result.logp_BT, ref_logp_BT=result.ref_logp_BT)
    return credit.assign(result.rollout, result.rewards, out, chosen, config.kl, paid)[0].adv_BT


def short(numbers: Sequence[float]) -> list[float]:
    """Numbers to four significant digits."""
    return [float(f"{x:.4g}") for x in numbers]
