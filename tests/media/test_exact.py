"""Arithmetic that must equal a reference bit for bit."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import clips
import numpy as np
import torch

from mirada.media.exact import linspace_indices, resize_bicubic, resize_bilinear, rgb_to_hsv

GOLDEN = Path(__file__).parents[1] / "golden" / "keye_vl"


def test_hsv_equals_opencv_on_every_third_value() -> None:
    # SHA-256 of what OpenCV 5.0.0 cvtColor(COLOR_RGB2HSV) gives for these 86**3 colours (all 2**24 were compared once).
    steps = np.arange(0, 256, 3, np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1)
    assert hashlib.sha256(rgb_to_hsv(colours).tobytes()).hexdigest() == (
        "81fbd79e7a38684b106ae5be1247efab2ea175723718da134521ea1ed2492f0b"
    )


def test_hsv_of_known_colours() -> None:
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 0, 1]], np.uint8)
    assert rgb_to_hsv(colours).tolist() == [
        [0, 0, 0],
        [0, 0, 255],
        [0, 255, 255],
        [60, 255, 255],
        [120, 255, 255],
        [0, 255, 255],  # just below red: rounds to 180, which wraps
    ]


def test_indices_equal_torch_linspace() -> None:
    draw = np.random.default_rng(0)
    differs_from_numpy = 0
    for trial in range(1500):
        total = int(draw.integers(2, 400 if trial % 2 else 200_000))
        start = int(draw.integers(0, total // 2 + 1))
        num = int(draw.integers(1, min(total - start, 1400) + 1))
        wanted = torch.linspace(start, total - 1, num).round().long().numpy()
        assert np.array_equal(linspace_indices(start, total - 1, num), wanted), (start, total, num)
        differs_from_numpy += not np.array_equal(np.rint(np.linspace(start, total - 1, num)), wanted)
    assert differs_from_numpy > 50, "the cases no longer show why torch's own rounding is needed"


def test_bicubic_equals_the_golden_of_utils_1_0_0() -> None:
    golden = json.loads((GOLDEN / "image_processor.json").read_text())["video_tensor_1.0.0"]
    made = np.stack([resize_bicubic(clips.synth(90, 160, 40 + t), tuple(golden["resized_hw"])) for t in range(4)])
    assert hashlib.sha256(made.transpose(0, 3, 1, 2).tobytes()).hexdigest() == golden["resized_sha256_uint8"]


def test_bilinear_is_torchs_own_on_uint8_and_not_pillows() -> None:
    from PIL import Image as pil

    frame = clips.synth(90, 160, 3)
    planes = torch.from_numpy(np.stack([frame, frame[::-1]])).permute(0, 3, 1, 2)
    batch = torch.nn.functional.interpolate(planes, (56, 84), mode="bilinear", antialias=True)
    assert np.array_equal(resize_bilinear(frame, (56, 84)), batch[0].permute(1, 2, 0).numpy())
    pillow = np.asarray(pil.fromarray(frame).resize((84, 56), pil.Resampling.BILINEAR))
    assert not np.array_equal(resize_bilinear(frame, (56, 84)), pillow)


def test_resizes_take_views_and_read_only_frames() -> None:
    frame = clips.synth(40, 60, 1)
    turned = np.rot90(frame)
    frozen = turned.copy()
    frozen.flags.writeable = False
    for resize in (resize_bicubic, resize_bilinear):
        assert np.array_equal(resize(turned, (28, 56)), resize(frozen, (28, 56)))
        assert resize(frame, (40, 60)) is frame


def test_video_modules_load_without_torch() -> None:
    code = "import sys, mirada.media.video, mirada.media.exact; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
