"""Steps that only decode, in fixed buffers: without CUDA nothing is captured, and the same buffers go through the model."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make_tiny

from mirada import VLM
from mirada.engine import llm as llm_module
from mirada.engine.graphs import BUCKETS, Graphs, pool_bytes
from mirada.engine.settings import EngineSettings
from mirada.errors import SettingsError
from mirada.layers.cache import make_cache
from mirada.types import Image, Message, Sampling, Text

KINDS = ("qwen2_vl", "KeyeVL1_5", "kimi_vl")
GREEDY = Sampling(max_tokens=9, ignore_eos=True)


def opened(directory, monkeypatch, fixed: bool, **settings) -> VLM:
    """An engine whose cache is in pages; ``fixed``: it decodes in fixed buffers."""

    def paged(spec, dtype, device, **options):
        return make_cache(spec, dtype, device, **(options | {"layout": "paged", "budget": options["budget"] or 8 << 20}))

    with monkeypatch.context() as patch:
        patch.setattr(llm_module, "make_cache", paged)
        vlm = VLM(directory, device="cpu", engine=EngineSettings(workers=0, **settings))
    runner = vlm._engine.engine.runner
    if fixed:
        runner.graphs = Graphs(runner.model, runner.cache, vlm.parts.context)
        assert runner.graphs.on
    return vlm


def said(text: str) -> list[Message]:
    return [Message("user", (Text(text),))]


def chats() -> list[list[Message]]:
    """Three of different lengths, one with a picture."""
    picture = np.random.default_rng(1).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    return [
        said("One."),
        [Message("user", (Image(picture), Text("What is there, and where does it lie?")))],
        said("A longer question that takes more than a page of the cache, so that block tables have several entries. " * 2),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_steps_give_what_steps_give(kind, tmp_path, monkeypatch):
    directory = make_tiny(tmp_path / kind, kind, seed=7)
    replies = {}
    for fixed in (False, True):
        with opened(directory, monkeypatch, fixed) as vlm:
            runner, steps = vlm._engine.engine.runner, []
            if fixed:
                make = runner.graphs.logits
                monkeypatch.setattr(
                    runner.graphs, "logits", lambda chunks, made=make, steps=steps: steps.append(len(chunks)) or made(chunks)
                )
            handles = [vlm.submit(chat, GREEDY) for chat in chats()]
            replies[fixed] = [handle.result().tokens for handle in handles]
            # Another arrives alone, in rows that others have left, whose pages it takes.
            replies[fixed].append(vlm.submit(said("Two."), GREEDY).result().tokens)
            if fixed:
                assert max(steps) >= 2 and min(steps) == 1 and len(steps) >= 16  # the picture may come late
                assert vlm._engine.wait_idle(10) and runner.cache.bytes_held == 0
    assert replies[True] == replies[False]


def test_rows_of_no_sequence_write_nothing(tmp_path, monkeypatch):
    """Three sequences in a bucket of four: pages that they do not hold stay as they were."""
    with opened(make_tiny(tmp_path / "q", "qwen2_vl", seed=7), monkeypatch, True, prefix_cache_bytes=0) as vlm:
        cache = vlm._engine.engine.runner.cache
        for layer in range(cache.num_layers):
            for pool in cache.pools(layer):
                pool.fill_(5.0)
        for handle in [vlm.submit(chat, GREEDY) for chat in chats()]:
            handle.result()
        used = [bool((pool != 5.0).any()) for pool in cache.pools(0)[0]]
        assert 3 <= sum(used) <= 20 and not used[-1] and used[0], (
            "pages are handed out from the first on: only padding could have touched the last"
        )


def test_moved_weights_are_seen(tmp_path, monkeypatch):
    with opened(make_tiny(tmp_path / "q", "qwen2_vl", seed=7), monkeypatch, True) as vlm:
        vlm.submit(said("One."), GREEDY).result()
        graphs, model = vlm._engine.engine.runner.graphs, vlm._engine.engine.runner.model
        buckets = dict(graphs._buckets)
        vlm.submit(said("One."), GREEDY).result()
        assert graphs._buckets == buckets and buckets, "the same weights: the same buffers"
        head = model.lm_head.weight
        head.data = head.data.clone()
        vlm.submit(said("One."), GREEDY).result()
        assert graphs._buckets.keys() == buckets.keys()
        assert all(graphs._buckets[size] is not buckets[size] for size in buckets)


def test_what_is_not_plain_decoding_goes_the_usual_way(tmp_path, monkeypatch):
    with opened(make_tiny(tmp_path / "q", "qwen2_vl", seed=7), monkeypatch, True, speculate=4) as vlm:
        graphs = vlm._engine.engine.runner.graphs
        taken = []
        takes = graphs.takes
        monkeypatch.setattr(
            graphs, "takes", lambda chunks: taken.append((takes(chunks), [c.count for c in chunks])) or taken[-1][0]
        )
        vlm.submit(said("again and again and again and again and again and"), Sampling(max_tokens=12, ignore_eos=True)).result()
        assert all(took == (max(counts) == 1) for took, counts in taken)
        assert any(took for took, _ in taken) and not all(took for took, _ in taken)


class Recorded(Graphs):
    """As on CUDA, with graphs that compute again what was recorded, into the same memory."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.real, self.device = self.device, SimpleNamespace(type="cuda")

    def _make(self, size):
        self.device = self.real
        try:
            return super()._make(size)
        finally:
            self.device = SimpleNamespace(type="cuda")


