"""Whoever waits for a reply is told, whatever fails beside it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from mirada.client import FakeClient
from mirada.client.handle import Growing
from mirada.client.loop import Loop
from mirada.client.reading import AnswerReader
from mirada.errors import RemoteError, RequestFailed
from mirada.types import Message

INFINITE = float("inf")


def test_a_call_that_fails_keeps_no_news_from_others(caplog):
    """``result`` waits behind a call of the caller's own that fails."""
    handle = FakeClient(["eins zwei"], latency=0.02).submit([Message("user", "hi")])
    handle.when_done(lambda: 1 / 0)
    assert handle.result(5).message.text == "eins zwei" and "ZeroDivisionError" in caplog.text


def test_what_comes_while_the_loop_ends_is_refused():
    closing, go = threading.Event(), threading.Event()

    class Web:
        async def aclose(self) -> None:
            closing.set()
            await asyncio.to_thread(go.wait)

    loop = Loop(Web())  # pyright: ignore[reportArgumentType]
    ending = threading.Thread(target=loop.end)
    ending.start()
    assert closing.wait(5)
    reply, work = Growing(), asyncio.sleep(60)
    loop.start(lambda: work, reply)
    with pytest.raises(RequestFailed, match="closed"):
        loop.wait(asyncio.sleep(0))
    go.set()
    ending.join()
    work.close()
    assert reply.done and isinstance(reply.error, RequestFailed)


def test_what_waits_for_a_loop_that_ends_is_told():
    class Web:
        async def aclose(self) -> None:
            pass

    loop, began = Loop(Web()), threading.Event()  # pyright: ignore[reportArgumentType]

    async def work() -> None:
        began.set()
        await asyncio.sleep(60)

    errors: list[BaseException] = []

    def wait() -> None:
        try:
            loop.wait(work())
        except BaseException as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert began.wait(5)
    loop.end()
    waiting.join(5)
    assert [type(error) for error in errors] == [RequestFailed]


@pytest.mark.parametrize(
    "value",
    [
        {"usage": {"prompt_tokens": INFINITE}},
        {"choices": [{"delta": {}, "token_ids": [INFINITE]}]},
        {"choices": [{"delta": {"tool_calls": [{"index": INFINITE}]}}]},
    ],
)
def test_counts_without_end_are_the_servers_fault(value):
    with pytest.raises(RemoteError, match="form of OpenAI"):
        AnswerReader().chunk(value)
