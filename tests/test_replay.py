"""``mode: replay``: one step of every objective on the same samples, and its gradient against the exact one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tree, write_jsonl
from test_compare import SCORES, base, said, shows, table
from transformers import LlamaConfig, LlamaForCausalLM

from rlkl import RunError, exact, recording
from rlkl.config import Config
from rlkl.grid import cost, listed, plan, replay
from rlkl.report.load import load
from rlkl.tasks import fix_model

LENGTH = 2


@pytest.fixture
def arms(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """REINFORCE, itself under another name and rate, its negative, and DPO."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_jsonl("prompts.jsonl", [{"prompt": f"Line {n}:"} for n in range(8)])
    Path("scores.py").write_text(SCORES)
    run = base(tiny_model, kl={"beta": 0.0})
    run["rewards"].pop("parity")
    run["rollout"] |= {"samples_per_prompt": 4}
    return {
        "name": "steps",
        "mode": "replay",
        "base": run,
        "arms": {
            "reinforce": {},
            "faster": {"optimiser.learning_rate": 2e-2},
            "against": {"rewards.letters.weight": -1},
            "ppo": {"trainer": {"type": "ppo", "epochs": 3}, "credit.baseline": "leave_one_out"},
            "dpo": {"trainer": {"type": "dpo"}, "kl.beta": 0.1},
        },
        "seeds": [0, 1],
    }


@shows("mode")
def test_every_arm_takes_one_step_on_the_samples_that_were_recorded(arms: Tree):
    Path("steps.yaml").write_text(json.dumps(arms))
    code, out, err = said("steps.yaml")
    assert code == 0, err
    folder = Path("runs/steps")
    assert {path.name for path in folder.iterdir()} == {
        *(f"samples,seed={seed}" for seed in (0, 1)), "compare.yaml", "replay.json", "replay.svg"
    }  # fmt: skip
    assert recording.steps(folder / "samples,seed=1") == [1]
    found = json.loads((folder / "replay.json").read_text())
    gradients = {
        a: {b: cell and cell["mean"] for b, cell in row.items()} for a, row in found["gradient_cosine"].items()
    }
    assert gradients["reinforce"]["faster"] == pytest.approx(1)  # the same objective
    assert gradients["reinforce"]["against"] == pytest.approx(-1, abs=1e-5)
    assert gradients["reinforce"]["ppo"] == pytest.approx(1, abs=1e-5)  # at ratio 1, and one step of its three
    assert 0 < gradients["reinforce"]["dpo"] < 0.9999  # pairs of the same samples, ranked by the same reward
    assert gradients["dpo"]["reinforce"] == gradients["reinforce"]["dpo"]
    assert found["update_cosine"]["reinforce"]["against"]["mean"] < -0.9
    rows = found["arms"]
    assert rows["faster"]["gradient_norm"] == pytest.approx(rows["reinforce"]["gradient_norm"])
    assert rows["faster"]["update_norm"] == pytest.approx(2 * rows["reinforce"]["update_norm"], rel=1e-3)
    assert rows["faster"]["kl"] > rows["reinforce"]["kl"] > 0
    assert rows["reinforce"]["gold"] > rows["against"]["gold"]
    assert set(rows["reinforce"]["seeds"]) == {"0", "1"}
    shown = {cells[0]: cells[1:] for cells in table(out)}
    assert shown["arm"][:3] == ["norm of gradient", "of update", "KL moved, nats"]
    assert (folder / "replay.svg").read_text().startswith("<?xml")


def test_the_same_command_again_gives_the_same_numbers(arms: Tree):
    arms["arms"] = {"reinforce": {}, "dpo": {"trainer": {"type": "dpo"}, "kl.beta": 0.1}}
    Path("steps.yaml").write_text(json.dumps(arms))
    assert said("steps.yaml")[0] == 0
    first = Path("runs/steps/replay.json").read_bytes()
    assert said("steps.yaml")[0] == 0
    assert Path("runs/steps/replay.json").read_bytes() == first


