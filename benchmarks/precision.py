"""What the precision modes cost in accuracy: one table, beside float32.

    python benchmarks/precision.py [--samples 100] [--tasks line scene] [--modes float32 exact int8 int4 int4:64 kv-int8]

*random*: a random model of realistic kind (heavy-tailed weights, a few channels thirty times the others): mean KL of the
next-token distribution from float32's over all positions, and the share of positions with another best token.
*mini*: the same over the answers that mini gives in float32 to held-out pictures, token by token.
*Held-out figures* of mini as ``recipes/mini_eval.py`` scores them, on the same samples in every mode, with 95 % intervals:
character errors of lines of up to 40 characters, exact answers of scenes.

``kv-int8`` keeps keys and values as int8 and everything else in float32. (mini's weights were trained as int8 rows and are
widened, so ``exact`` is float32 there.)
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

import kv_cache  # noqa: E402
import mini_eval  # noqa: E402
from load_quantised import config  # noqa: E402

from mirada import VLM  # noqa: E402
from mirada.adapt.mode import parse  # noqa: E402
from mirada.layers.batch import Batch  # noqa: E402
from mirada.layers.cache import make_cache  # noqa: E402
from mirada.models.family import family_of  # noqa: E402
from mirada.models.load import build, load_model, save_model  # noqa: E402

OUTLIERS = [17, 300, 611, 999]
POSITIONS = 512
MODES = ("float32", "exact", "int8", "int4", "int4:64", "kv-int8")
TASKS = {task.task: task for task in mini_eval.TASKS if task.max_chars in (None, 40)}
"""The longest lines, and all others by their names."""


def settings(mode: str) -> tuple[str | None, Any]:
    """``quant`` and ``kv`` of a mode."""
    return (None if mode in ("float32", "kv-int8") else mode), ("int8" if mode == "kv-int8" else "auto")


def compare(made: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Logits [T, V] -> mean KL(float32 || mode), share of positions with another best token."""
    a, b = exact.double().log_softmax(-1), made.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean()), float((a.argmax(-1) != b.argmax(-1)).double().mean())


@torch.no_grad()
def random_logits(folder: Path, mode: str) -> torch.Tensor:
    quant, kv = settings(mode)
    model: Any = load_model(folder, mode=parse(quant))
    cache = make_cache(family_of({"model_type": model.config.model_type}).cache_spec(model.config), torch.float32, "cpu", kv=kv)
    cache.allocate(0)
    tokens = torch.randint(0, 2000, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    return model.logits(model.forward(Batch(tokens, torch.arange(POSITIONS).expand(3, -1), (POSITIONS,)), None, cache))


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


def mini_logits(mode: str, pictures: list[Any], answers: list[tuple[int, ...]]) -> torch.Tensor:
    """[n, V] of all tokens of ``answers`` to ``pictures``."""
    quant, kv = settings(mode)
    with VLM("mini", device="cpu", quant=quant) as vlm:
        rows = [kv_cache.logits(vlm.parts, one, tokens, kv) for one, tokens in zip(pictures, answers, strict=True)]
    return torch.cat(rows)


def held_out(mode: str, task: Any, samples: int, batch: int) -> dict[str, float]:
    quant, kv = settings(mode)
    with VLM("mini", device="cpu", quant=quant, engine={"kv": kv}) as vlm:
        return mini_eval.evaluate(vlm, task, samples, batch, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--tasks", nargs="*", default=["line", "scene"], choices=list(TASKS))
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    pictures = kv_cache.drawn()
    answers = [output.tokens for output in kv_cache.answers("auto", pictures)]
    known = mini_logits("float32", pictures, answers)
    names = "  ".join(f"{name:>24}" for name in args.tasks)
    print(f"{'mode':8}  {'random KL':>9} {'other':>7}  {'mini KL':>9} {'other':>7}  {names}", flush=True)
    with tempfile.TemporaryDirectory() as made:
        random_model(Path(made))
        exact = random_logits(Path(made), "float32")
        for mode in args.modes:
            kl, other = compare(random_logits(Path(made), mode), exact)
            near, differs = compare(mini_logits(mode, pictures, answers), known)
            row = {"random": {"kl": kl, "other_best": other}, "mini": {"kl": near, "other_best": differs}}
            print(f"{mode:8}  {kl:9.1e} {other:7.2%}  {near:9.1e} {differs:7.2%}", end="", flush=True)
            for name in args.tasks:
                row[name] = found = held_out(mode, TASKS[name], args.samples, args.batch)
                said = f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
                print(f"  {said:>24}", end="", flush=True)
            print(flush=True)
            rows[mode] = row
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
