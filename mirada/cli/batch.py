"""``mirada batch``: a file of requests in OpenAI's batch format, answered line by line into another.

A line of the result is written when its answer is whole, so the file is valid at every moment, and a run that was ended goes on
where it stopped. A line that is wrong, or whose request fails, becomes a line that says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from mirada.cli.options import Who
from mirada.errors import (
    MediaRefused,
    MiradaError,
    ParameterError,
    RemoteError,
    RemoteRefused,
    RemoteUnreachable,
    RequestFailed,
    SettingsError,
)
from mirada.media.fetch import FetchLimits
from mirada.records import completion_to_openai, error_to_openai
from mirada.records.files import JsonLines
from mirada.types import Delta, Handle, Message, Output, Sampling, Thinking, ToolCall

if TYPE_CHECKING:
    from mirada.serve.settings import ServeSettings

ENDPOINT, RESPONSES = "/v1/chat/completions", "/v1/responses"
_FATAL = (RemoteRefused, RemoteUnreachable)
"""What would happen to every further line as well."""


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


class Line(NamedTuple):
    """One request. ``id`` names its place in the file; ``problem``: why it is none."""

    id: str
    custom_id: str | None
    body: Mapping[str, Any]
    problem: MiradaError | None = None
    url: str = ENDPOINT


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


def run(batch: Batch) -> int:
    """Answer what is not answered yet; the exit code: 0 all lines have an answer, 1 some have an error, 130 interrupted."""
    _check(batch)
    with Results(batch.target, batch.retry_errors) as results:
        total = sum(1 for _ in read_lines(batch.source))
        answerer = _Remote(batch) if batch.url is not None else _Local(batch)
        try:
            Run(batch, answerer, results, total).go()
        except KeyboardInterrupt:
            left = total - len(results.done)
            print(f"mirada: interrupted; {left} lines are left. The same command goes on with them.", file=sys.stderr)
            return 130
        finally:
            answerer.close()
        counts = results.counts
        said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        print(f"mirada: {total} lines: {said or 'none'} -> {batch.target}", file=sys.stderr)
        return 1 if results.num_errors else 0


def _check(batch: Batch) -> None:
    if not batch.source.is_file():
        raise SettingsError(f"there is no file {str(batch.source)!r}", "give the requests as JSON lines")
    if batch.target.exists() and batch.target.samefile(batch.source):
        raise SettingsError("requests and answers are the same file", "give the answers another name")
    if batch.in_flight < 1:
        raise SettingsError(f"--in-flight {batch.in_flight} lets nothing through", "give at least 1")
    if batch.media_root is not None and not batch.media_root.is_dir():
        raise SettingsError(f"the folder {str(batch.media_root)!r} of --media-root is not there", "give an existing folder")
    if batch.max_tokens is not None:
        Sampling(max_tokens=batch.max_tokens)  # says what is wrong with it before anything is opened
    batch.settings  # noqa: B018  (the same)
    batch.who  # noqa: B018


def read_lines(source: Path) -> Iterator[Line]:
    """The requests of a file, in order; empty lines are left out. A line that is wrong, or repeats a custom_id, has its
    ``problem``."""
    seen: set[str] = set()
    with source.open("rb") as file:
        for number, raw in enumerate(file, 1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not raw.strip():
                continue
            line = _parse(raw, number)
            if line.custom_id is not None and line.custom_id in seen:
                error = ParameterError(f"line {number} repeats a custom_id", "name every line differently", param="custom_id")
                line = line._replace(problem=line.problem or error)
            if line.custom_id is not None:
                seen.add(line.custom_id)
            yield line


def _parse(raw: bytes, number: int) -> Line:
    id = f"batch_req_{number}"
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return Line(id, None, {}, SettingsError(f"line {number} is not JSON: {error}", "correct it"))
    if not isinstance(value, dict):
        return Line(id, None, {}, SettingsError(f"line {number} is a {type(value).__name__}", "write an object"))
    named = value.get("custom_id")
    custom_id = named if isinstance(named, str) and named else None

    def wrong(name: str, fix: str) -> Line:
        said = repr(value.get(name))[:80]
        return Line(id, custom_id, {}, ParameterError(f"line {number} has {name}={said}", fix, param=name))

    if custom_id is None:
        return wrong("custom_id", "give every line a text of its own, by which its answer is found")
    if value.get("method", "POST") != "POST":
        return wrong("method", "only POST is known")
    url = value.get("url", ENDPOINT)
    if url not in (ENDPOINT, RESPONSES):
        return wrong("url", f"only {ENDPOINT} and {RESPONSES} are known")
    if not isinstance(value.get("body"), dict):
        return wrong("body", "give the request: an object with messages")
    return Line(id, custom_id, value["body"], url=url)


class Results:
    """The file of answers: opened by one process alone, repaired, and added to line by line.

    ``done``: names of lines that have an answer. ``retry_errors`` takes out the lines of errors first, so that they are asked
    again. Raises SettingsError if it cannot be written or another process writes it.
    """

    def __init__(self, path: Path, retry_errors: bool = False) -> None:
        self.path = path
        self.counts: Counter[str] = Counter({"answered": 0, "failed": 0, "skipped (had an answer)": 0})
        self.done: set[str] = set()
        self.num_errors = 0
        self._lock = threading.Lock()
        with contextlib.ExitStack() as opened:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._guard = opened.enter_context(path.open("ab"))
                fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if retry_errors:
                    self._guard = opened.enter_context(self._without_errors())
                self._lines = opened.enter_context(JsonLines(path))
            except BlockingIOError as error:
                raise SettingsError(f"another process writes {str(path)!r}", "wait for it, or give another path") from error
            except OSError as error:
                raise SettingsError(f"{str(path)!r} cannot be written ({error})", "give another path") from error
            self._read()
            self._open = opened.pop_all()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def has(self, line: Line) -> bool:
        """Whether it has an answer. A line that repeats a custom_id or has none is known by its place."""
        return line.id in self.done if line.problem is not None else f"custom {line.custom_id}" in self.done

    def add(self, line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None) -> None:
        """Write one line, whole. Raises RequestFailed if the disk does not take it."""
        failed = error is not None or (response or {}).get("status_code") != 200
        value = {"id": line.id, "custom_id": line.custom_id, "response": response, "error": error}
        with self._lock:
            try:
                self._lines.append_json(value)
            except OSError as problem:
                raise RequestFailed(
                    f"{str(self.path)!r} cannot be written ({problem})", "make room; then the same command goes on"
                ) from problem
            self._note(value, line.problem is None)
            self.counts["failed" if failed else "answered"] += 1

    def _note(self, value: Mapping[str, Any], named: bool) -> None:
        self.num_errors += _failed(value)
        self.done.add(f"custom {value['custom_id']}" if named else value["id"])

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for raw in file:
                value = self._value(raw)
                self._note(value, value["custom_id"] is not None and (value["error"] or {}).get("code") != "invalid_line")

    def _without_errors(self) -> BinaryIO:
        """Replace the file by one without its errors, in one step; the new file, guarded as the old one was."""
        with JsonLines(self.path):
            pass  # mends a torn line
        kept = [raw for raw in self.path.read_bytes().splitlines(keepends=True) if not _failed(self._value(raw))]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_bytes(b"".join(kept))
        file = partial.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(partial, self.path)
        return file

    def _value(self, raw: bytes) -> dict[str, Any]:
        """One line of answers. Raises SettingsError."""
        try:
            value = json.loads(raw)
            return {key: value[key] for key in ("id", "custom_id", "response", "error")}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SettingsError(
                f"a line of {str(self.path)!r} is no answer of a batch: {raw[:60]!r}", "give another file for the answers"
            ) from error


def _failed(value: Mapping[str, Any]) -> bool:
    return value.get("error") is not None or (value.get("response") or {}).get("status_code") != 200


@dataclass
class Run:
    """One pass over the requests, with a bounded number under way."""

    batch: Batch
    answerer: Answerer
    results: Results
    total: int
    handles: set[Any] = field(default_factory=set)
    fatal: MiradaError | None = None
    stopping: bool = False

    def go(self) -> None:
        """Raises the error that ends a run (a refused key, a full disk), or KeyboardInterrupt; the file is valid then too."""
        slots = threading.Semaphore(2 * self.batch.in_flight)  # read ahead as many as are under way
        with _progress(self.total) as tick, ThreadPoolExecutor(self.batch.in_flight, "mirada-batch") as pool:
            try:
                for line in read_lines(self.batch.source):
                    if self.results.has(line):
                        self.results.counts["skipped (had an answer)"] += 1
                        tick()
                        continue
                    slots.acquire()
                    if self.fatal is not None:
                        break
                    pool.submit(self._one, line).add_done_callback(lambda done: (slots.release(), tick()))
                pool.shutdown(wait=True)
            except BaseException:
                self._stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if self.fatal is not None:
            raise self.fatal

    def _stop(self) -> None:
        self.stopping = True
        for handle in tuple(self.handles):
            handle.cancel()

    def _one(self, line: Line) -> None:
        if self.stopping:
            return
        try:
            self._answer(line)
        except MiradaError as error:
            self.fatal = self.fatal or error
            self._stop()
        except Exception as error:  # a defect must not pass for a line that was never there
            self.fatal = self.fatal or RequestFailed(f"{line.id} failed: {error!r}", "this is a defect; please report it")
            self._stop()

    def _answer(self, line: Line) -> None:
        if line.problem is not None:
            self.results.add(line, None, {"code": "invalid_line", "message": str(line.problem)})
            return
        request_id = f"req_{uuid.uuid4().hex}"
        try:
            outputs, started = self._ask(line)
            failed = next((output.error for output in outputs if output.error is not None), None)
            if failed is not None:
                with started.naming():
                    raise failed
            if self.stopping or any(output.finish == "cancelled" for output in outputs):
                return  # it is asked by the next run
            body = started.body(outputs, request_id[4:])
        except _FATAL:
            raise
        except MiradaError as error:
            if not self.stopping:
                self._fail(line, error, request_id)
            return
        self.results.add(line, {"status_code": 200, "request_id": request_id, "body": body}, None)

    def _ask(self, line: Line) -> tuple[list[Output], Started]:
        started = self.answerer.start(line)
        handles = started.handles
        self.handles.update(handles)
        try:
            if self.stopping:  # since before they were known
                for handle in handles:
                    handle.cancel()
            return [handle.result() for handle in handles], started
        finally:
            self.handles.difference_update(handles)

    def _fail(self, line: Line, error: MiradaError, request_id: str) -> None:
        status, body = error_to_openai(error)
        if isinstance(error, RemoteError):
            if error.status is None or error.status == 200:
                self.results.add(line, None, {"code": body["error"]["code"], "message": str(error)})
                return
            status = error.status
        self.results.add(line, {"status_code": status, "request_id": request_id, "body": body}, None)


class _Local:
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
            return read.answer(
                outputs, id, self._model, asked.chat.sampling, token_bytes(self._vlm), self._vlm.parts.eos,
                ids=options.return_token_ids, reasoning=options.include_reasoning, name=options.request_id,
            )  # fmt: skip

        return Started(list(handles), made, read.naming)

    def close(self) -> None:
        self._vlm.close()


class _Remote:
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
            return read.answer(outputs, id, model, Sampling(), ids=bool(line.body.get("return_token_ids")))

        return Started(list(handles), made, read.naming)

    def close(self) -> None:
        self._client.close()


class _Chat:
    """A line of chat completions."""

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        yield

    def answer(
        self,
        outputs: list[Output],
        id: str,
        model: str,
        sampling: Sampling,
        token_bytes: Callable[[int], bytes] | None = None,
        ends: Collection[int] = (),
        *,
        ids: bool = False,
        reasoning: bool = True,
        name: str | None = None,
    ) -> dict[str, Any]:
        """The body of its answer."""
        outputs = [_with_ids(output, id, index) for index, output in enumerate(outputs)]
        return completion_to_openai(
            outputs, model=model, id=f"chatcmpl-{name or id}", created=int(time.time()), token_bytes=token_bytes,
            return_token_ids=ids, reasoning=reasoning,
        )  # fmt: skip


class _Response(_Chat):
    """A line of responses."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        from mirada.serve.responses import as_chat

        self._body = body
        self.form = as_chat(body)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        from mirada.serve.responses import own_words

        with own_words(self.form.places):
            yield

    def answer(
        self,
        outputs: list[Output],
        id: str,
        model: str,
        sampling: Sampling,
        token_bytes: Callable[[int], bytes] | None = None,
        ends: Collection[int] = (),
        *,
        ids: bool = False,
        reasoning: bool = True,
        name: str | None = None,
    ) -> dict[str, Any]:
        from mirada.client.fake import ending, pieces
        from mirada.serve.responses import Items

        (output,) = outputs
        items = Items(f"resp_{id}", model, sampling, self._body, ends, token_bytes, reasoning)
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


class _progress:
    """A bar for a person at a terminal, on the error stream; nothing otherwise."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("lines"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("lines", total=total)

    def __enter__(self) -> Callable[[], None]:
        if self._bar is None:
            return lambda: None
        self._bar.start()
        return lambda: self._bar.advance(self._task)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
