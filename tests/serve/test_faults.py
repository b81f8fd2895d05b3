"""Clients that go, signals, a full disk: what survives."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from serving import KEY, start, user

ENDLESS = {
    "model": "echo", "messages": user("tell"), "ignore_eos": True, "max_repeats": None, "temperature": 1.0, "max_tokens": 3000,
}  # fmt: skip
HEADERS = {"Authorization": f"Bearer {KEY}"}


def endless(**more):
    # null is as good as absent, so the guard against loops is set out of reach instead
    return {**ENDLESS, "max_repeats": 1000, **more}


def wait_for(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def send_raw(url: str, body: dict) -> socket.socket:
    """A request over a socket of our own, which can be cut."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    made = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
    made.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return made


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_sequence_within_one_step(server, stream):
    def num_gone() -> int:
        return sum(line.get("status") == 499 for line in server.logged())

    before, gone = server.stats(), num_gone()
    client = send_raw(server.url, endless(stream=stream))
    if stream:
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
    wait_for(lambda: server.stats()["running"] == 1)
    client.close()
    wait_for(lambda: server.stats()["running"] == 0)
    after = server.stats()
    assert after["generated_tokens_total"] - before["generated_tokens_total"] < 2500  # far from its 3000
    steps = [server.stats()["steps_total"] for _ in range(2)]
    assert steps[0] == steps[1]  # nothing is computed for nobody
    wait_for(lambda: num_gone() > gone)


def test_clients_that_go_before_their_body_is_there(server, post):
    for cut in (20, 150):
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 900\r\n"
            client.sendall((head + f"Authorization: Bearer {KEY}\r\n\r\n{{".encode())[:cut])
    assert post({"model": "echo", "messages": user("say:alive")}).json()["choices"][0]["message"]["content"] == "alive"
    wait_for(lambda: "mirada_requests_under_way 0.0" in server.get("/metrics").text)


def test_sigterm_drains_and_a_full_disk_of_logs_hurts_nobody(tmp_path):
    """Three answers under way are whole; a new request is told 503; the process then ends by itself with 0."""
    with start(tmp_path, KEY, log="/dev/full") as running:
        replies: list[httpx.Response] = []

        def ask():
            body = endless(max_tokens=500, seed=len(replies))  # so many that the first is not over before the third begins
            replies.append(httpx.post(running.url + "/v1/chat/completions", json=body, headers=HEADERS, timeout=300))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: running.stats()["running"] == 3)
        running.process.send_signal(signal.SIGTERM)
        wait_for(lambda: running.get("/ready").status_code == 503)
        new = httpx.post(running.url + "/v1/chat/completions", json=endless(), headers=HEADERS)
        assert new.status_code == 503 and new.json()["error"]["code"] == "draining" and new.headers["retry-after"]
        assert running.get("/health").status_code == 200
        for thread in threads:
            thread.join()
        assert [reply.json()["usage"]["completion_tokens"] for reply in replies] == [500] * 3
        assert running.process.wait(60) == 0


def test_the_command_serves_and_a_second_signal_ends_it():
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "mirada.cli", "serve", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        first, curl = process.stdout.readline(), process.stdout.readline() + process.stdout.readline()
        url = first.split(" at ")[1].split()[0]
        assert curl.startswith(f"curl {url}/v1/chat/completions")
        said = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=120)
        assert json.loads(said.stdout)["choices"][0]["message"]["role"] == "assistant", said
        client = send_raw(url, endless(model="mini", stream=True))
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        client.close()
    finally:
        process.kill()
        process.communicate()
