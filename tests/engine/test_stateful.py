"""Random traffic under a tiny budget: whatever comes, leaves and is preempted, every reply is what it is alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine.conftest import MODEL_TYPES
from engine.mixes import free, patched, with_keys
from engine.parting import NEAR, PLAIN, Partings, Reply, Row, Rows, watched
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from tiny import flat, frames_spelt, random_prompt

from mirada import VLM, Sampling
from mirada.engine import scheduler as scheduling
from mirada.engine.handle import EngineHandle
from mirada.engine.sequence import Sequence
from mirada.layers.cache import make_cache
from mirada.types import Prompt

LONGEST = 3 * 256
"""Tokens that a single request may need room for: all there is."""
EDGE = 252
"""Tokens of a prompt that outgrows its first block soon."""
SEEDS = st.integers(0, 7)
"""Few, so that requests meet others that begin alike."""


@dataclass
class World:
    """One way to set an engine up, and what its requests are answered alone."""

    plain: VLM
    adapters: dict[str, Any]
    layout: str
    kv: str
    known: dict[Any, Reply]
    met: set[str]
    partings: Partings

    @property
    def small(self) -> tuple[VLM, int]:
        """An engine that has room for one long request, and the bytes of it."""
        parts = self.plain.parts
        measured = make_cache(parts.cache_spec, torch.float32, "cpu", layout=self.layout, kv=self.kv, budget=1 << 24)
        most = measured.peak_bytes(LONGEST)
        vlm = VLM.from_parts(
            parts.model, parts.renderer, parts.rule, eos=parts.eos,
            engine={"cache_bytes": most, "max_running": 4, "step_tokens": 96, "step_patches": 32, "speculate": 3,
                    "layout": self.layout, "kv": self.kv, "workers": 0},
        )  # fmt: skip
        for name, folder in self.adapters.items():
            vlm.load_adapter(name, folder)
        drafts: Any = vlm._engine.engine.drafts
        drafts.costs, drafts.lookup = free(), erring(drafts.lookup)
        return vlm, most


def erring(lookup: Any) -> Any:
    """What was looked up, with a mistake in every third: what loops is foretold too well."""
    random = np.random.default_rng(0)

    def propose(sequence: Sequence, count: int) -> list[int]:
        draft = lookup(sequence).propose(count)
        if draft and random.random() < 0.35:
            draft[random.integers(len(draft))] = 3
        return draft

    return lambda sequence: SimpleNamespace(propose=lambda count: propose(sequence, count))


@dataclass(frozen=True)
class Ask:
    """What decides a reply."""

    seed: int
    size: int
    count: int
    hot: bool
    pixels: int
    adapter: str | None

    def submit(self, vlm: VLM, salt: str = "") -> EngineHandle:
        prompt, media = ask(vlm, self.seed, self.size, self.pixels)
        return vlm.submit(prompt, self.sampling, media=media, adapter=self.adapter, salt=salt)

    @property
    def sampling(self) -> Sampling:
        more: dict[str, Any] = {"temperature": 1.1, "seed": self.seed} if self.hot else {}
        return Sampling(max_tokens=self.count, ignore_eos=True, **more)


class Traffic(RuleBasedStateMachine):
    """Requests arrive, are cancelled and dropped while steps are made; the engine's thread is not needed for that."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.small, self.most = self.world.small
        self.engine = self.small._engine.engine
        # What is submitted waits for a step of ours.
        self.small._engine.submit = self.engine.scheduler.waiting.append
        self.asked: list[tuple[Sequence, Ask]] = []
        self.handles: list[EngineHandle] = []
        """Dropped, they would end what they stand for."""
        self._watching = watched(self.small)
        self.rows: dict[Sequence, Rows] = self._watching.__enter__()
        self._watch()

    def _watch(self) -> None:
        """After every forward the cache is within its budget; and what is reused of pictures is seen."""
        runner, scheduler = self.engine.runner, self.engine.scheduler
        forward, restore = runner._forward, scheduler.restore

        def checked(batch, *rest):
            made = forward(batch, *rest)
            assert runner.cache.bytes_held <= self.most
            assert len(set(batch.slots)) == len(batch.slots)
            return made

        def restored(sequence):
            restore(sequence)
            if any(span.start < sequence.computed for span in sequence.prompt.spans):
                self.world.met.add("pictures reused")

        runner._forward, scheduler.restore = checked, restored

    @initialize(seeds=st.lists(SEEDS, min_size=3, max_size=4))
    def begin(self, seeds: list[int]) -> None:
        self.arrive(seeds, EDGE, 12, False, 0, None, "")

    @rule(
        seeds=st.lists(SEEDS, min_size=1, max_size=3),
        size=st.sampled_from([0, EDGE, EDGE, EDGE + 256]),
        count=st.sampled_from([1, 6, 12]),
        hot=st.booleans(),
        pixels=st.sampled_from([0, 0, 1]),
        adapter=st.sampled_from([None, None, "one", "two"]),
        salt=st.sampled_from(["", "", "another"]),
    )
    def arrive(self, seeds: list[int], size: int, count: int, hot: bool, pixels: int, adapter: str | None, salt: str) -> None:
        for seed in seeds:
            one = Ask(seed, size, count, hot, pixels, adapter)
            self.handles.append(one.submit(self.small, salt))
            self.asked.append((sequence_of(self.handles[-1]), one))

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                self.engine.step()

    @precondition(lambda self: any(not one.done for one, _ in self.asked))
    @rule(data=st.data())
    def cancel(self, data) -> None:
        alive = [one for one, _ in self.asked if not one.done]
        sequence = alive[data.draw(st.integers(0, len(alive) - 1))]
        sequence.cancelled = True
        with torch.inference_mode():
            self.engine.step()
        assert sequence.done
        self.world.met.add("cancelled")

    @invariant()
    def nothing_is_lost(self) -> None:
        scheduler, cache = self.engine.scheduler, self.engine.runner.cache
        assert cache.num_open == len(scheduler.running) and len(scheduler.slots) + cache.num_open == 4
        assert sorted([*scheduler.slots, *(s.slot for s in scheduler.running)]) == list(range(4))
        assert cache.bytes_held <= self.most
        alive = [one for one, _ in self.asked if not one.done]
        assert {id(s) for s in alive} == {id(s) for s in (*scheduler.running, *scheduler.waiting) if not s.done}

    def teardown(self) -> None:
        for _ in range(3000):
            if self.engine.idle:
                break
            self.steps(1)
        assert self.engine.idle, "the engine does not come to an end"
        assert self.engine.runner.cache.bytes_held == 0 == self.engine.runner.cache.num_open
        for sequence, one in self.asked:
            self.check(sequence, one)
        met = self.world.met
        if self.engine.scheduler.preemptions:
            met.add("preempted")
        if self.engine.num_accepted:
            met.add("drafts accepted")
        if self.small._prefix.hits:
            met.add("prefixes reused")

    def check(self, sequence: Sequence, one: Ask) -> None:
        """Its tokens are those of the request alone, as far as it came, or part from them at a tie."""
        world = self.world
        if one not in world.known:
            with watched(world.plain) as rows:
                handle = one.submit(world.plain)
                world.known[one] = Reply(handle.result(30).tokens, rows[sequence_of(handle)])
        assert sequence.error is None, sequence.error
        got = Reply(tuple(sequence.tokens), self.rows.get(sequence, {}), sequence.finish != "cancelled")
        world.partings.check(world.known[one], got, sequence.prompt, one.sampling, f"{one}")


