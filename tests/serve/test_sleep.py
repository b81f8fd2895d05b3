"""Sleep and wake over HTTP: with a key, where a setting allows it."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving import KEY, data_uri, png, start_command, user

from mirada.errors import SettingsError
from mirada.serve import ServeSettings
from mirada.serve.sleep import check_sleep


@pytest.fixture(scope="module")
def asleep(tmp_path_factory):
    """A client of a server that may be put to sleep, and its process id."""
    config = {"api_keys": [KEY], "sleep": True, "engine": {"workers": 0}}
    key = {"Authorization": f"Bearer {KEY}"}
    with (
        start_command(tmp_path_factory.mktemp("sleep"), config) as (process, address, _),
        httpx.Client(base_url=address, timeout=60, headers=key) as client,
    ):
        yield client, process.pid


def ask(client: httpx.Client, text: str = "What is a receipt?", timeout: float = 60, **more) -> httpx.Response:
    parts = [{"type": "image_url", "image_url": {"url": data_uri(png())}}, {"type": "text", "text": text}]
    body = {"model": "mini", "messages": user(parts), "max_tokens": 8, **more}
    return client.post("/v1/chat/completions", json=body, timeout=timeout)


def anonymous(pid: int) -> float:
    """Megabytes of a process's own memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("level", [1, 2])
def test_a_server_sleeps_and_wakes(asleep, level):
    client, pid = asleep
    before = ask(client).json()["choices"][0]["message"]["content"]
    held = anonymous(pid)
    assert client.get("/is_sleeping").json() == {"is_sleeping": False, "levels": {"mini": 0}}
    for _ in range(2):
        told = client.post(f"/sleep?level={level}")
        assert told.status_code == 200 and told.json() == {"is_sleeping": True, "levels": {"mini": level}}
    assert anonymous(pid) < held - (20 if level == 2 else 0)
    refused = ask(client)
    assert refused.status_code == 503 and refused.headers["Retry-After"] and refused.json()["error"]["code"] == "engine_asleep"
    assert client.get("/ready").status_code == 503 and client.get("/ready").json() == {"status": "asleep"}
    assert client.get("/health").status_code == 200
    assert f'mirada_engine_asleep{{model="mini"}} {level}.0' in client.get("/metrics").text
    for _ in range(2):
        assert client.post("/wake_up").json() == {"is_sleeping": False, "levels": {"mini": 0}}
    assert client.get("/ready").status_code == 200
    assert ask(client).json()["choices"][0]["message"]["content"] == before


def test_what_is_under_way_is_answered_first(asleep):
    client, _ = asleep
    with ThreadPoolExecutor(1) as threads, client.stream(
        "POST", "/v1/chat/completions",
        json={"model": "mini", "messages": user("tell"), "stream": True, "ignore_eos": True, "max_repeats": 1000,
              "max_tokens": 120},
    ) as reply:  # fmt: skip
        lines = reply.iter_lines()
        next(lines)
        told = threads.submit(client.post, "/sleep")
        assert [line for line in lines if line][-1] == "data: [DONE]" and told.result().status_code == 200
    assert client.post("/wake_up").status_code == 200


def test_many_who_wait_for_sleep_hold_up_nobody(asleep):
    """More of them than there are threads for all: others are still told at once that it is falling asleep."""
    client, _ = asleep
    waiting = (os.cpu_count() or 1) + 4
    with ThreadPoolExecutor(waiting) as threads:
        with client.stream(
            "POST", "/v1/chat/completions",
            json={"model": "mini", "messages": user("tell"), "stream": True, "ignore_eos": True, "max_repeats": 4000,
                  "max_tokens": 4000},
        ) as reply:  # fmt: skip
            lines = reply.iter_lines()
            next(lines)
            told = [threads.submit(client.post, "/sleep") for _ in range(min(waiting, 32))]
            while (answer := ask(client, timeout=5)).status_code == 200:
                time.sleep(0.01)
            assert answer.json()["error"]["code"] == "engine_asleep" and not any(one.done() for one in told)
        assert {one.result().status_code for one in told} == {200}
    assert client.post("/wake_up").status_code == 200


def test_what_is_refused(asleep):
    client, _ = asleep
    for path, status, word in (
        ("/sleep?level=3", 400, "level"), ("/sleep?tags=weights", 400, "tags"), ("/wake_up?level=1", 400, "level"),
        ("/sleep?model=maxi", 404, "maxi"),
    ):  # fmt: skip
        told = client.post(path)
        assert told.status_code == status and word in told.json()["error"]["message"], told.text
    assert client.get("/sleep").status_code == 405
    for path in ("/sleep", "/wake_up"):
        assert httpx.post(str(client.base_url) + path, headers={"Authorization": "Bearer wrong-key"}).status_code == 401
    assert httpx.get(str(client.base_url) + "/is_sleeping").status_code == 401
    assert client.get("/is_sleeping").json()["is_sleeping"] is False


def test_the_routes_are_not_there_unasked(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "mini", "messages": user("hi"), "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/chat/completions", headers=headers, json=body).status_code == 200
    assert httpx.post(f"{server.url}/sleep", headers=headers).status_code == 404
    assert httpx.get(f"{server.url}/is_sleeping", headers=headers).status_code == 404


def test_without_a_key_nobody_can_ask_for_them():
    with pytest.raises(SettingsError, match="API key"):
        check_sleep(ServeSettings(sleep=True))
    check_sleep(ServeSettings(sleep=True, api_keys=(KEY,)))
