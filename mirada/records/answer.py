"""Outputs and errors as OpenAI's ``/v1/chat/completions`` says them, for the server and for batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mirada import errors
from mirada.errors import MiradaError
from mirada.types import Annotation, Delta, Finish, Logprob, MediaUsage, Output, ToolCall, Usage

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say (OpenAI's own choice)."""
FINISH: dict[Finish, str] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "repetition": "length"}
"""OpenAI has no word for an answer that was ended because it repeated itself: ``stop_reason`` beside it says so."""

TokenBytes = Callable[[int], bytes]


def completion_to_openai(
    outputs: Output | Sequence[Output],
    *,
    model: str,
    id: str,
    created: int,
    token_bytes: TokenBytes | None = None,
    return_token_ids: bool = False,
    reasoning: bool = True,
) -> dict[str, Any]:
    """A whole ``chat.completion``: one choice for each output. ``created``: seconds since 1970. ``token_bytes``: the bytes
    behind a token id, for logprobs. ``reasoning``: say what was thought too. Raises the error of an output that failed:
    failure is no completion."""
    outputs = [outputs] if isinstance(outputs, Output) else list(outputs)
    for output in outputs:
        if output.error is not None:
            raise output.error
    choices = [
        choice_to_openai(output, index, token_bytes, return_token_ids, reasoning) for index, output in enumerate(outputs)
    ]
    return {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage_to_openai([output.usage for output in outputs]),
        **notes_to_openai(outputs),
    }


def notes_to_openai(outputs: Sequence[Output]) -> dict[str, list[str]]:
    """What was done to the media, each note once: ``notes`` beside OpenAI's fields, or nothing."""
    notes = list(dict.fromkeys(note for output in outputs for note in output.notes))
    return {"notes": notes} if notes else {}


def choice_to_openai(
    output: Output,
    index: int = 0,
    token_bytes: TokenBytes | None = None,
    return_token_ids: bool = False,
    reasoning: bool = True,
) -> dict[str, Any]:
    """One entry of ``choices``."""
    calls = output.message.tool_calls
    text = output.message.text
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
    if output.message.reasoning and reasoning:
        message["reasoning_content"] = output.message.reasoning
    if calls:
        message["tool_calls"] = [call_to_openai(call, number) for number, call in enumerate(calls)]
    choice = {"index": index, "message": message, "logprobs": None, "finish_reason": finish_to_openai(output.finish)}
    choice |= stop_reason_to_openai(output)
    if output.logprobs is not None:
        choice["logprobs"] = logprobs_to_openai(output.logprobs, token_bytes)
    if return_token_ids:
        choice["token_ids"] = list(output.tokens)
    if output.annotations:
        choice["annotations"] = [annotation_to_openai(one) for one in output.annotations]
    return choice


def annotation_to_openai(one: Annotation, told: int = 0) -> dict[str, Any]:
    """One entry of ``annotations``; ``start`` and ``end`` count from character ``told`` of the answer on."""
    made: dict[str, Any] = {"type": one.kind, "label": one.label}
    if one.kind == "box":
        made["box"] = [side for point in one.points for side in point]
    elif one.kind == "point":
        made["point"] = list(one.points[0])
    else:
        made["points"] = [list(point) for point in one.points]
    made |= {one.media: one.index, "chosen": one.chosen, "size": list(one.size), "resized": list(one.resized)}
    if one.time is not None:
        made["time"] = list(one.time)
    return made | {"start": one.start - told, "end": one.end - told}


def annotation_from_openai(value: Mapping[str, Any]) -> Annotation:
    """The other way round. Raises KeyError, TypeError or ValueError for what is none."""
    kind, media = value["type"], "video" if "video" in value else "image"
    points = {"box": lambda: (value["box"][:2], value["box"][2:]), "point": lambda: (value["point"],)}
    pairs = points[kind]() if kind in points else value["points"]
    if kind not in ("box", "point", "polygon") or value["chosen"] not in ("only", "named", "last"):
        raise ValueError(f"an annotation of the type {kind!r}, chosen as {value['chosen']!r}")
    return Annotation(
        kind=kind,
        points=tuple((float(x), float(y)) for x, y in pairs),
        label=str(value["label"]),
        media=media,
        index=int(value[media]),
        size=_pair(value["size"], int),
        resized=_pair(value["resized"], int),
        time=_pair(value["time"], float) if "time" in value else None,
        chosen=value["chosen"],
        start=int(value["start"]),
        end=int(value["end"]),
    )


def _pair(value: Sequence[Any], kind: type) -> Any:
    first, second = value
    return kind(first), kind(second)


def stop_reason_to_openai(ended: Output | Delta) -> dict[str, str | int]:
    """``stop_reason`` beside a ``finish_reason``, where there is more to say: the stop string or stop token that was met, as
    vLLM says it, or that the answer repeated itself."""
    reason = "repetition" if ended.finish == "repetition" else ended.stop_reason
    return {} if reason is None else {"stop_reason": reason}


