"""Connections under clocks: a server in this process around an application that needs no model."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import asynccontextmanager

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from mirada.errors import SettingsError
from mirada.serve import ServeSettings
from mirada.serve.protocol import READ_BYTES, timed
from mirada.serve.run import listen

HEAD = b"POST /%s HTTP/1.1\r\nHost: x\r\n"
SOON = 0.25
LARGE = 32 << 20


async def app(scope, receive, send):
    """/large sends more than any buffer holds, /pieces too but piece by piece, /slow thinks first; the others answer at once.
    None reads a body."""
    if scope["path"] == "/pieces":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(LARGE >> 20):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": number < (LARGE >> 20) - 1})
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * SOON)
    body = bytes(LARGE) if scope["path"] == "/large" else b"ok"
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


@asynccontextmanager
async def listening(**settings):
    """(port, the state that uvicorn shares among connections)."""
    settings = {"header_seconds": SOON, "send_seconds": SOON, **settings}
    config = uvicorn.Config(app, log_config=None, lifespan="off", http=timed(ServeSettings(**settings)))
    config.load()
    state = ServerState()
    made = await asyncio.get_running_loop().create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    async with made:
        yield made.sockets[0].getsockname()[1], state
        for one in list(state.connections):
            one.transport.abort()


@asynccontextmanager
async def connected(port, **more):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **more)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.sleep(0.02)  # both ends hear of it


async def until_closed(reader, seconds=5.0):
    """What comes until the other side closes, and after how long that was."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        try:
            data = await reader.read()
        except ConnectionResetError:
            data = b""
    return data, time.monotonic() - began


async def drip(writer, pause=0.02):
    try:
        for _ in range(1000):
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(pause)
    except OSError:
        pass


@pytest.mark.parametrize("dripping", [False, True], ids=["silent", "dripping"])
@pytest.mark.parametrize("begun", [b"", b"POST /x HT", HEAD % b"x" + b"X-Slow: "], ids=["none", "line", "header"])
def test_a_head_that_does_not_come(begun, dripping):
    async def main():
        async with listening() as (port, state), connected(port) as (reader, writer):
            writer.write(begun)
            more = asyncio.create_task(drip(writer)) if dripping else None
            data, seconds = await until_closed(reader)
            if more is not None:
                more.cancel()
            await asyncio.sleep(0.05)
            return data, seconds, len(state.connections)

    data, seconds, left = asyncio.run(main())
    assert 0.8 * SOON < seconds < 20 * SOON and left == 0
    if not dripping:  # else what it still sends may make the system forget what it was told
        head, _, body = data.partition(b"\r\n\r\n")
        assert data == b"" if not begun else head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head.lower()
        assert not begun or json.loads(body)["error"]["code"] == "head_timeout"


def test_one_that_sends_much_has_its_turns_as_all_others(monkeypatch):
    read, received = [], H11Protocol.data_received
    monkeypatch.setattr(H11Protocol, "data_received", lambda self, data: read.append(len(data)) or received(self, data))

    async def main():
        async with listening() as (port, _), connected(port) as (reader, writer):
            writer.write(HEAD % b"x" + b"Content-Length: 1000000\r\n\r\n" + bytes(1_000_000))
            await reader.readuntil(b"ok")

    asyncio.run(main())
    assert sum(read) > READ_BYTES >= max(read)


