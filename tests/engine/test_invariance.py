"""One reply, however it was reached: alone, in company, with a cache, without one, in one pass or several."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.mixes import features, gap, mix, plain_logits, recorded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import pack

from mirada import VLM
from mirada.types import Image, Message, Sampling, Text, Video

TOLERANCE = 1e-4
GREEDY = Sampling(max_tokens=6, ignore_eos=True)
SETTINGS = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(vlm, asked, sampling=GREEDY):
    """Ids and logits of every step, for all of ``asked`` in one batch."""
    with recorded(vlm) as seen:
        handles = [vlm.submit(prompt, sampling, media=media) for prompt, media in asked]
        ids = [handle.result().tokens for handle in handles]
    return ids, [torch.stack(seen[prompt.tokens]) for prompt, _ in asked]


def same(one, other, what):
    """Equal ids and close logits up to the first step where the two best are too close to call, which is printed."""
    (ids, logits), (other_ids, other_logits) = one, other
    for i, (a, b) in enumerate(zip(logits, other_logits, strict=True)):
        for step in range(len(a)):
            assert (a[step] - b[step]).abs().max() < TOLERANCE, f"{what}: sequence {i}, step {step}"
            if gap(a[step]) < 1e-3 and ids[i][step] != other_ids[i][step]:
                print(f"{what}: sequence {i} parts at step {step}, where the gap is {gap(a[step]):.1e}")
                break
            assert ids[i][step] == other_ids[i][step], f"{what}: sequence {i}, step {step}"


@SETTINGS
@given(seed=st.integers(0, 2**31), count=st.integers(2, 5))
def test_batched_equals_one_by_one(vlm, seed, count):
    asked = mix(vlm, seed, count)
    together = run(vlm, asked)
    alone = [run(vlm, [one]) for one in asked]
    same(together, ([ids[0] for ids, _ in alone], [logits[0] for _, logits in alone]), "batched / alone")
    backwards = run(vlm, asked[::-1])
    same(together, (backwards[0][::-1], backwards[1][::-1]), "batched / backwards")


@SETTINGS
@given(seed=st.integers(0, 2**31))
def test_cached_equals_uncached_and_training_equals_engine(vlm, seed):
    asked = mix(vlm, seed, 3)
    ids, logits = run(vlm, asked)
    for ours, plain in zip(logits, plain_logits(vlm, asked, ids), strict=True):
        assert ours.shape == plain.shape
        assert (ours - plain).abs().max() < TOLERANCE


@SETTINGS
@given(seed=st.integers(0, 2**31))
def test_packed_equals_single_without_a_cache(vlm, seed):
    asked = mix(vlm, seed, 3)
    answers = [[1, 2, 3]] * 3
    packed = plain_logits(vlm, asked, answers)
    for one, answer, rows in zip(asked, answers, packed, strict=True):
        assert (plain_logits(vlm, [one], [answer])[0] - rows).abs().max() < TOLERANCE


def test_chats_with_real_media_batched_and_alone(vlm):
    """From pictures and frames to ids, through preparation and rendering: company changes nothing."""
    random = np.random.default_rng(6)

    def drawn(*shape):
        return random.integers(0, 256, (*shape, 3), dtype=np.uint8)

    video = Video([drawn(56, 84) for _ in range(5)], fps=3.0)
    if vlm.parts.rule.video is None:
        video = Image(drawn(56, 84))
    chats = [
        [Message("user", (Image(drawn(70, 40)), Text("one"), video))],
        [Message("user", "no media")],
        [Message("user", (video, Text("two"))), Message("assistant", "yes"), Message("user", (Image(drawn(30, 99)), "three"))],
    ]
    together = vlm.generate(chats, GREEDY)
    assert [output.usage.image_tokens + output.usage.num_frames > 0 for output in together] == [True, False, True]
    assert (together[0].usage.num_frames > 0) == isinstance(video, Video)
    for chat, output in zip(chats, together, strict=True):
        assert output.error is None
        assert vlm.generate([chat], GREEDY)[0].tokens == output.tokens


def test_small_steps_change_nothing(vlm, monkeypatch):
    """Encoding few patches and computing few tokens per step gives the same replies, within these bounds."""
    asked = mix(vlm, 5, 4)
    assert any(media for _, media in asked)
    whole = run(vlm, asked)
    small = VLM.from_parts(vlm.parts.model, vlm.parts.renderer, vlm.parts.rule, engine={"step_patches": 16, "step_tokens": 5})
    calls, sizes = [], []
    encode, forward = type(vlm.parts.model).encoding, type(vlm.parts.model).forward
    monkeypatch.setattr(
        type(vlm.parts.model), "encoding", lambda self, media, *rest: calls.append(media.grids) or encode(self, media, *rest)
    )
    monkeypatch.setattr(
        type(vlm.parts.model), "forward", lambda self, batch, *rest: sizes.append(batch.lengths) or forward(self, batch, *rest)
    )
    with small:
        same(whole, run(small, asked), "whole / small steps")
    assert len(calls) > 1 and max(map(sum, sizes)) <= 5 and any(1 < max(lengths) for lengths in sizes)
    assert any(len(lengths) > 1 for lengths in sizes), "chunks of prompts and decoding share a step"
    apart = vlm.parts.model.frames_apart
    for grids in calls:
        patches = [t * h * w for t, h, w in grids]
        most_alone = [h * w if apart else t * h * w for t, h, w in grids]
        assert sum(patches) <= 16 or (len(grids) == 1 and patches == most_alone)


def test_joining_a_running_batch_changes_nothing(vlm):
    asked = mix(vlm, 8, 3)
    alone = [run(vlm, [one])[0][0] for one in asked]
    first = vlm.submit(asked[0][0], GREEDY, media=asked[0][1])
    stream = iter(first)
    for _ in range(3):
        next(stream)
    later = [vlm.submit(prompt, GREEDY, media=media) for prompt, media in asked[1:]]
    assert [handle.result().tokens for handle in (first, *later)] == alone


def test_the_model_still_trains_after_answering(vlm):
    """Nothing that inference left behind (tables, positions) breaks a backward pass."""
    asked = mix(vlm, 2, 2)
    run(vlm, asked)
    model = vlm.parts.model
    hidden = model(pack([prompt for prompt, _ in asked]), features(vlm, [item for _, media in asked for item in media]))
    model.logits(hidden).square().mean().backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad(set_to_none=True)


def test_a_mistake_in_positions_would_show(vlm):
    """The comparisons above can fail: a prompt whose answer is placed one step too far differs."""
    asked = [one for one in mix(vlm, 11, 4) if one[1]][:1]
    ids, logits = run(vlm, asked)
    runner = vlm._engine.engine.runner
    original = runner._forward

    def shifted(batch, *rest):
        late = 1 if max(batch.lengths) == 1 else 0
        return original(replace(batch, positions=batch.positions + late), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_forward", shifted)
        with pytest.raises(AssertionError):
            same((ids, logits), run(vlm, asked), "shifted")
