"""A body of ``/v1/responses`` as one of chat completions, and errors in it under the names that its caller wrote."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mirada.errors import ContextOverflow, InputError, ParameterError, nearest
from mirada.records.request import HONOURED, LABELS, Unknown, wishes
from mirada.serve.errors import http_error

_RENAMED = {"max_output_tokens": "max_completion_tokens"}
_KEPT = (
    *(n for n in LABELS if n != "prediction"), "model", "stream", "temperature", "top_p", "parallel_tool_calls", "service_tier",
    "store", "prompt_cache_retention", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "stop", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "logit_bias", "ignore_eos", "max_repeats",
    "skip_special_tokens", "priority", "thinking", "thinking_budget", "include_reasoning", "fps", "nframes", "min_pixels",
    "max_pixels", "adapter", "chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar", "guided_whitespace_pattern", "guided_decoding_backend", "structured_outputs",
)  # fmt: skip
_OWN = (
    "input", "instructions", "tools", "tool_choice", "reasoning", "text", "truncation", "include", "background",
    "top_logprobs", "stream_options", "max_tool_calls",
)  # fmt: skip
KNOWN = (*_KEPT, *_OWN, *_RENAMED)
LOGPROBS = "message.output_text.logprobs"
INCLUDES = (
    LOGPROBS, "reasoning.encrypted_content", "message.input_image.image_url", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)  # fmt: skip
"""What ``include`` may name. But for the first, answers hold none of it: what was thought comes in clear, nothing is kept, and
there are no tools but the caller's."""
SUMMARIES = ("auto", "concise", "detailed")
TRUNCATIONS = ("disabled", "auto")
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
    "text": ("type", "text"),
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


def own_name(param: str, places: Sequence[Place]) -> str:
    """A parameter of chat completions as the caller of this API wrote it: ``input[2].content[0]``."""
    match = re.match(r"messages\[(\d{1,9})\](?:\.content\[(\d{1,9})\])?", param)
    if match and int(match[1]) < len(places):  # else it was read out of what the caller wrote, and is no place
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
            r"part (\d+) of message (\d+)", lambda m: _own_place(m, f"messages[{m[2]}].content[{m[1]}]", places), error.problem
        )
        said = re.sub(r"\bmessage (\d+)", lambda m: _own_place(m, f"messages[{m[1]}]", places), said)
        if param is not None:
            name = own_name(param, places)
            said = re.sub(rf"(?<![\w.]){re.escape(param)}(?![\w.])", lambda _: name, said)
            setattr(error, "param", name)  # noqa: B010  (not all kinds declare it)
        error.problem = said
        error.args = (said, error.fix)
        raise


def _own_place(said: re.Match[str], param: str, places: Sequence[Place]) -> str:
    """The words ``said`` of a message, as what the caller wrote at that place; as they are where there is none."""
    name = own_name(param, places)
    return said[0] if name == param else name


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
    _only(given, "truncation", TRUNCATIONS)
    most = given.get("max_tool_calls")  # of tools that a service runs itself: here there are none
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ParameterError(f"max_tool_calls={repr(most)[:80]} is no count", "leave it out", param="max_tool_calls")
    if not all(isinstance(value, str) for value in _typed(given, "metadata", dict, {}).values()):  # it comes back
        raise ParameterError("metadata holds what is no text", "give an object of texts", param="metadata")
    options = _typed(given, "stream_options", dict, {})
    left.check(options, ("include_obfuscation",), "stream_options")
    _only(options, "include_obfuscation", (False,), "stream_options.")
    turns = _turns(given, left)
    made["messages"] = turns.messages
    made["tools"] = [_tool(tool, index) for index, tool in enumerate(_typed(given, "tools", list, []))] or None
    reasoning, text = (_typed(given, name, dict, {}) for name in ("reasoning", "text"))
    left.check(reasoning, ("effort", "summary", "generate_summary", "context"), "reasoning")
    left.check(text, ("format", "verbosity"), "text")
    for name in ("summary", "generate_summary"):  # what was thought is told whole, and no summary of it is made
        _only(reasoning, name, SUMMARIES, "reasoning.")
    _only(reasoning, "context", ("auto", "all_turns"), "reasoning.")  # what is sent back is shown
    _only(text, "verbosity", HONOURED["verbosity"], "text.")
    left.names += [*wishes(given), *(f"text.{name}" for name in wishes(text))]
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
        if name not in INCLUDES:
            param = f"include[{index}]"
            raise ParameterError(
                f"{param}={repr(name)[:80]} cannot be included", f"leave it out, or give {LOGPROBS!r}", param=param
            )
    top = given.get("top_logprobs")
    return {"logprobs": True, "top_logprobs": top} if LOGPROBS in names or top is not None else {}


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
        self._thoughts: list[tuple[dict[str, Any], list[str]]] = []
        """Messages of assistants with what each thought, piece by piece."""

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
        message["content"] = message["content"] or []
        message["content"] += said  # in place: there may be very many
        self.places[-1].parts.extend(parts or [f"{where}.content"])

    def close(self) -> None:
        for message, thoughts in self._thoughts:
            message["reasoning_content"] = "\n\n".join(thoughts)

    def _assistant(self, where: str) -> dict[str, Any]:
        """The message of the assistant whose turn it is."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant" or not isinstance(last["content"], list | None):
            thought = self._thought
            self.add({"role": "assistant", "content": None}, where)
            self._thought = thought
        message = self.messages[-1]
        if self._thought:
            if not self._thoughts or self._thoughts[-1][0] is not message:
                self._thoughts.append((message, []))
            self._thoughts[-1][1].extend(self._thought)
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
    turns.close()
    if not turns.messages:
        raise ParameterError("input holds nothing that is said", "give at least one message", param="input")
    return turns
