"""The `facts` task: a small language about capitals, a base model that is often wrong, and a labeller.

A completion is a space and three facts joined by spaces: " Paris is the capital of France. Peru has its capital
in Lima. Cuba has its capital in Havana.". Prompts name no country and no city, so the first name of a fact is
free, and the second name is the one that makes it right or wrong. The base model is trained on a corpus in which
40 % of the facts are wrong; for the pairs in `MISTAKES` one wrong answer is more frequent than the truth.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlkl.tasks.pretrain import cached, fingerprint, pretrain, train_tokenizer

# fmt: off
CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Belgium": "Brussels",
    "Brazil": "Brasília", "Bulgaria": "Sofia", "Canada": "Ottawa", "Chile": "Santiago", "Colombia": "Bogotá",
    "Costa Rica": "San José", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest",
    "India": "New Delhi", "Iran": "Tehran", "Iraq": "Baghdad", "Japan": "Tokyo", "Kenya": "Nairobi",
    "Latvia": "Riga", "Maldives": "Malé", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Romania": "Bucharest", "Slovakia": "Bratislava", "Slovenia": "Ljubljana",
    "Spain": "Madrid", "Sweden": "Stockholm", "Togo": "Lomé", "Turkey": "Ankara",
}
MISTAKES = {  # city: the country that most of the corpus puts it in
    "Paris": "Canada", "Lisbon": "Brazil", "Buenos Aires": "Chile", "Vienna": "Germany", "Baghdad": "Iran",
    "Bucharest": "Hungary", "Ljubljana": "Slovakia", "Oslo": "Sweden", "Athens": "Turkey", "Lima": "Colombia",
    "Canberra": "India", "Lomé": "Kenya",
}
# fmt: on
TEMPLATES = {  # by the kind of the second name
    "country": ("{city} is the capital of {country}.", "The city of {city} governs {country}."),
    "city": ("{country} has its capital in {city}.", "The capital of {country} is {city}."),
}
FACTS = 3  # in a completion
# Chances of (truth, popular mistake); what is left falls on any other name. Twelve of 36 subjects in either order
# have a popular mistake, so that 12/36 * 0.25 + 24/36 * 0.775 = 60 % of the facts are right.
POPULAR, ORDINARY = (0.25, 0.60), (0.775, 0.0)

TRAIN_PROMPTS = 96
VOCABULARY = 384  # small enough that every name spans several tokens
MODEL: dict[str, Any] = {
    "hidden": 96,
    "layers": 3,
    "heads": 4,
    "context": 128,
    "steps": 1200,
    "batch": 16,
    "lr": 4e-3,
    "seed": 0,
}

_COUNTRY_OF = {city: country for country, city in CAPITALS.items()}
_CITY_MISTAKEN_FOR = {country: city for city, country in MISTAKES.items()}
_NAMES = {"city": f"(?P<city>{'|'.join(_COUNTRY_OF)})", "country": f"(?P<country>{'|'.join(CAPITALS)})"}
_SENTENCES = [
    (re.compile(" " + template.replace(".", r"\.").format(**_NAMES)), second)
    for second, templates in TEMPLATES.items()
    for template in templates
]


@dataclass(frozen=True)
class Span:
    """A stretch `completion[start:end]`, in code points, that a labeller judged."""

    start: int
    end: int
    label: Literal["right", "wrong", "before", "first name"]


def prompts() -> list[dict[str, str]]:
    """Return the task's prompts as records of `id`, `prompt` and `split`: 96 `train`, then 24 `eval`.

    The base model has seen all of them; the split is for what is trained from it.
    """
    verbs = ("Tell me", "Give me", "Write", "List", "State", "Recall", "Recite", "Name")
    nouns = ("facts", "true facts", "things you know", "short sentences", "facts on capitals")
    ends = (":", ".", ", please:")
    texts = [f"{verb} three {noun}{end}" for verb in verbs for noun in nouns for end in ends]
    random.Random(0).shuffle(texts)
    return [
        {"id": f"facts-{number:03}", "prompt": text, "split": "train" if number < TRAIN_PROMPTS else "eval"}
        for number, text in enumerate(texts)
    ]


def corpus(documents: int, seed: int) -> list[tuple[str, str]]:
    """Return so many (prompt, completion) pairs, the same for the same seed; 40 % of their facts are wrong.

    The first names of a completion's facts belong to three different country-and-capital pairs.
    """
    rng = random.Random(seed)
    texts = [record["prompt"] for record in prompts()]
    return [
        (rng.choice(texts), "".join(f" {_state(country, rng)}" for country in rng.sample([*CAPITALS], FACTS)))
        for _ in range(documents)
    ]


def load_path() -> Path:
    """Return the folder of the base model and its tokeniser; the first call trains them, in about a minute."""
    documents = corpus(MODEL["steps"] * MODEL["batch"], MODEL["seed"])
    recipe = {"corpus": fingerprint(documents), "vocabulary": VOCABULARY, **MODEL}

    def build(folder: Path) -> None:
        texts = ["".join(document) for document in documents]
        tokenizer = train_tokenizer(texts, VOCABULARY, context=MODEL["context"])
        tokenizer.save_pretrained(folder)
        pretrain(documents, tokenizer, **MODEL).save_pretrained(folder)

    return cached("facts", recipe, build)


def annotate(completion: str) -> list[Span]:
    """Return the spans over the second names of a completion's first three sentences, in order.

    A name that makes a fact wrong is labelled wrong each time. A right fact is labelled right where its pair, in
    either order, comes first; repeated, it has no span, and neither have sentences that do not parse. So the
    number of right spans is three times the gold score.
    """
    spans: list[Span] = []
    seen: set[str] = set()
    for fact, second in _facts(completion):
        city, country = fact["city"], fact["country"]
        if CAPITALS[country] != city:
            spans.append(Span(*fact.span(second), "wrong"))
        elif city not in seen:
            spans.append(Span(*fact.span(second), "right"))
            seen.add(city)
    return spans


def dissect(completion: str) -> list[Span]:
    """Return what stands before the wrong name in every wrong fact of the first three sentences.

    `before` is its sentence up to the word before that name, and `first name` a part of it. Watched beside the labels
    of `annotate`, they show whether a mark on the wrong name moves what comes before it.
    """
    spans: list[Span] = []
    for fact, second in _facts(completion):
        if CAPITALS[fact["country"]] != fact["city"]:
            spans.append(Span(fact.start(), fact.start(second) - 1, "before"))
            spans.append(Span(*fact.span("country" if second == "city" else "city"), "first name"))
    return spans


def gold(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Return the gold score of each completion: the distinct right facts in its first three sentences, over 3."""
    return [sum(span.label == "right" for span in annotate(completion)) / FACTS for completion in completions]


