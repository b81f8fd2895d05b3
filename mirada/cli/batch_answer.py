"""Who answers the lines of ``mirada batch``, as the command was told: the engine of this process or a server, and how a line's
body is read and its answer written.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mirada.cli.batch_file import RESPONSES, Line
from mirada.cli.options import Who
from mirada.errors import MediaRefused, ParameterError
from mirada.media.limits import FetchLimits
from mirada.records import completion_to_openai
from mirada.types import Delta, Handle, Message, Output, Sampling, Thinking, ToolCall

if TYPE_CHECKING:
    from mirada.serve.settings import ServeSettings


@dataclass(frozen=True, slots=True)
class Batch:
    """What the command was asked to do."""

    source: Path
    target: Path
    model: str | None = None
    url: str | None = None
    api_key: str | None = None
    device: str | None = None
    max_tokens: int | None = None
    in_flight: int = 16
    media_root: Path | None = None
    retry_errors: bool = False
    quant: str | None = None
    kv: str | None = None
    adapter: str | None = None
    """NAME=FOLDER, or a server's name for it; lines that name none are answered with it."""
    thinking: Thinking | None = None
    fps: float | None = None
    nframes: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    """Where a line says nothing of it."""

    @property
    def who(self) -> Who:
        """Who answers. Raises SettingsError for options of a model in this process with those of a server."""
        return Who(self.model, self.device, self.quant, self.kv, self.adapter, self.url, self.api_key)

    @property
    def settings(self) -> ServeSettings:
        """What a server is told to take where a request says nothing. Raises SettingsError."""
        from mirada.serve.settings import ServeSettings

        return ServeSettings(
            max_tokens=self.max_tokens, thinking=self.thinking, fps=self.fps, nframes=self.nframes,
            min_pixels=self.min_pixels, max_pixels=self.max_pixels,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Started:
    """A line under way: its answers, and what makes a body of them (and of a name that no other line has)."""

    handles: list[Handle]
    body: Callable[[list[Output], str], dict[str, Any]]
    naming: Callable[[], contextlib.AbstractContextManager[None]]
    """Within it errors name the line's own parameters."""


class Answerer(Protocol):
    """Who answers: the engine of this process, or a server."""

    def start(self, line: Line) -> Started: ...

    def close(self) -> None: ...


class Local:
    """The engine of this process. A line is read as ``mirada serve`` reads a request, by the same defaults."""

    def __init__(self, batch: Batch) -> None:
        limits = FetchLimits.serving(batch.media_root)
        opened, self._adapter = batch.who.open(limits=limits)
        self._vlm: Any = opened
        self._model = batch.model or "mini"
        self._settings = batch.settings
        self._root = batch.media_root

    def start(self, line: Line) -> Started:
        from mirada.serve.asked import ask_of, start, token_bytes

        body, read = _as_chat(line, lambda source, kind: _under(source, self._root))
        if self._adapter is not None and body.get("adapter") is None:
            body = {**body, "adapter": self._adapter}
        with read.naming():
            asked = ask_of(self._vlm, self._model, body, self._settings)
            handles = start(asked)
        options = asked.chat.options

        def made(outputs: list[Output], id: str) -> dict[str, Any]:
            how = Wanted(
                self._model, asked.chat.sampling, token_bytes(self._vlm), self._vlm.parts.eos,
                options.return_token_ids, options.include_reasoning, options.request_id,
            )  # fmt: skip
            return read.answer(outputs, id, how)

        return Started(list(handles), made, read.naming)

    def close(self) -> None:
        self._vlm.close()


class Remote:
    """A server; what it is asked is the line's own body (of responses: as chat completions), with files of the media root
    inside."""

    def __init__(self, batch: Batch) -> None:
        from mirada.client import HttpClient

        assert batch.url is not None
        self._client = HttpClient(batch.url, batch.api_key, batch.model, max_in_flight=batch.in_flight)
        self._batch = batch

    def start(self, line: Line) -> Started:
        from mirada.client.body import to_data_uri

        batch = self._batch
        limits = FetchLimits.serving(batch.media_root)
        body, read = _as_chat(line, lambda source, kind: to_data_uri(_under(source, batch.media_root), kind, limits))
        sent = batch.settings.completed({name: value for name, value in body.items() if value is not None})
        n = sent.pop("n", None) or 1
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 128:
            raise ParameterError(f"n={n!r} does not do", "give a number from 1 to 128", param="n")
        if batch.model is not None:
            sent["model"] = batch.model
        if batch.adapter is not None:
            sent.setdefault("adapter", batch.adapter)
        if batch.max_tokens is not None and sent.get("max_completion_tokens") is None:
            sent.setdefault("max_tokens", batch.max_tokens)
        seed = sent.get("seed")
        seeds = [{"seed": seed + index} if isinstance(seed, int) else {} for index in range(n)]
        handles = [self._client.send({**sent, **one}) for one in seeds]

        def made(outputs: list[Output], id: str) -> dict[str, Any]:
            model = str(batch.model or line.body.get("model") or self._client.model)
            return read.answer(outputs, id, Wanted(model, ids=bool(line.body.get("return_token_ids"))))

        return Started(list(handles), made, read.naming)

    def close(self) -> None:
        self._client.close()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the body of an answer is to say beside its text, and by which tokens."""

    model: str
    sampling: Sampling | None = None
    token_bytes: Callable[[int], bytes] | None = None
    ends: Collection[int] = ()
    """Ids of the tokens that end an answer."""
    ids: bool = False
    reasoning: bool = True
    name: str | None = None
    """Of the request, where it has one."""


class _Chat:
    """A line of chat completions."""

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        yield

    def answer(self, outputs: list[Output], id: str, how: Wanted) -> dict[str, Any]:
        """The body of its answer."""
        outputs = [_with_ids(output, id, index) for index, output in enumerate(outputs)]
        return completion_to_openai(
            outputs, model=how.model, id=f"chatcmpl-{how.name or id}", created=int(time.time()),
            token_bytes=how.token_bytes, return_token_ids=how.ids, reasoning=how.reasoning,
        )  # fmt: skip


class _Response(_Chat):
    """A line of responses."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        from mirada.serve.responses_body import as_chat

        self._body = body
        self.form = as_chat(body)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        from mirada.serve.responses_body import own_words

        with own_words(self.form.places):
            yield

    def answer(self, outputs: list[Output], id: str, how: Wanted) -> dict[str, Any]:
        from mirada.client.fake import ending, pieces
        from mirada.serve.responses_items import Items

        (output,) = outputs
        items = Items(f"resp_{id}", how.model, how.sampling, self._body, how.ends, how.token_bytes, how.reasoning)
        *before, last = pieces(output, 1 << 30) or [Delta()]
        for delta in before:
            items.feed(delta)
        items.feed(replace(ending(output), text=last.text, reasoning=last.reasoning))
        items.close()
        return items.object(output)


def _as_chat(line: Line, change: Callable[[str, str], str]) -> tuple[Mapping[str, Any], _Chat]:
    """The body of a line as one of chat completions, its media as ``change`` has them, and what answers in the line's own
    words. Raises ParameterError."""
    read = _Response(line.body) if line.url == RESPONSES else _Chat()
    body = read.form.body if isinstance(read, _Response) else line.body
    return with_sources(body, change), read


def _with_ids(output: Output, id: str, index: int) -> Output:
    """``output`` whose tool calls have names that no other line's have."""
    numbers = iter(range(len(output.message.tool_calls)))
    parts = [
        replace(part, id=f"call_{id}_{index}_{next(numbers)}") if isinstance(part, ToolCall) else part
        for part in output.message.parts
    ]
    return replace(output, message=Message("assistant", parts, reasoning=output.message.reasoning))


def with_sources(body: Mapping[str, Any], change: Callable[[str, str], str]) -> Mapping[str, Any]:
    """``body`` with every source of a picture or video that is no address and no ``data:`` URI as ``change(source, kind)``
    has it. What has no known form is left as it is: whoever reads the body says what is wrong with it."""

    def source(value: Any, kind: str) -> Any:
        if isinstance(value, str) and not value[:6].lower().startswith(("http:", "https:", "data:")):
            return change(value, kind)
        if isinstance(value, list):
            return [source(one, "image") for one in value]
        if isinstance(value, dict) and "url" in value:
            return {**value, "url": source(value["url"], kind)}
        return value

    def part(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kinds = ("image", "image_url", "video", "video_url")
        return {key: source(item, key[:5]) if key in kinds else item for key, item in value.items()}

    def message(value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("content"), list):
            return value
        return {**value, "content": [part(one) for one in value["content"]]}

    messages = body.get("messages")
    return {**body, "messages": [message(one) for one in messages]} if isinstance(messages, list) else body


def _under(source: str, root: Path | None) -> str:
    """A path as the rules for media take it: relative ones lie under the root. Raises MediaRefused where there is none."""
    if root is None:
        raise MediaRefused("the request names a file, and no folder of media is allowed", "give --media-root FOLDER")
    return source if source[:5].lower() == "file:" else str(root / source)
