"""Training of reward models, in a process of its own (see `rlkl.tasks.pretrain`): ``python -m rlkl.reward_model.fit``.

Sequence models learn from pairs by trl's ``RewardTrainer`` (Bradley and Terry 1952): with scores s of chosen and
rejected,

    L = -mean log sigmoid(s(x, y_chosen) - s(x, y_rejected)).

Token models learn the weights of annotated tokens by regression, over all tokens n of a batch that have one (sentence
models have one at the last token of every sentence, see `rlkl.data.sentences`):

    L = mean_n (s_n - w_n)^2,      s_n a function of the tokens up to n.

Its minimum is s_n = E[w_n | tokens up to n]: a score in the units of the weights, and graded where they are.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlkl import RunError, models
from rlkl.adapters import prepare_model
from rlkl.config import LoraConfig
from rlkl.tasks.pretrain import run_apart


def fit(
    folder: Path,
    base: str | Path,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    kind: str = "sequence",
    seed: int = 0,
    lora: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    cpu: bool = True,
) -> None:
    """Train on ``rows`` (see `rlkl.reward_model.data`) and save model and tokenizer in ``folder``.

    ``settings`` are those of :class:`rlkl.config.reward_model.FitConfig`. With ``cpu``, on one thread, equal arguments
    give equal weights; else on what the process finds, and with its progress shown on a terminal.

    Raises:
        RunError: the training failed; the message holds its last line.
    """
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    base = Path(base).resolve() if Path(base).is_dir() else base  # the process apart has another working directory
    names = ("chosen_ids", "rejected_ids") if kind == "sequence" else ("ids", "target")
    job = {"base": str(base), "settings": dict(settings), "kind": kind, "seed": seed, "dtype": dtype, "cpu": cpu}
    with tempfile.TemporaryDirectory() as name:
        Dataset.from_list([{n: row[n] for n in names} for row in rows]).save_to_disk(f"{name}/rows")
        shown = not cpu and sys.stderr.isatty()
        job |= {"lora": None if lora is None else dict(lora), "shown": shown}
        (Path(name) / "job.json").write_text(json.dumps(job))
        try:
            run_apart("rlkl.reward_model.fit", Path(name), folder.resolve(), cpu=cpu, shown=shown)
        except RuntimeError as error:
            raise RunError(f"the reward model could not be trained: {str(error).strip().splitlines()[-1]}") from error


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Annotated completions as a batch, padded on the right; targets that are none are NaN."""
    ids = [torch.tensor(row["ids"]) for row in rows]
    targets = [torch.tensor([torch.nan if w is None else w for w in row["target"]]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(targets, batch_first=True, padding_value=torch.nan),
    }


def regression(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """``mean_n (s_n - w_n)^2`` over the tokens with a target; 0 where a batch has none."""
    score_BS = outputs["logits"].squeeze(-1).float()
    known_BS = ~labels.isnan()
    error_BS: Tensor = (score_BS - labels.nan_to_num()) ** 2 * known_BS
    return error_BS.sum() / known_BS.sum().clamp(min=1)


def _train(job_folder: Path, folder: Path) -> None:
    """Train as a job says and save the model, adapters merged, with its tokenizer."""
    from datasets import load_from_disk
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoTokenizer, set_seed

    job = json.loads((job_folder / "job.json").read_text())
    disable_progress_bar()
    set_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["base"], trust_remote_code=False)
    model = models.headed(job["base"], job["kind"], job["dtype"])
    rows = load_from_disk(str(job_folder / "rows"))
    if job["lora"] is not None:
        heads = [name for name in models.HEADS if hasattr(model, name)]
        model = models.add_adapter(model, LoraConfig(**job["lora"]), job["base"], heads=heads)
    trainer = _pairwise if job["kind"] == "sequence" else _tokenwise
    trainer(model, tokenizer, rows, _arguments(job, job_folder, len(rows))).train()
    if not all(x.isfinite().all() for x in model.parameters()):
        raise ValueError(
            f"weights are not finite after it with learning_rate={job['settings']['learning_rate']:g}; lower it"
        )
    if job["lora"] is not None:
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _arguments(job: Mapping[str, Any], folder: Path, count: int) -> dict[str, Any]:
    """What both trainers are told about ``count`` rows; they report to nobody and save nothing."""
    s = job["settings"]
    updates = s["epochs"] * -(-count // s["batch"])
    return {
        "output_dir": str(folder),
        "num_train_epochs": s["epochs"],
        "per_device_train_batch_size": s["batch"],
        "learning_rate": s["learning_rate"],
        "weight_decay": s["weight_decay"],
        # below one: a share of all steps, rounded up; an only one would be of the warm-up, whose first rate is 0
        "warmup_steps": s["warmup"] if updates > 1 else 0,
        "lr_scheduler_type": "constant_with_warmup" if s["schedule"] == "constant" else s["schedule"],
        "seed": job["seed"],
        "bf16": False,
        "use_cpu": job["cpu"],
        "disable_tqdm": not job["shown"],
        "gradient_checkpointing": False,
        "report_to": "none",
        "push_to_hub": False,
        "logging_strategy": "no",
        "save_strategy": "no",
    }


def _pairwise(model: Any, tokenizer: Any, rows: Any, arguments: dict[str, Any]) -> Any:
    """trl's trainer. The models of transformers find a row's end by its pad token, which must occur in no row."""
    from trl import RewardConfig, RewardTrainer

    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        used = {i for row in rows for ids in (row["chosen_ids"], row["rejected_ids"]) for i in ids}
        free = next((i for i in range(len(tokenizer)) if i not in used), None)
        if free is None:
            raise ValueError("its tokenizer has no pad token, and all its tokens occur in the pairs")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free)
    config = RewardConfig(max_length=None, **arguments)
    return RewardTrainer(model, config, train_dataset=rows, processing_class=tokenizer)


def _tokenwise(model: Any, tokenizer: Any, rows: Any, arguments: dict[str, Any]) -> Any:
    from transformers import Trainer, TrainingArguments

    prepare_model(model)
    config = TrainingArguments(remove_unused_columns=False, **arguments)
    return Trainer(model, config, collate, rows, compute_loss_func=regression)


if __name__ == "__main__":
    _train(Path(sys.argv[1]), Path(sys.argv[2]))
