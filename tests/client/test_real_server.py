"""The client against the server of this package, in a process of its own: both ends of the same agreement."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from serving import start_command

from mirada import Image, Message, Sampling, Text, Video
from mirada.client import HttpClient, Retry
from mirada.errors import MediaError, RemoteBusy, RemoteError, RemoteNotFound, RemoteRefused, RemoteRejected, RemoteUnreachable

KEY = "sk-of-the-real-server"
CONFIG = {"max_requests": 2, "engine": {"workers": 0}, "api_keys": [KEY]}
SHORT = Sampling(max_tokens=12)
ENDLESS = Sampling(max_tokens=4000, ignore_eos=True, max_repeats=None, temperature=1.0)
PICTURE = np.arange(56 * 84 * 3, dtype=np.uint32).reshape(56, 84, 3).astype(np.uint8)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with start_command(tmp_path_factory.mktemp("real"), CONFIG) as (_, url, _):
        yield url


@pytest.fixture
def client(address):
    with HttpClient(address, KEY, "mini", retries=0) as made:
        yield made


def figure(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=30).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"mirada_{name}"))


def wait_for(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def test_whole_and_streamed_answers_are_the_same(address, client):
    chat = [Message("user", (Image(PICTURE), Text("what?")))]
    handle = client.submit(chat, SHORT)
    pieces = list(handle)
    streamed = handle.result(60)
    with HttpClient(address, KEY, "mini", stream=False) as other:
        whole = other.submit(chat, SHORT).result(60)
    assert streamed.error is None and whole.error is None
    assert "".join(piece.text for piece in pieces) == streamed.message.text == whole.message.text
    asked = replace(whole.usage, cached_tokens=streamed.usage.cached_tokens)  # the second finds what the first left
    assert (streamed.finish, streamed.usage) == (whole.finish, asked)
    assert streamed.usage.image_tokens > 0 and streamed.usage.completion_tokens > 0


def test_pictures_and_videos_arrive_as_they_are(client, tmp_path):
    from PIL import Image as Pillow

    path = tmp_path / "a.png"
    Pillow.fromarray(PICTURE).save(path)
    texts = [client.submit([Message("user", (Image(source), Text("what?")))], SHORT).result(60) for source in (PICTURE, path)]
    assert texts[0].error is None and texts[0].message == texts[1].message
    video = Video([PICTURE, PICTURE[::-1], PICTURE, PICTURE[::-1]], fps=2.0)
    output = client.submit([Message("user", (video, Text("what?")))], SHORT).result(60)
    assert output.error is None and output.usage.num_frames == 4 and output.usage.video_tokens > 0
    broken = client.submit([Message("user", (Image(b"\x89PNG\r\n\x1a\nxxxx"), Text("?")))], SHORT).result(60)
    assert isinstance(broken.error, MediaError | RemoteRejected)


def test_logprobs_seeds_and_the_name_of_the_only_model(address):
    with HttpClient(address, KEY) as client:
        assert client.models() == ["mini"]
        warm = Sampling(max_tokens=8, temperature=1.0, seed=5, logprobs=2, ignore_eos=True)
        first, again = (client.submit([Message("user", "hi")], warm).result(60) for _ in range(2))
        assert first.error is None and first.message == again.message and client.model == "mini"
        assert first.logprobs is not None and len(first.logprobs) == 8 and len(first.logprobs[0].top) == 2


def test_cancelling_frees_the_servers_place(address, client):
    handle = client.submit([Message("user", "hi")], ENDLESS)
    pieces = iter(handle)
    assert next(pieces) is not None
    assert figure(address, "engine_running") == 1
    handle.cancel()
    assert handle.result(20).finish == "cancelled"
    wait_for(lambda: figure(address, "engine_running") == 0 and figure(address, "requests_under_way") == 0)
    del handle, pieces
    forgotten = client.submit([Message("user", "hi")], ENDLESS)
    assert next(iter(forgotten)) is not None
    del forgotten  # nobody holds it any more
    wait_for(lambda: figure(address, "requests_under_way") == 0)


def half_a_request(address: str) -> socket.socket:
    """It is let in, and the rest of its body does not come."""
    host, port = address.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
    made.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 900\r\n\r\n{{".encode())
    return made


def test_a_busy_server_is_asked_again_when_it_says(address, client):
    """Two requests fill it; a third is told 429 and when to come back, and does."""

    def refusals() -> float:
        lines = httpx.get(f"{address}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=30).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if "requests_total{" in line and 'status="429"' in line)

    held = [half_a_request(address) for _ in range(2)]
    wait_for(lambda: figure(address, "requests_under_way") == 2)
    refused = client.submit([Message("user", "hi")], SHORT).result(20)
    assert isinstance(refused.error, RemoteBusy) and refused.error.status == 429 and "asks to wait 1 s" in str(refused.error)
    before = refusals()
    with HttpClient(address, KEY, "mini", retries=Retry(retries=50, first=0.01)) as patient:
        began = time.monotonic()
        third = patient.submit([Message("user", "hi")], SHORT)
        wait_for(lambda: refusals() > before)
        for one in held:
            one.close()
        output = third.result(120)
    assert output.error is None and time.monotonic() - began >= 1.0  # it waited as long as it was asked to


def test_what_the_server_refuses_is_a_typed_error_without_the_key(address, client):
    with HttpClient(address, "sk-some-other-key", "mini", retries=0) as stranger:
        error = stranger.submit([Message("user", "hi")], SHORT).result(20).error
        assert isinstance(error, RemoteRefused) and error.status == 401 and "sk-some-other-key" not in str(error)
    with HttpClient(address, KEY, "mimi", retries=0) as wrong:
        error = wrong.submit([Message("user", "hi")], SHORT).result(20).error
        assert isinstance(error, RemoteNotFound) and "mimi" in error.problem and "mini" in error.fix
    error = client.submit([Message("user", "hi")], SHORT, extra={"unheard_of": 1}).result(20).error
    assert isinstance(error, RemoteRejected) and error.status == 400 and "unheard_of" in str(error)


def test_a_server_that_dies_in_the_middle_of_an_answer(tmp_path):
    with start_command(tmp_path, CONFIG) as (process, url, _), HttpClient(url, KEY, "mini", retries=0) as client:
        handle = client.submit([Message("user", "hi")], ENDLESS)
        assert next(iter(handle)) is not None
        process.kill()
        process.wait()
        error = handle.result(20).error
        assert isinstance(error, RemoteError) and "broke off" in str(error) and handle.done
        assert isinstance(client.submit([Message("user", "hi")], SHORT).result(20).error, RemoteUnreachable)
