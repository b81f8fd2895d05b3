"""``mirada batch``: every line is answered once, whatever else is wrong, and a run that ended goes on."""

from __future__ import annotations

import base64
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from misbehaving import reply, serving, stream, words
from oracle import wrong

import mirada as package
from mirada.cli.batch_answer import with_sources
from mirada.cli.batch_file import Line, read_lines
from mirada.engine.llm import VLM


def request(name, *parts, **body):
    content = [*parts, {"type": "text", "text": f"What is {name}?"}]
    body = {"model": "any", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path):
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_name(path):
    lines = read(path)
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def text(line):
    return line["response"]["body"]["choices"][0]["message"]["content"]


def test_lines_are_answered_as_the_front_door_answers(mirada, tiny, picture, tmp_path):
    inside = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()},
    }
    named = {"type": "image", "image": picture.name}
    source = write(tmp_path / "in.jsonl", request("a", inside), request("b", named, n=2, logprobs=True), request("c"))
    done = mirada("batch", source, tmp_path / "out.jsonl", "-m", tiny, "--media-root", tmp_path)
    assert (done.code, done.out) == (0, "") and "3 lines: 3 answered" in done.err
    made = by_name(tmp_path / "out.jsonl")
    with VLM(tiny) as vlm:
        assert text(made["a"]) == vlm.ask(str(picture), "What is a?", max_tokens=4)
        assert text(made["c"]) == vlm.ask("What is c?", max_tokens=4)
    assert made["a"]["error"] is None and made["a"]["response"]["status_code"] == 200
    assert made["a"]["response"]["body"]["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    choices = made["b"]["response"]["body"]["choices"]
    assert len(choices) == 2 and len(choices[0]["logprobs"]["content"]) == 4 and choices[0]["logprobs"]["content"][0]["bytes"]


def test_answers_have_the_form_that_a_line_asks_for(mirada, tiny, tmp_path):
    source = write(
        tmp_path / "in.jsonl", request("a", guided_choice=["red", "blue"]), request("b", guided_regex="("),
        request("c", response_format={"type": "json_schema", "json_schema": {"schema": {"const": 7}}}),
    )  # fmt: skip
    done = mirada("batch", source, tmp_path / "out.jsonl", "-m", tiny)
    assert done.code == 1 and "3 lines: 2 answered, 1 failed" in done.err
    made = by_name(tmp_path / "out.jsonl")
    assert "red blue".find(text(made["a"])) >= 0 and text(made["c"]) == "7"
    assert made["b"]["response"]["body"]["error"]["param"] == "guided_regex"


def test_a_bad_line_is_an_error_line_and_stops_no_other(mirada, tiny, picture, tmp_path):
    source = write(
        tmp_path / "in.jsonl",
        "{nope", "", "[1]", request("a"), request("a"), {**request("b"), "method": "GET"}, {**request("c"), "url": "/v1/x"},
        {"custom_id": "d"}, {"custom_id": 3, "body": {}}, request("e", temperature="hot"),
        request("f", {"type": "image_url", "image_url": {"url": picture.name}}),
        request("g", {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}),
        request("h", {"type": "image", "image": "data:image/png;base64,AAAA"}), request("i", zeal=1), request("z"),
    )  # fmt: skip
    out = tmp_path / "out.jsonl"
    done = mirada("batch", source, out, "-m", tiny)
    assert done.code == 1 and "14 lines: 2 answered, 12 failed" in done.err
    lines = read(out)
    assert sorted(line["id"] for line in lines) == sorted(f"batch_req_{n}" for n in (1, *range(3, 16)))
    said = {line["id"]: json.dumps(line["error"] or line["response"]["body"]) for line in lines}
    wanted = {1: "not JSON", 3: "a list", 5: "repeats", 6: "only POST", 7: "only /v1/chat/completions", 8: "body=None",
              9: "custom_id=3", 10: "temperature='hot'", 11: "--media-root", 12: "not on the public internet", 13: "image",
              14: "'zeal' is unknown"}  # fmt: skip
    for number, words_ in wanted.items():
        assert words_ in said[f"batch_req_{number}"], said[f"batch_req_{number}"]
    codes = {line["custom_id"]: line["response"]["status_code"] for line in lines if line["response"]}
    assert codes == {"a": 200, "z": 200, "e": 400, "f": 400, "g": 400, "h": 400, "i": 400}
    again = mirada("batch", source, out, "-m", tiny)
    assert "2 skipped (had an answer), 12 skipped (had an error" in again.err and again.code == 1 and len(read(out)) == 14


def test_a_line_that_is_nested_too_deep_stops_no_other(mirada, tiny, tmp_path):
    call = '{"function": {"name": "f", "arguments": ' + '{"a":' * 900 + "1" + "}" * 900 + "}}"
    messages = f'[{{"role": "user", "content": "x"}}, {{"role": "assistant", "tool_calls": [{call}]}}]'
    deep = f'{{"custom_id": "deep", "body": {{"messages": {messages}, "max_tokens": 1}}}}'
    source = write(tmp_path / "in.jsonl", deep, request("a"), request("z"))
    done = mirada("batch", source, tmp_path / "out.jsonl", "-m", tiny)
    made = by_name(tmp_path / "out.jsonl")
    assert made.keys() == {"deep", "a", "z"}, done.err
    assert made["a"]["response"]["status_code"] == made["z"]["response"]["status_code"] == 200


def test_files_outside_the_root_are_refused(mirada, tiny, picture, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    sources = [f"../{picture.name}", str(picture), picture.as_uri()]
    lines = [request(str(n), {"type": "image_url", "image_url": {"url": source}}) for n, source in enumerate(sources)]
    for url in (None, "http://127.0.0.1:9"):
        out = tmp_path / f"out{bool(url)}.jsonl"
        who = ("--url", url) if url else ("-m", tiny)
        assert mirada("batch", write(tmp_path / "in.jsonl", *lines), out, *who, "--media-root", root).code == 1
        for line in read(out):
            assert "outside the allowed folder" in line["response"]["body"]["error"]["message"]


def test_a_run_goes_on_where_it_stopped_and_a_torn_line_is_mended(mirada, tmp_path):
    source, out = write(tmp_path / "in.jsonl", *map(request, "abcde")), tmp_path / "out.jsonl"
    with serving(stream(words("x"))) as server:
        assert mirada("batch", source, out, "--url", server.url).code == 0
        whole = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join(whole[:2]) + whole[2][:-30])
        left = {"a", "b", "c", "d", "e"} - {json.loads(line)["custom_id"] for line in whole[:2]}
        server.requests.clear()
        done = mirada("batch", source, out, "--url", server.url)
        assert "3 answered, 2 skipped" in done.err and set(by_name(out)) == set("abcde")
        assert {body["messages"][0]["content"][0]["text"][8] for body in server.bodies} == left
        server.requests.clear()
        assert mirada("batch", source, out, "--url", server.url).code == 0 and not server.requests


def test_errors_may_be_asked_again(mirada, tmp_path):
    source, out = write(tmp_path / "in.jsonl", *map(request, "abc")), tmp_path / "out.jsonl"
    bad = reply(400, {"error": {"message": "no"}})
    with serving(bad, bad, stream(words("x"))) as server:
        done = mirada("batch", source, out, "--url", server.url, "--in-flight", 1)
        assert done.code == 1 and "1 answered, 2 failed" in done.err
        assert by_name(out)["a"]["response"]["status_code"] == 400
        again = mirada("batch", source, out, "--url", server.url)
        assert again.code == 1 and "1 skipped (had an answer), 2 skipped (had an error: --retry-errors asks again)" in again.err
        assert mirada("batch", source, out, "--url", server.url, "--retry-errors").code == 0
    assert all(text(line) == "x" for line in by_name(out).values()) and not out.with_name("out.jsonl.partial").exists()


def test_a_server_gets_the_body_as_it_is_with_files_inside(mirada, picture, tmp_path):
    parts = [{"type": "image_url", "image_url": {"url": picture.name, "detail": "low"}},
             {"type": "image_url", "image_url": {"url": "https://h/a.png"}}]  # fmt: skip
    source = write(tmp_path / "in.jsonl", request("a", *parts, their_own=1, seed=5, n=2))
    with serving(stream(words("x", finish="length"))) as server:
        done = mirada("batch", source, tmp_path / "o.jsonl", "--url", server.url, "--model", "big", "--media-root", tmp_path)
    assert done.code == 0, done.err
    assert [body["seed"] for body in sorted(server.bodies, key=lambda body: body["seed"])] == [5, 6]
    body = server.bodies[0]
    assert (body["model"], body["their_own"], body["max_tokens"]) == ("big", 1, 4) and "n" not in body
    first, second, _ = body["messages"][0]["content"]
    assert first["image_url"]["url"].startswith("data:image/png;base64,") and first["image_url"]["detail"] == "low"
    assert second["image_url"]["url"] == "https://h/a.png"
    (line,) = read(tmp_path / "o.jsonl")
    assert [c["finish_reason"] for c in line["response"]["body"]["choices"]] == ["length"] * 2


def test_what_would_befall_every_line_ends_the_run_and_writes_none_of_it(mirada, tmp_path):
    source, out = write(tmp_path / "in.jsonl", *map(request, "abc")), tmp_path / "out.jsonl"
    with serving(reply(401, {"error": {"message": "wrong key"}})) as server:
        done = mirada("batch", source, out, "--url", server.url, "--api-key", "sk-1")
    assert done.code == 1 and "wrong key" in done.err and "sk-1" not in done.err and out.read_bytes() == b""


def test_as_many_are_under_way_as_may_be(mirada, tmp_path):
    source = write(tmp_path / "in.jsonl", *(request(str(n)) for n in range(12)))
    with serving(stream(words("x"), pause=0.005)) as server:
        assert mirada("batch", source, tmp_path / "o.jsonl", "--url", server.url, "--in-flight", 3).code == 0
    assert server.most <= 3 and len(by_name(tmp_path / "o.jsonl")) == 12


def test_an_interrupt_leaves_a_valid_file_and_says_how_to_go_on(mirada, tmp_path):
    source, out = write(tmp_path / "in.jsonl", *(request(str(n)) for n in range(40))), tmp_path / "out.jsonl"
    with serving(stream(words("x"), pause=0.05)) as server:
        command = [sys.executable, "-m", "mirada.cli", "batch", source, out, "--url", server.url, "--in-flight", "2"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while not out.exists() or out.read_bytes().count(b"\n") < 3:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=120)[1]
        assert process.returncode == 130 and "same command goes on" in said and "Traceback" not in said
        there = by_name(out)
        assert 3 <= len(there) < 40 and all(text(line) == "x" for line in there.values())
        server.script = [stream(words("y"))]
        assert mirada("batch", source, out, "--url", server.url).code == 0
    assert len(by_name(out)) == 40 and {text(line) for line in by_name(out).values()} == {"x", "y"}


def test_one_process_alone_writes_a_file(mirada, tmp_path):
    source, out = write(tmp_path / "in.jsonl", request("a")), tmp_path / "out.jsonl"
    with out.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = mirada("batch", source, out, "--url", "http://127.0.0.1:9")
    assert done.code == 2 and "another process writes" in done.err


WRONG = [
    (("{none}", "{out}"), "there is no file"),
    (("{source}", "{source}"), "the same file"),
    (("{source}", "{other}"), "is no answer of a batch"),
    (("{source}", "{out}", "--in-flight", "0"), "--in-flight 0"),
    (("{source}", "{out}", "--max-tokens", "0"), "max_tokens=0"),
    (("{source}", "{out}", "--media-root", "{none}"), "--media-root"),
    (("{source}", "{out}", "--url", "h:1"), "no http address"),
    (("{source}", "{source}/x.jsonl"), "cannot be written"),
]


@pytest.mark.parametrize(("given", "said"), WRONG, ids=[row[1] for row in WRONG])
def test_what_is_wrong_is_said_before_anything_is_opened(mirada, tmp_path, given, said):
    names = {"source": write(tmp_path / "in.jsonl", request("a")), "none": tmp_path / "none", "out": tmp_path / "out.jsonl",
             "other": write(tmp_path / "other.jsonl", {"x": 1})}  # fmt: skip
    done = mirada("batch", *(word.format(**names) for word in given))
    assert done.code == 2 and said in done.err and "Traceback" not in done.err


def test_lines_with_a_mark_of_byte_order_and_other_alphabets(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(request("é")).encode() + b"\n\xff\n")
    first, second = read_lines(path)
    assert first == Line("batch_req_1", "é", request("é")["body"]) and second.problem is not None


def test_sources_of_every_form_are_found_and_addresses_left():
    content = [
        {"type": "image", "image": "a"}, {"type": "image_url", "image_url": "b"}, {"image_url": {"url": "c", "detail": "x"}},
        {"type": "video", "video": ["d", "https://h"]}, {"type": "video_url", "video_url": {"url": "DATA:,"}}, "text", 3,
        {"type": "video_url", "video_url": {"url": "e"}},
    ]  # fmt: skip
    found = []
    body = {"messages": [{"content": content}, {"content": "image"}, 3]}
    with_sources(body, lambda source, kind: found.append((source, kind)) or source)
    assert found == [("a", "image"), ("b", "image"), ("c", "image"), ("d", "image"), ("e", "video")]
    assert with_sources({"messages": "x"}, lambda *_: "y") == {"messages": "x"}


def test_a_line_is_read_as_the_server_reads_a_request(mirada, tiny, tmp_path):
    """By the model's own sampling and the command's settings, where the line says nothing."""
    plain = request("a")
    del plain["body"]["temperature"]
    short = request("b")
    del short["body"]["max_tokens"]
    source = write(tmp_path / "in.jsonl", plain, short, request("c", seed=1), request("d", colour="red"))
    given = ("--max-tokens", "3", "--kv", "int8", "--thinking", "off")
    done = mirada("batch", source, tmp_path / "out.jsonl", "-m", "mini", *given)
    assert done.code == 1, done.err
    made = by_name(tmp_path / "out.jsonl")
    with VLM("mini", engine={"kv": "int8"}) as vlm:
        assert text(made["a"]) == vlm.ask("What is a?", max_tokens=4, thinking="off")
    assert made["b"]["response"]["body"]["usage"]["completion_tokens"] <= 3
    assert made["d"]["response"]["body"]["error"]["param"] == "colour"
    assert mirada("batch", source, tmp_path / "x.jsonl", "--url", "http://127.0.0.1:9", "--kv", "int8").code == 2
    assert mirada("batch", source, tmp_path / "x.jsonl", "--fps", "0").code == 2


def test_lines_of_responses(mirada, tmp_path):
    body = {"model": "any", "input": "What is it?", "max_output_tokens": 3, "include": ["message.output_text.logprobs"]}
    line = {"custom_id": "a", "url": "/v1/responses", "body": {**body, "thinking": "off", "temperature": 0}}
    bad = {"custom_id": "b", "url": "/v1/responses", "body": {**body, "input": [{"role": "robot", "content": "x"}]}}
    worse = {"custom_id": "c", "url": "/v1/responses", "body": {**body, "text": {"format": {"type": "xml"}}}}
    file = {"type": "input_image", "image_url": "no.png"}
    lost = {"custom_id": "d", "url": "/v1/responses", "body": {**body, "input": [{"role": "user", "content": [file]}]}}
    chat = {
        **request("e"),
        "body": {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 3, "temperature": 0},
    }
    source = write(tmp_path / "in.jsonl", line, bad, worse, lost, chat)
    done = mirada("batch", source, tmp_path / "out.jsonl", "--media-root", tmp_path, "--thinking", "off")
    assert done.code == 1, done.err
    made = by_name(tmp_path / "out.jsonl")
    whole = made["a"]["response"]["body"]
    assert wrong("Response", whole) == [] and whole["id"].startswith("resp_")
    part = whole["output"][0]["content"][0]
    assert part["text"] == text(made["e"]) and "".join(one["token"] for one in part["logprobs"]) == part["text"]
    params = [made[name]["response"]["body"]["error"]["param"] for name in "bcd"]
    assert params == ["input[0]", "text.format.type", "input"]


def test_lines_of_responses_repeat_no_settings_that_a_server_chose(mirada, tmp_path):
    """Sampling that a line leaves to the server is neither sent nor said: nobody here knows it."""
    body = {"model": "any", "input": "What is it?"}
    lines = [
        {"custom_id": str(n), "url": "/v1/responses", "body": {**body, **own}} for n, own in enumerate(({}, {"top_p": 0.5}))
    ]
    source = write(tmp_path / "in.jsonl", *lines)
    with serving(stream(words("x"))) as server:
        assert mirada("batch", source, tmp_path / "o.jsonl", "--url", server.url).code == 0
    made = by_name(tmp_path / "o.jsonl")
    told = [made[name]["response"]["body"] for name in "01"]
    assert [(one["temperature"], one["top_p"]) for one in told] == [(None, None), (None, 0.5)]
    assert all(wrong("Response", one) == [] for one in told)
    sent = set().union(*server.bodies) - {"model", "messages", "stream", "stream_options"}
    assert sent == {"top_p"}


def test_calls_of_all_lines_have_names_of_their_own(mirada, tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    asked = {"tools": [tool], "tool_choice": "required", "max_tokens": 40, "thinking": "off", "parallel_tool_calls": False}
    folder = tmp_path / "echo"  # mini, with a template that has a place for tools
    shutil.copytree(Path(package.__file__).parent / "assets" / "mini", folder)
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    shown = "{%- for tool in tools or [] -%}{{- tool | tojson -}}{%- endfor -%}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": shown + template}))
    source = write(tmp_path / "in.jsonl", request("a", **asked), request("b", **asked, n=2))
    assert mirada("batch", source, tmp_path / "out.jsonl", "-m", folder).code == 0
    lines = by_name(tmp_path / "out.jsonl").values()
    choices = [choice for line in lines for choice in line["response"]["body"]["choices"]]
    calls = [call["id"] for choice in choices for call in choice["message"]["tool_calls"]]
    assert len(calls) == len(set(calls)) == 3
