"""Random mixes of text, pictures and videos, and what a model makes of them without engine or cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from tiny import flat, frames_spelt, pack, random_prompt

from mirada import VLM
from mirada.engine.vision import encode
from mirada.media.grid import Patches, content_key
from mirada.types import Prompt


def mix(vlm: VLM, seed: int, count: int) -> list[tuple[Prompt, list[Patches]]]:
    """``count`` prompts, each with the media that it refers to."""
    config = vlm.parts.model.config
    random = np.random.default_rng(seed)
    pads = (config.image_token_id, config.video_token_id)
    asked = [random_prompt(random, pads, frames_spelt(config), flat(config)) for _ in range(count)]
    return [patched(random, *one, vlm.parts.rule.grid.frames) for one in asked]


def patched(random: np.random.Generator, prompt: Prompt, grids, frames: int = 1) -> tuple[Prompt, list[Patches]]:
    """``prompt`` with noise for its ``grids``, every patch through ``frames`` frames."""
    depth = (frames,) if frames > 1 else ()
    kinds = {span.media_id: span.kind for span in prompt.spans}
    media = []
    for index, (t, h, w) in enumerate(grids):
        pixels = random.integers(0, 256, (t * h * w, 3, *depth, 14, 14), dtype=np.uint8)
        media.append(Patches(kinds[index], pixels, ((t, h, w),), (h * 14, w * 14), bytes(32)))
    return prompt, media


def with_keys(vlm: VLM, prompt: Prompt, media: Sequence[Patches]) -> Prompt:
    """``prompt`` with the content keys that a renderer gives its spans."""
    rule = vlm.parts.rule.grid
    keys = [content_key(item.pixels, item.kind, item.grids, rule) for item in media]
    several = {s.media_id for s in prompt.spans if s.frame}
    spans = [
        replace(s, hash=hashlib.blake2b(keys[s.media_id] + s.frame.to_bytes(4, "little"), digest_size=32).digest())
        if s.media_id in several else replace(s, hash=keys[s.media_id])
        for s in prompt.spans
    ]  # fmt: skip
    return Prompt(prompt.tokens, tuple(spans))


def features(vlm: VLM, media: Sequence[Patches]) -> torch.Tensor | None:
    return encode(vlm.parts.model, media, vlm.parts.rule.grid, torch.device("cpu"), torch.float32)


@torch.no_grad()
def plain_logits(
    vlm: VLM, asked: Sequence[tuple[Prompt, list[Patches]]], answers: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Logits [V] by one forward without a cache over whole sequences, as training runs them: for each, one row per answer
    token, being what it was chosen from."""
    whole = [Prompt((*p.tokens, *answer), p.spans) for (p, _), answer in zip(asked, answers, strict=True)]
    model = vlm.parts.model
    logits = model.logits(model(pack(whole), features(vlm, [item for _, media in asked for item in media])))
    rows = logits.split([len(prompt.tokens) for prompt in whole])
    return [row[len(p.tokens) - 1 : -1] for row, (p, _) in zip(rows, asked, strict=True)]


@contextmanager
def recorded(vlm: VLM):
    """While open, {prompt tokens: [logits the engine chose from, step by step]}."""
    runner, seen = vlm._engine.engine.runner, {}
    original = runner._pick

    def pick(sequences, logits, choosers):
        for sequence, row in zip(sequences, logits, strict=True):
            seen.setdefault(sequence.prompt.tokens, []).append(row.clone())
        return original(sequences, logits, choosers)

    runner._pick = pick
    try:
        yield seen
    finally:
        del runner._pick


class Free:
    """A cost of steps (``engine.drafts.StepCost``) under which every draft is worth its rows, whatever the clock says."""

    def note(self, rows: int, seconds: float) -> None:
        pass

    def __call__(self, rows: int) -> float:
        return 1.0


def free() -> dict[bool, Free]:
    """For ``Drafts.costs``."""
    return {False: Free(), True: Free()}


def gap(logits: torch.Tensor) -> float:
    """Between the two largest."""
    top = logits.topk(2).values
    return float(top[0] - top[1])
