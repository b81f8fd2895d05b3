"""The two files of ``mirada batch``: lines of requests as they are read, and the file of answers, which one process alone
opens, mends and adds to.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mirada.errors import MiradaError, ParameterError, RequestFailed, SettingsError
from mirada.records.files import JsonLines

ENDPOINT, RESPONSES = "/v1/chat/completions", "/v1/responses"
HAD_ANSWER, HAD_ERROR = "skipped (had an answer)", "skipped (had an error: --retry-errors asks again)"


class Line(NamedTuple):
    """One request. ``id`` names its place in the file; ``problem``: why it is none."""

    id: str
    custom_id: str | None
    body: Mapping[str, Any]
    problem: MiradaError | None = None
    url: str = ENDPOINT


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

    ``done``: names of lines that have an answer or an error, and whether it is an error. ``retry_errors`` takes out the lines
    of errors first, so that they are asked again. Raises SettingsError if it cannot be written or another process writes it.
    """

    def __init__(self, path: Path, retry_errors: bool = False) -> None:
        self.path = path
        self.counts: Counter[str] = Counter(dict.fromkeys(("answered", "failed", HAD_ANSWER, HAD_ERROR), 0))
        self.done: dict[str, bool] = {}
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

    def skips(self, line: Line) -> bool:
        """Whether it has an answer or an error already, which is counted. A line that repeats a custom_id or has none is known
        by its place."""
        failed = self.done.get(line.id if line.problem is not None else f"custom {line.custom_id}")
        if failed is not None:
            self.counts[HAD_ERROR if failed else HAD_ANSWER] += 1
        return failed is not None

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
        failed = _failed(value)
        self.num_errors += failed
        self.done[f"custom {value['custom_id']}" if named else value["id"]] = failed

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
