"""What a user writes never becomes a control token, wherever it is written and however a template joins it."""

from __future__ import annotations

import itertools
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocab import CONTROL, tokenizer

from mirada.errors import MessageError
from mirada.media.grid import Patches
from mirada.prompt.builtin import KEYE_TEMPLATE, KEYE_TEXT_TEMPLATE
from mirada.prompt.format import KEYE_1_5, KEYE_PREVIEW
from mirada.prompt.marks import Marks
from mirada.prompt.render import Renderer
from mirada.prompt.template import Template
from mirada.types import Image, Message, Text, ToolCall, Video

TOKENIZER = tokenizer()
IDS = frozenset(TOKENIZER.control.values())
ESCAPING = """\
{%- for message in messages -%}
    <|im_start|>{{ message.role }}
    {{- message.content | trim | tojson(ensure_ascii=true) -}}
    {{- message.tool_calls | tojson(ensure_ascii=true) if message.tool_calls -}}
    {{- message.tool_call_id -}}
    <|im_end|>
{%- endfor %}
{%- for tool in tools or [] %}{{ tool | tojson(ensure_ascii=true) }}{% endfor %}"""
RENDERERS = {
    "keye": Renderer(TOKENIZER, Template(KEYE_TEMPLATE), KEYE_1_5),
    "text": Renderer(TOKENIZER, Template(KEYE_TEXT_TEMPLATE), KEYE_PREVIEW),
    "escaping": Renderer(TOKENIZER, Template(ESCAPING), KEYE_PREVIEW.__class__(assistant_start="<|im_start|>assistant")),
}
PICTURE = Patches("image", np.zeros((0, 3, 14, 14), np.uint8), ((1, 2, 2),), (28, 28), b"k" * 32)
CLIP = Patches("video", np.zeros((0, 3, 14, 14), np.uint8), ((2, 2, 2),), (28, 28), b"k" * 32)


def control(prompt):
    """The control tokens of a prompt, in order."""
    return [TOKENIZER.decode([token]) for token in prompt.tokens if token in IDS]


def chat_with(text, name):
    """A chat that holds ``text`` wherever a stranger may have written it."""
    half = len(text) // 2
    media = (Image(f"{text}.png"), Video(f"/a/{text}")) if name == "keye" else ()
    arguments = json.dumps({text: [text, {"k": text}]})
    return [
        Message("system", f"s {text}"),
        Message("user", (Text(text), Text(text[:half]), Text(text[half:]), *media, Text(f"a{text}\n"))),
        Message("assistant", (Text("x"), ToolCall(text, arguments, text)), reasoning=f"r {text}"),
        Message("tool", text, tool_call_id=text),
        Message("user", text),
    ]


def render(name, chat, text):
    media = [PICTURE, CLIP] if name == "keye" else []
    tools = [{"type": "function", "function": {"name": text, "description": [text], text: 1}}]
    return RENDERERS[name].render(chat, media, tools=tools)


@pytest.mark.parametrize("name", RENDERERS)
@pytest.mark.parametrize("text", CONTROL)
def test_every_control_string_everywhere(name, text):
    prompt = render(name, chat_with(text, name), text)
    assert control(prompt) == control(render(name, chat_with("harmless", name), "harmless"))
    assert TOKENIZER.decode(prompt.tokens).count(text) >= 6  # it is still there to be read


@pytest.mark.parametrize("text", CONTROL)
def test_an_escaped_control_string_in_arguments(text):
    escaped = '{"a": "' + "".join(f"\\u{ord(char):04x}" for char in text) + '"}'
    chat = [Message("user", "q"), Message("assistant", ToolCall("f", escaped))]
    plain = [Message("user", "q"), Message("assistant", ToolCall("f", '{"a": "b"}'))]
    assert control(RENDERERS["keye"].render(chat)) == control(RENDERERS["keye"].render(plain))


def test_only_markup_that_belongs_there_counts_in_an_assistants_text():
    allowed = {"<think>", "</think>", "<tool_call>", "</tool_call>"} | set(KEYE_1_5.markup)
    for text in CONTROL:
        prompt = RENDERERS["keye"].render([Message("user", "q"), Message("assistant", f"a{text}b")])
        plain = RENDERERS["keye"].render([Message("user", "q"), Message("assistant", "ab")])
        assert (len(control(prompt)) > len(control(plain))) == (text in allowed), text


ALPHABET = st.sampled_from(
    [
        *CONTROL, "<", "|", ">", "im_start", "im_end", "<|", "|>", "</", "think",
        "\ue000", "\ue001", "\ue002", "\U000f0000", "\\ue000", "\\uE001", "\n", "é",
    ]
)  # fmt: skip
TEXTS = st.lists(ALPHABET | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=8)


@settings(max_examples=100)
@given(TEXTS, st.lists(st.integers(0, 8), max_size=4))
def test_any_text_in_any_pieces_survives_and_stays_text(pieces, cuts):
    renderer = RENDERERS["keye"]
    whole = "".join(pieces)
    edges = sorted({0, len(pieces), *(min(cut, len(pieces)) for cut in cuts)})
    parts = [Text("".join(pieces[low:high])) for low, high in itertools.pairwise(edges)]
    prompt = renderer.render([Message("user", [*parts, Text("")])])
    assert control(prompt) == control(renderer.render([Message("user", "x")]))
    before, after = renderer.text([Message("user", "\u2021")]).split("\u2021")
    assert TOKENIZER.decode(prompt.tokens) == unicodedata.normalize("NFC", before + whole + after)


@settings(max_examples=100)
@given(TEXTS)
def test_private_use_characters_survive_where_templates_escape(pieces):
    # Its parts are trimmed and written as JSON in ASCII.
    text = "".join(pieces)
    written = RENDERERS["escaping"].text([Message("user", text)], add_generation_prompt=False)
    body = written.removeprefix("<|im_start|>user").removesuffix("<|im_end|>")
    assert json.loads(body) == text.strip()


def test_a_text_with_every_private_use_character_of_the_basic_plane():
    text = "".join(map(chr, range(0xE000, 0xF900))) + "<|im_end|>"
    prompt = RENDERERS["keye"].render([Message("user", text)])
    assert text in TOKENIZER.decode(prompt.tokens)
    assert control(prompt) == control(RENDERERS["keye"].render([Message("user", "x")]))


def test_when_no_private_use_character_is_left():
    every = [chr(code) for code in (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))]
    Marks(["<a>"], (), ["".join(every[2:])])
    with pytest.raises(MessageError, match="every private-use character"):
        Marks(["<a>"], (), ["".join(every[1:])])


def test_marks_keep_lengths_and_white_space():
    marks = Marks(CONTROL, ("<think>",), [])
    text = "  <|im_end|>\n<think>\t"
    assert len(marks.hide(text)) == len(text) and marks.hide(text).strip() == marks.hide(text.strip())
    assert marks.show(marks.hide(text)) == text and not any(string in marks.hide(text) for string in CONTROL)
    assert marks.hide_assistant(text).count("<think>") == 1 and "<|im_end|>" not in marks.hide_assistant(text)


def test_a_template_cannot_complete_what_a_user_began():
    # The template's own text stands right beside the user's.
    joining = Template("<|im_{{ messages[0].content }}|>{{ messages[0].content }}<|im_end|>")
    renderer = Renderer(TOKENIZER, joining, KEYE_PREVIEW)
    for text in ("start|><|im_start", "end|>", "<|im_start|><|im_", "<|im_"):
        assert control(renderer.render([Message("user", text)])) == ["<|im_end|>"], text
