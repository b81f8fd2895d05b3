"""The processor that ``mirada.compat.transformers.AutoProcessor`` gives: text and media in, tensors out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirada.compat import features
from mirada.compat.keywords import Keywords
from mirada.engine.load import find, pick_device
from mirada.engine.request import check_chat
from mirada.errors import MessageError, SettingsError
from mirada.media.limits import FetchLimits
from mirada.media.rule import MediaRule
from mirada.models.family import family_of
from mirada.models.load import read_json
from mirada.prompt.render import Renderer
from mirada.prompt.template import Template
from mirada.prompt.tokenizer import Tokenizer
from mirada.types import Chat

HUB = {"revision": "revision", "token": "token", "cache_dir": "cache_dir", "local_files_only": "offline"}
"""Names of transformers -> those of ``HubOptions``."""
NO_REMOTE_CODE = "no code of a checkpoint is ever run, every supported family is part of Mirada"

_LOAD = Keywords(
    "AutoProcessor.from_pretrained",
    honoured=("min_pixels", "max_pixels", "padding_side", *HUB),
    done_anyway={"trust_remote_code": (False,), "use_fast": (True, False), "force_download": (False,)},
    without_effect={"trust_remote_code": NO_REMOTE_CODE, "code_revision": NO_REMOTE_CODE},
    refused={"size": "give min_pixels and max_pixels", "subfolder": "give the directory itself"},
)
_TEMPLATE = Keywords(
    "apply_chat_template",
    honoured=("add_vision_id", "tools", "chat_template"),
    done_anyway={
        "tokenize": (False,), "return_dict": (False,), "continue_final_message": (False,), "padding": (False, True),
        "truncation": (False, True), "return_assistant_tokens_mask": (False,),
    },
    without_effect={
        "return_tensors": "the text alone is rendered here; the processor makes tensors of it",
        "enable_thinking": "the templates of these models know no such switch; end the question with /think or /no_think",
    },
    refused={
        "tokenize": "render with tokenize=False, then call the processor on the text",
        "return_dict": "render with tokenize=False, then call the processor on the text",
        "continue_final_message": "render with add_generation_prompt=True and add the beginning of the answer to the text",
    },
)  # fmt: skip
_CALL = Keywords(
    "processor(...)",
    honoured=("padding", "padding_side", "return_tensors", *features.PER_VIDEO),
    done_anyway={
        "truncation": (False,), "add_special_tokens": (True, False), "do_resize": (True,), "do_normalize": (True,),
        "do_rescale": (True,), "do_convert_rgb": (True,), "do_sample_frames": (False,), "return_attention_mask": (True,),
        "return_mm_token_type_ids": (False,), "return_token_type_ids": (False,),
    },
    without_effect={
        "truncation": "a prompt is never cut; one that does not fit makes generate raise ContextOverflow",
        "videos_kwargs": "give fps and the like themselves",
    },
    refused={
        "max_length": "a prompt is never cut; lower max_pixels, or shorten the text",
        "min_pixels": "give it to AutoProcessor.from_pretrained, or beside the picture in the message",
        "max_pixels": "give it to AutoProcessor.from_pretrained, or beside the picture in the message",
        "images_kwargs": "give min_pixels and max_pixels to AutoProcessor.from_pretrained",
    },
)  # fmt: skip
_DECODE = Keywords(
    "decode",
    done_anyway={"clean_up_tokenization_spaces": (False,)},
    without_effect={"clean_up_tokenization_spaces": "text is given back exactly as the tokens spell it"},
)


def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``tensor.to(...)``. Raises SettingsError or NotAvailable for a device that is unknown or absent, before torch trips."""
    for given in (*args[:1], kwargs.get("device")):
        if isinstance(given, str | int | torch.device) and not isinstance(given, bool):
            pick_device(torch.device("cuda", given) if isinstance(given, int) else given)
    return tensor.to(*args, **kwargs)


