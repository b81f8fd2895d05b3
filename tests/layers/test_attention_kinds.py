"""Kinds of attention: one function by several kernels, and where each is refused."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, make_tiny

from mirada import VLM, Message, Sampling
from mirada.errors import NotAvailable, SettingsError
from mirada.layers import fused, kinds
from mirada.layers.attention import attend_packed
from mirada.layers.batch import Batch
from mirada.layers.cache import SlabCache, attend_one
from mirada.layers.kinds import KINDS, check_kind

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_by_every_kind(kind: str, causal: bool) -> None:
    lengths = (5, 9, 5, 1)
    q, k, v = noise(20, 4, 16), noise(20, 2, 16, seed=1), noise(20, 2, 16, seed=2)
    made = attend_packed(q, k, v, lengths, causal, 0.25, kind)
    start = 0
    for n in lengths:
        one = slice(start, start + n)
        for head in range(4):
            scores = q[one, head].double() @ k[one, head // 2].double().T * 0.25
            if causal:
                scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            torch.testing.assert_close(
                made[one, head].double(), scores.softmax(-1) @ v[one, head // 2].double(), atol=1e-5, rtol=0
            )
        start += n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [1, 3, 7])
def test_the_last_tokens_of_a_sequence_by_every_kind(kind: str, new: int) -> None:
    q, keys, values = noise(new, 4, 16), noise(2, 7, 16, seed=1), noise(2, 7, 16, seed=2)
    made = attend_one(q, keys, values, 0.25, kind)
    for row in range(new):
        seen = 7 - new + row + 1
        for head in range(4):
            scores = keys[head // 2, :seen] @ q[row, head] * 0.25
            torch.testing.assert_close(made[row, head], scores.softmax(0) @ values[head // 2, :seen], atol=1e-5, rtol=0)


def test_the_cache_hands_the_kind_on(monkeypatch) -> None:
    asked = []
    monkeypatch.setitem(KINDS, "eager", lambda *args: asked.append(1) or kinds.eager(*args))
    cache = SlabCache(1, 2, 16)
    cache.allocate(0)
    batch = Batch(torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64), (3,), (0,), (0,))
    q, k, v = noise(3, 4, 16), noise(3, 2, 16), noise(3, 2, 16)
    cache.attend(0, q, k, v, batch, 0.25, "eager")
    assert asked == [1]
    cache.attend(0, q, k, v, batch, 0.25)
    assert asked == [1]


@pytest.mark.parametrize("model_type", TINY)
def test_eager_equals_sdpa_in_every_family(model_type: str, tmp_path, monkeypatch) -> None:
    calls = {"eager": 0, "sdpa": 0}

    def counted(kind: str, real):
        def run(*args):
            calls[kind] += 1
            return real(*args)

        return run

    def counted_seen(*args):
        made = seen(*args)
        calls["sdpa"] += made is not None
        return made

    seen = fused.seen
    monkeypatch.setattr(fused, "seen", counted_seen)  # what sdpa is in a tower, where it is compiled
    for kind in calls:
        monkeypatch.setitem(KINDS, kind, counted(kind, KINDS[kind]))
    folder = make_tiny(tmp_path, model_type, seed=3)
    picture = noise(60, 90, 3).mul(40).add(128).clamp(0, 255).to(torch.uint8).numpy()
    sampling = Sampling(max_tokens=5, logprobs=0, ignore_eos=True)
    chat = [Message("user", [_image(picture), _text("What is it?")])]
    outputs = {}
    for kind in calls:
        before = dict(calls)
        outputs[kind] = VLM(folder, device="cpu", attn=kind).generate([chat, [Message("user", "hi")]], sampling)
        other = "sdpa" if kind == "eager" else "eager"
        assert calls[kind] > before[kind] and calls[other] == before[other], "another kind was used"
    for ours, theirs in zip(outputs["eager"], outputs["sdpa"], strict=True):
        assert ours.error is None and ours.tokens == theirs.tokens
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert abs(a.logprob - b.logprob) < 1e-4


def _image(picture):
    from mirada import Image

    return Image(picture)


def _text(text: str):
    from mirada import Text

    return Text(text)


def test_what_rules_a_kind_out(monkeypatch) -> None:
    assert check_kind("auto", CPU, torch.float32) == check_kind("sdpa", CPU, torch.bfloat16) == "sdpa"
    assert check_kind("eager", CPU, torch.float32) == "eager"
    with pytest.raises(SettingsError, match=r"'flsh' is unknown.*'flash'"):
        check_kind("flsh", CPU, torch.float32)
    with pytest.raises(NotAvailable, match=r"flash.*device cpu.*attn='auto'"):
        check_kind("flash", CPU, torch.bfloat16)
    with pytest.raises(SettingsError, match=r"flash.*float32.*dtype='bfloat16'"):
        check_kind("flash", CUDA, torch.float32)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(NotAvailable, match=r"capability 7\.5.*needs 8\.0"):
        check_kind("flash", CUDA, torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert check_kind("flash", CUDA, torch.float16) == "flash"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with pytest.raises(NotAvailable, match="a torch built with it"):
        check_kind("flash", CUDA, torch.bfloat16)


def test_an_engine_refuses_before_it_reads_weights(tmp_path) -> None:
    folder = make_tiny(tmp_path, "Keye")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(NotAvailable, match="flash"):
        VLM(folder, device="cpu", attn="flash")
    with pytest.raises(SettingsError, match="attn"):
        VLM(folder, device="cpu", attn="fast")
