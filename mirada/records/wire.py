"""Chats as other programs write them (OpenAI's API, ``qwen-vl-utils``, ``keye-vl-utils``) -> Message.

One part of a content list may be ``{"type": "image", "image": ...}``, ``{"type": "image_url", "image_url": "..." | {"url":
"..."}}``, the same with ``video``, ``{"type": "text", "text": "..."}``, or any of these without ``type``. Options of a
picture or video stand beside it or, with ``{"url": ...}``, inside. A picture may have a ``uuid`` beside it (as in vLLM's API),
and one that was sent before may be null beside its own (``types.Image``). ``message_to_json`` is the way back.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mirada.errors import MediaUnsupported, MessageError, nearest
from mirada.types import Image, Message, Part, Text, ToolCall, Video, is_number

_SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_INTEGERS = (*_SIZES, "nframes", "min_frames", "max_frames", "total_pixels")
_NUMBERS = ("fps", "video_start", "video_end", "min_frame_similarity")
_OPTIONS: dict[type, tuple[str, ...]] = {Image: _SIZES, Video: _INTEGERS + _NUMBERS}
_SOURCES = {"image": Image, "image_url": Image, "video": Video, "video_url": Video}
_TYPES = ("text", "refusal", *_SOURCES)
_MESSAGE_KEYS = (
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "refusal", "annotations",
    "provider_specific_fields",
)  # fmt: skip
MOST_ID = 256
"""Characters of a picture's ``uuid``."""
_DETAILS = ("auto", "low", "high", "original")
LOW_DETAIL = 512 * 512
"""Most pixels of a picture whose ``detail`` is low, as OpenAI sizes those."""
Left = Callable[[str, str], None]
"""Called with where a key stands (in words) and its name, for keys that nobody knows."""
_PLACE = re.compile(r"part (\d+) of message (\d+)|message (\d+)")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def messages_from_openai(messages: Sequence[Mapping[str, Any]], left: Left | None = None) -> list[Message]:
    """A list of ``{"role": ..., "content": ...}`` -> messages; media stay references.

    Raises MessageError naming the message, the part and the key: unknown keys (and what they may have meant; with ``left``
    they are told and left aside), wrong types, parts of no or two kinds. A picture whose ``detail`` is low has at most
    ``LOW_DETAIL`` pixels; the other details are the model's own size. A refusal is what was said. ``name``, the
    ``annotations`` of an earlier answer, and what LiteLLM notes in one (``provider_specific_fields``) have no effect.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise MessageError(f"the messages are a {type(messages).__name__}", "give a list of objects with role and content")
    return [message_from_json(value, f"message {index}", left) for index, value in enumerate(messages)]


def param_of(words: str) -> str | None:
    """The parameter of which an error's words speak: ``messages[1].content[0]`` of "part 0 of message 1"."""
    match = _PLACE.search(words)
    if match is None:
        return None
    part, message, alone = match.groups()
    return f"messages[{message}].content[{part}]" if part else f"messages[{alone}]"


def message_from_json(value: Any, where: str = "the message", left: Left | None = None) -> Message:
    """One object -> message, as :func:`messages_from_openai`; ``where`` names it in errors."""
    if isinstance(value, Message):
        return value
    if not isinstance(value, Mapping):
        raise MessageError(f"{where} is a {type(value).__name__}", "give an object with role and content")
    _known(value, _MESSAGE_KEYS, where, left)
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise MessageError(f"{where} has the role {role!r}", f"use one of {', '.join(_ROLES)}")
    parts = _content(value.get("content"), where, left)
    refusal = value.get("refusal")
    if refusal is not None and (not isinstance(refusal, str) or role != "assistant"):
        raise MessageError(f"{where} has a refusal that is none", "give the text of an assistant's refusal")
    parts += [Text(refusal)] if refusal else []
    reasoning = value.get("reasoning_content") or value.get("reasoning") or ""
    calls = value.get("tool_calls") or []
    if (calls or reasoning) and role != "assistant":
        raise MessageError(f"{where} has tool_calls or reasoning, but the role {role!r}", "only an assistant's message may")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise MessageError(f"tool_calls of {where} are a {type(calls).__name__}", "give a list")
    if not isinstance(reasoning, str):
        raise MessageError(f"the reasoning of {where} is a {type(reasoning).__name__}", "give a string")
    call_id = value.get("tool_call_id")
    if call_id is not None and not isinstance(call_id, str):
        raise MessageError(f"tool_call_id of {where} is a {type(call_id).__name__}", "give a string")
    if value.get("content") is None and not calls and not reasoning and not refusal:
        raise MessageError(f"{where} has no content", "give a string or a list of parts")
    parts += [_call(call, f"tool call {index} of {where}", left) for index, call in enumerate(calls)]
    return Message(_ROLES[role], parts, reasoning, call_id)  # type: ignore[arg-type]


def _content(content: Any, where: str, left: Left | None) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [Text(content)]
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise MessageError(f"the content of {where} is a {type(content).__name__}", "give a string or a list of parts")
    return [_part(part, f"part {index} of {where}", left) for index, part in enumerate(content)]


