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

KIMI_A3B = {
    "architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl", "ignore_index": -100,
    "auto_map": {
        "AutoConfig": "configuration_kimi_vl.KimiVLConfig", "AutoModel": "modeling_kimi_vl.KimiVLForConditionalGeneration",
    },
    "media_placeholder_token_id": 163605, "vocab_size": 163840, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.3",
    "vision_config": {
        "model_type": "moonvit", "patch_size": 14, "num_hidden_layers": 27, "num_attention_heads": 16, "hidden_size": 1152,
        "intermediate_size": 4304, "init_pos_emb_height": 64, "init_pos_emb_width": 64, "merge_kernel_size": [2, 2],
        "torch_dtype": "bfloat16",
    },
    "text_config": {
        "vocab_size": 163840, "max_position_embeddings": 131072, "hidden_size": 2048, "intermediate_size": 11264,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_shared_experts": 2, "n_routed_experts": 64, "ep_size": 1, "routed_scaling_factor": 2.446, "kv_lora_rank": 512,
        "q_lora_rank": None, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc",
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6, "moe_layer_freq": 1, "first_k_dense_replace": 1,
        "norm_topk_prob": True, "scoring_func": "sigmoid", "aux_loss_alpha": 0.001, "seq_aux": True, "hidden_act": "silu",
        "initializer_range": 0.02, "rms_norm_eps": 1e-05, "pretraining_tp": 1, "use_cache": True, "rope_theta": 800000.0,
        "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 163584,
        "pad_token_id": 163839, "eos_token_id": 163585, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    },
}  # fmt: skip
"""config.json of Kimi-VL-A3B-Instruct (revision 398eede0903c)."""

KEYE_671B = {
    "architectures": ["KeyeVLMoeForConditionalGeneration"], "model_type": "KeyeVLMoe", "hidden_size": 7168,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "first_k_dense_replace": 3, "moe_layer_freq": 1, "vocab_size": 129280, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "num_nextn_predict_layers": 1, "bos_token_id": 0,
    "eos_token_id": 1, "image_token_id": 128800, "video_token_id": 128801, "vision_start_token_id": 128802,
    "vision_end_token_id": 128803, "fast_video_token_id": 128804,
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    },
    "vision_config": PREVIEW_8B["vision_config"],
}  # fmt: skip
"""What Keye-VL-671B-A37B's config.json should hold: DeepSeek-V3's public config and Keye's tower. The file itself and its token
ids were not seen."""
