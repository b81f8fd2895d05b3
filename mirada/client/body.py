"""A chat and its settings as the body of ``/v1/chat/completions``; media inside, as ``data:`` URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from mirada.errors import MediaUnsupported, MessageError
from mirada.media.fetch import fetch
from mirada.media.limits import FetchLimits
from mirada.records.wire import message_from_json, message_to_json
from mirada.types import Chat, Image, Message, Prompt, Sampling, Text, Thinking, Video

Tools = Sequence[Mapping[str, Any]]
_WEB = re.compile(r"https?://", re.IGNORECASE)
_DATA = re.compile(r"data:", re.IGNORECASE)
_DEFAULTS = Sampling()
_PLAIN = (
    "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "ignore_eos",
    "max_repeats", "thinking_budget", "min_tokens", "include_stop_str_in_output",
)  # fmt: skip
_MAGIC = (
    (0, b"\x89PNG", "image/png"), (0, b"\xff\xd8\xff", "image/jpeg"), (0, b"GIF8", "image/gif"), (8, b"WEBP", "image/webp"),
    (0, b"BM", "image/bmp"), (0, b"II*\x00", "image/tiff"), (0, b"MM\x00*", "image/tiff"), (4, b"ftypavif", "image/avif"),
    (4, b"ftypheic", "image/heic"), (4, b"ftypmif1", "image/heif"), (4, b"ftypqt", "video/quicktime"),
    (4, b"ftyp", "video/mp4"), (0, b"\x1a\x45\xdf\xa3", "video/webm"), (8, b"AVI ", "video/x-msvideo"),
    (0, b"OggS", "video/ogg"), (0, b"\x00\x00\x01\xba", "video/mpeg"),
)  # fmt: skip


def chat_to_body(chat: Chat | Prompt, limits: FetchLimits, inline: bool = False) -> list[dict[str, Any]]:
    """``messages`` of a body. Files, bytes, pictures and arrays become ``data:`` URIs; addresses stay addresses unless
    ``inline``: then they are fetched here, within ``limits``. Raises MessageError, MediaError."""
    if isinstance(chat, Prompt):
        raise MessageError("a server takes messages, and a rendered prompt is given", "give a list of Message")
    if isinstance(chat, str | bytes | Message | Mapping) or not isinstance(chat, Sequence) or not chat:
        raise MessageError("a chat is a list of at least one message", 'give a list: [Message("user", ...)]')
    messages = [message_from_json(value, f"message {index}") for index, value in enumerate(chat)]
    return [_message(message, limits, inline) for message in messages]


def sampling_to_body(sampling: Sampling) -> dict[str, Any]:
    """The fields of a body. ``max_tokens`` and ``temperature`` always, since servers have other defaults; the rest only
    where it is not Mirada's default, since OpenAI refuses what it does not know (``top_k``, ``min_p`` ...)."""
    body: dict[str, Any] = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
    for name in _PLAIN:
        value = getattr(sampling, name)
        if value != getattr(_DEFAULTS, name):
            body[name] = 0 if value is None else value  # 0: off, for `max_repeats`, which alone is not off by default
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        body["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    if sampling.json_schema is not None:
        named = {"name": "answer", "schema": sampling.json_schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    elif sampling.form is not None:  # as vLLM's users say it
        value = getattr(sampling, sampling.form)
        body["structured_outputs"] = {sampling.form: list(value) if sampling.form == "choice" else value}
    return body


def options_to_body(thinking: Thinking, tools: Tools | None, adapter: str | None) -> dict[str, Any]:
    """``thinking`` as users of vLLM send it, tools, and the name of an adapter."""
    body: dict[str, Any] = {}
    if thinking != "auto":
        body["chat_template_kwargs"] = {"enable_thinking": thinking == "on"}
    if tools:
        body["tools"] = [dict(tool) for tool in tools]
    if adapter is not None:
        body["adapter"] = adapter
    return body


def _message(message: Message, limits: FetchLimits, inline: bool) -> dict[str, Any]:
    words = [part for part in message.parts if not isinstance(part, Image | Video)]
    made = message_to_json(Message(message.role, words, message.reasoning, message.tool_call_id))
    if len(words) < len(message.parts):
        made["content"] = [_part(part, limits, inline) for part in message.parts if isinstance(part, Text | Image | Video)]
    elif all(isinstance(part, Text) for part in words) or message.tool_calls:
        made["content"] = message.text or (None if message.tool_calls else "")
    for number, call in enumerate(made.get("tool_calls", ())):
        call["id"] = call["id"] or f"call_{number}"
    return made


def _part(part: Text | Image | Video, limits: FetchLimits, inline: bool) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    own = ("source", "id")
    options = {f.name: value for f in fields(part) if f.name not in own and (value := getattr(part, f.name)) is not None}
    source = part.source
    if isinstance(part, Image):
        named = {} if part.id is None else {"uuid": part.id}
        if named and source is None:  # the server has it
            return {"type": "image_url", "image_url": None, **options, **named}
        return {"type": "image_url", "image_url": {"url": _address(source, "image", limits, inline), **options}, **named}
    if getattr(source, "ndim", None) == 4 or isinstance(source, list | tuple):
        # OpenAI has no form for frames; this one is that of qwen-vl-utils, which Mirada's server reads.
        return {"type": "video", "video": [_address(frame, "image", limits, inline) for frame in source], **options}
    return {"type": "video_url", "video_url": {"url": _address(source, "video", limits, inline), **options}}


def _address(source: Any, kind: str, limits: FetchLimits, inline: bool) -> str:
    if isinstance(source, str) and (_DATA.match(source) or (_WEB.match(source) and not inline)):
        return source
    return to_data_uri(source, kind, limits)


def to_data_uri(source: Any, kind: str, limits: FetchLimits) -> str:
    """A picture or video (``kind``: image, video) of any form with its bytes inside. Raises MediaError."""
    if hasattr(source, "__array__") or hasattr(source, "save"):
        data = _encoded(source)
    else:
        data = fetch(source, limits, max_bytes=limits.bytes if kind == "image" else limits.video_bytes)
    return f"data:{mime(data, kind)};base64," + base64.b64encode(data).decode("ascii")


def mime(data: bytes, kind: str) -> str:
    """The media type of a file, from how it begins; ``image/*`` and ``video/*`` are told apart by ``kind`` otherwise."""
    found = next((name for at, magic, name in _MAGIC if data[at : at + len(magic)] == magic), None)
    return found or {"image": "image/png", "video": "video/mp4"}.get(kind, "application/octet-stream")


def _encoded(source: Any) -> bytes:
    """A PIL image or uint8 array [H, W] / [H, W, 3|4] as PNG, which loses nothing."""
    from PIL import Image as Pillow  # a tenth of a second, for those who hand over pixels

    picture = source
    if not isinstance(source, Pillow.Image):
        try:
            picture = Pillow.fromarray(source)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise MediaUnsupported(
                f"a picture that is a {type(source).__name__} cannot be sent ({error})", "give uint8 [H, W, 3]"
            ) from error
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        picture = picture.convert("RGB")
    out = io.BytesIO()
    exif = picture.getexif()
    picture.save(out, "PNG", exif=exif) if exif else picture.save(out, "PNG")
    return out.getvalue()
