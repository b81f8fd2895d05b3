"""The decoder of a made checkpoint as a gguf file: ``PEER_PYTHON benchmarks/gguf_file.py CHECKPOINT FILE Q8_0``.

For the peers' interpreter (numpy, torch, safetensors, gguf). The same weights as on our side, put into a type of llama.cpp by
gguf's own quantisers. There is no vocabulary of strings: prompts are token ids. Tokens' embeddings are tied to the head, so the
type of ``token_embd`` is that of the head, ``--head``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def name_of(stored: str) -> str | None:
    """llama.cpp's name of a stored tensor; None: it is no part of the decoder."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if stored in top or not stored.startswith("model.layers."):
        return top.get(stored)
    _, _, layer, rest = stored.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def write(checkpoint: Path, file: Path, kind: str, head: str) -> None:
    sizes: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(sizes["rms_norm_eps"])
    writer.add_rope_freq_base(sizes["rope_theta"])
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 (not a mapping)
                if (name := name_of(stored)) is not None:
                    add(writer, name, tensors.get_tensor(stored), head if name == "token_embd.weight" else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: Any, name: str, tensor: torch.Tensor, kind: str) -> None:
    """Vectors stay float32, as llama.cpp's own converter leaves them."""
    wanted = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
    writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), wanted), raw_dtype=wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("kind", choices=("F32", "F16", "BF16", "Q8_0", "Q4_0"))
    parser.add_argument("--head", choices=("F32", "F16", "BF16", "Q8_0", "Q4_0"), help="default: the same")
    options = parser.parse_args()
    made = options.file.with_suffix(".part")
    write(options.checkpoint, made, options.kind, options.head or options.kind)
    made.rename(options.file)


if __name__ == "__main__":
    main()
