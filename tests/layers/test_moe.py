"""The router against a plain loop, and experts against one token at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.layers import linear as products
from mirada.layers.kernels.library import library
from mirada.layers.kernels.matrix import Format, Matrix
from mirada.layers.linear import Linear, MatrixStack, linear
from mirada.layers.moe import Experts, MoE, Router, Routing

ROUTINGS = (
    Routing(8, 3, scale=2.446),
    Routing(16, 4, groups=4, kept=2, scale=2.5),
    Routing(12, 2, groups=6, kept=1, normalise=False),
    Routing(6, 6),
)


def router(routing: Routing, seed: int, dim: int = 10) -> Router:
    random = torch.Generator().manual_seed(seed)
    made = Router(dim, routing)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=random))
        # Wide and mostly negative: what lies outside the kept groups must lose to any of these.
        made.bias.copy_(torch.randn(routing.experts, generator=random) - 1.5)
    return made


def plainly(module: Router, token: torch.Tensor) -> dict[int, float]:
    """Expert -> weight of one token, step by step."""
    r = module.routing
    scores = [torch.sigmoid(token.double() @ w.double()).item() for w in module.weight]
    biased = [s + b for s, b in zip(scores, module.bias.tolist(), strict=True)]
    size = r.experts // r.groups
    members = [range(g * size, (g + 1) * size) for g in range(r.groups)]
    ranked = sorted(range(r.groups), key=lambda g: -sum(sorted((biased[e] for e in members[g]), reverse=True)[:2]))
    within = [e for g in ranked[: r.kept] for e in members[g]]
    best = sorted(within, key=lambda e: -biased[e])[: r.top_k]
    total = sum(scores[e] for e in best) if r.normalise else 1.0
    return {e: scores[e] / total * r.scale for e in best}


@torch.no_grad()
@pytest.mark.parametrize("routing", ROUTINGS)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15)
def test_choices_and_weights_equal_the_plain_rule(routing: Routing, seed: int) -> None:
    module = router(routing, seed)
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed + 1))
    chosen, weights = module(x)
    assert weights.dtype == torch.float32
    for token, experts, shares in zip(x, chosen.tolist(), weights.tolist(), strict=True):
        wanted = plainly(module, token)
        assert sorted(experts) == sorted(wanted)
        for expert, share in zip(experts, shares, strict=True):
            assert share == pytest.approx(wanted[expert], rel=1e-5)


def test_the_bias_chooses_and_never_weighs() -> None:
    module = router(Routing(8, 2), 0)
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        module.bias.fill_(0.0)[4] = 50.0
    chosen, weights = module(x)
    assert (chosen == 4).any(1).all()
    assert torch.allclose(weights.sum(1), torch.ones(5))
    weights[:, 0].sum().backward()
    assert module.weight.grad is not None and module.bias.grad is None and not module.bias.requires_grad


@pytest.mark.parametrize("narrow", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_a_router_is_never_narrowed(narrow) -> None:
    block = MoE(10, 6, 1, Routing(8, 2))
    weight = block.router.weight.detach().clone()
    narrow(block)
    assert block.experts.down.dtype.itemsize == 2
    assert block.router.weight.dtype == block.router.bias.dtype == torch.float32
    assert torch.equal(block.router.weight, weight)
    assert block(torch.randn(3, 10).to(block.experts.down.dtype)).dtype == block.experts.down.dtype
    assert block.double().router.weight.dtype == torch.float64


def test_a_router_moves_with_its_model() -> None:
    with torch.device("meta"):
        block = MoE(10, 6, 1, Routing(8, 2)).bfloat16()
    assert block.router.weight.dtype == torch.float32
    block.to_empty(device="cpu")
    assert block.router.weight.device.type == "cpu" and block.router.weight.dtype == torch.float32


def drawn(seed: int, tokens: int, experts: int, top_k: int, dim: int = 12, inner: int = 5):
    random = torch.Generator().manual_seed(seed)
    module = Experts(experts, dim, inner)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=random) / p.shape[-1] ** 0.5)
    x = torch.randn(tokens, dim, generator=random)
    chosen = torch.stack([torch.randperm(experts, generator=random)[:top_k] for _ in range(tokens)])
    return module, x, chosen, torch.rand(tokens, top_k, generator=random)


def one_at_a_time(module: Experts, x, chosen, weights) -> torch.Tensor:
    rows = []
    for token, experts, shares in zip(x, chosen.tolist(), weights, strict=True):
        row = torch.zeros_like(token)
        for expert, share in zip(experts, shares, strict=True):
            gate, up = (module.gate_up[expert] @ token).chunk(2)
            row = row + share * (module.down[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@torch.no_grad()
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 40), experts=st.integers(1, 9))
@settings(max_examples=25)
def test_experts_equal_one_token_at_a_time(seed: int, tokens: int, experts: int) -> None:
    given_ = drawn(seed, tokens, experts, min(experts, 1 + seed % 4))
    torch.testing.assert_close(given_[0](*given_[1:]), one_at_a_time(*given_), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_company_changes_nothing() -> None:
    module, x, chosen, weights = drawn(1, 33, 6, 3, dim=64, inner=48)
    whole = module(x, chosen, weights)
    for i in range(33):
        one = slice(i, i + 1)
        torch.testing.assert_close(module(x[one], chosen[one], weights[one])[0], whole[i], atol=2e-6, rtol=1e-5)


def grouped(module: Experts, x, chosen, weights) -> torch.Tensor:
    """The form for GPUs, whose kernels torch also has on a CPU."""
    order = chosen.flatten().argsort(stable=True)
    shares = weights.flatten()[order].to(x.dtype)[:, None]
    counts = torch.bincount(chosen.flatten(), minlength=len(module.down))
    return module._grouped(x, order // chosen.shape[1], shares, order, counts)


def divided_grouped(module: Experts, x, chosen, weights) -> torch.Tensor:
    """``grouped`` as ``forward`` calls it where some experts lie elsewhere."""
    own, here = chosen - module.first, len(module.down)
    chosen = torch.where((own >= 0) & (own < here), own, here)
    order = chosen.flatten().argsort(stable=True)
    shares = weights.flatten()[order].to(x.dtype)[:, None]
    counts = torch.bincount(chosen.flatten(), minlength=here)[:here]
    return module._grouped(x, order // chosen.shape[1], shares, order, counts)


@pytest.mark.parametrize("form", [lambda m, *a: m(*a), grouped])
def test_gradients_reach_tokens_weights_and_the_experts_that_were_used(form) -> None:
    module, x, chosen, weights = drawn(7, 9, 8, 2, dim=16, inner=8)
    chosen = chosen % 4  # experts 4 .. 7 get nobody
    chosen[:, 1] = (chosen[:, 0] + 1) % 4
    leaves = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
    seen = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((form(module, x, chosen, weights) * seen).sum(), leaves)
    wanted = torch.autograd.grad((one_at_a_time(module, x, chosen, weights) * seen).sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert all(g.abs().max() > 0 for g in got) and got[2][4:].abs().max() == 0


@torch.no_grad()
def test_the_grouped_form_gives_the_same() -> None:
    for seed, dtype, near in ((3, torch.float32, 2e-6), (4, torch.bfloat16, 0.05)):
        module, x, chosen, weights = drawn(seed, 21, 8, 3, dim=32, inner=16)
        module.to(dtype)
        got = grouped(module, x.to(dtype), chosen, weights)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), module(x.to(dtype), chosen, weights).float(), atol=near, rtol=near)


@pytest.mark.parametrize("form", [lambda m, *a: m(*a), divided_grouped])
@torch.no_grad()
def test_experts_in_several_places_add_up(form) -> None:
    """Each place leaves out what the experts elsewhere would add, even where none of its own was chosen."""
    module, x, chosen, weights = drawn(5, 17, 8, 3, dim=16, inner=8)
    for tokens in (slice(None), (chosen < 4).all(1)):
        x_, chosen_, weights_ = x[tokens], chosen[tokens], weights[tokens]
        made = torch.zeros_like(x_)
        for first, end in ((0, 3), (3, 4), (4, 8)):
            part = Experts(end - first, 16, 8)
            part.gate_up.copy_(module.gate_up[first:end])
            part.down.copy_(module.down[first:end])
            part.first = first
            made += form(part, x_, chosen_, weights_)
        torch.testing.assert_close(made, module(x_, chosen_, weights_), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_shared_experts_take_every_token_and_may_be_absent() -> None:
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    block = MoE(10, 6, 2, Routing(8, 2))
    assert block.shared is not None and block.shared.down.weight.shape == (10, 12)
    torch.testing.assert_close(block(x), block.experts(x, *block.router(x)) + block.shared(x))
    assert MoE(10, 6, 0, Routing(8, 2)).shared is None


# ---- few tokens, in compiled code

needs_library = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
FORMS = {"float32": None, "bfloat16": (Format.BF16, 0), "int8": (Format.INT8, 32), "int4": (Format.INT4, 32)}


def stacked(weights: torch.Tensor, form: tuple[Format, int] | None) -> torch.nn.Module | torch.nn.Parameter:
    """[E, R, C] as ``form`` holds it."""
    if form is None:
        return torch.nn.Parameter(weights.detach().clone())
    if form[0] == Format.BF16:
        return MatrixStack([Matrix.of(one.detach().bfloat16()) for one in weights])
    made = [Matrix.empty(form[0], one.shape[0], one.shape[1], form[1]) for one in weights]
    for matrix, one in zip(made, weights, strict=True):
        matrix.fill(0, one.detach())
    return MatrixStack(made)


def block(form: str, shared: int = 2, inner: int = 48) -> MoE:
    torch.manual_seed(3)
    made = MoE(64, inner, shared, Routing(8, 3, scale=2.5))
    for name in ("gate_up", "down"):
        held = getattr(made.experts, name)
        delattr(made.experts, name)
        setattr(made.experts, name, stacked(held, FORMS[form]))
    return made


def by_reference(block: MoE, x: torch.Tensor) -> torch.Tensor:
    made = block.experts._sorted(x, *block.router(x))
    return made if block.shared is None else made + block.shared(x)


def in_compiled_code(experts: Experts) -> bool:
    return experts.table._array is not None


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [0, 2])
def test_few_tokens_in_one_call_equal_the_reference(form: str, shared: int) -> None:
    module = block(form, shared)
    for n in (1, 2, 5, 8):
        x = torch.randn(n, 64)
        torch.testing.assert_close(module(x), by_reference(module, x), atol=1e-5, rtol=1e-5)
    assert in_compiled_code(module.experts)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_token_has_one_result_whatever_its_company(form: str) -> None:
    module = block(form)
    x = torch.randn(8, 64)
    x[3] *= 300
    chosen, weights = module.router(x)
    alone = torch.cat([module.experts(x[i : i + 1], chosen[i : i + 1], weights[i : i + 1], module.shared) for i in range(8)])
    for n in (2, 3, 5, 8):
        assert torch.equal(module.experts(x[:n], chosen[:n], weights[:n], module.shared), alone[:n]), n
    if form.startswith("int"):  # more tokens go expert by expert, to the same bits
        many = module.experts(x.repeat(4, 1), chosen.repeat(4, 1), weights.repeat(4, 1))
        assert torch.equal(many[:8], module.experts(x, chosen, weights))


@needs_library
@torch.no_grad()
def test_experts_elsewhere_are_left_out_in_one_call() -> None:
    module, x, chosen, weights = drawn(5, 6, 8, 3, dim=32, inner=16)
    whole = module(x, chosen, weights)
    made = torch.zeros_like(x)
    for first, end in ((0, 3), (3, 8)):
        part = Experts(end - first, 32, 16)
        part.gate_up.copy_(module.gate_up[first:end])
        part.down.copy_(module.down[first:end])
        part.first = first
        made += part(x, chosen, weights)
        assert in_compiled_code(part)
    torch.testing.assert_close(made, whole, atol=2e-6, rtol=1e-5)


@needs_library
@torch.no_grad()
def test_weights_that_are_replaced_are_seen() -> None:
    module = block("float32")
    x = torch.randn(2, 64)
    before = module(x)
    module.experts.down = torch.nn.Parameter(module.experts.down * 2)
    assert module.shared is not None
    module.shared.down.weight.mul_(2)
    torch.testing.assert_close(module(x), 2 * before)
    assert in_compiled_code(module.experts) and in_compiled_code(copy.deepcopy(module).experts) is False


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("how", ["adapter", "hook", "rows"])
def test_what_compiled_code_cannot_take_is_left_to_the_modules(how: str) -> None:
    module = block("int8", inner=40 if how == "rows" else 48)  # 40: gates end inside a panel
    x = torch.randn(2, 64)
    before = by_reference(module, x)
    seen = []
    if how == "adapter":
        module.experts.adapted = lambda *given: seen.append(given)
    elif how == "hook" and module.shared is not None:
        module.shared.down.register_forward_hook(lambda *given: seen.append(given))
    torch.testing.assert_close(module(x), before, atol=1e-5, rtol=1e-5)
    assert not in_compiled_code(module.experts) and bool(seen) == (how != "rows")


@needs_library
@torch.no_grad()
def test_threads_share_the_experts_of_a_token() -> None:
    torch.manual_seed(0)
    module = MoE(256, 320, 1, Routing(8, 3))
    x = torch.randn(3, 256)
    alone, threads = module(x), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(module(x), alone) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


# ---- products


@pytest.mark.parametrize("rows", [0, 1, 3, 17, 300])
@pytest.mark.parametrize("least", [0, 1 << 20])
def test_products_without_gradients_equal_those_with(rows: int, least: int, monkeypatch) -> None:
    monkeypatch.setattr(products, "_ONEDNN_FROM", least)
    random = torch.Generator().manual_seed(rows)
    x, stack = torch.randn(rows, 24, generator=random), torch.randn(3, 200, 24, generator=random)
    for left, weight in ((x, stack[1]), (x[:, ::2], stack[0][:, :12]), (x.view(rows, 2, 12), stack[2][:, 12:])):
        with torch.no_grad():
            got = linear(left, weight)
        torch.testing.assert_close(got, F.linear(left, weight), atol=1e-5, rtol=1e-5)
    layer = Linear(24, 7)
    assert layer.bias is None and layer(x).requires_grad
