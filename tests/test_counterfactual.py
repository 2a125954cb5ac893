"""The counterfactual score: by hand, against the exact law of `fix`, causal, frozen, and what is refused."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tree, foreign_model, metrics, reward_model, write_jsonl
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rlkl
from rlkl import models, settings
from rlkl.config import CounterfactualSource
from rlkl.data.settled import settled
from rlkl.exact import enumerate_completions
from rlkl.policy import Policy
from rlkl.rewards.counterfactual import CounterfactualReward
from rlkl.sampling import given
from rlkl.tasks import fix, fix_model
from rlkl.tasks.pretrain import train_tokenizer
from rlkl.types import End, Rollout

HINT = "Line:"  # takes the place of a BOS
ROWS = (("The fox", " jumps over"), ("A dog", " reads"), ("Feedback", " arrives a token"))


def source(**keys: Any) -> CounterfactualSource:
    return CounterfactualSource(type="counterfactual", **{"template_marginal": HINT + "{x_prime}", **keys})


def made(folder: Path, tokenizer: Any = None, **keys: Any) -> CounterfactualReward:
    """A source that scores with the reference of a policy from ``folder``, or with a scorer of its own."""
    model, own = models.from_folder(folder)
    reward = CounterfactualReward("cf", source(**keys))
    reward.check(tokenizer or own)
    reward.bind(Policy(model))
    return reward


def rollout_of(tokenizer: Any, rows: Sequence[tuple[str, str]] = ROWS, **columns: list[Any]) -> Rollout:
    """Texts as a rollout; the first completion ends by EOS."""
    ids = [tokenizer(y)["input_ids"] for _, y in rows]
    ids[0] = [*ids[0], tokenizer.eos_token_id]
    return given(
        [tokenizer(x)["input_ids"] for x, _ in rows],
        ids,
        end_B=torch.tensor([int(End.EOS), *[int(End.LIMIT)] * (len(rows) - 1)]),
        temperature=0.5,  # of the policy, not of the scorer
        columns={"prompt": [x for x, _ in rows], **columns},
        decode=lambda tokens: str(tokenizer.decode(tokens)),
    )


@torch.no_grad()
def logp(folder: Path, before: Sequence[int], row: Sequence[int]) -> Tensor:
    """Log-probs of a row after its context, computed alone."""
    model, _ = models.from_folder(folder)
    logits = model.eval()(input_ids=torch.tensor([[*before, *row]])).logits[0, len(before) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(row)), torch.tensor(row)]


def differs(x: str, x_prime: str | None) -> str:
    """An auditor: the number of e's, where x′ is judged after x."""
    return str((x + (x_prime or "")).count("e") % 2)


