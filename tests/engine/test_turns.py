"""Whose turn it is, apart from any engine."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.engine.turns import Turns


@dataclass(eq=False)
class One:
    left: int


def serve(turns: Turns, line: list[One], room: int) -> None:
    """One step that gives ``room``."""
    given = []
    for one in turns.order(line):
        count = min(room, one.left)
        one.left -= count
        room -= count
        given.append((one, count))
    turns.note(line, given)


def test_the_least_left_goes_first_and_equals_in_order():
    a, b, c, d = line = [One(9), One(2), One(5), One(2)]
    assert Turns(10).order(line) == [b, d, c, a] and Turns(10).order([]) == []


@pytest.mark.parametrize("idle", [1, 100])
def test_what_the_oldest_could_not_use_keeps_nobody_waiting_for_long(idle):
    """The oldest waits for pictures while others are served; then it is owed one step, not all of these."""
    turns, oldest, other = Turns(100), One(1000), One(5000)
    for _ in range(idle):
        turns.note([oldest, other], [(other, 100)])
    serve(turns, [oldest, other], 100)
    short = One(50)
    serve(turns, [oldest, other, short], 100)
    assert oldest.left == 850 and short.left == 0


@settings(max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=2, max_size=12),
    arrivals=st.lists(st.integers(0, 6), min_size=12, max_size=12),
    room=st.integers(1, 60),
)
def test_the_oldest_has_half_and_nothing_is_wasted(sizes, arrivals, room):
    turns, line, steps = Turns(room), [], 0
    coming = [(at, One(size)) for at, size in zip(arrivals, sizes, strict=False)]
    served_since, oldest = 0, None
    while coming or line:
        line += [one for at, one in coming if at <= steps]
        coming = [(at, one) for at, one in coming if at > steps]
        if line and line[0] is not oldest:
            oldest, began, served_since = line[0], line[0].left, 0
        total = sum(one.left for one in line)
        serve(turns, line, room)
        assert sum(one.left for one in line) == max(0, total - room)
        served_since += min(room, total)
        if oldest is not None and oldest.left:
            assert 2 * (began - oldest.left) >= served_since - 2 * room
        line = [one for one in line if one.left]
        steps += 1
        assert steps < 6 + 400 * 12
