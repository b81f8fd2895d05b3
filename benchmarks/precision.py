"""What the precision modes cost in accuracy, beside float32.

    python benchmarks/precision.py [--samples 100] [--tasks 3] [--modes exact int8 int4]

Two figures. *Divergence* of a random model of realistic kind (heavy-tailed weights, a few channels thirty times the others):
mean KL of the next-token distribution from float32's over all positions, and how often the best token differs.
*Held-out figures* of mini, as ``recipes/mini_eval.py`` scores them, for every mode on the same samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "recipes"))

import mini_eval  # noqa: E402
from load_quantised import config  # noqa: E402

from mirada import VLM  # noqa: E402
from mirada.adapt.mode import parse  # noqa: E402
from mirada.layers.batch import Batch  # noqa: E402
from mirada.models.load import build, load_model, save_model  # noqa: E402

OUTLIERS = [17, 300, 611, 999]


def compare(made: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Logits [T, V] -> mean KL(float32 || mode), share of positions with another best token."""
    a, b = exact.double().log_softmax(-1), made.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean()), float((a.argmax(-1) != b.argmax(-1)).double().mean())


@torch.no_grad()
def random_logits(folder: Path, quant: str | None) -> torch.Tensor:
    model: Any = load_model(folder, mode=parse(quant))
    tokens = torch.randint(0, 2000, (512,), generator=torch.Generator().manual_seed(1))
    return model.logits(model(Batch(tokens, torch.arange(512).expand(3, -1), (512,))))


def random_model(folder: Path) -> None:
    """Four layers of width 1024 in bfloat16: Student weights (5 degrees), and four channels that the norms make thirty times as
    large and the matrices behind them read thirty times as faintly, as trained models do."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "vocab_size": 32000}
    mapping = config(4, 1) | sizes | {"tie_word_embeddings": False}
    mapping["vision_config"] |= {"hidden_size": 1024}
    model = build(mapping, torch.float32)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                if "norm" in name and parameter.numel() == 1024:
                    parameter[OUTLIERS] *= 30
                continue
            normal = torch.randn(parameter.shape, generator=random)
            chi = sum(torch.randn(parameter.shape, generator=random).square() for _ in range(5)) / 5
            parameter.copy_(normal / chi.sqrt() * parameter.shape[1] ** -0.5)
            if name.endswith(("qkv.weight", "gate_up.weight", "lm_head.weight")):
                parameter[:, OUTLIERS] /= 30
    save_model(model.to(torch.bfloat16), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--tasks", type=int, default=len(mini_eval.TASKS))
    parser.add_argument("--modes", nargs="+", default=["exact", "int8", "int4", "int4:64"])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        random_model(Path(made))
        exact = random_logits(Path(made), None)
        for mode in args.modes:
            kl, other = compare(random_logits(Path(made), mode), exact)
            rows[f"random {mode}"] = {"kl": kl, "other_best": other}
            print(f"random model   {mode:8} KL {kl:.2e}   another best token {other:.2%}", flush=True)
    for task in mini_eval.TASKS[: args.tasks]:
        for mode in [None, *args.modes]:
            with VLM(args.model, device="cpu", quant=mode) as vlm:
                row = mini_eval.evaluate(vlm, task, args.samples, args.batch, None)
            rows[f"{task.name} {mode}"] = row
            value = f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            print(f"{task.name:42} {mode or 'float32':8} {value}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