def sequence_of(handle: EngineHandle) -> Sequence:
    made: Any = handle._reply
    return made


def ask(vlm: VLM, seed: int, size: int, pixels: int = 0):
    """A prompt with or without media, text added to make ``size`` tokens if it has fewer; equal seeds are equal prompts, of
    equal pictures where ``pixels`` are equal too."""
    config, random = vlm.parts.model.config, np.random.default_rng(seed)
    pads = (config.image_token_id, config.video_token_id)
    prompt, grids = random_prompt(random, pads, frames_spelt(config), flat(config))
    tail = tuple(np.random.default_rng(1).integers(0, 250, max(0, size - len(prompt.tokens))).tolist())
    drawn = np.random.default_rng((seed, pixels))
    prompt, media = patched(drawn, Prompt((*prompt.tokens, *tail), prompt.spans), grids, vlm.parts.rule.grid.frames)
    return with_keys(vlm, prompt, media), media


@pytest.fixture
def traffic(engines, adapter_folders, monkeypatch):
    """Runs random traffic through one engine, and gives what was met."""

    def run(kind: str, layout: str, kv: str, **options: Any) -> World:
        parts = engines[kind].parts
        plain = VLM.from_parts(parts.model, parts.renderer, parts.rule, eos=parts.eos, engine=PLAIN | {"kv": kv})
        with plain:
            for name, folder in adapter_folders[kind].items():
                plain.load_adapter(name, folder)

            class Here(Traffic):
                world = World(plain, adapter_folders[kind], layout, kv, {}, set(), Partings(NEAR[kv]))

            options = {"suppress_health_check": list(HealthCheck)} | options
            run_state_machine_as_test(Here, settings=settings(**options))
        return Here.world

    monkeypatch.setattr(scheduling, "ROOM_TO_GROW", 1)
    return run


