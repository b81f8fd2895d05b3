"""A server on loopback that speaks OpenAI's API, and breaks every rule of it where a test asks for that."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: Any


Act = Callable[["Handler"], None]
"""What the server does with one request."""


@dataclass
class Server:
    """``script``: what it does with the first request, the second ...; the last one is repeated."""

    url: str = ""
    script: list[Act] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["mini"])
    gone: threading.Event = field(default_factory=threading.Event)
    """A client went away in the middle of an answer."""
    running: int = 0
    most: int = 0
    """Requests that were under way at once, at most."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def bodies(self) -> list[Any]:
        return [request.body for request in self.requests]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        state: Server = self.server.state
        if self.path.endswith("/models"):
            reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in state.models]})(self)
        else:
            reply(404, {"error": {"message": "nothing here"}})(self)

    def do_POST(self) -> None:
        state: Server = self.server.state
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        with state.lock:
            state.requests.append(Request(self.path, {k.lower(): v for k, v in self.headers.items()}, json.loads(body)))
            act = state.script[min(len(state.requests), len(state.script)) - 1]
            state.running += 1
            state.most = max(state.most, state.running)
        try:
            act(self)
        except (BrokenPipeError, ConnectionResetError):
            state.gone.set()
            self.close_connection = True
        finally:
            with state.lock:
                state.running -= 1

    def start(self, kind: str = "text/event-stream", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def finish_body(self) -> None:
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def drop(self) -> None:
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def reply(status: int, value: Any, kind: str = "application/json", **headers: str) -> Act:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()

    def act(handler: Handler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            handler.send_header(name.replace("_", "-"), text)
        handler.end_headers()
        handler.wfile.write(data)

    return act


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, usage: Any = None, **choice: Any) -> bytes:
    """One event of a stream."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, **choice}]
    value = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "mini", "choices": choices, "usage": usage}
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def words(*said: str, finish: str = "stop") -> list[bytes]:
    """The events of a whole answer."""
    return [chunk({"role": "assistant", "content": ""}), *(chunk({"content": word}) for word in said),
            chunk({}, finish), chunk(None, usage=USAGE), DONE]  # fmt: skip


def stream(events: list[bytes], pause: float = 0.0, then: str = "end", kind: str = "text/event-stream") -> Act:
    """Send ``events``; then end the body, ``drop`` the connection, or ``hang`` until the client goes."""

    def act(handler: Handler) -> None:
        handler.start(kind)
        for event in events:
            handler.send(event)
            if pause:
                time.sleep(pause)
        if then == "drop":
            handler.drop()
        elif then == "hang":
            hang(handler)
        else:
            handler.finish_body()

    return act


def hang(handler: Handler) -> None:
    """Wait until the client goes away, and note it."""
    handler.connection.settimeout(20)
    with suppress(OSError):
        if handler.connection.recv(1) == b"":
            handler.server.state.gone.set()
    handler.close_connection = True


def drop(handler: Handler) -> None:
    handler.drop()


@contextmanager
def serving(*script: Act, models: list[str] | None = None) -> Iterator[Server]:
    state = Server(script=list(script))
    if models is not None:
        state.models = models
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.state = state  # type: ignore[attr-defined]
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