def _part(part: Any, where: str, left: Left | None) -> Part:
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, Mapping):
        raise MessageError(
            f"{where} is a {type(part).__name__}", "give a string or an object such as {'type': 'text', 'text': ...}"
        )
    named = part.get("type")
    if named is not None and named not in _TYPES:
        raise MessageError(f"{where} has the type {named!r}", nearest(str(named), _TYPES))
    kinds = [kind for kind in _TYPES if kind in part]
    if not kinds:
        _known(part, ("type", *_TYPES), where)
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        raise MessageError(
            f"{where} must hold exactly one of {', '.join(_TYPES)}; it has {found}", "split it into several parts"
        )
    kind = kinds[0]
    if named is not None and named.removesuffix("_url") != kind.removesuffix("_url"):
        raise MessageError(f"{where} has the type {named!r} but holds {kind!r}", f"write the type {kind!r}")
    if kind in ("text", "refusal"):
        _known(part, ("type", kind, "cache_control"), where, left)
        if not isinstance(part[kind], str):
            raise MessageError(f"the text of {where} is a {type(part[kind]).__name__}", "give a string")
        return Text(part[kind])
    return _media(part, kind, where, left)


def _media(part: Mapping[str, Any], kind: str, where: str, left: Left | None) -> Image | Video:
    made = _SOURCES[kind]
    options = {key: value for key, value in part.items() if key not in ("type", kind, "cache_control")}
    source = part[kind]
    id = _id(options.pop("uuid", None), where) if made is Image else None
    if isinstance(source, Mapping):
        if "url" not in source and (id is None or source):
            raise MessageError(f"the {kind} of {where} has no url", "give {'url': '...'} or the address itself")
        options |= {key: value for key, value in source.items() if key != "url"}
        source = source.get("url")
    if (source is None and id is None) or (isinstance(source, str | bytes | list | tuple) and not source):
        raise MessageError(f"the {kind} of {where} is empty", "give a path, a URL, a data: URI or a picture")
    detail = options.pop("detail", None) if made is Image else None
    _known(options, _OPTIONS[made], where, left)
    given = ((key, value) for key, value in options.items() if value is not None and key in _OPTIONS[made])
    checked: dict[str, Any] = {key: _number(key, value, where) for key, value in given}
    if detail is not None and detail not in _DETAILS:
        raise MessageError(f"detail={repr(detail)[:80]} of {where} is unknown", f"use one of {', '.join(_DETAILS)}")
    if detail == "low" and not checked:
        checked["max_pixels"] = LOW_DETAIL
    if made is Video and "fps" in checked and "nframes" in checked:
        raise MessageError(f"{where} has both fps and nframes", "give one of them")
    return made(source, **checked) if id is None else Image(source, id=id, **checked)


def _id(given: Any, where: str) -> str | None:
    if given is not None and (not isinstance(given, str) or not 0 < len(given) <= MOST_ID):
        raise MessageError(f"uuid={repr(given)[:80]} of {where} is no name", f"give a string of 1 to {MOST_ID} characters")
    return given


def _number(key: str, value: Any, where: str) -> int | float:
    whole = key in _INTEGERS
    if not is_number(value) or (whole and value != int(value)) or value < 0 or (value == 0 and (whole or key == "fps")):
        wanted = "a positive whole number" if whole else "a positive number" if key == "fps" else "a number of at least 0"
        raise MessageError(f"{key}={repr(value)[:80]} of {where} is not {wanted}", f"give {wanted}")
    return int(value) if whole else float(value)


def _call(call: Any, where: str, left: Left | None) -> ToolCall:
    if not isinstance(call, Mapping):
        raise MessageError(f"{where} is a {type(call).__name__}", "give an object with function and id")
    _known(call, ("id", "type", "function", "index", "provider_specific_fields"), where, left)
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise MessageError(f"{where} names no function", "give {'function': {'name': ..., 'arguments': ...}}")
    _known(function, ("name", "arguments", "provider_specific_fields"), where, left)
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise MessageError(f"the arguments of {where} are no JSON: {error}", "give an object or JSON text") from error
    return ToolCall(function["name"], arguments, str(call.get("id") or ""))


def _known(value: Mapping[str, Any], keys: Sequence[str], where: str, left: Left | None = None) -> None:
    for key, item in value.items():
        if key not in keys and item is not None:  # clients dump their objects with many keys that hold null
            if left is not None:
                left(where, str(key))
                continue
            raise MessageError(f"{where} has the unknown key {key!r}", nearest(str(key), keys))


def message_to_json(message: Message, store: Callable[[bytes], str] | None = None) -> dict[str, Any]:
    """Message -> JSON value; ``message_from_json`` gives it back. ``store`` keeps bytes and names them (else data URIs)."""
    content: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
        elif isinstance(part, ToolCall):
            calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}})
        else:
            kind = "image" if isinstance(part, Image) else "video"
            options = {name: getattr(part, name) for name in _OPTIONS[type(part)] if getattr(part, name) is not None}
            named = {"uuid": part.id} if isinstance(part, Image) and part.id is not None else {}
            source = None if named and part.source is None else _source_to_json(part.source, store or _data_uri)
            content.append({"type": kind, kind: source, **options, **named})
    plain = len(content) == 1 and content[0]["type"] == "text"
    value: dict[str, Any] = {"role": message.role, "content": content[0]["text"] if plain else content}
    if calls:
        value["tool_calls"] = calls
    if message.reasoning:
        value["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    return value


def _source_to_json(source: Any, store: Callable[[bytes], str]) -> Any:
    if isinstance(source, bytes | bytearray | memoryview):
        return store(bytes(source))
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, list | tuple):
        return [_source_to_json(item, store) for item in source]
    raise MediaUnsupported(
        f"a medium that is a {type(source).__name__} cannot be kept in a record",
        "give its encoded bytes, or save it and give the path",
    )


def _data_uri(data: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode("ascii")
