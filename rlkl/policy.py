"""The one policy/reference wrapper: every log-prob, KL and value of a run comes from its ``forward``.

Rows are laid out as prompt, completion, right padding, so a causal model needs no mask and padding cannot
change anything. Only completion positions pass the vocabulary head, ``head_chunk`` at a time and recomputed in
the backward pass, so no ``[B, T, V]`` fp32 tensor exists.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlkl.adapters import (
    FROZEN,
    TRAINED,
    adapter_is_identity,
    causal,
    check_adapter,
    check_vocabulary,
    freeze_adapter_copy,
    head_agrees,
    prepare_model,
)
from rlkl.rows import inverse_cdf, layout, pick, spread, widen
from rlkl.types import Need, PolicyOutput, Rollout

Fields = dict[str, Tensor]


@dataclass
class DecodeState:
    """Decoding in progress: left-padded prompts, then one new token a row and step."""

    input_BS: Tensor
    attention_BS: Tensor
    position_BS: Tensor
    temperature: float
    cache: Any = None

    @classmethod
    def start(cls, prompt_BP: Tensor, length_B: Tensor, temperature: float) -> "DecodeState":
        """Left-pad right-padded prompts."""
        width = prompt_BP.shape[1]
        shift_BP = torch.arange(width, device=prompt_BP.device) - (width - length_B[:, None])
        seen_BP = shift_BP >= 0
        ids_BP = prompt_BP.gather(1, shift_BP.clamp(min=0)) * seen_BP
        return cls(ids_BP, seen_BP.long(), shift_BP.clamp(min=0), temperature)

    def append(self, token_B: Tensor) -> None:
        """Go on with the sampled tokens."""
        ones_B1 = torch.ones_like(self.attention_BS[:, :1])
        self.attention_BS = torch.cat([self.attention_BS, ones_B1], 1)
        self.position_BS = self.position_BS[:, -1:] + 1
        self.input_BS = token_B[:, None]


class Policy(nn.Module):
    """A causal LM, its frozen reference and an optional value head.

    The reference is a snapshot of the model as given, so KL = 0 at the start, bit for bit; under LoRA it is the base
    with the adapter off where that is the same function, else a second, frozen adapter; or a ``reference`` of its own.
    ``model`` is any causal LM of transformers or a peft model; where hidden states times the output embedding are
    not its logits (soft-capping, scaled logits, no such matrix) its own forward is used.

    Args:
        reference: another model; None for the model as it is; "base" for a peft model's base or the frozen adapter
            that it carries (a trained adapter read back).
        value_head: learn V(s) with a linear head on the trunk, or on a trunk of its own (``separate_critic``).
        head_chunk: positions that pass the vocabulary head together.

    Raises:
        ValueError: a value head on a model whose hidden states are out of reach; LoRA on a tied output embedding;
            a reference with another vocabulary.
    """

    def __init__(
        self,
        model: Any,
        *,
        value_head: bool = False,
        separate_critic: bool = False,
        head_chunk: int = 1024,
        reference: Any = None,
    ) -> None:
        super().__init__()
        prepare_model(model)
        self.model = model
        self.head_chunk = head_chunk
        self.chunked = head_agrees(causal(model))
        self.adapted = hasattr(model, "peft_config")
        if self.adapted:
            check_adapter(model)
            if reference is None and not adapter_is_identity(model):
                freeze_adapter_copy(model)
        elif reference is None:
            reference = copy.deepcopy(model)
        self.reference_adapter = self.adapted and FROZEN in model.peft_config
        self.reference = None if reference == "base" else reference
        if self.reference is not None:
            check_vocabulary(model, self.reference)
            prepare_model(self.reference)
            self.reference.requires_grad_(False)
        self.reference_chunked = self.chunked if self.reference is None else head_agrees(causal(self.reference))
        self.critic: Any = None
        self.value_head: nn.Linear | None = None
        if value_head:
            own_trunk = separate_critic and causal(model).base_model is not causal(model)
            if not self.chunked and not own_trunk:
                raise ValueError(
                    f"{type(causal(model)).__name__}: a learned value needs the trunk's hidden states, but this "
                    "model's logits are not its output embedding times them; use model.critic=separate, or another "
                    "credit.baseline"
                )
            if separate_critic:
                self.critic = copy.deepcopy(causal(model).base_model).requires_grad_(True)
            first = next(model.parameters())
            self.value_head = nn.Linear(model.config.hidden_size, 1, device=first.device, dtype=torch.float32)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[Any]:
        """The causal LM that plays the reference, for the time of the context."""
        if self.reference is not None:
            yield causal(self.reference)
        elif self.reference_adapter:
            self.model.base_model.set_adapter(FROZEN, inference_mode=True)
            try:
                yield causal(self.model)
            finally:
                self.model.base_model.set_adapter(TRAINED)
        else:
            with self.model.disable_adapter():
                yield causal(self.model)

    def forward(self, inputs: Rollout | DecodeState, need: Iterable[Need] = ()) -> PolicyOutput:
        """Train-time quantities of a rollout, or the next-token log-probs of a decoding.

        Args:
            inputs: a rollout, or a decoding, whose cache is moved on.
            need: which fields of the output to compute, for a rollout.
        """
        if isinstance(inputs, DecodeState):
            return self._next(inputs)
        return self._score(inputs, frozenset(need))

    def _next(self, state: DecodeState) -> PolicyOutput:
        out = self.model(
            input_ids=state.input_BS,
            attention_mask=state.attention_BS,
            position_ids=state.position_BS,
            past_key_values=state.cache,
            use_cache=True,
            **({"logits_to_keep": 1} if self.chunked else {}),
        )
        state.cache = out.past_key_values
        logits_BV = widen(out.logits[:, -1]) / state.temperature
        return PolicyOutput(next_logp_BV=logits_BV.log_softmax(-1))

    def _score(self, rollout: Rollout, need: frozenset[str]) -> PolicyOutput:
        input_BS, at_BT, real_BT = layout(rollout)
        token_N = rollout.tokens_BT[real_BT]
        shape = real_BT.shape
        fields: Fields = {}
        own = ref = None
        if need & {"logp", "entropy", "kl", "kl_forward", "alt_logp"} or ("value" in need and self.critic is None):
            hidden_BSD = self._trunk(causal(self.model), input_BS, self.chunked)
            own = pick(hidden_BSD, at_BT, real_BT)
        if need & {"ref_logp", "kl", "kl_forward"}:
            with torch.no_grad(), self._as_reference() as reference:
                ref = pick(self._trunk(reference, input_BS, self.reference_chunked), at_BT, real_BT)
        if wanted := need - {"value"}:
            alt_u_N = rollout.get("alt_u_BT")[real_BT] if "alt_logp" in need else None
            given = (own if wanted - {"ref_logp"} else None, ref, token_N, alt_u_N)
            flat = self._heads(*given, wanted, rollout.temperature)
            fields |= {f"{k}_BT": spread(v, real_BT, shape) for k, v in flat.items()}
        if "value" in need:
            if self.critic is not None:
                hidden_BSD = self.critic(input_ids=input_BS, use_cache=False).last_hidden_state
            rows = torch.arange(shape[0], device=real_BT.device)
            last_B = rollout.prompt_length_B + rollout.length_B - 1
            fields["value_BT"] = spread(self._value(pick(hidden_BSD, at_BT, real_BT)), real_BT, shape)
            fields["bootstrap_B"] = self._value(hidden_BSD[rows, last_B])
        return PolicyOutput(**fields)

    def _trunk(self, model: Any, input_BS: Tensor, chunked: bool) -> Tensor:
        """Hidden states, or logits where the head cannot be taken apart."""
        if chunked:
            out: Tensor = model.base_model(input_ids=input_BS, use_cache=False).last_hidden_state
            return out
        logits: Tensor = model(input_ids=input_BS, use_cache=False).logits
        return logits

    def _value(self, hidden: Tensor) -> Tensor:
        assert self.value_head is not None, "the policy has no value head"
        value: Tensor = self.value_head(hidden.float()).squeeze(-1)
        return value

    def _heads(
        self,
        own_ND: Tensor | None,
        ref_ND: Tensor | None,
        token_N: Tensor,
        alt_u_N: Tensor | None,
        need: frozenset[str],
        temperature: float,
    ) -> Fields:
        """Run the vocabulary head over chunks of positions."""
        parts: list[Fields] = []
        for start in range(0, max(len(token_N), 1), self.head_chunk):
            span = slice(start, start + self.head_chunk)
            own, ref, alt_u = (None if x is None else x[span] for x in (own_ND, ref_ND, alt_u_N))
            args = (own, ref, token_N[span], alt_u, need, temperature)
            graph = torch.is_grad_enabled() and own is not None
            parts.append(checkpoint(self._chunk, *args, use_reentrant=False) if graph else self._chunk(*args))
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def _chunk(
        self,
        own: Tensor | None,
        ref: Tensor | None,
        token_N: Tensor,
        alt_u_N: Tensor | None,
        need: frozenset[str],
        temperature: float,
    ) -> Fields:
        fields: Fields = {}
        logp_NV = None if own is None else self._log_softmax(causal(self.model), own, temperature, self.chunked)
        ref_NV = None
        if ref is not None:
            with torch.no_grad(), self._as_reference() as reference:
                ref_NV = self._log_softmax(reference, ref, temperature, self.reference_chunked)
            if "ref_logp" in need:
                fields["ref_logp"] = ref_NV.gather(1, token_N[:, None]).squeeze(1)
        if logp_NV is None:
            return fields
        if "logp" in need:
            fields["logp"] = logp_NV.gather(1, token_N[:, None]).squeeze(1)
        if "entropy" in need:
            fields["entropy"] = -(logp_NV.exp() * logp_NV).sum(-1)
        if "kl" in need and ref_NV is not None:
            fields["kl"] = (logp_NV.exp() * (logp_NV - ref_NV)).sum(-1)
        if "kl_forward" in need and ref_NV is not None:
            fields["kl_forward"] = (ref_NV.exp() * (ref_NV - logp_NV)).sum(-1)
        if alt_u_N is not None:
            others_NV = logp_NV.detach().scatter(1, token_N[:, None], -torch.inf)
            alt_N = inverse_cdf(others_NV, alt_u_N)
            fields["alt_logp"] = logp_NV.gather(1, alt_N[:, None]).squeeze(1)
        return fields

    def _log_softmax(self, model: Any, x_ND: Tensor, temperature: float, chunked: bool) -> Tensor:
        logits_NV = model.get_output_embeddings()(x_ND) if chunked else x_ND
        logp_NV: Tensor = (widen(logits_NV) / temperature).log_softmax(-1)
        return logp_NV
