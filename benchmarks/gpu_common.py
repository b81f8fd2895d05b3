"""What the GPU measurements share: models of the released sizes with random weights, ceilings of the card, times, results."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_parity import configs
from torch import Tensor, nn

from mirada.adapt.mode import Mode
from mirada.layers.batch import Batch
from mirada.layers.cache import make_cache
from mirada.layers.moe import Experts
from mirada.models import precision
from mirada.models.family import FAMILIES
from mirada.models.load import build
from mirada.models.precision import RoundedLinear, RoundedStack

LAYERS = {"Qwen2-VL-7B": (28, 32), "Keye-VL-8B": (36, 27), "Kimi-VL-A3B": (27, 27)}
"""Layers of decoder and tower as released."""
VOCABULARY = {"Qwen2-VL-7B": 152064, "Keye-VL-8B": 151936, "Kimi-VL-A3B": 163840}


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: shows that it runs, measures nothing")
    parser.add_argument("--models", nargs="*", default=list(LAYERS))
    return parser


class Report:
    """Rows printed as they come, and written as JSON after each: a later failure loses none."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.device = torch.device("cpu" if options.smoke else "cuda")
        if not options.smoke and not torch.cuda.is_available():
            sys.exit("no CUDA device: run this on a machine with a GPU, or with --smoke")
        self.name, self.folder, self.rows, self.failed = name, options.json, list[dict[str, Any]](), 0
        self.machine = {"torch": torch.__version__, "smoke": options.smoke}
        if not options.smoke:
            self.machine["gpu"] = torch.cuda.get_device_name()

    def row(self, what: str, good: bool | None = None, **values: Any) -> None:
        """``good``: whether a goal is reached; None: there is none."""
        self.failed += good is False
        values = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
        self.rows.append({"what": what, "good": good, **values})
        said = "" if good is None else "   ok" if good else "   BELOW THE GOAL"
        print(f"{what:44}" + "  ".join(f"{key} {value}" for key, value in values.items()) + said, flush=True)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": self.machine, "rows": self.rows}, indent=1)
            (self.folder / f"{self.name}.json").write_text(text)

    def finish(self) -> int:
        return 1 if self.failed else 0


def model_of(name: str, smoke: bool, device: torch.device) -> Any:
    """A model with random weights: bfloat16 at the released sizes on CUDA, or a tiny one."""
    layers, depth = (2, 2) if smoke else LAYERS[name]
    mapping = configs(layers, smoke)[name]
    key = "depth" if "depth" in mapping["vision_config"] else "num_hidden_layers"
    mapping["vision_config"] = mapping["vision_config"] | {key: depth}
    if not smoke:
        mapping["vocab_size"] = VOCABULARY[name]
        if "text_config" in mapping:
            mapping["text_config"] = mapping["text_config"] | {"vocab_size": VOCABULARY[name]}
    model: Any = build(mapping, torch.float32 if smoke else torch.bfloat16, device)
    model.init_weights(0)
    return model.eval()


def round_matrices(model: Any, mode: Mode) -> None:
    """The decoder's matrices, experts and head of a model in memory, as ``VLM(..., quant=)`` keeps them on a GPU."""
    for path, module in list(model.decoder.named_modules()):
        if isinstance(module, nn.Linear) and not getattr(module, "stays_float", False):
            parent, _, child = path.rpartition(".")
            setattr(model.decoder.get_submodule(parent), child, _rounded(module, mode))
        elif isinstance(module, Experts):
            for name in ("gate_up", "down"):
                held = getattr(module, name).data
                delattr(module, name)
                bits = 8 if mode.name == "int8" else 4
                stack = RoundedStack(held.shape, bits, precision._group(mode, held.shape[2]), held.dtype, held.device)
                stack.holder.fill(0, held.flatten(0, 1))  # pyright: ignore
                stack.finish()
                setattr(module, name, stack)
    model.lm_head = _rounded(model.lm_head, precision.HEAD)


def _rounded(plain: nn.Linear, mode: Mode) -> nn.Module:
    rows, columns = plain.weight.shape
    bits, group = 8 if mode.name == "int8" else 4, precision._group(mode, columns)
    made = RoundedLinear(rows, columns, bits, group, plain.bias, plain.weight.device)
    made.holder.fill(0, plain.weight.data)  # pyright: ignore
    made.finish()
    return made


def cache_of(model: Any, tokens: int, sequences: int) -> Any:
    """Pages for that many sequences, open."""
    spec = FAMILIES[model.config.model_type].cache_spec(model.config)
    weight = next(model.parameters())
    size = make_cache(spec, weight.dtype, "cpu").bytes_per_token
    made = make_cache(spec, weight.dtype, weight.device, layout="paged", budget=size * (tokens + 64) * sequences)
    for slot in range(sequences):
        made.allocate(slot)
    return made


def prompt(count: int, sequences: int, device: torch.device) -> Batch:
    """That many random tokens of each sequence."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1999, (count * sequences,), generator=random).to(device)
    places = torch.arange(count, device=device).repeat(sequences).expand(3, -1).contiguous()
    return Batch(tokens, places, (count,) * sequences, (0,) * sequences, tuple(range(sequences)))


@dataclass
class Decoding:
    """Stands for a sequence of the engine that decodes: what ``engine.graphs`` asks of one."""

    slot: int
    computed: int
    lora: None = None
    features: None = None

    def ids(self, start: int, end: int) -> list[int]:
        return [7] * (end - start)

    def places(self, start: int, end: int) -> np.ndarray:
        return np.arange(start, end)[None].repeat(3, 0)


@dataclass
class Step:
    """Stands for a chunk of one token."""

    sequence: Decoding
    count: int = 1
    rows: int = 1

    @property
    def end(self) -> int:
        return self.sequence.computed + 1


def seconds(work: Callable[[], Any], device: torch.device, rounds: int = 20, warm: int = 3) -> float:
    """Median time of one call: events of CUDA, or the clock."""
    for _ in range(warm):
        work()
    if device.type != "cuda":
        taken = []
        for _ in range(min(rounds, 3)):
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda.synchronize()
    for begin, end in pairs:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def bandwidth(device: torch.device) -> float:
    """Bytes per second that the device reads: the best of a sum and of a copy, the latter counting both ways."""
    count = 1 << (31 if device.type == "cuda" else 22)
    x = torch.ones(count // 4, device=device).normal_()
    y = torch.empty_like(x)
    reading = count / seconds(lambda: x.sum(), device, 10)
    return max(reading, 2 * count / seconds(lambda: y.copy_(x), device, 10))


def rate(device: torch.device) -> float:
    """Operations per second of a large product in bfloat16 (CPU: float32) of random values."""
    n = 8192 if device.type == "cuda" else 256
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device, 10)


def off(ours: Tensor, theirs: Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs‖ in float64 (infinite for NaN)."""
    gap = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30))
    return gap if gap == gap else float("inf")
