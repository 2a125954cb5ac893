"""The objects that flow through rlkl, and the legend of their axes.

========  =====================================================================
suffix    axis
========  =====================================================================
``B``     samples in a batch
``P``     prompt tokens (right-padded, true lengths in ``prompt_length_B``)
``T``     completion tokens (right-padded, true lengths in ``length_B``)
``V``     vocabulary
========  =====================================================================

Masks come from lengths, never from token ids, so a pad id equal to EOS changes nothing.
``True`` means *a policy token that trains*. Log-probs and KL are in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from rlkl.stopping import before_stop


class End(IntEnum):
    """How a completion ended. EOS and STOP terminate the episode, LIMIT truncates it."""

    EOS = 0
    STOP = 1
    LIMIT = 2


class _Rows:
    """Row selection, and access to fields that must be there, for a frozen dataclass of ``[B, ...]`` tensors."""

    def get(self, name: str) -> Tensor:
        """The tensor called ``name``; asking for one that was not computed is a bug of the caller."""
        value = getattr(self, name)
        assert value is not None, f"{type(self).__name__}.{name} was not asked for"
        return value  # type: ignore[no-any-return]

    def rows(self, index: Tensor) -> Self:
        """The samples at ``index`` (int64 ``[N]``), in that order."""
        chosen: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and value.dim() > 0:
                chosen[f.name] = value[index]
            elif f.name == "columns":
                chosen[f.name] = {k: [v[i] for i in index.tolist()] for k, v in value.items()}
            elif f.name == "shares":
                chosen[f.name] = {k: v[index] for k, v in value.items()}
        return replace(self, **chosen)  # type: ignore[type-var]


@dataclass(frozen=True)
class Rollout(_Rows):
    """Prompts with their completions: sampled by us, or written by somebody (``origin="data"``).

    ``behaviour_logp_BT`` are the log-probs (nats, at ``temperature``) under which the tokens were drawn.
    ``group_B`` numbers the prompt of a sample, ``sample_id_B`` the sample; both are global over ranks.
    ``annotation_BT`` are human or labelled token weights; they may look ahead and only likelihood
    trainers read them. ``annotated_BT`` (bool) says which tokens carry one; all others are masked there, and
    weigh 0. ``columns`` hold the prompt's text under ``prompt`` and its other columns, one list
    entry a sample. ``stop`` are the texts of which one ends a completion with ``End.STOP``.
    """

    prompt_BP: Tensor
    prompt_length_B: Tensor
    tokens_BT: Tensor
    length_B: Tensor
    policy_mask_BT: Tensor
    end_B: Tensor
    group_B: Tensor
    sample_id_B: Tensor
    behaviour_logp_BT: Tensor | None = None
    temperature: float = 1.0
    origin: Literal["policy", "reference", "data"] = "policy"
    pair_B: Tensor | None = None
    annotation_BT: Tensor | None = None
    annotated_BT: Tensor | None = None
    alt_u_BT: Tensor | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)
    decode: Callable[[list[int]], str] | None = None
    stop: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.tokens_BT.shape[0]

    def to(self, device: torch.device) -> "Rollout":
        """The same rollout with its tensors on ``device``."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in held.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def completion_ids(self) -> list[list[int]]:
        """Token ids of every completion, without padding (a terminating EOS is kept)."""
        pairs = zip(self.tokens_BT.tolist(), self.length_B.tolist(), strict=True)
        return [ids[:n] for ids, n in pairs]

    def texts(self) -> list[str]:
        """The completions as text, decoded on demand.

        A terminating EOS is left out, and so are a terminating stop string and what its last token adds to it.
        """
        assert self.decode is not None, "this rollout has no tokenizer"
        ends = self.end_B.tolist()
        rows = zip(self.completion_ids(), ends, strict=True)
        return [
            before_stop(self.decode(ids), self.stop)
            if end == End.STOP
            else self.decode(ids[:-1] if end == End.EOS else ids)
            for ids, end in rows
        ]


@dataclass(frozen=True)
class TokenRewards(_Rows):
    """Causal rewards: ``value_BT[t]`` is a function of the prompt and of tokens up to and including t.

    ``scored_BT`` marks positions at which the source gives a reward, zero or not. ``shares`` is what each
    source gave, clipped, and ``factors`` by what each was multiplied in the sum: its weight, over its running standard
    deviation where it is whitened. ``queries`` counts the scores that were asked for, ``labels`` those among them that
    were a person's judgement or stood for one.
    """

    value_BT: Tensor
    scored_BT: Tensor
    shares: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    queries: int = 0
    labels: int = 0


Need = Literal["logp", "ref_logp", "entropy", "kl", "kl_forward", "value", "alt_logp"]


@dataclass(frozen=True)
class PolicyOutput(_Rows):
    """What one forward of the policy/reference wrapper returns; only what was needed is filled.

    All ``[B, T]``, zero beyond a completion's length, at least fp32, at the rollout's temperature:
    ``logp`` and ``ref_logp`` of the tokens, ``entropy`` of the policy, exact ``kl`` = KL(pi||pi0) and
    ``kl_forward`` = KL(pi0||pi) of the next-token distributions (nats), ``value`` = V(s_t) before token t.
    ``bootstrap_B`` is the value of the state after the last token. ``alt_logp_BT`` are log-probs of given
    other tokens. ``next_logp_BV`` is filled when decoding.
    """

    logp_BT: Tensor | None = None
    ref_logp_BT: Tensor | None = None
    entropy_BT: Tensor | None = None
    kl_BT: Tensor | None = None
    kl_forward_BT: Tensor | None = None
    value_BT: Tensor | None = None
    bootstrap_B: Tensor | None = None
    alt_logp_BT: Tensor | None = None
    next_logp_BV: Tensor | None = None


@dataclass(frozen=True)
class Batch(_Rows):
    """What a loss reads. Everything here is data: detached, and fixed before micro-batching.

    ``weight_BT`` is a token's share of the loss: zero off the mask, else 1 / (the normaliser of the *global*
    batch). Losses are plain sums of ``weight * term``, so micro-batches add up to the whole batch.
    ``kl_weight_BT`` is the same for the KL penalty, where that covers more tokens than the loss (likelihood: every
    policy token, over the normaliser of the annotated ones). ``tokens`` is the global number of policy tokens, the
    denominator of token means. ``ref_logp_BT`` is what the frozen reference said of the tokens, once for all updates.
    """

    adv_BT: Tensor
    return_BT: Tensor
    mask_BT: Tensor
    weight_BT: Tensor
    tokens: Tensor
    group_B: Tensor
    behaviour_logp_BT: Tensor
    behaviour_value_BT: Tensor | None = None
    annotation_BT: Tensor | None = None
    pair_B: Tensor | None = None
    kl_weight_BT: Tensor | None = None
    ref_logp_BT: Tensor | None = None


Metrics = dict[str, tuple[Tensor, Tensor]]
"""``{name: (sum, count)}``, detached: metrics of micro-batches and ranks add up before the division."""


class Trainer(Protocol):
    """What one objective adds to the loop. Pure: it never calls the model, logs or steps an optimiser."""

    @property
    def need(self) -> frozenset[Need]:
        """What the training forward must return."""

    @property
    def epochs(self) -> int:
        """Passes over the samples of a step."""

    @property
    def minibatches(self) -> int:
        """Updates a pass."""

    def loss(self, out: PolicyOutput, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss, without the KL penalty, and what it reports."""

    def stop(self, metrics: dict[str, float]) -> bool:
        """Whether the means of the last pass say that the samples are used up."""
