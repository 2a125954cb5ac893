"""A chat-completions server in a thread, which answers as a test says and counts what it is asked."""

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Mapping[str, float] | str


def completion(answer: Answer, finish: str = "stop") -> dict[str, Any]:
    """A chat completion: of a text, or of the probabilities of its first token."""
    if isinstance(answer, str):
        return {"choices": [{"message": {"content": answer}, "finish_reason": finish}]}
    tops = [{"token": token, "logprob": math.log(p)} for token, p in answer.items()]
    best = max(answer, key=lambda token: answer[token])
    logprobs = {"content": [{"token": best, "logprob": math.log(answer[best]), "top_logprobs": tops}]}
    return {"choices": [{"message": {"content": best}, "logprobs": logprobs, "finish_reason": "length"}]}


class Stub:
    """``answer(question)`` is the reply; what is in ``faults`` comes first, each once: (status, headers, body).

    ``down`` is the status of every reply, where it is not 0, and ``said`` its text. ``slow`` is the
    time that a reply takes, seconds.
    """

    def __init__(self, answer: Callable[[str], Answer], port: int = 0) -> None:
        self.answer, self.faults, self.down, self.slow = answer, list[Any](), 0, 0.0
        self.said = "down"
        self.asked, self.headers, self.times = list[dict[str, Any]](), list[dict[str, str]](), list[float]()
        self.flying, self.most = 0, 0
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """Silent."""

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stub.asked.append({**body, "path": self.path})
                    stub.headers.append(dict(self.headers))
                    stub.times.append(time.monotonic())
                    stub.flying += 1
                    stub.most = max(stub.most, stub.flying)
                    fault = stub.faults.pop(0) if stub.faults else None
                time.sleep(stub.slow)
                if stub.down:
                    fault = (stub.down, {}, stub.said)
                with lock:
                    stub.flying -= 1
                status, headers, text = fault or (200, {}, None)
                if status is None:  # hang up
                    self.close_connection = True
                    return
                text = json.dumps(completion(stub.answer(body["messages"][0]["content"]))) if text is None else text
                data = text.encode()
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(data))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the other side has gone
                    self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def questions(self) -> list[str]:
        """What was asked, in order."""
        return [body["messages"][0]["content"] for body in self.asked]

    def close(self) -> None:
        """Listen no more."""
        self.server.shutdown()
        self.server.server_close()
