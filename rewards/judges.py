"""Who judges: a causal LM in this process, or a model behind an endpoint; from questions to scores."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlkl import models
from rlkl.config import OverseerSource
from rlkl.endpoint import Endpoint, NoAnswer, Reply
from rlkl.policy import DecodeState, Policy
from rlkl.sampling import pad

Ids = tuple[int, ...]
EMBEDDED = ("fix", "facts")
TOKENS = 16
"""Length of a reply that is read as a text, unless ``parameters`` says otherwise."""


class Unfit(Exception):
    """A question that the judge cannot be asked, or answers with no rating; ``item`` is which."""

    def __init__(self, message: str, item: int = 0) -> None:
        super().__init__(message)
        self.item = item


def judged(logp: Mapping[str, float], config: OverseerSource) -> float:
    """The score of ratings' log-probs, which are of disjoint events.

    Raises:
        NoAnswer: they hold less than ``min_mass`` together, or the log-odds are not finite.
    """
    mass = math.fsum(math.exp(x) for x in logp.values())
    if not mass > 0 or mass < config.min_mass:
        raise NoAnswer(
            f"the judge puts {mass:.3g} of its probability on the ratings, min_mass is {config.min_mass:g}; does the "
            "template end where a rating must follow?"
        )
    if config.score == "log_odds":
        worse, better = sorted(config.ratings, key=lambda answer: config.ratings[answer])
        odds = logp.get(better, -math.inf) - logp.get(worse, -math.inf)
        if not math.isfinite(odds):
            raise NoAnswer(f"the log-odds of {better!r} against {worse!r} are not finite; use score=expected")
        return odds
    return math.fsum(config.ratings[answer] * math.exp(x) for answer, x in logp.items()) / mass


class LocalJudge:
    """A frozen causal LM with its own tokenizer.

    A rating is the tokens by which the tokenizer goes on from the question. Where one rating's tokens begin another's
    ("1" and "10"), its probability is that of beginning with it and not with the longer one, so they are disjoint.
    """

    def __init__(self, name: str, config: OverseerSource) -> None:
        self.config = config
        path = config.model
        if path in EMBEDDED:
            from rlkl.tasks import facts, fix_model

            path = str((facts if path == "facts" else fix_model).load_path())
        model, self.tokenizer = models.from_folder(path, "auto", f"rewards.{name}.model")
        model.requires_grad_(False)
        self.model = Policy(model, reference=model).eval()
        self.context = models.context_length(model)
        if config.chat and not self.tokenizer.chat_template:
            raise Unfit(f"chat=true: the tokenizer of {config.model} has no chat template; set chat=false")

    def scores(self, questions: Sequence[str], device: torch.device) -> list[float]:
        """The score of every question.

        Raises:
            Unfit: a question is too long or cannot be followed by the ratings, or is answered with no rating.
        """
        asked = [self._tokens(question, i) for i, question in enumerate(questions)]
        rows: dict[Ids, list[int]] = {}  # what is read: a question with what ratings may begin with; their next tokens
        for context, ratings in asked:
            for tokens in ratings.values():
                for k, token in enumerate(tokens):
                    rows.setdefault(context + tokens[:k], []).append(token)
        logp = self._next(rows, device)
        found = []
        for i, (context, ratings) in enumerate(asked):
            whole = {
                answer: math.fsum(logp[context + tokens[:k], token] for k, token in enumerate(tokens))
                for answer, tokens in ratings.items()
            }
            try:
                found.append(judged(disjoint(ratings, whole), self.config))
            except NoAnswer as error:
                raise Unfit(str(error), i) from None
        return found

    def _tokens(self, question: str, i: int) -> tuple[Ids, dict[str, Ids]]:
        """A question's ids, and those by which each rating goes on."""
        special = not self.config.chat
        if self.config.chat:
            turn = [{"role": "user", "content": question}]
            question = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        texts = [question, *(question + answer for answer in self.config.ratings)]
        context, *longer = map(tuple, self.tokenizer(texts, add_special_tokens=special)["input_ids"])
        if not context:
            raise Unfit("template: the question has no token", i)
        ratings = dict(zip(self.config.ratings, (ids[len(context) :] for ids in longer), strict=True))
        for answer, ids in zip(ratings, longer, strict=True):
            if ids[: len(context)] != context or len(ids) == len(context):
                raise Unfit(
                    f"ratings: the judge's tokenizer joins {answer!r} with the end of the question; move the space "
                    "between them from the template's end to the ratings, or the other way round",
                    i,
                )
            if self.context is not None and len(ids) > self.context:
                raise Unfit(
                    f"the question has {len(ids)} tokens with a rating, and the judge reads at most {self.context}; "
                    "shorten the template, or lower rollout.max_new_tokens",
                    i,
                )
        if len(set(ratings.values())) < len(ratings):
            raise Unfit("ratings: two have the same tokens for this judge; take others", i)
        return context, ratings

    def _next(self, rows: Mapping[Ids, Sequence[int]], device: torch.device) -> dict[tuple[Ids, int], float]:
        """Log-probs of the wanted next tokens of each row; rows of like length are read together."""
        self.model.to(device)
        order = sorted(rows, key=len)
        found: dict[tuple[Ids, int], float] = {}
        for start in range(0, len(order), self.config.micro_batch):
            part = order[start : start + self.config.micro_batch]
            ids_BP, length_B = pad([list(row) for row in part])
            state = DecodeState.start(ids_BP.to(device), length_B.to(device), 1.0)
            logp_BV = self.model(state).get("next_logp_BV").double()
            for row, logp_V in zip(part, logp_BV, strict=True):
                wanted = list(dict.fromkeys(rows[row]))
                found |= {(row, t): x for t, x in zip(wanted, logp_V[wanted].tolist(), strict=True)}
        return found


