"""The door: who comes in, how much at once, and what every reply carries.

A plain ASGI layer, for layers that Starlette makes out of functions hide that a client has gone.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mirada.serve import log
from mirada.serve.errors import RETRY_AFTER, ClientGone, HttpError, error_reply
from mirada.serve.metrics import Metrics
from mirada.serve.settings import ServeSettings, is_loopback

OPEN = frozenset(("/", "/health", "/ready"))
"""Paths that need no key: the page, and what says whether the server lives. ``/ui/...`` is open too."""
KEY_PREFIX = "mirada.key."
"""A page cannot send headers with a WebSocket: its API key comes as a subprotocol, in base64url without padding."""
GONE = 499
"""What the log calls a reply to a client that went away (nginx's number; it is never sent)."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}
"""On every reply, unless its own route says otherwise (a page needs a policy of its own)."""
VALUE_BYTES = 256
"""That one value of JSON takes in memory, about: objects and their keys more, numbers less."""
LARGE_BODY = 1 << 18
"""What is smaller is read sooner than handed to a thread (some milliseconds)."""
T = TypeVar("T")
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(eq=False)
class Gate:
    """What is under way in one server."""

    num_requests: int = 0
    held_bytes: int = 0
    """What the bodies of all of it count as."""
    draining: bool = False
    empty: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nothing is under way."""

    def __post_init__(self) -> None:
        self.empty.set()


@dataclass(eq=False)
class Ticket:
    """One request on its way through: what the guard holds for it, and what the log says of it."""

    id: str
    began: float = field(default_factory=time.perf_counter)
    body_bytes: int = 0
    held_bytes: int = 0
    """What its body counts as: its bytes, and those of the objects that it becomes."""
    num_values: int = 0
    status: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class Guard:
    """Wraps the application. ``gate`` counts requests under ``/v1/``; the rest is small and always let in.

    ``scope["mirada.tenant"]`` says whose key opened the door: callers with different keys share no cache, or how soon an
    answer comes would tell one what another has asked.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, gate: Gate, metrics: Metrics) -> None:
        self.app, self.settings, self.gate, self.metrics = app, settings, gate, metrics
        self._keys = tuple(map(_digest, settings.api_keys))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        ticket = _ticket(scope, headers)
        counted = scope["method"] == "POST" and scope["path"].startswith("/v1/")
        sending = _Sending(send, ticket)
        entered = False
        try:
            self._admit(scope, headers, counted)
            if counted:
                entered = True
                self._enter()
            await self.app(scope, receive, sending)
        except ClientGone:
            ticket.status = GONE
        except Exception as error:
            if not isinstance(error, HttpError):
                log.event("defect", logging.ERROR, error, id=ticket.id, path=scope["path"])
            if ticket.status:  # half a reply is out: only a cut connection says that it is not whole
                raise
            await error_reply(error)(scope, receive, sending)
        finally:
            if entered:
                self._leave(ticket)
            self._note(scope, ticket)

    def _enter(self) -> None:
        self.gate.num_requests += 1
        self.gate.empty.clear()

    def _leave(self, ticket: Ticket) -> None:
        self.gate.num_requests -= 1
        self.gate.held_bytes -= ticket.held_bytes
        if not self.gate.num_requests:
            self.gate.empty.set()

    def _note(self, scope: Scope, ticket: Ticket) -> None:
        seconds = time.perf_counter() - ticket.began
        self.metrics.requests.labels(path=_route(scope), status=str(ticket.status)).inc()
        client = scope.get("client") or (None,)
        log.event(
            "request", id=ticket.id, method=scope.get("method", "GET"), path=scope["path"][:200], status=ticket.status,
            seconds=round(seconds, 4), client=client[0], **ticket.facts,
        )  # fmt: skip

    def _admit(self, scope: Scope, headers: dict[str, str], counted: bool) -> None:
        """Raises HttpError for who or what may not come in."""
        self._check_caller(scope, headers)
        if self.gate.draining and scope["path"] not in ("/health", "/ready", "/metrics"):
            raise stopping()
        if "transfer-encoding" in headers and "content-length" in headers:
            raise HttpError(
                400, "the length of the body is said twice, by Content-Length and by Transfer-Encoding; send one of them",
                code="two_lengths", headers={"Connection": "close"},
            )  # fmt: skip
        if counted and self.gate.num_requests >= self.settings.max_requests:
            raise busy(f"{self.gate.num_requests} requests are under way", "max_requests")

    def _check_caller(self, scope: Scope, headers: dict[str, str]) -> None:
        scope["mirada.tenant"] = ""
        if self._keys:
            if scope["path"] in OPEN or scope["path"].startswith("/ui/"):
                return
            scope["mirada.tenant"] = self._tenant(headers)
            return
        # Without a key, a page from anywhere in the user's own browser could ask: only pages of this very server may.
        if not is_loopback(_host(headers.get("host", ""))):
            raise HttpError(
                403, "the Host header names no address of this machine; without an API key only 127.0.0.1 and localhost do",
                code="host_refused",
            )  # fmt: skip
        if (origin := headers.get("origin")) is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise HttpError(403, "pages of other origins may not ask this server", code="origin_refused")

    def _tenant(self, headers: dict[str, str]) -> str:
        """Who has the key that was sent. Raises HttpError (401) if nobody has it."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        found = [hmac.compare_digest(given, one) for one in self._keys]  # every one of them, so that time says nothing
        if not any(found):
            raise HttpError(
                401, "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return given.hex()

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The same door for connections that stay; those that may not come in are answered before they open."""
        headers = _headers(scope)
        if "authorization" not in headers and (key := key_of(headers.get("sec-websocket-protocol", ""))):
            headers["authorization"] = f"Bearer {key}"
        ticket = _ticket(scope, headers)
        sending = _Sending(send, ticket)
        try:
            self._admit(scope, headers, counted=False)
            await self.app(scope, receive, sending)
        except Exception as error:
            if not isinstance(error, HttpError):
                log.event("defect", logging.ERROR, error, id=ticket.id, path=scope["path"])
            if ticket.status:  # it is open
                with contextlib.suppress(OSError, RuntimeError):
                    await send({"type": "websocket.close", "code": 1011})
                return
            await receive()
            await error_reply(error)(scope, receive, sending)
        finally:
            self._note(scope, ticket)


