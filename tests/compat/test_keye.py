"""``KeyeVLInference``: the same answers as ``VLM``, and what is not there yet says how to do without."""

from __future__ import annotations

from pathlib import Path

import hubs
import pytest
from PIL import Image
from tiny import make_tiny_keye

from mirada import VLM
from mirada.compat.keye import KeyeVLInference
from mirada.errors import CheckpointError, HubNotFound, InputError, MediaNotFound, SettingsError
from mirada.models import precision


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_keye(tmp_path_factory.mktemp("tiny"), "Keye")


@pytest.fixture(scope="module")
def keye(folder):
    return KeyeVLInference.from_local(model_path=folder, device="cpu", load_in_4bit=False, load_in_8bit=False)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (90, 60), (200, 10, 10)).save(path)
    return str(path)


def test_the_answer_is_that_of_the_front_door(keye, folder, picture):
    vlm = VLM(folder)
    made = keye.infer(image=picture, text="What is it?", max_new_tokens=6)
    assert made["response"] == vlm.ask(picture, "What is it?", max_tokens=6)
    assert made["usage"].image_tokens > 0 and made["usage"].completion_tokens <= 6
    both = keye.infer(image=[picture, picture], text="What?", max_new_tokens=6)
    assert both["response"] == vlm.ask(picture, picture, "What?", max_tokens=6)
    assert keye.infer(text="What?", max_new_tokens=6)["response"] == vlm.ask("What?", max_tokens=6)


def test_a_video_of_frames(keye):
    frames = [Image.new("RGB", (60, 60), (60 * n, 0, 0)) for n in range(4)]
    made = keye.infer(video=frames, text="What happens?", max_new_tokens=2)
    assert made["usage"].num_frames == 4 and made["usage"].video_tokens > 0


def test_a_bad_picture_raises_and_the_next_one_answers(keye, picture):
    with pytest.raises(MediaNotFound, match=r"none\.png"):
        keye.infer(image="none.png", text="What?")
    with pytest.raises(InputError, match="nothing"):
        keye.infer()
    assert isinstance(keye.infer(image=picture, text="What?", max_new_tokens=2)["response"], str)


@pytest.mark.parametrize(("flag", "bits"), [("load_in_4bit", 4), ("load_in_8bit", 8)])
def test_quantised_modes(folder, flag, bits):
    made = KeyeVLInference.from_local(model_path=folder, device="cpu", **{flag: True})
    with made.vlm as vlm:
        assert precision.bits(vlm.parts.model) == {bits, 8}  # the head takes 8
        assert made.infer(text="hi", max_new_tokens=2)["usage"].completion_tokens > 0
    with pytest.raises(SettingsError, match="more than one"):
        KeyeVLInference.from_local(model_path=folder, load_in_4bit=True, load_in_8bit=True)


def test_a_model_of_a_hub(folder, tmp_path, monkeypatch):
    files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with hubs.serve(hubs.Hub(files, token="t")) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        made = KeyeVLInference.from_hf_hub(model_name="org/tiny-vl", token="t")
        assert made.infer(text="hi", max_new_tokens=2)["usage"].completion_tokens > 0
        with pytest.raises(HubNotFound, match="org/other"):
            KeyeVLInference.from_hf_hub(model_name="org/other", token="t")
        made = KeyeVLInference.from_hf_hub(model_name="org/tiny-vl", token="t", load_in_4bit=True)
        assert 4 in precision.bits(made.vlm.parts.model)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(CheckpointError):
        KeyeVLInference.from_local(model_path=tmp_path)
