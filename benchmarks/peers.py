"""The peers' side of a comparison: transformers and llama.cpp, in an interpreter that has them and need not have Mirada.

``peers.py text CHECKPOINT DTYPE`` (transformers, decoder alone), ``peers.py vision CHECKPOINT DTYPE`` (transformers, the whole
Qwen2-VL), ``peers.py llama FILE.gguf``. Each takes the quickest of its settings for attention, found when it loads.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from worker import Stage, serve

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
PROBE = (256, 8)
"""Prompt and new tokens by which settings are compared."""


def quickest(settings: tuple[Any, ...], run: Callable[[Any], float], tries: int = 3) -> Any:
    """The setting with the least seconds, each tried ``tries`` times in turn."""
    least = {setting: float("inf") for setting in settings}
    for _ in range(tries):
        for setting in settings:
            least[setting] = min(least[setting], run(setting))
    return min(least, key=lambda setting: least[setting])


class Decoder:
    """transformers' Qwen2 with the decoder's weights of a Qwen2-VL: on text alone they are the same model, and this class has
    the shorter way (no positions on three axes). A plain loop over ``forward`` with its dynamic cache: quicker than
    ``generate``, which does more between tokens.
    """

    def __init__(self, checkpoint: str, dtype: str) -> None:
        import torch
        import transformers
        from safetensors.torch import load_file

        torch.set_num_threads(THREADS)
        torch.set_grad_enabled(False)
        self.torch, self.cache = torch, transformers.DynamicCache
        given = json.loads((Path(checkpoint) / "config.json").read_text())
        plain = ("rope_scaling", "vision_config", "architectures", "model_type", "torch_dtype")
        config = transformers.Qwen2Config(**{key: value for key, value in given.items() if key not in plain})
        config.rope_parameters = {"rope_type": "default", "rope_theta": given["rope_theta"]}
        with torch.device("meta"):
            model = transformers.Qwen2ForCausalLM(config)
        weights: dict[str, Any] = {}
        for shard in sorted(Path(checkpoint).glob("*.safetensors")):
            weights |= {k: v.to(getattr(torch, dtype)) for k, v in load_file(shard).items() if k.startswith("model.")}
        # A mapped file's pages would be touched for the first time while we measure.
        model.load_state_dict({k: v.clone() for k, v in weights.items()}, assign=True, strict=False)
        model.tie_weights()
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if left:
            raise RuntimeError(f"no weights for {left[:3]}")
        self.model = model.eval()
        self.vocabulary = given["vocab_size"]

    def load(self) -> dict[str, Any]:
        prompt = list(range(300, 300 + min(PROBE[0], self.vocabulary - 300)))

        def probe(setting: str) -> float:
            self.model.set_attn_implementation(setting)
            made = self.run(prompt, PROBE[1])
            return made["prefill"][0] + 64 * made["decode"][0]

        setting = quickest(("sdpa", "eager"), probe)
        self.model.set_attn_implementation(setting)
        return {"setting": setting}

    def run(self, ids: list[int], new: int) -> dict[str, Any]:
        torch, tokens = self.torch, []
        stage, cache = Stage(), self.cache(config=self.model.config)
        step = torch.tensor([ids])
        for at in range(new):
            logits = self.model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            step = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(step))
            if at == 0:
                stage.mark("prefill")
        stage.mark("decode", max(1, new - 1))
        return stage.spent | {"tokens": tokens}

    def logits(self, prompts: list[list[int]], file: str) -> None:
        np.save(file, np.stack([self.model(self.torch.tensor([ids])).logits[0].float().numpy() for ids in prompts]))


class Llama:
    """llama.cpp through its own functions: one batch for the prompt, then one token at a time, greedily."""

    def __init__(self, file: str) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not read {file}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None

    def open(self, flash: int) -> None:
        """A context with or without its flash attention."""
        if self.context:
            self.lib.llama_free(self.context)
        given = self.lib.llama_context_default_params()
        given.n_ctx = given.n_batch = given.n_ubatch = 1024
        given.n_threads = given.n_threads_batch = THREADS
        given.flash_attn_type = flash
        self.context = self.lib.llama_init_from_model(self.model, given)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")

    def load(self) -> dict[str, Any]:
        settings = {
            "flash": self.lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            "plain": self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        }

        def probe(name: str) -> float:
            self.open(settings[name])
            self.run([300], 2)
            made = self.run(list(range(300, 300 + min(PROBE[0], self.vocabulary - 300))), PROBE[1])
            return made["prefill"][0] + 64 * made["decode"][0]

        setting = quickest(tuple(settings), probe)
        self.open(settings[setting])
        self.run([300], 2)
        return {"setting": f"{setting}, llama-cpp-python {self.lib.__version__}"}

    def step(self, ids: list[int]) -> None:
        held = (ctypes.c_int32 * len(ids))(*ids)  # the batch only points to it
        if status := self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(held, len(ids))):
            raise RuntimeError(f"llama_decode gave {status}")

    def row(self, at: int = -1) -> np.ndarray:
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, at), (self.vocabulary,))

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def run(self, ids: list[int], new: int) -> dict[str, Any]:
        self.clear()
        tokens, stage = [], Stage()
        for at in range(new):
            self.step(tokens[-1:] if at else ids)
            tokens.append(int(self.row().argmax()))
            if at == 0:
                stage.mark("prefill")
        stage.mark("decode", max(1, new - 1))
        return stage.spent | {"tokens": tokens}

    def logits(self, prompts: list[list[int]], file: str) -> None:
        made = []
        for ids in prompts:
            self.clear()
            batch = self.lib.llama_batch_init(len(ids), 0, 1)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
            batch.n_tokens = len(ids)
            if status := self.lib.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode gave {status}")
            made.append(np.stack([self.row(i) for i in range(len(ids))]))
            self.lib.llama_batch_free(batch)
        np.save(file, np.stack(made))


class Vision:
    """transformers' Qwen2-VL with its own image processor and ``generate``; prompts are put into words as its template does."""

    def __init__(self, checkpoint: str, dtype: str) -> None:
        import tokenizers
        import torch
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        torch.set_num_threads(THREADS)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype)
        ).eval()
        with torch.no_grad():  # no page is touched for the first time while we measure
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()
        self.images = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
        self.tokenizer = tokenizers.Tokenizer.from_file(str(Path(checkpoint) / "tokenizer.json"))
        self.pad = self.tokenizer.token_to_id("<|image_pad|>")
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = self.tokenizer.token_to_id("<|endoftext|>")

    def load(self, size: int = 224) -> dict[str, Any]:
        """Choose the quicker attention for pictures of ``size``, after one that touches everything."""
        self.ask(min(size, 224), 0, "warm")

        def probe(setting: str) -> float:
            self.model.set_attn_implementation(setting)
            return self.ask(size, 1, "probe")["first"][0]

        setting = quickest(("sdpa", "eager"), probe, tries=3 if size <= 224 else 1)
        self.model.set_attn_implementation(setting)
        return {"setting": setting}

    def inputs(self, requests: list[dict[str, Any]], pictures: list[Any]) -> dict[str, Any]:
        """Ids padded on the left, with pixels."""
        shown = [one for one in pictures if one is not None]
        made = dict(self.images(images=shown, return_tensors="pt")) if shown else {}
        counts = (made["image_grid_thw"].prod(-1) // 4).tolist() if shown else []
        rows = []
        for request, one in zip(requests, pictures, strict=True):
            pads = "" if one is None else f"<|vision_start|>{'<|image_pad|>' * counts.pop(0)}<|vision_end|>"
            text = (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                f"{pads}{request['text']}<|im_end|>\n<|im_start|>assistant\n"
            )
            rows.append(self.tokenizer.encode(text, add_special_tokens=False).ids)
        torch, longest = self.torch, max(map(len, rows))
        fill = self.model.generation_config.pad_token_id
        made["input_ids"] = torch.tensor([[fill] * (longest - len(row)) + row for row in rows])
        made["attention_mask"] = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        if shown:
            made["mm_token_type_ids"] = (made["input_ids"] == self.pad).int()
        self.count = sum(map(len, rows))
        return made

    def generate(self, requests: list[dict[str, Any]], pictures: list[Any], new: int) -> int:
        """Prompt tokens, padding not counted."""
        inputs = self.inputs(requests, pictures)
        out = self.model.generate(**inputs, max_new_tokens=new, do_sample=False)
        if out.shape[1] != inputs["input_ids"].shape[1] + new:
            raise RuntimeError(f"{out.shape[1] - inputs['input_ids'].shape[1]} tokens instead of {new}")
        return self.count

    def ask(self, size: int, seed: int, question: str) -> dict[str, Any]:
        """The first token of an answer."""
        shown = picture(size, seed)
        stage = Stage()
        count = self.generate([{"text": question}], [shown], 1)
        stage.mark("first")
        return stage.spent | {"prompt": count}

    def ask_all(self, size: int, seed: int, questions: list[str], new: int) -> dict[str, Any]:
        shown = picture(size, seed)
        stage = Stage()
        count = sum(self.generate([{"text": question}], [shown], new) for question in questions)
        stage.mark("all")
        return stage.spent | {"prompt": count}

    def batch(self, requests: list[dict[str, Any]], new: int, together: int) -> dict[str, Any]:
        """Requests in padded batches of ``together``."""
        pictures = [picture(one["size"], one["seed"]) if one["size"] else None for one in requests]
        stage, count = Stage(), 0
        for at in range(0, len(requests), together):
            count += self.generate(requests[at : at + together], pictures[at : at + together], new)
        stage.mark("all")
        return stage.spent | {"prompt": count, "tokens": new * len(requests)}


def picture(size: int, seed: int) -> Any:
    """The same as ``ours.picture``, as a PIL image."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "text": (Decoder, ("load", "run", "logits")),
    "llama": (Llama, ("load", "run", "logits")),
    "vision": (Vision, ("load", "ask", "ask_all", "batch")),
}

if __name__ == "__main__":
    kind, orders = KINDS[sys.argv[1]]
    side = kind(*sys.argv[2:])
    serve({name: getattr(side, name) for name in orders})
