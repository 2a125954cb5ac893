"""The exact frontier of a listed task and what horizons reach, against sums coded apart; the reward of horizon.yaml."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Tree, write_jsonl
from test_compare import base, said
from test_replay import letters

from rlkl import exact
from rlkl.grid import listed, plan
from rlkl.lane import build
from rlkl.tasks import fix, late
from rlkl.types import Rollout

BETA = 0.3


def test_the_reward_is_the_same_sum_at_the_end_or_field_by_field():
    rows = list(itertools.product(range(8), repeat=2))
    tokens = torch.tensor([[4, 0, 1, a, b] for a, b in rows])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    rollout = Rollout(tokens, tokens[:, 0], tokens, tokens[:, 0], mask, tokens[:, 0], tokens[:, 0], tokens[:, 0])
    dense = late.dense(rollout)
    texts = ["".join(map(str, row.tolist())) for row in tokens]
    assert dense.sum(-1).tolist() == pytest.approx(late.terminal([], texts))
    assert dense[:, :3].abs().sum() == 0
    assert (dense[:, 3] - torch.tensor([a / 6 if a < 4 else 0 for a, _ in rows])).abs().max() < 1e-6
    assert max(late.terminal([], texts)) == 1
    assert late.terminal([], ["4013", ""]) == [0.5, 0.0]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Two tokens of fourteen, a reward on both, all 196 completions listed; horizons 1 and whole."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(listed, "alphabet", lambda config: 14)
    score = (
        "def score(prompts, completions):\n    return [('0' in t[:1]) + 0.5 * ('1' in t[1:]) for t in completions]\n"
    )
    Path("both.py").write_text(score)
    write_jsonl("prompts.jsonl", [{"prompt": f"{n}>"} for n in range(8)])
    run = base(letters(tmp_path / "m", 0), kl={"beta": BETA}) | {
        "rewards": {"both": {"type": "function", "path": "both:score"}},
        "rollout": {"prompts": 2, "samples_per_prompt": 2, "max_new_tokens": 2},
        "train": {"steps": 1},
    }
    return {"name": "listed", "base": run, "arms": {"a": {"credit.horizon": 1}, "b": {}}, "seeds": [0], "workers": 1}


def test_the_frontier_and_the_horizons_are_the_optima_by_definition(tree: Tree):
    made = plan.make(tree)
    made.folder.mkdir(parents=True)
    found = listed.exact_points(made)
    assert found is not None
    assert found["mass"] == pytest.approx(1, abs=1e-6)
    lane = build(made.runs[0].config)
    kls, golds, one = [], [], []
    for ids in lane.held_out.ids:
        rows = exact.enumerate_completions(ids, 14, 2)
        with torch.no_grad():
            logp_NT = lane.policy(rows, {"logp"}).get("logp_BT").double()
        p = logp_NT.sum(-1).exp().view(14, 14)
        texts = [lane.tokenizer.decode(t) for t in rows.tokens_BT.tolist()]
        r = torch.tensor([("0" in t[:1]) + 0.5 * ("1" in t[1:]) for t in texts], dtype=torch.float64).view(14, 14)
        star = p * (r / BETA).exp()
        star = star / star.sum()
        kls.append((star * (star / p).log()).sum())
        golds.append((star * r).sum())
        last = p * (r / BETA).exp()
        last = last / last.sum(1, keepdim=True) * p.sum(1, keepdim=True)  # the first token as it was
        one.append(torch.stack([(last * (last / p).log()).sum(), (last * r).sum()]))
    by_horizon = {point["horizon"]: point for point in found["horizons"]}
    assert by_horizon[None]["kl"] == pytest.approx(float(sum(kls)) / len(kls), rel=1e-4)
    assert by_horizon[None]["gold"] == pytest.approx(float(sum(golds)) / len(golds), rel=1e-4)
    assert [by_horizon[1]["kl"], by_horizon[1]["gold"]] == pytest.approx((sum(one) / len(one)).tolist(), rel=1e-4)
    values = {h: point["gold"] - BETA * point["kl"] for h, point in by_horizon.items()}
    assert values[None] > values[1] > found["frontier"][0]["gold"]
    golds_ = [point["gold"] for point in found["frontier"]]
    assert golds_ == sorted(golds_)
    assert found["frontier"][0]["kl"] == pytest.approx(0, abs=1e-9)


def test_it_is_kept_until_what_it_depends_on_changes(tree: Tree, monkeypatch):
    made = plan.make(tree)
    made.folder.mkdir(parents=True)
    first = listed.exact_points(made)
    with monkeypatch.context() as patch:
        patch.setattr(listed, "build", lambda config: pytest.fail("made anew"))
        assert listed.exact_points(made) == json.loads(json.dumps(first))
    for cut in (20, 0):
        path = made.folder / "exact.json"
        path.write_text(path.read_text()[:cut])  # by a full disk; made anew
        assert listed.exact_points(made) == first == json.loads(path.read_text())
    other = plan.make(tree, ["base.kl.beta=0.2"])
    again = listed.exact_points(other)
    assert again is not None and first is not None
    assert again["horizons"][0]["beta"] == 0.2
    assert again["frontier"] == first["frontier"]


def test_a_comparison_of_a_listed_task_says_and_draws_it(tree: Tree):
    Path("listed.yaml").write_text(json.dumps(tree))
    code, out, err = said("listed.yaml")
    assert code == 0, err
    assert "exact optimum, horizon 1, beta 0.3: gold" in out
    assert "exact optimum, horizon whole, beta 0.3: gold" in out
    summary = json.loads(Path("runs/listed/summary.json").read_text())
    kept = json.loads(Path("runs/listed/exact.json").read_text())
    assert summary["exact"] == kept["frontier"]
    assert summary["exact_horizons"] == kept["horizons"]


def test_other_tasks_are_not_listed(tree: Tree, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(Path("/"))
    shipped = Path(__file__).parents[1] / "configs" / "compare"
    assert listed.alphabet(plan.make(shipped / "quickstart.yaml").runs[0].config) is None
    horizon = plan.make(shipped / "horizon.yaml").runs[0].config
    assert listed.alphabet(horizon) == fix.VOCABULARY
    assert math.prod([fix.VOCABULARY] * horizon.rollout.max_new_tokens) == len(fix.STRINGS)
