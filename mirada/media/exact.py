"""Arithmetic that must equal a reference bit for bit: torch resizes, OpenCV's HSV, torch.linspace.

Only the two resizes need torch, and import it when they are called; the rest is numpy.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def resize_bicubic(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [*size, 3], bicubic with antialias, as torchvision resizes a uint8 tensor.

    Source: ``torchvision.transforms.functional.resize`` (0.28) on tensors: interpolate in float32, clamp to 0..255, round
    half to even. keye-vl-utils 1.0.0 and qwen-vl-utils resize video frames so.
    """
    if frame.shape[:2] == tuple(size):
        return frame
    made = _interpolate(_planes(frame).float(), size, "bicubic")
    return _picture(made.clamp_(0, 255).round_())


def resize_bilinear(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [*size, 3], bilinear with antialias in torch's own uint8 arithmetic (keye-vl-utils 1.5.2).

    That arithmetic is fixed-point where the CPU has AVX2; elsewhere (Arm, old x86) torch computes in float and single
    values may differ by 1.
    """
    if frame.shape[:2] == tuple(size):
        return frame
    return _picture(_interpolate(_planes(frame), size, "bilinear"))


def _planes(frame: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.require(frame, requirements=("C", "W"))).permute(2, 0, 1)[None]


def _interpolate(planes: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return torch.nn.functional.interpolate(planes, tuple(size), mode=mode, antialias=True)


def _picture(planes: torch.Tensor) -> np.ndarray:
    import torch

    return np.ascontiguousarray(planes[0].to(torch.uint8).permute(1, 2, 0).numpy())


@cache
def _hsv_tables() -> tuple[np.ndarray, np.ndarray]:
    steps = np.arange(1, 256)
    saturation, hue = np.zeros(256, np.int32), np.zeros(256, np.int32)
    saturation[1:] = np.rint((255 << 12) / steps)
    hue[1:] = np.rint((180 << 12) / (6.0 * steps))
    return saturation, hue


def rgb_to_hsv(frame: np.ndarray) -> np.ndarray:
    """uint8 RGB [..., 3] -> uint8 HSV [..., 3] with H in 0..179, S and V in 0..255.

    Source: OpenCV ``cvtColor(COLOR_RGB2HSV)`` on 8 bits: two tables of 12-bit fixed-point reciprocals, rounded. Checked
    equal to OpenCV 5.0 on all 2**24 colours.
    """
    saturation, hue = _hsv_tables()
    red, green, blue = (frame[..., channel].astype(np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    turn = np.where(value == red, green - blue, np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread))
    turn = (turn * hue[spread] + 2048) >> 12
    made = np.empty(frame.shape, np.uint8)
    made[..., 0] = np.where(turn < 0, turn + 180, turn)
    made[..., 1] = (spread * saturation[value] + 2048) >> 12
    made[..., 2] = value
    return made


def linspace_indices(start: int, end: int, num: int) -> np.ndarray:
    """int64 [num]: ``torch.linspace(start, end, num).round().long()``.

    torch steps in float32 from both ends towards the middle, each element one fused multiply-add; ties round to even.
    ``np.linspace`` chooses another frame in one of five random cases.
    """
    if num == 1:
        return np.array([start], np.int64)
    low, high = np.float64(np.float32(start)), np.float64(np.float32(end))
    step = np.float64(np.float32(np.float32(high - low) / np.float32(num - 1)))
    position = np.arange(num)
    from_low, from_high = low + step * position, high - step * (num - 1 - position)
    made = np.where(position < num // 2, from_low, from_high).astype(np.float32)
    return np.rint(made).astype(np.int64)