def disjoint(ratings: Mapping[str, Ids], logp: Mapping[str, float]) -> dict[str, float]:
    """Log-probs of beginning with each rating and with no longer one, from those of beginning with it."""
    alone = {}
    for answer, tokens in ratings.items():
        inside = [a for a, other in ratings.items() if a != answer and other[: len(tokens)] == tokens]
        nearest = [
            a for a in inside if not any(b != a and ratings[a][: len(ratings[b])] == ratings[b] for b in inside)
        ]  # those that begin with another of them are part of that one
        rest = 1 - math.fsum(math.exp(logp[a] - logp[answer]) for a in nearest)
        alone[answer] = logp[answer] + math.log(rest) if rest > 0 else -math.inf
    return alone


class RemoteJudge:
    """A model behind an endpoint: the first token of its reply, or the last line, is the rating."""

    def __init__(self, config: OverseerSource) -> None:
        self.config = config
        assert config.endpoint is not None
        key = None
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env)
            if key is None:
                raise Unfit(f"api_key_env={config.api_key_env}: this environment variable is not set; export it")
        try:
            self.endpoint = Endpoint(
                config.endpoint,
                key,
                timeout=config.timeout,
                retries=config.retries,
                backoff=config.backoff,
                concurrency=config.concurrency,
                cache=config.cache,
            )
        except ValueError as error:
            raise Unfit(f"endpoint: {error}") from None

    def scores(self, questions: Sequence[str], _device: torch.device) -> list[float]:
        """The score of every question.

        Raises:
            Outage: the endpoint stays away, refuses, or replies with no rating.
        """
        return self.endpoint.ask([self._body(question) for question in questions], self._read)

    def _body(self, question: str) -> dict[str, Any]:
        """A request. Probabilities are asked for at temperature 1, since some servers divide by it first."""
        body: dict[str, Any] = {"model": self.config.model, "messages": [{"role": "user", "content": question}]}
        if self.config.read == "text":
            body |= {"temperature": 0, "max_tokens": TOKENS}
        else:
            body |= {"temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": self.config.top_logprobs}
        body |= self.config.parameters
        return {key: value for key, value in body.items() if value is not None}

    def _read(self, reply: Reply) -> float:
        """The score that a reply gives."""
        if self.config.read == "text":
            return self._text(reply)
        if reply.first is None:
            raise NoAnswer("the server gives no logprobs; set read=text, if its texts are to count")
        known = {answer.strip(): answer for answer in self.config.ratings}
        p = dict.fromkeys(known.values(), 0.0)
        for token, x in reply.first:
            if (answer := known.get(token.strip())) is not None:
                p[answer] += math.exp(x)
        try:
            return judged({answer: math.log(x) for answer, x in p.items() if x > 0}, self.config)
        except NoAnswer as error:
            begins = ", ".join(f"{token!r} {math.exp(x):.2g}" for token, x in reply.first[:3])
            raise NoAnswer(f"{error} (its first token: {begins})") from None

    def _text(self, reply: Reply) -> float:
        last = (reply.text.strip().splitlines() or [""])[-1].strip()
        values = {answer.strip(): value for answer, value in self.config.ratings.items()}
        for said in (last, last.rstrip(".").strip()):
            if said in values and not reply.cut:
                return values[said]
        cut = "was cut, raise parameters.max_tokens" if reply.cut else f"ends in {last[:80]!r}"
        raise NoAnswer(f"the reply is no rating: it {cut}; the last line must be one of {', '.join(values)}")
