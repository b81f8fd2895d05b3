"""Options that commands share: each reaches what it is for, and is refused where it has no place."""

from __future__ import annotations

import json

import pytest
from clips import encode
from tiny_adapters import make_adapter

from mirada.cli.options import How, Who, named_adapter
from mirada.engine.llm import VLM
from mirada.errors import SettingsError
from mirada.models import precision
from mirada.types import Image, Video


@pytest.fixture(scope="module")
def vlm(tiny):
    with VLM(tiny, engine={"workers": 0}) as made:
        yield made


@pytest.fixture(scope="module")
def adapter(vlm, tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapter") / "loud", vlm.parts.model, strength=3.0)


def usage(mirada, *words):
    done = mirada("ask", *words, "--max-tokens", 1, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)["usage"]


def test_settings_of_media(mirada, tiny, picture, tmp_path):
    video = tmp_path / "clip.mp4"
    video.write_bytes(encode(20))
    asked = (video, "What?", "-m", tiny)
    frames = [usage(mirada, *asked, *more)["num_frames"] for more in (("--nframes", 4), ("--fps", 4))]
    assert frames[0] == 4 and frames[1] > 4
    tokens = [usage(mirada, picture, "What?", "-m", tiny, *more)["image_tokens"] for more in ((), ("--min-pixels", 100_000))]
    assert tokens[0] < tokens[1]
    done = mirada("ask", video, "What?", "-m", tiny, "--nframes", 4, "--fps", 2)
    assert done.code == 2 and "nframes" in done.err and "Traceback" not in done.err


def test_how_matrices_and_the_cache_are_kept(tiny):
    with Who(str(tiny), quant="int8", kv="int8").open(workers=0)[0] as made:
        assert isinstance(made, VLM)
        assert made._engine.engine.runner.cache.kv == "int8"
        assert precision.bits(made.parts.model)
    with Who(str(tiny)).open(workers=0)[0] as made:
        assert isinstance(made, VLM) and made._engine.engine.runner.cache.kv == "auto"
        assert not precision.bits(made.parts.model)


def test_an_adapter_answers(mirada, tiny, adapter, vlm):
    vlm.load_adapter("loud", adapter)
    plain, loud = (vlm.ask("What?", max_tokens=8, adapter=name) for name in (None, "loud"))
    assert plain != loud
    for said in (adapter, f"any={adapter}"):
        done = mirada("ask", "What?", "-m", tiny, "--max-tokens", 8, "--adapter", said, "--json")
        assert json.loads(done.out)["text"] == loud
    assert named_adapter(str(adapter)) == ("loud", adapter) and named_adapter(f"a={adapter}") == ("a", adapter)


WRONG = [
    (("--quant", "int7"), "quant='int7' is unknown"),
    (("--kv", "int4"), "kv='int4' is unknown"),
    (("--thinking", "maybe"), "--thinking 'maybe' is unknown"),
    (("--adapter", "x=/no/such"), "no adapter lies at '/no/such'"),
    (("--adapter", "={tiny}"), "NAME=FOLDER"),
    (("--nframes", "3.5"), "Invalid value for '--nframes'"),
    (("--url", "http://127.0.0.1:9", "--quant", "int8"), "--quant is for a model in this process"),
    (("--url", "http://127.0.0.1:9", "--kv", "int8"), "--kv is for a model in this process"),
    (("--url", "http://127.0.0.1:9", "--adapter", "a=b"), "--adapter 'a=b' has a folder"),
    (("--api-key", "sk-x"), "--api-key is for a server"),
]


@pytest.mark.parametrize("command", ["ask", "chat"])
@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(row[0]) for row in WRONG])
def test_what_has_no_place_is_said_in_one_message(mirada, monkeypatch, tiny, command, words, said):
    monkeypatch.setattr("builtins.input", lambda _: (_ for _ in ()).throw(EOFError))
    words = [word.format(tiny=tiny) for word in words]
    done = mirada(command, *(["What?"] if command == "ask" else []), *([] if "--url" in words else ["-m", tiny]), *words)
    assert done.code == 2 and said in done.err, done.err
    assert "Traceback" not in done.err and done.out == ""


def test_each_kind_takes_the_settings_that_are_its_own():
    how = How.of(8, 0.0, "off", fps=2.0, nframes=None, min_pixels=None, max_pixels=1000)
    assert (how.thinking, how.sampling.max_tokens) == ("off", 8)
    assert how.part(Image, "a.png") == Image("a.png", max_pixels=1000)
    assert how.part(Video, "a.mp4") == Video("a.mp4", fps=2.0, max_pixels=1000)
    with pytest.raises(SettingsError):
        How.of(0, 0.0, None)
