"""What a server answers -> deltas: chunks of a stream, whole completions, fragments of tool calls, usage, logprobs.

Fields that are not OpenAI's are those of vLLM and of Mirada's own server: ``reasoning_content`` (or ``reasoning``),
``token_ids``, ``stop_reason``, ``annotations``, ``notes``, image and video tokens and ``media`` of ``usage``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mirada.errors import RemoteError, RemoteRejected
from mirada.records.answer import annotation_from_openai, media_from_openai
from mirada.types import Annotation, Delta, Finish, Logprob, ToolCall, Usage

_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls"}
_WRONG = (TypeError, ValueError, LookupError, AttributeError, OverflowError)
"""What reading a value of another form raises; OverflowError: a count that is infinite."""


def read_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object; RemoteError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemoteError(f"the server sent what is not JSON ({error}): {excerpt(text)}", "check the server") from error
    if not isinstance(value, dict):
        raise RemoteError(f"the server sent a {type(value).__name__} for an answer", "check that it speaks OpenAI's API")
    return value


def excerpt(text: str | bytes, most: int = 120) -> str:
    """The beginning of what a server sent, fit for a message."""
    text = text[: most * 4].decode("utf-8", "replace") if isinstance(text, bytes) else text
    text = "".join(c if c.isprintable() else " " for c in text).strip()
    return repr(text if len(text) <= most else text[:most] + "…")


@dataclass
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class AnswerReader:
    """Reads one answer; ``chunk`` after ``chunk``, or one ``completion``, then ``close``. RemoteError: it is no answer."""

    def __init__(self) -> None:
        self.usage = Usage()
        self.finish: Finish | None = None
        self.stop_reason: str | int | None = None
        self.notes: tuple[str, ...] = ()
        self.logprobs = False
        """Whether any came."""
        self.num_fragments = 0
        """Of tool calls, so far."""
        self._calls: dict[int, _Call] = {}

    def chunk(self, value: Mapping[str, Any]) -> Delta:
        """What one ``chat.completion.chunk`` adds; an empty Delta if nothing."""
        try:
            return self._read(value, "delta")
        except _WRONG as error:
            raise _malformed(value, error) from error

    def completion(self, value: Mapping[str, Any]) -> Delta:
        """A whole ``chat.completion``."""
        try:
            if not value.get("choices"):
                raise KeyError("choices")
            return self._read(value, "message")
        except _WRONG as error:
            raise _malformed(value, error) from error

    def close(self) -> Delta:
        """The last piece: tool calls, and how it ended. RemoteError if the server did not say."""
        if self.finish is None:
            raise RemoteError("the answer broke off: the server ended it without a finish_reason", "ask again")
        calls = []
        for number, (_, call) in enumerate(sorted(self._calls.items())):
            if not call.name:
                raise RemoteError("the server sent a tool call without a name", "check the server")
            calls.append(ToolCall(call.name, "".join(call.arguments) or "{}", call.id or f"call_{number}"))
        finish = "tool_calls" if calls and self.finish == "stop" else self.finish
        return Delta(tool_calls=tuple(calls), finish=finish, stop_reason=self.stop_reason, notes=self.notes)

    def _read(self, value: Mapping[str, Any], inner: str) -> Delta:
        if value.get("usage"):
            self.usage = _usage(value["usage"])
        notes = value.get("notes")
        if isinstance(notes, list):
            self.notes = tuple(dict.fromkeys((*self.notes, *map(str, notes))))
        choice = next((one for one in value.get("choices") or () if one.get("index", 0) == 0), None)
        if choice is None:
            return Delta()
        said = choice.get(inner) or {}
        for position, fragment in enumerate(said.get("tool_calls") or ()):
            self._fragment(fragment, position)
        text = _text(said.get("content")) + _text(said.get("refusal"))
        reasoning = _text(said.get("reasoning_content") or said.get("reasoning"))
        tokens = tuple(int(token) for token in choice.get("token_ids") or ())
        logprobs = _logprobs(choice.get("logprobs"), tokens)
        self.logprobs = self.logprobs or bool(logprobs)
        if choice.get("finish_reason") is not None:
            self.finish = _finish(choice)
            reason = choice.get("stop_reason")
            self.stop_reason = reason if isinstance(reason, str | int) and self.finish != "repetition" else None
        return Delta(text, reasoning, tokens, logprobs, annotations=_annotations(choice.get("annotations")))

    def _fragment(self, fragment: Mapping[str, Any], position: int) -> None:
        self.num_fragments += 1
        index = fragment.get("index")
        call = self._calls.setdefault(int(position if index is None else index), _Call())
        call.id = call.id or fragment.get("id") or ""
        function = fragment.get("function") or {}
        call.name += function.get("name") or ""
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):  # some servers send the object itself
            arguments = json.dumps(arguments, ensure_ascii=False)
        call.arguments.append(_text(arguments))


def _malformed(value: Any, error: Exception) -> RemoteError:
    said = excerpt(json.dumps(value, ensure_ascii=False, default=str))
    return RemoteError(
        f"the server's answer has not the form of OpenAI's ({type(error).__name__}: {error}): {said}", "check the server"
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"text is a {type(value).__name__}")
    return value


def _annotations(value: Any) -> tuple[Annotation, ...]:
    """Boxes and points as Mirada's server says them; what other servers may call so (citations) is none."""
    return tuple(annotation_from_openai(one) for one in value or () if one.get("type") in ("box", "point", "polygon"))


