"""Layers over several devices: the plan from made-up sizes, and values that follow it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mirada import VLM, Image, Message, Sampling, Text
from mirada.engine import load as loading
from mirada.engine import memory, place
from mirada.engine.place import Mover, Plan, Room, Sizes, measure, plan
from mirada.errors import NotAvailable, OutOfMemory, SettingsError
from mirada.layers.cache import SlabCache

A, B, CPU = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")
SIZES = Sizes(main=100, layers=(30, 30, 30, 30), cache=5, working=10)


def test_all_on_the_first_device_if_it_fits():
    made = plan(SIZES, [Room(A, 250), Room(B, 250), Room(CPU, 1000)])
    assert made == Plan(A, (A,) * 4) and made.devices == (A,)
    assert plan(SIZES, [Room(A, 249), Room(B, 250)]).layers == (A, A, A, B)


def test_layers_go_on_where_the_last_device_was_full():
    made = plan(SIZES, [Room(A, 180), Room(B, 45), Room(CPU, 80)])
    assert made == Plan(A, (A, A, B, CPU)) and made.devices == (A, B, CPU)
    assert [made.device_of(f"decoder.layers.{i}.mlp.down.weight") for i in range(4)] == list(made.layers)
    for name in ("decoder.embed.weight", "visual.layers.3.norm1.weight", "lm_head.weight", "decoder.norm.weight"):
        assert made.device_of(name) == A


def test_a_device_too_small_is_passed_over_and_not_gone_back_to():
    # The first GPU holds no weights outside the layers, yet the first layers.
    assert plan(SIZES, [Room(A, 80), Room(B, 250)]) == Plan(B, (A, A, B, B))
    uneven = Sizes(main=10, layers=(40, 90, 10), working=0)
    assert plan(uneven, [Room(A, 70), Room(B, 200)]).layers == (A, B, B)


@pytest.mark.parametrize("rooms", [[Room(A, 109)], [Room(A, 180), Room(B, 44), Room(CPU, 70)], [Room(A, -5), Room(CPU, 0)]])
def test_what_fits_nowhere_says_what_was_needed(rooms):
    with pytest.raises(OutOfMemory, match=r"needs 250 bytes.* on cuda:0.*quantised") as caught:
        plan(SIZES, rooms)
    assert caught.value.needed == 250 and caught.value.available == max(0, sum(room.free for room in rooms))
    assert caught.value.unit == "bytes"


def test_sizes_of_a_checkpoint_add_up(tiny_directories):
    from mirada.models.load import load_model

    for folder in tiny_directories.values():
        sizes, model = measure(folder, torch.bfloat16), load_model(folder, torch.bfloat16)
        held = {name: p.numel() * 2 for name, p in model.named_parameters()}
        for index, size in enumerate(sizes.layers):
            assert size == sum(n for name, n in held.items() if name.startswith(f"decoder.layers.{index}."))
        assert sizes.main + sum(sizes.layers) == sum(held.values())
        assert sizes.cache > 0 and sizes.working > 0


@pytest.fixture
def moves(monkeypatch):
    """Two fake GPUs: the plan names them, what would be moved is noted, and all stays on the CPU."""
    noted: list[torch.device] = []

    def note(self, value, device, keep):
        noted.append(device)
        return value

    monkeypatch.setattr(Mover, "_tensor", note)
    return noted


def test_answers_do_not_depend_on_the_plan(tiny_directories, engines, monkeypatch, picture, moves):
    """Every family through hooks: the same tokens, and each layer asked for its values on its device."""
    monkeypatch.setattr(loading, "rooms", lambda: [Room(CPU, 10**9), Room(CPU, 10**9)])
    for kind, folder in tiny_directories.items():
        spread = VLM(folder, device_map="auto")
        model, count = spread.parts.model, len(spread.parts.model.decoder.layers)
        assert spread.parts.placement == Plan(CPU, (CPU,) * count)
        assert spread._engine.engine.runner.cache.devices == (CPU,) * count
        for module in (*model.decoder.layers, model.decoder.norm):
            assert len(module._forward_pre_hooks) == 1
            module._forward_pre_hooks.clear()
        place.install(model, Plan(A, (A,) * (count - 1) + (B,)))
        moves.clear()
        chat = [Message("user", [Image(picture), Text("What?")])]
        sampling = Sampling(max_tokens=3, logprobs=0, ignore_eos=True)
        ours, theirs = (vlm.generate([chat], sampling)[0] for vlm in (spread, engines[kind]))
        assert ours.error is None and ours.tokens == theirs.tokens
        chances = [[report.logprob for report in output.logprobs or ()] for output in (ours, theirs)]
        assert chances[0] == pytest.approx(chances[1], abs=1e-5)
        steps = [moves[i] for i in range(len(moves)) if i == 0 or moves[i] != moves[i - 1]]
        assert steps == [A, B] * 3 + [A], "over the border and back, once a forward"


@dataclass(frozen=True)
class Shared:
    turn: tuple[torch.Tensor, torch.Tensor]
    name: str = "x"
    none: torch.Tensor | None = None


def test_what_is_moved_and_what_is_remembered():
    mover, meta = Mover(), torch.device("meta")
    shared, flow, cache = Shared((torch.ones(2), torch.ones(3))), torch.ones(4), object()
    (x, ctx, same), kwargs = mover.to(meta)(torch.nn.Identity(), (flow, shared, cache), {"y": flow, "n": 3})
    assert x.device == ctx.turn[0].device == ctx.turn[1].device == kwargs["y"].device == meta
    assert ctx.name == "x" and ctx.none is None and same is cache and kwargs["n"] == 3
    (_, again, _), _ = mover.to(meta)(torch.nn.Identity(), (flow, shared, cache), {})
    assert again.turn[0] is ctx.turn[0], "what layers share is moved once"
    mover.forget()
    (_, later, _), _ = mover.to(meta)(torch.nn.Identity(), (flow, shared, cache), {})
    assert later.turn[0] is not ctx.turn[0]
    (x, ctx, _), _ = mover.to(CPU)(torch.nn.Identity(), (flow, shared, cache), {})
    assert x is flow and ctx is shared, "nothing is made anew where nothing moves"


def test_parameters_are_allocated_where_the_plan_says(tiny_directories):
    from mirada.models.load import build, read_json

    meta = torch.device("meta")
    for folder in tiny_directories.values():
        mapping = read_json(folder / "config.json")
        layers = mapping.get("text_config", mapping)["num_hidden_layers"]
        made = Plan(CPU, (CPU, meta) + (CPU,) * (layers - 2))
        model = build(mapping, torch.float32, "cpu", place=made.device_of)
        for name, parameter in model.named_parameters():
            assert parameter.device == (meta if name.startswith("decoder.layers.1.") else CPU), name


def test_slabs_lie_with_their_layers():
    cache = SlabCache(2, 1, 4)
    cache.spread((CPU, torch.device("meta")))
    cache.allocate(0)
    for layer in range(2):
        cache.write(layer, 0, 0, torch.ones(1, 1, 4), torch.ones(1, 1, 4))
    assert [slabs[0].device.type for slabs in cache._slabs[0]] == ["cpu", "meta"]
    with pytest.raises(ValueError, match="1 open"):
        cache.spread((CPU, CPU))
    with pytest.raises(ValueError, match="1 devices for 2 layers"):
        SlabCache(2, 1, 4).spread((CPU,))


def test_admission_looks_at_every_device(engines, all_of_it, monkeypatch):
    engine = next(iter(engines.values()))._engine.engine
    budget, cache = engine.scheduler.budget, engine.runner.cache
    free = {CPU: 1000, A: 300}
    monkeypatch.setattr(memory, "available", lambda device: free[device])
    monkeypatch.setattr(cache, "devices", (CPU, A))
    # Half of the cache lies on each.
    assert budget.free(()) == 600
    monkeypatch.setattr(cache, "bytes_held", 100)
    assert budget.free(()) == 700
    monkeypatch.setattr(cache, "devices", (CPU, CPU))
    assert budget.free(()) == 1100
    monkeypatch.setattr(cache, "bytes_held", 0)


def test_settings_that_make_no_sense(tiny_directories, monkeypatch):
    folder = tiny_directories["Keye"]
    with pytest.raises(SettingsError, match=r"device_map 'balanced'.*'auto'"):
        VLM(folder, device_map="balanced")
    with pytest.raises(SettingsError, match="beside device_map"):
        VLM(folder, device_map="auto", device="cpu")
    monkeypatch.setattr(loading, "rooms", lambda: [Room(CPU, 1000)])
    with pytest.raises(OutOfMemory, match="on cpu"):
        VLM(folder, device_map="auto")


def test_a_kind_of_attention_must_suit_every_device_of_the_plan(tiny_directories, monkeypatch):
    folder = tiny_directories["Keye"]
    sizes = measure(folder, torch.bfloat16)
    only = sizes.main + sizes.layers[0] + sizes.cache + sizes.working
    monkeypatch.setattr(loading, "rooms", lambda: [Room(A, only), Room(CPU, 10**9)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    with pytest.raises(NotAvailable, match=r"flash.*cpu"):
        VLM(folder, device_map="auto", attn="flash", dtype="bf16")


def test_auto_without_a_gpu_is_the_cpu(tiny_directories):
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        made = VLM(tiny_directories["Keye"], device_map="auto", dtype="auto").parts
        assert made.placement is not None and made.placement.devices == (CPU,)
        assert made.model.lm_head.weight.dtype == torch.float32