@pytest.mark.parametrize("said", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_an_upgrade_with_a_body_is_refused_at_once(said):
    """uvicorn hands on the head alone: both sides would wait for ever, on a connection that no clock sees."""
    upgrade = b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + said + b"\r\n\r\n"

    async def main():
        async with listening() as (port, state), connected(port) as (reader, writer):
            writer.write(upgrade)
            data, _ = await until_closed(reader)
            await asyncio.sleep(0.05)
            return data, len(state.connections)

    data, left = asyncio.run(main())
    assert data.startswith(b"HTTP/1.1 400 ") and left == 0
    assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"] == "upgrade_with_body"


def test_a_whole_head_has_no_clock_and_the_next_one_has():
    wide = 0.8  # of which a busy machine may take half between two heads

    async def main():
        async with listening(header_seconds=wide) as (port, _), connected(port) as (reader, writer):
            for _ in range(3):
                writer.write(HEAD % b"x" + b"Content-Length: 0\r\n\r\n")
                assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
                await asyncio.sleep(0.35 * wide)  # together longer than the clock of one head
            writer.write(b"GET /x HTTP")
            return await until_closed(reader, 25 * wide)

    data, seconds = asyncio.run(main())
    assert data.startswith(b"HTTP/1.1 408 ") and seconds < 20 * wide


def test_a_body_that_nobody_reads_may_not_drip_for_ever():
    async def main():
        async with listening() as (port, state), connected(port) as (reader, writer):
            writer.write(HEAD % b"x" + b"Content-Length: 1000000\r\n\r\n")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            dripping = asyncio.create_task(drip(writer))
            data, seconds = await until_closed(reader)
            dripping.cancel()
            await asyncio.sleep(0.05)
            return data, seconds, len(state.connections)

    data, seconds, left = asyncio.run(main())
    assert data == b"" and seconds < 20 * SOON and left == 0


@pytest.mark.parametrize("path", [b"large", b"pieces"])
def test_a_client_that_does_not_take_what_it_is_sent(path):
    async def main():
        async with listening() as (port, state), connected(port, limit=1 << 10) as (reader, writer):
            writer.write(HEAD % path + b"Content-Length: 0\r\n\r\n")
            began = time.monotonic()
            while not state.tasks and not state.total_requests:
                await asyncio.sleep(0.01)
            while state.connections and time.monotonic() - began < 10:
                await asyncio.sleep(0.02)
            left, seconds = len(state.connections), time.monotonic() - began
            data, _ = await until_closed(reader)
            return left, seconds, len(data)

    left, seconds, got = asyncio.run(main())
    assert left == 0 and seconds < 20 * SOON and got < LARGE


def test_a_request_may_take_longer_than_its_head():
    async def main():
        async with listening() as (port, _), connected(port) as (reader, writer):
            writer.write(HEAD % b"slow" + b"Content-Length: 0\r\n\r\n")
            return await reader.readuntil(b"ok")

    assert asyncio.run(main()).startswith(b"HTTP/1.1 200")


def test_one_that_takes_it_slowly_gets_all():
    """Longer than both clocks, but never standing still."""

    async def main():
        async with listening(send_seconds=1.0) as (port, _), connected(port) as (reader, writer):
            writer.write(HEAD % b"large" + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            got = 0
            while piece := await reader.read(LARGE // 10):
                got += len(piece)
                await asyncio.sleep(1.5 / (LARGE / len(piece)))
            return got

    assert asyncio.run(main()) == LARGE


def test_too_many_connections_close_the_ones_that_wait_longest():
    """They come all at once, so that the loop takes many in before it hears that one has gone."""

    async def main():
        async with listening(max_connections=8, header_seconds=30) as (port, state):
            idle = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(20)))
            async with connected(port) as (reader, writer):  # one who means it
                writer.write(HEAD % b"x" + b"Content-Length: 0\r\n\r\n")
                said = await reader.readuntil(b"ok")
                for _ in range(100):
                    closed = [one.at_eof() or one.exception() is not None for one, _ in idle]
                    if sum(closed) >= 13:
                        break
                    await asyncio.sleep(0.02)
                left = len(state.connections)
            for _, each in idle:
                each.transport.abort()
            await asyncio.sleep(0.02)
            return left, said, sum(closed)

    left, said, closed = asyncio.run(main())
    assert left == 8 and said.startswith(b"HTTP/1.1 200") and closed == 13


def test_settings_out_of_range():
    for name in ("header_seconds", "max_connections"):
        with pytest.raises(SettingsError, match=name):
            ServeSettings(**{name: 0})


def test_an_answer_in_two_pieces_does_not_wait_for_the_client():
    """Nagle's algorithm would have the second piece wait for the acknowledgement of the first: 40 ms for each answer."""

    async def main():
        accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        sock = listen(ServeSettings(port=0))
        async with (
            await asyncio.start_server(lambda _, writer: accepted.put_nowait(writer), sock=sock),
            connected(sock.getsockname()[1]),
        ):
            writer = await asyncio.wait_for(accepted.get(), 20)
            assert writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()

    asyncio.run(main())
