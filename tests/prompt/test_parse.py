from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.prompt.format import KEYE_PREVIEW
from mirada.prompt.parse import Parser, extract_answer, parse
from mirada.types import Text, ToolCall, joined_calls

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
F = ToolCall("f", '{"x": 1}', "call_0")


def joined(deltas):
    text = "".join(delta.text for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    return text, reasoning, joined_calls(call for delta in deltas for call in delta.tool_calls)


def whole(text, inside=None):
    parser = Parser(KEYE_PREVIEW, inside)
    return joined(parser.feed(text) + parser.close())


RULES = [  # reply, answer, reasoning, calls
    ("", "", "", ()),
    ("plain  answer\n", "plain  answer\n", "", ()),
    ("  \n indented\n\n", "  \n indented\n\n", "", ()),
    ("a < b and c </d> e", "a < b and c </d> e", "", ()),
    ("<think>r</think><answer>A</answer>", "A", "r", ()),
    ("\n<think>\n r \n</think>\n\n<answer>\n A \n</answer>\n", "A", "r", ()),
    ("<think>r</think>\n\nA\n", "A", "r", ()),
    ("<analysis>s</analysis>A b", "A b", "s", ()),
    ("<analysis>s</analysis>\n<think>r</think><answer>A</answer>", "A", "s\n\nr", ()),
    ("<analysis>s</analysis><think>\n</think><answer>A</answer>", "A", "s", ()),
    ("<think></think>A", "A", "", ()),
    ("<answer>A</answer>", "A", "", ()),
    ("<answer>A</answer> tail ", "A tail", "", ()),
    ("<answer>A\n</answer>tail", "A\ntail", "", ()),
    # still open at the end
    ("<think>r", "", "r", ()),
    ("<think>r</thin", "", "r</thin", ()),
    ("<answer>A", "A", "", ()),
    ("<answer>A</ans", "A</ans", "", ()),
    ("<thi", "<thi", "", ()),
    ("A <tool_ca", "A <tool_ca", "", ()),
    # in the wrong place: text
    ("say <think>x</think>", "say <think>x</think>", "", ()),
    ("</think>A", "</think>A", "", ()),
    ("A</answer>", "A</answer>", "", ()),
    ("A<answer>B</answer>", "A<answer>B</answer>", "", ()),
    ("<answer>A</answer><answer>B</answer>", "A<answer>B</answer>", "", ()),
    ("<answer><think>x</think></answer>", "<think>x</think>", "", ()),
    # nested: text of the block that is open
    ("<think>a<think>b</think>c</think>A", "c</think>A", "a<think>b", ()),
    ("<think>a<answer>b</answer></think>A", "A", "a<answer>b</answer>", ()),
    (f"<think>{CALL}</think>A", "A", CALL, ()),
    ("<analysis><think>a</analysis>A", "A", "<think>a", ()),
    # tool calls
    (CALL, "", "", (F,)),
    (f"<think>r</think>\n{CALL}\n", "", "r", (F,)),
    (f"Let me see.\n{CALL}", "Let me see.", "", (F,)),
    (f"a\n{CALL}\nb", "a\n\nb", "", (F,)),
    (f"<answer>a{CALL}</answer>", "a", "", (F,)),
    (CALL + CALL, "", "", (F, ToolCall("f", '{"x": 1}', "call_1"))),
    (f"{CALL}<think>r</think>A", "A", "r", (F,)),
    ('<tool_call>{"name": "f"}</tool_call>', "", "", (ToolCall("f", "{}", "call_0"),)),
    ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", "", (F,)),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}}', "", "", (F,)),
    ('<tool_call>{"name": "é", "arguments": ["\\ud800"]}</tool_call>', "", "", (ToolCall("é", '["\\ud800"]', "call_0"),)),
    # broken calls: text, nothing lost
    ('<tool_call>{"name": "f"</tool_call>', '<tool_call>{"name": "f"</tool_call>', "", ()),
    ("<tool_call>\n[1]\n</tool_call>", "<tool_call>\n[1]\n</tool_call>", "", ()),
    ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', "", ()),
    ('<tool_call>{"name": ""}</tool_call>', '<tool_call>{"name": ""}</tool_call>', "", ()),
    ('<tool_call>{"name": "\\ud800"}</tool_call>', '<tool_call>{"name": "\\ud800"}</tool_call>', "", ()),
    ("<tool_call></tool_call>", "<tool_call></tool_call>", "", ()),
    # a call from where its arguments begin: they are what was written
    ('<tool_call>{"name": "f", "arguments": {"x": 1', "", "", (ToolCall("f", '{"x": 1', "call_0"),)),
    ('<tool_call>{"name": "f", "arguments": {"x": }]}</tool_call>.', "]}.", "", (ToolCall("f", '{"x": }', "call_0"),)),
    ('<tool_call>{"name":"f","arguments":{"x":  "\\"}"}, "id": 1}</tool_call>', "", "",
     (ToolCall("f", '{"x":  "\\"}"}', "call_0"),)),
    ('<tool_call>{"name": "f", "arguments": {"x": [{}, {"y": "{"}]}} left </tool_call>', "} left", "",
     (ToolCall("f", '{"x": [{}, {"y": "{"}]}', "call_0"),)),
    ('<tool_call>{"arguments": {"x":1}, "name": "f"}</tool_call>', "", "", (F,)),
    (f'<tool_call>{{"name": "f{"o" * 600}", "arguments": {{"x": 1}}}}</tool_call>', "", "",
     (ToolCall("f" + "o" * 600, '{"x": 1}', "call_0"),)),
    ('<tool_call>{"name": "f", "arguments": {"x": "\\', "", "", (ToolCall("f", '{"x": "\\', "call_0"),)),
    # a tag inside a string of JSON is no tag
    ('<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>A', "A", "",
     (ToolCall("f", '{"x": "</tool_call>"}', "call_0"),)),
    ('<tool_call>{"arguments": {"x": "a\\"</tool_call>\\\\"}, "name": "f"}</tool_call>', "", "",
     (ToolCall("f", '{"x": "a\\"</tool_call>\\\\"}', "call_0"),)),
    ('<tool_call>\n{"name": "f", "arguments": {"x": ["<tool_call>", {"y": "</tool_call>"}]}}\n</tool_call> b', "b", "",
     (ToolCall("f", '{"x": ["<tool_call>", {"y": "</tool_call>"}]}', "call_0"),)),
    # what cannot be a string of JSON hides none
    ('<tool_call>{"name": "f", "arguments": {"x": "a\n</tool_call>b', "b", "", (ToolCall("f", '{"x": "a\n', "call_0"),)),
    ('<tool_call>it "is</tool_call> no "call', '<tool_call>it "is</tool_call> no "call', "", ()),
    ('<tool_call>{"name": "f", "arguments": {}} "x</tool_call>y"', '} "xy"', "", (ToolCall("f", "{}", "call_0"),)),
    (f"a\n<tool_call>no</tool_call>\n{CALL}", "a\n<tool_call>no</tool_call>", "", (F,)),
    ("<tool_call>no</tool_call><think>x</think>", "<tool_call>no</tool_call><think>x</think>", "", ()),
    ('<tool_call>{"name": "f', '<tool_call>{"name": "f', "", ()),
    (f"<tool_call>{CALL}</tool_call>", f"<tool_call>{CALL}</tool_call>", "", ()),
    ("<tool_call>" + "[" * 5000 + "</tool_call>", "<tool_call>" + "[" * 5000 + "</tool_call>", "", ()),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "answer", "reasoning", "calls"), RULES)
