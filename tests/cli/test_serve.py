"""``mirada serve``: the command itself in a process of its own: two models, an adapter, keys from everywhere, files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import httpx
import pytest
from serving import data_uri, image, png, user
from tiny_adapters import make_adapter

from mirada import VLM

KEYS = {
    "option": "key-of-the-option",
    "file": "key-of-the-file",
    "environment": "key-of-the-environment",
    "yaml": "key-of-the-yaml",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def vlm(tiny):
    with VLM(tiny, engine={"workers": 0}) as made:
        yield made


@pytest.fixture(scope="module")
def loud(folder, vlm):
    return make_adapter(folder / "loud", vlm.parts.model, strength=3.0)


@pytest.fixture(scope="module")
def web(tiny, folder, loud):
    """A client of the running command, ended by SIGTERM at the end."""
    (folder / "keys").write_text(f"# of the tests\n{KEYS['file']}\n")
    (folder / "keys").chmod(0o600)
    (folder / "media").mkdir()
    (folder / "media" / "a.png").write_bytes(png())
    (folder / "outside.png").write_bytes(png())
    (folder / "more.yaml").write_text(f"api_keys: [{KEYS['yaml']}]\nport: 1\nmax_tokens: 3\nengine: {{workers: 0}}\n")
    words = ["--model", "mini", "--model", f"tiny={tiny}", "--port", "0", "--host", "127.0.0.1",
             "--adapter", f"tiny:loud={loud}",
             "--media-root", folder / "media", "--api-key", KEYS["option"], "--api-key-file", folder / "keys", "--kv", "int8",
             "--max-pixels", "4000", "--config", folder / "more.yaml"]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "mirada.cli", "serve", *map(str, words)], stdout=subprocess.PIPE, stderr=log,
            text=True, env={**os.environ, "MIRADA_API_KEYS": KEYS["environment"]},
        )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.readline()
    try:
        assert said.startswith("Serving mini at http://127.0.0.1:"), (folder / "log").read_text()
        with httpx.Client(base_url=said.split()[3], timeout=60, headers={"Authorization": f"Bearer {KEYS['option']}"}) as made:
            yield made
    finally:
        process.terminate()
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.stdout.close()


def ask(web, model, text="What?", *parts, **more):
    body = {"model": model, "messages": user(text, *parts), "temperature": 0, **more}
    return web.post("/v1/chat/completions", json=body)


def text(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("source", KEYS)
def test_keys_are_read_from_everywhere(web, source):
    assert web.get("/v1/models", headers={"Authorization": f"Bearer {KEYS[source]}"}).status_code == 200
    assert web.get("/v1/models", headers={"Authorization": f"Bearer {KEYS[source]}x"}).status_code == 401


def test_both_models_and_the_adapter_answer_by_their_names(web, vlm, loud):
    found = {card["id"]: card for card in web.get("/v1/models").json()["data"]}
    assert list(found) == ["mini", "tiny", "loud"]
    assert found["tiny"]["adapters"] == ["loud"] and found["loud"]["parent"] == "tiny" and "parent" not in found["tiny"]
    assert web.get("/v1/models/loud").json()["id"] == "loud"
    vlm.load_adapter("loud", loud)
    plain, changed = (vlm.ask("What?", max_tokens=3, adapter=name) for name in (None, "loud"))
    assert plain != changed
    assert text(ask(web, "tiny")) == plain  # three tokens: max_tokens of the file
    assert text(ask(web, "tiny", adapter="loud")) == text(ask(web, "loud")) == text(ask(web, "loud", adapter="loud")) == changed
    assert ask(web, "loud").json()["model"] == "loud"
    assert text(ask(web, "mini", max_tokens=8)) not in (plain, changed)


def test_an_adapter_belongs_to_its_model(web):
    for model, adapter in (("mini", "loud"), ("loud", "other"), ("tiny", "load")):
        reply = ask(web, model, adapter=adapter)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "adapter"


def test_settings_of_media_hold_where_a_request_has_none(web):
    large = image(data_uri(png((400, 300))))

    def tokens(**more):
        return ask(web, "tiny", "What?", large, **more).json()["usage"]["prompt_tokens_details"]["image_tokens"]

    assert tokens() < tokens(max_pixels=100_000) == tokens(mm_processor_kwargs={"max_pixels": 100_000})


def test_only_files_of_the_media_root_are_read(web, folder):
    inside = ask(web, "tiny", "What?", image("a.png"))
    assert inside.status_code == 400 or inside.json()["usage"]["prompt_tokens_details"]["image_tokens"]
    assert text(ask(web, "tiny", "What?", image((folder / "media" / "a.png").as_uri())))
    for source in ((folder / "outside.png").as_uri(), f"file://{folder}/media/../outside.png"):
        reply = ask(web, "tiny", "What?", image(source))
        assert reply.status_code == 400 and "outside the allowed folder" in reply.json()["error"]["message"]


WRONG = [
    (("--model", "a={tiny}", "--model", "a={tiny}"), "two models are called 'a'"),
    (("--model", "="), "--model '=' has no form"),
    (("--model", "mini", "--model", "a={tiny}", "--adapter", "x={loud}"), "does not say for which of 2 models"),
    (("--model", "a={tiny}", "--adapter", "a={loud}"), "two models or adapters are called 'a'"),
    (("--adapter", "x={tiny}"), "no adapter lies at"),
    (("--host", "0.0.0.0"), "no API key is set"),
    (("--port", "99999"), "port=99999 is out of range"),
    (("--media-root", "/no/such"), "--media-root '/no/such' is no folder"),
    (("--quant", "int7"), "quant='int7' is unknown"),
    (("--kv", "int4"), "kv='int4' is unknown"),
    (("--thinking", "maybe"), "--thinking 'maybe' is unknown"),
    (("--fps", "2", "--nframes", "4"), "fps and nframes are both given"),
    (("--fps", "-1"), "fps=-1.0 is out of range"),
    (("--min-pixels", "9000", "--max-pixels", "4000"), "min_pixels=9000 is above max_pixels"),
    (("--api-key", "short"), "API key 1 does not do"),
    (("--api-key-file", "/no/such"), "'/no/such' cannot be read"),
    (("--config", "/no/such.yaml"), "/no/such.yaml"),
]


def test_a_port_that_is_taken_is_named(mirada):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = mirada("serve", "--port", port)
    assert done.code == 2 and f"port {port} is in use" in done.err


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(row[0]) for row in WRONG])
def test_what_is_wrong_is_said_before_anything_is_served(mirada, tiny, loud, words, said):
    done = mirada("serve", *(word.format(tiny=tiny, loud=loud) for word in words))
    assert done.code == 2 and said in done.err, done.err
    assert "Traceback" not in done.err and done.out == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engine: 3", "engine in"), ("engine: {worker: 1}", "did you mean 'workers'"), ("engine: {workers: -1}", "workers=-1"),
        ("media: [1]", "media in"), ("media: {second: 1}", "did you mean 'seconds'"), ("media: {seconds: 0}", "seconds=0"),
        ("media: {file_root: /}", "--media-root"), ("media: {allow_private: true}", "--private-media"),
    ],
)  # fmt: skip
def test_bounds_of_the_engine_and_of_media_that_do_not_do(mirada, tmp_path, text, words):
    """What can be checked is, before a model is opened."""
    (tmp_path / "c.yaml").write_text(text)
    done = mirada("serve", "--port", "0", "--config", str(tmp_path / "c.yaml"))
    assert done.code == 2 and words in done.err


def test_a_way_of_thinking_that_a_model_lacks_is_refused_at_the_start(vlm):
    from dataclasses import replace
    from types import SimpleNamespace

    from mirada.errors import SettingsError
    from mirada.media.limits import FetchLimits
    from mirada.serve import ServeSettings, create_app

    form = replace(vlm.parts.renderer.format, thinking_suffix=(("auto", ""),))
    parts = SimpleNamespace(renderer=SimpleNamespace(format=form))
    models = {"plain": SimpleNamespace(parts=parts, limits=FetchLimits.serving())}
    with pytest.raises(SettingsError, match="plain has no thinking mode 'on'"):
        create_app(models, ServeSettings(thinking="on"))
