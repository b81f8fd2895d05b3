"""The loop: resuming is bit-exact, a stop loses nothing, a run folder is not mixed up, losses fall."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from mirada.errors import CheckpointError
from mirada.media.grid import GridRule, Patches
from mirada.models.keye_vl import KeyeConfig, KeyeVL
from mirada.train import checkpoint
from mirada.train.batch import IGNORE, Example, TrainBatch, collate
from mirada.train.loop import TrainSettings, train
from mirada.train.objectives.dense import Dense, DenseHeads
from mirada.train.objectives.next_token import NextToken
from mirada.types import Prompt, Span

IMAGE, VOCABULARY = 60, 64
CONFIG = {
    "model_type": "KeyeVL1_5", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "head_dim": 16, "vocab_size": VOCABULARY, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63, "eos_token_id": 1,
    "vision_config": {
        "hidden_size": 32, "image_size": 56, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
        "patch_size": 14,
    },
}  # fmt: skip
SETTINGS = TrainSettings(steps=6, lr=3e-3, warmup=2, average=0.9, log_every=1, save_every=3, tensorboard=False, quiet=True)


def make_model() -> KeyeVL:
    model = KeyeVL(KeyeConfig.from_hf(CONFIG))
    model.init_weights(seed=3)
    return model


def make_example(index: int) -> Example:
    """Two questions in one: the second half of the answer depends on the picture's brightness."""
    random = np.random.default_rng(index)
    h, w = 2, 2 * int(random.integers(1, 4))
    shade = int(random.integers(0, 2))
    pixels = np.full((h * w, 3, 14, 14), 40 + 170 * shade, np.uint8)
    num = h * w // 4
    tokens = (5, *[IMAGE] * num, 6, 7 + shade, 1)
    span = Span("image", 1, (1, h, w), 0)
    learn = (False,) * (len(tokens) - 2) + (True, True)
    media = Patches("image", pixels, ((1, h, w),), (h * 14, w * 14), bytes(32))
    return Example(Prompt(tokens, (span,), learn), (media,), {"shade": np.full((h * w, 1), shade)})


def batches(step: int) -> Iterator[TrainBatch]:
    while True:
        yield collate([make_example(4 * step + i) for i in range(4)], GridRule())
        step += 1


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(folder: Path, settings: TrainSettings = SETTINGS, draws=batches) -> tuple[KeyeVL, DenseHeads, bool]:
    torch.manual_seed(11)
    model, heads = make_model(), DenseHeads(32, {"shade": (1, 2)})
    state = train(model, NextToken(heads, 0.3), draws, settings, folder, extra=[heads])
    return model, heads, state.stopped


def test_labels_are_the_next_token_where_it_is_learnt() -> None:
    batch = collate([make_example(0), make_example(1)], GridRule())
    start = 0
    for example, length in zip((make_example(0), make_example(1)), batch.batch.lengths, strict=True):
        labels = batch.labels[start : start + length].tolist()
        assert labels[-3:] == [example.prompt.tokens[-2], example.prompt.tokens[-1], IGNORE]
        assert set(labels[:-3]) == {IGNORE}
        start += length
    rows = batch.batch.feature_rows
    assert rows is not None and set(batch.batch.tokens[rows].tolist()) == {IMAGE}
    assert len(rows) == (batch.batch.tokens == IMAGE).sum()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_bit_exact(tmp_path: Path, optimizer: Literal["adamw", "muon"]) -> None:
    settings = replace(SETTINGS, optimizer=optimizer)
    whole, whole_heads, _ = run(tmp_path / "whole", settings)

    def ends_after_three(step: int) -> Iterator[TrainBatch]:
        for k, batch in zip(range(step, 4), batches(step), strict=False):
            if k == 3:
                raise KeyboardInterrupt  # a machine that dies between two steps
            yield batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", settings, draws=ends_after_three)
    resumed, resumed_heads, _ = run(tmp_path / "broken", settings)
    for one, two in ((whole, resumed), (whole_heads, resumed_heads)):
        for name, value in weights(one).items():
            assert torch.equal(value, two.state_dict()[name]), name


def test_a_stop_signal_saves_and_says_so(tmp_path: Path) -> None:
    def stops(step: int) -> Iterator[TrainBatch]:
        for k, batch in enumerate(batches(step), step):
            if k == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    *_, stopped = run(tmp_path, draws=stops)
    assert stopped
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-0000002"]
    *_, stopped = run(tmp_path)
    assert not stopped


def test_other_settings_do_not_resume(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError, match=r"lr 0\.003 -> 0\.5"):
        run(tmp_path, replace(SETTINGS, lr=0.5))


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    newest = sorted(tmp_path.glob("step-*"))[-1]
    (newest / "state.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match=newest.name):
        run(tmp_path)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    def poisoned(step: int) -> Iterator[TrainBatch]:
        for batch in batches(step):
            assert batch.media is not None
            batch.media.pixels[0] = float("nan")
            yield batch

    with pytest.raises(FloatingPointError, match="step 0"):
        run(tmp_path, draws=poisoned)


def test_learns_what_the_picture_shows(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=60, warmup=5, average=None, save_every=100)
    model, _, _ = run(tmp_path, settings)
    batch = collate([make_example(1000 + i) for i in range(32)], GridRule())
    with torch.no_grad():
        hidden = model(batch.batch, model.encode(batch.media))
        rows = (batch.labels != IGNORE).nonzero()[:, 0]
        right = (model.logits(hidden[rows]).argmax(-1) == batch.labels[rows]).float().mean()
    assert right == 1.0


def test_the_dense_objective_trains_the_tower_alone(tmp_path: Path) -> None:
    model, heads = make_model(), DenseHeads(32, {"shade": (1, 2)})
    model.requires_grad_(False)
    model.visual.requires_grad_(True)
    before = weights(model)
    train(model, Dense(heads), batches, replace(SETTINGS, average=None), tmp_path, extra=[heads])
    changed = {name.split(".")[0] for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"visual"}


def test_bfloat16_products_leave_float32_weights_near_those_of_float32(tmp_path: Path) -> None:
    exact, _, _ = run(tmp_path / "exact", replace(SETTINGS, steps=2))
    rough, _, _ = run(tmp_path / "rough", replace(SETTINGS, steps=2, precision="bfloat16"))
    for name, value in weights(exact).items():
        other = rough.state_dict()[name]
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, value, atol=2e-2, rtol=0)
    assert any(not torch.equal(value, rough.state_dict()[name]) for name, value in weights(exact).items())


def test_batches_that_come_to_an_end_lose_nothing(tmp_path):
    """Two steps past the last checkpoint the data is out: another run goes on behind them."""
    train(make_model(), NextToken(), lambda step: islice(batches(step), 5 - step), SETTINGS, tmp_path)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-0000005"
    assert train(make_model(), NextToken(), batches, SETTINGS, tmp_path).step == 6
