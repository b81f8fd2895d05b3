"""A decoder of latent attention and experts, packed as its release is: blocks of fp8, and as others pack it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packers import FORMS
from safetensors.torch import save_file
from torch import nn

from mirada import adapt
from mirada.adapt.packed import PackedLinear, PackedStack
from mirada.layers import fused
from mirada.layers.batch import Batch
from mirada.layers.cache import make_cache
from mirada.layers.kernels.library import library
from mirada.models import quantised, shards
from mirada.models.deepseek import DeepseekConfig, DeepseekDecoder, cache_spec, ignored, rules
from mirada.models.layout import Layout
from mirada.models.load import load_weights

CONFIG = DeepseekConfig(
    vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, kv_lora_rank=24,
    q_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, moe_intermediate_size=24, n_routed_experts=8,
    n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1, max_position_embeddings=64,
    rms_norm_eps=1e-6, num_nextn_predict_layers=1,
)  # fmt: skip
LAYOUT = Layout(tuple(rules(CONFIG)), ignored(CONFIG))


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = DeepseekDecoder(CONFIG)
        self.lm_head = nn.Linear(CONFIG.hidden_size, CONFIG.vocab_size, bias=False)

    @torch.no_grad()
    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """A prompt, then three single steps from its cache: the absorbed form of attention."""
        cache = make_cache(cache_spec(CONFIG), torch.float32, "cpu")
        cache.allocate(0)
        made = []
        for begin, end in ((0, 20), (20, 21), (21, 22), (22, 23)):
            where = torch.arange(begin, end).expand(3, -1)
            batch = Batch(tokens[begin:end], where, (end - begin,), (begin,))
            made.append(self.lm_head(self.decoder(self.decoder.embed(tokens[begin:end]), batch, cache)))
        return torch.cat(made)


def checkpoint(folder: Path, form: str) -> tuple[dict, dict, object]:
    """Stored tensors packed and plain, written as the release is: the router and the layer for further tokens too."""
    config, packer = FORMS[form]
    random = torch.Generator().manual_seed(3)
    packed, plain = {}, {}
    for name, (_, _, shape) in LAYOUT.stored().items():
        made = torch.randn(shape, generator=random) / (shape[-1] ** 0.5 if len(shape) > 1 else 5) + (len(shape) == 1)
        plain[name] = packed[name] = made
        if "_proj" in name:
            stored, plain[name] = packer(packed.pop(name))
            packed |= {f"{name.removesuffix('weight')}{suffix}": t.contiguous() for suffix, t in stored.items()}
    further = {"model.layers.2.eh_proj.weight": torch.ones(4, 8), "model.layers.2.eh_proj.weight_scale_inv": torch.ones(1, 1)}
    save_file(packed | (further if form.startswith("fp8") else {}), folder / "packed.safetensors")
    save_file(plain, folder / "plain.safetensors")
    scheme = adapt.read({"quantization_config": config})
    return shards.read_all([folder / "packed.safetensors"]), shards.read_all([folder / "plain.safetensors"]), scheme


@pytest.mark.parametrize("form", ["fp8", "fp8 small blocks", "gptq 4", "compressed asymmetric"])
def test_packed_experts_compute_what_they_mean(tmp_path: Path, form: str) -> None:
    packed, plain, scheme = checkpoint(tmp_path, form)
    tokens = torch.randint(0, 90, (23,), generator=torch.Generator().manual_seed(1))
    expected = LanguageModel()
    load_weights(expected, LAYOUT, plain)
    ours = LanguageModel()
    quantised.replace(ours, quantised.check(LAYOUT, packed, scheme))  # pyright: ignore[reportArgumentType]
    load_weights(ours, LAYOUT, packed, scheme)  # pyright: ignore[reportArgumentType]
    layer = ours.decoder.layers[1]
    assert isinstance(layer.mlp.experts.gate_up, PackedStack) and isinstance(layer.mlp.experts.down, PackedStack)
    assert isinstance(layer.attention.out, PackedLinear) and isinstance(layer.mlp.shared.gate_up, PackedLinear)
    assert isinstance(layer.attention.kv_b, nn.Linear)  # absorbed attention reads it
    torch.testing.assert_close(ours.run(tokens), expected.run(tokens), atol=1e-4, rtol=0)
    wide = LanguageModel()
    load_weights(wide, LAYOUT, packed, scheme)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(a, b) for a, b in zip(wide.parameters(), expected.parameters(), strict=True))


@pytest.mark.skipif(library() is None, reason="the CPU kernels are not compiled")
@pytest.mark.parametrize("form", ["gptq 4", "compressed 4"])
def test_packed_experts_are_multiplied_packed(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a precision mode: within what rounding activations changes, and no weight is ever widened."""
    packed, _, scheme = checkpoint(tmp_path, form)
    exact, ours = LanguageModel(), LanguageModel()
    for model, compiled in ((exact, False), (ours, True)):
        quantised.replace(model, quantised.check(LAYOUT, packed, scheme), compiled)  # pyright: ignore
        load_weights(model, LAYOUT, packed, scheme)  # pyright: ignore[reportArgumentType]
    tokens = torch.randint(0, 90, (23,), generator=torch.Generator().manual_seed(1))
    expected = exact.run(tokens)
    monkeypatch.setattr(PackedStack, "__getitem__", None)
    made = ours.run(tokens)
    experts = ours.decoder.layers[1].mlp.experts
    assert isinstance(experts.gate_up, PackedStack) and experts.table._array is not None
    assert (made - expected).abs().median() < 0.02 * expected.std()  # a near tie between experts may fall otherwise


