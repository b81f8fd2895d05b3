"""mini, from nothing: draw, train, export. ``recipes/mini_speedrun.sh`` is the whole life on one page.

    python recipes/mini.py tokenizer --size cpu --run runs/mini
    python recipes/mini.py train STAGE --size cpu --run runs/mini [--steps N]
    python recipes/mini.py train hold --run runs/more --start mirada/assets/mini      (an exported checkpoint, further)
    python recipes/mini.py export --size cpu --run runs/mini --out mirada/assets/mini

Stages build on one another: ``letters`` and ``dense`` (vision tower alone, from what the generator knows of every patch;
lines first, then everything), ``text`` (decoder alone: spelling, copying, templates), ``projector`` (that alone),
``reading`` (projector and decoder, the tower at rest, lines growing from 1 to 40 characters), ``all`` (everything),
``hold`` (the final mix, rate to zero, averaged, weights rounded as they will be stored).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from mini_parts import SIZES, SPECIAL_TOKENS, TEMPLATE, Size, build_tokenizer, model_config, preprocessor_config, write_card
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset

from mirada import Image, Message, Text, synth
from mirada.errors import SettingsError
from mirada.media.grid import GridRule, Patches, content_key, patchify
from mirada.models.family import FAMILIES
from mirada.models.load import build, load_model, save_model
from mirada.prompt.render import Renderer
from mirada.train.batch import Example, TrainBatch, collate
from mirada.train.loop import TrainSettings, train
from mirada.train.objectives.dense import Dense, DenseHeads
from mirada.train.objectives.next_token import NextToken
from mirada.train.optim import round_rows, unround_rows
from mirada.types import Prompt

PLACES = 6
"""Rows and columns of the net over a picture in which the tower must know each patch's cell."""
DENSE_KINDS = {
    "char": (2, len(synth.CHARS)),
    "shape": (1, len(synth.SHAPES)),
    "colour": (1, len(synth.COLOURS)),
    "box": (1, synth.NUM_BOX_CLASSES),
    "place": (1, 1 + PLACES * PLACES),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: what it trains, on which share of tasks, how hard (``level`` from first to last step), and its dials.

    ``grow``: lines grow with the level too; where every patch has its own label, length is no difficulty.
    """

    parts: tuple[str, ...]
    mix: Mapping[str, float]
    settings: TrainSettings
    level: tuple[float, float] = (1.0, 1.0)
    batch: int = 64
    grow: bool = True
    dense_weight: float = 0.0
    rounded: bool = False


TOWER, WHOLE = ("visual",), ("visual", "projector", "decoder", "lm_head")
LINES = {"line": 0.85, "paragraph": 0.15}
SEEN = {"line": 0.55, "scene": 0.2, "boxes": 0.08, "chart": 0.09, "paragraph": 0.08}
READING = {"line": 0.8, "scene": 0.12, "boxes": 0.03, "chart": 0.01, "paragraph": 0.02, "text": 0.02}
EVERYTHING = {"line": 0.47, "scene": 0.4, "boxes": 0.05, "chart": 0.04, "paragraph": 0.02, "text": 0.02}
MORE_QUESTIONS = {"scene": 7, "boxes": 4, "chart": 4}
"""Further turns about a picture: it is seen once, its answers teach many times. None about text, which is only read."""
COMMON = TrainSettings(steps=1, optimizer="muon", save_every=400)
STAGES = {
    "letters": Stage(TOWER, LINES, replace(COMMON, steps=800, lr=2e-3, shape="linear", floor=0.3), (0.0, 0.6), grow=False),
    "dense": Stage(TOWER, SEEN, replace(COMMON, steps=700, lr=1e-3, shape="linear", floor=0.3), (0.3, 1.0), grow=False),
    "text": Stage(("decoder", "lm_head"), {"text": 1.0}, replace(COMMON, steps=500, lr=2e-3, shape="linear", floor=0.2)),
    "projector": Stage(("projector",), EVERYTHING, replace(COMMON, steps=150, lr=2e-3), (0.0, 0.1)),
    "reading": Stage(
        ("projector", "decoder", "lm_head"),
        READING,
        replace(COMMON, steps=900, lr=2e-3, shape="linear", floor=0.4),
        (0.05, 0.8),
    ),
    "all": Stage(WHOLE, EVERYTHING, replace(COMMON, steps=2500, lr=1e-3, shape="constant"), (0.6, 1.0), dense_weight=0.3),
    "hold": Stage(
        WHOLE,
        EVERYTHING,
        replace(COMMON, steps=1200, lr=1e-3, shape="linear", warmup=1, average=0.99),
        dense_weight=0.1,
        rounded=True,
    ),
}
ORDER = tuple(STAGES)


class Drawn(IterableDataset):
    """Batches of drawn samples; step k is the same whoever draws it, so that workers and resumed runs agree."""

    def __init__(self, name: str, size: Size, start: int, settings: TrainSettings, directory: Path, fonts: str) -> None:
        self.name, self.stage, self.start, self.steps, self.seed = name, STAGES[name], start, settings.steps, settings.seed
        self.directory, self.lengths, self.rule = directory, size.lengths, GridRule(max_pixels=size.max_pixels)
        self.fonts, self.batch = fonts, self.stage.batch * size.times_batch

    def __iter__(self) -> Iterator[TrainBatch]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        renderer = None if self.stage.parts == TOWER else load_renderer(self.directory)
        for step in range(self.start + first, self.steps, stride):
            yield self.draw(step, renderer)

    def draw(self, step: int, renderer: Renderer | None) -> TrainBatch:
        chooser = random.Random(f"{self.seed} {self.name} {step}")
        tasks = chooser.choices(list(self.stage.mix), weights=list(self.stage.mix.values()), k=self.batch)
        low, high = self.stage.level
        level = low + (high - low) * min(1.0, step / (0.7 * self.steps))
        seed = self.seed * 16 + ORDER.index(self.name)
        made = []
        for i, task in enumerate(tasks):
            longest = chooser.choices((12, 24, 40), weights=self.lengths)[0]
            limit = max(1, round(longest * min(1.0, 2 * level))) if self.stage.grow else longest
            made.append(example(renderer, self.rule, task, seed, step * self.batch + i, level, limit, self.fonts))
        return collate(made, self.rule)


def example(
    renderer: Renderer | None, rule: GridRule, task: str, seed: int, index: int, level: float, max_chars: int, fonts: str
) -> Example:
    """One drawn sample as a training example; without a renderer, the picture and its labels alone."""
    if task == "text" and renderer is not None:
        question, answer = synth.text_sample(seed, index)
        chat = [Message("user", question), Message("assistant", answer)]
        return Example(renderer.render(chat, (), add_generation_prompt=False))
    sample = synth.sample(task, seed, index, level=level, max_chars=max_chars, fonts=fonts)
    pixels = patchify(sample.image[None], rule.patch)
    high, wide = sample.image.shape[:2]
    grid = (1, high // rule.patch, wide // rule.patch)
    patches = Patches("image", pixels, (grid,), (high, wide), content_key(pixels, grid))
    chat = [Message("user", (Image(b""), Text(sample.question))), Message("assistant", sample.answer)]
    for more in synth.more_questions(sample, MORE_QUESTIONS.get(task, 0), seed, index):
        chat += [Message("user", more.question), Message("assistant", more.answer)]
    prompt = renderer.render(chat, [patches], add_generation_prompt=False) if renderer else Prompt((0,), (), (False,))
    labels = {"char": sample.dense.char, "shape": sample.dense.shape, "colour": sample.dense.colour, "box": sample.dense.box}
    labels["place"] = places(*grid[1:])
    return Example(prompt, (patches,), {k: v.reshape(grid[1] * grid[2], *v.shape[2:]) for k, v in labels.items()})


def places(rows: int, columns: int) -> np.ndarray:
    """int64 [rows, columns]: the cell of each patch in a net of PLACES by PLACES over the picture, from 1."""
    down, across = (np.arange(n) * PLACES // n for n in (rows, columns))
    return 1 + down[:, None] * PLACES + across[None, :]


def load_renderer(directory: Path) -> Renderer:
    family = FAMILIES["KeyeVL1_5"]
    config = family.config(json.loads((directory / "config.json").read_text()))
    return Renderer.from_directory(directory, family.prompt_format(config))


def run_stage(
    name: str, size: Size, run: Path, settings: TrainSettings, workers: int, fonts: str, device: str, start: Path | None
) -> None:
    """Train one stage from the weights of the one before, or of ``start``; leaves ``<stage>.safetensors`` in the run folder."""
    stage, base = STAGES[name], run / "base"
    if start is not None:
        adopt_base(start, base)
    config = json.loads((base / "config.json").read_text())
    torch.manual_seed(settings.seed)
    model = build(config)
    model.init_weights(settings.seed)
    heads = DenseHeads(size.vision_width, DENSE_KINDS)
    before = [run / f"{earlier}.safetensors" for earlier in ORDER[: ORDER.index(name)]]
    done = [path for path in before if path.exists()]
    if start is not None:
        model.load_state_dict(load_model(start, widen=True).state_dict())
    elif done:
        nn.ModuleList([model, heads]).load_state_dict(load_file(done[-1]))
    model.requires_grad_(False)
    for part in stage.parts:
        getattr(model, part).requires_grad_(True)
    heads.requires_grad_(stage.parts == TOWER or stage.dense_weight > 0)
    if stage.rounded:
        round_rows(model)
    nn.ModuleList([model, heads]).to(device)

    def batches(step: int):
        data = Drawn(name, size, step, settings, base, fonts)
        return iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))

    objective = Dense(heads) if stage.parts == TOWER else NextToken(heads, stage.dense_weight)
    # Sequences are short: on a CPU plain products are 1.2 times faster, there and back, than the flash kernel.
    with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():
        state = train(model, objective, batches, settings, run / name, extra=[heads])
    if stage.rounded:
        unround_rows(model)
    save_file({k: v.cpu().clone() for k, v in nn.ModuleList([model, heads]).state_dict().items()}, run / f"{name}.safetensors")
    print(f"stage {name}: {state.step} steps{' (stopped early)' if state.stopped else ''}")


def adopt_base(start: Path, base: Path) -> None:
    """The files of an exported checkpoint that are not weights, for a run that trains it on in full precision."""
    base.mkdir(parents=True, exist_ok=True)
    for file in start.glob("*.json"):
        if file.name != "card.json":
            (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((start / "config.json").read_text())
    config.pop("quantization_config", None)
    (base / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def make_base(size: Size, run: Path) -> None:
    """The files of the checkpoint that are not weights: tokenizer, config, template, preprocessor."""
    base = run / "base"
    base.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(size.vocabulary)
    tokenizer.save(str(base / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    (base / "config.json").write_text(json.dumps(model_config(size, ids), indent=1) + "\n")
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, indent=1)
        + "\n"
    )
    (base / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}, indent=1) + "\n")
    (base / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(size), indent=1) + "\n")
    eos = {"do_sample": False, "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]}
    (base / "generation_config.json").write_text(json.dumps(eos, indent=1) + "\n")


def export(size: Size, run: Path, out: Path) -> None:
    """Write the newest stage as a checkpoint with int8 rows, and its card."""
    done = [run / f"{name}.safetensors" for name in ORDER if (run / f"{name}.safetensors").exists()]
    if not done:
        raise SettingsError(f"{run} holds no trained stage", "run the train command first")
    model = build(json.loads((run / "base" / "config.json").read_text()))
    nn.ModuleList([model, DenseHeads(size.vision_width, DENSE_KINDS)]).load_state_dict(load_file(done[-1]))
    out.mkdir(parents=True, exist_ok=True)
    for file in (run / "base").iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    save_model(model, out, int8_rows=True)
    write_card(out, size, done[-1].stem)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tokenizer", "train", "export"))
    parser.add_argument("stage", nargs="?", choices=ORDER)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--run", type=Path, default=Path("runs/mini"))
    parser.add_argument("--out", type=Path, default=Path("mirada/assets/mini"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 is right on a GPU, and four times faster on a CPU that has avx512_bf16 or amx",
    )
    parser.add_argument("--start", type=Path, help="train on from this exported checkpoint instead of the run's earlier stages")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--fonts", default="debian", help="debian (named packages), debian-any (other versions), builtin (one)")
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.command == "tokenizer":
        make_base(size, args.run)
    elif args.command == "export":
        export(size, args.run, args.out)
    elif args.stage is None:
        sys.exit("train needs a stage: " + ", ".join(ORDER))
    else:
        settings = STAGES[args.stage].settings
        steps = args.steps or settings.steps * size.times_steps
        settings = replace(settings, steps=steps, seed=args.seed, precision=args.precision)
        run_stage(args.stage, size, args.run, settings, args.workers, args.fonts, args.device, args.start)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
