"""A reward model as a source: what it reads, where it is paid, and what is refused."""

import itertools
from email.message import Message
from http.client import BadStatusLine
from pathlib import Path
from socket import gaierror
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import torch
from conftest import Tree, metrics, reward_model
from models import CHUNKED, EOS, build, make_rollout
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rlkl
from rlkl import RunError, importing, scoring, settings
from rlkl.config import LearnedSource, dump
from rlkl.rewards import reading
from rlkl.rewards.learned import LearnedReward

ROWS = [[7, 11, 3, 8, EOS], [9], [12, 4, EOS, 20, 33, 41, EOS, EOS], [64, 30, 2]]


def alone(model: Any, row: list[int]) -> float:
    """The model's own score of a row without padding; without a pad id, it reads the last place."""
    model.config.get_text_config().pad_token_id = None
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([row])).logits)


def classifier(name: str, folder: Path) -> Any:
    build(name).save_pretrained(folder)
    torch.manual_seed(2)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("pad_id", [None, 0, EOS])
def test_a_row_is_scored_at_its_last_place_whatever_the_pad_id(name: str, pad_id: int | None, tmp_path: Path) -> None:
    model = classifier(name, tmp_path)
    expected = [alone(model, row) for row in ROWS]
    model.config.get_text_config().pad_token_id = pad_id
    for micro_batch in (1, 3, 64):
        assert scoring.scores(model, ROWS, micro_batch).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(set(expected)) == len(ROWS)


def source(path: Path, **keys: Any) -> LearnedReward:
    return LearnedReward("rm", LearnedSource(type="learned", path=str(path), **keys))


def texts(reward: LearnedReward) -> tuple[Any, int]:
    """A rollout on the tiny vocabulary; the first and third completions end by EOS."""
    end = reward.tokenizer.eos_token_id
    return make_rollout([[5, 6], [7], [8, 9, 10]], [[20, 21, end], [22, 23], [end]]), end


def ended(rollout: Any, end: int) -> Any:
    from dataclasses import replace

    return replace(rollout, end_B=torch.tensor([0, 2, 0]))  # make_rollout knows another EOS


def test_what_is_judged_ends_by_one_eos_and_is_paid_at_the_last_policy_token(tiny_reward_model: Path) -> None:
    reward = source(tiny_reward_model)
    rollout, end = texts(reward)
    result = reward(ended(rollout, end))
    rows = [[5, 6, 20, 21, end], [7, 22, 23, end], [8, 9, 10, end]]
    expected = [alone(reward.model, row) for row in rows]
    assert result.value_BT.sum(-1).tolist() == pytest.approx(expected, rel=1e-5)
    assert result.scored_BT.tolist() == [[False, False, True], [False, True, False], [True, False, False]]
    assert torch.equal(result.value_BT != 0, result.scored_BT) and result.queries == 3
    bare = source(tiny_reward_model, eos=False)(ended(rollout, end))
    expected = [alone(reward.model, row[:-1]) for row in rows]
    assert bare.value_BT.sum(-1).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_stop_string_is_no_part_of_what_is_judged(tiny_reward_model: Path) -> None:
    from dataclasses import replace

    reward = source(tiny_reward_model)
    tokenizer, end = reward.tokenizer, reward.tokenizer.eos_token_id
    said = tokenizer("A fox.")["input_ids"]
    stop = tokenizer("\nQ")["input_ids"]
    rollout = make_rollout([[5], [6]], [[*said, *stop], stop])
    stopped = replace(rollout, end_B=torch.tensor([1, 1]), stop=("\nQ",), decode=lambda ids: str(tokenizer.decode(ids)))
    assert reading.whole(stopped, tokenizer, None, True) == [[5, *said, end], [6, end]]


def test_it_is_frozen_in_its_own_dtype_and_its_dropout_is_off(tiny_model: Path, tmp_path: Path) -> None:
    reward = source(reward_model(tiny_model, tmp_path, dtype=torch.bfloat16))
    assert {p.dtype for p in reward.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in reward.model.parameters()) and not reward.model.training
    rollout, end = texts(reward)
    assert reward(ended(rollout, end)).value_BT.dtype == torch.float32


