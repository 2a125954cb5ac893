"""Sharded parameters (``train.shard``): every process holds a part of each weight, gradient and moment.

torch's ``fully_shard`` cuts policy, reference and critic alike, a transformer block at a time, and what is left
(embeddings, vocabulary head) with the wrapper whose one ``forward`` is called. In every forward the parts of a block
meet, are used and let go of again. So all processes must call the policy equally often: :func:`together` and
:func:`all_agree` see to it. Outside a step weights are whole: checkpoints and models are those of any other run.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlkl import RunError
from rlkl.adapters import causal
from rlkl.reduce import global_max

Piece = TypeVar("Piece")


def place(policy: Any, optimiser: torch.optim.Optimizer, accelerator: Accelerator) -> tuple[Any, Any]:
    """Shard a policy and its optimiser, both whole so far, over all processes; what ``accelerator.prepare`` would give.

    Autocast stays outside of the gathering, so the arithmetic is that of whole parameters.
    """
    names = {p: n for n, p in policy.named_parameters()}
    moments = {names[p]: state for p, state in optimiser.state.items()}
    groups = [[names[p] for p in group["params"]] for group in optimiser.param_groups]
    _shard(policy, accelerator.device)
    parts = dict(policy.named_parameters())
    for group, members in zip(optimiser.param_groups, groups, strict=True):
        group["params"] = [parts[name] for name in members]
    optimiser.state.clear()
    for name, state in moments.items():
        optimiser.state[parts[name]] = {k: _part(x, parts[name]) if x.dim() else x for k, x in state.items()}
    return (
        accelerator.prepare_model(policy, device_placement=False, evaluation_mode=True),
        accelerator.prepare_optimizer(optimiser, device_placement=False),
    )


def _shard(policy: Any, device: torch.device) -> None:
    options: Any = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "reshard_after_forward": True,  # of the root too: torch would keep it whole from an evaluation on
    }
    for model in (policy.model, policy.reference, policy.critic):
        kinds = set(getattr(causal(model), "_no_split_modules", None) or ()) if model is not None else set()
        for block in [m for m in causal(model).modules() if type(m).__name__ in kinds] if kinds else []:
            fully_shard(block, **options)
    if policy.value_head is not None:  # always fp32; what is gathered together must train in one dtype
        fully_shard(policy.value_head, **options)
    fully_shard(policy, **options)


def _part(x: Tensor, like: Any) -> Tensor:
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)


def sharded(policy: Any) -> bool:
    """Whether a policy's parameters are in parts."""
    return isinstance(policy, FSDPModule)


def whole(x: Tensor) -> Tensor:
    """A tensor that may be in parts, put together; to be called by all processes."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gathered(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors on the CPU; to be called by all processes. What is tied stays tied."""
    made: dict[int, Tensor] = {}
    found = {}
    for name, x in named:
        if id(x) not in made:
            made[id(x)] = whole(x.detach()).cpu().contiguous()
        found[name] = made[id(x)]
    return found


def weights(module: nn.Module) -> dict[str, Tensor] | None:
    """The whole state of a module with parameters in parts, on the CPU; None where they are whole."""
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        return None
    return gathered(module.state_dict(keep_vars=True).items())


def together(policy: Any, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, bool]]:
    """Pieces of work that call the policy once each, with True.

    With sharded parameters a process that has fewer than another goes on with its last one, with False: what comes of
    it is to be left out.

    Raises:
        RunError: there is no piece at all on this process.
    """
    most = len(pieces)
    if sharded(policy):
        most = int(global_max(torch.tensor(most, device=next(policy.parameters()).device)))
        if most and not pieces:
            raise RunError("train.shard: a process has no rows to evaluate; hold out more prompts than processes")
    yield from ((piece, True) for piece in pieces)
    yield from ((pieces[-1], False) for _ in range(most - len(pieces)))


def all_agree(policy: Any, done: Tensor) -> bool:
    """Whether ``done`` holds, with sharded parameters on all processes."""
    return bool(1 - global_max(1 - done.long())) if sharded(policy) else bool(done)
