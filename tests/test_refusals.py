"""Keys that nothing would read, true where a number belongs, and the steps that CI itself runs, as configurations."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import Tree

from rlkl import RunError, cli, models, settings, train
from rlkl.config import KLConfig
from rlkl.grid import plan

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("credit.lambda=0.5", "lambda=0.5 with advantage=returns: only gae reads it"),
        ("credit.ema_decay=0.5", "ema_decay=0.5 with baseline=leave_one_out: only ema reads it"),
        ("trainer.value_coef=0.5", "trainer.value_coef=0.5 with credit.baseline=leave_one_out: no value is learned"),
        ("kl.beta=true", "kl: beta=true: this key takes no true or false"),
        ("train.steps=true", "train: steps=true: this key takes no true or false"),
        ("data.held_out=true", "data: held_out=true: this key takes no true or false"),
        ("optimiser.warmup_steps=9", "optimiser.warmup_steps=9 with train.steps=2"),
        ("name=..", "name"),
    ],
)
def test_what_would_be_ignored_or_misread_is_refused(override: str, message: str, tiny_config: Tree) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settings.load(tiny_config, [override])


def test_a_configuration_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="3: a configuration is the path of a YAML file or a mapping"):
        train(3)  # type: ignore[arg-type]


def test_the_quickstart_of_ci_is_a_valid_configuration() -> None:
    (line,) = re.findall(r"rlkl compare (.*)", (ROOT / ".ci" / "run").read_text())
    path, *overrides = [word for word in shlex.split(line) if not word.startswith("--")]
    runs = plan.make(ROOT / path, overrides).runs
    assert len(runs) == 3 and all(run.config.train.steps < 10 for run in runs)


@pytest.mark.parametrize("path", ["CONTRIBUTING.md", "README.md"])
def test_the_files_that_a_page_names_exist(path: str) -> None:
    named = re.findall(r"`((?:rlkl|trainers|rewards|configs|docs|tests)/[\w./-]+)`", (ROOT / path).read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def lines(prompts: list[str], completions: list[str]) -> list[float]:
    raise ValueError("line one\nline two")


def leaves(prompts: list[str], completions: list[str]) -> list[float]:
    raise SystemExit(7)


@pytest.mark.parametrize(
    ("function", "said"), [("lines", "ValueError: line one line two"), ("leaves", "SystemExit: 7")]
)
def test_a_reward_that_fails_ends_the_run_in_one_line(
    function: str, said: str, tiny_config: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config["rewards"] = {"broken": {"type": "function", "path": f"test_refusals:{function}"}}
    with pytest.raises(RunError):
        train(tiny_config)
    import yaml

    Path("config.yaml").write_text(yaml.safe_dump(tiny_config))
    assert cli.main(["train", "config.yaml", "name=again"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert said in line and "error.txt" in line
    assert Path("runs/again/error.txt").is_file()


@pytest.mark.parametrize(
    ("keys", "horizon", "rule"),
    [
        ({}, None, "reverse KL of the sequence"),
        ({}, 2, "reverse KL of the next 2 tokens where a scored token is in reach"),
        ({"window": "own"}, None, "local"),
        ({"window": "same"}, 3, "reverse KL of the next 3 tokens"),
        ({"placement": "loss", "estimator": "k3"}, None, "forward KL"),
    ],
)
def test_the_rule_that_is_printed_is_the_one_in_force(keys: Tree, horizon: int | None, rule: str) -> None:
    assert KLConfig(**keys).gradient(horizon).startswith(rule)


def test_a_mistake_is_blamed_on_the_key_that_was_given(tiny_config: Tree) -> None:
    tiny_config["model"]["reference"] = "/nowhere"
    with pytest.raises(ValueError, match=r"model\.reference=/nowhere: no such folder"):
        train(tiny_config)


def test_a_missing_folder_below_one_that_exists_is_no_hub_name(tiny_config: Tree) -> None:
    Path("m").mkdir()
    with pytest.raises(ValueError, match=r"model\.path=m/nope: no such folder"):
        models.from_folder("m/nope")


def test_an_adapter_is_read_back_as_it_was_and_from_anywhere(
    tiny_config: Tree, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the tokenizer is longer than the vocabulary, and the base was named by a relative path."""
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, "base")
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.add_tokens(["<never>"])
    tokenizer.save_pretrained("base")
    tiny_config["model"] = {"type": "pretrained", "path": "base", "lora": {"rank": 2, "alpha": 4}}
    run = train(tiny_config).resolve()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    model, found = models.from_folder(run / "final")
    assert len(found) == model.config.vocab_size + 1 == model.get_input_embeddings().weight.shape[0] + 1


def test_saved_datasets_take_whole_splits(tiny_config: Tree) -> None:
    import datasets

    from rlkl.config import DatasetsData
    from rlkl.data.sources import _load

    rows = datasets.Dataset.from_list([{"prompt": f"p{i}"} for i in range(6)])
    rows.save_to_disk("one")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk("both")
    assert len(_load(DatasetsData(type="datasets", path="one"), "train")) == 6
    for path, split in (("one", "train[:2]"), ("one", "test"), ("both", "train[:2]")):
        with pytest.raises(ValueError, match="slice"):
            _load(DatasetsData(type="datasets", path=path), split)


def test_conv1d_layers_are_adapted_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from rlkl.config import LoraConfig

    small = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    models.add_adapter(GPT2LMHeadModel(small), LoraConfig(rank=2), "gpt2")
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
