"""What the policy wrapper must know about the models it is given: dropout, heads, adapters."""

import copy
from typing import Any

import torch
from torch import nn

TRAINED, FROZEN = "default", "reference"
"""The names of the adapter that trains, and of the frozen copy that is the reference."""


def causal(model: Any) -> Any:
    """The causal LM itself: inside a peft model, whose layers carry the adapters, or the model."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def prepare_model(model: nn.Module) -> None:
    """Switch dropout off by its probability and clear padding indices, in place.

    ``.eval()`` would also switch gradient checkpointing off; a padding index would freeze the row of a pad
    token that is also EOS.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, 0.0)


@torch.no_grad()
def head_agrees(model: Any) -> bool:
    """Whether output embedding times last hidden state gives the model's own logits.

    The head's output is amplified for the comparison: soft-capping leaves the small logits of an untrained model
    nearly as they are, and would go unnoticed.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or model.base_model is model:
        return False
    ids = _some_ids(model)
    amplified = head.register_forward_hook(lambda _module, _inputs, logits: 100 * logits)
    try:
        own = model(input_ids=ids, use_cache=False).logits
        ours = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    finally:
        amplified.remove()
    return own.shape == ours.shape and torch.allclose(own, ours, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def adapter_is_identity(model: Any) -> bool:
    """Whether switching the adapter off leaves the logits as they are, bit for bit."""
    ids = _some_ids(model)
    own = model(input_ids=ids, use_cache=False).logits
    with model.disable_adapter():
        return torch.equal(own, model(input_ids=ids, use_cache=False).logits)


def freeze_adapter_copy(model: Any) -> None:
    """Add a frozen copy of the trained adapter under the name of the reference, in place."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name=TRAINED).items()}
    model.add_adapter(FROZEN, copy.deepcopy(model.peft_config[TRAINED]))
    set_peft_model_state_dict(model, state, adapter_name=FROZEN)
    model.set_adapter(TRAINED)
    for name, parameter in model.named_parameters():
        if f".{FROZEN}." in name or name.endswith(f".{FROZEN}"):
            parameter.requires_grad_(False)


def check_adapter(model: Any) -> None:
    """Refuse an adapter on an output embedding that is tied to the input embedding.

    Raises:
        ValueError: merging or saving such an adapter would change the embeddings too.
    """
    lm = causal(model)
    tied = getattr(lm.config.get_text_config(), "tie_word_embeddings", False)
    if tied and hasattr(lm.get_output_embeddings(), "lora_A"):
        raise ValueError(
            "model.lora.targets: names the output embedding, which this model ties to its input embedding; "
            "leave it out of the targets"
        )


def check_vocabulary(model: Any, reference: Any) -> None:
    """Refuse a reference whose vocabulary is not the policy's.

    Raises:
        ValueError: the sizes differ, so that no KL between the two exists.
    """
    ours, theirs = (int(causal(m).config.get_text_config().vocab_size) for m in (model, reference))
    if ours != theirs:
        raise ValueError(f"model.reference: its vocabulary has {theirs} tokens, the policy's {ours}; they must agree")


def _some_ids(model: Any) -> torch.Tensor:
    size = int(model.config.get_text_config().vocab_size)
    return torch.arange(8, device=next(model.parameters()).device)[None] * 7919 % size
