"""Parts of tiny checkpoints whose decoder is DeepSeek-V3's: Kimi-VL and Keye-VL-671B, in the released layouts."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KIMI_CONTROL = (
    "[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|start_header_id|>", "<|end_header_id|>", "[EOT]",
    "<|im_system|>", "<|im_middle|>", "<|media_start|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>",
    "[UNK]", "[PAD]",
)  # fmt: skip
KIMI_FILE = {
    "in_token_limit": 64, "patch_size": 14, "num_pooled_tokens": 1024, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "pad_input": True, "merge_kernel_size": [2, 2],
}  # fmt: skip
WORDS = ("th", "in", "an", "er", "the", " a", " t", " the", "on", "re", "\n\n", "第", "你好")


def write_tiktoken(directory: Path, control: Sequence[str] = KIMI_CONTROL) -> dict[str, int]:
    """``tiktoken.model`` of 256 bytes and a few words (with what they are merged from), and the ids of ``control``."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in WORDS:
        data = word.encode()
        tokens += [data[:end] for end in range(2, len(data) + 1) if data[:end] not in tokens]
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(tokens)]
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    ids = {text: len(tokens) + i for i, text in enumerate(control)}
    named = {str(i): {"content": text, "special": True} for text, i in ids.items()}
    settings = {
        "tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]",
        "unk_token": "[UNK]", "added_tokens_decoder": named,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return ids


def deepseek_text(vocab_size: int, **changes: Any) -> dict[str, Any]:
    """A DeepSeek-V3 decoder of two layers, the first dense."""
    return {
        "vocab_size": vocab_size, "max_position_embeddings": 4096, "hidden_size": 64, "intermediate_size": 96,
        "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "n_shared_experts": 2, "n_routed_experts": 4, "ep_size": 1, "routed_scaling_factor": 2.446, "kv_lora_rank": 24,
        "q_lora_rank": None, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 16, "topk_method": "noaux_tc",
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_layer_freq": 1, "first_k_dense_replace": 1,
        "norm_topk_prob": True, "scoring_func": "sigmoid", "aux_loss_alpha": 0.001, "seq_aux": True, "hidden_act": "silu",
        "initializer_range": 0.02, "rms_norm_eps": 1e-5, "pretraining_tp": 1, "use_cache": True, "rope_theta": 800000.0,
        "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    } | changes  # fmt: skip


def kimi_config(model_type: str, ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a Kimi-VL."""
    vocab_size = max(ids.values()) + 1
    text = deepseek_text(vocab_size)
    text |= {"bos_token_id": ids["[BOS]"], "eos_token_id": ids["[EOS]"], "pad_token_id": ids["[PAD]"], "torch_dtype": "float32"}
    vision = {
        "model_type": "moonvit", "patch_size": 14, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32,
        "intermediate_size": 72, "init_pos_emb_height": 6, "init_pos_emb_width": 5, "merge_kernel_size": [2, 2],
    }  # fmt: skip
    return {
        "architectures": ["KimiVLForConditionalGeneration"], "model_type": model_type, "vision_config": vision,
        "text_config": text, "ignore_index": -100, "media_placeholder_token_id": ids["<|media_pad|>"],
        "torch_dtype": "float32", "tie_word_embeddings": False, "vocab_size": vocab_size,
    }  # fmt: skip


YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0,
}  # fmt: skip


def keye_moe_config(model_type: str, ids: dict[str, int], vision: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Keye-VL-671B: low-rank queries, four groups of experts, YaRN. ``vision`` as in the 8B models."""
    text = deepseek_text(
        max(ids.values()) + 1, q_lora_rank=40, n_routed_experts=8, n_group=4, topk_group=2, n_shared_experts=1,
        rope_theta=10000, rope_scaling=YARN, routed_scaling_factor=2.5, rms_norm_eps=1e-6, num_nextn_predict_layers=1,
    )  # fmt: skip
    return text | {
        "architectures": ["KeyeVLMoeForConditionalGeneration"], "model_type": model_type, "torch_dtype": "float32",
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "fast_video_token_id": ids["<|video_pad|>"], "vision_config": vision,
    }  # fmt: skip
