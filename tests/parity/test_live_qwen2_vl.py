"""Qwen2-VL beside transformers, live, over random configs; and checkpoints that either side saves, read by the other."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.qwen2_vl import Qwen2VLCase
from tiny import randomise, tiny_config
from torch import Tensor

from mirada.models.load import build, load_model, save_model

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
ATOL = 1e-4
NAMES = (
    "<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
IDS = {name: 190 + i for i, name in enumerate(NAMES)}
IMAGE, VIDEO, PAD = IDS["<|image_pad|>"], IDS["<|video_pad|>"], IDS["<|endoftext|>"]


@pytest.fixture(scope="module")
def theirs() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="pip install 'mirada[parity]'")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        from transformers import Qwen2VLForConditionalGeneration
    return Qwen2VLForConditionalGeneration


def config(seed: int) -> dict[str, Any]:
    """config.json of sizes drawn at random: heads that share keys or do not, uneven sections, tied or not, other patches."""
    random = np.random.default_rng(seed)
    kv, share, half = int(random.integers(1, 3)), int(random.integers(1, 4)), int(random.integers(4, 13))
    first = int(random.integers(1, half - 1))
    second = int(random.integers(1, half - first))
    width, heads = kv * share * 2 * half, int(random.integers(1, 4))
    vision = {
        "depth": int(random.integers(1, 4)), "embed_dim": heads * 4 * int(random.integers(2, 7)), "num_heads": heads,
        "hidden_size": width, "mlp_ratio": int(random.integers(1, 5)), "patch_size": int(random.choice([6, 10, 14])),
    }  # fmt: skip
    made = tiny_config("qwen2_vl", IDS)
    return made | {
        "hidden_size": width, "num_attention_heads": kv * share, "num_key_value_heads": kv,
        "num_hidden_layers": int(random.integers(2, 4)), "intermediate_size": int(random.integers(20, 90)),
        "rope_theta": float(random.choice([1e4, 1e6])), "rms_norm_eps": float(random.choice([1e-6, 1e-5])),
        "rope_scaling": {"type": "mrope", "mrope_section": [first, second, half - first - second]},
        "tie_word_embeddings": seed % 2 == 0, "vision_config": made["vision_config"] | vision,
    }  # fmt: skip


@torch.no_grad()
def drawn(seed: int) -> Any:
    """A model of such a config, with logits that spread by about one."""
    model = build(config(seed))
    randomise(model, seed)
    model.decoder.embed.weight.mul_(0.2)
    if not model.config.text.tie_word_embeddings:
        model.lm_head.weight.mul_(0.5)
    return model.eval()


def case_of(model: Any, seed: int) -> Qwen2VLCase:
    """Two rows, the shorter padded on the left: pictures and a video longer than it is wide, then a picture."""
    random = np.random.default_rng(seed)
    images, videos = [(1, 4, 6), (1, 2, 2), (1, 6, 2)], [(5, 2, 4)]

    def words() -> list[int]:
        return random.integers(0, 180, random.integers(2, 6)).tolist()

    rows = [
        [*words(), *[IMAGE] * 6, *words(), *[VIDEO] * 10, *words(), *[IMAGE] * 1, *words()],
        [*words(), *[IMAGE] * 3, *words()],
    ]
    longest = max(map(len, rows))
    v = model.config.vision
    depth = v.num_channels * v.temporal_patch_size * v.patch_size**2

    def pixels(grids: list[tuple[int, int, int]]) -> Tensor:
        shape = sum(t * h * w for t, h, w in grids), depth
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

    tensors = {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": pixels(images),
        "pixel_values_videos": pixels(videos),
        "image_grid_thw": torch.tensor(images),
        "video_grid_thw": torch.tensor(videos),
    }
    return Qwen2VLCase(model, tensors)


def inputs_of(case: Qwen2VLCase) -> dict[str, Tensor]:
    """What transformers 5 takes besides."""
    ids = case.theirs["input_ids"]
    return case.theirs | {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def padded(case: Qwen2VLCase, places: list) -> Tensor:
    full = np.zeros((3, *case.mask.shape), np.int64)
    for row, (place, _) in enumerate(places):
        full[:, row, case.mask[row].numpy()] = place
    return torch.from_numpy(full)


@torch.no_grad()
@pytest.mark.parametrize("seed", [1, 2, 5])
def test_what_we_save_they_load_and_compute_alike(theirs: Any, tmp_path: Path, seed: int) -> None:
    model = drawn(seed)
    save_model(model, tmp_path)
    other, info = theirs.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    case = case_of(model, seed)
    inputs, spread = inputs_of(case), float(case.logits.std())
    assert spread > 0.3  # logits that are all alike would prove nothing

    released = other.eval()(**inputs, position_ids=padded(case, case.places)).logits[case.mask]
    worst = float((released - case.logits).abs().max())
    print(f"seed {seed}: logits within {worst:.1e}, spread {spread:.2f}")
    assert worst < ATOL

    # By their own rule of positions: ours under its name.
    places, deltas = other.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], inputs["video_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )  # fmt: skip
    ours = padded(case, case.places_of_transformers_5)
    assert torch.equal(ours[:, case.mask], places[:, case.mask]) and not torch.equal(ours, padded(case, case.places))
    following = torch.tensor([after for _, after in case.places_of_transformers_5])
    assert torch.equal(following - case.mask.sum(1), deltas.flatten())
    case.__dict__["places"] = case.places_of_transformers_5
    made = other.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    assert made[:, case.mask.shape[1] :].tolist() == case.greedy_cached(6)


@torch.no_grad()
def test_what_they_save_we_load_and_compute_alike(theirs: Any, tmp_path: Path) -> None:
    """config.json with text_config and rope_parameters, as transformers 5 writes it, and both namings of tensors."""
    model = drawn(4)
    save_model(model, tmp_path / "ours")
    other = theirs.from_pretrained(tmp_path / "ours")
    other.save_pretrained(tmp_path / "theirs")
    assert "text_config" in (tmp_path / "theirs" / "config.json").read_text()
    case, again = case_of(model, 0), case_of(load_model(tmp_path / "theirs"), 0)
    assert torch.equal(case.logits, again.logits)
    assert again.model.config == model.config
