"""Training on stored preference pairs: the rows of a step, the gradient, held-out accuracy, mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from conftest import Tree, metrics, write_jsonl
from models import assert_same_gradients
from test_distributed import one_and_two, torchrun
from test_stored import placed
from transformers import AutoTokenizer

import rlkl
from rlkl import cli, runs, settings
from rlkl.config import dump
from rlkl.data import paired
from rlkl.lane import collect
from rlkl.types import End


def record(n: int, **fields: Any) -> dict[str, Any]:
    """A pair in which the side with more of the letter a is preferred."""
    return {"prompt": f"P{n}:", "chosen": " a" * (1 + n % 3), "rejected": " b" * (1 + n % 2), "note": n, **fields}


@pytest.fixture
def offline(tiny_config: Tree) -> Tree:
    """Two steps of DPO on stored pairs, without any reward."""
    write_jsonl("pairs.jsonl", [record(n) for n in range(8)])
    return {
        **tiny_config,
        "rewards": {},
        "data": {"type": "pairs", "path": "pairs.jsonl", "held_out": 0.25},
        "trainer": {"type": "dpo"},
        "kl": {"beta": 0.5},
        "rollout": {"prompts": 3, "max_new_tokens": 8},
    }


def test_a_step_has_both_sides_of_its_records_and_ends_them_by_eos(offline: Tree) -> None:
    lane, _ = placed(offline)
    rollout = collect(lane, 1)
    assert rollout.origin == "data" and rollout.behaviour_logp_BT is None
    assert rollout.get("pair_B").tolist() == [0, 1, 2, 3, 4, 5] and rollout.group_B.tolist() == [0, 0, 1, 1, 2, 2]
    numbers = rollout.columns["note"]
    assert numbers[0::2] == numbers[1::2] and not {"chosen", "rejected"} & rollout.columns.keys()
    expected = [record(n)[side] for n in numbers[0::2] for side in ("chosen", "rejected")]
    assert rollout.texts() == expected and set(rollout.end_B.tolist()) == {int(End.EOS)}
    assert rollout.columns["prompt"] == [f"P{n}:" for n in numbers]


def test_long_sides_are_cut_and_counted(offline: Tree) -> None:
    offline["rollout"]["max_new_tokens"] = 2
    lane, _ = placed(offline)
    rollout = collect(lane, 1)
    assert int(rollout.length_B.max()) == 2 and int(End.LIMIT) in rollout.end_B.tolist()
    assert lane.stored is not None and "longer than rollout.max_new_tokens=2 are cut" in lane.stored.notes[0]


def test_pairs_that_the_cut_makes_equal_are_refused(offline: Tree) -> None:
    write_jsonl("pairs.jsonl", [*(record(n) for n in range(8)), record(9, chosen=" a" * 20 + " b", rejected=" a" * 20)])
    offline["rollout"]["max_new_tokens"] = 16
    with pytest.raises(
        ValueError, match=r"1 of 9 pairs are equal in their first rollout\.max_new_tokens=16 tokens and p"
    ):
        placed(offline)
    offline["rollout"]["max_new_tokens"] = 21
    placed(offline)


def chat(tiny_model: Path, template: str) -> Any:
    shutil.copytree(tiny_model, "chat")
    tokenizer = AutoTokenizer.from_pretrained("chat")
    tokenizer.chat_template = template
    tokenizer.save_pretrained("chat")
    return tokenizer


CONVERSATION: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def test_conversations_go_through_the_template_and_have_one_eos(
    offline: Tree, tiny_model: Path, tmp_path: Path
) -> None:
    chat(tiny_model, TEMPLATE)
    rows = [CONVERSATION | {"prompt": [{"role": "user", "content": f"q{n}"}]} for n in range(4)]
    write_jsonl("pairs.jsonl", rows)
    offline["model"]["path"] = "chat"
    lane, _ = placed(offline)
    rollout = collect(lane, 1)
    assert rollout.texts() == ["yes", "no"] * 3
    assert all(ids.count(lane.eos_ids[0]) == 1 for ids in rollout.completion_ids())
    assert {text[:4] for text in rollout.columns["prompt"]} == {"[u]q"} and rollout.columns["prompt"][0].endswith("[a]")
    assert metrics(rlkl.train(offline))[-1]["kl/sequence"] > 0


def test_a_template_that_rewrites_the_prompt_is_refused(offline: Tree, tiny_model: Path) -> None:
    tokenizer = chat(tiny_model, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="the chat template writes the prompt in another way once the answer follows"):
        paired.completion_ids({"messages": CONVERSATION["prompt"], **CONVERSATION}, "chosen", tokenizer, 0)


def test_anything_that_datasets_reads_gives_the_same_run(offline: Tree) -> None:
    rows = [record(n) for n in range(8)]
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "other": datasets.Dataset.from_list(rows[:2])}
    ).save_to_disk("saved")
    one = rlkl.train({**offline, "name": "one"})
    offline["data"]["path"] = "saved"
    two = rlkl.train({**offline, "name": "two"})
    assert metrics(one) == metrics(two)


def test_training_prefers_the_chosen_side_of_held_out_pairs(offline: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    offline["train"]["steps"] = 12
    run = rlkl.train(offline)
    rows = metrics(run)
    said = capsys.readouterr().out
    assert "6 records (2 held out, evaluated on 2 prompts)" in said and "accuracy 0.500 ± 0.000" in said
    assert rows[0]["preference/eval/accuracy"] == 0.5 and rows[0]["preference/eval/margin"] == 0
    assert rows[-1]["preference/eval/accuracy"] == 1 and rows[-1]["preference/eval/margin"] > 0.5
    assert [row["reward/queries"] for row in rows[1:4]] == [3, 6, 6]  # a preference costs its label once
    assert rows[-1]["tokens/generated"] == 0 and rows[-1]["kl/sequence"] > 0
    again = runs.evaluate_run(run, None, None, None)
    assert again["preference/eval/margin"] == pytest.approx(rows[-1]["preference/eval/margin"], rel=1e-5)
    assert "stored preference pairs" in (run / "final" / "README.md").read_text(encoding="utf-8")


def test_held_out_numbers_by_hand(offline: Tree) -> None:
    from rlkl import pairs
    from rlkl.types import PolicyOutput, Rollout

    class Moved:
        def __call__(self, rollout: Rollout, need: set[str]) -> PolicyOutput:
            x_BT = torch.ones(rollout.tokens_BT.shape) * rollout.policy_mask_BT
            return PolicyOutput(logp_BT=2 * x_BT, ref_logp_BT=x_BT)

    lane, _ = placed(offline)
    assert lane.stored is not None
    sides = [("QZX", "Q"), ("Q", "QZ"), ("Q", "Z")]
    rollout = lane.stored.make([record(n, chosen=x, rejected=y) for n, (x, y) in enumerate(sides)])
    lengths = rollout.length_B.double()
    margin = 0.5 * (lengths[0::2] - lengths[1::2])
    assert margin[0] > 0 > margin[1] and margin[2] == 0
    for micro_batch in (2, 64):
        found = pairs.measure(Moved(), rollout, 0.5, micro_batch)
        assert found["preference/eval/accuracy"] == 0.5
        assert found["preference/eval/margin"] == pytest.approx(float(margin.mean()))
        assert found["preference/eval/margin_stderr"] == pytest.approx(float(margin.std() / 3**0.5))


def test_two_processes_are_one(offline: Tree, tmp_path: Path) -> None:
    offline["rollout"]["prompts"] = 5
    offline["train"] = {"steps": 1, "micro_batch": 2}
    Path("pairs.yaml").write_text(yaml.safe_dump(offline))
    ((one, two),) = one_and_two(["pairs.yaml"])
    assert_same_gradients(two, one)
    torchrun(2, "-m", "rlkl", "train", "pairs.yaml", "name=both")
    ours, theirs = metrics(rlkl.train(offline))[-1], metrics(tmp_path / "runs" / "both")[-1]
    assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.type=reinforce", "use trainer.type=dpo"),
        ("trainer.type=token_likelihood", "use trainer.type=dpo"),
        ("rollout.samples_per_prompt=6", "rollout.samples_per_prompt=6 with data.type=pairs"),
        ("train.micro_batch=3", "train.micro_batch=3 with trainer.type=dpo"),
        ("rewards.f={type: function, path: 'a:b'}", "set rewards.f.weight=0 to watch it"),
        ("rewards.s={type: annotations, weights: {x: 1}}", "these records have no spans"),
        ("kl.beta=0", "this loss holds kl.beta itself"),
    ],
)
def test_keys_that_mean_nothing_here_are_refused(override: str, said: str, offline: Tree) -> None:
    with pytest.raises(ValueError) as error:
        settings.load(offline, [override])
    assert said in str(error.value)
    config = settings.load(offline)
    assert settings.load(dump(config)) == config


def test_other_runs_need_a_reward(tiny_config: Tree) -> None:
    tiny_config["rewards"] = {}
    with pytest.raises(ValueError, match=r"rewards=\{\}: name at least 1 source"):
        settings.load(tiny_config)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("[]", "pairs.jsonl:2: a list; every record must be an object"),
        ({"chosen": "a", "rejected": "b"}, "pairs.jsonl:2: prompt: missing (there are: chosen, rejected)"),
        (record(1, chosen=None), "pairs.jsonl:2: chosen: missing; it must be a text, as the prompt is"),
        (record(1, rejected=""), "pairs.jsonl:2: rejected: empty; it must be a text"),
        (record(1, rejected=3), "pairs.jsonl:2: rejected: a whole number; it must be a text"),
        (record(1, prompt=7), "pairs.jsonl:2: prompt: a whole number; it must be text, or a list of {role, content}"),
        (record(1, rejected=" a a"), "pairs.jsonl:2: rejected: equal to chosen, which prefers nothing"),
        (record(1, messages=[]), "pairs.jsonl:2: messages: this name has another meaning here"),
        (CONVERSATION | {"chosen": "yes"}, "pairs.jsonl:2: chosen: a text; it must be text, or a list of"),
        (CONVERSATION | {"chosen": []}, "pairs.jsonl:2: chosen: empty; it must be"),
        (
            CONVERSATION | {"chosen": [{"role": "assistant"}]},
            "pairs.jsonl:2: chosen[0]: content: null; it must be a text",
        ),
        (CONVERSATION, "has no chat template; use a chat model, or write prompt, chosen and rejected as texts"),
        ("nothing", "pairs.jsonl:2: not valid JSON"),
    ],
)
def test_bad_records_name_their_place_the_field_and_a_remedy(
    bad: Any, said: str, offline: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    line = bad if isinstance(bad, str) else json.dumps(bad)
    Path("pairs.jsonl").write_text(json.dumps(record(0)) + "\n" + line + "\n")
    Path("c.yaml").write_text(yaml.safe_dump(offline))
    assert cli.main(["train", "c.yaml"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert said in error
    assert not Path("runs").exists()
