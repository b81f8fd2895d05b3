"""Server-sent events out of bytes as they come, however they were cut.

The rules are those of the HTML standard (section 9.2.6, "Interpreting an event stream"): lines end with LF, CR or CRLF, a line
that begins with a colon is a comment, ``data`` lines of one event are joined by LF, an empty line ends it, and what is left
at the end without one is no event. One departure: bytes that are not UTF-8 are an error and not U+FFFD, for they would
become an answer that nobody gave.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirada.errors import RemoteError

MOST_BYTES = 16 << 20
"""Of one event; a server that never ends a line must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Event:
    data: str
    event: str = "message"


class SSEParser:
    """``feed`` bytes, take events. Raises RemoteError for bytes that are not UTF-8 and events above ``most`` bytes."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._line = bytearray()
        """A line that has not ended."""
        self._after_cr = False
        """The last byte was a CR: an LF that follows belongs to it."""
        self._first = True
        self._data: list[str] = []
        self._event = ""
        self._size = 0

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that ``chunk`` completes."""
        events: list[Event] = []
        at = 0
        while at < len(chunk):
            if self._after_cr and chunk[at : at + 1] == b"\n":
                at += 1
                self._after_cr = False
                continue
            self._after_cr = False
            end = _line_end(chunk, at)
            self._line += chunk[at:end]
            if self._size + len(self._line) > self._most:
                raise RemoteError(
                    f"the server sent an event of more than {self._most} bytes", "check that it speaks OpenAI's API"
                )
            if end == len(chunk):
                break
            self._after_cr = chunk[end] == 13
            at = end + 1
            self._take_line(events)
        return events

    @property
    def pending(self) -> bool:
        """Whether an event or a line has begun and not ended."""
        return bool(self._line or self._data)

    def _take_line(self, events: list[Event]) -> None:
        raw, self._line = bytes(self._line), bytearray()
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RemoteError(f"the server sent bytes that are not UTF-8 ({error.reason})", "check the server") from error
        if self._first:
            line, self._first = line.removeprefix("\ufeff"), False
        if not line:
            if self._data:
                events.append(Event("\n".join(self._data), self._event or "message"))
            self._data, self._event, self._size = [], "", 0
            return
        self._size += len(raw)
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value


def _line_end(chunk: bytes, at: int) -> int:
    """Where the line that holds ``at`` ends in ``chunk``; its length if it does not."""
    cr = chunk.find(b"\r", at)
    lf = chunk.find(b"\n", at, cr if cr >= 0 else len(chunk))
    return lf if lf >= 0 else cr if cr >= 0 else len(chunk)
