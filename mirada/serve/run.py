"""Runs a server until it is told to stop, and then lets what is under way end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from mirada.errors import SettingsError
from mirada.serve import log
from mirada.serve.app import create_app
from mirada.serve.guard import Gate
from mirada.serve.protocol import timed, timed_socket
from mirada.serve.settings import ServeSettings

if TYPE_CHECKING:
    from mirada.engine.llm import VLM

WATCH_SECONDS = 2.0
"""Between two looks at the engines."""
IDLE_SECONDS = 5
"""That a connection is kept open between two requests."""

WS_MESSAGE_BYTES = 2 << 20
"""Largest message of a live connection, unless a frame may be larger."""


def listen(settings: ServeSettings) -> socket.socket:
    """A socket that listens where ``settings`` say. Raises SettingsError: the port is taken, the address is not ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio turns Nagle's algorithm off where a socket says that it is TCP; with it, all that is sent in two pieces waits
    # for the acknowledgement of the first, which clients on Linux hold back for 40 ms.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((settings.host.strip("[]"), settings.port))
        made.listen(2048)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise _cannot(settings, error) from error
    return made


def _cannot(settings: ServeSettings, error: OSError) -> SettingsError:
    if error.errno == errno.EADDRINUSE:
        return SettingsError(f"port {settings.port} is in use", "end what listens there, or give another --port (0: any)")
    if error.errno == errno.EACCES:
        return SettingsError(f"port {settings.port} is not open to this user", "give a --port above 1023")
    return SettingsError(f"nothing can listen at {settings.host}:{settings.port}: {error}", "check --host and --port")


def serve(
    models: Mapping[str, VLM],
    settings: ServeSettings,
    ready: Callable[[str], None] | None = None,
    sock: socket.socket | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain: new requests are answered 503, those under way end, then all closes. A second
    signal ends them at once. ``ready`` is called with the address once requests are taken. For the main thread."""
    sock = sock or listen(settings)
    app = create_app(models, settings)
    log.set_up()
    server = Server(app, settings, ready, sock)
    try:
        server.run(sockets=[sock])
    finally:
        sock.close()
        for vlm in models.values():
            vlm.close()


def address(sock: socket.socket) -> str:
    """``http://host:port`` of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, but for what a signal does: its own way closes the door at once, and the next client finds nobody."""

    def __init__(self, app: FastAPI, settings: ServeSettings, ready: Callable[[str], None] | None, sock: socket.socket) -> None:
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=5, lifespan="off", http=timed(settings),
            ws=timed_socket(settings), ws_max_size=max(WS_MESSAGE_BYTES, settings.live.frame_bytes + 1024),
            h11_max_incomplete_event_size=64 * 1024,
        )  # fmt: skip
        super().__init__(config)
        self._gate: Gate = app.state.gate
        self._settings, self._ready, self._sock = settings, ready, sock
        self._drain: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
        self._watching = loop.create_task(self._watch())
        log.event("started", address=address(self._sock))
        if self._ready is not None:
            self._ready(address(self._sock))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are taken in ``startup``, where the loop is

    def stop(self) -> None:
        """Drain and end; called again, end. For the event loop's thread."""
        if self._drain is not None:
            self.force_exit = self.should_exit = True
            return
        self._gate.draining = True
        log.event("draining", under_way=self._gate.num_requests)
        self._drain = asyncio.get_running_loop().create_task(self._drained())

    async def _watch(self) -> None:
        """The log says when an engine can no longer answer; ``/ready`` says so to those who ask."""
        while True:
            self.config.app.state.watch.look()  # type: ignore[union-attr]
            await asyncio.sleep(WATCH_SECONDS)

    async def _drained(self) -> None:
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._gate.empty.wait()
        except TimeoutError:
            log.event("drain_timeout", under_way=self._gate.num_requests)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await super().shutdown(sockets)
        log.event("stopped", under_way=self._gate.num_requests)
