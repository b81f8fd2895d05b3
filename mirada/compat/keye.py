"""``KeyeVLInference``, the class that users of Keye-VL were shown, on :class:`mirada.VLM`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirada.engine.llm import VLM
from mirada.errors import InputError
from mirada.types import Image, Message, Sampling, Text, Video


class KeyeVLInference:
    """One model that answers about one picture, several pictures or a video.

    ``KeyeVLInference.from_local(model_path=DIR, device="cuda").infer(image="a.png", text="What is it?")["response"]``
    """

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm

    @classmethod
    def from_local(
        cls,
        model_path: str | Path,
        device: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
    ) -> KeyeVLInference:
        """The checkpoint in ``model_path``. ``load_in_4bit`` and ``load_in_8bit``: ``VLM(..., quant="int4")`` and ``"int8"``.

        Raises NotAvailable (these two off the CPU), SettingsError (both), CheckpointError, OutOfMemory.
        """
        return cls(VLM(str(model_path), device=device, load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit))

    @classmethod
    def from_hf_hub(
        cls,
        model_name: str,
        device: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
    ) -> KeyeVLInference:
        """The model of that name on the Hugging Face Hub, fetched once. Raises as ``from_local``, and HubError."""
        from mirada.hub import resolve  # brings an HTTP client

        place = resolve(model_name, revision=revision, token=token)
        return cls.from_local(place, device, load_in_4bit, load_in_8bit)

    def infer(
        self, image: Any = None, video: Any = None, text: str = "", max_new_tokens: int = 1024, temperature: float = 0.0
    ) -> dict[str, Any]:
        """Answer ``text`` about ``image`` (one source or a list of them) and ``video`` (a source, or a list of frames).

        ``{"response": the answer, "reasoning": what was thought before it, "usage": Usage}``. Raises MediaError,
        ContextOverflow, OutOfMemory; InputError without any input.
        """
        pictures = image if isinstance(image, list | tuple) else [] if image is None else [image]
        parts = [Image(source) for source in pictures] + ([Video(video)] if video is not None else [])
        if not parts and not text:
            raise InputError("infer() was given nothing", "give at least one of image, video and text")
        chat = [Message("user", (*parts, Text(text)))]
        (output,) = self.vlm.generate([chat], Sampling(max_tokens=max_new_tokens, temperature=temperature))
        if output.error is not None:
            raise output.error
        return {"response": output.message.text, "reasoning": output.message.reasoning, "usage": output.usage}
