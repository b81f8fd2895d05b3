"""``mirada ask``: one question, one streamed answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mirada.cli import show
from mirada.engine import inputs
from mirada.errors import InputError, SettingsError
from mirada.media.fetch import FetchLimits
from mirada.types import Output, Sampling

if TYPE_CHECKING:
    from mirada.client import HttpClient


def run(
    words: list[str],
    model: str | None,
    sampling: Sampling,
    think: bool | None,
    fps: float | None,
    max_pixels: int | None,
    device: str | None,
    as_json: bool,
    url: str | None = None,
    api_key: str | None = None,
) -> None:
    """Answer ``words[-1]`` about the media ``words[:-1]``; print the answer, or one JSON object. ``url``: ask that server."""
    *sources, question = words
    if Path(question).is_file():
        raise InputError(
            f"the last word, {question!r}, is a file, so there is no question", 'end with one: mirada ask a.png "What is it?"'
        )
    show.check_paths(sources)
    turn = inputs.question(tuple(words), None, show.media_options(fps, max_pixels), FetchLimits())
    if url is None and api_key is not None:
        raise SettingsError("--api-key is for a server, and none is given", "add --url")
    # One question has nothing to protect, and starting processes takes long.
    client = show.open_model(model or "mini", device, workers=0) if url is None else _server(url, api_key, model)
    with client:
        handle = client.submit([turn], sampling, thinking=show.thinking(think))
        if not as_json:
            show.stream(handle)
        output = handle.result()
        if output.error is not None:
            raise output.error
    if as_json:
        print(json.dumps(as_object(output, getattr(client, "model", None) or model or "mini"), ensure_ascii=False))


def _server(url: str, api_key: str | None, model: str | None) -> HttpClient:
    from mirada.client import HttpClient  # httpx takes a tenth of a second to load

    return HttpClient(url, api_key, model)


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
