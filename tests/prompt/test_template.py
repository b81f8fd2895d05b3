from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mirada.errors import CheckpointError, MessageError
from mirada.prompt.builtin import KEYE_TEMPLATE, KEYE_TEXT_TEMPLATE
from mirada.prompt.format import KEYE_PREVIEW
from mirada.prompt.template import Template

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/keye_vl/chat_template.json").read_text(encoding="utf-8"))
CASES = [
    (source, case)
    for group, source in (("processor_template", KEYE_TEMPLATE), ("tokenizer_config_template", KEYE_TEXT_TEMPLATE))
    for case in GOLDEN[group]
]


def render(source, messages=(), **variables):
    return Template(source).render(messages, **variables)


@pytest.mark.parametrize(("source", "case"), CASES, ids=[case["name"] for _, case in CASES])
def test_built_in_templates_render_as_recorded(source, case):
    assert render(source, case["messages"], **case["kwargs"]) == case["rendered"]


def test_the_recorded_cases_are_all_there():
    assert len(CASES) == 10


def test_numbers_of_pictures_and_videos_run_across_turns():
    turn = [{"type": "video", "video": "v"}, {"type": "image", "image": "i"}, {"image_url": "i"}]
    chat = [{"role": "user", "content": turn}, {"role": "assistant", "content": "x"}, {"role": "user", "content": turn}]
    text = render(KEYE_TEMPLATE, chat, add_vision_id=True)
    labels = ["Video 1: ", "Picture 1: ", "Picture 2: ", "Video 2: ", "Picture 3: ", "Picture 4: "]
    at = [text.index(label) for label in labels]
    assert at == sorted(at) and text.count("Picture ") == 4


@pytest.mark.parametrize("source", [KEYE_TEMPLATE, KEYE_TEXT_TEMPLATE])
def test_tools_calls_and_results(source):
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1, "b": "<ü>"}}}
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
    ]
    text = render(source, chat, tools=[{"type": "function", "function": {"name": "add"}}])
    assert text.startswith("<|im_start|>system\nS\n\n# Tools\n\n")
    assert '<tools>\n{"type": "function", "function": {"name": "add"}}\n</tools>' in text
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "<ü>"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{written}\n{written}<|im_end|>\n" in text
    results = "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
    assert text.endswith(results)


# the environment is that of transformers


def test_environment_as_templates_expect_it():
    assert render("{% for m in messages %}\n    {% if m.x %}\nA\n    {% endif %}\n{% endfor %}\nZ", [{"x": 1}]) == "A\nZ"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ x | tojson }}", x={"b": "<é>", "a": [1, None]}) == '{"b": "<é>", "a": [1, null]}'
    assert render("{{ x | tojson(indent=2) }}", x={"b": 1}) == '{\n  "b": 1\n}'
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("{% generation %}a{{ 1 }}{% endgeneration %}b") == "a1b"
    assert render("{{ none_such }}{{ none_such is defined }}") == "False"
    assert render("{% for x in y %}{{ loop.last }}{{ loop.length }} {% endfor %}", y=[1, 2]) == "False2 True2 "
    assert render("{{ y | map(attribute='a') | join('-') }}", y=[{"a": "p"}, {"a": "q"}]) == "p-q"
    assert render("{{ 'a-b'.replace('-', '+') }}{{ 'x,y'.split(',')[1:] | join }}{{ 'abc'[::-1] }}") == "a+bycba"
    assert render("{% for x in y | selectattr('a') %}{{ loop.index }}{{ x.a }}{% endfor %}", y=[{"a": 1}, {"a": 0}]) == "11"
    assert Template("{{ eos_token }}", names={"eos_token": "E"}).render([]) == "E"