def test_rules(reply, answer, reasoning, calls):
    assert whole(reply) == (answer, reasoning, calls)


@pytest.mark.parametrize("reply", [row[0] for row in RULES if len(row[0]) < 200])
def test_every_rule_at_every_split_point(reply):
    expected = whole(reply)
    for at in range(len(reply) + 1):
        parser = Parser(KEYE_PREVIEW)
        assert joined(parser.feed(reply[:at]) + parser.feed(reply[at:]) + parser.close()) == expected, at
    parser = Parser(KEYE_PREVIEW)
    assert joined([delta for char in reply for delta in parser.feed(char)] + parser.close()) == expected


TAGS = [
    text
    for tags in (KEYE_PREVIEW.think, KEYE_PREVIEW.analysis, KEYE_PREVIEW.answer, KEYE_PREVIEW.tool_call)
    for text in (tags.open, tags.close)
]
PIECES = st.sampled_from(
    [
        *TAGS,
        CALL,
        '{"name": "g"}',
        "é",
        "ü ö",
        '<tool_call>{"name": "h", "arguments": {',
        '"x\\"',
        "}",
        " ",
        "\n",
        "<",
        "</",
        ">",
        "<think",
        "answer>",
        "<|",
    ]
)


@settings(max_examples=100)
@given(
    st.lists(PIECES, max_size=12).map("".join),
    st.lists(st.integers(1, 9), max_size=60),
    st.sampled_from([None, "think", "answer"]),
)
def test_stream_equals_whole(reply, sizes, inside):
    parser = Parser(KEYE_PREVIEW, inside)
    deltas, at = [], 0
    for size in [*sizes, len(reply)]:
        deltas += parser.feed(reply[at : at + size])
        at += size
    assert joined(deltas + parser.close()) == whole(reply, inside)


