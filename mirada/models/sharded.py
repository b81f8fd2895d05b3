"""A rank's share of a model: modules cut to size before memory is taken, and slices read straight from the mapped files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirada import adapt
from mirada.errors import CheckpointError, NotAvailable
from mirada.models import quantised, shards
from mirada.models.family import family_of
from mirada.models.layout import Layout, Rule
from mirada.models.load import build, read_json
from mirada.models.shards import Mapped, Stored
from mirada.parallel.plan import Column, Cut, Plan, Share, cuts

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Piece:
    """What a rank takes of one stored tensor, and where it goes: entry ``index`` of ``rule``, in its own shapes."""

    name: str
    cut: Cut | None
    rule: Rule
    index: int


def load_share(directory: str | Path, dtype: torch.dtype, device: torch.device | str, share: Share) -> nn.Module:
    """The modules of ``directory`` as rank ``share`` holds them; those for the first rank alone have no weights elsewhere.

    Raises NotAvailable for a checkpoint that is packed, SettingsError for sizes that cannot be divided, CheckpointError.
    """
    directory = Path(directory)
    mapping, layout, stored = _read(directory)
    pieces: list[Piece] = []
    where = str(directory / "config.json")
    model = build(mapping, dtype, device, where, lambda model: pieces.extend(cut(model, layout, share)))
    parameters, mapped = dict(model.named_parameters()), Mapped()
    with torch.no_grad():
        # In the order of the files, so that each is read once from front to back.
        for piece in sorted(pieces, key=lambda piece: (str(stored[piece.name].file), stored[piece.name].start)):
            _fill(piece.rule.place(parameters[piece.rule.parameter], piece.index), stored[piece.name], piece.cut, mapped)
    return model.eval()


def share_bytes(directory: str | Path, dtype: torch.dtype, share: Share) -> int:
    """Bytes of the weights that ``load_share`` takes."""
    directory = Path(directory)
    mapping, layout, _ = _read(directory)
    made: list[Piece] = []
    build(mapping, dtype, "meta", str(directory / "config.json"), lambda model: made.extend(cut(model, layout, share)))
    return sum(math.prod(piece.rule.tensors[piece.index][1]) for piece in made) * dtype.itemsize


def plan_of(config: Any) -> Plan:
    """How the family of a model's config divides it."""
    return family_of({"model_type": config.model_type}).plan(config)


def head_sizes(config: Any, ranks: int) -> list[int]:
    """Rows of the head on each rank."""
    split = plan_of(config).split(HEAD)
    assert isinstance(split, Column)
    ranges = [split.units[0].of(Share(rank, ranks)) for rank in range(ranks)]
    return [end - begin for begin, end in ranges]


def _read(directory: Path) -> tuple[dict[str, Any], Layout, dict[str, Stored]]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory", "give the directory that holds config.json and the weights")
    where = str(directory / "config.json")
    mapping = read_json(directory / "config.json")
    if (scheme := adapt.read(mapping, where)) is not None:
        raise NotAvailable(
            f"{directory} is stored as {scheme.method}, and only plain weights are divided",
            "use the plain release, or one process",
        )
    family = family_of(mapping, where)
    layout = family.layout(family.config(mapping))
    stored = layout.released(shards.read_all(shards.find(directory)))
    quantised.check(layout, stored, None)
    return mapping, layout, stored


def cut(model: Any, layout: Layout, share: Share) -> list[Piece]:
    """Shrinks the modules of ``model``, which lie on meta, to a rank's share; returns what fills them."""
    config: Any = model.config
    plan, made = plan_of(config), []
    for rule in _rules(layout, config):
        owner, _, attribute = rule.parameter.rpartition(".")
        module = model.get_submodule(owner)
        held: Tensor = getattr(module, attribute)
        shapes = tuple(shape for _, shape in rule.tensors)
        taken = cuts(plan.split(rule.parameter), shapes, len(held), share)
        if not taken:
            module._parameters[attribute] = None
            continue
        own = tuple((rule.tensors[i][0], shapes[i] if c is None else c.shape(shapes[i])) for i, c in taken)
        local = replace(rule, tensors=own)
        module._parameters[attribute] = nn.Parameter(
            held.new_empty(_shape(rule, local, tuple(held.shape), taken[0][1])), held.requires_grad
        )
        if attribute == "weight" and hasattr(module, "out_features"):
            module.out_features, module.in_features = module._parameters[attribute].shape  # pyright: ignore
        made += [Piece(own[at][0], c, local, at) for at, (_, c) in enumerate(taken)]
    plan.apply(model.get_submodule("decoder"), share)
    model.tie_weights = lambda: None  # the head has rows of its own, even where they are the embedding's
    return made


def _rules(layout: Layout, config: Any) -> Iterator[Rule]:
    """Those of the layout, and one for a head that is tied."""
    yield from layout.rules
    if config.text.tie_word_embeddings:
        embed = next(rule for rule in layout.rules if rule.parameter == "decoder.embed.weight")
        yield replace(embed, parameter=HEAD)


def _shape(rule: Rule, local: Rule, whole: tuple[int, ...], cut: Cut | None) -> tuple[int, ...]:
    """Of the parameter that ``local`` fills, which had shape ``whole`` when ``rule`` filled it."""
    if rule.how == "stack":
        return (len(local.tensors) * whole[0] // len(rule.tensors), *whole[1:])
    if cut is None:
        return whole
    if cut.dim == 0:
        return (sum(shape[0] for _, shape in local.tensors), *whole[1:])
    return cut.shape(whole)


def _fill(place: Tensor, stored: Stored, cut: Cut | None, mapped: Mapped) -> None:
    """The slice that a rank takes, and of slices of rows no other byte, from the file's pages to its place."""
    row = math.prod(stored.shape[1:])
    size = stored.torch_dtype.itemsize
    if cut is not None and cut.dim == 0:
        stored = replace(stored, shape=cut.shape(stored.shape), start=stored.start + cut.begin * row * size)
        cut = None
    if cut is None:
        flat = place.view(-1)
        for begin, piece in mapped.chunks(stored, row * size):
            flat[begin : begin + len(piece)].copy_(piece)
        return
    for begin, piece in mapped.chunks(stored, row * size):
        rows = piece.view(-1, row)[:, cut.begin : cut.end]
        place[begin // row : begin // row + len(rows)].copy_(rows)
