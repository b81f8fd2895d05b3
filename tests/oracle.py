"""OpenAI's published OpenAPI document as judge of every answer that a server under test has given.

``serve/openai_schemas.json`` holds the schemas of chat completions, responses, models and errors of that document (its
``info`` says which version; without descriptions and examples), under OpenAI's MIT licence beside it.

``Recorder`` writes down each answer inside the server's process; ``problems`` says what is wrong with them. Beside the schemas
as they are, the objects of chat completions and the items of responses are closed: a field that OpenAI does not know must be
in ``EXTENSIONS``.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

PARTS = "#/components/schemas/"
EXTENSIONS = {
    "CreateChatCompletionResponse": ("notes",),
    "CreateChatCompletionResponse.choices": ("stop_reason", "token_ids", "annotations"),
    "ChatCompletionResponseMessage": ("reasoning_content",),
    "CompletionUsage": ("num_frames", "timestamps", "media"),
    "CompletionUsage.prompt_tokens_details": ("image_tokens", "video_tokens"),
    "CreateChatCompletionStreamResponse": ("notes",),
    "CreateChatCompletionStreamResponse.choices": ("stop_reason", "token_ids", "annotations"),
    "ChatCompletionStreamResponseDelta": ("reasoning_content",),
    "OutputMessage": ("annotations",),
    "ResponseUsage": ("num_frames", "timestamps", "media"),
    "ResponseUsage.input_tokens_details": ("image_tokens", "video_tokens"),
}
"""Fields of ours in objects of theirs, as docs/serve.md lists them."""
CLOSED = (
    "CreateChatCompletionResponse", "ChatCompletionResponseMessage", "CompletionUsage", "CreateChatCompletionStreamResponse",
    "ChatCompletionStreamResponseDelta", "ChatCompletionTokenLogprob", "ChatCompletionMessageToolCall",
    "ChatCompletionMessageToolCallChunk", "ListModelsResponse", "ErrorResponse", "Error", "OutputMessage", "ResponseUsage",
    "FunctionToolCall", "ReasoningItem", "OutputTextContent", "ResponseTextDeltaEvent", "ResponseTextDoneEvent", "LogProb",
    "TopLogProb", "ResponseLogProb", "ResponseOutputItemAddedEvent", "ResponseOutputItemDoneEvent",
    "ResponseFunctionCallArgumentsDeltaEvent", "ResponseFunctionCallArgumentsDoneEvent",
)  # fmt: skip
judged: Counter[str] = Counter()
"""How many answers or events each schema has judged."""


class Recorder:
    """An ASGI layer that appends every answer under ``/v1/`` to ``file``, one JSON a line."""

    def __init__(self, app: Any, file: Path) -> None:
        self.app, self._file = app, file

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        made: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "whole": False, "text": ""}
        body: list[bytes] = []

        async def tell(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = {name.lower(): value.decode("latin-1") for name, value in message["headers"]}
                made.update(status=message["status"], type=headers.get(b"content-type", ""))
            else:
                body.append(message.get("body", b""))
                if not message.get("more_body", False):
                    made["whole"] = True
                    self._write(made, body)  # before the client can know that it is over
            await send(message)

        try:
            await self.app(scope, receive, tell)
        finally:
            if body and not made["whole"]:
                self._write(made, body)

    def _write(self, made: dict[str, Any], body: list[bytes]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({**made, "text": b"".join(body).decode()}) + "\n")


def problems(file: Path, start: int = 0) -> tuple[list[str], int]:
    """(what is wrong with the answers recorded from byte ``start`` on, where to go on)."""
    if not file.exists():
        return [], start
    data = file.read_bytes()[start:]
    data = data[: data.rfind(b"\n") + 1]
    found = [problem for line in data.splitlines() for problem in _judge(json.loads(line))]
    return found, start + len(data)


def _judge(answer: dict[str, Any]) -> Iterator[str]:
    where = f"{answer['method']} {answer['path']} {answer['status']}"
    if answer["method"] == "HEAD":
        return
    if answer["type"].startswith("text/event-stream"):
        yield from (f"{where}: {problem}" for problem in _events(answer))
        return
    if not answer["type"].startswith("application/json"):
        yield f"{where}: an answer of the type {answer['type']!r}"
        return
    if not answer["whole"]:
        return
    name = "ErrorResponse" if answer["status"] >= 400 else _whole_name(answer["path"])
    yield from (f"{where}: {problem}" for problem in wrong(name, json.loads(answer["text"])))


def _whole_name(path: str) -> str:
    known = {
        "/v1/chat/completions": "CreateChatCompletionResponse",
        "/v1/responses": "Response",
        "/v1/models": "ListModelsResponse",
    }
    return known.get(path) or "Model"


def _events(answer: dict[str, Any]) -> Iterator[str]:
    *events, rest = answer["text"].split("\n\n")
    if answer["whole"] and rest:
        yield f"the stream ends within an event: {rest[:100]!r}"
    is_chat = answer["path"] == "/v1/chat/completions"
    for number, event in enumerate(events):
        fields = dict(line.split(": ", 1) for line in event.split("\n") if not line.startswith(":"))
        if not fields:  # a comment
            continue
        if fields["data"] == "[DONE]":
            if not is_chat or number != len(events) - 1:
                yield "[DONE] where it does not belong"
            continue
        value = json.loads(fields["data"])
        if is_chat:
            name = "ErrorResponse" if "error" in value else "CreateChatCompletionStreamResponse"
        else:
            name = _event_names().get(value["type"], "")
            if not name or fields.get("event") != value["type"] or value["sequence_number"] != number:
                yield f"event {number} is not announced as it is: {event[:120]!r}"
                continue
        yield from (f"event {number}: {problem}" for problem in wrong(name, value))
    if answer["whole"] and is_chat and events[-1] != "data: [DONE]":
        yield "the stream has no [DONE]"


def wrong(name: str, value: Any) -> list[str]:
    """What schema ``name`` says against ``value``."""
    judged[name] += 1
    return [
        f"{name}: {error.json_path}: {error.message[:300]}"
        for error in sorted(_validator(name).iter_errors(value), key=lambda error: error.json_path)
    ]


@cache
def document() -> dict[str, Any]:
    """The part of OpenAI's document that is kept here, with our extensions."""
    made = _nullable(json.loads((Path(__file__).parent / "serve" / "openai_schemas.json").read_text(encoding="utf-8")))
    assert made["info"]["license"]["name"] == "MIT"
    schemas = made["components"]["schemas"]
    for name in CLOSED:
        schemas[name] = _closed(copy.deepcopy(schemas[name]), name)
    return made


