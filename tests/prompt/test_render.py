from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocab import CONTROL, oracle, tokenizer

from mirada.errors import CheckpointError, MessageError
from mirada.media.grid import Patches
from mirada.prompt.builtin import KEYE_TEMPLATE, KEYE_TEXT_TEMPLATE
from mirada.prompt.format import KEYE_1_5, KEYE_PREVIEW
from mirada.prompt.render import Renderer
from mirada.prompt.template import Template
from mirada.prompt.tokenizer import Tokenizer
from mirada.records.wire import messages_from_openai
from mirada.types import Image, Message, Span, Text, ToolCall, Video

GOLDEN = Path(__file__).parents[1] / "golden/keye_vl"
TOKENIZER = tokenizer()
PREVIEW = Renderer(TOKENIZER, Template(KEYE_TEMPLATE), KEYE_PREVIEW)
FRAMES = Renderer(TOKENIZER, Template(KEYE_TEMPLATE), KEYE_1_5)
TEXT = Renderer(TOKENIZER, Template(KEYE_TEXT_TEMPLATE), KEYE_PREVIEW)


def patches(kind, *grids, **facts):
    return Patches(kind, np.zeros((0, 3, 14, 14), np.uint8), grids, (28, 28), kind.encode() * 4, **facts)


PICTURE = patches("image", (1, 4, 6))
CLIP = patches("video", (3, 4, 4), fps=2.0)


def learnt(prompt):
    return TOKENIZER.decode(token for token, learn in zip(prompt.tokens, prompt.learn, strict=True) if learn)


def text_of(prompt):
    return TOKENIZER.decode(prompt.tokens)


# the recorded renderings


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "chat_template.json").read_text())["processor_template"], ids=lambda c: c["name"]
)
def test_chats_of_dicts_render_as_recorded(case):
    chat = messages_from_openai(case["messages"])
    assert PREVIEW.text(chat, **case["kwargs"]) == case["rendered"]
    media = [
        PICTURE if isinstance(part, Image) else CLIP for message in chat for part in message.parts if not isinstance(part, Text)
    ]
    written = case["rendered"].replace("<|image_pad|>", "<|image_pad|>" * 6).replace("<|video_pad|>", "<|video_pad|>" * 12)
    prompt = PREVIEW.render(chat, media, **case["kwargs"])
    assert text_of(prompt) == written
    assert list(prompt.tokens) == oracle().encode(written).ids
    assert len(prompt.learn) == len(prompt.tokens)


@pytest.mark.parametrize("case", json.loads((GOLDEN / "keye15_processor.json").read_text()), ids=lambda case: case["name"])
def test_slow_fast_videos_are_written_as_recorded(case):
    fps = case["ele"].get("fps")
    times = tuple(index / fps for index in range(case["num_frames"])) if fps else None
    clip = patches("video", *map(tuple, case["video_grid_thw"]), timestamps=times, fast=tuple(map(bool, case["frame_types"])))
    prompt = FRAMES.render([Message("user", (Image("a"), Video("v"), Text("?")))], [PICTURE, clip])
    text = text_of(prompt)
    inside = text.split("<|vision_start|>")[2].split("<|vision_end|>")[0]
    short = re.sub(r"(?:<\|video_pad\|>)+", lambda run: f"<|video_pad|>*{len(run.group()) // 13}", inside)
    assert short == case["prompt_between_vision_start_end"]
    assert list(prompt.tokens) == oracle().encode(text).ids
    frames = [span for span in prompt.spans if span.kind == "video"]
    assert [span.frame for span in frames] == list(range(case["num_frames"]))
    assert [span.grid for span in frames] == [(1, h, w) for t, h, w in case["video_grid_thw"] for _ in range(t)]
    assert {span.t_step for span in frames} == {0.0} and {span.media_id for span in frames} == {1}
    assert len({span.hash for span in frames}) == len(frames)
    pad = TOKENIZER.id("<|video_pad|>")
    for span in frames:
        assert set(prompt.tokens[span.start : span.end]) == {pad}
        assert prompt.tokens[span.start - 1] != pad and prompt.tokens[span.end] != pad


