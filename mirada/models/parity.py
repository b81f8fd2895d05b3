"""One picture and one question through a model in named stages, kept in a file, and compared stage by stage with another run.

The stages: ``picture`` (decoded), ``pixels`` (resized), ``patches`` (normalised), ``patch embedding``, ``tower layer 0`` ..,
``tower norm``, ``projector``, ``tokens``, ``positions``, ``embeddings``, ``decoder layer 0`` .., ``decoder norm``, ``logits``
(of the last token), ``greedy`` (the tokens that follow). ``docs/parity.md`` says what each holds and how far it may be off.

T tokens, N patches, W width of the tower, D width of the decoder, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as pil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mirada.errors import CheckpointError, MessageError, TensorError
from mirada.layers.batch import Batch, MediaBatch
from mirada.layers.cache import make_cache
from mirada.layers.kernels import library
from mirada.media.grid import Patches, normalise
from mirada.media.image import open_image
from mirada.media.limits import FetchLimits
from mirada.media.prepare import prepare
from mirada.media.rule import MediaRule
from mirada.models.family import FAMILIES
from mirada.models.positions import positions
from mirada.prompt.render import Renderer
from mirada.types import Image, Message, Prompt, Text

QUESTION = "What is in this picture?"
STEPS = 8
"""Greedy tokens."""
_FORM = "mirada parity 1"
_OTHER_PICTURE = 8.0
"""Mean difference, in levels of 255, from which two pictures are not the same one decoded twice."""


@dataclass(frozen=True)
class Limit:
    """How far a stage may be off, as shares of the root mean square of what it is compared with: its largest difference, and
    the root mean square of all differences."""

    largest: float
    typical: float


LIMITS = {
    "float32": Limit(1e-3, 5e-5),
    "float16": Limit(0.1, 0.005),
    "bfloat16": Limit(0.5, 0.04),
    "int8": Limit(0.5, 0.06),
    "int4": Limit(3.0, 0.4),
}
"""Of every stage that a network computes, by the coarser of the two precisions."""
_SAME = Limit(0.0, 0.0)
_STAGE_LIMITS = {
    "picture": Limit(0.05, 0.02),  # decoders of JPEG may differ by a level or two
    "pixels": _SAME,
    "patches": Limit(1e-5, 1e-6),
    "tokens": _SAME,
    "positions": _SAME,
    "greedy": _SAME,
}


@dataclass(frozen=True, eq=False)
class Recording:
    """What one run made, stage by stage, in order, on the CPU; ``facts`` say of which model, by what, with which question."""

    stages: Mapping[str, Tensor]
    facts: Mapping[str, str]

    @property
    def precision(self) -> str:
        """How matrices were kept, as ``VLM.precision`` says it."""
        return self.facts.get("precision", "float32")

    def save(self, path: str | Path) -> None:
        """Write it as safetensors. CheckpointError if that cannot be."""
        facts = {**self.facts, "form": _FORM, "stages": json.dumps(list(self.stages))}
        try:
            save_file({name: tensor.contiguous() for name, tensor in self.stages.items()}, path, facts)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be written ({error})", "give a file in a folder that exists") from error

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read what ``save`` wrote. CheckpointError for another file, or one that is broken."""
        again = "give a file that 'mirada doctor --model X --parity --record FILE' wrote"
        try:
            with safe_open(str(path), "pt") as file:
                facts = dict(file.metadata() or {})
                if facts.pop("form", None) != _FORM:
                    raise CheckpointError(f"{path} is no recording", again)
                names = json.loads(facts.pop("stages"))
                return cls({name: file.get_tensor(name) for name in names}, facts)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as a recording ({error})", again) from error

    def picture(self) -> pil.Image:
        """The picture of which it is."""
        return pil.fromarray(self.stages["picture"].numpy())


@dataclass(frozen=True)
class Row:
    """One stage of two runs. Shares are of the root mean square of the reference; None where there is nothing to divide."""

    stage: str
    shape: tuple[int, ...]
    largest: float
    relative: float | None
    typical: float | None
    limit: Limit
    within: bool
    note: str = ""


