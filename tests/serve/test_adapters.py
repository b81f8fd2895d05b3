"""Adapters come and go over HTTP: with a key, from one folder, where a setting names it."""

from __future__ import annotations

import httpx
import pytest
from serving import KEY, start_command, user
from tiny_adapters import make_adapter

from mirada import VLM
from mirada.errors import SettingsError
from mirada.serve import ServeSettings
from mirada.serve.adapters import check_adapters

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A client of a server with ``adapter_root``; below it lie an adapter and what is none."""
    folder = tmp_path_factory.mktemp("adapters")
    root = folder / "root"
    with VLM("mini", engine={"workers": 0}) as mini:
        make_adapter(root / "loud", mini.parts.model, strength=3.0)
        make_adapter(folder / "outside", mini.parts.model)
    (root / "empty").mkdir()
    (root / "link").symlink_to(folder / "outside")
    (root / "circle").symlink_to(root / "circle")
    config = {"api_keys": [KEY], "adapter_root": str(root), "engine": {"workers": 0}}
    with start_command(folder, config) as (_, address, _), httpx.Client(base_url=address, timeout=60) as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client


def ask(client: httpx.Client, model: str) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": model, "messages": user("What is a receipt?"), "max_tokens": 6})


def names(client: httpx.Client) -> list[str]:
    return [one["id"] for one in client.get("/v1/models").json()["data"]]


def test_an_adapter_comes_answers_and_goes(server):
    assert ask(server, "loud").status_code == 404
    told = server.post(LOAD, json={"lora_name": "loud", "lora_path": "loud"})
    assert (told.status_code, told.text) == (200, "Success: LoRA adapter 'loud' added successfully.")
    assert names(server) == ["mini", "loud"]
    said = [ask(server, name).json()["choices"][0]["message"]["content"] for name in ("mini", "loud")]
    assert said[0] != said[1]
    again = server.post(LOAD, json={"lora_name": "loud", "lora_path": "loud"})
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    assert server.post(UNLOAD, json={"lora_name": "loud"}).text == "Success: LoRA adapter 'loud' removed successfully."
    assert names(server) == ["mini"] and ask(server, "loud").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"lora_name": "a", "lora_path": "../outside"}, 400, "lora_path"),
        ({"lora_name": "a", "lora_path": "link"}, 400, "lora_path"),
        ({"lora_name": "a", "lora_path": "/etc"}, 400, "lora_path"),
        ({"lora_name": "a", "lora_path": "nothing"}, 400, "lora_path"),
        ({"lora_name": "a", "lora_path": "empty"}, 400, "lora_path"),
        ({"lora_name": "a", "lora_path": 5}, 400, "lora_path"),
        ({"lora_name": "a", "lora_path": "a" * 256}, 400, "lora_path"),
        ({"lora_name": "a", "lora_path": "circle"}, 400, "lora_path"),
        ({"lora_name": "a", "lora_path": "circle/loud"}, 400, "lora_path"),
        ({"lora_name": "mini", "lora_path": "loud"}, 400, "lora_name"),
        ({"lora_name": "a\n", "lora_path": "loud"}, 400, "lora_name"),
        ({"lora_path": "loud"}, 400, "lora_name"),
        ({"lora_name": "a", "lora_path": "loud", "model": "other"}, 404, "model"),
        ({"lora_name": "a", "lora_path": "loud", "lora_pth": "x"}, 400, "lora_pth"),
    ],
)
def test_what_cannot_be_loaded_is_named(server, body, status, param):
    told = server.post(LOAD, json=body)
    assert (told.status_code, told.json()["error"]["param"]) == (status, param), told.text
    assert names(server) == ["mini"]


@pytest.mark.parametrize(("name", "status"), [("nothing", 404), ("mini", 404), (5, 400)])
def test_what_cannot_be_unloaded_is_named(server, name, status):
    assert server.post(UNLOAD, json={"lora_name": name}).status_code == status
    assert names(server) == ["mini"]


def test_nobody_without_a_key_loads(server):
    assert httpx.post(f"{server.base_url}{LOAD}", json={"lora_name": "a", "lora_path": "loud"}).status_code == 401


def test_the_setting_needs_a_key_and_a_folder(tmp_path):
    with pytest.raises(SettingsError, match="needs an API key"):
        check_adapters(ServeSettings(adapter_root=tmp_path))
    with pytest.raises(SettingsError, match="no folder"):
        check_adapters(ServeSettings(adapter_root=tmp_path / "none", api_keys=(KEY,)))
    check_adapters(ServeSettings())
