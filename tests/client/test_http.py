"""The client of OpenAI-compatible servers: what it sends, what it reads, and what becomes of every fault."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import time

import numpy as np
import pytest
from misbehaving import DONE, USAGE, chunk, drop, hang, reply, serving, stream, words
from PIL import Image as Pillow

from mirada import errors
from mirada.client import HttpClient, Retry, Timeouts
from mirada.types import Delta, Image, Message, Output, Prompt, Sampling, Text, ToolCall, Usage, Video

HI = [Message("user", "hi")]
NOW = Retry(retries=3, first=0.001)
KEY = "sk-very-secret-key"


@pytest.fixture
def ask():
    """``ask(server, ...) -> Output``; clients end with the test."""
    made = []

    def client(server, chat=HI, sampling=None, *, options=None, **settings) -> Output:
        settings = {"model": "mini", "retries": NOW, **settings}
        made.append(HttpClient(server.url, **settings))
        return made[-1].submit(chat, sampling, **(options or {})).result(30)

    yield client
    for one in made:
        one.close()


def test_an_answer_streams_and_is_the_fold_of_its_deltas(ask):
    with serving(stream(words("Hel", "lo é"))) as server, HttpClient(server.url, model="mini") as client:
        handle = client.submit(HI)
        assert [delta.text for delta in handle] == ["Hel", "lo é", ""]
        output = handle.result(10)
    assert (output.message, output.finish, output.error) == (Message("assistant", "Hello é"), "stop", None)
    assert output.usage == Usage(5, 2) and output.metrics["total"] >= output.metrics["first_token"] > 0
    (request,) = server.requests
    assert request.path == "/v1/chat/completions" and "authorization" not in request.headers
    assert request.body == {
        "model": "mini",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 256,
        "temperature": 0.0,
    }


def test_async_readers_and_await():
    async def main(client):
        handle = client.submit(HI)
        return [delta.text async for delta in handle], await handle

    with serving(stream(words("a", "b"), pause=0.01)) as server, HttpClient(server.url, model="m") as client:
        texts, output = asyncio.run(main(client))
    assert texts == ["a", "b", ""] and output.message.text == "ab"


def test_every_split_point_of_the_bytes_gives_the_same_answer(ask):
    events = b"".join(words("é", "漢🦉"))
    for at in range(1, len(events), 37):
        with serving(stream([events[:at], events[at:]])) as server:
            assert ask(server).message.text == "é漢🦉", at


def test_settings_become_fields_and_defaults_do_not(ask):
    sampling = Sampling(
        max_tokens=9, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.5,
        frequency_penalty=-0.5, logit_bias={3: -1.5}, seed=4, stop=("a", "b"), logprobs=2, ignore_eos=True,
        max_repeats=None, thinking_budget=7,
    )  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with serving(stream(words("x"))) as server:
        options = {"thinking": "off", "tools": [tool], "adapter": "a", "extra": {"guided_regex": "x", "max_tokens": None}}
        assert ask(server, sampling=sampling, options=options, extra={"user": "u"}).error is None
    body = server.bodies[0]
    for name in ("model", "messages", "stream", "stream_options"):
        del body[name]
    assert body == {
        "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "logit_bias": {"3": -1.5}, "seed": 4, "stop": ["a", "b"], "logprobs": True,
        "top_logprobs": 2, "ignore_eos": True, "max_repeats": 0, "thinking_budget": 7, "user": "u", "guided_regex": "x",
        "chat_template_kwargs": {"enable_thinking": False}, "tools": [tool], "adapter": "a",
    }  # fmt: skip


def test_what_is_sent_is_what_the_server_reads(ask):
    from mirada.records import request_from_openai

    sampling = Sampling(max_tokens=9, top_k=5, stop=("a",), logprobs=2, max_repeats=None, logit_bias={3: 1.0}, seed=1)
    call = ToolCall("f", '{"x": 1}', "c1")
    chat = [
        Message("system", "S"),
        Message("user", (Image("http://x/a.png", max_pixels=9), Text("a"), Video("http://x/v.mp4", fps=2.0), Text("b"))),
        Message("assistant", (call,), reasoning="hm"),
        Message("tool", "3", tool_call_id="c1"),
    ]
    with serving(stream(words("x"))) as server:
        ask(server, chat, sampling, options={"thinking": "on"})
    messages, read, options = request_from_openai(server.bodies[0])
    assert (messages, read, options.thinking) == (chat, sampling, "on")


@pytest.mark.parametrize(
    "form", [{"json_schema": {"type": "null"}}, {"regex": "a+"}, {"choice": ("a", "b")}, {"grammar": 'start: "a"'}], ids=str
)
def test_the_form_of_an_answer_is_sent_too(ask, form):
    from mirada.records import request_from_openai

    with serving(stream(words("x"))) as server:
        ask(server, sampling=Sampling(**form))
    assert request_from_openai(server.bodies[0]).sampling == Sampling(**form)


def test_media_travel_as_data_and_addresses_as_they_are(ask, tmp_path):
    path = tmp_path / "a.png"
    Pillow.new("RGB", (4, 3), (200, 10, 10)).save(path)
    array = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    clip = b"\0\0\0\x18ftypisom" + bytes(20)
    parts = [
        Image(str(path)), Image(path.as_uri()), Image(path.read_bytes()), Image(Pillow.open(path)), Image(array),
        Image("http://127.0.0.1:9/a.png"), Image("data:image/png;base64,AAAA"), Video(clip, nframes=2),
        Video([path, array], fps=1.0), Text("what?"),
    ]  # fmt: skip
    with serving(stream(words("x"))) as server:
        assert ask(server, [Message("user", parts)]).error is None
    sent = server.bodies[0]["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in sent[:7]]
    assert all(url.startswith("data:image/png;base64,") for url in urls[:5]) and urls[0] == urls[1] == urls[2]
    assert base64.b64decode(urls[0].partition(",")[2]) == path.read_bytes()
    for url, pixels in ((urls[3], np.asarray(Pillow.open(path))), (urls[4], array)):
        assert (np.asarray(Pillow.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) == pixels).all()
    assert urls[5:] == ["http://127.0.0.1:9/a.png", "data:image/png;base64,AAAA"]
    assert sent[7]["video_url"]["nframes"] == 2 and sent[7]["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert sent[8]["type"] == "video" and len(sent[8]["video"]) == 2 and sent[8]["fps"] == 1.0


def test_addresses_may_be_fetched_here_under_the_rules_for_media(ask):
    with serving(stream(words("x"))) as server:
        chat = [Message("user", (Image("http://127.0.0.1:9/a.png"), Text("x")))]
        assert isinstance(ask(server, chat, inline_urls=True).error, errors.MediaRefused)
        assert isinstance(ask(server, [Message("user", (Image("/none.png"), "x"))]).error, errors.MediaNotFound)
        assert isinstance(ask(server, Prompt((1, 2))).error, errors.MessageError)
        assert isinstance(ask(server, []).error, errors.MessageError)
        assert isinstance(ask(server, options={"extra": {"x": float("nan")}}).error, errors.SettingsError)
    assert server.requests == []


def test_reasoning_tool_calls_logprobs_and_token_ids(ask):
    top = [{"token": "Hi", "logprob": -0.5}, {"token": "token_id:7", "logprob": -2}]
    logprobs = {"content": [{"token": "Hi", "logprob": -0.5, "bytes": None, "top_logprobs": top}]}
    usage = {
        **USAGE, "completion_tokens_details": {"reasoning_tokens": 1}, "num_frames": 2, "timestamps": [[0, 0.5]],
        "prompt_tokens_details": {"image_tokens": 3, "video_tokens": 4},
    }  # fmt: skip
    calls = [
        {"index": 0, "id": "c0", "type": "function", "function": {"name": "get", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"a"'}},
        {"index": 1, "id": "c1", "function": {"name": "put", "arguments": "{}"}},
        {"index": 0, "function": {"arguments": ": 1}"}},
    ]
    events = [
        chunk({"role": "assistant", "reasoning_content": "let"}),
        chunk({"reasoning": " me"}),
        chunk({"content": "Hi"}, logprobs=logprobs, token_ids=[5]),
        *(chunk({"tool_calls": [call]}) for call in calls),
        chunk({}, "tool_calls"),
        chunk(None, usage=usage),
        DONE,
    ]
    with serving(stream(events)) as server:
        output = ask(server, sampling=Sampling(logprobs=1))
    calls = (ToolCall("get", '{"a": 1}', "c0"), ToolCall("put", "{}", "c1"))
    assert output.message == Message("assistant", (Text("Hi"), *calls), reasoning="let me")
    assert output.finish == "tool_calls" and output.tokens == (5,)
    assert output.usage == Usage(5, 2, 1, 3, 4, 2, ((0.0, 0.5),))
    (one,) = output.logprobs or ()
    assert (one.token, one.logprob, one.top) == (5, -0.5, ((-1, -0.5), (7, -2.0)))
    assert one.texts == ("Hi", "Hi", "token_id:7")


def test_whole_replies(ask):
    message = {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "length"}], "usage": USAGE}
    with serving(reply(200, whole)) as server:
        output = ask(server, stream=False)
    assert (output.message.text, output.message.reasoning, output.finish) == ("Hi", "hm", "length")
    assert "stream" not in server.bodies[0] and output.usage.prompt_tokens == 5


def test_the_key_goes_out_once_and_is_never_shown(ask, monkeypatch, caplog):
    caplog.set_level(0)
    said = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}
    with serving(reply(401, said)) as server:
        output = ask(server, api_key=KEY)
        monkeypatch.setenv("MIRADA_API_KEY", "from-the-environment\n")
        ask(server)
    assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {KEY}", "Bearer from-the-environment"]
    assert isinstance(output.error, errors.RemoteRefused) and output.error.status == 401
    shown = str(output.error) + repr(output.error) + repr(HttpClient) + caplog.text
    assert "***" in shown and KEY not in shown
    with pytest.raises(errors.SettingsError) as caught:
        HttpClient("http://h", api_key="a b")
    assert "a b" not in str(caught.value)


REFUSED = [
    (400, {"error": {"message": "temperature is too high", "param": "temperature"}}, errors.RemoteRejected, "too high"),
    (400, {"error": {"message": "long", "code": "context_length_exceeded"}}, errors.ContextOverflow, "long"),
    (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, errors.RemoteRejected, "field required"),
    (413, b"<html>too large</html>", errors.RemoteRejected, "too large"),
    (403, {"message": "no"}, errors.RemoteRefused, "no"),
    (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, errors.RemoteRefused, "pay"),
    (404, {"detail": "Not Found"}, errors.RemoteNotFound, "Not Found"),
    (501, b"", errors.RemoteError, "501"),
    (307, b"", errors.RemoteError, "redirects to 'http://evil/'"),
]


@pytest.mark.parametrize(("status", "body", "kind", "said"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_a_refusal_is_typed_named_and_final(ask, status, body, kind, said):
    with serving(reply(status, body, Location="http://evil/?token=x")) as server:
        error = ask(server, api_key=KEY).error
    assert type(error) is kind and said in str(error), error
    assert len(server.requests) == 1
    if status != 400 or kind is errors.RemoteRejected:
        assert error.status == status


def test_an_unknown_model_names_the_nearest(ask):
    with serving(reply(404, {"error": {"message": "no model"}}), models=["mini", "qwen"]) as server:
        error = ask(server, model="mimi").error
    assert isinstance(error, errors.RemoteNotFound) and "did you mean 'mini'" in str(error)


def test_no_model_takes_the_only_one(ask):
    with serving(stream(words("x")), models=["only"]) as server:
        assert ask(server, model=None).error is None and server.bodies[0]["model"] == "only"
        server.models = ["a", "b"]
        error = ask(server, model=None).error
        assert isinstance(error, errors.SettingsError) and "a, b" in str(error)
        with HttpClient(server.url) as client:
            assert client.models() == ["a", "b"]


def test_busy_then_well(ask):
    busy = reply(429, {"error": {"message": "slow down"}}, Retry_After="0.05")
    with serving(busy, reply(503, b""), drop, stream(words("x"))) as server:
        begun = time.monotonic()
        assert ask(server).message.text == "x"
    assert time.monotonic() - begun >= 0.05 and len(server.requests) == 4


@pytest.mark.parametrize(
    ("status", "kind"),
    [(500, errors.RemoteError), (503, errors.RemoteBusy), (429, errors.RemoteBusy), (504, errors.RemoteTimeout)],
)
def test_what_does_not_pass_is_given_up_after_the_attempts(ask, status, kind):
    with serving(reply(status, {"error": {"message": "broken"}})) as server:
        error = ask(server, retries=Retry(2, first=0.001)).error
    assert type(error) is kind and "broken" in str(error) and "(3 attempts)" in str(error)
    assert len(server.requests) == 3 and error.status == status


def test_a_server_that_asks_for_too_long_is_not_asked_again(ask):
    with serving(reply(429, b"", Retry_After="9999")) as server:
        error = ask(server).error
    assert isinstance(error, errors.RemoteBusy) and "wait 9999 s" in str(error) and len(server.requests) == 1


def test_nothing_listens():
    with serving(drop) as server:
        url = server.url
    with HttpClient(url, model="m", retries=Retry(1, first=0.001)) as client:
        error = client.submit(HI).result(10).error
    assert isinstance(error, errors.RemoteUnreachable) and "(2 attempts)" in str(error)


BROKEN = [
    ("cut", stream(words("Hel", "lo")[:2], then="drop"), "broke off"),
    ("ended early", stream(words("Hel", "lo")[:2]), "broke off in the middle"),
    ("no JSON", stream([b"data: {nope\n\n"]), "not JSON"),
    ("a list", stream([b"data: [1]\n\n"]), "a list"),
    ("wrong form", stream([b'data: {"choices": [3]}\n\n']), "not the form"),
    ("text is a number", stream([b'data: {"choices": [{"index": 0, "delta": {"content": 3}}]}\n\n']), "not the form"),
    ("not UTF-8", stream([b"data: \xff\xfe\n\n"]), "not UTF-8"),
    ("HTML", stream([b"<html>login</html>"], kind="text/html"), "'text/html'"),
    ("JSON for a stream", reply(200, {"choices": []}), "application/json"),
    ("an endless line", stream([b"data: " + b"x" * (1 << 20)] + [b"x" * (1 << 20)] * 16), "more than"),
    ("a nameless call", stream([chunk({"tool_calls": [{"index": 0}]}, "stop"), DONE]), "without a name"),
    ("strange end", stream([chunk({}, "meteor"), DONE]), "meteor"),
    ("filtered", stream([chunk({}, "content_filter"), DONE]), "content filter"),
    ("error inside", stream([chunk({"content": "x"}), b'data: {"error": {"message": "boom", "code": 500}}\n\n']), "boom"),
    ("no HTTP", lambda handler: handler.wfile.write(b"hello\r\n\r\n") or handler.drop(), "broke off"),
]


@pytest.mark.parametrize(("act", "said"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_answer_is_an_error_and_not_an_answer(ask, act, said):
    with serving(act) as server:
        output = ask(server, retries=0)
    assert isinstance(output.error, errors.RemoteError) and said in str(output.error), output
    assert output.message.text == "" and output.finish == "error"


def test_a_stream_that_has_begun_is_not_asked_again_unless_that_is_wanted(ask):
    cut = stream(words("Hel", "lo")[:2], then="drop")
    whole = stream(words("Hell", "o!"))
    with serving(cut, whole) as server:
        assert isinstance(ask(server).error, errors.RemoteError) and len(server.requests) == 1
    again = Retry(2, first=0.001, after_tokens=True)
    with serving(cut, whole) as server, HttpClient(server.url, model="m", retries=again) as client:
        handle = client.submit(HI)
        assert [delta.text for delta in handle] == ["Hel", "l", "o!", ""] and handle.result(1).message.text == "Hello!"
    with serving(cut, stream(words("Hallo"))) as server:
        assert "begins otherwise" in str(ask(server, retries=again).error)


def test_what_an_answer_points_at_comes_once_though_the_stream_broke_off():
    boxes = [{"type": "point", "label": "", "point": [at, at], "image": 0, "size": [9, 9], "resized": [9, 9], "chosen": "only",
              "start": at, "end": at + 1} for at in range(3)]  # fmt: skip
    pieces = [chunk({"content": "abc"}), *(chunk({}, annotations=[box]) for box in boxes)]
    ended = chunk({}, "stop", stop_reason="c").replace(b'"id"', b'"notes": ["turned upright"], "id"', 1)
    again = Retry(2, first=0.001, after_tokens=True)
    acts = stream(pieces[:3], then="drop"), stream([*pieces, ended, DONE])
    with serving(*acts) as server, HttpClient(server.url, model="m", retries=again) as client:
        output = client.submit(HI).result(10)
    assert [one.start for one in output.annotations] == [0, 1, 2]
    assert (output.notes, output.stop_reason) == (("turned upright",), "c")


def test_the_clocks(ask):
    drip = [chunk({"content": "a"}), *[b": still here\n\n"] * 200]
    slow = {
        "total": stream([chunk({"content": "x"})] * 300, pause=0.02),
        "between": stream(drip, pause=0.02),
        "first_token": hang,
    }
    for name, act in slow.items():
        with serving(act) as server:
            begun = time.monotonic()
            error = ask(server, timeout=Timeouts(**{name: 0.2})).error
            assert isinstance(error, errors.RemoteTimeout) and f"Timeouts.{name}" in str(error), (name, error)
            assert time.monotonic() - begun < 3 and server.gone.wait(5) and len(server.requests) == 1


def test_cancelling_closes_the_connection_and_keeps_what_there_is():
    with serving(stream([chunk({"content": "Hel"})], then="hang")) as server, HttpClient(server.url, model="m") as client:
        handle = client.submit(HI)
        assert next(iter(handle)).text == "Hel"
        handle.cancel()
        output = handle.result(5)
        assert (output.finish, output.message.text, output.error) == ("cancelled", "Hel", None)
        assert server.gone.wait(5)


def test_a_handle_or_client_that_is_forgotten_ends_its_requests():
    with serving(stream([chunk({"content": "x"})], then="hang")) as server:
        client = HttpClient(server.url, model="m")
        handle = client.submit(HI)
        for _ in handle:
            break
        thread = client._loop._thread
        del handle
        gc.collect()
        assert server.gone.wait(5)
        del client
        gc.collect()
        thread.join(5)
        assert not thread.is_alive()


def test_a_closed_client_says_so():
    with serving(stream([chunk({"content": "x"})], then="hang")) as server:
        client = HttpClient(server.url, model="m")
        handle = client.submit(HI)
        client.close()
        assert handle.result(5).finish == "cancelled"
        assert isinstance(client.submit(HI).result(5).error, errors.RequestFailed)
        with pytest.raises(errors.RequestFailed):
            client.models()


def test_no_more_are_under_way_than_may_be_and_connections_are_used_again():
    ports = set()

    def act(handler):
        ports.add(handler.client_address[1])
        stream(words("x"), pause=0.005)(handler)

    with serving(act) as server, HttpClient(server.url, model="m", max_in_flight=3) as client:
        outputs = [handle.result(20) for handle in [client.submit(HI) for _ in range(12)]]
    assert all(output.message.text == "x" for output in outputs) and server.most <= 3 and len(ports) <= 6


def test_a_body_may_be_sent_as_it_is():
    with serving(stream(words("x"))) as server, HttpClient(server.url, model="mini") as client:
        assert client.send({"messages": [{"role": "user", "content": "é"}], "seed": 3}).result(5).message.text == "x"
    assert server.bodies[0]["seed"] == 3 and server.bodies[0]["model"] == "mini" and server.bodies[0]["stream"] is True


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h/v1/", "http://h/v1"),
        ("https://h/api/v3", "https://h/api/v3"),
        ("http://[::1]:80/v1/chat/completions", "http://[::1]/v1"),
    ],
)
def test_addresses(url, base):
    with HttpClient(url) as client:
        assert client.base_url == base


@pytest.mark.parametrize(
    "url", ["h:8000", "ftp://h", "http://", "http://u:p@h/v1", "http://h/v1?key=x", "http://h:99999/", None]
)
def test_what_is_no_address(url):
    with pytest.raises(errors.SettingsError) as caught:
        HttpClient(url)
    assert "u:p" not in str(caught.value) and "key=x" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"timeout": 0}, {"timeout": "x"}, {"max_in_flight": 0}, {"retries": -1}])
def test_what_is_no_setting(settings):
    with pytest.raises(errors.SettingsError):
        HttpClient("http://h", **settings)


def test_deltas_are_plain_and_hold_no_more_than_was_said():
    with serving(stream(words("a"))) as server, HttpClient(server.url, model="m") as client:
        assert list(client.submit(HI)) == [Delta("a"), Delta(finish="stop")]
        assert json.dumps(server.bodies[0])
