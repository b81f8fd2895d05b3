"""Hundreds of small requests leave neither memory nor objects behind; minutes of them are ``benchmarks/soak.py``'s."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import numpy as np
import pytest

from mirada import VLM, Image, Message, Sampling, Text
from mirada.engine import memory
from mirada.errors import MiradaError

KB = 1 << 10
ROUND = 120
SMALL = {"prefix_cache_bytes": 512 * KB, "encoder_cache_bytes": 256 * KB, "pixel_cache_bytes": 512 * KB, "workers": 0}
"""Full long before the first round is over."""
PICTURE = 112 * 112 * 3
GROWTH = ROUND * PICTURE // 3
"""Bytes: less than if every third request left its picture behind. What the C library keeps in holes is about a tenth."""


def traffic(vlm: VLM, seed: int) -> None:
    """``ROUND`` requests: new pictures, some of them with a broken one beside them, some read in pieces and left half-way."""
    random = np.random.default_rng(seed)
    for _ in range(ROUND // 8):
        pictures = [random.integers(0, 256, (112, 112, 3), dtype=np.uint8) for _ in range(6)]
        chats = [[Message("user", (Image(picture), Text("what is it?")))] for picture in pictures]
        chats[2] = []
        settings = Sampling(max_tokens=3, ignore_eos=True, logprobs=1)
        assert [output.error is None for output in vlm.generate(chats[:5], settings)] == [True, True, False, True, True]
        for delta in vlm.stream(chats[5], settings):
            assert delta.tokens
            break
        handle = vlm.submit([Message("user", (Image(b"no picture"), Text("?")))], settings)
        with contextlib.suppress(MiradaError):
            list(handle)
        vlm.submit(chats[0], settings)  # nobody reads it
    assert vlm._engine.wait_idle(20)


def held() -> tuple[int, int]:
    """Bytes of this process's own memory, and objects."""
    gc.collect()
    memory.trim()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * KB for line in lines if line.startswith("RssAnon")), len(gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_hundreds_of_requests_leave_nothing_behind(tiny_directories):
    with VLM(tiny_directories["qwen2_vl"], device="cpu", engine=SMALL) as vlm:
        traffic(vlm, 0)
        rounds = [held()]
        assert vlm.stats()["pixel_cache_bytes"] > 400 * KB  # full
        for seed in range(1, 4):  # holes come and go; what leaks grows in every round
            traffic(vlm, seed)
            rounds.append(held())
            grown, more = (now - then for now, then in zip(rounds[-1], rounds[-2], strict=True))
            if grown < GROWTH and more < ROUND // 8:
                return
    raise AssertionError(f"memory (bytes) and objects grow in every round: {rounds}")
