"""What the prompt room must know of a model family: one small frozen value that the family hands in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mirada.prompt.builtin import KEYE_TEMPLATE, KIMI_TEMPLATE, QWEN2_VL_TEMPLATE
from mirada.types import Thinking


@dataclass(frozen=True, slots=True)
class Tags:
    """An opening and a closing string, such as ``<think>`` and ``</think>``; empty where the family has none."""

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
    tokens_per_second: float | None = 2.0
    """Position units per second of video (joint layout). None: one unit from row to row of the grid, whatever the rate."""
    video_advance: Literal["block", "plane"] = "block"
    """What text after a video counts on from; see ``types.Span.advance``."""
    merge: int = 2
    """Side of the square of patches that becomes one token."""
    flat_positions: bool = False
    """Placeholder tokens count on like text, instead of by time, row and column."""

    assistant_start: str = "<|im_start|>assistant\n"
    """What the template writes before an assistant's turn; what follows, up to ``turn_end``, is learnt."""
    turn_end: str = "<|im_end|>"
    eos: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")
    """Tokens that end a reply."""

    think: Tags = Tags("<think>", "</think>")
    analysis: Tags = Tags("<analysis>", "</analysis>")
    answer: Tags = Tags("<answer>", "</answer>")
    tool_call: Tags = Tags("<tool_call>", "</tool_call>")
    call_arguments: str = ""
    """Stands between a call's name and its arguments; where the family has none, a call is JSON that holds both."""
    call_section: Tags = Tags("", "")
    """Around all calls of a reply."""
    markup: tuple[str, ...] = (
        "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
        "<|point_start|>", "<|point_end|>", "<|ocr_text_start|>", "<|ocr_text_end|>",
        "<|clip_time_start|>", "<|clip_time_end|>",
    )  # fmt: skip
    """Control strings besides the tags that an assistant's own text may hold (boxes, points, ...). No user's may."""

    clicks: bool = False
    """Points are said as calls such as ``pyautogui.click(x=0.25, y=0.5)``, in fractions of the picture (``prompt.ground``)."""

    thinking_suffix: tuple[tuple[Thinking, str], ...] = (("on", "/think"), ("off", "/no_think"), ("auto", ""))
    """(thinking mode, what is put at the end of the last user text for it)."""
    template: str = KEYE_TEMPLATE
    """Chat template (jinja) for a checkpoint that ships none."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Strings that part a reply into reasoning, answer and tool calls."""
        pairs = (self.think, self.analysis, self.answer, self.tool_call, self.call_section)
        found = (*(text for tags in pairs for text in (tags.open, tags.close)), self.call_arguments)
        return tuple(filter(None, found))

    @property
    def assistant_strings(self) -> tuple[str, ...]:
        """Control strings that keep their meaning inside an assistant's text."""
        return self.tags + self.markup


KEYE_PREVIEW = PromptFormat()
KEYE_1_5 = PromptFormat(video_layout="frames")
QWEN2_VL = PromptFormat(
    tokens_per_second=None,
    markup=("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    thinking_suffix=(("off", ""), ("auto", "")),
    template=QWEN2_VL_TEMPLATE,
)
"""Qwen2-VL: from one pair of frames to the next is one unit. It does not think before it answers."""
_NO_TAGS = Tags("", "")
KIMI = PromptFormat(
    image_pad="<|media_pad|>",
    video_pad="",
    vision_start="<|media_start|>",
    vision_end="<|media_end|>",
    flat_positions=True,
    assistant_start="<|im_assistant|>assistant<|im_middle|>",
    eos=("<|im_end|>", "[EOS]"),
    think=Tags("◁think▷", "◁/think▷"),
    analysis=_NO_TAGS,
    answer=_NO_TAGS,
    tool_call=Tags("<|tool_call_begin|>", "<|tool_call_end|>"),
    call_arguments="<|tool_call_argument_begin|>",
    call_section=Tags("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    markup=(),
    clicks=True,
    thinking_suffix=(("auto", ""),),
    template=KIMI_TEMPLATE,
)
"""Kimi-VL. Its thinking tags are plain text, of several tokens each; whether a release thinks cannot be asked for. Tools are
written as for Kimi-K2, of the same makers; a vocabulary without tokens for the marks of calls spells them as plain text."""
