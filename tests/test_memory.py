"""The memory estimate of ``--dry-run``: exact counts, and a peak that real tensors reach."""

import subprocess
import sys
import weakref
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import Tree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlkl import memory, models, settings, summary
from rlkl.config import LoraConfig
from rlkl.policy import Policy
from rlkl.sampling import given
from rlkl.types import Rollout

SIZES = {"vocab_size": 4000, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
ROWS, PROMPT, LENGTH = 4, 40, 88


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with its config.json and nothing else."""
    Qwen2Config(**SIZES, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def config(path: Path, model: Tree | None = None, **sections: Tree):
    tree: Tree = {
        "name": "memory",
        "model": {"type": "pretrained", "path": str(path), **(model or {})},
        "data": {"type": "jsonl", "path": "none.jsonl", "max_prompt_tokens": PROMPT},
        "rewards": {"mine": {"type": "function", "path": "mine:score"}},
        "trainer": {"type": "reinforce"},
        "rollout": {"prompts": 2, "samples_per_prompt": ROWS // 2, "max_new_tokens": LENGTH},
        "evaluate": {"prompts": 2, "samples_per_prompt": 2},
        "train": {"head_chunk": 64},
    }
    return settings.load(tree | {name: tree.get(name, {}) | section for name, section in sections.items()})


def counts(model) -> tuple[int, int]:
    every = list(model.parameters())
    return sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4), LoraConfig(rank=2, targets=["q_proj"])])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_exactly(tmp_path, tied, lora):
    made = Qwen2Config(**SIZES, tie_word_embeddings=tied)
    made.save_pretrained(tmp_path)
    real = Qwen2ForCausalLM(made)
    if lora is not None:
        real = models.add_adapter(real, lora, "here")
    found = memory.estimate(config(tmp_path, {"lora": lora and lora.model_dump()}))
    assert (found.parameters, found.trained) == counts(real)
    assert found.held[0].bytes == 4 * found.parameters


def test_an_adapter_folder_counts_base_and_adapter(tmp_path, folder):
    real = models.add_adapter(Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder)), LoraConfig(rank=4), "here")
    real.peft_config["default"].base_model_name_or_path = str(folder)
    real.save_pretrained(tmp_path / "adapter")
    found = memory.estimate(config(tmp_path / "adapter"))
    assert (found.parameters, found.trained) == counts(real)
    assert {p.name: p.bytes for p in found.held}["reference"] == 4 * found.trained


def test_what_is_held(folder):
    full = {p.name: p.bytes for p in memory.estimate(config(folder)).held}
    size = full["weights"]
    assert full == {"weights": size, "reference": size, "gradients": size, "Adam states": 2 * size}
    half = memory.estimate(config(folder, {"dtype": "bfloat16", "lora": {"rank": 4}}))
    held = {p.name: p.bytes for p in half.held}
    assert held["weights"] == 2 * (half.parameters - half.trained) + 4 * half.trained  # adapters are float32
    assert held["gradients"] == 4 * half.trained and "reference" not in held


def test_a_value_head_and_a_critic_of_its_own_are_counted(folder):
    plain = memory.estimate(config(folder)).parameters
    assert memory.estimate(config(folder, credit={"baseline": "value"})).parameters == plain + 65
    both = memory.estimate(config(folder, {"critic": "separate"}, credit={"baseline": "value"}))
    assert both.parameters == 2 * plain + 65  # the embeddings are tied, so the trunk is the whole model


class Peak(TorchDispatchMode):
    """Bytes of the live tensors that were made while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.most = 0

    def _drop(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata)
        self.most = max(self.most, self.now)
        return out


@pytest.mark.parametrize(
    ("model", "sections", "need"),
    [
        ({}, {}, {"logp"}),
        ({}, {"kl": {"placement": "loss", "estimator": "exact"}}, {"logp", "ref_logp", "kl"}),
        ({"lora": {"rank": 4}, "dtype": "bfloat16"}, {}, {"logp"}),
        ({"lora": {"rank": 4}}, {"train": {"gradient_checkpointing": True, "head_chunk": 64}}, {"logp"}),
    ],
)
def test_the_peak_is_that_of_real_tensors(folder, model, sections, need):
    """Within 10 % below and 30 % above; it is dominated by parts that are counted, not guessed."""
    cfg = config(folder, model, **sections)
    torch.manual_seed(0)
    with Peak() as peak:
        lm = Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder)).to(getattr(torch, cfg.model.dtype))
        if cfg.model.lora is not None:
            lm = models.add_adapter(lm, cfg.model.lora, "here")
        if cfg.train.gradient_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        policy = Policy(lm, head_chunk=cfg.train.head_chunk).train()
        optimiser = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
        rollout = full_rollout()
        for _ in range(2):  # the second step finds Adam's states
            peak.most = peak.now
            out = policy(rollout, need)
            sum(out.get(f"{name}_BT").sum() for name in need - {"ref_logp"}).backward()
            del out
            optimiser.step()
            optimiser.zero_grad()
        with torch.no_grad():
            policy(rollout, {"kl", "entropy"})
    assert 0.9 * peak.most < memory.estimate(cfg).peak < 1.3 * peak.most


