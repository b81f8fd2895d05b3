"""The compiled CPU kernels beside what they compute, written plainly. R rows, C columns, n rows of x."""

from __future__ import annotations

import ctypes

import pytest
import torch

from mirada.errors import NotAvailable, SettingsError, TensorError
from mirada.layers import linear as layer
from mirada.layers.kernels import library as compiled
from mirada.layers.kernels.matrix import BLOCK, Format, Matrix, kernels, product
from mirada.layers.linear import MatrixLinear, MatrixStack, linear

LIBRARY = compiled.library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"no compiled kernels: {compiled.status().why}")
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2}
HERE = [name for name, number in ISAS.items() if LIBRARY is not None and number <= LIBRARY.mr_best_isa()]
SHAPES = [(16, 32), (48, 128), (1, 32), (17, 96), (40, 33), (5, 7), (31, 161), (24, 84), (9, 95), (130, 256)]
INTEGERS = [(Format.INT8, 0), (Format.INT8, 32), (Format.INT8, 128), (Format.INT4, 32), (Format.INT4, 64), (Format.INT4, 0)]


@pytest.fixture(params=HERE or [pytest.param("none", marks=needs_library)])
def isa(request):
    """Each set of kernels that this processor has, one by one."""
    lib = kernels()
    assert lib.mr_set_isa(ISAS[request.param]) == ISAS[request.param]
    yield request.param
    lib.mr_set_isa(-1)


def filled(format: Format, group: int, weight: torch.Tensor) -> Matrix:
    made = Matrix.empty(format, *weight.shape, group)
    made.fill(0, weight)
    return made


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x as the kernels see it in front of integers: 8 bits in blocks of 32, float64."""
    n, columns = x.shape
    blocks = torch.nn.functional.pad(x, (0, -columns % BLOCK)).view(n, -1, BLOCK)
    most = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(most < 1e-30, torch.zeros_like(most), 127 / most)
    return ((blocks * inverse).round().double() * (most / 127).double()).flatten(1)[:, :columns]


def close(made: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> bool:
    scale = expected.abs().amax().clamp_min(1e-30)
    return bool(((made.double() - expected).abs().amax() / scale) < tolerance)


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("format", "group"), INTEGERS)
def test_integers_are_the_product_of_what_is_stored(isa, format, group, shape):
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape) * 0.05
    matrix = filled(format, group, weight)
    bias = torch.randn(shape[0])
    with_bias = Matrix(format, *shape, group, matrix.values, matrix.scales, bias=bias)
    for n in (1, 2, 3, 5, 8, 12, 13, 30):
        x = torch.randn(n, shape[1])
        expected = rounded(x) @ matrix.widen().double().T
        assert close(product(matrix, x), expected), n
        assert close(product(with_bias, x), expected + bias), n


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats(isa, dtype, shape):
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0])
    matrix = Matrix.of(weight, bias)
    for n in (1, 2, 3, 4, 7, 8, 9, 17):
        x = torch.randn(n, shape[1])
        assert close(product(matrix, x), x.double() @ weight.double().T + bias), n


@needs_library
@pytest.mark.parametrize("shape", [*SHAPES[:6], (70, 1100), (33, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_in_front_of_many_rows(isa, dtype, shape):
    """Another order of sums, the same for every row, batch and number of threads."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(shape).to(dtype), torch.randn(shape[0]), torch.randn(150, shape[1])
    matrix = Matrix.of(weight, bias)
    made = product(matrix, x, many=True)
    assert close(made, x.double() @ weight.double().T + bias)
    for n in (1, 6, 11, 13, 30):
        assert torch.equal(product(matrix, x[:n], many=True), made[:n]), n
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4 - before % 2)
        assert torch.equal(product(matrix, x, many=True), made)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("status", ["avx2", "scalar"])
def test_tiles_are_widened_only_where_no_kernel_is_quicker(monkeypatch, status):
    weight, bias = torch.randn(700, 1024).bfloat16(), torch.randn(700)
    matrix, x = Matrix.of(weight), torch.randn(2, 10, 1024)
    monkeypatch.setattr(compiled, "_loaded", lambda: (LIBRARY, compiled.Status(status, "a test")))
    taken: list[bool] = []
    true = layer._by_tiles
    monkeypatch.setattr(layer, "_by_tiles", lambda *given: taken.append(True) or true(*given))
    with torch.no_grad():
        made = linear(x, matrix, bias)
    assert close(made, x.double() @ weight.double().T + bias, 3e-6) and made.shape == (2, 10, 700)
    assert taken == ([True] if status == "scalar" else [])