# spans


def test_spans_of_pictures_and_joint_videos():
    chat = [Message("user", (Text("a"), Image("i"), Video("v"), Video("w"), Image("j")))]
    odd = patches("video", (2, 2, 2), fps=3.0)
    plain = patches("video", (2, 2, 2))
    prompt = PREVIEW.render(chat, [PICTURE, odd, plain, PICTURE])
    third = float(np.float32(1 / 3.0) * np.float32(2))
    expected = [
        ("image", (1, 4, 6), 0, 0.0),
        ("video", (2, 2, 2), 1, third),
        ("video", (2, 2, 2), 2, 2.0),
        ("image", (1, 4, 6), 3, 0.0),
    ]
    assert [(span.kind, span.grid, span.media_id, span.t_step) for span in prompt.spans] == expected
    assert prompt.spans[0] == Span("image", prompt.spans[0].start, (1, 4, 6), 0, merge=2, hash=PICTURE.key)
    for span in prompt.spans:
        pad = TOKENIZER.id(f"<|{span.kind}_pad|>")
        assert set(prompt.tokens[span.start : span.end]) == {pad}
        assert prompt.tokens[span.start - 1] == TOKENIZER.id("<|vision_start|>")
        assert prompt.tokens[span.end] == TOKENIZER.id("<|vision_end|>")
    assert (
        sum(token in (TOKENIZER.id("<|image_pad|>"), TOKENIZER.id("<|video_pad|>")) for token in prompt.tokens) == 6 + 2 + 2 + 6
    )


BOTH = [Message("user", (Image("i"), Video("v")))]


@pytest.mark.parametrize(
    ("renderer", "media", "said"),
    [
        (PREVIEW, [], "holds 1 image and 1 video, but 0 images and 0 videos were prepared"),
        (PREVIEW, [PICTURE], "but 1 image and 0 videos"),
        (PREVIEW, [PICTURE, CLIP, CLIP], "but 1 image and 2 videos"),
        (PREVIEW, [CLIP, PICTURE], "another order .number 1 should be image, is video"),
        (PREVIEW, [PICTURE, patches("video", (1, 4, 4), (1, 2, 2))], "one grid .frames, h, w. per video"),
        (PREVIEW, [patches("image", (2, 4, 4)), CLIP], "one grid .1, h, w. per picture"),
        (PREVIEW, [patches("image", (1, 4, 3)), CLIP], "cannot be merged 2x2"),
        (PREVIEW, [patches("image", (1, 0, 2)), CLIP], "is empty"),
        (FRAMES, [PICTURE, patches("video", (2, 2, 2), timestamps=(0.0,))], "has 2 frames, but 1 timestamps"),
        (FRAMES, [PICTURE, patches("video", (2, 2, 2), fast=(True,) * 3)], "has 2 frames, but 3 fast"),
        (TEXT, [PICTURE, CLIP], "wrote placeholders for 0 images and 0 videos, but the chat holds 1 image and 1 video"),
    ],
)
def test_media_that_do_not_fit_are_named(renderer, media, said):
    with pytest.raises(MessageError, match=said):
        renderer.render(BOTH, media)


def test_a_vocabulary_without_frame_tokens_is_named():
    from tiny_vocab import spec

    made = spec()
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] != "<|frame|>"]
    with pytest.raises(CheckpointError, match=r"no token '<\|frame\|>'"):
        Renderer(Tokenizer(made), Template(KEYE_TEMPLATE), KEYE_1_5).render([Message("user", Video("v"))], [CLIP])


# the tokens of the rendered text, and no others

PIECES = st.sampled_from(
    ["\n", "\n\n", " ", "the", " the", "e\u0301", "漢", "👍🏽", "12", "\ue000", "\ue001", "assistant\n", "\\ue000", "'s"]
)
PLAIN = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>|"), max_size=4), max_size=6)
TURNS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), PLAIN.map("".join)), min_size=1, max_size=6
)


