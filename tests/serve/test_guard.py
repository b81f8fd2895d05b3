"""Keys, hosts, limits, headers: the application in this process, around a model that says what it is told."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from serving import user
from starlette.testclient import TestClient

from mirada.engine.handle import EngineHandle
from mirada.engine.llm import VLM
from mirada.engine.sequence import Sequence
from mirada.errors import ParameterError, QueueFull, RequestFailed, SettingsError
from mirada.media.limits import FetchLimits
from mirada.serve import ServeSettings, create_app
from mirada.serve.errors import HttpError
from mirada.serve.live import _check_names
from mirada.serve.log import Lines, event, set_up
from mirada.serve.openai import read_json
from mirada.serve.settings import find_keys
from mirada.serve.stream import Choices
from mirada.types import Delta, Prompt, Sampling

BODY = {"model": "mini", "messages": user("hi")}
KEY = "0123456789abcdef"
JSON = {"Content-Type": "application/json"}


class Scripted:
    """mini's files around an engine that never runs: ``sequences`` are what was asked, for the test to move."""

    adapters = ()
    asleep = 0
    recommended_sampling = None
    limits = FetchLimits.serving()

    def __init__(self, parts) -> None:
        self.parts = parts
        self.sequences: list[Sequence] = []
        self.error = None
        self.now = "ready"
        self.asked = threading.Event()

    def submit(self, chat, sampling, **more):
        sequence = Sequence(Prompt(()), Sampling(), None)
        self.sequences.append(sequence)
        if self.error is not None:
            sequence.fail(self.error)
        self.asked.set()
        return EngineHandle(sequence)

    def state(self, stall_seconds):
        return self.now

    def guide(self, sampling, **more):
        return None

    def say(self, text: str, finish=None) -> None:
        self.sequences[-1]._publish(Delta(text, tokens=(1,), finish=finish))

    def stats(self):
        return {"running": len(self.sequences)}


@pytest.fixture(scope="module")
def parts():
    with VLM("mini", engine={"workers": 0}) as vlm:
        return vlm.parts


@pytest.fixture
def model(parts):
    return Scripted(parts)


@asynccontextmanager
async def http(model, **settings):
    transport = httpx.ASGITransport(create_app({"mini": model}, ServeSettings(**settings)))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        yield client


def asked(model, *calls, **settings) -> list[httpx.Response]:
    """Replies to (method, path, options), one after the other."""

    async def run():
        async with http(model, **settings) as client:
            return [await client.request(method, path, **options) for method, path, options in calls]

    return asyncio.run(run())


def test_who_is_ready_can_answer(model, parts):
    other = Scripted(parts)
    app = create_app({"mini": model, "other": other}, ServeSettings())

    async def told():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            replies = [await client.get(path) for path in ("/ready", "/health")]
            return [(reply.status_code, reply.json()["status"]) for reply in replies]

    for mine, others, status, said in (
        ("ready", "ready", 200, "ready"), ("asleep", "ready", 200, "ready"), ("asleep", "asleep", 503, "asleep"),
        ("died", "ready", 503, "died"), ("asleep", "stalled", 503, "stalled"), ("closed", "ready", 503, "closed"),
    ):  # fmt: skip
        model.now, other.now = mine, others
        assert asyncio.run(told()) == [(status, said), (200, "ok")]  # the process lives all the same
    app.state.gate.draining = True
    assert asyncio.run(told())[0] == (503, "draining")


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1:8000", 200), ("[::1]", 200), ("LocalHost:1", 200), ("127.0.0.1:", 200), ("[::1].evil.example", 403),
        ("127.0.0.1:80@evil.example", 403), ("[::1", 403), ("127.0.0.1.evil.example", 403), ("", 403), ("::1", 403),
    ],
)  # fmt: skip
def test_which_host_names_this_machine(model, host, status):
    (reply,) = asked(model, ("GET", "/v1/models", {"headers": {"Host": host}}))
    assert reply.status_code == status


def test_a_body_that_is_coded_or_has_two_lengths_is_refused(model):
    gzip, both, plain = asked(
        model,
        ("POST", "/v1/chat/completions", {"content": b"{}", "headers": JSON | {"Content-Encoding": "gzip"}}),
        ("POST", "/v1/chat/completions", {"content": b"{}", "headers": JSON | {"Transfer-Encoding": "chunked"}}),
        ("POST", "/v1/chat/completions", {"content": b"{}", "headers": JSON | {"Content-Encoding": "identity"}}),
    )
    assert gzip.status_code == 415 and "gzip" in gzip.json()["error"]["message"]
    assert both.status_code == 400 and both.json()["error"]["code"] == "two_lengths"
    assert both.headers["connection"] == "close"  # a proxy that counts otherwise would take the rest for another's request
    assert plain.status_code == 400 and plain.json()["error"]["param"] == "model"


