"""Tables: import on use, and the nearest name when there is none."""

from __future__ import annotations

import math
import time

import pytest

from mirada.errors import UnknownName, nearest
from mirada.table import Table

SHAPES = Table("shape", {"root": "math:sqrt", "sine": "math:sin", "broken": "no_such_module:x"})


def test_an_entry_is_imported_on_use():
    assert SHAPES["root"] is math.sqrt
    assert "root" in SHAPES and "cube" not in SHAPES
    assert list(SHAPES) == ["root", "sine", "broken"]
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        SHAPES["broken"]


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(UnknownName) as caught:
        SHAPES["roots"]
    assert caught.value.problem == "shape 'roots' is unknown"
    assert caught.value.fix == "did you mean 'root'? known: broken, root, sine"


def test_nothing_near_and_nothing_known():
    assert nearest("qqqq", ["a"]) == "known: a"
    assert nearest("a", []) == "known: none"


def test_names_that_are_very_long_or_very_many_are_not_compared():
    began = time.thread_time()
    assert nearest("a" * 3_000_000, ["a"]) == "known: a"
    names = [f"{'a' * 190}{number:06d}" for number in range(20_000)]
    said = nearest("a" * 196, names)
    assert said.endswith(" and 19800 more") and len(said) < 30_000
    assert time.thread_time() - began < 2