def test_a_run_learns_from_it(tiny_config: Tree, tiny_reward_model: Path) -> None:
    tiny_config["rewards"] = {
        "rm": {"type": "learned", "path": str(tiny_reward_model), "weight": 2.0},
        "varied": {**tiny_config["rewards"]["varied"], "weight": 0},
    }
    run = rlkl.train(tiny_config)
    rows = metrics(run)
    assert rows[1]["reward/train/total"] == pytest.approx(2 * rows[1]["reward/train/rm"])
    assert rows[1]["policy/grad_norm"] > 0 and rows[-1]["reward/queries"] == 8
    card = (run / "final" / "README.md").read_text(encoding="utf-8")
    assert str(tiny_reward_model.parent) not in card and tiny_reward_model.name in card


def spoilt(folder: Path, change: Any) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        change(model.score.weight)
    model.save_pretrained(folder)
    return folder


def test_a_score_that_is_not_finite_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    reward = source(spoilt(reward_model(tiny_model, tmp_path), lambda w: w.fill_(torch.nan)))
    rollout, end = texts(reward)
    with pytest.raises(RunError, match="reward rm: sample 0 got nan; every completion needs a finite score"):
        reward(ended(rollout, end))


def test_a_completion_beyond_its_context_stops_the_run(tiny_reward_model: Path) -> None:
    reward = source(tiny_reward_model)
    with pytest.raises(RunError, match="reward rm: sample 0 has 65 tokens with its prompt, and the model reads"):
        reward(make_rollout([[5] * 10], [[6] * 54]))


def two_labels(base: Path, folder: Path) -> Path:
    return reward_model(base, folder, num_labels=2)


def causal_lm(base: Path, folder: Path) -> Path:
    return base


def adapter(base: Path, folder: Path) -> Path:
    (reward_model(base, folder) / "adapter_config.json").write_text("{}")
    return folder


def nothing(base: Path, folder: Path) -> Path:
    return folder / "nowhere"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (two_labels, "it has 2 labels, not one score"),
        (causal_lm, "lacks the weights score.weight"),
        (adapter, "it holds an adapter; merge it into its base"),
        (nothing, "no such folder"),
    ],
)
def test_what_is_no_reward_model_is_refused(make: Any, why: str, tiny_model: Path, tmp_path: Path) -> None:
    path = make(tiny_model, tmp_path / "rm")
    with pytest.raises(ValueError, match=rf"^rewards\.rm\.path=.*{why}"):
        source(path)


