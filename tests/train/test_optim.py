"""Schedules, averaging, and weights rounded as they will be stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mirada.errors import SettingsError
from mirada.train.optim import Average, Muon, Schedule, optimizers, orthogonal, round_rows, unround_rows


@pytest.mark.parametrize("shape,half", [("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)])
def test_schedule(shape: str, half: float) -> None:
    schedule = Schedule(2.0, 110, warmup=10, shape=shape, floor=0.1)  # type: ignore[arg-type]
    assert schedule.at(0) == pytest.approx(0.2)
    assert schedule.at(9) == schedule.at(10) == pytest.approx(2.0)
    assert schedule.at(60) == pytest.approx(2 * half)
    assert schedule.at(500) == pytest.approx(2.0 if shape == "constant" else 0.2)


def test_unknown_shape() -> None:
    with pytest.raises(SettingsError, match="step"):
        Schedule(1.0, 10, shape="step")  # type: ignore[arg-type]


def test_only_matrices_decay_and_frozen_parts_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    (adamw,) = optimizers(nn.ModuleList([model, model]), 0.1, (0.9, 0.99))
    groups = adamw.param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (3, 0.0)]


def test_average_follows_with_the_stated_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = Average(model, decay=0.5)
    nn.init.ones_(model.weight)
    average.update(100)
    assert average.shadow["weight"].item() == 0.5
    average.copy_to_model()
    assert model.weight.item() == 0.5


def test_rounded_weights_are_those_of_the_stored_form_and_can_be_undone() -> None:
    from mirada.layers.linear import dequantise_rows, quantise_rows

    torch.manual_seed(0)
    embed, head = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
    head.weight = embed.weight  # tied
    model = nn.ModuleList([embed, head])
    plain = embed.weight.detach().clone()
    round_rows(model)
    assert torch.equal(head.weight, dequantise_rows(*quantise_rows(plain)))
    head.weight.sum().backward()
    unround_rows(model)
    assert torch.equal(embed.weight, plain)
    assert head.weight is embed.weight
    assert embed.weight.grad is not None and bool((embed.weight.grad == 1).all())  # straight through


def test_orthogonal_keeps_directions_and_evens_lengths() -> None:
    torch.manual_seed(0)
    made = orthogonal(torch.randn(3, 8, 24))
    singular = torch.linalg.svdvals(made)
    assert 0.6 < singular.min() and singular.max() < 1.3


def test_muon_takes_the_inner_matrices_and_cuts_fused_ones() -> None:
    block = nn.ModuleDict({"qkv": nn.Linear(4, 12), "gate_up": nn.Linear(4, 16), "down": nn.Linear(8, 4)})
    model = nn.ModuleDict({"m": nn.ModuleDict({"layers": nn.ModuleList([block]), "head": nn.Linear(4, 9)})})
    adamw, muon = optimizers(model, 0.0, (0.9, 0.99), "muon")
    assert isinstance(muon, Muon)
    assert {g["pieces"]: [tuple(p.shape) for p in g["params"]] for g in muon.param_groups} == {
        3: [(12, 4)],
        2: [(16, 4)],
        1: [(4, 8)],
    }
    assert sum(len(g["params"]) for g in adamw.param_groups) == 5
    before = block["qkv"].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    muon.param_groups[0]["lr"] = 0.1
    muon.step()
    moved = (block["qkv"].weight.detach() - before) / (0.1 * 0.2 * 4**0.5)
    for piece in moved.chunk(3):
        assert torch.linalg.svdvals(piece).max() < 1.3
    assert torch.linalg.svdvals(moved).max() > 1.4  # cut, not one matrix of twelve rows
