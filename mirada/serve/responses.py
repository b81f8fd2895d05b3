"""OpenAI's ``/v1/responses`` for text and pictures: a body becomes one of chat completions, an answer becomes items.

The whole reply is what its stream's last event holds: both are made by ``Items``. Nothing is stored, so a conversation goes on
by sending it whole.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mirada.errors import MiradaError
from mirada.serve import chat
from mirada.serve.errors import reply
from mirada.serve.guard import Ticket, aside
from mirada.serve.responses_body import Form, as_chat, own_name, own_words
from mirada.serve.responses_items import Items
from mirada.serve.stream import BEAT, EventStream, Pace, Silence, beating, unless_gone
from mirada.types import Output


async def respond(request: Request, body: Mapping[str, Any], desk: chat.Desk) -> Response | EventStream:
    """The answer to a body of ``/v1/responses``. Raises MiradaError, HttpError or ClientGone."""
    form = await aside(request, as_chat, body, desk.settings.unknown_parameters == "warn")
    with own_words(form.places):
        return await _respond(request, body, form, desk)


async def _respond(request: Request, body: Mapping[str, Any], form: Form, desk: chat.Desk) -> Response | EventStream:
    asked = with_unknown(await aside(request, chat.read, form.body, desk, request.scope["mirada.tenant"]), form)
    ticket: Ticket = request.scope["mirada.ticket"]
    ticket.facts |= {"model": asked.name, "stream": asked.chat.options.stream}
    choices = await chat.submit(asked)
    items = items_of(f"resp_{secrets.token_hex(16)}", asked, body)
    if asked.chat.options.stream:
        return await chat.first_then_all(request, _events(request, choices, items, asked, desk), choices, asked, desk)
    choices.begin()
    try:
        outputs = await unless_gone(request.receive, _fold(choices, items))
    finally:
        choices.end()
    chat.note(request, outputs, asked, desk)
    return reply(items.object(outputs[0]), headers=asked.headers)


def with_unknown(asked: chat.Asked, form: Form) -> chat.Asked:
    """``asked`` with the parameters that nobody knew, under the names of this API."""
    options = asked.chat.options
    names = (*form.unknown, *(own_name(name, form.places) for name in options.unknown))
    return replace(asked, chat=asked.chat._replace(options=replace(options, unknown=names)))


def items_of(id: str, asked: chat.Asked, body: Mapping[str, Any]) -> Items:
    """The items of the answer to ``body``."""
    options = asked.chat.options
    return Items(
        id, asked.name, asked.chat.sampling, body, asked.vlm.parts.eos, chat.token_bytes(asked.vlm), options.include_reasoning
    )


async def _fold(choices: chat.Choices, items: Items) -> list[Output]:
    while (news := await choices.next()) is not None:
        items.feed(news[1])
    items.close()
    return await choices.outputs()


async def _events(
    request: Request, choices: chat.Choices, items: Items, asked: chat.Asked, desk: chat.Desk
) -> AsyncGenerator[bytes, None]:
    """The events of one response. An error before the first piece is raised; a later one is an event, and the stream ends."""
    begun, silence = False, Silence()
    pace = Pace(desk.metrics.inter_token.labels(asked.name).observe)
    try:
        async with aclosing(beating(choices)) as news:
            async for one in news:
                opening = b"" if begun else items.opening()
                begun = True
                if one is not None:
                    pace.piece(one[0])
                if said := silence.broken(opening + (BEAT if one is None else items.feed(one[1]))):
                    yield said
        outputs = await choices.outputs()
        chat.note(request, outputs, asked, desk)
        yield items.close() + items.ending(outputs[0])
    except MiradaError as error:
        if not begun:
            raise
        request.scope["mirada.ticket"].facts["error"] = str(error)[:200]
        yield items.failing(error)
