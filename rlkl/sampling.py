"""Prompts to a Rollout: our own decode loop, with counter-based randomness.

Token t of sample i at step s is the inverse CDF of the uniform u(seed, stream, s, i, t), which depends on
nothing else: not on rank, padding, batch or the other samples.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkl import sharding
from rlkl.policy import DecodeState, Policy
from rlkl.rows import inverse_cdf
from rlkl.stopping import StopStrings
from rlkl.types import End, Rollout

TRAIN, EVALUATE, ALTERNATIVES, PREPARE, SPLIT, ORDER, MINIBATCHES = 0, 1, 2, 3, 100, 101, 1000  # streams of randomness


def uniforms(seed: int, stream: int, step: int, sample_id_B: Tensor, length: int) -> Tensor:
    """``u[i, t]`` in [0, 1), float64, ``[B, T]``: Philox keyed by (seed, step), counted by (sample, token)."""
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, stream, i])).random(length)
        for i in sample_id_B.tolist()
    ]
    return torch.from_numpy(np.stack(rows))


def permutation(seed: int, stream: int, epoch: int, size: int) -> list[int]:
    """A seeded order of ``size`` things, another one for every stream and epoch."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, stream, 0]))
    return [int(i) for i in generator.permutation(size)]


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, one entry a prompt, with what reward functions get to see beside them."""

    ids: Sequence[Sequence[int]]
    group: Sequence[int]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    decode: Callable[[list[int]], str] | None = None

    def part(self, rank: int, ranks: int) -> "Prompts":
        """The prompts of one of several processes; groups keep their global numbers."""
        chosen = slice(len(self.ids) * rank // ranks, len(self.ids) * (rank + 1) // ranks)
        columns = {name: values[chosen] for name, values in self.columns.items()}
        return Prompts(self.ids[chosen], self.group[chosen], columns, self.decode)

    def first(self, count: int) -> "Prompts":
        """The first ``count`` prompts, or all where there are fewer."""
        columns = {name: values[:count] for name, values in self.columns.items()}
        return Prompts(self.ids[:count], self.group[:count], columns, self.decode)


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Prompts,
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    stop: Sequence[str] = (),
    seed: int,
    step: int,
    stream: int = TRAIN,
    temperature: float = 1.0,
    micro_batch: int = 256,
) -> Rollout:
    """G completions a prompt, with the log-probs (nats, at ``temperature``) under which they were drawn.

    A completion ends with the first of ``eos_ids`` (``End.EOS``) or the token that completes one of the ``stop``
    strings (``End.STOP``), kept as a policy token, or after ``max_new_tokens`` (``End.LIMIT``). Sample i of the step
    is the (i mod G)-th of its prompt.
    """
    repeat = [p for p in range(len(prompts.ids)) for _ in range(samples_per_prompt)]
    device = next(policy.parameters()).device
    prompt_BP, prompt_length_B = pad([prompts.ids[p] for p in repeat])
    sample_id_B = torch.tensor(
        [prompts.group[p] * samples_per_prompt + k % samples_per_prompt for k, p in enumerate(repeat)]
    )
    u_BT = uniforms(seed, stream, step, sample_id_B, max_new_tokens)
    assert not stop or prompts.decode is not None, "stop strings need a tokenizer"
    stops = StopStrings(stop, prompts.decode) if stop and prompts.decode else None
    parts = []
    with evaluating(policy):  # gradient checkpointing would switch the cache off; dropout is off in any case
        pieces = [slice(start, start + micro_batch) for start in range(0, len(repeat), micro_batch)]
        for rows, mine in sharding.together(policy, pieces):
            state = DecodeState.start(prompt_BP[rows].to(device), prompt_length_B[rows].to(device), temperature)
            drawn = [x.cpu() for x in _decode(policy, state, u_BT[rows].to(device), eos_ids, stops)]
            parts += [drawn] if mine else []
    tokens_BT, logp_BT, length_B, end_B = (torch.cat(x) for x in zip(*parts, strict=True))
    width = int(length_B.max())
    mask_BT = torch.arange(width) < length_B[:, None]
    return Rollout(
        prompt_BP=prompt_BP,
        prompt_length_B=prompt_length_B,
        tokens_BT=tokens_BT[:, :width] * mask_BT,
        length_B=length_B,
        policy_mask_BT=mask_BT,
        end_B=end_B,
        behaviour_logp_BT=logp_BT[:, :width] * mask_BT,
        temperature=temperature,
        group_B=torch.tensor([prompts.group[p] for p in repeat]),
        sample_id_B=sample_id_B,
        columns={name: [values[p] for p in repeat] for name, values in prompts.columns.items()},
        decode=prompts.decode,
        stop=tuple(stop),
    ).to(device)


@contextlib.contextmanager
def evaluating(policy: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the context; then every module is in its own mode again."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _decode(
    policy: Policy, state: DecodeState, u_BT: Tensor, eos_ids: Sequence[int], stops: StopStrings | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, log-probs, lengths and ends, decoded until every row has ended; what follows an end means nothing."""
    rows, length = u_BT.shape
    token_BT = torch.zeros(rows, length, dtype=torch.long, device=u_BT.device)
    logp_BT = torch.zeros(rows, length, device=u_BT.device)
    eos = torch.tensor(list(eos_ids), dtype=torch.long, device=u_BT.device)
    length_B = torch.full((rows,), length, device=u_BT.device)
    end_B = torch.full((rows,), int(End.LIMIT), device=u_BT.device)
    for t in range(length):
        logp_BV = policy(state).get("next_logp_BV")
        token_B = inverse_cdf(logp_BV, u_BT[:, t])
        if t == 0:
            logp_BT = logp_BT.to(logp_BV.dtype)
        token_BT[:, t] = token_B
        logp_BT[:, t] = logp_BV.gather(1, token_B[:, None]).squeeze(1)
        open_B = end_B == End.LIMIT
        end_B[open_B & torch.isin(token_B, eos)] = int(End.EOS)
        if stops is not None:
            end_B[stops.completed(token_BT[:, : t + 1], end_B == End.LIMIT)] = int(End.STOP)
        length_B[open_B & (end_B != End.LIMIT)] = t + 1
        if sharding.all_agree(policy, (end_B != End.LIMIT).all()):
            break
        state.append(token_B)
    return token_BT, logp_BT, length_B, end_B


def pad(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids ``[B, P]`` and lengths ``[B]``."""
    length_B = torch.tensor([len(row) for row in ids])
    width = int(length_B.max())
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], dtype=torch.long), length_B


def given(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], width: int = 1, **more: Any
) -> Rollout:
    """Completions that are there already, as a rollout at least ``width`` tokens wide.

    ``more`` are its other fields; without them every completion is a group of its own and ended by the limit.
    """
    prompt_BP, prompt_length_B = pad(prompts)
    tokens_BT, length_B = pad(completions)
    tokens_BT = torch.nn.functional.pad(tokens_BT, (0, max(width - tokens_BT.shape[1], 0)))
    order_B = torch.arange(len(length_B))
    fields: dict[str, Any] = {"end_B": torch.full_like(length_B, int(End.LIMIT)), "group_B": order_B} | more
    return Rollout(
        prompt_BP=prompt_BP,
        prompt_length_B=prompt_length_B,
        tokens_BT=tokens_BT,
        length_B=length_B,
        policy_mask_BT=torch.arange(tokens_BT.shape[1]) < length_B[:, None],
        sample_id_B=order_B,
        **fields,
    )