@pytest.fixture
def recorded(monkeypatch):
    """Stands in for torch.cuda: each capture takes 10 bytes; returns the graphs that were made."""
    made, reserved = [], [0]

    class Graph:
        def replay(self) -> None:
            self.replays += 1
            self.bucket.logits.copy_(self.forward(self.bucket))

    @contextmanager
    def graph(into, pool):
        into.pool, into.replays = pool, 0
        made.append(into)
        reserved[0] += 10
        yield

    forward = Graphs._forward

    def noted(self, bucket):
        if isinstance(bucket.graph, Graph):  # what is captured now, or was
            bucket.graph.bucket, bucket.graph.forward = bucket, lambda bucket: forward(self, bucket)
        return forward(self, bucket)

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    for name, fake in {
        "Stream": lambda device: stream, "current_stream": lambda device: stream, "stream": lambda one: nullcontext(),
        "synchronize": lambda device: None, "memory_reserved": lambda device: reserved[0],
        "graph_pool_handle": lambda: "pool", "CUDAGraph": Graph, "graph": graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Graphs, "_forward", noted)
    return made


@pytest.mark.parametrize("most", [1, 1000])
def test_captures_are_replayed_until_their_memory_is_spent(most, tmp_path, monkeypatch, recorded):
    """One capture per number of rows, in one pool; then, as with no room for more, the usual way: the same replies."""
    directory = make_tiny(tmp_path / "q", "qwen2_vl", seed=7)
    with opened(directory, monkeypatch, False) as plain:
        expected = [handle.result().tokens for handle in [plain.submit(chat, GREEDY) for chat in chats()]]
    with opened(directory, monkeypatch, False) as vlm:
        runner = vlm._engine.engine.runner
        monkeypatch.setattr(Recorded, "_able", lambda self: True)
        graphs = runner.graphs = Recorded(runner.model, runner.cache, vlm.parts.context, most)
        made = {}
        for count in (1, 2, 3, 3):
            made[count] = [handle.result().tokens for handle in [vlm.submit(chat, GREEDY) for chat in chats()[:count]]]
            assert made[count] == expected[:count]
        stats = graphs.stats()
        assert stats["captured"] == len(recorded) == (1 if most == 1 else len(graphs._buckets)) and stats["bytes"] == 10 * len(
            recorded
        )
        assert stats["replayed"] == sum(one.replays for one in recorded) >= 8 and {one.pool for one in recorded} == {"pool"}
        assert bool(graphs._refused) == (most == 1)
        head = vlm.parts.model.lm_head.weight
        head.data = head.data.clone()
        assert vlm.submit(chats()[0], GREEDY).result().tokens == expected[0]
        assert len(graphs._buckets) == 1 and graphs.stats()["bytes"] == 10 and not graphs._refused, "captured anew"


def test_slabs_and_other_attention_are_refused(tmp_path):
    with VLM(make_tiny(tmp_path / "q", "qwen2_vl", seed=7), device="cpu", engine=EngineSettings(workers=0)) as vlm:
        runner = vlm._engine.engine.runner
        assert runner.graphs is None
        assert not Graphs(runner.model, runner.cache, 64).on
        paged = make_cache(vlm.parts.cache_spec, torch.float32, "cpu", layout="paged", budget=1 << 20)
        assert Graphs(runner.model, paged, 64).on
    with VLM(tmp_path / "q", device="cpu", attn="eager", engine=EngineSettings(workers=0)) as vlm:
        assert not Graphs(vlm._engine.engine.runner.model, paged, 64).on


def test_buckets_and_bytes():
    assert list(BUCKETS) == sorted(set(BUCKETS)) and BUCKETS[:5] == (1, 2, 4, 8, 16)
    assert pool_bytes(torch.device("cpu"), 100, None) is None and pool_bytes(torch.device("cuda"), 100, None) == 85
    assert pool_bytes(torch.device("cuda"), 100, 7) == 7
    with pytest.raises(SettingsError, match="cuda_graphs"):
        EngineSettings(cuda_graphs=1)  # pyright: ignore
