"""What answers are made of, in the server's OpenAPI document: completions, responses, models and errors."""

from __future__ import annotations

from collections.abc import Mapping

from mirada.serve.schema_words import OBJECT, Schema, many, maybe, number, one_of, ref, text, told, whole


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


def answers() -> dict[str, Schema]:
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
            {"notes": many(text()), "service_tier": text()},
        ),
        "ChatCompletionChunk": told(
            {**head, "object": one_of("chat.completion.chunk"), "choices": many(grown)},
            {"usage": maybe({"anyOf": [ref("Usage"), OBJECT]}), "notes": many(text()), "service_tier": text()},
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
        {"usage": usage, "stop_reason": {"anyOf": [text(), count]}, "notes": many(text()), "service_tier": text()},
    )
