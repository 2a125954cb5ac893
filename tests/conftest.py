"""Shape checks on every public tensor function, one thread a process, and a tiny model to run on."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

with install_import_hook(["rlkl.kl", "rlkl.credit", "rlkl.losses", "rlkl.exact"], "beartype.beartype"):
    import rlkl.credit
    import rlkl.exact
    import rlkl.kl
    import rlkl.losses  # noqa: F401

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from rlkl.tasks.pretrain import train_tokenizer

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # begun in a shell's background, which processes inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A small model reads a few short lines.",
    "Feedback arrives a token at a time.",
]
RECORDS = [{"prompt": f"Line {n}:", "gold": f"answer {n}"} for n in range(8)]
CONTEXT = 64

Tree = dict[str, Any]


def varied(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that differs between random completions: the share of letters."""
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


@pytest.fixture(scope="session", autouse=True)
def no_dashboards_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever a test logs stays in a folder of its own, and no account is found. trackio reads its folder once."""
    folder = tmp_path_factory.mktemp("dashboards")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("WANDB_", "TRACKIO_"))]:
            patch.delenv(name)
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("WANDB_CONFIG_DIR", str(folder))
        patch.setenv("WANDB_CACHE_DIR", str(folder))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("NETRC", str(folder / "netrc"))
        yield


def random_llama(tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of one layer that reads as much as its tokenizer."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained Llama of one layer; some of its completions end by EOS, some at the limit."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = train_tokenizer(SENTENCES, 270, context=CONTEXT)
    model = random_llama(tokenizer, 0)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def foreign_model(folder: Path, text: str, vocabulary: int) -> Path:
    """Writes a random Llama whose tokenizer, made of the sentences and a text, is no other model's here."""
    tokenizer = train_tokenizer([*SENTENCES * 4, text], vocabulary, context=128)
    random_llama(tokenizer, 3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random reward model of one layer over the same tokenizer."""
    return reward_model(tiny_model, tmp_path_factory.mktemp("tiny-reward-model"))


def reward_model(base: Path, folder: Path, **changes: Any) -> Path:
    """The trunk of ``base`` with a random score head, and its tokenizer, in ``folder``."""
    set_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, **{"num_labels": 1, **changes})
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_config(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A run of two steps on the tiny model, with its prompts in the test's own folder, which is the working one."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("prompts.jsonl", RECORDS)
    return {
        "name": "tiny",
        "model": {"type": "pretrained", "path": str(tiny_model)},
        "data": {"type": "jsonl", "path": "prompts.jsonl", "held_out": 0.25},
        "rewards": {"varied": {"type": "function", "path": "conftest:varied"}},
        "trainer": {"type": "reinforce"},
        "rollout": {"prompts": 2, "samples_per_prompt": 2, "max_new_tokens": 6},
        "optimiser": {"learning_rate": 1e-2},
        "train": {"steps": 2},
        "evaluate": {"prompts": 2, "samples_per_prompt": 2},
        "log": {"with": []},
    }


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built, without the network, from a copy of the working tree."""
    for tool in ("pip", "setuptools"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed, so no wheel can be built")
    copy = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("rlkl", "trainers", "rewards", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist", "."]
    built = subprocess.run([sys.executable, "-m", "pip", *words], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return path


def write_jsonl(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a JSONL file."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics(run: Path) -> list[Tree]:
    """The rows of a run's metrics.jsonl, without their times, which differ between two equal runs."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: x for name, x in row.items() if not name.startswith("time/")} for row in rows]
