"""``compat.transformers`` against recorded outputs of the reference processors and models: pixels, grids, greedy ids."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.golden import cases, load_model_files
from safetensors.torch import load_file
from tiny import make_tiny, write_tokenizer

from mirada import VLM
from mirada.compat import features
from mirada.compat.model import Model
from mirada.compat.processor import Processor
from mirada.engine import request, vision
from mirada.media.rule import KEYE_15
from mirada.models.family import family_of
from mirada.prompt.render import Renderer
from mirada.prompt.template import Template
from mirada.prompt.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


def synth(h: int, w: int, k: int) -> np.ndarray:
    """The pictures of the Qwen2-VL and Kimi-VL files."""
    y, x, c = (axis.astype(np.int64) for axis in np.ogrid[:h, :w, :3])
    return ((7 * x + 13 * y + 41 * c + x * y // 11 + 29 * k + (x // 8 + y // 8 + c) % 2 * 64) % 256).astype(np.uint8)


def renderer(folder: Path, config: dict, pads: dict[str, int], form) -> Renderer:
    """A renderer whose control strings have the ids that the recorded prompts hold."""
    write_tokenizer(folder, tuple(pads))
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["id"] = pads[token["content"]]
    return Renderer(Tokenizer(spec), Template(form.template), form)


def opened(folder: Path, family: str, pads: dict[str, int], *weights: str, config: str = "config.json") -> Model:
    mapping = json.loads((GOLDEN / family / config).read_text())
    model = load_model_files(GOLDEN / family / config, *(GOLDEN / family / name for name in weights))
    kind = family_of(mapping)
    form = kind.prompt_format(model.config)
    return Model(VLM.from_parts(model, renderer(folder, mapping, pads, form)), {"do_sample": False})


def ids_of(config: str, family: str) -> dict[str, int]:
    mapping = json.loads((GOLDEN / family / config).read_text())
    return {"<|image_pad|>": mapping["image_token_id"], "<|video_pad|>": mapping["video_token_id"]}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return opened(folder, "qwen2_vl", ids_of("config.json", "qwen2_vl"), "model.safetensors")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("p"), "qwen2_vl")
    (folder / "preprocessor_config.json").write_text((GOLDEN / "qwen2_vl/preprocessor_config.json").read_text())
    return Processor.from_pretrained(folder)


@pytest.mark.parametrize("name", ["case_a", "case_b_long_video"])
def test_qwen_tensors_and_greedy_ids(name, qwen, processor):
    """From pictures and frames to the reference's ids: the tensors are made here, the prompt is the recorded one."""
    case = load_file(GOLDEN / f"qwen2_vl/{name}.safetensors")
    images = [synth(60, 90, 1), synth(100, 45, 2)]
    film = np.stack([synth(*((70, 115) if name == "case_a" else (50, 70)), (5 if name == "case_a" else 9) + 3 * i)
                     for i in range(4 if name == "case_a" else 10)])  # fmt: skip
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    made = processor(text=[f"{pad}{pad}<|video_pad|>"], images=images, videos=[film], return_tensors="pt")
    for key in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"):
        assert made[key].dtype == case[key].dtype and torch.equal(made[key], case[key]), key
    tensors = {key: made[key] for key in features.MEDIA if key in made}
    out = qwen.generate(input_ids=case["input_ids"], attention_mask=case["attention_mask"], **tensors, max_new_tokens=12)
    recorded = case["generated_ids"]
    length = case["input_ids"].shape[1]
    assert torch.equal(out[:, :length], case["input_ids"])
    assert out[:, length:].tolist() == recorded[:, -12:].tolist()