def test_a_proxy_may_ask_for_the_head_of_what_can_be_read(model):
    paths = ("/health", "/ready", "/metrics", "/v1/models", "/v1/models/mini", "/", "/openapi.json")
    replies = asked(model, *(("HEAD", path, {}) for path in paths))
    assert [reply.status_code for reply in replies] == [200] * len(paths)


def test_a_socket_that_is_not_opened_has_a_status(model, caplog):
    caplog.set_level("INFO", "mirada.serve")
    scope = {"type": "websocket", "path": "/nothing", "headers": [(b"host", b"localhost")], "query_string": b""}
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message["type"])

    asyncio.run(create_app({"mini": model})(scope, receive, send))
    assert sent == ["websocket.close"] and caplog.records[-1].facts["status"] == 403


def test_a_defect_in_the_middle_of_a_stream_is_raised_and_nobody_waits_for_ever():
    class Broken:
        async def __aiter__(self):
            yield Delta("a")
            raise ZeroDivisionError("planted")

    async def main():
        choices = Choices([Broken()])
        choices.begin()
        async with asyncio.timeout(10):
            assert (await choices.next())[1].text == "a"
            await choices.next()

    with pytest.raises(ZeroDivisionError, match="planted"):
        asyncio.run(main())


def test_what_the_engine_logs_is_lines_too(tmp_path):
    loggers = [logging.getLogger(name) for name in ("mirada", "mirada.serve", "uvicorn", "uvicorn.error")]
    before = [(one, one.handlers[:], one.level, one.propagate) for one in loggers]
    with (tmp_path / "log").open("wb") as file:
        try:
            set_up(file.fileno())
            logging.getLogger("mirada.engine.prepare").error("planted")
            event("once")
        finally:
            for one, handlers, level, propagate in before:
                one.handlers[:], one.propagate = handlers, propagate
                one.setLevel(level)
    assert [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()] == ["planted", "once"]


def test_a_parameter_without_a_name_is_unknown_too():
    with pytest.raises(ParameterError, match="start has no ''"):
        _check_names({"type": "start", "": 1}, ("type", "model"))


def test_the_log_says_when_an_engine_dies(model, caplog):
    app = create_app({"mini": model}, ServeSettings())
    with caplog.at_level("INFO", logger="mirada.serve"):
        for model.now in ("ready", "died", "died"):
            app.state.watch.look()
    facts = [record for record in caplog.records if record.message == "engine"]
    assert [(record.levelname, record.facts) for record in facts] == [("ERROR", {"model": "mini", "state": "died"})]


def test_refusals_are_counted_under_the_path_that_they_are_of(model):
    calls = [("POST", "/v1/chat/completions", {"json": BODY}), ("GET", "/v1/models/mini", {}), ("GET", "/v1/strange", {})]
    bearer = {"Authorization": f"Bearer {KEY}"}
    text = asked(model, *calls, ("GET", "/metrics", {"headers": bearer}), api_keys=(KEY,))[-1].text
    for path in ("/v1/chat/completions", "/v1/models/{name:path}", "other"):
        assert f'mirada_requests_total{{path="{path}",status="401"}} 1.0' in text, text


def test_a_body_of_many_values_is_refused_as_it_comes(model):
    """Whatever it would have been: it is not even JSON, and nobody reads it to its end."""
    many = b"[[]," * 500
    replies = asked(
        model,
        *(("POST", path, {"content": many, "headers": JSON}) for path in ("/v1/chat/completions", "/v1/responses")),
        ("POST", "/v1/chat/completions", {"content": b'{"model":"' + b"a" * 5000 + b'"}', "headers": JSON}),
        max_body_values=999,
    )
    assert [reply.status_code for reply in replies] == [400, 400, 404]
    assert replies[0].json()["error"]["code"] == "body_too_complex" and "max_body_values" in replies[0].text


def test_values_count_against_the_bytes_of_all_bodies(model):
    body = json.dumps({**BODY, "metadata": {str(i): "" for i in range(100)}}).encode()
    refused = asked(model, ("POST", "/v1/chat/completions", {"content": body, "headers": JSON}), max_bodies_bytes=20_000)[0]
    assert len(body) < 2000 and refused.status_code == 429 and "max_bodies_bytes" in refused.text


