"""The server's own OpenAPI document: what is written here is what ``/openapi.json`` says, and tests hold the server to it.

Written by hand, for bodies are read by room ``records`` and not by classes that a framework could look at. Every optional
parameter may be null, which is as good as leaving it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mirada.records.request import HONOURED, LABELS, MOST_CHOICES
from mirada.records.wire import MOST_ID
from mirada.serve.responses import LOGPROBS

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def text(**more: Any) -> Schema:
    return {"type": "string", **more}


def whole(least: int | None = None, most: int | None = None, **more: Any) -> Schema:
    return {"type": "integer"} | _bounds(least, most) | more


def number(least: float | None = None, most: float | None = None, **more: Any) -> Schema:
    return {"type": "number"} | _bounds(least, most) | more


def flag(**more: Any) -> Schema:
    return {"type": "boolean", **more}


def one_of(*values: Any, **more: Any) -> Schema:
    return {"enum": list(values), **more}


def many(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def thing(needed: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None, **more: Any) -> Schema:
    """An object with these fields and no others, unless ``more`` says otherwise. The optional ones may be null."""
    fields = {**needed, **{name: maybe(one) for name, one in (optional or {}).items()}}
    return {"type": "object", "required": list(needed), "properties": fields, "additionalProperties": False, **more}


def loose(needed: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """``thing`` that may hold anything beside."""
    made = thing(needed, optional)
    del made["additionalProperties"]
    return made


def told(needed: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An object of an answer: later versions may say more."""
    return {"type": "object", "required": list(needed), "properties": {**needed, **(optional or {})}}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _bounds(least: float | None, most: float | None) -> Schema:
    return ({} if least is None else {"minimum": least}) | ({} if most is None else {"maximum": most})


ANYTHING: Schema = {}
OBJECT: Schema = {"type": "object"}
_POSITIVE = number(exclusiveMinimum=0)
_PIXELS = {
    "min_pixels": whole(1, description="Least area of a resized picture or frame."),
    "max_pixels": whole(1, description="Largest area of a resized picture or frame."),
}
_SIZES = {**_PIXELS, "resized_height": whole(1), "resized_width": whole(1)}
_BOUNDS = {"min_frames": whole(1), "max_frames": whole(1), "total_pixels": whole(1)}
_CLIP = {
    **_SIZES, **_BOUNDS, "fps": _POSITIVE, "nframes": whole(1), "video_start": number(0), "video_end": number(0),
    "min_frame_similarity": number(0),
}  # fmt: skip
_DETAIL = one_of("auto", "low", "high", "original", description="low: at most 512 x 512 pixels. Else: the model's own size.")
MEDIA = {
    "fps": _POSITIVE | {"description": "Frames per second to take of a video; not with nframes."},
    "nframes": whole(1, description="Frames to take of a video in all."),
    **_PIXELS,
}
SAMPLING = {
    "temperature": number(0, 100, description="0 is greedy."),
    "top_p": number(exclusiveMinimum=0, maximum=1),
    "top_k": whole(-1, description="-1 and 0 are off."),
    "min_p": number(0, 1),
    "repetition_penalty": number(exclusiveMinimum=0, maximum=10, description="1 is off."),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": {"type": "object", "patternProperties": {"^[0-9]{1,9}$": number()}, "additionalProperties": False},
    "seed": whole(),
    "stop": {"anyOf": [text(minLength=1), many(text(minLength=1))]},
    "stop_token_ids": many(whole(0), description="Token ids that end the answer."),
    "include_stop_str_in_output": flag(description="The stop string that ended the answer stays at its end."),
    "min_tokens": whole(0, description="Before so many tokens nothing ends the answer."),
    "ignore_eos": flag(),
    "max_repeats": whole(0, description="Times that an answer may end with one piece over and over; 0 is off."),
    "thinking_budget": whole(0, description="Most tokens of reasoning."),
}
MODES = {
    "thinking": {"anyOf": [one_of("auto", "on", "off"), flag()]},
    "adapter": text(description="A LoRA adapter of the model."),
    "chat_template_kwargs": thing(
        {}, {"enable_thinking": flag(), "thinking": {"anyOf": [one_of("auto", "on", "off"), flag()]}}
    ),
    "mm_processor_kwargs": thing({}, {**MEDIA, **_BOUNDS, "num_frames": whole(1)}),
    "media_io_kwargs": thing({}, {"video": thing({}, {"fps": _POSITIVE, "num_frames": whole(1)})}),
    "include_reasoning": flag(description="false: the answer does not say what was thought."),
}
IDLE = {name: ANYTHING for name in LABELS}
LIMITED = {name: one_of(*values) for name, values in HONOURED.items()}
"""Parameters that are kept to with these values alone."""
_SCHEMA = {"anyOf": [OBJECT, flag(), text(description="A schema as JSON text.")]}
_FORMS = {
    "guided_json": _SCHEMA, "guided_regex": text(minLength=1), "guided_choice": many(text(minLength=1), minItems=1),
    "guided_grammar": text(minLength=1), "guided_whitespace_pattern": text(),
}  # fmt: skip
_STRUCTURED = {
    "json": {"anyOf": [OBJECT, flag(), text()]}, "json_object": flag(), "regex": text(minLength=1),
    "choice": many(text(minLength=1), minItems=1), "grammar": text(minLength=1), "whitespace_pattern": text(),
    "disable_any_whitespace": flag(),
}  # fmt: skip
_FUNCTION = loose({"name": text(minLength=1)}, {"description": text(), "parameters": OBJECT})
_NAMED = loose({"type": one_of("function"), "function": loose({"name": text()})})
_ALLOWED = loose(
    {
        "type": one_of("allowed_tools"),
        "allowed_tools": loose({"mode": one_of("auto", "required"), "tools": many(_NAMED, minItems=1)}),
    }
)
_EFFORT = one_of("none", "minimal", "low", "medium", "high", "xhigh")
_FORMAT = {
    "anyOf": [
        loose({"type": one_of("text", "json_object")}),
        loose({"type": one_of("json_schema"), "json_schema": loose({"schema": {"anyOf": [OBJECT, flag()]}})}),
    ]
}
_TEXT_FORMAT = {
    "anyOf": [
        loose({"type": one_of("text", "json_object")}),
        loose({"type": one_of("json_schema"), "schema": {"anyOf": [OBJECT, flag()]}}),
    ]
}
_STREAM = thing({}, {"include_usage": flag(), "include_obfuscation": one_of(False), "continuous_usage_stats": flag()})


