"""Whole runs on the tiny model: what they write, that they repeat, and the commands that read them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import RECORDS, Tree, metrics, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlkl
from rlkl import settings
from rlkl.cli import main
from rlkl.config import GRADIENT

EVALUATED = {"kl/sequence", "kl/sequence_stderr", "kl/token", "reward/eval/varied", "reward/eval/varied_stderr"}
DIVERSITY = ("entropy", "distinct_1", "distinct_2", "distinct_3", "self_bleu")
EVALUATED |= {f"policy/eval/{name}" for name in ("length", "terminated", *DIVERSITY)}
TRAINED = {"kl/penalty", "kl/beta", "reward/train/total", "reward/train/varied", "reward/queries", "tokens/generated"}
TRAINED |= {"loss/policy", "credit/advantage_std", "credit/return"}
TRAINED |= {f"policy/{name}" for name in ("grad_norm", "learning_rate", "length", "terminated", "sampling_gap")}
DATA = Path(os.environ.get("RLKL_DATA") or Path(__file__).parents[2] / "shared/data") / "qa_feedback_a.jsonl"


def changed(config: Tree, **changes: Any) -> Tree:
    """A deep copy with ``section__key=value`` changes."""
    config = json.loads(json.dumps(config))
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            config.setdefault(section, {})[key] = value
        else:
            config[section] = value
    return config


@pytest.fixture
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training the tiny model."""
    monkeypatch.setattr("rlkl.plots.curves", lambda folder: folder / "curves.png")


@pytest.fixture
def run(tiny_config: Tree) -> Path:
    """The folder of a finished run of the tiny configuration."""
    return rlkl.train(tiny_config)


