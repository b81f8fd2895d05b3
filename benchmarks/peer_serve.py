"""``transformers serve`` for ``serve_load.py``: ``PEERS/bin/python peer_serve.py MODEL --port N ...``

Its Qwen2-VL does not open without torchvision, whose wheels are made for CUDA builds of torch: beside a CPU build their
compiled half cannot be loaded, and the whole package fails to import. So torchvision lies in a folder of its own
(``PEERS/vision``), where it disturbs no other comparison, and where its compiled half is missing, what is used of that is put
in its place: pictures are decoded by Pillow, and two operators that nobody calls here are declared. Resizing and the rest are
torchvision's own, in torch.
"""

from __future__ import annotations

import ctypes
import io
import sys
from pathlib import Path
from typing import Any

import torch

VISION = Path(sys.prefix) / "vision"
OPERATORS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
             "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # fmt: skip
KEPT: list[Any] = []
"""Operators last as long as what declared them."""


def compiled_half() -> bool:
    """Whether torchvision's own operators can be loaded beside this torch."""
    found = next((VISION / "torchvision").glob("_C*.so"), None)
    try:
        return found is not None and bool(ctypes.CDLL(str(found)))
    except OSError:
        return False


def do_without() -> None:
    KEPT.append(torch.library.Library("torchvision", "DEF"))
    for operator in OPERATORS:
        KEPT[0].define(operator)
    import torchvision.io  # pyright: ignore[reportMissingImports]

    torchvision.io.decode_image = torchvision.io.image.decode_image = decode


def decode(data: torch.Tensor, mode: Any = None, **_: Any) -> torch.Tensor:
    """uint8 [3, H, W] of the bytes of a picture."""
    import numpy as np
    from PIL import Image

    picture = Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def main() -> None:
    if VISION.is_dir():
        sys.path.insert(0, str(VISION))
        if not compiled_half():
            do_without()
    from transformers.cli.transformers import main as transformers  # pyright: ignore[reportMissingImports]

    sys.argv[1:1] = ["serve"]
    transformers()


if __name__ == "__main__":
    main()
