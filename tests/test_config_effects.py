"""Every key of the configuration does what it says: each has a test below that shows its effect on a run.

``shows`` names the keys that a test is about, and the last test compares these names with the models, so that a key
without a test fails. Runs are of the tiny model; two runs differ in the key alone.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import RECORDS, Tree, metrics, reward_model, write_jsonl
from pydantic import BaseModel
from safetensors.torch import load_file
from test_distributed import HERE, torchrun
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rlkl
from rlkl import RunError, checkpoint, kl, settings
from rlkl.config import AnnotationsSource, Config
from rlkl.lane import Lane, build
from rlkl.rewards.annotations import AnnotationReward
from rlkl.types import PolicyOutput, Rollout

SHOWN: set[str] = set()
Test = Callable[..., None]
Run = Callable[..., Path]


def shows(*keys: str) -> Callable[[Test], Test]:
    """This test shows what these keys do."""
    SHOWN.update(keys)
    return lambda test: test


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a section and below; the members of a union stand under their type, what they share beside it."""
    for name, field in model.model_fields.items():
        name = field.alias or name
        members = list(sections(field.annotation))
        tagged = [m for m in members if "type" in m.model_fields]
        if not members:
            yield prefix + name
        elif not tagged:
            if field.annotation is not members[0]:  # may be left out
                yield prefix + name
            yield from keys(members[0], f"{prefix}{name}.")
        for member in tagged:
            (tag,) = get_args(member.model_fields["type"].annotation)
            shared = {key for base in member.__mro__[1:] for key in getattr(base, "model_fields", {})}
            for key in keys(member):
                own = key.split(".")[0] not in shared
                yield f"{prefix}{name}.{tag}.{key}" if own else f"{prefix}{name}.{key}"


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, dict):
        for part in get_args(annotation):
            yield from sections(part)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training the tiny model."""
    monkeypatch.setattr("rlkl.plots.curves", lambda folder: folder / "curves.png")


@pytest.fixture
def run(tiny_config: Tree) -> Run:
    """``run({"key.sub": value})``: the folder of a run of the tiny configuration with these changes."""
    count = iter(range(100))

    def trained(changes: Tree | None = None) -> Path:
        return rlkl.train(changed(tiny_config, {"name": f"run-{next(count)}", **(changes or {})}))

    return trained


def changed(config: Tree, changes: Tree) -> Tree:
    """A deep copy with ``{"key.sub": value}`` changes."""
    config = json.loads(json.dumps(config))
    for key, value in changes.items():
        *path, leaf = key.split(".")
        section = config
        for part in path:
            section = section.setdefault(part, {})
        section[leaf] = value
    return config


def weights(run: Path, name: str = "final") -> dict[str, Tensor]:
    """The tensors of a model of a run."""
    return load_file(next((run / name).glob("*.safetensors")))


def moved(run: Path) -> Tensor:
    """What training added to the weights."""
    before, after = weights(run, "reference"), weights(run)
    return torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)])


def series(run: Path, name: str) -> list[float]:
    """A metric of the training steps."""
    return [row[name] for row in metrics(run)[1:]]


def same(one: Path, other: Path, rel: float = 1e-4) -> bool:
    """Whether two runs went the same way up to rounding."""
    rows = zip(metrics(one), metrics(other), strict=True)
    return all(a == pytest.approx(b, rel=rel, abs=1e-5) for a, b in rows)


# The run


@shows("name", "folder")
def test_the_run_is_written_below_its_folder_by_its_name(run):
    assert run({"name": "my-run", "folder": "some/where"}) == Path("some/where/my-run")
    assert (Path("some/where/my-run") / "metrics.jsonl").is_file()


@shows("seed")
def test_the_seed_changes_split_order_and_samples(run, tiny_config):
    from rlkl.data.prompts import PromptSet, records

    runs = [run({"seed": seed, "data.held_out": "other.jsonl"}) for seed in map(seeded, (0, 0, 1))]
    assert series(runs[0], "reward/train/total") == series(runs[1], "reward/train/total")
    assert series(runs[0], "reward/train/total") != series(runs[2], "reward/train/total")
    assert metrics(runs[0])[0] != metrics(runs[2])[0]  # the same held-out prompts, other samples
    config = settings.load(tiny_config)
    held = {tuple(row["prompt"] for row in records(config.data, seed)[1]) for seed in range(6)}
    assert len(held) > 1
    tokenizer = AutoTokenizer.from_pretrained(tiny_config["model"]["path"])
    orders = set()
    for seed in range(6):
        prompts = PromptSet.tokenise(RECORDS, tokenizer, seed, None, 1)
        epoch = [text for step in (1, 2, 3, 4) for text in prompts.batch(step, 2).columns["prompt"]]
        assert sorted(epoch) == [record["prompt"] for record in RECORDS]
        orders.add(tuple(epoch))
    assert len(orders) == 6


def seeded(seed: int) -> int:
    write_jsonl("other.jsonl", [{"prompt": "Held out:"}, {"prompt": "Held out too:"}])
    return seed


# The model


def another(model: Path, folder: Path) -> Path:
    """A copy of a model with other weights."""
    copy = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        copy.lm_head.weight.mul_(0.5)
    copy.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@shows("model.pretrained.type", "model.pretrained.path")
def test_the_model_of_this_path_is_trained(run, tiny_model, tmp_path):
    other = another(tiny_model, tmp_path / "other")
    trained = run({"model": {"type": "pretrained", "path": str(other)}})
    assert torch.equal(
        weights(trained, "reference")["lm_head.weight"], load_file(other / "model.safetensors")["lm_head.weight"]
    )
    assert metrics(trained)[0]["policy/eval/entropy"] > metrics(run())[0]["policy/eval/entropy"]


@shows("model.facts.type")
def test_the_model_of_the_task_facts_is_trained(run, tiny_model, tmp_path, monkeypatch):
    other = another(tiny_model, tmp_path / "other")
    monkeypatch.setattr("rlkl.tasks.facts.load_path", lambda: other)
    trained = weights(run({"model": {"type": "facts"}}), "reference")
    assert torch.equal(trained["lm_head.weight"], load_file(other / "model.safetensors")["lm_head.weight"])


@shows("model.fix.type", "model.fix.says")
def test_the_models_of_the_task_fix_are_trained(run, tiny_model, tmp_path, monkeypatch):
    paths = {"edits": another(tiny_model, tmp_path / "other"), "critiques": tiny_model}
    monkeypatch.setattr("rlkl.tasks.fix_model.load_path", lambda says: paths[says])
    for says, path in paths.items():
        trained = weights(run({"model": {"type": "fix", "says": says}}), "reference")
        assert torch.equal(trained["lm_head.weight"], load_file(path / "model.safetensors")["lm_head.weight"])


@shows(*(f"model.tiny.{key}" for key in ("type", "texts", "vocabulary", "hidden", "layers", "context", "steps")))
@shows("model.tiny.learning_rate")
def test_a_tiny_model_is_built_as_asked(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path / "cache"))
    asked: Tree = {}

    def untrained(documents: list[str], tokenizer: Any, **given: Any) -> LlamaForCausalLM:
        asked.update(given, documents=documents)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=given["hidden"],
                intermediate_size=32,
                num_hidden_layers=given["layers"],
                num_attention_heads=given["heads"],
                max_position_embeddings=given["context"],
                eos_token_id=tokenizer.eos_token_id,
            )
        )

    monkeypatch.setattr("rlkl.tasks.pretrain.pretrain", untrained)
    tiny = {"texts": ["prompt", "gold"], "vocabulary": 263, "hidden": 16, "layers": 3, "context": 40}
    trained = run({"model": {"type": "tiny", **tiny, "steps": 7, "learning_rate": 0.5}})
    config = json.loads((trained / "final/config.json").read_text())
    assert (config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]) == (263, 16, 3)
    assert config["max_position_embeddings"] == 40
    assert (asked["steps"], asked["lr"]) == (7, 0.5)
    assert set(asked["documents"]) < {f"{record['prompt']} {record['gold']}" for record in RECORDS}
    run({"model": {"type": "tiny", **tiny, "texts": ["gold"]}})
    assert set(asked["documents"]) < {record["gold"] for record in RECORDS}


@shows("model.lora", "model.lora.rank", "model.lora.alpha", "model.lora.targets")
def test_an_adapter_of_this_shape_trains_in_place_of_the_weights(run):
    trained = run({"model.lora": {"rank": 3, "alpha": 6.0, "targets": ["q_proj"]}})
    saved = json.loads((trained / "final/adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["target_modules"]) == (3, 6.0, ["q_proj"])
    tensors = weights(trained)
    assert {name.split(".")[-3] for name in tensors} == {"q_proj"}
    assert {tuple(x.shape) for x in tensors.values()} == {(3, 32), (32, 3)}
    stronger = run({"model.lora": {"rank": 3, "alpha": 60.0, "targets": ["q_proj"]}})
    assert metrics(stronger)[-1]["kl/sequence"] > metrics(trained)[-1]["kl/sequence"] > 0
    assert not (run() / "final/adapter_config.json").exists()


@shows("model.reference")
def test_kl_is_measured_to_the_reference_that_is_named(run, tiny_model, tmp_path):
    other = another(tiny_model, tmp_path / "other")
    trained = run({"model.reference": str(other)})
    assert metrics(trained)[0]["kl/sequence"] > 0
    assert series(trained, "kl/penalty")[0] != 0
    assert metrics(run({"model.reference": "initial"}))[0]["kl/sequence"] == 0


@shows("model.dtype")
def test_the_weights_have_the_precision_asked_for(run):
    for name in ("float32", "bfloat16"):
        assert {x.dtype for x in weights(run({"model.dtype": name})).values()} == {getattr(torch, name)}


@shows("model.critic")
def test_a_separate_critic_leaves_the_trunk_of_the_policy_alone(run):
    learned = {"credit.baseline": "value", "kl.beta": 0.0, "rewards.varied.weight": 0.0, "trainer.value_coef": 1.0}
    learned["rewards.one"] = {"type": "function", "path": "test_config_effects:one"}
    learned |= {"rollout.max_new_tokens": 1, "train.steps": 3}
    runs = {where: run({**learned, "model.critic": where}) for where in ("trunk", "separate")}
    assert series(runs["trunk"], "loss/value")[0] == series(runs["separate"], "loss/value")[0] > 0
    assert series(runs["trunk"], "loss/value")[2] != series(runs["separate"], "loss/value")[2]


def one(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0] * len(prompts)


# The data


@shows("data.facts.type")
def test_the_prompts_of_the_task_facts_have_a_split_of_their_own(tiny_config):
    train, held = split({"data": {"type": "facts"}}, tiny_config)
    assert (len(train), len(held)) == (96, 24)
    assert all("three" in text for text in train + held)


@shows("data.fix.type")
def test_the_prompts_of_the_task_fix_have_a_split_of_their_own(tiny_config):
    train, held = split({"data": {"type": "fix"}}, tiny_config)
    assert (len(train), len(held)) == (48, 16) and "0011>" in held


def split(changes: Tree, config: Tree) -> tuple[list[str], list[str]]:
    """Training and held-out prompts."""
    from rlkl.data.prompts import records

    loaded = settings.load(changed(config, changes))
    train, held = records(loaded.data, loaded.seed)
    return [row["prompt"] for row in train], [row["prompt"] for row in held]


@shows("data.jsonl.type", "data.jsonl.path", "data.columns")
def test_prompts_come_from_the_mapped_column_of_the_file(tiny_config):
    write_jsonl("q.jsonl", [{"question": f"Q{n}", "prompt": "no"} for n in range(4)])
    train, held = split({"data": {"type": "jsonl", "path": "q.jsonl", "columns": {"prompt": "question"}}}, tiny_config)
    assert sorted(train + held) == ["Q0", "Q1", "Q2", "Q3"]


@shows("data.annotated.prompt")
def test_another_column_may_be_the_prompt_of_annotated_data(tiny_config):
    spans = [{"start": 0, "end": 1, "label": "x"}]
    rows = [{"id": str(i), "prompt": "long", "short": f"{i}:", "completion": "a", "spans": spans} for i in range(4)]
    write_jsonl("stored.jsonl", rows)
    offline = {
        "data": {"type": "annotated", "path": "stored.jsonl", "prompt": "short"},
        "rewards": {"spans": {"type": "annotations", "weights": {"x": -1.0}}},
        "trainer": {"type": "token_likelihood"},
        "kl": {"beta": 0},
        "rollout": {"prompts": 2, "max_new_tokens": 6},
    }
    lane = build(settings.load({**tiny_config, **offline}))
    assert lane.stored is not None
    prompts = [row["prompt"] for row in (*lane.train_prompts.records, *lane.stored.prompts.records)]
    assert all(prompt.endswith(":") for prompt in prompts)


@shows("data.annotated.type", "data.path")
def test_annotated_data_are_learned_from_as_they_are_stored(run):
    rows = [
        {"id": str(i), "prompt": f"{i}:", "completion": "a b", "spans": [{"start": 0, "end": 1, "label": "x"}]}
        for i in range(4)
    ]
    write_jsonl("stored.jsonl", rows)
    offline = {
        "data": {"type": "annotated", "path": "stored.jsonl", "held_out": 0.5},
        "rewards": {"spans": {"type": "annotations", "weights": {"x": -1.0}}},
        "trainer": {"type": "token_likelihood"},
        "kl": {"placement": "loss", "estimator": "exact_local"},
        "rollout": {"prompts": 2, "max_new_tokens": 6},
    }
    folder = run(offline)
    assert series(folder, "tokens/generated") == [0, 0]
    assert metrics(folder)[-1]["annotated/change/x"] < 0


@shows("data.pairs.type", "data.pairs.split")
def test_pairs_are_learned_from_as_they_are_stored(run, tmp_path):
    import datasets

    rows = [{"prompt": f"{i}:", "chosen": "a b", "rejected": "b a"} for i in range(4)]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    splits = {name: datasets.Dataset.from_list(x) for name, x in (("train", rows), ("swapped", swapped))}
    datasets.DatasetDict(splits).save_to_disk("saved")
    write_jsonl("pairs.jsonl", rows)
    dpo = {"trainer": {"type": "dpo"}, "rewards": {}, "rollout": {"prompts": 2, "max_new_tokens": 6}}

    def preferring(**data: Any) -> float:
        folder = run({**dpo, "data": {"type": "pairs", "held_out": 0.5, **data}})
        assert series(folder, "tokens/generated") == [0, 0]
        return metrics(folder)[-1]["preference/eval/margin"]

    assert preferring(path="pairs.jsonl") == preferring(path="saved") > 0
    assert preferring(path="saved", split="swapped") > 0


@shows("data.held_out")
def test_a_share_or_a_file_is_held_out(tiny_config):
    for share, kept in ((0.25, 2), (0.5, 4), (0.01, 1), (0.99, 7)):
        train, held = split({"data.held_out": share}, tiny_config)
        assert (len(train), len(held)) == (8 - kept, kept)
        assert not set(train) & set(held)
    write_jsonl("held.jsonl", [{"prompt": "elsewhere"}])
    train, held = split({"data.held_out": "held.jsonl"}, tiny_config)
    assert (len(train), held) == (8, ["elsewhere"])


@shows("data.max_prompt_tokens", "data.overlong")
def test_longer_prompts_are_refused_or_left_out(run, capsys):
    write_jsonl("long.jsonl", [*RECORDS, {"prompt": "much longer than the others"}])
    with pytest.raises(ValueError, match="much longer"):
        run({"data.path": "long.jsonl", "data.max_prompt_tokens": 9})
    run({"data.path": "long.jsonl", "data.max_prompt_tokens": 9, "data.overlong": "drop"})
    assert "1 longer" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at most 3"):
        run({"data.max_prompt_tokens": 3, "data.overlong": "drop"})


@shows(*(f"data.datasets.{key}" for key in ("type", "path", "name", "split", "data_files")))
def test_prompts_come_from_datasets(tiny_config, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "table"
    folder.mkdir()
    for part in ("a", "b", "c"):
        write_jsonl(folder / f"{part}.jsonl", [{"prompt": f"{part}{n}"} for n in range(3)])
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: one\n  data_files:\n  - split: train\n    path: a.jsonl\n"
        "- config_name: two\n  data_files:\n  - split: train\n    path: b.jsonl\n"
        "  - split: more\n    path: c.jsonl\n---\n"
    )

    def read(**keys: Any) -> str:
        train, held = split({"data": {"type": "datasets", "path": str(folder), "held_out": 0.4, **keys}}, tiny_config)
        return " ".join(sorted(train + held))

    assert read(name="one") == "a0 a1 a2"
    assert read(name="two") == "b0 b1 b2"
    assert read(name="two", split="more") == "c0 c1 c2"
    assert read(name="two", split="more[:2]") == "c0 c1"
    assert read(path="json", data_files=str(folder / "c.jsonl")) == "c0 c1 c2"


# Rewards and the trainer


@shows("rewards.function.type", "rewards.function.path", "rewards.weight")
def test_the_reward_is_the_weighted_sum_of_its_functions(run):
    single = run()
    double = run({"rewards.varied.weight": 2.0})
    assert series(double, "reward/train/total")[0] == pytest.approx(2 * series(single, "reward/train/total")[0])
    assert series(double, "reward/train/varied")[0] == series(single, "reward/train/varied")[0]
    both = run({"rewards.one": {"type": "function", "path": "test_config_effects:one", "weight": 3.0}})
    assert series(both, "reward/train/one") == [1.0, 1.0]
    assert series(both, "reward/train/total")[0] == pytest.approx(series(single, "reward/train/total")[0] + 3)


@shows("rewards.function.level")
def test_a_reward_may_be_paid_at_every_token(run):
    source = {"type": "function", "path": "test_config_effects:every_token", "level": "token"}
    trained = run({"rewards": {"dense": source}})
    assert series(trained, "reward/train/dense") == pytest.approx(series(trained, "policy/length"))


def every_token(rollout: Rollout) -> Tensor:
    return rollout.policy_mask_BT.float()


@shows(*(f"rewards.annotations.{key}" for key in ("type", "labeller", "weights", "lookahead")))
def test_the_spans_of_a_labeller_are_paid_by_their_weights(run):
    source = {"type": "annotations", "labeller": "test_config_effects:letters", "weights": {"letter": 1.0}}
    counted = {"rewards.letters": {"type": "function", "path": "test_config_effects:count_letters", "weight": 0.0}}
    plain = run({**counted, "rewards.spans": source})
    assert series(plain, "reward/train/spans") == series(plain, "reward/train/letters")
    assert series(plain, "reward/train/letters")[0] > 0
    double = run({"rewards": {"spans": {**source, "weights": {"letter": 2.0}}}})
    heavy = run({"rewards": {"spans": {**source, "weight": 3.0}}})
    first = series(plain, "reward/train/spans")[0]
    assert series(double, "reward/train/spans")[0] == series(double, "reward/train/total")[0] == 2 * first
    assert series(heavy, "reward/train/spans")[0] == first == pytest.approx(series(heavy, "reward/train/total")[0] / 3)
    long = {"credit.gamma": 0.5, "rollout.max_new_tokens": 30}
    soon, late = (run({**long, "rewards": {"spans": {**source, "lookahead": lookahead}}}) for lookahead in (1, 3))
    assert series(soon, "reward/train/spans")[0] == series(late, "reward/train/spans")[0]
    assert series(soon, "credit/return")[0] != series(late, "credit/return")[0]


def letters(completion: str) -> list[Tree]:
    return [{"start": i, "end": i + 1, "label": "letter"} for i, c in enumerate(completion) if c.isalpha()]


def count_letters(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(letters(text))) for text in completions]


COUNTERFACTUAL = {"type": "counterfactual", "template_marginal": "Line:{x_prime}"}


def scored(run: Run, **changes: Any) -> Path:
    return run({"rewards": {"cf": {**COUNTERFACTUAL, **changes}}})


@shows("rewards.counterfactual.type", "rewards.counterfactual.c", "rewards.counterfactual.template_marginal")
def test_the_counterfactual_score_takes_c_times_the_marginal_away(run):
    none, half, whole, other = (
        series(scored(run, **changes), "reward/train/cf")[0]
        for changes in ({"c": 0.0}, {"c": 0.5}, {}, {"template_marginal": "A fox. {x_prime}"})
    )
    assert none < half < whole and half == pytest.approx((none + whole) / 2, rel=1e-5) and other != whole


@shows(*(f"rewards.counterfactual.{key}" for key in ("c_end", "c_steps")))
def test_c_moves_to_its_end(run):
    moved = scored(run, c=0.0, c_end=1.0, c_steps=1)
    assert series(moved, "reward/c/cf") == [1.0, 1.0] and "reward/c/cf" not in metrics(scored(run))[1]
    assert series(moved, "reward/train/cf")[0] == series(scored(run), "reward/train/cf")[0]
    slow = scored(run, c=0.0, c_end=1.0, c_steps=2)
    assert series(slow, "reward/c/cf") == [0.5, 1.0]
    assert series(slow, "reward/train/cf")[0] == series(scored(run, c=0.5), "reward/train/cf")[0]
    (before, after), still = (
        [metrics(one)[row]["reward/eval/cf"] for row in (0, -1)] for one in (moved, scored(run, c=0.0))
    )
    assert before == still[0] and after > still[1] + 1


@shows("rewards.counterfactual.scorer")
def test_another_model_may_score(run, tiny_model, tmp_path):
    other = another(tiny_model, tmp_path / "other")
    own, same, flatter = (series(scored(run, c=0.0, **s), "reward/train/cf")[0] for s in (
        {}, {"scorer": str(tiny_model)}, {"scorer": str(other)},
    ))  # fmt: skip
    assert same == pytest.approx(own, rel=1e-5) and abs(flatter - own) > 0.1


@shows("rewards.counterfactual.template_conditional")
def test_the_template_lays_out_what_the_completion_is_conditioned_on(run):
    plain, gold = (
        series(scored(run, c=0.0, template_conditional=t), "reward/train/cf")[0]
        for t in ("{x}{x_prime}", "{gold}{x_prime}")
    )
    assert plain != gold


@shows("rewards.counterfactual.template_outcome", "rewards.counterfactual.lambda_y")
def test_the_outcome_is_weighed(run):
    without, once, twice = (
        series(scored(run, **changes), "reward/train/cf")[0]
        for changes in ({}, *({"template_outcome": "{x_prime}: {gold}", "lambda_y": weight} for weight in (1, 2)))
    )
    assert once < without - 1 and twice - without == pytest.approx(2 * (once - without), rel=1e-4)


@shows("rewards.counterfactual.auditor")
def test_where_the_verdict_stays_the_score_is_taken_back(run):
    stays, changes = (
        series(scored(run, auditor=f"test_config_effects:{name}"), "reward/train/cf")[0]
        for name in ("one_verdict", "other_verdict")
    )
    assert stays == pytest.approx(0, abs=1e-4) and changes == series(scored(run), "reward/train/cf")[0] != 0


@shows("rewards.counterfactual.template_auditor")
def test_a_classifying_auditor_reads_its_template(run, tiny_model, tmp_path):
    judge = str(reward_model(tiny_model, tmp_path / "judge", num_labels=2))
    alone, after_x = (
        series(scored(run, auditor=judge, template_auditor=t), "reward/train/cf") for t in ("{x_prime}", "{x}{x_prime}")
    )
    assert alone != after_x


JOINT = {
    "predictor": "joint",
    "outcome": "test_config_effects:lengths",
    "template_outcome": "{x_prime}: {y_prime}",
    "y_prime": "odd",
    "budget": 12,
}


def lengths(x: str, x_prime: str) -> str:
    return "odd" if len(x_prime) % 2 else "even"


@shows(*(f"rewards.counterfactual.{key}" for key in ("predictor", "outcome", "y_prime", "budget", "start", "every")))
@shows("rewards.counterfactual.updates", "rewards.counterfactual.learning_rate")
def test_a_joint_predictor_learns_what_came_of_samples(run, tiny_model):
    def trained(**changes: Any) -> Path:
        given = {"scorer": str(tiny_model), **JOINT, **changes}
        return scored(run, **{key: value for key, value in given.items() if value is not None})

    def labels(**changes: Any) -> list[float]:
        return [row.get("reward/labels", 0) for row in metrics(trained(**changes))]

    def loss(**changes: Any) -> float:
        return series(trained(start=0.0, **changes), "reward/learn/cf/loss")[-1]

    assert labels() == [6, 10, 12] and labels(budget=7) == [4, 7, 7]
    assert labels(start=0.0) == [0, 4, 8] and labels(every=2) == [6, 6, 10]
    alone = trained(predictor=None, outcome=None, budget=None)
    assert metrics(alone)[1]["reward/labels"] == 0 and "reward/learn/cf/loss" not in metrics(alone)[1]
    usual = loss()
    assert loss(updates=20) < usual and loss(learning_rate=1e-2) < usual
    assert series(alone, "reward/train/cf") != series(
        trained(predictor=None, outcome=None, budget=None, y_prime="even"), "reward/train/cf"
    )


def one_verdict(x: str, x_prime: str | None) -> str:
    return "the same"


def other_verdict(x: str, x_prime: str | None) -> str:
    return "edited" if x_prime is not None else "as it was"


def slow_verdict(x: str, x_prime: str | None) -> str:
    time.sleep(5)
    return "late"


@shows("rewards.counterfactual.timeout")
def test_an_auditor_has_so_much_time(run):
    with pytest.raises(rlkl.RunError, match="the auditor"):
        scored(run, auditor="test_config_effects:slow_verdict", timeout=0.2)


@shows("rewards.counterfactual.micro_batch")
def test_the_scorers_micro_batch_changes_nothing(run):
    one, many = (series(scored(run, micro_batch=size), "reward/train/cf")[0] for size in (1, 64))
    assert one == pytest.approx(many, rel=1e-5)


@shows("rewards.annotations.unmarked")
def test_unmarked_tokens_are_masked_or_weigh_what_is_asked():
    from test_rewards import rollout

    from rlkl.config import AnnotationsSource
    from rlkl.rewards.annotations import AnnotationReward

    given = {"type": "annotations", "labeller": "test_config_effects:sevens", "weights": {"seven": 2.0}}
    marked = {
        unmarked: AnnotationReward("spans", AnnotationsSource(**given, unmarked=unmarked)).annotate(rollout([[7, 8]]))
        for unmarked in (None, -0.5)
    }
    assert marked[None].annotation_BT.tolist() == [[2.0, 0.0]]
    assert marked[None].annotated_BT.tolist() == [[True, False]]
    assert marked[-0.5].annotation_BT.tolist() == [[2.0, -0.5]]
    assert marked[-0.5].annotated_BT.tolist() == [[True, True]]


def sevens(completion: str) -> list[Tree]:
    return [{"start": i, "end": i + 1, "label": "seven"} for i, c in enumerate(completion) if c == "7"]


ON_SAMPLES = pytest.mark.parametrize("trainer", ["reinforce", "ppo"])


@shows("trainer.reinforce.entropy_coef", "trainer.ppo.entropy_coef")
@ON_SAMPLES
def test_the_entropy_bonus_raises_entropy(run, trainer):
    flat = {"rewards.varied.weight": 0.0, "kl.beta": 0.0, "optimiser.learning_rate": 1e-3, "trainer.type": trainer}
    plain, bonus = run(flat), run({**flat, "trainer.entropy_coef": 1.0})
    assert metrics(plain)[-1]["policy/eval/entropy"] == metrics(plain)[0]["policy/eval/entropy"]
    assert metrics(bonus)[-1]["policy/eval/entropy"] > metrics(bonus)[0]["policy/eval/entropy"]
    assert "policy/entropy" in metrics(bonus)[1]


@shows("trainer.reinforce.value_coef", "trainer.ppo.value_coef")
@ON_SAMPLES
def test_the_value_is_learned_by_its_coefficient(run, trainer):
    learned = {"credit.baseline": "value", "kl.beta": 0.0, "rewards": {"one": {"type": "function"}}, "train.steps": 3}
    learned |= {"rewards.one.path": "test_config_effects:one", "trainer.type": trainer}
    learned |= {"trainer.epochs": 1, "trainer.value_clip": None} if trainer == "ppo" else {}
    losses = {coef: series(run({**learned, "trainer.value_coef": coef}), "loss/value") for coef in (0.0, 0.5)}
    assert losses[0.0] == [0.5, 0.5, 0.5]  # the value stays 0, the return is 1
    assert losses[0.5][0] == 0.5
    assert losses[0.5][2] < losses[0.5][1] < 0.5


@shows("trainer.reinforce.type", "trainer.ppo.type", "trainer.ppo.epochs", "trainer.ppo.minibatches")
@pytest.mark.parametrize(
    ("trainer", "updates"),
    [
        ({"type": "reinforce"}, 1),
        ({"type": "ppo"}, 4),
        ({"type": "ppo", "epochs": 3}, 3),
        ({"type": "ppo", "epochs": 3, "minibatches": 2}, 6),
    ],
)
def test_a_trainer_makes_so_many_updates_on_the_same_samples(run, monkeypatch, trainer, updates):
    calls = counted_calls(monkeypatch)
    trained = run({"trainer": trainer, "train.steps": 1})
    assert calls["backward"] == updates
    assert series(trained, "policy/epochs") == [trainer.get("epochs", {"reinforce": 1, "ppo": 4}[trainer["type"]])]
    assert series(trained, "reward/queries") == [4]


@shows("trainer.ppo.clip")
def test_the_clip_holds_the_ratio_near_one(run):
    near = {"train.steps": 1, "optimiser.learning_rate": 1e-3}
    runs = {clip: run({**near, "trainer": {"type": "ppo", "clip": clip}}) for clip in (1e-3, 1e3)}
    assert series(runs[1e-3], "policy/clip_fraction")[0] > 0 == series(runs[1e3], "policy/clip_fraction")[0]
    assert not torch.equal(*(moved(folder) for folder in runs.values()))


@shows("trainer.ppo.value_clip")
def test_the_clip_of_values_holds_them_near_those_at_sampling(run):
    learned = {"credit.baseline": "value", "kl.beta": 0.0, "rewards": {"one": {"type": "function"}}, "train.steps": 1}
    learned |= {"rewards.one.path": "test_config_effects:one", "trainer.type": "ppo", "trainer.value_coef": 1.0}
    loss = {clip: series(run({**learned, "trainer.value_clip": clip}), "loss/value")[0] for clip in (1e-9, None)}
    assert loss[1e-9] >= 0.5  # the clipped values stay at 0, the return is 1
    assert loss[None] < 0.45


@shows("trainer.ppo.target_kl")
def test_passes_end_where_the_policy_has_moved_past_its_target(run):
    assert series(run({"trainer": {"type": "ppo", "target_kl": 1e-6}}), "policy/epochs") == [2, 2]
    assert series(run({"trainer": {"type": "ppo", "target_kl": 1e6}}), "policy/epochs") == [4, 4]


# Credit; in the first step KL is zero, so that returns are those of the rewards alone.


@shows("credit.horizon")
def test_a_horizon_pays_only_tokens_within_it(run):
    one = run({"credit.horizon": 1})
    assert series(one, "credit/return")[0] == pytest.approx(
        series(one, "reward/train/total")[0] / series(one, "policy/length")[0], rel=1e-5
    )
    full, wide = run(), run({"credit.horizon": 6})
    assert series(full, "credit/return")[0] == series(wide, "credit/return")[0] > series(one, "credit/return")[0]


@shows("credit.gamma")
def test_discounting_pays_earlier_tokens_less(run):
    returns = [series(run({"credit.gamma": gamma}), "credit/return")[0] for gamma in (0.0, 0.5, 1.0)]
    assert returns[0] < returns[1] < returns[2]
    assert returns[0] == pytest.approx(series(run({"credit.horizon": 1}), "credit/return")[0])


@shows("credit.advantage", "credit.lambda")
def test_gae_weighs_later_errors_by_lambda(run):
    learned = {"credit.baseline": "value", "credit.advantage": "gae"}
    spread = [series(run({**learned, "credit.lambda": x}), "credit/return")[0] for x in (0.0, 0.5, 1.0)]
    assert spread[0] < spread[1] < spread[2]  # the value is 0 at first, so this is the advantage
    plain = run({"credit.baseline": "value", "credit.advantage": "returns"})
    assert spread[2] == pytest.approx(series(plain, "credit/return")[0])
    assert spread[1] != pytest.approx(series(plain, "credit/return")[0])


@shows("credit.baseline")
def test_every_baseline_has_advantages_of_its_own(run):
    names = ("none", "batch_mean", "leave_one_out", "ema", "value", "group_norm")
    steps = {name: metrics(run({"credit.baseline": name, "train.steps": 3}))[-1] for name in names}
    assert len({steps[name]["loss/policy"] for name in names}) == len(names)


@shows("credit.ema_decay")
def test_the_decay_keeps_that_share_of_the_old_baseline(run):
    frozen = {"credit.baseline": "ema", "train.steps": 3, "optimiser.learning_rate": 1e-12, "kl.beta": 0.0}
    fast, slow = (metrics(run({**frozen, "credit.ema_decay": decay}))[1:] for decay in (0.0, 0.9))
    assert [row["loss/policy"] for row in fast[:2]] == [row["loss/policy"] for row in slow[:2]]
    assert fast[2]["loss/policy"] != slow[2]["loss/policy"]  # the first two means are mixed in the third step


@shows("credit.bootstrap_truncated")
def test_a_truncated_episode_is_continued_by_its_value(run):
    learned = {"credit.baseline": "value", "trainer.value_coef": 1.0}
    plain, continued = run(learned), run({**learned, "credit.bootstrap_truncated": True})
    assert series(plain, "credit/return")[0] == series(continued, "credit/return")[0]  # the value is 0 at first
    assert series(plain, "credit/return")[1] != series(continued, "credit/return")[1]


SHORT = {"rollout.max_new_tokens": 1, "rollout.prompts": 6, "credit.baseline": "none", "kl.beta": 0.0}


@shows("credit.centre_rewards")
def test_centred_rewards_have_mean_zero(run):
    assert series(run(SHORT), "credit/return")[0] > 0.1
    assert series(run({**SHORT, "credit.centre_rewards": True}), "credit/return")[0] == pytest.approx(0, abs=1e-6)


@shows("credit.whiten_rewards")
def test_whitened_rewards_have_deviation_one(run):
    assert series(run(SHORT), "credit/advantage_std")[0] != pytest.approx(1, rel=1e-2)
    whitened = series(run({**SHORT, "credit.whiten_rewards": True}), "credit/advantage_std")
    assert whitened == pytest.approx([1, 1], rel=1e-5)
    mean = series(run({**SHORT, "credit.whiten_rewards": True}), "credit/return")[0]
    assert mean > 0.1  # they are not centred


@shows("credit.whiten_advantages")
def test_whitened_advantages_have_deviation_one(run):
    assert series(run(), "credit/advantage_std")[0] != pytest.approx(1, rel=1e-2)
    assert series(run({"credit.whiten_advantages": True}), "credit/advantage_std") == pytest.approx([1, 1], rel=1e-5)


@shows("credit.normaliser")
def test_the_normaliser_divides_by_sequences_tokens_or_lengths(run):
    norm = {name: run({"credit.normaliser": name}) for name in ("sequence", "token_mean", "sequence_mean")}
    first = {name: series(folder, "policy/grad_norm")[0] for name, folder in norm.items()}
    length = series(norm["sequence"], "policy/length")[0]
    assert length > 1
    assert first["token_mean"] == pytest.approx(first["sequence"] / length, rel=1e-5)
    assert len({round(x, 6) for x in first.values()}) == 3


# KL


@shows("kl.beta")
def test_beta_weighs_the_penalty(run, tiny_model, tmp_path):
    away = {"model.reference": str(another(tiny_model, tmp_path / "other")), "rewards.varied.weight": 0.0}
    away |= {"train.steps": 1, "optimiser.learning_rate": 1e-3, "kl.placement": "loss", "kl.estimator": "exact"}
    runs = {beta: run({**away, "kl.beta": beta}) for beta in (0.0, 1.0, 2.0)}
    assert [series(folder, "kl/beta")[0] for folder in runs.values()] == [0, 1, 2]
    norms = [series(folder, "policy/grad_norm")[0] for folder in runs.values()]
    assert norms == pytest.approx([0, norms[1], 2 * norms[1]])
    before, after = (metrics(runs[1.0])[step]["kl/sequence"] for step in (0, 1))
    assert after < before == metrics(runs[0.0])[1]["kl/sequence"]


@shows("kl.placement", "kl.estimator")
def test_place_and_estimator_change_the_gradient_once_kl_is_not_zero(run):
    chosen = [("reward", "k1"), ("loss", "exact"), ("loss", "k2"), ("loss", "exact_forward")]
    norms = [series(run({"kl.placement": p, "kl.estimator": e, "kl.beta": 1.0}), "policy/grad_norm") for p, e in chosen]
    assert len({round(first, 4) for first, _ in norms[:3]}) == 1
    assert len({round(second, 4) for _, second in norms}) == len(chosen)


@shows("kl.window")
def test_the_window_bounds_the_penalty_that_a_token_pays(run):
    windows = {name: run({"kl.window": name, "credit.horizon": 2, "kl.beta": 1.0}) for name in WINDOWS}
    assert len({series(folder, "credit/return")[0] for folder in windows.values()}) == 1
    assert len({round(series(folder, "credit/return")[1], 6) for folder in windows.values()}) == len(WINDOWS)


WINDOWS = ("own", "same", "full", "anchored")


@shows("kl.target")
def test_beta_adapts_towards_the_target(run):
    trained = run({"kl.target": 0.5, "kl.beta": 1.0, "train.steps": 4})
    beta, measured = series(trained, "kl/beta"), series(trained, "kl/penalty")
    assert beta[0] == 1.0
    assert beta[1] == pytest.approx(0.98)  # KL is 0 at first, below the target
    for step in (1, 2):
        assert beta[step + 1] == pytest.approx(kl.adapt(beta[step], measured[step], 0.5))
    assert set(series(run({"kl.beta": 1.0}), "kl/beta")) == {1.0}


# Sampling


@shows("rollout.prompts", "rollout.samples_per_prompt")
def test_a_step_takes_so_many_samples_of_so_many_prompts(run):
    trained = run({"rollout.prompts": 3, "rollout.samples_per_prompt": 5})
    assert series(trained, "reward/queries") == [15, 30]
    wide, deep = run({"rollout.prompts": 4}), run({"rollout.samples_per_prompt": 4})
    assert series(wide, "reward/queries") == series(deep, "reward/queries") == [8, 16]
    assert series(wide, "reward/train/total") != series(deep, "reward/train/total")


@shows("rollout.max_new_tokens")
def test_completions_end_at_the_limit(run):
    assert series(run({"rollout.max_new_tokens": 1}), "policy/length") == [1, 1]
    longer = run({"rollout.max_new_tokens": 20})
    assert series(longer, "policy/length")[0] > 6
    assert metrics(longer)[0]["policy/eval/length"] > 6


@shows("rollout.temperature")
def test_a_low_temperature_repeats_the_likeliest_completion_and_evaluation_stays_at_one(run):
    cold = run({"rollout.temperature": 1e-3, "kl.beta": 0.0})
    assert series(cold, "credit/advantage_std")[0] == 0  # the samples of a prompt are equal
    assert series(run(), "credit/advantage_std")[0] > 0
    assert metrics(cold)[0] == metrics(run())[0]


@shows("rollout.stop")
def test_a_stop_text_ends_completions(run):
    stopped = run({"rollout.stop": list("abcdefghijklmnopqrstuvwxyz"), "rollout.max_new_tokens": 20})
    rows = [json.loads(line) for line in (stopped / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "stop" in {row["end"] for row in rows}
    assert not any(character.islower() and character.isascii() for row in rows for character in row["completion"])
    assert series(stopped, "policy/length")[0] < series(run({"rollout.max_new_tokens": 20}), "policy/length")[0]


@shows("rollout.record", "rollout.replay")
def test_recorded_samples_can_be_replayed_by_another_run(run):
    recorded = run({"rollout.record": True})
    assert (recorded / "rollouts").is_dir()
    free = {"kl.beta": 0.7, "credit.baseline": "none"}
    replayed, live = run({**free, "rollout.replay": str(recorded)}), run(free)
    assert not (replayed / "rollouts").exists()
    names = ("reward/train/total", "policy/length")
    assert [series(replayed, name) for name in names] == [series(recorded, name) for name in names]
    assert series(live, "reward/train/total")[1] != series(recorded, "reward/train/total")[1]


@shows("rewards.learned.path", "rewards.learned.type", "rewards.learned.eos", "rewards.learned.micro_batch")
def test_a_reward_model_judges_in_pieces_with_or_without_eos(run, tiny_reward_model, monkeypatch):
    from rlkl import scoring

    sizes = []
    monkeypatch.setattr(scoring, "pad", lambda rows, pad=scoring.pad: sizes.append(len(rows)) or pad(rows))
    source = {"type": "learned", "path": str(tiny_reward_model)}
    whole, pieces, bare = (run({"rewards.rm": {**source, **keys}}) for keys in ({}, {"micro_batch": 1}, {"eos": False}))
    assert same(whole, pieces, rel=1e-2) and set(sizes) == {1, 4}
    assert metrics(whole)[0]["reward/eval/rm"] != metrics(bare)[0]["reward/eval/rm"]


FIT = ("fit.epochs", "fit.batch", "fit.learning_rate", "fit.schedule", "fit.warmup", "fit.weight_decay")
TAUGHT = ("labeller", "weights", "budget", "schedule", "start", "every", *FIT)


@shows("evaluate.gold", *(f"rewards.learned.{key}" for key in TAUGHT))
def test_a_reward_model_learns_from_its_labeller_as_asked(run, tiny_model, monkeypatch):
    import taught

    monkeypatch.setattr("rlkl.rewards.taught.fit", taught.quick_fit)
    fit = {"epochs": 2, "batch": 3, "learning_rate": 0.5, "schedule": "linear", "warmup": 0.5, "weight_decay": 0.25}

    def rows(**keys: Any) -> list[Tree]:
        source = {"type": "learned", "path": str(tiny_model), "labeller": "taught:prefer", "budget": 6, **keys}
        changes = {"rewards.rm": source, "evaluate.gold": "varied", "train.steps": 4, "rewards.varied.weight": 0}
        return metrics(run(changes))

    frozen = rows(fit=fit)
    assert taught.fits[-1]["settings"] == fit
    assert [row["reward/labels"] for row in frozen] == [6] * 5
    assert frozen[0]["reward/eval/gap/rm"] == pytest.approx(0, abs=1e-6) and frozen[-1]["reward/eval/gap/rm"] != 0
    online = rows(schedule="online", every=1)
    assert [row["reward/labels"] for row in online] == [3, 5, 6, 6, 6]
    assert [row["reward/labels"] for row in rows(schedule="online", every=2, start=0.2)] == [1, 1, 3, 3, 5]
    tokens = rows(level="token", labeller="taught:letters", weights={"letter": 1.0})
    assert tokens[0]["reward/learn/rm/rows"] == 6


@shows("rewards.learned.timeout")
def test_a_labeller_may_take_so_long(run, tiny_model):
    source = {"type": "learned", "path": str(tiny_model), "labeller": "test_config_effects:dreamy", "budget": 6}
    with pytest.raises(RunError, match=r"the labeller, samples 0 and 1.*0\.05"):
        run({"rewards.rm": {**source, "timeout": 0.05}})


def dreamy(first: str, second: str) -> int:
    time.sleep(5)
    return 1


@shows("rewards.clip", "rewards.whiten")
def test_a_source_is_clipped_and_divided_by_its_spread(run):
    plain = run({"train.steps": 1})
    low = series(run({"train.steps": 1, "rewards.varied.clip": 0.1}), "reward/train/total")[0]
    assert 0 < low <= 0.1 < series(plain, "reward/train/total")[0]
    whitened = run({"train.steps": 1, "rewards.varied.whiten": True})
    (std,) = series(whitened, "reward/std/varied")
    assert std != 1 and series(whitened, "reward/train/total")[0] == pytest.approx(
        series(plain, "reward/train/total")[0] / std, rel=1e-5
    )


@shows("rewards.learned.level", "rewards.learned.missing_eos_penalty")
def test_a_reward_model_scores_tokens_is_clipped_and_minds_the_end(run, tiny_model, tiny_reward_model, tmp_path):
    from test_learned_reward import token_model

    source = {"type": "learned", "path": str(tiny_reward_model)}
    keys = ({}, {"clip": 1e-3}, {"missing_eos_penalty": 100.0})
    plain, clipped, ended = (series(run({"rewards": {"rm": {**source, **k}}}), "reward/train/rm")[0] for k in keys)
    assert abs(plain) > 2e-3 and 0 < abs(clipped) <= 1e-3 and ended < plain
    dense = {"type": "learned", "path": str(token_model(tiny_model, tmp_path / "rm")), "level": "token"}
    assert abs(series(run({"rewards": {"rm": dense}}), "reward/train/rm")[0]) > 1e-3


# What changes memory and not results


@shows("rollout.micro_batch", "train.micro_batch", "train.head_chunk", "train.gradient_checkpointing")
@pytest.mark.parametrize(
    ("key", "value", "work"),
    [
        ("rollout.micro_batch", 1, "_decode"),
        ("train.micro_batch", 1, "backward"),
        ("train.head_chunk", 3, "_chunk"),
        ("train.gradient_checkpointing", True, "forward"),
    ],
)
def test_memory_is_saved_without_changing_results(run, monkeypatch, key, value, work):
    calls = counted_calls(monkeypatch)
    plain = run()
    before = dict(calls)
    calls.clear()
    assert same(plain, run({key: value}))
    assert calls[work] > before[work]  # the work was cut differently, or some of it done twice


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often something decodes, differentiates, passes a chunk of the head, or computes a layer."""
    from accelerate import Accelerator
    from transformers.models.llama.modeling_llama import LlamaMLP

    from rlkl import sampling
    from rlkl.policy import Policy

    calls: dict[str, int] = {}

    def count(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def counted(*given: Any, **named: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return whole(*given, **named)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in ((sampling, "_decode"), (Accelerator, "backward"), (Policy, "_chunk"), (LlamaMLP, "forward")):
        count(owner, name)
    return calls


# The optimiser


@shows("optimiser.learning_rate")
def test_the_first_step_of_adam_is_as_long_as_the_learning_rate(run):
    short, long = (moved(run({"optimiser.learning_rate": rate, "train.steps": 1})) for rate in (1e-4, 1e-3))
    assert float(short.abs().max()) == pytest.approx(1e-4, rel=1e-2)
    assert float(long.abs().max()) == pytest.approx(1e-3, rel=1e-2)
    assert series(run({"optimiser.learning_rate": 0.25}), "policy/learning_rate") == [0.25, 0.25]


@shows("optimiser.schedule", "optimiser.warmup_steps")
@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("constant", 2, [0.5, 1, 1, 1]),
        ("linear", 2, [0.5, 1, 1, 0.5]),
        ("linear", 4, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_the_learning_rate_follows_its_schedule(run, schedule, warmup, factors):
    chosen = {"optimiser.schedule": schedule, "optimiser.warmup_steps": warmup, "optimiser.learning_rate": 1.0}
    from rlkl.update import schedule as factor

    config = settings.load(changed(TREE, chosen)).optimiser
    assert [factor(config, step, 4) for step in (1, 2, 3, 4)] == pytest.approx(factors)


TREE: Tree = {
    "name": "x",
    "model": {"type": "facts"},
    "data": {"type": "facts"},
    "rewards": {"one": {"type": "function", "path": "test_config_effects:one"}},
    "trainer": {"type": "reinforce"},
}


def test_the_schedule_reaches_the_optimiser(run):
    trained = run({"optimiser.schedule": "linear", "optimiser.warmup_steps": 1, "train.steps": 3})
    assert series(trained, "policy/learning_rate") == pytest.approx([0.01, 0.01, 0.005])


@shows("optimiser.weight_decay")
def test_weight_decay_shrinks_the_weights(run):
    one = {"train.steps": 1, "optimiser.learning_rate": 1e-3}
    plain, decayed = weights(run(one)), weights(trained := run({**one, "optimiser.weight_decay": 0.5}))
    start = weights(trained, "reference")
    for name in start:
        assert torch.allclose(decayed[name], plain[name] - 1e-3 * 0.5 * start[name], atol=1e-6)


@shows("optimiser.betas")
def test_the_betas_weigh_earlier_gradients(run):
    steps = {1: [], 2: []}
    for betas in ([0.9, 0.999], [0.0, 0.5]):
        for count in steps:
            steps[count].append(moved(run({"train.steps": count, "optimiser.betas": betas})))
    assert torch.allclose(*steps[1], atol=1e-5)  # the first step is corrected for them
    assert not torch.allclose(*steps[2], atol=1e-4)


@shows("optimiser.max_grad_norm")
def test_gradients_above_the_norm_are_scaled_down(run):
    tight, loose = run({"optimiser.max_grad_norm": 1e-9}), run({"optimiser.max_grad_norm": 1e9})
    assert series(tight, "policy/grad_norm")[0] == series(loose, "policy/grad_norm")[0]  # reported before the scaling
    assert float(moved(tight).abs().max()) < 0.2 * float(moved(loose).abs().max())  # next to Adam's epsilon


# The loop, evaluation and what is said


@shows("train.steps")
def test_the_run_has_so_many_steps(run):
    assert [row["step"] for row in metrics(run({"train.steps": 5}))] == [0, 1, 2, 3, 4, 5]


@shows("train.mixed_precision")
def test_mixed_precision_computes_in_bfloat16_and_keeps_the_weights(run):
    plain = run()
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process
    try:
        mixed = run({"train.mixed_precision": "bf16"})
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert {x.dtype for x in weights(mixed).values()} == {torch.float32}
    difference = abs(metrics(mixed)[0]["policy/eval/entropy"] - metrics(plain)[0]["policy/eval/entropy"])
    assert 0 < difference < 1


@shows("evaluate.every", "evaluate.early")
@pytest.mark.parametrize(("early", "steps"), [(0, [0, 4, 7]), (2, [0, 1, 2, 4, 7])])
def test_evaluations_come_every_so_many_steps_early_on_and_at_both_ends(run, early, steps):
    rows = metrics(run({"evaluate.every": 4, "evaluate.early": early, "train.steps": 7}))
    assert [row["step"] for row in rows if "kl/sequence" in row] == steps


@shows("evaluate.prompts", "evaluate.samples_per_prompt")
def test_an_evaluation_asks_so_many_prompts_for_so_many_samples(run):
    asked = {"data.held_out": 0.5, "evaluate.prompts": 3, "evaluate.samples_per_prompt": 5}
    assert metrics(run(asked))[0]["reward/eval/queries"] == 15
    assert metrics(run({**asked, "evaluate.prompts": 100}))[0]["reward/eval/queries"] == 20  # as many as there are


def endless(prompts, completions):
    time.sleep(0.2 if len(CALLS) else 0)
    CALLS.append(1)
    return [0.0] * len(prompts)


CALLS: list[int] = []


@shows("rewards.function.timeout", "rewards.annotations.timeout")
def test_a_reward_may_take_so_long(run, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CALLS", [])
    run({"rewards.varied.path": "test_config_effects:endless", "rewards.varied.timeout": None})
    with pytest.raises(rlkl.RunError, match=r"no answer within 0\.1 s"):
        run({"rewards.varied.path": "test_config_effects:endless", "rewards.varied.timeout": 0.1})
    labeller = AnnotationsSource(type="annotations", labeller="time:sleep", weights={"x": 1}, timeout=0.01)
    monkeypatch.setattr("time.sleep", lambda text, real=time.sleep: [real(1), []][1])
    with pytest.raises(rlkl.RunError, match=r"no answer within 0\.01 s"):
        AnnotationReward("marks", labeller)._ask("marks", "text")


def boundless(prompts, completions):
    return [3e38 * (i % 2) for i in range(len(prompts))]


@shows("train.on_nonfinite")
def test_an_update_that_is_not_finite_ends_the_run_or_is_left_out(run):
    overrides = {"rewards.varied.path": "test_config_effects:boundless", "evaluate.every": 1}
    with pytest.raises(rlkl.RunError, match="the gradient norm is"):
        run(overrides)
    skipped = run({**overrides, "train.on_nonfinite": "skip"})
    assert series(skipped, "policy/skipped") == [1, 1]
    assert {row["kl/sequence"] for row in metrics(skipped)} == {0.0}


@shows("train.shard")
def test_every_process_holds_a_part_of_policy_and_reference(tiny_config):
    for shard in (False, True):
        config = {**tiny_config, "train": {"steps": 1, "shard": shard}}
        Path(f"{shard}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    said = torchrun(2, str(HERE / "ranks.py"), "held", "False.yaml", "True.yaml").split()
    assert said[0] == "1.000" and 0.5 <= float(said[1]) < 0.51


@shows("save.every", "save.keep")
def test_a_checkpoint_is_written_every_so_many_steps_and_the_newest_stay(run):
    assert checkpoint.steps(run({"save.every": None, "train.steps": 5})) == []
    assert checkpoint.steps(run({"save.every": 2, "train.steps": 7})) == [6]
    assert checkpoint.steps(run({"save.every": 2, "save.keep": 2, "train.steps": 7})) == [4, 6]


@shows("log.every")
def test_a_line_is_printed_every_so_many_steps_and_at_the_end(run, capsys):
    run({"log.every": 2, "train.steps": 5})
    said = capsys.readouterr().out
    assert [f"step {n}/5" in said for n in (1, 2, 3, 4, 5)] == [False, True, False, True, True]


@shows("log.samples")
def test_so_many_samples_are_kept_and_shown(run, capsys):
    for count in (0, 1, 2):
        folder = run({"log.samples": count})
        path = folder / "samples.jsonl"
        assert (len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0) == 2 * count
        assert capsys.readouterr().out.count("before:") == count


@shows("log.with", "log.project", "log.group")
def test_dashboards_are_told_the_run_its_project_and_its_group(run, monkeypatch):
    from rlkl import dashboards

    opened: list[Config] = []

    class Told:
        record: dict[str, str] = {}  # noqa: RUF012
        note = "told"

        def __init__(self, folder: Path, config: Config, known: Any) -> None:
            opened.append(config)

        def metrics(self, step: int, values: Tree) -> None:
            pass

        def samples(self, step: int, rows: Any) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setitem(dashboards.SINKS, "tensorboard", Told)
    run()
    assert opened == []
    run({"log.with": ["tensorboard"], "log.project": "mine", "log.group": "these"})
    assert [(config.log.project, config.log.group) for config in opened] == [("mine", "these")]


# Completeness

LIKELIHOOD = {
    "trainer": {"type": "token_likelihood"},
    "rewards": {"parity": {"type": "function", "path": "test_config_effects:parity", "level": "token"}},
    "credit": {"horizon": 1},
    "kl": {"beta": 0.1, "placement": "loss", "estimator": "exact"},
}


def parity(rollout: Rollout) -> torch.Tensor:
    """Even tokens are good, odd ones bad: as causal as can be."""
    return 1.0 - 2.0 * (rollout.tokens_BT % 2)


@shows("trainer.token_likelihood.type", "trainer.token_likelihood.loss")
def test_every_likelihood_loss_trains_in_its_own_way(tiny_config):
    moved = {}
    for loss in ("signed", "unlikelihood", "npo", "contrastive", "binary", "regression", "rwr"):
        config = tiny_config | LIKELIHOOD | {"name": loss, "trainer": {"type": "token_likelihood", "loss": loss}}
        if loss in ("binary", "regression", "rwr"):
            config["kl"] = {"beta": 0.5}
        rows = metrics(rlkl.train(config))
        assert rows[-1]["kl/sequence"] > 0
        moved[loss] = rows[1]["loss/likelihood"]
    assert len(set(moved.values())) == len(moved)


@shows("trainer.token_likelihood.kappa")
def test_kappa_is_the_exponent_of_npo(tiny_config):
    def moved(kappa: float) -> float:
        trainer = {"type": "token_likelihood", "loss": "npo", "kappa": kappa}
        config = tiny_config | LIKELIHOOD | {"name": f"kappa{kappa}", "trainer": trainer}
        return metrics(rlkl.train(config))[1]["loss/likelihood"]

    assert moved(0.5) != moved(2.0)


@shows("trainer.token_likelihood.offset")
def test_the_offset_is_a_value_head_of_the_prompt_or_the_state_or_nothing(tiny_config):
    def built(offset: str) -> Lane:
        trainer = {"type": "token_likelihood", "loss": "regression", "offset": offset}
        return build(settings.load(tiny_config | LIKELIHOOD | {"kl": {"beta": 0.5}, "trainer": trainer}))

    assert built("none").policy.value_head is None
    value_BT = torch.tensor([[1.0, 2.0, 3.0]])
    for offset, expected in (("prompt", [1.0, 1.0, 1.0]), ("state", [1.0, 2.0, 3.0])):
        lane = built(offset)
        assert lane.policy.value_head is not None
        out = PolicyOutput(value_BT=value_BT)
        assert lane.trainer._offset(out, torch.zeros(1, 3)).tolist() == [expected]


@shows("trainer.token_likelihood.imitate")
def test_so_many_of_the_best_samples_are_imitated(tiny_config):
    def learned(best: int) -> float:
        trainer = {"type": "token_likelihood", "imitate": best}
        rows = metrics(rlkl.train(tiny_config | LIKELIHOOD | {"name": f"best{best}", "trainer": trainer} | sampled))
        return rows[1]["loss/likelihood"]

    sampled = {"rollout": {"prompts": 2, "samples_per_prompt": 4, "max_new_tokens": 6}}
    assert len({learned(best) for best in (1, 2, 3)}) == 3


@shows("trainer.dpo.type")
def test_dpo_trains_on_pairs_and_holds_beta(run):
    rows = {beta: metrics(run({"trainer.type": "dpo", "kl.beta": beta}))[1] for beta in (0.1, 1.0)}
    assert [row["loss/preference"] for row in rows.values()] == pytest.approx([math.log(2)] * 2)  # at the reference
    assert rows[1.0]["policy/grad_norm"] == pytest.approx(10 * rows[0.1]["policy/grad_norm"], rel=1e-4)
    assert rows[1.0]["policy/grad_norm"] > 0


def test_every_key_has_a_test_and_every_tested_key_exists():
    existing = set(keys(Config))
    assert existing - SHOWN == set(), "these keys have no test of their effect"
    assert SHOWN - existing == set(), "these keys are tested and do not exist"


def test_the_walk_finds_keys_at_every_depth():
    found = set(keys(Config))
    assert len(found) > 60
    assert {"seed", "kl.beta", "credit.lambda", "rewards.function.path", "model.tiny.steps", "model.lora.rank"} < found
    assert not {"kl", "model", "rewards", "credit.lambda_", "log.with_"} & found


import test_budget  # noqa: E402, F401 - its tests show keys too
import test_overseer  # noqa: E402, F401
