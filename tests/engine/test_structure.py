"""Answers of a promised form through whole engines: a random model under a mask keeps to it, whatever it would rather say."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny

from mirada import VLM, Message, Sampling
from mirada.engine import scheduler as scheduling
from mirada.engine import structure
from mirada.engine.structure import Structures
from mirada.engine.thought import AfterThought
from mirada.errors import RequestFailed, SettingsError
from mirada.prompt.format import KEYE_1_5, KIMI, QWEN2_VL, Tags
from mirada.prompt.parse import Parser
from mirada.prompt.spelling import BYTE_TO_CHAR
from mirada.prompt.tokenizer import Tokenizer
from mirada.types import joined_calls

ASK = [Message("user", "Say it in JSON.")]
WORD = {"type": "string", "maxLength": 8}
SCHEMAS = {
    "enum": {"enum": ["a", 'b"\\', "é☃", 3, None]},
    "nested": {
        "type": "object", "required": ["name", "at"], "additionalProperties": False,
        "properties": {"name": WORD, "at": {"type": "object", "required": ["x"], "additionalProperties": False,
                                            "properties": {"x": {"type": "integer", "minimum": -5, "maximum": 99}}}},
    },
    "arrays": {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "minItems": 1,
               "maxItems": 3},
    "numbers": {"type": "array", "items": False, "minItems": 2, "prefixItems": [
        {"type": "number", "minimum": 0.5, "maximum": 2}, {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}]},
    "pattern": {"type": "object", "required": ["id"], "additionalProperties": False,
                "properties": {"id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}}},
    "defs": {"$ref": "#/$defs/pair", "$defs": {
        "pair": {"type": "object", "required": ["l", "r"], "additionalProperties": False,
                 "properties": {"l": {"$ref": "#/$defs/leaf"}, "r": {"$ref": "#/$defs/leaf"}}},
        "leaf": {"anyOf": [{"type": "null"}, WORD]}}},
    "optional": {"type": "object", "properties": {"a": {"const": 1}, "b": {"type": "null"}}, "additionalProperties": False},
    "format": {"type": "string", "format": "date"},
}  # fmt: skip


def tool(name, parameters=None):
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TIGHT = {"x-guidance": {"whitespace_flexible": False}}
TOOLS = [
    tool("look", SCHEMAS["nested"] | TIGHT),
    tool("now"),
    tool('odd "é', {"properties": {"x": WORD}, "additionalProperties": False} | TIGHT),
]


def without_control(vlm, tokens):
    control = set(vlm.parts.renderer.tokenizer.control.values())
    return not control & set(tokens[:-1]) and (tokens[-1] not in control or tokens[-1] in vlm.parts.eos)


def tight(schema):
    """Without white space between the parts, which random models like too well."""
    return schema | TIGHT


def check(text, schema):
    jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


def test_json_of_random_models_is_valid_under_its_schema(vlm):
    """Every family: the text is what the schema says, and no control token is in it."""
    names = [*SCHEMAS, "nested"]
    ways = [
        Sampling(json_schema=tight(SCHEMAS[name]), max_tokens=200, temperature=2.0, seed=seed)
        for seed, name in enumerate(names)
    ]
    ways[-1] = Sampling(json_schema=tight(SCHEMAS["nested"]), max_tokens=200)  # greedy
    for name, output in zip(names, vlm.generate([ASK] * len(ways), ways, thinking=quiet(vlm)), strict=True):
        assert output.error is None, output.error
        if output.message.reasoning:  # this family cannot be told not to think
            continue
        assert output.finish == "stop", (name, output.message.text)
        check(output.message.text, SCHEMAS[name])
        assert not re.search(r"\s", re.sub('"(\\\\.|[^"])*"', "", output.message.text))
        assert without_control(vlm, output.tokens)


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_allowed_leads_to_valid_json(engines, name):
    """Without a model: one that finds all that is allowed equally likely."""
    for engine in engines.values():
        tokenizer, eos = engine.parts.renderer.tokenizer, engine.parts.eos
        made = Structures(tokenizer, QWEN2_VL, eos)
        for seed in range(5):
            check(
                drive(made.guide(Sampling(json_schema=SCHEMAS[name])), tokenizer, eos, np.random.default_rng(seed)),
                SCHEMAS[name],
            )


def has(vlm, mode):
    return mode in dict(vlm.parts.renderer.format.thinking_suffix)


@pytest.fixture(scope="module")
def qwen(engines):
    return engines["qwen2_vl"]


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.3, 1.0, 5.0]),
    top_p=st.sampled_from([None, 0.5]),
    penalty=st.sampled_from([1.0, 2.0]),
    name=st.sampled_from(sorted(SCHEMAS)),
    bias=st.sampled_from([None, 20.0, -50.0]),
)
def test_no_way_of_sampling_leaves_the_schema(qwen, seed, temperature, top_p, penalty, name, bias):
    quote = qwen.parts.renderer.tokenizer.encode('"')[0]
    way = Sampling(
        json_schema=tight(SCHEMAS[name]), max_tokens=200, seed=seed, temperature=temperature, top_p=top_p,
        repetition_penalty=penalty, frequency_penalty=penalty - 1,
        logit_bias=None if bias is None else {quote: bias}, logprobs=1, max_repeats=None,
    )  # fmt: skip
    output = qwen.submit(ASK, way).result()
    assert output.finish == "stop", output
    check(output.message.text, SCHEMAS[name])
    assert len(output.logprobs) == len(output.tokens)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"regex": "[A-F]{2}[0-9]{4}"}, "[A-F]{2}[0-9]{4}"),
        ({"regex": "^(ab|cd)$"}, "ab|cd"),
        ({"regex": r"(?s).{6}"}, "(?s).{6}"),
        ({"choice": ["yes", "yes, sir", 'a"\\\n\t\x7fé☃', "{x}", "/*"]}, 'yes|yes, sir|a"\\\\\n\t\x7fé☃|\\{x\\}|/\\*'),
        ({"grammar": 'start: "<" NAME ("," NAME)? ">"\nNAME: /[a-z]{1,4}/'}, "<[a-z]{1,4}(,[a-z]{1,4})?>"),
        ({"grammar": 'start: %json {"enum": [1, "a"]} "!"'}, '(1|"a")!'),
    ],
    ids=str,
)
def test_expressions_choices_and_grammars(qwen, form, expected):
    found = set()
    for seed in range(4):
        output = qwen.submit(ASK, Sampling(**form, max_tokens=60, temperature=3.0, seed=seed)).result()
        assert re.fullmatch(expected, output.message.text) and output.finish == "stop"
        assert without_control(qwen, output.tokens)
        found.add(output.message.text)
    assert len(found) > 1


def test_the_end_may_come_only_where_the_form_is_whole(qwen):
    """Ends are most wanted everywhere: the reply is the shortest there is."""
    ends = dict.fromkeys(qwen.parts.eos, 100.0)
    for form, text in (({"regex": "a{3}b*"}, "aaa"), ({"json_schema": {"type": "array", "minItems": 0}}, "[]")):
        output = qwen.submit(ASK, Sampling(**form, logit_bias={**ends, **_bias(qwen, "]ab", 50)}, max_tokens=9)).result()
        assert output.message.text == text or (text == "aaa" and set(output.message.text) == {"a"})
        assert output.finish == "stop"


def _bias(vlm, letters, bias):
    return {vlm.parts.renderer.tokenizer.encode(letter)[0]: float(bias) for letter in letters}


def test_a_reply_that_is_cut_off_is_the_beginning_of_one(qwen):
    way = {"json_schema": tight(SCHEMAS["nested"]), "temperature": 2.0, "seed": 5}
    whole = qwen.submit(ASK, Sampling(**way, max_tokens=200)).result()
    lengths = range(1, len(whole.tokens), 4)
    handles = [qwen.submit(ASK, Sampling(**way, max_tokens=most)) for most in lengths]
    for most, handle in zip(lengths, handles, strict=True):
        cut = handle.result()
        assert cut.finish == "length" and cut.tokens == whole.tokens[:most]
        assert whole.message.text.startswith(cut.message.text.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_stop_strings_cut_it_too(qwen):
    output = qwen.submit(ASK, Sampling(regex="a{2}[0-9]stop[0-9]{20}", stop=("stop",), max_tokens=60)).result()
    assert re.fullmatch("aa[0-9]", output.message.text) and output.finish == "stop"


def test_guided_and_free_replies_share_steps(qwen):
    """Drafts of loops and neighbours change nothing: each reply is the one that it is alone."""
    ways = [Sampling(json_schema=tight(SCHEMAS["nested"]), max_tokens=60), Sampling(max_tokens=60, max_repeats=None)]
    ways += [Sampling(regex="(ab){20}", max_tokens=60)]
    alone = [qwen.submit(ASK, way).result().tokens for way in ways]
    together = [handle.result().tokens for handle in [qwen.submit(ASK, way) for way in ways]]
    assert together == alone


def test_a_preempted_reply_goes_on_in_its_form(tiny_directories, qwen, monkeypatch):
    """Three that nearly fill a block each and outgrow it, with room for four."""
    monkeypatch.setattr(scheduling, "ROOM_TO_GROW", 1)
    render = qwen.parts.renderer.render
    chats = [[Message("user", letter * 400)] for letter in "abc"]
    chats = [[Message("user", chat[0].text[: 400 - len(render(chat).tokens) + 245])] for chat in chats]
    schema = {"type": "array", "items": WORD, "minItems": 5, "maxItems": 5}
    ways = [Sampling(json_schema=tight(schema), max_tokens=200, seed=seed, temperature=1.5) for seed in range(3)]
    expected = qwen.generate(chats, ways)
    for output in expected:
        check(output.message.text, schema)
    room = {"cache_bytes": 4 * qwen._engine.engine.runner.cache.bytes_for(1), "prefix_cache_bytes": 0}
    with VLM(tiny_directories["qwen2_vl"], device="cpu", engine=room) as small:
        outputs = small.generate(chats, ways)
        assert small.stats()["preemptions"] > 0
    assert [output.tokens for output in outputs] == [output.tokens for output in expected]


def test_a_head_larger_than_the_tokenizer_says_nothing_beyond_it(tmp_path, qwen):
    size = qwen.parts.model.config.text.vocab_size
    directory = make_tiny(tmp_path, "qwen2_vl", seed=7, vocab_size=size + 37)
    with VLM(directory, device="cpu") as larger:
        beyond = {token: 100.0 for token in range(larger.parts.renderer.tokenizer.vocab_size, size + 37)}
        assert len(beyond) >= 37
        output = larger.submit(ASK, Sampling(regex="[a-z]{9}", logit_bias=beyond, max_tokens=20)).result()
        assert re.fullmatch("[a-z]{9}", output.message.text)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"json_schema": {"type": "objekt"}}, "json_schema cannot be kept to: Invalid type: objekt"),
        ({"json_schema": {"not": {"type": "null"}}}, "not"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"$ref": "#/$defs/none"}}, "does not exist"),
        ({"json_schema": {"$ref": "http://127.0.0.1/x"}}, "not present"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"json_schema": False}, "nothing fulfils"),
        ({"json_schema": {"type": {1, 2}}}, "no JSON"),
        ({"json_schema": {"x-guidance": 3}}, "x-guidance is a int"),
        ({"json_schema": {"x-guidance": {"lenience": 1}}}, "lenience"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": "\ud800"}, "surrogate"),
        ({"regex": "(" * 20000 + "a" + ")" * 20000}, "nest"),
        ({"choice": ["\ud800"]}, "surrogate"),
        ({"grammar": "no grammar"}, "grammar cannot be kept to"),
        ({"grammar": "start: x"}, "unknown name"),
        ({"grammar": "start: start"}, "cannot be kept to"),
        ({"grammar": 'start: <|image_pad|> "a"'}, "unknown special token"),
        ({"grammar": 'start: <|im_start|>'}, "unknown special token"),
        ({"grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000}, "deeply"),
        ({"regex": "a", "grammar": "start: x"}, "two forms"),
        ({"regex": 3}, "sampling.regex is 3"),
        ({"choice": []}, "at least one"),
        ({"choice": "yes"}, "sampling.choice is 'yes'"),
        ({"json_schema": [1]}, "is a list"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_form_that_cannot_be_kept_to_is_said_and_nothing_dies(qwen, form, words):
    with pytest.raises(SettingsError, match=words):
        qwen.ask("Say it.", **form)
    assert qwen.ask("Say it.", choice=["alive"]) == "alive"


def test_a_schema_nested_too_deeply_is_said(qwen):
    schema: dict = {"type": "null"}
    for _ in range(600):
        schema = {"type": "array", "items": schema}
    with pytest.raises(SettingsError, match=r"recursion|nest"):
        qwen.guide({"json_schema": schema})


def test_control_tokens_that_a_grammar_names_stay_forbidden(qwen):
    """They are none of a caller's text, however a grammar asks for them; an end is one only where the form is whole."""
    pad = qwen.parts.renderer.tokenizer.id("<|image_pad|>")
    for token in (f"<[{pad}]>", "<|im_end|>"):
        output = qwen.submit(ASK, Sampling(grammar=f'start: "a" {token} "b"', max_tokens=5)).result()
        assert isinstance(output.error, RequestFailed) and "allows no token" in str(output.error)