@needs_library
@pytest.mark.parametrize(("format", "group"), [*INTEGERS, (Format.F32, 0), (Format.BF16, 0)])
def test_a_row_has_one_result_whatever_its_batch(isa, format, group):
    torch.manual_seed(1)
    weight = torch.randn(50, 180)  # 20 columns in the last block: what lies behind them is another row's
    floats = {Format.F32: torch.float32, Format.BF16: torch.bfloat16}
    matrix = Matrix.of(weight.to(floats[format])) if format in floats else filled(format, group, weight)
    x = torch.randn(40, 180)
    x[3] *= 300  # a row that is large changes no other
    alone = torch.cat([product(matrix, row[None]) for row in x])
    for n in (2, 4, 6, 8, 11, 12, 13, 24, 25, 40):
        assert torch.equal(product(matrix, x[:n]), alone[:n]), n


@needs_library
def test_an_outlier_stays_in_its_block(isa):
    """One channel a hundred times larger: the other blocks are as fine as before."""
    torch.manual_seed(2)
    weight, x = torch.randn(32, 512), torch.randn(4, 512)
    matrix = filled(Format.INT8, 128, weight)
    x[:, 5] *= 100
    blocks = torch.zeros_like(x)
    blocks[:, BLOCK:] = x[:, BLOCK:]
    without = matrix.widen().double()
    error = product(matrix, x).double() - product(matrix, x - blocks).double() - blocks.double() @ without.T
    assert error.norm() / (blocks.double() @ without.T).norm() < 0.01
    tensorwise = (x / (x.abs().max() / 127)).round() * (x.abs().max() / 127)  # what one scale for all would do
    assert (tensorwise.double()[:, BLOCK:] - x[:, BLOCK:]).norm() > 20 * (rounded(x)[:, BLOCK:] - x[:, BLOCK:]).norm()