def test_one_key_given_twice_among_very_many_is_found_soon():
    pairs = [*((str(i), 1) for i in range(60_000)), ("59999", 2)]
    data = b"{" + b",".join(f'"{key}":{value}'.encode() for key, value in pairs) + b"}"
    began = time.thread_time()
    with pytest.raises(HttpError, match="'59999' is given twice"):
        read_json(data)
    assert time.thread_time() - began < 2  # by comparing each with each: minutes


def test_a_large_body_is_read_beside_the_loop(model, monkeypatch):
    where = []
    for name, module in (("read_json", "openai"), ("read", "chat")):
        home = importlib.import_module(f"mirada.serve.{module}")
        known = getattr(home, name)
        monkeypatch.setattr(home, name, lambda *given, known=known: where.append(threading.current_thread()) or known(*given))
    large = {**BODY, "messages": user("x" * 300_000), "model": "absent"}
    calls = [("POST", "/v1/chat/completions", {"json": body}) for body in (large, {**BODY, "model": "absent"})]
    assert [reply.status_code for reply in asked(model, *calls)] == [404, 404]
    main = threading.main_thread()
    assert [thread is main for thread in where] == [False, False, True, True]


def test_a_large_live_message_is_read_beside_the_loop(model, monkeypatch):
    where = []
    for name, module in (("read_json", "openai"), ("read", "chat")):
        home = importlib.import_module(f"mirada.serve.{module}")
        known = getattr(home, name)
        monkeypatch.setattr(home, name, lambda *given, known=known: where.append(threading.current_thread()) or known(*given))
    app = create_app({"mini": model}, ServeSettings())
    with TestClient(app) as client, client.websocket_connect("ws://localhost/v1/live") as socket:
        socket.send_json({"type": "start", "model": "mini"})
        assert socket.receive_json()["type"] == "state"
        for size in (1, 300_000):
            socket.send_json({"type": "question", "id": "a", "text": "x" * size})
            assert "no frame" in socket.receive_json()["error"]["message"]
    assert [thread is where[0] for thread in where] == [True, True, True, False, False]


def test_a_key_is_needed_where_one_is_set(model):
    bearer = {"Authorization": f"Bearer {KEY}"}
    given = [{}, {"Authorization": "Bearer wrong-wrong"}, {"Authorization": KEY}, bearer, {"X-Api-Key": KEY}]
    paths = [("GET", "/v1/models", {"headers": one}) for one in given]
    codes = [reply.status_code for reply in asked(model, *paths, api_keys=("another-key", KEY))]
    assert codes == [401, 401, 401, 200, 200]
    closed = asked(model, *(("GET", path, {}) for path in ("/metrics", "/openapi.json", "/v1/nothing")), api_keys=(KEY,))
    assert [reply.status_code for reply in closed] == [401] * 3
    assert closed[0].json()["error"]["code"] == "invalid_api_key" and closed[0].headers["www-authenticate"] == "Bearer"
    opened = asked(model, *(("GET", path, {}) for path in ("/health", "/ready")), api_keys=(KEY,))
    assert [reply.status_code for reply in opened] == [200, 200]


def test_without_a_key_only_this_machines_own_pages_may_ask(model):
    def code(**headers):
        return asked(model, ("GET", "/v1/models", {"headers": {k.title(): v for k, v in headers.items()}}))[0].status_code

    assert code() == code(host="127.0.0.1:1") == code(host="[::1]:8000") == 200
    assert code(host="evil.example") == code(host="127.0.0.1.evil.example") == 403  # a name that leads here
    assert code(origin="http://localhost:8000") == 200
    assert code(origin="http://evil.example") == code(origin="null") == code(origin="http://localhost:9000") == 403


def test_settings_that_are_not_safe_are_refused(model, parts, tmp_path):
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        with pytest.raises(SettingsError, match="no API key"):
            ServeSettings(host=host)
        assert KEY not in repr(ServeSettings(host=host, api_keys=(KEY,)))
    for key in ("short", "with space", "ключключ"):
        with pytest.raises(SettingsError, match="API key 1") as error:
            ServeSettings(api_keys=(key,))
        assert key not in str(error.value)
    model.limits = FetchLimits()
    with pytest.raises(SettingsError, match="any file"):
        create_app({"mini": model})
    with pytest.raises(SettingsError, match="no model"):
        create_app({})


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key-1\n\nsecond-key  # of a friend\n")
    with pytest.raises(SettingsError, match="open to other users"):
        find_keys(file=file)
    file.chmod(0o600)
    monkeypatch.setenv("MIRADA_API_KEYS", "third-key-3, first-key-1")
    assert find_keys(("zeroth-key",), file) == ("zeroth-key", "third-key-3", "first-key-1", "second-key")
    with pytest.raises(SettingsError, match="cannot be read"):
        find_keys(file=tmp_path / "none")


