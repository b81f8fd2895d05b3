"""``VLM(..., quant=)``: what it refuses, and that an engine in a mode answers alike whatever the batch is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import TINY, make_tiny
from tiny_adapters import make_adapter

from mirada import VLM, Image, Message, Sampling, Text
from mirada.adapt.mode import Mode
from mirada.engine.load import check_mode
from mirada.errors import NotAvailable, SettingsError
from mirada.layers import fused
from mirada.layers.kernels import library as compiled
from mirada.models import precision, quantised
from mirada.models.load import load_model, save_model
from mirada.types import Prompt

CPU, INT4, INT8 = torch.device("cpu"), Mode("int4", 32), Mode("int8", 128)
GPTQ8 = SimpleNamespace(method="gptq", bits=8, widens=False)
MIXED = SimpleNamespace(method="compressed-tensors", widens=False, groups=(SimpleNamespace(bits=4), SimpleNamespace(bits=8)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen2_vl")


def test_on_a_cpu_and_a_gpu_with_kernels(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(fused, "status", lambda: fused.Status(("cuda",), "Triton is installed"))
    assert check_mode(INT4, None, cuda, torch.bfloat16, False, False) == INT4
    with pytest.raises(SettingsError, match="widen=True"):
        check_mode(INT4, None, cuda, torch.bfloat16, False, True)
    with pytest.raises(NotAvailable, match="multiplied in a dtype"):
        check_mode(Mode("exact"), None, cuda, torch.bfloat16, False, False)
    with pytest.raises(NotAvailable, match="one device"):
        check_mode(INT4, None, torch.device("mps"), torch.float32, False, False)
    with pytest.raises(NotAvailable, match="several devices"):
        check_mode(INT4, None, CPU, torch.float32, True, False)
    monkeypatch.setattr(fused, "status", lambda: fused.Status((), "Triton is not installed", "install it"))
    with pytest.raises(NotAvailable, match="Triton is not installed") as refused:
        check_mode(INT4, None, cuda, torch.bfloat16, False, False)
    assert refused.value.fix == "install it"


def test_not_beside_another_type(folder):
    with pytest.raises(SettingsError, match="bfloat16"):
        VLM(folder, device="cpu", quant="int8", dtype="bfloat16")
    with pytest.raises(SettingsError, match="widen=True"):
        VLM(folder, device="cpu", quant="int8", widen=True)
    with pytest.raises(SettingsError, match="known: exact, int4, int8"):
        VLM(folder, device="cpu", quant="int3")


@pytest.mark.parametrize(("mode", "scheme"), [(INT4, GPTQ8), (Mode("exact"), GPTQ8), (INT4, MIXED), (INT8, MIXED)])
def test_a_packed_checkpoint_keeps_its_bits(mode, scheme):
    with pytest.raises(SettingsError, match=f"stored as {scheme.method}"):
        check_mode(mode, scheme, CPU, torch.float32, False, False)


def test_a_packed_checkpoint_may_be_multiplied_as_it_is():
    assert check_mode(INT8, GPTQ8, CPU, torch.float32, False, False) == INT8
    assert check_mode(None, GPTQ8, CPU, torch.bfloat16, True, True) is None


@pytest.mark.parametrize("quant", ["exact", "int8", "int4"])
def test_batch_mates_change_nothing(folder, quant):
    prompts = [Prompt(tuple(range(10 + i, 30 + 3 * i))) for i in range(5)]
    with VLM(folder, device="cpu", quant=quant) as vlm:
        assert bool(precision.bits(vlm.parts.model)) == (quant != "exact")
        together = vlm.generate(prompts, Sampling(max_tokens=8))
        alone = [vlm.generate([prompt], Sampling(max_tokens=8))[0] for prompt in prompts]
    assert [o.error for o in together] == [None] * 5
    assert [o.tokens for o in together] == [o.tokens for o in alone]


@pytest.fixture(scope="module", params=sorted(TINY))
def narrow(request, tmp_path_factory):
    """A checkpoint stored in bfloat16."""
    made = make_tiny(tmp_path_factory.mktemp(request.param), request.param)
    save_model(load_model(made, torch.bfloat16), made)
    return made


@pytest.mark.skipif(compiled.library() is None, reason="needs the compiled kernels")
def test_bfloat16_is_kept_as_it_is_stored_unasked(narrow, picture, caplog):
    chat = [Message("user", [Image(picture), Text("What is it?")])]
    sampling = Sampling(max_tokens=6, ignore_eos=True, logprobs=0)
    with caplog.at_level("INFO"), VLM(narrow, device="cpu") as kept, VLM(narrow, device="cpu", dtype="float32") as wide:
        assert (kept.precision, wide.precision) == ("exact", "float32")
        assert "kept as exact on cpu" in caplog.text
        model = kept.parts.model
        assert quantised.is_packed(model) and not quantised.is_packed(wide.parts.model)
        assert model.decoder.embed.weight.dtype == torch.bfloat16
        assert kept._engine.engine.runner.dtype == torch.float32  # activations, keys and values
        made, expected = (vlm.generate([chat], sampling)[0] for vlm in (kept, wide))
    assert made.error is None and made.tokens == expected.tokens
    assert [t.logprob for t in made.logprobs] == pytest.approx([t.logprob for t in expected.logprobs], abs=1e-4)


def test_an_adapter_beside_what_is_stored(narrow, tmp_path):
    """The same adapter on matrices as they are stored and on float32 ones gives the same answers, other than without it."""
    adapter = make_adapter(tmp_path / "a", load_model(narrow), 1)
    prompt, sampling = Prompt(tuple(range(10, 40))), Sampling(max_tokens=4, ignore_eos=True, logprobs=0)
    rows = []
    for dtype in ("auto", "float32"):
        with VLM(narrow, device="cpu", dtype=dtype, adapters={"a": adapter}) as vlm:
            rows.append([vlm.generate([prompt], sampling, adapter=name)[0] for name in ("a", None)])
    for made, expected in zip(*rows, strict=True):
        assert made.error is None and made.tokens == expected.tokens
        assert [t.logprob for t in made.logprobs] == pytest.approx([t.logprob for t in expected.logprobs], abs=1e-4)
    assert rows[0][0].logprobs != rows[0][1].logprobs


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"widen": True}, {"quant": "int8"}])
def test_what_is_asked_for_is_what_is_given(narrow, options):
    if narrow.name.startswith("qwen2_vl"):
        with VLM(narrow, device="cpu", **options) as vlm:
            wanted = {"dtype": "bfloat16", "widen": "float32", "quant": "int8:128"}[next(iter(options))]
            assert vlm.precision == wanted


def test_float32_and_mini_stay_what_they_are(folder):
    for name in (folder, "mini"):
        with VLM(name, device="cpu") as vlm:
            assert vlm.precision == "float32" and not quantised.is_packed(vlm.parts.model)


def test_without_kernels_it_is_float32(narrow, monkeypatch):
    monkeypatch.setattr(compiled, "_loaded", lambda: (None, compiled.Status("none", "a test", "end it")))
    with VLM(narrow, device="cpu") as vlm:
        assert vlm.precision == "float32"
