"""Mistakes of the user end in exit 2 with nothing written or lost, failing runs in exit 1 with their traceback kept."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from conftest import RECORDS, Tree

from rlkl.cli import main
from rlkl.types import Rollout

Train = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def train(tiny_config: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """``train(*words)``: exit code and lines on stderr of ``rlkl train`` on the tiny configuration and these words."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config), encoding="utf-8")

    def run(*words: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = main(["train", "config.yaml", *words])
        return code, capsys.readouterr().err.splitlines()

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@dataclass
class Mistake:
    """Words on the command line, with a file of prompts where given; ``says`` must all stand in the one line."""

    name: str
    words: list[str]
    says: list[str]
    prompts: bytes | None = None
    lines: int = 1


MISTAKES = [
    Mistake("unknown section", ["optimizer.learning_rate=1"], ["optimizer", "unknown key", "did you mean optimiser?"]),
    Mistake("unknown key of a section", ["kl.betta=1"], ["kl.betta", "unknown key", "did you mean kl.beta?"]),
    Mistake("unknown key behind an alias", ["credit.lamda=1"], ["credit.lamda", "did you mean credit.lambda?"]),
    Mistake("unknown key of a reward", ["rewards.varied.wieght=2"], ["did you mean rewards.varied.weight?"]),
    Mistake("unknown key of a model type", ["model.pth=x"], ["model.pth", "did you mean model.path?"]),
    Mistake("unknown key of a data type", ["data.heldout=0.1"], ["data.heldout", "did you mean data.held_out?"]),
    Mistake("unknown key of the trainer", ["trainer.entropy=1"], ["did you mean trainer.entropy_coef?"]),
    Mistake("unknown key like no other", ["kl.zzz=1"], ["kl.zzz", "unknown key", "known: beta, placement"]),
    Mistake("unknown role of a column", ["data.columns.promt=q"], ["data.columns.promt", "'prompt'"]),
    Mistake(
        "several mistakes at once",
        ["kl.betta=1", "seed=-1", "optimiser.schedule=fast"],
        ["kl.betta", "seed=-1", "optimiser.schedule='fast'", "'constant', 'linear' or 'cosine'"],
        lines=3,
    ),
    Mistake("text for a number", ["kl.beta=much"], ["kl.beta='much'", "valid number"]),
    Mistake("fraction for a count", ["train.steps=1.5"], ["train.steps=1.5", "integer"]),
    Mistake("number for a section", ["kl=0.1"], ["kl=0.1", "valid dictionary"]),
    Mistake("text for a list", ["model.type=tiny", "model.texts=prompt"], ["model.texts='prompt'", "valid list"]),
    Mistake("list for a file or share", ["data.held_out=[1]"], ["data.held_out=[1]", "number", "string"]),
    Mistake("too small", ["train.steps=0"], ["train.steps=0", "greater than or equal to 1"]),
    Mistake("too large", ["credit.gamma=1.1"], ["credit.gamma=1.1", "less than or equal to 1"]),
    Mistake("not finite", ["kl.beta=.nan"], ["kl.beta=nan", "finite"]),
    Mistake("negative coefficient", ["kl.beta=-1"], ["kl.beta=-1", "greater than or equal to 0"]),
    Mistake("null where a value must be", ["kl.beta=null"], ["kl.beta=None", "valid number"]),
    Mistake("name that would leave its folder", ["name=../x"], ["name='../x'", "pattern"]),
    Mistake("share of everything", ["data.held_out=1.0"], ["held_out=1.0", "between 0 and 1", "name a file"]),
    Mistake("wrong model type", ["model.type=llama"], ["model.type", "llama", "'pretrained', 'facts', 'fix', 'tiny'"]),
    Mistake("wrong data type", ["data.type=csv"], ["data.type", "csv", "'facts', 'fix', 'jsonl'"]),
    Mistake("no model type", ["model={}"], ["model.type", "missing", "'pretrained', 'facts', 'fix', 'tiny'"]),
    Mistake("missing key of a type", ["model.type=pretrained", "model={type: pretrained}"], ["model.path", "missing"]),
    Mistake("missing key of a reward", ["rewards={a: {type: function}}"], ["rewards.a.path", "missing"]),
    Mistake("missing section", ["trainer=null"], ["trainer=None", "valid dictionary"]),
    Mistake("no reward", ["rewards={}"], ["rewards={}", "at least 1"]),
    Mistake("override without a value", ["kl.beta"], ["kl.beta", "key.sub=value"]),
    Mistake("override without a key", ["=1"], ["=1", "key.sub=value"]),
    Mistake("unknown interpolation", ["kl.beta=${nothing}"], ["kl.beta", "nothing", "not found"]),
    Mistake(
        "k1 in the loss",
        ["kl.placement=loss"],
        ["estimator=k1", "placement=loss", "gradient is zero in expectation", "use exact,"],
    ),
    Mistake(
        "exact KL in the reward", ["kl.estimator=exact"], ["estimator=exact", "placement=reward", "biased", "use k1"]
    ),
    Mistake("k2 in the reward", ["kl.estimator=k2"], ["estimator=k2", "placement=reward", "biased", "use k1"]),
    Mistake("k3 in the reward", ["kl.estimator=k3"], ["estimator=k3", "reverse minus forward KL", "use k1"]),
    Mistake(
        "forward KL in the reward", ["kl.estimator=exact_forward"], ["estimator=exact_forward", "only k1", "use k1"]
    ),
    Mistake(
        "window of a loss",
        ["kl.placement=loss", "kl.estimator=exact", "kl.window=own"],
        ["window=own", "placement=loss", "needs placement=reward"],
    ),
    Mistake("target from nothing", ["kl.beta=0", "kl.target=1"], ["target=1", "beta=0", "start above 0"]),
    Mistake(
        "GAE with a horizon",
        ["credit.advantage=gae", "credit.baseline=value", "credit.horizon=2"],
        ["horizon=2", "lambda=0.95", "ignore the horizon", "use advantage=returns"],
    ),
    Mistake(
        "GAE at lambda 1 with a horizon",
        ["credit.advantage=gae", "credit.baseline=value", "credit.horizon=2", "credit.lambda=1"],
        ["horizon=2", "use advantage=returns"],
    ),
    Mistake("GAE on another baseline", ["credit.advantage=gae"], ["baseline=leave_one_out", "set baseline=value"]),
    Mistake(
        "GAE with a KL window",
        ["credit.advantage=gae", "credit.baseline=value", "kl.window=own"],
        ["kl.window=own", "credit.advantage=gae", "use window=full"],
    ),
    Mistake(
        "leave_one_out alone",
        ["rollout.samples_per_prompt=1"],
        ["credit.baseline=leave_one_out", "rollout.samples_per_prompt=1", "use 2 or more"],
    ),
    Mistake(
        "batch_mean alone",
        ["credit.baseline=batch_mean", "rollout.samples_per_prompt=1", "rollout.prompts=1"],
        ["credit.baseline=batch_mean", "1 completion", "2 or more"],
    ),
    Mistake("facts for a tiny model", ["data={type: facts}", "model={type: tiny, texts: [a]}"], ["model.type=facts"]),
    Mistake("no prompts file", ["data.path=nowhere.jsonl"], ["nowhere.jsonl", "no such file", "data.path", ".jsonl"]),
    Mistake("no held-out file", ["data.held_out=other.jsonl"], ["other.jsonl", "no such file", "data.held_out"]),
    Mistake("empty prompts file", [], ["p.jsonl", "empty", "at least one record"], prompts=b""),
    Mistake("prompts file of empty lines", [], ["p.jsonl", "empty"], prompts=b"\n  \n\n"),
    Mistake("line that is no JSON", [], ["p.jsonl:3", "not valid JSON"], prompts=b'{"prompt": "a"}\n\nhello\n'),
    Mistake("line that is no object", [], ["p.jsonl:2", "list", "JSON object"], prompts=b'{"prompt": "a"}\n["b"]\n'),
    Mistake(
        "record without a prompt",
        [],
        ["p.jsonl:2", "'prompt'", "question, gold", "data.columns.prompt"],
        prompts=b'{"prompt": "a"}\n{"question": "b", "gold": "c"}\n',
    ),
    Mistake("prompt that is no text", [], ["p.jsonl:1", "no text in column 'prompt'"], prompts=b'{"prompt": 3}\n'),
    Mistake("mapped column that is not there", ["data.columns={prompt: q}"], ["p.jsonl:1", "'q'"], prompts=b'{"x": 1}'),
    Mistake("not UTF-8", [], ["p.jsonl", "not UTF-8 at byte 15", "convert"], prompts=b'{"prompt": "caf\xe9"}\n'),
    Mistake("one record to split", [], ["p.jsonl", "1 record", "data.held_out"], prompts=b'{"prompt": "a"}\n'),
    Mistake(
        "prompt longer than the context",
        [],
        ["'abcabc", "context 64", "max_new_tokens 6", "shorten it or lower max_new_tokens"],
        prompts=b'{"prompt": "a"}\n{"prompt": "' + 40 * b"abc" + b'"}\n',
    ),
    Mistake("longer answers than the context", ["rollout.max_new_tokens=64"], ["context 64", "max_new_tokens 64"]),
    Mistake("no model folder", ["model.path=./no-model"], ["model.path=./no-model", "no such folder", "causal LM"]),
    Mistake("no model of this name", ["model.path=no-model"], ["model.path=no-model", "cannot be loaded", "folder"]),
    Mistake("folder that is no model", ["model.path=./nothing"], ["model.path=./nothing", "cannot be loaded"]),
    Mistake("text column of a tiny model", ["model={type: tiny, texts: [none]}"], ["model.texts", "'none'", "columns"]),
    Mistake("reward that is no path", ["rewards.varied.path=word_f1"], ["rewards.varied.path='word_f1'", "pattern"]),
    Mistake("reward of no module", ["rewards.varied.path=nowhere:f"], ["nowhere:f", "No module named", "importable"]),
    Mistake(
        "reward of no function",
        ["rewards.varied.path=math:f"],
        ["rewards.varied.path=math:f", "module math has no function f; name one"],
    ),
    Mistake("reward that cannot be called", ["rewards.varied.path=math:pi"], ["math:pi", "no function pi"]),
    Mistake("reward of a broken module", ["rewards.varied.path=broken:f"], ["broken:f", "SyntaxError", "imported"]),
    Mistake("reward of a module that raises", ["rewards.varied.path=raising:f"], ["raising:f", "KeyError: 'home'"]),
    Mistake(
        "token reward that reads ahead",
        ["rewards.varied.path=test_errors:spread_backwards", "rewards.varied.level=token"],
        ["reward varied", "not causal", "depends on later tokens", "pay it at the last token that it reads"],
    ),
    Mistake(
        "token reward of another shape",
        ["rewards.varied.path=test_errors:one_a_sample", "rewards.varied.level=token"],
        ["reward varied", "returned shape [4]", "before the first step"],
    ),
    Mistake(
        "token reward that raises at once",
        ["rewards.varied.path=test_errors:raises", "rewards.varied.level=token"],
        ["reward varied", "LookupError: no verdict", "before the first step"],
    ),
    Mistake("folder below a file", ["folder=config.yaml/runs"], ["config.yaml", "is a file", "folder=..."]),
    Mistake("name of a file", ["folder=.", "name=config.yaml"], ["config.yaml", "is a file", "name=..."]),
    Mistake("folder of something else", ["name=notes", "--overwrite"], ["notes", "not a run", "config.yaml"]),
    Mistake("folder of something else, plainly", ["name=notes"], ["notes", "not empty", "--overwrite"]),
    Mistake("unknown flag", ["--overwrit"], ["--overwrit", "--overwrite", "rlkl train --help"]),
]


def spread_backwards(rollout: Rollout) -> torch.Tensor:
    """A score of the whole completion, at each of its tokens."""
    return rollout.policy_mask_BT * rollout.tokens_BT.sum(-1, keepdim=True)


def one_a_sample(rollout: Rollout) -> torch.Tensor:
    return torch.zeros(len(rollout))


def raises(*_: Any, **__: Any) -> Any:
    raise LookupError("no verdict")


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_a_mistake_is_one_line_exit_2_and_leaves_everything_as_it_was(mistake, train, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "raising.py").write_text("{}['home']")
    (tmp_path / "runs/notes").mkdir(parents=True)
    (tmp_path / "runs/notes/todo.txt").write_text("mine")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    old_run(tmp_path)
    words = [*mistake.words]
    if mistake.prompts is not None:
        (tmp_path / "p.jsonl").write_bytes(mistake.prompts)
        words.append("data.path=p.jsonl")
    before = tree(tmp_path)
    # with --overwrite the existing run is at stake, without it its folder would be refused first
    code, said = train(*words, *([] if "name=notes" in words else ["--overwrite"]))
    assert code == 2, said
    assert len(said) == mistake.lines, said
    assert all(line.startswith("rlkl: ") for line in said)
    assert [part for part in mistake.says if part not in "\n".join(said)] == [], said
    assert tree(tmp_path) == before


def old_run(folder: Path) -> None:
    """A finished run of the tiny configuration's name."""
    run = folder / "runs/tiny"
    run.mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).write_text("old\n")


