"""Parts of mini's recipe that are data: sizes, tokenizer, config files, card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mirada import synth
from mirada.synth.types import MIN_PIXELS


@dataclass(frozen=True, slots=True)
class Size:
    """Widths and depths; ``max_pixels`` bounds a picture (an area)."""

    vocabulary: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    max_pixels: int = 256 * 28 * 28
    lengths: tuple[float, float, float] = (0.45, 0.3, 0.25)
    """Shares of lines of up to 12, 24 and 40 characters."""
    times_batch: int = 1
    times_steps: int = 1
    """Samples per step, and steps, as multiples of the recipe's."""


SIZES = {
    "cpu": Size(1024, 192, 6, 3, 256, 4, 4, 2, 768),
    "gpu": Size(
        4096, 320, 6, 5, 384, 7, 6, 2, 1152, max_pixels=512 * 28 * 28, lengths=(0.35, 0.3, 0.35), times_batch=8, times_steps=4
    ),
    "smoke": Size(512, 32, 1, 1, 64, 1, 2, 1, 64),
}
"""*cpu* has about 7 million parameters, *gpu* about 22 million; *smoke* only shows that the recipe runs."""

MROPE_SECTION = [1, 3, 28]
"""Frequencies (of 32) for time, row, column. The columns need fast ones: with the released 2 : 3 : 3 they would get the
slowest, neighbours along a line of text would differ by 0.003 radians, and reading would hardly be learnt."""

CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<think>", "</think>", "<|point_start|>", "<|point_end|>",
    "<|ocr_text_start|>", "<|ocr_text_end|>", "<|clip_time_start|>", "<|clip_time_end|>",
    "<|frame|>", "<|fast_start|>", "<|fast_end|>",
)  # fmt: skip
SPECIAL_TOKENS = CONTROL + PLAIN

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Where text is cut before merges: Qwen2's pattern, single digits."""

TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' or 'video' in part or 'video_url' in part -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""Keye's turns without a default system message."""


def build_tokenizer(vocabulary: int, num_samples: int = 20000) -> Tokenizer:
    """Byte-level BPE of ``vocabulary`` tokens in all, short merges, digits alone, trained on drawn text.

    ``max_token_length=4`` gives merges of at most 3 characters: the library's bound is exclusive.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=4,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(num_samples), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    return tokenizer


def _corpus(num_samples: int):
    for index in range(num_samples):
        question, answer = synth.text_sample(0, index)
        yield question
        yield answer


def model_config(size: Size, ids: Mapping[str, int]) -> dict:
    """config.json in the layout of Keye-VL-1.5."""
    return {
        "architectures": ["KeyeVL1_5ForConditionalGeneration"],
        "model_type": "KeyeVL1_5",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "max_position_embeddings": 4096,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": MROPE_SECTION},
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": size.vocabulary,
        "vision_config": {
            "hidden_size": size.vision_width,
            "image_size": 224,
            "intermediate_size": 4 * size.vision_width,
            "model_type": "siglip_vision_model",
            "num_attention_heads": size.vision_heads,
            "num_hidden_layers": size.vision_layers,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "tokens_per_second": 2,
        },
    }


def preprocessor_config(size: Size) -> dict:
    """preprocessor_config.json: four cells at least, as drawn in training, ``max_pixels`` at most."""
    return {
        "min_pixels": MIN_PIXELS,
        "max_pixels": size.max_pixels,
        "patch_size": 14,
        "temporal_patch_size": 1,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def write_card(out: Path, size: Size, stage: str) -> None:
    """card.json: what the files are, with their SHA-256."""
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir()) if p.name != "card.json"}
    card = {
        "name": "mini",
        "licence": "Apache-2.0",
        "architecture": "Keye-VL-1.5, small",
        "trained_on": "drawn pictures only (mirada.synth), by the stages of recipes/mini.py; docs/LOG.md says which were run",
        "last_stage": stage,
        "vocabulary": size.vocabulary,
        "untrained": ["video"],
        "sha256": files,
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
