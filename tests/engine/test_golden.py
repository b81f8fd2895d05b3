"""Greedy ids of the reference, through the engine's own prefill, cache and decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from parity.golden import Case, cases, load_model_files, load_reference_model
from parity.kimi import KimiCase
from parity.qwen2_vl import Qwen2VLCase
from safetensors.torch import load_file
from tiny import make_tiny

from mirada import VLM, Sampling
from mirada.engine import request, vision
from mirada.media.grid import Patches
from mirada.models.family import FAMILIES
from mirada.prompt.render import Renderer
from mirada.types import Prompt

GOLDEN = Path(__file__).parents[1] / "golden" / "keye_vl"
QWEN2_VL = GOLDEN.parent / "qwen2_vl"
PREVIEW = ("mixed", "image", "video_default_seconds", "video_fps2", "text", "left_padded_batch")


@pytest.fixture(scope="module", params=["Keye", "KeyeVL1_5", "qwen2_vl"])
def reference(request, tmp_path_factory):
    """(engine, {name: case}) of one model type. The reference's own vocabulary is not recorded, so any renderer will do."""
    kind = Qwen2VLCase if request.param == "qwen2_vl" else Case
    if request.param == "Keye":
        model = load_reference_model(GOLDEN / "model_config.json", GOLDEN / "model_weights.safetensors")
        recorded = cases(GOLDEN / "model_goldens.safetensors")
        assert set(recorded) == set(PREVIEW)
    elif request.param == "qwen2_vl":
        model = load_model_files(QWEN2_VL / "config.json", QWEN2_VL / "model.safetensors")
        recorded = {name: load_file(QWEN2_VL / f"{name}.safetensors") for name in ("case_a", "case_b_long_video")}
    else:
        override = GOLDEN / "keye15_projector_override.safetensors"
        model = load_reference_model(GOLDEN / "keye15_config.json", GOLDEN / "model_weights.safetensors", override)
        recorded = cases(GOLDEN / "keye15_goldens.safetensors")
        assert len(recorded) == 1
    directory = make_tiny(tmp_path_factory.mktemp(request.param), request.param)
    form = VLM(directory, device="cpu").parts.renderer.format
    vlm = VLM.from_parts(model, Renderer.from_directory(directory, form))
    return vlm, {name: kind(model, tensors) for name, tensors in recorded.items()}


def media_of(case: Case) -> list[list[Patches]]:
    """Per prompt, one Patches for every span, holding the recorded (already normalised) pixels."""
    queues = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if name in case.theirs:
            queues[kind] = case.theirs[name].numpy()
    made = []
    for prompt in case.prompts:
        media = []
        for span in prompt.spans:
            count = int(np.prod(span.grid))
            media.append(Patches(span.kind, queues[span.kind][:count], (span.grid,), (0, 0), bytes(32)))
            queues[span.kind] = queues[span.kind][count:]
        made.append(media)
    assert not any(len(left) for left in queues.values())
    return made


def test_greedy_ids(reference, monkeypatch):
    vlm, recorded = reference
    monkeypatch.setattr(vision, "normalise", lambda pixels, rule: pixels)
    monkeypatch.setattr(request, "check_media", lambda media, rule: None)
    handles, expected = [], []
    for case in recorded.values():
        generated = case.theirs["generated_ids" if "generated_ids" in case.theirs else "generated"].tolist()
        for prompt, media, ids in zip(case.prompts, media_of(case), generated, strict=True):
            handles.append(vlm.submit(prompt, Sampling(max_tokens=len(ids), ignore_eos=True), media=media))
            expected.append(tuple(ids))
    assert [handle.result().tokens for handle in handles] == expected  # all cases in one batch


@torch.no_grad()
def test_greedy_ids_of_kimi(tmp_path_factory, monkeypatch):
    """Three pictures in one prompt, beside a prompt of text alone: flat positions, a latent cache, experts."""
    folder = GOLDEN.parent / "kimi_vl"
    model = load_model_files(folder / "config.json", folder / "model.safetensors")
    directory = make_tiny(tmp_path_factory.mktemp("kimi_vl"), "kimi_vl")
    form = FAMILIES["kimi_vl"].prompt_format(model.config)
    vlm = VLM.from_parts(model, Renderer.from_directory(directory, form))
    case, text = (KimiCase(model, load_file(folder / name)) for name in ("case.safetensors", "text_only.safetensors"))
    media, at = [], 0
    for _, h, w in case.grids:
        pixels = case.theirs["pixel_values"][at : at + h * w].numpy()
        media.append(Patches("image", pixels, ((1, h, w),), (0, 0), bytes(32)))
        at += h * w
    monkeypatch.setattr(vision, "normalise", lambda pixels, rule: pixels)
    monkeypatch.setattr(request, "check_media", lambda media, rule: None)
    asked = Prompt(tuple(case.theirs["input_ids"][0].tolist()), case.spans)
    expected = case.theirs["generated_ids"][0].tolist()
    sampling = Sampling(max_tokens=len(expected), ignore_eos=True)
    alone = vlm.submit(Prompt(tuple(text.theirs["input_ids"][0].tolist())), Sampling(max_tokens=1, ignore_eos=True))
    assert list(vlm.submit(asked, sampling, media=media).result().tokens) == expected
    assert alone.result().tokens == (int(text.theirs["logits"][0, -1].argmax()),)