def test_a_pydantic_model_is_a_schema(qwen):
    import pydantic  # the openai client brings it

    class Sign(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        word: str = pydantic.Field(max_length=5)
        lines: list[int] = pydantic.Field(max_length=2)

    for seed in range(2):
        text = qwen.ask("Read it.", json_schema=Sign, temperature=2.0, seed=seed, max_tokens=200)
        Sign.model_validate_json(text)


def test_white_space_is_bounded(qwen):
    """What a weak model would indent for ever comes to an end."""
    spaces = {
        t: 80.0 for t in range(qwen.parts.renderer.tokenizer.vocab_size) if qwen.parts.renderer.tokenizer.decode([t]).isspace()
    }
    output = qwen.submit(
        ASK, Sampling(json_schema=SCHEMAS["nested"], logit_bias=spaces, max_tokens=900, max_repeats=None)
    ).result()
    assert output.finish == "stop"
    check(output.message.text, SCHEMAS["nested"])
    assert 30 < max(map(len, re.findall(r"\s+", output.message.text))) <= 40


def test_grammars_are_kept_and_their_number_is_bounded(qwen, monkeypatch):
    made = Structures(qwen.parts.renderer.tokenizer, QWEN2_VL, qwen.parts.eos)
    compiled = []
    check = made._checked
    monkeypatch.setattr(made, "_checked", lambda *given: compiled.append(given[0]) or check(*given))
    for number in (1, 1, 2, 1):
        made.guide(Sampling(regex=f"a{{{number}}}"))
    assert len(compiled) == 2
    for number in range(structure.KEPT + 9):
        made.guide(Sampling(regex=f"a{{{number}}}b"))
    assert len(made._kept) == structure.KEPT
    monkeypatch.setattr(structure, "KEPT_CHARS", 10)
    made.guide(Sampling(regex="abc"))
    assert len(made._kept) == 1


def test_a_grammar_that_compiles_long_holds_up_only_those_who_want_it(qwen, monkeypatch):
    made = Structures(qwen.parts.renderer.tokenizer, QWEN2_VL, qwen.parts.eos)
    check, begun, go, compiled = made._checked, threading.Event(), threading.Event(), []

    def checked(what, grammar, control):
        compiled.append(grammar)
        if "slow" in grammar:
            begun.set()
            assert go.wait(20)
        return check(what, grammar, control)

    made.guide(Sampling(choice=("kept",)))
    monkeypatch.setattr(made, "_checked", checked)
    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(made.guide, Sampling(choice=("slow",))) for _ in range(2)]
        try:
            assert begun.wait(20)
            for text in ("kept", "fresh"):
                assert pool.submit(made.guide, Sampling(choice=(text,))).result(10).allows
            assert not any(one.done() for one in slow)
        finally:
            go.set()
        guides = [one.result(20) for one in slow]
    assert len(compiled) == 2 and guides[0] is not guides[1]
    monkeypatch.setattr(made, "_checked", check)
    for _ in range(2):  # one that failed is nobody's to wait for
        with pytest.raises(SettingsError):
            made.guide(Sampling(regex="("))


