"""64 requests at once, each with a picture, a Qwen2-VL of released text sizes and random weights: ours against transformers.

    python benchmarks/gpu_throughput.py [--json FOLDER] [--requests 64] [--new 128] [--goal 3]

Ours: requests with ready patches through the engine (continuous batching, chunked prefill, captured steps). transformers:
``generate`` of one padded batch of all of them, same sizes, same number of new tokens, bfloat16, its SDPA attention. Its own
continuous batching (``generate_batch``) takes no pictures: against that a second pair of rows has requests of text alone,
theirs by a Qwen2 of the same text sizes. Preparation of pictures is left out on both sides.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_common as common
import numpy as np
import torch

GRID = (1, 32, 32)


def main(argv: list[str] | None = None) -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--goal", type=float, default=3.0)
    options = parser.parse_args(argv)
    if options.smoke:
        options.requests, options.new = 3, 4
    report = common.Report("gpu_throughput", options)
    with tempfile.TemporaryDirectory() as folder:
        rates = ours(Path(folder), options, report)
        if not options.smoke and rates:
            for compare, rate in zip((peer, peer_of_text), rates, strict=True):
                gc.collect()
                torch.cuda.empty_cache()
                compare(Path(folder), options, report, rate)
    return report.finish()


def texts(options: Any) -> list[Any]:
    """Prompts of text alone, 200 to 400 tokens."""
    from mirada.types import Prompt

    random = np.random.default_rng(1)
    return [Prompt(random.integers(5, 100, int(random.integers(200, 400))).tolist()) for _ in range(options.requests)]


def asked(options: Any, config: Any) -> tuple[list[Any], list[Any]]:
    """(prompts, patches) of all requests: a picture, then 20 to 200 tokens of text."""
    from mirada.media.grid import Patches
    from mirada.types import Prompt, Span

    random, grid = np.random.default_rng(0), (1, 4, 4) if options.smoke else GRID
    _, h, w = grid
    prompts, media = [], []
    for i in range(options.requests):
        count = h * w // 4
        text = random.integers(5, 100, int(random.integers(20, 200))).tolist()
        tokens = (config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id, *text)
        prompts.append(Prompt(tokens, (Span("image", 1, grid, 0),)))
        pixels = random.integers(0, 256, (h * w, 3, 2, 14, 14), dtype=np.uint8)
        media.append([Patches("image", pixels, (grid,), (h * 14, w * 14), bytes([i]) * 32)])
    return prompts, media


def ours(folder: Path, options: Any, report: common.Report) -> list[float]:
    """Requests per second, with pictures and of text alone; nothing if one failed."""
    import shapes

    from mirada import VLM
    from mirada.types import Sampling

    shape = "tiny" if options.smoke else "2b"
    directory = shapes.make(folder / "made", shape, "tiny" if options.smoke else "full")
    settings = {"max_running": options.requests, "step_tokens": 8192, "step_patches": 32768, "workers": 0}
    settings |= {"prefix_cache_bytes": 0, "encoder_cache_bytes": 0}
    if not options.smoke:
        settings["cache_bytes"] = 16 << 30  # the peer runs in the same process afterwards
    sampling = Sampling(temperature=0.0, max_tokens=options.new, ignore_eos=True)
    with VLM(directory, device=str(report.device), engine=settings) as vlm:
        rates = []
        alone = texts(options)
        for what, (prompts, media) in {
            "ours": asked(options, vlm.parts.model.config), "ours, text alone": (alone, [[]] * len(alone)),
        }.items():  # fmt: skip
            taken = []
            for _ in range(1 if options.smoke else 4):  # the first captures
                began = time.perf_counter()
                handles = [vlm.submit(p, sampling, media=m) for p, m in zip(prompts, media, strict=True)]
                outputs = [handle.result() for handle in handles]
                taken.append(time.perf_counter() - began)
                wrong = [output.error for output in outputs if output.error or len(output.tokens) != options.new]
                if wrong:
                    report.row(what, False, error=repr(wrong[0])[:300])
                    return []
            graphs = vlm._engine.engine.runner.graphs
            rates.append(options.requests / min(taken))
            report.row(what, requests_per_s=rates[-1], tokens_per_s=rates[-1] * options.new, seconds=min(taken),
                       captured=0 if graphs is None else graphs.num_captured)  # fmt: skip
    return rates


def peer(folder: Path, options: Any, report: common.Report, rate: float) -> None:
    try:
        import transformers
    except ImportError:
        report.row("transformers", error="not installed")
        return
    directory = folder / "made"
    model: Any = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model = model.cuda().eval()
    prompts, media = asked(options, model.config)
    longest = max(len(p.tokens) for p in prompts)
    pad = [longest - len(p.tokens) for p in prompts]
    ids = torch.tensor([[5] * n + list(p.tokens) for n, p in zip(pad, prompts, strict=True)]).cuda()
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pad]).cuda()
    pixels = torch.cat([torch.from_numpy(m[0].pixels).flatten(1) for m in media]).cuda().to(torch.bfloat16) / 128 - 1
    grids = torch.tensor([m[0].grids[0] for m in media]).cuda()
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": grids}
    given["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    best, error = 0.0, ""
    for more in ({}, {"drop": "mm_token_type_ids"}):
        kept = {k: v for k, v in given.items() if k != more.get("drop")}
        try:
            for _ in range(3):
                torch.cuda.synchronize()
                began = time.perf_counter()
                with torch.inference_mode():
                    model.generate(**kept, max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False)
                torch.cuda.synchronize()
                best = max(best, options.requests / (time.perf_counter() - began))
            break
        except (ValueError, TypeError, RuntimeError) as raised:
            error = repr(raised)[:300]
    if not best:
        report.row("transformers", False, error=error)
        return
    report.row("transformers, one padded batch", requests_per_s=best, tokens_per_s=best * options.new)
    report.row("ours over transformers", rate / best >= options.goal, ratio=rate / best)


def peer_of_text(folder: Path, options: Any, report: common.Report, rate: float) -> None:
    """transformers' continuous batching of the text-only prompts, by a Qwen2 with random weights of the same sizes."""
    what = "transformers, continuous batching, text alone"
    try:
        import transformers

        given = json.loads((folder / "made" / "config.json").read_text())
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
        config = transformers.Qwen2Config(**{key: given[key] for key in keys if key in given})
        config._attn_implementation = "sdpa_paged"
        model: Any = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).cuda().eval()
        how = transformers.GenerationConfig(max_new_tokens=options.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        inputs, best = [list(prompt.tokens) for prompt in texts(options)], 0.0
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            with torch.inference_mode():
                made = model.generate_batch(inputs=inputs, generation_config=how)
            torch.cuda.synchronize()
            short = [len(one.generated_tokens) for one in made.values() if len(one.generated_tokens) != options.new]
            if short or len(made) != len(inputs):
                raise RuntimeError(f"{len(made)} answers, of other lengths than asked: {short[:5]}")
            best = max(best, options.requests / (time.perf_counter() - began))
    except (ImportError, AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:  # its releases differ
        report.row(what, error=repr(error)[:300])
        return
    report.row(what, requests_per_s=best, tokens_per_s=best * options.new)
    report.row("ours over transformers' continuous batching", rate / best >= options.goal, ratio=rate / best)


if __name__ == "__main__":
    sys.exit(main())
