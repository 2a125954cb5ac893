"""The model card: valid for the Hub, and with the run's own numbers."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import Tree, metrics
from huggingface_hub import ModelCard

import rlkl
from rlkl import card, runs
from rlkl.trainers import TRAINERS


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_card_of_a_run(tiny_config: Tree, tmp_path: Path, lora: Tree | None) -> None:
    tiny_config["model"]["lora"] = lora
    run = rlkl.train(tiny_config)
    found = ModelCard.load(run / "final" / "README.md")
    assert found.data.library_name == ("peft" if lora else "transformers")
    assert found.data.base_model == Path(tiny_config["model"]["path"]).name
    assert {"rlkl", "reinforce"} <= set(found.data.tags) and ("lora" in found.data.tags) == bool(lora)
    last = metrics(run)[-1]
    assert f"{last['kl/sequence']:.3f} ± {last['kl/sequence_stderr']:.3f} |" in found.content
    assert f"{last['reward/eval/varied']:.3f} ± {last['reward/eval/varied_stderr']:.3f} |" in found.content
    for said in ("β = 0.05; k1 in the reward", "Williams (1992)", "Ziegler", "Korbak", f"rlkl {rlkl.__version__}"):
        assert said in found.content
    assert ("LoRA: low-rank" in found.content) == bool(lora)
    assert "[More Information Needed]" not in found.content
    assert str(tmp_path) not in found.content and tiny_config["model"]["path"] not in found.content
    assert (run / "final" / "curves.png").read_bytes() == (run / "curves.png").read_bytes()


def test_a_merged_export_is_a_whole_model(tiny_config: Tree) -> None:
    run = rlkl.train(tiny_config | {"model": tiny_config["model"] | {"lora": {"rank": 2}}})
    runs.export_run(run, "merged", merge=True)
    runs.export_run(run, "adapter", merge=False)
    kinds = [ModelCard.load(f"{folder}/README.md").data.library_name for folder in ("merged", "adapter")]
    assert kinds == ["transformers", "peft"]
    assert "AutoModelForCausalLM" in Path("merged/README.md").read_text(encoding="utf-8")


def test_the_configuration_in_the_card_is_complete(tiny_config: Tree) -> None:
    run = rlkl.train(tiny_config)
    text = (run / "final" / "README.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(text.split("<summary>Configuration</summary>\n\n```yaml\n")[1].split("```")[0])
    written = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    written["model"]["path"] = Path(written["model"]["path"]).name
    assert shown == written


def test_commands_lose_their_absolute_paths() -> None:
    said = card._command(["/home/me/bin/rlkl", "train", "/home/me/a b.yaml", "data.path=/home/me/q.jsonl", "kl.beta=1"])
    assert said == "rlkl train 'a b.yaml' data.path=q.jsonl kl.beta=1"
    assert card._command(["notebook.py"]) == "rlkl train config.yaml"


def test_every_objective_has_a_name() -> None:
    assert set(card.METHODS) == set(TRAINERS)


def test_importing_it_does_not_load_models() -> None:
    code = "import sys, rlkl.card; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
