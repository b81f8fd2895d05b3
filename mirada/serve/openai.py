"""OpenAI's chat completions on the wire, and our types; nothing else. Whole bodies are read and written by room ``records``.

A streamed tool call begins with a chunk that holds its name; chunks with its arguments follow as these are written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mirada.errors import ParameterError, nearest
from mirada.records.answer import (
    TokenBytes,
    annotation_to_openai,
    call_to_openai,
    finish_to_openai,
    logprobs_to_openai,
    stop_reason_to_openai,
    usage_to_openai,
)
from mirada.serve.errors import HttpError
from mirada.types import Delta, Message, Output, ToolCall

DONE = b"data: [DONE]\n\n"
MOST_DEPTH = 64
"""Objects and lists inside one another. What looks into them, schemas of tools above all, does so by recursion."""
MOST_DIGITS = 24
TOO_LARGE = object()
"""Stands for a number that is none of ours until the parameter that holds it is found."""


def read_json(data: bytes) -> dict[str, Any]:
    """A body as an object; HttpError 400 for anything else, for numbers that JSON does not know or that are beyond 64 bits (it
    names the parameter that holds one), for what is nested deeper than ``MOST_DEPTH``, and for a key given twice."""
    try:
        value = json.loads(
            data, parse_constant=_no_constant, object_pairs_hook=_no_key_twice, parse_int=_whole, parse_float=_fraction
        )
    except ValueError as error:
        raise HttpError(400, f"the body is not valid JSON: {error}", code="not_json") from error
    except RecursionError as error:
        raise HttpError(400, "the body is nested too deeply", code="not_json") from error
    if not isinstance(value, dict):
        raise HttpError(400, f"the body is a JSON {type(value).__name__}; send an object", code="not_json")
    for name, one in value.items():
        _check(name, one)
    return value


def _check(name: str, value: Any) -> None:
    """Raises ParameterError unless parameter ``name`` holds numbers that can be, no deeper than may be."""
    level = [value]
    for _ in range(MOST_DEPTH):
        if TOO_LARGE in level:
            raise ParameterError(f"{name} holds a number that is too large", "give one of at most 64 bits", param=name)
        lists = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [inner for inners in lists for inner in inners]
        if not level:
            return
    raise ParameterError(f"{name} is nested more than {MOST_DEPTH} deep", "send something flatter", param=name)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _whole(digits: str) -> Any:
    return int(digits) if len(digits) < MOST_DIGITS and -(1 << 63) <= int(digits) < 1 << 64 else TOO_LARGE


def _fraction(digits: str) -> Any:
    value = float(digits)
    return value if math.isfinite(value) else TOO_LARGE


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is given twice")
    return made


def with_ids(output: Output, base: str, index: int) -> Output:
    """``output`` whose tool calls have names that no other reply of this server uses; a stream makes the same ones."""
    if not output.message.tool_calls:
        return output
    numbers = iter(range(len(output.message.tool_calls)))
    parts = [replace(p, id=call_id(base, index, next(numbers))) if isinstance(p, ToolCall) else p for p in output.message.parts]
    return replace(output, message=Message("assistant", parts, reasoning=output.message.reasoning))


def call_id(base: str, index: int, number: int) -> str:
    """Name of tool call ``number`` of choice ``index`` of the reply ``base``."""
    return f"call_{base.rpartition('-')[2]}_{index}_{number}"


@dataclass
class Chunks:
    """Makes the ``chat.completion.chunk`` objects of one reply."""

    id: str
    created: int
    model: str
    include_usage: bool = False
    logprobs: bool = False
    token_bytes: TokenBytes | None = None
    return_token_ids: bool = False
    reasoning: bool = True
    """Say what is thought too."""
    usages: bool = False
    """Say in every chunk what was used so far (``continuous_usage_stats``)."""
    tier: Mapping[str, str] = field(default_factory=dict)
    """``tier_of`` the request."""

    def __post_init__(self) -> None:
        self._num_calls: dict[int, int] = {}
        self._num_tokens: dict[int, int] = {}
        self.num_prompt = 0
        """Tokens of the prompt, once they are known; ``usages`` says them."""

    def opening(self, index: int) -> dict[str, Any]:
        """The first of choice ``index``: who speaks."""
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def pieces(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """What ``delta`` adds to choice ``index``; nothing for one that holds nothing to show yet."""
        self._num_tokens[index] = self._num_tokens.get(index, 0) + len(delta.tokens)
        said: dict[str, Any] = {}
        if delta.reasoning and self.reasoning:
            said["reasoning_content"] = delta.reasoning
        if delta.text:
            said["content"] = delta.text
        if delta.tool_calls:
            said["tool_calls"] = [self._call(index, call) for call in delta.tool_calls]
        beside: dict[str, Any] = {}
        if self.logprobs and delta.logprobs:
            beside["logprobs"] = logprobs_to_openai(delta.logprobs, self.token_bytes)
        if self.return_token_ids and delta.tokens:
            beside["token_ids"] = list(delta.tokens)
        if delta.annotations:
            beside["annotations"] = [annotation_to_openai(one) for one in delta.annotations]
        if said or beside:
            yield self._chunk(index, said, **beside)
        if delta.finish is not None:
            ended = self._chunk(index, {}, finish_reason=finish_to_openai(delta.finish), **stop_reason_to_openai(delta))
            yield ended | ({"notes": list(delta.notes)} if delta.notes and not index else {})

    def usage(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The last one where ``include_usage`` is set."""
        return self._head() | {"choices": [], "usage": usage_to_openai([output.usage for output in outputs])}

    def _call(self, index: int, call: ToolCall) -> dict[str, Any]:
        if not call.name:  # more of the arguments of the last one
            return {"index": self._num_calls[index] - 1, "function": {"arguments": call.arguments}}
        number = self._num_calls.get(index, 0)
        self._num_calls[index] = number + 1
        return {"index": number, **call_to_openai(replace(call, id=call_id(self.id, index, number)), number)}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model, **self.tier}

    def _chunk(self, index: int, delta: dict[str, Any], **beside: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **beside}
        return self._head() | {"choices": [choice]} | ({"usage": self._so_far()} if self.include_usage or self.usages else {})

    def _so_far(self) -> dict[str, int] | None:
        if not self.usages:
            return None
        completion = sum(self._num_tokens.values())
        total = self.num_prompt + completion
        return {"prompt_tokens": self.num_prompt, "completion_tokens": completion, "total_tokens": total}


def tier_of(body: Mapping[str, Any]) -> dict[str, str]:
    """What an answer says of ``service_tier``, where the request does: there is one for all."""
    return {"service_tier": "default"} if body.get("service_tier") is not None else {}


def model_card(name: str, created: int, context: int, adapters: Sequence[str]) -> dict[str, Any]:
    """One entry of ``/v1/models``; context and adapters are said beside OpenAI's fields, as vLLM does."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "mirada", "max_model_len": context}
    return card | {"adapters": list(adapters)}


def check_model_name(body: Mapping[str, Any], names: Sequence[str]) -> str:
    """Which model a body asks for. Raises ParameterError, or HttpError 404 for one that is not here."""
    name = body.get("model")
    if not isinstance(name, str):
        raise ParameterError("the request names no model", f"give model, one of {', '.join(names)}", param="model")
    if name not in names:
        raise no_model(name, names)
    return name


def no_model(name: str, names: Sequence[str]) -> HttpError:
    shown = name if len(name) <= 80 else name[:79] + "…"
    return HttpError(
        404, f"the model {shown!r} is not served here; {nearest(shown, names)}", param="model", code="model_not_found"
    )
