"""The compiled decode step through the whole engine: the same ids as the modules' own forward, in every family that has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_tiny

from mirada import VLM, Image, Message, Sampling, Text
from mirada.layers.kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
QUESTIONS = ("What does it say?", "How many red circles are there, and where?", "Read it.", "Describe the picture.")


def chats(count: int = 4) -> list[list[Message]]:
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 255, (56 + 28 * i, 112, 3), dtype=np.uint8) for i in range(count)]
    return [[Message("user", (Image(picture), Text(question)))] for picture, question in zip(pictures, QUESTIONS, strict=False)]


def ids(vlm: VLM, on: bool, **sampling: Any) -> list[tuple[int, ...]]:
    vlm.parts.model.decoder.steps.on = on
    outputs = vlm.generate(chats(), Sampling(max_tokens=24, ignore_eos=True, **sampling))
    assert all(output.error is None for output in outputs)
    return [output.tokens for output in outputs]


def test_pictures_asked_of_mini() -> None:
    with VLM("mini", engine={"prefix_cache_bytes": 0}) as vlm:
        assert ids(vlm, True) == ids(vlm, False)
        assert vlm.parts.model.decoder.steps.planned


@pytest.mark.parametrize("model_type", ["Keye", "KeyeVL1_5", "qwen2_vl"])
@pytest.mark.parametrize("tied", [False, True])
def test_families(tmp_path: Path, model_type: str, tied: bool) -> None:
    make_tiny(tmp_path, model_type, tie_word_embeddings=tied)
    with VLM(tmp_path, device="cpu", engine={"prefix_cache_bytes": 0, "speculate": 3}) as vlm:
        assert ids(vlm, True) == ids(vlm, False)
        assert vlm.parts.model.decoder.steps.planned


@pytest.mark.parametrize("settings", [{"engine": {"kv": "int8"}}, {"quant": "int8"}, {"quant": "int4"}])
def test_other_storage_is_planned_too(tmp_path: Path, settings: dict[str, Any]) -> None:
    make_tiny(tmp_path, "qwen2_vl")
    with VLM(tmp_path, device="cpu", **settings) as vlm:
        assert len(ids(vlm, True)) == len(chats())
        assert vlm.parts.model.decoder.steps.planned


def test_a_family_without_a_plan_answers_all_the_same(tmp_path: Path) -> None:
    make_tiny(tmp_path, "kimi_vl")
    with VLM(tmp_path, device="cpu") as vlm:
        assert not hasattr(vlm.parts.model.decoder, "steps")
        assert vlm.generate(chats(1), Sampling(max_tokens=3))[0].error is None
