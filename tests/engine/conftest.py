"""Engines over tiny random checkpoints of every model type, opened once."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import TINY, make_tiny

from mirada import VLM

MODEL_TYPES = tuple(TINY)
VIDEO_TYPES = tuple(kind for kind in TINY if kind != "kimi_vl")


@pytest.fixture(scope="session")
def tiny_directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {kind: make_tiny(folder / kind, kind, seed=7) for kind in MODEL_TYPES}


@pytest.fixture(scope="session")
def engines(tiny_directories):
    return {kind: VLM(directory, device="cpu") for kind, directory in tiny_directories.items()}


@pytest.fixture(params=MODEL_TYPES)
def vlm(request, engines) -> VLM:
    return engines[request.param]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """After each test no engine holds a sequence or a byte of cache."""
    yield
    if "engines" in request.fixturenames:
        for engine in request.getfixturevalue("engines").values():
            assert engine._engine.wait_idle(10)
            scheduler = engine._engine.engine.scheduler
            assert scheduler.cache.bytes_held == 0
            assert not scheduler.running and not scheduler.waiting
            assert sorted(scheduler.slots) == list(range(16))


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8)
