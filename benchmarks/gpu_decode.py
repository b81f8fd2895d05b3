"""Decoding one sequence: random models of the released sizes, time of a step against the bytes that it must read.

    python benchmarks/gpu_decode.py [--json FOLDER] [--past 1024] [--goal 0.8]

A step reads every weight of the decoder and the head once (of experts those that a token passes), and keys and values of the
past. *share*: those bytes over the time of a step, over the measured read bandwidth. *graph*: the captured step of the engine;
*eager*: the same calls launched one by one. Before that, both must give the same logits.
"""

from __future__ import annotations

import sys
from typing import Any

import gpu_common as common
import torch

from mirada.engine.graphs import Graphs


def needed(model: Any, cache: Any, past: int) -> int:
    """Bytes that one step must read."""
    text, total = model.config.text, 0
    for name, parameter in (*model.decoder.named_parameters(), *model.lm_head.named_parameters(prefix="head")):
        size = parameter.numel() * parameter.element_size()
        if ".experts." in name:
            size = size * text.num_experts_per_tok // text.n_routed_experts
        total += 0 if name == "embed.weight" and not text.tie_word_embeddings else size
    return total + past * cache.bytes_per_token


def main(argv: list[str] | None = None) -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--past", type=int, default=1024)
    parser.add_argument("--goal", type=float, default=0.8)
    options = parser.parse_args(argv)
    report = common.Report("gpu_decode", options)
    past = 40 if options.smoke else options.past
    ceiling = common.bandwidth(report.device)
    report.row("read bandwidth", bytes_per_s=ceiling)
    for name in options.models:
        with torch.inference_mode():
            one(name, past, ceiling, options, report)
        if report.device.type == "cuda":
            torch.cuda.empty_cache()
    return report.finish()


def one(name: str, past: int, ceiling: float, options: Any, report: common.Report) -> None:
    model = common.model_of(name, options.smoke, report.device)
    cache = common.cache_of(model, past, 1)
    model(common.prompt(past, 1, report.device), None, cache)
    graphs = Graphs(model, cache, past + 64)
    chunks: list[Any] = [common.Step(common.Decoding(0, past))]
    if not graphs.takes(chunks):
        report.row(f"{name}", good=False, error="the engine would not decode in fixed buffers")
        return
    fixed = graphs.logits(chunks)
    assert fixed is not None
    fixed = fixed.clone()

    def eager() -> torch.Tensor:
        tokens = torch.full((1,), 7, device=report.device)
        places = torch.full((3, 1), past, device=report.device)
        return model.next_logits(common.Batch(tokens, places, (1,), (past,), (0,)), None, cache)

    gap = common.off(fixed, eager())
    report.row(f"{name}: captured against launched", gap < 2e-2, relative=gap)
    size = needed(model, cache, past)
    for what, work in (("graph", lambda: graphs.logits(chunks)), ("eager", eager)):
        taken = common.seconds(work, report.device, 30)
        share = size / taken / ceiling
        good = share >= options.goal if what == "graph" and not options.smoke else None
        report.row(f"{name}: decode, {what}", good, ms=taken * 1e3, gigabytes=size / 1e9, share=share, tokens_per_s=1 / taken)
    report.row(f"{name}: bytes of captures", bytes=graphs.bytes_held, captured=graphs.num_captured)


if __name__ == "__main__":
    sys.exit(main())
