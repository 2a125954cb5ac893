"""Two gloo processes equal one with the same global batch."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import Tree, metrics, varied
from models import assert_same_gradients
from ranks import gradients
from safetensors.torch import load_file

import rlkl
from rlkl import launch

HERE = Path(__file__).parent
ROOT = HERE.parent


def torchrun(processes: int, *arguments: str) -> str:
    """Standard output of a script or module under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-3000:]
    return done.stdout


def one_and_two(ours: Sequence[str], theirs: Sequence[str] = ()) -> list[tuple[Any, Any]]:
    """The gradients of each configuration on one process and on two; ``theirs`` where two have others."""
    for folder in ("one", "two"):
        Path(folder).mkdir(exist_ok=True)
    gradients("one", ours)
    torchrun(2, str(HERE / "ranks.py"), "gradients", "two", *(theirs or ours))
    names = [f"{Path(path).stem}.safetensors" for path in ours]
    return [(load_file(f"one/{name}"), load_file(f"two/{name}")) for name in names]


def of_one_prompt(prompts: list[str], completions: list[str]) -> list[float]:
    """Differs between the samples of one prompt alone, so that all others tie."""
    return [x * (prompt == "Line 1:") for prompt, x in zip(prompts, varied(prompts, completions), strict=True)]


OBJECTIVES: dict[str, Tree] = {
    "leave_one_out": {},
    "batch_statistics": {
        "credit": {
            "baseline": "batch_mean",
            "centre_rewards": True,
            "whiten_rewards": True,
            "whiten_advantages": True,
            "normaliser": "token_mean",
        }
    },
    "gae": {"credit": {"advantage": "gae", "baseline": "value", "bootstrap_truncated": True}},
    "exact_kl": {"kl": {"placement": "loss", "estimator": "exact", "beta": 0.3}},
    "ppo": {
        "trainer": {"type": "ppo", "epochs": 1, "minibatches": 3},
        "credit": {"advantage": "gae", "baseline": "value"},
    },
    "dpo": {"trainer": {"type": "dpo"}, "rollout": {"samples_per_prompt": 4}},
    "dpo_with_pairs_on_one_process_alone": {
        "trainer": {"type": "dpo"},
        "rewards": {"varied": {"type": "function", "path": "test_distributed:of_one_prompt"}},
        "rollout": {"samples_per_prompt": 6},
    },
    "lora": {"model": {"lora": {"rank": 2, "alpha": 4}}},
    "counterfactual": {
        "rewards": {"cf": {"type": "counterfactual", "c": 0.5, "template_marginal": "Line:{x_prime}"}},
    },
}


def test_the_gradient_of_two_processes_is_that_of_one(tiny_config: Tree, tiny_reward_model: Path) -> None:
    tiny_config["rollout"]["prompts"] = 5  # 2 and 3 a process
    tiny_config["train"] = {"steps": 1, "micro_batch": 2}  # 2 and 3 micro-batches a process
    learned: Tree = {"rewards": {"rm": {"type": "learned", "path": str(tiny_reward_model), "weight": 0.3}}}
    objectives = OBJECTIVES | {"learned": learned}
    for name, sections in objectives.items():
        tree = {**tiny_config, **{k: {**tiny_config.get(k, {}), **v} for k, v in sections.items()}}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(tree))
    for one, two in one_and_two([f"{name}.yaml" for name in objectives]):
        assert one.keys() == two.keys()
        assert_same_gradients(two, one)


def test_five_live_steps_of_two_processes_give_the_metrics_of_one(tiny_config: Tree, tmp_path: Path) -> None:
    tiny_config["rollout"]["prompts"] = 3
    tiny_config["train"]["steps"] = 5
    tiny_config["evaluate"]["every"] = 2
    tiny_config["kl"] = {"beta": 0.1, "target": 0.5}
    Path("config.yaml").write_text(yaml.safe_dump(tiny_config))
    out = torchrun(2, "-m", "rlkl", "train", "config.yaml", "name=two")
    assert out.count("eval @ 0") == 1  # the main process alone speaks
    one = metrics(rlkl.train(tiny_config, ["name=one"]))
    two = metrics(tmp_path / "runs" / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(6))
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("section", ["rollout", "evaluate"])
def test_every_process_needs_a_prompt(section: str, tiny_config: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_config[section]["prompts"] = 1
    pair = SimpleNamespace(num_processes=2, distributed_type=launch.DistributedType.MULTI_CPU)
    monkeypatch.setattr(launch, "Accelerator", lambda **_: pair)
    with pytest.raises(ValueError, match=rf"{section}\.prompts=1 with 2 processes"):
        rlkl.train(tiny_config)


@pytest.mark.parametrize("kind", [launch.DistributedType.FSDP, launch.DistributedType.DEEPSPEED])
def test_sharding_by_accelerate_is_refused(kind: str, tiny_config: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(num_processes=2, distributed_type=kind)
    monkeypatch.setattr(launch, "Accelerator", lambda **_: made)
    with pytest.raises(ValueError, match=r"rlkl shards by itself.*set train\.shard=true"):
        rlkl.train(tiny_config)


class Parent:
    """A launcher with a command line."""

    def __init__(self, *words: str) -> None:
        self.words = list(words)

    def parent(self) -> "Parent":
        return self

    def cmdline(self) -> list[str]:
        return self.words


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "rlkl"), 2),
        (("python", "/bin/accelerate", "launch", "--num-processes=3", "-m", "rlkl"), 3),
        (("python", "/bin/torchrun", "--nproc_per_node", "4", "-m", "rlkl"), 4),
        (("bash", "-c", "something --num_processes 2"), None),
    ],
)
def test_fewer_processes_than_asked_for_are_noticed(
    words: tuple[str, ...], asked: int | None, monkeypatch: pytest.MonkeyPatch, tiny_config: Tree
) -> None:
    monkeypatch.setattr(launch.psutil, "Process", lambda: Parent(*words))
    assert launch.asked_processes() == asked
    warning = launch.mismatch(launch.accelerator(rlkl.settings.load(tiny_config)))
    assert (
        warning is None if asked is None else (warning is not None and f"{asked} processes were asked for" in warning)
    )


def test_two_runs_do_not_share_a_folder(tiny_config: Tree) -> None:
    from rlkl.tracking import claim

    folder = Path("runs/tiny")
    with claim(folder, overwrite=True, main=True), pytest.raises(ValueError, match="another run is writing to it"):
        rlkl.train(tiny_config, overwrite=True)
    assert not folder.exists()
    assert rlkl.train(tiny_config).is_dir()