def _nullable(schema: Any) -> Any:
    """JSON Schema knows no ``nullable``, which the document still uses in places (a word of OpenAPI 3.0)."""
    if isinstance(schema, list):
        return [_nullable(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _nullable(one) for key, one in schema.items()}
    return {"anyOf": [made, {"type": "null"}]} if made.pop("nullable", None) is True else made


def _closed(schema: Any, where: str) -> Any:
    """``schema`` in which every object takes its own properties and our extensions alone."""
    if isinstance(schema, dict):
        if isinstance(properties := schema.get("properties"), dict):
            for name, one in properties.items():
                properties[name] = _closed(one, f"{where}.{name}")
            properties.update((name, {}) for name in EXTENSIONS.get(where, ()))
            schema["additionalProperties"] = False
        for key in ("items", "anyOf", "oneOf", "allOf"):
            if key in schema:
                schema[key] = _closed(schema[key], where)
    elif isinstance(schema, list):
        return [_closed(one, where) for one in schema]
    return schema


@cache
def _validator(name: str) -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator({"components": document()["components"], "$ref": PARTS + name})


@cache
def _event_names() -> dict[str, str]:
    """Type of an event of ``/v1/responses`` -> its schema."""
    schemas = document()["components"]["schemas"]
    names = [one["$ref"].removeprefix(PARTS) for one in schemas["ResponseStreamEvent"]["anyOf"]]
    return {schemas[name]["properties"]["type"]["enum"][0]: name for name in names}
