"""A model's name or directory to everything that the engine needs of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mirada import adapt
from mirada.adapt.mode import Mode
from mirada.adapt.mode import parse as parse_mode
from mirada.engine import memory
from mirada.engine.parallel import check_alone, join, load_shared, own_device, spec_of
from mirada.engine.place import Plan, Room, install, measure, plan, rooms
from mirada.errors import CheckpointError, NotAvailable, SettingsError
from mirada.layers import fused
from mirada.layers.kernels import library
from mirada.layers.kinds import check_kind, set_kind
from mirada.media.grid import GridRule
from mirada.media.rule import MediaRule
from mirada.models import precision, shards
from mirada.models.family import family_of
from mirada.models.load import load_model, read_json
from mirada.models.quantised import resident_bytes
from mirada.models.releases import advised
from mirada.prompt.render import Renderer
from mirada.table import nearest
from mirada.types import Sampling

ASSETS = Path(__file__).resolve().parent.parent / "assets"
_log = logging.getLogger(__name__)
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Parts:
    """A model in memory with what belongs to it."""

    model: Any
    renderer: Renderer
    rule: MediaRule
    eos: frozenset[int]
    context: int
    """Most tokens of prompt and answer together."""
    cache_spec: dict[str, Any]
    placement: Plan | None = None
    """Where layers lie, if they lie on devices of their own."""
    advised: Sampling | None = None
    """How the release advises to sample; None: it says nothing."""
    untrained: tuple[str, ...] = ()
    """Kinds of media (image, video) that its card says it was never taught, though it takes them."""
    group: Any = None
    """The processes that share the model (``parallel.group.Group``), if several do."""
    precision: str = ""
    """How matrices are kept: a mode of ``adapt.mode`` (exact, int8:128 ...), a type, or the format of a packed checkpoint."""


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    widen: bool = False,
    hub: Any = None,
    device_map: str | None = None,
    attn: str = "auto",
    quant: str | Mode | None = None,
    tensor_parallel: int | None = None,
    max_image_tokens: int | None = None,
) -> Parts:
    """Read the checkpoint ``name``: a directory, a model inside the package (``mini``), or org/name on a hub.

    ``widen``: packed (quantised) matrices take ``dtype`` on load, for speed, instead of staying packed. ``device_map="auto"``
    spreads layers over all GPUs and the CPU instead of taking one ``device``. ``attn``: see ``layers.kinds.check_kind``.
    ``quant``: how matrices are kept, see ``adapt.mode`` and ``check_mode``; without it and without a ``dtype`` (None or
    ``auto``) see ``unasked_mode``.

    ``tensor_parallel``: so many processes hold a share each, see ``engine.parallel``.

    Raises CheckpointError, NotAvailable (device), SettingsError, or OutOfMemory before any weight is read.
    """
    group = None
    if tensor_parallel is not None:
        check_alone(device_map=device_map, quant=None if quant is None else str(quant), widen=widen or None)
        group = join(tensor_parallel)
        device = own_device(device, group.share)
    directory = find(name, hub)
    found = _rooms(device_map, device)
    place = found[0].device if found else pick_device(device)
    mapping = read_json(directory / "config.json")
    kind = pick_dtype(dtype, place, mapping)
    attention = check_kind(attn, place, kind)
    scheme = adapt.read(mapping, str(directory / "config.json"))
    mode = check_mode(parse_mode(quant), scheme, place, kind, bool(found), widen)
    if mode is None and dtype in (None, "auto") and not (group or found or widen):
        mode = unasked_mode(directory, scheme, place)
    family = family_of(mapping, str(directory / "config.json"))
    if group is not None:
        made = None
        model = load_shared(directory, kind, place, group)
    elif found:
        made = plan(measure(directory, kind, widen), found)
        for other in made.devices:
            check_kind(attn, other, kind)
        model = load_model(directory, kind, made.main, widen=widen, place=made.device_of)
        install(model, made)
    else:
        made = None
        check_weights(directory, kind, place, widen, mode)
        model = load_model(directory, kind, place, widen=widen, mode=mode)
    set_kind(model, attention)
    parts = _with_files(model, family, directory, name)
    rule = _bounded(parts.rule, min_pixels, max_pixels, max_image_tokens)
    kept = precision_of(mode, scheme, kind, widen)
    _log.info("model %s: matrices are kept as %s on %s", directory.name, kept, "several devices" if found else place)
    return replace(parts, rule=rule, placement=made, group=group, precision=kept)


def _bounded(rule: MediaRule, min_pixels: int | None, max_pixels: int | None, tokens: int | None) -> MediaRule:
    max_pixels = area_of(tokens, rule.grid, max_pixels)
    return rule.bounded(min_pixels, max_pixels) if min_pixels or max_pixels else rule


def area_of(tokens: int | None, grid: GridRule, pixels: int | None = None) -> int | None:
    """``max_image_tokens`` as the ``max_pixels`` that a family understands: a token is a square of ``grid.factor`` pixels of a
    picture or frame (28 a side in all families here). Marks around a picture are not counted, nor the border of up to a
    token on each side that Kimi-VL adds.

    ``pixels`` is what was given as ``max_pixels``, and the result without ``tokens``. SettingsError if both are given, or for
    fewer tokens than ``min_pixels`` asks for."""
    if tokens is None:
        return pixels
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise SettingsError(f"max_image_tokens={tokens!r} is not a positive whole number", "give tokens of a picture, e.g. 256")
    if pixels is not None:
        raise SettingsError("max_image_tokens is given beside max_pixels", "give one of the two: they bound the same")
    if tokens * grid.factor**2 < grid.min_pixels:
        least = -(-grid.min_pixels // grid.factor**2)
        raise SettingsError(
            f"max_image_tokens={tokens} is less than the model's min_pixels of {grid.min_pixels}",
            f"give at least {least}, or lower min_pixels of the model",
        )
    return tokens * grid.factor**2


def unasked_mode(directory: Path, scheme: Any, device: torch.device) -> Mode | None:
    """The mode of a model that is loaded without a word about its type: ``exact`` on a CPU whose compiled kernels multiply by
    bfloat16 as it is stored, where most of the weights are that. The values are those of float32, in half the memory."""
    if device.type != "cpu" or scheme is not None or library.library() is None:
        return None
    sizes = [(stored.dtype, math.prod(stored.shape)) for stored in shards.read_all(shards.find(directory)).values()]
    narrow = sum(size for dtype, size in sizes if dtype == "BF16")
    return Mode("exact") if 2 * narrow > sum(size for _, size in sizes) else None


def precision_of(mode: Mode | None, scheme: Any, dtype: torch.dtype, widen: bool = False) -> str:
    """How the matrices of a model are kept, in a word or two."""
    if mode is not None and (scheme is None or scheme.widens):
        return str(mode)
    if scheme is not None and not scheme.widens and not widen:
        return f"{scheme.method}, as stored" + (f", {mode.name} kernels" if mode else "")
    return str(dtype).removeprefix("torch.")


def _with_files(model: Any, family: Any, directory: Path, name: str | Path) -> Parts:
    """``model`` with what the other files of its checkpoint say: tokenizer, template, pixels, ends of a reply."""
    preprocessor = directory / "preprocessor_config.json"
    rule: MediaRule = family.media_rule(model.config, read_json(preprocessor) if preprocessor.exists() else None)
    file = directory / "generation_config.json"
    generation = read_json(file) if file.exists() else {}
    parts = assemble(
        model,
        Renderer.from_directory(directory, family.prompt_format(model.config)),
        rule,
        eos=_eos(generation),
    )
    card = directory / "card.json"  # of models that this package trained
    untrained = tuple(read_json(card).get("untrained", ())) if card.exists() else ()
    return replace(parts, advised=advised([name, directory.resolve()], generation, str(file)), untrained=untrained)


def check_mode(
    mode: Mode | None, scheme: Any, device: torch.device, dtype: torch.dtype, spread: bool, widen: bool
) -> Mode | None:
    """``mode`` where it can be had: on a CPU, and on a GPU with Triton's kernels. On a checkpoint that is packed already it can
    only be the one of its own bits, and means that the integers are multiplied as they are: on a CPU by the compiled kernels,
    with activations rounded to 8 bits; on a GPU they are in any case.

    NotAvailable on other devices and for ``exact`` off a CPU, where matrices are kept in a ``dtype``; SettingsError beside
    ``device_map`` or ``widen``, on a CPU beside other types than float32, or for other bits.
    """
    if mode is None:
        return None
    name = f"quant={str(mode)!r}"
    if spread or (device.type != "cpu" and not fused.packs(device)):
        where = "several devices" if spread else str(device)
        why = f" with Triton's kernels ({fused.status().why})" if device.type == "cuda" and not spread else ""
        raise NotAvailable(
            f"{name} on {where}: precision modes are for one device, a CPU or a GPU{why}",
            (fused.status().fix if why else "")
            or "use device='cpu', or a checkpoint that is stored quantised (AWQ, GPTQ, compressed-tensors, fp8)",
        )
    if device.type != "cpu" and not mode.rounds:
        raise NotAvailable(f"{name} on {device}: there matrices are multiplied in a dtype", "leave quant out, or give a dtype")
    if (dtype != torch.float32 and not fused.packs(device)) or widen:
        other = "widen=True" if widen else f"dtype={str(dtype).removeprefix('torch.')!r}"
        raise SettingsError(
            f"{name} beside {other}",
            "leave widen out: rounded matrices are never widened"
            if widen
            else "leave dtype out: activations are float32 there",
        )
    if scheme is not None and not scheme.widens and _bits(scheme) != {"int8": {8}, "int4": {4}}.get(mode.name):
        raise SettingsError(
            f"{name}: the checkpoint is stored as {scheme.method} already", "leave quant out: it stays as it is stored"
        )
    return mode


def _bits(scheme: Any) -> set[int]:
    """Of the integers of a packed checkpoint; none for floats."""
    if scheme.method == "fp8":
        return set()
    return {group.bits for group in scheme.groups} if hasattr(scheme, "groups") else {getattr(scheme, "bits", 4)}


def _rooms(device_map: str | None, device: Any) -> list[Room]:
    """Devices to spread over, or none for one device."""
    if device_map is None:
        return []
    if device_map != "auto":
        raise SettingsError(f"device_map {device_map!r} is unknown", "use 'auto', or None for one device")
    if device is not None:
        raise SettingsError(f"device {str(device)!r} is given beside device_map", "give one of the two")
    return rooms()


def assemble(model: Any, renderer: Renderer, rule: MediaRule | None = None, eos: Iterable[int] = ()) -> Parts:
    """Parts from modules in memory; what is not given is the family's own."""
    family = family_of({"model_type": model.config.model_type})
    tokenizer, form = renderer.tokenizer, renderer.format
    ends = {*eos, *model.config.eos_token_ids, *(tokenizer.control[text] for text in form.eos if text in tokenizer.control)}
    return Parts(
        model=model,
        renderer=renderer,
        rule=rule or family.media_rule(model.config),
        eos=frozenset(ends),
        context=model.config.text.max_position_embeddings,
        cache_spec=spec_of(model, family.cache_spec(model.config)),
        precision=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def find(name: str | Path, hub: Any = None) -> Path:
    """The directory of a model; one on a hub is fetched if need be (``hub``: ``mirada.hub.HubOptions`` or a mapping of them).

    Raises CheckpointError listing the models inside the package, HubError and its kinds.
    """
    path = Path(name)
    inside = ASSETS / path
    if isinstance(name, str) and path.name == name and (inside / "config.json").is_file() and not path.is_dir():
        return inside
    if path.is_dir():
        return path
    from mirada.hub.resolve import is_id, resolve_with  # brings an HTTP client

    if is_id(name):
        return resolve_with(name, hub)
    known = [folder.parent.name for folder in ASSETS.glob("*/config.json")]
    fix = f"give the directory of a checkpoint, or org/name on a hub; {nearest(str(name), known)}"
    raise CheckpointError(f"there is no model {str(name)!r}", fix)


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        made = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"device {device!r} is unknown", "use cpu, cuda, cuda:1 or mps") from error
    if made.type == "cuda" and not torch.cuda.is_available():
        raise NotAvailable("device cuda is not available", "use device='cpu', or install a CUDA build of torch and its driver")
    if made.type == "cuda" and (made.index or 0) >= torch.cuda.device_count():
        raise NotAvailable(f"device {made} is not available", f"there are {torch.cuda.device_count()} CUDA devices")
    if made.type == "mps" and not torch.backends.mps.is_available():
        raise NotAvailable("device mps is not available", "use device='cpu'; mps needs macOS on Apple silicon")
    if made.type not in ("cpu", "cuda", "mps"):
        raise SettingsError(f"device {str(device)!r} is not supported", "use cpu, cuda, cuda:1 or mps")
    return made


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device, config: dict[str, Any]) -> torch.dtype:
    """The type asked for; with None or ``auto`` float32 on a CPU (without fast bfloat16 it is the quickest; how matrices are
    kept is another matter, see ``unasked_mode``), elsewhere the checkpoint's."""
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    elif dtype is None or dtype == "auto":
        name = "float32" if device.type == "cpu" else str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    else:
        name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise SettingsError(f"dtype {name!r} is not supported", nearest(name, DTYPES))
    return DTYPES[name]


