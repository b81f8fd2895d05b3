"""Norms, feed-forward blocks and patch embedding beside their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mirada.layers.embed import CACHED_SIZES, GridPositions, PatchEmbed
from mirada.layers.linear import dequantise_rows, quantise_rows
from mirada.layers.mlp import MLP, GatedMLP
from mirada.layers.norm import RMSNorm, norm_heads


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


@torch.no_grad()
def test_rms_norm() -> None:
    made = RMSNorm(48, 1e-2)
    made.weight.copy_(noise(48, seed=1))
    x = noise(5, 48) * 0.1
    np.testing.assert_allclose(made(x).numpy(), rms(x.double().numpy(), made.weight.double().numpy(), 1e-2), atol=1e-6)


@torch.no_grad()
def test_rms_norm_of_half_inputs_is_computed_in_float32_and_weighed_after_the_cast() -> None:
    made = RMSNorm(48, 1e-6).bfloat16()
    made.weight.copy_(noise(48, seed=1))
    x = noise(5, 48).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(made(x), wide.bfloat16() * made.weight)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_query_and_key_heads_get_their_own_weights(dtype: torch.dtype) -> None:
    q_norm, k_norm = RMSNorm(16, 1e-6), RMSNorm(16, 1e-6)
    q_norm.weight.copy_(noise(16, seed=1))
    k_norm.weight.copy_(noise(16, seed=2))
    q_norm.to(dtype), k_norm.to(dtype)
    x = noise(7, 6, 16).to(dtype)
    apart = torch.cat((q_norm(x[:, :4]), k_norm(x[:, 4:])), 1)
    torch.testing.assert_close(norm_heads(x, q_norm, k_norm, 4), apart, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("gelu", ["tanh", "none"])
def test_mlp(gelu) -> None:
    made = MLP(8, 12, 6, gelu)
    x = noise(5, 8) * 2
    w1, b1, w2, b2 = (p.double().numpy() for p in made.parameters())
    inner = x.double().numpy() @ w1.T + b1
    if gelu == "tanh":
        act = 0.5 * inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    else:
        act = 0.5 * inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    np.testing.assert_allclose(made(x).numpy(), act @ w2.T + b2, atol=1e-6)


@torch.no_grad()
def test_gated_mlp() -> None:
    made = GatedMLP(8, 12)
    x = noise(5, 8)
    both = x.double().numpy() @ made.gate_up.weight.double().numpy().T
    gate, up = both[:, :12], both[:, 12:]
    out = (gate / (1 + np.exp(-gate)) * up) @ made.down.weight.double().numpy().T
    np.testing.assert_allclose(made(x).numpy(), out, atol=1e-6)


@torch.no_grad()
def test_patch_embedding_is_a_convolution() -> None:
    made = PatchEmbed(3, 14, 10)
    pixels = noise(6, 3, 14, 14)
    theirs = torch.nn.functional.conv2d(pixels, made.proj.weight.view(10, 3, 14, 14), made.proj.bias, stride=14)
    torch.testing.assert_close(made(pixels), theirs.flatten(1), atol=1e-5, rtol=1e-5)


def bilinear(table: np.ndarray, h: int, w: int) -> np.ndarray:
    """Half-pixel centres, edges repeated."""

    def line(n: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.maximum((np.arange(n) + 0.5) * side / n - 0.5, 0)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, side - 1), at - low

    (y0, y1, fy), (x0, x1, fx) = line(h, len(table)), line(w, len(table))
    fy, fx = fy[:, None, None], fx[None, :, None]
    top = table[y0][:, x0] * (1 - fx) + table[y0][:, x1] * fx
    low = table[y1][:, x0] * (1 - fx) + table[y1][:, x1] * fx
    return top * (1 - fy) + low * fy


@pytest.mark.parametrize(("h", "w"), [(6, 6), (4, 10), (2, 2), (30, 14)])
def test_places_are_resampled_bilinearly(h: int, w: int) -> None:
    made = GridPositions(6, 8)
    theirs = bilinear(made.weight.detach().double().numpy().reshape(6, 6, 8), h, w).reshape(h * w, 8)
    np.testing.assert_allclose(made.resample(h, w).detach().numpy(), theirs, atol=1e-6)


def test_places_follow_the_table_when_it_changes() -> None:
    made = GridPositions(6, 8)
    grids = [(2, 4, 4), (1, 2, 6)]
    with torch.no_grad():
        before = made(grids)
        made.weight.mul_(2)
        after = made(grids)
        assert torch.equal(after, before * 2)
        for w in range(2, 3 * CACHED_SIZES, 2):
            made([(1, 2, w)])
        assert len(made._cache) == CACHED_SIZES
    assert made(grids).requires_grad
    torch.testing.assert_close(made(grids).detach(), after)


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 14, 14)])
def test_int8_rows_are_within_half_a_step(shape) -> None:
    weight = noise(*shape)
    weight[1] = 0
    weight[2] *= 1e-9
    values, scale = quantise_rows(weight)
    assert values.dtype == torch.int8 and values.shape == weight.shape
    assert scale.dtype == torch.float16 and scale.shape == weight.shape[:1]
    made = dequantise_rows(values, scale)
    step = scale.float().view(-1, *[1] * (len(shape) - 1))
    # The scale itself is rounded to 11 bits, so the largest value may miss by that much more.
    assert torch.all((made - weight).abs() <= 0.5 * step + weight.abs() * 2**-11 + 1e-8)
    assert torch.equal(made[1], torch.zeros_like(made[1]))
    again = quantise_rows(made)
    assert torch.equal(again[0], values) and torch.equal(again[1], scale)
