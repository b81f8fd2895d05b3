"""Models in a precision mode: which matrices take it, what they answer, and the file from which they come the second time."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from tiny import TINY, make_tiny, pack

from mirada.adapt.mode import parse, quantise
from mirada.errors import NotAvailable, TensorError
from mirada.layers.kernels import library as compiled
from mirada.layers.kernels.matrix import Format
from mirada.layers.linear import MatrixLinear, MatrixStack
from mirada.models import formed, precision, rounding, shards
from mirada.models.family import family_of
from mirada.models.load import load_model, save_model
from mirada.types import Prompt

needs_library = pytest.mark.skipif(compiled.library() is None, reason=f"no compiled kernels: {compiled.status().why}")


@pytest.fixture(scope="module", params=sorted(TINY))
def checkpoint(request, tmp_path_factory):
    """A tiny checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny(folder, request.param)
    save_model(load_model(folder, torch.bfloat16), folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRADA_CACHE", str(tmp_path))
    monkeypatch.setattr(formed, "FROM_BYTES", 0)
    return tmp_path / "formed"


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(compiled, "_loaded", lambda: (None, compiled.Status("none", "a test", "end it")))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    tokens = torch.randint(5, 60, (24,), generator=torch.Generator().manual_seed(0))
    return model.logits(model(pack([Prompt(tuple(tokens.tolist()))])))


def divergence(model, reference) -> float:
    made, expected = logits(model).log_softmax(-1), logits(reference).log_softmax(-1)
    return float((expected.exp() * (expected - made)).sum(-1).mean())


@pytest.mark.parametrize("compiled_kernels", [pytest.param(True, marks=needs_library), False])
@pytest.mark.parametrize(("quant", "most"), [("exact", 1e-7), ("int8", 2e-4), ("int4", 2e-2)])
def test_a_mode_answers_nearly_as_float32(checkpoint, quant, most, compiled_kernels, request):
    reference = load_model(checkpoint)
    if not compiled_kernels:
        request.getfixturevalue("no_library")
    model = load_model(checkpoint, mode=parse(quant))
    assert precision.bits(model) == {"exact": set(), "int8": {8}, "int4": {4, 8}}[quant]
    # torch's int8 rounds activations to 7 bits; experts of a random model are chosen by near ties.
    slack = (1 if compiled_kernels or quant == "exact" else 5) * (10 if "moe" in type(reference).__name__.lower() else 1)
    assert divergence(model, reference) < most * slack
    plain = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        rounded = (
            name.startswith("decoder.layers") and parameter.ndim > 1 and not name.endswith(("router.weight", "kv_b.weight"))
        )
        tower = name.startswith(("visual", "projector"))
        if not rounded and not tower and not name.startswith("lm_head"):
            assert torch.equal(plain[name].float(), parameter), name  # routers, norms, embeddings, kv_b: as they were


def test_the_tower_computes_the_same(checkpoint):
    reference, model = load_model(checkpoint), load_model(checkpoint, mode=parse("int4"))
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(("visual", "projector")):
            other = model.get_submodule(name)
            with torch.no_grad():
                assert torch.equal(other.weight, module.weight), name
                x = torch.randn(20, module.in_features)
                assert torch.allclose(other(x), module(x), atol=1e-5), name


@needs_library
def test_the_second_start_is_the_first(checkpoint, cache):
    for quant in ("exact", "int8", "int4:64"):
        first = load_model(checkpoint, mode=parse(quant))
        assert any(isinstance(m, MatrixLinear | MatrixStack) for m in first.modules())
        second = load_model(checkpoint, mode=parse(quant))
        held = dict(formed.tensors(second))
        assert all(torch.equal(t, held[n]) for n, t in formed.tensors(first)) and len(held) == len(dict(formed.tensors(first)))
        assert torch.equal(logits(second), logits(first))
        assert second.lm_head.weight.shape == first.lm_head.weight.shape
    assert len(list(cache.iterdir())) == 2  # nothing is computed for exact, so nothing is kept


@needs_library
@pytest.mark.parametrize("shard", [1 << 30, 4000])
def test_exact_matrices_stay_in_their_files(checkpoint, tmp_path, shard, monkeypatch):
    """In one file what needs no joining, and gates with ups, are never read; divided, each tensor may lie apart."""
    model = load_model(checkpoint, torch.bfloat16)
    save_model(model, tmp_path / "model", max_shard_bytes=shard)
    (tmp_path / "model" / "config.json").write_text((checkpoint / "config.json").read_text())
    read, chunks = [], shards.Mapped.chunks
    monkeypatch.setattr(
        shards.Mapped, "chunks", lambda self, stored, *rest: (read.append(stored.name), chunks(self, stored, *rest))[1]
    )
    made = load_model(tmp_path / "model", mode=parse("exact"))
    assert not [name for name in read if name.endswith(("down_proj.weight", "o_proj.weight", "embed_tokens.weight"))]
    assert any("gate_proj" in name for name in read) == (shard == 4000)
    assert any(name.endswith(("q_proj.weight", "kv_b_proj.weight")) for name in read)
    assert torch.equal(logits(made), logits(load_model(checkpoint, mode=parse("exact"))))


@pytest.fixture
def one(tmp_path):
    return make_tiny(tmp_path / "model", "qwen2_vl")


@needs_library
@pytest.mark.parametrize("damage", ["cut", "byte", "header", "empty", "magic"])
def test_a_broken_file_is_made_anew(one, cache, damage, caplog):
    first = load_model(one, mode=parse("int4"))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    broken = bytearray(whole)
    if damage == "cut":
        del broken[-1000:]
    elif damage == "empty":
        broken.clear()
    else:
        broken[{"byte": len(broken) - 3000, "header": 60, "magic": 0}[damage]] ^= 1
    file.write_bytes(broken)
    assert torch.equal(logits(load_model(one, mode=parse("int4"))), logits(first))
    assert "broken and made anew" in caplog.text
    assert file.read_bytes() == whole


@needs_library
def test_another_checkpoint_has_another_file(one, cache, monkeypatch):
    load_model(one, mode=parse("int8"))
    model = load_model(one)
    with torch.no_grad():
        model.decoder.norm.weight.add_(1)
    save_model(model, one)  # the same shapes and header, other numbers
    changed = load_model(one, mode=parse("int8"))
    assert torch.equal(changed.decoder.norm.weight, model.decoder.norm.weight)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(compiled, "VERSION", 77)
    load_model(one, mode=parse("int8"))
    assert len(list(cache.iterdir())) == 3


@needs_library
def test_the_cache_is_bounded(one, cache, monkeypatch):
    load_model(one, mode=parse("int8"))
    (first,) = cache.iterdir()
    monkeypatch.setenv("MIRADA_CACHE_GB", str(first.stat().st_size * 1.5 / 1e9))
    load_model(one, mode=parse("int4"))
    (second,) = cache.iterdir()
    assert second != first
    monkeypatch.setenv("MIRADA_CACHE_GB", "0")
    load_model(one, mode=parse("int8"))
    assert list(cache.iterdir()) == [second]


@needs_library
def test_a_disk_that_takes_nothing_is_said(one, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MIRADA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(formed, "FROM_BYTES", 0)
    load_model(one, mode=parse("int8"))
    assert "could not be kept" in caplog.text


def plant(folder, *parts: str) -> list[str]:
    """Makes one column of each group of 32 a thousand times as large in the matrices whose names hold ``parts``."""
    model = load_model(folder)
    layout = family_of(json.loads((folder / "config.json").read_text())).layout(model.config)
    names = []
    with torch.no_grad():
        for name, view in layout.read(dict(model.named_parameters())):
            if any(part in name for part in parts):
                view.view(-1, view.shape[-1])[:, ::32] *= 1000
                names.append(name)
    save_model(model.to(torch.bfloat16), folder)
    return names


@pytest.mark.parametrize("compiled_kernels", [pytest.param(True, marks=needs_library), False])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_what_rounding_would_spoil_stays_exact_and_is_named(checkpoint, tmp_path, quant, compiled_kernels, request, caplog):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    moe = "experts.1.down_proj" if "moe" in checkpoint.name.lower() or "kimi" in checkpoint.name else "layers.1.mlp.down_proj"
    planted = plant(folder, "layers.0.self_attn.o_proj", moe)
    assert len(planted) >= 2
    if not compiled_kernels:
        request.getfixturevalue("no_library")
    reference, model = load_model(folder), load_model(folder, mode=parse(quant))
    assert sorted(rounding.exact(model)) == sorted(planted)
    assert (
        all(name in caplog.text for name in planted) and f"{len(planted)} of {len(rounding.of(model))} matrices" in caplog.text
    )
    for name, one in rounding.of(model).items():
        assert one.error > 0.5 if name in planted else one.error < rounding.MOST[one.bits] / 2, name
    wide, kept = dict(reference.named_parameters()), dict(model.named_modules())
    out = next(name for name in wide if name.startswith("decoder.layers.0.") and name.endswith("out.weight"))
    assert torch.equal(kept[out.removesuffix(".weight")].weight.float(), wide[out])
    fine = load_model(checkpoint, mode=parse(quant))
    assert not rounding.exact(fine) and "stay exact" not in caplog.text.split(planted[-1])[-1]


@needs_library
def test_a_matrix_that_stayed_exact_is_so_the_second_time(tmp_path, cache, caplog):
    one = make_tiny(tmp_path / "tied", "qwen2_vl", tie_word_embeddings=True)
    planted = plant(one, "layers.0.mlp.gate_proj", "embed_tokens")
    first = load_model(one, mode=parse("int4"))
    gate = next(name for name in planted if "gate_proj" in name)
    assert set(rounding.exact(first)) == {gate, "lm_head.weight"}
    caplog.clear()
    second = load_model(one, mode=parse("int4"))
    assert rounding.of(second) == rounding.of(first) and "stay exact" in caplog.text
    assert second.decoder.layers[0].mlp.gate_up.matrix.format == second.lm_head.matrix.format == Format.BF16
    assert torch.equal(logits(second), logits(first))
    assert len(list(cache.iterdir())) == 1


def test_the_error_is_that_of_a_product_with_equal_inputs():
    """Against its definition, by drawing inputs; and outliers do not hide what they do to the rest."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=random)
    weight[:, ::32] *= 50
    x = torch.randn(4000, 256, generator=random) / weight.norm(dim=0)  # each column gives the product as much
    for bits, group in ((8, 32), (4, 32)):
        made = quantise(weight, bits, group).widen()
        measure = rounding.Measure(bits, 256)
        for begin in range(0, 64, 24):
            measure.add(weight[begin : begin + 24], made[begin : begin + 24].clone())
        lost, whole = x @ (made - weight).T, x @ weight.T
        assert measure.result().error == pytest.approx(float(lost.norm() / whole.norm()), rel=0.1)
        assert measure.result().error > 3 * float((made - weight).norm() / weight.norm())
    zeros = rounding.Measure(4, 8)
    zeros.add(torch.zeros(3, 8), torch.zeros(3, 8))
    assert zeros.result() == rounding.Rounding(4, 0.0)


def test_what_cannot_be_done(one):
    model = load_model(one, mode=parse("int8"))
    with pytest.raises(NotAvailable, match="packed"):
        save_model(model, one)
    plain = load_model(one)
    with torch.no_grad():
        plain.decoder.layers[0].mlp.down.weight[3, 3] = float("nan")
    save_model(plain, one)
    with pytest.raises(TensorError, match="down_proj"):
        load_model(one, mode=parse("int8"))


def test_a_copy_stands_alone(one):
    model = load_model(one, mode=parse("int4"))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
