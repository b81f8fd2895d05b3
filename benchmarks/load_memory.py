"""How much a process grows while it loads a checkpoint: ``python benchmarks/load_memory.py [GIGABYTES] [--dtype bfloat16]``.

Makes a checkpoint of that size (bfloat16, sharded), loads it in a fresh process and prints the growth of its peak resident
memory, and of its anonymous part, as multiples of the bytes of the weights in the type that they are loaded to. The floor
is 1.0: the weights themselves. Mapped pages of the files count as resident until they are given back. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = {
    "model_type": "KeyeVL1_5", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 4096, "vocab_size": 8192, "rope_theta": 1000000, "num_hidden_layers": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}, "image_token_id": 1, "video_token_id": 2,
    "vision_start_token_id": 3, "vision_end_token_id": 4, "eos_token_id": 5,
    "vision_config": {
        "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512, "image_size": 86,
    },
}  # fmt: skip


def make(directory: Path, size: int, shard: int = 512 << 20) -> int:
    """A checkpoint of at least ``size`` bytes in bfloat16, written in shards of ``shard`` bytes; returns its bytes."""
    import torch

    from mirada.models.load import build, save_model

    def number(layers: int) -> int:
        return sum(p.numel() for p in build(MODEL | {"num_hidden_layers": layers}, device="meta").parameters())

    layers = 1 + max(0, (size // 2 - number(1))) // (number(2) - number(1)) + 1
    model = build(MODEL | {"num_hidden_layers": layers}, torch.bfloat16)
    for parameter in model.parameters():
        parameter.detach().fill_(0.5)
    files = save_model(model, directory, max_shard_bytes=shard)
    return sum(file.stat().st_size for file in files)


def measure(directory: Path, dtype: str, warm: bool = False) -> dict[str, float]:
    """Growth of a fresh process that loads ``directory``: bytes, and shares of the weights' own bytes.

    ``warm`` imports all modules and builds the model on ``meta`` before the count begins; without it, their some 60 MB
    count as growth.
    """
    command = [sys.executable, __file__, "--load", str(directory), "--dtype", dtype, *(["--warm"] if warm else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon"))}


def _load(directory: Path, dtype: str, warm: bool) -> None:
    import time

    import torch

    from mirada.models.load import build, load_model

    if warm:
        build(MODEL, device="meta")
    torch.zeros(1 << 20).bfloat16().float()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before, start = _resident(), time.perf_counter()
    model = load_model(directory, getattr(torch, dtype))
    seconds, after = time.perf_counter() - start, _resident()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak, anonymous = after["VmHWM"] - before["VmRSS"], after["RssAnon"] - before["RssAnon"]
    facts = {"weights": weights, "peak": peak, "anonymous": anonymous, "seconds": round(seconds, 2)}
    print(json.dumps(facts | {"peak_ratio": round(peak / weights, 4), "anonymous_ratio": round(anonymous / weights, 4)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gigabytes", type=float, nargs="?", default=2.0)
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16; both of the first two without it")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        _load(arguments.load, arguments.dtype, arguments.warm)
        return
    with tempfile.TemporaryDirectory() as folder:
        size = make(Path(folder), int(arguments.gigabytes * 1e9))
        print(f"checkpoint of {size / 1e9:.2f} GB in bfloat16")
        for dtype in [arguments.dtype] if arguments.dtype else ["bfloat16", "float32"]:
            made = measure(Path(folder), dtype)
            print(
                f"{dtype:9} weights {made['weights'] / 1e9:5.2f} GB  growth of peak {made['peak_ratio']:.3f}x  "
                f"anonymous {made['anonymous_ratio']:.3f}x  (floor 1.000x)  {made['seconds']:.1f} s"
            )


if __name__ == "__main__":
    main()
