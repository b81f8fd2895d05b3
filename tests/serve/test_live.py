"""Live video: the rolling window by itself, and the WebSocket of a real server."""

from __future__ import annotations

import base64
import io
import json
import time
from contextlib import ExitStack

import pytest
from PIL import Image
from serving import KEY
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mirada.errors import MediaDecodeError, MediaTooLarge, MessageError
from mirada.serve.guard import key_of
from mirada.serve.live import LiveLimits, Window


def jpeg(size=(96, 64), colour=(200, 30, 30)) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", size, colour).save(made, "JPEG")
    return made.getvalue()


def frame(time_ms: int, data: bytes | None = None) -> bytes:
    return time_ms.to_bytes(8, "big") + (jpeg() if data is None else data)


# ---- the window


def test_the_window_forgets_by_time_by_number_and_by_bytes():
    by_time = Window(LiveLimits(seconds=2))
    for second in range(10):
        by_time.add(frame(second * 1000))
    assert (len(by_time), by_time.seconds) == (3, 2.0)
    by_number = Window(LiveLimits(frames=4))
    by_bytes = Window(LiveLimits(bytes=3 * len(jpeg())))
    for number in range(10):
        by_number.add(frame(number))
        by_bytes.add(frame(number))
    assert len(by_number) == 4 and by_number.num_bytes == 4 * len(jpeg())
    assert len(by_bytes) == 3 and by_bytes.num_bytes == 3 * len(jpeg())


def test_a_question_sees_the_last_seconds_at_the_rate_they_were_taken():
    window = Window(LiveLimits(asked_frames=5))
    colours = [jpeg(colour=(number, 0, 0)) for number in range(0, 250, 10)]
    for number, data in enumerate(colours):
        window.add(frame(1_000_000 + number * 500, data))
    frames, rate = window.last(1.5)
    assert frames == colours[-4:] and rate == pytest.approx(2.0)
    frames, rate = window.last(10)  # 21 frames, of which five are taken
    assert frames == [colours[i] for i in (4, 9, 14, 19, 24)] and rate == pytest.approx(0.4)


def test_one_frame_has_a_rate_and_none_is_an_error():
    window = Window(LiveLimits())
    with pytest.raises(MessageError, match="no frame has arrived"):
        window.last(10)
    window.add(frame(7))
    assert window.last(10) == ([jpeg()], 1.0)


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        (frame(5, b"GIF89a"), MediaDecodeError, "not a JPEG"),
        (b"\0\0", MediaDecodeError, "not a JPEG"),
        (frame(5, jpeg((2000, 1100))), MediaTooLarge, "2200000 pixels"),
        (frame(5, b"\xff\xd8\xff" + bytes(1 << 20)), MediaTooLarge, "bytes"),
        (frame(3), MediaDecodeError, "3 ms came after one of 4 ms"),
        (frame(4), MediaDecodeError, "4 ms came after one of 4 ms"),
    ],
)
def test_a_bad_frame_is_refused_and_changes_nothing(data, kind, said):
    window = Window(LiveLimits())
    window.add(frame(4))
    with pytest.raises(kind, match=said):
        window.add(data)
    assert len(window) == 1 and window.num_bytes == len(jpeg())


@pytest.mark.parametrize(
    ("offered", "key"),
    [
        ("mirada.live, mirada.key." + base64.urlsafe_b64encode(b"secret-?>~").decode().rstrip("="), "secret-?>~"),
        ("mirada.live", ""),
        ("mirada.key.*", ""),
        ("mirada.key.w6k", ""),
        ("", ""),
    ],
)
def test_the_key_among_subprotocols(offered, key):
    assert key_of(offered) == key


# ---- the connection


@pytest.fixture
def live(server):
    """``live(key=KEY)``: an open connection."""
    address = server.url.replace("http", "ws") + "/v1/live"
    with ExitStack() as opened:

        def make(key: str = KEY):
            coded = base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")
            protocols: list = ["mirada.live", f"mirada.key.{coded}"]
            return opened.enter_context(connect(address, subprotocols=protocols, open_timeout=20))

        yield make


def say(socket, **message) -> None:
    socket.send(json.dumps(message))


def hear(socket, kind: str) -> dict:
    """The next message of a kind."""
    while (message := json.loads(socket.recv(timeout=60)))["type"] != kind:
        assert message["type"] in ("state", "delta"), message
    return message