def test_a_run_leaves_its_files(run, tiny_config):
    names = {"config.yaml", "env.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "curves.png"}
    names |= {"reference", "final"}
    assert run == Path("runs/tiny")
    assert {path.name for path in run.iterdir()} == names
    assert [path.name for path in Path("runs").iterdir()] == ["tiny"]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    environment = json.loads((run / "env.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert settings.load(run / "config.yaml") == settings.load(tiny_config)


def test_the_final_model_loads_with_transformers_and_has_moved(run, tiny_model):
    weights = {}
    for name in (run / "final", run / "reference", tiny_model):
        weights[name] = AutoModelForCausalLM.from_pretrained(name).state_dict()
        assert AutoTokenizer.from_pretrained(name)("abc")["input_ids"]
    final, reference, start = weights.values()
    assert set(final) == set(start)
    assert all(torch.equal(reference[name], start[name]) for name in start)
    assert not any(torch.equal(final[name], start[name]) for name in start if name.endswith("proj.weight"))


def test_every_step_has_a_row_with_its_metrics(run):
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    first, middle, last = (set(row) for row in rows)
    assert first >= EVALUATED
    assert not first & TRAINED
    assert middle >= TRAINED
    assert not middle & EVALUATED
    assert last >= EVALUATED | TRAINED
    assert all(x is None or math.isfinite(x) for row in rows for x in row.values())


def test_times_are_seconds_of_the_stages(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stages = ("sample", "reward", "score", "update", "learn")
    for row in rows[1:]:
        assert sum(row[f"time/{stage}"] for stage in stages) == pytest.approx(row["time/step"], rel=1e-6)
    assert rows[0]["time/evaluate"] > 0


def test_the_reference_is_the_start_so_kl_is_zero_there_bit_for_bit(run):
    first, step, last = metrics(run)
    assert first["kl/sequence"] == first["kl/token"] == first["kl/sequence_stderr"] == 0
    assert step["kl/penalty"] == 0
    assert last["kl/penalty"] != 0
    assert last["kl/sequence"] > 0


def test_kl_a_token_is_kl_a_sequence_over_the_mean_length(run):
    last = metrics(run)[-1]
    assert last["kl/token"] == pytest.approx(last["kl/sequence"] / last["policy/eval/length"], rel=1e-6)


def test_tokens_and_queries_are_counted_over_the_run(run):
    rows = metrics(run)
    lengths = [4 * row["policy/length"] for row in rows[1:]]
    assert rows[1]["tokens/generated"] == pytest.approx(lengths[0])
    assert rows[2]["tokens/generated"] == pytest.approx(sum(lengths))
    assert [row["reward/queries"] for row in rows[1:]] == [4, 8]
    assert [row["reward/eval/queries"] for row in rows if "reward/eval/queries" in row] == [4, 4]


def test_sampling_and_scoring_agree_about_the_tokens(run):
    assert all(row["policy/sampling_gap"] < 1e-4 for row in metrics(run)[1:])


def test_samples_are_of_held_out_prompts_at_every_evaluation(run):
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 2, 2]
    assert rows[0]["prompt"] == rows[2]["prompt"] != rows[1]["prompt"] == rows[3]["prompt"]
    assert all(row["end"] in ("eos", "limit") for row in rows)
    assert all(isinstance(row["completion"], str) and "reward/varied" in row for row in rows)
    assert all(row["kl"] == 0 for row in rows[:2])


def test_the_written_configuration_trains_to_the_same_metrics(run):
    again = rlkl.train(run / "config.yaml", ["name=again"])
    assert metrics(again) == metrics(run)
    final = [AutoModelForCausalLM.from_pretrained(folder / "final").state_dict() for folder in (run, again)]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_a_seed_repeats_a_run_bit_for_bit_and_another_does_not(run, tiny_config):
    assert metrics(rlkl.train(tiny_config, overwrite=True)) == metrics(run)
    other = metrics(rlkl.train(tiny_config, ["seed=1", "name=other"]))
    assert [row.get("loss/policy") for row in other] != [row.get("loss/policy") for row in metrics(run)]


def test_a_run_repeats_whatever_the_global_generators_hold(run, tiny_config):
    before = metrics(run)
    torch.manual_seed(12345)
    assert metrics(rlkl.train(tiny_config, overwrite=True)) == before


def test_python_and_the_command_line_run_the_same(run, tiny_config, capsys):
    Path("c.yaml").write_text(yaml.safe_dump(changed(tiny_config, name="command")))
    assert main(["train", "c.yaml"]) == 0
    assert metrics(Path("runs/command")) == metrics(run)
    said = capsys.readouterr().out
    assert "2 prompts x 2 samples = 4 completions" in said
    assert "eval @ 0" in said
    assert "step 2/2" in said
    assert "runs/command/final" in said


def test_without_a_penalty_kl_is_measured_all_the_same(tiny_config):
    rows = metrics(rlkl.train(changed(tiny_config, kl__beta=0.0)))
    assert rows[0]["kl/sequence"] == 0
    assert rows[-1]["kl/sequence"] > 0
    assert rows[2]["kl/penalty"] != 0
    assert all(row["kl/beta"] == 0 for row in rows[1:])


@pytest.mark.parametrize(("placement", "estimator"), sorted(GRADIENT))
def test_every_place_and_estimator_of_the_penalty_trains(no_figure, tiny_config, placement, estimator):
    config = changed(tiny_config, kl={"placement": placement, "estimator": estimator, "beta": 0.3}, name="penalised")
    penalised = metrics(rlkl.train(config))
    assert [row["step"] for row in penalised] == [0, 1, 2]
    assert ("loss/kl" in penalised[2]) == (placement == "loss")
    free = metrics(rlkl.train(changed(config, kl__beta=0.0, name="free")))
    assert free[1]["loss/policy"] == penalised[1]["loss/policy"]  # KL is 0 at the start
    assert free[2]["policy/grad_norm"] != penalised[2]["policy/grad_norm"]


@pytest.mark.parametrize(
    "credit",
    [
        *({"baseline": name} for name in ("none", "batch_mean", "leave_one_out", "ema", "value", "group_norm")),
        {"baseline": "value", "advantage": "gae"},
        {"baseline": "value", "advantage": "gae", "bootstrap_truncated": True},
        {"baseline": "leave_one_out", "horizon": 2},
        {"baseline": "value", "horizon": 2},
    ],
    ids=lambda credit: " ".join(map(str, credit.values())),
)
def test_every_baseline_trains(no_figure, tiny_config, credit):
    rows = metrics(rlkl.train(changed(tiny_config, credit=credit)))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert ("loss/value" in rows[1]) == (credit["baseline"] == "value")
    assert all(row["policy/grad_norm"] > 0 for row in rows[1:])


def prompts_of(config: Tree) -> tuple[list[str], list[str]]:
    """Training and held-out prompts of a configuration."""
    from rlkl.data.prompts import records

    loaded = settings.load(config)
    train, held = records(loaded.data, loaded.seed)
    return [row["prompt"] for row in train], [row["prompt"] for row in held]


def test_held_out_prompts_are_not_trained_on(tiny_config):
    train, held = prompts_of(tiny_config)
    assert len(held) == 2
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(record["prompt"] for record in RECORDS)


def test_a_line_separator_within_a_prompt_ends_no_record(tiny_config):
    texts = ["one\u2028two", "three\u0085four", "five\x0bsix", "seven"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    Path("prompts.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    train, held = prompts_of(tiny_config)
    assert sorted(train + held) == sorted(texts)


def test_the_split_depends_on_the_seed_alone(tiny_config):
    splits = [prompts_of(changed(tiny_config, seed=seed))[1] for seed in range(8)]
    assert prompts_of(changed(tiny_config, train__steps=7, rollout__prompts=1))[1] == splits[0]
    assert len({tuple(split) for split in splits}) > 1


def test_evaluating_the_final_model_again_gives_the_last_row(run, capsys):
    assert main(["eval", str(run)]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    last = metrics(run)[-1]
    for name in EVALUATED:
        assert float(said[name]) == pytest.approx(last[name], rel=1e-5), name


def test_evaluation_takes_other_prompts_samples_and_seeds(tiny_config, capsys):
    run = rlkl.train(changed(tiny_config, seed=3))

    def judged(*words: str) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["eval", str(run), *words]) == 0
        said = dict(line.split() for line in capsys.readouterr().out.splitlines())
        return said["reward/eval/queries"], said["kl/sequence"]

    plain = judged()
    assert judged("--prompts", "1")[0] == "2"
    assert judged("--samples", "5")[0] == "10"
    assert float(plain[1]) == pytest.approx(metrics(run)[-1]["kl/sequence"], rel=1e-5)
    assert judged("--seed", "0")[1] != plain[1]
    assert judged("--seed", "3") == plain


def test_samples_of_given_prompts_are_printed(run, capsys):
    assert main(["sample", str(run), "--prompt", "Tell me", "--prompt", "Now", "--samples", "3", "--seed", "4"]) == 0
    said = capsys.readouterr().out
    assert main(["sample", str(run), "--prompt", "Tell me", "--prompt", "Now", "--samples", "3", "--seed", "4"]) == 0
    assert capsys.readouterr().out == said
    assert main(["sample", str(run), "--prompt", "Tell me", "--prompt", "Now", "--samples", "3", "--seed", "5"]) == 0
    assert capsys.readouterr().out != said
    assert said.index("prompt: Tell me") < said.index("prompt: Now")
    assert said.count("  3: ") == 2
    assert "  4: " not in said


def test_samples_of_held_out_prompts_are_printed_where_none_is_given(run, capsys, tiny_config):
    assert main(["sample", str(run), "--prompts", "2", "--samples", "1"]) == 0
    said = capsys.readouterr().out
    assert [line.removeprefix("prompt: ") for line in said.splitlines() if line.startswith("prompt: ")] == prompts_of(
        tiny_config
    )[1]


def test_reading_a_run_changes_nothing_in_it(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["eval", str(run)]) == 0
    assert main(["sample", str(run)]) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_dry_run_prints_the_configuration_and_the_arithmetic_and_writes_nothing(tiny_config, capsys):
    Path("c.yaml").write_text(yaml.safe_dump(tiny_config))
    before = sorted(Path().iterdir())
    assert main(["train", "c.yaml", "--dry-run", "train.steps=25", "rollout.prompts=3", "train.micro_batch=4"]) == 0
    said = capsys.readouterr().out
    assert sorted(Path().iterdir()) == before
    expected = settings.load(tiny_config, ["train.steps=25", "rollout.prompts=3", "train.micro_batch=4"])
    assert settings.load(yaml.safe_load(said)) == expected
    assert "3 prompts x 2 samples = 6 completions, at most 36 tokens" in said
    assert "2 x at most 4 completions" in said
    assert "25 steps, 150 completions, at most 900 tokens" in said
    assert "4 x at most 4 completions" in said  # evaluations at 0, 10, 20 and 25
    assert "k1 in the reward, window full" in said


def test_the_doctor_finds_this_installation_well(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path / "cache"))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"rlkl {rlkl.__version__}" in said
    assert f"torch {torch.__version__}" in said
    assert f"cache {tmp_path / 'cache'} is writable" in said
    assert not (tmp_path / "cache").exists()


def test_the_doctor_finds_what_is_wrong(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("rlkl.doctor.PACKAGES", ("torch", "no-such-package"))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "MISSING  no-such-package: pip install no-such-package" in said
    assert "is not writable" in said


def python(*words: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(rlkl.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)


def test_help_is_there_as_a_module_and_names_the_commands():
    done = python("-m", "rlkl", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(f" {name} " in done.stdout for name in ("train", "sample", "eval", "doctor"))


def test_help_and_mistakes_import_no_torch():
    code = """
import sys
from rlkl.cli import main
assert main(["--help"]) == 0
assert main(["train", "--help"]) == 0
assert main([]) == 0
assert main(["nonsense"]) == 2
import rlkl.config, rlkl.settings, rlkl.summary
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy", "accelerate"}))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlkl.doctor.report", interrupt)
    assert main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_file(), reason=f"the feedback data is not there; name its folder in RLKL_DATA ({DATA})")
def test_the_configuration_for_files_trains_on_real_questions(tmp_path, monkeypatch):
    """From a file of questions to a model, with the committed configuration and a smaller budget."""
    config = Path(__file__).parents[1] / "configs/jsonl.yaml"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path / "cache"))
    with DATA.open(encoding="utf-8") as file:
        records = [json.loads(line) for line, _ in zip(file, range(40), strict=False)]
    write_jsonl("questions.jsonl", records)
    small = ["model.steps=2", "model.hidden=32", "model.layers=1", "model.vocabulary=400", "rollout.prompts=2"]
    small += ["train.steps=2", "evaluate.prompts=3", "rollout.max_new_tokens=8", "log.with=[]"]
    run = rlkl.train(config, ["data.path=questions.jsonl", *small])
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["kl/sequence"] == 0
    assert 0 <= rows[-1]["reward/eval/overlap"] <= 1
    questions = {record["question"] for record in records}
    shown = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["prompt"] for row in shown} <= questions
    assert AutoModelForCausalLM.from_pretrained(run / "final").config.hidden_size == 32
