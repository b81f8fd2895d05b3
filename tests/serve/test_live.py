"""Live video: the rolling window by itself, and the WebSocket of a real server. Every message of either side is judged by
``live.schema.json``."""

from __future__ import annotations

import base64
import io
import itertools
import json
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from functools import cache
from importlib.resources import files

import httpx
import jsonschema
import pytest
from oracle import wrong
from PIL import Image
from serving import KEY, start_command
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mirada.errors import MediaDecodeError, MediaTooLarge, MessageError, SettingsError
from mirada.serve.guard import key_of
from mirada.serve.settings import ServeSettings
from mirada.serve.window import LiveLimits, Window

judged: Counter[str] = Counter()
"""Messages by type that the schema has judged."""


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
    by_number = Window(LiveLimits(frames=4, frames_per_second=1e6))
    by_bytes = Window(LiveLimits(bytes=3 * len(jpeg()), frame_bytes=2000, frames_per_second=1e6))
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


@pytest.mark.parametrize(("given", "kept"), [(30, 4), (5, 4), (4, 4), (2, 2)])
def test_frames_that_come_faster_than_they_may_are_thinned_out(given, kept):
    window = Window(LiveLimits(frames_per_second=4))
    unsteady = itertools.cycle((0, 40, -40, 20))
    num_sent = given * 10
    taken = [
        window.add(frame(1000 + round(number * 1000 / given) + (next(unsteady) if given < 5 else 0)))
        for number in range(num_sent)
    ]
    assert 9 * kept <= len(window) == sum(taken) <= 10 * kept + 1
    assert window.num_left_out == num_sent - sum(taken)


def test_a_question_may_look_at_one_frame_alone():
    window = Window(LiveLimits(asked_frames=1))
    for number in range(3):
        window.add(frame(number * 1000, jpeg(colour=(number, 0, 0))))
    assert window.last(10) == ([jpeg(colour=(2, 0, 0))], 1.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"frames": 0}, "frames=0"), ({"seconds": -1.0}, "seconds"), ({"bytes": 9}, "frame_bytes"), ({"turns": -1}, "turns")],
)
def test_bounds_that_bound_nothing_are_refused(given, said):
    with pytest.raises(SettingsError, match=said):
        LiveLimits(**given)
    assert ServeSettings(live=LiveLimits(turns=0)).live.turns == 0


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


# ---- what is said


