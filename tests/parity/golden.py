"""Reads a directory of reference outputs and runs our model on the inputs that it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tiny import frames_spelt
from torch import Tensor

from mirada.layers.batch import Batch, MediaBatch
from mirada.layers.cache import SlabCache
from mirada.models.family import FAMILIES
from mirada.models.keye_vl import KeyeVL
from mirada.models.load import build, load_weights
from mirada.models.positions import positions
from mirada.models.shards import read_all
from mirada.types import Grid, Prompt, Span

ATOL = 2e-4


def load_reference_model(config: Path, *weights: Path) -> KeyeVL:
    """As ``load_model_files``, of a Keye-VL."""
    model = load_model_files(config, *weights)
    assert isinstance(model, KeyeVL)
    return model


def load_model_files(config: Path, *weights: Path, **changes: Any) -> Any:
    """The model of the family that ``config`` names, ``changes`` replacing keys of it; tensors of later files replace those of
    earlier ones."""
    model = build(json.loads(config.read_text()) | changes)
    stored = {name: tensor for file in weights for name, tensor in read_all([file]).items()}
    load_weights(model, FAMILIES[model.config.model_type].layout(model.config), stored)
    return model.eval()


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, f"{what}: shape {list(ours.shape)}, the reference has {list(theirs.shape)}"
    worst = float((ours - theirs).abs().max()) if theirs.numel() else 0.0
    assert worst <= ATOL, f"{what}: differs by {worst:.3g}"


def same(ours: Any, theirs: Any, what: str) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{what}: shape {ours.shape}, the reference has {theirs.shape}"
    assert np.array_equal(ours, theirs), f"{what}: differs at {np.argwhere(ours != theirs)[0]}"


class Case:
    """One recorded call: its inputs, our run of it, and a check for every tensor that was recorded."""

    def __init__(self, model: KeyeVL, tensors: Mapping[str, Tensor]) -> None:
        self.model = model
        self.theirs = dict(tensors)
        self.seen: dict[str, Tensor] = {}

    # ---- inputs

    @cached_property
    def grids(self) -> dict[str, list[Grid]]:
        names = {"image": ("image_grid_thw",), "video": ("video_grid_thw", "video_grid_thw_merged")}
        found = {kind: [self.theirs[n] for n in options if n in self.theirs] for kind, options in names.items()}
        return {kind: [tuple(row) for row in grids[0].tolist()] for kind, grids in found.items() if grids}

    @cached_property
    def mask(self) -> Tensor:
        return self.theirs.get("attention_mask", torch.ones_like(self.theirs["input_ids"])).bool()

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Rows without their padding, with the spans that their placeholder tokens show."""
        config = self.model.config
        steps = self.theirs.get("second_per_grid_ts", torch.ones(len(self.grids.get("video", ())))).tolist()
        apart = frames_spelt(config)
        videos = list(zip(self.grids.get("video", ()), steps, strict=not apart))
        queues = {
            config.image_token_id: [("image", grid, 0.0) for grid in self.grids.get("image", ())],
            config.video_token_id: [
                ("video", (1, *grid[1:]) if apart else grid, 0.0 if apart else step * self._rate)
                for grid, step in videos
                for _ in range(grid[0] if apart else 1)
            ],
        }
        rows = [ids[mask].tolist() for ids, mask in zip(self.theirs["input_ids"], self.mask, strict=True)]
        made = [self._prompt(row, queues) for row in rows]
        assert not any(queues.values()), "more grids than runs of placeholder tokens"
        return made

    @property
    def _rate(self) -> float:
        return self.model.config.vision.tokens_per_second

    @staticmethod
    def _prompt(row: list[int], queues: dict[int, list]) -> Prompt:
        spans: list[Span] = []
        at = 0
        while at < len(row):
            if row[at] in queues:
                kind, grid, step = queues[row[at]].pop(0)
                spans.append(Span(kind, at, grid, len(spans), t_step=step))
                assert set(row[at : spans[-1].end]) == {row[at]}, "a run of placeholder tokens is shorter than its grid"
                at = spans[-1].end
            else:
                at += 1
        return Prompt(tuple(row), tuple(spans))

    # ---- our run

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """Projected features per kind, each kind encoded in one call as the reference does; what passes by is kept."""
        pixels = {"image": "pixel_values", "video": "pixel_values_videos"}
        made = {}
        for kind, grids in self.grids.items():
            hooks = self._watch(kind)
            made[kind] = self.model.encode(MediaBatch(self.theirs[pixels[kind]], tuple(grids), (kind,) * len(grids)))  # pyright: ignore
            self.seen[f"{kind}_projected"] = made[kind]
            for hook in hooks:
                hook.remove()
        return made

    def _watch(self, kind: str) -> list:
        """Forward hooks on the tower that keep what leaves each part."""
        tower, seen = self.model.visual, self.seen

        def keep(name: str) -> Callable:
            return lambda module, args, out: seen.__setitem__(name, out)

        first = tower.layers[0].register_forward_pre_hook(
            lambda module, args: seen.__setitem__(f"{kind}_patch_plus_pos", args[0])
        )
        layers = [layer.register_forward_hook(keep(f"{kind}_vision_layer{i}")) for i, layer in enumerate(tower.layers)]
        return [first, *layers, tower.norm.register_forward_hook(keep(f"{kind}_vision_out"))]

    @cached_property
    def ordered_features(self) -> Tensor | None:
        """Features of all prompts in the order of their spans."""
        queues = {kind: list(made.split([s.num_tokens for s in self._spans(kind)])) for kind, made in self.features.items()}
        pieces = [queues[span.kind].pop(0) for prompt in self.prompts for span in prompt.spans]
        return torch.cat(pieces) if pieces else None

    def _spans(self, kind: str) -> list[Span]:
        return [span for prompt in self.prompts for span in prompt.spans if span.kind == kind]

    @cached_property
    def places(self) -> list[tuple[np.ndarray, int]]:
        return [positions(len(prompt.tokens), prompt.spans) for prompt in self.prompts]

    def batch(self, extra: list[list[int]] | None = None) -> Batch:
        """All rows end to end, each followed by the tokens that were generated for it."""
        extra = extra or [[] for _ in self.prompts]
        tokens, places, rows, start = [], [], [], 0
        for prompt, (place, following), more in zip(self.prompts, self.places, extra, strict=True):
            tokens += [*prompt.tokens, *more]
            places += [place, np.tile(np.arange(following, following + len(more)), (3, 1))]
            rows += [np.arange(span.start, span.end) + start for span in prompt.spans]
            start = len(tokens)
        lengths = tuple(len(p.tokens) + len(more) for p, more in zip(self.prompts, extra, strict=True))
        features = torch.from_numpy(np.concatenate(rows)) if rows else None
        return Batch(torch.tensor(tokens), torch.from_numpy(np.concatenate(places, 1)), lengths, feature_rows=features)

    @cached_property
    def hidden(self) -> Tensor:
        seen = self.seen

        def keep(name: str) -> Callable:
            return lambda module, args, out: seen.__setitem__(name, out)

        decoder = self.model.decoder
        hooks = [layer.register_forward_hook(keep(f"text_layer{i}")) for i, layer in enumerate(decoder.layers)]
        first = decoder.layers[0].register_forward_pre_hook(lambda module, args: seen.__setitem__("inputs_embeds", args[0]))
        made = self.model(self.batch(), self.ordered_features)
        for hook in (*hooks, first):
            hook.remove()
        return made

    @cached_property
    def logits(self) -> Tensor:
        return self.model.logits(self.hidden)

    def greedy(self, steps: int) -> tuple[list[list[int]], float]:
        """Ids by a whole forward for each, and the smallest gap between the two best logits."""
        extra: list[list[int]] = [[] for _ in self.prompts]
        gap = float("inf")
        for _ in range(steps):
            batch = self.batch(extra)
            ends = torch.tensor(batch.lengths).cumsum(0) - 1
            best = self.model.logits(self.model(batch, self.ordered_features)[ends]).topk(2)
            gap = min(gap, float((best.values[:, 0] - best.values[:, 1]).min()))
            for row, token in zip(extra, best.indices[:, 0].tolist(), strict=True):
                row.append(token)
        return extra, gap

    def greedy_cached(self, steps: int) -> list[list[int]]:
        """Ids by one pass over the prompts and then a token at a time over the cache."""
        text = self.model.config.text
        cache = SlabCache(text.num_hidden_layers, text.num_key_value_heads, text.head_dim)
        batch, following = self.batch(), [place[1] for place in self.places]
        for slot in batch.slots:
            cache.allocate(slot)
        hidden = self.model(batch, self.ordered_features, cache)
        hidden, past = hidden[torch.tensor(batch.lengths).cumsum(0) - 1], list(batch.lengths)
        made: list[list[int]] = [[] for _ in past]
        for step in range(steps):
            tokens = self.model.logits(hidden).argmax(-1)
            for row, token in zip(made, tokens.tolist(), strict=True):
                row.append(token)
            place = (torch.tensor(following) + step).expand(3, -1)
            hidden = self.model(Batch(tokens, place, (1,) * len(past), tuple(n + step for n in past)), None, cache)
        return made

    # ---- checks

    def checks(self) -> dict[str, Callable[[], None]]:
        """One check for every recorded tensor; a name that is not known is a check that fails."""
        made: dict[str, Callable[[], None]] = {}
        for name in self.theirs:
            if name not in _INPUTS:
                made[name] = lambda name=name: self.check(name)
        if "generated" in made:
            made["generated_cached"] = lambda: same(
                self.greedy_cached(self.theirs["generated"].shape[1]), self.theirs["generated"], "ids over a cache"
            )
        return made

    @torch.no_grad()
    def check(self, name: str) -> None:
        theirs = self.theirs[name]
        if name.startswith(("image_", "video_")) and not name.startswith("video_grid"):
            assert self.features is not None
            close(self._seen(name), theirs, name)
        elif name in ("inputs_embeds", "logits") or name.startswith("text_layer"):
            ours = self.logits if name == "logits" else self._seen(name, self.hidden)
            close(ours, theirs[self.mask], name)
        elif name == "generated":
            same(self.greedy(theirs.shape[1])[0], theirs, name)
        elif name in _EXACT:
            same(*_EXACT[name](self), name)
        else:
            raise AssertionError(f"the directory holds {name!r}, which no check knows")

    def _seen(self, name: str, _run: Tensor | None = None) -> Tensor:
        assert name in self.seen, f"the directory holds {name!r}, which our model has no place for"
        return self.seen[name]


