"""preprocessor_config.json -> the media rule of a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mirada.errors import ConfigError
from mirada.keys import Keys
from mirada.media.rule import MediaRule, Resample
from mirada.models.vit import VisionConfig

FILE = "preprocessor_config.json"
_FIXED: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
}
_FILTERS: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}
# Names of classes, and switches of other software that leave the pixels as they are.
_IGNORED = (
    "image_processor_type", "processor_class", "auto_map", "_valid_processor_keys", "video_processor_type", "data_format",
    "input_data_format", "device", "return_tensors", "disable_grouping", "do_center_crop", "crop_size", "default_to_square",
    "do_pad", "pad_size", "image_seq_length",
)  # fmt: skip


def media_rule(preset: MediaRule, vision: VisionConfig, file: Mapping[str, Any] | None) -> MediaRule:
    """``preset`` with the bounds, mean, deviation and filter that ``file`` says (None: as they are), for patches as
    ``vision`` has them. ConfigError names a key or value that is not understood or contradicts the model."""
    keys = Keys({name: value for name, value in (file or {}).items() if value is not None}, FILE)
    keys.expect("patch_size", vision.patch_size)
    keys.expect("merge_size", vision.spatial_merge_size)
    keys.expect("temporal_patch_size", vision.temporal_patch_size)
    for name, value in _FIXED.items():
        keys.expect(name, value)
    for name in ("do_center_crop", "do_pad"):
        keys.expect(name, False)
    keys.ignore(*_IGNORED)
    low, high = _bounds(keys, preset)
    grid = replace(
        preset.grid,
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        frames=vision.temporal_patch_size,
        merged_order=vision.merged_order,
        min_pixels=low,
        max_pixels=high,
        mean=_triple(keys, "image_mean", preset.grid.mean),
        std=_triple(keys, "image_std", preset.grid.std),
    )
    keys.expect("resample", *_FILTERS)
    resample = _FILTERS[keys.mapping["resample"]] if "resample" in keys.mapping else preset.resample
    keys.done()
    return replace(preset, grid=grid, resample=resample)


def _bounds(keys: Keys, preset: MediaRule) -> tuple[int, int]:
    """min_pixels and max_pixels, or what files of transformers 5 write for them: size, with areas despite its names."""
    size = Keys(keys.take("size", dict, {}), f"{FILE}: size")
    low = size.take("shortest_edge", int, preset.grid.min_pixels)
    high = size.take("longest_edge", int, preset.grid.max_pixels)
    low, high = size.take("min_pixels", int, low), size.take("max_pixels", int, high)
    size.done()
    return keys.take("min_pixels", int, low), keys.take("max_pixels", int, high)


def _triple(keys: Keys, name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    made = tuple(float(x) for x in keys.take(name, list, list(default)))
    if len(made) != 3:
        raise ConfigError(f"{keys.where}: {name} holds {len(made)} numbers", "one per colour channel: three")
    return made


def kimi_media_rule(preset: MediaRule, vision: VisionConfig, file: Mapping[str, Any] | None) -> MediaRule:
    """``preset`` with what Kimi-VL's ``file`` says; what it does not say is as in the releases, whose files say all.

    ConfigError names a key or value that is not understood or contradicts the model.
    """
    keys = Keys({name: value for name, value in (file or {}).items() if value is not None}, FILE)
    keys.expect("patch_size", vision.patch_size)
    keys.expect("merge_kernel_size", [vision.spatial_merge_size] * 2)
    keys.ignore(*_IGNORED, "num_pooled_tokens")
    patch = vision.patch_size
    grid = replace(
        preset.grid,
        patch=patch,
        merge=vision.spatial_merge_size,
        max_pixels=keys.take("in_token_limit", int, preset.grid.max_pixels // patch**2) * patch**2,
        border="pad" if keys.take("pad_input", bool, True) else "crop",
        mean=_triple(keys, "image_mean", preset.grid.mean),
        std=_triple(keys, "image_std", preset.grid.std),
    )
    keys.done()
    return replace(preset, grid=grid)