def test_an_arm_whose_step_is_not_finite_is_reported_and_in_no_matrix(arms: Tree):
    arms["arms"] = {"reinforce": {}, "wild": {"optimiser.learning_rate": 1e30}, "faster": arms["arms"]["faster"]}
    Path("steps.yaml").write_text(json.dumps(arms))
    code, out, err = said("steps.yaml")
    assert (code, err) == (1, "rlkl: 2 of 6 steps failed; their arms are in no matrix\n")
    told = [line for line in out.splitlines() if "FAILED" in line]
    assert [line.split(": ")[0] for line in told] == ["wild,seed=0", "wild,seed=1"]
    text = Path("runs/steps/replay.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert list(found["arms"]) == list(found["gradient_cosine"]) == ["reinforce", "faster"]
    assert [f"{name}: FAILED: {error}" for name, error in found["failed"].items()] == told
    arms["arms"] = {"wild": {"optimiser.learning_rate": 1e30}}
    Path("steps.yaml").write_text(json.dumps(arms))
    code, out, err = said("steps.yaml", "name=wild")
    assert code == 1
    assert err.startswith("rlkl: every arm failed: wild,seed=0: ") and err.count("\n") == 1


def test_an_arm_whose_step_raises_anything_is_reported_on_a_line_and_the_others_go_on(arms: Tree):
    Path("broken.py").write_text(
        "def score(prompts, completions):\n    raise ValueError('two\\nlines')\n\n\n"
        "def leave(prompts, completions):\n    raise SystemExit(3)\n"
    )
    raising = {name: {"rewards.own": {"type": "function", "path": f"broken:{name}"}} for name in ("score", "leave")}
    arms["arms"] = {
        "overflow": {"optimiser.learning_rate": 1e38}, **raising, "reinforce": {}, "faster": arms["arms"]["faster"]
    }  # fmt: skip
    arms["seeds"] = [0]
    Path("steps.yaml").write_text(json.dumps(arms))
    code, out, err = said("steps.yaml")
    assert (code, err) == (1, "rlkl: 3 of 5 steps failed; their arms are in no matrix\n")
    told = dict(line.split(": FAILED: ") for line in out.splitlines() if "FAILED" in line)
    files = {name: f"runs/steps/{name},seed=0/error.txt" for name in ("overflow", *raising)}
    assert [name.removesuffix(",seed=0") for name in told] == list(files)
    for name, what in (("overflow", "RuntimeError: value cannot be"), ("score", "two lines"), ("leave", "SystemExit")):
        assert what in told[f"{name},seed=0"]
        assert told[f"{name},seed=0"].endswith(f"(traceback in {files[name]})")
        assert Path(files[name]).read_text().startswith("Traceback")
    assert "broken.py" in Path(files["score"]).read_text()
    found = json.loads(Path("runs/steps/replay.json").read_text())
    assert (list(found["arms"]), found["failed"]) == (["reinforce", "faster"], told)
    arms["arms"] = {name: arms["arms"][name] for name in ("reinforce", "faster")}
    Path("steps.yaml").write_text(json.dumps(arms))
    assert said("steps.yaml")[0] == 0
    assert not list(Path("runs/steps").glob("score*"))  # of the other time


def test_the_plan_of_a_replay_costs_a_batch_a_seed_and_a_step_an_arm(arms: Tree):
    made = plan.make(arms | {"arms": {name: arms["arms"][name] for name in ("reinforce", "ppo")}})
    first = made.runs[0]
    planned = cost.bounds(first.config, made.config.mode)
    assert first.config.train.steps > 1
    drawn = first.config.rollout.prompts * 4 * first.config.rollout.max_new_tokens
    assert cost.recorded(made) == 2 * drawn
    samples = made.folder / replay.record(made, first).config.name
    lane, accelerator = replay.ready(first.config, samples)
    replay.take(lane, made.gold, accelerator)
    assert planned == {"steps": 1, "tokens": 0, "queries": lane.queries, "labels": lane.labels}
    _, told = cost.table(made, [], 1)
    n = 4 * planned["queries"]
    assert told.startswith(f"in all at most 4 steps, {2 * drawn:,} tokens, {n} queries, {n} labels")
    assert "the tokens once a seed, replayed to every arm" in told


def test_a_folder_holds_one_mode_and_a_report_says_where_the_tables_of_a_replay_are(arms: Tree):
    arms["arms"], arms["seeds"] = {"reinforce": {}}, [0]
    Path("steps.yaml").write_text(json.dumps(arms))
    assert said("steps.yaml")[0] == 0
    before = Path("runs/steps/compare.yaml").read_text()
    code, _, err = said("steps.yaml", "mode=train")
    told = "rlkl: runs/steps: holds a comparison of mode=replay; give this one another name=...\n"
    assert (code, err) == (2, told)
    assert Path("runs/steps/compare.yaml").read_text() == before
    with pytest.raises(ValueError, match="mode=replay, which has no runs for a page") as why:
        load(["runs/steps"])
    assert "runs/steps/replay.json and runs/steps/replay.svg" in str(why.value)
    Path("runs/begun").mkdir()
    Path("runs/begun/compare.yaml").write_text("mode: train")
    assert said("steps.yaml", "name=begun")[2].startswith("rlkl: runs/begun: holds something else")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"arms": {"a": {}, "b": {"rollout.prompts": 3}}},
            "rollout.prompts: 2 in a, 3 in b; mode=replay takes one step",
        ),
        ({"arms": {"a": {}, "b": {"model.path": "x"}}}, "model.path: "),
        ({"arms": {"a": {"rollout.record": True}}}, "arm a: mode=replay records and replays by itself"),
        ({"match_kl": 1}, "match_kl with mode=replay: every arm takes one step; drop the key"),
        ({"budgets": {"steps": 1}}, "budgets with mode=replay"),
    ],
    ids=str,
)
def test_what_replay_cannot_compare_is_refused(arms: Tree, keys: Tree, told: str):
    Path("steps.yaml").write_text(json.dumps(arms | keys))
    code, _, err = said("steps.yaml")
    assert code == 2
    assert told in err
    assert not Path("runs").exists()


