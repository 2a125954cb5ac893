"""The reward model of `facts`: trained from the labeller's preferences between samples of the base model.

Two samples of a training prompt are compared by `facts.prefer`; ties are left out. The base model with a score head
learns from these pairs as every reward model does (`rlkl.reward_model.fit`). The prompts that `facts` holds out are
held out here too: on pairs of theirs its accuracy is measured.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlkl.tasks import facts
from rlkl.tasks.pretrain import cached, no_progress_bars

RECIPE: dict[str, Any] = {
    "samples": 64,  # of each of the 96 training prompts, compared two by two
    "max_new_tokens": 64,
    "epochs": 6,
    "batch": 16,
    "lr": 1e-3,
    "warmup": 0.1,  # share of all steps
    "seed": 0,
}

Pair = dict[str, list[int]]


def load_path() -> Path:
    """Return the folder of the reward model and its tokeniser; the first call trains them, in about a minute."""
    base = facts.load_path()

    def build(folder: Path) -> None:
        train_reward_model(folder, base, **RECIPE)

    return cached("facts-reward", {"base": base.name, **RECIPE}, build)


def train_reward_model(
    folder: Path,
    base: Path,
    *,
    samples: int,
    max_new_tokens: int,
    epochs: int,
    batch: int,
    lr: float,
    warmup: float,
    seed: int,
) -> dict[str, float]:
    """Train a reward model into `folder` and return its accuracy on held-out pairs, with the counts of pairs.

    They are also written, as `preferences.json`. Equal arguments give equal weights.
    """
    from rlkl.reward_model.fit import fit

    train = preferences(base, "train", samples, max_new_tokens, seed)
    held_out = preferences(base, "eval", samples, max_new_tokens, seed)
    print(
        f"training the reward model of facts on {len(train)} preferences, on one CPU thread: about a minute",
        file=sys.stderr,
        flush=True,
    )
    settings = {"epochs": epochs, "batch": batch, "learning_rate": lr, "warmup": warmup}
    fit(folder, base, train, {**settings, "schedule": "cosine", "weight_decay": 0.0}, seed=seed)
    found = {"accuracy": accuracy(folder, held_out), "held_out_pairs": len(held_out), "training_pairs": len(train)}
    (folder / "preferences.json").write_text(json.dumps(found, indent=2))
    print(
        f"it agrees with the labeller on {found['accuracy']:.1%} of {len(held_out)} held-out pairs",
        file=sys.stderr,
        flush=True,
    )
    return found


def preferences(base: Path, split: str, samples: int, max_new_tokens: int, seed: int) -> list[Pair]:
    """Return the pairs of a split as token ids: prompt, completion and one EOS, `chosen_ids` and `rejected_ids`.

    Samples 2i and 2i+1 of a prompt are compared; a tie is no pair. Every comparison is a query of the labeller.
    """
    from rlkl import models
    from rlkl.data.prompts import PromptSet
    from rlkl.policy import Policy
    from rlkl.sampling import sample

    with no_progress_bars():
        model, tokenizer = models.from_folder(base)
    rows = [record for record in facts.prompts() if record["split"] == split]
    found = PromptSet.tokenise(rows, tokenizer, seed, models.context_length(model), max_new_tokens)
    ends = models.eos_ids(model, tokenizer)
    rollout = sample(
        Policy(model),
        found.take(range(len(rows))),
        samples_per_prompt=samples,
        max_new_tokens=max_new_tokens,
        eos_ids=ends,
        seed=seed,
        step=0,
    )
    texts, ids = rollout.texts(), rollout.completion_ids()
    judged = [
        [*prompt, *(y[:-1] if y[-1] in ends else y), tokenizer.eos_token_id]
        for prompt, y in zip((p for p in found.ids for _ in range(samples)), ids, strict=True)
    ]
    pairs = []
    for i in range(0, len(texts), 2):
        better = facts.prefer(texts[i], texts[i + 1])
        if better:
            pairs.append({"chosen_ids": judged[i + better - 1], "rejected_ids": judged[i + 2 - better]})
    return pairs


def accuracy(folder: Path, pairs: Sequence[Pair]) -> float:
    """Return the share of pairs whose chosen side the reward model in `folder` scores higher."""
    from rlkl import models, scoring

    model, _ = models.reward_model(folder)
    chosen, rejected = (
        scoring.scores(model, [pair[side] for pair in pairs], 64) for side in ("chosen_ids", "rejected_ids")
    )
    return float((chosen > rejected).float().mean())
