"""Bytes over HTTP, whole or not at all: resumed where they were cut, checked against what the hub states."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from mirada.errors import HubError
from mirada.hub.source import Asked, Listing, RemoteFile, Source
from mirada.hub.store import Digest, Store

TIMEOUT = httpx.Timeout(30, connect=10)
TRIES = 5
"""Attempts in a row that bring nothing new before a transfer is given up."""
PAUSE = 1.0
"""Seconds before the second attempt; doubled for each further one."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Progress:
    """How far one file is: ``done`` of ``total`` bytes, of which ``reused`` were there before."""

    name: str
    done: int
    total: int
    reused: int = 0


Report = Callable[[Progress], None]


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # reads all certificates: a tenth of a second


class Web:
    """One hub, spoken to with one token. Redirects to other hosts are followed without it."""

    def __init__(self, source: Source, asked: Asked, token: str | None) -> None:
        self.source, self.asked, self.token = source, asked, token
        headers = {"User-Agent": "mirada", **source.headers(token)}
        self.client = httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=True, verify=_tls())

    def __enter__(self) -> Web:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def listing(self) -> Listing:
        """What the repository holds. HubError, or one of its kinds, if the hub does not say; Unreachable if it is not there."""
        url = self.source.listing_url(self.asked)
        for attempt in range(TRIES):
            try:
                answer = self.client.get(url)
            except httpx.RequestError as error:  # redirects without end are none of transport
                raise Unreachable(self.source, self.asked, error) from error
            if answer.status_code not in _PASSING or attempt == TRIES - 1:
                break
            time.sleep(_pause(attempt, answer.headers))
        self._check(answer)
        try:
            return self.source.listing(answer.json())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubError(
                f"{self.asked.endpoint} does not answer like {self.source.title} ({type(error).__name__}: {error})",
                "check the address of the hub",
            ) from error

    def _check(self, answer: httpx.Response) -> None:
        if answer.is_success:
            return
        known = self.source.refusal(self.asked, answer.status_code, answer.headers, self.token is not None)
        raise known or HubError(
            f"{self.source.title} answered {answer.status_code} for {self.asked.model!r}", "try again later"
        )

    def fetch(self, store: Store, commit: str, file: RemoteFile, report: Report) -> Path:
        """The file in the store, fetched if it is not there. HubError if it does not arrive whole; the next call goes on."""
        if not store.has(commit, file):
            with store.locked(file):
                if not store.has(commit, file):  # another process may have been first
                    self._transfer(self.source.file_url(self.asked, commit, file.name), store.part(file), file, report)
                    store.part(file).replace(store.blob(file))
        report(Progress(file.name, file.size, file.size, file.size))
        return store.link(commit, file)

    def _transfer(self, url: str, part: Path, file: RemoteFile, report: Report) -> None:
        """``url`` into ``part``, in as many requests as it takes, then its hash."""
        tries, cause = 0, ""
        if part.is_file() and part.stat().st_size > file.size:
            part.unlink()
        reused = _size(part)
        while (held := _size(part)) < file.size or not part.exists():
            if tries == TRIES:
                raise HubError(
                    f"{file.name!r} broke off after {held} of {file.size} bytes ({cause})",
                    "run it again: it goes on where it stopped",
                )
            if tries:
                time.sleep(_pause(tries - 1, {}))
            try:
                self._append(url, part, held, file, lambda done: report(Progress(file.name, done, file.size, reused)))
                cause = "the connection was closed early"
            except (httpx.RequestError, _Passing) as error:
                cause = str(error) or type(error).__name__
            tries = 0 if _size(part) > held else tries + 1
        digest = Digest(file)
        digest.read(part)
        if not digest.fits():
            part.unlink()
            raise HubError(
                f"{file.name!r} arrived with other bytes than {self.source.title} states ({file.key[:12]}...)", "fetch it again"
            )

    def _append(self, url: str, part: Path, held: int, file: RemoteFile, report: Callable[[int], None]) -> None:
        """One request for what is missing from byte ``held`` on, added to ``part``."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
        with self.client.stream("GET", url, headers=headers) as answer:
            if answer.status_code in _PASSING:
                raise _Passing(f"the server answered {answer.status_code}")
            if answer.status_code == 416:  # the server's file ends before ours: ours is wrong
                part.unlink()
                return
            self._check(answer)
            if held and not _continues(answer, held):
                held = 0  # the whole file comes again
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("r+b" if held else "wb") as handle:
                handle.seek(held)
                for data in answer.iter_raw():  # as it comes: what a cut leaves in a buffer would be lost
                    if held + len(data) > file.size:
                        raise HubError(
                            f"{file.name!r} is longer than the {file.size} bytes that {self.source.title} states",
                            "try again, or another hub",
                        )
                    handle.write(data)
                    held += len(data)
                    report(held)


class _Passing(Exception):
    """An answer that may be another the next time."""


class Unreachable(HubError):
    """The hub could not be spoken to at all."""

    def __init__(self, source: Source, asked: Asked, cause: object) -> None:
        super().__init__(
            f"{source.title} at {asked.endpoint} cannot be reached, so {asked.model!r} cannot be looked up ({cause})",
            "check the connection and proxy, or the path if a folder was meant; HF_HUB_OFFLINE=1 uses what was fetched before",
        )


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _continues(answer: httpx.Response, held: int) -> bool:
    """Whether the answer begins at byte ``held``, as was asked."""
    found = re.match(r"bytes (\d+)-", answer.headers.get("content-range", ""))
    return answer.status_code == 206 and found is not None and int(found[1]) == held


def _pause(attempt: int, headers: Mapping[str, Any]) -> float:
    """Seconds to wait: what the server asks for, up to a minute, or twice as long each time."""
    asked = str(headers.get("retry-after", ""))
    return min(60.0, float(asked)) if asked.isdecimal() else PAUSE * 2**attempt
