"""Three-dimensional positions from spans: one function for every family.

Text counts on all three axes at once. A span of pictures starts one past the highest position so far and lays out
(time, row, column) from there; text goes on one past its highest (M-RoPE, Qwen2-VL, arXiv 2409.12191; time steps as in
Qwen2.5-VL and Keye ``modeling_keye.py`` get_rope_index). Tokens of a flat span count like text (Kimi-VL, DeepSeek).

transformers 5 leaves the time axis out of that highest, so that text after a long video stands earlier than the models were
trained with; spans whose ``advance`` is ``plane`` follow it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mirada.errors import MessageError
from mirada.types import Span


def positions(num_tokens: int, spans: Sequence[Span]) -> tuple[np.ndarray, int]:
    """int64 [3, num_tokens] and the position of the token that would come next: one past the highest of all.

    Spans must be in order, must not overlap and must end inside the prompt; otherwise MessageError.
    """
    made = np.empty((3, num_tokens), np.int64)
    at = following = 0
    for span in spans:
        if span.start < at or span.end > num_tokens:
            raise MessageError(
                f"the {span.kind} span of tokens {span.start} to {span.end} overlaps another or ends past token {num_tokens}",
                "give spans in order, each inside the prompt",
            )
        base = following + span.start - at
        made[:, at : span.start] = np.arange(following, base)
        block = made[:, span.start : span.end]
        block[:] = base + _offsets(span)
        following = int((block if span.advance == "block" else block[1:]).max()) + 1
        at = span.end
    following += num_tokens - at
    made[:, at:] = np.arange(following - num_tokens + at, following)
    return made, int(made.max(initial=-1)) + 1


def _offsets(span: Span) -> np.ndarray:
    """[3, tokens of the span] (or [tokens], for all axes), from its own start."""
    if span.flat:
        return np.arange(span.num_tokens)
    t, h, w = span.grid[0], span.grid[1] // span.merge, span.grid[2] // span.merge
    # float32, then cut towards zero: with odd rates the rounding of a wider type would choose another step.
    steps = (np.arange(t, dtype=np.float32) * np.float32(span.t_step)).astype(np.int64)
    time, row, column = np.broadcast_arrays(steps[:, None, None], np.arange(h)[:, None], np.arange(w))
    return np.stack((time.ravel(), row.ravel(), column.ravel()))
