"""Tiny random checkpoints in the released form, and packed batches without a renderer or an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_deepseek import KIMI_CONTROL, KIMI_FILE, keye_moe_config, kimi_config, write_tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mirada.layers.batch import Batch, MediaBatch
from mirada.models.family import FAMILIES
from mirada.models.load import build, save_model
from mirada.models.positions import positions
from mirada.prompt.builtin import KEYE_TEMPLATE, KIMI_TEMPLATE, QWEN2_VL_TEMPLATE
from mirada.types import Grid, Prompt, Span

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
MARKUP = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<|point_start|>", "<|point_end|>",
    "<|ocr_text_start|>", "<|ocr_text_end|>", "<|clip_time_start|>", "<|clip_time_end|>",
)  # fmt: skip
FRAMES = ("<|frame|>", "<|fast_start|>", "<|fast_end|>")
MERGES = ("t h", "i n", "a n", "e r", "th e", "Ġ a", "Ġ the", "o n", "r e", "\u010a \u010a")
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Tiny:
    """What a tiny checkpoint of one model type is made of."""

    config: Callable[[str, dict[str, int]], dict[str, Any]]
    control: tuple[str, ...]
    preprocessor: dict[str, Any]
    template: str
    ends: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")
    write: Callable[[Path, Sequence[str]], dict[str, int]] | None = None
    """Writes another vocabulary than ``write_tokenizer`` does."""


def make_tiny(directory: str | Path, model_type: str, seed: int = 0, **changes: Any) -> Path:
    """A whole checkpoint: config, weights, tokenizer, template, preprocessor. ``changes`` replace keys of config.json."""
    directory, tiny = Path(directory), TINY[model_type]
    directory.mkdir(parents=True, exist_ok=True)
    ids = (tiny.write or write_tokenizer)(directory, tiny.control)
    model = build(tiny_config(model_type, ids) | changes)
    randomise(model, seed)
    save_model(model, directory)
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
                  "eos_token_id": [ids[end] for end in tiny.ends], "pad_token_id": ids[tiny.ends[-1]]}  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(tiny.preprocessor, indent=2))
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": tiny.template}, indent=2))
    return directory


def make_tiny_keye(directory: str | Path, model_type: str = "KeyeVL1_5", seed: int = 0, **changes: Any) -> Path:
    """``make_tiny`` of a Keye-VL."""
    return make_tiny(directory, model_type, seed, **changes)


def tiny_config(model_type: str, ids: dict[str, int]) -> dict[str, Any]:
    """config.json in the released layout, two layers each."""
    return TINY[model_type].config(model_type, ids)


def _text(ids: dict[str, int]) -> dict[str, Any]:
    """What Qwen2 and Qwen3 decoders say alike."""
    return {
        "attention_dropout": 0.0, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"], "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
        "intermediate_size": 160, "max_position_embeddings": 4096, "max_window_layers": 2, "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "float32", "use_cache": True, "use_sliding_window": False, "vocab_size": max(ids.values()) + 1,
    }  # fmt: skip


def _qwen2_vl(model_type: str, ids: dict[str, int]) -> dict[str, Any]:
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "in_chans": 3, "mlp_ratio": 2, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    }  # fmt: skip
    architecture = "Qwen2VLForConditionalGeneration"
    return _text(ids) | {"architectures": [architecture], "model_type": model_type, "vision_config": vision}


_KEYE_VISION = {
    "hidden_size": 32, "image_size": 86, "intermediate_size": 72, "model_type": "siglip_vision_model",
    "num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 14, "spatial_merge_size": 2,
    "tokens_per_second": 2, "temporal_patch_size": 2,
}  # fmt: skip


def _keye(model_type: str, ids: dict[str, int]) -> dict[str, Any]:
    architecture = {"Keye": "KeyeForConditionalGeneration", "KeyeVL1_5": "KeyeVL1_5ForConditionalGeneration"}[model_type]
    return _text(ids) | {
        "architectures": [architecture], "model_type": model_type, "attention_bias": False, "head_dim": 16,
        "pad_token_id": ids["<|endoftext|>"], "vision_config": dict(_KEYE_VISION),
    }  # fmt: skip


_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_BOUNDS = {"min_pixels": 3136, "max_pixels": 100352, "patch_size": 14, "merge_size": 2}
_KEYE_FILE = _BOUNDS | _HALF | {"temporal_patch_size": 1, "processor_class": "KeyeProcessor"}
_QWEN2_VL_FILE = _BOUNDS | _CLIP | {"temporal_patch_size": 2, "processor_class": "Qwen2VLProcessor"}
TINY = {
    "Keye": Tiny(_keye, SPECIAL + MARKUP, _KEYE_FILE, KEYE_TEMPLATE),
    "KeyeVL1_5": Tiny(_keye, SPECIAL + MARKUP + FRAMES, _KEYE_FILE, KEYE_TEMPLATE),
    "KeyeVLMoe": Tiny(
        lambda kind, ids: keye_moe_config(kind, ids, dict(_KEYE_VISION)), SPECIAL + MARKUP + FRAMES, _KEYE_FILE, KEYE_TEMPLATE
    ),
    "kimi_vl": Tiny(kimi_config, KIMI_CONTROL, KIMI_FILE, KIMI_TEMPLATE, ("<|im_end|>", "[EOS]"), write_tiktoken),
    "qwen2_vl": Tiny(_qwen2_vl, SPECIAL + MARKUP[:6], _QWEN2_VL_FILE, QWEN2_VL_TEMPLATE),
}
"""Model type -> its parts; tests of properties run over all of them."""


def write_tokenizer(directory: Path, control: Sequence[str]) -> dict[str, int]:
    """A byte-level BPE of 256 bytes and a few merges, with ``control`` as added tokens; returns the ids of those."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    vocab = {piece: i for i, piece in enumerate([*letters, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))  # pyright: ignore[reportArgumentType]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    spec = json.loads(tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    ids = {text: len(vocab) + i for i, text in enumerate(control)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = set(SPECIAL + FRAMES)
    spec["added_tokens"] = [{"id": i, "content": text, "special": text in special, **flags} for text, i in ids.items()]
    (directory / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1), encoding="utf-8")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
        "add_prefix_space": False, "model_max_length": 4096,
        "added_tokens_decoder": {str(i): {"content": text, "special": text in special, **flags} for text, i in ids.items()},
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return ids


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights under which every part of the model matters to its output."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.ndim == 1:
            parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
        else:
            parameter.copy_(noise if "embed" in name or "positions" in name else noise / parameter.shape[1] ** 0.5)


