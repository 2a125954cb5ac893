"""From ``model:`` in the configuration to a causal LM and its tokenizer."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import huggingface_hub.utils.logging as hub_logging
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from rlkl import hub
from rlkl.config import FactsModel, FixModel, LoraConfig, Model, ModelSection, TinyModel


def load(config: Model, records: Sequence[dict[str, Any]], seed: int = 0) -> tuple[Any, Any, Any]:
    """The model (with its adapter, if any), a reference of its own or None, and the tokenizer.

    ``records`` are the training prompts, on whose columns ``type: tiny`` is trained; ``seed`` draws a fresh adapter.

    Raises:
        ValueError: a model cannot be loaded, or has no tokenizer; an adapter does not fit.
    """
    folder = path(config, records)
    model, tokenizer = from_folder(folder, config.dtype)
    if config.lora is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = add_adapter(model, config.lora, str(folder))
    reference = (
        None if config.reference == "initial" else from_folder(config.reference, config.dtype, "model.reference")[0]
    )
    return model, reference, tokenizer


def from_folder(path: str | Path, dtype: str = "float32", key: str = "model.path") -> tuple[Any, Any]:
    """A causal LM, or a base with a peft adapter that can go on training, and its tokenizer.

    Remote code and pickles of strangers are never run. ``key`` is what a mistake is blamed on.

    Raises:
        ValueError: there is no such folder, or it does not hold a whole model and its tokenizer.
    """
    adapted = os.path.isfile(Path(path) / "adapter_config.json")
    with _loading(path, key, "a causal LM"):
        if adapted:
            from peft import PeftConfig, PeftModel

            # Not AutoPeftModelForCausalLM: it resizes the base where the tokenizer is longer than the vocabulary.
            base = _whole(AutoModelForCausalLM, PeftConfig.from_pretrained(str(path)).base_model_name_or_path, dtype)
            model = PeftModel.from_pretrained(base, path, is_trainable=True)
        else:
            model = _whole(AutoModelForCausalLM, path, dtype)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return model, tokenizer


HEADS = ("score", "classifier")
SCORED = {
    "sequence": (AutoModelForSequenceClassification, "a sequence-classification model of one label"),
    "token": (AutoModelForTokenClassification, "a token-classification model of one label"),
}
SCORED["sentence"] = SCORED["token"]  # read at the last tokens of sentences


def reward_model(path: str | Path, key: str = "path", kind: str = "sequence") -> tuple[Any, Any]:
    """A frozen model with one score, of a sequence or a token, in its own dtype, and its tokenizer.

    Remote code and pickles of strangers are never run. ``key`` is what a mistake is blamed on.

    Raises:
        ValueError: there is no such folder, or it does not hold such a model, whole, and its tokenizer.
    """
    auto, what = SCORED[kind]
    with _loading(path, key, what):
        if (Path(path) / "adapter_config.json").is_file():
            raise ValueError("it holds an adapter; merge it into its base")
        if (made := _trained_for(path)) in SCORED and made != kind:
            raise ValueError(f"it was trained with kind={made}, and is read as {kind}")
        model = _whole(auto, path, "auto")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if model.config.num_labels != 1:
            raise ValueError(f"it has {model.config.num_labels} labels, not one score")
        if kind == "sequence" and (not hasattr(model, "score") or not hasattr(model, "base_model")):
            raise ValueError(f"{type(model).__name__} has no score head that reads the last token")
    return model.eval().requires_grad_(False), tokenizer


def _trained_for(path: str | Path) -> Any:
    """What `rlkl reward-model` made this folder for; None where another made it."""
    try:
        held = json.loads((Path(path) / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held.get("kind") if isinstance(held, dict) else None


def classifier(path: str | Path, key: str = "path") -> tuple[Any, Any]:
    """A frozen sequence-classification model of two labels or more, in its own dtype, and its tokenizer.

    Raises:
        ValueError: there is no such folder, or it does not hold such a model, whole, and its tokenizer.
    """
    with _loading(path, key, "a sequence-classification model of two labels or more"):
        model = _whole(AutoModelForSequenceClassification, path, "auto")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if model.config.num_labels < 2:
            raise ValueError("it has 1 label, which is no verdict")
    return model.eval().requires_grad_(False), tokenizer


def headed(path: str | Path, kind: str, dtype: str = "float32", key: str = "model.path") -> Any:
    """The trunk of a causal LM with a fresh head of one score, of a sequence or of every token.

    Raises:
        ValueError: there is no such folder, or it holds no such model, or an adapter.
    """
    auto, what = SCORED[kind]
    with _loading(path, key, "a causal LM"):
        if (Path(path) / "adapter_config.json").is_file():
            raise ValueError("it holds an adapter; merge it into its base (rlkl export --merge)")
        model, found = auto.from_pretrained(
            path, dtype=dtype, num_labels=1, trust_remote_code=False, output_loading_info=True
        )
        trunk = [n for n in found["missing_keys"] if n.split(".")[0] not in HEADS]
        if trunk:
            raise ValueError(f"lacks the weights {', '.join(sorted(trunk)[:3])} of {what}")
    return model


def beginner(path: str | Path, kind: str, key: str) -> tuple[Any, Any]:
    """Such a model, frozen, and its tokenizer: one that is to be given weights.

    Raises:
        ValueError: as above.
    """
    with torch.random.fork_rng():  # what its head starts from has no meaning
        model = headed(path, kind, key=key)
    with _loading(path, key, "a causal LM"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return model.eval().requires_grad_(False), tokenizer


@contextlib.contextmanager
def _loading(path: str | Path, key: str, what: str) -> Iterator[None]:
    """Loading without noise; whatever goes wrong is one line that blames ``key``."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    local = str(path).startswith((".", "~", "/")) or str(path).count("/") > 1
    if (local or (os.path.isdir(Path(path).parent) and Path(path).parent != Path())) and not os.path.isdir(path):
        raise ValueError(f"{key}={path}: no such folder; give one with {what} and its tokenizer")
    try:
        if not os.path.isdir(path) and not hub.cached(str(path)) and not hub.answers():
            raise OSError("there is no such folder here, and the Hub does not answer")
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        why = str(error).strip().splitlines()[0].split(". ")[0]
        raise ValueError(
            f"{key}={path}: cannot be loaded ({why}); "
            f"give a folder with {what} and its tokenizer, or a Hub name while online"
        ) from None


