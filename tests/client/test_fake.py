"""Scripted replies."""

from __future__ import annotations

import asyncio

import pytest

from mirada import errors
from mirada.client import FakeClient
from mirada.types import Logprob, Message, Output, Prompt, Sampling, Text, ToolCall, Usage

HI = [Message("user", "hi")]


def test_replies_come_in_their_order_and_then_no_more():
    call = ToolCall("f", "{}", "c")
    output = Output(Message("assistant", "x", reasoning="hm"), (1,), (Logprob(1, -1.0),), "length", Usage(3, 1), notes=("n",))
    client = FakeClient(["eins zwei", Message("assistant", (Text("a"), call)), output, errors.OutOfMemory("no")], piece=4)
    handle = client.submit(HI)
    assert [delta.text for delta in handle] == ["eins", " zwe", "i", ""] and handle.result().message.text == "eins zwei"
    second = client.submit(HI, Sampling(seed=1), thinking="on").result()
    assert second.message.tool_calls == (call,) and second.finish == "tool_calls"
    third = client.submit(Prompt((1,))).result()
    assert (third.message, third.tokens, third.logprobs, third.finish, third.usage, third.notes) == (
        output.message, (1,), output.logprobs, "length", Usage(3, 1), ("n",),
    )  # fmt: skip
    assert isinstance(client.submit(HI).result().error, errors.OutOfMemory)
    with pytest.raises(errors.RequestFailed, match="no reply to request 5"):
        list(client.submit(HI))
    assert [asked.sampling.seed for asked in client.requests] == [None, 1, None, None, None]
    assert client.requests[1].options["thinking"] == "on" and client.requests[0].chat == HI


def test_a_function_sees_what_was_asked():
    client = FakeClient(lambda chat, sampling: f"{chat[-1].text} {sampling.max_tokens}")
    assert client.submit([{"role": "user", "content": "é"}], Sampling(max_tokens=3)).result().message.text == "é 3"
    assert isinstance(client.submit([{"role": "cat"}]).result().error, errors.MessageError)


def test_latency_and_cancelling():
    async def main():
        handle = FakeClient("abcdef", latency=0.01, piece=2).submit(HI)
        return [delta.text async for delta in handle], (await handle).message.text

    assert asyncio.run(main()) == (["ab", "cd", "ef", ""], "abcdef")
    handle = FakeClient("ab" * 500, latency=0.01, piece=2).submit(HI)
    next(iter(handle))
    handle.cancel()
    output = handle.result(5)
    assert output.finish == "cancelled" and 2 <= len(output.message.text) < 900


@pytest.mark.parametrize("wrong", [{"piece": 0}, {"latency": -1}])
def test_what_makes_no_stream(wrong):
    with pytest.raises(errors.SettingsError):
        FakeClient("x", **wrong)
