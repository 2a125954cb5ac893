"""Finished runs, read back: samples and evaluations of their final model."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlkl import artefacts, checkpoint, models, moved, pairs, rewards, settings
from rlkl.config import Config, TableData
from rlkl.data import stored
from rlkl.data.prompts import PromptSet, records
from rlkl.evaluate import evaluate
from rlkl.policy import Policy
from rlkl.sampling import sample


def open_run(run: str | Path) -> tuple[Config, Policy, Any]:
    """Configuration, final policy with its reference, and tokenizer of a run.

    Raises:
        ValueError: the folder is no run, or the run did not finish.
    """
    return (config := read_config(run)), *artefacts.load_policy(Path(run), config)


def read_config(run: str | Path) -> Config:
    """The configuration of a run.

    Raises:
        ValueError: the folder is no run.
    """
    path = Path(run) / "config.yaml"
    if not os.path.isfile(path):
        raise ValueError(f"{run}: not a run (no config.yaml); give a folder that rlkl train wrote")
    return settings.load(path)


def evaluate_run(run: str | Path, prompts: int | None, samples: int | None, seed: int | None) -> dict[str, float]:
    """The metrics of :func:`rlkl.evaluate.evaluate` for a run's final model, on its own held-out prompts.

    Where the run learned from stored completions, with what moved on the held-out ones.
    """
    config, policy, tokenizer = open_run(run)
    held = _held_out(config, policy.model, tokenizer)
    eos_ids, reward = models.eos_ids(policy.model, tokenizer), rewards.build(config.rewards)
    rewards.check(reward, tokenizer)
    reward.bind(policy)
    reward.load_state_dict(checkpoint.load_rewards(Path(run) / "rewards"))
    reward.at(config.train.steps)
    asked = stored.asked(held) if config.offline else held
    values = evaluate(
        policy,
        rewards.judges(reward) if config.offline else reward,
        asked.take(range(min(prompts or config.evaluate.prompts, len(asked.ids)))),
        samples_per_prompt=samples or config.evaluate.samples_per_prompt,
        max_new_tokens=config.rollout.max_new_tokens,
        eos_ids=eos_ids,
        stop=config.rollout.stop,
        seed=config.seed if seed is None else seed,
        micro_batch=config.train.micro_batch,
    ).metrics
    if config.offline:
        data, rows = stored.maker(config, tokenizer, eos_ids)(held.records), config.train.micro_batch
        paired = data.pair_B is not None
        values |= pairs.measure(policy, data, config.kl.beta, rows) if paired else {}
        values |= {} if paired else moved.measure(policy, moved.stored(data), rows)
    return values


def sample_run(run: str | Path, given: Sequence[str], prompts: int, samples: int, seed: int) -> Iterator[str]:
    """Completions of the given prompts, or of the run's first held-out ones, a printable block a prompt."""
    config, policy, tokenizer = open_run(run)
    chat = bool(given) and _chats(config)
    asked = [{"messages": [{"role": "user", "content": t}]} if chat else {"prompt": t} for t in given]
    chosen = _held_out(config, policy.model, tokenizer, asked)
    chosen = stored.asked(chosen) if config.offline and not given else chosen
    rollout = sample(
        policy,
        chosen.take(range(len(given) or min(prompts, len(chosen.ids)))),
        samples_per_prompt=samples,
        max_new_tokens=config.rollout.max_new_tokens,
        eos_ids=models.eos_ids(policy.model, tokenizer),
        stop=config.rollout.stop,
        seed=seed,
        step=0,
    )
    texts = rollout.texts()
    for start in range(0, len(texts), samples):
        yield f"prompt: {rollout.columns['prompt'][start]}"
        yield from (f"  {i + 1}: {text}" for i, text in enumerate(texts[start : start + samples]))


def export_run(run: str | Path, folder: str | Path, merge: bool) -> None:
    """Copy the final model of a run to a new folder; ``merge`` folds its adapter into the base."""
    artefacts.export(Path(run), read_config(run), Path(folder), merge)


def _held_out(config: Config, model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]] | None = None) -> PromptSet:
    """The held-out prompts of a run, or ``rows`` in their place."""
    context, length = models.context_length(model), config.rollout.max_new_tokens
    if rows:
        return PromptSet.tokenise(rows, tokenizer, config.seed, context, length)
    held = records(config.data, config.seed)[1]
    return PromptSet.tokenise(held, tokenizer, config.seed, context, length, config.data)


def _chats(config: Config) -> bool:
    """Whether the run's prompts are conversations."""
    if isinstance(config.data, TableData):
        return "messages" in config.data.columns
    return config.offline and "messages" in records(config.data, config.seed)[0][0]
