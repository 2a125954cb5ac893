"""What a run needs in memory, from its configuration and the model's config.json alone: no weights, no data.

Parameters are counted on the meta device, so they are exact. What the backward pass keeps is counted too: a forward
on fake tensors has every shape and no numbers. The vocabulary head and the decode step are arithmetic. All of it is
for one process and without the allocator's overhead.

Torch is imported by the functions that need it.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkl.config import Config, LoraConfig, PretrainedModel

GIB = 2**30
ASSUMED_PROMPT = 512  # tokens, where data.max_prompt_tokens does not say
# Arrays of float32 [chunk, V] that live at once in the vocabulary head; tests/test_memory.py measures the whole.
HEAD_ARRAYS = {"log-probs": 4, "whole distributions": 7, "evaluation": 6}
DECODE_BYTES = 4 + 3 * 8  # a next-token probability: float32 log-probs; float64 probabilities, their sums, a copy


@dataclass(frozen=True)
class Part:
    """One line of the table."""

    name: str
    bytes: int
    why: str = ""


@dataclass(frozen=True)
class Memory:
    """An estimate for one process: what is held all the time, and stages that take turns."""

    parameters: int
    trained: int
    held: list[Part]
    stages: dict[str, list[Part]]

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(p.bytes for p in self.held) + max(sum(p.bytes for p in parts) for parts in self.stages.values())

    def lines(self) -> Iterator[str]:
        """A table in GiB."""
        yield f"{self.parameters:,} parameters, {self.trained:,} of them trained"
        for title, parts in {"all the time": self.held, **self.stages}.items():
            for number, part in enumerate(parts):
                shown = title if number == 0 else ""
                yield f"  {shown:<12}  {part.name:<24} {part.bytes / GIB:8.2f} GiB  {part.why}".rstrip()
        yield f"  {'peak':<12}  {'':<24} {self.peak / GIB:8.2f} GiB  an estimate; leave 1 to 2 GiB beside it"


def lines(config: Config) -> list[str]:
    """The estimate of a run for ``--dry-run``, or one line that says why there is none."""
    if not isinstance(config.model, PretrainedModel):
        return [f"not worked out for model.type={config.model.type}, a small model of its own"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers and peft, about their own names
        try:
            table = list(estimate(config).lines())
        except ValueError as error:
            return [f"not worked out: {error}"]
    shared = "  train.shard: what is held all the time is divided by the number of processes"
    return [*table, shared] if config.train.shard else table


def estimate(config: Config) -> Memory:
    """The memory of a run whose model is ``type: pretrained``.

    Raises:
        ValueError: the model's configuration cannot be read, or an adapter does not fit.
    """
    assert isinstance(config.model, PretrainedModel)
    model = empty_model(config.model.path, config.model.dtype, config.model.lora)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    every = list(model.parameters())
    trained = [p for p in every if p.requires_grad]
    weights, learned = _bytes(every), _bytes(trained)
    reference, why = _reference(config, model, base)
    held = [Part("weights", weights, config.model.dtype)]
    if reference:
        held.append(Part("reference", reference, why))
    count, extra = _count(every), _count(trained)
    if config.credit.needs_value:
        critic = list(base.base_model.parameters()) if config.model.critic == "separate" else []
        head = base.config.get_text_config().hidden_size + 1
        held.append(Part("value", _bytes(critic) + 4 * head, f"critic: {config.model.critic}"))
        count, extra = count + _count(critic) + head, extra + _count(critic) + head
        learned += held[-1].bytes
    held.append(Part("gradients", learned))
    held.append(Part("Adam states", 2 * learned))
    stages = {**_stages(config, model, base), "step": [Part("AdamW at work", learned, "at most")]}
    return Memory(count, extra, held, stages)


def empty_model(path: str, dtype: str, lora: LoraConfig | None = None) -> Any:
    """A causal LM on the meta device, with its adapter if it has one: shapes without storage.

    Raises:
        ValueError: its configuration cannot be read, or the adapter does not fit.
    """
    import huggingface_hub.utils.logging as hub_logging
    import peft
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from rlkl.models import add_adapter

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if (Path(path) / "adapter_config.json").is_file():
        settings = peft.PeftConfig.from_pretrained(path)
        settings.inference_mode = False
        if lora is not None:
            raise ValueError(f"model.lora with model.path={path}: this folder holds an adapter; drop lora")
        base = empty_model(str(settings.base_model_name_or_path), dtype)
        with init_empty_weights():
            return peft.get_peft_model(base, settings)
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(found, dtype=getattr(torch, dtype), trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
        why = "no such folder" if path.startswith((".", "~")) or path.count("/") > 1 else why
        raise ValueError(f"model.path={path}: its config.json cannot be read ({why})") from None
    model.tie_weights()  # placing parameters on the meta device one by one unties them
    if lora is None:
        return model
    with init_empty_weights():
        return add_adapter(model, lora, path)


def kept_for_backward(model: Any, rows: int, length: int, bf16: bool = False) -> int:
    """Bytes that the trunk keeps for the backward pass of ``rows`` sequences, counted on fake tensors.

    The model's parameters are replaced by fake ones, so it is good for nothing else afterwards.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    sizes: dict[int, tuple[Any, int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        own = {t.untyped_storage()._cdata for t in _materialise(model)}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                sizes[storage._cdata] = (storage, storage.nbytes())  # held, so that no other takes its address
            return tensor

        base = model.get_base_model() if hasattr(model, "peft_config") else model
        model.train()
        ids_BS = torch.zeros(rows, length, dtype=torch.long)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            base.base_model(input_ids=ids_BS, use_cache=False)
    return sum(size for _, size in sizes.values())


