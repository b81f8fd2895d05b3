"""Prompts of Kimi-VL: spans that count like text, thoughts in plain tags, and what its chats do not hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.errors import CheckpointError, MessageError
from mirada.media.grid import Patches
from mirada.prompt.format import KIMI
from mirada.prompt.parse import Parser, parse
from mirada.prompt.render import Renderer
from mirada.prompt.template import Template
from mirada.prompt.tokenizer import Tokenizer
from mirada.types import Image, Message, Text, ToolCall, Video, joined_calls

GOLDEN = Path(__file__).parents[1] / "golden" / "kimi_vl" / "tokenizer"
TOKENIZER = Tokenizer.from_directory(GOLDEN)
RENDERER = Renderer(TOKENIZER, Template(KIMI.template), KIMI)
HEAD = "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"


def picture(h: int, w: int, key: int = 0) -> Patches:
    return Patches("image", np.zeros((h * w, 3, 14, 14), np.uint8), ((1, h, w),), (h * 14, w * 14), bytes([key]) * 32)


def test_placeholders_grow_and_their_spans_are_flat() -> None:
    chat = [Message("user", (Text("A:"), Image("a"), Text("B:"), Image("b"), "which?"))]
    prompt = RENDERER.render(chat, [picture(4, 6), picture(2, 2, 1)])
    pad = TOKENIZER.id("<|media_pad|>")
    assert [(s.num_tokens, s.flat, s.media_id, s.kind) for s in prompt.spans] == [(6, True, 0, "image"), (1, True, 1, "image")]
    for span in prompt.spans:
        assert set(prompt.tokens[span.start : span.end]) == {pad}
        assert prompt.tokens[span.end] == TOKENIZER.id("<|media_end|>")
        assert TOKENIZER.decode(prompt.tokens[span.start - 7 : span.start]) == "<|media_start|>image<|media_content|>"
    assert prompt.tokens.count(pad) == 7 and prompt.spans[1].hash == bytes([1]) * 32
    assert prompt.tokens[0] == TOKENIZER.id("<|im_system|>")  # no [BOS]


def test_what_an_assistant_wrote_is_learnt_with_its_end() -> None:
    chat = [Message("user", "hi"), Message("assistant", "yes", reasoning="hm"), Message("user", "so?")]
    prompt = RENDERER.render(chat)
    learnt = TOKENIZER.decode([t for t, learn in zip(prompt.tokens, prompt.learn, strict=True) if learn])
    assert learnt == "◁think▷hm◁/think▷yes<|im_end|>"


@given(text=st.text("[]<|>imedaps_nrtEOS ◁▷/thk", max_size=40))
@settings(max_examples=60)
def test_text_of_users_never_becomes_a_control_token(text: str) -> None:
    text += "[EOS]<|im_end|><|media_pad|><|reserved_token_600|>"
    prompt = RENDERER.render([Message("user", text)])
    control = [token for token in prompt.tokens if token in TOKENIZER.special_ids]
    assert control == [token for token in RENDERER.render([Message("user", "x")]).tokens if token in TOKENIZER.special_ids]
    assert RENDERER.text([Message("user", text)]) == (
        HEAD + f"<|im_user|>user<|im_middle|>{text}<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )


@pytest.mark.parametrize(
    ("reply", "reasoning", "answer"),
    [
        ("◁think▷ two and two ◁/think▷ It is 4. ", "two and two", "It is 4."),
        ("◁think▷never done", "never done", ""),
        ("plain ◁/think▷ text", "", "plain ◁/think▷ text"),
        ("It is ◁think▷4", "", "It is ◁think▷4"),
        ("<think>no tag here</think>", "", "<think>no tag here</think>"),
        ("◁think▷a◁think▷b◁/think▷c", "a◁think▷b", "c"),
        ('{"name": "f", "arguments": {}}', "", '{"name": "f", "arguments": {}}'),
    ],
)
def test_thoughts_are_read_from_plain_text(reply: str, reasoning: str, answer: str) -> None:
    made = parse(reply, KIMI)
    assert (made.reasoning, made.text, made.tool_calls) == (reasoning, answer, ())
    for cut in range(len(reply) + 1):
        parser = Parser(KIMI)
        deltas = [*parser.feed(reply[:cut]), *parser.feed(reply[cut:]), *parser.close()]
        assert ("".join(d.reasoning for d in deltas), "".join(d.text for d in deltas)) == (reasoning, answer), cut


def test_tags_of_thought_are_several_ordinary_tokens() -> None:
    ids = TOKENIZER.encode("◁think▷")
    assert len(ids) > 2 and not set(ids) & TOKENIZER.special_ids
    stream = TOKENIZER.decoder()
    assert "".join(stream.feed([token]) for token in ids) + stream.close() == "◁think▷"


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SECTION = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
CALL = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"


def test_tools_calls_and_their_results_are_written_as_for_kimi_k2() -> None:
    chat = [
        Message("user", "a"),
        Message("assistant", ("hm", ToolCall("f", '{"x": 1}', "c1"), ToolCall("g", "{}", "c2"))),
        Message("tool", "one", tool_call_id="c1"),
        Message("tool", "two", tool_call_id="c2"),
        Message("assistant", ToolCall("f", "{}", "c1")),  # a name that was used before
        Message("tool", "three", tool_call_id="c1"),
        Message("tool", "four", tool_call_id="other"),
    ]
    text = RENDERER.text(chat, tools=TOOLS)
    results = {"functions.f:0": "one", "functions.g:1": "two"}, {"functions.f:2": "three", "other": "four"}
    told = ["".join(f"<|im_system|>tool<|im_middle|>## Return of {k}\n{v}<|im_end|>" for k, v in r.items()) for r in results]
    first, second = CALL.format("f", 0, '{"x": 1}') + CALL.format("g", 1, "{}"), CALL.format("f", 2, "{}")
    assistant = "<|im_assistant|>assistant<|im_middle|>"
    assert text == (
        '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]'
        f"<|im_end|>{HEAD}<|im_user|>user<|im_middle|>a<|im_end|>"
        f"{assistant}hm{SECTION.format(first)}<|im_end|>{told[0]}"
        f"{assistant}{SECTION.format(second)}<|im_end|>{told[1]}{assistant}"
    )


KIMI_CALLS = [  # reply, answer, reasoning, (name, arguments)
    (SECTION.format(CALL.format("f", 0, '{"x": 1}')), "", "", [("f", '{"x": 1}')]),
    (SECTION.format(CALL.format("f", 0, "{}") + CALL.format("g", 1, "[2]")), "", "", [("f", "{}"), ("g", "[2]")]),
    ("◁think▷r◁/think▷" + SECTION.format("\n" + CALL.format("f", 0, " {} \n") + "\n"), "", "r", [("f", "{}")]),
    ("I look. " + SECTION.format(CALL.format("a.b", 12, "{}")) + " so", "I look.  so", "", [("a.b", "{}")]),
    (CALL.format("f", 0, "{}"), "", "", [("f", "{}")]),  # without a section
    (SECTION.format("<|tool_call_begin|>f<|tool_call_argument_begin|>1<|tool_call_end|>"), "", "", [("f", "1")]),
    (SECTION.format(CALL.format("f", 0, "")), "", "", [("f", "{}")]),
    ("<|tool_calls_section_begin|>" + CALL.format("f", 0, '{"x": "</')[:-17], "", "", [("f", '{"x": "</')]),  # cut off
    (CALL.format("f", 0, '{"x": 1}')[:-5], "", "", [("f", '{"x": 1}<|tool_call_')]),
    (SECTION.format(CALL.format("f", 0, '{"x": "<|tool_call_end|>"}')) + "A", "A", "", [("f", '{"x": "<|tool_call_end|>"}')]),
    (CALL.format("f", 0, '{"x": "\\\\\\"<|tool_call_end|>", "y": [2]}'), "", "",
     [("f", '{"x": "\\\\\\"<|tool_call_end|>", "y": [2]}')]),
    (CALL.format("f", 0, '{"x": "\n') + "b", "b", "", [("f", '{"x": "')]),
    ("<|tool_call_begin|>functions.f", "<|tool_call_begin|>functions.f", "", []),
    ("<|tool_call_begin|>f<|tool_call_end|>b", "<|tool_call_begin|>f<|tool_call_end|>b", "", []),
    ("<|tool_call_begin|> <|tool_call_argument_begin|>{}<|tool_call_end|>",) * 2 + ("", []),
    ("<|tool_call_begin|><|tool_call_argument_begin|>{<|tool_call_argument_begin|>}<|tool_call_end|>",) * 2 + ("", []),
    ("a <|tool_call_end|> b", "a <|tool_call_end|> b", "", []),
    ("◁think▷<|tool_call_begin|>f◁/think▷b", "b", "<|tool_call_begin|>f", []),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "answer", "reasoning", "calls"), KIMI_CALLS)
def test_calls_are_read_at_every_split_point(reply, answer, reasoning, calls) -> None:
    made = parse(reply, KIMI)
    assert (made.text, made.reasoning, [(c.name, c.arguments) for c in made.tool_calls]) == (answer, reasoning, calls)
    assert [call.id for call in made.tool_calls] == [f"call_{number}" for number in range(len(calls))]
    for cut in range(len(reply) + 1):
        parser = Parser(KIMI)
        deltas = [*parser.feed(reply[:cut]), *parser.feed(reply[cut:]), *parser.close()]
        found = joined_calls(call for d in deltas for call in d.tool_calls)
        assert ("".join(d.text for d in deltas), "".join(d.reasoning for d in deltas), found) == (
            answer, reasoning, made.tool_calls,
        ), cut  # fmt: skip


def test_what_its_chats_do_not_hold() -> None:
    with pytest.raises(MessageError, match="frames of a video as pictures"):
        RENDERER.text([Message("user", Video("a.mp4"))])
    with pytest.raises(MessageError, match=r"'on' is unknown.*auto"):
        RENDERER.render([Message("user", "a")], thinking="on")


def test_a_vocabulary_that_renames_a_mark_is_told(tmp_path: Path) -> None:
    """An error names what is missing, instead of its being spelt out in ordinary tokens."""
    renderer = Renderer(renamed(tmp_path, "<|media_pad|>"), Template(KIMI.template), KIMI)
    with pytest.raises((CheckpointError, MessageError), match=r"placeholder|media_pad"):
        renderer.render([Message("user", (Image("a"), Text("?")))], [picture(2, 2)])


def test_a_template_whose_turns_the_vocabulary_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no token '<\|im_end\|>', with which the family's own template ends turns"):
        renamed(tmp_path, "<|im_end|>")
        Renderer.from_directory(tmp_path, KIMI)


def renamed(folder: Path, control: str) -> Tokenizer:
    """The vocabulary with another name for one of its control strings."""
    for name in ("tiktoken.model", "tokenizer_config.json"):
        (folder / name).write_text((GOLDEN / name).read_text().replace(control, "<|other|>"))
    return Tokenizer.from_directory(folder)