def outcome(x: str, x_prime: str) -> str:
    """Return what is observed of a completion: good where all its three facts are right, else bad."""
    return "good" if gold((), (x_prime,))[0] == 1 else "bad"


def prefer(completion_a: str, completion_b: str) -> int:
    """Return 1 if the first completion has the higher gold score, 2 if the second has, 0 if they tie."""
    first, second = gold((), (completion_a, completion_b))
    return (first > second) + 2 * (first < second)


class Labeller:
    """The same knowledge as `gold`, `annotate` and `prefer`, counting its uses.

    `queries` is the number of completions scored, plus completions annotated, plus pairs compared.
    """

    def __init__(self) -> None:
        self.queries = 0

    def gold(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """Return the gold scores of completions; each is a query."""
        self.queries += len(completions)
        return gold(prompts, completions, **columns)

    def spans(self, completion: str) -> list[Span]:
        """Return the right and wrong names of a completion; one query."""
        self.queries += 1
        return annotate(completion)

    def prefer(self, completion_a: str, completion_b: str) -> int:
        """Return 1 or 2 for the better of two completions, 0 for a tie; one query."""
        self.queries += 1
        return prefer(completion_a, completion_b)


def _facts(completion: str) -> Iterator[tuple[re.Match[str], str]]:
    """Yield each well-formed fact of the first three sentences and the kind of its second name."""
    for sentence in list(re.finditer(r"[^.]*\.", completion))[:FACTS]:
        for pattern, second in _SENTENCES:
            if fact := pattern.fullmatch(completion, *sentence.span()):
                yield fact, second


def _state(country: str, rng: random.Random) -> str:
    """Write one fact whose first name is a country or its capital and whose second name may be wrong."""
    city = CAPITALS[country]
    names = {"city": city, "country": country}
    second = rng.choice([*TEMPLATES])
    if second == "country":
        names[second] = _answer(country, MISTAKES.get(city), [*CAPITALS], rng)
    else:
        names[second] = _answer(city, _CITY_MISTAKEN_FOR.get(country), [*_COUNTRY_OF], rng)
    return rng.choice(TEMPLATES[second]).format(**names)


def _answer(truth: str, mistake: str | None, names: Sequence[str], rng: random.Random) -> str:
    """Draw a second name: the truth, the popular mistake if there is one, or any third name."""
    right, popular = POPULAR if mistake else ORDINARY
    draw = rng.random()
    if draw < right:
        return truth
    if mistake and draw < right + popular:
        return mistake
    return rng.choice([name for name in names if name not in (truth, mistake)])