def full_rollout() -> Rollout:
    completions = torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH)).tolist()
    return given([[0] * PROMPT] * ROWS, completions, group_B=torch.arange(ROWS) // 2)


def test_the_kv_cache_is_that_of_the_model(folder):
    real = Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder))
    cache = real(input_ids=torch.zeros(ROWS, PROMPT + LENGTH, dtype=torch.long), use_cache=True).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.estimate(config(folder)).stages["sampling"][0].bytes == size


def test_chunks_and_micro_batches_change_the_peak(folder):
    def peak(**sections: Tree) -> int:
        return memory.estimate(config(folder, **sections)).peak

    assert peak(train={"head_chunk": 512}) > peak() > peak(train={"micro_batch": 1, "head_chunk": 64})


def test_the_dry_run_shows_the_table(folder):
    size = counts(Qwen2ForCausalLM(Qwen2Config.from_pretrained(folder)))[0]
    shown = summary.describe(config(folder))
    assert f"# memory:      {size:,} parameters, {size:,} of them trained\n#   all the time  weights " in shown
    assert " GiB  4 x 128 tokens" in shown


@pytest.mark.parametrize(
    ("path", "why"), [("./none/here", "no such folder"), ("some-body/some-model", "its config.json cannot be read")]
)
def test_one_line_says_why_there_is_no_estimate(path, why, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (line,) = memory.lines(config(Path(path) if path[0] != "." else path))
    assert line.startswith(f"not worked out: model.path={path}: ") and why in line


def test_embedded_models_have_no_estimate():
    tree = {"name": "m", "model": {"type": "facts"}, "data": {"type": "facts"}, "trainer": {"type": "reinforce"}}
    cfg = settings.load(tree | {"rewards": {"mine": {"type": "function", "path": "mine:score"}}})
    assert memory.lines(cfg) == ["not worked out for model.type=facts, a small model of its own"]


def test_another_reference_is_counted_from_its_own_configuration(folder, tmp_path):
    other = LlamaConfig(**{**SIZES, "num_hidden_layers": 1})
    other.save_pretrained(tmp_path / "other")
    found = memory.estimate(config(folder, {"reference": str(tmp_path / "other")}))
    assert {p.name: p.bytes for p in found.held}["reference"] == 4 * counts(LlamaForCausalLM(other))[0]


def test_importing_it_does_not_import_torch():
    code = "import sys, rlkl.summary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_numbers_in_the_configuration_of_the_half_billion_model(tmp_path):
    """Its dimensions, as its own config.json has them; no weights are needed."""
    Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path)
    path = Path(__file__).parents[1] / "configs/models/qwen2.5-0.5b.yaml"
    table = memory.lines(settings.load(path, [f"model.path={tmp_path}"]))
    said = [line.removeprefix("#   ").strip() for line in path.read_text().splitlines() if line.startswith("#   ")]
    assert [line.strip() for line in table] == said[: len(table)]


def test_what_sharding_divides_is_said(folder: Path) -> None:
    plain, shared = (memory.lines(config(folder, train={"head_chunk": 64, "shard": shard})) for shard in (False, True))
    assert shared[:-1] == plain
    assert "train.shard: what is held all the time is divided" in shared[-1]
