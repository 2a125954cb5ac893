"""A reward model from its configuration: records, training, evaluation on held-out records, folder."""

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from rlkl import models, scoring, settings
from rlkl.config.reward_model import RewardModelConfig
from rlkl.reward_model import data, measure
from rlkl.reward_model.data import Row
from rlkl.reward_model.fit import fit
from rlkl.tracking import lock

EVALUATION = "evaluation.json"
TOGETHER = 32  # rows that are scored together; it changes memory, not results


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RewardModelConfig:
    """The configuration from a YAML file or a mapping, with ``key.sub=value`` overrides.

    Raises:
        ValueError: one line a mistake.
    """
    tree = settings.read(source)
    for override in overrides:
        settings.put(tree, *settings.parse(override))
    return settings.check(settings.resolve(tree), RewardModelConfig)


def train(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, overwrite: bool = False
) -> dict[str, Any]:
    """Train as the configuration says, into its folder, and return the evaluation, which the folder holds too.

    Raises:
        ValueError: a mistake in the configuration, the data or the folder; nothing was written.
        RunError: the training failed; nothing was written.
    """
    config = load(source, overrides)
    folder = Path(config.output)
    check_folder(folder, overwrite)
    learned, held = data.records(config.data, config.seed)
    base = models.path(config.model, list({row.get("prompt") or str(row["messages"]): row for row in learned}.values()))
    policy, tokenizer = models.from_folder(base, config.model.dtype)
    context = models.context_length(policy)
    if config.model.lora is not None:  # a mistake in it is told before anything is trained
        models.add_adapter(policy, config.model.lora, str(base))
    del policy
    (rows, long), (held_rows, held_long) = (
        data.rows(config.data, r, tokenizer, context, config.kind) for r in (learned, held)
    )
    if not any(any(w is not None for w in row.get("target", [0])) for row in rows):
        raise ValueError(
            "data: no token or sentence of the training records has a target; set data.unmarked, or mark some"
        )
    dropped = f"; {long + held_long} longer ones left out" if long + held_long else ""
    what = "pairs" if config.kind == "sequence" else "annotated completions"
    print(f"training on {len(rows)} {what}, {len(held_rows)} held out{dropped}", file=sys.stderr, flush=True)
    lora = None if config.model.lora is None else config.model.lora.model_dump(mode="json")
    with (
        lock(folder, "reward model", "output"),
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name,
    ):
        new = Path(name) / "model"
        new.mkdir()
        fit(
            new,
            base,
            rows,
            config.train.model_dump(mode="json"),
            kind=config.kind,
            seed=config.seed,
            lora=lora,
            dtype=config.model.dtype,
            cpu=not torch.cuda.is_available(),
        )
        counts = {"kind": config.kind, "training_rows": len(rows), "left_out": long + held_long}
        found = counts | evaluate(new, held_rows, config.kind, config.seed)
        (new / EVALUATION).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        held_config = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (new / "reward_model.yaml").write_text(held_config, encoding="utf-8")
        check_folder(folder, overwrite)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return found


def evaluate(folder: Path, rows: Sequence[Row], kind: str, seed: int) -> dict[str, Any]:
    """Measure the reward model in a folder on held-out rows.

    Raises:
        ValueError: a token model reads later tokens, or no row has a target.
    """
    model, _ = models.reward_model(folder, "output", kind)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = [row["prompt"] for row in rows]
    if kind == "sequence":
        chosen, rejected = (
            scoring.scores(model, [row[f"{side}_ids"] for row in rows], TOGETHER) for side in ("chosen", "rejected")
        )
        return measure.pairs((chosen - rejected).double().cpu().numpy(), prompts, seed)
    scoring.check_causal(model, rows[0]["ids"])
    scores = scoring.token_scores(model, [row["ids"] for row in rows], TOGETHER)
    known = [(s, w, row["prompt"]) for score_T, row in zip(scores, rows, strict=True)
             for s, w in zip(score_T.tolist(), row["target"], strict=True) if w is not None]  # fmt: skip
    if not known:
        raise ValueError(
            "data: no token or sentence of the held-out records has a target; set data.unmarked, or hold out others"
        )
    score_N, target_N, groups = zip(*known, strict=True)
    return measure.tokens(np.array(score_N), np.array(target_N), groups, seed, f"{kind}s")


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, before anything is done.

    Raises:
        ValueError: the folder is not empty and may not be replaced, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={folder}: is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"output={folder}: not empty; name another, or pass --overwrite")
    if not (folder / EVALUATION).is_file():
        raise ValueError(f"output={folder}: not empty and no reward model of ours; --overwrite replaces those only")


def table(found: Mapping[str, Any]) -> Any:
    """An evaluation as a rich table."""
    from rich.table import Table

    shown = Table(title=f"on {found['records']} held-out records", title_justify="left")
    for column, side in (("", "left"), ("value", "right"), ("95 % interval", "right")):
        shown.add_column(column, justify=side)  # type: ignore[arg-type]
    for name, value in found.items():
        if isinstance(value, float):
            low_high = found["interval"].get(name)
            around = "" if low_high is None else f"{low_high[0]:.3f} to {low_high[1]:.3f}"
            shown.add_row(name.replace("_", " "), f"{value:.3f}", around)
    for b in found.get("bins", []):
        shown.add_row(f"  {b['pairs']} pairs of confidence {b['confidence']:.3f}", f"{b['accuracy']:.3f}", "right")
    return shown
