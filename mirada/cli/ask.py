"""``mirada ask``: one question, one streamed answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from mirada.cli import show
from mirada.engine import inputs
from mirada.errors import InputError
from mirada.media.fetch import FetchLimits
from mirada.types import Output, Sampling


def run(
    words: list[str],
    model: str,
    sampling: Sampling,
    think: bool | None,
    fps: float | None,
    max_pixels: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Answer ``words[-1]`` about the media ``words[:-1]``; print the answer, or one JSON object."""
    *sources, question = words
    if Path(question).is_file():
        raise InputError(
            f"the last word, {question!r}, is a file, so there is no question", 'end with one: mirada ask a.png "What is it?"'
        )
    show.check_paths(sources)
    turn = inputs.question(tuple(words), None, show.media_options(fps, max_pixels), FetchLimits())
    vlm = show.open_model(model, device, workers=0)  # one question has nothing to protect, and starting processes takes long
    handle = vlm.submit([turn], sampling, thinking=show.thinking(think))
    if not as_json:
        show.stream(handle)
    output = handle.result()
    if output.error is not None:
        raise output.error
    if as_json:
        print(json.dumps(as_object(output, model), ensure_ascii=False))


def as_object(output: Output, model: str) -> dict:
    """What ``--json`` prints."""
    return {
        "text": output.message.text,
        "reasoning": output.message.reasoning,
        "tool_calls": [asdict(call) for call in output.message.tool_calls],
        "finish": output.finish,
        "model": model,
        "usage": asdict(output.usage),
        "notes": list(output.notes),
        "metrics": dict(output.metrics),
    }
