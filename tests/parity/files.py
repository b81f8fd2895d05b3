"""What a directory of reference outputs may hold: for every file name the checks, and what they need beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Check = Callable[[], None]


@dataclass(frozen=True)
class Files:
    """``checks``: file name -> its checks by name. ``needs``: names that must lie beside it. ``without``: names of files that
    other files are checked with, and of texts."""

    checks: Mapping[str, Callable[[Path], dict[str, Check]]]
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without: frozenset[str] = frozenset()


def all_of(facts: Mapping, known: Iterable[str], where: str) -> None:
    """No recorded fact goes unseen."""
    extra = set(facts) - set(known)
    assert not extra, f"{where} holds facts that no check knows: {sorted(extra)}"
