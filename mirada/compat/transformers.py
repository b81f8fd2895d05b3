"""The snippets of the model cards of Qwen2-VL, Keye-VL and Kimi-VL with one line changed.

    from mirada.compat.transformers import AutoModelForCausalLM, AutoProcessor   # instead of: from transformers import ...

Names and shapes follow transformers (github.com/huggingface/transformers, ``models/qwen2_vl``, ``generation``) and the code
that Keye-VL-8B-Preview is released with. No code of a checkpoint is run: every name opens every supported family, which is
told by ``model_type`` in config.json. Unknown keyword arguments are errors; docs/compat.md lists the known ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirada.compat.model import Model
from mirada.compat.processor import BatchFeature, Processor, TextTokenizer

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    "AutoProcessor",
    "AutoTokenizer",
    "BatchFeature",
    "KeyeForConditionalGeneration",
    "KeyeProcessor",
    "KeyeVL1_5ForConditionalGeneration",
    "KimiVLForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2VLProcessor",
]

AutoModel = AutoModelForCausalLM = AutoModelForImageTextToText = AutoModelForVision2Seq = Model
Qwen2VLForConditionalGeneration = Model
KeyeForConditionalGeneration = KeyeVL1_5ForConditionalGeneration = Model
KimiVLForConditionalGeneration = Model
AutoProcessor = Qwen2VLProcessor = KeyeProcessor = Processor


class AutoTokenizer:
    """``AutoTokenizer.from_pretrained(...)``: the tokenizer of the processor."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **kwargs: Any) -> TextTokenizer:
        """As ``AutoProcessor.from_pretrained``."""
        return Processor.from_pretrained(pretrained_model_name_or_path, **kwargs).tokenizer