class _Sending:
    """``send``, with the headers of every reply, and its status kept (101: a WebSocket was opened)."""

    def __init__(self, send: Send, ticket: Ticket) -> None:
        self._send, self._ticket = send, ticket

    async def __call__(self, message: Message) -> None:
        if message["type"] == "websocket.accept":
            self._ticket.status = 101
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", self._ticket.id.encode())]}
        elif message["type"] == "websocket.close" and not self._ticket.status:
            self._ticket.status = 403  # what the client is told of one that was not opened
        elif message["type"].endswith("http.response.start"):
            self._ticket.status = message["status"]
            have = {name.lower() for name, _ in message["headers"]}
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in have]
            more.append((b"x-request-id", self._ticket.id.encode()))
            message = {**message, "headers": [*message["headers"], *more]}
        await self._send(message)


def key_of(protocols: str) -> str:
    """The API key among the subprotocols that a client offers; empty where there is none."""
    for one in protocols.split(","):
        if (name := one.strip()).startswith(KEY_PREFIX):
            coded = name.removeprefix(KEY_PREFIX)
            with contextlib.suppress(binascii.Error, ValueError):
                return base64.urlsafe_b64decode(coded + "=" * (-len(coded) % 4)).decode("ascii")
    return ""


def stopping() -> HttpError:
    """503 for who comes after the server was told to stop."""
    return HttpError(
        503, "the server is about to stop; ask another, or later", kind="server_error", code="draining",
        headers={"Retry-After": "5", "Connection": "close"},
    )  # fmt: skip


