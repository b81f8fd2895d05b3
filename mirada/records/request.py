"""Bodies of OpenAI's ``/v1/chat/completions`` -> types, with what users of vLLM send beside it; ``answer`` is the way back.

The one reader of such bodies, for the server and for batches. Facts: OpenAI's API reference
(``CreateChatCompletionRequest``) and vLLM's OpenAI-compatible server (``SamplingParams`` beside OpenAI's fields,
``guided_*``, ``structured_outputs``, ``chat_template_kwargs``, ``mm_processor_kwargs``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from mirada.errors import MessageError, ParameterError, SettingsError, nearest
from mirada.records.wire import messages_from_openai, param_of
from mirada.types import FORMS, Image, Message, Sampling, Thinking, Video, is_number

MOST_CHOICES = 128
"""Most answers to one request (``n``), as OpenAI's."""
MOST_NAME = 200
"""Characters of an unknown parameter that are told."""

_SAMPLING = {field.name for field in fields(Sampling)} - {"logprobs", "max_tokens", *FORMS}
_MEDIA = ("fps", "nframes", "min_pixels", "max_pixels")
# Names inside `mm_processor_kwargs` and `media_io_kwargs.video` -> settings of pictures and videos.
_PROCESSOR = {**{name: name for name in (*_MEDIA, "min_frames", "max_frames", "total_pixels")}, "num_frames": "nframes"}
_IO = {"fps": "fps", "num_frames": "nframes"}
# Parameter -> setting of Sampling.
_GUIDES = {"guided_json": "json_schema", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_STRUCTURED = {"json": "json_schema", "json_object": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
_SPACES = ("whitespace_pattern", "disable_any_whitespace")
_OBJECT = {"type": "object"}
"""The schema of any JSON object."""
_OWN = (
    "messages", "model", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs",
    "response_format", "structured_outputs", "guided_whitespace_pattern", "tools", "tool_choice", "parallel_tool_calls",
    "thinking", "reasoning_effort", "include_reasoning", "adapter", "chat_template_kwargs", "mm_processor_kwargs",
    "media_io_kwargs", "return_token_ids", "request_id",
)  # fmt: skip
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prediction")
"""Known, and of no effect on an answer: names that a caller gives to its requests, for services that keep them, and hints that
speed up a service and change nothing of what it says."""
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
HONOURED: dict[str, tuple[Any, ...]] = {
    "store": (False, True),  # nothing is kept, and a response says so
    "service_tier": ("auto", "default", "flex", "scale", "priority"),  # there is one, and the answer names it
    "prompt_cache_retention": ("in_memory", "in-memory", "24h"),  # at most so long
    "verbosity": ("low", "medium", "high"),
    "modalities": (["text"],),
    "priority": (0,),
    "skip_special_tokens": (True,),
    "guided_decoding_backend": ("auto", "guidance", "llguidance"),
}
"""Parameters of which these values alone are taken; any other is an error."""
TOLD: dict[str, tuple[Any, ...]] = {"verbosity": ("low", "high"), "truncation": ("auto",)}
"""Wishes that programs send as a matter of course and that cannot be kept to: the answer comes, and ``unknown`` names them."""
KNOWN = frozenset((*_OWN, *LABELS, *HONOURED, *_SAMPLING, *_MEDIA, *_GUIDES))
"""Every parameter that is understood."""

_TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "an object", list: "a list"}


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a body asks for beside messages and sampling."""

    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    """``stream_options.include_usage``."""
    continuous_usage: bool = False
    """``stream_options.continuous_usage_stats``."""
    n: int = 1
    thinking: Thinking = "auto"
    thinking_param: str | None = None
    """The parameter that says so."""
    include_reasoning: bool = True
    """Whether the answer is to say what was thought."""
    adapter: str | None = None
    form_param: str | None = None
    """The parameter that says what the answer must look like; sampling has what it says."""
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: Literal["auto", "none", "required", "named"] = "auto"
    tool_name: str | None = None
    """The function that must be called, where ``tool_choice`` is ``named``."""
    parallel_tool_calls: bool = True
    return_token_ids: bool = False
    request_id: str | None = None
    """What the answer's ``id`` ends with."""
    unknown: tuple[str, ...] = ()
    """Parameters that were left aside: not understood, where that is allowed, and wishes (``TOLD``)."""


class ChatRequest(NamedTuple):
    messages: list[Message]
    sampling: Sampling
    options: RequestOptions


def request_from_openai(
    body: Mapping[str, Any], *, defaults: Sampling | None = None, allow_unknown: bool = False
) -> ChatRequest:
    """A body of ``/v1/chat/completions`` -> (messages, sampling, options). ``null`` is as good as absent.

    ``defaults``: sampling where the body says nothing. ``fps``, ``nframes``, ``min_pixels``, ``max_pixels`` (also inside
    ``mm_processor_kwargs``) become settings of every picture and video that has none of its own. ``allow_unknown`` collects
    unknown parameters in ``options.unknown``. Raises ParameterError naming the parameter, or MessageError.
    """
    if not isinstance(body, Mapping):
        raise MessageError(f"the request is a {type(body).__name__}", "send a JSON object")
    given = {str(key): value for key, value in body.items() if value is not None}
    left = Unknown(allow_unknown)
    left.check(given, KNOWN)
    _check_honoured(given)
    left.names += wishes(given)
    if "messages" not in given:
        raise ParameterError("the request has no messages", "give a list of objects with role and content", param="messages")
    messages = messages_from_openai(given["messages"], left.key if allow_unknown else None)
    if not messages:
        raise ParameterError("the list of messages is empty", "give at least one", param="messages")
    tools = _tools(given)
    tool_choice, tool_name, allowed = _tool_choice(given)
    form = _form(given, left)
    streamed = _stream_options(given, left)
    thinking, thinking_param = _thinking(given, left)
    options = RequestOptions(
        model=_take(given, "model", str),
        stream=_take(given, "stream", bool, False),
        include_usage=_take(streamed, "include_usage", bool, False, "stream_options."),
        continuous_usage=_take(streamed, "continuous_usage_stats", bool, False, "stream_options."),
        n=_count(given),
        thinking=thinking,
        thinking_param=thinking_param,
        include_reasoning=_take(given, "include_reasoning", bool, True),
        adapter=_take(given, "adapter", str),
        form_param=form and form.param,
        tools=_only_tools(tools, allowed),
        tool_choice=tool_choice,
        tool_name=tool_name,
        parallel_tool_calls=_take(given, "parallel_tool_calls", bool, True),
        return_token_ids=_take(given, "return_token_ids", bool, False),
        request_id=_request_id(given),
    )
    _check_tool_name(options)
    if form is not None and tool_choice in ("required", "named"):
        raise ParameterError(
            f"{form.param} and tool_choice both say what the answer must be", "give one of them", param="tool_choice"
        )
    sampling = _sampling(given, defaults or Sampling())
    if form is not None:
        sampling = _set(replace(sampling, **dict.fromkeys(FORMS)), form.setting, form.value, form.param)
    messages = _with_media_settings(messages, given, left)
    return ChatRequest(messages, sampling, replace(options, unknown=tuple(left.names)))


class Unknown:
    """What a body says that nobody knows: an error that names it, or (``allowed``) one of ``names``."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.names: list[str] = []

    def check(self, value: Mapping[str, Any], known: Collection[str], param: str = "") -> None:
        """Look at the keys of ``value``, which is what parameter ``param`` holds. Raises ParameterError."""
        for key, item in value.items():
            if key not in known and item is not None:
                path = f"{param}.{str(key)[:MOST_NAME]}" if param else str(key)[:MOST_NAME]
                if not self.allowed:
                    raise ParameterError(f"the parameter {path!r} is unknown", nearest(str(key), known), param=path)
                self.names.append(path)

    def key(self, where: str, key: str) -> None:
        """Note one of a message or of a part (``where``, in words)."""
        self.names.append(f"{param_of(where) or 'messages'}.{key}")


def _check_honoured(given: Mapping[str, Any]) -> None:
    for name, values in HONOURED.items():
        value = given.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            raise _wrong(name, value, " or ".join(map(json.dumps, values)) + ", or leave it out: nothing else can be kept to")


def wishes(given: Mapping[str, Any]) -> list[str]:
    """Which of ``TOLD`` a body has."""
    return [name for name, values in TOLD.items() if given.get(name) in values]


def _request_id(given: Mapping[str, Any]) -> str | None:
    name = _take(given, "request_id", str)
    if name is not None and not re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", name):
        raise _wrong("request_id", name, "1 to 128 letters, digits and . _ : -")
    return name


def _take(given: Mapping[str, Any], name: str, kind: type, default: Any = None, where: str = "") -> Any:
    """``given[name]`` if it is a ``kind``; ParameterError otherwise."""
    value = given.get(name)
    if value is None:
        return default
    kinds = {dict: Mapping, list: list | tuple, float: int | float}.get(kind, kind)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(where + name, value, _TYPE_WORDS[kind])
    return value


def _wrong(param: str, value: Any, wanted: str) -> ParameterError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:79] + "…"
    return ParameterError(f"{param}={shown} does not do", f"give {wanted}", param=param)


def _count(given: Mapping[str, Any]) -> int:
    n = _take(given, "n", int, 1)
    if not 1 <= n <= MOST_CHOICES:
        raise _wrong("n", n, f"a number from 1 to {MOST_CHOICES}")
    return n


def _stream_options(given: Mapping[str, Any], left: Unknown) -> Mapping[str, Any]:
    options = _take(given, "stream_options", dict, {})
    if options and given.get("stream") is not True:
        raise ParameterError("stream_options is for a stream", "set stream, or leave it out", param="stream_options")
    left.check(options, ("include_usage", "include_obfuscation", "continuous_usage_stats"), "stream_options")
    if _take(options, "include_obfuscation", bool, False, "stream_options."):
        raise _wrong("stream_options.include_obfuscation", True, "false: streams are not obfuscated")
    return options


def _sampling(given: Mapping[str, Any], sampling: Sampling) -> Sampling:
    values: dict[str, Any] = {name: given[name] for name in given if name in _SAMPLING}
    if values.get("max_repeats") == 0 and not isinstance(values["max_repeats"], bool):
        values["max_repeats"] = None
    if values.get("top_k") in (0, -1) and not isinstance(values["top_k"], bool):
        values["top_k"] = None  # vLLM's words for off
    if "logit_bias" in values:
        values["logit_bias"] = _bias(values["logit_bias"])
    for name in ("max_tokens", "max_completion_tokens"):  # the newer name wins, as at OpenAI
        if name in given:
            sampling = _set(sampling, "max_tokens", given[name], name)
    for name, value in values.items():
        sampling = _set(sampling, name, value, name)
    top = _take(given, "top_logprobs", int)
    if _take(given, "logprobs", bool, False):
        return _set(sampling, "logprobs", top or 0, "top_logprobs")
    if top:
        raise ParameterError("top_logprobs needs logprobs", "set logprobs to true", param="top_logprobs")
    return sampling


def _set(sampling: Sampling, name: str, value: Any, param: str) -> Sampling:
    try:
        return replace(sampling, **{name: value})
    except SettingsError as error:
        raise ParameterError(
            error.problem.replace("sampling setting ", "").replace(name, param), error.fix, param=param
        ) from error


def _bias(value: Any) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in value.items()}
    except (AttributeError, TypeError, ValueError):
        raise _wrong("logit_bias", value, "an object of token ids and numbers") from None


def _thinking(given: Mapping[str, Any], left: Unknown) -> tuple[Thinking, str | None]:
    """How to think, and the parameter that says so."""
    kwargs = _take(given, "chat_template_kwargs", dict, {})
    left.check(kwargs, ("enable_thinking", "thinking"), "chat_template_kwargs")
    effort = _take(given, "reasoning_effort", str)
    if effort not in (None, *EFFORTS):
        raise _wrong("reasoning_effort", effort, f"{', '.join(EFFORTS[:-1])} or {EFFORTS[-1]}")
    enable = _take(kwargs, "enable_thinking", bool, None, "chat_template_kwargs.")
    said: Thinking = "auto"
    by: str | None = None
    if effort is not None:
        said, by = "off" if effort == "none" else "on", "reasoning_effort"
    if enable is not None:
        said, by = "on" if enable else "off", "chat_template_kwargs.enable_thinking"
    for param, value in (("chat_template_kwargs.thinking", kwargs.get("thinking")), ("thinking", given.get("thinking"))):
        if isinstance(value, bool):
            said, by = "on" if value else "off", param
        elif value in ("auto", "on", "off"):
            said, by = value, param
        elif value is not None:
            raise _wrong(param, value, "auto, on or off")
    return said, by


class _Form(NamedTuple):
    """What an answer must look like: a setting of Sampling, and the parameter that says so."""

    setting: str
    value: Any
    param: str


def _form(given: Mapping[str, Any], left: Unknown) -> _Form | None:
    """The one form that is asked for; two are an error."""
    found = [_made_form(setting, given[name], name) for name, setting in _GUIDES.items() if name in given]
    outputs = _take(given, "structured_outputs", dict, {})
    left.check(outputs, (*_STRUCTURED, *_SPACES), "structured_outputs")
    for name, setting in _STRUCTURED.items():
        param = f"structured_outputs.{name}"
        value = outputs.get(name)
        if name == "json_object":
            value = _OBJECT if _take(outputs, name, bool, False, "structured_outputs.") else None
        if value is not None:
            found.append(_spaced(_made_form(setting, value, param), outputs))
    found += _response_format(_take(given, "response_format", dict))
    if len(found) > 1:
        said = " and ".join(form.param for form in found)
        raise ParameterError(f"{said} ask for two forms", "give one of them", param=found[1].param)
    pattern = _take(given, "guided_whitespace_pattern", str)
    if pattern is None:
        return found[0] if found else None
    if not found or found[0].setting != "json_schema":
        raise ParameterError(
            "guided_whitespace_pattern is for an answer in JSON", "give guided_json, or leave it out",
            param="guided_whitespace_pattern",
        )  # fmt: skip
    return _spaced(found[0], {"whitespace_pattern": pattern})


def _made_form(setting: str, value: Any, param: str) -> _Form:
    if setting == "json_schema":
        return _Form(setting, _schema(value, param), param)
    if setting == "choice":
        if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) and one for one in value):
            raise _wrong(param, value, "a list of at least one non-empty text")
        return _Form(setting, tuple(value), param)
    if not isinstance(value, str) or not value:
        raise _wrong(param, value, "a non-empty text")
    return _Form(setting, value, param)


def _spaced(form: _Form, outputs: Mapping[str, Any]) -> _Form:
    """With what ``structured_outputs`` says of white space in JSON."""
    pattern = _take(outputs, "whitespace_pattern", str, None, "structured_outputs.")
    tight = _take(outputs, "disable_any_whitespace", bool, False, "structured_outputs.")
    if form.setting != "json_schema" or form.value is False or (pattern is None and not tight):
        return form
    own = {"whitespace_flexible": False} if tight else {"whitespace_pattern": pattern}
    return form._replace(value={**({} if form.value is True else form.value), "x-guidance": own})


def _schema(value: Any, param: str) -> Any:
    if isinstance(value, str):  # vLLM takes the schema as text too
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ParameterError(f"{param} is not JSON: {error}", "give a JSON schema", param=param) from error
    if not isinstance(value, Mapping | bool):
        raise _wrong(param, value, "a JSON schema: an object")
    return value


def _response_format(form: Mapping[str, Any] | None) -> list[_Form]:
    kind = "text" if form is None else form.get("type")
    if form is None or kind == "text":
        return []
    if kind == "json_object":
        return [_Form("json_schema", _OBJECT, "response_format")]
    if kind != "json_schema":
        raise _wrong("response_format.type", kind, "text, json_object or json_schema")
    inner = _take(form, "json_schema", dict, {}, "response_format.")
    if not isinstance(inner.get("schema"), Mapping | bool):
        raise _wrong("response_format.json_schema.schema", inner.get("schema"), "a JSON schema: an object")
    return [_Form("json_schema", inner["schema"], "response_format")]


def _tools(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = _take(given, "tools", list, [])
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            raise _wrong(where, tool, 'an object such as {"type": "function", "function": {"name": ..., "parameters": {...}}}')
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise _wrong(f"{where}.function", function, 'an object such as {"name": ..., "parameters": {...}}')
        _take(function, "parameters", dict, None, f"{where}.function.")
        _take(function, "description", str, None, f"{where}.function.")
    return tuple(tools)


def _tool_choice(given: Mapping[str, Any]) -> tuple[Any, str | None, tuple[str, ...] | None]:
    """(mode, the function that must be called, the functions that may be called: None for all)."""
    choice = given.get("tool_choice", "auto")
    if choice in ("auto", "none", "required"):
        return choice, None, None
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        inner = _take(choice, "allowed_tools", dict, choice, "tool_choice.")
        mode, allowed = inner.get("mode"), _take(inner, "tools", list, [], "tool_choice.")
        names = tuple(name for tool in allowed if (name := _function_name(tool)) is not None)
        if mode not in ("auto", "required") or not names or len(names) < len(allowed):
            raise _wrong("tool_choice", choice, "mode (auto or required), and in tools the names of functions")
        return mode, None, names
    name = _function_name(choice)
    if name is None:
        raise _wrong("tool_choice", choice, 'auto, none, required or {"type": "function", "function": {"name": ...}}')
    return "named", name, None


def _function_name(choice: Any) -> str | None:
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _only_tools(tools: tuple[Mapping[str, Any], ...], allowed: tuple[str, ...] | None) -> tuple[Mapping[str, Any], ...]:
    """The tools that may be called: the model is told of no others. Raises ParameterError."""
    if allowed is None:
        return tools
    names, chosen = {tool["function"]["name"] for tool in tools}, set(allowed)
    for name in allowed:
        if name not in names:
            raise ParameterError(f"tool_choice names {name!r}, which is no tool", nearest(name, names), param="tool_choice")
    return tuple(tool for tool in tools if tool["function"]["name"] in chosen)


def _check_tool_name(options: RequestOptions) -> None:
    names = [tool["function"]["name"] for tool in options.tools]
    if options.tool_choice == "required" and not names:
        raise ParameterError("tool_choice asks for a call, and there are no tools", "give tools", param="tool_choice")
    if options.tool_name is not None and options.tool_name not in names:
        raise ParameterError(
            f"tool_choice names {options.tool_name!r}, which is no tool", nearest(options.tool_name, names), param="tool_choice"
        )


def _with_media_settings(messages: list[Message], given: Mapping[str, Any], left: Unknown) -> list[Message]:
    kwargs, io = _take(given, "mm_processor_kwargs", dict, {}), _take(given, "media_io_kwargs", dict, {})
    left.check(io, ("video",), "media_io_kwargs")
    video = _take(io, "video", dict, {}, "media_io_kwargs.")
    checked: dict[str, int | float] = {}  # of the same setting said twice, the last counts
    for known, value, where in (
        (_IO, video, "media_io_kwargs.video"), (_PROCESSOR, kwargs, "mm_processor_kwargs"), ({m: m for m in _MEDIA}, given, ""),
    ):  # fmt: skip
        if where:
            left.check(value, known, where)
        for name, setting in known.items():
            if value.get(name) is not None:
                checked[setting] = _media_number(f"{where}.{name}" if where else name, value[name])
    if "fps" in checked and "nframes" in checked:
        raise ParameterError("both fps and nframes are given", "give one of them", param="nframes")
    if not checked:
        return messages

    def part(one: Any) -> Any:
        if not isinstance(one, Image | Video):
            return one
        has_rate = isinstance(one, Video) and (one.fps is not None or one.nframes is not None)
        new = {
            name: value
            for name, value in checked.items()
            if getattr(one, name, 0) is None and not (has_rate and name in ("fps", "nframes"))
        }
        return replace(one, **new)

    return [Message(m.role, tuple(map(part, m.parts)), m.reasoning, m.tool_call_id) for m in messages]


def _media_number(param: str, value: Any) -> int | float:
    whole = not param.endswith("fps")
    number = is_number(value) and value > 0
    if not number or (whole and value != int(value)):
        raise _wrong(param, value, "a positive whole number" if whole else "a positive number")
    return int(value) if whole else float(value)
