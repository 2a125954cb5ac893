"""A judge as reward: ratings by hand from the judge's own logits, replies of a server, and what ends a run."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import foreign_model
from stub import Stub
from test_config_effects import shows
from test_counterfactual import rollout_of
from transformers import AutoTokenizer

from rlkl import Outage, RunError, models
from rlkl.config import OverseerSource
from rlkl.endpoint import NoAnswer
from rlkl.rewards.judges import disjoint, judged
from rlkl.rewards.overseer import OverseerReward
from rlkl.types import Rollout

ROWS = [("Line 1:", " a quick fox"), ("Line 2:", " a dog"), ("Line 1:", " a quick fox"), ("Line 2:", " lazy")]
TEMPLATE = "{prompt}{completion} ->"


@pytest.fixture(scope="session")
def judge_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama whose tokenizer is no other model's here."""
    return foreign_model(tmp_path_factory.mktemp("judge"), "rated 1 2 3 10 yes no", 300)


def source(**keys: Any) -> OverseerSource:
    ratings = {"1": 1.0, "2": 2.0, "10": 10.0}
    given = {"template": TEMPLATE, "ratings": ratings, "min_mass": 0.0, "model": "judge", **keys}
    return OverseerSource(type="overseer", **given)


def local(folder: Path, **keys: Any) -> OverseerReward:
    return OverseerReward("judge", source(model=str(folder), **keys))


def remote(stub: Stub, folder: Path, **keys: Any) -> OverseerReward:
    given = {"ratings": {"1": 1.0, "2": 2.0, "9": 9.0}, "retries": 1, "backoff": 0.01, "timeout": 5}
    return OverseerReward("judge", source(endpoint=stub.url, **{"cache": str(folder / "kept"), **given, **keys}))


