"""The model that ``mirada.compat.transformers.AutoModel`` and its kind give: ``generate`` on :class:`mirada.VLM`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mirada.compat.features import MEDIA, prompts
from mirada.compat.keywords import Keywords
from mirada.compat.processor import HUB, NO_REMOTE_CODE, hub_options, moved
from mirada.engine.llm import VLM
from mirada.engine.load import find, pick_device
from mirada.errors import MessageError, SettingsError, nearest
from mirada.models.load import read_json
from mirada.models.releases import advised
from mirada.types import Sampling

_LOAD = Keywords(
    "from_pretrained",
    honoured=("torch_dtype", "dtype", "device_map", "attn_implementation", *HUB),
    done_anyway={
        "trust_remote_code": (False,), "low_cpu_mem_usage": (True,), "use_safetensors": (True,), "force_download": (False,),
        "load_in_4bit": (False,), "load_in_8bit": (False,), "use_cache": (True,),
    },
    without_effect={
        "trust_remote_code": NO_REMOTE_CODE,
        "code_revision": NO_REMOTE_CODE,
        "low_cpu_mem_usage": "weights always go straight from their file to their place",
    },
    refused={
        "quantization_config": "open a quantised checkpoint, or use mirada.VLM(folder, quant='int8')",
        "load_in_4bit": "open a quantised checkpoint, or use mirada.VLM(folder, quant='int4')",
        "load_in_8bit": "open a quantised checkpoint, or use mirada.VLM(folder, quant='int8')",
        "max_memory": "give device_map='cpu' or 'cuda:N'",
        "use_safetensors": "convert the checkpoint to safetensors; pickles are never read",
    },
)  # fmt: skip
_GENERATE = Keywords(
    "generate",
    honoured=(
        "input_ids", "attention_mask", *MEDIA, "max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "top_k",
        "min_p", "repetition_penalty", "eos_token_id", "pad_token_id", "stop_strings",
    ),
    done_anyway={
        "use_cache": (True,), "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "min_length": (0,),
        "min_new_tokens": (0,), "return_dict_in_generate": (False,), "output_scores": (False,), "output_logits": (False,),
        "output_attentions": (False,), "output_hidden_states": (False,), "synced_gpus": (False,), "length_penalty": (1.0,),
        "early_stopping": (False, True), "typical_p": (1.0,), "no_repeat_ngram_size": (0,),
    },
    without_effect={
        "use_cache": "the engine always keeps its cache",
        "synced_gpus": "there is one process",
        "length_penalty": "it is for beams",
        "bos_token_id": "prompts are given, never started",
        "cache_implementation": "the engine has its own cache",
    } | dict.fromkeys(("num_frames", "mm_token_type_ids", "token_type_ids", "tokenizer"), ""),
    refused={
        "num_beams": "leave it out: one sequence is decoded; try temperature and top_p",
        "num_return_sequences": "put the prompt into the batch as often as you want answers",
        "streamer": "use mirada.VLM.stream",
        "stopping_criteria": "give stop_strings",
        "logits_processor": "use temperature, top_k, top_p, min_p, repetition_penalty",
        "generation_config": "give its values as arguments",
        "return_dict_in_generate": "leave it out: the ids are returned; mirada.VLM reports log-probabilities",
        "output_scores": "use mirada.VLM with Sampling(logprobs=...)",
        "inputs_embeds": "give input_ids",
        "past_key_values": "give the whole prompt",
    },
)  # fmt: skip
_SILENT = ("num_frames", "mm_token_type_ids", "token_type_ids", "tokenizer")
"""What processors put among the inputs and nothing needs, and the companion of stop_strings."""


class Model:
    """One checkpoint, ready to generate. ``vlm`` is the engine itself."""

    def __init__(self, vlm: VLM, generation: Mapping[str, Any] | None = None, directory: Path | None = None) -> None:
        """``generation``: what generation_config.json holds, the defaults of ``generate``. ``directory``: of the checkpoint."""
        self.vlm = vlm
        self._directory = directory
        self.generation_config = SimpleNamespace(**(generation or {}))

    def __repr__(self) -> str:
        place = f"{self.dtype}, device={str(self.device)!r}"
        return f"{type(self).__name__}({str(self._directory)!r}, {self.config.model_type}, {place})"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Model:
        """The checkpoint of a directory, or of org/name on a hub, whatever its family.

        ``torch_dtype`` (or ``dtype``): a torch.dtype or its name; "auto" and nothing mean float32 on a CPU (with bfloat16
        matrices kept as they are stored, see ``VLM.precision``) and the checkpoint's own elsewhere. ``device_map``: "auto"
        spreads layers over all GPUs and the CPU, nothing means a GPU if there is one; "cpu", "cuda:1", {"": device}.
        ``attn_implementation``: eager, sdpa, flash_attention_2 (which on a machine without CUDA is noted and has no effect).
        Raises CheckpointError and its kinds, NotAvailable, OutOfMemory, SettingsError.
        """
        options = _LOAD.settle(kwargs)
        directory = find(pretrained_model_name_or_path, hub_options(options))
        device, spread = _device(options.get("device_map"))
        vlm = VLM(
            directory,
            device=device,
            device_map=spread,
            dtype=options.get("dtype", options.get("torch_dtype", "auto")),
            attn=_attention(options.get("attn_implementation", "auto"), device),
        )
        file = directory / "generation_config.json"
        return cls(vlm, read_json(file) if file.exists() else None, directory)

    @property
    def device(self) -> torch.device:
        return next(self.vlm.parts.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vlm.parts.model.parameters()).dtype

    @property
    def config(self) -> Any:
        """The family's own typed config."""
        return self.vlm.parts.model.config

    def eval(self) -> Model:
        """Itself: it never trains."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Model:
        """Itself, on another device or in another dtype; requests under way must have ended."""
        place = moved(torch.empty(0, device=self.device, dtype=self.dtype), *args, **kwargs)
        device = pick_device(place.device)
        if (device.type, device.index or 0, place.dtype) != (self.device.type, self.device.index or 0, self.dtype):
            old = self.vlm
            if old.parts.placement is not None:
                raise SettingsError(
                    "a model loaded with device_map='auto' is not moved", "load it with device_map='cuda' and its torch_dtype"
                )
            if old.precision == "exact" and self._directory is not None:  # in a form that only the CPU kernels read
                self.vlm = VLM(self._directory, device=device, dtype=place.dtype, limits=old.limits)
                old.close()
                return self
            old.parts.model.to(device=device, dtype=place.dtype)
            self.vlm = VLM.from_parts(old.parts.model, old.parts.renderer, old.parts.rule, eos=old.parts.eos, limits=old.limits)
        return self

    def cuda(self, device: Any = None) -> Model:
        """``to`` a GPU."""
        return self.to("cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device)

    def cpu(self) -> Model:
        """``to`` the CPU."""
        return self.to("cpu")

    @torch.no_grad()
    def generate(self, inputs: Any = None, **kwargs: Any) -> Tensor:
        """int64 [rows, L]: each prompt as it was given (padding included) with its answer, filled up with the pad token.

        ``**inputs`` is what the processor gave. Defaults are those of generation_config.json; without ``max_new_tokens``
        or ``max_length`` at most 256 tokens are generated. Sampling follows ``torch.manual_seed``. The first bad row raises
        its MiradaError.
        """
        if inputs is not None:
            kwargs = {"input_ids": inputs, **kwargs}
        options = _GENERATE.settle({name: value for name, value in kwargs.items() if name not in _SILENT})
        if "input_ids" not in options:
            raise MessageError("generate is given no input_ids", "call it as generate(**inputs) with what the processor gave")
        parts = self.vlm.parts
        ids = torch.as_tensor(options["input_ids"])
        rows = prompts(options, parts.rule, parts.renderer.format, parts.renderer.tokenizer)
        settings = [self._sampling(options, ids.shape[1]) for _ in rows]
        handles = []
        try:
            for (prompt, media), sampling in zip(rows, settings, strict=True):
                handles.append(self.vlm.submit(prompt, sampling, media=media))
            outputs = [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()
        for output in outputs:
            if output.error is not None:
                raise output.error
        return self._joined(ids, [output.tokens for output in outputs], options.get("pad_token_id"))

    def _sampling(self, options: Mapping[str, Any], length: int) -> Sampling:
        saved = vars(self.generation_config)
        file = advised([], {**saved, "do_sample": True, "temperature": saved.get("temperature", 1.0)})
        assert file is not None
        self._check_ends(options.get("eos_token_id"))
        made: dict[str, Any] = {
            "max_tokens": _most(options, saved, length),
            "repetition_penalty": float(options.get("repetition_penalty", file.repetition_penalty)),
        }
        stops = options.get("stop_strings", ())
        made["stop"] = (stops,) if isinstance(stops, str) else tuple(stops)
        if options.get("do_sample", bool(saved.get("do_sample", False))):
            top_k = options.get("top_k", saved.get("top_k", 50))  # 50: what transformers takes where nothing is said
            top_p = options.get("top_p", saved.get("top_p", 1.0))
            made |= {
                "temperature": float(options.get("temperature", file.temperature)),
                "top_k": top_k or None,
                "top_p": float(top_p) if top_p < 1 else None,
                "min_p": options.get("min_p"),
                "seed": int(torch.randint(1 << 62, ())),
            }
        return Sampling(**made)

    def _check_ends(self, asked: Any) -> None:
        ends = {asked} if isinstance(asked, int) else set(asked or ())
        if not ends <= self.vlm.parts.eos:
            raise SettingsError(
                f"generate cannot end at the tokens {sorted(ends - self.vlm.parts.eos)}",
                f"it ends at {sorted(self.vlm.parts.eos)}; for others give stop_strings",
            )

    def _joined(self, ids: Tensor, answers: list[tuple[int, ...]], pad: int | None) -> Tensor:
        if pad is None:
            saved = getattr(self.generation_config, "pad_token_id", None)
            pad = min(self.vlm.parts.eos) if saved is None else saved
        longest = max(map(len, answers))
        made = torch.full((len(ids), longest), int(pad), dtype=torch.int64, device=ids.device)  # type: ignore[arg-type]
        for row, answer in enumerate(answers):
            made[row, : len(answer)] = torch.tensor(answer, device=ids.device)
        return torch.cat((ids, made), 1)


def _most(options: Mapping[str, Any], saved: Mapping[str, Any], length: int) -> int:
    if "max_new_tokens" in options:
        return options["max_new_tokens"]
    if "max_length" in options:
        if options["max_length"] <= length:
            raise SettingsError(
                f"max_length={options['max_length']} leaves no room after {length} tokens of prompt", "give max_new_tokens"
            )
        return options["max_length"] - length
    return saved.get("max_new_tokens") or Sampling().max_tokens


def _device(device_map: Any) -> tuple[Any, str | None]:
    """``device_map`` of transformers -> ``device`` and ``device_map`` of VLM."""
    if isinstance(device_map, Mapping):
        if list(device_map) != [""]:
            raise SettingsError("device_map names single layers", "give 'auto', a device, or {'': device}")
        device_map = device_map[""]
    if device_map == "auto":
        return None, "auto"
    if device_map in ("balanced", "balanced_low_0", "sequential"):
        raise SettingsError(f"device_map={device_map!r} is not supported", "give 'auto', a device, or {'': device}")
    return torch.device("cuda", device_map) if isinstance(device_map, int) else device_map, None


def _attention(name: str, device: Any) -> str:
    known = {"auto": "auto", "eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash", "flash_attention_3": "flash"}
    if name not in known:
        raise SettingsError(f"attn_implementation={name!r} is unknown", nearest(str(name), known))
    if known[name] == "flash" and pick_device(device).type != "cuda":
        warnings.warn(f"attn_implementation={name} has no effect: it needs a CUDA device", stacklevel=3)
        return "auto"
    return known[name]