def test_tools_are_compiled_once_however_many_there_are(qwen, monkeypatch):
    made = Structures(qwen.parts.renderer.tokenizer, QWEN2_VL, qwen.parts.eos)
    compiled = []
    check = made._checked
    monkeypatch.setattr(made, "_checked", lambda *given: compiled.append(given[0]) or check(*given))
    names = [f"f{number}" for number in range(structure.KEPT + 9)]
    tools = [{"type": "function", "function": {"name": name, "parameters": {"title": name}}} for name in names]
    for _ in range(3):
        made.guide(Sampling(), tools=tools, tool_choice="required")
    assert len(compiled) == len(tools) + 1
    wrong = {"type": "function", "function": {"name": "g", "parameters": {"not": {}}}}
    with pytest.raises(SettingsError, match="the tool 'g'"):
        made.guide(Sampling(), tools=[*tools, wrong], tool_choice="required")


def test_a_panic_is_an_error_of_its_grammar_alone():
    class PanicException(BaseException):
        pass

    with pytest.raises(SettingsError, match="regex cannot be kept to: index out of bounds"), structure._panics("regex"):
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), structure._panics("regex"):
        raise KeyboardInterrupt


# tools


@pytest.mark.parametrize("several", [False, True])
def test_required_calls_are_calls_of_the_tools(vlm, several):
    if not vlm.parts.renderer.template.knows("tools"):
        vlm = with_tools(vlm)
    ways = [Sampling(max_tokens=150, temperature=2.0, seed=seed) for seed in range(2)]
    handles = [
        vlm.submit(ASK, way, tools=TOOLS, tool_choice="required", parallel_tool_calls=several, thinking=quiet(vlm))
        for way in ways
    ]
    for handle in handles:
        output = handle.result()
        assert output.error is None, output.error
        if output.message.reasoning:
            continue
        assert output.finish == "tool_calls" or (several and output.finish in ("length", "repetition")), output
        calls = output.message.tool_calls
        assert calls and (several or len(calls) == 1)
        assert output.message.text == "" or output.finish != "tool_calls"  # a call that is cut off before its arguments
        for call in calls[: None if output.finish == "tool_calls" else -1]:
            _check_call(call)
        pieces = [piece for delta in handle for piece in delta.tool_calls]
        assert joined_calls(pieces) == calls and len(pieces) > len(calls)


