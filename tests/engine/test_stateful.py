"""Random traffic under a tiny budget: whatever comes, leaves and is preempted, every reply is what it is alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.mixes import free, gap, patched
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from tiny import flat, frames_spelt, random_prompt

from mirada import VLM, Sampling
from mirada.engine import scheduler as scheduling
from mirada.types import Prompt

LONGEST = 3 * 256
"""Tokens that a single request may need room for: all there is."""
EDGE = 252
"""Tokens of a prompt that outgrows its first block soon."""


class Traffic(RuleBasedStateMachine):
    """Requests arrive, are cancelled and dropped while steps are made; the engine's thread is not needed for that."""

    vlm: VLM
    known: dict
    met: set[str]

    def __init__(self) -> None:
        super().__init__()
        parts = self.vlm.parts
        cache = self.vlm._engine.engine.runner.cache
        self.most = cache.peak_bytes(LONGEST)
        self.small = VLM.from_parts(
            parts.model, parts.renderer, parts.rule,
            engine={"cache_bytes": self.most, "max_running": 4, "step_tokens": 96, "step_patches": 32, "speculate": 3},
        )  # fmt: skip
        self.engine = self.small._engine.engine
        self.engine.drafts.costs = free()
        self.asked: list[tuple] = []
        self.seen: dict[int, list[torch.Tensor]] = {}
        self._watch()

    def _watch(self) -> None:
        """After every forward the cache is within its budget; logits are kept, to tell a tie from a mistake."""
        runner = self.engine.runner
        forward, pick = runner._forward, runner._pick

        def checked(batch, *rest):
            made = forward(batch, *rest)
            assert runner.cache.bytes_held <= self.most
            assert len(set(batch.slots)) == len(batch.slots)
            return made

        def noted(sequences, logits, choosers):
            picked = pick(sequences, logits, choosers)
            for sequence, row in zip(sequences, logits, strict=True):
                self.seen.setdefault(id(sequence), []).append(row.clone())
            return picked

        runner._forward, runner._pick = checked, noted

    @initialize(seeds=st.lists(st.integers(0, 20), min_size=3, max_size=4))
    def begin(self, seeds: list[int]) -> None:
        self.arrive(seeds, EDGE, 12, False)

    @rule(
        seeds=st.lists(st.integers(0, 20), min_size=1, max_size=3),
        size=st.sampled_from([0, EDGE, EDGE, EDGE + 256]),
        count=st.sampled_from([1, 6, 12]),
        hot=st.booleans(),
    )
    def arrive(self, seeds: list[int], size: int, count: int, hot: bool) -> None:
        for seed in seeds:
            prompt, media = ask(self.vlm, seed, size)
            more = {"temperature": 1.1, "seed": seed} if hot else {}
            sampling = Sampling(max_tokens=count, ignore_eos=True, **more)
            sequence = self.small._requests.make(prompt, sampling, "auto", media)
            self.engine.scheduler.waiting.append(sequence)
            self.asked.append((sequence, (seed, size, count, hot), prompt, media, sampling))

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                self.engine.step()

    @precondition(lambda self: any(not one[0].done for one in self.asked))
    @rule(data=st.data())
    def cancel(self, data) -> None:
        alive = [one[0] for one in self.asked if not one[0].done]
        sequence = alive[data.draw(st.integers(0, len(alive) - 1))]
        sequence.cancelled = True
        with torch.inference_mode():
            self.engine.step()
        assert sequence.done
        self.met.add("cancelled")

    @invariant()
    def nothing_is_lost(self) -> None:
        scheduler, cache = self.engine.scheduler, self.engine.runner.cache
        assert cache.num_open == len(scheduler.running) and len(scheduler.slots) + cache.num_open == 4
        assert sorted([*scheduler.slots, *(s.slot for s in scheduler.running)]) == list(range(4))
        assert cache.bytes_held <= self.most
        alive = [one[0] for one in self.asked if not one[0].done]
        assert {id(s) for s in alive} == {id(s) for s in (*scheduler.running, *scheduler.waiting) if not s.done}

    def teardown(self) -> None:
        for _ in range(3000):
            if self.engine.idle:
                break
            self.steps(1)
        assert self.engine.idle, "the engine does not come to an end"
        assert self.engine.runner.cache.bytes_held == 0 == self.engine.runner.cache.num_open
        for sequence, key, prompt, media, sampling in self.asked:
            self.check(sequence, key, prompt, media, sampling)
        if self.engine.scheduler.preemptions:
            self.met.add("preempted")
        if self.engine.num_accepted:
            self.met.add("drafts accepted")
        if self.small._prefix.hits:
            self.met.add("prefixes reused")

    def check(self, sequence, key, prompt, media, sampling) -> None:
        """Its tokens are those of the request alone, as far as it came, or part from them at a tie."""
        if key not in self.known:
            self.known[key] = self.vlm.submit(prompt, sampling, media=media).result().tokens
        assert sequence.error is None, sequence.error
        got, whole = tuple(sequence.tokens), self.known[key]
        assert sequence.finish == "cancelled" or len(got) == len(whole)
        if got == whole[: len(got)]:
            return
        at = next(i for i, (a, b) in enumerate(zip(got, whole, strict=False)) if a != b)
        near = min(gap(row) for row in self.seen[id(sequence)])
        print(f"request {key} parts at token {at}, where the smallest gap is {near:.1e}")
        assert sampling.temperature or near < 1e-3, f"{key}: {got} instead of {whole}"


def ask(vlm: VLM, seed: int, size: int):
    """A prompt with or without media, text added to make ``size`` tokens if it has fewer; equal seeds are equal prompts."""
    config, random = vlm.parts.model.config, np.random.default_rng(seed)
    pads = (config.image_token_id, config.video_token_id)
    prompt, grids = random_prompt(random, pads, frames_spelt(config), flat(config))
    tail = tuple(np.random.default_rng(1).integers(0, 250, max(0, size - len(prompt.tokens))).tolist())
    return patched(random, Prompt((*prompt.tokens, *tail), prompt.spans), grids, vlm.parts.rule.grid.frames)


def test_random_traffic_under_a_tiny_budget(vlm, monkeypatch):
    monkeypatch.setattr(scheduling, "ROOM_TO_GROW", 1)

    class Here(Traffic):
        pass

    Here.vlm, Here.known, Here.met = vlm, {}, set()
    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=3, stateful_step_count=8, deadline=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    assert Here.known and {"cancelled", "preempted"} <= Here.met, Here.met


@pytest.mark.slow
def test_more_random_traffic(vlm, monkeypatch):
    monkeypatch.setattr(scheduling, "ROOM_TO_GROW", 1)

    class Here(Traffic):
        pass

    Here.vlm, Here.known, Here.met = vlm, {}, set()
    run_state_machine_as_test(
        Here, settings=settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    )