def test_qwen_left_padded_batch(qwen):
    case, one = (load_file(GOLDEN / f"qwen2_vl/{name}.safetensors") for name in ("batch_left_padded", "case_a"))
    media = {key: one[key] for key in features.MEDIA if key in one}
    out = qwen.generate(
        input_ids=case["input_ids"], attention_mask=case["attention_mask"], **media, max_new_tokens=8, pad_token_id=311
    )
    assert out[0, -8:].tolist() == case["generated_ids"][0, -8:].tolist()
    # The reference took its padded row of text for finished; alone, that text goes on so:
    assert set(case["generated_ids"][1].tolist()) == {311}
    assert out[1, -8] == case["logits_row1_text"][-1].argmax()


def test_qwen_pixels(processor):
    table = json.loads((GOLDEN / "qwen2_vl/processing_tables.json").read_text())["images"]
    for row in table:
        low, high = row["kwargs"].get("min_pixels"), row["kwargs"].get("max_pixels")
        one = Processor(processor._renderer, processor._rule.bounded(low, high) if low or high else processor._rule)
        made = one(text="<|image_pad|>", images=synth(row["h"], row["w"], row["k"]), return_tensors="pt")
        assert made.image_grid_thw.tolist() == [row["grid_thw"]]
        assert list(made.pixel_values.shape) == row["pixel_values_shape"]
        assert hashlib.sha256(made.pixel_values.numpy().tobytes()).hexdigest() == row["sha256_float32"]


def test_keye_pixels(tmp_path, synth):
    """Two pictures, frames as PIL images, and the resized tensor that ``fetch_video`` of 1.0.0 gives."""
    facts = json.loads((GOLDEN / "keye_vl/image_processor.json").read_text())
    folder = make_tiny(tmp_path, "Keye")
    (folder / "preprocessor_config.json").write_text(json.dumps(facts["processor_config"]))
    keye = Processor.from_pretrained(folder)
    images = [synth(*size) for size in facts["two_images"]["sizes"]]
    film = [synth(112, 140, 20 + t) for t in range(5)]
    assert facts["video_frames_processor"]["frames"] == "synth(112,140,20+t) t=0..4"
    made = keye(
        text=["<|image_pad|> <|image_pad|> <|video_pad|>"], images=images, videos=[film], fps=[2.0], return_tensors="pt"
    )
    for key, grid, name in (
        ("pixel_values", "image_grid_thw", "two_images"),
        ("pixel_values_videos", "video_grid_thw", "video_frames_processor"),
    ):
        assert hashlib.sha256(made[key].numpy().tobytes()).hexdigest() == facts[name]["sha256_float32"], name
        assert made[grid].tolist() == facts[name]["grid_thw"] and list(made[key].shape) == facts[name]["shape"]
    assert made.second_per_grid_ts.tolist() == [0.5]


def preview(tmp_path: Path) -> Model:
    names = ("model_weights.safetensors",)
    return opened(tmp_path, "keye_vl", ids_of("model_config.json", "keye_vl"), *names, config="model_config.json")


def take_noise(monkeypatch):
    """The recorded pixels are noise, no bytes."""
    monkeypatch.setattr(vision, "normalise", lambda pixels, rule: pixels)
    monkeypatch.setattr(features, "denormalise", lambda values, rule, tolerance: values)
    monkeypatch.setattr(request, "check_media", lambda media, rule: None)


def test_keye_preview_greedy_ids(tmp_path, monkeypatch):
    take_noise(monkeypatch)
    model, seen = preview(tmp_path), 0
    for name, case in cases(GOLDEN / "keye_vl/model_goldens.safetensors").items():
        inputs = {key: case[key] for key in ("input_ids", "attention_mask", *features.MEDIA) if key in case}
        out = model.generate(**inputs, max_new_tokens=case["generated"].shape[1])
        assert out[:, case["input_ids"].shape[1] :].tolist() == case["generated"].tolist(), name
        seen += 1
    assert seen == 6