def letters(folder: Path, seed: int) -> Path:
    """An untrained model in float64's reach of 14 tokens, one a character, whose completions can be listed."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 13}
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=14, max_position_embeddings=16, initializer_range=0.4, tie_word_embeddings=False, **sizes, **ends
        )
    ).save_pretrained(folder)
    fix_model.tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_reinforce_with_k1_in_the_reward_goes_where_the_exact_gradient_goes(arms: Tree, tmp_path: Path, monkeypatch):
    """Away from its reference, so that the penalty has a gradient of its own; all 196 completions are listed."""
    monkeypatch.setattr(listed, "alphabet", lambda config: 14)
    Path("evens.py").write_text(
        "def score(prompts, completions):\n    return [float(t[:1] in '02468') for t in completions]\n"
    )
    write_jsonl("prompts.jsonl", [{"prompt": f"{n}>"} for n in range(8)])
    run = arms["base"] | {
        "model": {
            "type": "pretrained",
            "path": str(letters(tmp_path / "m", 0)),
            "reference": str(letters(tmp_path / "r", 1)),
        },
        "rewards": {"even": {"type": "function", "path": "evens:score"}},
        "rollout": {"prompts": 2, "samples_per_prompt": 6000, "max_new_tokens": LENGTH},
        "kl": {"beta": 0.3},
        "train": {"steps": 2, "micro_batch": 500},
    }
    local = {"kl": {"placement": "reward", "estimator": "k1", "window": "own"}}
    bad = {"bad": {"optimiser.learning_rate": 0.5}}
    tree = {"base": run, "arms": bad | {"k1": {}, "unpenalised": {"kl.beta": 0.0}, "own": local}, "seeds": [0]}
    made = plan.make(arms | tree)
    whole = replay.ready

    def ready(config: Config, samples: Path) -> Any:
        if config.name.startswith("bad"):
            raise RunError("it has no labels")
        return whole(config, samples)

    monkeypatch.setattr(replay, "ready", ready)
    found = replay.run(made)
    assert found["failed"] == {"bad,seed=0": "it has no labels"}  # the first; the truth is nobody's step
    cosines = {arm: row["exact"] for arm, row in found["arms"].items()}
    assert cosines["k1"] > 0.99
    assert cosines["unpenalised"] < 0.9
    assert cosines["own"] < cosines["k1"]
    lane, _ = replay.ready(made.runs[1].config, made.folder / "samples,seed=0")
    places = lane.train_prompts.places(1, 2)
    truth = listed.exact_gradient(lane, "even", places, 14)
    rows = [listed.atoms(lane, place, 14, held_out=False) for place in places]
    parts = []
    for atoms in rows:  # once more, from the definition
        own, ref = exact.sequence_logp(lane.policy, atoms)
        gold = torch.tensor([float(text[:1] in "02468") for text in atoms.texts()])
        parts.append((own.exp() * (gold - 0.3 * (own - ref))).sum() / 2)
    again = exact.flat_gradient(lane.policy, torch.stack(parts).sum())
    assert float((again - truth).norm() / truth.norm()) < 1e-4


def test_signal_to_noise_and_cosines_by_hand():
    assert replay.snr([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])]) == pytest.approx((4 - 2 / 2) / 2)
    assert replay.snr([torch.tensor([1.0])]) is None
    assert replay.cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)
    assert replay.cosine(torch.zeros(2), torch.ones(2)) is None
    assert replay.ratio({"kl": 0.2, "gold": 0.1, "gold_stderr": 0.04}) == pytest.approx(2)
    assert replay.ratio({"kl": 0.2, "gold": 0.1, "gold_stderr": 0.06}) is None