@pytest.mark.parametrize("form", ["fp8", "gptq 4", "compressed asymmetric"])
def test_packed_experts_may_lie_one_below_another(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels for many experts read them: the same matrices, and no part is held twice; of floats in blocks they stay."""
    packed, _, scheme = checkpoint(tmp_path, form)
    ours = LanguageModel()
    quantised.replace(ours, quantised.check(LAYOUT, packed, scheme))  # pyright: ignore[reportArgumentType]
    load_weights(ours, LAYOUT, packed, scheme)  # pyright: ignore[reportArgumentType]
    experts = ours.decoder.layers[1].mlp.experts
    stacks = (experts.gate_up, experts.down)
    apart = [[stack[e] for e in range(len(stack))] for stack in stacks]
    size = sum(buffer.nbytes for buffer in experts.buffers())
    monkeypatch.setattr(fused, "packs", lambda device: True)
    quantised.join(ours)
    assert all((stack.joined is not None) == (form != "fp8") for stack in stacks)
    assert sum(buffer.nbytes for buffer in experts.buffers()) == size
    x = torch.randn(3, CONFIG.hidden_size)
    for stack, matrices in zip(stacks, apart, strict=True):
        assert all(torch.equal(stack[e], matrix) for e, matrix in enumerate(matrices))
        assert torch.equal(stack[-1], matrices[-1])
        with pytest.raises(IndexError):
            stack[len(stack)]
    torch.testing.assert_close(experts.gate_up.product(5, x), x @ apart[0][5].T)


def test_the_need_for_memory_counts_experts_as_stored(tmp_path: Path) -> None:
    packed, plain, scheme = checkpoint(tmp_path, "fp8")
    whole = quantised.resident_bytes(LAYOUT, plain, None, torch.bfloat16)
    assert whole == sum(p.numel() for p in LanguageModel().parameters()) * 2
    assert quantised.resident_bytes(LAYOUT, packed, scheme, torch.bfloat16) < 0.75 * whole  # pyright: ignore
    assert quantised.resident_bytes(LAYOUT, packed, scheme, torch.bfloat16, widen=True) == whole  # pyright: ignore
