"""A client that answers from a script: for tests of whatever asks a model, without one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mirada.client.body import Tools
from mirada.client.handle import Growing, ReplyHandle
from mirada.errors import MiradaError, RequestFailed, SettingsError
from mirada.records.wire import message_from_json
from mirada.types import Chat, Delta, Message, Output, Prompt, Sampling, Text, Thinking, Usage

Scripted = str | Message | Output | MiradaError
"""One reply: its text, the whole message, the whole output, or the error that it ends with."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asked."""

    chat: Sequence[Message] | Prompt
    sampling: Sampling
    options: Mapping[str, Any] = field(default_factory=dict)


class FakeClient:
    """Implements ``types.Client``. ``script``: a function of (chat, sampling), or replies for the requests in their order (one
    more is a RequestFailed). ``latency``: seconds before the first piece and between two; with 0 a reply is whole when
    ``submit`` returns. ``piece``: characters of one delta. ``requests``: what was asked so far."""

    def __init__(
        self,
        script: Callable[[Any, Sampling], Scripted] | Iterable[Scripted],
        *,
        latency: float = 0.0,
        piece: int = 4,
    ) -> None:
        if piece < 1 or latency < 0:
            raise SettingsError(f"piece={piece!r} and latency={latency!r} make no stream", "give at least 1, and at least 0")
        self._script = script if callable(script) else iter((script,) if isinstance(script, str) else script)
        self._latency, self._piece = latency, piece
        self._lock = threading.Lock()
        self.requests: list[Asked] = []

    def submit(
        self,
        chat: Chat | Prompt,
        sampling: Sampling | None = None,
        *,
        thinking: Thinking = "auto",
        tools: Tools | None = None,
        adapter: str | None = None,
    ) -> ReplyHandle:
        sampling, reply = sampling or Sampling(), Growing()
        try:
            asked = chat if isinstance(chat, Prompt) else [message_from_json(m, f"message {i}") for i, m in enumerate(chat)]
            with self._lock:
                self.requests.append(Asked(asked, sampling, {"thinking": thinking, "tools": tools, "adapter": adapter}))
                said = self._next(asked, sampling)
        except MiradaError as error:
            said = error
        if not self._latency:
            for step in _steps(said, self._piece):
                step(reply)
            return ReplyHandle(reply)
        stopped = threading.Event()
        reply.stop = stopped.set
        threading.Thread(target=_play, args=(reply, said, self._piece, self._latency, stopped), daemon=True).start()
        return ReplyHandle(reply)

    def _next(self, chat: Any, sampling: Sampling) -> Scripted:
        if callable(self._script):
            return self._script(chat, sampling)
        try:
            return next(self._script)
        except StopIteration:
            raise RequestFailed(f"the script has no reply to request {len(self.requests)}", "give it more replies") from None


def _play(reply: Growing, said: Scripted, piece: int, latency: float, stopped: threading.Event) -> None:
    for step in _steps(said, piece):
        if stopped.wait(latency):
            reply.publish(Delta(finish="cancelled"))
            return
        step(reply)


def _steps(said: Scripted, piece: int) -> list[Callable[[Growing], None]]:
    """What to do to a reply, one thing after the other."""
    if isinstance(said, Output) and said.error is not None:
        said = said.error
    if isinstance(said, MiradaError):
        error = said
        return [lambda reply: reply.fail(error)]
    if isinstance(said, str):
        said = Message("assistant", said)
    output = Output(said, finish="tool_calls" if said.tool_calls else "stop") if isinstance(said, Message) else said
    return [
        *(lambda reply, delta=delta: reply.publish(delta) for delta in pieces(output, piece)),
        lambda reply: _finish(reply, output),
    ]


def pieces(output: Output, size: int) -> list[Delta]:
    """An output as the deltas of a stream, ``size`` characters each, but for the last one, which ends it."""
    thought, said = output.message.reasoning, "".join(p.text for p in output.message.parts if isinstance(p, Text))
    made = [Delta(reasoning=thought[at : at + size]) for at in range(0, len(thought), size)]
    return made + [Delta(text=said[at : at + size]) for at in range(0, len(said), size)]


def _finish(reply: Growing, output: Output) -> None:
    num_tokens = len(output.tokens)
    reply.usage = output.usage if output.usage != Usage() else Usage(completion_tokens=num_tokens)
    reply.metrics, reply.notes, reply.logprobs = dict(output.metrics), output.notes, output.logprobs is not None
    reply.publish(ending(output))


def ending(output: Output) -> Delta:
    """The last delta of an output: all but the words of ``pieces``."""
    return Delta(
        tokens=output.tokens,
        logprobs=output.logprobs or (),
        tool_calls=output.message.tool_calls,
        finish=output.finish,
        annotations=output.annotations,
        stop_reason=output.stop_reason,
        notes=output.notes,
    )
