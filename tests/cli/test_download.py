"""The command that fetches, and a model that is asked for by its name on a hub."""

from __future__ import annotations

import hubs
import pytest
from tiny import make_tiny_keye

from mirada import VLM, Message, Sampling
from mirada.errors import HubNotFound, SettingsError
from mirada.hub import transfer

MODEL = "org/tiny-vl"


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = make_tiny_keye(tmp_path_factory.mktemp("hubs"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def hub(files, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    monkeypatch.chdir(tmp_path)
    with hubs.serve(hubs.Hub(dict(files))) as made:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", made.url)
        yield made


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_a_model_is_fetched_and_its_place_printed(mirada, hub, files, source, tmp_path):
    hub.cuts = {"model.safetensors": [100_000]}
    done = mirada("download", MODEL, "--from", source, "--cache-dir", tmp_path / "own")
    assert done.code == 0, done.err
    place = tmp_path / "own" / "models--org--tiny-vl" / "snapshots"
    folder = done.out.strip()
    assert folder.startswith(str(place)) and (place / folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert "model.safetensors" in done.err and hub.sent("model.safetensors")[0] == 100_000


def test_what_fails_is_one_message(mirada, hub):
    for words, said in (
        (("org/other",), "there is no model 'org/other'"),
        ((MODEL, "--revision", "v9"), "has no revision 'v9'"),
        ((MODEL, "--token", "wrong"), "token is not valid"),
        ((MODEL, "--endpoint", "http://127.0.0.1:1"), "cannot be reached"),
    ):
        done = mirada("download", *words)
        assert done.code == 1 and said in done.err and "Traceback" not in done.err and done.out == ""
    done = mirada("download", MODEL, "--from", "hugging")
    assert done.code == 2 and "hf, modelscope" in done.err


def test_a_model_is_opened_by_its_name(hub, monkeypatch):
    chat, sampling = [Message("user", "hi")], Sampling(max_tokens=4, ignore_eos=True)
    text = VLM(MODEL, device="cpu").generate([chat], sampling)[0].message.text
    sent = len(hub.requests)
    again = VLM(MODEL, device="cpu", hub={"offline": True})
    assert again.generate([chat], sampling)[0].message.text == text != "" and len(hub.requests) == sent
    with pytest.raises(HubNotFound, match="mirada download org/other"):
        VLM("org/other", device="cpu", hub={"offline": True})
    with pytest.raises(SettingsError, match="tokn"):
        VLM(MODEL, hub={"tokn": "x"})
    with pytest.raises(HubNotFound, match="'v9'"):
        VLM(MODEL, hub={"revision": "v9"})


def test_a_directory_of_that_name_comes_first(hub, files, tmp_path):
    folder = tmp_path / "org" / "tiny-vl"
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert VLM(MODEL, device="cpu").parts.context > 0 and hub.requests == []


def test_asking_offline_names_the_command(mirada, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = mirada("ask", "--model", MODEL, "What is it?")
    assert done.code == 1 and "run: mirada download org/tiny-vl" in done.err and hub.requests == []
