"""A reply beside the one that its request has alone: the same logits token by token, the same draws, and so the same tokens.

Rounding may differ: another number of rows sums in another order. So logits are equal within a bound, at every token, whether
it is the same one or not; and where two replies part, each token is what its own logits and draw give to a request alone. Both
together mean that a reply parts at a tie only: greedy, where the two best logits are within twice the bound; drawn, where the
draw is that near the edge between the two tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mirada import VLM, Sampling
from mirada.engine import sample
from mirada.engine.sample import Chooser
from mirada.types import Prompt

PLAIN = {"max_running": 1, "prefix_cache_bytes": 0, "encoder_cache_bytes": 0, "pixel_cache_bytes": 0, "workers": 0}
"""An engine that nothing but the model's forward can make a reply of."""
NEAR = {"auto": 1e-4, "int8": 0.1}
"""Bound of the difference of logits: int8 makes steps of a rounding. Some 4e-6 and 2e-2 were met."""


@dataclass
class Row:
    """What one token was chosen from: logits [V] and the draw, if there was one."""

    logits: torch.Tensor
    uniform: float | None


Rows = dict[int, Row]


@dataclass
class Reply:
    tokens: tuple[int, ...]
    rows: Rows
    whole: bool = True
    """False: it was cancelled."""


@contextmanager
def watched(vlm: VLM) -> Iterator[dict[Any, Rows]]:
    """While open: by sequence and number of the token, what it was chosen from; the last time, where a step was repeated."""
    runner: Any = vlm._engine.engine.runner
    original, seen = runner._sample, {}

    def noted(chunks: Any, logits: torch.Tensor) -> Any:
        kept = logits.clone()
        made = original(chunks, logits)
        start = 0
        for chunk, choice in zip(chunks, made, strict=True):
            one = chunk.sequence
            for i in range(len(choice.tokens)):
                draw = one.chooser._uniform if chunk.rows == 1 else None
                seen.setdefault(one, {})[len(one.tokens) + i] = Row(kept[start + i], draw)
            start += chunk.rows
        return made

    runner._sample = noted
    try:
        yield seen
    finally:
        del runner._sample


@dataclass
class Partings:
    """Compares replies; keeps count of what was excused."""

    near: float
    count: int = 0
    largest: float = 0.0
    """Difference of logits that was met."""
    told: list[str] = field(default_factory=list)

    def check(
        self, alone: Reply, got: Reply, prompt: Prompt, sampling: Sampling, told: str, guide: Callable[[], Any] = lambda: None
    ) -> bool:
        """Whether they are the same, as far as ``got`` came. AssertionError where they part otherwise than at a tie."""
        pairs = zip(alone.tokens, got.tokens, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(alone.tokens), len(got.tokens)))
        parts = same < min(len(alone.tokens), len(got.tokens))
        for i in range(same + parts):
            self._same_row(alone.rows[i], got.rows[i], f"{told}: token {i}")
        if parts:
            self._excuse(alone, got, same, prompt, sampling, told, guide)
            return False
        assert not got.whole or len(got.tokens) == len(alone.tokens), f"{told}: {got.tokens} instead of {alone.tokens}"
        assert len(got.tokens) <= len(alone.tokens), f"{told}: {got.tokens} goes on after {alone.tokens}"
        return True

    def _same_row(self, alone: Row, got: Row, told: str) -> None:
        differ = float((alone.logits - got.logits).abs().max())
        self.largest = max(self.largest, differ)
        assert differ < self.near, f"{told}: its logits differ by {differ:.1e}"
        assert alone.uniform == got.uniform, f"{told}: another draw than alone"

    def _excuse(
        self, alone: Reply, got: Reply, at: int, prompt: Prompt, sampling: Sampling, told: str, guide: Callable[[], Any]
    ) -> None:
        for reply in (alone, got):
            chooser = Chooser(sampling, prompt.tokens, guide())
            for token in alone.tokens[:at]:
                chooser.note(token)
            row = reply.rows[at]
            chooser._uniform = row.uniform
            (own,) = sample.pick(row.logits[None].clone(), [chooser]).tokens
            assert own == reply.tokens[at], f"{told}: token {at} is {reply.tokens[at]}, and its logits give {own}"
        self.count += 1
        self.told.append(f"{told}: parts at token {at} from {alone.tokens[at]} to {got.tokens[at]}, at a tie")
        print(self.told[-1])
