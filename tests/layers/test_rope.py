"""Rotary positions beside complex numbers in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mirada.layers import fused
from mirada.layers.kernels.library import library
from mirada.layers.norm import RMSNorm, norm_heads
from mirada.layers.rope import grid_angles, mrope_angles, pairs_to_halves, rotate, rotation

CPU = torch.device("cpu")


def turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Channel i and i + d/2 as one complex number, times e^(i angle)."""
    half = x.shape[-1] // 2
    made = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate((made.real, made.imag), -1)


@pytest.mark.parametrize(("dim", "sections"), [(128, (16, 24, 24)), (16, (2, 3, 3)), (64, (8, 12, 12)), (80, (10, 15, 15))])
def test_three_axes(dim: int, sections: tuple[int, int, int]) -> None:
    places = np.random.default_rng(0).integers(0, 40, (3, 11))
    x = torch.randn(11, 3, dim, generator=torch.Generator().manual_seed(0))
    angles = np.empty((11, dim // 2))
    for j in range(dim // 2):
        axis = 0 if j < sections[0] else 1 if j < sections[0] + sections[1] else 2
        angles[:, j] = places[axis] * 1e6 ** (-2 * j / dim)
    ours = rotate(x, rotation(mrope_angles(torch.from_numpy(places), sections, dim, 1e6)))
    np.testing.assert_allclose(ours.numpy(), turned(x.double().numpy(), angles), atol=2e-5)


@pytest.mark.parametrize("dim", [16, 64, 72, 80])
def test_rows_and_columns(dim: int) -> None:
    grids = [(1, 2, 4), (3, 4, 2)]
    x = torch.randn(32, 2, dim, generator=torch.Generator().manual_seed(0))
    rows = [(y, column) for t, h, w in grids for _ in range(t) for y in range(h) for column in range(w)]
    frequencies = 10000.0 ** (-2 * np.arange(dim // 4) / (dim // 2))
    angles = np.array([np.concatenate((y * frequencies, column * frequencies)) for y, column in rows])
    ours = rotate(x, rotation(grid_angles(grids, dim, 10000.0, CPU)))
    np.testing.assert_allclose(ours.numpy(), turned(x.double().numpy(), angles), atol=2e-6)


def test_turning_is_in_float32_for_half_inputs() -> None:
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    turn = rotation(mrope_angles(torch.arange(5).expand(3, 5) * 500, (8, 12, 12), 64, 1e6))
    assert turn[0].dtype == torch.float32
    assert torch.equal(rotate(x, turn), rotate(x.float(), turn).bfloat16())


# ---- where they lie, in compiled code


def _projection(seed: int, tokens: int, width: int) -> tuple[torch.nn.Linear, torch.Tensor]:
    torch.manual_seed(seed)
    by = torch.nn.Linear(12, width, bias=False)
    return by, by(torch.randn(tokens, 12))


@pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
@torch.no_grad()
@pytest.mark.parametrize(("heads", "width"), [(5, 64), (3, 12), (2, 6)])
@pytest.mark.parametrize("pairs", [False, True])
def test_turned_where_they_lie_equals_the_written_rule(heads: int, width: int, pairs: bool) -> None:
    for tokens in (1, 3, 400):  # the last on several threads, where there are
        by, made = _projection(tokens, tokens, (heads + 2) * width)
        held = made.view(tokens, heads + 2, width)[:, :heads]  # what lies beside them stays
        turn = rotation(torch.randn(tokens, width // 2) * 9)
        norms = [RMSNorm(width, 1e-6) for _ in range(2)]
        for norm in norms:
            norm.weight.copy_(torch.randn(width))
        beside = made.view(tokens, heads + 2, width)[:, heads:].clone()
        source = pairs_to_halves(held) if pairs else norm_heads(held, norms[0], norms[1], 1)
        expected = rotate(source, turn)
        given = () if pairs else [(norm.weight, norm.eps, count) for norm, count in zip(norms, (1, heads - 1), strict=True)]
        got = fused.turn_in_place(made, by, held, turn, given, pairs)
        assert got is held
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
        assert torch.equal(made.view(tokens, heads + 2, width)[:, heads:], beside)


@torch.no_grad()
def test_what_is_hooked_keeps_what_it_saw() -> None:
    by, made = _projection(0, 2, 24)
    by.register_forward_hook(lambda *_: None)
    before = made.clone()
    got = fused.turn_in_place(made, by, made.view(2, 3, 8), rotation(torch.randn(2, 4)))
    assert torch.equal(made, before)
    assert got is None or not torch.equal(got, before.view(2, 3, 8))


def test_nothing_is_turned_in_place_where_gradients_are_wanted() -> None:
    by, made = _projection(0, 2, 24)
    assert fused.turn_in_place(made, by, made.view(2, 3, 8), rotation(torch.randn(2, 4))) is None
