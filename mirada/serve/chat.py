"""One chat completion: read the body, ask the engine, answer whole or as a stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from mirada.errors import MiradaError
from mirada.records.answer import completion_to_openai
from mirada.serve import openai
from mirada.serve.asked import Asked, ask_of, start, token_bytes
from mirada.serve.errors import as_json, http_error, reply
from mirada.serve.guard import Gate, Ticket, aside
from mirada.serve.metrics import Metrics
from mirada.serve.settings import ServeSettings
from mirada.serve.stream import BEAT, Choices, EventStream, Pace, Silence, beating, unless_gone
from mirada.types import Output

if TYPE_CHECKING:
    from mirada.engine.llm import VLM


@dataclass(frozen=True)
class Desk:
    """What every request needs of the server."""

    models: Mapping[str, VLM]
    settings: ServeSettings
    metrics: Metrics
    gate: Gate
    created: int
    """When the server began (seconds since 1970)."""

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may name as their model: the models, then their adapters."""
        return tuple(dict.fromkeys((*self.models, *(name for vlm in self.models.values() for name in vlm.adapters))))

    @property
    def states(self) -> dict[str, str]:
        """Model -> whether its engine answers (``VLM.state``)."""
        return {name: vlm.state(self.settings.stall_seconds) for name, vlm in self.models.items()}

    def find(self, name: str) -> tuple[str, str | None]:
        """The model behind one of ``names``, and the adapter if it is one. A model's name goes before an adapter's. Raises
        HttpError (404) for one that was unloaded meanwhile."""
        if name in self.models:
            return name, None
        if (model := next((model for model, vlm in self.models.items() if name in vlm.adapters), None)) is None:
            raise openai.no_model(name, self.names)
        return model, name


async def complete(request: Request, body: Mapping[str, Any], desk: Desk) -> Response | EventStream:
    """The answer to a body of ``/v1/chat/completions``. Raises MiradaError, HttpError or ClientGone."""
    asked = await aside(request, read, body, desk, request.scope["mirada.tenant"])
    ticket: Ticket = request.scope["mirada.ticket"]
    ticket.facts |= {"model": asked.name, "stream": asked.chat.options.stream}
    options = asked.chat.options
    id = f"chatcmpl-{options.request_id or secrets.token_hex(12)}"
    choices = await submit(asked)
    if options.stream:
        return await _streamed(request, choices, asked, id, desk, openai.tier_of(body))
    outputs = await whole(request, choices, asked, desk)
    made = completion_to_openai(
        [openai.with_ids(output, id, index) for index, output in enumerate(outputs)],
        model=asked.name, id=id, created=int(time.time()), token_bytes=token_bytes(asked.vlm),
        return_token_ids=options.return_token_ids, reasoning=options.include_reasoning,
    )  # fmt: skip
    return reply(made | openai.tier_of(body), headers=asked.headers)


def read(body: Mapping[str, Any], desk: Desk, tenant: str) -> Asked:
    """Everything that can be said about a body before the engine sees it. Raises MiradaError or HttpError."""
    name = openai.check_model_name(body, desk.names)
    model, adapter = desk.find(name)
    return ask_of(desk.models[model], name, body, desk.settings, adapter, tenant)


async def submit(asked: Asked) -> Choices:
    """Hand all choices to the engine. Rendering and counting tokens take long for long texts: that is done in a thread."""
    # A caller that goes while the thread works leaves handles that nobody holds, and those end by themselves.
    return Choices(await asyncio.to_thread(start, asked))


async def whole(request: Request, choices: Choices, asked: Asked, desk: Desk) -> list[Output]:
    """All outputs, or the error of one; a client that goes meanwhile ends them."""
    try:
        outputs = await unless_gone(request.receive, choices.outputs())
    finally:
        choices.end()
    note(request, outputs, asked, desk)
    return outputs


def note(request: Request, outputs: list[Output], asked: Asked, desk: Desk) -> None:
    """Count and log what was used."""
    for output in outputs:
        desk.metrics.note(asked.name, output)
    ticket: Ticket = request.scope["mirada.ticket"]
    ticket.facts["prompt_tokens"] = outputs[0].usage.prompt_tokens
    ticket.facts["completion_tokens"] = sum(output.usage.completion_tokens for output in outputs)


async def _streamed(
    request: Request, choices: Choices, asked: Asked, id: str, desk: Desk, tier: Mapping[str, str]
) -> EventStream:
    options = asked.chat.options
    chunks = openai.Chunks(
        id, int(time.time()), asked.name, options.include_usage, asked.chat.sampling.logprobs is not None,
        token_bytes(asked.vlm), options.return_token_ids, options.include_reasoning, options.continuous_usage, tier,
    )  # fmt: skip
    events = _events(request, choices, chunks, asked, desk)
    return await first_then_all(request, events, choices, asked, desk)


async def first_then_all(
    request: Request, events: AsyncGenerator[bytes, None], choices: Choices, asked: Asked, desk: Desk
) -> EventStream:
    """A stream that begins once its first event is there: what fails before is a plain error with a status of its own."""
    choices.begin()
    try:
        first = await unless_gone(request.receive, _next(events))
    except BaseException:
        choices.end()
        raise
    return EventStream(_chain(first, events), choices.end, asked.headers, desk.settings.send_seconds)


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        yield first
        async for one in rest:
            yield one


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    return (b"" if name is None else f"event: {name}\n".encode()) + b"data: " + as_json(value) + b"\n\n"


async def _events(
    request: Request, choices: Choices, chunks: openai.Chunks, asked: Asked, desk: Desk
) -> AsyncGenerator[bytes, None]:
    """The events of one reply. An error before the first piece is raised; a later one is an event, and the stream ends."""
    begun, silence = False, Silence()
    pace = Pace(desk.metrics.inter_token.labels(asked.name).observe)
    try:
        async with aclosing(beating(choices)) as news:
            async for one in news:
                opening = b"" if begun else b"".join(event(chunks.opening(i)) for i in range(asked.chat.options.n))
                begun = True
                said = opening + BEAT
                if one is not None:
                    index, delta = one
                    pace.piece(index)
                    chunks.num_prompt = choices.usage.prompt_tokens
                    said = opening + b"".join(event(chunk) for chunk in chunks.pieces(index, delta))
                if said := silence.broken(said):
                    yield said
        outputs = await choices.outputs()
        note(request, outputs, asked, desk)
        yield (event(chunks.usage(outputs)) if chunks.include_usage else b"") + openai.DONE
    except MiradaError as error:
        if not begun:
            raise
        request.scope["mirada.ticket"].facts["error"] = str(error)[:200]
        yield event(http_error(error).body) + openai.DONE
