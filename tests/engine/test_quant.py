"""``VLM(..., quant=)``: what it refuses, and that an engine in a mode answers alike whatever the batch is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import make_tiny

from mirada import VLM, Sampling
from mirada.adapt.mode import Mode
from mirada.engine.load import check_mode
from mirada.errors import NotAvailable, SettingsError
from mirada.models import precision
from mirada.types import Prompt

CPU, INT4, INT8 = torch.device("cpu"), Mode("int4", 32), Mode("int8", 128)
GPTQ8 = SimpleNamespace(method="gptq", bits=8, widens=False)
MIXED = SimpleNamespace(method="compressed-tensors", widens=False, groups=(SimpleNamespace(bits=4), SimpleNamespace(bits=8)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen2_vl")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_only_on_a_cpu(device):
    with pytest.raises(NotAvailable, match="for one CPU"):
        check_mode(INT4, None, torch.device(device), torch.float32, False, False)
    with pytest.raises(NotAvailable, match="several devices"):
        check_mode(INT4, None, CPU, torch.float32, True, False)


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