class BatchFeature(dict):
    """Tensors by name, also as attributes (``inputs.input_ids``)."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"these inputs have no {name!r}; they have {', '.join(self)}")
        return self[name]

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """All tensors on a device; a dtype is taken by pixel values and the like, ids and grids stay whole numbers."""
        place = moved(torch.empty(0), *args, **{k: v for k, v in kwargs.items() if k != "non_blocking"})
        return BatchFeature(
            {
                name: value.to(place.device, place.dtype if _casts(value, args, kwargs) else None)
                if isinstance(value, Tensor)
                else value
                for name, value in self.items()
            }
        )


def _casts(value: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return value.is_floating_point() and any(isinstance(one, torch.dtype) for one in (*args, *kwargs.values()))


class TextTokenizer:
    """The part of transformers' tokenizers that the model cards use."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[str], padding_side: str = "left") -> None:
        self._tokenizer = tokenizer
        self.eos_token = tokenizer.names.get("eos_token") or next(text for text in ends if text in tokenizer.control)
        self.pad_token = tokenizer.names.get("pad_token") or self.eos_token
        self.padding_side = padding_side

    @property
    def eos_token_id(self) -> int:
        return self._tokenizer.id(self.eos_token)

    @property
    def pad_token_id(self) -> int:
        return self._tokenizer.id(self.pad_token)

    def __len__(self) -> int:
        return self._tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        """Trusted text: control strings become their tokens, as transformers does."""
        return self._tokenizer.encode_control(text)

    def convert_tokens_to_ids(self, token: str) -> int:
        """Id of a control string; CheckpointError when there is none."""
        return self._tokenizer.id(token)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """Ids (a list, array or tensor [L]) -> text."""
        _DECODE.settle(kwargs)
        ids = torch.as_tensor(token_ids).reshape(-1).tolist()
        return self._tokenizer.decode(ids, skip_special=skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Rows of ids -> their texts."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in sequences]


class Processor:
    """Renders chats, cuts pictures and videos, and puts both together as tensors.

    Raises MessageError, MediaError and SettingsError; all are ValueErrors.
    """

    def __init__(self, renderer: Renderer, rule: MediaRule, padding_side: str = "left") -> None:
        self._renderer, self._rule = renderer, rule
        self.tokenizer = TextTokenizer(renderer.tokenizer, renderer.format.eos, _side(padding_side))
        self.image_token, self.video_token = renderer.format.image_pad, renderer.format.video_pad

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Processor:
        """Tokenizer, template and rules of a directory, or of org/name on a hub; no weights are read.

        ``min_pixels`` / ``max_pixels`` bound the resized area of a picture or frame. Raises CheckpointError and its kinds,
        SettingsError.
        """
        options = _LOAD.settle(kwargs)
        directory = find(pretrained_model_name_or_path, hub_options(options))
        mapping = read_json(directory / "config.json")
        family = family_of(mapping, str(directory / "config.json"))
        config = family.config(mapping)
        file = directory / "preprocessor_config.json"
        rule: MediaRule = family.media_rule(config, read_json(file) if file.exists() else None)
        low, high = options.get("min_pixels"), options.get("max_pixels")
        renderer = Renderer.from_directory(directory, family.prompt_format(config))
        return cls(renderer, rule.bounded(low, high) if low or high else rule, options.get("padding_side", "left"))

    def apply_chat_template(
        self, conversation: Sequence[Any], add_generation_prompt: bool = False, **kwargs: Any
    ) -> str | list[str]:
        """One chat (or several) as text (or several), one placeholder per picture or video.

        What users typed stays text even where it reads like a control string, as long as the string that is returned
        reaches the processor as it is, or with text put before or behind it.
        """
        options = _TEMPLATE.settle(kwargs)
        renderer, template = self._renderer, options.pop("chat_template", None)
        if template is not None:
            renderer = Renderer(
                renderer.tokenizer, Template(template, "chat_template", renderer.tokenizer.names), renderer.format
            )
        several = bool(conversation) and isinstance(conversation[0], list | tuple)
        made = [
            renderer.text(_chat(chat), add_generation_prompt=add_generation_prompt, **options)
            for chat in (conversation if several else [conversation])
        ]
        return list(made) if several else made[0]

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """``text``: one rendered chat or several; ``images`` and ``videos``: all of theirs, in order.

        Gives input_ids and attention_mask, and as far as there are media pixel_values, image_grid_thw (Kimi:
        image_grid_hws), pixel_values_videos, video_grid_thw, second_per_grid_ts (Keye Preview), num_frames (Keye 1.5).
        """
        options = _CALL.settle(kwargs)
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts or not all(isinstance(one, str) for one in texts):
            raise MessageError("the processor is given no text", "give text=[processor.apply_chat_template(...)]")
        limits = FetchLimits()
        pictures = [features.picture(source, self._rule, limits) for source in features.flat(images)]
        films = list(features.videos_of(videos))
        facts = [{name: _one(name, options[name], i, len(films)) for name in features.PER_VIDEO if name in options}
                 for i in range(len(films))]  # fmt: skip
        clips = [features.video(source, self._rule, one) for source, one in zip(films, facts, strict=True)]
        left, right = iter(pictures), iter(clips)
        prompts = [self._renderer.encode(one, left, right) for one in texts]
        for kind, rest in (("image", list(left)), ("video", list(right))):
            if rest:
                raise MessageError(
                    f"the texts have no placeholder for {len(rest)} of the {kind}s", f"give one {kind} per placeholder"
                )
        side = _side(options.get("padding_side", self.tokenizer.padding_side))
        self._check_padding(options.get("padding", False), [len(prompt.tokens) for prompt in prompts])
        made = features.token_tensors(prompts, self.tokenizer.pad_token_id, side)
        made |= features.media_tensors(pictures, clips, self._rule, self._renderer.format)
        return _as(options.get("return_tensors"), made)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """See ``TextTokenizer.decode``."""
        return self.tokenizer.decode(token_ids, skip_special_tokens, **kwargs)

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """See ``TextTokenizer.batch_decode``."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Iterable[Any], skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """``batch_decode`` under the name of transformers' pipelines."""
        return self.batch_decode(generated_outputs, skip_special_tokens, **kwargs)

    @staticmethod
    def _check_padding(padding: Any, lengths: Sequence[int]) -> None:
        if padding not in (True, False, "longest"):
            raise SettingsError(f"processor(...) cannot do padding={padding!r}", "give True: up to the longest text")
        if not padding and len(set(lengths)) > 1:
            raise SettingsError("texts of different lengths make no tensor without padding", "give padding=True")


def hub_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those of transformers' names that say where a model comes from, as ``HubOptions``; None if there are none."""
    return {HUB[name]: value for name, value in options.items() if name in HUB} or None


def _side(side: str) -> str:
    if side not in ("left", "right"):
        raise SettingsError(f"padding_side={side!r} is unknown", "give left or right")
    return side


def _one(name: str, values: Any, index: int, count: int) -> Any:
    """What is said of one video of ``count``: an entry of a list, or for fps one number for all."""
    if name == "fps" and isinstance(values, int | float):
        return values
    given = len(values) if hasattr(values, "__len__") else 1
    if given != count:
        raise SettingsError(
            f"{name} is said for {given} of {count} videos",
            "give what process_vision_info returned; every list of frames needs its fps, or none",
        )
    return values[index]


def _as(kind: str | None, tensors: dict[str, Tensor]) -> BatchFeature:
    if kind == "pt":
        return BatchFeature(tensors)
    if kind not in (None, "np"):
        raise SettingsError(f"processor(...) cannot do return_tensors={kind!r}", "give 'pt' or 'np'")
    made: dict[str, Any] = {name: value.numpy() for name, value in tensors.items()}
    if kind is None:
        made["input_ids"], made["attention_mask"] = (tensors[name].tolist() for name in ("input_ids", "attention_mask"))
    return BatchFeature(made)


def _chat(chat: Any) -> Chat:
    """Messages; placeholders without a source (``{"type": "image"}``) are taken, as templates ask only for the type."""
    if isinstance(chat, list | tuple):
        chat = [{**m, "content": [_part(p) for p in m["content"]]} if _has_parts(m) else m for m in chat]
    return check_chat(chat, "auto")


def _has_parts(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple)


def _part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return {**part, kind: kind} if kind in ("image", "video") and len(part) == 1 else part