def test_every_reply_carries_the_headers(model):
    for reply in asked(model, ("GET", "/health", {}), ("GET", "/nothing", {}), ("POST", "/v1/chat/completions", {"json": {}})):
        assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert reply.headers["x-request-id"].startswith("req_")
        assert "access-control-allow-origin" not in reply.headers and "server" not in reply.headers
    preflight = asked(model, ("OPTIONS", "/v1/chat/completions", {"headers": {"Origin": "http://localhost:8000"}}))[0]
    assert preflight.status_code == 405
    odd = asked(model, ("GET", "/health", {"headers": {"X-Request-Id": "a b\x7f"}}))[0]
    assert odd.headers["x-request-id"].startswith("req_")


def test_bodies_are_bounded(model):
    large = {**BODY, "messages": user("x" * 2000)}
    one = asked(model, ("POST", "/v1/chat/completions", {"json": large}), max_body_bytes=1000)[0]
    assert one.status_code == 413 and "1,000 bytes" in one.json()["error"]["message"]

    async def pieces():  # no length is said beforehand
        for _ in range(100):
            yield b" " * 100

    said = {"content": pieces(), "headers": {"Content-Type": "application/json"}}
    assert asked(model, ("POST", "/v1/chat/completions", said), max_body_bytes=1000)[0].status_code == 413
    busy = asked(model, ("POST", "/v1/chat/completions", {"json": large}), max_bodies_bytes=1000)[0]
    assert busy.status_code == 429 and busy.headers["retry-after"] == "1"


def test_a_body_that_drips_is_given_up(model):
    async def drip():
        yield b"{"
        await asyncio.sleep(5)

    said = {"content": drip(), "headers": {"Content-Type": "application/json"}}
    assert asked(model, ("POST", "/v1/chat/completions", said), body_seconds=0.05)[0].status_code == 408


def test_one_more_than_may_be_under_way_is_told_to_come_again(model):
    async def run():
        async with http(model, max_requests=1) as client:
            first = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
            await asyncio.to_thread(model.asked.wait, 10)
            second = await asyncio.wait_for(client.post("/v1/chat/completions", json=BODY), 10)
            look = await client.get("/v1/models")  # what costs nothing is let in
            model.say("a", "stop")
            await first
            model.asked.clear()
            third = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
            await asyncio.to_thread(model.asked.wait, 10)
            model.say("b", "stop")
            return first.result(), second, look, await third

    first, second, look, third = asyncio.run(run())
    assert [reply.status_code for reply in (first, second, look, third)] == [200, 429, 200, 200]
    assert second.headers["retry-after"] == "1" and second.json()["error"]["type"] == "rate_limit_error"


def test_errors_of_the_engine_have_their_status(model):
    for error, status in ((QueueFull("full"), 429), (RequestFailed("dead"), 500)):
        model.error = error
        for stream in (False, True):
            reply = asked(model, ("POST", "/v1/chat/completions", {"json": {**BODY, "stream": stream}}))[0]
            assert reply.status_code == status and reply.json()["error"]["message"]
            assert ("retry-after" in reply.headers) == (status == 429)


def test_an_error_in_the_middle_of_a_stream_is_an_event_and_then_done(model):
    async def run():
        async with http(model) as client:
            reading = asyncio.create_task(client.post("/v1/chat/completions", json={**BODY, "stream": True}))
            await asyncio.to_thread(model.asked.wait, 10)
            model.say("half ")
            await asyncio.sleep(0.05)
            model.sequences[-1].fail(RequestFailed("its worker was lost"))
            return await reading

    reply = asyncio.run(run())
    events = [event.removeprefix("data: ") for event in reply.text.split("\n\n")]
    assert reply.status_code == 200 and events[-2:] == ["[DONE]", ""]
    assert json.loads(events[-3])["error"]["message"].startswith("its worker was lost")
    assert "half " in json.loads(events[1])["choices"][0]["delta"]["content"]


