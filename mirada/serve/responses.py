"""OpenAI's ``/v1/responses`` for text and pictures: a body becomes one of chat completions, an answer becomes items.

The whole reply is what its stream's last event holds: both are made by ``Items``. Nothing is stored, so a conversation goes on
by sending it whole.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from mirada.errors import ContextOverflow, InputError, MiradaError, ParameterError, nearest
from mirada.records.answer import (
    TokenBytes,
    annotation_to_openai,
    logprobs_to_openai,
    notes_to_openai,
    stop_reason_to_openai,
    usage_to_openai,
)
from mirada.records.request import LABELS, Unknown
from mirada.serve import chat
from mirada.serve.errors import http_error, reply
from mirada.serve.guard import Ticket, aside
from mirada.serve.stream import BEAT, EventStream, Pace, beating, unless_gone
from mirada.types import Delta, Logprob, Output, Sampling, ToolCall

_RENAMED = {"max_output_tokens": "max_completion_tokens"}
_KEPT = (
    *LABELS, "model", "stream", "temperature", "top_p", "parallel_tool_calls", "service_tier", "store",
    "prompt_cache_retention", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop",
    "stop_token_ids", "include_stop_str_in_output", "min_tokens", "logit_bias", "ignore_eos", "max_repeats",
    "skip_special_tokens", "priority", "thinking", "thinking_budget", "include_reasoning", "fps", "nframes", "min_pixels",
    "max_pixels", "adapter", "chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar", "guided_whitespace_pattern", "guided_decoding_backend", "structured_outputs",
)  # fmt: skip
_OWN = (
    "input", "instructions", "tools", "tool_choice", "reasoning", "text", "truncation", "include", "background",
    "top_logprobs", "stream_options",
)  # fmt: skip
KNOWN = (*_KEPT, *_OWN, *_RENAMED)
LOGPROBS = "message.output_text.logprobs"
"""What ``include`` may name."""
# Parameters of chat completions as this API says them; the first that fits counts.
_BACK = (
    (r"max_(?:completion_)?tokens$", "max_output_tokens"), (r"messages$", "input"), (r"reasoning_effort", "reasoning.effort"),
    (r"response_format\.json_schema", "text.format"), (r"response_format", "text.format"),
    (r"(tools\[\d+\])\.function", r"\1"), (r"stream_options$", "stream_options"),
)  # fmt: skip
_ITEM_KEYS = {
    "message": ("type", "role", "content", "id", "status", "phase", "annotations"),
    "function_call": ("type", "id", "call_id", "name", "arguments", "status"),
    "function_call_output": ("type", "id", "call_id", "output", "status"),
}
_PART_KEYS = {
    "input_text": ("type", "text"),
    "output_text": ("type", "text", "annotations", "logprobs"),
    "refusal": ("type", "refusal"),
    "input_image": ("type", "image_url", "detail", "file_id"),
}


class Place(NamedTuple):
    """Where in a body a message of chat completions comes from, and each part of its content."""

    whole: str
    parts: list[str]


class Form(NamedTuple):
    """A body as one of chat completions."""

    body: dict[str, Any]
    places: list[Place]
    """Of each message."""
    unknown: list[str]
    """Parameters that were left aside."""


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


def own_name(param: str, places: Sequence[Place]) -> str:
    """A parameter of chat completions as the caller of this API wrote it: ``input[2].content[0]``."""
    if match := re.match(r"messages\[(\d+)\](?:\.content\[(\d+)\])?", param):
        whole, parts = places[int(match[1])]
        part = int(match[2]) if match[2] else -1
        return (parts[part] if 0 <= part < len(parts) else whole) + param[match.end() :]
    for pattern, name in _BACK:
        if re.match(pattern, param):
            return re.sub(pattern, name, param, count=1)
    return param


@contextlib.contextmanager
def own_words(places: Sequence[Place]) -> Iterator[None]:
    """Errors of a body of chat completions speak of this API's: they name its parameters."""
    try:
        yield
    except (InputError, ContextOverflow) as error:
        param = http_error(error).param
        said = re.sub(
            r"part (\d+) of message (\d+)", lambda m: own_name(f"messages[{m[2]}].content[{m[1]}]", places), error.problem
        )
        said = re.sub(r"\bmessage (\d+)", lambda m: own_name(f"messages[{m[1]}]", places), said)
        if param is not None:
            name = own_name(param, places)
            said = re.sub(rf"(?<![\w.]){re.escape(param)}(?![\w.])", lambda _: name, said)
            setattr(error, "param", name)  # noqa: B010  (not all kinds declare it)
        error.problem = said
        error.args = (said, error.fix)
        raise


