"""The repetition guard against its definition, written out plainly."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.engine import loops
from mirada.engine.loops import LoopGuard
from mirada.types import Sampling

DEFAULT = Sampling().max_repeats


def is_loop(tokens, max_repeats):
    """At least ``max_repeats`` copies, and 32 tokens per copy allowed, of one piece of at most 256 tokens at the end."""
    for period in range(1, loops.MAX_PERIOD + 1):
        length = max(max_repeats * period, loops.LOOP_TOKENS * max_repeats)
        if len(tokens) >= length and all(tokens[-i] == tokens[-i - period] for i in range(1, length - period + 1)):
            return True
    return False


def ended(tokens, max_repeats):
    """After how many tokens the guard ends the reply; None if it does not."""
    guard = LoopGuard(max_repeats)
    return next((n for n in range(1, len(tokens) + 1) if guard.looping(tokens[:n])), None)


def plainly(tokens, max_repeats):
    return next((n for n in range(1, len(tokens) + 1) if is_loop(tokens[:n], max_repeats)), None)


@pytest.fixture
def small(monkeypatch):
    """Short pieces, so that the definition can be asked at every token."""
    monkeypatch.setattr(loops, "MAX_PERIOD", 12)
    monkeypatch.setattr(loops, "LOOP_TOKENS", 4)


PIECES = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=14), st.integers(1, 9)), max_size=8)


@pytest.mark.hypothesis
def test_the_guard_is_its_definition(small):
    found = []

    @settings(max_examples=150, database=None)
    @given(pieces=PIECES, max_repeats=st.integers(2, 5))
    def check(pieces, max_repeats):
        tokens = [token for piece, times in pieces for token in piece * times]
        expected = plainly(tokens, max_repeats)
        assert ended(tokens, max_repeats) == expected
        found.append(expected is not None)

    check()
    assert any(found) and not all(found)


@pytest.mark.parametrize("seed", range(20))
def test_long_texts_of_few_words_too(small, seed):
    source = random.Random(seed)
    blocks = [[source.randrange(2) for _ in range(source.randint(1, 12))] for _ in range(3)]
    tokens = [t for _ in range(150) for t in source.choice(blocks) * source.choice((1, 1, 1, 2, 4))]
    assert ended(tokens, 4) == plainly(tokens, 4)


@pytest.mark.parametrize("period", [1, 2, 7, 31, 32, 33, 100, 256])
def test_the_length_at_which_a_loop_ends(period):
    start = list(range(1000, 1100))
    piece = list(range(period))
    length = loops.loop_length(period, DEFAULT)
    assert length == max(16 * period, 512)
    tokens = start + (piece * (length // period + 1))[: length + 3]
    assert ended(tokens, DEFAULT) == len(start) + length


def test_a_longer_piece_is_no_loop():
    assert ended(list(range(loops.MAX_PERIOD + 1)) * 40, DEFAULT) is None


SPARED = {
    "a ruled line of a wide table": "|---" * 200,
    "empty rows": "|  |  |  |  |\n" * 40,
    "numbered items": "".join(f"{i}. The same words each time\n" for i in range(400)),
    "code of one shape": "".join(f"    self.layer_{i} = Linear(512, 512, bias=False)\n" for i in range(300)),
    "a column of figures": "".join(f"| {i * 37 % 1000} | 0 | 0 | 0 |\n" for i in range(400)),
    "a googol": "1" + "0" * 100,
    "sheet of ten equal cards": "Jane Roe\nHead of Sales\nExample Ltd\n12 Long Street\nLondon\n+44 20 7946 0000\n\n" * 10,
}
LOOPS = {
    "a sentence": "I will now look at the image once more. " * 80,
    "a token": "!" * 4 * 600,
    "a paragraph": "Wait, let me count again. There are two on the left, three on the right, and one behind them. " * 60,
}


@pytest.mark.parametrize("name", SPARED)
def test_tables_lists_code_and_numbers_are_spared(name):
    assert ended(pieces_of(SPARED[name]), DEFAULT) is None


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_not(name):
    tokens = pieces_of(LOOPS[name])
    assert (ended(tokens, DEFAULT) or len(tokens)) < len(tokens)


def pieces_of(text):
    """Tokens such as a large vocabulary makes of it: words with their space, each digit, up to four signs together."""
    names: dict[str, int] = {}
    words = re.findall(r" ?[^\W\d_]+|\d| ?[^\w\s]{1,4}|\s+|_", text)
    assert "".join(words) == text
    return [names.setdefault(word, len(names)) for word in words]


def test_a_token_costs_next_to_nothing():
    """Counted in checks, not in seconds: ordinary text is looked at once in a few hundred tokens."""
    checks = []
    guard = LoopGuard(DEFAULT)
    plain = guard._matches
    guard._matches = lambda tail: checks.append(1) or plain(tail)
    tokens: list[int] = []
    for token in np.random.default_rng(0).integers(0, 50, 20_000).tolist():
        tokens.append(token)
        assert not guard.looping(tokens)
    assert 20_000 / 512 <= len(checks) < 20_000 / 400