def with_tools(vlm):
    pytest.skip("its template takes no tools")


def quiet(vlm):
    return "off" if has(vlm, "off") else "auto"


def _check_call(call):
    schemas = {
        "look": SCHEMAS["nested"],
        "now": {"const": {}},
        'odd "é': {"type": "object", **TOOLS[2]["function"]["parameters"]},
    }
    jsonschema.validate(json.loads(call.arguments), schemas[call.name])


FORMS = {"qwen2_vl": QWEN2_VL, "kimi_vl": KIMI}


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(
    ("choice", "names"), [("required", {"look", "now", 'odd "é'}), ({"name": "look"}, {"look"})], ids=("required", "named")
)
def test_calls_follow_the_family_s_own_form(engines, kind, choice, names):
    """At random under the guide alone, without a model: what comes is read as calls by the parser, and by nothing else."""
    engine, found = engines[kind], set()
    tokenizer = engine.parts.renderer.tokenizer
    made = Structures(tokenizer, FORMS[kind], engine.parts.eos)
    for seed in range(12):
        guide = made.guide(Sampling(), "off", TOOLS, choice)
        text = drive(guide, tokenizer, engine.parts.eos, np.random.default_rng(seed))
        parser = Parser(FORMS[kind])
        deltas = parser.feed(text) + parser.close()
        calls = joined_calls(call for delta in deltas for call in delta.tool_calls)
        assert calls and not "".join(delta.text for delta in deltas), text
        assert not isinstance(choice, dict) or len(calls) == 1
        for call in calls:
            _check_call(call)
            found.add(call.name)
    assert found == names


