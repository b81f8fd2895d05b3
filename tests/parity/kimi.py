"""Checks of a directory of Kimi-VL reference outputs, by file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity import golden
from parity.files import Check, Files, all_of
from parity.golden import same
from safetensors.torch import load_file
from torch import Tensor

from mirada.errors import InputError
from mirada.layers.batch import Batch, MediaBatch
from mirada.layers.cache import make_cache
from mirada.media.grid import normalise
from mirada.media.prepare import prepare
from mirada.media.rule import MediaRule
from mirada.models.family import FAMILIES
from mirada.models.positions import positions
from mirada.models.shards import read_all
from mirada.prompt.render import Renderer
from mirada.prompt.template import Template
from mirada.prompt.tokenizer import Tokenizer
from mirada.records.wire import messages_from_openai
from mirada.types import Grid, Image, Span

FAMILY = FAMILIES["kimi_vl"]
FEATURES_ATOL, LOGITS_ATOL = 2e-5, 5e-5
"""Of everything before and after the decoder; the latter is what planted mistakes may lower."""


class KimiCase:
    """One recorded call: its inputs, our run of it, and a check for every tensor that was recorded."""

    def __init__(self, model: Any, tensors: Mapping[str, Tensor]) -> None:
        self.model, self.theirs = model, dict(tensors)
        self.seen: dict[str, Any] = {}

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        return tuple((1, int(h), int(w)) for h, w in self.theirs.get("image_grid_hws", ()))

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        pad, row = self.model.config.image_token_id, self.theirs["input_ids"][0].tolist()
        made, at = [], 0
        for number, grid in enumerate(self.grids):
            span = Span("image", row.index(pad, at), grid, number, flat=True)
            assert set(row[span.start : span.end]) == {pad}, "a run of placeholder tokens is shorter than its grid"
            made.append(span)
            at = span.end
        assert pad not in row[at:], "more placeholder tokens than grids hold"
        return tuple(made)

    @cached_property
    def features(self) -> Tensor | None:
        if not self.grids:
            return None
        tower = self.model.visual
        hooks = (
            tower.layers[0].register_forward_pre_hook(lambda module, args: self.seen.update(patch_embed_out=args[0])),
            tower.norm.register_forward_hook(lambda module, args, out: self.seen.update(encoder_out=out)),
        )
        made = self.model.encode(MediaBatch(self.theirs["pixel_values"], self.grids, ("image",) * len(self.grids)))
        for hook in hooks:
            hook.remove()
        return made

    def batch(self, extra: list[int] | None = None) -> Batch:
        tokens = [*self.theirs["input_ids"][0].tolist(), *(extra or ())]
        place = torch.from_numpy(positions(len(tokens), self.spans)[0])
        rows = [row for span in self.spans for row in range(span.start, span.end)]
        return Batch(torch.tensor(tokens), place, (len(tokens),), feature_rows=torch.tensor(rows) if rows else None)

    @cached_property
    def hidden(self) -> Tensor:
        decoder = self.model.decoder
        hooks = [decoder.layers[0].register_forward_hook(lambda module, args, out: self.seen.update(hidden_first=out))]
        for i, layer in enumerate(decoder.layers):
            if self.model.config.text.is_moe(i):
                hooks.append(layer.mlp.router.register_forward_hook(partial(self._keep_router, i)))
        made = self.model(self.batch(), self.features)
        for hook in hooks:
            hook.remove()
        return made

    def _keep_router(self, layer: int, _module: Any, _args: Any, out: tuple[Tensor, Tensor]) -> None:
        chosen, order = out[0].sort(-1)
        self.seen[f"router_l{layer}_indices_sorted"] = chosen
        self.seen[f"router_l{layer}_weights"] = out[1].gather(1, order)

    @cached_property
    def logits(self) -> Tensor:
        return self.model.logits(self.hidden)

    def greedy(self, steps: int) -> list[int]:
        """Ids by whole forward passes."""
        made: list[int] = []
        for _ in range(steps):
            hidden = self.model(self.batch(made), self.features)
            made.append(int(self.model.logits(hidden[-1]).argmax()))
        return made

    def greedy_cached(self, steps: int) -> list[int]:
        """Ids by one pass over the prompt and then a token at a time over the latent cache."""
        cache: Any = make_cache(FAMILY.cache_spec(self.model.config), torch.float32, "cpu")
        cache.allocate(0)
        batch, made = self.batch(), []
        hidden, start = self.model(batch, self.features, cache), batch.lengths[0]
        for step in range(steps):
            made.append(int(self.model.logits(hidden[-1]).argmax()))
            place = torch.full((3, 1), start + step)
            hidden = self.model(Batch(torch.tensor(made[-1:]), place, (1,), (start + step,)), None, cache)
        return made

    def checks(self) -> dict[str, Check]:
        """One check for every recorded tensor; a name that is not known is a check that fails."""
        made: dict[str, Check] = {name: partial(self.check, name) for name in self.theirs if name not in _INPUTS}
        if "generated_ids" in made:
            made["generated_ids over a cache"] = lambda: same(
                self.greedy_cached(self.theirs["generated_ids"].shape[1]), self.theirs["generated_ids"][0], "ids over a cache"
            )
        return made

    @torch.no_grad()
    def check(self, name: str) -> None:
        theirs = self.theirs[name]
        if name in ("patch_embed_out", "encoder_out", "image_features"):
            made = self.features
            close(made if name == "image_features" else self.seen[name], theirs, name, FEATURES_ATOL)
        elif name == "logits":
            close(self.logits, theirs[0], name, LOGITS_ATOL)
        elif name == "hidden_last_norm":
            close(self.hidden, theirs[0], name, LOGITS_ATOL)
        elif name == "hidden_first" or name.startswith("router_"):
            assert self.hidden is not None
            assert name in self.seen, f"the directory holds {name!r}, which our model has no place for"
            if theirs.dtype == torch.int64:
                same(self.seen[name], theirs, name)
            else:
                close(self.seen[name], theirs[0] if theirs.ndim == 3 else theirs, name, LOGITS_ATOL)
        elif name == "generated_ids":
            same(self.greedy(theirs.shape[1]), theirs[0], name)
        else:
            raise AssertionError(f"the directory holds {name!r}, which no check knows")


_INPUTS = {"input_ids", "pixel_values", "image_grid_hws"}


def close(ours: Tensor | None, theirs: Tensor, what: str, atol: float) -> None:
    assert ours is not None and ours.shape == theirs.shape, f"{what}: another shape than {list(theirs.shape)}"
    worst = float((ours - theirs).abs().max())
    assert worst <= min(atol, golden.ATOL), f"{what}: differs by {worst:.3g}"


def _model(folder: Path) -> Any:
    return golden.load_model_files(folder / "config.json", folder / "model.safetensors")


def _case(file: Path) -> dict[str, Check]:
    return KimiCase(_model(file.parent), load_file(file)).checks()


def _weights(file: Path) -> dict[str, Check]:
    made: dict[str, Check] = {"names and shapes": partial(_check_names, file)}
    if any(name.endswith("inv_freq") for name in read_all([file])):
        made["stale frequencies are ignored"] = partial(_check_stale, file)
    return made


def _check_names(file: Path) -> None:
    config = FAMILY.config(json.loads((file.parent / "config.json").read_text()))
    layout = FAMILY.layout(config)
    theirs = {name: tuple(tensor.shape) for name, tensor in load_file(file).items() if not layout.ignores(name)}
    ours = {name: shape for name, (_, _, shape) in layout.stored().items()}
    assert ours == theirs, f"names or shapes differ: {sorted(set(ours.items()) ^ set(theirs.items()))[:4]}"


def _check_stale(file: Path) -> None:
    """The frequencies that lie in the file are wrong on purpose: none is used, and no save writes them."""
    config = FAMILY.config(json.loads((file.parent / "config.json").read_text()))
    stored = {name: tensor for name, tensor in load_file(file).items() if name.endswith("inv_freq")}
    layout = FAMILY.layout(config)
    assert all(map(layout.ignores, stored))
    dim = config.text.qk_rope_head_dim
    true = config.text.rope_theta ** (-torch.arange(0, dim, 2) / dim)
    assert not any(torch.allclose(tensor.float(), true, rtol=1e-3) for tensor in stored.values())
    assert not set(stored) & set(layout.stored())


# ---- preprocessing


def _rule(folder: Path, **settings: Any) -> MediaRule:
    config = FAMILY.config(json.loads((folder / "config.json").read_text()))
    file = json.loads((folder / "preprocessor_config.json").read_text())
    return FAMILY.media_rule(config, file | settings)


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
    for row in facts.get("grid_table_pad_input_true", ()):
        made[f"grid of {row['w']}x{row['h']} at {row['in_token_limit']}"] = partial(_check_grid, file.parent, row)
    made["facts"] = partial(all_of, facts, ("pillow", "images", "grid_table_pad_input_true"), file.name)
    return made


def _check_image(folder: Path, row: dict) -> None:
    all_of(row, ("index", "h", "w", "k", "kwargs", "grid_hw", "tokens", "shape", "sha256_float32", "abs_sum", "mean"), "image")
    rule = _rule(folder, **row["kwargs"])
    made = prepare(Image(synth(row["h"], row["w"], row["k"])), rule)
    ((t, h, w),) = made.grids
    assert t == 1 and [h, w] == row["grid_hw"] and h * w / 4 == row["tokens"], f"grid {h, w} differs"
    final = np.load(folder / "image_processor.npz")[f"final_u8_{row['index']}"]
    ours = made.pixels.reshape(h, w, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(h * 14, w * 14, 3)
    assert np.array_equal(ours, final), "the picture before its cutting differs"
    values = normalise(made.pixels, rule.grid)
    assert list(values.shape) == row["shape"], f"shape {values.shape} differs"
    sums = float(np.abs(values.astype(np.float64)).sum()), float(values.astype(np.float64).mean())
    assert np.allclose(sums, (row["abs_sum"], row["mean"]), rtol=1e-6), f"sums {sums} differ"
    assert hashlib.sha256(values.tobytes()).hexdigest() == row["sha256_float32"], "pixels differ"


def _check_grid(folder: Path, row: dict) -> None:
    all_of(row, ("h", "w", "in_token_limit", "resized_wh", "padded_wh", "grid_hw", "lm_tokens", "error"), "a row of grids")
    grid = _rule(folder, in_token_limit=row["in_token_limit"]).grid
    assert list(grid.shrink(row["h"], row["w"])[::-1]) == row["resized_wh"], "the resized size differs"
    try:
        high, wide = grid.fit(row["h"], row["w"])
    except InputError as error:
        assert row["error"], f"refused ({error}), which differs"
        return
    assert row["error"] is None, f"taken, which differs from {row['error']!r}"
    assert [wide, high] == row["padded_wh"] and [high // 14, wide // 14] == row["grid_hw"], f"size {high, wide} differs"
    assert high * wide // 784 == row["lm_tokens"], f"tokens of {high, wide} differ"


def _pixels(file: Path) -> dict[str, Check]:
    return {"each picture has its facts": partial(_check_listed, file)}


def _check_listed(file: Path) -> None:
    rows = json.loads((file.parent / "processing_tables.json").read_text())["images"]
    assert sorted(np.load(file)) == sorted(f"final_u8_{row['index']}" for row in rows), "pictures and their facts differ"


# ---- prompt


def _chats(file: Path) -> dict[str, Check]:
    return {str(i): partial(_check_chat, file.parent, row) for i, row in enumerate(json.loads(file.read_text()))}


def _check_chat(folder: Path, row: dict) -> None:
    all_of(row, ("messages", "add_generation_prompt", "text"), "a rendering")
    form = FAMILY.prompt_format(FAMILY.config(json.loads((folder / "config.json").read_text())))
    template, asked = Template(form.template), {"add_generation_prompt": row["add_generation_prompt"]}
    text = template.render(row["messages"], **asked)
    assert text == row["text"], f"rendering differs: {text!r}"
    renderer = Renderer(Tokenizer.from_directory(folder / "tokenizer"), template, form)
    whole = renderer.text(messages_from_openai(_named(row["messages"])), **asked)
    assert whole == row["text"], f"rendering of messages differs: {whole!r}"


def _named(messages: list[dict]) -> list[dict]:
    """Pictures get a source, which no rendering shows."""
    made = []
    for message in messages:
        parts = message["content"]
        if not isinstance(parts, str):
            parts = [part | {"image": "a.png"} if part["type"] == "image" else part for part in parts]
        made.append(message | {"content": parts})
    return made


def _tokenizer(folder: Path) -> dict[str, Check]:
    facts = json.loads((folder / "cases.json").read_text())
    made = Tokenizer.from_directory(folder)
    checks: dict[str, Check] = {}
    for i, row in enumerate(facts["cases"]):
        checks[f"text {i}"] = partial(_check_text, made, row)
    checks["facts"] = partial(_check_vocabulary, made, facts)
    checks["files"] = lambda: same(
        sorted(path.name for path in folder.iterdir()), ["cases.json", "tiktoken.model", "tokenizer_config.json"], "files"
    )
    return checks


def _check_vocabulary(made: Tokenizer, facts: dict) -> None:
    from mirada.prompt.tiktoken_files import PATTERN

    all_of(facts, ("n_base", "n_vocab", "pattern", "cases"), "cases.json")
    assert made.vocab_size == facts["n_vocab"] and min(made.control.values()) == facts["n_base"], "sizes differ"
    assert facts["pattern"] == PATTERN, "the pattern differs"


def _check_text(made: Tokenizer, row: dict) -> None:
    all_of(row, ("text", "ids", "ids_specials_as_text", "pieces"), "a text")
    same(made.encode_control(row["text"]), row["ids"], "ids")
    same(made.encode(row["text"]), row["ids_specials_as_text"], "ids of plain text")
    for ids in (row["ids"], row["ids_specials_as_text"]):
        assert made.decode(ids) == row["text"], "the text read back differs"
    if row["ids"] == row["ids_specials_as_text"]:
        encoded: Any = made._plain
        cuts = [span for _, span in encoded.pre_tokenizer.pre_tokenize_str(row["text"])]
        assert [row["text"][a:b] for a, b in cuts] == row["pieces"], f"pieces {cuts} differ"


_CHECKS: dict[str, Callable[[Path], dict[str, Check]]] = {
    "case.safetensors": _case,
    "text_only.safetensors": _case,
    "model.safetensors": _weights,
    "processing_tables.json": _tables,
    "image_processor.npz": _pixels,
    "chat_renderings.json": _chats,
    "tokenizer": _tokenizer,
}
_MODEL = ("config.json", "model.safetensors")
FILES = Files(
    checks=_CHECKS,
    needs={
        "case.safetensors": _MODEL,
        "text_only.safetensors": _MODEL,
        "processing_tables.json": ("config.json", "preprocessor_config.json", "image_processor.npz"),
        "image_processor.npz": ("processing_tables.json",),
        "chat_renderings.json": ("config.json", "tokenizer"),
    },
    without=frozenset({"README.md", "config.json", "preprocessor_config.json"}),
)
