"""Checks of a directory of Qwen2-VL reference outputs, by file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packers import awq_config, gptq_config
from parity import golden
from parity.files import Check, Files, all_of
from parity.golden import Case, load_model_files, same
from parity.preprocessing import outcome, sha
from safetensors.torch import load_file, save_file
from tiny import SPECIAL, write_tokenizer
from torch import Tensor

from mirada import adapt
from mirada.layers.batch import MediaBatch
from mirada.media.exact import linspace_indices
from mirada.media.grid import normalise
from mirada.media.prepare import prepare
from mirada.media.rule import QWEN2_VL, QWEN2_VL_LATER, MediaRule
from mirada.media.sample import strict_nframes
from mirada.media.video import video_budget
from mirada.models.family import FAMILIES
from mirada.models.load import load_weights, save_model
from mirada.models.positions import positions
from mirada.models.shards import read_all
from mirada.prompt.render import Renderer
from mirada.prompt.template import Template
from mirada.prompt.tokenizer import Tokenizer
from mirada.records.wire import messages_from_openai
from mirada.types import Image, Video

FAMILY = FAMILIES["qwen2_vl"]
FEATURES_ATOL, LOGITS_ATOL = 2e-5, 1e-4


def close(ours: Tensor, theirs: Tensor, what: str, atol: float) -> None:
    assert ours.shape == theirs.shape, f"{what}: shape {list(ours.shape)} differs from {list(theirs.shape)}"
    worst = float((ours - theirs).abs().max())
    assert worst <= min(atol, golden.ATOL), f"{what}: differs by {worst:.3g}"


class Qwen2VLCase(Case):
    """A recorded call; steps of videos are one unit, and pictures and videos are each encoded in one call."""

    _rate = 1.0

    @cached_property
    def features(self) -> dict[str, Tensor]:
        made = {}
        for kind, grids in self.grids.items():
            pixels = self.theirs["pixel_values" if kind == "image" else "pixel_values_videos"]
            made[kind] = self.model.encode(MediaBatch(pixels, tuple(grids), (kind,) * len(grids)))  # pyright: ignore
        return made

    @cached_property
    def hidden(self) -> Tensor:
        first = self.model.decoder.layers[0]
        hook = first.register_forward_hook(lambda module, args, out: self.seen.update(hidden_first=out))
        made = self.model(self.batch(), self.ordered_features)
        hook.remove()
        return made

    @cached_property
    def places_of_transformers_5(self) -> list[tuple[np.ndarray, int]]:
        """As ``places``, with text that counts on from rows and columns alone."""
        spans = [tuple(replace(span, advance="plane") for span in prompt.spans) for prompt in self.prompts]
        return [positions(len(p.tokens), s) for p, s in zip(self.prompts, spans, strict=True)]

    def checks(self) -> dict[str, Check]:
        made = {name: partial(self.check, name) for name in self.theirs if name not in _INPUTS}
        if "generated_ids" in made:
            made["generated_ids over a cache"] = partial(self.check_cached, self.theirs["generated_ids"])
        if self.grids:
            made["packed pictures do not see each other"] = self.check_alone
        return made

    @torch.no_grad()
    def check(self, name: str) -> None:
        theirs = self.theirs[name]
        if name in ("image_features", "video_features"):
            close(self.features[name.partition("_")[0]], theirs, name, FEATURES_ATOL)
        elif name in _HIDDEN:
            close(_HIDDEN[name](self), theirs[self.mask], name, LOGITS_ATOL)
        elif name == "logits_last":
            whole = self.mask.all(1)
            close(self.rows(-1)[whole], theirs[whole], name, LOGITS_ATOL)
        elif name == "logits_row1_text":
            close(self.logits[-self.batch().lengths[1] :], theirs, name, LOGITS_ATOL)
        elif name == "generated_ids":
            self.same_ids(self.greedy(theirs.shape[1])[0], theirs)
        elif name in _PLACES:
            same(*_PLACES[name](self, theirs), name)
        else:
            raise AssertionError(f"the directory holds {name!r}, which no check knows")

    def rows(self, at: int) -> Tensor:
        """Logits of one token of every row, ``at`` being counted from its end."""
        return self.logits[torch.tensor(self.batch().lengths).cumsum(0) + at]

    def same_ids(self, ours: list[list[int]], theirs: Tensor) -> None:
        """Whole rows are as recorded. Of padded rows the reference's ids (and last logits) were read as if padding stood on the
        right, so that they show padding: what such a row gives alone, and its recorded logits, take their place."""
        for row, mask in enumerate(self.mask):
            if mask.all():
                same(ours[row], theirs[row], f"ids of row {row}")
                continue
            ids = self.theirs["input_ids"][row]
            shown = torch.cat([ids, torch.tensor(ours[row])])[int(mask.sum()) :][: theirs.shape[1]]
            same(theirs[row], shown, f"padding of row {row}")
            alone = Qwen2VLCase(self.model, {"input_ids": ids[mask][None]})
            same(ours[row], alone.greedy(theirs.shape[1])[0][0], f"ids of row {row} alone")
            assert ours[row][0] == int(self.theirs[f"logits_row{row}_text"][-1].argmax()), f"the first id of row {row} differs"

    @torch.no_grad()
    def check_cached(self, theirs: Tensor) -> None:
        self.same_ids(self.greedy_cached(theirs.shape[1]), theirs)

    @torch.no_grad()
    def check_alone(self) -> None:
        """Each picture, and each pair of frames, encoded by itself gives what all together give."""
        for kind, grids in self.grids.items():
            pixels = self.theirs["pixel_values" if kind == "image" else "pixel_values_videos"]
            frames = [(1, h, w) for t, h, w in grids for _ in range(t)]
            pieces = pixels.split([h * w for _, h, w in frames])
            alone = [self.model.encode(MediaBatch(p, (f,), ("image",))) for p, f in zip(pieces, frames, strict=True)]
            close(self.features[kind], torch.cat(alone), f"{kind}s alone", FEATURES_ATOL)


def _padded(case: Qwen2VLCase, places: list, theirs: Tensor) -> tuple[np.ndarray, Tensor]:
    """Padded places hold what the reference puts there; only the others count."""
    full = theirs.numpy().copy()
    for row, (place, _) in enumerate(places):
        full[:, row, case.mask[row].numpy()] = place
    return full, theirs


def _deltas(case: Qwen2VLCase, places: list, theirs: Tensor) -> tuple[np.ndarray, Tensor]:
    """The next position less the length without padding."""
    return np.array([[following - int(n)] for (_, following), n in zip(places, case.mask.sum(1), strict=True)]), theirs


_HIDDEN: dict[str, Callable[[Qwen2VLCase], Tensor]] = {
    "hidden_first": lambda case: (case.hidden, case.seen["hidden_first"])[1],
    "hidden_last_norm": lambda case: case.hidden,
    "logits": lambda case: case.logits,
    "logits_untied": lambda case: case.logits,
    "logits_tied": lambda case: case.logits,
}
_PLACES: dict[str, Callable[[Qwen2VLCase, Tensor], tuple]] = {
    "position_ids": lambda case, theirs: _padded(case, case.places, theirs),
    "rope_deltas": lambda case, theirs: _deltas(case, case.places, theirs),
    "position_ids_transformers_5_23": lambda case, theirs: _padded(case, case.places_of_transformers_5, theirs),
    "rope_deltas_transformers_5_23": lambda case, theirs: _deltas(case, case.places_of_transformers_5, theirs),
}
_INPUTS = {"input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"}
_MEDIA = _INPUTS - {"input_ids", "attention_mask"}


def _model(folder: Path, **changes: Any) -> Any:
    return load_model_files(folder / "config.json", folder / "model.safetensors", **changes)


def _case(file: Path) -> dict[str, Check]:
    return Qwen2VLCase(_model(file.parent), load_file(file)).checks()


def _padded_batch(file: Path) -> dict[str, Check]:
    """The pictures of its first row are those of case A."""
    media = {name: tensor for name, tensor in load_file(file.parent / "case_a.safetensors").items() if name in _MEDIA}
    return Qwen2VLCase(_model(file.parent), media | load_file(file)).checks()


def _text_only(file: Path) -> dict[str, Check]:
    made: dict[str, Check] = {}
    tensors = load_file(file)
    for name, tied in (("logits_untied", False), ("logits_tied", True)):
        if name in tensors:
            model = _model(file.parent, tie_word_embeddings=tied)
            made |= Qwen2VLCase(model, {"input_ids": tensors["input_ids"], name: tensors[name]}).checks()
    made["facts"] = partial(all_of, tensors, ("input_ids", "logits_untied", "logits_tied"), file.name)
    return made


# ---- weights


def _weights(file: Path) -> dict[str, Check]:
    return {
        "names and shapes": partial(_check_names, file),
        "the other naming": partial(_check_other_naming, file),
        "saved again": partial(_check_saved, file),
    }


def _check_names(file: Path) -> None:
    config = FAMILY.config(json.loads((file.parent / "config.json").read_text()))
    theirs = {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}
    ours = {name: shape for name, (_, _, shape) in FAMILY.layout(config).stored().items()}
    assert ours == theirs, f"names or shapes differ: {sorted(set(ours.items()) ^ set(theirs.items()))[:4]}"


def _check_other_naming(file: Path) -> None:
    """What transformers from 4.52 on may save gives the same parameters."""
    plain, renamed = _model(file.parent), _model(file.parent)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({later_name(name): tensor for name, tensor in load_file(file).items()}, path)
        torch.nn.init.zeros_(renamed.lm_head.weight)
        load_weights(renamed, FAMILY.layout(renamed.config), read_all([path]))
    for (name, ours), theirs in zip(renamed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), f"{name} differs"


def later_name(name: str) -> str:
    """A released name as transformers from 4.52 on holds it in memory."""
    if name.startswith("visual."):
        return f"model.{name}"
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _check_saved(file: Path) -> None:
    theirs = load_file(file)
    with tempfile.TemporaryDirectory() as folder:
        (written,) = save_model(_model(file.parent), Path(folder))
        ours = load_file(written)
        assert json.loads((Path(folder) / "config.json").read_text()) == json.loads((file.parent / "config.json").read_text())
    assert set(ours) == set(theirs), f"names differ: {sorted(set(ours) ^ set(theirs))[:4]}"
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), f"{name} differs"


# ---- packed weights


def _packing(file: Path) -> dict[str, Check]:
    tensors = load_file(file)
    names = sorted({name.partition(".")[0] for name in tensors})
    held = {name: {k.partition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{name}.")} for name in names}
    return {name: partial(_check_packed, name, facts) for name, facts in held.items()}


_PACKED = ("qweight", "qzeros", "scales", "g_idx")


def _check_packed(name: str, facts: Mapping[str, Tensor]) -> None:
    """Integers, zeros and the product of what AutoAWQ and AutoGPTQ packed."""
    all_of(facts, (*_PACKED, "bias", "int_weight_out_in", "int_zero_out_group", "dequant_weight_out_in"), name)
    out, width = facts["int_weight_out_in"].shape
    group = width // facts["scales"].shape[0]
    kind, _, variant = name.partition("_")
    config = awq_config(group) if kind == "awq" else gptq_config(group, bits=int(kind[-1]), sym=variant != "asym")
    scheme = adapt.read({"quantization_config": config | ({"desc_act": True} if "actorder" in variant else {})})
    assert scheme is not None
    stored = {f"{_LINEAR}.{key}": facts[key] for key in _PACKED if key in facts}
    made = scheme.unpack(f"{_LINEAR}.weight", (out, width), stored)
    same(made.integers(), facts["int_weight_out_in"].float(), "integers")
    same(made.zeros, facts["int_zero_out_group"], "zeros")
    # AutoAWQ multiplies in float16: its product is one rounding away from the exact one.
    wide = made.widen().half().float() if kind == "awq" else made.widen()
    same(wide, facts["dequant_weight_out_in"], "widened weights")


_LINEAR = "model.layers.0.mlp.down_proj"


# ---- preprocessing


def _rule(folder: Path) -> MediaRule:
    """The image processor alone, without the resize of qwen-vl-utils before it."""
    config = FAMILY.config(json.loads((folder / "config.json").read_text()))
    file = json.loads((folder / "preprocessor_config.json").read_text())
    return replace(FAMILY.media_rule(config, file), first=None)


def synth(height: int, width: int, number: int) -> np.ndarray:
    """The golden drawing ``synth_image(h, w, k)`` of this directory."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3].astype(np.int64)
    wave = 7 * x + 13 * y + 41 * c + x * y // 11 + 29 * number
    return ((wave + (x // 8 + y // 8 + c) % 2 * 64) % 256).astype(np.uint8)


def _tables(file: Path) -> dict[str, Check]:
    facts = json.loads(file.read_text())
    made: dict[str, Check] = {}
    for row in facts.get("images", ()):
        made[f"image {row['index']}"] = partial(_check_image, file.parent, row)
    for name, check in _TABLES.items():
        if name in facts:
            made[name] = partial(_each, check, facts[name])
    made["facts"] = partial(all_of, facts, ("pillow", "formula", "images", *_TABLES), file.name)
    return made


def _each(check: Callable[[dict], None], rows: list[dict]) -> None:
    assert rows, "an empty table"
    for row in rows:
        check(row)


_IMAGE_FACTS = (
    "index", "h", "w", "k", "kwargs", "grid_thw", "pixel_values_shape", "sha256_float32", "mean", "std", "abs_sum",
    "temporal_copies_equal",
)  # fmt: skip


def _check_image(folder: Path, row: dict) -> None:
    all_of(row, _IMAGE_FACTS, "a picture")
    rule = _rule(folder).bounded(**row["kwargs"])
    made = prepare(Image(synth(row["h"], row["w"], row["k"])), rule)
    assert [list(grid) for grid in made.grids] == [row["grid_thw"]], f"grid {made.grids} differs"
    recorded, i = np.load(folder / "image_processor.npz"), row["index"]
    same(_whole(made.pixels, made.grids[0]), recorded[f"resized_u8_{i}"], "the resized picture")
    values = normalise(made.pixels, rule.grid)
    assert np.array_equal(values[:, :, 0], values[:, :, 1]) == row["temporal_copies_equal"], "the two frames differ"
    flat = values.reshape(len(values), -1)
    same(flat[[0, -1]], [recorded[f"first_patch_{i}"], recorded[f"last_patch_{i}"]], "first and last patch")
    wide = flat.astype(np.float64)
    sums = float(np.abs(wide).sum()), float(wide.mean()), float(wide.std())
    assert np.allclose(sums, (row["abs_sum"], row["mean"], row["std"]), rtol=1e-6), f"sums {sums} differ"
    assert list(flat.shape) == row["pixel_values_shape"] and sha(flat) == row["sha256_float32"], "pixels differ"


def _whole(pixels: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """uint8 [N, C, f, P, P] of one picture -> [H, W, C], its first frame put together again."""
    _, h, w = grid
    cut = pixels[:, :, 0].reshape(h // 2, w // 2, 2, 2, 3, 14, 14)
    return cut.transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * 14, w * 14, 3)


def _check_size(row: dict) -> None:
    """Sizes are those of qwen-vl-utils, but never nothing. transformers differ where a side is less than one cell."""
    versions = ("qwen_vl_utils_0_0_8", "transformers_4_45_2", "transformers_5_23_0")
    all_of(row, ("h", "w", "min_pixels", "max_pixels", *versions), "a size")
    h, w = row["h"], row["w"]
    ours = list(QWEN2_VL.bounded(row["min_pixels"], row["max_pixels"]).grid.fit(h, w))
    utils, old, new = ([max(28, n) for n in row[k]] if isinstance(row[k], list) else row[k] for k in versions)
    assert ours == utils, f"{h}x{w} differs: {ours}, recorded {utils}"
    assert ours == old or (min(h, w) < 28 and str(old).startswith("ValueError")), f"{h}x{w} differs from 4.45.2: {ours}, {old}"
    assert ours == new or min(h, w) <= 14, f"{h}x{w} differs from 5.23.0: {ours}, {new}"


def _check_frames(row: dict) -> None:
    all_of(row, ("total_frames", "video_fps", "request", "v0_0_8", "v0_0_14"), "a count of frames")
    for version, rule in (("v0_0_8", QWEN2_VL), ("v0_0_14", QWEN2_VL_LATER)):
        facts = row[version]
        part = Video(None, **row["request"])
        num = outcome(partial(strict_nframes, row["total_frames"], row["video_fps"], part, rule))
        if not isinstance(facts, dict) or "nframes" not in facts:
            assert num == "ValueError" and "ValueError" in str(facts), f"{row['request']} differs: {num}, recorded {facts}"
            continue
        all_of(facts, ("nframes", "indices", "sha256_indices_csv"), version)
        assert num == facts["nframes"], f"{row['total_frames'], row['request']} differs: {num}, {version} {facts['nframes']}"
        indices = linspace_indices(0, row["total_frames"] - 1, num).tolist()
        listed = facts["indices"]
        cut = listed.index("...") if "..." in listed else len(listed)  # long lists are recorded without their middle
        after = listed[cut + 1 :]
        assert listed[:cut] == indices[:cut] and after == indices[len(indices) - len(after) :], f"indices of {row} differ"
        text = np.frombuffer(",".join(map(str, indices)).encode(), np.uint8)
        assert sha(text) == facts["sha256_indices_csv"], f"indices of {row} differ"


def _check_budget(row: dict) -> None:
    all_of(row, ("nframes", "h", "w", "request", "min_pixels", "max_pixels", "resized_hw"), "a budget")
    part = Video(None, **row["request"])
    assert row["min_pixels"] == QWEN2_VL.frame_min_pixels if part.min_pixels is None else part.min_pixels
    made = video_budget(row["nframes"], row["h"], row["w"], part, QWEN2_VL)
    assert list(made) == row["resized_hw"], f"{row} differs: {made}"
    assert made[0] * made[1] <= max(row["max_pixels"], row["min_pixels"] * 1.05), f"{row}: {made} is past its bound, differs"


_TABLES = {
    "smart_resize_factor28": _check_size,
    "smart_nframes": _check_frames,
    "video_pixel_budget_v0_0_8": _check_budget,
}


def _pixels(file: Path) -> dict[str, Check]:
    return {"each picture has its facts": partial(_check_listed, file)}


def _check_listed(file: Path) -> None:
    rows = json.loads((file.parent / "processing_tables.json").read_text())["images"]
    names = [f"{what}_{row['index']}" for row in rows for what in ("resized_u8", "first_patch", "last_patch")]
    assert sorted(np.load(file)) == sorted(names), "pictures and their facts differ"


# ---- prompt


def _chats(file: Path) -> dict[str, Check]:
    return {str(i): partial(_check_chat, row) for i, row in enumerate(json.loads(file.read_text()))}


def _check_chat(row: dict) -> None:
    all_of(row, ("messages", "add_generation_prompt", "add_vision_id", "text"), "a rendering")
    options = {name: row[name] for name in ("add_generation_prompt", "add_vision_id")}
    template = Template(FAMILY.format.template)
    text = template.render(row["messages"], **options)
    assert text == row["text"], f"rendering differs: {text!r}"
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), SPECIAL)
        renderer = Renderer(Tokenizer.from_directory(folder), template, FAMILY.format)
    whole = renderer.text(messages_from_openai(_sourced(row["messages"])), **options)
    assert whole == row["text"], f"rendering of messages differs: {whole!r}"


def _sourced(messages: list[dict]) -> list[dict]:
    """Pictures and videos get a source, which no rendering shows."""

    def part(given: dict) -> dict:
        kind = given.get("type")
        return given | {kind: f"a.{kind}"} if kind in ("image", "video") and kind not in given else given

    return [m if isinstance(m["content"], str) else m | {"content": [part(p) for p in m["content"]]} for m in messages]


_CHECKS: dict[str, Callable[[Path], dict[str, Check]]] = {
    "case_a.safetensors": _case,
    "case_b_long_video.safetensors": _case,
    "batch_left_padded.safetensors": _padded_batch,
    "text_only.safetensors": _text_only,
    "model.safetensors": _weights,
    "processing_tables.json": _tables,
    "image_processor.npz": _pixels,
    "chat_renderings.json": _chats,
    "quant_packing.safetensors": _packing,
}
_MODEL = ("config.json", "model.safetensors")
FILES = Files(
    checks=_CHECKS,
    needs={
        "case_a.safetensors": _MODEL,
        "case_b_long_video.safetensors": _MODEL,
        "batch_left_padded.safetensors": (*_MODEL, "case_a.safetensors"),
        "text_only.safetensors": _MODEL,
        "model.safetensors": ("config.json",),
        "processing_tables.json": ("config.json", "preprocessor_config.json", "image_processor.npz"),
        "image_processor.npz": ("processing_tables.json",),
    },
    without=frozenset({"README.md", "config.json", "preprocessor_config.json"}),
)
