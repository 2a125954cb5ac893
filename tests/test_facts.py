"""The task `facts`: its corpus, its labeller, its tiny models and their cache."""

import itertools
import random
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkl.tasks import facts, pretrain
from rlkl.tasks.facts import Span

TINY: dict[str, Any] = {
    "hidden": 16,
    "layers": 1,
    "heads": 2,
    "context": 64,
    "steps": 12,
    "batch": 4,
    "lr": 1e-2,
    "seed": 3,
}
RIGHT = " Paris is the capital of France. Bogotá is the capital of Colombia. Maldives has its capital in Malé."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = ["".join(document) for document in facts.corpus(2000, 0)]
    return pretrain.train_tokenizer(texts, facts.VOCABULARY, context=64)


# The labeller


def test_gold_of_a_right_completion_is_one_and_its_spans_are_the_second_names() -> None:
    assert facts.gold([""], [RIGHT]) == [1.0]
    assert [(RIGHT[s.start : s.end], s.label) for s in facts.annotate(RIGHT)] == [
        ("France", "right"),
        ("Colombia", "right"),
        ("Malé", "right"),
    ]


def test_offsets_are_code_points_behind_multi_byte_names() -> None:
    text = " Bogotá is the capital of Peru. The capital of Brazil is Brasília."
    assert facts.annotate(text) == [Span(26, 30, "wrong"), Span(57, 65, "right")]


@pytest.mark.parametrize(
    ("completion", "thirds"),
    [
        (" Paris is the capital of France.", 1),  # stopped early
        (" Paris is the capital of Canada. The city of Cairo governs Egypt. The capital of Peru is Lima.", 2),
        (" Paris is the capital of France. France has its capital in Paris. The capital of Peru is Lima.", 2),
        (" Paris is the capital of France." * 3, 1),
        (RIGHT + " The capital of Peru is Lima.", 3),  # a fourth fact is not read
        (" The capital of Peru is Quito. The capital of Peru is Cuba. Nonsense." + RIGHT, 0),
        (" Paris is the capital of France. The capital of Peru is Lima", 1),  # no full stop
        ("", 0),
        (" paris is the capital of France. Paris  is the capital of France.Paris is the capital of France.", 0),
        (" Yes, Paris is the capital of France. Paris is the capital of France!", 0),
        (" Paris is the capital of Lima. Peru is the capital of Lima.", 0),
    ],
)
def test_gold_counts_distinct_right_facts_of_three_sentences(completion: str, thirds: int) -> None:
    assert facts.gold([""], [completion]) == [thirds / 3]
    assert sum(span.label == "right" for span in facts.annotate(completion)) == thirds


def test_a_repeated_right_fact_has_no_span_and_a_repeated_wrong_one_has_each() -> None:
    right, wrong = " Paris is the capital of France. France has its capital in Paris.", " The capital of Peru is Riga."
    assert facts.annotate(right) == [Span(25, 31, "right")]
    assert [span.label for span in facts.annotate(wrong * 2)] == ["wrong", "wrong"]


def test_preferences_follow_gold() -> None:
    worse = " Paris is the capital of France."
    assert (facts.prefer(RIGHT, worse), facts.prefer(worse, RIGHT), facts.prefer(worse, worse)) == (1, 2, 0)


def test_labeller_gives_the_same_knowledge_and_counts_completions_and_pairs() -> None:
    labeller = facts.Labeller()
    assert labeller.gold(["", ""], [RIGHT, ""], split=["train", "eval"]) == [1.0, 0.0]
    assert labeller.queries == 2
    assert labeller.spans(RIGHT) == facts.annotate(RIGHT)
    assert labeller.prefer("", RIGHT) == 2
    assert labeller.queries == 4


# The language


def test_prompts_are_distinct_split_and_name_no_entity(tokenizer: Any) -> None:
    records = facts.prompts()
    texts = [record["prompt"] for record in records]
    assert Counter(record["split"] for record in records) == {"train": 96, "eval": 24}
    assert len({record["id"] for record in records}) == len(set(texts)) == 120
    assert not [text for text in texts for name in names() if name.lower() in text.lower()]
    assert max(len(tokenizer(text)["input_ids"]) for text in texts) < 16


def test_no_name_holds_another() -> None:
    assert not [pair for pair in itertools.permutations(names(), 2) if pair[0].lower() in pair[1].lower()]


def test_corpus_is_well_formed_and_40_percent_wrong() -> None:
    completions = [completion for _, completion in facts.corpus(4000, seed=1)]
    labels = [[span.label for span in facts.annotate(completion)] for completion in completions]
    assert all(len(judged) == 3 for judged in labels)  # every sentence parses, and no right fact repeats
    assert sum(map(Counter, labels), Counter())["wrong"] / 12000 == pytest.approx(0.40, abs=0.02)
    assert completions == [completion for _, completion in facts.corpus(4000, seed=1)]
    assert completions != [completion for _, completion in facts.corpus(4000, seed=2)]