def test_a_cancelled_answer_is_no_answer(model):
    async def run():
        async with http(model) as client:
            reading = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
            await asyncio.to_thread(model.asked.wait, 10)
            model.sequences[-1].cancel()
            return await reading

    assert asyncio.run(run()).status_code == 500


def test_unknown_parameters_may_be_named_in_a_header_instead(model):
    model.error = None

    async def run():
        async with http(model, unknown_parameters="warn") as client:
            reading = asyncio.create_task(client.post("/v1/chat/completions", json={**BODY, "spell": 1, "heat": 2}))
            await asyncio.to_thread(model.asked.wait, 10)
            model.say("a", "stop")
            return await reading

    reply = asyncio.run(run())
    assert reply.status_code == 200 and reply.headers["x-mirada-ignored"] == "spell, heat"


def test_a_defect_is_a_plain_500_and_the_log_holds_no_secret(model, monkeypatch, caplog):
    monkeypatch.setattr(model, "submit", lambda *a, **k: 1 / 0)
    body = {**BODY, "messages": user("my secret")}
    reply = asked(
        model, ("POST", "/v1/chat/completions?token=hidden", {"json": body, "headers": {"Authorization": "Bearer k"}})
    )[0]
    assert (
        reply.status_code == 500 and "ZeroDivisionError" not in reply.text and reply.json()["error"]["code"] == "internal_error"
    )
    lines = [Lines._line(record) for record in caplog.records if record.name == "mirada.serve"]
    assert any("ZeroDivisionError" in line for line in lines)
    assert not any(word in line for line in lines for word in ("my secret", "hidden", "Bearer"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_that_cannot_be_written_kills_nothing(model, capfd):
    import logging
    import os

    handler = Lines(os.open("/dev/full", os.O_WRONLY))
    logger = logging.getLogger("mirada.serve")
    logger.addHandler(handler)
    try:
        assert asked(model, ("GET", "/health", {}))[0].status_code == 200
    finally:
        logger.removeHandler(handler)
        os.close(handler.fd)
    assert "Errno" not in capfd.readouterr().err  # logging's own handler would have complained there


def test_whatever_was_asked_for_the_log_says_it_in_one_line(model, caplog):
    odd = "\x85\u2028\x0b\x1b\x9b\ud800é"
    with caplog.at_level("INFO", "mirada.serve"):
        asked(model, ("GET", "/v1/models/" + quote(odd[:5] + odd[6:]), {}))
        event("odd", what=odd)
    lines = [Lines._line(record) for record in caplog.records if record.name == "mirada.serve"]
    assert [line.splitlines() for line in lines] == [[line] for line in lines] and all(map(str.isascii, lines))
    assert json.loads(lines[0])["path"] == "/v1/models/" + odd[:5] + odd[6:] and json.loads(lines[1])["what"] == odd


def test_each_application_counts_for_itself(model, parts):
    first = asked(model, ("GET", "/v1/models", {}), ("GET", "/v1/models", {}), ("GET", "/metrics", {}))[-1].text
    second = asked(Scripted(parts), ("GET", "/metrics", {}))[0].text
    assert 'mirada_requests_total{path="/v1/models",status="200"} 2.0' in first
    assert 'path="/v1/models"' not in second
    assert 'mirada_engine_running{model="mini"} 0.0' in first


def test_the_message_that_a_client_has_gone_cancels_its_sequence_at_once(model):
    """Before the loop turns to anything else that waits: the engine looks at the flag before its next step."""

    async def run(stream: bool):
        app = create_app({"mini": model}, ServeSettings())
        body = json.dumps({**BODY, "stream": stream}).encode()
        left: asyncio.Queue = asyncio.Queue()
        left.put_nowait({"type": "http.request", "body": body, "more_body": False})
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
            "headers": headers, "scheme": "http", "server": ("localhost", 1), "client": ("127.0.0.1", 1), "http_version": "1.1",
        }  # fmt: skip
        sent = []

        async def send(message):
            sent.append(message)

        model.asked.clear()
        serving = asyncio.create_task(app(scope, left.get, send))
        await asyncio.to_thread(model.asked.wait, 10)
        if stream:
            model.say("half")
            while not sent:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not model.sequences[-1].cancelled and app.state.gate.num_requests == 1
        left.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(serving, 1)
        assert model.sequences[-1].cancelled and app.state.gate.num_requests == 0
        return sent

    assert asyncio.run(run(False)) == []  # nobody is there to be told
    assert not any(message.get("more_body") is False for message in asyncio.run(run(True)))
