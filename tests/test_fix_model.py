"""The base model of `fix`: what it has learned of the law, and the ordinary loop on it."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics

import rlkl
from rlkl import models
from rlkl.policy import Policy
from rlkl.sampling import Prompts
from rlkl.tasks import fix, fix_mass, fix_model

STRINGS = torch.from_numpy(fix.STRINGS)


@pytest.fixture(scope="module")
def folder() -> Path:
    return fix_model.load_path()


@torch.no_grad()
def learned(folder: Path, context: str) -> np.ndarray:
    """The model's log-probs of all strings after a context."""
    model, tokenizer = models.from_folder(folder)
    ids = torch.tensor(tokenizer(context)["input_ids"])
    found = []
    for part in STRINGS.split(8192):
        logits = model(input_ids=torch.cat([ids.expand(len(part), -1), part], 1)).logits
        found.append(logits[:, len(ids) - 1 : -1].log_softmax(-1).gather(-1, part[..., None]).sum((1, 2)))
    return torch.cat(found).double().numpy()


def test_tokens_are_characters_and_digits_have_their_own_ids() -> None:
    tokenizer = fix_model.tokenizer()
    assert tokenizer("0123>")["input_ids"] == [0, 1, 2, 3, fix_model.WRITES]
    assert tokenizer("47?+-")["input_ids"] == [4, 7, fix_model.ASKS, fix_model.PASSES, fix_model.FAILS]
    assert tokenizer.decode([4, 2, 0, 1, 1]) == "42011" and tokenizer.eos_token_id == fix_model.END


def test_its_targets_are_the_law() -> None:
    ids, laws, known = fix_model.rows(4, np.random.default_rng(0), 0.5, 0.1, fix.tag_law())
    assert torch.equal(known, laws.sum(-1) > 0) and torch.allclose(laws.sum(-1)[known], torch.tensor(1.0))
    for row in range(4):
        text = fix_model.tokenizer().decode(ids[row])
        x, string = [int(c) for c in text[:4]], [int(c) for c in text[5:]]
        logp = laws[row, 4:9].log().gather(-1, ids[row, 5:, None]).sum()
        assert text[4] == ">" and float(logp) == pytest.approx(fix.law(x)[fix.index(string)], rel=1e-5)
        alone = laws[4 + row, :5].log().gather(-1, ids[4 + row, 1:6, None]).sum()
        assert float(alone) == pytest.approx(fix.marginal()[fix.index(ids[4 + row, 1:6].tolist())], rel=1e-5)
        outcome = fix.outcome()[fix.index(ids[8 + row, :5].tolist())]
        assert float(laws[8 + row, 5, fix_model.PASSES]) == pytest.approx(outcome)


def test_it_has_learned_the_law(folder: Path) -> None:
    for x in (fix.EXAMPLE, (3, 1, 0, 2)):
        law, found = fix.law(x), learned(folder, "".join(map(str, x)) + ">")
        kl = float((np.exp(law) * (law - found)).sum())
        assert 0 <= kl < 2e-3
        assert np.abs(law - found)[fix.true_fixes(x)].max() < 0.15
    law, found = fix.marginal(), learned(folder, ">")
    assert float((np.exp(law) * (law - found)).sum()) < 2e-3


def test_it_has_learned_the_outcome(folder: Path) -> None:
    model, _ = models.from_folder(folder)
    asked = torch.cat([STRINGS, torch.full((len(STRINGS), 1), fix_model.ASKS)], 1)
    with torch.no_grad():
        laws = [model(input_ids=part).logits[:, -1].softmax(-1)[:, fix_model.PASSES] for part in asked.split(8192)]
    off = np.abs(torch.cat(laws).numpy() - fix.outcome())
    assert off.mean() < 0.02 and off[~fix.malformed()].max() < 0.05


def test_a_run_on_it_goes_through_the_ordinary_loop(folder: Path, tmp_path: Path) -> None:
    run = rlkl.train(
        {
            "name": "fix",
            "folder": str(tmp_path),
            "model": {"type": "fix"},
            "data": {"type": "fix"},
            "rewards": {"gold": {"type": "function", "path": "rlkl.tasks.fix:gold"}},
            "trainer": {"type": "reinforce"},
            "rollout": {"prompts": 4, "samples_per_prompt": 4, "max_new_tokens": 5},
            "train": {"steps": 1},
            "evaluate": {"prompts": 16, "samples_per_prompt": 16},
            "log": {"with": []},
        }
    )
    first = metrics(run)[0]
    assert first["policy/eval/length"] == 5.0 and first["reward/eval/gold"] < 0.05 and first["kl/sequence"] == 0.0


def test_the_exact_mass_is_that_of_the_enumeration(folder: Path) -> None:
    model, tokenizer = models.from_folder(folder)
    xs = [fix.EXAMPLE, (3, 1, 0, 2), (2, 2, 3, 3)]
    texts = ["".join(map(str, x)) for x in xs]
    prompts = Prompts([tokenizer(f"{x}>")["input_ids"] for x in texts], [4, 5, 6], {"x": texts})
    found = fix_mass.measure(Policy(model), prompts, torch.device("cpu"), micro_batch=4)
    each = [np.exp(learned(folder, f"{t}>"))[fix.true_fixes(x)].sum() for t, x in zip(texts, xs, strict=True)]
    assert found["policy/eval/true_fixes"] == pytest.approx(np.mean(each), rel=1e-4)
    assert found["policy/eval/true_fixes_stderr"] == pytest.approx(np.std(each, ddof=1) / 3**0.5, rel=1e-2)
    assert 0.008 < np.mean(each) < 0.011


def test_a_critique_names_neither_of_the_fields_that_matter() -> None:
    folder = fix_model.load_path("critiques")
    assert folder != fix_model.load_path()
    for x in (fix.EXAMPLE, (3, 1, 0, 2)):
        law, found = fix.critique_law(x), learned(folder, "".join(map(str, x)) + ">")
        said = law > -np.inf
        assert 0 <= float((np.exp(law[said]) * (law - found)[said]).sum()) < 2e-3
        assert np.exp(found[fix.true_fixes(x)]).sum() < 1e-5 < 1e-3 * np.exp(fix.law(x)[fix.true_fixes(x)]).sum() * 2
    texts = ["70012", "42011", "00011"]
    assert fix.convinced([], texts, x=["0011"] * 3) == [1.0, 1.0, 0.0]


@pytest.mark.slow
def test_it_is_made_in_under_two_minutes_of_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = fix_model.load_path()
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path))
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    made = fix_model.load_path()
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started < 120 and made != kept
    assert (made / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()