def as_chat(body: Mapping[str, Any], allow_unknown: bool = False) -> Form:
    """A body of ``/v1/responses`` as one of ``/v1/chat/completions``. Raises ParameterError."""
    given = {key: value for key, value in body.items() if value is not None}
    if "previous_response_id" in given or "conversation" in given:
        name = "previous_response_id" if "previous_response_id" in given else "conversation"
        raise ParameterError("no response is kept here to go on from", "send the whole conversation as input", param=name)
    left = Unknown(allow_unknown)
    left.check(given, KNOWN)
    made = {_RENAMED.get(key, key): value for key, value in given.items() if key in _KEPT or key in _RENAMED}
    _only(given, "background", (False,))
    _only(given, "truncation", ("disabled",))
    if not all(isinstance(value, str) for value in _typed(given, "metadata", dict, {}).values()):  # it comes back
        raise ParameterError("metadata holds what is no text", "give an object of texts", param="metadata")
    options = _typed(given, "stream_options", dict, {})
    left.check(options, ("include_obfuscation",), "stream_options")
    _only(options, "include_obfuscation", (False,), "stream_options.")
    turns = _turns(given, left)
    made["messages"] = turns.messages
    made["tools"] = [_tool(tool, index) for index, tool in enumerate(_typed(given, "tools", list, []))] or None
    reasoning, text = (_typed(given, name, dict, {}) for name in ("reasoning", "text"))
    left.check(reasoning, ("effort", "summary", "generate_summary"), "reasoning")
    left.check(text, ("format", "verbosity"), "text")
    for name in ("summary", "generate_summary"):  # what was thought is told whole, and no summary of it is made
        _only(reasoning, name, ("auto",), "reasoning.")
    _only(text, "verbosity", ("medium",), "text.")
    made |= {
        "tool_choice": _choice(given.get("tool_choice")),
        "reasoning_effort": reasoning.get("effort"),
        "response_format": _format(text.get("format")),
        **_logprobs(given),
    }
    return Form(made, turns.places, left.names)


def _only(given: Mapping[str, Any], name: str, values: Collection[Any], where: str = "") -> None:
    """Raises ParameterError for a value that cannot be kept to."""
    value = given.get(name)
    if value is not None and not any(type(value) is type(one) and value == one for one in values):
        fix = f"leave it out, or give {' or '.join(map(repr, values))}"
        raise ParameterError(f"{where}{name}={repr(value)[:80]} is not kept to", fix, param=where + name)


def _typed(given: Mapping[str, Any], name: str, kind: type, default: Any, where: str = "") -> Any:
    value = given.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        wanted = {dict: "an object", list: "a list", str: "a text"}[kind]
        raise ParameterError(f"{where}{name} is a {type(value).__name__}", f"give {wanted}", param=where + name)
    return value


def _logprobs(given: Mapping[str, Any]) -> dict[str, Any]:
    names = _typed(given, "include", list, [])
    for index, name in enumerate(names):
        if name != LOGPROBS:
            param = f"include[{index}]"
            raise ParameterError(
                f"{param}={repr(name)[:80]} cannot be included", f"leave it out, or give {LOGPROBS!r}", param=param
            )
    top = given.get("top_logprobs")
    return {"logprobs": True, "top_logprobs": top} if names or top is not None else {}


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


def _choice(choice: Any) -> Any:
    """``tool_choice`` as chat completions have it."""
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        return {"type": "allowed_tools", "mode": choice.get("mode"), "tools": [_choice(tool) for tool in choice["tools"]]}
    return {"type": "function", "function": {"name": choice["name"]}} if "name" in choice else choice


