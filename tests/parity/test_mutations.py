"""Mistakes that are easily made with this family, each planted: each must turn the named parity check red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import golden
from parity.planting import Mistakes
from torch import Tensor

from mirada.layers import embed, fused, mlp, rope
from mirada.models import decoder, keye_vl, positions, projector, vit

PREVIEW, K15 = "model_goldens.safetensors: ", "keye15_goldens.safetensors: "
MISTAKES = Mistakes()
caught_by = MISTAKES.caught_by
SHARP = 1e-5
"""Tolerance for mistakes too small for the usual one; without a mistake the checks pass it too."""


# ---- vision: patches and places


@caught_by(PREVIEW + "image.image_patch_plus_pos")
def pixels_flattened_with_channels_last(patch) -> None:
    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels.permute(0, 2, 3, 1).flatten(1))

    patch.setattr(embed.PatchEmbed, "forward", forward)


def _resample(patch, **options: Any) -> None:
    true = F.interpolate
    patch.setattr(embed.F, "interpolate", lambda *args, **kwargs: true(*args, **(kwargs | options)))


@caught_by(PREVIEW + "image.image_patch_plus_pos")
def table_resampled_corner_to_corner(patch) -> None:
    _resample(patch, align_corners=True)


@caught_by(PREVIEW + "mixed.image_patch_plus_pos")
def table_resampled_with_antialias(patch) -> None:
    _resample(patch, antialias=True)


@caught_by(PREVIEW + "image.image_patch_plus_pos")
def table_resampled_bicubically(patch) -> None:
    _resample(patch, mode="bicubic")


@caught_by(PREVIEW + "image.image_patch_plus_pos")
def table_read_by_columns(patch) -> None:
    true = embed.GridPositions.resample

    def resample(self, h: int, w: int) -> Tensor:
        return true(self, w, h).view(w, h, -1).transpose(0, 1).reshape(h * w, -1)

    patch.setattr(embed.GridPositions, "resample", resample)


# ---- vision: rotary angles


@caught_by(PREVIEW + "image.image_vision_layer0")
def rows_and_columns_swapped_in_vision_rope(patch) -> None:
    def swapped(*args: Any) -> Tensor:
        angles = rope.grid_angles(*args)
        return angles.roll(angles.shape[-1] // 2, -1)

    patch.setattr(vit, "grid_angles", swapped)


def _rotate_neighbours(x: Tensor, turn: rope.Rotation) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = turn[0][..., :half], turn[1][..., half:]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


@caught_by(PREVIEW + "image.image_vision_layer0")
def vision_rope_pairs_neighbouring_channels(patch) -> None:
    _uncompiled(patch)
    patch.setattr(vit, "rotate", _rotate_neighbours)


@caught_by(PREVIEW + "image.image_vision_layer0")
def vision_frequencies_over_the_whole_head(patch) -> None:
    def angles(grids, head_dim: int, theta: float, device) -> Tensor:
        true = rope.inverse_frequencies
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(rope, "inverse_frequencies", lambda dim, *rest: true(2 * dim, *rest)[: dim // 2])
            return rope.grid_angles(grids, head_dim, theta, device)

    patch.setattr(vit, "grid_angles", angles)


@caught_by(PREVIEW + "video_fps2.video_vision_layer0")
def rows_go_on_from_frame_to_frame(patch) -> None:
    patch.setattr(vit, "grid_angles", lambda grids, *rest: rope.grid_angles([(1, t * h, w) for t, h, w in grids], *rest))


# ---- vision: who sees whom


@caught_by(PREVIEW + "mixed.image_vision_layer0")
def packed_images_see_each_other(patch) -> None:
    patch.setattr(keye_vl.KeyeVL, "segments", lambda self, grids: (sum(t * h * w for t, h, w in grids),))


@caught_by(PREVIEW + "video_fps2.video_vision_layer0")
def frames_of_a_preview_video_kept_apart(patch) -> None:
    patch.setattr(keye_vl.KeyeVL, "segments", lambda self, grids: tuple(h * w for t, h, w in grids for _ in range(t)))


@caught_by(K15 + "video_vision_out")
def frames_of_a_15_video_see_each_other(patch) -> None:
    patch.setattr(keye_vl.KeyeVL, "segments", lambda self, grids: tuple(t * h * w for t, h, w in grids))


@caught_by(PREVIEW + "image.image_vision_layer0")
def vision_scale_from_the_whole_width(patch) -> None:
    true = vit.attend_packed
    patch.setattr(
        vit, "attend_packed", lambda q, *rest, scale, **kw: true(q, *rest, scale=(q.shape[1] * q.shape[2]) ** -0.5, **kw)
    )


# ---- vision: layers


@caught_by(PREVIEW + "image.image_vision_layer0")
def exact_gelu_in_the_tower(patch) -> None:
    true = vit.MLP
    patch.setattr(vit, "MLP", lambda *sizes, gelu: true(*sizes, gelu="none"))


@caught_by(PREVIEW + "image.image_vision_out")
def no_norm_after_the_tower(patch) -> None:
    true = vit.KeyeVisionTower.slices

    def slices(self, *args: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.norm, "forward", lambda x: x)
            return (yield from true(self, *args))

    patch.setattr(vit.KeyeVisionTower, "slices", slices)


@caught_by(PREVIEW + "image.image_vision_out")
def features_of_the_layer_before_the_last(patch) -> None:
    true = vit.KeyeVisionTower.__init__

    def init(self, config) -> None:
        true(self, config)
        self.layers[-1].register_forward_hook(lambda module, args, out: args[0])

    patch.setattr(vit.KeyeVisionTower, "__init__", init)


# ---- projector


@caught_by(PREVIEW + "image.image_projected")
def tanh_gelu_in_the_projector(patch) -> None:
    true = projector.MLP
    patch.setattr(projector, "MLP", lambda *sizes, gelu: true(*sizes, gelu="tanh"))


@caught_by(PREVIEW + "image.image_projected")
def preview_projector_normalises_after_merging(patch) -> None:
    def forward(self, x: Tensor, grids) -> Tensor:
        merged = projector.merge_patches(x, grids, self.merge)
        weight, bias = self.norm.weight.repeat(4), self.norm.bias.repeat(4)
        return self.mlp(F.layer_norm(merged, merged.shape[-1:], weight, bias, self.norm.eps))

    patch.setattr(projector.Projector, "forward", forward)


@caught_by(K15 + "image_projected")
def projector_of_15_normalises_before_merging(patch) -> None:
    def forward(self, x: Tensor, grids) -> Tensor:
        apart = projector.merge_patches(F.layer_norm(x, x.shape[-1:], eps=self.norm.eps), grids, self.merge)
        return self.mlp(apart * self.norm.weight + self.norm.bias)

    patch.setattr(projector.Projector, "forward", forward)


@caught_by(PREVIEW + "image.image_projected")
def squares_merged_column_by_column(patch) -> None:
    true = projector.merge_patches

    def merge(x: Tensor, grids, size: int) -> Tensor:
        return true(x, grids, size).view(-1, size, size, x.shape[-1]).transpose(1, 2).reshape(-1, size * size * x.shape[-1])

    patch.setattr(projector, "merge_patches", merge)


@caught_by(PREVIEW + "image.image_projected")
def four_patches_of_a_row_merged(patch) -> None:
    patch.setattr(projector, "merge_patches", lambda x, grids, size: x.reshape(-1, size * size * x.shape[-1]))


# ---- decoder


def _uncompiled(patch) -> None:
    """Heads are normalised and turned by what is planted, not by the kernel that does both."""
    patch.setattr(fused, "turn_in_place", lambda *args, **kwargs: None)


@caught_by(PREVIEW + "text.text_layer0")
def heads_normalised_after_turning(patch) -> None:
    def late(heads: Tensor, turn: rope.Rotation) -> Tensor:
        return state["norm"](rope.rotate(state["raw"], turn))

    state: dict[str, Any] = {}

    def keep(heads: Tensor, q_norm, k_norm, num_q: int) -> Tensor:
        state["raw"], state["norm"] = heads, lambda x: true(x, q_norm, k_norm, num_q)
        return heads

    true = decoder.norm_heads
    _uncompiled(patch)
    patch.setattr(decoder, "norm_heads", keep)
    patch.setattr(decoder, "rotate", late)


@caught_by(PREVIEW + "text.text_layer0")
def heads_not_normalised(patch) -> None:
    _uncompiled(patch)
    patch.setattr(decoder, "norm_heads", lambda heads, *norms: heads)


@caught_by(PREVIEW + "image.text_layer0")
def mrope_sections_interleaved(patch) -> None:
    def angles(places: Tensor, sections, head_dim: int, theta: float) -> Tensor:
        axis = torch.arange(head_dim // 2) % 3
        return places.float()[axis].T * rope.inverse_frequencies(head_dim, theta)

    patch.setattr(decoder, "mrope_angles", angles)


@caught_by(PREVIEW + "image.text_layer0")
def mrope_sections_in_another_order(patch) -> None:
    patch.setattr(decoder, "mrope_angles", lambda places, s, *rest: rope.mrope_angles(places, s[::-1], *rest))


@caught_by(PREVIEW + "image.text_layer0")
def all_axes_turn_by_time(patch) -> None:
    patch.setattr(decoder, "mrope_angles", lambda places, *rest: rope.mrope_angles(places[:1].expand(3, -1), *rest))


@caught_by(PREVIEW + "text.text_layer0")
def text_rope_pairs_neighbouring_channels(patch) -> None:
    _uncompiled(patch)
    patch.setattr(decoder, "rotate", _rotate_neighbours)


@caught_by(PREVIEW + "text.text_layer0")
def decoder_sees_the_future(patch) -> None:
    true = decoder.attend_packed
    patch.setattr(decoder, "attend_packed", lambda *args, causal, **kw: true(*args, causal=False, **kw))


@caught_by(PREVIEW + "left_padded_batch.logits")
def packed_sequences_see_each_other(patch) -> None:
    true = decoder.attend_packed
    patch.setattr(decoder, "attend_packed", lambda q, k, v, lengths, **kw: true(q, k, v, (sum(lengths),), **kw))


@caught_by(PREVIEW + "text.text_layer0")
def key_heads_tiled_instead_of_repeated(patch) -> None:
    true = decoder.attend_packed

    def tiled(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kw: Any) -> Tensor:
        share = q.shape[1] // k.shape[1]
        return true(q, k.repeat(1, share, 1), v.repeat(1, share, 1), *rest, **kw)

    patch.setattr(decoder, "attend_packed", tiled)


@caught_by(PREVIEW + "text.text_layer0")
def gate_and_up_swapped(patch) -> None:
    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)

    patch.setattr(mlp.GatedMLP, "forward", forward)


@caught_by(PREVIEW + "text.logits")
def norm_weight_counted_from_one(patch) -> None:
    true = decoder.RMSNorm.forward
    patch.setattr(decoder.RMSNorm, "forward", lambda self, x: true(self, x) + true(self, x) / self.weight)


@caught_by(PREVIEW + "text.logits")
def no_norm_before_the_head(patch) -> None:
    true = decoder.Decoder.__init__

    def init(self, config) -> None:
        true(self, config)
        self.norm.register_forward_hook(lambda module, args, out: args[0])

    patch.setattr(decoder.Decoder, "__init__", init)


# ---- positions


@caught_by(PREVIEW + "mixed.position_ids")
def time_steps_rounded(patch) -> None:
    def offsets(span) -> np.ndarray:
        made = true(span)
        per = made.shape[1] // span.grid[0]
        made[0] = np.repeat(np.round(np.arange(span.grid[0]) * span.t_step).astype(np.int64), per)
        return made

    true = positions._offsets
    patch.setattr(positions, "_offsets", offsets)


def _changed_offsets(patch, change: Callable[[np.ndarray], np.ndarray]) -> None:
    true = positions._offsets
    patch.setattr(positions, "_offsets", lambda span: change(true(span)))


@caught_by(PREVIEW + "image.position_ids")
def rows_and_columns_swapped_in_positions(patch) -> None:
    _changed_offsets(patch, lambda made: made[[0, 2, 1]])


@caught_by(PREVIEW + "video_fps2.position_ids")
def time_left_out_of_positions(patch) -> None:
    _changed_offsets(patch, lambda made: made * np.array([[0], [1], [1]]))


@caught_by(PREVIEW + "image.position_ids")
def vision_starts_one_late(patch) -> None:
    _changed_offsets(patch, lambda made: made + 1)


class _OnlyTime(np.ndarray):
    def max(self, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(self)[0].max() if self.ndim == 2 else np.asarray(self).max()


@caught_by(PREVIEW + "image.position_ids")
def text_goes_on_from_the_highest_time(patch) -> None:
    true = np.empty
    patch.setattr(positions.np, "empty", lambda *args: true(*args).view(_OnlyTime))


@caught_by(PREVIEW + "image.position_ids")
def one_position_per_token(patch) -> None:
    patch.setattr(positions, "_offsets", lambda span: np.tile(np.arange(span.num_tokens), (3, 1)))


# ---- constants


def _other_eps(patch, part: str, eps: float) -> None:
    true = golden.load_weights

    def load(model, *rest: Any) -> None:
        true(model, *rest)
        for module in model.get_submodule(part).modules():
            if hasattr(module, "eps"):
                module.eps = eps

    patch.setattr(golden, "load_weights", load)


@caught_by(PREVIEW + "image.image_vision_out", SHARP)
def eps_of_the_projector_in_the_tower(patch) -> None:
    _other_eps(patch, "visual", 1e-5)


@caught_by(PREVIEW + "image.image_projected", SHARP)
def eps_of_the_tower_in_the_projector(patch) -> None:
    _other_eps(patch, "projector", 1e-6)


@caught_by(PREVIEW + "text.logits", SHARP)
def eps_ten_times_larger_in_the_decoder(patch) -> None:
    _other_eps(patch, "decoder", 1e-5)


def _other_config(patch, change: Callable[[dict], None]) -> None:
    true = golden.build

    def build(mapping: dict) -> Any:
        change(mapping)
        return true(mapping)

    patch.setattr(golden, "build", build)


@caught_by(PREVIEW + "text.text_layer0")
def rope_base_of_older_models(patch) -> None:
    _other_config(patch, lambda mapping: mapping.update(rope_theta=10000))


@caught_by(PREVIEW + "mixed.position_ids")
def half_as_many_positions_per_second(patch) -> None:
    _other_config(patch, lambda mapping: mapping["vision_config"].update(tokens_per_second=1))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES.prove(name, monkeypatch)