@settings(max_examples=100)
@given(st.lists(PIECES, max_size=12).map("".join), st.sampled_from([None, "think", "answer"]))
def test_no_content_is_lost(reply, inside):
    text, reasoning, calls = whole(reply, inside)
    told = "".join((text, reasoning, *(call.arguments for call in calls)))
    for char in "éüö":
        assert told.count(char) == reply.count(char)
    for name in "fgh":
        assert told.count(f'"{name}"') + sum(call.name == name for call in calls) == reply.count(f'"{name}"')


@settings(max_examples=100)
@given(st.text(max_size=40))
def test_replies_without_tags_come_through(reply):
    if not any(tag in reply for tag in TAGS):
        assert whole(reply) == (reply, "", ())


def test_text_is_given_out_as_soon_as_it_is_certain():
    parser = Parser(KEYE_PREVIEW)
    assert parser.feed("<") == [] and parser.feed("thi") == []
    assert [delta.text for delta in parser.feed("s is")] == ["<this is"]
    assert parser.feed(" ") == []
    assert [delta.text for delta in parser.feed("A<")] == [" A"]
    parser = Parser(KEYE_PREVIEW)
    assert [delta.reasoning for delta in parser.feed("<think>one two")] == ["one two"]
    assert joined(parser.feed(f" </think>x{CALL}y")) == ("xy", "", (F,))


def test_a_call_is_told_while_it_is_written():
    parser = Parser(KEYE_PREVIEW)
    assert parser.feed('<tool_call>\n{"name": "f", "arguments": ') == []
    told = [call for char in '{"x": "a}"}}\n</tool_call>' for delta in parser.feed(char) for call in delta.tool_calls]
    assert told == [ToolCall("f", "{", "call_0"), *(ToolCall("", char) for char in '"x": "a}"}')]


def test_tags_that_do_not_count_are_text():
    parser = Parser(KEYE_PREVIEW, kinds=("think",))
    reply = f"<think>r</think><answer>{CALL}"
    assert joined(parser.feed(reply) + parser.close()) == (f"<answer>{CALL}", "r", ())
    parser = Parser(KEYE_PREVIEW, kinds=())
    assert joined(parser.feed(" <think>" + reply) + parser.close()) == (" <think>" + reply, "", ())


def test_a_reply_is_full_after_so_many_calls():
    for cut in range(len(CALL) + 9):
        parser, reply = Parser(KEYE_PREVIEW, most_calls=1), f"so {CALL}\n{CALL} on"
        assert joined(parser.feed(reply[:cut]) + parser.feed(reply[cut:]) + parser.close()) == ("so", "", (F,))
        assert parser.full


def test_a_block_that_the_prompt_opened():
    assert whole("r\n</think>\nA", inside="think") == ("A", "r", ())


def test_parse_makes_a_message():
    message = parse(f"<think>r</think>A {CALL}", KEYE_PREVIEW)
    assert (message.role, message.parts, message.reasoning) == ("assistant", (Text("A"), F), "r")
    assert parse("", KEYE_PREVIEW).parts == ()


def test_parsing_is_linear():
    def seconds(reply, size):
        begun = time.thread_time()
        parser = Parser(KEYE_PREVIEW)
        for at in range(0, len(reply), size):
            parser.feed(reply[at : at + size])
        parser.close()
        return time.thread_time() - begun

    for unit in ("<", " ", "<tool_call>", CALL, "a ", "<tool_call>{"):
        for size in (7, 10**9):
            small = min(seconds(unit * 600, size) for _ in range(3))
            # The least of a few: a neighbour on the same core slows one of them.
            assert min(seconds(unit * 6000, size) for _ in range(3)) < 10 * small * 4 + 0.02, (unit, size)


# answers as they are graded


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("A", "A"),
        (" A ", "A"),
        ("<analysis>x</analysis>A", "A"),
        ("<think>x</think><answer>A</answer>", "A"),
        ("<think>x <answer>no</answer></think><answer>A</answer><answer> B </answer>", "B"),
        ("<think>x</think><answer>so \\boxed{1} or \\boxed{\\frac{1}{2}} it is</answer>", "\\frac{1}{2}"),
        ("so \\boxed{C}.", "C"),
        ("\\boxed{open {brace}", "\\boxed{open {brace}"),
        ("<think>\\boxed{1}</think>none", "none"),
        ("<analysis>a</analysis><think>b</think> c", "c"),
        ("<answer>open", "<answer>open"),
        ("", ""),
    ],
)
def test_extract_answer(reply, answer):
    assert extract_answer(reply) == answer


def test_arguments_are_json_where_the_model_wrote_json():
    broken = ['{"x": "a\n', '{"x": 1', '{"x": }', '{"x": "\\']
    for reply, _, _, calls in RULES:
        for call in calls:
            assert call.arguments in broken or json.loads(call.arguments) is not None, reply
