"""Mistakes that are easily made with Kimi-VL, each planted: each must turn the named parity check red."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity.conftest import KIMI
from parity.planting import Mistakes
from torch import Tensor

from mirada.layers import embed, fused, mla, moe, rope
from mirada.media import grid, task
from mirada.models import deepseek, kimi_vl, projector, vit, vlm
from mirada.prompt import tiktoken_files
from mirada.prompt.format import PromptFormat

CASE, TABLES = "case.safetensors: ", "processing_tables.json: "
MISTAKES = Mistakes(KIMI)
caught_by = MISTAKES.caught_by
SHARP = 2e-5
"""Tolerance for a mistake too small for the usual one; without it the checks pass this too."""


# ---- MoonViT


def _resample(patch, **options: Any) -> None:
    true = F.interpolate
    patch.setattr(embed.F, "interpolate", lambda *args, **kwargs: true(*args, **(kwargs | options)))


@caught_by(CASE + "patch_embed_out")
def table_resampled_bilinearly(patch) -> None:
    _resample(patch, mode="bilinear")


@caught_by(CASE + "patch_embed_out")
def table_resampled_corner_to_corner(patch) -> None:
    _resample(patch, align_corners=True)


@caught_by(CASE + "patch_embed_out")
def table_resampled_with_antialias(patch) -> None:
    _resample(patch, antialias=True)


@caught_by(CASE + "patch_embed_out")
def table_cut_instead_of_resampled(patch) -> None:
    def resample(self, h: int, w: int) -> Tensor:
        rows, columns = (torch.arange(n) % size for n, size in zip((h, w), self.size, strict=True))
        return self.weight[rows][:, columns].flatten(0, 1)

    patch.setattr(embed.GridPositions, "resample", resample)


@caught_by(CASE + "encoder_out")
def rows_before_columns(patch) -> None:
    def angles(*args: Any) -> Tensor:
        rows, columns = rope.grid_angles(*args).chunk(2, -1)
        return torch.stack((rows, columns), -1).flatten(-2)

    patch.setattr(kimi_vl, "column_row_angles", angles)


@caught_by(CASE + "encoder_out")
def columns_and_rows_in_halves_instead_of_turns(patch) -> None:
    patch.setattr(kimi_vl, "column_row_angles", lambda *args: rope.grid_angles(*args).roll(1, -1))


@caught_by(CASE + "encoder_out")
def vision_rope_pairs_channels_half_a_head_apart(patch) -> None:
    patch.setattr(vit.PairedAttention, "pairs", False)


@caught_by(CASE + "encoder_out")
def packed_pictures_see_each_other(patch) -> None:
    patch.setattr(kimi_vl.KimiVL, "segments", lambda self, grids: (sum(t * h * w for t, h, w in grids),))


@caught_by(CASE + "encoder_out")
def exact_gelu_in_the_tower(patch) -> None:
    true = vit.MLP
    patch.setattr(vit, "MLP", lambda *sizes, gelu: true(*sizes, gelu="none"))


@caught_by(CASE + "encoder_out", 5e-6)
def norms_of_the_tower_with_the_eps_of_siglip(patch) -> None:
    true = kimi_vl.MoonVisionTower.__init__
    patch.setattr(kimi_vl.MoonVisionTower, "__init__", lambda self, c: true(self, replace(c, layer_norm_eps=1e-6)))


@caught_by(CASE + "image_features")
def tanh_gelu_in_the_projector(patch) -> None:
    true = projector.MLP
    patch.setattr(projector, "MLP", lambda *sizes, gelu: true(*sizes, gelu="tanh"))


@caught_by(CASE + "image_features")
def squares_merged_column_by_column(patch) -> None:
    true = projector.merge_patches

    def merge(x: Tensor, grids, size: int) -> Tensor:
        return true(x, grids, size).view(-1, size, size, x.shape[-1]).transpose(1, 2).reshape(-1, size * size * x.shape[-1])

    patch.setattr(projector, "merge_patches", merge)


@caught_by(CASE + "image_features")
def projector_normalises_after_merging(patch) -> None:
    def forward(self, x: Tensor, grids) -> Tensor:
        merged = projector.merge_patches(x, grids, self.merge)
        weight, bias = self.norm.weight.repeat(4), self.norm.bias.repeat(4)
        return self.mlp(F.layer_norm(merged, merged.shape[-1:], weight, bias, self.norm.eps))

    patch.setattr(projector.Projector, "forward", forward)


# ---- decoder


@caught_by(CASE + "logits")
def pictures_take_room_by_rows_and_columns(patch) -> None:
    from parity import kimi

    true = kimi.positions
    patch.setattr(kimi, "positions", lambda n, spans: true(n, [replace(span, flat=False) for span in spans]))


@caught_by(CASE + "hidden_first")
def text_rope_pairs_channels_half_a_head_apart(patch) -> None:
    patch.setattr(fused, "turn_in_place", lambda *args, **kwargs: None)  # the kernel pairs channels itself
    patch.setattr(mla, "pairs_to_halves", lambda x: x)


@caught_by(CASE + "hidden_first")
def scores_scaled_by_the_plain_part_of_keys(patch) -> None:
    patch.setattr(deepseek.DeepseekConfig, "softmax_scale", property(lambda c: c.qk_nope_head_dim**-0.5))


@caught_by(CASE + "logits", SHARP)
def latent_norm_with_the_eps_of_the_config(patch) -> None:
    patch.setattr(mla, "LATENT_EPS", 1e-5)


@caught_by(CASE + "hidden_first")
def rope_base_of_the_pretraining(patch) -> None:
    patch.setattr(deepseek, "inverse_frequencies", lambda dim, theta, device: rope.inverse_frequencies(dim, 50000.0, device))


@caught_by(CASE + "router_l1_weights")
def bias_leaks_into_the_weights_of_experts(patch) -> None:
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.weight).sigmoid() + self.bias
        weights, chosen = scores.topk(self.routing.top_k, -1)
        return chosen, weights / weights.sum(-1, keepdim=True) * self.routing.scale

    patch.setattr(moe.Router, "forward", forward)


@caught_by(CASE + "router_l1_indices_sorted")
def bias_of_the_router_ignored(patch) -> None:
    patch.setattr(moe.Router, "_rank", lambda self, scores: scores)


@caught_by(CASE + "router_l1_weights")
def no_scale_of_the_experts(patch) -> None:
    patch.setattr(deepseek.DeepseekConfig, "routing", _routing(scale=1.0))


@caught_by(CASE + "router_l1_weights")
def weights_of_experts_not_normalised(patch) -> None:
    patch.setattr(deepseek.DeepseekConfig, "routing", _routing(normalise=False))


def _routing(**changes: Any) -> property:
    true = deepseek.DeepseekConfig.routing.fget
    assert true is not None
    return property(lambda config: replace(true(config), **changes))


@caught_by(CASE + "router_l1_weights")
def experts_scored_by_softmax(patch) -> None:
    patch.setattr(torch.Tensor, "sigmoid", lambda x: x.softmax(-1))


@caught_by(CASE + "logits")
def shared_experts_scaled_like_the_others(patch) -> None:
    patch.setattr(
        moe.MoE, "forward", lambda self, x: self.experts(x, *self.router(x)) + self.shared(x) * self.router.routing.scale
    )


@caught_by(CASE + "logits")
def features_written_in_another_order(patch) -> None:
    true = vlm.VisionLanguageModel.embed
    patch.setattr(
        vlm.VisionLanguageModel,
        "embed",
        lambda self, batch, made=None: true(self, batch, None if made is None else made.flip(0)),
    )


# ---- pictures


@caught_by(TABLES + "image 0")
def filled_up_with_white(patch) -> None:
    true = grid.np.pad
    patch.setattr(grid.np, "pad", lambda *args: true(*args, constant_values=255))


@caught_by(TABLES + "image 0")
def filled_up_on_both_sides(patch) -> None:
    true = grid.np.pad
    patch.setattr(grid.np, "pad", lambda x, room: true(x, [(sum(r) // 2, sum(r) - sum(r) // 2) for r in room]))


@caught_by(TABLES + "image 0")
def stretched_instead_of_filled_up(patch) -> None:
    patch.setattr(grid.GridRule, "frame", lambda self, x, h, w: grid.np.resize(x, (h, w, 3)))


@caught_by(TABLES + "image 3")
def resized_bilinearly(patch) -> None:
    true = task.resize
    patch.setattr(task, "resize", lambda image, h, w, rule: true(image, h, w, replace(rule, resample="bilinear")))


@caught_by(TABLES + "grid of 897x897 at 4096")
def limit_counted_on_filled_up_sides(patch) -> None:
    def shrink(self, height: int, width: int) -> tuple[int, int]:
        cells = (-(-height // 28) * 2) * (-(-width // 28) * 2)
        scale = min(1.0, (self.max_pixels / 196 / cells) ** 0.5)
        return int(height * scale), int(width * scale)

    patch.setattr(grid.GridRule, "shrink", shrink)


@caught_by(TABLES + "image 1")
def mean_and_deviation_of_clip(patch) -> None:
    from parity import kimi

    true, clip = kimi._rule, {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    patch.setattr(kimi, "_rule", lambda folder, **settings: true(folder, **settings, **clip))


# ---- words


@caught_by("tokenizer: text 4")
def han_characters_joined_with_letters(patch) -> None:
    patch.setattr(tiktoken_files, "PATTERN", tiktoken_files.PATTERN.replace(r"[\p{Han}]+|", "").replace(r"&&[^\p{Han}]", ""))


@caught_by("tokenizer: text 6")
def digits_one_by_one(patch) -> None:
    patch.setattr(tiktoken_files, "PATTERN", tiktoken_files.PATTERN.replace("{1,3}", ""))


@caught_by("chat_renderings.json: 0")
def full_stop_after_the_system_turn(patch) -> None:
    _template(patch, "assistant<|im_end|>", "assistant.<|im_end|>")


@caught_by("chat_renderings.json: 2")
def line_between_turns(patch) -> None:
    _template(patch, '{{- "<|im_end|>" }}\n{%- endfor', '{{- "<|im_end|>\\n" }}\n{%- endfor')


def _template(patch, old: str, new: str) -> None:
    true = kimi_vl.KimiFamily.prompt_format

    def prompt_format(self, config) -> PromptFormat:
        form = true(self, config)
        assert old in form.template
        return replace(form, template=form.template.replace(old, new))

    patch.setattr(kimi_vl.KimiFamily, "prompt_format", prompt_format)


@pytest.mark.parametrize("name", list(MISTAKES))
def test_each_mistake_turns_its_check_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES.prove(name, monkeypatch)
