"""The largest of each row, against torch."""

from __future__ import annotations

import pytest
import torch

from mirada.layers.kernels.library import library
from mirada.layers.largest import largest

pytestmark = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")


@pytest.mark.parametrize("width", [1, 15, 16, 17, 1024, 1030])
def test_as_torch(width: int) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).round(decimals=1)  # many are equal
    assert largest(x) == [(row == row.max()).nonzero()[0].item() for row in x]
    for place in range(0, width, 7):
        x[2, place] = 100.0
        found = largest(x)
        assert found is not None and found[2] == place
        x[2, place] = -100.0


@pytest.mark.parametrize("place", [0, 16, 33])
def test_what_is_no_number(place: int) -> None:
    x = torch.zeros(3, 34)
    x[0, place], x[1, place], x[2] = float("nan"), float("inf"), float("-inf")
    assert largest(x) == [-1, -1, -1]
    x[2, place] = -1e30
    assert largest(x) == [-1, -1, place]


def test_left_to_others() -> None:
    assert largest(torch.zeros(2, 4, dtype=torch.float64)) is None
    assert largest(torch.zeros(4, 2).T) is None
