"""The stages of ``models.parity`` as transformers computes them, if it is installed: an optional peer, never a dependency.

Qwen2-VL has classes there (4.45 and later). Keye-VL and Kimi-VL are published as code of their own, which is never run: what
they are compared with is a recording, or ``eager``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image as pil
from torch import Tensor

from mirada.errors import MediaUnsupported, NotAvailable
from mirada.media.grid import Patches, denormalise
from mirada.media.prepare import resize_first
from mirada.media.rule import MediaRule
from mirada.models.parity import STEPS, Inputs, Recording, unfold
from mirada.prompt.render import Renderer
from mirada.types import Image

_CLASSES = {"qwen2_vl": "Qwen2VLForConditionalGeneration"}
_PROCESSORS = (  # those that resize with Pillow, as the releases were made: of transformers 5, then of 4
    ("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"),
    ("transformers.models.qwen2_vl.image_processing_qwen2_vl", "Qwen2VLImageProcessor"),
)


class Peer:
    """transformers' classes for the checkpoint in ``folder``: float32 on the CPU, attention as it is written.

    NotAvailable if transformers is not installed, has no class for ``model_type``, or does not read the folder."""

    def __init__(self, folder: Path, model_type: str) -> None:
        if model_type not in _CLASSES:
            raise NotAvailable(
                f"transformers has no class of its own for {model_type}",
                f"it has for {', '.join(_CLASSES)}; compare with a recording (--record), or --against eager",
            )
        module = _package()
        self.version: str = module.__version__
        self.processor = _read(_processor(), folder)
        self.tokenizer = _read(module.AutoTokenizer, folder)
        kind = getattr(module, _CLASSES[model_type])
        self.model = _read(kind, folder, dtype=torch.float32, attn_implementation="eager").eval()

    def run(
        self,
        given: Inputs,
        renderer: Renderer,
        rule: MediaRule,
        facts: dict[str, str],
        eos: frozenset[int] = frozenset(),
        steps: int = STEPS,
    ) -> Recording:
        """All stages: its own resize, patches, tokens and positions, then its model on these.

        ``facts`` are those of our run; precision, software and device become its own. Before its image processor the picture
        passes the resize of the family's utility package, as it does here."""
        made = self.processor(images=[_picture(given, rule)], return_tensors="pt")
        pixels, grid = made["pixel_values"].float(), made["image_grid_thw"]
        tokens = self.tokens(given, renderer, int(grid[0].prod()) // rule.grid.merge**2)
        seen: dict[str, Tensor] = {}
        shown = {"pixel_values": pixels, "image_grid_thw": grid}
        with torch.no_grad(), _watching(self.model, seen):
            seen["logits"] = self.forward(tokens, shown)
        patches = pixels.view(-1, *given.pixels.shape[1:])
        stages = {
            "picture": given.picture,
            "pixels": _resized(patches, grid, given, rule),
            "patches": patches,
            "tokens": tokens,
            **seen,
            "greedy": torch.tensor(self.greedy(tokens, shown, eos, steps)),
        }
        software = f"transformers {self.version}, torch {torch.__version__}"
        own = facts | {"precision": "float32", "software": software, "device": "cpu, eager attention"}
        return Recording({name: value for name, value in stages.items() if value is not None}, own)

    def tokens(self, given: Inputs, renderer: Renderer, count: int) -> Tensor:
        """int64 [T]: the checkpoint's template and vocabulary by transformers, the picture's placeholder ``count`` times."""
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": given.question}]}]
        text = self.tokenizer.apply_chat_template(
            chat, chat_template=renderer.template.source, tokenize=False, add_generation_prompt=True
        )
        pad = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        ids = self.tokenizer(text.replace(pad, pad * count), add_special_tokens=False)["input_ids"]
        return torch.tensor(ids)

    def forward(self, tokens: Tensor, shown: dict[str, Tensor]) -> Tensor:
        """float32 [1, V]: logits of the last token."""
        ids = tokens[None]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **shown}
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # transformers 5 finds pictures by it
            batch["mm_token_type_ids"] = (ids == self.model.config.image_token_id).to(torch.int64)
        return self.model(**batch, use_cache=False).logits[0, -1:].float()

    @torch.no_grad()
    def greedy(self, tokens: Tensor, shown: dict[str, Tensor], eos: frozenset[int], steps: int) -> list[int]:
        """A whole pass for every token: slow, and without anything that a cache may get wrong."""
        made: list[int] = []
        while len(made) < steps and not (made and made[-1] in eos):
            made.append(int(self.forward(torch.cat((tokens, tokens.new_tensor(made))), shown).argmax()))
        return made


def _package() -> Any:
    try:
        return importlib.import_module("transformers")
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch is a RuntimeError
        raise NotAvailable(f"transformers cannot be imported ({error})", "pip install transformers") from error


def _processor() -> Any:
    for name, kind in _PROCESSORS:
        try:
            return getattr(importlib.import_module(name), kind)
        except (ImportError, AttributeError, RuntimeError):
            continue
    raise NotAvailable(
        "this transformers has no image processor of Qwen2-VL that can be imported", "pip install -U transformers"
    )


def _read(kind: Any, folder: Path, **settings: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **settings)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise NotAvailable(
            f"transformers does not read {folder.name} ({type(error).__name__}: {error})", "compare with --against eager"
        ) from error


def _picture(given: Inputs, rule: MediaRule) -> pil.Image:
    picture = pil.fromarray(given.picture.numpy())
    return picture if rule.first is None else resize_first(Image(picture), rule)


def _resized(patches: Tensor, grid: Tensor, given: Inputs, rule: MediaRule) -> Tensor | None:
    """The resized picture that ``patches`` show; None if they are not those of bytes under this mean and deviation."""
    try:
        pixels = denormalise(patches.numpy(), rule.grid)
    except MediaUnsupported:
        return None
    t, high, wide = (int(n) for n in grid[0])
    return unfold(Patches("image", pixels, ((t, high, wide),), given.patches.size, b""), rule)


@contextmanager
def _watching(model: Any, seen: dict[str, Tensor]) -> Iterator[None]:
    """Keeps what leaves the parts of a Qwen2-VL under the names of ``parity``."""

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, out: seen.__setitem__(name, _flat(out))

    def into(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["positions"] = kwargs["position_ids"][-3:, 0].clone()
        seen["embeddings"] = _flat(kwargs["inputs_embeds"])

    tower, decoder = model.model.visual, model.model.language_model
    hooks = [tower.patch_embed.register_forward_hook(keep("patch embedding"))]
    hooks += [block.register_forward_hook(keep(f"tower layer {i}")) for i, block in enumerate(tower.blocks)]
    hooks.append(tower.merger.register_forward_hook(keep("projector")))
    hooks.append(decoder.register_forward_pre_hook(into, with_kwargs=True))
    hooks += [layer.register_forward_hook(keep(f"decoder layer {i}")) for i, layer in enumerate(decoder.layers)]
    hooks.append(decoder.norm.register_forward_hook(keep("decoder norm")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _flat(out: Any) -> Tensor:
    """[.., D] of one sequence -> float32 [T, D], copied."""
    x = out[0] if isinstance(out, tuple) else out
    return x.detach().float().flatten(0, -2).clone()
