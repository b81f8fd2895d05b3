"""What requests may hold, in the server's OpenAPI document: parameters with their bounds, messages and items of input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mirada.records.request import EFFORTS, HONOURED, LABELS, MOST_CHOICES
from mirada.records.wire import MOST_ID
from mirada.serve.responses_body import INCLUDES, KNOWN, SUMMARIES, TRUNCATIONS
from mirada.serve.schema_words import ANYTHING, OBJECT, Schema, flag, loose, many, number, one_of, ref, text, thing, whole

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
_EFFORT = one_of(*EFFORTS)
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
    said = thing({}, {"format": _TEXT_FORMAT, "verbosity": one_of(*HONOURED["verbosity"])})
    summary = one_of(*SUMMARIES)
    thought = {"effort": _EFFORT, "summary": summary, "generate_summary": summary, "context": one_of("auto", "all_turns")}
    return thing(
        {"model": one_of(*names), "input": {"anyOf": [text(minLength=1), many(ref("InputItem"), minItems=1)]}},
        {
            "stream": flag(), "instructions": text(), "max_output_tokens": whole(1), "tools": many(function),
            "tool_choice": {"anyOf": [one_of("auto", "none", "required"), named, allowed]}, "parallel_tool_calls": flag(),
            "reasoning": thing({}, thought), "text": said, "truncation": one_of(*TRUNCATIONS), "max_tool_calls": whole(1),
            "background": one_of(False), "include": many(one_of(*INCLUDES)), "top_logprobs": whole(0, 100),
            "stream_options": thing({}, {"include_obfuscation": one_of(False)}), "structured_outputs": thing({}, _STRUCTURED),
            **_FORMS, **SAMPLING, **MODES, **MEDIA, **{n: one for n, one in {**IDLE, **LIMITED}.items() if n in KNOWN},
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


def parts() -> dict[str, Schema]:
    """What requests are made of."""
    noted = {"provider_specific_fields": ANYTHING}
    called = thing({"name": text(minLength=1)}, {"arguments": {"anyOf": [text(), OBJECT]}, **noted})
    call = thing({"function": called}, {"id": text(), "type": one_of("function"), "index": whole(), **noted})
    content = _content()
    messages = [
        thing({"role": one_of(role), "content": content}, {"name": text(), "annotations": ANYTHING, **noted})
        for role in ("system", "developer", "user")
    ]
    messages.append(thing({"role": one_of("tool"), "content": content}, {"name": text(), "tool_call_id": text(), **noted}))
    thoughts = {"reasoning_content": text(), "reasoning": text(), "refusal": text(), "annotations": ANYTHING}
    assistant = {"name": text(), "tool_calls": many(call), **thoughts, **noted}
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
            thing({"type": one_of("input_text", "text"), "text": text()}),
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