@pytest.fixture
def rollout(tiny_model: Path) -> Rollout:
    return rollout_of(AutoTokenizer.from_pretrained(tiny_model), ROWS, gold=["a", "b", "a", "b"])


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A server that rates by the length of the question."""
    server = Stub(rate)
    yield server
    server.close()


def rate(question: str) -> dict[str, float]:
    share = (len(question) % 7 + 1) / 10
    return {"1": 0.9 * share, "2": 0.9 * (1 - share), " 2": 0.05, "the": 0.05}


def rated(question: str) -> float:
    share = (len(question) % 7 + 1) / 10
    return (0.9 * share + 2 * (0.9 * (1 - share) + 0.05)) / 0.95


@torch.no_grad()
def p_next(folder: Path, ids: Sequence[int]) -> Any:
    model, _ = models.from_folder(folder)
    return model.eval()(input_ids=torch.tensor([list(ids)])).logits[0, -1].double().softmax(-1)


# The local judge


@shows("rewards.overseer.ratings")
def test_the_expected_rating_is_that_of_the_judges_own_logits(judge_model: Path, rollout: Rollout) -> None:
    tokenizer = AutoTokenizer.from_pretrained(judge_model)
    result = local(judge_model, micro_batch=2)(rollout)
    (one,), (two,), ten = (tokenizer(answer)["input_ids"] for answer in ("1", "2", "10"))
    assert len(ten) == 2 and ten[0] == one  # the longer rating begins with the shorter one
    for i, (x, y) in enumerate(ROWS):
        asked = tokenizer(f"{x}{y} ->")["input_ids"]
        first, then = p_next(judge_model, asked), p_next(judge_model, [*asked, one])
        p = [first[one] * (1 - then[ten[1]]), first[two], first[one] * then[ten[1]]]
        expected = (p[0] + 2 * p[1] + 10 * p[2]) / sum(p)
        assert float(result.value_BT[i].sum()) == pytest.approx(float(expected), rel=1e-5)
        last = int(rollout.length_B[i]) - 1
        assert result.scored_BT[i].nonzero().tolist() == [[last]] and result.value_BT[i, last] != 0
    assert result.queries == 4 and not result.value_BT.requires_grad


@shows("rewards.overseer.score")
def test_log_odds_are_those_of_the_better_rating(judge_model: Path, rollout: Rollout) -> None:
    tokenizer = AutoTokenizer.from_pretrained(judge_model)
    odds = {"score": "log_odds", "template": "{prompt}{completion} Good?"}
    result = local(judge_model, ratings={" no": -1.0, " yes": 5.0}, **odds)(rollout)
    other = local(judge_model, ratings={" yes": 1.0, " no": 2.0}, **odds)(rollout)

    def logp(asked: list[int], row: list[int]) -> float:
        return math.fsum(math.log(p_next(judge_model, asked + row[:k])[t]) for k, t in enumerate(row))

    for i, (x, y) in enumerate(ROWS):
        asked = tokenizer(f"{x}{y} Good?")["input_ids"]
        yes, no = (tokenizer(answer)["input_ids"] for answer in (" yes", " no"))
        expected = logp(asked, yes) - logp(asked, no)
        assert float(result.value_BT[i].sum()) == pytest.approx(expected, rel=1e-5)
        assert float(other.value_BT[i].sum()) == pytest.approx(-expected, rel=1e-5)


@shows("rewards.overseer.micro_batch")
def test_how_many_rows_are_read_together_changes_nothing(
    judge_model: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, most = [], list[int]()
    for size in (1, 4):
        reward, read = local(judge_model, micro_batch=size), list[int]()
        own = reward.judge.model.forward  # type: ignore[union-attr]

        def forward(state: Any, own: Any = own, read: list[int] = read) -> Any:
            read.append(len(state.input_BS))
            return own(state)

        monkeypatch.setattr(reward.judge.model, "forward", forward)  # type: ignore[union-attr]
        found.append(reward(rollout).value_BT.sum(-1).tolist())
        most.append(max(read))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and most == [1, 4]


def test_equal_questions_are_read_once(judge_model: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    reward, read = local(judge_model), list[int]()
    own = reward.judge._next  # type: ignore[union-attr]
    monkeypatch.setattr(reward.judge, "_next", lambda rows, device: read.append(len(rows)) or own(rows, device))
    result = reward(rollout)
    assert read == [6]  # three questions, each alone and with "1"
    assert result.value_BT[0].sum() == result.value_BT[2].sum() != result.value_BT[1].sum()


def test_nested_ratings_are_disjoint() -> None:
    ratings = {"a": (1,), "ab": (1, 2), "abc": (1, 2, 3), "ac": (1, 4), "b": (5,)}
    logp = {answer: math.log(p) for answer, p in zip(ratings, (0.5, 0.3, 0.1, 0.15, 0.25), strict=True)}
    found = {answer: math.exp(x) for answer, x in disjoint(ratings, logp).items()}
    assert found == pytest.approx({"a": 0.05, "ab": 0.2, "abc": 0.1, "ac": 0.15, "b": 0.25})
    certain = disjoint({"1": (1,), "10": (1, 0)}, {"1": math.log(0.5), "10": math.log(0.5)})
    assert certain["1"] == -math.inf


@shows("rewards.overseer.chat")
def test_the_chat_template_lays_the_question_out(judge_model: Path, rollout: Rollout, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rewards\.judge\.chat=true: .* has no chat template"):
        local(judge_model, chat=True)
    model, tokenizer = models.from_folder(judge_model)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}|"
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = local(tmp_path / "chat", chat=True)(rollout)
    plain = local(judge_model, template="<user>{prompt}{completion} ->|")(rollout)
    assert chat.value_BT.tolist() == plain.value_BT.tolist() != local(judge_model)(rollout).value_BT.tolist()


def test_a_judge_that_gives_no_rating_ends_the_run(judge_model: Path, rollout: Rollout) -> None:
    with pytest.raises(RunError, match=r"reward judge: sample 0: the judge puts .* on the ratings, min_mass is 0\.99"):
        local(judge_model, min_mass=0.99)(rollout)
    with pytest.raises(NoAnswer, match="not finite"):
        judged({"1": 0.0}, source(ratings={"1": 0.0, "2": 1.0}, score="log_odds"))
    with pytest.raises(NoAnswer, match="puts nan"):
        judged({"1": math.nan, "2": 0.0}, source())


def test_a_question_that_is_too_long_is_never_cut(judge_model: Path, rollout: Rollout) -> None:
    with pytest.raises(RunError, match=r"sample 0: the question has \d+ tokens with a rating, .* reads at most 128"):
        local(judge_model, template="x" * 140 + TEMPLATE)(rollout)


def test_a_rating_that_the_tokenizer_joins_with_the_question_is_refused(judge_model: Path, rollout: Rollout) -> None:
    with pytest.raises(RunError, match="joins 'ck' with the end of the question"):
        local(judge_model, template="{prompt}{completion} qui", ratings={"ck": 1.0, "1": 2.0})(rollout)


@shows("rewards.overseer.template")
def test_a_column_that_is_not_there_is_named_before_the_first_step(judge_model: Path, rollout: Rollout) -> None:
    reward = local(judge_model, template="{qestion}{completion}")
    with pytest.raises(ValueError, match=r"there is no text \{qestion\}; use prompt, gold, completion \(on a few"):
        reward.probe(rollout)
    plain, gold = (local(judge_model, template=t)(rollout) for t in (TEMPLATE, "{gold}{completion} {{->"))
    assert plain.value_BT.tolist() != gold.value_BT.tolist()


# The endpoint


@shows("rewards.overseer.type", "rewards.overseer.endpoint", "rewards.overseer.model", "rewards.overseer.cache")
def test_ratings_come_from_the_first_tokens_of_replies(stub: Stub, rollout: Rollout, tmp_path: Path) -> None:
    result = remote(stub, tmp_path)(rollout)
    asked = [f"{x}{y} ->" for x, y in ROWS]
    assert result.value_BT.sum(-1).tolist() == pytest.approx([rated(question) for question in asked])
    assert sorted(stub.questions) == sorted(set(asked)) and result.queries == 4
    body = stub.asked[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["logprobs"]) == ("judge", 1, 1, True)
    assert body["top_logprobs"] == 20 and "Authorization" not in stub.headers[0]
    again = remote(stub, tmp_path)(rollout)  # another run: nothing is asked, and the queries count all the same
    assert again.value_BT.tolist() == result.value_BT.tolist() and again.queries == 4 and len(stub.asked) == 3


def test_log_odds_of_an_endpoint(stub: Stub, rollout: Rollout, tmp_path: Path) -> None:
    stub.answer = lambda question: {"Yes": 0.6, " yes": 0.1, "no": 0.2}
    reward = remote(stub, tmp_path, ratings={"yes": 1.0, "no": 0.0}, score="log_odds", min_mass=0.25)
    assert reward(rollout).value_BT.sum(-1).tolist() == pytest.approx([math.log(0.1 / 0.2)] * 4)
    stub.answer = lambda question: {"yes": 0.9}
    with pytest.raises(Outage, match="log-odds of 'yes' against 'no' are not finite"):
        remote(stub, tmp_path, ratings={"yes": 1.0, "no": 0.0}, score="log_odds", cache=str(tmp_path / "x"))(rollout)


@shows("rewards.overseer.read")
@pytest.mark.parametrize("text", ["2", " 2\n", "2.", "The end is fine.\n\n2"])
def test_a_text_is_read_only_where_it_is_asked_for(stub: Stub, rollout: Rollout, tmp_path: Path, text: str) -> None:
    stub.answer = lambda question: text
    with pytest.raises(Outage, match=r"sample 0: .*the server gives no logprobs; set read=text"):
        remote(stub, tmp_path, concurrency=1)(rollout)
    assert remote(stub, tmp_path, read="text", min_mass=0.5)(rollout).value_BT.sum(-1).tolist() == [2] * 4
    assert (stub.asked[-1]["temperature"], "logprobs" in stub.asked[-1]) == (0, False)


@pytest.mark.parametrize("text", ["", "good", "2/9", "Rating: 2", "3", "2 or 9", "2\nas I said"])
def test_a_reply_that_is_no_rating_names_the_sample_and_is_never_zero(
    stub: Stub, rollout: Rollout, tmp_path: Path, text: str
) -> None:
    stub.answer = lambda question: text if "dog" in question else "1"
    with pytest.raises(Outage, match=r"reward judge: sample 1: .* the reply is no rating: it ends in .*one of 1, 2, 9"):
        remote(stub, tmp_path, read="text", min_mass=0.5)(rollout)


@shows("rewards.overseer.min_mass")
def test_first_tokens_that_are_no_rating_name_the_sample(stub: Stub, rollout: Rollout, tmp_path: Path) -> None:
    stub.answer = lambda question: {"The": 0.7, "2": 0.2} if "dog" in question else {"1": 1.0}
    with pytest.raises(Outage, match=r"sample 1: .* puts 0\.2 of its .*, min_mass is 0\.5.*first token: 'The' 0\.7"):
        remote(stub, tmp_path, min_mass=0.5)(rollout)
    assert remote(stub, tmp_path, min_mass=0.1)(rollout).value_BT.sum(-1).tolist() == [1, 2, 1, 1]


def test_a_text_that_was_cut_is_no_rating(stub: Stub, rollout: Rollout, tmp_path: Path) -> None:
    from stub import completion

    stub.faults = [(200, {}, json.dumps(completion("1", "length")))]
    with pytest.raises(Outage, match=r"was cut, raise parameters\.max_tokens"):
        remote(stub, tmp_path, read="text", min_mass=0.5, concurrency=1)(rollout)


@shows("rewards.overseer.parameters", "rewards.overseer.top_logprobs")
def test_parameters_are_added_to_each_request(stub: Stub, rollout: Rollout, tmp_path: Path) -> None:
    parameters = {"max_tokens": None, "max_completion_tokens": 1, "extra": {"thinking": False}}
    remote(stub, tmp_path, parameters=parameters, top_logprobs=5)(rollout)
    body = stub.asked[0]
    assert "max_tokens" not in body and body["max_completion_tokens"] == 1 and body["extra"] == {"thinking": False}
    assert body["top_logprobs"] == 5


@shows("rewards.overseer.api_key_env")
def test_the_key_comes_from_the_environment(
    stub: Stub, rollout: Rollout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    remote(stub, tmp_path, api_key_env="JUDGE_KEY")(rollout)
    assert {headers["Authorization"] for headers in stub.headers} == {"Bearer sk-1"}


@shows(*(f"rewards.overseer.{key}" for key in ("timeout", "retries", "backoff", "concurrency")))
def test_how_the_endpoint_is_asked_is_as_configured(stub: Stub, rollout: Rollout, tmp_path: Path) -> None:
    stub.slow, stub.faults = 0.1, [(500, {}, "")]
    remote(stub, tmp_path, backoff=0.8, concurrency=1)(rollout)
    assert stub.most == 1 and stub.times[1] - stub.times[0] > 0.4
    remote(stub, tmp_path / "other", concurrency=3)(rollout)
    assert stub.most == 3 and len(stub.asked) == 7
    stub.slow = 0.5
    with pytest.raises(Outage, match=r"no answer after 3 tries .ReadTimeout"):
        remote(stub, tmp_path / "third", timeout=0.1, retries=2, concurrency=1)(rollout)
    assert len(stub.asked) == 10


def test_probing_tells_a_mistake_from_a_fault(stub: Stub, rollout: Rollout, tmp_path: Path) -> None:
    stub.down = 404
    with pytest.raises(ValueError, match=r"status 404: down \(on a few samples before the first step\)"):
        remote(stub, tmp_path).probe(rollout)
    stub.down = 503
    with pytest.raises(Outage, match="no answer after 2 tries"):
        remote(stub, tmp_path).probe(rollout)


# Configurations


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"template": "{prompt}?"}, "must have {completion}"),
        ({"template": "{completion"}, "a brace that is text is written twice"),
        ({"template": "{completion} {0:x}"}, "is no plain name"),
        ({"ratings": {1: 1, 2: 2}}, "ratings: 1 is no text; put it in quotes"),
        ({"ratings": {True: 1, "no": 0}}, "ratings: True is no text"),
        ({"ratings": {"1": 1.0, "2": 1.0}}, "all have the same value"),
        ({"score": "log_odds"}, "score=log_odds with 3 ratings"),
        ({"read": "text"}, "read=text without endpoint"),
        ({"retries": 2}, "retries=2 without endpoint"),
        ({"endpoint": "localhost:8000"}, "String should match pattern"),
        ({"endpoint": "http://me:secret@host/v1"}, "String should match pattern"),
        ({"endpoint": "http://h/v1"}, "'10' begins with '1'"),
        ({"endpoint": "http://h/v1", "ratings": {"1": 1.0, " 1": 2.0}}, "'1' twice"),
        ({"endpoint": "http://h/v1", "chat": True}, "chat=true with endpoint"),
        ({"endpoint": "http://h/v1", "read": "text", "min_mass": 0.5, "top_logprobs": 5}, "top_logprobs=5 with read"),
        ({"endpoint": "http://h/v1", "read": "text", "min_mass": 0.9}, "min_mass=0.9 with read=text"),
        ({"endpoint": "http://h/v1", "read": "text", "min_mass": 0.5, "parameters": {"a": math.inf}}, "sent as JSON"),
    ],
)
def test_what_means_nothing_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        source(**keys)
    assert said in str(caught.value)


def test_ten_ratings_may_be_read_from_a_text() -> None:
    ratings = {str(n): float(n) for n in range(1, 11)}
    assert source(endpoint="http://h/v1", read="text", min_mass=0.5, ratings=ratings).ratings == ratings


def test_a_key_that_is_not_set_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    ratings = {"1": 1.0, "2": 2.0}
    with pytest.raises(ValueError, match=r"rewards\.judge\.api_key_env=NO_SUCH_KEY: .* is not set; export it"):
        OverseerReward("judge", source(endpoint="http://h/v1", api_key_env="NO_SUCH_KEY", ratings=ratings))
