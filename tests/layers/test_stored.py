"""Matrices as checkpoints store them: the compiled kernels beside the plain product of what the numbers mean.

R rows, C columns, G groups, n rows of x.
"""

from __future__ import annotations

import copy

import pytest
import torch

from mirada.adapt.packed import Packed, PackedRows, PackedStack, as_stored, join_halves, to_matrix
from mirada.layers import linear as layer
from mirada.layers.kernels import library as compiled
from mirada.layers.kernels.matrix import Format, Matrix, kernels, product
from mirada.layers.linear import linear

LIBRARY = compiled.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"no compiled kernels: {compiled.status().why}")
ISAS = ("scalar", "avx2", "avx512")
SHAPES = [(16, 32), (1, 9), (5, 7), (37, 161), (130, 256), (66, 70)]
FORMS = {
    f"{name} of {group or 'all'}{' with zeros' if zeros else ''}": (bits, group, zeros)
    for name, bits in (("int4", 4), ("int8", 8))
    for group in (0, 5, 24, 32, 48)
    for zeros in (False, True)
} | {f"fp8 in blocks of {block}": (0, block, False) for block in (0, 16, 48, 128)}


@pytest.fixture(params=ISAS[: LIBRARY.mr_best_isa() + 1] if LIBRARY is not None else ["none"])
def isa(request):
    """Each set of kernels that this processor has, one by one."""
    assert kernels().mr_set_isa(ISAS.index(request.param)) == ISAS.index(request.param)
    yield request.param
    kernels().mr_set_isa(-1)


