"""An HTTP client that costs little beside the server it measures: one connection, one request at a time, read as it comes.

What a real client library does with a reply would take as much of the processor as a small model; here a piece of a stream is
found by its ``data:`` and read with ``json``. Nothing but the standard library.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What came back, and when (seconds from sending)."""

    status: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    """The body of a reply that was not streamed."""
    retry_after: float = 0.0
    first: float | None = None
    """To the first piece with text or a token."""
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """From each such piece to the next."""
    seconds: float = 0.0
    complete: bool = False
    """Whether it ended as a reply should."""


class Broken(Exception):
    """The connection ended, or what came over it is no HTTP."""


class Connection:
    """To one server, kept open from request to request where the server allows it."""

    def __init__(self, host: str, port: int, key: str | None = None) -> None:
        self.host, self.port, self._key = host, port, key
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.num_opened = 0

    async def ask(
        self,
        body: bytes,
        path: str = "/v1/chat/completions",
        *,
        cut: int | None = None,
        kind: str = "application/json",
        length: int | None = None,
    ) -> Answer:
        """The reply to ``body``. ``cut``: the connection is closed after so many pieces of the answer (0: as soon as the
        request is sent). ``length`` is said of the body instead of what is true. Raises Broken or OSError."""  # fmt: skip
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: {kind}\r\n"
        head += f"Authorization: Bearer {self._key}\r\n" if self._key else ""
        said = f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body
        answer, began = Answer(), time.perf_counter()
        again = self._writer is not None
        try:
            await self._send(said)
            if cut == 0:
                self.abort()
                return answer
            status = await self._line()
        except (Broken, OSError):
            if not again:
                raise
            self.abort()  # the server had closed what lay idle
            await self._send(said)
            status = await self._line()
        await self._read(status, answer, began, cut)
        answer.seconds = time.perf_counter() - began
        return answer

    async def get(self, path: str) -> tuple[int, bytes]:
        """(status, body) of a small page."""
        await self._send(f"GET {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n\r\n".encode())
        status = _status(await self._line())
        headers = await self._headers()
        body = b"".join([piece async for piece in self._pieces(headers)])
        self._done(headers)
        return status, body

    def abort(self) -> None:
        """Cut the connection without a word."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def _send(self, data: bytes) -> None:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self.host, self.port, limit=1 << 22)
            self.num_opened += 1
        self._writer.write(data)
        await self._writer.drain()

    async def _read(self, status: bytes, answer: Answer, began: float, cut: int | None) -> None:
        answer.status = _status(status)
        headers = await self._headers()
        answer.retry_after = float(headers.get("retry-after", 0))
        if headers.get("content-type", "").startswith("text/event-stream"):
            pieces, rest = 0, b""
            async for data in self._pieces(headers):
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    pieces += _event(event, answer, began)
                if cut is not None and pieces >= cut:
                    self.abort()
                    return
        else:
            _whole(b"".join([piece async for piece in self._pieces(headers)]), answer)
        self._done(headers)

    def _done(self, headers: dict[str, str]) -> None:
        if headers.get("connection", "").lower() == "close":
            self.abort()

    async def _line(self) -> bytes:
        assert self._reader is not None
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise Broken("the connection ended in the middle of a reply" if line else "the connection ended before a reply")
        return line.rstrip(b"\r\n")

    async def _headers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        while line := await self._line():
            name, _, value = line.decode("latin-1").partition(":")
            found[name.strip().lower()] = value.strip()
        return found

    async def _pieces(self, headers: dict[str, str]):
        assert self._reader is not None
        try:
            if headers.get("transfer-encoding", "").lower() != "chunked":
                yield await self._reader.readexactly(int(headers.get("content-length", 0)))
                return
            while size := int(await self._line(), 16):
                data = await self._reader.readexactly(size + 2)
                yield data[:-2]
            await self._line()
        except asyncio.IncompleteReadError as error:
            raise Broken("the connection ended in the middle of a body") from error


def _status(line: bytes) -> int:
    words = line.split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/1."):
        raise Broken(f"no HTTP: {line[:60]!r}")
    return int(words[1])


def _event(event: bytes, answer: Answer, began: float) -> int:
    """Take in one server-sent event; whether it is a piece of the answer."""
    if not event.startswith(b"data: "):
        return 0
    if event == b"data: [DONE]":
        answer.complete = True
        return 0
    value = json.loads(event[6:])
    if "error" in value:
        answer.error = value["error"] if isinstance(value["error"], dict) else {"message": str(value["error"])}
        return 0
    answer.usage = value.get("usage") or answer.usage
    held = False
    for choice in value.get("choices", ()):
        delta = choice.get("delta", {})
        text, tokens = delta.get("content") or "", choice.get("token_ids") or ()
        answer.text += text
        answer.tokens += tokens
        answer.finish = choice.get("finish_reason") or answer.finish
        held = held or bool(text or tokens)
    if held:
        now = time.perf_counter() - began
        if answer.first is None:
            answer.first = now
        else:
            answer.gaps.append(now - answer.last)
        answer.last = now
    return int(held)


def _whole(body: bytes, answer: Answer) -> None:
    value = json.loads(body)
    if not isinstance(value, dict) or "choices" not in value:
        found = value.get("error", value) if isinstance(value, dict) else value
        answer.error = found if isinstance(found, dict) else {"message": str(found)}
        return
    (choice,) = value["choices"]
    answer.whole = value
    answer.text, answer.finish = choice["message"]["content"] or "", choice["finish_reason"]
    answer.tokens, answer.usage = choice.get("token_ids") or [], value["usage"]
    answer.complete = True