FEW = {"max_examples": 3, "stateful_step_count": 8, "phases": [Phase.generate]}
WAYS = [  # every layout and form of keys and latents; the other families and pairs are in ``test_more_random_traffic``
    ("Keye", "slab", "auto"), ("KeyeVL1_5", "paged", "auto"), ("kimi_vl", "paged", "auto"),
    ("qwen2_vl", "paged", "int8"), ("kimi_vl", "slab", "int8"),
]  # fmt: skip


@pytest.mark.hypothesis
@pytest.mark.parametrize(("kind", "layout", "kv"), WAYS)
def test_random_traffic_under_a_tiny_budget(traffic, kind, layout, kv):
    world = traffic(kind, layout, kv, **FEW)
    print(world.met, world.partings.count, world.partings.largest, len(world.known))
    assert {"cancelled", "preempted", "prefixes reused", "pictures reused"} <= world.met, world.met


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("layout", ["slab", "paged"])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_more_random_traffic(traffic, kind, layout, kv):
    traffic(kind, layout, kv, max_examples=30, stateful_step_count=30)


# What is excused, and what is not.


def row(*logits: float, uniform: float | None = None) -> Row:
    return Row(torch.tensor(logits), uniform)


GREEDY, HOT = Sampling(), Sampling(temperature=1.0)
LEVEL = row(1.0, 1.0005, 0.0)
"""The second is the best, by less than the bound."""


@pytest.mark.parametrize(
    ("sampling", "alone", "got", "tokens", "wrong"),
    [
        (GREEDY, LEVEL, row(1.0003, 1.0, 0.0), (1, 0), ""),
        (GREEDY, LEVEL, LEVEL, (1, 0), "its logits give 1"),
        (GREEDY, LEVEL, row(1.0003, 1.0, 0.0), (1, 2), "its logits give 0"),
        (GREEDY, LEVEL, row(1.5, 1.0, 0.0), (1, 0), "logits differ"),
        (GREEDY, LEVEL, row(1.0, 1.0005, 0.1), (1, 1), "logits differ"),
        (HOT, row(0.0, 0.0, uniform=0.49999), row(0.0, 0.0005, uniform=0.49999), (0, 1), ""),
        (HOT, row(0.0, 0.0, uniform=0.4), row(0.0, 0.0005, uniform=0.4), (0, 1), "its logits give 0"),
        (HOT, row(0.0, 0.0, uniform=0.4), row(0.0, 0.0, uniform=0.6), (0, 1), "another draw"),
    ],
)
def test_only_a_tie_excuses(sampling, alone, got, tokens, wrong):
    """The first three tokens are equal; at the fourth two replies part, or its logits do."""
    sure = [row(0.0, 0.0, 9.0, uniform=got.uniform and 0.5)] * 3
    first, second = (
        Reply((2, 2, 2, token), dict(enumerate([*sure, one]))) for token, one in zip(tokens, (alone, got), strict=True)
    )
    partings = Partings(1e-3)
    prompt: Any = SimpleNamespace(tokens=(1,))
    if wrong:
        with pytest.raises(AssertionError, match=wrong):
            partings.check(first, second, prompt, sampling, "this one")
    else:
        assert not partings.check(first, second, prompt, sampling, "this one") and partings.count == 1
        # A tie elsewhere excuses nothing.
        later = replace(second, tokens=(2, 2, 1, tokens[1]))
        with pytest.raises(AssertionError, match="token 2 is 1, and its logits give 2"):
            partings.check(first, later, prompt, sampling, "this one")