def _positions(case: Case) -> tuple[np.ndarray, Tensor]:
    """Padded places hold 1, as the reference fills them."""
    full = np.ones((3, *case.mask.shape), np.int64)
    for row, (place, _) in enumerate(case.places):
        full[:, row, case.mask[row].numpy()] = place
    return full, case.theirs["position_ids"]


def _deltas(case: Case) -> tuple[np.ndarray, Tensor]:
    """The next position less the padded length."""
    theirs = case.theirs["rope_deltas"]
    return np.array([following - case.mask.shape[1] for _, following in case.places]).reshape(theirs.shape), theirs


def _split(case: Case) -> tuple[list, Tensor]:
    return [(1, h, w) for t, h, w in case.grids["video"] for _ in range(t)], case.theirs["video_grid_thw_split"]


_EXACT: dict[str, Callable[[Case], tuple]] = {
    "position_ids": _positions,
    "rope_deltas": _deltas,
    "video_grid_thw_split": _split,
    "num_frames": lambda case: (sum(t for t, _, _ in case.grids["video"]), case.theirs["num_frames"].sum()),
    "frame_types": lambda case: (len(case.theirs["video_grid_thw_split"]), len(case.theirs["frame_types"])),
}
_INPUTS = {
    "input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw",
    "video_grid_thw_merged", "second_per_grid_ts",
}  # fmt: skip


def cases(file: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors of a file by case; names without a case belong to the case ''."""
    made: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        case, _, name = key.rpartition(".")
        made.setdefault(case, {})[name] = tensor
    return made
