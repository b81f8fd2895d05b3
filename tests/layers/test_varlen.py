"""torch's attention over segments, as its releases have had it: stand-ins that compute what each says, with its signature."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mirada.layers import fused
from mirada.layers.attention import attend_packed

LENGTHS = (3, 8, 1)


def by_hand(q, k, v, cu: Tensor, scale: float, causal: bool) -> Tensor:
    made, ends = [], cu.tolist()
    for begin, end in pairwise(ends):
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], k[begin:end]) * scale
        if causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), float("-inf"))
        made.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[begin:end]))
    return torch.cat(made)


def first_release(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """torch 2.10: a flag, and no scale but its own."""
    assert max_q == max_k == max(cu_seq_q.diff()) and all(x.is_contiguous() for x in (query, key, value))
    return by_hand(query, key, value, cu_seq_q, query.shape[-1] ** -0.5, is_causal)


def later_release(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """torch 2.11: a scale, and a window in place of the flag."""
    assert window_size in ((-1, -1), (-1, 0)) and cu_seq_q.dtype == torch.int32
    own = query.shape[-1] ** -0.5 if scale is None else scale
    return by_hand(query, key, value, cu_seq_q, own, window_size == (-1, 0))


def other_release(query, key, value, *, offsets):
    raise AssertionError("not to be called so")


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    for kept in (fused._varlen, fused._varlen_works, fused._parameters):
        kept.cache_clear()
    yield
    for kept in (fused._varlen, fused._varlen_works, fused._parameters):
        kept.cache_clear()


@pytest.mark.parametrize("release", (first_release, later_release))
@pytest.mark.parametrize("causal", (False, True))
def test_both_releases_are_called_as_they_want(release, causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(sum(LENGTHS), 6, 8).split(2, 1)
    cu = fused.segments(LENGTHS, q.device)
    assert cu.tolist() == [0, 3, 11, 12]
    made = fused._call_varlen(release, q, k, v, cu, max(LENGTHS), causal, 0.7)
    torch.testing.assert_close(made, attend_packed(q, k, v, LENGTHS, causal, 0.7))


@pytest.mark.parametrize(
    ("release", "works"), ((first_release, True), (later_release, True), (other_release, False), (None, False))
)
def test_a_release_is_tried_once(release, works, monkeypatch):
    calls = []
    monkeypatch.setattr(fused, "_varlen", lambda: calls.append(1) or release)
    for _ in range(2):
        assert fused._varlen_works(torch.device("cpu"), torch.float32, 8) is works
    assert len(calls) <= 2, "asked for, and called, the first time only"


def test_off_a_gpu_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(fused, "_varlen", lambda: pytest.fail("asked"))
    q, k, v = torch.randn(sum(LENGTHS), 6, 8).split(2, 1)
    with torch.no_grad():
        assert fused.varlen(q, k, v, LENGTHS, False, 0.7) is None
