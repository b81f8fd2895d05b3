"""A small byte-level BPE tokenizer with every control token of Keye-VL."""

from __future__ import annotations

import functools
import json
from typing import Any

from mirada.prompt.spelling import BYTE_TO_CHAR
from mirada.prompt.tokenizer import Tokenizer
from mirada.prompt.tokenizer_files import QWEN2_PATTERN

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>", "<|frame|>", "<|fast_start|>", "<|fast_end|>",
)  # fmt: skip
ORDINARY = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<|point_start|>", "<|point_end|>",
    "<|ocr_text_start|>", "<|ocr_text_end|>", "<|clip_time_start|>", "<|clip_time_end|>",
)  # fmt: skip
CONTROL = SPECIAL + ORDINARY
WORDS = (
    "\n\n",
    "\n\n\n",
    " the",
    "the",
    "user",
    "assistant",
    "system",
    "<|",
    "|>",
    "</",
    "im",
    "_end",
    "you",
    " are",
    "é",
    "漢",
    "👍",
    "\t\t",
)


@functools.cache
def _json() -> str:
    vocab = {BYTE_TO_CHAR[byte]: byte for byte in range(256)}
    merges: list[list[str]] = []
    for word in WORDS:
        symbols = [BYTE_TO_CHAR[byte] for byte in word.encode()]
        left = symbols[0]
        for right in symbols[1:]:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append([left, right])
            left += right
    added = [
        {
            "id": len(vocab) + index, "content": text, "special": text in SPECIAL,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        }
        for index, text in enumerate(CONTROL)
    ]  # fmt: skip
    pattern = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pattern, level]},
        "post_processor": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return json.dumps(spec)


def spec() -> dict[str, Any]:
    """A fresh copy of what its ``tokenizer.json`` holds."""
    return json.loads(_json())


def oracle():
    """The same vocabulary in the ``tokenizers`` library, control tokens and all."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(_json())


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(spec(), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
