"""Questions to a server: tried again, limited, remembered by content; the key stays where it is."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from stub import Stub, completion

from rlkl import Outage, endpoint
from rlkl.endpoint import Endpoint, NoAnswer, Refused, Reply

KEY = "sk-very-secret-7"


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A server that says how long each question is."""
    server = Stub(lambda question: str(len(question)))
    yield server
    server.close()


def made(stub: Stub, folder: Path, key: str | None = None, **keys: Any) -> Endpoint:
    return Endpoint(stub.url, key, **{"timeout": 5, "retries": 3, "backoff": 0.01, "cache": folder / "kept", **keys})


def bodies(*questions: str) -> list[dict[str, Any]]:
    return [{"model": "judge", "messages": [{"role": "user", "content": question}]} for question in questions]


def number(reply: Reply) -> float:
    try:
        return float(reply.text)
    except ValueError:
        raise NoAnswer(f"{reply.text!r} is no number") from None


def test_replies_come_in_the_order_of_the_questions(stub: Stub, tmp_path: Path) -> None:
    questions = ["x" * n for n in (5, 3, 9, 1, 7, 2)]
    assert made(stub, tmp_path).ask(bodies(*questions), number) == [5, 3, 9, 1, 7, 2]
    assert {body["path"] for body in stub.asked} == {"/v1/chat/completions"}


@pytest.mark.parametrize(
    "fault",
    [
        (429, {}, "slow down"),
        (408, {}, "late"),
        (500, {}, "oops"),
        (503, {}, "<html>"),
        (None, {}, ""),
        (200, {}, "<html>a proxy</html>"),
        (200, {}, '{"choices": []}'),
    ],
)
def test_what_may_pass_is_tried_again(stub: Stub, tmp_path: Path, fault: Any) -> None:
    stub.faults = [fault, fault]
    assert made(stub, tmp_path).ask(bodies("four"), number) == [4]
    assert len(stub.asked) == 3


def test_an_endpoint_that_stays_dead_is_given_up_after_so_many_tries(stub: Stub, tmp_path: Path) -> None:
    stub.down = 503
    with pytest.raises(Outage, match=r"/v1: no answer after 4 tries \(status 503: down\)$"):
        made(stub, tmp_path).ask(bodies("four"), number)
    assert len(stub.asked) == 4
    stub.close()
    with pytest.raises(Outage, match=r"no answer after 2 tries .ConnectError"):
        made(stub, tmp_path, retries=1).ask(bodies("four"), number)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
def test_a_refusal_is_final(stub: Stub, tmp_path: Path, status: int) -> None:
    stub.faults = [(status, {"Location": "/elsewhere"}, "no such model")]
    with pytest.raises(Refused, match=f"status {status}: no such model"):
        made(stub, tmp_path).ask(bodies("four"), number)
    assert len(stub.asked) == 1


def test_waits_double_with_a_spread(stub: Stub, tmp_path: Path) -> None:
    stub.down = 500
    with pytest.raises(Outage):
        made(stub, tmp_path, backoff=0.1).ask(bodies("four"), number)
    waits = [after - before for before, after in zip(stub.times, stub.times[1:], strict=False)]
    for wait, middle in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert 0.5 * middle <= wait < 1.5 * middle + 0.3


def test_retry_after_is_honoured_as_seconds_and_as_a_date(stub: Stub, tmp_path: Path) -> None:
    stub.faults = [(429, {"Retry-After": "0.6"}, "")]
    made(stub, tmp_path).ask(bodies("four"), number)
    assert 0.55 < stub.times[1] - stub.times[0] < 3
    assert endpoint.retry_after(None) == endpoint.retry_after("soon") == endpoint.retry_after("-3") == 0
    assert endpoint.retry_after("nan") == 0
    later = datetime.now(UTC) + timedelta(seconds=30)
    assert 27 < endpoint.retry_after(format_datetime(later, usegmt=True)) <= 30


def test_a_server_that_asks_for_an_hour_ends_the_run_at_once(stub: Stub, tmp_path: Path) -> None:
    stub.faults = [(429, {"Retry-After": "3600"}, "quota")]
    with pytest.raises(Outage, match=r"quota\); it asks to be left alone for 3600 s"):
        made(stub, tmp_path).ask(bodies("four"), number)
    assert len(stub.asked) == 1


def test_a_request_has_so_much_time(stub: Stub, tmp_path: Path) -> None:
    stub.slow = 2
    started = time.monotonic()
    with pytest.raises(Outage, match=r"after 2 tries .ReadTimeout"):
        made(stub, tmp_path, timeout=0.2, retries=1).ask(bodies("four"), number)
    assert time.monotonic() - started < 1.5


def test_a_reply_that_drips_is_held_to_the_time(tmp_path: Path) -> None:
    import socket

    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        link, _ = listener.accept()
        link.recv(65536)
        link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(100):
            try:
                link.sendall(b" ")
            except OSError:
                return
            time.sleep(0.05)

    threading.Thread(target=drip, daemon=True).start()
    started = time.monotonic()
    asked = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout=0.3, retries=0, cache=tmp_path)
    with pytest.raises(Outage, match=r"ReadTimeout: not complete within 0\.3 s"):
        asked.ask(bodies("four"), number)
    listener.close()
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("limit", [1, 3])
def test_so_many_requests_are_under_way_at_once(stub: Stub, tmp_path: Path, limit: int) -> None:
    stub.slow = 0.05
    made(stub, tmp_path, concurrency=limit).ask(bodies(*("x" * n for n in range(12))), number)
    assert stub.most == limit and len(stub.asked) == 12