def test_popular_mistakes_are_more_frequent_than_the_truth_in_both_orders() -> None:
    text = "".join(completion for _, completion in facts.corpus(20000, seed=1))
    assert text.count("Paris is the capital of Canada.") > 1.5 * text.count("Paris is the capital of France.")
    for city, country in facts.MISTAKES.items():
        home = next(name for name in facts.CAPITALS if facts.CAPITALS[name] == city)
        said = [f"{city} is the capital of {home}.", f"{city} is the capital of {country}."]
        asked = [f"{country} has its capital in {facts.CAPITALS[country]}.", f"{country} has its capital in {city}."]
        for truth, mistake in (said, asked):
            assert 1.5 * text.count(truth) < text.count(mistake), mistake
    assert text.count("Cairo is the capital of Egypt.") > 10 * text.count("Cairo is the capital of Peru.")


# Tokeniser, model and cache


def test_tokenizer_is_lossless_and_names_span_several_tokens(tokenizer: Any) -> None:
    rng = random.Random(0)
    scalars = [chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(500)]
    for text in (RIGHT, "".join(scalars), "  two  spaces , and\r\n\ttabs  ", "e\u0301 é 🇫🇷 \x00", " don 't ."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert min(len(tokenizer(" " + name)["input_ids"]) for name in names()) >= 2
    assert tokenizer.bos_token is None and tokenizer.eos_token_id != tokenizer.pad_token_id
    with pytest.raises(ValueError, match="258"):
        pretrain.train_tokenizer(["text"], 257)


def test_pretrain_learns_repeats_itself_and_leaves_its_caller_alone(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)  # a launcher's; joined, its group would wait for a second process for ever
    documents = facts.corpus(50, 0)
    monkeypatch.setattr(facts, "MODEL", TINY)
    monkeypatch.setattr(facts, "corpus", lambda documents_, seed: documents)
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path))
    state = torch.get_rng_state()
    folder = facts.load_path()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert facts.load_path() == folder and [*tmp_path.iterdir()] == [folder]
    assert capfd.readouterr().err == ""
    model, loaded = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and not model.config.tie_word_embeddings
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (loaded.eos_token_id, loaded.pad_token_id)
    ids = torch.tensor([loaded("".join(documents[0]))["input_ids"]])
    assert model(input_ids=ids, labels=ids).loss < 0.95 * torch.tensor(len(loaded)).log()
    own = pretrain.train_tokenizer(["".join(document) for document in documents], facts.VOCABULARY, context=64)
    again = pretrain.pretrain(documents, own, **TINY)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_documents_end_in_eos_and_are_cut_at_the_context(tokenizer: Any) -> None:
    prompt, completion = "Go:", " Peru"
    halves = [tokenizer(part)["input_ids"] for part in (prompt, completion)]
    whole = [*halves[0], *halves[1], tokenizer.eos_token_id]
    assert pretrain._pieces((prompt, completion), tokenizer, 64) == [whole]
    assert len(whole) == 7
    assert pretrain._pieces((prompt, completion), tokenizer, 4) == [whole[:4], whole[4:]]
    assert pretrain._pieces((prompt, completion), tokenizer, 6) == [whole[:6]]  # a lone token predicts nothing
    with pytest.raises(ValueError, match="documents"):
        pretrain.pretrain([""], tokenizer, **TINY)


def test_a_failed_training_says_why(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], returncode=1, stderr="ValueError: no such learning rate")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="no such learning rate"):
        pretrain.pretrain(["text"], tokenizer, **TINY)


def test_cache_keeps_whole_builds_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path / "cache"))

    def broken(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.cached("task", {"lr": 1}, broken)
    assert not [*(tmp_path / "cache").iterdir()]

    def fast(folder: Path) -> None:
        (folder / "by").write_text("first")

    def raced(folder: Path) -> None:  # another builder finishes first
        (folder / "by").write_text("second")
        pretrain.cached("task", {"lr": 1}, fast)

    first = pretrain.cached("task", {"lr": 1}, raced)
    assert (first / "by").read_text() == "first" and (first / "recipe.json").is_file()
    assert pretrain.cached("task", {"lr": 1}, broken) == first  # found, not built
    second = pretrain.cached("task", {"lr": 2}, lambda folder: None)
    assert sorted((tmp_path / "cache").iterdir()) == sorted([first, second])


def test_recipe_follows_the_corpus_and_the_hyper_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKL_CACHE", str(tmp_path))
    monkeypatch.setattr(facts, "cached", lambda name, recipe, build: pretrain.fingerprint(recipe))
    monkeypatch.setattr(facts, "MODEL", {**facts.MODEL, "steps": 10})
    seen = {facts.load_path()}
    for module, name, value in (
        (facts, "POPULAR", (0.2, 0.6)),
        (facts, "VOCABULARY", 400),
        (facts, "MODEL", {**facts.MODEL, "lr": 1.0}),
    ):
        monkeypatch.setattr(module, name, value)
        seen.add(facts.load_path())
    assert len(seen) == 4
    assert pretrain.fingerprint({"a": 1, "b": 2}) == pretrain.fingerprint({"b": 2, "a": 1})


def names() -> list[str]:
    return [*facts.CAPITALS, *facts.CAPITALS.values()]