def test_every_part_by_hand(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rollout = rollout_of(tokenizer, y_prime=["good", "bad", "good"])
    reward = made(
        tiny_model,
        c=0.75,
        lambda_y=0.5,
        template_outcome="{x_prime} is {y_prime}",
        auditor="test_counterfactual:differs",
        micro_batch=2,
    )
    result = reward(rollout)
    hint = tokenizer(HINT)["input_ids"]
    gates = []
    for i, (x, y) in enumerate(ROWS):
        row = rollout.completion_ids()[i]
        bracket = logp(tiny_model, tokenizer(x)["input_ids"], row) - 0.75 * logp(tiny_model, hint, row)
        said = tokenizer(y + " is ")["input_ids"], tokenizer(rollout.columns["y_prime"][i])["input_ids"]
        gates.append(differs(x, y) != differs(x, None))
        bracket[-1] += 0.5 * logp(tiny_model, *said).sum() + (gates[-1] - 1) * bracket.sum()
        assert result.value_BT[i, : len(row)].tolist() == pytest.approx(bracket.tolist(), rel=1e-4, abs=1e-4)
        assert not result.value_BT[i, len(row) :].any()
    assert {True, False} == set(gates)
    assert torch.equal(result.scored_BT, rollout.policy_mask_BT) and result.queries == 3
    assert not result.value_BT.requires_grad


def test_templates_lay_out_other_columns(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    columns = {"question": ["who?", "why?", "how?"], "prediction 1": ["fox", "dog", "cat"]}
    rollout = rollout_of(tokenizer, **columns)
    result = made(tiny_model, template_conditional="{question} {{old}} {prediction 1}\n{completion}", c=0)(rollout)
    expected = logp(tiny_model, tokenizer("why? {old} dog\n")["input_ids"], rollout.completion_ids()[1])
    assert result.value_BT[1, : len(expected)].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    own = rollout_of(tokenizer, x=["one", "two", "three"])
    expected = logp(tiny_model, tokenizer("two")["input_ids"], rollout.completion_ids()[1])
    assert made(tiny_model, c=0)(own).value_BT[1, : len(expected)].tolist() == pytest.approx(
        expected.tolist(), rel=1e-4
    )


def test_the_prompt_is_read_as_the_policy_read_it(tiny_model: Path) -> None:
    """A chat template writes special tokens of its own, which the text tokenised again may lack."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rollout = rollout_of(tokenizer)
    ids = [tokenizer.eos_token_id, *tokenizer("A dog")["input_ids"]]
    prompt_BP = torch.nn.functional.pad(rollout.prompt_BP, (0, 9))
    prompt_BP[1, : len(ids)] = torch.tensor(ids)
    length_B = rollout.prompt_length_B.clone()
    length_B[1] = len(ids)
    result = made(tiny_model, c=0)(replace(rollout, prompt_BP=prompt_BP, prompt_length_B=length_B))
    expected = logp(tiny_model, ids, rollout.completion_ids()[1])
    assert result.value_BT[1, : len(expected)].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_it_is_causal_and_the_probe_says_so(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = rollout_of(AutoTokenizer.from_pretrained(tiny_model))
    reward = made(tiny_model)
    reward.probe(rollout)
    bracket = CounterfactualReward._bracket

    def hindsight(self: CounterfactualReward, rollout: Rollout, asked: Any) -> Tensor:
        dense_BT = bracket(self, rollout, asked)
        return dense_BT.sum(-1, keepdim=True) / rollout.length_B[:, None] * rollout.policy_mask_BT

    monkeypatch.setattr(CounterfactualReward, "_bracket", hindsight)
    with pytest.raises(ValueError, match="reward cf: not causal"):
        reward.probe(rollout)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model over another, coarser tokenizer."""
    return foreign_model(tmp_path_factory.mktemp("foreign"), "Line: token lines tokens jumps jumping", 330)


def test_another_tokenizer_scores_the_text_and_is_paid_once_its_words_are_over(tiny_model: Path, foreign: Path) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(foreign)
    rollout = rollout_of(ours)
    reward = made(tiny_model, scorer=str(foreign), c=0.5)
    reward.probe(rollout)
    result = reward(rollout)
    for i, (x, y) in enumerate(ROWS):
        row = theirs(y)["input_ids"] + [theirs.eos_token_id] * (i == 0)
        after, alone = (logp(foreign, theirs(text)["input_ids"], row) for text in (x, HINT))
        assert float(result.value_BT[i].sum()) == pytest.approx(float((after - 0.5 * alone).sum()), rel=1e-4)
        assert len(row) != int(rollout.length_B[i])
    first = [int(b.nonzero()[0]) for b in result.value_BT != 0]
    texts = [ours.decode(row[: t + 1]) for row, t in zip(rollout.completion_ids(), first, strict=True)]
    assert texts == [" jumps o", " reads", " arrives a"]  # the first word is paid where the next one begins


def test_words_settle_where_the_next_one_begins(foreign: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(foreign)
    text = "The  quick\n\nfox, é"
    letters = train_tokenizer(["x"], 258)
    ids = letters(text)["input_ids"]
    found = settled(ids, lambda tokens: str(letters.decode(tokens)), text, tokenizer)
    assert found.ids == tokenizer(text)["input_ids"] and found.paid == sorted(found.paid)
    assert {letters.decode(ids[: t + 1]) for t in found.paid} == {"The  q", "The  quick\n\nf", text}
    assert found.paid[-1] == len(ids) - 1


def digest(model: torch.nn.Module) -> str:
    parts = [p.detach().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("own", [True, False])
def test_the_predictor_is_control_its_parameters_never_change(
    tiny_config: Tree, tiny_model: Path, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlkl import start

    kept: list[tuple[Any, str, str]] = []
    build = start.build

    def watched(config: Any) -> Any:
        lane = build(config)
        (reward, _) = lane.reward.sources["cf"]
        kept.append((reward.scorer.reference, digest(reward.scorer.reference), digest(lane.policy.model)))
        kept[0][0].policy = [lane.policy.model]
        return lane

    monkeypatch.setattr(start, "build", watched)
    section = {"type": "counterfactual", "template_marginal": HINT + "{x_prime}"}
    tiny_config["rewards"] = {"cf": section if own else {**section, "scorer": str(tiny_model)}}
    run = rlkl.train(tiny_config)
    reference, before, policy = kept[0]
    assert digest(reference) == before and digest(reference.policy[0]) != policy
    assert not any(p.requires_grad for p in reference.parameters())
    assert metrics(run)[1]["reward/train/cf"] == metrics(run)[1]["reward/train/total"] != 0


def test_on_fix_it_is_the_enumerated_score() -> None:
    """The trained tiny transformer's score of all strings, against the exact law."""
    folder = fix_model.load_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    atoms = enumerate_completions(tokenizer("0011>")["input_ids"], fix.VOCABULARY, fix.LENGTH)
    columns = {name: [value] * len(atoms) for name, value in fix.prompts()[0].items()}
    rollout = replace(atoms, columns=columns, decode=lambda tokens: str(tokenizer.decode(tokens)))
    keys = {"template_conditional": "{x}>{x_prime}", "template_marginal": ">{x_prime}", "micro_batch": 4096}
    reward = made(folder, c=0.7, template_outcome="{x_prime}?{y_prime}", **keys)
    fixes = fix.true_fixes(fix.EXAMPLE)
    near = fixes | fix.cosmetics(fix.EXAMPLE)
    found = reward(rollout).value_BT.sum(-1).double().numpy()
    exact = fix.score(fix.EXAMPLE, 0.7)
    assert np.abs(found - exact)[near].max() < 0.25
    likely = np.exp(fix.law(fix.EXAMPLE))
    assert float((likely * np.abs(found - exact)).sum()) < 0.05
    assert fix.precision(fixes, found) == 1.0
    assert fix.precision(fixes, made(folder, c=0.0, **keys)(rollout).value_BT.sum(-1).double().numpy()) < 0.5


def test_a_run_on_fix_raises_its_score(tmp_path: Path) -> None:
    run = rlkl.train(
        {
            "name": "fix",
            "folder": str(tmp_path),
            "model": {"type": "fix"},
            "data": {"type": "fix"},
            "rewards": {
                "cf": {
                    "type": "counterfactual",
                    "c": 0.7,
                    "template_conditional": "{x}>{x_prime}",
                    "template_marginal": ">{x_prime}",
                    "template_outcome": "{x_prime}?{y_prime}",
                    "auditor": "rlkl.tasks.fix:audit",
                },
                "gold": {"type": "function", "path": "rlkl.tasks.fix:gold", "weight": 0},
            },
            "trainer": {"type": "reinforce"},
            "kl": {"beta": 0.1},
            "rollout": {"prompts": 16, "samples_per_prompt": 16, "max_new_tokens": 5},
            "optimiser": {"learning_rate": 1e-3},
            "train": {"steps": 12, "micro_batch": 256},
            "evaluate": {"prompts": 16, "samples_per_prompt": 16, "every": 12},
            "log": {"with": []},
        }
    )
    first, last = metrics(run)[0], metrics(run)[-1]
    assert last["reward/eval/cf"] > first["reward/eval/cf"] + 0.5


REFUSED = {
    "template_conditional={x}": r"template_conditional='\{x\}': must have \{x_prime\} once, at its end",
    "template_conditional={x_prime}{x_prime}": "once, at its end",
    "template_conditional=Correct it:": "once, at its end",
    "template_marginal=": "once, at its end",
    "template_conditional={x_prime} .": "ends in text; what is scored",
    "template_marginal={x}{x_prime}": r"it is p\(x'\) without x; take x out",
    "template_marginal={x_prime": "a brace that is text is written twice",
    "template_marginal={x_prime!r}": "no plain name",
    "template_auditor={x}": r"it lays out \{x_prime\}, beside \{x\} or alone",
    "template_outcome={y}": r"needs \{x_prime\}, and the column of y' at its end",
    "lambda_y=2": "without template_outcome: there is no y'",
    "c_end=1": r"c_end=1\.0 with c_steps=None: a schedule of c needs both",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_means_nothing_is_refused(tiny_config: Tree, setting: str) -> None:
    key, _, value = setting.partition("=")
    tiny_config["rewards"] = {"cf": {"type": "counterfactual", key: float(value) if value.isdigit() else value}}
    with pytest.raises(ValueError, match=REFUSED[setting]) as caught:
        settings.load(tiny_config)
    assert "\n" not in str(caught.value).strip()


UNUSABLE = {
    "template_conditional": ("{z}{x_prime}", r"sample 0: template_conditional: there is no text \{z\}; use x, nothing"),
    "template_marginal": ("{x_prime}", "the scorer's tokenizer has no BOS to begin with; begin the template with"),
    "template_outcome": ("{x_prime} {nothing}", r"sample 0: template_outcome: y' has no token"),
    "scorer": ("nowhere/at/all", "rewards.cf.scorer=nowhere/at/all: no such folder"),
    "auditor": ("nowhere:f", "nowhere:f: cannot be imported"),
    "auditor ": (
        "test_counterfactual:alone",
        r"is called with \(x, x_prime\) and takes \(x: str\) -> str; let it take both",
    ),
    "auditor  ": ("nowhere.f", "a function is module:function"),
    "template_auditor": ("{x}: {x_prime}", r"only a classifier reads it"),
}


@pytest.mark.parametrize("key", UNUSABLE)
def test_what_cannot_be_used_is_said_before_the_first_step(tiny_config: Tree, key: str) -> None:
    value, said = UNUSABLE[key]
    write_jsonl("prompts.jsonl", [{"prompt": f"Line {n}:", "nothing": ""} for n in range(8)])
    section = {"type": "counterfactual", "template_marginal": HINT + "{x_prime}", key.strip(): value}
    tiny_config["rewards"] = {"cf": section}
    with pytest.raises(ValueError, match=said) as caught:
        rlkl.train(tiny_config)
    assert "\n" not in str(caught.value).strip() and not Path("runs").exists()


def test_without_a_marginal_no_bos_is_needed(tiny_model: Path) -> None:
    rollout = rollout_of(AutoTokenizer.from_pretrained(tiny_model))
    assert made(tiny_model, c=0, template_marginal="{x_prime}")(rollout).value_BT.any()


def test_an_auditor_may_be_a_classifier_with_its_own_tokenizer(tiny_model: Path, foreign: Path, tmp_path: Path) -> None:
    folder = reward_model(foreign, tmp_path / "judge", num_labels=3, id2label={0: "good", 1: "bad", 2: "odd"})
    before = digest(AutoModelForSequenceClassification.from_pretrained(folder))
    model, tokenizer = models.classifier(folder)

    def verdict(text: str) -> int:
        return int(model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits.argmax())

    rows = [(x, y) for x in ("The fox", "A dog", "Feedback", "reads") for y in (" jumps over", " reads", "!", " lines")]
    rollout = rollout_of(AutoTokenizer.from_pretrained(tiny_model), rows)
    plain = made(tiny_model)(rollout)
    for template in ("{x_prime}", "{x} becomes {x_prime}"):
        reward = made(tiny_model, auditor=str(folder), template_auditor=template)
        result = reward(rollout)
        changes = [verdict(template.format(x=x, x_prime=y)) != verdict(x) for x, y in rows]
        assert {True, False} == set(changes)
        expected = plain.value_BT.sum(-1) * torch.tensor(changes)
        assert result.value_BT.sum(-1).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert (result.queries, result.labels) == (16, 0)  # a classifier is a model
        assert reward.auditor is not None and reward.auditor("The fox") in ("good", "bad", "odd")
        assert digest(reward.auditor.model) == before
    with pytest.raises(ValueError, match=r"rewards.cf.auditor=.*it has 1 label, which is no verdict"):
        made(tiny_model, auditor=str(reward_model(foreign, tmp_path / "score")))
    long = made(tiny_model, auditor=str(folder), template_auditor="a" * 400 + "{x_prime}")
    with pytest.raises(rlkl.RunError, match="sample 0: the auditor: ValueError: the classifier reads 1 to 128 tokens"):
        long(rollout)


def alone(x: str) -> str:
    return x


def raises(x: str, x_prime: str | None) -> str:
    if x_prime is not None:
        raise RuntimeError("no judgement")
    return x


def test_an_auditor_that_fails_is_named(tiny_model: Path) -> None:
    reward = made(tiny_model, auditor="test_counterfactual:raises")
    with pytest.raises(rlkl.RunError, match="reward cf: sample 0: the auditor: RuntimeError: no judgement"):
        reward(rollout_of(AutoTokenizer.from_pretrained(tiny_model)))


def test_a_row_beyond_the_scorers_context_is_named(tiny_model: Path) -> None:
    for scorer in ("reference", str(tiny_model)):
        reward = made(tiny_model, scorer=scorer, template_conditional="a" * 80 + "{x_prime}", c=0)
        with pytest.raises(
            rlkl.RunError, match=r"reward cf: sample 0 has .* tokens in template_conditional; the scorer reads 64"
        ):
            reward(rollout_of(AutoTokenizer.from_pretrained(tiny_model)))


def test_c_follows_its_schedule() -> None:
    moving = source(c=0.2, c_end=1.0, c_steps=4)
    assert [moving.c_at(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0])
    assert source(c=0.3).c_at(7) == 0.3