@settings(max_examples=100)
@given(TURNS, st.sampled_from([PREVIEW, FRAMES]), st.booleans())
def test_tokens_are_those_of_the_rendered_text(turns, renderer, generate):
    chat = [Message(role, text) for role, text in turns]
    rows = [{"role": role, "content": text} for role, text in turns]
    written = renderer.template.render(rows, add_generation_prompt=generate, add_vision_id=False)
    assert renderer.text(chat, add_generation_prompt=generate) == written
    prompt = renderer.render(chat, add_generation_prompt=generate)
    assert list(prompt.tokens) == oracle().encode(written).ids


@settings(max_examples=100)
@given(TURNS, st.booleans())
def test_what_is_learnt_is_what_the_assistant_wrote(turns, generate):
    import unicodedata

    chat = [Message(role, text) for role, text in turns]
    prompt = PREVIEW.render(chat, add_generation_prompt=generate)
    said = [unicodedata.normalize("NFC", text) for role, text in turns if role == "assistant"]
    found = learnt(prompt).split("<|im_end|>")
    assert len(found) == len(said) + 1 and found[-1] == ""
    for whole, got in zip(said, found, strict=False):
        # A newline at the front may share a token with the header's own; that token is not the model's to choose.
        assert whole.endswith(got) and not whole[: len(whole) - len(got)].strip("\n")
        if not whole.startswith("\n"):
            assert got == whole


def test_learnt_text_and_its_end():
    chat = [
        Message("system", "S"),
        Message("user", "q"),
        Message("assistant", "Yes."),
        Message("user", "why"),
        Message("assistant", "", reasoning="r"),
        Message("assistant", (Text("A"), ToolCall("f", '{"x": 1}')), reasoning="r"),
    ]
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    expected = ["Yes.", "<think>r</think>", f"<think>r</think><answer>A</answer>\n{call}", ""]
    assert learnt(PREVIEW.render(chat)).split("<|im_end|>") == expected
    assert not any(PREVIEW.render(chat[:2]).learn)
    prompt = PREVIEW.render(chat[:3], add_generation_prompt=False)
    assert text_of(prompt).endswith("Yes.<|im_end|>\n") and not prompt.learn[-1] and prompt.learn[-2]


def test_a_newline_that_joins_the_header_is_not_learnt():
    prompt = PREVIEW.render([Message("user", "q"), Message("assistant", "\nA")], add_generation_prompt=False)
    assert TOKENIZER.encode("\n\n")[0] in prompt.tokens
    assert learnt(prompt) == "A<|im_end|>"


def test_vision_tokens_are_never_learnt():
    chat = [Message("user", "draw"), Message("assistant", (Text("a"), Image("i"), Text("b"), Video("v")))]
    clip = patches("video", (2, 2, 2), timestamps=(0.0, 0.5), fast=(False, True))
    assert learnt(FRAMES.render(chat, [PICTURE, clip])) == "ab<|im_end|>"


def test_the_familys_template_for_text_leaves_old_thoughts_out():
    chat = [
        Message("user", "a"),
        Message("assistant", "<think>\nr\n</think>\n\nb"),
        Message("user", "c"),
        Message("assistant", "d", reasoning="s"),
    ]
    assert learnt(TEXT.render(chat)) == "b<|im_end|><think>\ns\n</think>\n\nd<|im_end|>"


def test_a_template_without_places_for_calls_and_thoughts_still_shows_them():
    bare = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    renderer = Renderer(TOKENIZER, Template(bare), KEYE_PREVIEW)
    chat = [Message("assistant", (Text("A"), ToolCall("f", '{"x": "<|im_end|>"}')), reasoning="r")]
    written = '<think>r</think><answer>A</answer>\n<tool_call>\n{"name": "f", "arguments": {"x": "<|im_end|>"}}\n</tool_call>'
    assert renderer.text(chat) == f"<|im_start|>assistant\n{written}<|im_end|>\n"
    assert list(renderer.render(chat).tokens).count(TOKENIZER.id("<|im_end|>")) == 1
    with pytest.raises(MessageError, match="no place for tools"):
        renderer.render(chat, tools=[{"name": "f"}])


