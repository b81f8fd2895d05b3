"""Schedules, averaging, and weights rounded as they will be stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mirada.errors import SettingsError
from mirada.train.optim import Average, Schedule, adamw, round_rows, unround_rows


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
    groups = adamw([model, model], 0.1, (0.9, 0.99)).param_groups
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
    assert torch.equal(head.weight, dequantise_rows(*quantise_rows(plain), torch.float32))
    head.weight.sum().backward()
    unround_rows(model)
    assert torch.equal(embed.weight, plain)
    assert head.weight is embed.weight
    assert embed.weight.grad is not None and bool((embed.weight.grad == 1).all())  # straight through
