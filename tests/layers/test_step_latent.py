"""A compiled step of latent attention and experts against the modules' own forward, which is the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mirada.layers.batch import Batch
from mirada.layers.cache import make_cache
from mirada.layers.kernels.library import library
from mirada.layers.kernels.matrix import Format, Matrix
from mirada.layers.latent_cache import LatentCache
from mirada.layers.linear import Linear, MatrixLinear, MatrixStack
from mirada.layers.moe import Experts, Router
from mirada.layers.rope import Yarn
from mirada.layers.step_plan import FEW_ROWS
from mirada.models.deepseek import DeepseekConfig, DeepseekDecoder, cache_spec

pytestmark = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
CONFIG = DeepseekConfig(
    vocab_size=48, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, kv_lora_rank=32,
    q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, moe_intermediate_size=32, n_routed_experts=8,
    n_shared_experts=1, num_experts_per_tok=3, routed_scaling_factor=2.4, first_k_dense_replace=1,
)  # fmt: skip
KEYE = replace(CONFIG, q_lora_rank=24, n_group=4, topk_group=2, yarn=Yarn(4.0, 1024, mscale_all_dim=0.5))
WIDE = replace(CONFIG, hidden_size=256, intermediate_size=640, kv_lora_rank=128, qk_rope_head_dim=32, moe_intermediate_size=160)


def make(config: DeepseekConfig = CONFIG, dtype: torch.dtype = torch.float32) -> tuple[DeepseekDecoder, nn.Linear]:
    """A decoder and a head in which every part matters."""
    random = torch.Generator().manual_seed(0)
    decoder, head = DeepseekDecoder(config).eval(), nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    with torch.no_grad():
        for name, parameter in (*decoder.named_parameters(), *head.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.2 * noise)
            if "bias" in name:
                parameter.copy_(0.05 * noise)
    return decoder.to(dtype), head.to(dtype)


def rounded(decoder: DeepseekDecoder, format: Format) -> None:
    """Puts matrices of another format where they are put when a model is loaded."""

    def of(weight: Tensor) -> Matrix:
        if format == Format.BF16:
            return Matrix.of(weight.detach().bfloat16())
        made = Matrix.empty(format, *weight.shape, 32)
        made.fill(0, weight.detach())
        return made

    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Linear and not child.stays_float:
                setattr(module, name, MatrixLinear(of(child.weight)))
        for name in ("gate_up", "down") if isinstance(module, Experts) else ():
            stack: Any = getattr(module, name)
            delattr(module, name)
            setattr(module, name, MatrixStack([of(one) for one in stack]))


def filled(config: DeepseekConfig, past: tuple[int, ...], kv: str = "auto", dtype: torch.dtype = torch.float32) -> LatentCache:
    """A cache that holds ``past`` tokens per slot; the same noise every time, and what is behind it is no number."""
    cache: Any = make_cache(cache_spec(config), dtype, "cpu", kv=kv)
    for slot, tokens in enumerate(past):
        random = torch.Generator().manual_seed(slot + 7)
        cache.allocate(slot)
        cache.grow(slot, tokens + 1)
        for layer in range(config.num_hidden_layers):
            for plane in cache.planes_of(slot, layer):
                plane.fill_(float("nan")) if plane.is_floating_point() else plane.fill_(99)
            rows = torch.randn(tokens, 1, config.kv_lora_rank + config.qk_rope_head_dim, generator=random)
            if tokens:
                cache.write(layer, slot, 0, rows)
    return cache


def batch(
    past: tuple[int, ...], lengths: tuple[int, ...], width: int = 64, slots: tuple[int, ...] = ()
) -> tuple[Tensor, Batch]:
    """Embeddings, the same for a place of a slot whatever else is in the batch, and positions that differ by axis."""
    slots = slots or tuple(range(len(past)))
    places = [(slot, at) for slot, p, n in zip(slots, past, lengths, strict=True) for at in range(p, p + n)]
    x = [torch.randn(width, generator=torch.Generator().manual_seed(100000 * slot + at)) for slot, at in places]
    at = torch.tensor([place for _, place in places])
    return torch.stack(x), Batch(torch.zeros_like(at), torch.stack((at, at // 2 + 3, at % 5)), lengths, past, slots)


@torch.inference_mode()
def compiled(decoder: DeepseekDecoder, head: nn.Module, cache: LatentCache, x: Tensor, new: Batch) -> tuple[Tensor, Tensor]:
    made = decoder.steps.run(decoder, decoder._parts, x, new, cache, head)
    assert made is not None and made[0] is not None and made[1] is not None, "no plan"
    return made[0], made[1]


@torch.inference_mode()
def by_modules(decoder: DeepseekDecoder, head: nn.Module, cache: LatentCache, x: Tensor, new: Batch) -> tuple[Tensor, Tensor]:
    decoder.steps.on = False
    try:
        hidden = decoder(x, new, cache)
    finally:
        decoder.steps.on = True
    return hidden, head(hidden)


def compare(
    config: DeepseekConfig,
    past: tuple[int, ...],
    lengths: tuple[int, ...],
    tolerance: float = 2e-5,
    change: Callable[[DeepseekDecoder], Any] = lambda decoder: None,
    **kept: Any,
) -> None:
    """Hidden values, logits, and all that was written into the cache."""
    decoder, head = make(config)
    change(decoder)
    x, new = batch(past, lengths, config.hidden_size)
    caches = [filled(config, past, **kept) for _ in range(2)]
    got, wanted = compiled(decoder, head, caches[0], x, new), by_modules(decoder, head, caches[1], x, new)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    for slot, total in enumerate(p + n for p, n in zip(past, lengths, strict=True)):
        for layer in range(config.num_hidden_layers):
            for mine, theirs in zip(*(cache.planes_of(slot, layer) for cache in caches), strict=True):
                a, b = mine[:, :total], theirs[:, :total]
                if a.is_floating_point():
                    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
                else:  # a number on the edge between two steps may fall to either side
                    assert (a.int() - b.int()).abs().max() <= 1


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each set of instructions that this processor has."""
    kernels: Any = library()
    wanted = ("scalar", "avx2", "avx512").index(request.param)
    before = kernels.mr_set_isa(-1)
    if wanted > before:
        pytest.skip(f"no {request.param} here")
    kernels.mr_set_isa(wanted)
    yield
    kernels.mr_set_isa(before)