def busy(problem: str, knob: str) -> HttpError:
    """429 for what does not fit now."""
    return HttpError(
        429, f"{problem}; come again later (server setting {knob})", kind="rate_limit_error", code="too_many_requests",
        headers={"Retry-After": str(RETRY_AFTER)},
    )  # fmt: skip


async def aside(request: HTTPConnection, work: Callable[..., T], *given: Any) -> T:
    """``work(*given)``, in a thread where the request's body, or the last message of a live connection, is large: every other
    connection would wait for it."""
    ticket: Ticket = request.scope["mirada.ticket"]
    if ticket.held_bytes < LARGE_BODY:
        return work(*given)
    return await asyncio.to_thread(work, *given)


async def read_body(request: Request, gate: Gate, settings: ServeSettings) -> bytes:
    """The whole body. Its bytes count against the gate until the request ends. Raises HttpError (408, 413, 415, 429)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, "the body must be JSON; send the header Content-Type: application/json", code="not_json")
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) not in ("", "identity"):
        raise HttpError(415, f"the body comes in the coding {coding[:40]!r}; send it as it is", code="unknown_coding")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > settings.max_body_bytes:
        raise _too_large(settings)
    try:
        async with asyncio.timeout(settings.body_seconds):
            return b"".join([piece async for piece in _pieces(request, gate, settings)])
    except TimeoutError:
        raise HttpError(
            408, f"the body did not arrive within {settings.body_seconds:g} s", code="body_timeout",
            headers={"Connection": "close"},
        ) from None  # fmt: skip


async def _pieces(request: Request, gate: Gate, settings: ServeSettings):
    ticket: Ticket = request.scope["mirada.ticket"]
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        # Each value but the first of its object or list has a comma before it, and base64 holds none of these.
        values = sum(map(piece.count, (b",", b"{", b"[")))
        size = len(piece) + VALUE_BYTES * values
        ticket.body_bytes += len(piece)
        ticket.num_values += values
        ticket.held_bytes += size
        gate.held_bytes += size
        if ticket.body_bytes > settings.max_body_bytes:
            raise _too_large(settings)
        if ticket.num_values > settings.max_body_values:
            raise HttpError(
                400, f"the body holds more than {settings.max_body_values:,} values; send it in several requests"
                " (server setting max_body_values)", code="body_too_complex", headers={"Connection": "close"},
            )  # fmt: skip
        if gate.held_bytes > settings.max_bodies_bytes:
            raise busy("the requests under way hold as many bytes as they may", "max_bodies_bytes")
        yield piece
        if not message.get("more_body", False):
            return


def _too_large(settings: ServeSettings) -> HttpError:
    return HttpError(
        413, f"the body is larger than {settings.max_body_bytes:,} bytes; send smaller pictures, or their addresses",
        code="body_too_large", headers={"Connection": "close"},
    )  # fmt: skip


def _route(scope: Scope) -> str:
    """The path of the route that a request is for, also where the door was not opened; ``other`` for none, so that no stranger
    makes names of metrics."""
    if "route" in scope:
        return scope["route"].path
    routes = scope["app"].routes if "app" in scope else ()
    found = next((one for one in routes if hasattr(one, "path") and one.matches(scope)[0] is not Match.NONE), None)
    return "other" if found is None else found.path


def _ticket(scope: Scope, headers: dict[str, str]) -> Ticket:
    wanted = headers.get("x-request-id", "")
    made = scope["mirada.ticket"] = Ticket(wanted if _ID.fullmatch(wanted) else f"req_{secrets.token_hex(12)}")
    return made


def _headers(scope: Scope) -> dict[str, str]:
    pairs: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in pairs}


def _host(header: str) -> str:
    """The name in a Host header, without its port; empty for what is none."""
    found = _HOST.fullmatch(header)
    return found[1] if found else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