def test_a_run_is_not_replaced_unasked(train, tmp_path):
    old_run(tmp_path)
    before = tree(tmp_path)
    code, said = train()
    assert code == 2
    assert len(said) == 1
    assert "runs/tiny: not empty" in said[0]
    assert "--overwrite" in said[0]
    assert tree(tmp_path) == before


def test_overwrite_replaces_the_whole_run(train, tmp_path):
    old_run(tmp_path)
    (tmp_path / "runs/tiny/stale.txt").write_text("old\n")
    code, _ = train("--overwrite")
    assert code == 0
    assert not (tmp_path / "runs/tiny/stale.txt").exists()
    assert "old" not in (tmp_path / "runs/tiny/metrics.jsonl").read_text()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["tiny"]


def test_an_empty_folder_is_no_hindrance(train, tmp_path):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    assert train()[0] == 0


def test_a_run_survives_when_its_successor_cannot_be_written(train, tmp_path, monkeypatch):
    old_run(tmp_path)
    before = tree(tmp_path)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlkl.tracking.environment", full)
    code, said = train("--overwrite")
    assert code == 2
    assert said == ["rlkl: runs/tiny: cannot be written (No space left on device); choose another folder=..."]
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_a_mistake(train, tmp_path, monkeypatch):
    before = tree(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, said = train()
    assert code == 2
    assert said == ["rlkl: runs/tiny: cannot be written (Permission denied); choose another folder=..."]
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ["c.yaml", "no such configuration file", "configs/"]),
        ("kl: [1\nname: x", ["c.yaml", "not valid YAML"]),
        ("a: 1\na: 2", ["c.yaml", "not valid YAML", "duplicate"]),
        ("- name: x", ["c.yaml", "ListConfig", "mapping of sections"]),
        (b"name: caf\xe9", ["c.yaml", "not valid YAML"]),
    ],
    ids=["missing", "broken", "a key twice", "a list", "not UTF-8"],
)
def test_a_configuration_file_that_cannot_be_read_is_one_line(tmp_path, capsys, monkeypatch, content, says):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = tree(tmp_path)
    assert main(["train", "c.yaml"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert [part for part in says if part not in said[0]] == [], said
    assert tree(tmp_path) == before


def test_an_empty_configuration_lists_every_missing_key(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("")
    assert main(["train", "c.yaml"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["name:", "model:", "data:", "rewards:", "trainer:"]
    assert all("missing" in line for line in said)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian", "c.yaml"], ["'trian'", "Did you mean 'train'", "rlkl --help"]),
        (["train"], ["Missing argument", "rlkl train --help"]),
        (["sample"], ["Missing argument", "rlkl sample --help"]),
        (["sample", "run", "--prompts", "0"], ["--prompts", "greater than or equal to 1", "rlkl sample --help"]),
        (["eval", "run", "--seed", "-1"], ["--seed", "greater than or equal to 0"]),
        (["eval", "run", "--samples", "two"], ["--samples", "integer"]),
        (["doctor", "--fast"], ["--fast", "rlkl doctor --help"]),
        (["sample", "nowhere"], ["nowhere", "not a run", "rlkl train"]),
        (["eval", "nowhere"], ["nowhere", "not a run", "rlkl train"]),
        (["eval", "x" * 300], ["xxx", "not a run", "rlkl train"]),
        (["train", "x" * 300], ["xxx: cannot be read (File name too long)", "configs/"]),
        (["train", "/proc/self/mem"], ["/proc/self/mem: cannot be read (Input/output error)", "configs/"]),
        (["compare", "/proc/self/mem"], ["/proc/self/mem: cannot be read (Input/output error)", "configs/"]),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    said = captured.err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("rlkl: ")
    assert [part for part in says if part not in said[0]] == [], said
    assert captured.out == ""
    assert tree(tmp_path) == {}


def test_a_run_that_did_not_finish_cannot_be_opened(tmp_path, tiny_config, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(tiny_config))
    for command in ("eval", "sample"):
        assert main([command, "run"]) == 2
        assert "did not finish" in capsys.readouterr().err


def test_a_dry_run_finds_the_same_mistakes(train):
    assert train("--dry-run", "kl.betta=1") == (2, ["rlkl: kl.betta: unknown key, did you mean kl.beta?"])


def test_pickled_weights_of_strangers_are_not_run(train, tiny_model, tmp_path):
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = tmp_path / "stranger"
    folder.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save({"lm_head.weight": Payload()}, folder / "pytorch_model.bin")
    code, said = train("model.path=./stranger")
    assert code == 2
    assert len(said) == 1
    assert "model.path=./stranger: cannot be loaded" in said[0]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("damage", ["truncated", "incomplete"])
def test_damaged_weights_are_refused(train, tiny_model, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        tensors = load_file(weights)
        del tensors["lm_head.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    code, said = train("model.path=./damaged")
    assert code == 2
    assert len(said) == 1
    assert "model.path=./damaged: cannot be loaded" in said[0]
    assert ("lm_head.weight" in said[0]) == (damage == "incomplete")


# Failing runs. Before a step n come n - 1 steps and the evaluation at step 0, so its batch is call n.


@dataclass
class Faulty:
    """A reward that goes wrong from its call ``step`` on, whatever it is asked; single samples are no calls."""

    step: int = 2
    answer: Callable[[list[str]], Any] | None = None
    calls: int = 0
    bad: set[str] = field(default_factory=set)

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> Any:
        assert self.answer is not None
        self.calls += len(prompts) > 1
        if self.calls <= self.step:
            return [0.5] * len(prompts)
        self.bad = self.bad or {prompts[-1]}
        return self.answer(prompts)


FAULTY = Faulty()


def faulty(prompts: list[str], completions: list[str], **columns: Any) -> Any:
    return FAULTY(prompts, completions, **columns)


def faulty_token(rollout: Rollout) -> Any:
    return FAULTY(rollout.columns["prompt"], rollout.texts())


def raise_at_bad(prompts: list[str]) -> list[float]:
    if FAULTY.bad & set(prompts):
        raise LookupError("no verdict")
    return [0.5] * len(prompts)


def one_is(value: Any) -> Callable[[list[str]], list[Any]]:
    return lambda prompts: [0.5, 0.5, 0.5, value]


FAILURES = {
    "raises": (raise_at_bad, ["LookupError: no verdict", "at sample 2"]),
    "NaN": (one_is(float("nan")), ["sample 3 got nan", "finite"]),
    "infinite": (one_is(float("inf")), ["sample 3 got inf", "finite"]),
    "None": (one_is(None), ["sample 3 got None", "finite"]),
    "text": (one_is("good"), ["sample 3 got 'good'", "finite"]),
    "too few": (lambda prompts: [0.5], ["returned 1 scores for 4 completions", "one each"]),
    "no list": (lambda prompts: None, ["returned a NoneType for 4 completions"]),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_reward_that_fails_stops_the_run_and_names_source_and_sample(train, tmp_path, monkeypatch, failure):
    answer, says = FAILURES[failure]
    monkeypatch.setattr("test_errors.FAULTY", Faulty(2, answer))
    code, said = train("rewards.varied.path=test_errors:faulty")
    assert_failed(code, said, tmp_path, ["step 2: reward varied", *says])
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert not (tmp_path / "runs/tiny/final").exists()


def test_a_reward_that_fails_from_the_start_fails_in_the_first_evaluation(train, tmp_path, monkeypatch):
    monkeypatch.setattr("test_errors.FAULTY", Faulty(0, one_is(None)))
    code, said = train("rewards.varied.path=test_errors:faulty")
    assert_failed(code, said, tmp_path, ["evaluation at step 0: reward varied", "sample 3 got None"])


TOKEN_FAILURES: dict[str, tuple[Callable[[Rollout], Any], list[str]]] = {
    "raises": (raises, ["LookupError: no verdict"]),
    "shape": (one_a_sample, ["returned shape [4] for tokens [4,"]),
    "NaN": (
        lambda rollout: torch.zeros(rollout.tokens_BT.shape).index_put(
            (torch.tensor(1), torch.tensor(0)), torch.tensor(float("nan"))
        ),
        ["sample 1 got nan at token 0"],
    ),
    "None": (lambda rollout: None, ["reward varied"]),
}
STEP_OF_TOKEN = {"on": False, "failure": ""}


def token_fails_in_training(rollout: Rollout) -> Any:
    if STEP_OF_TOKEN["on"]:
        return TOKEN_FAILURES[str(STEP_OF_TOKEN["failure"])][0](rollout)
    return torch.zeros(rollout.tokens_BT.shape)


@pytest.mark.parametrize("failure", TOKEN_FAILURES)
def test_a_token_reward_that_fails_stops_the_run(train, tmp_path, monkeypatch, failure):
    import rlkl.loop

    step = rlkl.loop.train_step

    def fail_from_here(*given: Any, **named: Any) -> Any:
        monkeypatch.setitem(STEP_OF_TOKEN, "on", True)
        return step(*given, **named)

    monkeypatch.setattr(rlkl.loop, "train_step", fail_from_here)
    monkeypatch.setitem(STEP_OF_TOKEN, "failure", failure)
    code, said = train("rewards.varied.path=test_errors:token_fails_in_training", "rewards.varied.level=token")
    assert_failed(code, said, tmp_path, ["step 1: reward varied", *TOKEN_FAILURES[failure][1]])


def test_a_step_that_diverges_stops_the_run_with_a_remedy(train, tmp_path):
    code, said = train("optimiser.learning_rate=1e30")
    assert_failed(code, said, tmp_path, ["step 2", "lower optimiser.learning_rate"])


def test_a_failure_of_our_own_keeps_its_type_and_traceback(train, tmp_path, monkeypatch):
    monkeypatch.setattr("rlkl.kl.measured", lambda *_: 1 / 0)
    code, said = train()
    assert_failed(code, said, tmp_path, ["ZeroDivisionError"])
    assert "in <lambda>" in (tmp_path / "runs/tiny/error.txt").read_text()


def assert_failed(code: int, said: list[str], folder: Path, says: list[str]) -> None:
    assert code == 1, said
    assert len(said) == 1, said
    assert said[0].startswith("rlkl: ")
    assert "error.txt" in said[0]
    assert [part for part in says if part not in said[0]] == [], said
    trace = (folder / "runs/tiny/error.txt").read_text()
    assert trace.startswith("Traceback")
    assert (folder / "runs/tiny/config.yaml").is_file()


def test_debug_prints_the_traceback(train, monkeypatch):
    monkeypatch.setattr("test_errors.FAULTY", Faulty(0, raise_at_bad))
    code, said = train("rewards.varied.path=test_errors:faulty", "--debug")
    assert code == 1
    assert said[0].startswith("Traceback")
    assert "raise LookupError" in "\n".join(said)


def test_the_table_is_about_the_tiny_run(train):
    """What every mistake is added to is itself without one."""
    assert train() == (0, [])
    assert len(RECORDS) > 2