def test_a_failure_asks_nothing_further(stub: Stub, tmp_path: Path) -> None:
    stub.faults = [(401, {}, "who are you?")]
    with pytest.raises(Refused):
        made(stub, tmp_path, concurrency=1).ask(bodies(*("x" * n for n in range(50))), number)
    time.sleep(0.2)
    assert len(stub.asked) == 1


def test_which_question_failed_is_known(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda question: "many" if question == "xx" else "1"
    with pytest.raises(Refused, match="'many' is no number") as caught:
        made(stub, tmp_path).ask(bodies("x", "xxx", "xx"), number)
    assert caught.value.item == 2


def test_what_was_answered_is_asked_no_more(stub: Stub, tmp_path: Path) -> None:
    first, second = made(stub, tmp_path), made(stub, tmp_path)
    assert first.ask(bodies("four", "fives"), number) == [4, 5]
    assert second.ask(bodies("fives", "six.six", "four"), number) == [5, 7, 4]
    assert sorted(stub.questions) == ["fives", "four", "six.six"]
    other = [{**bodies("four")[0], "temperature": 1}]
    assert second.ask(other, number) == [4] and len(stub.asked) == 4  # another request
    elsewhere = Endpoint(stub.url.replace("/v1", "/v2"), cache=tmp_path / "kept")
    assert elsewhere.ask(bodies("four"), number) == [4] and len(stub.asked) == 5  # another endpoint


def damaged(text: str) -> Iterator[str]:
    kept = json.loads(text)
    yield ""
    yield text[: len(text) // 2]
    yield "[]"
    yield json.dumps({**kept, "request": "0"})
    yield json.dumps({**kept, "reply": {**kept["reply"], "text": "44"}})
    yield json.dumps({**kept, "reply": None})
    yield "\x00" * len(text)


def test_a_damaged_entry_is_asked_for_again(stub: Stub, tmp_path: Path) -> None:
    asked = made(stub, tmp_path)
    asked.ask(bodies("four"), number)
    (path,) = (tmp_path / "kept").rglob("*.json")
    whole = path.read_text()
    for count, text in enumerate(damaged(whole), 2):
        path.write_text(text)
        assert asked.ask(bodies("four"), number) == [4]
        assert len(stub.asked) == count and path.read_text() == whole


def test_a_reply_that_is_no_answer_is_not_kept(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda question: "well"
    with pytest.raises(Refused):
        made(stub, tmp_path).ask(bodies("four"), number)
    assert not list((tmp_path / "kept").rglob("*.json"))


def test_several_writers_leave_whole_entries_and_nothing_else(stub: Stub, tmp_path: Path) -> None:
    questions = ["x" * n for n in range(20)]
    clients = [made(stub, tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda client: client.ask(bodies(*questions), number), clients))
    assert found == [list(range(20))] * 4
    files = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert len(files) == 20 and all(json.loads(path.read_text())["reply"] for path in files)


def test_the_key_is_sent_and_written_nowhere(stub: Stub, tmp_path: Path) -> None:
    asked = made(stub, tmp_path, KEY)
    asked.ask(bodies("four"), number)
    assert stub.headers[0]["Authorization"] == f"Bearer {KEY}"
    stub.faults = [(401, {}, f"Incorrect API key provided: {KEY}")]
    with pytest.raises(Refused, match=r"provided: \[key\]$"):
        asked.ask(bodies("five5"), number)
    stub.faults = [(200, {}, f"your key is {KEY}")] * 4
    with pytest.raises(Outage) as caught:
        asked.ask(bodies("five5"), number)
    assert KEY not in str(caught.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()] == []


@pytest.mark.parametrize("key", ["", "two\nlines", " spaced ", "clé"])
def test_a_key_that_no_header_takes_is_refused(stub: Stub, tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="no header takes"):
        made(stub, tmp_path, key)


def test_no_proxy_stands_between_this_machine_and_itself(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert made(stub, tmp_path).ask(bodies("four"), number) == [4]
    monkeypatch.setenv("ALL_PROXY", "nonsense://x")
    monkeypatch.setenv("http_proxy", "nonsense://x")
    with pytest.raises(ValueError, match=r"judge\.example/v1: cannot be asked"):
        Endpoint("http://judge.example/v1", cache=tmp_path)


def test_a_cache_that_cannot_be_written_is_refused(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/kept: cannot be written"):
        made(stub, tmp_path / "file")


def test_the_likeliest_first_tokens_are_read() -> None:
    reply = endpoint.parsed(json.dumps(completion({"7": 0.75, " 8": 0.25})))
    assert reply.text == "7" and reply.cut and reply.first is not None
    assert [token for token, _ in reply.first] == ["7", " 8"]
    assert endpoint.parsed(json.dumps(completion("7"))) == Reply("7", False, None)
