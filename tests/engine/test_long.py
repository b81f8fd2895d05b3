"""Long prompts, computed in chunks: values of one forward without a cache, in bounded memory."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.mixes import patched, plain_logits, recorded
from tiny import make_tiny

from mirada import VLM, Sampling
from mirada.errors import ContextOverflow
from mirada.models.positions import positions
from mirada.types import Prompt, Span

FULL = 131072
KINDS = ("Keye", "kimi_vl", "qwen2_vl")
"""Keys and values, latents, and videos in one span."""
MB = 1 << 20


@pytest.fixture(scope="module")
def long_directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    return {kind: lengthened(make_tiny(folder / kind, kind, seed=7)) for kind in KINDS}


def lengthened(directory: Path) -> Path:
    """The checkpoint, with a context of ``FULL`` tokens."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config.get("text_config", config)["max_position_embeddings"] = FULL
    file.write_text(json.dumps(config))
    return directory


def text(count: int, seed: int = 0) -> Prompt:
    return Prompt(tuple(np.random.default_rng(seed).integers(0, 250, count).tolist()))


def with_media(vlm: VLM, count: int):
    """A prompt of ``count`` tokens with pictures at its beginning, in its middle and at its very end."""
    config, merge = vlm.parts.model.config, 2
    grids, tokens, spans = [(1, 8, 12), (1, 4, 6), (1, 6, 6)], [], []
    random = np.random.default_rng(3)
    flat = vlm.parts.renderer.format.flat_positions
    for index, (grid, start) in enumerate(zip(grids, (5, count // 2, count - 12), strict=True)):
        tokens += random.integers(0, 250, start - len(tokens)).tolist()
        spans.append(Span("image", start, grid, index, merge=merge, flat=flat))
        tokens += [config.image_token_id] * spans[-1].num_tokens
    tokens += random.integers(0, 250, count - len(tokens)).tolist()
    return patched(random, Prompt(tuple(tokens), tuple(spans)), grids, vlm.parts.rule.grid.frames)


@pytest.fixture(params=KINDS)
def long(request, long_directories):
    settings = {"step_tokens": 512, "prefix_cache_bytes": 0, "step_seconds": None}
    with VLM(long_directories[request.param], device="cpu", engine=settings) as vlm:
        assert vlm.parts.context == FULL
        yield vlm


@pytest.mark.parametrize("media", [False, True])
def test_a_long_prompt_in_chunks_is_one_forward(long, media):
    """Chunks of 512 tokens: the logits after them, and after three more, are those of one forward without a cache."""
    size = 4096 if long.parts.model.config.model_type == "Keye" else 2048  # latents are slower
    prompt, patches = with_media(long, size) if media else (text(size), [])
    with recorded(long) as seen:
        output = long.submit(prompt, Sampling(max_tokens=4, ignore_eos=True), media=patches).result()
    assert output.error is None and long.stats()["steps"] == size // 512 + 3
    plain = plain_logits(long, [(prompt, patches)], [output.tokens])[0]
    got = torch.stack(seen[prompt.tokens])
    assert got.shape == plain.shape and (got - plain).abs().max() < 2e-4
    assert abs(plain[0] - plain[1]).max() > 0.1, "the rows differ, so a shift would show"


def test_past_the_limit(long):
    output = long.submit(text(FULL), Sampling(max_tokens=1)).result()
    assert isinstance(output.error, ContextOverflow)
    assert (output.error.needed, output.error.available, output.error.unit) == (FULL + 1, FULL, "tokens")


def test_positions_right_at_the_end_of_the_context(long):
    """A picture among the last tokens of the context: what the engine places is what the one function says."""
    prompt, patches = with_media(long, FULL - 8)
    sequence = long._requests.make(prompt, Sampling(max_tokens=100), "auto", patches)
    where, following = positions(len(prompt.tokens), prompt.spans)
    assert sequence.limit == 8 and sequence.first_position == following
    sequence.tokens = [1, 2, 3]
    end = len(prompt.tokens)
    for start in (0, 4, FULL // 2 - 1, end - 12, end - 3):
        assert (sequence.places(start, end) == where[:, start:end]).all()
    assert sequence.places(end, end + 3).tolist() == [[following, following + 1, following + 2]] * 3
    assert sequence.positions.dtype == np.int32


def peak(reset: bool = False) -> int:
    """Most bytes of this process in memory, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_whole_context(tmp_path):
    """131071 tokens: within the bytes of their keys and values and 96 MB, and equal at the end to one forward without a
    cache. One head, because the attention of either takes minutes."""
    directory = lengthened(make_tiny(tmp_path, "Keye", seed=7, num_attention_heads=1, num_key_value_heads=1))
    with VLM(directory, device="cpu", engine={"step_tokens": 1024, "prefix_cache_bytes": 0}) as vlm:
        vlm.submit(text(2000), Sampling(max_tokens=1)).result()
        prompt = text(FULL - 1)
        gc.collect()
        before = peak(reset=True)
        with recorded(vlm) as seen:
            output = vlm.submit(prompt, Sampling(max_tokens=5, ignore_eos=True)).result()
        grown = peak() - before
        assert output.error is None and output.finish == "length" and len(output.tokens) == 1
        cache = vlm._engine.engine.runner.cache.bytes_for(FULL)
        print(f"{grown / MB:.0f} MB, of which keys and values {cache / MB:.0f} MB, in {output.metrics['total']:.0f} s")
        assert grown < cache + 96 * MB
        plain = plain_logits(vlm, [(prompt, [])], [output.tokens])[0]
    assert (torch.stack(seen[prompt.tokens]) - plain).abs().max() < 1e-3
