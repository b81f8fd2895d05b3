"""Configs of released models, as far as they are public."""

from __future__ import annotations

PREVIEW_8B = {
    "architectures": ["KeyeForConditionalGeneration"], "model_type": "Keye", "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "rope_theta": 1000000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "max_position_embeddings": 40960,
    "vocab_size": 151936, "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656,
    "vision_config": {
        "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304,
        "image_size": 384, "patch_size": 14, "attention_dropout": 0.0, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "tokens_per_second": 2, "model_type": "siglip_vision_model",
    },
}  # fmt: skip
"""config.json of Keye-VL-8B-Preview (public repository of Keye, keye-vl-8b-preview)."""
