"""Tiny random causal LMs of real architectures, rollouts on them, and their log-probs computed the naive way.

The naive way reads only a model's own logits: one row at a time, in eval mode, without any padding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlkl.policy import Policy
from rlkl.types import End, Rollout

VOCAB, HIDDEN, EOS = 67, 32, 5
CHUNKED = ("gpt2", "llama", "qwen2")
WHOLE = ("gemma2", "granite")  # soft-capped and scaled logits: no output embedding times hidden states
ARCHITECTURES = CHUNKED + WHOLE
PROMPTS = ([7, 11, 3, 8], [9], [12, 4, EOS, 20, 33, 41, 2], [64, 30])
COMPLETIONS = ([21, 6, 50, 13, EOS], [2, 17, 18], [EOS], [40, 41, 42, 43, 44, 45])

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
_LLAMA = {"intermediate_size": 48, "num_key_value_heads": 2, "attention_dropout": 0.3}


def config(name: str, **changes: Any) -> Any:
    """The configuration of a two-layer model, with dropout wherever the architecture has some."""
    if name == "gpt2":
        drop = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
        return GPT2Config(**{**_COMMON, **drop, **changes})
    if name == "llama":
        return LlamaConfig(**{**_COMMON, **_LLAMA, "tie_word_embeddings": False, **changes})
    if name == "qwen2":
        return Qwen2Config(**{**_COMMON, **_LLAMA, "tie_word_embeddings": True, **changes})
    if name == "gemma2":  # one layer of two sees only the last 3 tokens
        own = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 3, "final_logit_softcapping": 2.0}
        return Gemma2Config(**{**_COMMON, **_LLAMA, **own, **changes})
    assert name == "granite", name
    own = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.5}
    return GraniteConfig(**{**_COMMON, **_LLAMA, **own, **changes})


def build(name: str, seed: int = 0, noise: float = 0.1, **changes: Any) -> PreTrainedModel:
    """A model in fp32 with seeded random weights, norms and biases included, in eval mode as from disk."""
    classes = {
        "gpt2": GPT2LMHeadModel,
        "llama": LlamaForCausalLM,
        "qwen2": Qwen2ForCausalLM,
        "gemma2": Gemma2ForCausalLM,
        "granite": GraniteForCausalLM,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = classes[name](config(name, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
    return model.eval()


def make_policy(name: str, **options: Any) -> Policy:
    """A policy with a reference of its own, so that no KL is zero."""
    return Policy(build(name, 0), reference=build(name, 1), **options)


def make_rollout(
    prompts: Sequence[Sequence[int]] = PROMPTS,
    completions: Sequence[Sequence[int]] = COMPLETIONS,
    *,
    temperature: float = 1.0,
    wider: int = 0,
    fill: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Rollout:
    """Rows of different lengths, padded on the right by ``wider`` more positions than needed, with ``fill``."""

    def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(row) for row in rows) + wider
        return torch.tensor([[*row] + [fill] * (width - len(row)) for row in rows]), torch.tensor([*map(len, rows)])

    prompt_BP, prompt_length_B = padded(prompts)
    tokens_BT, length_B = padded(completions)
    mask_BT = torch.arange(tokens_BT.shape[1]) < length_B[:, None]
    return Rollout(
        prompt_BP=prompt_BP,
        prompt_length_B=prompt_length_B,
        tokens_BT=tokens_BT,
        length_B=length_B,
        policy_mask_BT=mask_BT,
        end_B=torch.tensor([int(End.EOS if row[-1] == EOS else End.LIMIT) for row in completions]),
        group_B=torch.arange(len(prompts)),
        sample_id_B=torch.arange(len(prompts)),
        behaviour_logp_BT=-torch.rand(tokens_BT.shape, dtype=dtype) * mask_BT,
        temperature=temperature,
        columns={"prompt": [str(row) for row in prompts]},
    )


def next_logp(model: Any, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probs ``[L, V]`` of the next token before every token of the completion."""
    assert not model.training
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
    first = len(prompt) - 1
    return (logits[first : first + len(completion)].to(torch.float32) / temperature).log_softmax(-1)


def naive(
    model: Any,
    reference: Any,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    completions: Sequence[Sequence[int]] = COMPLETIONS,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """What ``Policy`` promises, ``[B, T]`` with zeros beyond every completion's length."""
    width = max(len(row) for row in completions)
    columns: dict[str, list[Tensor]] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        own = next_logp(model, prompt, completion, temperature)
        with torch.no_grad():
            ref = next_logp(reference, prompt, completion, temperature)
        at = torch.arange(len(completion)), torch.tensor([*completion])
        found = {
            "logp": own[at],
            "ref_logp": ref[at],
            "entropy": -(own.exp() * own).sum(-1),
            "kl": (own.exp() * (own - ref)).sum(-1),
            "kl_forward": (ref.exp() * (ref - own)).sum(-1),
        }
        for key, value in found.items():
            columns.setdefault(key, []).append(torch.nn.functional.pad(value, (0, width - len(completion))))
    return {key: torch.stack(rows) for key, rows in columns.items()}


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of ``loss`` in every parameter of ``model``; every one must receive some."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every parameter's gradient within ``tolerance`` of the largest entry of any of them."""
    assert actual.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3, "nothing to compare with"
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).abs().max()) <= tolerance * scale, name