def test_answers_about_the_last_seconds_while_frames_keep_coming(live):
    socket = live()
    assert socket.subprotocol == "mirada.live"  # and never the key
    say(socket, type="start", model="echo")
    assert hear(socket, "state")["frames"] == 0
    for number in range(12):
        socket.send(frame(1_000_000 + number * 500))
    say(socket, type="question", id="q1", text="What is it? say:Red, all of it.", seconds=3)
    said, frames_after = "", 12
    while (message := json.loads(socket.recv(timeout=60)))["type"] != "done":
        assert message["type"] in ("delta", "state"), message
        if message["type"] == "delta":
            assert message["id"] == "q1"
            said += message["choices"][0]["delta"].get("content") or ""
        socket.send(frame(1_000_000 + frames_after * 500))
        frames_after += 1
    usage = message["usage"]
    assert said == "Red, all of it."
    assert usage["num_frames"] == 7 and usage["prompt_tokens_details"]["video_tokens"] > 0
    say(socket, type="question", id="q2", text="And now? say:Red.")
    longer = hear(socket, "done")["usage"]  # the first question and its answer are read again
    assert longer["prompt_tokens"] > usage["prompt_tokens"]


def test_stop_ends_an_answer_and_the_next_is_taken(live):
    socket = live()
    say(socket, type="start", model="mini")
    socket.send(frame(1))
    say(socket, type="question", id="long", text="Go on.", max_tokens=400, ignore_eos=True)
    say(socket, type="question", id="second", text="Me too.")
    assert hear(socket, "error")["id"] == "second"  # one at a time
    say(socket, type="stop", id="long")
    say(socket, type="question", id="third", text="Short?", max_tokens=2)
    assert hear(socket, "done")["id"] == "third"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"type": "question", "id": "a", "text": " "}, "text"),
        ({"type": "question", "id": 5, "text": "x"}, "id"),
        ({"type": "question", "id": "a", "text": "x", "seconds": 61}, "seconds"),
        ({"type": "question", "id": "a", "text": "x", "seconds": True}, "seconds"),
        ({"type": "question", "id": "a", "text": "x", "temperature": -1}, "temperature"),
        ({"type": "question", "id": "a", "text": "x", "nonsense": 1}, "nonsense"),
        ({"type": "question", "id": "a", "text": "x", "n": 2}, "n"),
        ({"type": "question", "id": "a", "text": "x", "messages": []}, "messages"),
        ({"type": "dance"}, "type"),
        ({"type": "start", "model": "nobody"}, "model"),
    ],
)
def test_a_bad_message_is_an_error_that_names_it_and_the_connection_lives(live, message, param):
    socket = live()
    say(socket, type="start", model="mini")
    socket.send(frame(1))
    say(socket, **message)
    assert hear(socket, "error")["error"]["param"] == param
    say(socket, type="question", id="after", text="Still there?", max_tokens=1)
    assert hear(socket, "done")["id"] == "after"


@pytest.mark.parametrize("sent", [b"", "no json", "[]", '{"type": "question", "id": "a", "text": "x"}', frame(1)])
def test_nothing_is_taken_before_start(live, sent):
    socket = live()
    socket.send(sent)
    assert hear(socket, "error")["error"]["message"]
    say(socket, type="start", model="mini")
    hear(socket, "state")


def test_a_wrong_key_does_not_come_in(live):
    with pytest.raises(InvalidStatus) as refused:
        live(key="wrong-key-1234")
    assert refused.value.response.status_code == 403


def test_a_message_above_the_limit_ends_only_its_own_connection(live):
    socket, other = live(), live()
    with pytest.raises(ConnectionClosed):
        socket.send(bytes(3 << 20))
        socket.recv(timeout=30)
    say(other, type="start", model="mini")
    hear(other, "state")


def test_a_client_that_vanishes_frees_its_place(live, server):
    for _ in range(3):
        socket = live()
        say(socket, type="start", model="mini")
        socket.send(frame(1))
        say(socket, type="question", id="long", text="Go on.", max_tokens=2000, ignore_eos=True)
        hear(socket, "delta")
        socket.socket.shutdown(2)
    until = time.monotonic() + 30
    while True:
        (under_way,) = (
            line for line in server.get("/metrics").text.splitlines() if line.startswith("mirada_requests_under_way ")
        )
        if under_way.endswith(" 0.0"):
            return
        assert time.monotonic() < until, under_way
        time.sleep(0.2)