def drive(guide, tokenizer, eos, random, most=2000):
    """What a model says that finds all that is allowed equally likely."""
    return tokenizer.decode(drive_tokens(guide, tokenizer, eos, random, most))


def drive_tokens(guide, tokenizer, eos, random, most=2000):
    said = []
    while not guide.finished and len(said) < most:
        words = np.zeros(-(-tokenizer.vocab_size // 32) + 1, np.int32)
        guide.mask(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        assert len(allowed) and allowed.max() < tokenizer.vocab_size
        forced = guide.forced()
        assert not forced or forced[0] in allowed
        token = int(random.choice(allowed))
        guide.accept(token)
        if token not in eos:
            said.append(token)
    return said


def test_a_tool_cannot_name_control_tokens(engines):
    engine = engines["qwen2_vl"]
    tokenizer = engine.parts.renderer.tokenizer
    odd = tool("<|im_start|>")
    guide = Structures(tokenizer, QWEN2_VL, engine.parts.eos).guide(Sampling(), "off", [odd], "required")
    said = drive_tokens(guide, tokenizer, engine.parts.eos, np.random.default_rng(0))
    assert '"name": "<|im_start|>"' in tokenizer.decode(said)
    control = set(tokenizer.control.values()) - {tokenizer.control.get(tag) for tag in QWEN2_VL.tags}
    assert not control & set(said)


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        (TOOLS, "maybe", "unknown"),
        ([], "required", "no tools"),
        (TOOLS, {"name": "lok"}, "did you mean 'look'"),
        (TOOLS, {"function": {}}, "unknown"),
        ([{"type": "function"}], "required", "names no function"),
        ([tool("f", {"type": "nope"})], "required", "parameters of the tool 'f' cannot be kept to: Invalid type"),
        ([tool("f", {"not": {}})], {"name": "f"}, "not"),
        ([tool("f", [1])], "required", "are a list"),
    ],
    ids=str,
)
def test_tools_that_cannot_be_kept_to(qwen, tools, choice, words):
    with pytest.raises(SettingsError, match=words):
        qwen.guide(tools=tools, tool_choice=choice)


def test_a_form_and_a_call_cannot_both_be(qwen):
    with pytest.raises(SettingsError, match="both say"):
        qwen.guide({"regex": "a"}, tools=TOOLS, tool_choice="required")
    assert qwen.guide(tools=TOOLS) is None and qwen.guide() is None


# reasoning first


@pytest.fixture(scope="module")
def keye(engines):
    return engines["KeyeVL1_5"]


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_reasoning_comes_first_and_is_free(keye, budget):
    """``thinking='on'`` opens a block; what it holds is up to the model, and the budget closes it, even inside a character."""
    for seed in range(2):
        way = Sampling(json_schema=tight(SCHEMAS["nested"]), thinking_budget=budget, temperature=3.0, seed=seed, max_tokens=500)
        output = keye.submit(ASK, way, thinking="on").result()
        assert output.error is None, output.error
        assert bool(output.message.reasoning.strip()) <= (budget > 0) and output.finish == "stop"
        check(output.message.text, SCHEMAS["nested"])
        assert output.raw.startswith(("<think>", "<analysis>"))


def test_without_thinking_the_answer_is_at_once_there(keye):
    output = keye.submit(ASK, Sampling(regex="a{5}", max_tokens=9), thinking="off").result()
    assert output.message.text == "aaaaa" and output.raw == "aaaaa"


def test_what_looks_like_tags_is_the_answer(qwen):
    for text in ("<answer>x</answer>", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', " <think> "):
        assert qwen.ask("Say it.", choice=[text], max_tokens=200) == text


def spell(made, sampling, thinking, text, tokenizer, form):
    """Whether ``text``, as its tokens, is allowed to the end; and the guide after it."""
    guide = made.guide(sampling, thinking)
    for token in tokenizer.encode_control(text):
        words = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
        guide.mask(words)
        if not words[token // 32] >> (token % 32) & 1:
            return False, guide
        guide.accept(token)
    return True, guide


@pytest.mark.parametrize(
    ("kind", "form", "thinking", "text", "good"),
    [
        ("kimi_vl", KIMI, "auto", "◁think▷any { thing ◁/thin k▷ é◁/think▷\n\n[1]", True),
        ("kimi_vl", KIMI, "auto", "[1]", True),
        ("kimi_vl", KIMI, "auto", "◁think▷a◁/think▷◁think▷b◁/think▷[1]", True),
        ("kimi_vl", KIMI, "auto", "◁thinx", False),
        ("kimi_vl", KIMI, "auto", "◁think▷a◁/think▷x", False),
        ("kimi_vl", KIMI, "auto", "◁think▷a◁/think▷\n\n\n \n \n \n[1]", False),
        ("KeyeVL1_5", KEYE_1_5, "auto", "<analysis>so</analysis><think>why</think>[1]", True),
        ("KeyeVL1_5", KEYE_1_5, "auto", "[1]", True),
        ("KeyeVL1_5", KEYE_1_5, "on", "[1]", False),
        ("KeyeVL1_5", KEYE_1_5, "on", "<think>a</think>\n[1]", True),
        ("KeyeVL1_5", KEYE_1_5, "on", "<think>a</think>[1][", False),
        ("KeyeVL1_5", KEYE_1_5, "off", "<think>", False),
        ("KeyeVL1_5", KEYE_1_5, "auto", "<think>a<|im_end|>", False),
        ("KeyeVL1_5", KEYE_1_5, "auto", "<think>a<tool_call>", False),
        ("qwen2_vl", QWEN2_VL, "auto", "<think>", False),
    ],
)
def test_where_a_block_may_stand(engines, kind, form, thinking, text, good):
    engine = engines[kind]
    tokenizer = engine.parts.renderer.tokenizer
    made = Structures(tokenizer, form, engine.parts.eos)
    allowed, guide = spell(made, Sampling(json_schema={"const": [1]}), thinking, text, tokenizer, form)
    assert allowed == good
    if good:
        assert guide.finished and isinstance(guide, AfterThought)


def test_no_token_closes_a_block_and_begins_the_answer_in_one():
    """Where a vocabulary has such tokens, the rules would not see what they say of the answer."""
    letters = [BYTE_TO_CHAR[byte] for byte in range(256)]
    odd = ["k>a", ">a", ">Ċ", "</think>b", "</think>ĠĊ", "<think"]
    spec = {
        "model": {"type": "BPE", "vocab": {word: index for index, word in enumerate([*letters, *odd])}, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "added_tokens": [{"id": 300, "content": "<end>", "special": True}],
    }  # fmt: skip
    tokenizer = Tokenizer(spec)
    form = replace(KEYE_1_5, analysis=Tags("", ""))
    guide = Structures(tokenizer, form, [300]).guide(Sampling(choice=("a", "b")), "on")

    def allowed():
        words = np.zeros(10, np.int32)
        guide.mask(words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return {word for index, word in enumerate([*letters, *odd]) if bits[index]}

    assert allowed() == {"<", "<think"}  # a block must come
    for token in tokenizer.encode("<think>so"):
        guide.accept(token)
    assert set(odd) - allowed() == {"</think>b"} and set(letters) <= allowed()
    for token in tokenizer.encode("</thin"):
        guide.accept(token)
    assert set(odd) - allowed() == {"</think>b", "k>a"}
    guide.accept(tokenizer.encode("k")[0])
    assert set(odd) - allowed() == {"</think>b", ">a"}
    guide.accept(256 + odd.index(">Ċ"))
    assert {"a", "b", "Ċ", "<"} <= allowed() and "c" not in allowed()


def test_the_answer_may_begin_as_a_tag_does(engines):
    """Kimi's tags are text: until one is whole, both an answer and a thought may come of it."""
    engine = engines["kimi_vl"]
    tokenizer = engine.parts.renderer.tokenizer
    made = Structures(tokenizer, KIMI, engine.parts.eos)
    for text in ("◁th", "◁think", "◁think▷x◁/think▷◁th", "◁think▷x◁/think▷◁x"):
        allowed, guide = spell(made, Sampling(regex="◁[a-z]*"), "auto", text, tokenizer, KIMI)
        assert allowed and any(guide._rules.allows(end) for end in engine.parts.eos), text


def test_thoughts_at_random_are_read_as_the_guide_meant_them(engines):
    """Whatever a model thinks, the parser finds the same answer that the rules watched over."""
    for kind, form in (("kimi_vl", KIMI), ("KeyeVL1_5", KEYE_1_5)):
        engine = engines[kind]
        tokenizer = engine.parts.renderer.tokenizer
        made = Structures(tokenizer, form, engine.parts.eos)
        close = tokenizer.encode_control(form.think.close)
        for seed in range(20):
            random = np.random.default_rng(seed)
            guide, said = made.guide(Sampling(choice=("yes", "no")), "auto"), []
            for token in tokenizer.encode_control(form.think.open):
                guide.accept(token)
                said.append(token)
            for _ in range(int(random.integers(0, 30))):
                words = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
                guide.mask(words)
                allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
                assert not {int(t) for t in allowed} & set(engine.parts.eos)
                token = int(random.choice([t for t in allowed if t not in close[:1]]))
                guide.accept(token)
                said.append(token)
            for token in close:  # as the budget does
                guide.accept(token)
                said.append(token)
            rest = tokenizer.encode("yes")
            for token in rest:
                guide.accept(token)
            assert guide.finished
            parser = Parser(form, kinds=("think", "analysis"))
            deltas = parser.feed(tokenizer.decode([*said, *rest])) + parser.close()
            assert "".join(delta.text for delta in deltas) == "yes"