def close(made: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> bool:
    return bool((made.double() - expected).abs().amax() / expected.abs().amax().clamp_min(1e-30) < tolerance)


def packed(
    shape: tuple[int, int], bits: int, group: int, zeros: bool, scales: torch.dtype = torch.float16
) -> tuple[Packed, torch.Tensor]:
    """A matrix of any numbers (the seed is its shape), and what it means: float32, one rounding a weight."""
    random = torch.Generator().manual_seed(sum(shape) + group + bits)
    rows, columns = shape
    width = group or columns
    count, at = -(-columns // width), torch.arange(columns) // width
    if not bits:
        values = (torch.randn(shape, generator=random) * 30).to(torch.float8_e4m3fn)
        block = group or rows
        scale = torch.rand(-(-rows // block), count, generator=random) * 0.01 + 1e-3
        meant = values.float() * scale[torch.arange(rows) // block][:, at]
        return Packed(values, scale, columns, 8, group, row_block=block), meant
    whole = torch.randint(0, 1 << bits, shape, generator=random, dtype=torch.uint8)
    zero = torch.randint(0, 1 << bits, (rows, count), generator=random, dtype=torch.uint8)
    scale = (torch.rand(rows, count, generator=random) * 0.01 + 1e-3).to(scales)
    middle = zero.float()[:, at] if zeros else float(1 << (bits - 1))
    meant = (whole.float() - middle) * scale.float()[:, at]
    return Packed(whole if bits == 8 else join_halves(whole), scale, columns, bits, group, zero if zeros else None), meant


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_stored_and_x_is_not_rounded(isa, form):
    for shape in SHAPES:
        given, meant = packed(shape, *FORMS[form])
        matrix = as_stored(given)
        assert matrix is not None and torch.equal(matrix.widen(), meant) and torch.equal(given.widen(), meant)
        bias, x = torch.randn(shape[0]), torch.randn(13, shape[1])
        x[3] *= 300  # a row that is large changes no other
        exact = x.double() @ meant.double().T
        made = product(matrix, x)
        most = x.double().abs() @ meant.double().abs().T  # what the roundings of a sum are measured by
        assert bool(((made - exact).abs() <= 1e-6 * most).all()), shape
        for n in (1, 2, 6, 8):
            assert torch.equal(product(matrix, x[:n]), made[:n]), n
        matrix.bias = bias
        matrix._struct = None
        assert bool(((product(matrix, x[:3]) - exact[:3] - bias).abs() <= 1e-6 * (most[:3] + bias.abs())).all())
        part = matrix.part(1, shape[0])
        assert part is None or torch.equal(part.widen(), meant[1:])


def test_every_e4m3_number(isa):
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    numbers = every[(every & 127) != 127].view(torch.float8_e4m3fn)[None]
    matrix = as_stored(Packed(numbers, torch.ones(1, 1), 254))
    assert matrix is not None and torch.equal(matrix.widen(), numbers.float())


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_of_every_type(scales):
    given, meant = packed((20, 70), 8, 24, True, scales)
    rows = PackedRows(20, 70)
    rows.fill(given, "cpu")
    x = torch.randn(2, 3, 70)
    assert close(rows(x).flatten(0, 1), x.double().flatten(0, 1) @ meant.double().T)


def test_many_rows_go_by_tiles_and_are_the_same_product(monkeypatch):
    given, meant = packed((130, 256), 4, 48, True)
    matrix, x = as_stored(given), torch.randn(layer.FEW_STORED + 1, 256)
    assert matrix is not None
    monkeypatch.setattr(layer, "TILE_BYTES", 4 * 256 * 50)
    taken: list[int] = []
    true = Matrix.widen_into
    monkeypatch.setattr(Matrix, "widen_into", lambda *given: taken.append(len(given[1])) or true(*given))
    with torch.no_grad():
        few, many = linear(x[:-1], matrix, torch.ones(130)), linear(x, matrix, torch.ones(130))
    assert taken == [50, 50, 30] and close(few, (x[:-1].double() @ meant.double().T) + 1, 5e-6)
    assert close(many, x.double() @ meant.double().T + 1, 5e-6)


def test_gradients_reach_the_input():
    given, meant = packed((24, 40), 0, 16, False)
    rows = PackedRows(24, 40)
    rows.fill(given, "cpu")
    x = torch.randn(3, 40, requires_grad=True)
    rows(x).sum().backward()
    assert x.grad is not None and close(x.grad, meant.double().sum(0).expand(3, -1))


def test_columns_in_any_order_are_gathered_once_and_put_back():
    given, meant = packed((24, 96), 4, 24, True)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    whole = torch.stack((given.values & 15, given.values >> 4), -1).flatten(1)
    shuffled = Packed(join_halves(whole[:, order]), given.scales, 96, 4, 24, given.zeros, (order // 24).to(torch.int32))
    rows = PackedRows(24, 96)
    rows.fill(shuffled, "cpu")
    x = torch.randn(5, 96)
    assert rows.read() is not None and torch.equal(rows.weight, meant[:, order])
    assert close(rows(x), x.double() @ meant[:, order].double().T)
    assert torch.equal(copy.deepcopy(rows)(x), rows(x)) and torch.equal(rows.to(torch.float64)(x), rows(x))
    stack = PackedStack([rows], (1, 24, 96), torch.float32)
    stack.join()
    assert stack.joined is None and close(stack.product(0, x), x.double() @ meant[:, order].double().T)


def test_a_stack_hands_its_matrices_to_the_kernels_for_experts():
    given, meant = packed((24, 40), 8, 5, True)
    rows = PackedRows(24, 40)
    rows.fill(given, "cpu")
    stack = PackedStack([rows, rows], (2, 24, 40), torch.float32)
    held = stack.compiled_matrices(1)
    assert held is not None and [m.format for m in held] == [Format.STORED8]
    x = torch.randn(2, 40)
    assert close(stack.product(1, x), x.double() @ meant.double().T)


def test_zeros_in_the_middle_are_no_zeros():
    """GPTQ stores them for symmetric integers too."""
    given, _ = packed((16, 64), 8, 32, True)
    assert given.zeros is not None and to_matrix(given) is None
    given.zeros.fill_(128)
    matrix = to_matrix(given)
    assert matrix is not None and matrix.format == Format.INT8 and torch.equal(matrix.widen(), given.widen())
    given.zeros[3, 1] = 127
    assert to_matrix(given) is None


def test_without_kernels_it_is_widened_as_before(monkeypatch):
    monkeypatch.setattr(compiled, "_loaded", lambda: (None, compiled.Status("none", "a test")))
    given, meant = packed((24, 40), 8, 5, True)
    rows = PackedRows(24, 40)
    rows.fill(given, "cpu")
    assert rows.read() is None and as_stored(given) is None
    assert close(rows(torch.eye(40)), meant.T.double())
