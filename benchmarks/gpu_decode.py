"""Decoding one sequence: random models of the released sizes, time of a step against the bytes that it must read.

    python benchmarks/gpu_decode.py [--json FOLDER] [--past 1024] [--goal 0.8] [--quant int8 int4]

A step reads every weight of the decoder and the head once (of experts those that a token passes), and keys and values of the
past. *share*: those bytes over the time of a step, over the measured read bandwidth. *graph*: the captured step of the engine;
*eager*: the same calls launched one by one. Before that, both must give the same logits. *submit*: what a caller of
``VLM.submit`` sees, sampling and the engine's own work included. ``--quant``: the same with matrices rounded to integers, whose
bytes are then the fewer ones (a bfloat16 row comes first; no goal but the share).
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import gpu_common as common
import torch

from mirada import VLM
from mirada.adapt.mode import parse
from mirada.engine.graphs import Graphs
from mirada.engine.settings import EngineSettings
from mirada.models.family import FAMILIES
from mirada.models.load import load_model
from mirada.prompt.render import Renderer
from mirada.types import Prompt, Sampling


def needed(model: Any, cache: Any, past: int) -> int:
    """Bytes that one step must read."""
    text, total = model.config.text, 0
    for name, parameter in (*_held(model.decoder), *_held(model.lm_head, "head")):
        size = parameter.numel() * parameter.element_size()
        if ".experts." in name:
            size = size * text.num_experts_per_tok // text.n_routed_experts
        total += 0 if name == "embed.weight" and not text.tie_word_embeddings else size
    return total + past * cache.bytes_per_token


def _held(module: Any, prefix: str = "") -> Any:
    """Parameters, and the integers and scales that stand in their place."""
    return (*module.named_parameters(prefix=prefix), *module.named_buffers(prefix=prefix))


def main(argv: list[str] | None = None) -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--past", type=int, default=1024)
    parser.add_argument("--goal", type=float, default=0.8)
    parser.add_argument("--quant", nargs="*", default=["int8", "int4"])
    options = parser.parse_args(argv)
    report = common.Report("gpu_decode", options)
    past = 40 if options.smoke else options.past
    ceiling = common.bandwidth(report.device)
    report.row("read bandwidth", bytes_per_s=ceiling)
    for name in options.models:
        with torch.inference_mode():
            model = common.model_of(name, options.smoke, report.device)
            measure(name, model, past, ceiling, options, report)
        through_the_engine(name, model, past, options, report)
        for quant in options.quant:
            with torch.inference_mode():
                model = None  # one at a time: the next is made while nothing else is held
                model = common.model_of(name, options.smoke, report.device)
                common.round_matrices(model, parse(quant))  # pyright: ignore[reportArgumentType]
                measure(f"{name} {quant}", model, past, ceiling, options, report)
        del model
        if report.device.type == "cuda":
            torch.cuda.empty_cache()
    return report.finish()


def through_the_engine(name: str, model: Any, past: int, options: Any, report: common.Report) -> None:
    """The time of a token as ``VLM.submit`` gives it: a long answer's less a short one's."""
    import tiny

    kind, (short, long) = model.config.model_type, (2, 6) if options.smoke else (8, 136)
    with tempfile.TemporaryDirectory() as folder:
        directory = tiny.make_tiny(folder, kind)
        family = FAMILIES[kind]
        renderer = Renderer.from_directory(directory, family.prompt_format(load_model(directory).config))
    settings = EngineSettings(workers=0, prefix_cache_bytes=0, cache_bytes=1 << (24 if options.smoke else 31))
    with VLM.from_parts(model, renderer, engine=settings) as vlm:
        taken = {}
        for count in (long, short, long):  # the first captures
            sampling = Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
            began = time.perf_counter()
            output = vlm.submit(Prompt(tuple(range(5, 5 + past))), sampling).result()
            taken[count] = time.perf_counter() - began
            if output.error or len(output.tokens) != count:
                report.row(f"{name}: decode, submit", False, error=repr(output.error)[:300])
                return
    each = (taken[long] - taken[short]) / (long - short)
    report.row(f"{name}: decode, submit", ms=each * 1e3, tokens_per_s=1 / each)


def measure(name: str, model: Any, past: int, ceiling: float, options: Any, report: common.Report) -> None:
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