def chat_parameters(names: Sequence[str]) -> Schema:
    """A body of ``/v1/chat/completions`` to one of ``names``."""
    return thing(
        {"model": one_of(*names), "messages": many(ref("ChatMessage"), minItems=1)},
        {
            "stream": flag(), "stream_options": _STREAM, "n": whole(1, MOST_CHOICES), "max_tokens": whole(1),
            "max_completion_tokens": whole(1), "logprobs": flag(), "top_logprobs": whole(0, 100), "response_format": _FORMAT,
            "structured_outputs": thing({}, _STRUCTURED), **_FORMS,
            "tools": many(loose({"function": _FUNCTION}, {"type": one_of("function")})),
            "tool_choice": {"anyOf": [one_of("auto", "none", "required"), _NAMED, _ALLOWED]}, "parallel_tool_calls": flag(),
            "reasoning_effort": _EFFORT, "return_token_ids": flag(), **SAMPLING, **MODES, **MEDIA, **IDLE, **LIMITED,
            "request_id": text(pattern="^[A-Za-z0-9._:-]{1,128}$", description="What the answer's id ends with."),
        },
        description="OpenAI's chat completions, with what users of vLLM send beside it and settings of pictures and videos.",
    )  # fmt: skip


def responses_parameters(names: Sequence[str]) -> Schema:
    """A body of ``/v1/responses`` to one of ``names``."""
    function = loose(
        {"type": one_of("function"), "name": text(minLength=1)}, {"description": text(), "parameters": OBJECT, "strict": flag()}
    )
    named = loose({"name": text()}, {"type": one_of("function")})
    allowed = loose({"type": one_of("allowed_tools"), "mode": one_of("auto", "required"), "tools": many(named, minItems=1)})
    said = thing({}, {"format": _TEXT_FORMAT, "verbosity": one_of("medium")})
    thought = thing({}, {"effort": _EFFORT, "summary": one_of("auto"), "generate_summary": one_of("auto")})
    return thing(
        {"model": one_of(*names), "input": {"anyOf": [text(minLength=1), many(ref("InputItem"), minItems=1)]}},
        {
            "stream": flag(), "instructions": text(), "max_output_tokens": whole(1), "tools": many(function),
            "tool_choice": {"anyOf": [one_of("auto", "none", "required"), named, allowed]}, "parallel_tool_calls": flag(),
            "reasoning": thought, "text": said, "truncation": one_of("disabled"),
            "background": one_of(False), "include": many(one_of(LOGPROBS)), "top_logprobs": whole(0, 100),
            "stream_options": thing({}, {"include_obfuscation": one_of(False)}), "structured_outputs": thing({}, _STRUCTURED),
            **_FORMS, **SAMPLING, **MODES, **MEDIA, **IDLE, **LIMITED,
            "metadata": {"type": "object", "additionalProperties": text()},
        },
        description="OpenAI's responses, for text and pictures; nothing is stored.",
    )  # fmt: skip