@cache
def schema() -> dict:
    made = json.loads(files("mirada.serve").joinpath("live.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(made)
    return made


def fits(message: dict, side: str) -> bool:
    """Whether ``message`` is one that ``side`` may send."""
    rules = {"$ref": f"#/$defs/from_{side}", "$defs": schema()["$defs"]}
    return jsonschema.Draft202012Validator(rules).is_valid(message)


def say(socket, **message) -> None:
    """Send what the schema allows."""
    assert fits(message, "client"), message
    judged[message["type"]] += 1
    socket.send(json.dumps(message))


def hear_any(socket) -> dict:
    message = json.loads(socket.recv(timeout=60))
    assert fits(message, "server"), message
    judged[message["type"]] += 1
    if message["type"] == "delta":  # and its choices by OpenAI's document
        whole = {"id": "x", "created": 1, "model": "x", "object": "chat.completion.chunk", "choices": message["choices"]}
        assert not wrong("CreateChatCompletionStreamResponse", whole)
    return message


def hear(socket, kind: str) -> dict:
    """The next message of a kind."""
    while (message := hear_any(socket))["type"] != kind:
        assert message["type"] in ("state", "delta", "stopped"), message
    return message


def answer(socket, id: str, text: str, **more) -> dict:
    """The usage of a question's whole answer."""
    say(socket, type="question", id=id, text=text, **more)
    done = hear(socket, "done")
    assert done["id"] == id
    return done["usage"]


# ---- the connection


@pytest.fixture
def live(server):
    """``live(key=KEY)``: an open connection."""
    with ExitStack() as opened:

        def make(key: str = KEY, **headers: str):
            coded = base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")
            protocols: list = ["mirada.live", f"mirada.key.{coded}"]
            return opened.enter_context(open_socket(server.url, subprotocols=protocols, additional_headers=headers))

        yield make


def open_socket(address: str, **more):
    return connect(address.replace("http", "ws", 1) + "/v1/live", open_timeout=20, max_size=None, compression=None, **more)


def test_answers_about_the_last_seconds_while_frames_keep_coming(live):
    socket = live()
    assert socket.subprotocol == "mirada.live"  # and never the key
    say(socket, type="start", model="echo")
    assert hear(socket, "state")["frames"] == 0
    for number in range(12):
        socket.send(frame(1_000_000 + number * 500))
    say(socket, type="question", id="q1", text="What is it? say:Red, all of it.", seconds=3)
    said, frames_after = "", 12
    while (message := hear_any(socket))["type"] != "done":
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
    say(socket, type="question", id="long", text="Again.")
    assert "id" not in hear(socket, "error")  # of that name an answer is under way, and has not ended
    say(socket, type="stop", id="another")
    say(socket, type="stop", id="long")
    assert hear(socket, "stopped")["id"] == "long"
    answer(socket, "third", "Short?", max_tokens=2)


QUESTION = {"type": "question", "id": "a", "text": "x"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (QUESTION | {"seconds": 61}, "seconds"),
        (QUESTION | {"temperature": -1}, "temperature"),
        (QUESTION | {"nonsense": 1}, "nonsense"),
        ({"type": "start", "model": "nobody"}, "model"),
        ({"type": "start", "model": "mini", "messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"type": "start", "model": "mini", "messages": [{"role": "assistant", "content": "x"}]}, "messages[0]"),
    ],
)
def test_what_only_the_server_knows_to_be_wrong_is_named(live, message, param):
    socket = live()
    say(socket, type="start", model="mini")
    socket.send(frame(1))
    say(socket, **message)
    assert hear(socket, "error")["error"]["param"] == param
    answer(socket, "after", "Still there?", max_tokens=1)


def test_the_server_refuses_what_the_schema_does_and_names_it(live):
    socket = live()
    say(socket, type="start", model="mini")
    socket.send(frame(1))
    right = [
        {"type": "start", "model": "mini", "system": "s", "messages": []},
        QUESTION | {"seconds": 2.5, "max_tokens": 1},
        {"type": "stop", "id": "a"},
    ]
    turn = {"role": "user", "content": "x"}
    odd = [5, True, "", " ", "x" * 129, [], {}, None, [turn, 5], [turn, {"role": "user", "content": "x"}], [turn | {"a": 1}]]
    num_refused = 0
    for message in right:
        for name, value in itertools.product((*message, "n", "stream", "fps", "mm_processor_kwargs", "another"), odd):
            if name == "max_tokens":
                continue
            changed = message | {name: value}
            if fits(changed, "client") or (name == "another" and message["type"] == "question"):
                continue
            socket.send(json.dumps(changed))
            error = hear(socket, "error")["error"]
            assert error["param"] and error["param"].startswith(name), (changed, error)
            num_refused += 1
    assert num_refused > 100
    answer(socket, "after", "Still there?", max_tokens=1)


def test_the_schema_knows_every_message():
    for kind in ("state", "delta", "done", "stopped", "error"):
        assert judged[kind] and not fits({"type": kind}, "server")
    assert judged["start"] and judged["question"] and judged["stop"]
    assert not fits({"type": "dance"}, "client") and not fits({"type": "start", "model": "x"}, "server")


def test_the_conversation_is_what_start_says_it_is(live):
    socket = live()
    say(socket, type="start", model="echo")
    socket.send(frame(1))
    alone = answer(socket, "1", "What is it? say:Red.")["prompt_tokens"]
    follows = answer(socket, "2", "What is it? say:Red.")["prompt_tokens"]
    assert follows > alone
    say(socket, type="start", model="echo")  # the model alone changes: turns and frames stay
    state = hear(socket, "state")
    assert (state["turns"], state["frames"], state["model"]) == (2, 1, "echo")
    say(socket, type="start", model="echo", messages=[])  # a new conversation
    assert answer(socket, "3", "What is it? say:Red.")["prompt_tokens"] == alone
    turns = [{"role": "user", "content": "What is it? say:Red."}, {"role": "assistant", "content": "Red."}]
    say(socket, type="start", model="echo", messages=turns)  # the second asked again
    assert answer(socket, "4", "What is it? say:Red.")["prompt_tokens"] == follows
    say(socket, type="start", model="echo", system="You see everything.", messages=[])
    assert answer(socket, "5", "What is it? say:Red.")["prompt_tokens"] > alone
    say(socket, type="start", model="echo", messages=turns * 20)
    assert hear(socket, "state")["turns"] == LiveLimits().turns


def test_parameters_of_a_chat_hold_for_a_question(live):
    """``n`` and the like are refused; what shapes the answer is not left aside."""
    socket = live()
    say(socket, type="start", model="echo")
    socket.send(frame(1))
    asked = {"text": "say:<think>why</think>Red.", "thinking": "on"}

    def choices(id: str, **more) -> list[dict]:
        say(socket, type="question", id=id, **asked, **more)
        found = []
        while (message := hear_any(socket))["type"] != "done":
            found += message.get("choices", [])
        return found

    plain = choices("a")
    thought = [one["delta"].get("reasoning_content") or "" for one in plain]
    assert "".join(thought) == "why" and not any("token_ids" in one for one in plain)
    silent = choices("b", include_reasoning=False, return_token_ids=True)
    assert not any(one["delta"].get("reasoning_content") for one in silent)
    assert "".join(one["delta"].get("content") or "" for one in silent) == "Red."
    assert any(one.get("token_ids") for one in silent)


def test_start_ends_an_answer_and_an_adapter_is_a_model(live):
    socket = live()
    say(socket, type="start", model="mini")
    socket.send(frame(1))
    say(socket, type="question", id="long", text="Go on.", max_tokens=2000, ignore_eos=True)
    hear(socket, "delta")
    say(socket, type="start", model="loud", messages=[])
    assert hear(socket, "stopped")["id"] == "long"
    assert hear(socket, "state")["model"] == "loud"
    answer(socket, "short", "And you?", max_tokens=2)


def test_a_defect_ends_its_question_alone_and_is_logged_under_the_connections_id(live, server):
    socket = live(**{"X-Request-ID": "of-this-defect"})
    assert socket.response.headers["x-request-id"] == "of-this-defect"
    say(socket, type="start", model="echo")
    assert hear(socket, "state")["request_id"] == "of-this-defect"
    socket.send(frame(1))
    say(socket, type="question", id="q", text="defect:now")
    found = hear(socket, "error")
    assert (found["id"], found["error"]["code"]) == ("q", "internal_error") and "now" not in found["error"]["message"]
    answer(socket, "after", "Still there? say:Yes.")
    lines = lines_of(server, "of-this-defect", 3)
    assert [(line["event"], line.get("status")) for line in lines] == [
        ("defect", None), ("live_question", 500), ("live_question", 200),
    ]  # fmt: skip
    assert "RuntimeError" in lines[0]["traceback"] and lines[2]["prompt_tokens"] > 0


def test_connections_are_logged_and_counted(live, server):
    def figures() -> dict[str, float]:
        lines = [line for line in server.get("/metrics").text.splitlines() if "live" in line and not line.startswith("#")]
        pairs = (line.rpartition(" ") for line in lines if "_created" not in line)
        return {name: float(value) for name, _, value in pairs}

    wait_for(lambda: figures()["mirada_live_connections"] == 0)  # those of other tests
    before = figures()
    socket = live(**{"X-Request-ID": "of-this-count"})
    say(socket, type="start", model="echo")
    for time_ms in (1, 1000, 1001, 1002):
        socket.send(frame(time_ms))
    socket.send(frame(1))
    hear(socket, "error")
    answer(socket, "a", "What is it? say:Red.")
    asked = 'mirada_live_questions_total{status="200"}'  # counted once its done is sent
    wait_for(lambda: figures().get(asked, 0) > before.get(asked, 0))
    after = figures()
    rise = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert rise == {
        "mirada_live_connections": 1, "mirada_live_bytes": 2 * len(jpeg()),
        'mirada_live_frames_total{outcome="kept"}': 2, 'mirada_live_frames_total{outcome="left_out"}': 2,
        'mirada_live_frames_total{outcome="refused"}': 1, 'mirada_live_questions_total{status="200"}': 1,
    }  # fmt: skip
    socket.close()
    line = lines_of(server, "of-this-count", 2)[-1]
    assert (line["path"], line["status"], line["questions"], line["left_out"]) == ("/v1/live", 101, 1, 2)
    name = 'mirada_requests_total{path="/v1/live",status="101"}'
    assert figures()[name] == before.get(name, 0) + 1


def lines_of(server, id: str, count: int) -> list[dict]:
    """What the log says under ``id``, once it is so many lines."""

    def found() -> list[dict]:
        return [line for line in server.logged() if line.get("id") == id]

    wait_for(lambda: len(found()) >= count)
    return found()


def wait_for(holds, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("sent", [b"", "no json", "[]", '{"type": "question", "id": "a", "text": "x"}', frame(1)])
def test_nothing_is_taken_before_start(live, sent):
    socket = live()
    socket.send(sent)
    assert hear(socket, "error")["error"]["message"]
    say(socket, type="start", model="mini")
    hear(socket, "state")


def test_a_wrong_key_does_not_come_in_and_is_logged(live, server):
    with pytest.raises(InvalidStatus) as refused:
        live(key="wrong-key-1234", **{"X-Request-ID": "of-the-wrong-key"})
    reply = refused.value.response
    assert reply.status_code == 401 and json.loads(reply.body)["error"]["code"] == "invalid_api_key"
    assert reply.headers["x-request-id"] == "of-the-wrong-key"
    (line,) = lines_of(server, "of-the-wrong-key", 1)
    assert (line["path"], line["status"]) == ("/v1/live", 401)


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


# ---- bounds that were set


BOUNDS = {"seconds": 3, "frames": 5, "bytes": 40_000, "frame_bytes": 9_000, "frames_per_second": 2, "connections": 2,
          "idle_seconds": 1.5}  # fmt: skip


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    """A server of the command with ``BOUNDS`` in its file: (process, address, log)."""
    with start_command(tmp_path_factory.mktemp("live"), {"live": BOUNDS, "send_seconds": 1.5}) as running:
        yield running


def test_the_bounds_of_the_configuration_hold(bounded):
    with open_socket(bounded[1]) as socket:
        say(socket, type="start", model="mini")
        hear(socket, "state")
        for number in range(40):  # of four seconds
            socket.send(frame(number * 100))
        say(socket, type="start", model="mini")
        state = hear(socket, "state")
        while state["left_out"] < 31:
            state = hear(socket, "state")
        assert (state["frames"], state["left_out"]) == (5, 31)
        large = jpeg() + bytes(8_999 - len(jpeg()))
        for number in range(10):
            socket.send(frame(10_000 + number * 500, large))
        say(socket, type="start", model="mini")
        assert hear(socket, "state")["bytes"] <= 40_000
        socket.send(frame(20_000))
        socket.send(frame(30_000))
        say(socket, type="start", model="mini")
        assert hear(socket, "state")["frames"] == 1  # the rest is older than three seconds
        socket.send(frame(31_000, large + b"xx"))
        assert hear(socket, "error")["error"]["code"] == "media_too_large"
        say(socket, type="question", id="a", text="x", seconds=3.5)
        assert hear(socket, "error")["error"]["param"] == "seconds"
        assert answer(socket, "b", "And now?", max_tokens=1)["num_frames"] == 1


def test_one_connection_more_is_told_why_and_closed(bounded):
    with open_socket(bounded[1]) as first, open_socket(bounded[1]) as second:
        with open_socket(bounded[1]) as third:
            assert hear(third, "error")["error"]["code"] == "too_many_requests"
            with pytest.raises(ConnectionClosed) as closed:
                third.recv(timeout=10)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        for socket in (first, second):
            say(socket, type="start", model="mini")
            hear(socket, "state")


def test_who_keeps_silent_is_closed_but_not_while_it_waits_for_an_answer(tmp_path):
    with start_command(tmp_path, {"live": {"idle_seconds": 0.6}}) as running, open_socket(running[1]) as socket:
        say(socket, type="start", model="mini")
        socket.send(frame(1))
        say(socket, type="question", id="long", text="Go on.", max_tokens=3900, ignore_eos=True)
        began = time.monotonic()
        hear(socket, "done")
        waited = time.monotonic() - began
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        assert waited > 0.6, "the answer was too short to show anything"


def test_who_does_not_read_is_closed(bounded):
    def flood() -> None:
        with suppress(ConnectionClosed, OSError):
            while True:  # each is answered by an error that names the key, and nobody takes
                socket.send(json.dumps({"type": "stop", "x" * 50_000: 1}))

    with open_socket(bounded[1], max_queue=1, close_timeout=1) as socket:
        sending = threading.Thread(target=flood, daemon=True)
        sending.start()
        sending.join(20)
        was_cut_off = not sending.is_alive()
        with suppress(OSError):
            socket.socket.shutdown(2)  # or closing would wait for what is being sent
    assert was_cut_off
    wait_for(lambda: _figure(bounded[1], "mirada_live_connections") == 0)
    assert '"client_does_not_read"' in bounded[2].read_text()


def _figure(address: str, name: str) -> float:
    lines = httpx.get(address + "/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def test_memory_is_bounded_while_frames_come_faster_than_they_are_used(server, live):
    socket = live()
    say(socket, type="start", model="mini")
    large = jpeg() + bytes(400_000)
    socket.send(frame(0, large))
    say(socket, type="question", id="long", text="Go on.", max_tokens=600, ignore_eos=True)
    rss = _rss(server.process.pid)
    most_held = 0
    for number in range(1, 200):  # 80 MB, a third of a second apart by their own times
        socket.send(frame(number * 300, large))
        if number % 40 == 0:
            lines = server.get("/metrics").text.splitlines()
            most_held = max(most_held, *(float(line.split()[1]) for line in lines if line.startswith("mirada_live_bytes ")))
    assert 8 << 20 < most_held <= LiveLimits().bytes
    assert _rss(server.process.pid) - rss < 80 << 20
    say(socket, type="stop")
    hear(socket, "stopped")


def _rss(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_sigterm_lets_an_answer_end_and_takes_no_question_more(bounded):
    process, address, log = bounded
    with open_socket(address) as one, open_socket(address) as other:
        for socket in (one, other):
            say(socket, type="start", model="mini")
            socket.send(frame(1))
        say(one, type="question", id="long", text="Go on.", max_tokens=300, ignore_eos=True)
        hear(one, "delta")
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: '"draining"' in log.read_text())
        say(other, type="question", id="late", text="Me too.")
        assert hear(other, "error")["error"]["code"] == "draining"
        assert hear(one, "done")["usage"]["completion_tokens"] == 300
        with pytest.raises(ConnectionClosed):
            one.recv(timeout=20)
    assert process.wait(30) == 0
