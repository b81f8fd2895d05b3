"""What one step computes of a sequence, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from mirada.engine.sequence import Sequence
from mirada.errors import MiradaError
from mirada.types import Logprob


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``count`` tokens of a sequence (those of its draft included), computed in one step."""

    sequence: Sequence
    count: int

    rows: int = field(init=False)
    """Rows whose logits are wanted: none in the middle of a prompt, one at its end, and one more per token of a draft."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", max(0, self.end - self.sequence.num_tokens + 1))

    @property
    def end(self) -> int:
        return self.sequence.computed + self.count


@dataclass(frozen=True, slots=True)
class Choice:
    """What a chunk gave: no token, one, or several where a draft was right; reports where log-probabilities are wanted; or
    why it could not choose."""

    tokens: Seq[int] = ()
    reports: Seq[Logprob | None] = ()
    error: MiradaError | None = None
