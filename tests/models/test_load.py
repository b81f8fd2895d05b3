"""Checkpoints on disk: every tensor once, bytes that come back, memory that stays, errors that name the thing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_tiny_keye

from mirada.errors import CheckpointError, ConfigError, TensorError
from mirada.models import shards
from mirada.models.layout import Layout, Rule
from mirada.models.load import build, load_model, save_model
from mirada.models.shards import Mapped, read_header

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "load_memory.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_tiny_keye(tmp_path_factory.mktemp("tiny"), "Keye", 1)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


# ---- what goes in comes out


def test_names_and_values_are_those_of_the_release(made: Path) -> None:
    model, stored = load_model(made), load_file(made / "model.safetensors")
    layer = stored["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(model.decoder.layers[1].attention.qkv.weight[64:96], layer)
    assert torch.equal(model.decoder.layers[0].mlp.gate_up.weight[160:], stored["model.layers.0.mlp.up_proj.weight"])
    patch = stored["visual.vision_model.embeddings.patch_embedding.weight"]
    assert patch.shape == (32, 3, 14, 14) and torch.equal(model.visual.patches.proj.weight, patch.flatten(1))
    assert not model.training


@pytest.mark.parametrize("options", [{}, {"max_shard_bytes": 100_000}, {"int8_rows": True, "max_shard_bytes": 60_000}])
@pytest.mark.parametrize("model_type", ["Keye", "KeyeVL1_5"])
def test_save_load_save_is_byte_identical(tmp_path: Path, model_type: str, options: dict) -> None:
    model = load_model(make_tiny_keye(tmp_path / "made", model_type))
    save_model(model, tmp_path / "first", **options)
    again = load_model(tmp_path / "first")
    options.pop("int8_rows", None)
    save_model(again, tmp_path / "second", **options)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    assert len(digests(tmp_path / "first")) > 4 or not options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_survive_too(made: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = load_model(made, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    save_model(model, tmp_path / "half")
    assert equal(load_model(tmp_path / "half", dtype), model)
    wide = load_model(tmp_path / "half", torch.float32)
    assert equal(wide.to(dtype), model)


def test_config_is_kept_to_the_letter(copy: Path, tmp_path: Path) -> None:
    text = json.dumps(json.loads((copy / "config.json").read_text()), indent=7) + "\n\n"
    (copy / "config.json").write_text(text)
    save_model(load_model(copy), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == text


def test_other_readers_understand_what_is_written(made: Path, tmp_path: Path) -> None:
    files = save_model(load_model(made), tmp_path / "out", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {}
    for file in files:
        assert file.stat().st_size < 130_000
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            held |= {name: file.name for name in opened.keys()}  # noqa: SIM118
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())


def test_files_of_the_format_library_are_read(made: Path, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7).half(), "c": torch.randn(2, 3).bfloat16(), "d": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "x.safetensors", {"some": "fact"})
    mapped, header = Mapped(), read_header(tmp_path / "x.safetensors")
    assert all(torch.equal(mapped.whole(header[name]), tensor) for name, tensor in tensors.items())


def test_chunks_cut_at_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 100)
    tensor = torch.randn(17, 9)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    pieces = [(at, piece.clone()) for at, piece in Mapped().chunks(read_header(tmp_path / "x.safetensors")["x"], 36)]
    assert [at for at, _ in pieces] == list(range(0, 17 * 9, 18))
    assert torch.equal(torch.cat([piece for _, piece in pieces]).view(17, 9), tensor)


def test_int8_rows_are_near_and_small(made: Path, tmp_path: Path) -> None:
    model = load_model(made)
    save_model(model, tmp_path / "small", int8_rows=True)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "mirada_int8_rows"}
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.int8 and stored["lm_head.weight_scale"].dtype == torch.float16
    assert stored["model.norm.weight"].dtype == torch.float32
    assert (tmp_path / "small" / "model.safetensors").stat().st_size < 0.35 * (made / "model.safetensors").stat().st_size
    for ours, theirs in zip(load_model(tmp_path / "small").parameters(), model.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= theirs.abs().max() / 127 * 0.51 + 2**-11 * theirs.abs().max()


def test_a_save_leaves_no_older_weights_behind(made: Path, tmp_path: Path) -> None:
    model = load_model(made)
    save_model(model, tmp_path, max_shard_bytes=100_000)
    save_model(model, tmp_path)
    assert sorted(digests(tmp_path)) == ["config.json", "model.safetensors"]


def test_ignored_tensors_may_be_there_and_are_not_kept(copy: Path, tmp_path: Path) -> None:
    stored = load_file(copy / "model.safetensors")
    extra = {
        "visual.vision_model.head.probe": torch.zeros(1, 1, 32),
        "visual.vision_model.embeddings.packing_position_embedding.weight": torch.zeros(4, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    save_file(stored | extra, copy / "model.safetensors")
    save_model(load_model(copy), tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(stored)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    directory = make_tiny_keye(tmp_path / "tied", "KeyeVL1_5", tie_word_embeddings=True)
    stored = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in stored
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, directory / "model.safetensors")
    model = load_model(directory)
    assert model.lm_head.weight is model.decoder.embed.weight
    assert torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"])


@pytest.mark.parametrize("model_type", ["Keye", "KeyeVL1_5"])
def test_the_projector_of_the_other_release_is_refused_by_its_norm(tmp_path: Path, model_type: str) -> None:
    directory = make_tiny_keye(tmp_path / "made", model_type)
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = {"Keye": "KeyeVL1_5", "KeyeVL1_5": "Keye"}[model_type]
    (directory / "config.json").write_text(json.dumps(config))
    sizes = {"Keye": r"\[32\], expected \[128\]", "KeyeVL1_5": r"\[128\], expected \[32\]"}
    with pytest.raises(TensorError, match=f"mlp_AR.pre_norm.weight.*{sizes[model_type]}"):
        load_model(directory)


# ---- what is broken is named


def _tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        stored = load_file(directory / "model.safetensors")
        change(stored)
        save_file(stored, directory / "model.safetensors")

    return spoil


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        file = directory / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return spoil


def _config(text: str | None = None, **keys: object) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys) if text is None else text)

    return spoil


def _sharded(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        save_model(load_model(directory), directory, max_shard_bytes=100_000)
        change(directory)

    return spoil


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _swap_index(directory: Path) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00009.safetensors"
    file.write_text(json.dumps(index))


def _outside(directory: Path) -> None:
    file = directory / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))


def _twice(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()
    shutil.copy(directory / "model-00001-of-00009.safetensors", directory / "model-00002-of-00009.safetensors")


def _overlong(data: bytes) -> bytes:
    return struct.pack("<Q", 1 << 40) + data[8:]


def _wrong_span(data: bytes) -> bytes:
    return (
        data.replace(b'"shape":[301,64]', b'"shape":[302,64]', 1)
        if b"[301,64]" in data
        else data.replace(b"[298,64]", b"[297,64]", 1)
    )


NORM, HEAD = "model.norm.weight", "lm_head.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], type[CheckpointError], str]] = {
    "tensor missing": (_tensors(lambda t: t.pop(NORM)), TensorError, r"lacks tensor 'model.norm.weight' of shape \[64\]"),
    "two missing": (_tensors(lambda t: (t.pop(NORM), t.pop(HEAD))), TensorError, r"lacks .* \(and 1 more\)"),
    "tensor extra": (_tensors(lambda t: t.update(spare=torch.zeros(2))), TensorError, "holds tensor 'spare'"),
    "misshapen": (
        _tensors(lambda t: t.update({NORM: torch.zeros(63)})), TensorError, r"norm.weight' has shape \[63\], expected \[64\]",
    ),
    "integers": (_tensors(lambda t: t.update({NORM: torch.zeros(64).long()})), TensorError, "norm.weight' is stored as I64"),
    "int8 unsaid": (_tensors(lambda t: t.update({HEAD: t[HEAD].char()})), TensorError, "lm_head.weight' is stored as int8"),
    "truncated": (_bytes(lambda data: data[:-5]), TensorError, r"model.safetensors is broken: tensor .* but the file has"),
    "header cut": (_bytes(lambda data: data[:50]), TensorError, "header should take"),
    "empty": (_bytes(lambda data: b""), TensorError, "is broken: it is empty"),
    "a pointer of Git LFS": (
        _bytes(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), TensorError, "git lfs pull",
    ),
    "header overlong": (_bytes(_overlong), TensorError, "header should take 1099511627776"),
    "header no JSON": (_bytes(lambda data: data[:8] + b"x" * (len(data) - 8)), TensorError, "not that of a safetensors"),
    "sizes disagree": (_bytes(_wrong_span), TensorError, "takes .* bytes, not"),
    "another size": (_config(hidden_size=32), TensorError, r"expected \["),
    "no config": (lambda d: (d / "config.json").unlink(), ConfigError, "config.json is missing"),
    "config no JSON": (_config("{"), ConfigError, "config.json is not JSON"),
    "config a list": (_config("[]"), ConfigError, "config.json holds a list"),
    "unknown family": (
        _config(model_type="Kaye"), ConfigError, r"config.json: model_type 'Kaye' .* mean 'Keye'\? known: Keye, KeyeVL1_5",
    ),
    "unknown key": (_config(rope_thta=1), ConfigError, "'rope_thta'"),
    "pickle": (_pickle, CheckpointError, "pickles .pytorch_model.bin.*any code"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), CheckpointError, "holds no weights"),
    "shard missing": (
        _sharded(lambda d: (d / "model-00003-of-00009.safetensors").unlink()), CheckpointError, "shard 'model-00003-of-00009.",
    ),
    "index elsewhere": (_sharded(_outside), CheckpointError, "shard 'elsewhere.safetensors'"),
    "index disagrees": (_sharded(_swap_index), TensorError, "(holds|lacks) tensor 'lm_head.weight', against"),
    "index malformed": (
        _sharded(lambda d: (d / "model.safetensors.index.json").write_text("{}")), CheckpointError, "is not an index of shards",
    ),
    "shard missing, no index": (
        _sharded(lambda d: [(d / n).unlink() for n in ("model.safetensors.index.json", "model-00001-of-00009.safetensors")]),
        CheckpointError, "shard 'model-00001-of-00009.safetensors'",
    ),
    "tensor twice": (_sharded(_twice), TensorError, "lies in model-00001.* and in model-00002"),
    "no scales": (
        _tensors(lambda t: t.update({HEAD: t[HEAD].char()})), TensorError, "lacks tensor 'lm_head.weight_scale' of shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_names_what_is_wrong(copy: Path, name: str) -> None:
    spoil, error, said = BROKEN[name]
    spoil(copy)
    if name == "no scales":
        _config(quantization_config={"quant_method": "mirada_int8_rows"})(copy)
    with pytest.raises(error, match=said) as caught:
        load_model(copy)
    assert caught.value.fix
    assert type(caught.value) is error


def test_what_does_not_fit_is_refused_before_memory_is_taken(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BROKEN["tensor extra"][0](copy)
    monkeypatch.setattr("mirada.models.load.build", lambda *args: pytest.fail("the model was allocated"))
    with pytest.raises(TensorError, match="holds tensor 'spare'"):
        load_model(copy)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        load_model(tmp_path / "nowhere")


def test_shards_without_an_index_are_whole_if_their_numbers_are(copy: Path) -> None:
    model = load_model(copy)
    save_model(model, copy, max_shard_bytes=100_000)
    (copy / "model.safetensors.index.json").unlink()
    assert equal(load_model(copy), model)


# ---- the layout itself


@pytest.mark.parametrize("model_type", ["Keye", "KeyeVL1_5"])
def test_rules_and_parameters_match_one_to_one(made: Path, model_type: str) -> None:
    mapping = json.loads((made / "config.json").read_text()) | {"model_type": model_type}
    model = build(mapping, device="meta")
    stored = load_file(made / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) - sum(t.numel() for t in stored.values()) in (0, 2 * 96)


def test_a_layout_that_does_not_fit_its_modules_is_refused() -> None:
    rule = Rule("a", (("x", (2, 3)), ("y", (1, 3))))
    layout = Layout((rule,))
    layout.check_parameters({"a": (3, 3)})
    for shapes, said in (
        ({"a": (4, 3)}, "not filled once"),
        ({"a": (3, 3), "b": (1,)}, "'b' has no rule"),
        ({}, "'a' does not exist"),
    ):
        with pytest.raises(TensorError, match=said):
            layout.check_parameters(shapes)
    with pytest.raises(TensorError, match="not filled once"):
        Layout((rule, rule)).check_parameters({"a": (3, 3)})


def test_stacked_and_reshaped_tensors_have_their_places() -> None:
    parameter = torch.arange(24.0).view(2, 12)
    stack = Rule("a", (("x", (3, 4)), ("y", (4, 3))), "stack")
    assert stack.fits((2, 12)) and not stack.fits((3, 8))
    assert torch.equal(stack.place(parameter, 1), torch.arange(12.0, 24).view(4, 3))
    fused = Rule("a", (("x", (1, 3, 4)), ("y", (1, 12))))
    assert fused.fits((2, 12)) and torch.equal(fused.place(parameter, 0), torch.arange(12.0).view(1, 3, 4))
    assert dict(Layout((fused,)).read({"a": parameter}))["y"].data_ptr() == parameter[1].data_ptr()


# ---- memory


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(("size", "dtype"), [(100, "bfloat16"), pytest.param(2000, "float32", marks=pytest.mark.slow)])
def test_loading_grows_by_little_more_than_the_weights(tmp_path: Path, size: int, dtype: str) -> None:
    spec = importlib.util.spec_from_file_location("load_memory", BENCHMARK)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    stored = benchmark.make(tmp_path, size * 1_000_000, shard=size * 2_000_000)
    assert stored >= size * 1_000_000
    facts = benchmark.measure(tmp_path, dtype, warm=True)
    assert facts["weights"] >= size * 1_000_000
    assert 0.9 <= facts["peak_ratio"] <= 1.15, facts
    assert 0.9 <= facts["anonymous_ratio"] <= 1.15, facts
