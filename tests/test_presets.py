"""Presets: each trains, and has the keys that its header claims."""

import re
from pathlib import Path

import oracle
import pytest
import yaml
from conftest import Tree, metrics

import rlkl
from rlkl import settings, summary
from rlkl.config import KLConfig, dump

FOLDER = Path(__file__).parents[1] / "configs" / "presets"
PRESETS = sorted(FOLDER.glob("*.yaml"))
CLAIM = re.compile(r"^#   ([\w.]+)=(\S+)", re.M)


def claims(path: Path) -> dict[str, str]:
    return dict(CLAIM.findall(path.read_text(encoding="utf-8")))


def resolved(tree: Tree, key: str) -> str:
    for part in key.split("."):
        tree = tree[part]
    return str(tree).lower() if isinstance(tree, bool) else str(tree)


def test_the_names_that_people_search_for_are_there() -> None:
    assert [path.stem for path in PRESETS] == ["grpo", "reinforce++", "rloo"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_header_tells_what_the_configuration_resolves_to(path: Path) -> None:
    tree, said = dump(settings.load(path)), claims(path)
    assert len(said) >= 5
    assert {key: resolved(tree, key) for key in said} == said
    assert "biased in it" in path.read_text(encoding="utf-8")


def changed(path: Path) -> set[str]:
    """What a preset changes in the base; what the other trainer does not read is no change."""
    base, own = (settings.decisive(settings.load(one)) for one in (FOLDER.parent / "reinforce.yaml", path))
    unread = {"trainer.value_clip", "trainer.minibatches"}  # no preset learns a value or cuts its batches
    return {key for key in base | own if base.get(key) != own.get(key)} - unread


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_header_tells_all_that_the_method_changes(path: Path) -> None:
    assert {key for key in changed(path) if key.split(".")[0] in ("trainer", "credit", "kl")} <= claims(path).keys()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_page_tells_all_that_a_preset_changes(path: Path) -> None:
    page = (FOLDER.parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    (row,) = [line.split("|")[2] for line in page.splitlines() if line.startswith(f"| [{path.stem}]")]
    assert "constant learning\nrate of 0.0005, where that of `configs/reinforce.yaml` falls from 0.001" in page
    words = {
        "credit.baseline": "group mean|no baseline",
        "credit.normaliser": "mean over each completion",
        "credit.whiten_advantages": "whitened",
        "kl.beta": "β 0.04",
        "kl.estimator": "k3",
        "kl.placement": "in the loss",
        "rollout.prompts": r"\d+ prompts of",
        "rollout.samples_per_prompt": "of (8|one) samples?",
        "trainer.clip": "clip of 0.2",
        "trainer.epochs": "(one|two) updates? a step",
    }
    told = {"trainer.type", "optimiser.learning_rate", "optimiser.schedule"}  # the clip, and what all three change
    needed = changed(path) - told
    assert needed <= words.keys()
    assert {key for key in words if re.search(words[key], row)} == needed
    assert needed or row.strip() == "nothing else"


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_it_trains(path: Path, tiny_config: Tree) -> None:
    preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    preset |= {key: tiny_config[key] for key in ("model", "data", "rewards", "evaluate", "log")}
    rows = metrics(rlkl.train(preset, ["train.steps=1", "optimiser.warmup_steps=0", "rollout.max_new_tokens=6"]))
    assert rows[1]["policy/grad_norm"] > 0 and rows[1]["kl/sequence"] > 0


def test_what_the_headers_say_of_gradients_is_what_a_run_says() -> None:
    config = {path.stem: settings.load(path) for path in PRESETS}
    assert "forward KL" in summary.penalty(config["grpo"])
    assert summary.penalty(config["rloo"]).endswith("reverse KL of the sequence")
    assert summary.penalty(config["reinforce++"]).endswith("reverse KL of the sequence")
    with pytest.raises(ValueError, match="k3_ratio"):
        settings.load(FOLDER / "grpo.yaml", ["trainer.epochs=4"])
    settings.load(FOLDER / "grpo.yaml", ["trainer.epochs=4", "kl.estimator=k3_ratio"])


def test_rloo_is_unbiased_and_grpo_is_not() -> None:
    """Expected gradients over all batches of three samples, against the exact one, from the presets' own sections."""
    from rlkl import exact

    problem = oracle.tabular(vocab=3, length=2)
    rewards = oracle.random_rewards(problem.atoms)
    found = {}
    for name in ("rloo", "grpo"):
        config = settings.load(FOLDER / f"{name}.yaml", ["kl.beta=0.3"])
        loss = oracle.estimator_loss(problem, rewards, config.credit, config.kl)
        found[name] = -exact.estimator(problem.policy, problem.atoms, loss, samples=3).gradient
    truth = problem.gradient(problem.objective(rewards.value_BT.sum(-1), KLConfig(beta=0.3).beta))
    oracle.assert_close(found["rloo"], truth)
    assert oracle.cosine(found["grpo"], truth) < 0.99