def _source(
    kind: str, options: Mapping[str, Schema], frames: bool = False, beside: Mapping[str, Schema] | None = None
) -> Schema:
    """A part that holds a picture or a video: ``type`` may be left out, and so may the object around the address."""
    forms = [text(minLength=1), thing({"url": text(minLength=1)}, options)]
    if frames:
        forms.append(many({"anyOf": [text(minLength=1), thing({"url": text(minLength=1)})]}, minItems=1))
    kinds = one_of(kind, kind.removesuffix("_url"), f"{kind.removesuffix('_url')}_url")
    return thing({kind: {"anyOf": forms}}, {"type": kinds, "cache_control": ANYTHING, **options, **(beside or {})})


def _content() -> Schema:
    """What a message of chat completions may hold."""
    words = thing({"text": text()}, {"type": one_of("text"), "cache_control": ANYTHING})
    refusal = thing({"refusal": text()}, {"type": one_of("refusal"), "cache_control": ANYTHING})
    shown = {**_SIZES, "detail": _DETAIL}
    name = text(minLength=1, maxLength=MOST_ID)
    pictures = [_source(kind, shown, beside={"uuid": name}) for kind in ("image", "image_url")]
    again = {"type": one_of("image", "image_url"), "cache_control": ANYTHING, **shown}
    pictures += [thing({kind: {"type": "null"}, "uuid": name}, again) for kind in ("image", "image_url")]
    videos = [_source(kind, _CLIP, frames=True) for kind in ("video", "video_url")]
    return {"anyOf": [text(), many({"anyOf": [text(), words, refusal, *pictures, *videos]})]}


def _parts() -> dict[str, Schema]:
    """What requests are made of."""
    called = thing({"name": text(minLength=1)}, {"arguments": {"anyOf": [text(), OBJECT]}})
    call = thing({"function": called}, {"id": text(), "type": one_of("function"), "index": whole()})
    content = _content()
    messages = [
        thing({"role": one_of(role), "content": content}, {"name": text(), "annotations": ANYTHING})
        for role in ("system", "developer", "user")
    ]
    messages.append(thing({"role": one_of("tool"), "content": content}, {"name": text(), "tool_call_id": text()}))
    thoughts = {"reasoning_content": text(), "reasoning": text(), "refusal": text(), "annotations": ANYTHING}
    assistant = {"name": text(), "tool_calls": many(call), **thoughts}
    messages.append(thing({"role": one_of("assistant"), "content": content}, assistant))
    messages += [
        thing({"role": one_of("assistant"), key: schema}, {**assistant, "content": content})
        for key, schema in (("tool_calls", many(call, minItems=1)), ("refusal", text(minLength=1)))
    ]
    return {"ChatMessage": {"anyOf": messages}, "InputItem": {"anyOf": _items()}}


def _items() -> list[Schema]:
    """What ``input`` of responses is made of."""
    said = {
        "anyOf": [
            thing({"type": one_of("input_text"), "text": text()}),
            thing({"type": one_of("output_text"), "text": text()}, {"annotations": ANYTHING, "logprobs": ANYTHING}),
            thing({"type": one_of("refusal"), "refusal": text()}),
            thing({"type": one_of("input_image"), "image_url": text(minLength=1)}, {"detail": _DETAIL}),
        ]
    }
    words = {"anyOf": [text(), many(said)]}
    roles = one_of("system", "developer", "user", "assistant")
    beside = {"id": ANYTHING, "status": ANYTHING}
    message = {"type": one_of("message"), "phase": ANYTHING, "annotations": ANYTHING, **beside}
    call = {"type": one_of("function_call"), "name": text(minLength=1)}
    return [
        thing({"role": roles, "content": words}, message),
        thing(call, {"arguments": text(), "call_id": text(), **beside}),
        thing({"type": one_of("function_call_output"), "output": words}, {"call_id": text(), **beside}),
        loose({"type": one_of("reasoning")}, {"content": many(OBJECT)}),
    ]


