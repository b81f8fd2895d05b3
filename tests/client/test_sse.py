"""Server-sent events: the same events however the bytes are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.client.sse import Event, SSEParser
from mirada.errors import RemoteError

STREAM = (
    "\ufeff: a comment\r\n\r\ndata: eins\n\ndata: zwei é 漢 🦉\r\n\r\nevent: note\rdata:drei\rdata:  vier\rid: 7\rretry: 5\r\r"
    "data\n\nevent: empty\n\ndata: [DONE]\n\ndata: torn"
).encode()
EVENTS = [Event("eins"), Event("zwei é 漢 🦉"), Event("drei\n vier", "note"), Event(""), Event("[DONE]")]


def read(*pieces: bytes) -> list[Event]:
    parser = SSEParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_whole_and_byte_by_byte():
    assert read(STREAM) == EVENTS
    assert read(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == EVENTS


def test_every_split_point():
    for at in range(len(STREAM) + 1):
        assert read(STREAM[:at], STREAM[at:]) == EVENTS, at


@settings(max_examples=60)
@given(st.lists(st.integers(0, len(STREAM)), max_size=9), st.sampled_from([b"\n", b"\r", b"\r\n"]))
def test_any_chunking_and_line_end(cuts, end):
    data = (
        b"".join(line + end for line in STREAM.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]) + b"data: torn"
    )
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert read(*(data[a:b] for a, b in pairwise(places))) == EVENTS


def test_an_event_comes_as_soon_as_its_empty_line_does():
    parser = SSEParser()
    assert parser.feed(b"data: x\r") == [] and parser.feed(b"\r") == [Event("x")]
    assert parser.feed(b"\ndata: y\n") == [] and parser.pending
    assert parser.feed(b"\n") == [Event("y")] and not parser.pending


def test_what_is_not_utf8_is_an_error_and_not_a_question_mark():
    with pytest.raises(RemoteError, match="not UTF-8"):
        read(b"data: \xff\n\n")
    with pytest.raises(RemoteError, match="not UTF-8"):
        read("data: é".encode()[:-1] + b"\n\n")


@pytest.mark.parametrize("piece", [b"x" * 64, b"data: xxxxxxxx\n"])
def test_an_endless_event_ends(piece):
    parser = SSEParser(most=1000)
    with pytest.raises(RemoteError, match="more than 1000 bytes"):
        for _ in range(200):
            parser.feed(piece)
