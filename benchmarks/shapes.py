"""Checkpoints with random weights in the sizes that are measured: ``python benchmarks/shapes.py 2b DIRECTORY``.

All are Qwen2-VL in its released layout, bfloat16, written once and then used by every side: Mirada, transformers, and (as a
gguf file made of them) llama.cpp. Logits spread as a trained model's do (standard deviation 2), so that a distance between
two distributions means something.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VERSION = 1
"""Of what is written; another one is made anew."""
FIRST_PLAIN = 300
"""Ids from here on are no control token."""
TEXT: dict[str, dict[str, int]] = {
    "2b": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
           "intermediate_size": 8960, "vocab_size": 151936},
    "512": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2,
            "intermediate_size": 1408, "vocab_size": 16384},
    "mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 768, "vocab_size": 1024},
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "intermediate_size": 256, "vocab_size": 512},
}  # fmt: skip
"""Name -> sizes of the decoder: Qwen2-VL-2B's, a middle one, those of the model inside the package, and one for tests."""
VISION: dict[str, dict[str, int]] = {
    "none": {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2},
    "full": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
    "mini": {"depth": 6, "embed_dim": 192, "num_heads": 3, "mlp_ratio": 4},
    "tiny": {"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2},
}
"""Name -> sizes of the tower: one that is only there because the layout wants one, Qwen2-VL's, mini's, and one for tests."""
MAX_PIXELS = 1 << 22
TIES = 1 << 22


def config(shape: str, vision: str, text_layers: int | None, vision_layers: int | None, ids: dict[str, int]) -> dict[str, Any]:
    """config.json of the released layout. Rotary sections are Qwen2-VL's, in proportion to the width of a head."""
    text, tower = dict(TEXT[shape]), dict(VISION[vision])
    text["num_hidden_layers"] = text_layers or text["num_hidden_layers"]
    tower["depth"] = vision_layers or tower["depth"]
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    side = half * 3 // 8
    return text | {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "hidden_act": "silu",
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"], "initializer_range": 0.02, "max_position_embeddings": 32768,
        "max_window_layers": text["num_hidden_layers"], "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * side, side, side]}, "sliding_window": None,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
        "vision_config": tower | {"hidden_size": text["hidden_size"], "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2,
                                  "spatial_patch_size": 14, "temporal_patch_size": 2},
    }  # fmt: skip


def make(
    directory: Path, shape: str, vision: str = "none", text_layers: int | None = None, vision_layers: int | None = None
) -> Path:
    """A whole checkpoint in ``directory``; nothing is done if the same one is there."""
    stamp = {"version": VERSION, "shape": shape, "vision": vision, "text": text_layers, "tower": vision_layers}
    mark = directory / "made.json"
    if mark.exists() and json.loads(mark.read_text()) == stamp:
        return directory
    import torch

    sys.path.insert(0, str(HERE.parent / "tests"))
    import tiny  # pyright: ignore[reportMissingImports]

    from mirada.models.load import build, save_model

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    ids = tiny.write_tokenizer(directory, tiny.TINY["qwen2_vl"].control)
    model = build(config(shape, vision, text_layers, vision_layers, ids), torch.bfloat16)
    fill(model)
    save_model(model, directory)
    preprocessor = tiny.TINY["qwen2_vl"].preprocessor | {"max_pixels": MAX_PIXELS}
    generation = {"eos_token_id": [ids["<|im_end|>"]], "pad_token_id": ids["<|endoftext|>"]}
    template = {"chat_template": tiny.TINY["qwen2_vl"].template}
    for name, made in (("preprocessor", preprocessor), ("generation", generation)):
        (directory / f"{name}_config.json").write_text(json.dumps(made, indent=2))
    (directory / "chat_template.json").write_text(json.dumps(template, indent=2))
    mark.write_text(json.dumps(stamp))
    return directory


def fill(model: Any) -> None:
    """Noise under which no part is lost in another: matrices keep the spread of what they multiply."""
    import torch

    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1, generator=random)
                continue
            spread = (2.0 if "embed" in name or "lm_head" in name else 1.0) * parameter[0].numel() ** -0.5
            for rows in parameter.split(max(1, TIES // parameter[0].numel())):
                rows.copy_(torch.randn(rows.shape, generator=random).mul_(spread))


def weights(shape: str, text_layers: int | None = None) -> int:
    """Weights that one decoded token reads: the layers' matrices and the head."""
    s = TEXT[shape]
    width = s["hidden_size"]
    attention = width * width * 2 + 2 * width * width * s["num_key_value_heads"] // s["num_attention_heads"]
    layers = text_layers or s["num_hidden_layers"]
    return layers * (attention + 3 * width * s["intermediate_size"]) + width * s["vocab_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=TEXT)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--vision", choices=VISION, default="none")
    parser.add_argument("--text-layers", type=int)
    parser.add_argument("--vision-layers", type=int)
    options = parser.parse_args()
    make(options.directory, options.shape, options.vision, options.text_layers, options.vision_layers)


if __name__ == "__main__":
    main()