def _annotation() -> Schema:
    """What an answer points at."""
    count = whole(0)
    pair, quad = many(number(0), minItems=2, maxItems=2), many(number(0), minItems=4, maxItems=4)
    sides = many(count, minItems=2, maxItems=2)
    annotation = told(
        {
            "type": one_of("box", "point", "polygon"),
            "label": text(),
            "size": sides,
            "resized": sides,
            "start": count,
            "end": count,
            "chosen": one_of("only", "named", "last"),
        },
        {"box": quad, "point": pair, "points": many(pair), "image": count, "video": count, "time": many(number())},
    )
    annotation["description"] = (
        "A box [x1, y1, x2, y2], a point [x, y] or a polygon in pixels of the original, upright picture of size [width, height]"
    )
    return annotation


def _media(count: Schema) -> Schema:
    """How a picture or video came before the model."""
    sides, grid = many(count, minItems=2, maxItems=2), many(count, minItems=3, maxItems=3)
    return told(
        {"type": one_of("image", "video"), "size": sides, "resized": sides, "grid": grid, "tokens": count},
        {"grids": many(grid), "frames": count, "fps": maybe(number(0))},
    )


def _usage(count: Schema, frames: Mapping[str, Schema]) -> Schema:
    return told(
        {
            "prompt_tokens": count,
            "completion_tokens": count,
            "total_tokens": count,
            "prompt_tokens_details": told({"cached_tokens": count, "image_tokens": count, "video_tokens": count}),
            "completion_tokens_details": told({"reasoning_tokens": count}),
        },
        frames,
    )


def _answers() -> dict[str, Schema]:
    """What answers are made of."""
    count = whole(0)
    token = {"token": text(), "logprob": number(), "bytes": maybe(many(whole(0, 255)))}
    logprobs = told({"content": many(told({**token, "top_logprobs": many(told(token))})), "refusal": {"type": "null"}})
    function = told({"name": text(), "arguments": text()})
    call = told({"id": text(), "type": one_of("function"), "function": function})
    piece = told(
        {"index": count},
        {"id": text(), "type": one_of("function"), "function": told({}, {"name": text(), "arguments": text()})},
    )
    frames = {"num_frames": count, "timestamps": many(many(number())), "media": many(ref("MediaUsage"))}
    reason = one_of("stop", "length", "tool_calls")
    beside = {"stop_reason": {"anyOf": [text(), count]}, "token_ids": many(count), "annotations": many(ref("Annotation"))}
    message = told(
        {"role": one_of("assistant"), "content": maybe(text()), "refusal": {"type": "null"}},
        {"reasoning_content": text(), "tool_calls": many(call)},
    )
    delta = told(
        {},
        {
            "role": one_of("assistant"),
            "content": text(),
            "refusal": {"type": "null"},
            "reasoning_content": text(),
            "tool_calls": many(piece),
        },
    )
    head = {"id": text(), "created": whole(), "model": text()}
    choice = told({"index": count, "message": message, "logprobs": maybe(logprobs), "finish_reason": reason}, beside)
    grown = told({"index": count, "delta": delta, "logprobs": maybe(logprobs), "finish_reason": maybe(reason)}, beside)
    model = told(
        {
            "id": text(),
            "object": one_of("model"),
            "created": whole(),
            "owned_by": text(),
            "max_model_len": count,
            "adapters": many(text()),
        },
        {"parent": text()},
    )
    return {
        "Annotation": _annotation(),
        "Usage": _usage(count, frames),
        "MediaUsage": _media(count),
        "ChatCompletion": told(
            {**head, "object": one_of("chat.completion"), "choices": many(choice), "usage": ref("Usage")},
            {"notes": many(text())},
        ),
        "ChatCompletionChunk": told(
            {**head, "object": one_of("chat.completion.chunk"), "choices": many(grown)},
            {"usage": maybe({"anyOf": [ref("Usage"), OBJECT]}), "notes": many(text())},
        ),
        "Response": _response(count, frames),
        "ResponseEvent": told({"type": text(pattern=r"^response\."), "sequence_number": count}),
        "Model": model,
        "ModelList": told({"object": one_of("list"), "data": many(ref("Model"))}),
        "Error": told({"error": told({"message": text(), "type": text(), "param": maybe(text()), "code": maybe(text())})}),
    }


