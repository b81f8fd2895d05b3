"""Modes where Triton's kernels multiply: canonical integers on the device, made while loading and kept on disk.

``fused.packs`` says where that is; here it says so of the CPU, and the modules' own torch code multiplies.
"""

from __future__ import annotations

import pytest
import torch
from tiny import make_tiny, pack

from mirada import VLM, Sampling
from mirada.adapt.mode import parse
from mirada.adapt.packed import PackedLinear, PackedRows, PackedStack
from mirada.engine import load as engine_load
from mirada.engine import memory
from mirada.engine.load import check_weights
from mirada.layers import fused
from mirada.layers.kernels import library as compiled
from mirada.layers.linear import Linear
from mirada.models import formed, precision, rounding
from mirada.models.load import load_model, save_model
from mirada.types import Prompt

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=("qwen2_vl", "kimi_vl"))
def checkpoint(request, tmp_path_factory):
    """A tiny checkpoint in bfloat16: one whose head is its table, one with experts."""
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny(folder, request.param, **({"tie_word_embeddings": True} if request.param == "qwen2_vl" else {}))
    save_model(load_model(folder, torch.bfloat16), folder)
    return folder


@pytest.fixture
def packs(monkeypatch):
    monkeypatch.setattr(fused, "packs", lambda device: True)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    tokens = torch.randint(5, 60, (24,), generator=torch.Generator().manual_seed(0))
    return model.logits(model(pack([Prompt(tuple(tokens.tolist()))]))).float()


def divergence(model, reference) -> float:
    made, expected = logits(model).log_softmax(-1), logits(reference).log_softmax(-1)
    return float((expected.exp() * (expected - made)).sum(-1).mean())


@pytest.mark.parametrize(("quant", "most"), [("int8", 5e-4), ("int4", 6e-2)])
def test_answers_are_nearly_those_of_float32(checkpoint, quant, most, packs):
    reference, model = load_model(checkpoint), load_model(checkpoint, mode=parse(quant))
    assert precision.bits(model) == {"int8": {8}, "int4": {4, 8}}[quant]
    slack = 10 if "moe" in type(reference).__name__.lower() else 1  # experts of a random model are chosen by near ties
    assert 0 < divergence(model, reference) < most * slack
    held = {path for path, module in model.named_modules() if isinstance(module, PackedLinear | PackedStack)}
    assert "lm_head" in held and all(path.startswith(("decoder.layers", "lm_head")) for path in held)
    for module in model.modules():  # one tensor of each, which moves with the model
        assert getattr(module, "holder", None) is None
        if isinstance(module, PackedStack):
            assert module.joined is not None and not module.parts and len(module) == module.shape[0]


def test_the_rest_takes_the_type_that_is_asked_for(checkpoint, packs):
    model = load_model(checkpoint, torch.bfloat16, mode=parse("int8"))
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype != torch.bfloat16}
    assert all("router" in name for name in wide) and logits(model).isfinite().all()
    rows = next(module for module in model.modules() if isinstance(module, PackedRows))
    assert rows.values.dtype == torch.uint8 and rows.scales.dtype == torch.float16


def test_bytes_are_those_that_were_reckoned(checkpoint, packs, monkeypatch):
    asked = []
    monkeypatch.setattr(engine_load.memory, "require", lambda needed, free, what, fix: asked.append(needed))
    for dtype in (torch.float32, torch.bfloat16):
        check_weights(checkpoint, dtype, CPU, mode=parse("int4"))
        model = load_model(checkpoint, dtype, mode=parse("int4"))
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        assert asked.pop() == pytest.approx(held, rel=0.06)  # routers stay wide, and some groups are smaller


def test_what_rounding_would_spoil_stays_plain(checkpoint, packs, monkeypatch):
    first = load_model(checkpoint, mode=parse("int4"))
    name = max(rounding.of(first), key=lambda name: rounding.of(first)[name].error * (name != "lm_head.weight"))
    monkeypatch.setitem(rounding.MOST, 4, rounding.of(first)[name].error * 0.9999)
    model = load_model(checkpoint, mode=parse("int4"))
    assert name in rounding.exact(model)
    assert divergence(model, load_model(checkpoint)) < 2e-1
    assert len(list(model.parameters())) > len(list(first.parameters()))


@pytest.mark.skipif(compiled.library() is None, reason="checksums are the compiled kernels'")
def test_the_second_time_it_comes_from_disk(checkpoint, packs, tmp_path, monkeypatch):
    monkeypatch.setenv("MIRADA_CACHE", str(tmp_path))
    monkeypatch.setattr(formed, "FROM_BYTES", 0)
    monkeypatch.setitem(rounding.MOST, 4, 0.1)  # some stay plain, and so does the head
    monkeypatch.setitem(rounding.MOST, 8, 0.0)
    first = load_model(checkpoint, torch.bfloat16, mode=parse("int4"))
    assert len(list((tmp_path / "formed").iterdir())) == 1
    monkeypatch.setattr("mirada.models.load.load_weights", lambda *args: pytest.fail("was rounded again"))
    second = load_model(checkpoint, torch.bfloat16, mode=parse("int4"))
    assert torch.equal(logits(first), logits(second)) and rounding.of(first) == rounding.of(second)
    assert first.state_dict().keys() == second.state_dict().keys()
    for model in (first, second):
        assert isinstance(model.lm_head, Linear) and model.lm_head.weight.dtype == torch.bfloat16
        assert (model.lm_head.weight is model.decoder.embed.weight) == model.config.text.tie_word_embeddings


def test_an_engine_in_integers(checkpoint, packs):
    prompts = [Prompt(tuple(range(10 + i, 30 + 3 * i))) for i in range(3)]
    with VLM(checkpoint, device="cpu", load_in_4bit=True) as vlm:
        assert vlm.precision == "int4:32"
        together = vlm.generate(prompts, Sampling(max_tokens=6))
        alone = [vlm.generate([prompt], Sampling(max_tokens=6))[0] for prompt in prompts]
        assert [o.error for o in together] == [None] * 3
        assert [o.tokens for o in together] == [o.tokens for o in alone]
        model = vlm.parts.model
        assert memory.widest(model) >= model.config.text.vocab_size * model.config.text.hidden_size