def check_weights(
    directory: Path, dtype: torch.dtype, device: torch.device, widen: bool = False, mode: Mode | None = None
) -> None:
    """Raise OutOfMemory unless the weights in ``dtype`` (or ``mode``) fit, counted from the headers of their files."""
    mapping = read_json(directory / "config.json")
    scheme, family = adapt.read(mapping, str(directory / "config.json")), family_of(mapping)
    wide = widen or (scheme is not None and scheme.widens)
    layout = family.layout(family.config(mapping))
    stored = layout.released(shards.read_all(shards.find(directory)))
    if mode is not None and (scheme is None or scheme.widens):
        needed = precision.resident_bytes(layout, mode, stored, dtype, mode.rounds and fused.packs(device))
    else:
        needed = resident_bytes(layout, stored, scheme, dtype, wide)
    smaller = "use dtype='bfloat16', " if dtype.itemsize > 2 else "use "
    kept = str(dtype).removeprefix("torch.") if mode is None else str(mode)
    memory.require(
        needed, memory.available(device), f"model {directory.name!r} in {kept}",
        f"{smaller}a quantised mode, a smaller model, or another device",
    )  # fmt: skip


def _eos(generation: Mapping[str, Any]) -> tuple[int, ...]:
    found = generation.get("eos_token_id")
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)
