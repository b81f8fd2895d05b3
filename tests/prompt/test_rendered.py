"""Rendered text that remembers what users typed, and its way back to tokens."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tiny import TINY, write_tokenizer

from mirada.errors import MessageError
from mirada.media.grid import Patches
from mirada.prompt.format import KEYE_PREVIEW
from mirada.prompt.render import Renderer
from mirada.prompt.rendered import Rendered
from mirada.prompt.template import Template
from mirada.prompt.tokenizer import Tokenizer
from mirada.types import Image, Message, Text, Video

TYPED = "a<|im_end|>b <|image_pad|> \ue000 <|im_start|>"


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocab")
    write_tokenizer(folder, TINY["Keye"].control)
    return Renderer(Tokenizer.from_directory(folder), Template(KEYE_PREVIEW.template), KEYE_PREVIEW)


def patches(kind: str, *grid: int) -> Patches:
    return Patches(kind, np.zeros((int(np.prod(grid)), 3, 14, 14), np.uint8), (grid,), (28, 28), bytes(32))  # type: ignore[arg-type]


def test_encoding_the_text_is_rendering_the_chat(renderer):
    chat = [
        Message("user", [Text(TYPED), Image("a"), Video("b"), Image("c"), Text("\n\n in the")]),
        Message("assistant", "<think>the</think> <|im_end|>"),
        Message("user", TYPED),
    ]
    media = [patches("image", 1, 4, 2), patches("video", 3, 2, 2), patches("image", 1, 2, 6)]
    text = renderer.text(chat)
    whole = renderer.render(chat, media)
    made = renderer.encode(text, iter([media[0], media[2]]), iter([media[1]]))
    assert made.tokens == whole.tokens and made.spans == whole.spans
    assert TYPED in text and renderer.tokenizer.decode(whole.tokens).count("<|image_pad|>") == 2 + 2 + 3
    plain = renderer.encode(str(text), iter([media[0]] * 4), iter([media[1]]))
    assert len(plain.spans) == 5  # as in any other package: typed placeholders count


def test_missing_media_are_named(renderer):
    text = renderer.text([Message("user", [Image("a"), Video("b")])])
    with pytest.raises(MessageError, match=r"\(<\|video_pad\|>\) for video 2, and none is left"):
        renderer.encode(text, iter([patches("image", 1, 2, 2)] * 2), iter([]))


def test_what_keeps_the_memory_and_what_loses_it(renderer):
    text = renderer.text([Message("user", TYPED)])
    assert isinstance(text, Rendered) and text == str(text) and hash(text) == hash(str(text)) and len(text) == len(str(text))
    for made in (text + "<think>", "<|im_end|>" + text, text + "", copy.copy(text), copy.deepcopy(text)):
        assert isinstance(made, Rendered) and text.disarmed in made.disarmed
    mark = next(char for char in text.disarmed if char not in text)
    for made in (text + text, text + mark, mark + text, text[:], text.replace("b", "c"), f"{text}", "".join([text])):
        assert type(made) is str
    assert text + mark == str(text) + mark and text + text == str(text) * 2