@pytest.mark.parametrize("merged", [True, False])
def test_keye_15_greedy_ids(tmp_path, monkeypatch, merged):
    take_noise(monkeypatch)
    pads = ids_of("keye15_config.json", "keye_vl")
    files = ("model_weights.safetensors", "keye15_projector_override.safetensors")
    model = opened(tmp_path, "keye_vl", pads, *files, config="keye15_config.json")
    case = load_file(GOLDEN / "keye_vl/keye15_goldens.safetensors")
    names = ("input_ids", "pixel_values", "image_grid_thw", "pixel_values_videos", "num_frames")
    grids = case["video_grid_thw_merged" if merged else "video_grid_thw_split"]
    out = model.generate(**{name: case[name] for name in names}, video_grid_thw=grids, max_new_tokens=12)
    assert out[:, case["input_ids"].shape[1] :].tolist() == case["generated"].tolist()


@pytest.mark.parametrize("case", json.loads((GOLDEN / "keye_vl/keye15_processor.json").read_text()), ids=lambda c: c["name"])
def test_keye_15_processor(tmp_path, case):
    from parity.preprocessing import _counted, _sampled

    from mirada.compat import keye_vl_utils

    _, _, frames = _sampled(case)
    ele = {"video": [frame for frame in frames], **case["ele"]}
    _, videos, kwargs = keye_vl_utils.process_vision_info([{"role": "user", "content": [{"type": "video", **ele}]}])
    made = Processor.from_pretrained(make_tiny(tmp_path, "KeyeVL1_5"))
    made = Processor(made._renderer, KEYE_15)
    inputs = made(text=["<|vision_start|><|video_pad|><|vision_end|>"], videos=videos, return_tensors="pt", **kwargs)
    facts = case["pixel_values_videos"]
    assert inputs.video_grid_thw.tolist() == case["video_grid_thw"] and inputs.num_frames.tolist() == [case["num_frames"]]
    assert hashlib.sha256(inputs.pixel_values_videos.numpy().tobytes()).hexdigest() == facts["sha256_float32"]
    between = made.decode(inputs.input_ids[0]).removeprefix("<|vision_start|>").removesuffix("<|vision_end|>")
    assert _counted(between) == case["prompt_between_vision_start_end"]


def test_kimi_pixels_and_greedy_ids(tmp_path):
    mapping = json.loads((GOLDEN / "kimi_vl/config.json").read_text())
    pads = {"<|media_pad|>": mapping["media_placeholder_token_id"], "<|im_end|>": 399}
    model = opened(tmp_path, "kimi_vl", pads, "model.safetensors")
    kind = family_of(mapping)
    rule = kind.media_rule(model.config, json.loads((GOLDEN / "kimi_vl/preprocessor_config.json").read_text()))
    processor = Processor(model.vlm.parts.renderer, rule)
    case = load_file(GOLDEN / "kimi_vl/case.safetensors")
    images = [synth(45, 77, 1), synth(112, 112, 2), synth(30, 200, 3)]
    made = processor(text=["<|media_pad|>" + " <|media_pad|>" * 2], images=images, return_tensors="pt", padding=True)
    assert torch.equal(made.image_grid_hws, case["image_grid_hws"])
    assert torch.equal(made.pixel_values, case["pixel_values"]) and "image_grid_thw" not in made
    out = model.generate(
        input_ids=case["input_ids"], pixel_values=made.pixel_values, image_grid_hws=made.image_grid_hws, max_new_tokens=12
    )
    assert out[:, case["input_ids"].shape[1] :].tolist() == case["generated_ids"][:, -12:].tolist()


def test_renderings_and_ids_through_the_processor(tmp_path):
    """Recorded renderings; each encodes to what the whole string would, as nothing in them is typed by a user."""
    made = Processor.from_pretrained(make_tiny(tmp_path, "qwen2_vl"))
    for row in json.loads((GOLDEN / "qwen2_vl/chat_renderings.json").read_text()):
        text = made.apply_chat_template(
            row["messages"], add_generation_prompt=row["add_generation_prompt"], add_vision_id=row["add_vision_id"]
        )
        assert text == row["text"]
