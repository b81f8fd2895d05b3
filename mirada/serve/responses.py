"""OpenAI's ``/v1/responses`` for text and pictures: a body becomes one of chat completions, an answer becomes items.

The whole reply is what its stream's last event holds: both are made by ``Items``. Nothing is stored, so a conversation goes on
by sending it whole.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mirada.errors import MiradaError, ParameterError, nearest
from mirada.records.answer import annotation_to_openai, usage_to_openai
from mirada.serve import chat
from mirada.serve.errors import http_error, reply
from mirada.serve.guard import Ticket
from mirada.serve.stream import BEAT, EventStream, Pace, beating, unless_gone
from mirada.types import Delta, Output, ToolCall

_RENAMED = {"max_output_tokens": "max_completion_tokens"}
_BACK = {"max_completion_tokens": "max_output_tokens", "messages": "input", "response_format": "text.format"}
_KEPT = (
    "model", "stream", "temperature", "top_p", "parallel_tool_calls", "metadata", "user", "service_tier", "safety_identifier",
    "prompt_cache_key", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop",
    "logit_bias", "ignore_eos", "max_repeats", "thinking", "thinking_budget", "fps", "nframes", "min_pixels", "max_pixels",
    "adapter", "chat_template_kwargs", "mm_processor_kwargs",
)  # fmt: skip
_OWN = ("input", "instructions", "tools", "tool_choice", "reasoning", "text", "store", "truncation", "include", "background")
KNOWN = (*_KEPT, *_OWN, *_RENAMED)


async def respond(request: Request, body: Mapping[str, Any], desk: chat.Desk) -> Response | EventStream:
    """The answer to a body of ``/v1/responses``. Raises MiradaError, HttpError or ClientGone."""
    try:
        form = as_chat(body, desk.settings.unknown_parameters == "warn")
        asked = chat.read(form, desk, request.scope["mirada.tenant"])
        ticket: Ticket = request.scope["mirada.ticket"]
        ticket.facts |= {"model": asked.name, "stream": asked.chat.options.stream}
        choices = await chat.submit(asked)
    except ParameterError as error:
        param = _BACK.get(error.param, error.param.replace("].function.", "]."))
        raise ParameterError(error.problem.replace(error.param, param), error.fix, param=param) from error
    items = Items(f"resp_{secrets.token_hex(16)}", asked, body)
    if asked.chat.options.stream:
        return await chat.first_then_all(request, _events(request, choices, items, asked, desk), choices, asked, desk)
    choices.begin()
    try:
        outputs = await unless_gone(request.receive, _fold(choices, items))
    finally:
        choices.end()
    chat.note(request, outputs, asked, desk)
    return reply(items.object(outputs[0]), headers=asked.headers)


def as_chat(body: Mapping[str, Any], allow_unknown: bool = False) -> dict[str, Any]:
    """A body of ``/v1/responses`` as one of ``/v1/chat/completions``. Raises ParameterError."""
    given = {key: value for key, value in body.items() if value is not None}
    if "previous_response_id" in given or "conversation" in given:
        name = "previous_response_id" if "previous_response_id" in given else "conversation"
        raise ParameterError("no response is kept here to go on from", "send the whole conversation as input", param=name)
    made = {_RENAMED.get(key, key): value for key, value in given.items() if key in _KEPT or key in _RENAMED}
    for key, value in given.items():
        if key not in KNOWN:
            if not allow_unknown:
                raise ParameterError(f"the parameter {key!r} is unknown", nearest(key, KNOWN), param=key)
            made[key] = value
    for key, wanted in (("background", False), ("truncation", "disabled")):
        if key in given and (given[key] != wanted or type(given[key]) is not type(wanted)):
            raise ParameterError(f"{key}={given[key]!r} is not kept to", f"leave it out, or give {wanted!r}", param=key)
    if not all(isinstance(value, str) for value in _mapping(given, "metadata").values()):  # it comes back in the response
        raise ParameterError("metadata holds what is no text", "give an object of texts", param="metadata")
    made["messages"] = _messages(given)
    made["tools"] = [_tool(tool, index) for index, tool in enumerate(_typed(given, "tools", list, []))] or None
    choice = given.get("tool_choice")
    if isinstance(choice, Mapping) and "name" in choice:
        choice = {"type": "function", "function": {"name": choice["name"]}}
    reasoning, text = (_mapping(given, name) for name in ("reasoning", "text"))
    made |= {"tool_choice": choice, "reasoning_effort": reasoning.get("effort"), "response_format": _format(text.get("format"))}
    return made


def _mapping(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _typed(given, name, dict, {})


def _typed(given: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name, default)
    if not isinstance(value, kind):
        wanted = {dict: "an object", list: "a list", str: "a text"}[kind]
        raise ParameterError(f"{name} is a {type(value).__name__}", f"give {wanted}", param=name)
    return value


def _format(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {k: v for k, v in value.items() if k != "type"}}
    return value


def _tool(tool: Any, index: int) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise ParameterError(
            f"tools[{index}] is no function", 'give {"type": "function", "name": ...}', param=f"tools[{index}]"
        )
    return {"type": "function", "function": {key: value for key, value in tool.items() if key not in ("type", "strict")}}


def _messages(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked = given.get("input")
    if not isinstance(asked, str | list) or not asked:
        raise ParameterError("the request has no input", "give a text, or a list of messages", param="input")
    instructions = _typed(given, "instructions", str, "")
    lead = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(asked, str):
        return [*lead, {"role": "user", "content": asked}]
    return lead + [made for index, item in enumerate(asked) if (made := _item(item, f"input[{index}]")) is not None]


def _item(item: Any, where: str) -> dict[str, Any] | None:
    """One item of ``input`` as a message; None for one that says nothing to the model."""
    kind = item.get("type", "message") if isinstance(item, Mapping) else type(item).__name__
    if kind == "message":
        content = item.get("content")
        if isinstance(content, list):
            content = [_part(part, f"{where}.content[{number}]") for number, part in enumerate(content)]
        return {"role": item.get("role"), "content": content}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        return {"role": "assistant", "content": None, "tool_calls": [{"id": item.get("call_id"), "function": function}]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    if kind == "reasoning":
        return None
    kinds = ("message", "function_call", "function_call_output", "reasoning")
    raise ParameterError(f"{where} has the type {kind!r}", nearest(str(kind), kinds), param=where)


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    kinds = ("input_text", "output_text", "input_image")
    raise ParameterError(
        f"{where} has the type {kind!r}", f"{nearest(str(kind), kinds)}; an input_image needs image_url", param=where
    )


class Items:
    """Output items as they grow, and the events that tell of it. Feed every delta once, then ``close``."""

    def __init__(self, id: str, asked: chat.Asked, body: Mapping[str, Any]) -> None:
        self.id, self._asked, self._body = id, asked, body
        self._created = int(time.time())
        self._done: list[dict[str, Any]] = []
        self._open: tuple[str, list[str]] | None = None
        """Kind of the item that grows (message, reasoning or call), and its text or arguments."""
        self._name = ""
        """Of the call that grows."""
        self._found: list[dict[str, Any]] = []
        """Boxes and points in the message that grows."""
        self._told = 0
        """Characters of earlier messages."""
        self._number = -1

    def opening(self) -> bytes:
        """The first events."""
        whole = self.object(None)
        return self._event("response.created", response=whole) + self._event("response.in_progress", response=whole)

    def feed(self, delta: Delta) -> bytes:
        """What ``delta`` adds."""
        said = b""
        for kind, text in (("reasoning", delta.reasoning), ("message", delta.text)):
            if text:
                said += self._grow(kind, text)
        self._found += [annotation_to_openai(one, self._told) for one in delta.annotations]
        for call in delta.tool_calls:
            said += self._call(call)
        return said

    def close(self) -> bytes:
        """The item that grew is whole."""
        if self._open is None:
            return b""
        kind, texts = self._open
        self._open = None
        if kind == "call":
            return self._end_call("".join(texts))
        item = self._item(kind, "".join(texts), "completed")
        if kind == "message":
            # Beside the part, whose own annotations OpenAI's schema keeps for citations.
            item |= {"annotations": self._found} if self._found else {}
            self._found, self._told = [], self._told + len("".join(texts))
        at, part = self._at(item), item["content"][0]
        name = "output_text" if kind == "message" else "reasoning_text"
        more = {"logprobs": []} if kind == "message" else {}
        said = self._event(f"response.{name}.done", **at, content_index=0, text=part["text"], **more)
        said += self._event("response.content_part.done", **at, content_index=0, part=part)
        self._done.append(item)
        return said + self._event("response.output_item.done", output_index=at["output_index"], item=item)

    def ending(self, output: Output) -> bytes:
        """The last event, which holds the whole response."""
        whole = self.object(output)
        return self._event(f"response.{whole['status']}", response=whole)

    def failing(self, error: MiradaError) -> bytes:
        """An error in the middle."""
        found = http_error(error)
        failed = self.object(None) | {"status": "failed", "error": {"code": "server_error", "message": found.message}}
        return self._event("response.failed", response=failed)

    def object(self, output: Output | None) -> dict[str, Any]:
        """The response so far; whole where there is an ``output``."""
        body, sampling = self._body, self._asked.chat.sampling
        cut = output is not None and output.finish in ("length", "repetition")
        return {
            "id": self.id, "object": "response", "created_at": self._created, "model": self._asked.name,
            "status": "in_progress" if output is None else "incomplete" if cut else "completed", "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "background": False,
            "instructions": body.get("instructions"), "max_output_tokens": body.get("max_output_tokens"),
            "output": list(self._done), "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **(body.get("reasoning") or {})}, "store": False,
            "temperature": sampling.temperature if sampling.temperature <= 2 else None,  # OpenAI's schema ends at 2
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": [{"parameters": None, "strict": None, **tool} for tool in body.get("tools") or ()],
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p, "truncation": "disabled",
            "metadata": body.get("metadata") or {}, **({} if output is None else {"usage": _usage([output])}),
        }  # fmt: skip

    def _grow(self, kind: str, text: str) -> bytes:
        said = b""
        if self._open is not None and self._open[0] != kind:
            said += self.close()
        if self._open is None:
            self._open = (kind, [])
            item = self._item(kind, "", "in_progress")
            at = self._at(item)
            said += self._event("response.output_item.added", output_index=at["output_index"], item=item | {"content": []})
            said += self._event("response.content_part.added", **at, content_index=0, part=item["content"][0])
        self._open[1].append(text)
        name = "output_text" if kind == "message" else "reasoning_text"
        more = {"logprobs": []} if kind == "message" else {}
        at = self._at(self._item(kind, "", ""))
        return said + self._event(f"response.{name}.delta", **at, content_index=0, delta=text, **more)

    def _call(self, call: ToolCall) -> bytes:
        """A call begins, or goes on."""
        said = b""
        if call.name:
            said += self.close()
            self._open, self._name = ("call", []), call.name
            item = self._call_item("", "in_progress")
            said += self._event("response.output_item.added", output_index=len(self._done), item=item)
        assert self._open is not None
        self._open[1].append(call.arguments)
        if not call.arguments:
            return said
        at = self._at(self._call_item("", ""))
        return said + self._event("response.function_call_arguments.delta", **at, delta=call.arguments)

    def _end_call(self, arguments: str) -> bytes:
        item = self._call_item(arguments, "completed")
        at = self._at(item)
        said = self._event("response.function_call_arguments.done", **at, name=self._name, arguments=arguments)
        self._done.append(item)
        return said + self._event("response.output_item.done", output_index=at["output_index"], item=item)

    def _call_item(self, arguments: str, status: str) -> dict[str, Any]:
        number = len(self._done)
        return {
            "type": "function_call", "id": f"fc_{self.id[5:]}_{number}", "call_id": f"call_{self.id[5:]}_{number}",
            "name": self._name, "arguments": arguments, "status": status,
        }  # fmt: skip

    def _item(self, kind: str, text: str, status: str) -> dict[str, Any]:
        number = len(self._done)
        if kind == "message":
            part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
            head: dict[str, Any] = {"type": "message", "id": f"msg_{self.id[5:]}_{number}", "role": "assistant"}
        else:
            part = {"type": "reasoning_text", "text": text}
            head = {"type": "reasoning", "id": f"rs_{self.id[5:]}_{number}", "summary": []}
        return head | {"status": status, "content": [part]}

    def _at(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._done)}

    def _event(self, kind: str, **said: Any) -> bytes:
        self._number += 1
        return chat.event({"type": kind, "sequence_number": self._number, **said}, kind)


def _usage(outputs: Sequence[Output]) -> dict[str, Any]:
    """As chat completions say it, under the names of this API."""
    told = usage_to_openai([output.usage for output in outputs])
    return {
        "input_tokens": told.pop("prompt_tokens"),
        "input_tokens_details": {"cached_tokens": 0, **told.pop("prompt_tokens_details")},
        "output_tokens": told.pop("completion_tokens"),
        "output_tokens_details": told.pop("completion_tokens_details"),
        **told,
    }


async def _fold(choices: chat.Choices, items: Items) -> list[Output]:
    while (news := await choices.next()) is not None:
        items.feed(news[1])
    items.close()
    return await choices.outputs()


async def _events(
    request: Request, choices: chat.Choices, items: Items, asked: chat.Asked, desk: chat.Desk
) -> AsyncGenerator[bytes, None]:
    """The events of one response. An error before the first piece is raised; a later one is an event, and the stream ends."""
    begun = False
    pace = Pace(desk.metrics.inter_token.labels(asked.name).observe)
    try:
        async with aclosing(beating(choices)) as news:
            async for one in news:
                opening = b"" if begun else items.opening()
                begun = True
                if one is not None:
                    pace.piece(one[0])
                if said := opening + (BEAT if one is None else items.feed(one[1])):
                    yield said
        outputs = await choices.outputs()
        chat.note(request, outputs, asked, desk)
        yield items.close() + items.ending(outputs[0])
    except MiradaError as error:
        if not begun:
            raise
        request.scope["mirada.ticket"].facts["error"] = str(error)[:200]
        yield items.failing(error)
