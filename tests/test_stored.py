"""Training on stored annotated data: the records of a step, the gradient, evaluation without their judge, mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import Tree, metrics, write_jsonl
from models import assert_same_gradients
from test_distributed import HERE, one_and_two, torchrun
from torch.nn.functional import cross_entropy

import rlkl
from rlkl import cli, loop, settings
from rlkl.config import dump
from rlkl.data import stored
from rlkl.data.prompts import PromptSet
from rlkl.lane import Lane, build, collect
from rlkl.types import End

WEIGHTS = {"good": 1.0, "bad": -1.0}


def record(n: int, **fields: Any) -> dict[str, Any]:
    """A short completion with a good and a bad letter."""
    spans = [{"start": 0, "end": 1, "label": "bad"}, {"start": 2, "end": 3, "label": "good", "weight": 0.5}]
    return {"id": str(n), "prompt": f"P{n}:", "completion": "ab" + "c" * (1 + n % 3), "spans": spans, **fields}


@pytest.fixture
def offline(tiny_config: Tree) -> Tree:
    """Two steps on stored completions."""
    write_jsonl("stored.jsonl", [record(n, gold=f"g{n}") for n in range(8)])
    return {
        **tiny_config,
        "data": {"type": "annotated", "path": "stored.jsonl", "held_out": 0.25},
        "rewards": {"spans": {"type": "annotations", "weights": WEIGHTS}},
        "trainer": {"type": "token_likelihood"},
        "credit": {"horizon": 1},
        "kl": {"placement": "loss", "estimator": "exact_local", "beta": 0.1},
        "rollout": {"prompts": 4, "max_new_tokens": 6},
    }


def placed(config: Tree) -> tuple[Lane, Accelerator]:
    """A lane that is ready to train."""
    lane, accelerator = build(settings.load(config)), Accelerator(cpu=True)
    lane.place(accelerator)
    return lane, accelerator


# What a step learns from


def test_every_epoch_visits_every_record_once_in_the_order_of_prompts(offline: Tree) -> None:
    lane, _ = placed(offline)
    assert lane.stored is not None
    ids = [collect(lane, step).columns["id"] for step in (1, 2, 3)]
    assert sorted(ids[0] + ids[1][:2]) == sorted(row["id"] for row in lane.train_prompts.records)
    assert sorted(ids[1][2:] + ids[2]) == sorted(ids[0] + ids[1][:2]) != ids[0] + ids[1][:2]
    assert ids[0] == lane.train_prompts.batch(1, 4).columns["id"]
    assert [lane.stored.used(step, 4) for step in (1, 2, 3)] == [4, 6, 6]


def test_a_stored_rollout_is_data_with_the_end_that_was_written(offline: Tree) -> None:
    offline["rollout"]["max_new_tokens"] = 4
    lane, _ = placed(offline)
    rollout = collect(lane, 1)
    assert rollout.origin == "data" and rollout.behaviour_logp_BT is None and rollout.annotation_BT is None
    assert rollout.group_B.tolist() == [0, 1, 2, 3]
    full = [row["completion"] for row in lane.train_prompts.records]
    for text, end, ids in zip(rollout.texts(), rollout.end_B.tolist(), rollout.completion_ids(), strict=True):
        assert (end == End.EOS) == (text in full and len(ids) < 5 and ids[-1] == lane.eos_ids[0])
        assert len(ids) <= 4
    assert any("longer than rollout.max_new_tokens=4 are cut, with 0 spans" in note for note in lane.stored.notes)  # type: ignore[union-attr]


def test_known_tokens_are_never_made_again(offline: Tree, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "the"]
    assert tokenizer("the")["input_ids"] != letters
    rows = [record(n, completion="the", token_ids=letters) for n in range(4)]
    write_jsonl("stored.jsonl", rows)
    lane, _ = placed(offline)
    assert collect(lane, 1).completion_ids()[0] == letters, "no EOS is added either"


def test_messages_become_prompts_once(offline: Tree, tiny_model: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, "chat")
    tokenizer = AutoTokenizer.from_pretrained("chat")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained("chat")
    rows = [record(n, messages=[{"role": "user", "content": f"m{n}"}]) for n in range(4)]
    for row in rows:
        del row["prompt"]
    write_jsonl("stored.jsonl", rows)
    offline["model"]["path"] = "chat"
    lane, _ = placed(offline)
    assert set(collect(lane, 1).columns["prompt"]) <= {f"<m{n}>" for n in range(4)}


def test_messages_without_a_template_name_a_key_that_there_is(offline: Tree) -> None:
    rows = [record(n, messages=[{"role": "user", "content": f"m{n}"}], plain=f"m{n}") for n in range(4)]
    for row in rows:
        del row["prompt"]
    write_jsonl("stored.jsonl", rows)
    with pytest.raises(ValueError, match=r"no chat template; use a chat model, or name a text column in data\.prompt$"):
        placed(offline)
    offline["data"]["prompt"] = "plain"
    placed(offline)


# The gradient


def test_a_warm_start_is_cross_entropy_over_every_completion_token(offline: Tree) -> None:
    """`unmarked: 1` and no spans: the loss and its gradient, the end of the completion included."""
    write_jsonl("stored.jsonl", [record(n, spans=[]) for n in range(8)])
    offline["rewards"]["spans"] |= {"unmarked": 1.0, "weights": {"none": 0.0}}
    offline |= {"kl": {"beta": 0}}
    offline["train"] = {"steps": 1, "micro_batch": 3}
    offline["optimiser"] = {"learning_rate": 1e-12, "max_grad_norm": 1e9}
    lane, accelerator = placed(offline)
    rollout = collect(lane, 1)
    terms = []
    for i in range(len(rollout)):
        prompt = rollout.prompt_BP[i, : rollout.prompt_length_B[i]]
        answer = rollout.tokens_BT[i, : rollout.length_B[i]]
        assert answer[-1] == lane.eos_ids[0]
        logits = lane.policy.model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        terms.append(cross_entropy(logits, answer, reduction="none"))
    expected = torch.cat(terms).mean()
    parameters = [p for p in lane.policy.parameters() if p.requires_grad]
    truth = torch.autograd.grad(expected, parameters)
    found: list[torch.Tensor] = []
    clip = accelerator.clip_grad_norm_
    accelerator.clip_grad_norm_ = lambda ps, norm: (found.extend(p.grad.clone() for p in parameters), clip(ps, norm))[1]
    row = loop.train_step(lane, 1, accelerator)
    assert row["loss/likelihood"] == pytest.approx(expected.item(), rel=1e-5)
    scale = max(float(g.abs().max()) for g in truth)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5 * scale) for a, b in zip(truth, found, strict=True))


def test_the_gradient_of_two_processes_is_that_of_one(offline: Tree) -> None:
    offline["rollout"]["prompts"] = 5  # 2 and 3 a process
    offline["train"] = {"steps": 1, "micro_batch": 2}
    Path("stored.yaml").write_text(yaml.safe_dump(offline))
    ((one, two),) = one_and_two(["stored.yaml"])
    assert_same_gradients(two, one)


def test_two_processes_write_the_metrics_of_one(offline: Tree, tmp_path: Path) -> None:
    """What moved is summed over processes too: 2 held-out records, one on each."""
    Path("stored.yaml").write_text(yaml.safe_dump(offline))
    torchrun(2, "-m", "rlkl", "train", "stored.yaml", "name=two")
    one, two = metrics(rlkl.train(offline)), metrics(tmp_path / "runs" / "two")
    assert "annotated/change/bad_stderr" in one[-1]
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("loss", ["signed", "unlikelihood", "npo", "contrastive", "binary", "regression", "rwr"])
def test_every_loss_learns_from_stored_completions(loss: str, offline: Tree) -> None:
    offline["trainer"]["loss"] = loss
    if loss in ("binary", "regression", "rwr"):
        offline["kl"] = {"beta": 0.5}
    rows = metrics(rlkl.train(offline))
    assert rows[-1]["annotated/change/bad"] < rows[-1]["annotated/change/good"]


# Evaluation


def test_stored_spans_judge_no_new_sample_and_what_remains_is_reported(offline: Tree) -> None:
    rows = metrics(rlkl.train(offline))
    assert not [key for row in rows for key in row if key.startswith("reward/eval/") and key != "reward/eval/queries"]
    assert {"kl/sequence", "policy/eval/entropy", "annotated/logp/bad", "annotated/moved/unmarked"} <= rows[0].keys()
    assert [row["reward/queries"] for row in rows[1:]] == [4, 6]
    assert not [key for row in rows for key in row if key in ("kl/penalty", "policy/sampling_gap")]


def test_a_function_of_weight_0_is_watched(offline: Tree) -> None:
    offline["rewards"]["overlap"] = {"type": "function", "path": "rlkl.rewards.overlap:word_f1", "weight": 0}
    watched, alone = (
        rlkl.train({**offline, "name": "a"}),
        rlkl.train({**offline, "name": "b", "rewards": {"spans": offline["rewards"]["spans"]}}),
    )
    assert "reward/eval/overlap_stderr" in metrics(watched)[0]
    keys = ("kl/sequence", "annotated/logp/bad")
    assert [metrics(watched)[-1][key] for key in keys] == [metrics(alone)[-1][key] for key in keys]


def test_held_out_prompts_are_distinct_and_their_records_all_measured(offline: Tree) -> None:
    write_jsonl("stored.jsonl", [record(n, prompt=f"P{n % 4}:") for n in range(8)])
    offline["data"]["held_out"] = 0.5
    lane, _ = placed(offline)
    assert len(lane.held_out.ids) == 2 and lane.marked is not None and len(lane.marked.rollout) == 4
    assert not {"completion", "spans", "token_ids"} & lane.held_out.columns.keys()
    trained = {row["prompt"] for row in lane.train_prompts.records}
    assert not trained & set(lane.marked.rollout.columns["prompt"])


def test_runs_are_repeatable_and_evaluated_again(offline: Tree) -> None:
    one, two = (rlkl.train({**offline, "name": name}) for name in "ab")
    assert metrics(one) == metrics(two)
    from rlkl.runs import evaluate_run, sample_run

    again = evaluate_run(one, None, None, None)
    assert {key: again[key] for key in again} == {key: metrics(one)[-1][key] for key in again}
    assert len(list(sample_run(one, [], 2, 1, 0))) == 4


# Mistakes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "trainer.type=reinforce",
            "policy gradients need the policy's own samples); use trainer.type=token_likelihood",
        ),
        ("kl.estimator=exact", "kl.estimator=exact with data.type=annotated: its score term is exact on the policy's"),
        ("kl.target=1", "kl.target=1.0 with data.type=annotated: beta adapts to a KL"),
        ("rollout.temperature=0.5", "rollout.temperature=0.5 with data.type=annotated: nothing is sampled in training"),
        ("rollout.samples_per_prompt=3", "rollout.samples_per_prompt=3 with data.type=annotated"),
        ("rollout.record=true", "rollout.record=true with data.type=annotated"),
        ("rollout.replay=runs/x", "rollout.replay=runs/x with data.type=annotated"),
        ("rewards.spans.weight=0", "rewards with data.type=annotated: no source says what the labels weigh"),
        ("rewards.f={type: function, path: 'a:b'}", "set rewards.f.weight=0 to watch it"),
        ("rewards.spans.weights={good: 1}", "rewards.spans.weights: none for 'bad' (record '"),
        ("data.held_out=missing.jsonl", "missing.jsonl: no such file"),
        ("data.max_prompt_tokens=2", "prompts are too long"),
        ("data.prompt=nope", "record '0': no text in column 'nope' (columns: id, prompt, completion, spans, gold)"),
    ],
)
def test_mistakes_are_one_line_before_the_start(
    override: str, said: str, offline: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("stored.yaml").write_text(yaml.safe_dump(offline))
    assert cli.main(["train", "stored.yaml", override]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"completion": "", "spans": []}, "stored.jsonl:3: completion: empty"),
        ({"spans": [{"start": 0, "end": 99, "label": "bad"}]}, "stored.jsonl:3: spans[0]: 0:99 is no part"),
        ({"token_ids": [999999]}, "token_ids: 999999 is beyond"),
        ({"id": "1"}, "stored.jsonl:3: id: '1' again"),
    ],
)
def test_a_bad_record_is_named(broken: Tree, said: str, offline: Tree) -> None:
    write_jsonl("stored.jsonl", [record(n, **(broken if n == 2 else {})) for n in range(8)])
    with pytest.raises(ValueError) as error:
        rlkl.train(offline)
    assert said in str(error.value)


def test_completions_without_a_mark_are_refused_and_a_batch_without_one_moves_nothing(offline: Tree) -> None:
    write_jsonl("bare.jsonl", [record(n, spans=[]) for n in range(8)])
    with pytest.raises(ValueError, match=r"none of the 6 training completions has a span.*unmarked"):
        rlkl.train(offline, ["data.path=bare.jsonl"])
    for marked in range(8):  # the one that is marked shall be a training record
        rows = [record(n) if n == marked else record(n, spans=[]) for n in range(8)]
        write_jsonl("rare.jsonl", rows)
        try:
            run = rlkl.train(offline, ["data.path=rare.jsonl", "rollout.prompts=1", "train.steps=6"], overwrite=True)
        except ValueError:
            continue
        break
    found = metrics(run)[1:]
    assert sorted(row["policy/skipped"] for row in found) == [0, 1, 1, 1, 1, 1]
    assert all(row["policy/grad_norm"] == 0 for row in found if row["policy/skipped"])


def test_what_defaults_meet_is_accepted(offline: Tree) -> None:
    """The default of samples_per_prompt is ignored, 1 says the same, and a written configuration reloads."""
    for value in (4, 1):
        config = settings.load({**offline, "rollout": {**offline["rollout"], "samples_per_prompt": value}})
        assert config.samples == 1 and settings.load(dump(config)) == config
    from rlkl.summary import describe

    assert "a step:      4 stored completions, at most 24 tokens" in describe(config)


def test_the_order_is_the_one_of_prompts() -> None:
    prompts = PromptSet([{"prompt": str(i)} for i in range(5)], [[i] for i in range(5)], None, seed=3)
    assert [prompts.batch(2, 3).ids[i][0] for i in range(3)] == prompts.places(2, 3)


def test_asked_keeps_the_first_of_equal_prompts() -> None:
    rows = [{"prompt": p, "gold": i, "spans": [], "completion": "x"} for i, p in enumerate("abab")]
    kept = stored.asked(PromptSet(rows, [[ord(r["prompt"])] for r in rows], None, seed=0))
    assert kept.records == [{"prompt": "a", "gold": 0}, {"prompt": "b", "gold": 1}]
    assert kept.ids == [[97], [98]]
    assert json.dumps(rows)


# Real feedback

QA = HERE.parent.parent / "shared" / "data" / "qa_feedback_a.jsonl"


@pytest.mark.skipif(
    not QA.is_file(), reason="needs ../shared/data/qa_feedback_a.jsonl, which is no part of the project"
)
@pytest.mark.parametrize("loss", ["unlikelihood", "signed"])
def test_human_error_spans_reach_the_loss_and_the_report(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of configs/annotated.yaml on the real file, with a smaller model and fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path / "cache"))
    assert cli.main(["data", "import", "qa-feedback", str(QA), "-o", "ann.jsonl"]) == 0
    small = ["model.hidden=16", "model.layers=1", "model.steps=2", "train.steps=2", "log.with=[]"]
    small += [
        "evaluate.prompts=2",
        "optimiser.warmup_steps=0",
        "rollout.max_new_tokens=64",
        "optimiser.learning_rate=0.01",
        f"trainer.loss={loss}",
    ]
    config = str(HERE.parent / "configs" / "annotated.yaml")
    assert cli.main(["train", config, "data.path=ann.jsonl", *small]) == 0
    said = capsys.readouterr().out
    assert "167 records (83 held out, evaluated on 2 prompts)" in said
    assert ("warning: trainer.loss=signed" in said) == (loss == "signed")
    rows = metrics(Path("runs/annotated"))
    kinds = {"Irrelevant", "Unverifiable", "Wrong-Grounding", "Redundant", "marked", "unmarked"}
    assert {f"annotated/logp/{kind}_stderr" for kind in kinds} <= rows[-1].keys()
    assert rows[-1]["annotated/change/marked"] < 0
    assert rows[-1]["reward/queries"] == 32
