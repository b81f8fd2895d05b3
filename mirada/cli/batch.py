"""``mirada batch``: a file of requests in OpenAI's batch format, answered line by line into another.

A line of the result is written when its answer is whole, so the file is valid at every moment, and a run that was ended goes on
where it stopped. A line that is wrong, or whose request fails, becomes a line that says so.
"""

from __future__ import annotations

import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from mirada.cli.batch_answer import Answerer, Batch, Local, Remote, Started
from mirada.cli.batch_file import Line, Results, read_lines
from mirada.errors import (
    MiradaError,
    ParameterError,
    RemoteError,
    RemoteRefused,
    RemoteUnreachable,
    RequestFailed,
    SettingsError,
)
from mirada.records import error_to_openai
from mirada.types import Output, Sampling

_FATAL = (RemoteRefused, RemoteUnreachable)
"""What would happen to every further line as well."""


def run(batch: Batch) -> int:
    """Answer what is not answered yet; the exit code: 0 all lines have an answer, 1 some have an error, 130 interrupted."""
    _check(batch)
    with Results(batch.target, batch.retry_errors) as results:
        total = sum(1 for _ in read_lines(batch.source))
        answerer = Remote(batch) if batch.url is not None else Local(batch)
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
                    if self.results.skips(line):
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
        except RecursionError:
            self._fail(
                line, ParameterError("the body is nested too deeply", "send something flatter", param="body"), request_id
            )
            return
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
