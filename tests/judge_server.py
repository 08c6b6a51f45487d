"""A local chat endpoint that misbehaves on command, one behaviour per request, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 100, "completion_tokens": 10}


def completion(text: Any, usage: Any = USAGE) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}).encode()


@dataclass
class Request:
    at: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


Behaviour = Callable[["Handler", Request], None]


@dataclass
class Server:
    url: str
    script: list[Behaviour]  # the behaviour of each request in turn; the last one stays
    requests: list[Request] = field(default_factory=list)
    under_way: set[Handler] = field(default_factory=set)
    most_under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)  # set at the end: hanging requests return


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Server

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Request(time.monotonic(), self.path, dict(self.headers), body)
        with owner.lock:
            behaviour = owner.script[min(len(owner.requests), len(owner.script) - 1)]
            owner.requests.append(request)
            owner.under_way.add(self)
            owner.most_under_way = max(owner.most_under_way, len(owner.under_way))
        try:
            behaviour(self, request)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            owner.under_way.discard(self)

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.owner.under_way.discard(self)  # before the client can know
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def says(text: Any, usage: Any = USAGE) -> Behaviour:
    return sends(completion(text, usage))


def sends(body: bytes) -> Behaviour:
    return lambda handler, request: handler.answer(body)


def refuses(status: int, retry_after: str | None = None, body: bytes = b"") -> Behaviour:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return lambda handler, request: handler.answer(body, status, headers)


def hangs(handler: Handler, request: Request) -> None:
    handler.owner.released.wait(30)
    handler.close_connection = True


def drips(handler: Handler, request: Request) -> None:
    """A byte now and then: no single read is slow."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.close_connection = True
    for _ in range(600):
        handler.wfile.write(b" ")
        if handler.owner.released.wait(0.05):
            return


def cuts(handler: Handler, request: Request) -> None:
    """The connection ends in the middle of the body."""
    body = completion('{"score": 1}')
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


@contextmanager
def serve(*script: Behaviour) -> Iterator[Server]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    owner = Server(f"http://127.0.0.1:{http.server_address[1]}/v1", list(script))
    http.RequestHandlerClass = type("OwnedHandler", (Handler,), {"owner": owner})
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield owner
    finally:
        owner.released.set()
        http.shutdown()
        thread.join()
        http.server_close()