def _response(count: Schema, frames: Mapping[str, Schema]) -> Schema:
    status = one_of("in_progress", "completed", "incomplete", "failed")
    output = {
        "anyOf": [
            told(
                {
                    "type": one_of("message"),
                    "id": text(),
                    "role": one_of("assistant"),
                    "status": status,
                    "content": many(
                        told(
                            {
                                "type": one_of("output_text"),
                                "text": text(),
                                "annotations": many(OBJECT),
                                "logprobs": many(OBJECT),
                            }
                        )
                    ),
                },
                {"annotations": many(ref("Annotation"))},
            ),
            told(
                {
                    "type": one_of("reasoning"),
                    "id": text(),
                    "summary": many(OBJECT),
                    "content": many(told({"type": one_of("reasoning_text"), "text": text()})),
                }
            ),
            told({"type": one_of("function_call"), "id": text(), "call_id": text(), "name": text(), "arguments": text()}),
        ]
    }
    usage = told(
        {
            "input_tokens": count,
            "output_tokens": count,
            "total_tokens": count,
            "input_tokens_details": told({"cached_tokens": count, "image_tokens": count, "video_tokens": count}),
            "output_tokens_details": told({"reasoning_tokens": count}),
        },
        frames,
    )
    return told(
        {
            "id": text(),
            "object": one_of("response"),
            "created_at": whole(),
            "model": text(),
            "status": status,
            "output": many(output),
            "error": maybe(OBJECT),
            "incomplete_details": maybe(told({"reason": one_of("max_output_tokens")})),
        },
        {"usage": usage, "stop_reason": {"anyOf": [text(), count]}, "notes": many(text())},
    )


ERRORS = {
    400: "A parameter or a picture does not do; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "Without an API key, only this machine and its own pages may ask.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too much is under way; come again after `Retry-After`.",
    501: "This server lacks what would be needed.",
    503: "The server is about to stop, or memory ran out.",
}
_ID = {"X-Request-Id": {"schema": text(), "description": "The client's own, or one that the server's log knows."}}
_LATER = {"Retry-After": {"schema": text(), "description": "Seconds."}}
_IGNORED = {
    "X-Mirada-Ignored": {"schema": text(), "description": "Unknown parameters that were left aside, where that is allowed."}
}


def document(title: str, version: str, names: Sequence[str], keys: bool) -> Schema:
    """The whole document of a server of the models ``names``; ``keys``: it asks for an API key."""
    guarded = [{"bearer": []}] if keys else []
    schemas = {"ChatRequest": chat_parameters(names), "ResponseRequest": responses_parameters(names), **_parts(), **_answers()}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": "OpenAI's API around open vision-language models."},
        "paths": {
            "/v1/chat/completions": {
                "post": _answering("chat", "ChatRequest", "ChatCompletion", "ChatCompletionChunk", guarded)
            },
            "/v1/responses": {"post": _answering("response", "ResponseRequest", "Response", "ResponseEvent", guarded)},
            "/v1/models": {
                "get": _reading("models", "The models, and their adapters.", _json(ref("ModelList")), (401, 403, 503), guarded)
            },
            "/v1/models/{name}": {
                "get": _reading("model", "One of them.", _json(ref("Model")), (401, 403, 404, 503), guarded)
                | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": text(minLength=1)}]}
            },
            "/health": {
                "get": _reading("health", "Whether the process lives.", _json(told({"status": one_of("ok")})), (403,), [])
            },
            "/ready": {"get": _ready()},
            "/metrics": {
                "get": _reading("metrics", "Figures for Prometheus.", {"text/plain": {"schema": text()}}, (401, 403), guarded)
            },
        },
        "components": {
            "schemas": schemas,
            **({"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}} if keys else {}),
        },
    }


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _errors(statuses: Sequence[int]) -> Schema:
    return {
        str(status): {
            "description": ERRORS[status],
            "content": _json(ref("Error")),
            "headers": _ID | (_LATER if status in (429, 503) else {}),
        }
        for status in statuses
    }


def _reading(name: str, said: str, content: Schema, statuses: Sequence[int], guarded: list[Schema]) -> Schema:
    answer = {"description": said, "content": content, "headers": _ID}
    return {"operationId": name, "summary": said, "security": guarded, "responses": {"200": answer, **_errors(statuses)}}


def _ready() -> Schema:
    states = {"200": ("ready",), "503": ("draining", "asleep", "stalled", "died", "closed")}
    made = _reading("ready", "Whether requests that come now would be answered.", {}, (403,), [])
    for status, state in states.items():
        told_so = _json(told({"status": one_of(*state)}))
        made["responses"][status] = {"description": ", ".join(state), "content": told_so, "headers": _ID}
    return made


def _answering(name: str, body: str, answer: str, event: str, guarded: list[Schema]) -> Schema:
    stream = {
        "schema": text(description=f"Server-sent events; the data of each is JSON of {event} (or Error)."),
        "x-event": ref(event),
    }
    content = _json(ref(answer)) | {"text/event-stream": stream}
    made = _reading(name, "An answer, whole or (`stream`) as server-sent events.", content, tuple(ERRORS), guarded)
    made["responses"]["200"]["headers"] = _ID | _IGNORED
    return made | {"requestBody": {"required": True, "content": _json(ref(body))}}
