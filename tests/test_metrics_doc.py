"""docs/metrics.md is current, and says everything that runs emit and nothing else."""

from pathlib import Path

import pytest
from conftest import Tree, write_jsonl
from taught import quick_fit
from torch import Tensor

import rlkl
from rlkl import metrics, settings, tracking
from rlkl.config import GRADIENT
from rlkl.types import Rollout

BASELINES = ("none", "batch_mean", "leave_one_out", "ema", "value", "group_norm")
ONLINE: Tree = {"schedule": "online", "every": 1}
RUNS: dict[str, Tree] = {
    **{f"baseline {name}": {"credit": {"baseline": name}} for name in BASELINES},
    **{f"{e} in the {p}": {"kl": {"placement": p, "estimator": e}} for p, e in GRADIENT},
    "gae": {"credit": {"advantage": "gae", "baseline": "value", "bootstrap_truncated": True}},
    "horizon": {"credit": {"horizon": 2}},
    "entropy": {"trainer": {"type": "reinforce", "entropy_coef": 0.1}},
    "ppo": {"trainer": {"type": "ppo", "minibatches": 2, "entropy_coef": 0.1}, "credit": {"baseline": "value"}},
    "token likelihood": {
        "trainer": {"type": "token_likelihood"},
        "rewards": {"parity": {"type": "function", "path": "test_metrics_doc:parity", "level": "token"}},
        "credit": {"horizon": 1},
        "kl": {"placement": "loss", "estimator": "exact"},
    },
    "dpo": {"trainer": {"type": "dpo"}},
    "stored completions": {
        "data": {"type": "annotated", "path": "stored.jsonl", "held_out": 0.5},
        "trainer": {"type": "token_likelihood"},
        "rewards": {"spans": {"type": "annotations", "weights": {"not so good": -1.0}}},
        "kl": {"placement": "loss", "estimator": "exact_local"},
        "rollout": {"prompts": 2, "max_new_tokens": 6},
    },
    "stored pairs": {
        "data": {"type": "pairs", "path": "pairs.jsonl", "held_out": 0.5},
        "trainer": {"type": "dpo"},
        "rewards": {},
        "rollout": {"prompts": 2, "max_new_tokens": 6},
    },
    "two sources, one whitened": {
        "rewards": {
            "parity": {"type": "function", "path": "test_metrics_doc:parity", "level": "token"},
            "varied": {"type": "function", "path": "conftest:varied", "whiten": True},
        },
    },
    "fix": {
        "model": {"type": "fix"},
        "data": {"type": "fix"},
        "rewards": {
            "cf": {"type": "counterfactual", "template_marginal": ">{x_prime}", "c_end": 0.5, "c_steps": 2}
            | {"scorer": "fix", "template_outcome": "{x_prime}?{y_prime}", "predictor": "joint", "budget": 8}
            | {"outcome": "rlkl.tasks.fix:experiment"}
        },
    },
    "a model that is taught": {
        "rewards": {
            "rm": {"type": "learned", "path": "tiny", "labeller": "taught:prefer", "budget": 12, **ONLINE},
            "varied": {"type": "function", "path": "conftest:varied", "weight": 0.0},
        },
        "rollout": {"prompts": 2, "samples_per_prompt": 4, "max_new_tokens": 6},
        "evaluate": {"prompts": 2, "samples_per_prompt": 2, "gold": "varied"},
        "train": {"steps": 3},
    },
    "beta 0": {"kl": {"beta": 0}},
    "budget": {"train": {"steps": 3, "budget": {"steps": 1}}},
    "adaptive beta": {"kl": {"target": 1.0}},
    "whitening": {"credit": {"whiten_rewards": True, "whiten_advantages": True, "centre_rewards": True}},
    "one prompt": {"evaluate": {"prompts": 1, "samples_per_prompt": 2}},
}


def parity(rollout: Rollout) -> Tensor:
    """Even tokens are good, odd ones bad."""
    return 1.0 - 2.0 * (rollout.tokens_BT % 2)


def test_every_key_of_a_run_is_documented_once_and_every_documented_key_is_emitted(tiny_config, monkeypatch):
    monkeypatch.setattr("rlkl.rewards.taught.fit", quick_fit)
    Path("tiny").symlink_to(tiny_config["model"]["path"])
    span = {"start": 0, "end": 1, "label": "not so good"}
    write_jsonl("stored.jsonl", [{"id": i, "prompt": i, "completion": "a b", "spans": [span]} for i in "abcd"])
    write_jsonl("pairs.jsonl", [{"prompt": i, "chosen": "a b", "rejected": "b a"} for i in "abcd"])
    seen = set()
    for name, change in RUNS.items():
        folder = rlkl.train({**tiny_config, **change, "name": name.replace(" ", "-")})
        keys = {key for row in tracking.read_metrics(folder) for key in row} - {"step"}
        found = {key: metrics.documented(key) for key in keys}
        assert {key: entries for key, entries in found.items() if len(entries) != 1} == {}, name
        seen |= {entries[0] for entries in found.values()}
    assert set(metrics.METRICS) == seen


def test_the_page_is_current():
    page = Path(__file__).parent.parent / "docs/metrics.md"
    assert page.read_text(encoding="utf-8") == "\n".join(metrics.page()) + "\n"


def test_every_key_has_a_unit_and_a_meaning():
    assert all(unit and meaning and not meaning.endswith(".") for unit, meaning in metrics.METRICS.values())


@pytest.mark.parametrize("name", ["total", "queries", "labels", "gold_stderr", "go/ld"])
def test_a_source_cannot_take_the_name_of_a_metric(name, tiny_config):
    source = tiny_config["rewards"]["varied"]
    with pytest.raises(ValueError, match=f"rewards.{name}: "):
        settings.load({**tiny_config, "rewards": {name: source}})
