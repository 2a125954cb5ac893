"""Tiny language models from scratch: a byte-level tokeniser, a small Llama, and a cache folder for both.

Training runs in a process of its own. `transformers.Trainer` resets accelerate's process-wide state (a
caller's `Accelerator` would lose its precision and device), reseeds the global generators and joins the
process group that a launcher announces. Apart, on one CPU thread, it does none of this to its caller and gives
the same weights however the caller was started.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from rlkl.config.templates import fields

EOS, PAD = "<eos>", "<pad>"
OPTIMISATION: dict[str, Any] = {
    "optim": "adamw_torch",
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "warmup_steps": 0.05,  # below one: a share of all steps
    "lr_scheduler_type": "cosine",
}
FLOPS_PER_SECOND = 5e10  # of one CPU thread on such small matrices; only for the announced duration
LAUNCHERS = (  # prefixes of the variables by which torchrun, accelerate and MPI announce a process group
    *("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "ACCELERATE_"),
    *("PMI_", "OMPI_", "MV2_"),
)

Document = str | tuple[str, str]


def train_tokenizer(texts: Sequence[str], vocab_size: int, *, context: int = 1024) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE with the special tokens `<eos>` and `<pad>` and no start token.

    Few or short texts may give fewer than `vocab_size` tokens; `len(tokenizer)` is the true number. `context`
    is the tokeniser's `model_max_length`, in tokens.

    Raises:
        ValueError: `vocab_size` is below 258 (256 bytes and two special tokens).
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size}: a byte-level vocabulary needs at least {smallest} tokens")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def laid_out(asked: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[Document]:
    """Documents from columns of records: joined by a space, or laid out by templates, which hold braces.

    A template's document is what stands before its last placeholder, and the text of the latter.

    Raises:
        ValueError: a column is not text in every record; a template has no placeholder at its end.
    """
    templates = [template for template in asked if "{" in template]
    names = [name for t in templates for name in fields("model.texts", t)] if templates else asked
    if templates and (len(templates) < len(asked) or not all(fields("model.texts", t) for t in templates)):
        raise ValueError(f"model.texts={list(asked)}: columns, or templates that end in {{a column}}; use one kind")
    if missing := [c for c in names if any(not isinstance(r.get(c), str) for r in records)]:
        raise ValueError(f"model.texts: column {missing[0]!r} is not text in every record; name text columns")
    if not templates:
        return [" ".join(r[c] for c in asked) for r in records]
    made: list[Document] = []
    for template in templates:
        last = fields("model.texts", template)[-1]
        before = template[: template.rindex("{")]
        made += [(before.format_map(r), r[last]) for r in records]
    return made


def pretrain(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden: int,
    layers: int,
    heads: int,
    context: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> LlamaForCausalLM:
    """Train a Llama from scratch in fp32 on one CPU thread; the same arguments give the same weights.

    A document is a text or a (prompt, completion) pair, whose halves are tokenised apart, as they are when a
    completion is sampled. It ends in `<eos>`, and the loss is the mean over all real tokens of a batch.
    Documents longer than `context` tokens are cut into pieces of that length; `batch` counts pieces a step, in
    an order that is shuffled anew in each epoch.

    Raises:
        ValueError: no document holds a token.
        RuntimeError: the training process failed; the message ends with what it wrote.
    """
    pieces = [piece for document in documents for piece in _pieces(document, tokenizer, context)]
    if not pieces:
        raise ValueError("documents: nothing to train on, at least one must hold a token")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,  # LoRA on a tied head would train the embeddings too
    )
    weights = 2 * len(tokenizer) * hidden + layers * 12 * hidden**2
    tokens = steps * batch * sum(map(len, pieces)) / len(pieces)
    seconds = 8 + 6 * weights * tokens / FLOPS_PER_SECOND
    print(
        f"training a Llama of {weights / 1e6:.2f} M parameters for {steps} steps on one CPU thread: "
        f"about {seconds:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        job = {"pieces": pieces, "steps": steps, "batch": batch, "lr": lr, "seed": seed}
        (folder / "job.json").write_text(json.dumps(job))
        run_apart("rlkl.tasks.pretrain", folder)
        with no_progress_bars():
            return LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def cached(name: str, recipe: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Return the cache folder of a recipe; where it is missing, `build` fills it first.

    The folder is `<cache>/<name>-<fingerprint>` under `$RLKL_CACHE`, or else under the user's cache folder.
    `build` writes into an empty folder beside it, which is renamed when complete: a build that fails or is
    killed leaves no half model, and of two builders at once the first to finish wins. `recipe` must hold all
    that decides the result (hyper-parameters and the `fingerprint` of the corpus); it is kept as `recipe.json`.
    """
    recipe = {**recipe, "optimisation": OPTIMISATION}
    root = Path(os.environ.get("RLKL_CACHE") or platformdirs.user_cache_dir("rlkl"))
    folder = root / f"{name}-{fingerprint(recipe)[:16]}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=root) as temporary:
        part = Path(temporary) / "part"
        part.mkdir()
        with no_progress_bars():
            build(part)
        (part / "recipe.json").write_text(json.dumps(recipe, indent=2, sort_keys=True))
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # anything but another builder having been faster
                raise
    return folder


def fingerprint(value: object) -> str:
    """Return the SHA-256, in hexadecimal, of a value's canonical JSON.

    Raises:
        TypeError: the value cannot be written as JSON.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _pieces(document: Document, tokenizer: PreTrainedTokenizerFast, context: int) -> list[list[int]]:
    """Tokenise one document, close it with `<eos>`, and cut it; a lone token at the end is left out."""
    parts = (document,) if isinstance(document, str) else document
    ids = [token for part in parts for token in tokenizer(part, verbose=False)["input_ids"]]
    ids.append(tokenizer.eos_token_id)
    return [ids[start : start + context] for start in range(0, len(ids) - 1, context)]


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence transformers' bars for loading and saving."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def run_apart(module: str, *folders: Path, cpu: bool = True, shown: bool = False) -> None:
    """Run a module on folders, the first of which holds its job, in a process that sees no launcher.

    With ``cpu`` it sees one CPU thread and no GPU either. With ``shown`` it writes to this terminal.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}
    if cpu:
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    command = [sys.executable, "-m", module, *map(str, folders)]
    heard: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": None if shown else subprocess.PIPE}
    done = subprocess.run(command, cwd=folders[0], env=environment, text=True, **heard)
    if done.returncode:
        said = "" if shown else f":\n{done.stderr[-2000:]}"
        raise RuntimeError(f"the training process failed (exit {done.returncode}){said}")


def _train(folder: Path) -> None:
    """Train the model that a job folder describes and save it in the folder's `model`."""
    job = json.loads((folder / "job.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    set_seed(job["seed"])
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        learning_rate=job["lr"],
        seed=job["seed"],
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        **OPTIMISATION,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model, arguments, collator, [{"input_ids": piece} for piece in job["pieces"]]).train()
    model.save_pretrained(folder / "model")


if __name__ == "__main__":
    _train(Path(sys.argv[1]))
