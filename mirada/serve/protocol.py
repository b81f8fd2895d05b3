"""One connection: uvicorn's, with clocks.

uvicorn itself waits without bound for the rest of a request's head, for the rest of a body that nobody reads (of a request
that was refused), and for a client to take what was sent to it. A few hundred such clients would hold all connections there
may be.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from mirada.serve import log
from mirada.serve.errors import HttpError, error_reply
from mirada.serve.settings import ServeSettings


def timed(settings: ServeSettings) -> type[H11Protocol]:
    """The class of connections under ``settings``, as uvicorn wants it."""
    return type("Timed", (_Timed,), {"settings": settings})


def timed_socket(settings: ServeSettings) -> type[WebSocketsSansIOProtocol]:
    """The same for WebSockets."""
    return type("TimedSocket", (_TimedSocket,), {"settings": settings})


LEAST_TAKEN = 64 << 10
"""Bytes that a client must take in ``send_seconds``, if so many wait for it."""

READ_BYTES = 32 << 10
"""Read of a connection before all others have their turn. A body may come in chunks of one byte, each of which costs as much as
thousands of bytes in one."""


class _Taking:
    """Of what is sent some must be taken in every ``send_seconds``, from the moment when no more fits. For protocols of uvicorn
    to be mixed with."""

    settings: ServeSettings
    loop: asyncio.AbstractEventLoop
    transport: Any
    client: Any

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._taking, self._untaken = _Clock(self.loop, self._check_taken), 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._taking.stop()
        super().connection_lost(exc)  # type: ignore[misc]

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._watch_taking()

    def resume_writing(self) -> None:
        self._taking.stop()
        super().resume_writing()  # type: ignore[misc]

    def _watch_taking(self) -> None:
        self._untaken = self.transport.get_write_buffer_size()
        self._taking.start(self.settings.send_seconds)

    def _check_taken(self) -> None:
        """Closing would wait without bound for a client that does not take what is sent to it."""
        left = self.transport.get_write_buffer_size()
        if left and left > self._untaken - LEAST_TAKEN:
            log.event("client_does_not_read", client=self.client and self.client[0])
            self.transport.abort()
        elif left:
            self._watch_taking()


class _TimedSocket(_Taking, WebSocketsSansIOProtocol):
    pass


class _Timed(_Taking, H11Protocol):
    """Between two requests, and before the first, the head of the next must be whole within ``header_seconds``. Of too many
    connections the one goes that has kept its request waiting longest."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head = _Clock(self.loop, self._late)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]  # asyncio's own; other loops take no notice
        self._head.start(self.settings.header_seconds)
        if len(self.connections) > self.settings.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.stop()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._head.stop()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._head.stop()
        if any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in self.headers):
            # uvicorn hands on the head alone: the other protocol would wait for the body, and no clock would see it.
            log.event("upgrade_with_body", client=self.client and self.client[0])
            self._refuse(HttpError(400, "a request that opens a WebSocket has no body", code="upgrade_with_body"))
            self.transport.close()
            return
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else the next request was there already
            self._head.start(self.settings.header_seconds)

    @property
    def waits_since(self) -> float | None:
        """When it began to wait for a request, on the loop's clock; None while one is under way."""
        return self._head.since

    def _make_room(self) -> None:
        waiting = [one for one in self.connections if isinstance(one, _Timed) and one.waits_since is not None]
        oldest = min(waiting, key=lambda one: one.waits_since or 0.0)  # this one waits too
        log.event("connections_full", logging.WARNING, open=len(self.connections), client=oldest.client and oldest.client[0])
        oldest.give_way()

    def give_way(self) -> None:
        """Close at once; the loop hears of it later, so it must not be chosen twice."""
        self._head.stop()
        self.transport.abort()

    def _late(self) -> None:
        """No request came, or not all of its head."""
        self._head.start(self.settings.header_seconds)
        if self.transport.get_write_buffer_size():  # it may still be at the reply before
            if self._taking.since is None:
                self._watch_taking()
            return
        if not self.transport.is_closing() and self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            log.event("slow_head", client=self.client and self.client[0])
            seconds = self.settings.header_seconds
            self._refuse(HttpError(408, f"the head of the request did not arrive within {seconds:g} s", code="head_timeout"))
        self.transport.close()

    def _refuse(self, error: HttpError) -> None:
        said = error_reply(error)
        headers = [*said.raw_headers, (b"connection", b"close")]
        reason = HTTPStatus(error.status).phrase.encode()
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=reason),
            h11.Data(data=bytes(said.body)),
        ):
            self.transport.write(self.conn.send(event) or b"")


class _Clock:
    """Calls once, some seconds after it was last started."""

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        self._loop, self._call = loop, call
        self._timer: asyncio.TimerHandle | None = None
        self.since: float | None = None

    def start(self, seconds: float) -> None:
        self.stop()
        self.since = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._call)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.since = None