@needs_library
@pytest.mark.parametrize("value", [-128, -127, 127])
def test_no_sum_overflows_at_the_ends_of_the_range(isa, value):
    """All weights and activations at an end: 16-bit sums of a careless kernel would wrap or stick."""
    columns = 256
    eight = Matrix.empty(Format.INT8, 16, columns, 32)
    eight.pack(0, torch.full((16, columns), value + 128, dtype=torch.uint8), torch.ones(16, columns // 32))
    four = Matrix.empty(Format.INT4, 16, columns, 32, zeros=True)
    four.pack(
        0, torch.full((16, columns // 2), 0xFF, dtype=torch.uint8), torch.ones(16, 8), torch.zeros(16, 8, dtype=torch.uint8)
    )
    for sign in (1.0, -1.0):
        x = torch.full((3, columns), sign * 127)
        assert product(eight, x).tolist() == [[sign * 127 * value * columns] * 16] * 3
        assert product(four, x).tolist() == [[sign * 127 * 15 * columns] * 16] * 3


@needs_library
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(16, 64), (37, 96), (20, 70)], ids=str)
def test_zero_points(isa, shape, wide):
    torch.manual_seed(3)
    rows, columns = shape
    groups = -(-columns // 32)
    values = torch.randint(0, 256, (rows, -(-columns // 2)), dtype=torch.uint8)
    if columns % 2:
        values[:, -1] &= 15
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8)
    scales = torch.rand(rows, groups) + 0.5 if wide else (torch.rand(rows, groups) + 0.5).half().float()
    matrix = Matrix.empty(Format.INT4, rows, columns, 32, wide=wide, zeros=True)
    matrix.pack(0, values, scales, zeros)
    back = matrix.unpack()
    assert all(torch.equal(a, b) for a, b in zip(back, (values, scales, zeros), strict=True))  # pyright: ignore
    integers = torch.stack((values & 15, values >> 4), -1).flatten(1)[:, :columns].double()
    at = torch.arange(columns) // 32
    weight = (integers - zeros.double()[:, at]) * scales.double()[:, at]
    assert torch.equal(matrix.widen().double(), weight.float().double())
    x = torch.randn(5, columns)
    assert close(product(matrix, x), rounded(x) @ weight.T)


@needs_library
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_visible(isa, bad):
    x = torch.randn(3, 64)
    x[1, 40] = bad
    for format, group in ((Format.INT8, 32), (Format.INT4, 32)):
        made = product(filled(format, group, torch.randn(16, 64)), x)
        assert not made[1].isfinite().any() and made[0].isfinite().all() and made[2].isfinite().all()


@needs_library
def test_zeros_and_the_smallest_numbers(isa):
    matrix = filled(Format.INT8, 32, torch.randn(16, 64))
    x = torch.zeros(3, 64)
    x[1], x[2, 0] = 1e-40, 1e-35
    assert product(matrix, x).abs().max() < 1e-30
    assert product(filled(Format.INT4, 32, torch.zeros(16, 64)), torch.randn(2, 64)).abs().max() == 0


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_come_in_pieces(dtype):
    weight = torch.randn(50, 96).to(dtype)
    for format, group in INTEGERS:
        whole = filled(format, group, weight)
        pieces = Matrix.empty(format, 50, 96, group)
        for begin, end in ((0, 7), (7, 31), (31, 50)):
            pieces.fill(begin, weight[begin:end])
        assert torch.equal(pieces.values, whole.values) and torch.equal(pieces.scales, whole.scales)  # pyright: ignore


@needs_library
def test_weights_that_are_refused():
    matrix = Matrix.empty(Format.INT8, 16, 64, 32)
    for bad in (float("nan"), float("inf"), 1e6):
        weight = torch.randn(16, 64)
        weight[3, 3] = bad
        with pytest.raises(TensorError, match="not finite"):
            matrix.fill(0, weight)
    with pytest.raises(TensorError, match="groups of 48"):
        Matrix.empty(Format.INT4, 16, 96, 48)
    with pytest.raises(TensorError, match="row by row"):
        Matrix.of(torch.randn(4, 8).T)


@needs_library
def test_a_linear_of_a_matrix_has_gradients_in_x():
    matrix = filled(Format.INT4, 32, torch.randn(24, 64))
    module = MatrixLinear(matrix, torch.nn.Parameter(torch.randn(24)))
    x = torch.randn(2, 3, 64, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, matrix.widen().sum(0).expand_as(x), atol=1e-5)
    with torch.no_grad():
        assert module(x).shape == (2, 3, 24) and module(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(linear(x, matrix, module.bias), module(x))
    with pytest.raises(NotAvailable, match="stay on the CPU"):
        module.to("meta")
    with pytest.raises(NotAvailable, match="stay on the CPU"):
        MatrixStack([matrix]).to("meta")


@needs_library
def test_threads_share_a_product():
    weight = torch.randn(300, 512)
    matrix, x = filled(Format.INT8, 128, weight), torch.randn(20, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = product(matrix, x)
        torch.set_num_threads(3)
        assert torch.equal(product(matrix, x), alone)
    finally:
        torch.set_num_threads(before)


def test_bfloat16_without_compiled_kernels(monkeypatch):
    """Tiles are widened, whether there are kernels or not, and x is never rounded."""
    monkeypatch.setattr(compiled, "_loaded", lambda: (None, compiled.Status("none", "a test", "end it")))
    weight = torch.randn(700, 1024).bfloat16()
    matrix = Matrix(Format.BF16, 700, 1024, 0, weight)
    with torch.no_grad():
        for n in (1, 20):
            x = torch.randn(n, 1024)
            assert close(linear(x, matrix), x.double() @ weight.double().T, 3e-6)
    with pytest.raises(NotAvailable, match="a test") as caught:
        product(matrix, torch.randn(1, 1024))
    assert caught.value.fix == "end it"


@pytest.mark.parametrize("wanted", ["off", "sse9", *HERE])
def test_the_setting(monkeypatch, wanted):
    monkeypatch.setenv(compiled.SETTING, wanted)
    compiled._loaded.cache_clear()
    try:
        if wanted == "sse9":
            with pytest.raises(SettingsError, match="sse9"):
                compiled.library()
        else:
            assert compiled.status().name == ("none" if wanted == "off" else wanted)
            assert (compiled.library() is None) == (wanted == "off")
    finally:
        monkeypatch.undo()
        compiled._loaded.cache_clear()
        if LIBRARY is not None:
            kernels().mr_set_isa(-1)


@needs_library
def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "VERSION", 999)
    compiled._loaded.cache_clear()
    try:
        assert compiled.library() is None
        assert "is of version" in compiled.status().why and "pip install" in compiled.status().fix
    finally:
        monkeypatch.undo()
        compiled._loaded.cache_clear()


@needs_library
def test_a_checksum_sees_every_byte():
    lib = kernels()
    data = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    whole = lib.mr_checksum(data.data_ptr(), 1000)
    for at in (0, 63, 64, 500, 959, 960, 999):
        data[at] ^= 1
        assert lib.mr_checksum(data.data_ptr(), 1000) != whole
        data[at] ^= 1
    assert lib.mr_checksum(data.data_ptr(), 1000) == whole != lib.mr_checksum(data.data_ptr(), 999)
    assert ctypes.sizeof(compiled.Matrix) == 56
