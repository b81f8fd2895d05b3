"""What one decode step costs beside its arithmetic: torch calls, new tensors, objects of Python. Counts, never times.

For a small model these are most of a step. A bound is what is there now: who adds a call to the inner loop has to say why here.
"""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_deepseek
import torch
from tiny import make_tiny
from tiny_adapters import make_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from mirada.engine.adapters import Adapters
from mirada.engine.load import load
from mirada.layers.batch import Batch
from mirada.layers.cache import SlabCache, make_cache
from mirada.layers.kernels.library import library
from mirada.models.deepseek import DeepseekConfig, DeepseekDecoder, cache_spec

PAST = 40
COMPILED = {"calls": 1, "tensors": 1}
"""Of a whole step in compiled code: room for logits."""
PER_LAYER = {"calls": 12, "tensors": 10} if library() is not None else {"calls": 19, "tensors": 17}
BESIDE = {"calls": 17, "tensors": 17}
"""Of a step by the modules for one sequence: in each layer, and once (embedding, rotation, last norm, head). No views."""
PER_MATE = {"calls": 3, "tensors": 1}
"""In each layer, for each further sequence, which is written and attended by itself; their results are joined once."""
OBJECTS = 6000
"""Most bytes of Python objects that live at once because of one step in compiled code."""
LAYERS = 4
STEPS = {"one": (1,), "three": (1, 1, 1), "sixteen": (1,) * 16, "a draft of seven": (8,), "a chunk beside two": (1, 1, 30)}
"""New tokens of each sequence in one step."""
BY_MODULES = {  # calls and tensors of a whole step
    "float keys": {"one": (65, 57), "three": (93, 69), "sixteen": (249, 121), "a draft of seven": (101, 101),
                   "a chunk beside two": (129, 113)},
    # 26 calls a layer for each further sequence: its new rows are made integers, and its old ones floats, by themselves
    "int8 keys": {"one": (153, 105), "three": (357, 213), "sixteen": (1657, 889), "a draft of seven": (173, 141),
                  "a chunk beside two": (377, 249)},
    # four a layer: writing, and gathering what it attends
    "pages": {"one": (77, 65), "three": (113, 93), "sixteen": (321, 249), "a draft of seven": (113, 109),
              "a chunk beside two": (149, 137)},
}  # fmt: skip
ADAPTED = {"calls": 27, "tensors": 12.5}
"""More in each layer, however many sequences have the adapter: its four fused matrices are seven of a checkpoint, each two
products and what adds them where they belong."""
LATENT = 18
"""Calls of a layer with latent attention and a dense block, for one sequence, by the modules."""
EXPERTS = 7
"""More of them where the block is of experts: nine choose, and one makes room for what all chosen ones add."""


