"""Precision modes: their names, the plain rounding beside the compiled one, and int8 by torch's own kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mirada.adapt import fbgemm
from mirada.adapt.fbgemm import Int8Linear
from mirada.adapt.mode import Mode, parse, quantise
from mirada.adapt.packed import Packed, PackedRows, PackedStack, sort_columns, to_matrix
from mirada.errors import NotAvailable, SettingsError, TensorError
from mirada.layers.kernels import library as compiled
from mirada.layers.kernels.matrix import Format, Matrix

needs_library = pytest.mark.skipif(compiled.library() is None, reason=f"no compiled kernels: {compiled.status().why}")
needs_fbgemm = pytest.mark.skipif(not fbgemm.available(), reason="this torch has no fbgemm")


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (None, None),
        ("exact", Mode("exact")),
        ("int8", Mode("int8", 128)),
        ("int8:0", Mode("int8")),
        ("int4", Mode("int4", 32)),
        ("int4:64", Mode("int4", 64)),
        (Mode("int4", 64), Mode("int4", 64)),
    ],
)
def test_names(given, made):
    assert parse(given) == made
    assert made is None or parse(str(made)) == made


@pytest.mark.parametrize("given", ["int5", "int4:48", "int4:0", "exact:0", "int8:", "INT8", ""])
def test_names_that_are_refused(given):
    with pytest.raises(SettingsError, match="quant="):
        parse(given)


def test_flags_of_other_software():
    assert parse(None, load_in_8bit=True) == parse("int8") and parse(None, load_in_4bit=True) == parse("int4")
    for flags in ({"quant": "int8", "load_in_8bit": True}, {"quant": None, "load_in_8bit": True, "load_in_4bit": True}):
        with pytest.raises(SettingsError, match="more than one"):
            parse(**flags)


@needs_library
@pytest.mark.parametrize("shape", [(40, 128), (7, 100), (3, 33)], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 32), (8, 128), (4, 32), (4, 64), (4, 128)])
def test_the_compiled_rounding_is_the_plain_one(bits, group, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[0], 1) * 0.1
    weight[1] = 0
    plain = quantise(weight, bits, group)
    matrix = Matrix.empty(Format.INT8 if bits == 8 else Format.INT4, *shape, group)
    matrix.fill(0, weight)
    made = matrix.widen()
    if bits == 8:  # one scale, no choice: equal to the last bit
        assert torch.equal(made, plain.widen())
    else:  # sums of another order may choose another scale of equal worth
        assert ((made - weight).norm() / (plain.widen() - weight).norm() - 1).abs() < 1e-3
        assert (made != plain.widen()).float().mean() < 0.02
    assert (made[1] == 0).all()


@pytest.mark.parametrize(("bits", "group", "most"), [(8, 128, 0.008), (8, 0, 0.012), (4, 32, 0.09), (4, 64, 0.1)])
def test_how_far_rounding_moves_a_normal_matrix(bits, group, most):
    torch.manual_seed(0)
    weight = torch.randn(64, 1024)
    assert (quantise(weight, bits, group).widen() - weight).norm() / weight.norm() < most


def test_the_search_for_a_scale_pays():
    torch.manual_seed(0)
    weight = torch.randn(64, 1024)
    most = weight.view(64, -1, 32)
    most = most.gather(-1, most.abs().argmax(-1, keepdim=True))
    simple = ((weight.view(64, -1, 32) / (most / -8)).round().clamp(-8, 7) * (most / -8)).view_as(weight)
    assert (quantise(weight, 4, 32).widen() - weight).norm() < 0.95 * (simple - weight).norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_no_numbers_are_refused(bits):
    weight = torch.randn(4, 64)
    weight[2, 2] = float("nan")
    with pytest.raises(TensorError, match="not finite"):
        quantise(weight, bits, 32)


@needs_fbgemm
class TestFbgemm:
    @staticmethod
    def filled(rows: int, columns: int) -> Int8Linear:
        torch.manual_seed(0)
        made = Int8Linear(rows, columns, torch.nn.Parameter(torch.randn(rows)))
        made.fill(0, torch.randn(rows // 2, columns))
        made.fill(rows // 2, torch.randn(rows - rows // 2, columns).bfloat16())
        return made

    def test_it_computes_what_is_stored(self):
        module = self.filled(48, 160)
        with torch.no_grad():
            x = torch.randn(2, 7, 160)
            expected = torch.nn.functional.linear(x, module.weight, module.bias)
            assert (module(x) - expected).norm() / expected.norm() < 0.02
            assert module(x.bfloat16()).dtype == torch.bfloat16
            assert torch.equal(module(torch.zeros(1, 160))[0], module.bias)

    def test_batch_mates_change_nothing(self):
        """A token of three hundred times the size beside the others: they keep their results."""
        module = self.filled(48, 160)
        with torch.no_grad():
            x = torch.randn(9, 160)
            alone = torch.cat([module(row[None]) for row in x])
            x[4] *= 300
            made = module(x)
            others = [i for i in range(9) if i != 4]
            assert torch.allclose(made[others], alone[others], atol=1e-5)

    def test_gradients_and_moves(self):
        module = self.filled(16, 64)
        x = torch.randn(3, 64, requires_grad=True)
        module(x).sum().backward()
        assert x.grad is not None and torch.allclose(x.grad[0], module.weight.sum(0), atol=1e-4)
        with pytest.raises(NotAvailable, match="stay on the CPU"):
            module.to("meta")
        with pytest.raises(TensorError, match="not finite"):
            module.fill(0, torch.full((1, 64), float("inf")))


def packed(bits: int, rows: int, columns: int, group: int, zeros: bool, dtype: torch.dtype) -> Packed:
    groups = -(-columns // group) if group else 1
    values = torch.randint(0, 256, (rows, columns if bits == 8 else columns // 2), dtype=torch.uint8)
    held = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8) if zeros else None
    return Packed(values, (torch.rand(rows, groups) + 0.1).to(dtype), columns, bits, group, held)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "group", "zeros"), [(4, 32, False), (4, 64, True), (4, 128, True), (4, 0, True), (8, 32, False), (8, 0, False)]
)
def test_packed_checkpoints_take_the_compiled_form_with_the_same_numbers(bits, group, zeros, dtype):
    torch.manual_seed(0)
    form = packed(bits, 40, 256, group, zeros, dtype)
    rows = PackedRows(40, 256, compiled=True)
    rows.fill(form, "cpu")
    assert rows.matrix is not None
    assert torch.equal(rows.weight, form.widen())
    x = torch.randn(3, 256)
    with torch.no_grad():
        expected = x @ form.widen().T
        assert (rows(x) - expected).norm() / expected.norm() < 0.02
    with pytest.raises(NotAvailable):
        rows.to("meta")


@needs_library
@needs_library
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [256, 224])
def test_columns_in_another_order_are_sorted_once_and_x_with_them(bits, columns):
    """act-order: the same numbers as the widened reference, and the product but for the rounding of activations."""
    plain = packed(bits, 40, columns, 64, bits == 4, torch.float16)
    groups = (torch.arange(columns) // 64)[torch.randperm(columns)].int()
    given = replace(plain, groups=groups)
    rows, reference = PackedRows(40, columns, compiled=True), PackedRows(40, columns)
    rows.fill(given, "cpu")
    reference.fill(given, "cpu")
    assert rows.matrix is not None and rows.order is not None and reference.matrix is None
    torch.testing.assert_close(rows.weight, given.widen(), rtol=1e-6, atol=0)
    x = torch.randn(3, 5, columns)
    expected = reference(x)
    with torch.no_grad():
        assert float((rows(x) - expected).norm() / expected.norm()) < 0.01
        assert torch.equal(rows(x[:, :1]), rows(x)[:, :1])
    stack = PackedStack([rows], (1, 40, columns), torch.float32)
    assert stack.compiled_matrices(0) is None  # they would be multiplied by x as it comes
    with torch.no_grad():
        assert torch.equal(stack.product(0, x), rows(x))
    x.requires_grad_()
    torch.testing.assert_close(rows(x), expected, rtol=1e-3, atol=1e-2)
    (made,) = torch.autograd.grad(rows(x).sum(), x)
    torch.testing.assert_close(made, given.widen().sum(0).expand_as(x), rtol=1e-3, atol=1e-2)


def test_forms_that_have_no_compiled_one():
    whole = packed(4, 16, 128, 64, False, torch.float16)
    assert to_matrix(whole) is not None
    reordered = Packed(whole.values, whole.scales, 128, 4, 64, groups=torch.randint(0, 2, (128,), dtype=torch.int32))
    assert to_matrix(reordered) is None and sort_columns(reordered) == (reordered, None)  # groups of many sizes
    assert to_matrix(packed(4, 16, 96, 48, False, torch.float16)) is None
    assert to_matrix(packed(8, 16, 128, 64, True, torch.float16)) is None
    assert to_matrix(Packed(torch.zeros(16, 128).to(torch.float8_e4m3fn), torch.ones(1, 1), 128, row_block=128)) is None
