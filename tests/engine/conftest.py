"""Engines over tiny random checkpoints of every model type, opened once."""

from __future__ import annotations

import time

import numpy as np
import pytest
from tiny import TINY, make_tiny
from tiny_adapters import make_adapter

from mirada import VLM
from mirada.engine import memory

MODEL_TYPES = tuple(TINY)
TWO_TYPES = ("KeyeVL1_5", "kimi_vl")
"""Unlike in all that an engine knows of a model: vocabulary, template, keys and values or latents, videos or none, experts."""
VIDEO_TYPES = tuple(kind for kind in TINY if kind != "kimi_vl")


@pytest.fixture(scope="session")
def tiny_directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {kind: make_tiny(folder / kind, kind, seed=7) for kind in MODEL_TYPES}


@pytest.fixture(scope="session")
def engines(tiny_directories):
    return {kind: VLM(directory, device="cpu") for kind, directory in tiny_directories.items()}


@pytest.fixture(scope="session")
def adapter_folders(engines, tmp_path_factory):
    """Two adapters for every model type: "one" changes everything but the router, "two" leaves the tower as it is."""

    def chosen(seed: int):
        return lambda name: "mlp.gate.weight" not in name and (seed == 0 or "visual" not in name)

    return {
        kind: {
            name: make_adapter(tmp_path_factory.mktemp(kind) / name, engine.parts.model, seed, chosen(seed))
            for seed, name in enumerate(("one", "two"))
        }
        for kind, engine in engines.items()
    }


@pytest.fixture(params=MODEL_TYPES)
def vlm(request, engines) -> VLM:
    return engines[request.param]


@pytest.fixture(params=TWO_TYPES)
def either(request, engines) -> VLM:
    """For what the engine does whatever the model is."""
    return engines[request.param]


@pytest.fixture
def slowly(monkeypatch):
    """``slowly(vlm)``: none of its steps is over before 10 ms, so that a reply of thousands of tokens is still under way when
    a machine with other work comes to the test's next line (without it 3000 tokens take less than a second)."""

    def slow(vlm: VLM) -> None:
        step = vlm._engine.engine.step

        def paced() -> None:
            time.sleep(0.01)
            step()

        monkeypatch.setattr(vlm._engine.engine, "step", paced)

    return slow


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


@pytest.fixture
def all_of_it(monkeypatch):
    """Keys and values may take all memory that is free: nothing is kept for caches and others."""
    monkeypatch.setattr(memory, "SPARE", 0.0)
    monkeypatch.setattr(memory, "CACHES", 0.0)


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8)
