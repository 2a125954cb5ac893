"""The models in a run's folder: ``reference/`` and ``final/``, written and read back."""

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from rlkl import card, models
from rlkl.adapters import FROZEN, TRAINED
from rlkl.config import Config
from rlkl.policy import Policy
from rlkl.sharding import weights


def load_reference(policy: Policy, config: Config, folder: Path) -> None:
    """Give a policy, not placed yet, the reference that its run kept."""
    if config.model.reference != "initial":
        return
    if (policy.reference is not None or policy.reference_adapter) and not folder.is_dir():
        raise ValueError(f"{folder}: the reference of this run is gone; put it back, or begin anew with --overwrite")
    if policy.reference is not None:
        kept = models.from_folder(folder, config.model.dtype)[0]
        policy.reference.load_state_dict(kept.state_dict())
    elif policy.reference_adapter:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(policy.model, load_file(folder / FROZEN / "adapter_model.safetensors"), FROZEN)


def save_reference(policy: Policy, config: Config, tokenizer: Any, folder: Path, main: bool) -> None:
    """Keep the initial reference, once a run: a snapshot of the weights, a frozen adapter, or (base) nothing.

    To be called by all processes; the ``main`` one writes.
    """
    if config.model.reference != "initial" or (policy.reference is None and not policy.reference_adapter):
        return
    model = policy.reference or policy.model
    state = weights(model)
    if not main:
        return
    if policy.reference is not None:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
    else:
        model.save_pretrained(folder, selected_adapters=[FROZEN], state_dict=state)


def save_final(policy: Policy, tokenizer: Any, folder: Path, main: bool = True) -> None:
    """A folder that ``from_pretrained`` reads, or ``AutoPeftModelForCausalLM`` for an adapter; whole or not at all.

    To be called by all processes; the ``main`` one writes.
    """
    state = weights(policy.model)
    if not main:
        return
    adapted = {"selected_adapters": [TRAINED]} if policy.adapted else {}
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    policy.model.save_pretrained(new, state_dict=state, **adapted)
    tokenizer.save_pretrained(new)
    shutil.rmtree(folder, ignore_errors=True)  # an empty one, or one that a kill left without its card
    new.rename(folder)


def load_policy(run: Path, config: Config) -> tuple[Policy, Any]:
    """The final model of a run beside its reference, and the tokenizer.

    Raises:
        ValueError: the run did not finish, or its models cannot be read.
    """
    if not (run / "final").is_dir():
        raise ValueError(f"{run}: this run has no final model; it did not finish")
    model, tokenizer = models.from_folder(run / "final", config.model.dtype)
    reference: Any = "base"
    if config.model.reference != "initial":
        reference = models.from_folder(config.model.reference, config.model.dtype)[0]
    elif (run / "reference" / FROZEN).is_dir():
        model.load_adapter(run / "reference" / FROZEN, adapter_name=FROZEN)
        model.set_adapter(TRAINED)
    elif (run / "reference").is_dir():
        reference = models.from_folder(run / "reference", config.model.dtype)[0]
    return Policy(model, reference=reference, head_chunk=config.train.head_chunk), tokenizer


def export(run: Path, config: Config, folder: Path, merge: bool) -> None:
    """Copy the final model of a run elsewhere, with its adapter merged into the base if asked.

    Raises:
        ValueError: the folder is not empty or cannot be made, or there is no adapter to merge.
    """
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not empty; name a new folder")
    policy, tokenizer = load_policy(run, config)
    if merge and not policy.adapted:
        raise ValueError(f"{run}: has no adapter to merge; leave --merge out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); name another folder") from None
    if not merge:
        save_final(policy, tokenizer, folder)
        return card.write(run, folder, policy.adapted)
    policy.model.merge_and_unload(adapter_names=[TRAINED]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card.write(run, folder, adapter=False)
