"""Loading a checkpoint of Qwen2-VL-2B's shape in a precision mode: the first start, which rounds, and the second, which maps.

    python benchmarks/load_quantised.py --folder /tmp/made [--quant int4 int8 exact] [--layers 28] [--tower 32] [--anyway]

The checkpoint (random bfloat16 weights) is made in ``--folder`` if it is not there, and the cache beside it. Each start is a
process of its own; memory is its peak (mapped pages that others may share are counted apart).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from harness import require_quiet

CHILD = """
import json, os, sys, time
began = time.perf_counter()
import torch
from mirada.adapt.mode import parse
from mirada.models.load import load_model
imported, spent = time.perf_counter(), time.process_time()
model = load_model(sys.argv[1], mode=parse(sys.argv[2]))
loaded, spent = time.perf_counter(), time.process_time() - spent
with torch.no_grad():
    model.lm_head(model.decoder.embed(torch.tensor([1])).float())
first = time.perf_counter()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
gb = lambda name: int(status[name].split()[0]) / 1e6
print(json.dumps({"import": imported - began, "load": loaded - imported, "cpu": spent, "product": first - loaded,
                  "peak": gb("VmHWM"), "own": gb("RssAnon"), "mapped": gb("RssFile")}))
"""


def config(layers: int, tower: int) -> dict:
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_act": "silu",
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": layers, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
        "image_token_id": 151655, "video_token_id": 151656,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": tower, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
                          "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
                          "temporal_patch_size": 2},
    }  # fmt: skip


def make(folder: Path, layers: int, tower: int) -> None:
    import torch

    from mirada.models.load import build, save_model

    model = build(config(layers, tower), torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            flat, pool = parameter.view(-1), torch.randn(1 << 20).mul_(0.02).bfloat16()
            for begin in range(0, len(flat), len(pool)):  # the same numbers over and over: they are only to be rounded
                flat[begin : begin + len(pool)] = pool[: len(flat) - begin]
    save_model(model, folder)


def start(folder: Path, quant: str, cache: Path) -> dict[str, float]:
    environment = dict(os.environ) | {"MIRADA_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), quant], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--quant", nargs="+", default=["int4"])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tower", type=int, default=32, help="layers of the vision tower")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine")
    args = parser.parse_args()
    require_quiet(args.anyway)
    model, cache = args.folder / f"model-{args.layers}-{args.tower}", args.folder / "cache"
    if not (model / "config.json").is_file():
        make(model, args.layers, args.tower)
    for quant in args.quant:
        shutil.rmtree(cache, ignore_errors=True)
        for name in ("first", "second", "third"):
            row = start(model, quant, cache)
            size = sum(file.stat().st_size for file in (cache / "formed").glob("*.mirada")) / 1e9  # exact keeps nothing
            print(
                f"{quant} {name:6} import {row['import']:5.1f} s  load {row['load']:6.1f} s ({row['cpu']:.1f} s of CPU)"
                f"  first product {row['product']:5.2f} s"
                f"  memory {row['own']:.2f} GB + {row['mapped']:.2f} mapped, peak {row['peak']:.2f}; kept {size:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