def test_a_name_that_is_no_folder_waits_for_no_hub_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise answer

    def asked(*_: Any, **__: Any) -> Any:
        raise OSError("the Hub was asked")

    monkeypatch.setattr("rlkl.models._whole", asked)
    monkeypatch.setattr("urllib.request.urlopen", away)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    answer: Exception
    failures = (URLError(gaierror("no such host")), TimeoutError("timed out"), BadStatusLine("garbage"))
    for name, failure in itertools.product(("nofolder", "no/folder"), failures):
        answer = failure
        with pytest.raises(
            ValueError, match=rf"^rewards\.rm\.path={name}: .*there is no such folder here, and the Hub do"
        ):
            source(Path(name))
    with pytest.raises(ValueError, match=r"cannot be loaded \(Repo id must"):
        source(Path("x" * 300))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "file")
    with pytest.raises(ValueError, match="the Hub was asked"):
        source(Path("downloaded"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    for reached in (URLError(SSLError("certificate")), HTTPError("u", 401, "no", Message(), None)):
        answer = reached
        with pytest.raises(ValueError, match="the Hub was asked"):
            source(Path("gpt2"))


def test_a_tokenizer_without_eos_needs_eos_false(tiny_model: Path, tmp_path: Path) -> None:
    folder = reward_model(tiny_model, tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"rewards\.rm\.eos=true: .* has no EOS; set eos=false"):
        source(folder)
    assert source(folder, eos=False).context == 64


def test_the_policy_and_the_rewards_of_a_finished_run_can_be_evaluated(
    tiny_config: Tree, tiny_reward_model: Path
) -> None:
    from rlkl import runs

    tiny_config["rewards"]["rm"] = {"type": "learned", "path": str(tiny_reward_model)}
    assert "reward/eval/rm" in runs.evaluate_run(rlkl.train(tiny_config), None, None, None)


def test_the_configuration_watches_gold_and_learns_from_the_model() -> None:
    config = settings.load(Path(__file__).parents[1] / "configs" / "rewards" / "learned.yaml")
    assert {name: source.weight for name, source in config.rewards.items()} == {"model": 1.0, "gold": 0.0}
    assert settings.load(dump(config)) == config


def test_a_folder_named_like_a_function_is_none(tiny_config: Tree) -> None:
    tiny_config["rewards"]["rm"] = {"type": "learned", "path": "judge:v2"}
    assert list(importing.named(settings.load(tiny_config))) == [("conftest:varied", "rewards.varied.path", ())]


# Scores of tokens, clip, and what did not end


def token_model(tiny_model: Path, folder: Path) -> Path:
    from rlkl import models

    torch.manual_seed(3)
    model = models.headed(tiny_model, "token")
    with torch.no_grad():
        model.score.weight.mul_(20)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_a_token_model_pays_each_policy_token_its_own_score(tiny_model: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    reward = source(token_model(tiny_model, tmp_path / "rm"), level="token")
    rollout, end = texts(reward)
    rollout = ended(rollout, end)
    found = reward(rollout)
    for i, (prompt, y) in enumerate(zip([[5, 6], [7], [8, 9, 10]], [[20, 21, end], [22, 23], [end]], strict=True)):
        for t in range(len(y)):  # of what stands before, and no more
            alone = reward.model(input_ids=torch.tensor([[*prompt, *y[: t + 1]]])).logits[0, -1, 0]
            assert float(found.value_BT[i, t]) == pytest.approx(float(alone), rel=1e-4, abs=1e-5)
    assert torch.equal(found.scored_BT, rollout.policy_mask_BT) and found.queries == 3
    assert not found.value_BT[~rollout.policy_mask_BT].any()
    reward.probe(rollout)
    mask_BT = rollout.policy_mask_BT.clone()
    mask_BT[0, 1] = False  # written by an environment
    spared = reward(replace(rollout, policy_mask_BT=mask_BT)).value_BT
    assert spared[0, 1] == 0 and spared[0, 2] == found.value_BT[0, 2]


def test_a_token_model_that_looks_ahead_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    reward = source(token_model(tiny_model, tmp_path / "rm"), level="token")
    own = reward.model.forward

    def ahead(input_ids: Any, **keys: Any) -> Any:
        out = own(input_ids=input_ids, **keys)
        out.logits = out.logits + input_ids.float().sum(1)[:, None, None]
        return out

    reward.model.forward = ahead
    rollout, end = texts(reward)
    with pytest.raises(ValueError, match="reward rm: not causal"):
        reward.probe(ended(rollout, end))


def test_a_run_learns_from_a_token_model(tiny_config: Tree, tiny_model: Path, tmp_path: Path) -> None:
    path = token_model(tiny_model, tmp_path / "rm")
    tiny_config["rewards"] = {"rm": {"type": "learned", "path": str(path), "level": "token"}}
    rows = metrics(rlkl.train(tiny_config))
    assert rows[1]["policy/grad_norm"] > 0 and rows[0]["reward/eval/rm"] != 0


def test_clip_comes_before_the_penalty_of_what_did_not_end(tiny_reward_model: Path) -> None:
    plain = source(tiny_reward_model)
    rollout, end = texts(plain)
    rollout = ended(rollout, end)  # by EOS, the limit, EOS
    score_B = plain(rollout).value_BT.sum(-1)
    middle = float(score_B.abs().median())
    paid_B = source(tiny_reward_model, clip=middle, missing_eos_penalty=2.5)(rollout).value_BT.sum(-1)
    assert bool((score_B.abs() > middle).any())
    assert torch.allclose(paid_B, score_B.clamp(-middle, middle) - torch.tensor([0, 2.5, 0]))


def test_equal_completions_are_scored_once(tiny_reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = source(tiny_reward_model)
    rollout = make_rollout([[5, 6]] * 3 + [[5]], [[20, 21], [22, 23], [20, 21], [20, 21]])
    seen = []
    monkeypatch.setattr(scoring, "pad", lambda rows, pad=scoring.pad: seen.extend(rows) or pad(rows))
    score_B = reward(rollout).value_BT.sum(-1)
    assert len(seen) == 3 and reward(rollout).queries == 4
    assert score_B[0] == score_B[2] and len(set(score_B.tolist())) == 3


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"eos": False}, "eos=false with level=token"),
        ({"missing_eos_penalty": 1.0}, "missing_eos_penalty=1.0 with level=token"),
        ({"path": "facts"}, "path=facts with level=token"),
    ],
)
def test_what_means_nothing_for_tokens_is_refused(keys: Tree, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        LearnedSource(**{"type": "learned", "path": "x", "level": "token", **keys})