def _finish(choice: Mapping[str, Any]) -> Finish:
    reason = choice["finish_reason"]
    if reason == "content_filter":
        raise RemoteRejected("the server's content filter ended the answer", "ask otherwise", status=200)
    if choice.get("stop_reason") == "repetition":
        return "repetition"
    if reason not in _FINISH:
        raise RemoteError(f"the server ended the answer with {excerpt(str(reason))}", "ask again")
    return _FINISH[reason]


def _logprobs(value: Mapping[str, Any] | None, tokens: tuple[int, ...]) -> tuple[Logprob, ...]:
    made: list[Logprob] = []
    content: Any = (value or {}).get("content") or ()
    for number, entry in enumerate(content):
        names = [entry, *(entry.get("top_logprobs") or ())]
        ids = [_token_id(one["token"]) for one in names]
        if ids[0] < 0 and number < len(tokens):
            ids[0] = tokens[number]
        probabilities = [float(one["logprob"]) for one in names]
        texts = tuple(str(one["token"]) for one in names)
        made.append(Logprob(ids[0], probabilities[0], tuple(zip(ids[1:], probabilities[1:], strict=True)), texts))
    return tuple(made)


def _token_id(token: str) -> int:
    """vLLM names tokens ``token_id:N`` where it is asked to."""
    number = token.removeprefix("token_id:")
    return int(number) if number != token and number.isdecimal() else -1


def _usage(value: Mapping[str, Any]) -> Usage:
    prompt, completion = value.get("prompt_tokens_details") or {}, value.get("completion_tokens_details") or {}
    return Usage(
        prompt_tokens=int(value.get("prompt_tokens") or 0),
        cached_tokens=int(prompt.get("cached_tokens") or 0),
        completion_tokens=int(value.get("completion_tokens") or 0),
        reasoning_tokens=int(completion.get("reasoning_tokens") or 0),
        image_tokens=int(prompt.get("image_tokens") or 0),
        video_tokens=int(prompt.get("video_tokens") or 0),
        num_frames=int(value.get("num_frames") or 0),
        timestamps=tuple(tuple(float(t) for t in times) for times in value.get("timestamps") or ()),
        media=tuple(media_from_openai(one) for one in value.get("media") or ()),
    )


class CatchUp:
    """Lets a second answer go on where the first broke off: what was passed on already is checked and left out."""

    def __init__(self, said: Delta) -> None:
        self._text, self._reasoning = said.text, said.reasoning
        self._tokens, self._logprobs = len(said.tokens), len(said.logprobs)
        self._annotations = len(said.annotations)

    def rest(self, delta: Delta) -> Delta:
        """The new part of ``delta``. RemoteError if it says something else than before."""
        text, self._text = _beyond(delta.text, self._text)
        reasoning, self._reasoning = _beyond(delta.reasoning, self._reasoning)
        tokens, logprobs = delta.tokens[self._tokens :], delta.logprobs[self._logprobs :]
        self._tokens = max(0, self._tokens - len(delta.tokens))
        self._logprobs = max(0, self._logprobs - len(delta.logprobs))
        annotations = delta.annotations[self._annotations :]
        self._annotations = max(0, self._annotations - len(delta.annotations))
        if delta.finish is not None and (self._text or self._reasoning):
            raise _differs()
        return replace(delta, text=text, reasoning=reasoning, tokens=tokens, logprobs=logprobs, annotations=annotations)


def _beyond(piece: str, said: str) -> tuple[str, str]:
    """(what of ``piece`` goes beyond ``said``, what of ``said`` is still to come)."""
    size = min(len(piece), len(said))
    if piece[:size] != said[:size]:
        raise _differs()
    return piece[size:], said[size:]


def _differs() -> RemoteError:
    return RemoteError(
        "the stream broke off, and the second answer begins otherwise than the first",
        "ask at temperature 0 or with a seed, or leave after_tokens out",
    )
