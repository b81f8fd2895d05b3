"""``mirada ask``: one question, one streamed answer."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from mirada.cli import show
from mirada.cli.options import How, Who
from mirada.engine import inputs
from mirada.errors import InputError
from mirada.media.limits import FetchLimits
from mirada.records.answer import annotation_to_openai
from mirada.types import Output


def run(words: list[str], who: Who, how: How, as_json: bool) -> None:
    """Answer ``words[-1]`` about the media ``words[:-1]``; print the answer, or one JSON object. ``-`` is standard input."""
    sources, question = show.piped(words)
    if os.path.isfile(question):  # unlike Path's, it takes a question that is too long for a path
        raise InputError(
            f"the last word, {question!r}, is a file, so there is no question", 'end with one: mirada ask a.png "What is it?"'
        )
    show.check_paths(source for source in sources if isinstance(source, str))
    turn = inputs.question(tuple(sources), question, how.media, FetchLimits())
    # One question has nothing to protect, and starting processes takes long.
    client, adapter = who.open(workers=0)
    with client:
        handle = client.submit([turn], how.sampling, thinking=how.thinking, adapter=adapter)
        if not as_json:
            show.stream(handle)
        output = handle.result()
        if output.error is not None:
            raise output.error
        show.notes(output)
    if as_json:
        made = as_object(output, getattr(client, "model", None) or who.model or "mini")
        print(json.dumps(made, ensure_ascii=not sys.stdout.encoding.lower().startswith("utf")))


def as_object(output: Output, model: str) -> dict:
    """What ``--json`` prints."""
    return {
        "text": output.message.text,
        "reasoning": output.message.reasoning,
        "tool_calls": [asdict(call) for call in output.message.tool_calls],
        "finish": output.finish,
        "model": model,
        "usage": asdict(output.usage),
        "annotations": [annotation_to_openai(one) for one in output.annotations],
        "notes": list(output.notes),
        "metrics": dict(output.metrics),
    }
