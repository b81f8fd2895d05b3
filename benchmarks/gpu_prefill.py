"""Prefill and vision tower: operations that the sizes ask for over time, as a share of a large bfloat16 product.

    python benchmarks/gpu_prefill.py [--json FOLDER] [--tokens 4096]

*prefill*: one prompt into an empty cache of pages. *vision*: tower and projector on pictures of three sizes packed together, in
pictures per second. Operations: two per weight that a token (patch) passes, and of attention those that are not masked.
"""

from __future__ import annotations

import sys
from typing import Any

import gpu_common as common
import torch

from mirada.layers.batch import MediaBatch

GRIDS = ((1, 32, 32), (1, 48, 32), (1, 64, 64))


def main(argv: list[str] | None = None) -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args(argv)
    report = common.Report("gpu_prefill", options)
    ceiling = common.rate(report.device)
    report.row("product of 8192 in bfloat16", operations_per_s=ceiling)
    for name in options.models:
        model = common.model_of(name, options.smoke, report.device)
        with torch.inference_mode():
            prefill(name, model, 64 if options.smoke else options.tokens, ceiling, report)
            vision(name, model, ((1, 4, 4), (1, 6, 4)) if options.smoke else GRIDS * 4, ceiling, report)
        del model
        if report.device.type == "cuda":
            torch.cuda.empty_cache()
    return report.finish()


def passed(module: torch.nn.Module, text: Any = None) -> int:
    """Weights of matrices that one token passes."""
    total = 0
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2 or name.endswith(("embed.weight", "positions.table")):
            continue
        experts = ".experts." in name
        total += parameter.numel() * text.num_experts_per_tok // text.n_routed_experts if experts else parameter.numel()
    return total


def prefill(name: str, model: Any, tokens: int, ceiling: float, report: common.Report) -> None:
    text, cache = model.config.text, common.cache_of(model, tokens, 1)
    batch = common.prompt(tokens, 1, report.device)
    wide = 2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers * tokens * tokens
    operations = 2 * passed(model.decoder, text) * tokens + wide
    taken = common.seconds(lambda: model(batch, None, cache), report.device, 5, 2)
    report.row(f"{name}: prefill {tokens}", ms=taken * 1e3, tokens_per_s=tokens / taken, mfu=operations / taken / ceiling)


def vision(name: str, model: Any, grids: tuple[Any, ...], ceiling: float, report: common.Report) -> None:
    config, weight = model.config.vision, next(model.parameters())
    frames = config.temporal_patch_size
    patches = sum(t * h * w for t, h, w in grids)
    shape = (patches, 3, *((frames,) if frames > 1 else ()), config.patch_size, config.patch_size)
    media = MediaBatch(torch.randn(shape, device=weight.device, dtype=weight.dtype), grids, ("image",) * len(grids))
    seen = sum((t * h * w) ** 2 for t, h, w in grids)
    operations = 2 * passed(model.visual) * patches + 4 * config.hidden_size * config.num_hidden_layers * seen
    taken = common.seconds(lambda: model.encode(media), report.device, 5, 2)
    report.row(f"{name}: vision, {len(grids)} pictures", ms=taken * 1e3, images_per_s=len(grids) / taken,
               patches_per_s=patches / taken, mfu=operations / taken / ceiling)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
