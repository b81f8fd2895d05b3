from __future__ import annotations

import pytest

from mirada.errors import MessageError
from mirada.records.wire import messages_from_openai
from mirada.types import Image, Message, Text, ToolCall, Video


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def one(part):
    return messages_from_openai(user(part))[0].parts[0]


@pytest.mark.parametrize(
    ("part", "made"),
    [
        ("hi", Text("hi")),
        ({"type": "text", "text": "hi"}, Text("hi")),
        ({"text": "hi"}, Text("hi")),
        ({"type": "image", "image": "a.png"}, Image("a.png")),
        ({"image": "a.png"}, Image("a.png")),
        ({"type": "image", "image_url": "a.png"}, Image("a.png")),
        ({"type": "image_url", "image_url": "http://x/a.png"}, Image("http://x/a.png")),
        ({"type": "image_url", "image_url": {"url": "data:,", "detail": "high"}}, Image("data:,")),
        ({"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}, Image("data:,", max_pixels=512 * 512)),
        ({"image_url": {"url": "data:,", "detail": "low", "max_pixels": 9}}, Image("data:,", max_pixels=9)),
        ({"image_url": {"url": "a.png"}}, Image("a.png")),
        ({"image": "a.png", "min_pixels": 100, "max_pixels": 200.0}, Image("a.png", min_pixels=100, max_pixels=200)),
        ({"image_url": {"url": "a.png", "max_pixels": 9}}, Image("a.png", max_pixels=9)),
        ({"image": "a.png", "resized_height": 28, "resized_width": 56}, Image("a.png", resized_height=28, resized_width=56)),
        ({"image": "a.png", "max_pixels": None}, Image("a.png")),
        ({"image": b"bytes"}, Image(b"bytes")),
        ({"type": "video", "video": "a.mp4", "fps": 2}, Video("a.mp4", fps=2.0)),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}, "nframes": 8}, Video("a.mp4", nframes=8)),
        ({"type": "video_url", "video_url": "a.mp4"}, Video("a.mp4")),
        ({"video": ["1.png", "2.png"], "fps": 0.5}, Video(["1.png", "2.png"], fps=0.5)),
        (
            {"video": "v", "video_start": 0, "video_end": 2.5, "min_frames": 4, "max_frames": 8},
            Video("v", video_start=0.0, video_end=2.5, min_frames=4, max_frames=8),
        ),
        (
            {"video": "v", "total_pixels": 10**6, "min_frame_similarity": 0.9},
            Video("v", total_pixels=10**6, min_frame_similarity=0.9),
        ),
    ],
)  # fmt: skip
def test_parts(part, made):
    assert one(part) == made


def test_whole_chats():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    loose = {"function": {"name": "g", "arguments": {"é": 1}}}
    chat = [
        {"role": "developer", "content": "S", "name": None},
        {"role": "user", "content": ["a", {"image": "i"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call, loose], "refusal": None, "audio": None},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "assistant", "content": "A", "reasoning_content": "r", "refusal": None, "annotations": []},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "Never."}]},
        Message("user", "made already"),
    ]
    assert messages_from_openai(chat) == [
        Message("system", "S"),
        Message("user", ("a", Image("i"))),
        Message("assistant", (ToolCall("f", '{"x": 1}', "c1"), ToolCall("g", '{"é": 1}'))),
        Message("tool", "3", tool_call_id="c1"),
        Message("assistant", "A", reasoning="r"),
        Message("assistant", "No."),
        Message("assistant", "Never."),
        Message("user", "made already"),
    ]


BAD = [
    ("a string", "messages are a str"),
    ({"role": "user"}, "messages are a dict"),
    (["x"], "message 0 is a str"),
    ([{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}], "message 1 has the role 'bot'"),
    ([{"content": "b"}], "message 0 has the role None"),
    ([{"role": ["user"], "content": "b"}], "message 0 has the role"),
    ([{"role": "user"}], "message 0 has no content"),
    ([{"role": "user", "content": 3}], "content of message 0 is a int"),
    ([{"role": "user", "content": {"text": "a"}}], "content of message 0 is a dict"),
    ([{"role": "user", "contents": "a"}], "unknown key 'contents'. did you mean 'content'"),
    ([{"role": "user", "content": "a", "tool_calls": [{}]}], "only an assistant's"),
    ([{"role": "assistant", "tool_calls": "x"}], "tool_calls of message 0 are a str"),
    ([{"role": "assistant", "tool_calls": [1]}], "tool call 0 of message 0 is a int"),
    ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "names no function"),
    ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "argument": 1}}]}], "did you mean 'arguments'"),
    ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": b""}}}]}], "are no JSON"),
    ([{"role": "assistant", "content": "a", "reasoning": 3}], "reasoning of message 0 is a int"),
    ([{"role": "tool", "content": "a", "tool_call_id": 3}], "tool_call_id of message 0 is a int"),
    ([{"role": "user", "content": "a", "refusal": "no"}], "refusal that is none"),
    ([{"role": "assistant", "refusal": 3}], "refusal that is none"),
    (user({"image_url": {"url": "x", "detail": "tiny"}}), "auto, low, high, original"),
    (user({"video_url": {"url": "x", "detail": "low"}}), "unknown key 'detail'"),
    (user("a", 3), "part 1 of message 0 is a int"),
    (user({"type": "imag", "image": "x"}), "type 'imag'. did you mean 'image'"),
    (user({"type": ["image"], "image": "x"}), "has the type"),
    (user({"type": "image"}), "exactly one of"),
    (user({"img": "x"}), "unknown key 'img'. did you mean 'image'"),
    (user({"image": "x", "text": "y"}), "it has text and image"),
    (user({"type": "video", "image": "x"}), "type 'video' but holds 'image'"),
    (user({"type": "text", "text": 3}), "text of part 0 of message 0 is a int"),
    (user({"text": "x", "max_pixels": 3}), "unknown key 'max_pixels'"),
    (user({"image": ""}), "image of part 0 of message 0 is empty"),
    (user({"image": None}), "is empty"),
    (user({"video": []}), "is empty"),
    (user({"image_url": {"uri": "x"}}), "has no url"),
    (user({"image": "x", "max_pixel": 3}), "unknown key 'max_pixel'. did you mean 'max_pixels'"),
    (user({"image_url": {"url": "x", "fps": 3}}), "unknown key 'fps'"),
    (user({"image": "x", "max_pixels": "3"}), "max_pixels='3' of part 0"),
    (user({"image": "x", "max_pixels": True}), "max_pixels=True"),
    (user({"image": "x", "max_pixels": 1.5}), "a positive whole number"),
    (user({"image": "x", "max_pixels": 0}), "a positive whole number"),
    (user({"video": "x", "fps": float("nan")}), "fps=nan"),
    (user({"video": "x", "fps": 0}), "a positive number"),
    (user({"video": "x", "video_start": -1}), "at least 0"),
    (user({"video": "x", "fps": 1, "nframes": 4}), "both fps and nframes"),
]


@pytest.mark.parametrize(("messages", "said"), BAD)
def test_bad_chats_are_named(messages, said):
    with pytest.raises(MessageError, match=said) as caught:
        messages_from_openai(messages)
    assert caught.value.fix