# -- one run -----------------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """What goes into a model, made of a picture and a question."""

    picture: Tensor
    """uint8 [H, W, 3], upright."""
    patches: Patches
    pixels: Tensor
    """float32 [N, ..], normalised."""
    prompt: Prompt
    places: Tensor
    """int64 [3, T]."""
    following: int
    """The position of the token after the prompt."""
    question: str

    def batch(self, device: torch.device) -> Batch:
        rows = np.concatenate([np.arange(span.start, span.end) for span in self.prompt.spans])
        tokens = torch.tensor(self.prompt.tokens, device=device)
        return Batch(tokens, self.places.to(device), (len(tokens),), feature_rows=torch.from_numpy(rows).to(device))


def drawn() -> pil.Image:
    """The picture that is taken where none is given: 250 x 190, whole numbers alone, so the same everywhere; fine enough that
    every resize shows."""
    y, x = np.mgrid[0:190, 0:250].astype(np.int64)
    disc = (x - 90) ** 2 + (y - 80) ** 2 < 55**2
    channels = (np.where(disc, 210, x * 255 // 249), (x * x + y * y) // 61 % 256, np.where(x % 40 < 20, y, 255 - y))
    return pil.fromarray(np.stack(channels, -1).astype(np.uint8))


def inputs(
    renderer: Renderer, rule: MediaRule, picture: Any = None, question: str | None = None, limits: FetchLimits | None = None
) -> Inputs:
    """The same steps that the engine takes in front of a model. Raises MediaError, MessageError."""
    limits, question = limits or FetchLimits(), question or QUESTION
    upright = open_image(drawn() if picture is None else picture, limits, rule.alpha).rgb
    patches = prepare(Image(upright), rule, limits)
    prompt = renderer.render([Message("user", [Image(upright), Text(question)])], [patches])
    places, following = positions(len(prompt.tokens), prompt.spans)
    pixels = torch.from_numpy(normalise(patches.pixels, rule.grid))
    return Inputs(torch.from_numpy(np.array(upright)), patches, pixels, prompt, torch.from_numpy(places), following, question)


def run(
    model: Any, given: Inputs, rule: MediaRule, precision: str = "", eos: frozenset[int] = frozenset(), steps: int = STEPS
) -> Recording:
    """All stages of ``given`` through ``model``; at most ``steps`` greedy tokens, the first of ``eos`` being the last."""
    device, dtype = model.decoder.norm.weight.device, model.decoder.norm.weight.dtype
    media = MediaBatch(given.pixels.to(device, dtype), given.patches.grids, (given.patches.kind,) * len(given.patches.grids))
    batch = given.batch(device)
    seen = trace(model, media, batch)
    seen["logits"] = seen["logits"][-1:]
    tokens, gaps = greedy(model, batch, seen["projector"].to(device), given.following, steps, eos)
    stages = {
        "picture": given.picture,
        "pixels": unfold(given.patches, rule),
        "patches": given.pixels,
        **{name: seen[name] for name in seen if name.startswith(("patch", "tower", "projector"))},
        "tokens": torch.tensor(given.prompt.tokens),
        "positions": given.places,
        **{name: seen[name] for name in seen if not name.startswith(("patch", "tower", "projector"))},
        "greedy": torch.tensor(tokens),
    }
    return Recording(stages, facts(model, precision, given.question) | {"gaps": json.dumps(gaps)})


def facts(model: Any, precision: str, question: str) -> dict[str, str]:
    """What a recording says of itself: ``model`` (sizes), ``precision``, ``question``, and by what it was made."""
    vision, text = model.config.vision, model.config.text
    sizes = {"model_type": model.config.model_type}
    sizes |= {
        f"vision.{n}": getattr(vision, n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    }
    sizes |= {f"text.{n}": getattr(text, n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    return {
        "model": json.dumps(sizes),
        "precision": precision or str(model.decoder.norm.weight.dtype).removeprefix("torch."),
        "question": question,
        "software": f"mirada {metadata.version('mirada')}, torch {torch.__version__}",
        "device": f"{model.decoder.norm.weight.device}, {library.status().name} kernels",
    }


@torch.no_grad()
def trace(model: Any, media: MediaBatch | None, batch: Batch) -> dict[str, Tensor]:
    """What leaves each part of ``model`` in a pass without a cache, in float32 on the CPU; ``logits`` of all tokens [T, V]."""
    seen: dict[str, Tensor] = {}
    features = None
    with _watching(model, seen):
        if media is not None:
            features = model.encode(media)
        hidden = model(batch, features)
    seen["decoder norm"], seen["logits"] = _kept(hidden), _kept(model.logits(hidden))
    return seen


@contextmanager
def _watching(model: Any, seen: dict[str, Tensor]) -> Iterator[None]:
    def out(name: str) -> Callable[..., None]:
        return lambda module, args, made: seen.__setitem__(name, _kept(made))

    def into(name: str) -> Callable[..., None]:
        return lambda module, args: seen.__setitem__(name, _kept(args[0]))

    tower, decoder = model.visual, model.decoder
    hooks = [tower.layers[0].register_forward_pre_hook(into("patch embedding"))]
    hooks += [layer.register_forward_hook(out(f"tower layer {i}")) for i, layer in enumerate(tower.layers)]
    if hasattr(tower, "norm"):
        hooks.append(tower.norm.register_forward_hook(out("tower norm")))
    hooks.append(model.projector.register_forward_hook(out("projector")))
    hooks.append(decoder.layers[0].register_forward_pre_hook(into("embeddings")))
    hooks += [layer.register_forward_hook(out(f"decoder layer {i}")) for i, layer in enumerate(decoder.layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _kept(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32, copy=True)  # a copy: what follows may write over it


@torch.no_grad()
def greedy(
    model: Any, batch: Batch, features: Tensor | None, following: int, steps: int, eos: frozenset[int] = frozenset()
) -> tuple[list[int], list[float]]:
    """Tokens by one pass over the prompt and then a token at a time from the cache, as the engine goes; and by how much the
    best logit of each was ahead of the next."""
    norm = model.decoder.norm.weight
    cache = make_cache(FAMILIES[model.config.model_type].cache_spec(model.config), norm.dtype, norm.device)
    cache.allocate(0)
    tokens: list[int] = []
    gaps: list[float] = []
    logits = model.logits(model(batch, features, cache)[-1:])
    while len(tokens) < steps:
        best = logits[0].topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        if tokens[-1] in eos or len(tokens) == steps:
            break
        past = len(batch.tokens) + len(tokens) - 1
        place = torch.full((3, 1), following + len(tokens) - 1, device=norm.device)
        logits = model.next_logits(Batch(torch.tensor(tokens[-1:], device=norm.device), place, (1,), (past,)), None, cache)
    cache.free(0)
    return tokens, gaps


def unfold(patches: Patches, rule: MediaRule) -> Tensor:
    """uint8 [frames, H, W, 3] that ``patches`` of one size were cut from: a picture after its resize and border."""
    t, high, wide = patches.grids[0]
    patch, square = rule.grid.patch, rule.grid.merge if rule.grid.merged_order else 1
    span = patches.pixels.shape[2] if patches.pixels.ndim == 5 else 1
    cut = patches.pixels[: t * high * wide].reshape(t, high // square, wide // square, square, square, -1, span, patch, patch)
    whole = cut.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(t * span, high * patch, wide * patch, -1)
    return torch.from_numpy(np.ascontiguousarray(whole))


# -- two runs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Two runs beside each other; ``first`` is the first stage beyond its limit."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def first(self) -> Row | None:
        return next((row for row in self.rows if not row.within), None)


def compare(ours: Recording, theirs: Recording) -> Report:
    """Stage by stage, where both have it, in the order of ``ours``. TensorError for a recording of a model of other sizes,
    MessageError for one of another picture or question."""
    check_same(ours, theirs)
    limit = limit_of(ours.precision, theirs.precision)
    rows = [_row(name, ours, theirs, limit) for name in ours.stages if name in theirs.stages]
    left = [name for name in ours.stages if name not in theirs.stages]
    return Report(tuple(rows), (f"the other run has no {', '.join(left)}",) if left else ())


def check_same(ours: Recording, theirs: Recording) -> None:
    """See ``compare``."""
    a, b = (json.loads(side.facts.get("model", "{}")) for side in (ours, theirs))
    for name in a:
        if name in b and a[name] != b[name]:
            raise TensorError(
                f"the recording is of another model: its {name} is {b[name]}, this model's {a[name]}", "give one of this model"
            )
    if ours.facts["question"] != theirs.facts.get("question", ours.facts["question"]):
        raise MessageError(
            f"the recording is of another question: {theirs.facts['question']!r}", "leave the question out: it is in the file"
        )
    x, y = ours.stages.get("picture"), theirs.stages.get("picture")
    if x is None or y is None:
        return
    if x.shape != y.shape or float((x.float() - y.float()).abs().mean()) > _OTHER_PICTURE:
        raise MessageError(
            f"the recording is of another picture: {_size(y)}, {_name(y)}; this one is {_size(x)}, {_name(x)}",
            "leave the picture out: it is in the file",
        )


def _size(picture: Tensor) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"


def _name(picture: Tensor) -> str:
    return hashlib.sha256(picture.numpy().tobytes()).hexdigest()[:12]


def kind_of(precision: str) -> str:
    """The row of ``LIMITS`` for a precision as ``VLM.precision`` says it: a mode, a type, or a packed format."""
    name = precision.partition(":")[0]
    if name in LIMITS:
        return name
    if name == "exact":
        return "float32"
    if precision.startswith(("fp8", "mirada_int8")) or "int8 kernels" in precision:
        return "int8"
    return "int4"


def limit_of(ours: str, theirs: str) -> Limit:
    """The limit of two runs with these precisions: the coarser one's; where both are the same form of the same weights, that of
    what rounds activations."""
    if ours == theirs and "as stored" in ours and "kernels" not in ours:
        return LIMITS["float32"]
    if ours == theirs and kind_of(ours) == "int4":
        return LIMITS["int8"]
    return max((LIMITS[kind_of(side)] for side in (ours, theirs)), key=lambda limit: limit.largest)


def _row(name: str, ours: Recording, theirs: Recording, limit: Limit) -> Row:
    x, y = ours.stages[name], theirs.stages[name]
    limit = _STAGE_LIMITS.get(name, limit)
    if name == "greedy":
        return _greedy_row(ours, theirs)
    if x.shape != y.shape:
        note = f"{list(x.shape)} beside {list(y.shape)}"
        return Row(name, tuple(x.shape), float("inf"), None, None, limit, False, note)
    a, b = x.double(), y.double()
    off, spread = (a - b).abs(), float(b.square().mean().sqrt()) if b.numel() else 0.0
    largest = float(off.max()) if off.numel() else 0.0
    typical = float(off.square().mean().sqrt()) if off.numel() else 0.0
    if spread == 0.0:
        return Row(name, tuple(x.shape), largest, None, None, limit, largest == 0.0)
    shares = largest / spread, typical / spread
    within = shares[0] <= limit.largest and shares[1] <= limit.typical  # what is no number is not
    note = "" if within else _where(off)
    return Row(name, tuple(x.shape), largest, *shares, limit, within, note)


def _where(off: Tensor) -> str:
    """The row of the largest difference; NaN counts as the largest."""
    at = int(off.nan_to_num(float("inf")).argmax())
    index = tuple(int(i) for i in np.unravel_index(at, off.shape)) if off.ndim else ()
    count = int((off != 0).sum())
    return f"most at {list(index)}; {count} of {off.numel()} differ"


def _greedy_row(ours: Recording, theirs: Recording) -> Row:
    """Tokens are the same, or the first that is not was so near a tie that logits within their limit may choose either."""
    a, b = ours.stages["greedy"].tolist(), theirs.stages["greedy"].tolist()
    count = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    differ = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    shape = (len(a),)
    if not differ:
        return Row("greedy", shape, 0.0, None, None, _SAME, True)
    note = f"the same up to token {count}: then {a[count : count + 1]} and {b[count : count + 1]}"
    gaps = json.loads(ours.facts.get("gaps", "[]"))
    logits = ours.stages.get("logits")
    if count < min(len(gaps), len(a), len(b)) and logits is not None:
        most = 2 * limit_of(ours.precision, theirs.precision).largest * float(logits.double().square().mean().sqrt())
        if gaps[count] <= most:
            return Row("greedy", shape, float(differ), None, None, _SAME, True, f"{note}, a near tie ({gaps[count]:.3g} apart)")
    return Row("greedy", shape, float(differ), None, None, _SAME, False, note)
