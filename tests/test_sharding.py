"""Sharded parameters (``train.shard``) change no result: gradients, live runs, checkpoints and models on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Tree
from models import assert_same_gradients
from peft import LoraConfig, get_peft_model
from ranks import runs
from safetensors.torch import load_file
from test_distributed import HERE, one_and_two, torchrun
from test_processes import close, same
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

import rlkl


@pytest.fixture(scope="module")
def tied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers whose head is its embedding."""
    folder = tmp_path_factory.mktemp("tied-model")
    config = LlamaConfig.from_pretrained(tiny_model, tie_word_embeddings=True, num_hidden_layers=2)
    set_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter on it, of which a frozen copy is the reference."""
    folder = tmp_path_factory.mktemp("adapter")
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tied_model), settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tied_model).save_pretrained(folder)
    return folder


@pytest.fixture
def kinds(tiny_config: Tree, tied_model: Path, adapter: Path) -> dict[str, Tree]:
    """Five prompts for two processes, so that one has more micro-batches to decode, to score and to learn from."""
    base: Tree = {
        **tiny_config,
        "rollout": {"prompts": 5, "samples_per_prompt": 2, "max_new_tokens": 6, "micro_batch": 3},
        "train": {"steps": 4, "micro_batch": 2},
        "evaluate": {"prompts": 2, "samples_per_prompt": 2, "every": 2},
        "save": {"every": 2},
        "optimiser": {"learning_rate": 3e-3},
    }
    tied = {"type": "pretrained", "path": str(tied_model)}
    exact: Tree = {"placement": "loss", "estimator": "exact", "beta": 0.3}
    valued: Tree = {"advantage": "gae", "baseline": "value", "bootstrap_truncated": True}
    return {
        "full": base,
        "tied": {**base, "model": tied, "kl": exact, "train": {**base["train"], "gradient_checkpointing": True}},
        "value": {**base, "credit": valued, "trainer": {"type": "ppo", "epochs": 1, "minibatches": 3}},
        "critic": {**base, "model": {**tied, "critic": "separate"}, "credit": valued},
        "lora": {**base, "model": {**tied, "lora": {"rank": 2}}, "kl": exact},
        "adapter": {**base, "model": {"type": "pretrained", "path": str(adapter)}, "kl": exact},
        "dpo": {**base, "trainer": {"type": "dpo"}, "kl": {"beta": 0.5}},
    }


def sharded(tree: Tree) -> Tree:
    """The same run with its parameters in parts."""
    return {**tree, "train": {**tree["train"], "shard": True}}


def test_sharded_gradients_are_the_whole_ones(kinds: dict[str, Tree]) -> None:
    for folder in ("one", "two"):
        Path(folder).mkdir()
    for name, tree in kinds.items():
        Path(f"one/{name}.yaml").write_text(yaml.safe_dump(tree))
        Path(f"two/{name}.yaml").write_text(yaml.safe_dump(sharded(tree)))
    for one, two in one_and_two([f"one/{name}.yaml" for name in kinds], [f"two/{name}.yaml" for name in kinds]):
        assert one.keys() == two.keys()
        assert_same_gradients(two, one)


def test_sharded_runs_and_checkpoints_are_those_of_one_process(kinds: dict[str, Tree]) -> None:
    planned: list[Any] = []
    for name, tree in kinds.items():
        rlkl.train(tree, [f"name={name}-one"])
        runs([[tree, [f"name={name}-grown"], False, 4]])
        planned += [
            [sharded(tree), [f"name={name}-parts"], False, None],
            [sharded(tree), [f"name={name}-cut"], False, 4],
            [sharded(tree), [f"name={name}-cut"], True, None],
            [sharded(tree), [f"name={name}-joined"], False, 4],
            [sharded(tree), [f"name={name}-grown"], True, None],
        ]
    Path("plan.json").write_text(json.dumps(planned))
    torchrun(2, str(HERE / "ranks.py"), "runs", "plan.json")
    for name, tree in kinds.items():
        one, parts, grown = (Path("runs", f"{name}-{kind}") for kind in ("one", "parts", "grown"))
        assert [path.name for path in Path("runs", f"{name}-joined", "checkpoints").iterdir()] == ["step_2"]
        joined = rlkl.train(tree, [f"name={name}-joined"], resume=True)
        same(parts, Path("runs", f"{name}-cut"))
        for other in (parts, grown, joined):
            close(one, other)
            same_models(one, other)


def same_models(one: Path, other: Path) -> None:
    """What two runs leave on disk holds the same weights: the reference bit for bit, the final one but for rounding."""
    for folder in ("reference", "final"):
        files = sorted(path.relative_to(one) for path in (one / folder).rglob("*.safetensors"))
        assert files == sorted(path.relative_to(other) for path in (other / folder).rglob("*.safetensors"))
        assert files or folder == "reference"
        for file in files:
            ours, theirs = load_file(one / file), load_file(other / file)
            assert {k: x.dtype for k, x in ours.items()} == {k: x.dtype for k, x in theirs.items()}
            for key, x in ours.items():
                assert torch.allclose(x, theirs[key], atol=1e-3 * (folder == "final"), rtol=0), (file, key)


def test_sharding_without_a_second_process_is_refused(tiny_config: Tree) -> None:
    with pytest.raises(ValueError, match=r"train\.shard=true with 1 process.*torchrun --nproc_per_node N"):
        rlkl.train(sharded(tiny_config))