def pack(prompts: Sequence[Prompt]) -> Batch:
    """Prompts end to end, without a cache; features must come in the order of the spans."""
    tokens = np.concatenate([np.asarray(prompt.tokens, np.int64) for prompt in prompts])
    places = np.concatenate([positions(len(prompt.tokens), prompt.spans)[0] for prompt in prompts], 1)
    starts = np.cumsum((0, *(len(prompt.tokens) for prompt in prompts)))
    rows = [np.arange(s.start, s.end) + start for start, p in zip(starts, prompts, strict=False) for s in p.spans]
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(places),
        lengths=tuple(len(prompt.tokens) for prompt in prompts),
        feature_rows=torch.from_numpy(np.concatenate(rows)) if rows else None,
    )


def media_batch(grids: Sequence[Grid], random: torch.Generator, frames: int = 1) -> MediaBatch:
    """Noise for every patch of ``grids``, each through ``frames`` frames."""
    count = sum(t * h * w for t, h, w in grids)
    depth = (frames,) if frames > 1 else ()
    return MediaBatch(torch.randn(count, 3, *depth, 14, 14, generator=random), tuple(grids), ("image",) * len(grids))


def frames_spelt(config: Any) -> bool:
    """Whether prompts of a model give every frame of a video a span of its own."""
    return FAMILIES[config.model_type].prompt_format(config).video_layout == "frames"


def flat(config: Any) -> bool:
    """Whether tokens of pictures count on like text."""
    return FAMILIES[config.model_type].prompt_format(config).flat_positions


def random_prompt(
    random: np.random.Generator, pads: tuple[int, int | None], frames_apart: bool, flat: bool = False
) -> tuple[Prompt, tuple[Grid, ...]]:
    """A prompt of text, pictures and videos in any order, and its grids. ``pads``: ids of the image and the video token
    (None: no videos)."""
    tokens: list[int] = []
    spans: list[Span] = []
    grids: list[Grid] = []
    for media in range(random.integers(0, 4)):
        tokens += random.integers(0, 250, random.integers(1, 8)).tolist()
        kind = "video" if pads[1] is not None and random.random() < 0.4 else "image"
        t = int(random.integers(2, 5)) if kind == "video" else 1
        grid = (t, 2 * int(random.integers(1, 5)), 2 * int(random.integers(1, 5)))
        grids.append(grid)
        cut = [(1, *grid[1:])] * t if frames_apart and kind == "video" else [grid]
        for frame, piece in enumerate(cut):
            step = 0.0 if frames_apart else float(random.choice([0.4, 1.0, 1.3, 2.0]))
            spans.append(Span(kind, len(tokens), piece, media, frame, step, flat=flat))
            pad = pads[kind == "video"]
            assert pad is not None
            tokens += [pad] * spans[-1].num_tokens
            if frames_apart:
                tokens += random.integers(0, 250, 2).tolist()
    tokens += random.integers(0, 250, random.integers(1, 12)).tolist()
    return Prompt(tuple(tokens), tuple(spans)), tuple(grids)
