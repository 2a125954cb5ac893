"""The reward model of `facts`: from preferences between base samples, by trl, without a trace in this process."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from rlkl import models, scoring
from rlkl.tasks import facts, facts_reward

SHORT = {**facts_reward.RECIPE, "samples": 2, "epochs": 1}


def test_a_short_training_gives_a_whole_reward_model_and_touches_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, state = torch.get_rng_state(), AcceleratorState._shared_state.copy()
    found = facts_reward.train_reward_model(tmp_path / "rm", facts.load_path(), **SHORT)
    assert torch.equal(torch.get_rng_state(), before) and AcceleratorState._shared_state == state
    assert 0 < found["training_pairs"] <= 96 and 0 < found["held_out_pairs"] <= 24
    said = capfd.readouterr()
    assert f"of {found['held_out_pairs']} held-out pairs" in said.err and said.out == ""
    assert json.loads((tmp_path / "rm" / "preferences.json").read_text()) == found
    model, tokenizer = models.reward_model(tmp_path / "rm")
    assert tokenizer.get_vocab() == models.from_folder(facts.load_path())[1].get_vocab()
    assert not [p for p in (tmp_path / "rm").iterdir() if p.suffix in (".bin", ".pt", ".pth")]
    end = tokenizer.eos_token_id
    one, two = scoring.scores(model, [[5, 6, end], [7, 8, end]], 2).tolist()
    assert one != two


def test_pairs_are_base_samples_that_the_labeller_tells_apart() -> None:
    _, tokenizer = models.from_folder(facts.load_path())
    texts = {split: {r["prompt"] for r in facts.prompts() if r["split"] == split} for split in ("train", "eval")}
    for split, prompts in texts.items():
        pairs = facts_reward.preferences(facts.load_path(), split, 2, 64, seed=3)
        assert pairs
        for pair in pairs:
            sides = [tokenizer.decode(pair[side][:-1]) for side in ("chosen_ids", "rejected_ids")]
            ends = [pair[side].count(tokenizer.eos_token_id) for side in ("chosen_ids", "rejected_ids")]
            (prompt,) = [p for p in prompts if sides[0].startswith(p)]
            assert facts.prefer(*(text.removeprefix(prompt) for text in sides)) == 1
            assert ends == [1, 1] and sides[1].startswith(prompt)


@pytest.mark.slow
def test_it_agrees_with_the_labeller_on_most_held_out_pairs() -> None:
    found = json.loads((facts_reward.load_path() / "preferences.json").read_text())
    assert found["held_out_pairs"] > 400 and found["accuracy"] > 0.8
