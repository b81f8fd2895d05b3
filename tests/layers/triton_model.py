"""Whole decoders through the Triton kernels in Triton's interpreter, against the modules' own torch code on slabs."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import TINY, make_tiny, tiny_config, write_tokenizer
from tiny_deepseek import KIMI_CONTROL, write_tiktoken
from torch.utils._python_dispatch import TorchDispatchMode

from mirada.adapt.mode import parse
from mirada.engine.graphs import Graphs
from mirada.layers import fused
from mirada.layers.batch import Batch
from mirada.layers.cache import make_cache
from mirada.models.family import FAMILIES
from mirada.models.load import build, load_model

PIECES = ({0: 2, 1: 1}, {0: 1, 1: 5}, {0: 1, 1: 1})


def play(model, cache, pieces=PIECES) -> list[torch.Tensor]:
    """Logits of prompts in pieces and single tokens of two sequences, in company."""
    random, past, made = torch.Generator().manual_seed(0), {0: 0, 1: 0}, []
    for slot in past:
        cache.allocate(slot)
    for piece in pieces:
        places = torch.cat([torch.arange(past[slot], past[slot] + n) for slot, n in piece.items()])
        tokens = torch.randint(0, 90, (len(places),), generator=random)
        batch = Batch(tokens, places.expand(3, -1), tuple(piece.values()), tuple(past[s] for s in piece), tuple(piece))
        made.append(model.next_logits(batch, None, cache))
        past = {slot: past[slot] + n for slot, n in piece.items()}
    return made


@pytest.mark.parametrize("kind", ("qwen2_vl", "KeyeVL1_5", "kimi_vl"))
def test_models_through_the_kernels(kind, tmp_path, monkeypatch):
    ids = write_tiktoken(tmp_path, KIMI_CONTROL) if kind == "kimi_vl" else write_tokenizer(tmp_path, TINY[kind].control)
    model = build(tiny_config(kind, ids)).eval()
    model.init_weights(3)
    spec = FAMILIES[kind].cache_spec(model.config)
    used = set()
    for name in ("rms_norm", "add_norm", "swiglu", "turn_and_keep", "attend_pages", "attend_latents", "experts", "write"):
        real = getattr(fused, name)

        def noted(*args, real=real, name=name):
            out = real(*args)
            if out is not None or name == "write":
                used.add(name)
            return out

        monkeypatch.setattr(fused, name, noted)
    with torch.inference_mode():
        assert fused.on(torch.empty(1))
        ours = play(model, make_cache(spec, torch.float32, "cpu", layout="paged", budget=1 << 20))
        expected = {"attend_latents", "experts", "write"} if kind == "kimi_vl" else {"turn_and_keep", "attend_pages"}
        assert used == expected | {"rms_norm", "add_norm", "swiglu"}
        monkeypatch.setattr(fused, "on", lambda x: False)
        theirs = play(model, make_cache(spec, torch.float32, "cpu", layout="slab"))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 2e-4 * b.std() + 1e-5


def small_experts(folder) -> dict:
    """Of a Kimi-VL: one layer, of experts whose width the kernels take."""
    text = tiny_config("kimi_vl", write_tiktoken(folder, KIMI_CONTROL))["text_config"]
    return text | {"moe_intermediate_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 0}


def test_a_mode_through_the_kernels(tmp_path, monkeypatch):
    """Loading makes integers for the kernels, and single tokens and several are multiplied by them as they lie. The latents are
    integers too."""
    text = small_experts(tmp_path)
    model = load_model(make_tiny(tmp_path, "kimi_vl", text_config=text), mode=parse("int4"))
    pieces = ({0: 2, 1: 1}, {0: 1, 1: 2})
    spec, calls = FAMILIES["kimi_vl"].cache_spec(model.config), {"packed": 0, "experts": 0}
    for name in calls:
        real = getattr(fused, name)

        def counted(*args, real=real, name=name):
            out = real(*args)
            calls[name] += out is not None
            return out

        monkeypatch.setattr(fused, name, counted)
    with torch.inference_mode():
        ours = play(model, make_cache(spec, torch.float32, "cpu", kv="int8", layout="paged", budget=1 << 20), pieces)
        assert calls == {"packed": calls["packed"], "experts": len(pieces)} and calls["packed"] >= len(pieces) * 5
        monkeypatch.setattr(fused, "on", lambda x: False)
        theirs = play(model, make_cache(spec, torch.float32, "cpu", kv="int8", layout="slab"), pieces)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 2e-4 * b.std() + 1e-5


class Words(TorchDispatchMode):
    """Counts calls for which a host waits until a GPU has said a number: what a CUDA graph cannot hold."""

    WAIT = (
        "item", "_local_scalar_dense", "nonzero", "argwhere", "is_nonzero", "masked_select", "unique", "_unique", "equal",
        "repeat_interleave.Tensor",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        masks = [x for x in (args[1] if name.startswith("index.") else ()) if x is not None and x.dtype == torch.bool]
        self.calls += 1
        if masks or name.startswith(self.WAIT):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_fixed_step_says_nothing_to_the_host(tmp_path):
    """A step of decoding as it is captured, with latents, and experts as integers."""
    text = small_experts(tmp_path)
    model = load_model(make_tiny(tmp_path, "kimi_vl", text_config=text), mode=parse("int4"))
    spec = FAMILIES["kimi_vl"].cache_spec(model.config)
    cache = make_cache(spec, torch.float32, "cpu", layout="paged", budget=1 << 18)
    cache.allocate(0)
    chunks = [SimpleNamespace(count=1, rows=1, end=1, sequence=Decoding(0))]
    with torch.inference_mode():
        graphs = Graphs(model, cache, 64)
        assert graphs.takes(chunks)
        with Words() as words:
            logits = graphs.logits(chunks)
        with Words() as seen:  # they would be
            assert logits.argmax().item() >= 0 and len(logits[logits > logits.mean()]) and logits.nonzero().numel()
    assert words.found == [] and words.calls > 20 and logits.isfinite().all()
    assert [name.partition(".")[0] for name in seen.found] == ["item", "index", "nonzero"]


@dataclass
class Decoding:
    """What ``engine.graphs`` asks of a sequence that decodes its first token."""

    slot: int
    computed: int = 0
    lora: None = None
    features: None = None

    def ids(self, start: int, end: int) -> list[int]:
        return [7] * (end - start)

    def places(self, start: int, end: int) -> np.ndarray:
        return np.arange(start, end)[None].repeat(3, 0)


def test_gradients_go_the_modules_way():
    x = torch.randn(2, 8, requires_grad=True)
    assert not fused.on(x)
    with torch.no_grad():
        assert fused.on(x) and not fused.on(x.double()) and not fused.on(x.to("meta"))
