"""Mistakes that are easily made with Qwen2-VL, each planted: each must turn the named parity check red."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import golden, qwen2_vl
from parity.conftest import QWEN2_VL
from parity.planting import Mistakes
from torch import Tensor

from mirada.layers import embed, fused, mlp, rope
from mirada.media import grid
from mirada.media.rule import QWEN2_VL_LATER
from mirada.models import decoder, positions, projector, vit, vlm
from mirada.models import qwen2_vl as family
from mirada.prompt.format import PromptFormat

A, B, TEXT = "case_a.safetensors: ", "case_b_long_video.safetensors: ", "text_only.safetensors: "
BATCH, TABLES, CHATS = "batch_left_padded.safetensors: ", "processing_tables.json: ", "chat_renderings.json: "
MISTAKES = Mistakes(QWEN2_VL)
caught_by = MISTAKES.caught_by
SHARP = 1e-5
"""Tolerance for mistakes too small for the usual one; without a mistake the checks pass it too."""


# ---- vision: patches and places


@caught_by(A + "image_features")
def columns_over_frames_then_channels(patch) -> None:
    true = embed.PatchEmbed.forward

    def forward(self, pixels: Tensor) -> Tensor:
        return true(self, pixels.view(len(pixels), 3, 2, -1).transpose(1, 2))

    patch.setattr(embed.PatchEmbed, "forward", forward)


@caught_by(A + "video_features")
def first_frame_of_a_pair_taken_twice(patch) -> None:
    true = embed.PatchEmbed.forward

    def forward(self, pixels: Tensor) -> Tensor:
        pairs = pixels.view(len(pixels), 3, 2, -1)
        return true(self, pairs[:, :, :1].expand_as(pairs))

    patch.setattr(embed.PatchEmbed, "forward", forward)


def _angles(patch, change: Callable[..., Tensor]) -> None:
    true = rope.grid_angles
    patch.setattr(family, "grid_angles", lambda *args, merge: change(true, *args, merge=merge))


@caught_by(A + "image_features")
def places_row_after_row(patch) -> None:
    _angles(patch, lambda true, *args, merge: true(*args))


@caught_by(A + "image_features")
def columns_before_rows_in_vision_rope(patch) -> None:
    _angles(patch, lambda true, grids, dim, *rest, merge: true(grids, dim, *rest, merge=merge).roll(dim // 4, -1))


@caught_by(A + "image_features")
def rows_and_columns_interleaved_in_vision_rope(patch) -> None:
    def angles(true, *args: Any, merge: int) -> Tensor:
        return torch.stack(true(*args, merge=merge).chunk(2, -1), -1).flatten(-2)

    _angles(patch, angles)


@caught_by(A + "image_features")
def vision_frequencies_over_the_whole_head(patch) -> None:
    def angles(true, grids, head_dim: int, *rest: Any, merge: int) -> Tensor:
        frequencies = rope.inverse_frequencies
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(rope, "inverse_frequencies", lambda dim, *more: frequencies(2 * dim, *more)[: dim // 2])
            return true(grids, head_dim, *rest, merge=merge)

    _angles(patch, angles)


@caught_by(A + "image_features")
def vision_rope_pairs_neighbouring_channels(patch) -> None:
    def rotate(x: Tensor, turn: rope.Rotation) -> Tensor:
        halves = rope.rotate(rope.pairs_to_halves(x), turn).unflatten(-1, (2, -1))
        return halves.transpose(-1, -2).flatten(-2)

    patch.setattr(fused, "turn_in_place", lambda *args, **kwargs: None)
    patch.setattr(vit, "rotate", rotate)


# ---- vision: who sees whom, and layers


@caught_by(A + "video_features")
def frames_see_each_other(patch) -> None:
    patch.setattr(vlm, "grid_segments", lambda grids, apart: tuple(t * h * w for t, h, w in grids))


@caught_by(A + "packed pictures do not see each other")
def packed_pictures_see_each_other(patch) -> None:
    patch.setattr(vlm, "grid_segments", lambda grids, apart: (sum(t * h * w for t, h, w in grids),))


def _gelu(patch, change: dict[str, str]) -> None:
    true = mlp.gelu
    patch.setattr(fused, "gelu_in_place", lambda *args: False)
    patch.setattr(mlp, "gelu", lambda x, kind: true(x, change.get(kind, kind)))


@caught_by(A + "image_features")
def exact_gelu_in_the_tower(patch) -> None:
    _gelu(patch, {"quick": "none"})


@caught_by(A + "image_features")
def tanh_gelu_in_the_tower(patch) -> None:
    _gelu(patch, {"quick": "tanh"})


@caught_by(A + "image_features")
def tanh_gelu_in_the_merger(patch) -> None:
    _gelu(patch, {"none": "tanh"})


def _other_eps(patch, part: str, eps: float) -> None:
    true = golden.load_weights

    def load(model, *rest: Any) -> None:
        true(model, *rest)
        for module in model.get_submodule(part).modules():
            if hasattr(module, "eps"):
                module.eps = eps

    patch.setattr(golden, "load_weights", load)


@caught_by(A + "image_features", SHARP)
def eps_of_torch_in_the_tower(patch) -> None:
    _other_eps(patch, "visual", 1e-5)


@caught_by(A + "image_features", SHARP)
def large_eps_in_the_merger(patch) -> None:
    _other_eps(patch, "projector", 1e-3)


@caught_by(A + "image_features")
def merger_normalises_whole_squares(patch) -> None:
    def forward(self, x: Tensor, grids) -> Tensor:
        wide = self.square(x, grids)
        weight, bias = self.norm.weight.repeat(4), self.norm.bias.repeat(4)
        return self.mlp(F.layer_norm(wide, wide.shape[-1:], weight, bias, self.norm.eps))

    patch.setattr(projector.Projector, "forward", forward)


@caught_by(A + "image_features")
def merger_takes_patches_row_after_row(patch) -> None:
    patch.setattr(projector.Projector, "square", lambda self, x, grids: projector.merge_patches(x, grids, self.merge))


@caught_by(A + "hidden_first")
def features_of_pictures_and_videos_swapped(patch) -> None:
    true = golden.Case.ordered_features.func

    def ordered(self) -> Tensor:
        made = true(self)
        return torch.cat([made[self.features["image"].shape[0] :], made[: self.features["image"].shape[0]]])

    patch.setattr(qwen2_vl.Qwen2VLCase, "ordered_features", property(ordered))


# ---- decoder


def _mrope(patch, change: Callable[..., Tensor]) -> None:
    patch.setattr(decoder, "mrope_angles", change)


@caught_by(A + "logits")
def all_axes_turn_by_time(patch) -> None:
    _mrope(patch, lambda places, *rest: rope.mrope_angles(places[:1].expand(3, -1), *rest))


@caught_by(A + "logits")
def positions_count_tokens(patch) -> None:
    def angles(places: Tensor, *rest: Any) -> Tensor:
        return rope.mrope_angles(torch.arange(places.shape[1]).expand(3, -1), *rest)

    _mrope(patch, angles)


@caught_by(A + "logits")
def mrope_sections_interleaved(patch) -> None:
    def angles(places: Tensor, sections, head_dim: int, theta: float) -> Tensor:
        axis = torch.arange(head_dim // 2) % 3
        return places.float()[axis].T * rope.inverse_frequencies(head_dim, theta)

    _mrope(patch, angles)


@caught_by(A + "logits")
def mrope_sections_in_another_order(patch) -> None:
    _mrope(patch, lambda places, sections, *rest: rope.mrope_angles(places, sections[::-1], *rest))


@caught_by(TEXT + "logits_untied")
def biases_left_out(patch) -> None:
    true = golden.load_weights

    def load(model, *rest: Any) -> None:
        true(model, *rest)
        for layer in model.decoder.layers:
            torch.nn.init.zeros_(layer.attention.qkv.bias)

    patch.setattr(golden, "load_weights", load)


@caught_by(TEXT + "logits_tied")
def head_of_its_own_where_it_is_the_embedding(patch) -> None:
    true = golden.build

    def build(mapping: dict) -> Any:
        return true(mapping | {"tie_word_embeddings": False})

    patch.setattr(golden, "build", build)


def _config(patch, **changes: Any) -> None:
    true = golden.build
    patch.setattr(golden, "build", lambda mapping: true(mapping | changes))


@caught_by(TEXT + "logits_untied")
def rope_base_of_older_models(patch) -> None:
    _config(patch, rope_theta=10000.0)


@caught_by(TEXT + "logits_untied", SHARP)
def eps_of_the_config_class(patch) -> None:
    _config(patch, rms_norm_eps=1e-5)


@caught_by(TEXT + "logits_untied")
def decoder_sees_the_future(patch) -> None:
    true = decoder.attend_packed
    patch.setattr(decoder, "attend_packed", lambda *args, causal, **kw: true(*args, causal=False, **kw))


@caught_by(BATCH + "logits_row1_text")
def packed_sequences_see_each_other(patch) -> None:
    true = decoder.attend_packed
    patch.setattr(decoder, "attend_packed", lambda q, k, v, lengths, **kw: true(q, k, v, (sum(lengths),), **kw))


# ---- positions


@caught_by(B + "position_ids")
def text_goes_on_from_rows_and_columns_alone(patch) -> None:
    _true_positions(patch, lambda span: replace(span, advance="plane"))


@caught_by(B + "logits")
def the_rule_of_transformers_5(patch) -> None:
    _true_positions(patch, lambda span: replace(span, advance="plane"))


@caught_by(B + "position_ids_transformers_5_23")
def the_released_rule_under_the_newer_name(patch) -> None:
    _true_positions(patch, lambda span: replace(span, advance="block"))


@caught_by(A + "position_ids")
def time_counts_frames_instead_of_pairs(patch) -> None:
    _true_positions(patch, lambda span: replace(span, t_step=2 * span.t_step))


def _true_positions(patch, change: Callable) -> None:
    for module in (golden, qwen2_vl):
        patch.setattr(module, "positions", lambda count, spans: positions.positions(count, [change(span) for span in spans]))


@caught_by(A + "generated_ids over a cache")
def answers_go_on_from_the_number_of_tokens(patch) -> None:
    true = golden.positions
    patch.setattr(golden, "positions", lambda count, spans: (true(count, spans)[0], count))


# ---- before the model


@caught_by(TABLES + "smart_resize_factor28")
def halves_rounded_up(patch) -> None:
    patch.setattr(grid, "round", lambda x: math.floor(x + 0.5), raising=False)


@caught_by(TABLES + "smart_resize_factor28")
def small_sides_enlarged_with_their_ratio(patch) -> None:
    true = grid.fit
    patch.setattr(grid, "fit", lambda *size, enlarge, **options: true(*size, enlarge=True, **options))


@caught_by(TABLES + "smart_resize_factor28")
def size_above_the_bound_rounded_to_the_nearest(patch) -> None:
    true = grid._steps
    patch.setattr(grid, "_steps", lambda side, factor, rounding: true(side, factor, round))


@caught_by(TABLES + "smart_nframes")
def frames_of_later_versions(patch) -> None:
    patch.setattr(qwen2_vl, "QWEN2_VL", QWEN2_VL_LATER)


@caught_by(TABLES + "smart_nframes")
def frames_of_the_first_version_in_later_ones(patch) -> None:
    patch.setattr(qwen2_vl, "QWEN2_VL_LATER", replace(QWEN2_VL_LATER, frame_rounding="nearest"))


@caught_by(TABLES + "smart_nframes")
def frames_chosen_without_the_last(patch) -> None:
    true = qwen2_vl.linspace_indices
    patch.setattr(qwen2_vl, "linspace_indices", lambda first, last, num: true(first, last - 1, num))


@caught_by(TABLES + "video_pixel_budget_v0_0_8")
def budget_per_frame_instead_of_per_pair(patch) -> None:
    true = qwen2_vl.video_budget
    patch.setattr(qwen2_vl, "video_budget", lambda num, *rest: true(2 * num, *rest))


def _other_rule(patch, **changes: Any) -> None:
    true = qwen2_vl._rule
    patch.setattr(qwen2_vl, "_rule", lambda folder: replace(true(folder), **changes))


@caught_by(TABLES + "image 0")
def pictures_resized_bilinearly(patch) -> None:
    _other_rule(patch, resample="bilinear")


def _other_grid(patch, **changes: Any) -> None:
    true = qwen2_vl._rule
    patch.setattr(qwen2_vl, "_rule", lambda folder: replace(rule := true(folder), grid=replace(rule.grid, **changes)))


@caught_by(TABLES + "image 0")
def patches_row_after_row(patch) -> None:
    _other_grid(patch, merged_order=False)


@caught_by(TABLES + "image 0")
def values_centred_as_keye_does(patch) -> None:
    _other_grid(patch, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@caught_by(TABLES + "image 0")
def values_rescaled_in_single_precision(patch) -> None:
    def normalised(pixels: np.ndarray, rule: grid.GridRule) -> np.ndarray:
        mean, std = (np.asarray(x, np.float32).reshape(3, 1, 1, 1) for x in (rule.mean, rule.std))
        return (pixels.astype(np.float32) * np.float32(1 / 255) - mean) / std

    patch.setattr(qwen2_vl, "normalise", normalised)


@caught_by(TABLES + "image 0")
def second_frame_of_a_picture_left_black(patch) -> None:
    true = grid.GridRule.patchify

    def patchify(self, frames: np.ndarray) -> np.ndarray:
        return true(self, np.concatenate([frames, np.zeros_like(frames)]))

    patch.setattr(grid.GridRule, "patchify", patchify)


def _template(patch, old: str, new: str) -> None:
    form: PromptFormat = family.QWEN2_VL.format
    assert old in form.template
    patch.setattr(qwen2_vl, "FAMILY", replace(family.QWEN2_VL, format=replace(form, template=form.template.replace(old, new))))


@caught_by(CHATS + "0")
def default_system_turn_without_its_stop(patch) -> None:
    _template(patch, "You are a helpful assistant.", "You are a helpful assistant")


@caught_by(CHATS + "5")
def pictures_counted_from_zero(patch) -> None:
    _template(patch, '"Picture " ~ seen.pictures', '"Picture " ~ (seen.pictures - 1)')


@caught_by(CHATS + "4")
def pictures_apart_from_the_text(patch) -> None:
    _template(patch, "<|image_pad|><|vision_end|>", "<|image_pad|><|vision_end|>\\n")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES.prove(name, monkeypatch)