class Calls(TorchDispatchMode):
    """Counts operations that compute or copy, and tensors that own new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls[str(func)] += 1
            known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
            self.tensors += sum(t.untyped_storage().data_ptr() not in known for t in _tensors(out))
        return out


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


@pytest.fixture(scope="module")
def mini() -> Any:
    return load("mini", device="cpu").model


@pytest.fixture(scope="module", params=[None, "exact", "int8", "int4"])
def precise(request: pytest.FixtureRequest) -> Any:
    """The same model at each precision."""
    model = load("mini", device="cpu", quant=request.param).model
    yield model
    model.decoder.steps.on = True


def standing(model: Any, lengths: tuple[int, ...], kv: str = "auto", layout: str = "slab") -> tuple[Any, Batch]:
    """A cache in which sequences have a past, and a step that adds ``lengths`` tokens to them; plans and tables are made."""
    spec = {"num_layers": LAYERS, "num_kv_heads": 2, "head_dim": 64}
    cache: Any = make_cache(spec, torch.float32, "cpu", kv=kv, layout=layout, budget=1 << 26)  # pyright: ignore
    count, total = len(lengths), sum(lengths)
    for slot in range(count):
        cache.allocate(slot)
        cache.grow(slot, 3 * PAST)
    with torch.inference_mode():
        for past, step in ((0, (PAST,) * count), (PAST, lengths)):
            places = torch.cat([torch.arange(past, past + length) for length in step]).expand(3, -1)
            batch = Batch(torch.full((sum(step),), 5), places, step, (past,) * count, tuple(range(count)))
            for _ in range(2):
                model.next_logits(batch, None, cache)
    assert len(batch.tokens) == total
    return cache, batch


@pytest.fixture(params=[1, 3])
def ready(request: pytest.FixtureRequest, mini: Any) -> tuple[SlabCache, Batch, int]:
    """A cache in which that many sequences stand in the middle of their answers, and the next step of all of them."""
    count = request.param
    spec = {"num_layers": LAYERS, "num_kv_heads": 2, "head_dim": 64}
    cache: Any = make_cache(spec, torch.float32, "cpu")
    for slot in range(count):
        cache.allocate(slot)
        cache.grow(slot, 2 * PAST)
    step = Batch(torch.full((count,), 5), torch.full((3, count), PAST), (1,) * count, (PAST,) * count, tuple(range(count)))
    with torch.inference_mode():
        for on in (False, True):  # first calls build plans and tables
            mini.decoder.steps.on = on
            mini.next_logits(step, None, cache)
    yield cache, step, count  # pyright: ignore[reportReturnType]
    mini.decoder.steps.on = True


def counted(model: Any, cache: SlabCache, step: Batch) -> Calls:
    with torch.inference_mode(), Calls() as calls:
        model.next_logits(step, None, cache)
    return calls


@pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
def test_a_step_in_compiled_code(mini: Any, ready: tuple[SlabCache, Batch, int]) -> None:
    cache, step, _ = ready
    calls = counted(mini, cache, step)
    assert sum(calls.calls.values()) <= COMPILED["calls"], calls.calls
    assert calls.tensors <= COMPILED["tensors"], calls.calls


@pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
def test_objects_of_a_step_in_compiled_code(mini: Any, ready: tuple[SlabCache, Batch, int]) -> None:
    cache, step, _ = ready
    with torch.inference_mode():
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            for _ in range(3):
                mini.next_logits(step, None, cache)
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak - before < OBJECTS, f"{peak - before} bytes at once"
    assert after - before < OBJECTS // 4, f"{after - before} bytes stay"


def test_a_step_by_the_modules(mini: Any, ready: tuple[SlabCache, Batch, int]) -> None:
    cache, step, count = ready
    mini.decoder.steps.on = False
    calls = counted(mini, cache, step)
    for name, found in (("calls", sum(calls.calls.values())), ("tensors", calls.tensors)):
        mates = PER_MATE[name] * (count - 1) + (count > 1)
        assert found <= LAYERS * (PER_LAYER[name] + mates) + BESIDE[name], (name, calls.calls)


@pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("step", STEPS)
def test_every_step_of_a_small_model_is_one_call(precise: Any, step: str, kv: str) -> None:
    """At every precision, with any keys, and also where a draft is checked or a prompt computed beside."""
    precise.decoder.steps.on = True
    calls = counted(precise, *standing(precise, STEPS[step], kv))
    assert (sum(calls.calls.values()), calls.tensors) == (COMPILED["calls"], COMPILED["tensors"]), calls.calls


@pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kept", BY_MODULES)
def test_other_steps_by_the_modules(mini: Any, kept: str, step: str) -> None:
    try:
        by_the_modules(mini, kept, step)
    finally:
        mini.decoder.steps.on = True


@pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
@pytest.mark.parametrize("kept", BY_MODULES)
def test_a_product_is_one_call_at_every_precision(precise: Any, kept: str) -> None:
    by_the_modules(precise, kept, "three")


def by_the_modules(model: Any, kept: str, step: str) -> None:
    model.decoder.steps.on = kept == "pages"  # which are never for compiled code
    kv, layout = ("int8" if kept == "int8 keys" else "auto"), ("paged" if kept == "pages" else "slab")
    calls = counted(model, *standing(model, STEPS[step], kv, layout))
    most, tensors = BY_MODULES[kept][step]
    assert sum(calls.calls.values()) <= most, calls.calls
    assert calls.tensors <= tensors, calls.calls


@pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
@pytest.mark.parametrize("owners", [(True,), (True, False, False), (True, True, True)])
def test_an_adapter_in_the_batch(mini: Any, owners: tuple[bool, ...], tmp_path: Path) -> None:
    """Its step goes by the modules, and costs the same for one request as for all; the next step is one call again."""
    adapters = Adapters(mini)
    adapters.load("one", make_adapter(tmp_path / "one", mini))
    found = adapters.find("one")
    cache, step = standing(mini, (1,) * len(owners))
    with adapters.tokens([(found if owner else None, 1, 1) for owner in owners]):
        counted(mini, cache, step)  # makes tables
        calls = counted(mini, cache, step)
    plain = BY_MODULES["float keys"]["one" if len(owners) == 1 else "three"]
    assert sum(calls.calls.values()) <= plain[0] + LAYERS * ADAPTED["calls"], calls.calls
    assert calls.tensors <= plain[1] + LAYERS * ADAPTED["tensors"], calls.calls
    assert sum(counted(mini, cache, step).calls.values()) == COMPILED["calls"]


FORMATS = (None, "exact", "int8", "int4")
MIXED = ("kimi_vl", "KeyeVLMoe")
"""Latent attention, a dense layer and then experts; the second with low-rank queries and groups of experts."""


@pytest.fixture(scope="module", params=[(kind, quant) for kind in MIXED for quant in FORMATS], ids=str)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind, quant = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_deepseek, "deepseek_text", partial(tiny_deepseek.deepseek_text, moe_intermediate_size=32))
        folder = make_tiny(tmp_path_factory.mktemp("mixed"), kind)
    return load(folder, device="cpu", quant=quant).model


def standing_latents(model: Any, lengths: tuple[int, ...], kv: str = "auto") -> tuple[Any, Batch]:
    """As ``standing``."""
    cache: Any = make_cache(cache_spec(model.decoder.config), torch.float32, "cpu", kv=kv)
    for slot in range(len(lengths)):
        cache.allocate(slot)
        cache.grow(slot, 2 * PAST)
    past = (PAST,) * len(lengths)
    places = torch.cat([torch.arange(PAST, PAST + length) for length in lengths]).expand(3, -1)
    batch = Batch(torch.full((sum(lengths),), 5), places, lengths, past)
    with torch.inference_mode():
        for layer in range(cache.num_layers):
            for slot in range(len(lengths)):
                cache.write(layer, slot, 0, torch.randn(PAST, 1, sum(cache._parts)))
        for on in (False, True):  # first calls build plans and tables
            model.decoder.steps.on = on
            model.next_logits(batch, None, cache)
    return cache, batch


@pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("step", ["one", "three", "sixteen", "a draft of seven"])
def test_a_step_of_latents_and_experts_is_one_call(mixed: Any, step: str, kv: str) -> None:
    calls = counted(mixed, *standing_latents(mixed, STEPS[step], kv))
    assert (sum(calls.calls.values()), calls.tensors) == (COMPILED["calls"], COMPILED["tensors"]), calls.calls


@pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
def test_a_layer_of_latent_attention_and_experts_by_the_modules() -> None:
    def calls(layers: int, dense: int) -> int:
        config = DeepseekConfig(
            vocab_size=32, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=96,
            kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
            moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3,
            first_k_dense_replace=dense,
        )  # fmt: skip
        decoder, cache = DeepseekDecoder(config).eval(), make_cache(cache_spec(config), torch.float32, "cpu")
        decoder.steps.on = False
        cache.allocate(0)
        cache.grow(0, 2 * PAST)
        step = Batch(torch.tensor([5]), torch.full((3, 1), PAST), (1,), (PAST,))
        with torch.inference_mode():
            x = decoder.embed(step.tokens)
            decoder(x, step, cache)
            with Calls() as counter:
                decoder(x, step, cache)
        return sum(counter.calls.values())

    assert calls(2, 2) - calls(1, 1) <= LATENT
    assert calls(2, 1) - calls(1, 1) <= LATENT + EXPERTS
