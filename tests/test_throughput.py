"""benchmarks/throughput.py runs, counts the same work on both sides, and its page shows what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import throughput
from benchmarks.contestants import NAMES, PAIRS, build
from benchmarks.workload import SIZES, Meter, Workload

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def meters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Meter]:
    """What one step of each contestant did."""
    folder, seen = tmp_path_factory.mktemp("throughput"), {}
    SIZES["tiny"].model(folder / "model")
    for name in NAMES:
        contestant = build(name, SIZES["tiny"], folder)
        seconds = contestant.turn()
        assert (
            0 < sum(x for stage, x in seconds.items() if stage not in ("step", "processor")) <= seconds["step"] * 1.01
        )
        seen[name] = contestant.meter
    return seen


def test_both_sides_do_equal_work(meters: dict[str, Meter]) -> None:
    """Every row is as long as can be; trl's GRPO alone does not score the samples again before the update."""
    w = SIZES["tiny"]
    row = w.rows * (w.prompt_tokens + w.new_tokens)
    for ours, theirs in PAIRS.items():
        assert meters[ours].trained == meters[theirs].trained == row
        assert meters[ours].tokens - meters[theirs].tokens == (row if ours == "grpo" else 0)
    assert meters["reinforce"].tokens == (row - w.rows) + 3 * row  # sampled, scored by both, trained on
    assert meters["reinforce"].flops == meters["RLOOTrainer"].flops


def test_the_reference_is_asked_once_where_its_log_probs_suffice(meters: dict[str, Meter]) -> None:
    same = meters["reinforce"].tokens
    assert meters["grpo"].tokens == same  # k3 in the loss
    assert meters["dpo"].tokens <= same  # ties are left out
    assert meters["ppo"].tokens == same + 3 * SIZES["tiny"].rows * 12  # a second pass, and the exact KL in both


def test_work_is_that_of_the_formula() -> None:
    """Two rows: three tokens, then one more with a cache, then four at once with gradients; counted by hand."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    meter = Meter(Workload(8, 1, 10, 1, 2, 3, 1), [model.base_model])
    matrices = 4 * 8 * 8 + 3 * 8 * 16
    ids = torch.ones(2, 3, dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        first = 2 * 6 * matrices + 4 * 8 * 2 * (1 + 2 + 3) + 2 * 2 * 10 * 8
        assert meter.flops == first
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        assert meter.flops == first + 2 * 2 * matrices + 4 * 8 * 2 * 4 + 2 * 2 * 10 * 8
    meter.reset()
    model(input_ids=torch.ones(2, 4, dtype=torch.long), use_cache=False)
    assert meter.flops == 3 * (2 * 8 * matrices + 4 * 8 * 2 * (1 + 2 + 3 + 4) + 2 * 2 * 10 * 8)
    assert (meter.tokens, meter.trained) == (8, 8)


def test_the_command_measures_and_writes_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    words = ["--size", "tiny", "--rounds", "1", "--only", "reinforce", "RLOOTrainer", "--json", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.throughput", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reinforce / RLOOTrainer" in done.stdout
    found = json.loads(path.read_text(encoding="utf-8"))
    assert set(found["contestants"]["reinforce"]["stages"]) == set(throughput.STAGES) - {"step"}
    memory = found["contestants"]["RLOOTrainer"]["memory_mib"]
    assert memory["peak"] > memory["imports"] > 0
    assert list(tmp_path.iterdir()) == [path]


BASELINES = [p for p in sorted((ROOT / "benchmarks/baselines").glob("*.json")) if p.name != "coverage.json"]


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.name)
def test_the_page_shows_the_baseline(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert throughput.markdown(found) in (ROOT / "docs/performance.md").read_text(encoding="utf-8")
