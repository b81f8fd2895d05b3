"""A decode step in compiled code against the modules' own forward, which is the reference."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mirada.layers.batch import Batch
from mirada.layers.cache import SlabCache
from mirada.layers.kernels.library import library
from mirada.layers.step import MOST_ROWS, Step
from mirada.models.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
CONFIG = DecoderConfig(
    vocab_size=48, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=96, rope_theta=10000.0, mrope_section=(2, 3, 3),
)  # fmt: skip
QWEN2 = replace(CONFIG, qkv_bias=True, qk_norm=False)


def make(config: DecoderConfig = CONFIG, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Decoder, nn.Linear]:
    """A decoder and a head in which every part matters."""
    random = torch.Generator().manual_seed(seed)
    decoder, head = Decoder(config), nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    with torch.no_grad():
        for parameter in (*decoder.parameters(), *head.parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.2 * noise)
    return decoder.to(dtype), head.to(dtype)


def filled(config: DecoderConfig, past: tuple[int, ...], kv: str = "auto", dtype: torch.dtype = torch.float32) -> SlabCache:
    """A cache that holds ``past`` tokens per slot; the same noise every time, and what is behind it is no number."""
    cache = SlabCache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, dtype, kv=kv)
    for slot, tokens in enumerate(past):
        random = torch.Generator().manual_seed(1000 * slot + 7)
        cache.allocate(slot)
        cache.grow(slot, tokens + 1)
        for layer in range(config.num_hidden_layers):
            sides = (torch.randn(tokens, config.num_key_value_heads, config.head_dim, generator=random) for _ in "kv")
            for plane in cache.planes_of(slot, layer):
                plane.fill_(float("nan")) if plane.is_floating_point() else plane.fill_(99)
            if tokens:
                cache.write(layer, slot, 0, *sides)
    return cache


def batch(
    past: tuple[int, ...], lengths: tuple[int, ...], width: int = 64, slots: tuple[int, ...] = ()
) -> tuple[Tensor, Batch]:
    """Embeddings, the same for a place of a slot whatever else is in the batch, and positions that differ by axis."""
    slots = slots or tuple(range(len(past)))
    x = [
        torch.randn(width, generator=torch.Generator().manual_seed(100000 * slot + place))
        for slot, before, new in zip(slots, past, lengths, strict=True)
        for place in range(before, before + new)
    ]
    at = torch.cat([torch.arange(before, before + new) for before, new in zip(past, lengths, strict=True)])
    positions = torch.stack((at, at // 2 + 3, at % 5))
    return torch.stack(x), Batch(torch.zeros(len(at), dtype=torch.int64), positions, lengths, past, slots)


@torch.inference_mode()
def compiled(decoder: Decoder, head: nn.Linear, cache: SlabCache, x: Tensor, new: Batch) -> tuple[Tensor, Tensor]:
    made = decoder.steps.run(decoder, decoder._parts, x, new, cache, head)
    assert made is not None and made[1] is not None, "no plan"
    return made[0], made[1]


@torch.inference_mode()
def by_modules(decoder: Decoder, head: nn.Linear, cache: SlabCache, x: Tensor, new: Batch) -> tuple[Tensor, Tensor]:
    decoder.steps.on = False
    try:
        hidden = decoder(x, new, cache)
    finally:
        decoder.steps.on = True
    return hidden, head(hidden)


def compare(
    config: DecoderConfig, past: tuple[int, ...], lengths: tuple[int, ...], tolerance: float = 1e-5, **kept: Any
) -> None:
    """Hidden values, logits, and all that was written into the cache."""
    decoder, head = make(config)
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


@pytest.mark.parametrize("config", [CONFIG, QWEN2], ids=["qwen3", "qwen2"])
@pytest.mark.parametrize(
    ("past", "lengths"),
    [((0,), (1,)), ((63,), (1,)), ((64,), (1,)), ((255,), (2,)), ((256,), (1,)), ((5000,), (1,)), ((250,), (8,)),
     ((0, 300, 64, 1), (1, 1, 1, 1)), ((1000, 3), (5, 3)), ((7,) * 16, (1,) * 16), ((0,), (40,)), ((250, 7), (33, 300))],
)  # fmt: skip
def test_equal_to_the_modules(config: DecoderConfig, past: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    compare(config, past, lengths)


@pytest.mark.parametrize(
    ("width", "sections"), [(64, (16, 8, 8)), (72, (12, 12, 12)), (80, (8, 16, 16)), (128, (16, 24, 24)), (20, (4, 3, 3))]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_head_sizes_and_groups(width: int, sections: tuple[int, int, int], heads: int, kv_heads: int) -> None:
    sizes = {"head_dim": width, "mrope_section": sections, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    compare(replace(CONFIG, num_hidden_layers=1, **sizes), (70, 0), (1, 3))


@settings(max_examples=25)
@given(
    st.builds(
        lambda heads, kv, half, width, inner, bias, norm, layers: replace(
            CONFIG, num_attention_heads=heads * kv, num_key_value_heads=kv, head_dim=4 * half, mrope_section=(half, half, 0),
            hidden_size=width, intermediate_size=inner, qkv_bias=bias, qk_norm=norm, num_hidden_layers=layers,
        ),
        st.integers(1, 8), st.integers(1, 3), st.integers(1, 9), st.integers(1, 70), st.integers(1, 70), st.booleans(),
        st.booleans(), st.integers(1, 3),
    ),
    st.lists(st.tuples(st.integers(0, 600), st.integers(1, 4)), min_size=1, max_size=4),
)  # fmt: skip
def test_any_sizes(config: DecoderConfig, sequences: list[tuple[int, int]]) -> None:
    past, lengths = zip(*sequences, strict=True)
    # So few channels can cancel to almost nothing before a norm, which then blows rounding up.
    compare(config, past, lengths, tolerance=3e-4)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [32, 35, 65])
def test_many_rows_of_odd_sizes(isa: None, rows: int, dtype: torch.dtype) -> None:
    """Rows and columns that fill no tile, and a matrix deeper than what is turned at a time."""
    config = replace(QWEN2, hidden_size=33, intermediate_size=523, num_attention_heads=3, num_key_value_heads=1)
    decoder, head = make(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.bfloat16())
    narrow = copy.deepcopy(decoder)
    for layer in narrow.layers:
        for matrix in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
            matrix.weight.data = matrix.weight.data.to(dtype)
    x, new = batch((5,), (rows,), 33)
    got, wanted = compiled(narrow, head, filled(config, (5,)), x, new), by_modules(decoder, head, filled(config, (5,)), x, new)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_many_rows_on_several_threads() -> None:
    decoder, head = make(replace(CONFIG, hidden_size=256, intermediate_size=768))
    x, new = batch((300, 4), (40, 90), 256)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            made.append(compiled(decoder, head, filled(decoder.config, (300, 4)), x, new)[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made[0], other) for other in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_looked_up(dtype: torch.dtype) -> None:
    decoder, head = make(dtype=dtype)
    _, new = batch((9, 3), (2, 1))
    new = replace(new, tokens=torch.tensor([47, 0, 5]))
    with torch.inference_mode():
        wanted = decoder.logits(decoder.embed(new.tokens), new, filled(CONFIG, (9, 3)), head)
        got = decoder.logits(None, new, filled(CONFIG, (9, 3)), head)
        assert got is not None and wanted is not None and torch.equal(got, wanted)
        for wrong in (48, -1):
            cache = filled(CONFIG, (9, 3))
            assert decoder.logits(None, replace(new, tokens=torch.tensor([0, 1, wrong])), cache, head) is None
        decoder.embed.max_norm = 1.0  # rows would be changed as they are read
        decoder.steps = Step()
        assert decoder.logits(None, new, filled(CONFIG, (9, 3)), head) is None


def test_weights_in_large_pages() -> None:
    """As many as are moved there: what is read is what was there before."""
    compare(replace(CONFIG, hidden_size=512, intermediate_size=1408, num_hidden_layers=1), (70, 0), (1, 3), tolerance=1e-4)


def test_where_few_rows_are_the_limit() -> None:
    """Large layers, and what lies far behind, are left to the modules when there are more."""
    decoder, head = make()
    long = (150_000,)
    with torch.inference_mode():
        x, new = batch((20,), (40,))
        assert decoder.logits(x, new, filled(CONFIG, (20,)), head) is not None
        x, new = batch(long, (300,))
        assert decoder.logits(x, new, filled(CONFIG, (20,)), head) is None
        large, big_head = make(replace(CONFIG, hidden_size=512, intermediate_size=3000, num_hidden_layers=1))
        x, new = batch((20,), (17,), 512)
        assert large.logits(x, new, filled(large.config, (20,)), big_head) is None
        x, new = batch((20,), (16,), 512)
        assert large.logits(x, new, filled(large.config, (20,)), big_head) is not None


@pytest.mark.parametrize("past", [(0,), (300, 17)])
def test_a_cache_of_int8(past: tuple[int, ...]) -> None:
    compare(CONFIG, past, (2,) * len(past), tolerance=2e-2, kv="int8")


@pytest.mark.parametrize("past", [(0,), (300, 17)])
def test_bfloat16_weights_and_cache(past: tuple[int, ...]) -> None:
    """Storage is bfloat16, arithmetic float32: nearer to the same weights in float32 than the modules are."""
    decoder, head = make(dtype=torch.bfloat16)
    wide, wide_head = copy.deepcopy(decoder).float(), copy.deepcopy(head).float()
    x, new = batch(past, (2,) * len(past))
    x = x.bfloat16()
    exact = by_modules(wide, wide_head, filled(CONFIG, past), x.float(), new)
    caches = [filled(CONFIG, past, dtype=torch.bfloat16) for _ in range(2)]
    got, modules = compiled(decoder, head, caches[0], x, new), by_modules(decoder, head, caches[1], x, new)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    torch.testing.assert_close(got[1], exact[1], atol=2e-2, rtol=2e-2)
    assert (got[1] - exact[1]).norm() < (modules[1].float() - exact[1]).norm()


def test_a_row_depends_on_nothing_beside_it() -> None:
    """Bitwise: alone or with others, token by token or several at once, on however many threads."""
    decoder, head = make(replace(CONFIG, hidden_size=256, intermediate_size=768))
    past, lengths = (300, 62, 0, 511), (3, 1, 2, 2)
    x, new = batch(past, lengths, 256)
    decoder.steps.run(decoder, decoder._parts, x, new, filled(decoder.config, past), head)  # what is asked below needs a plan
    whole = compiled(decoder, head, filled(decoder.config, past), x, new)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for a, b in zip(compiled(decoder, head, filled(decoder.config, past), x, new), whole, strict=True):
                assert torch.equal(a, b), f"{threads} threads"
    finally:
        torch.set_num_threads(before)
    cache, row = filled(decoder.config, past), 0
    for slot, (start, count) in enumerate(zip(past, lengths, strict=True)):
        for place in range(start, start + count):
            one = compiled(decoder, head, cache, *batch((place,), (1,), 256, (slot,)))
            assert torch.equal(one[0][0], whole[0][row]) and torch.equal(one[1][0], whole[1][row]), (slot, place)
            row += 1


@pytest.mark.parametrize(
    ("past", "sizes"),
    [
        ((3000, 900), {"hidden_size": 256, "intermediate_size": 768}),
        ((0, 0), {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 48, "num_key_value_heads": 48}),
        ((0, 0), {"hidden_size": 256, "intermediate_size": 3072}),
    ],
    ids=["attention", "heads", "mlp"],
)
def test_threads_wait_for_each_other(past: tuple[int, int], sizes: dict[str, int]) -> None:
    """One stage that takes long between short ones, many times: who went on too soon would read what is not there yet."""
    decoder, head = make(replace(CONFIG, num_hidden_layers=6, **sizes))
    before = torch.get_num_threads()
    cache = filled(decoder.config, past)
    try:
        for turn in range(12):
            x, new = batch(past, (1, 1), 256)
            x = x + turn  # not what an earlier turn left in the scratch
            torch.set_num_threads(1)
            wanted = compiled(decoder, head, cache, x, new)[1]
            compiled(decoder, head, cache, x + 0.5, new)
            torch.set_num_threads(3)
            assert torch.equal(compiled(decoder, head, cache, x, new)[1], wanted), turn
    finally:
        torch.set_num_threads(before)


def test_slabs_that_grow_move_and_return() -> None:
    decoder, head = make()
    mine, theirs = filled(CONFIG, (250, 30)), filled(CONFIG, (250, 30))
    for place in range(8):  # slot 0 grows beyond its block on the way
        x, new = batch((250 + place, 30 + place), (1, 1))
        torch.testing.assert_close(
            compiled(decoder, head, mine, x, new), by_modules(decoder, head, theirs, x, new), atol=1e-5, rtol=1e-5
        )
    for cache in (mine, theirs):
        cache.free(0)
        cache.allocate(0)
    x, new = batch((0, 10), (1, 1))  # and slot 1 goes back to an earlier place
    torch.testing.assert_close(
        compiled(decoder, head, mine, x, new), by_modules(decoder, head, theirs, x, new), atol=1e-5, rtol=1e-5
    )


def test_logits_are_those_of_the_head_that_is_given() -> None:
    decoder, head = make()
    tied = nn.Linear(64, 48, bias=False)
    tied.weight = decoder.embed.weight
    x, new = batch((9,), (1,))
    for wanted in (head, tied, head):
        hidden, logits = compiled(decoder, wanted, filled(CONFIG, (9,)), x, new)
        torch.testing.assert_close(logits, hidden @ wanted.weight.detach().T, atol=1e-5, rtol=1e-5)


def _replace_module(decoder: Decoder) -> None:
    old = decoder.layers[1].mlp.down
    decoder.layers[1].mlp.down = type(old)(96, 64)


def _scale_in_place(decoder: Decoder) -> None:
    decoder.layers[0].norm1.weight.data.mul_(2)


def _other_storage(decoder: Decoder) -> None:
    parameter = decoder.layers[0].attention.qkv.weight
    parameter.data = torch.randn_like(parameter)


def _other_parameter(decoder: Decoder) -> None:
    decoder.norm.weight = nn.Parameter(torch.rand(64))


def _load(decoder: Decoder) -> None:
    decoder.load_state_dict(make(seed=5)[0].state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [_replace_module, _scale_in_place, _other_storage, _other_parameter, _load])
def test_a_plan_follows_its_weights(change: Any, dtype: torch.dtype) -> None:
    decoder, head = make()
    for norm in [decoder.norm, *(n for layer in decoder.layers for n in (layer.norm1, layer.norm2))]:
        norm.to(dtype)  # narrow ones are copied
    x, new = batch((4,), (1,))
    before = compiled(decoder, head, filled(CONFIG, (4,)), x, new)
    with torch.no_grad():
        change(decoder)
    after = compiled(decoder, head, filled(CONFIG, (4,)), x, new)
    assert not torch.equal(before[0], after[0])
    fresh, _ = make()
    fresh = copy.deepcopy(decoder)
    assert not fresh.steps.planned
    assert torch.equal(compiled(fresh, head, filled(CONFIG, (4,)), x, new)[0], after[0])


def _hook(decoder: Decoder) -> None:
    decoder.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 0)


def _own_forward(decoder: Decoder) -> None:
    decoder.layers[1].attention.forward = lambda x, ctx: x  # type: ignore[method-assign]


def _own_kind(decoder: Decoder) -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    decoder.layers[1].attention.out = Twice(64, 64, bias=False)


def _eager(decoder: Decoder) -> None:
    decoder.layers[1].attention.attention_kind = "eager"


@pytest.mark.parametrize("change", [_hook, _own_forward, _own_kind, _eager])
def test_what_a_plan_cannot_take_is_left_to_the_modules(change: Any) -> None:
    decoder, head = make()
    x, new = batch((4,), (1,))
    compiled(decoder, head, filled(CONFIG, (4,)), x, new)
    change(decoder)
    wanted = by_modules(decoder, head, filled(CONFIG, (4,)), x, new)
    for _ in range(2):
        with torch.inference_mode():
            assert decoder.logits(x, new, filled(CONFIG, (4,)), head) is None
            assert torch.equal(decoder(x, new, filled(CONFIG, (4,))), wanted[0])


def test_a_hook_that_is_taken_off_brings_the_plan_back() -> None:
    decoder, head = make()
    x, new = batch((4,), (1,))
    handle = decoder.layers[0].register_forward_pre_hook(lambda module, args: None)
    with torch.inference_mode():
        assert decoder.logits(x, new, filled(CONFIG, (4,)), head) is None
    handle.remove()
    compiled(decoder, head, filled(CONFIG, (4,)), x, new)


def test_left_to_the_modules_by_what_is_asked() -> None:
    decoder, head = make()
    x, new = batch((4,), (1,))
    cache = filled(CONFIG, (4,))
    assert decoder.logits(x, new, cache, head) is None, "gradients are wanted"
    with torch.inference_mode():
        assert decoder.logits(x, new, None, head) is None, "no cache"
        assert decoder.logits(x.double(), new, cache, head) is None, "another type"
        long, many = batch((0,), (MOST_ROWS + 1,))
        assert decoder.logits(long, many, filled(CONFIG, (0,)), head) is None, "too many tokens"
        other = filled(replace(CONFIG, num_hidden_layers=3), (4,))
        assert decoder.logits(x, new, other, head) is None, "a cache of another model"
        refused = nn.Linear(64, 48, bias=False, dtype=torch.float64)
        assert decoder.logits(x, new, cache, refused) is None, "a head of another type"
        assert decoder.steps.run(decoder, decoder._parts, x, new, cache) is not None, "but not the layers"


def test_copies_and_pickles_begin_without_a_plan() -> None:
    decoder, head = make()
    compiled(decoder, head, filled(CONFIG, (4,)), *batch((4,), (1,)))
    assert decoder.steps.planned
    assert not pickle.loads(pickle.dumps(decoder.steps)).planned
    assert isinstance(copy.deepcopy(decoder).steps, Step)


def test_several_threads_of_python_at_once() -> None:
    """Models of their own, and one that they share: every result is what it is alone."""
    pairs = [make(seed=seed) for seed in (0, 1)]
    pairs.append(pairs[0])
    x, new = batch((300,), (1,))
    wanted = [compiled(decoder, head, filled(CONFIG, (300,)), x, new)[1] for decoder, head in pairs]
    wrong: list[int] = []

    def work(index: int) -> None:
        cache = filled(CONFIG, (300,))
        for _ in range(40):
            if not torch.equal(compiled(*pairs[index], cache, x, new)[1], wanted[index]):
                wrong.append(index)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


def _in_child(results: Any, decoder: Decoder, head: nn.Linear, threads: int) -> None:
    torch.set_num_threads(threads)
    x, new = batch((300,), (1,), 256)
    results.send(compiled(decoder, head, filled(decoder.config, (300,)), x, new)[1].sum().item())


def test_a_forked_child_has_threads_of_its_own() -> None:
    """The parent's workers are not in the child; asking them would wait for ever."""
    decoder, head = make(replace(CONFIG, hidden_size=256, intermediate_size=768))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, new = batch((300,), (1,), 256)
        wanted = compiled(decoder, head, filled(decoder.config, (300,)), x, new)[1].sum().item()
        mine, other = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(other, decoder, head, 2))
        child.start()
        try:
            assert mine.poll(30), "the child waits for threads that it does not have"
            assert mine.recv() == pytest.approx(wanted, abs=1e-4)
        finally:
            child.kill()
            child.join()
    finally:
        torch.set_num_threads(before)