AS_RELEASED = """{% set image_count = namespace(value=0) %}{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}\
{% set image_count.value = image_count.value + 1 %}\
{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_template_in_the_usual_style():
    for case in GOLDEN["processor_template"]:
        if "video" not in str(case["messages"]):
            assert render(AS_RELEASED, case["messages"], **case["kwargs"]) == case["rendered"]


def test_a_template_may_refuse_a_chat():
    with pytest.raises(MessageError, match="refuses this chat: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ x.append(1) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] * 10 ** 8 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000d}'.format(1) }}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ 'a'['ljust'](1000000000) }}",
        "{{ ('a' | attr('ljust'))(1000000000) }}",
        "{{ (('a',) | map(attribute='ljust') | first)(1000000000) }}",
        "{{ ('{:1000000000d}' | attr('format'))(1) }}",
        "{{ ('a' * 4000000).replace('a', 'b' * 4000000) }}",
        "{{ ('a' * 4000000) | replace('a', 'b' * 4000000) }}",
        "{{ ('a' * 4000000).join('b' * 4000000) }}",
        "{{ ['a'] * 100000 | join('b' * 4000000) }}",
        "{{ (['a'] * 100000) | join('b' * 4000000) }}",
        "{% set n = namespace(t='a') %}{% for i in range(100) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "{% set n = namespace(t='a') %}{% for i in range(100) %}{% set n.t = n.t + n.t %}{% endfor %}",
        "{% set n = namespace(t=9) %}{% for i in range(100) %}{% set n.t = n.t * n.t %}{% endfor %}",
        "{% set n = namespace(t=[1]) %}{% for i in range(100) %}{% set n.t = n.t + n.t %}{% endfor %}",
        "{% set a, n = 'a' * 8000000, namespace(l=[]) %}{% for i in range(9999) %}{% set n.l = n.l + [a[1:]] %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 8000 }}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(9999) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ x | tojson(indent=1000000000) }}",
        "{% for c in 'a' * 8000000 %}{% endfor %}",
        "{% for i in range(500) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    ],
)  # fmt: skip
def test_hostile_templates_are_stopped(source):
    import resource

    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(CheckpointError):
        render(source, [{"role": "user"}], x=[1])
    assert time.thread_time() - begun < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 * 1024


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% if %}", "no valid template .line 1"),
        ("{{ 'a' | center(10) }}", "center"),
        ("{{ messages[0].a.b.c }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "chat template"),
        ("{{ 1 " + "+ 1 " * 50000 + "}}", "chat template"),
        ("a" * 2_000_000, "2000000 characters"),
    ],
)
def test_broken_templates_are_named(source, said):
    with pytest.raises(CheckpointError, match=said):
        render(source, [{}])


def test_a_stopped_rendering_does_not_disturb_the_next():
    template = Template("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}{{ n }}")
    with pytest.raises(CheckpointError):
        template.render([], n=50_000)
    assert template.render([], n=3) == "3"


# where a checkpoint keeps it


def test_the_processors_template_comes_first(tmp_path):
    def read():
        return Template.from_directory(tmp_path, KEYE_PREVIEW).render([{"role": "user", "content": "x"}])

    assert read() == render(KEYE_TEMPLATE, [{"role": "user", "content": "x"}])
    text_only = {"chat_template": "text only", "eos_token": {"content": "E"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(text_only), encoding="utf-8")
    assert read() == render(KEYE_TEMPLATE, [{"role": "user", "content": "x"}])
    listed = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{# <|image_pad|> #}listed {{ eos_token }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(text_only | {"chat_template": listed}), encoding="utf-8")
    assert read() == "listed E"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}", encoding="utf-8")
    assert read() == "file E"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}), encoding="utf-8")
    assert read() == "processor"


@pytest.mark.parametrize(
    ("name", "text"),
    [("chat_template.json", "{}"), ("chat_template.json", "["), ("tokenizer_config.json", '{"chat_template": [1]}')],
)
def test_broken_template_files_are_named(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=name):
        Template.from_directory(tmp_path, KEYE_PREVIEW)