class _Turns:
    """Messages as they are made of items. What an assistant thought, said and called, one after another, is one message."""

    def __init__(self, left: Unknown) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: list[Place] = []
        self._left = left
        self._thought: list[str] = []
        """Of an assistant, before what it says."""

    def add(self, message: dict[str, Any], where: str, parts: Sequence[str] = ()) -> None:
        self.messages.append(message)
        self.places.append(Place(where, list(parts)))
        self._thought = []

    def item(self, item: Any, where: str) -> None:
        """Take in one item of ``input``. Raises ParameterError."""
        kind = item.get("type") or "message" if isinstance(item, Mapping) else type(item).__name__
        if kind == "reasoning":
            content = _typed(item, "content", list, [], f"{where}.")
            self._thought += [
                part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            ]
            return
        if not isinstance(kind, str) or kind not in _ITEM_KEYS:
            kinds = (*_ITEM_KEYS, "reasoning")
            raise ParameterError(f"{where} has the type {repr(kind)[:80]}", nearest(str(kind), kinds), param=where)
        self._left.check(item, _ITEM_KEYS[kind], where)
        if kind == "message":
            self._message(item, where)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            self._assistant(where).setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})
        else:
            content, parts = self._content(item.get("output"), f"{where}.output")
            self.add({"role": "tool", "tool_call_id": item.get("call_id"), "content": content}, where, parts)

    def _message(self, item: Mapping[str, Any], where: str) -> None:
        content, parts = self._content(item.get("content"), f"{where}.content")
        if item.get("role") != "assistant" or not (isinstance(content, str) or parts):
            self.add({"role": item.get("role"), "content": content}, where, parts)
            return
        message = self._assistant(where)
        said = [{"type": "text", "text": content}] if isinstance(content, str) else content
        message["content"] = [*(message["content"] or ()), *said]
        self.places[-1].parts.extend(parts or [f"{where}.content"])

    def _assistant(self, where: str) -> dict[str, Any]:
        """The message of the assistant whose turn it is."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            thought = self._thought
            self.add({"role": "assistant", "content": None}, where)
            self._thought = thought
        message = self.messages[-1]
        if self._thought:
            before = [message["reasoning_content"]] if "reasoning_content" in message else []
            message["reasoning_content"] = "\n\n".join((*before, *self._thought))
            self._thought = []
        return message

    def _content(self, content: Any, where: str) -> tuple[Any, list[str]]:
        """(content of a message, where each of its parts comes from)."""
        if not isinstance(content, list):
            return content, []
        paths = [f"{where}[{number}]" for number in range(len(content))]
        return [self._part(part, path) for part, path in zip(content, paths, strict=True)], paths

    def _part(self, part: Any, where: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(kind, str) or kind not in _PART_KEYS:
            raise ParameterError(f"{where} has the type {repr(kind)[:80]}", nearest(str(kind), _PART_KEYS), param=where)
        self._left.check(part, _PART_KEYS[kind], where)
        if kind == "refusal":
            return {"type": "refusal", "refusal": part.get("refusal")}
        if kind != "input_image":
            return {"type": "text", "text": part.get("text")}
        if part.get("file_id") is not None or not isinstance(part.get("image_url"), str):
            raise ParameterError(
                f"{where} has no image_url", "give an address or a data: URI; no files are kept here", param=where
            )
        return {"type": "image_url", "image_url": {"url": part["image_url"], "detail": part.get("detail")}}


def _turns(given: Mapping[str, Any], left: Unknown) -> _Turns:
    asked = given.get("input")
    if not isinstance(asked, str | list) or not asked:
        raise ParameterError("the request has no input", "give a text, or a list of messages", param="input")
    turns = _Turns(left)
    if instructions := _typed(given, "instructions", str, ""):
        turns.add({"role": "system", "content": instructions}, "instructions")
    if isinstance(asked, str):
        turns.add({"role": "user", "content": asked}, "input")
    for index, item in enumerate(asked if isinstance(asked, list) else ()):
        turns.item(item, f"input[{index}]")
    if not turns.messages:
        raise ParameterError("input holds nothing that is said", "give at least one message", param="input")
    return turns


class Items:
    """Output items as they grow, and the events that tell of it. Feed every delta once, then ``close``.

    ``ends``: tokens that end an answer, which no ``logprobs`` of a text have. ``reasoning``: say what is thought too.
    """

    def __init__(
        self,
        id: str,
        model: str,
        sampling: Sampling,
        body: Mapping[str, Any],
        ends: Collection[int] = (),
        token_bytes: TokenBytes | None = None,
        reasoning: bool = True,
    ) -> None:
        self.id, self._model, self._sampling, self._body = id, model, sampling, body
        self._ends, self._token_bytes, self._reasoning = ends, token_bytes, reasoning
        self._created = int(time.time())
        self._done: list[dict[str, Any]] = []
        self._open: tuple[str, list[str]] | None = None
        """Kind of the item that grows (message, reasoning or call), and its text or arguments."""
        self._name = ""
        """Of the call that grows."""
        self._found: list[dict[str, Any]] = []
        """Boxes and points in the message that grows."""
        self._logprobs: list[dict[str, Any]] = []
        """Of the message that grows."""
        self._waiting: list[Logprob] = []
        """Those of tokens whose text is still to come."""
        self._told = 0
        """Characters of earlier messages."""
        self._cut = False
        self._number = -1

    def opening(self) -> bytes:
        """The first events."""
        whole = self.object(None)
        return self._event("response.created", response=whole) + self._event("response.in_progress", response=whole)

    def feed(self, delta: Delta) -> bytes:
        """What ``delta`` adds."""
        said = b""
        calls = list(delta.tool_calls)
        while calls and not calls[0].name:  # the rest of a call goes before what follows it
            said += self._call(calls.pop(0))
        if delta.reasoning and self._reasoning:
            said += self._grow("reasoning", delta.reasoning)
        logprobs = self._logprobs_of(delta)
        if delta.text:
            said += self._grow("message", delta.text, logprobs)
        self._found += [annotation_to_openai(one, self._told) for one in delta.annotations]
        for call in calls:
            said += self._call(call)
        self._cut = delta.finish in ("length", "repetition")
        return said

    def close(self) -> bytes:
        """The item that grew is whole, or cut off."""
        return self._close("incomplete" if self._cut else "completed")

    def _close(self, status: str = "completed") -> bytes:
        if self._open is None:
            return b""
        kind, texts = self._open
        self._open = None
        if kind == "call":
            return self._end_call("".join(texts), status)
        item = self._item(kind, "".join(texts), status)
        more: dict[str, Any] = {}
        if kind == "message":
            item["content"][0]["logprobs"] = self._logprobs
            more = {"logprobs": [_short(one) for one in self._logprobs]}
            # Beside the part, whose own annotations OpenAI's schema keeps for citations.
            item |= {"annotations": self._found} if self._found else {}
            self._found, self._logprobs, self._told = [], [], self._told + len("".join(texts))
        at, part = self._at(item), item["content"][0]
        name = "output_text" if kind == "message" else "reasoning_text"
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
        body, sampling = self._body, self._sampling
        cut = output is not None and output.finish in ("length", "repetition")
        ended: dict[str, Any] = {}
        if output is not None:
            ended = {"usage": _usage([output]), **stop_reason_to_openai(output), **notes_to_openai([output])}
        return {
            "id": self.id, "object": "response", "created_at": self._created, "model": self._model,
            "status": "in_progress" if output is None else "incomplete" if cut else "completed", "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "background": False,
            "instructions": body.get("instructions"), "max_output_tokens": body.get("max_output_tokens"),
            "output": list(self._done), "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **(body.get("reasoning") or {})}, "store": False,
            "temperature": sampling.temperature if sampling.temperature <= 2 else None,  # OpenAI's schema ends at 2
            "text": {"format": {"type": "text"}, **(body.get("text") or {})},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": [{"parameters": None, "strict": None, **tool} for tool in body.get("tools") or ()],
            "top_logprobs": min(sampling.logprobs or 0, 20),  # where OpenAI's schema ends
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p, "truncation": "disabled",
            "metadata": body.get("metadata") or {}, **ended,
        }  # fmt: skip

    def _logprobs_of(self, delta: Delta) -> list[dict[str, Any]]:
        """Those of the tokens of ``delta.text``, with tokens before it that said nothing yet."""
        ended = delta.finish in ("stop", "tool_calls")
        self._waiting += [one for one in delta.logprobs if not (ended and one.token in self._ends)]
        if delta.text:
            found = logprobs_to_openai(self._waiting, self._token_bytes)["content"]
            self._waiting = []
            return found
        if delta.reasoning or delta.tool_calls or (self._open is not None and self._open[0] != "message"):
            self._waiting = []  # of what is no text, or of the tag that closes it
        return []

    def _grow(self, kind: str, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> bytes:
        said = b""
        if self._open is not None and self._open[0] != kind:
            said += self._close()
        if self._open is None:
            self._open = (kind, [])
            item = self._item(kind, "", "in_progress")
            at = self._at(item)
            said += self._event("response.output_item.added", output_index=at["output_index"], item=item | {"content": []})
            said += self._event("response.content_part.added", **at, content_index=0, part=item["content"][0])
        self._open[1].append(text)
        self._logprobs += logprobs
        name = "output_text" if kind == "message" else "reasoning_text"
        more = {"logprobs": [_short(one) for one in logprobs]} if kind == "message" else {}
        at = self._at(self._item(kind, "", ""))
        return said + self._event(f"response.{name}.delta", **at, content_index=0, delta=text, **more)

    def _call(self, call: ToolCall) -> bytes:
        """A call begins, or goes on."""
        said = b""
        if call.name:
            said += self._close()
            self._open, self._name = ("call", []), call.name
            item = self._call_item("", "in_progress")
            said += self._event("response.output_item.added", output_index=len(self._done), item=item)
        assert self._open is not None
        self._open[1].append(call.arguments)
        if not call.arguments:
            return said
        at = self._at(self._call_item("", ""))
        return said + self._event("response.function_call_arguments.delta", **at, delta=call.arguments)

    def _end_call(self, arguments: str, status: str) -> bytes:
        item = self._call_item(arguments, status)
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


def _short(one: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of logprobs as events have it."""
    top = [{"token": other["token"], "logprob": other["logprob"]} for other in one["top_logprobs"]]
    return {"token": one["token"], "logprob": one["logprob"], "top_logprobs": top}


def _usage(outputs: Sequence[Output]) -> dict[str, Any]:
    """As chat completions say it, under the names of this API."""
    told = usage_to_openai([output.usage for output in outputs])
    return {
        "input_tokens": told.pop("prompt_tokens"),
        "input_tokens_details": told.pop("prompt_tokens_details"),
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