def _whole(kind: Any, path: str | Path, dtype: str) -> Any:
    model, found = kind.from_pretrained(path, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(f"lacks the weights {', '.join(sorted(found['missing_keys'])[:3])}")
    return model


def add_adapter(model: Any, config: LoraConfig, path: str, heads: Sequence[str] = ()) -> Any:
    """A fresh LoRA adapter on a frozen base; ``heads`` are modules that train whole, and have no adapter.

    Raises:
        ValueError: the model has an adapter already, or none of the targets.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(f"model.lora with model.path={path}: this folder holds an adapter, which trains on; drop lora")
    import peft

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        **({"modules_to_save": list(heads), "exclude_modules": list(heads)} if heads else {"task_type": "CAUSAL_LM"}),
    )
    if Path(path).is_dir():
        model.name_or_path = str(Path(path).resolve())  # the adapter finds its base from every folder
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        leaves = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "weight")})
        raise ValueError(
            f"model.lora.targets={targets}: {str(error).splitlines()[0]}; modules: {', '.join(leaves)}"
        ) from None


def path(config: Model, records: Sequence[dict[str, Any]]) -> str | Path:
    """Folder or Hub name of the model; an embedded one is trained first where the cache lacks it."""
    if isinstance(config, FactsModel):
        from rlkl.tasks import facts

        return facts.load_path()
    if isinstance(config, FixModel):
        from rlkl.tasks import fix_model

        return fix_model.load_path(config.says)
    if isinstance(config, TinyModel):
        return _tiny(config, records)
    return config.path


def _tiny(config: TinyModel, records: Sequence[dict[str, Any]]) -> Path:
    from rlkl.tasks import pretrain

    texts = pretrain.laid_out(config.texts, records)
    recipe = {
        **config.model_dump(mode="json", exclude=set(ModelSection.model_fields)),
        "corpus": pretrain.fingerprint(texts),
    }

    def build(folder: Path) -> None:
        plain = [text if isinstance(text, str) else "".join(text) for text in texts]
        tokenizer = pretrain.train_tokenizer(plain, config.vocabulary, context=config.context)
        model = pretrain.pretrain(
            texts,
            tokenizer,
            hidden=config.hidden,
            layers=config.layers,
            heads=config.hidden // 8 if config.hidden < 32 else 4,
            context=config.context,
            steps=config.steps,
            batch=16,
            lr=config.learning_rate,
            seed=0,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return pretrain.cached("tiny", recipe, build)


def eos_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """All ids that end a completion: those of the generation config, else of the config, else the tokenizer's."""
    for holder in (getattr(model, "generation_config", None), model.config, tokenizer):
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def ignored_sampling(model: PreTrainedModel) -> list[str]:
    """Settings of the generation config that would change what log-probs mean, and are not applied."""
    neutral = {
        "top_p": (None, 1.0),
        "top_k": (None, 0),
        "min_p": (None, 0.0),
        "typical_p": (None, 1.0),
        "temperature": (None, 1.0),
        "repetition_penalty": (None, 1.0),
        "no_repeat_ngram_size": (None, 0),
    }
    config = getattr(model, "generation_config", None)
    found = {name: getattr(config, name, None) for name in neutral}
    return [f"{name}={value}" for name, value in found.items() if value not in neutral[name]]


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read, where its config says so."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None