def finish_to_openai(finish: Finish) -> str:
    return FINISH.get(finish, "stop")


def call_to_openai(call: ToolCall, number: int = 0) -> dict[str, Any]:
    """One entry of ``tool_calls``."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or f"call_{number}", "type": "function", "function": function}


def logprobs_to_openai(logprobs: Sequence[Logprob], token_bytes: TokenBytes | None = None) -> dict[str, Any]:
    """``logprobs`` of a choice. Without ``token_bytes`` tokens are named ``token_id:N``, as vLLM does when asked."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = None if token_bytes is None else token_bytes(token)
        text = f"token_id:{token}" if data is None else data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": None if data is None else list(data)}

    def named(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text.encode("utf-8", "replace"))}

    def entries(one: Logprob) -> list[dict[str, Any]]:
        pairs = [(one.token, one.logprob), *one.top]
        if one.texts:  # as another server said them
            return [named(text, logprob) for text, (_, logprob) in zip(one.texts, pairs, strict=True)]
        return [entry(*pair) for pair in pairs]

    content = [{**first, "top_logprobs": rest} for first, *rest in map(entries, logprobs)]
    return {"content": content, "refusal": None}


def usage_to_openai(usages: Sequence[Usage]) -> dict[str, Any]:
    """``usage`` of all choices of one request: the prompt counts once. Beside OpenAI's fields: image and video tokens, the
    frames and timestamps (seconds, per video) that were used, and of every picture and video how it came before the model."""
    first = usages[0]
    completion = sum(usage.completion_tokens for usage in usages)
    made: dict[str, Any] = {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {
            "cached_tokens": first.cached_tokens,
            "image_tokens": first.image_tokens,
            "video_tokens": first.video_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning_tokens for usage in usages)},
    }
    if first.num_frames:
        made["num_frames"] = first.num_frames
        made["timestamps"] = [list(times) for times in first.timestamps]
    if first.media:
        made["media"] = [media_to_openai(one) for one in first.media]
    return made


def media_to_openai(one: MediaUsage) -> dict[str, Any]:
    """One entry of ``usage.media``. ``grid`` of a video whose frames have several sizes is that of its first run of them, and
    ``grids`` has them all."""
    made: dict[str, Any] = {
        "type": one.kind,
        "size": list(one.size),
        "resized": list(one.resized),
        "grid": list(one.grids[0]),
        "tokens": one.tokens,
    }
    if len(one.grids) > 1:
        made["grids"] = [list(grid) for grid in one.grids]
    if one.kind == "video":
        made |= {"frames": one.frames, "fps": one.fps}
    return made


def media_from_openai(value: Mapping[str, Any]) -> MediaUsage:
    """The other way round. Raises KeyError, TypeError or ValueError for what is none."""
    if value["type"] not in ("image", "video"):
        raise ValueError(f"a medium of the type {value['type']!r}")
    return MediaUsage(
        kind=value["type"],
        size=_pair(value["size"], int),
        resized=_pair(value["resized"], int),
        grids=tuple(_grid(grid) for grid in value.get("grids") or (value["grid"],)),
        tokens=int(value["tokens"]),
        frames=int(value.get("frames") or 0),
        fps=None if value.get("fps") is None else float(value["fps"]),
    )


def _grid(value: Sequence[Any]) -> tuple[int, int, int]:
    t, h, w = value
    return int(t), int(h), int(w)


_STATUS: tuple[tuple[type[MiradaError], int, str], ...] = (
    # The first that fits counts: kinds before their parents.
    (errors.RemoteRefused, 502, "server_error"),
    (errors.RemoteBusy, 503, "server_error"),
    (errors.RemoteTimeout, 504, "server_error"),
    (errors.InputError, 400, "invalid_request_error"),
    (errors.ContextOverflow, 400, "invalid_request_error"),
    (errors.QueueFull, 429, "rate_limit_error"),
    (errors.OutOfMemory, 503, "server_error"),
    (errors.EngineAsleep, 503, "server_error"),
    (errors.RemoteError, 502, "server_error"),
    (errors.ReplyTimeout, 504, "server_error"),
    (errors.NotAvailable, 501, "server_error"),
)


def error_to_openai(error: MiradaError) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) of an error in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""
    status, kind = next(((code, kind) for cls, code, kind in _STATUS if isinstance(error, cls)), (500, "server_error"))
    param = getattr(error, "param", None)
    if param is None and isinstance(error, errors.MessageError | errors.MediaError | errors.ContextOverflow):
        param = "messages"
    if isinstance(error, errors.ContextOverflow):
        code = "context_length_exceeded"
    else:
        code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
    return status, {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