@pytest.mark.parametrize("config", [CONFIG, KEYE], ids=["kimi", "keye"])
@pytest.mark.parametrize(
    ("past", "lengths"),
    [((0,), (1,)), ((63,), (1,)), ((255,), (2,)), ((1500,), (1,)), ((250,), (8,)), ((0, 300, 64, 1), (1, 1, 1, 1)),
     ((600, 3), (5, 3)), ((7,) * 16, (1,) * 16), ((0,), (16,))],
)  # fmt: skip
def test_equal_to_the_modules(config: DeepseekConfig, past: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    compare(config, past, lengths)


@pytest.mark.parametrize(
    "change",
    [
        {"first_k_dense_replace": 3},
        {"first_k_dense_replace": 0, "n_shared_experts": 0, "norm_topk_prob": False},
        {"first_k_dense_replace": 1, "moe_layer_freq": 2, "mrope_section": (2, 1, 1)},
        {"n_group": 2, "topk_group": 1, "n_shared_experts": 2, "intermediate_size": 90, "moe_intermediate_size": 35},
        {"kv_lora_rank": 20, "qk_rope_head_dim": 4, "num_attention_heads": 3, "q_lora_rank": 17, "hidden_size": 33},
        {"kv_lora_rank": 136, "qk_rope_head_dim": 24, "qk_nope_head_dim": 30, "v_head_dim": 54},
    ],
)
def test_shapes(change: dict[str, Any]) -> None:
    compare(replace(CONFIG, **change), (70, 0), (1, 3))


def test_on_every_processor(isa: None) -> None:
    compare(KEYE, (300, 5), (1, 3))
    compare(CONFIG, (300, 5), (1, 3), 2e-2, kv="int8")


@pytest.mark.parametrize("config", [CONFIG, KEYE], ids=["kimi", "keye"])
def test_latents_kept_as_int8(config: DeepseekConfig) -> None:
    compare(config, (300, 17), (2, 1), 2e-2, kv="int8")


@pytest.mark.parametrize("format", [Format.BF16, Format.INT8, Format.INT4], ids=["exact", "int8", "int4"])
@pytest.mark.parametrize("config", [CONFIG, KEYE], ids=["kimi", "keye"])
def test_matrices_of_every_format(config: DeepseekConfig, format: Format) -> None:
    """Integers: activations are rounded on both sides, and one on an edge may fall to either."""
    tolerance = 2e-5 if format == Format.BF16 else 3e-2
    compare(config, (300, 17), (2, 1), tolerance, lambda decoder: rounded(decoder, format))


def test_weights_activations_and_latents_in_bfloat16() -> None:
    """Storage is bfloat16, arithmetic float32: nearer to the same weights in float32 than the modules are."""
    decoder, head = make(dtype=torch.bfloat16)
    wide, wide_head = make()
    wide.load_state_dict(decoder.state_dict())
    wide_head.load_state_dict(head.state_dict())
    x, new = batch((300,), (2,))
    x = x.bfloat16()
    exact = by_modules(wide, wide_head, filled(CONFIG, (300,)), x.float(), new)[1]
    caches = [filled(CONFIG, (300,), dtype=torch.bfloat16) for _ in range(2)]
    got, modules = compiled(decoder, head, caches[0], x, new), by_modules(decoder, head, caches[1], x, new)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    assert (got[1] - exact).norm() < (modules[1].float() - exact).norm()


@pytest.mark.parametrize("format", [Format.F32, Format.INT8])
def test_a_row_depends_on_nothing_beside_it(format: Format) -> None:
    """Bitwise: alone or with others, token by token or several at once, on however many threads."""
    decoder, head = make(WIDE)
    if format != Format.F32:
        rounded(decoder, format)
    past, lengths = (300, 62, 0, 511), (3, 1, 2, 2)
    x, new = batch(past, lengths, 256)
    whole = compiled(decoder, head, filled(WIDE, past), x, new)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for a, b in zip(compiled(decoder, head, filled(WIDE, past), x, new), whole, strict=True):
                assert torch.equal(a, b), f"{threads} threads"
    finally:
        torch.set_num_threads(before)
    cache, row = filled(WIDE, past), 0
    for slot, (start, count) in enumerate(zip(past, lengths, strict=True)):
        for place in range(start, start + count):
            one = compiled(decoder, head, cache, *batch((place,), (1,), 256, (slot,)))
            assert torch.equal(one[0][0], whole[0][row]) and torch.equal(one[1][0], whole[1][row]), (slot, place)
            row += 1


def test_threads_wait_for_each_other() -> None:
    """Many times, with other input: who went on too soon would read what an earlier turn left."""
    decoder, head = make(replace(WIDE, num_hidden_layers=5))
    before, past = torch.get_num_threads(), (2900, 40)
    cache = filled(decoder.config, past)
    try:
        for turn in range(12):
            x, new = batch(past, (1, 1), 256)
            torch.set_num_threads(1)
            wanted = compiled(decoder, head, cache, x + turn, new)[1]
            compiled(decoder, head, cache, x - turn, new)
            torch.set_num_threads(3)
            assert torch.equal(compiled(decoder, head, cache, x + turn, new)[1], wanted), turn
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_stays_its_own_rows() -> None:
    decoder, head = make()
    x, new = batch((9, 9), (1, 1))
    wanted = compiled(decoder, head, filled(CONFIG, (9, 9)), x, new)[1]
    x[0] = float("nan")
    got = compiled(decoder, head, filled(CONFIG, (9, 9)), x, new)[1]
    assert got[0].isnan().all() and torch.equal(got[1], wanted[1])


def _adapted(decoder: DeepseekDecoder) -> None:
    decoder.layers[1].mlp.experts.adapted = lambda *given: None


def _some_experts_elsewhere(decoder: DeepseekDecoder) -> None:
    decoder.layers[1].mlp.experts.first = 0


def _own_router(decoder: DeepseekDecoder) -> None:
    class Other(Router):
        pass

    decoder.layers[2].mlp.router = Other(64, CONFIG.routing)


def _wide_router(decoder: DeepseekDecoder) -> None:
    decoder.layers[2].mlp.router.double()


def _other_kind(decoder: DeepseekDecoder) -> None:
    decoder.layers[0].attention.attention_kind = "eager"


def _variants(decoder: DeepseekDecoder) -> None:
    decoder.layers[2].attention.variants = ((None, (0,)),)


@pytest.mark.parametrize("change", [_adapted, _some_experts_elsewhere, _own_router, _wide_router, _other_kind, _variants])
def test_what_a_plan_cannot_take_is_left_to_the_modules(change: Callable[[DeepseekDecoder], None]) -> None:
    decoder, head = make()
    x, new = batch((4,), (1,))
    compiled(decoder, head, filled(CONFIG, (4,)), x, new)
    change(decoder)
    with torch.inference_mode():
        assert decoder.logits(x, new, filled(CONFIG, (4,)), head) is None


def _reroute(decoder: DeepseekDecoder) -> None:
    decoder.layers[1].mlp.router.routing = replace(CONFIG.routing, scale=1.0)


def _bias(decoder: DeepseekDecoder) -> None:
    decoder.layers[1].mlp.router.bias.data = torch.linspace(2.0, 0.0, 8)


def _other_experts(decoder: DeepseekDecoder) -> None:
    decoder.layers[1].mlp.experts.down = nn.Parameter(torch.randn(8, 64, 32))


def _packed_experts(decoder: DeepseekDecoder) -> None:
    rounded(decoder, Format.INT4)


def _norm(decoder: DeepseekDecoder) -> None:
    decoder.layers[1].attention.kv_norm.weight.data.mul_(2)


@pytest.mark.parametrize("change", [_reroute, _bias, _other_experts, _packed_experts, _norm])
def test_a_plan_follows_its_weights(change: Callable[[DeepseekDecoder], None]) -> None:
    decoder, head = make()
    x, new = batch((4,), (1,))
    before = compiled(decoder, head, filled(CONFIG, (4,)), x, new)[1]
    with torch.no_grad():
        change(decoder)
    after = compiled(decoder, head, filled(CONFIG, (4,)), x, new)[1]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, by_modules(decoder, head, filled(CONFIG, (4,)), x, new)[1], atol=3e-2, rtol=3e-2)


def test_more_than_few_rows_are_left_to_the_modules() -> None:
    decoder, head = make()
    with torch.inference_mode():
        x, new = batch((4,), (FEW_ROWS + 1,))
        assert decoder.logits(x, new, filled(CONFIG, (4,)), head) is None
        x, new = batch((4,), (1,))
        other: Any = make_cache({"num_layers": 3, "num_kv_heads": 1, "head_dim": 8}, torch.float32, "cpu")
        other.allocate(0)
        assert decoder.logits(x, new, other, head) is None, "a cache of keys and values"
        narrow = filled(replace(CONFIG, kv_lora_rank=36, qk_rope_head_dim=4), (4,))
        assert decoder.logits(x, new, narrow, head) is None, "latents of other widths"
