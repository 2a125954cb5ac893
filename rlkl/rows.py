"""Rows of tokens: their layout for a causal model, and the way between positions and ``[B, T]``."""

import torch
from torch import Tensor

from rlkl.types import Rollout


def inverse_cdf(logp_BV: Tensor, u_B: Tensor) -> Tensor:
    """The first token whose cumulated probability exceeds u; never one of probability zero."""
    cdf_BV = logp_BV.double().exp().cumsum(-1)
    target_B1 = u_B[:, None] * cdf_BV[:, -1:]
    return torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(1).clamp(max=logp_BV.shape[1] - 1)


def widen(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layout(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as prompt + completion + right padding.

    Returns:
        ``input_BS``; ``at_BT``, the position whose next-token law is that of completion token t; ``real_BT``.
    """
    width = int((rollout.prompt_length_B + rollout.length_B).max())
    steps_S = torch.arange(width, device=rollout.tokens_BT.device)
    prompt_B1, total_B1 = (
        rollout.prompt_length_B[:, None],
        (rollout.prompt_length_B + rollout.length_B)[:, None],
    )
    from_prompt = rollout.prompt_BP.gather(
        1, steps_S.clamp(max=rollout.prompt_BP.shape[1] - 1).expand(len(rollout), -1)
    )
    offset_BS = (steps_S - prompt_B1).clamp(0, rollout.tokens_BT.shape[1] - 1)
    input_BS = torch.where(steps_S < prompt_B1, from_prompt, rollout.tokens_BT.gather(1, offset_BS))
    input_BS = input_BS * (steps_S < total_B1)
    steps_T = torch.arange(rollout.tokens_BT.shape[1], device=steps_S.device)
    real_BT = steps_T < rollout.length_B[:, None]
    return input_BS, (prompt_B1 - 1 + steps_T).clamp(max=width - 1), real_BT


def pick(x_BSD: Tensor, at_BT: Tensor, real_BT: Tensor) -> Tensor:
    """The ``[N, D]`` rows of real completion positions."""
    row_BT = torch.arange(len(x_BSD), device=x_BSD.device)[:, None].expand_as(at_BT)
    return x_BSD[row_BT[real_BT], at_BT[real_BT]]


def spread(x_N: Tensor, real_BT: Tensor, shape: torch.Size) -> Tensor:
    """Back to ``[B, T]``, zero where there is no token."""
    return x_N.new_zeros(shape).masked_scatter(real_BT, x_N)