def test_a_template_that_writes_turns_in_another_way_is_named():
    other = Renderer(TOKENIZER, Template("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"), KEYE_PREVIEW)
    assert text_of(other.render([Message("user", "q")])) == "[user]q"
    with pytest.raises(CheckpointError, match="writes 0 assistant turns for 1"):
        other.render([Message("user", "q"), Message("assistant", "a")])


# thinking


@pytest.mark.parametrize(("thinking", "suffix"), [("on", "/think"), ("off", "/no_think"), ("auto", "")])
def test_thinking_is_a_suffix_of_the_last_user_text(thinking, suffix):
    chat = [
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", (Text("c"), Image("i"), Text("d"), Image("j"))),
        Message("tool", "t"),
    ]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"c{picture}d{suffix}{picture}<|im_end|>" in PREVIEW.text(chat, thinking=thinking)
    assert PREVIEW.text(chat, thinking=thinking).count("think") == bool(suffix)
    assert f"user\n{picture}{suffix}<|im_end|>" in PREVIEW.text([Message("user", Image("i"))], thinking=thinking)
    assert PREVIEW.text([Message("user", "x" + suffix)], thinking=thinking).count("think") == bool(suffix)


def test_thinking_needs_a_user_message():
    with pytest.raises(MessageError, match="no user message"):
        PREVIEW.render([Message("system", "s")], thinking="on")
    with pytest.raises(MessageError, match="'maybe' is unknown"):
        PREVIEW.render([Message("user", "s")], thinking="maybe")
    with pytest.raises(MessageError, match="chat is empty"):
        PREVIEW.render([])


def test_numbers_of_media_run_across_turns():
    turn = Message("user", (Image("i"), Video("v"), Image("j")))
    text = PREVIEW.text([turn, Message("assistant", "a"), turn], add_vision_id=True)
    labels = ["Picture 1: ", "Video 1: ", "Picture 2: ", "Picture 3: ", "Video 2: ", "Picture 4: "]
    at = [text.index(label + "<|vision_start|>") for label in labels]
    assert at == sorted(at)


def test_a_chat_of_too_many_characters_is_named():
    with pytest.raises(MessageError, match="holds 5000000 characters"):
        PREVIEW.render([Message("user", "a" * 5_000_000)])


def test_a_chat_of_very_many_parts():
    chat = [Message("user", [Text("a")] * 10_000 + [Image("i")] * 2000), *[Message("user", "b")] * 2000]
    prompt = PREVIEW.render(chat, [PICTURE] * 2000, add_vision_id=True)
    assert len(prompt.spans) == 2000


def test_a_renderer_crosses_to_another_process():
    chat = [Message("user", (Image("i"), Text("hi"))), Message("assistant", "there")]
    again = pickle.loads(pickle.dumps(FRAMES))
    assert again.render(chat, [PICTURE], thinking="on") == FRAMES.render(chat, [PICTURE], thinking="on")
    assert hash(KEYE_1_5) != hash(KEYE_PREVIEW)


def test_the_room_loads_without_torch():
    code = "import sys, mirada.prompt.render, mirada.prompt.parse, mirada.records.wire; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


# time


def best_of(run, times=3):
    def once():
        begun = time.thread_time()
        run()
        return time.thread_time() - begun

    return min(once() for _ in range(times))


def test_rendering_is_linear():
    words = "the user's assistant 漢字 counts 12 lines,\n\n"
    small = best_of(lambda: PREVIEW.render([Message("user", words * 250)]))
    large = best_of(lambda: PREVIEW.render([Message("user", words * 4000)]))
    assert large < 16 * small * 4
    turns = [Message("user", "how many?"), Message("assistant", "three of them", reasoning="counting")]
    few = best_of(lambda: PREVIEW.render(turns * 25))
    many = best_of(lambda: PREVIEW.render(turns * 400))
    assert many < 16 * few * 4
    run = best_of(lambda: PREVIEW.render([Message("user", "<" * 20_000)]))
    longer = best_of(lambda: PREVIEW.render([Message("user", "<" * 320_000)]))
    assert longer < 16 * run * 4


def test_the_control_strings_of_the_tests_are_those_of_the_tokenizer():
    assert set(CONTROL) == set(TOKENIZER.control)
