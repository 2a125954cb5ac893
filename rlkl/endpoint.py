"""Questions to an OpenAI-compatible chat-completions server: tried again, a few at a time, and remembered. Torch-free.

What is remembered is a function of the endpoint and the request alone: a file a reply in a folder that several
processes may share. The key of the server stands in no file and no message.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import platformdirs

from rlkl import Outage

Body = Mapping[str, Any]
AGAIN = (408, 429)
"""Statuses beside 5xx after which a request is worth trying again."""
LONGEST = 60.0
"""Seconds between two tries, at most, where the server asks for no more."""
PATIENCE = 600.0
"""Seconds that a server may ask to be left alone for; with more the run ends, to be resumed later."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Reply:
    """A server's reply: its text, whether it was cut, and the likeliest first tokens with their log-probs (nats)."""

    text: str
    cut: bool
    first: list[tuple[str, float]] | None


class Refused(Outage):
    """The server does not take the request; trying again would not help."""


class NoAnswer(Exception):
    """A reply that does not say what was asked."""


class Endpoint:
    """A server and how to reach it.

    Args:
        url: up to ``/v1``.
        key: sent as a bearer token; None for none.
        cache: folder of replies.

    Raises:
        ValueError: the address, the key or the proxy of the environment cannot be used, or the cache not be written.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = 60,
        retries: int = 6,
        backoff: float = 1,
        concurrency: int = 8,
        cache: str | Path | None = None,
    ) -> None:
        self.url, self.key = url.rstrip("/"), key
        self.timeout, self.retries, self.backoff, self.concurrency = timeout, retries, backoff, concurrency
        user = os.environ.get("RLKL_CACHE") or platformdirs.user_cache_dir("rlkl")
        self.cache = Path(cache) if cache is not None else Path(user) / "judgements"
        self.chance = random.Random()  # its own: waiting shall not move the randomness of a run
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
            raise ValueError("the key is empty, or holds white space or other characters that no header takes")
        try:
            self._client().close()
            self.cache.mkdir(parents=True, exist_ok=True)
        except (ValueError, httpx.InvalidURL, ImportError) as error:
            raise ValueError(f"{self.url}: cannot be asked ({self._clean(error)})") from None
        except OSError as error:
            raise ValueError(f"{self.cache}: cannot be written ({error.strerror}); give another cache") from None

    def ask(self, bodies: Sequence[Body], read: Callable[[Reply], float]) -> list[float]:
        """What ``read`` makes of the reply to each request; ``read`` raises NoAnswer where it can make nothing of it.

        Raises:
            Outage: the server refuses, stays away, or its reply is no answer; ``Outage.item`` is which request it was.
        """
        found = [self._remembered(body, read) for body in bodies]
        todo = [i for i, value in enumerate(found) if value is None]
        if not todo:
            return [value for value in found if value is not None]
        halted = threading.Event()
        with self._client() as client:

            def work(i: int) -> float:
                reply = self._reply(client, bodies[i], halted)
                try:
                    value = read(reply)
                except NoAnswer as error:
                    raise Refused(f"{self.url}: {self._clean(error)}") from None
                self._remember(bodies[i], reply)
                return value

            for i, value in _together(work, todo, self.concurrency, halted):
                found[i] = value
        return [value for value in found if value is not None]

    def _client(self) -> httpx.Client:
        """Proxies and certificates of the environment hold as everywhere, but not for this machine itself."""
        local = httpx.URL(self.url).host in LOOPBACK
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        limits = httpx.Limits(max_connections=self.concurrency)
        return httpx.Client(headers=headers, timeout=self.timeout, limits=limits, trust_env=not local)

    def _reply(self, client: httpx.Client, body: Body, halted: threading.Event) -> Reply:
        """The reply to a request, which is tried again as long as that may help."""
        for tries in itertools.count(1):
            asked = 0.0
            try:
                status, headers, text = self._post(client, body)
                if status == 200:
                    return parsed(text)
                failed = f"status {status}: {text}"
                if status not in AGAIN and status < 500:
                    raise Refused(f"{self.url}: {self._clean(failed)}")
                asked = retry_after(headers.get("retry-after"))
            except (httpx.TransportError, NoAnswer) as error:
                failed = f"{type(error).__name__}: {error}"
            said = f"{self.url}: no answer after {tries} {'try' if tries == 1 else 'tries'} ({self._clean(failed)})"
            if asked > PATIENCE:
                raise Outage(f"{said}; it asks to be left alone for {asked:.0f} s")
            pause = min(LONGEST, self.backoff * 2 ** min(tries - 1, 30)) * self.chance.uniform(0.5, 1.5)
            if tries > self.retries or halted.wait(max(pause, asked)):
                raise Outage(said)
        raise AssertionError

    def _post(self, client: httpx.Client, body: Body) -> tuple[int, httpx.Headers, str]:
        """Status, headers and text of a response; a server that drips it is held to the time, too."""
        until = time.monotonic() + self.timeout
        chunks = []
        content = json.dumps(dict(body)).encode()
        with client.stream("POST", f"{self.url}/chat/completions", content=content) as response:
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                if time.monotonic() > until:
                    raise httpx.ReadTimeout(f"not complete within {self.timeout:g} s")
        return response.status_code, response.headers, b"".join(chunks).decode("utf-8", "replace")

    def _clean(self, said: object) -> str:
        """On a line, not too long, without the key."""
        text = str(said).replace(self.key, "[key]") if self.key else str(said)
        return " ".join(text.split())[:300]

    def _place(self, body: Body) -> tuple[str, Path]:
        """The digest of a request, and the file of its reply."""
        asked = json.dumps({"endpoint": self.url, "request": body}, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(asked.encode()).hexdigest()
        return digest, self.cache / digest[:2] / f"{digest}.json"

    def _remembered(self, body: Body, read: Callable[[Reply], float]) -> float | None:
        """What ``read`` makes of the reply that is kept; None where there is none, or none that says it."""
        digest, path = self._place(body)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["request"] != digest or kept["check"] != check(kept["reply"]):
                return None
            reply = kept["reply"]
            first = None if reply["first"] is None else [(str(token), float(x)) for token, x in reply["first"]]
            return read(Reply(str(reply["text"]), bool(reply["cut"]), first))
        except (OSError, ValueError, KeyError, TypeError, NoAnswer):
            return None

    def _remember(self, body: Body, reply: Reply) -> None:
        """Keep a reply: whole or not at all, whoever else writes the same."""
        digest, path = self._place(body)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"request": digest, "reply": asdict(reply), "check": check(asdict(reply))}
        handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(kept, file)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def check(reply: Any) -> str:
    """A sum over a reply, by which a file that was damaged is known."""
    return hashlib.sha256(json.dumps(reply, sort_keys=True).encode()).hexdigest()[:16]


def parsed(text: str) -> Reply:
    """A reply from the JSON of a chat completion.

    Raises:
        NoAnswer: it is none.
    """
    try:
        choice = json.loads(text)["choices"][0]
        said = choice["message"].get("content")
        steps = (choice.get("logprobs") or {}).get("content") or []
        first = [(str(top["token"]), float(top["logprob"])) for top in steps[0]["top_logprobs"]] if steps else None
        return Reply("" if said is None else str(said), choice.get("finish_reason") == "length", first)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise NoAnswer(f"this is no chat completion ({type(error).__name__}): {text}") from None


def retry_after(value: str | None) -> float:
    """Seconds that a server asks to be left alone for: a number, or until a date; 0 where it does not say."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = (until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _together(
    work: Callable[[int], float], items: Sequence[int], limit: int, halted: threading.Event
) -> Iterator[tuple[int, float]]:
    """``work`` on every item, at most ``limit`` at once, in daemon threads: none keeps a process that is to end.

    Raises:
        Outage: the first that a thread met; its ``item`` says where.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, float, BaseException | None]] = queue.SimpleQueue()
    for item in items:
        todo.put(item)

    def loop() -> None:
        with contextlib.suppress(queue.Empty):
            while not halted.is_set():
                item = todo.get_nowait()
                try:
                    done.put((item, work(item), None))
                except BaseException as error:
                    done.put((item, math.nan, error))
                    halted.set()

    for _ in range(min(limit, len(items))):
        threading.Thread(target=loop, daemon=True).start()
    try:
        for _ in items:
            item, value, error = done.get()
            if isinstance(error, Outage):
                error.item = item
            if error is not None:
                raise error
            yield item, value
    finally:
        halted.set()
