"""Features together: whatever an engine is set to, and whatever its requests ask for at once, each reply is the one that the
plainest engine gives to that request alone."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from engine.mixes import free, patched, with_keys
from engine.parting import NEAR, PLAIN, Partings, Reply, watched
from tiny import flat, frames_spelt, random_prompt

from mirada import VLM, Sampling
from mirada.engine import scheduler as scheduling
from mirada.engine.guide import allow
from mirada.layers.cache import make_cache
from mirada.media.grid import Patches
from mirada.types import Output, Prompt

WORLDS = int(os.environ.get("MIRADA_PRODUCTS", "40"))
"""Of the large twin of the test."""


class Stepwise:
    """Allows every third token, a third that moves with each token; now and then says which must come."""

    def __init__(self, last: int, size: int) -> None:
        self.at, self.last, self.size = 0, last, size

    def mask(self, out: np.ndarray) -> None:
        allow(out, range(self.at % 3, self.size, 3))

    def accept(self, token: int) -> None:
        self.at += 1

    @property
    def finished(self) -> bool:
        return self.at >= self.last

    def forced(self) -> list[int]:
        return [41, 42] if self.at % 5 == 2 else []


@dataclass
class Ask:
    prompt: Prompt
    media: list[Patches]
    sampling: Sampling
    adapter: str | None
    guided: int
    reader: str
    after: int
    """Deltas after which it is left; 0: never."""
    salt: str

    size: int
    """Of the vocabulary."""

    def guide(self) -> Stepwise | None:
        return Stepwise(self.guided, self.size) if self.guided else None

    def submit(self, vlm: VLM):
        return vlm.submit(
            self.prompt, self.sampling, media=self.media, adapter=self.adapter, guide=self.guide(), salt=self.salt
        )


def draw_asks(vlm: VLM, random: np.random.Generator, count: int) -> list[Ask]:
    """Requests that share beginnings, pictures, adapters and settings, each in part."""
    config = vlm.parts.model.config
    pads = (config.image_token_id, config.video_token_id)
    control = vlm.parts.renderer.tokenizer.control
    bases = []
    for _ in range(3):
        prompt, grids = random_prompt(random, pads, frames_spelt(config), flat(config))
        prompt, media = patched(random, prompt, grids, vlm.parts.rule.grid.frames)
        bases.append((with_keys(vlm, prompt, media), media))
    made = []
    for _ in range(count):
        prompt, media = bases[random.integers(3)]
        size = int(random.choice([0, 1, 17, 70, 240]))
        tail = np.random.default_rng(random.integers(2)).integers(0, 250, size).tolist()
        if random.random() < 0.3:  # what it copies is what drafts are made of
            tail += [7, 8, 9, 10] * 5
        hot = random.random() < 0.4
        options: dict[str, Any] = {"max_tokens": int(random.choice([1, 3, 12, 24])), "ignore_eos": bool(random.random() < 0.8)}
        if hot:
            options |= {"temperature": 0.9, "seed": int(random.integers(99)), "top_p": float(random.choice([0.7, 1.0]))}
        if random.random() < 0.3:
            options["logprobs"] = 2
        if random.random() < 0.2:
            options["repetition_penalty"] = 1.3
        if random.random() < 0.2:
            options["stop"] = ("e", "th")
        if "<think>" in control and random.random() < 0.3:
            options |= {"logit_bias": {control["<think>"]: 12.0}, "thinking_budget": int(random.integers(4))}
        if random.random() < 0.15:
            options |= {"max_repeats": 2, "logit_bias": {77: 200.0}, "max_tokens": 80}
        made.append(Ask(
            Prompt((*prompt.tokens, *tail), prompt.spans), media, Sampling(**options),
            [None, "one", "two"][random.integers(3)], int(random.choice([0, 0, 0, 6])),
            ["result", "async", "await"][random.integers(3)], int(random.choice([0, 0, 0, 0, 1, 4])),
            "other" if random.random() < 0.2 else "", config.text.vocab_size,
        ))  # fmt: skip
    return made


def draw_settings(random: np.random.Generator, vlm: VLM) -> dict[str, Any]:
    cache = vlm._engine.engine.runner.cache
    size, least = cache.bytes_for(1), cache.peak_bytes(3 * 256)
    return {
        "max_running": int(random.choice([2, 5, 16])),
        "step_tokens": int(random.choice([3, 24, 200, 1024])),
        "step_patches": int(random.choice([8, 64, 4096])),
        "cache_bytes": least + int(random.choice([0, 1, 8])) * size,
        "prefix_cache_bytes": int(random.choice([0, size // 4, 64 * size])),
        "encoder_cache_bytes": int(random.choice([0, 4000, 1 << 24])),
        "speculate": int(random.choice([0, 3, 7])),
        "workers": 0,
    }


def crowd(vlm: VLM, kv: str, asks: list[Ask]) -> dict[str, Any]:
    """Room for the longest of ``asks``, so that few run at once."""
    cache = make_cache(vlm.parts.cache_spec, torch.float32, "cpu", layout="paged", kv=kv, budget=1 << 24)
    most = cache.peak_bytes(max(len(ask.prompt.tokens) + ask.sampling.max_tokens for ask in asks))
    return {
        "max_running": 16, "step_tokens": 200, "step_patches": 4096, "cache_bytes": most, "prefix_cache_bytes": most,
        "encoder_cache_bytes": 1 << 24, "speculate": 7,
    }  # fmt: skip


@pytest.fixture(scope="module")
def plains(tiny_directories, adapter_folders):
    """By model type and format of keys and values, the plainest engine, with two adapters."""
    made: dict[tuple[str, str, str | None], VLM] = {}

    def get(kind: str, kv: str, quant: str | None) -> VLM:
        if (kind, kv, quant) not in made:
            vlm = made[kind, kv, quant] = VLM(tiny_directories[kind], device="cpu", quant=quant, engine=PLAIN | {"kv": kv})
            load_adapters(vlm, adapter_folders[kind])
        return made[kind, kv, quant]

    yield get, adapter_folders
    for vlm in made.values():
        vlm.close()


def load_adapters(vlm: VLM, folders) -> None:
    for name, folder in folders.items():
        vlm.load_adapter(name, folder)


def world(seed: int, kind: str, plains, monkeypatch, count: int = 8, crowded: bool = False) -> dict[str, int]:
    """Draw an engine and requests, ask them all at once, and compare; what happened, in counts. ``crowded``: with caches and
    drafts, and so little memory that requests give way."""
    random = np.random.default_rng(seed)
    get, folders = plains
    kv, layout = str(random.choice(["auto", "auto", "int8"])), str(random.choice(["slab", "slab", "paged"]))
    layout = "paged" if crowded else layout  # they grow often
    quant = None if random.random() < 0.7 else "int8"
    plain = get(kind, kv, quant)
    parts = plain.parts
    asks = draw_asks(plain, random, count)
    monkeypatch.setattr(scheduling, "ROOM_TO_GROW", 1 if crowded else int(random.choice([1, 64])))
    settings = draw_settings(random, plain) | {"kv": kv, "layout": layout} | (crowd(plain, kv, asks) if crowded else {})
    alone = [answer(plain, ask) for ask in asks]
    with VLM.from_parts(parts.model, parts.renderer, parts.rule, eos=parts.eos, engine=settings) as vlm:
        load_adapters(vlm, folders[kind])
        guess(vlm, np.random.default_rng(seed), asks, alone)
        disturb(vlm, np.random.default_rng(seed), settings)
        if crowded:
            hold(vlm, len(asks))
        with watched(vlm) as rows:
            outputs, sequences = run(vlm, asks)
        assert vlm._engine.wait_idle(30)
        stats, cache = vlm.stats(), vlm._engine.engine.runner.cache
        assert cache.bytes_held == 0 == cache.num_open and stats["running"] == stats["waiting"] == 0
        assert stats["prefix_cache_bytes"] <= settings["prefix_cache_bytes"]
        assert stats["encoder_cache_bytes"] <= settings["encoder_cache_bytes"]
    told = f"seed {seed}, {kind}, {layout}, quant={quant}, {settings}"
    partings = Partings(NEAR[quant or kv])
    for index, (ask, output) in enumerate(zip(asks, outputs, strict=True)):
        reply = Reply(output.tokens, rows.get(sequences[index], {}), output.finish != "cancelled")
        check(ask, *alone[index], output, reply, partings, f"request {index} of {told}: {ask}")
    repetitions = sum(output.finish == "repetition" for output in outputs)
    return stats | {"repetitions": repetitions, "cancelled": sum(output.finish == "cancelled" for output in outputs)}


def disturb(vlm: VLM, random: np.random.Generator, settings) -> None:
    """Now and then a step of several sequences fails, so that it is made again one by one; memory stays within bounds."""
    runner: Any = vlm._engine.engine.runner
    forward = runner._forward

    def shaky(batch, *rest):
        made = forward(batch, *rest)
        assert runner.cache.bytes_held <= settings["cache_bytes"]
        if len(batch.lengths) > 1 and random.random() < 0.1:
            raise RuntimeError("now and then")
        return made

    runner._forward = shaky


def hold(vlm: VLM, count: int) -> None:
    """No step is made before ``count`` requests are in line."""
    thread: Any = vlm._engine
    submit, step, here, together = thread.submit, thread.engine.step, [], threading.Event()

    def counted(sequence):
        submit(sequence)
        here.append(sequence)
        if len(here) == count:
            together.set()

    def held():
        assert together.wait(30)
        step()

    thread.submit, thread.engine.step = counted, held


def guess(vlm: VLM, random: np.random.Generator, asks: list[Ask], alone: list[tuple[Output, Reply]]) -> None:
    """Random models copy little: drafts are made of what the reply will be, now and then with a mistake in it."""
    engine: Any = vlm._engine.engine
    replies = {
        (ask.prompt.tokens, repr(ask.sampling), ask.adapter): one.tokens for ask, (one, _) in zip(asks, alone, strict=True)
    }
    names = {vlm._adapters.find(name).key: name for name in vlm.adapters} | {"": None}

    class Oracle:
        def __init__(self, sequence) -> None:
            self.sequence = sequence

        def propose(self, most: int) -> list[int]:
            one = self.sequence
            draft = list(replies[one.prompt.tokens, repr(one.sampling), names[one.adapter]])[len(one.tokens) :][:most]
            if draft and random.random() < 0.4:
                draft[random.integers(len(draft))] = 3
            return draft

    engine.drafts.lookup, engine.drafts.costs = Oracle, free()


def run(vlm: VLM, asks: list[Ask]) -> tuple[list[Output], list[Any]]:
    """Outputs and sequences. From three threads, two with event loops of their own."""
    outputs: dict[int, Output] = {}
    sequences: dict[int, Any] = {}
    failures: list[BaseException] = []

    async def read(index: int) -> None:
        ask = asks[index]
        handle = ask.submit(vlm)
        sequences[index] = handle._reply
        if ask.after or ask.reader == "async":
            count = 0
            async for _ in handle:
                count += 1
                if count == ask.after:
                    handle.cancel()
        outputs[index] = await handle

    async def read_all(indices) -> None:
        await asyncio.gather(*(read(index) for index in indices))

    def read_plainly(indices) -> None:
        handles = [(index, asks[index].submit(vlm)) for index in indices]
        for index, handle in handles:
            sequences[index] = handle._reply
            if asks[index].after:
                for at, _ in enumerate(handle, 1):
                    if at == asks[index].after:
                        handle.cancel()
            outputs[index] = handle.result(60)

    def guarded(work) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    lots = [range(at, len(asks), 3) for at in range(3)]
    works = [lambda: asyncio.run(read_all(lots[0])), lambda: asyncio.run(read_all(lots[1])), lambda: read_plainly(lots[2])]
    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures, failures
    assert len(outputs) == len(asks)
    return [outputs[index] for index in range(len(asks))], [sequences[index] for index in range(len(asks))]


def answer(plain: VLM, ask: Ask) -> tuple[Output, Reply]:
    """What a request is answered alone, and what each token was chosen from."""
    with watched(plain) as rows:
        handle = ask.submit(plain)
        output = handle.result(60)
    assert output.error is None, output.error
    sequence: Any = handle._reply
    return output, Reply(output.tokens, rows[sequence])


def check(ask: Ask, whole: Output, alone: Reply, got: Output, reply: Reply, partings: Partings, told: str) -> None:
    assert got.error is None, f"{told}: {got.error!r}"
    if not partings.check(alone, reply, ask.prompt, ask.sampling, told, ask.guide):
        return
    if got.finish != "cancelled":
        usage = replace(got.usage, cached_tokens=0)  # alone there is nothing to find
        assert (got.message, got.finish, usage) == (whole.message, whole.finish, whole.usage), told
    if got.logprobs is not None:
        for mine, its in zip(got.logprobs, whole.logprobs or (), strict=False):
            assert mine.token == its.token and abs(mine.logprob - its.logprob) < 2 * partings.near, told
    assert {"queue", "total"} <= got.metrics.keys() and (not got.tokens or {"prefill", "first_token"} <= got.metrics.keys()), (
        told
    )


KINDS = ("Keye", "KeyeVL1_5", "KeyeVLMoe", "kimi_vl", "qwen2_vl")


def test_features_together(plains, monkeypatch):
    met: dict[str, int] = {}
    for seed, kind in enumerate(KINDS):
        with monkeypatch.context() as patch:
            for name, count in world(seed, kind, plains, patch, 12 if seed < 2 else 8, crowded=seed < 2).items():
                met[name] = met.get(name, 0) + count
    # Who gives way depends on when requests come; test_stateful has that happen in every run.
    wanted = ("prefix_cache_hits", "encoder_cache_hits", "accepted_tokens", "cancelled")
    assert all(met[name] for name in wanted), met


@pytest.mark.slow
def test_more_features_together(plains, monkeypatch):
    for seed in range(100, 100 + WORLDS):
        with monkeypatch.context() as patch:
            world(seed, KINDS[seed % len(KINDS)], plains, patch, 14)
