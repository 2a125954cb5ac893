"""Whole runs of two processes: they are those of one, they go on after an interruption, and fail as one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Tree, metrics, write_jsonl
from ranks import runs
from test_distributed import HERE, ROOT, torchrun

import rlkl
from rlkl import checkpoint

STEPS = 5
MARKS: Tree = {
    "rewards": {"marks": {"type": "annotations", "labeller": "ranks:vowels", "weights": {"good": 1, "bad": -1}}},
    "trainer": {"type": "token_likelihood", "loss": "npo"},
    "kl": {"placement": "loss", "estimator": "exact"},
}
STORED: Tree = {
    "data": {"type": "annotated", "path": "stored.jsonl", "held_out": 0.25},
    "rewards": {"spans": {"type": "annotations", "weights": {"good": 1, "bad": -1}}},
    "trainer": {"type": "token_likelihood"},
    "kl": {"placement": "loss", "estimator": "exact_local", "beta": 0.1},
    "rollout": {"prompts": 3, "max_new_tokens": 6},
}
PAIRS: Tree = {
    "data": {"type": "pairs", "path": "pairs.jsonl", "held_out": 0.25},
    "rewards": {},
    "trainer": {"type": "dpo"},
    "kl": {"beta": 0.5},
    "rollout": {"prompts": 3, "max_new_tokens": 6},
}
VALUED: Tree = {"credit": {"advantage": "gae", "baseline": "value"}}
KINDS: dict[str, Tree] = {
    "reinforce": {"credit": {"baseline": "ema"}, "kl": {"beta": 0.3, "target": 0.5}},
    "ppo": {**VALUED, "trainer": {"type": "ppo", "epochs": 2, "minibatches": 2}},
    "critic": {**VALUED, "trainer": {"type": "ppo"}, "model": {"critic": "separate"}},
    "likelihood": MARKS,
    "dpo": {"trainer": {"type": "dpo"}, "rollout": {"prompts": 3, "samples_per_prompt": 4, "max_new_tokens": 6}},
    "lora": {"model": {"lora": {"rank": 2}}},
    "stored": STORED,
    "pairs": PAIRS,
}


@pytest.fixture
def config(tiny_config: Tree) -> Tree:
    """Five steps, a checkpoint every other one, an evaluation every third; three prompts for two processes."""
    return {
        **tiny_config,
        "rollout": {**tiny_config["rollout"], "prompts": 3},
        "train": {"steps": STEPS, "micro_batch": 4},
        "evaluate": {**tiny_config["evaluate"], "every": 3, "prompts": 2},
        "save": {"every": 2},
        "optimiser": {"learning_rate": 3e-3},
    }


def kinds(config: Tree) -> dict[str, Tree]:
    """Runs of all kinds, and the data that some of them need."""
    spans = [{"start": 0, "end": 1, "label": "bad"}, {"start": 2, "end": 3, "label": "good"}]
    texts = ["abc", "abcd"] * 4
    rows = [{"id": str(n), "prompt": f"P{n}:", "completion": text, "spans": spans} for n, text in enumerate(texts)]
    write_jsonl("stored.jsonl", rows)
    write_jsonl("pairs.jsonl", [{"prompt": f"P{n}:", "chosen": " a" * (1 + n % 3), "rejected": " b"} for n in range(8)])
    added = ("model", "credit")
    return {
        name: {**config, **{k: {**config.get(k, {}), **v} if k in added else v for k, v in more.items()}}
        for name, more in KINDS.items()
    }


def close(one: Path, other: Path) -> None:
    """Two runs have the same metrics but for rounding."""
    ours, theirs = metrics(one), metrics(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert [k for k in a if a[k] is None] == [k for k in b if b[k] is None]
        a, b = ({k: x or 0.0 for k, x in row.items()} for row in (a, b))
        assert a == pytest.approx(b, rel=5e-4, abs=2e-5, nan_ok=True), (one, a["step"])


def same(one: Path, other: Path) -> None:
    """Two runs have the same metrics, samples and weights, bit for bit."""
    assert metrics(one) == metrics(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    for path in (one / "final").glob("*.safetensors"):
        assert path.read_bytes() == (other / "final" / path.name).read_bytes()


def test_every_trainer_runs_and_resumes_on_two_processes_as_on_one(config: Tree) -> None:
    trees, cut = kinds(config), STEPS - 1
    planned: list[Any] = []
    for name, tree in trees.items():
        rlkl.train(tree, [f"name={name}-one"])
        runs([[tree, [f"name={name}-one-two"], False, cut]])
        planned += [
            [tree, [f"name={name}-two"], False, None],
            [tree, [f"name={name}-cut"], False, cut],
            [tree, [f"name={name}-cut"], True, None],
            [tree, [f"name={name}-two-one"], False, cut],
            [tree, [f"name={name}-one-two"], True, None],
        ]
    Path("plan.json").write_text(json.dumps(planned))
    torchrun(2, str(HERE / "ranks.py"), "runs", "plan.json")
    for name, tree in trees.items():
        one, two = Path("runs", f"{name}-one"), Path("runs", f"{name}-two")
        assert metrics(one)[-1]["policy/grad_norm"] > 1e-4
        same(two, Path("runs", f"{name}-cut"))
        close(one, two)
        close(one, rlkl.train(tree, [f"name={name}-two-one"], resume=True))
        close(one, Path("runs", f"{name}-one-two"))


class Pair:
    """``rlkl train config.yaml`` as two processes of torchrun."""

    def __init__(self, *words: str, fate: str = "-1 0 none") -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1", "FATE": fate}
        self.process = subprocess.Popen(
            [*command, "-m", "rlkl", "train", "config.yaml", *words],
            env=os.environ | paths,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def said(self) -> list[str]:
        """What rlkl told its user, once torchrun has ended; nobody's traceback is in it."""
        _, error = self.process.communicate(timeout=120)
        assert "/rlkl/" not in error, error
        return re.findall(r"^rlkl: .*", error, re.M)


def test_a_process_that_dies_ends_the_others_with_one_message_and_a_usable_checkpoint(config: Tree) -> None:
    config["rewards"] = {"varied": {"type": "function", "path": "ranks:fated"}}
    config["train"]["steps"] = 6
    config["save"] = {"every": 1}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    whole, folder = Pair("name=whole"), Path("runs/tiny")
    assert whole.said() == []

    (line,) = Pair(fate="1 4 raise").said()
    assert line.startswith("rlkl: step 3: reward varied: ") and "the labeller left" in line and "error.txt" in line
    assert checkpoint.steps(folder) == [2] and "the labeller left" in (folder / "error.txt").read_text()

    *_, line = Pair("--resume", fate="1 3 exit").said()  # it told nothing, so the other may have promised to finish
    assert line.startswith("rlkl: another process of this run ended; go on with --resume")
    assert checkpoint.steps(folder) == [3]

    pair = Pair("--resume", fate="-1 0 sleep")
    until = time.monotonic() + 60
    while checkpoint.steps(folder) != [4]:
        assert pair.process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    pair.process.send_signal(signal.SIGTERM)
    finishing, stopped = pair.said()
    assert "finishing the step" in finishing and "stopped after step 5; go on with --resume" in stopped
    assert checkpoint.steps(folder) == [5] == [metrics(folder)[-1]["step"]]

    assert Pair("--resume").said() == []
    same(Path("runs/whole"), folder)


def test_a_mistake_that_all_processes_find_is_told_once(config: Tree) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(config))
    (line,) = Pair("kl.betta=1").said()
    assert "kl.betta: unknown key" in line
