"""The compiled kernels of vision towers beside what they compute, written plainly in float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F

from mirada.errors import TensorError
from mirada.layers import fused
from mirada.layers.attention import attend_packed
from mirada.layers.kernels import library as compiled
from mirada.layers.kernels.matrix import Matrix, attend_seen, gelu, kernels, product, swiglu
from mirada.layers.mlp import MLP
from mirada.layers.mlp import gelu as written

LIBRARY = compiled.library()
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2}
HERE = [name for name, number in ISAS.items() if LIBRARY is not None and number <= LIBRARY.mr_best_isa()]
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"no compiled kernels: {compiled.status().why}")
vectors = pytest.mark.skipif(compiled.status().name in ("none", "scalar"), reason="kernels for vectors are not in use")


@pytest.fixture(params=HERE)
def isa(request):
    """Each set of kernels that this processor has, one by one."""
    assert kernels().mr_set_isa(ISAS[request.param]) == ISAS[request.param]
    yield request.param
    kernels().mr_set_isa(-1)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(q, k, v, lengths, scale) -> torch.Tensor:
    """Segment by segment, head by head, in float64."""
    parts = []
    for a, b, c in zip(*(x.double().split(list(lengths)) for x in (q, k, v)), strict=True):
        shares = (torch.einsum("ihd,jhd->hij", a, b) * scale).softmax(-1)
        parts.append(torch.einsum("hij,jhd->ihd", shares, c))
    return torch.cat(parts)


def qkv(tokens: int, heads: int, d: int, seed: int = 0) -> list[torch.Tensor]:
    """As a tower has them: views of one tensor."""
    return list(noise(tokens, 3 * heads * d, seed=seed).view(tokens, 3 * heads, d).split(heads, 1))


@pytest.mark.parametrize("count", [1, 2])
def test_some_queries_of_some_heads_are_those_of_all(isa, threads, count):
    """Bit by bit, so that a layer may be computed in parts."""
    threads(count)
    q, k, v = qkv(1300, 3, 20)
    whole = attend_seen(q, k, v, (1300,), 0.2)
    for first, end in ((0, 1), (0, 1200), (7, 103), (1299, 1300)):
        assert torch.equal(attend_seen(q[first:end, 1:], k[:, 1:], v[:, 1:], (1300,), 0.2), whole[first:end, 1:])
    with pytest.raises(TensorError, match="5 asked"):
        attend_seen(q[:5], k, v, (1000, 300), 0.2)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_the_default_type_changes_nothing(isa, kind):
    q, k, v = qkv(40, 2, 16)
    matrix, x = Matrix.of(noise(48, 64)), noise(9, 64)
    gates = noise(5, 64)
    work = (
        lambda: attend_seen(q, k, v, (40,), 0.25),
        lambda: product(matrix, x),
        lambda: product(matrix, x, many=True),
        lambda: swiglu(gates),
        lambda: Matrix.of(matrix.values.bfloat16()).widen(),
    )
    wanted = [one() for one in work]
    try:
        torch.set_default_dtype(kind)
        made = [one() for one in work]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


@pytest.mark.parametrize(("heads", "d"), [(3, 80), (2, 72), (1, 64), (2, 4), (1, 12), (2, 33)])
@pytest.mark.parametrize("lengths", [(1,), (7, 1, 40), (256,), (257, 100), (13, 0, 600)])
def test_attention(isa, heads, d, lengths) -> None:
    q, k, v = qkv(sum(lengths), heads, d)
    made = attend_seen(q, k, v, lengths, 1.3 * d**-0.5)
    torch.testing.assert_close(made.double(), seen(q, k, v, lengths, 1.3 * d**-0.5), atol=3e-6, rtol=0)


def test_large_scores_and_far_apart_rows(isa) -> None:
    """The largest score comes late, twice in one block or never; keys and values lie apart from the queries."""
    q, k, v = (
        noise(700, 2, 16),
        noise(700, 2, 32, seed=1)[..., :16],
        noise(700, 2, 16, seed=2).transpose(0, 1).contiguous().transpose(0, 1),
    )
    q[3], k[650], k[651], q[5] = 9.0, 9.0, 9.0, 0.0
    q[7] = -9.0  # against key 650 far below all others
    made = attend_seen(q, k, v, (700,), 1.0)
    torch.testing.assert_close(made.double(), seen(q, k, v, (700,), 1.0), atol=2e-5, rtol=0)
    torch.testing.assert_close(made[3], (v[650] + v[651]) / 2, atol=2e-5, rtol=0)
    torch.testing.assert_close(made[5], v.mean(0), atol=2e-6, rtol=0)


def test_what_is_no_number_stays_in_its_segment(isa) -> None:
    q, k, v = qkv(90, 2, 16)
    before = attend_seen(q, k, v, (30, 30, 30), 0.25)
    k[40, 1, 3] = float("nan")
    after = attend_seen(q, k, v, (30, 30, 30), 0.25)
    assert after[30:60, 1].isnan().all()
    assert (
        torch.equal(after[:30], before[:30]) and torch.equal(after[60:], before[60:]) and torch.equal(after[:, 0], before[:, 0])
    )


def test_a_query_depends_on_its_segment_alone(isa, threads) -> None:
    lengths = (1030, 20, 300)
    q, k, v = qkv(sum(lengths), 2, 24)
    threads(1)
    whole = attend_seen(q, k, v, lengths, 0.2)
    at = 0
    for n in lengths:
        rows = slice(at, at + n)
        assert torch.equal(attend_seen(q[rows], k[rows], v[rows], (n,), 0.2), whole[rows])
        at += n
    threads(3)  # a head of the first segment is shared
    assert torch.equal(attend_seen(q, k, v, lengths, 0.2), whole)


def test_segments_must_hold_all_tokens() -> None:
    q, k, v = qkv(9, 1, 8)
    for lengths in ((4, 4), (10,), (-1, 10)):
        with pytest.raises(TensorError, match="segments of"):
            attend_seen(q, k, v, lengths, 1.0)
    assert ctypes.sizeof(compiled.Seen) == 104


@vectors
def test_attention_of_towers_takes_it_where_it_may(monkeypatch) -> None:
    q, k, v = qkv(50, 2, 16)
    with torch.no_grad():
        assert torch.equal(attend_packed(q, k, v, (20, 30), False, 0.25), attend_seen(q, k, v, (20, 30), 0.25))
        shared = attend_packed(q, k[:, :1], v[:, :1], (50,), False, 0.25)  # key heads fewer than query heads
        torch.testing.assert_close(
            shared.double(), seen(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), (50,), 0.25), atol=3e-6, rtol=0
        )
        monkeypatch.setattr(fused.matrix, "attend_seen", lambda *args: pytest.fail("it computes"))
        for kind, causal, x in (
            ("eager", False, q),
            ("sdpa", True, q),
            ("sdpa", False, q.double()),
            ("sdpa", False, q.bfloat16()),
        ):
            attend_packed(x, k.to(x.dtype), v.to(x.dtype), (20, 30), causal, 0.25, kind)
    attend_packed(q.requires_grad_(), k, v, (20, 30), False, 0.25).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("count", [0, 1, 15, 16, 1000, 70001])
@pytest.mark.parametrize("quick", [True, False])
def test_gelu(isa, count, quick, threads) -> None:
    threads(2)
    x = noise(count + 2) * 4
    if count > 900:
        x[3:9] = torch.tensor([0.0, 60.0, -60.0, 1e20, -1e20, float("nan")])
    wide = x[1:-1].double()
    expected = wide * torch.sigmoid(1.702 * wide) if quick else F.gelu(wide, approximate="tanh")
    made = x.clone()
    gelu(made[1:-1], quick)
    assert torch.equal(made[[0, -1]], x[[0, -1]])
    torch.testing.assert_close(made[1:-1].double(), expected, atol=2e-6, rtol=3e-6, equal_nan=True)


@vectors
@pytest.mark.parametrize("kind", ["tanh", "quick", "none"])
def test_mlp_is_the_same_where_gelu_lies_in_place(kind) -> None:
    made, x = MLP(12, 40, 8, kind), noise(5, 12)
    expected = made(x)  # gradients are wanted: as it is written
    assert expected.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected.detach(), atol=1e-6, rtol=1e-6)
        kept: list[torch.Tensor] = []
        made.fc1.register_forward_hook(lambda module, given, out: kept.append(out))
        made(x)
        assert torch.equal(kept[0], made.fc1(x))  # what is hooked keeps what it saw
        wide = noise(4, 6)
        assert fused.gelu_in_place(wide, torch.nn.Identity(), kind) == (kind != "none")
        torch.testing.assert_close(wide, noise(4, 6) if kind == "none" else written(noise(4, 6), kind), atol=1e-6, rtol=1e-6)
        assert not fused.gelu_in_place(noise(4, 6).T, torch.nn.Identity(), kind)
