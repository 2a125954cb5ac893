"""From ``model:`` in the configuration to a causal LM and its tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from rlkl.config import FactsModel, Model, TinyModel


def load(config: Model, records: Sequence[dict[str, Any]]) -> tuple[PreTrainedModel, Any]:
    """The model in fp32 and its tokenizer. Remote code and pickles of strangers are never run.

    ``records`` are the training prompts, on whose columns ``type: tiny`` is trained.

    Raises:
        ValueError: the model cannot be loaded, or has no tokenizer.
    """
    return from_folder(_path(config, records))


def from_folder(path: str | Path) -> tuple[PreTrainedModel, Any]:
    """A causal LM and its tokenizer from a local folder or by Hub name."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32", trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path={path}: cannot be loaded ({str(error).strip().splitlines()[0]}); "
            "give a folder with a causal LM and its tokenizer, or a Hub name while online"
        ) from None
    return model, tokenizer


def _path(config: Model, records: Sequence[dict[str, Any]]) -> str | Path:
    if isinstance(config, FactsModel):
        from rlkl.tasks import facts

        return facts.load_path()
    if isinstance(config, TinyModel):
        return _tiny(config, records)
    return config.path


def _tiny(config: TinyModel, records: Sequence[dict[str, Any]]) -> Path:
    from rlkl.tasks import pretrain

    missing = [c for c in config.texts if any(not isinstance(r.get(c), str) for r in records)]
    if missing:
        raise ValueError(f"model.texts: column {missing[0]!r} is not text in every record; name text columns")
    texts = [" ".join(r[c] for c in config.texts) for r in records]
    recipe = {**config.model_dump(mode="json"), "corpus": pretrain.fingerprint(texts)}

    def build(folder: Path) -> None:
        tokenizer = pretrain.train_tokenizer(texts, config.vocabulary)
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
        "top_k": (None, 0, 50),
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
