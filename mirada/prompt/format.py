"""What the prompt room must know of a model family: one small frozen value that the family hands in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mirada.prompt.builtin import KEYE_TEMPLATE
from mirada.types import Thinking


@dataclass(frozen=True, slots=True)
class Tags:
    """An opening and a closing string, such as ``<think>`` and ``</think>``."""

    open: str
    close: str


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Strings and rules of a family's prompts. The defaults are those of Keye-VL-8B-Preview.

    Every string that is a token of the checkpoint's vocabulary is looked up there; a missing one that is needed is a
    CheckpointError.
    """

    image_pad: str = "<|image_pad|>"
    video_pad: str = "<|video_pad|>"
    vision_start: str = "<|vision_start|>"
    vision_end: str = "<|vision_end|>"

    video_layout: Literal["joint", "frames"] = "joint"
    """joint: one run of pads for a whole video. frames: per frame its own run, after ``frame`` and its timestamp."""
    frame: str = "<|frame|>"
    fast_start: str = "<|fast_start|>"
    fast_end: str = "<|fast_end|>"
    tokens_per_second: float = 2.0
    """Position units per second of video (joint layout)."""
    merge: int = 2
    """Side of the square of patches that becomes one token."""

    assistant_start: str = "<|im_start|>assistant\n"
    """What the template writes before an assistant's turn; what follows, up to ``turn_end``, is learnt."""
    turn_end: str = "<|im_end|>"
    eos: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")
    """Tokens that end a reply."""

    think: Tags = Tags("<think>", "</think>")
    analysis: Tags = Tags("<analysis>", "</analysis>")
    answer: Tags = Tags("<answer>", "</answer>")
    tool_call: Tags = Tags("<tool_call>", "</tool_call>")
    markup: tuple[str, ...] = (
        "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
        "<|point_start|>", "<|point_end|>", "<|ocr_text_start|>", "<|ocr_text_end|>",
        "<|clip_time_start|>", "<|clip_time_end|>",
    )  # fmt: skip
    """Control strings besides the tags that an assistant's own text may hold (boxes, points, ...). No user's may."""

    thinking_suffix: tuple[tuple[Thinking, str], ...] = (("on", "/think"), ("off", "/no_think"), ("auto", ""))
    """(thinking mode, what is put at the end of the last user text for it)."""
    template: str = KEYE_TEMPLATE
    """Chat template (jinja) for a checkpoint that ships none."""

    @property
    def assistant_strings(self) -> tuple[str, ...]:
        """Control strings that keep their meaning inside an assistant's text."""
        pairs = (self.think, self.analysis, self.answer, self.tool_call)
        return tuple(text for tags in pairs for text in (tags.open, tags.close)) + self.markup


KEYE_PREVIEW = PromptFormat()
KEYE_1_5 = PromptFormat(video_layout="frames")