def _materialise(model: Any) -> list[Any]:
    """Give meta tensors a fake place on the CPU, in place; tied ones stay tied."""
    import torch

    made: dict[int, Any] = {}
    for module in list(model.modules()):
        named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in named:
            if id(tensor) not in made:
                fake = torch.empty_like(tensor, device="cpu")
                parameter = isinstance(tensor, torch.nn.Parameter)
                made[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if parameter else fake
            setattr(module, name, made[id(tensor)])
    return list(made.values())


def _stages(config: Config, model: Any, base: Any) -> dict[str, list[Part]]:
    text, train, rollout = base.config.get_text_config(), config.train, config.rollout
    batch, evaluated = rollout.prompts * config.samples, config.evaluate.prompts * config.evaluate.samples_per_prompt
    length, bf16 = _prompt(config, text) + rollout.max_new_tokens, train.mixed_precision == "bf16"
    rows = min(train.micro_batch, batch)
    kept = kept_for_backward(model, rows, length, bf16)
    layer, why = kept // text.num_hidden_layers, f"{rows} x {length} tokens"
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        kept = kept_for_backward(model, rows, length, bf16)
    if config.credit.needs_value and config.model.critic == "separate":
        kept *= 2
    activations = Part("activations", kept, why)
    again = [activations, Part("one layer again", layer)] if train.gradient_checkpointing else []
    whole = "exact" in config.kl.estimator or getattr(config.trainer, "entropy_coef", 0) > 0
    drawn = max(0 if config.offline else min(rollout.micro_batch, batch), min(4 * train.micro_batch, evaluated))
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * drawn * length * text.num_hidden_layers * heads * size * (2 if bf16 else base.dtype.itemsize)

    def head(arrays: int) -> Part:
        positions = min(train.head_chunk, rows * rollout.max_new_tokens)
        shown = f"{arrays} x {positions} positions x {text.vocab_size} tokens"
        return Part("vocabulary head", arrays * 4 * positions * text.vocab_size, shown)

    return {
        "sampling": [
            Part("KV cache", cache, f"{drawn} x {length} tokens x {text.num_hidden_layers} layers"),
            Part("next tokens", DECODE_BYTES * drawn * text.vocab_size, f"{drawn} x {text.vocab_size} tokens"),
        ],
        "training": [activations, head(HEAD_ARRAYS["whole distributions" if whole else "log-probs"])],
        "or": again,
        "evaluation": [head(HEAD_ARRAYS["evaluation"])],
    }


def _reference(config: Config, model: Any, base: Any) -> tuple[int, str]:
    if config.model.reference != "initial":
        other = empty_model(config.model.reference, config.model.dtype)
        return _bytes(other.parameters()), config.model.reference
    if not hasattr(model, "peft_config"):
        return _bytes(base.parameters()), "a frozen copy"
    if config.model.lora is not None:
        return 0, ""
    return _bytes(p for p in model.parameters() if p.requires_grad), "a frozen copy of the adapter"


def _prompt(config: Config, text: Any) -> int:
    """The longest prompt in tokens: as configured, or else an assumed length that fits the context."""
    asked = getattr(config.data, "max_prompt_tokens", None)
    context = getattr(text, "max_position_embeddings", None) or ASSUMED_PROMPT + config.rollout.max_new_tokens
    return int(asked or max(min(ASSUMED_PROMPT, context - config.rollout.max_new_tokens), 1))


def _count(parameters: list[Any]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
