"""Positions: a token-by-token walk of the rule, and what must hold of any prompt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_prompt

from mirada.errors import MessageError
from mirada.models.positions import positions
from mirada.types import Prompt, Span

PADS = (295, 296)


def walk(num_tokens: int, spans: tuple[Span, ...]) -> tuple[np.ndarray, int]:
    """The rule of the specification, one token after another."""
    starts = {span.start: span for span in spans}
    made: list[tuple[int, int, int]] = []
    while len(made) < num_tokens:
        base = max((max(place) for place in made), default=-1) + 1
        span = starts.get(len(made))
        if span is None:
            made.append((base, base, base))
            continue
        t, h, w = span.grid
        for frame in range(t):
            step = int(np.float32(frame) * np.float32(span.t_step))
            made += [(base + step, base + y, base + x) for y in range(h // 2) for x in range(w // 2)]
    return np.array(made).T, max(max(place) for place in made) + 1


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=150)
def test_equal_a_walk_over_random_mixes(seed: int, frames_apart: bool) -> None:
    prompt, _ = random_prompt(np.random.default_rng(seed), PADS, frames_apart)
    ours, following = positions(len(prompt.tokens), prompt.spans)
    theirs, expected = walk(len(prompt.tokens), prompt.spans)
    assert ours.dtype == np.int64 and np.array_equal(ours, theirs)
    assert following == expected


@given(st.integers(0, 10**6))
@settings(max_examples=50)
def test_a_prefix_has_the_same_positions(seed: int) -> None:
    prompt, _ = random_prompt(np.random.default_rng(seed), PADS, False)
    whole, _ = positions(len(prompt.tokens), prompt.spans)
    for cut in [span.end for span in prompt.spans]:
        part, _ = positions(cut, [span for span in prompt.spans if span.end <= cut])
        assert np.array_equal(part, whole[:, :cut])


@given(st.integers(0, 10**6), st.integers(1, 9))
@settings(max_examples=50)
def test_text_before_shifts_everything_by_its_length(seed: int, more: int) -> None:
    prompt, _ = random_prompt(np.random.default_rng(seed), PADS, False)
    spans = [Span(s.kind, s.start + more, s.grid, s.media_id, s.frame, s.t_step) for s in prompt.spans]
    plain, following = positions(len(prompt.tokens), prompt.spans)
    shifted, later = positions(len(prompt.tokens) + more, spans)
    assert np.array_equal(shifted[:, more:], plain + more) and later == following + more


def test_text_alone_counts_up() -> None:
    made, following = positions(5, ())
    assert np.array_equal(made, np.tile(np.arange(5), (3, 1))) and following == 5
    assert positions(0, ())[1] == 0


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1.0, [0, 1, 2, 3]),
        (2.0, [0, 2, 4, 6]),
        (1.4, [0, 1, 2, 4]),
        (0.0, [0, 0, 0, 0]),
        (np.float32(1 / 1.5) * 2, [0, 1, 2, 4]),
    ],
)
def test_time_steps_are_cut_towards_zero_in_float32(step: float, expected: list[int]) -> None:
    made, _ = positions(4, (Span("video", 0, (4, 2, 2), 0, t_step=float(step)),))
    assert made[0].tolist() == expected


@pytest.mark.parametrize(
    "spans",
    [
        (Span("image", 8, (1, 4, 4), 0),),
        (Span("image", 0, (1, 4, 4), 0), Span("image", 3, (1, 4, 4), 1)),
        (Span("image", 5, (1, 2, 2), 0), Span("image", 1, (1, 2, 2), 1)),
    ],
)
def test_spans_that_do_not_fit_are_refused(spans) -> None:
    with pytest.raises(MessageError, match="image span of tokens"):
        positions(10, spans)


def test_random_prompts_hold_a_token_per_square() -> None:
    prompt, grids = random_prompt(np.random.default_rng(3), PADS, True)
    assert isinstance(prompt, Prompt)
    assert sum(s.num_tokens for s in prompt.spans) == sum(t * h * w // 4 for t, h, w in grids)
