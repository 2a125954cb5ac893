"""The judge in the section ``rewards:``. Torch-free."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlkl.config.base import Positive, RewardSource
from rlkl.config.templates import parts

LOCAL = ("chat", "micro_batch")
READ = ("top_logprobs", "min_mass")
REMOTE = ("read", "top_logprobs", "api_key_env", "parameters")


class OverseerSource(RewardSource):
    """A judge: a causal LM, here or behind an OpenAI-compatible endpoint, is asked how good each completion is.

    The score is paid at the last policy token. The judge is frozen. One query a completion, though equal questions are
    asked once, and those that the cache holds are not asked again.
    """

    type: Literal["overseer"]
    model: str = Field(
        description="local folder or Hub name of a causal LM with its tokenizer, or facts, fix = an embedded base "
        "model; with an endpoint, the model's name there"
    )
    template: str = Field(
        "Question: {prompt}\nAnswer: {completion}\nHow good is this answer, from 1 (bad) to 9 (good)?\nRating:",
        description="the question; {prompt}, {completion}, {name} = any column of text; a brace that is text is "
        "written twice",
    )
    ratings: dict[str, float] = Field(
        min_length=2,
        description='answer -> value; a local judge goes on with the very text, so mind the space (" 7"); an '
        "endpoint's is compared without white space around it",
    )
    score: Literal["expected", "log_odds"] = Field(
        "expected",
        description="expected: the mean value under the probabilities of the ratings; log_odds: of two ratings, log p "
        "of the one of higher value - log p of the other",
    )
    min_mass: float = Field(
        0.5, ge=0, lt=1, description="probability that must fall on the ratings; with less the judge has given none"
    )
    chat: bool = Field(False, description="local judge: lay the question out by the tokenizer's chat template")
    micro_batch: Positive = Field(16, description="local judge: rows read together; changes memory, not results")
    endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$",
        description="http(s)://host[:port]/v1 of a chat-completions server; null = the judge is a local model",
    )
    read: Literal["logprobs", "text"] = Field(
        "logprobs",
        description="endpoint: probabilities of the reply's first token; or the last line of the reply, which must "
        "be a rating",
    )
    top_logprobs: int = Field(20, ge=2, le=20, description="endpoint: likeliest first tokens that are asked for")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_]\w*$", description="endpoint: environment variable that holds the key; null = no key"
    )
    parameters: dict[str, Any] = Field(
        {}, description="endpoint: added to each request as they are; null takes one of rlkl's own out"
    )
    timeout: float = Field(60, gt=0, description="endpoint: seconds that a request may take")
    retries: int = Field(
        6, ge=0, description="endpoint: further tries after 429, 408, 5xx, a timeout or a lost connection"
    )
    backoff: float = Field(
        1.0, gt=0, description="endpoint: seconds before the first further try, doubled each time up to 60, +-50 %"
    )
    concurrency: Positive = Field(8, description="endpoint: requests under way at once, of a process")
    cache: str | None = Field(
        None, description="endpoint: folder of replies by content; null = judgements/ in the user's cache folder"
    )

    logistics: ClassVar[tuple[str, ...]] = ("api_key_env", "timeout", "retries", "backoff", "concurrency", "cache")
    """Keys of how an endpoint is reached, which decide no result; a resumed run may have others."""

    @model_validator(mode="before")
    @classmethod
    def _ratings_are_texts(cls, data: Any) -> Any:
        ratings = data.get("ratings") if isinstance(data, Mapping) else None
        for answer in ratings if isinstance(ratings, Mapping) else ():
            if not isinstance(answer, str) or not answer.strip():
                raise ValueError(f'ratings: {answer!r} is no text; put it in quotes, such as "1" or " yes"')
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "completion" not in [name for _, name in self.layout()]:
            raise ValueError(f"template={self.template!r}: must have {{completion}}, which is to be judged")
        if len(set(self.ratings.values())) < 2:
            raise ValueError("ratings: all have the same value, so that nothing is judged; give at least two")
        if self.score == "log_odds" and len(self.ratings) != 2:
            raise ValueError(f"score=log_odds with {len(self.ratings)} ratings: it is of two; give two")
        if self.endpoint is None:
            self._refuse((*REMOTE, *self.logistics), "without endpoint: only a request has it")
            return self
        self._refuse(LOCAL, "with endpoint: only a local judge has it")
        if self.read == "text":
            self._refuse((*READ, "score"), "with read=text: a text has no probabilities")
        try:
            json.dumps(self.parameters, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"parameters: cannot be sent as JSON ({error}); put such values in quotes") from None
        known = [answer.strip() for answer in self.ratings]
        for i, answer in enumerate(known):
            if answer in known[:i]:
                raise ValueError(f"ratings: {answer!r} twice, but for white space, which an endpoint's reply may lack")
            longer = [k for k in known if k != answer and k.startswith(answer)]
            if longer and self.read == "logprobs":
                raise ValueError(
                    f"ratings: {longer[0]!r} begins with {answer!r}, and a reply's first token cannot tell them apart; "
                    "take others, such as 1 to 9, or read=text"
                )
        return self

    def _refuse(self, keys: tuple[str, ...], why: str) -> None:
        for key in keys:
            if (value := getattr(self, key)) != type(self).model_fields[key].default:
                raise ValueError(f"{key}={str(value).lower() if isinstance(value, bool) else value} {why}; drop it")

    @property
    def origin(self) -> str:
        """Where the scores come from."""
        return self.model

    def layout(self) -> list[tuple[str, str | None]]:
        """The template's texts, each with the placeholder behind it.

        Raises:
            ValueError: a brace is not closed, or a placeholder is no plain name.
        """
        return list(parts("template", self.template))
