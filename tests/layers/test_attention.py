"""Packed attention beside a plain softmax in float64, one sequence and one head at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.layers.attention import CAUSAL_SLACK, attend_packed, groups


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths, causal: bool, scale: float) -> np.ndarray:
    out = np.zeros(q.shape)
    share, start = q.shape[1] // k.shape[1], 0
    for n in lengths:
        rows = slice(start, start + n)
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head // share].T * scale
            if causal:
                scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[rows, head] = weights / weights.sum(1, keepdims=True) @ v[rows, head // share]
        start += n
    return out


def qkv(total: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(total, n, dim, generator=random) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("dim", [16, 64, 72, 80, 128, 192])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7,), (5, 5, 5), (3, 9, 1, 9, 4)])
def test_equals_plain_softmax_at_real_head_sizes(dim: int, causal: bool, lengths) -> None:
    q, k, v = qkv(sum(lengths), 4, 2, dim)
    ours = attend_packed(q, k, v, lengths, causal, dim**-0.5)
    theirs = plain(*(x.double().numpy() for x in (q, k, v)), lengths, causal, dim**-0.5)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_those_of_each_sequence_alone(causal: bool) -> None:
    lengths = (6, 2, 6, 5)
    packed = [x.requires_grad_() for x in qkv(sum(lengths), 4, 2, 16)]
    weight = torch.randn(sum(lengths), 4, 16, generator=torch.Generator().manual_seed(1))
    (attend_packed(*packed, lengths, causal, 0.25) * weight).sum().backward()
    alone = [x.detach().clone().requires_grad_() for x in packed]
    pieces = zip(*(x.split(lengths) for x in alone), strict=True)
    single = torch.cat([attend_packed(*piece, (len(piece[0]),), causal, 0.25) for piece in pieces])
    (single * weight).sum().backward()
    for ours, theirs in zip(packed, alone, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


def test_half_precision_stays_half() -> None:
    q, k, v = (x.bfloat16() for x in qkv(9, 4, 2, 64))
    ours = attend_packed(q, k, v, (4, 5), True, 0.125)
    theirs = attend_packed(q.float(), k.float(), v.float(), (4, 5), True, 0.125)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs, atol=3e-2, rtol=3e-2)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.sampled_from([0.0, CAUSAL_SLACK]))
@settings(max_examples=100)
def test_groups_hold_every_sequence_once_and_waste_little(lengths: list[int], slack: float) -> None:
    made = groups(lengths, slack)
    assert sorted(i for group in made for i in group) == list(range(len(lengths)))
    for group in made:
        longest = lengths[group[0]]
        assert all((1 - slack) * longest <= lengths[i] <= longest for i in group)
