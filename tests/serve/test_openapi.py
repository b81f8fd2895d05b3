"""The server's own OpenAPI document: it says what the server does, and schemathesis finds nothing that contradicts it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from oracle import EXTENSIONS
from oracle import document as openais
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from serving import KEY, data_uri, gif, image, png, user

from mirada.records.answer import media_to_openai
from mirada.records.request import HONOURED, KNOWN, LABELS
from mirada.serve import responses_body
from mirada.types import MediaUsage

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


@pytest.fixture(scope="module")
def told(server):
    """The document."""
    return server.get("/openapi.json").json()


@pytest.fixture(scope="module")
def valid(told):
    """``valid(schema's name, value)`` raises unless it is."""

    def check(name, value):
        schema = {"components": told["components"], "$ref": f"#/components/schemas/{name}"}
        jsonschema.Draft202012Validator(schema).validate(value)

    return check


def test_it_is_an_openapi_document_of_every_path(told, server):
    jsonschema.Draft202012Validator.check_schema({"$defs": told["components"]["schemas"]})
    assert told["openapi"] == "3.1.0" and set(told["paths"]) == {
        CHAT, RESPONSES, "/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics",
    }  # fmt: skip
    names = json.dumps(told).split('"$ref": "#/components/schemas/')[1:]
    assert {name.partition('"')[0] for name in names} == set(told["components"]["schemas"])


def test_every_parameter_is_in_it(told):
    schemas = told["components"]["schemas"]
    assert set(schemas["ChatRequest"]["properties"]) == KNOWN
    assert set(schemas["ResponseRequest"]["properties"]) == set(responses_body.KNOWN)


def test_openais_own_parameters_are_known_or_refused_by_name(post):
    """Of OpenAI's parameters those that change nothing here are taken; of the others each is an error that names it."""
    theirs = openais()["components"]["schemas"]
    fields: dict = {}
    for one in theirs["CreateChatCompletionRequest"]["allOf"]:
        fields |= one.get("properties", {})
    unknown = sorted(set(fields) - KNOWN)
    assert unknown == [
        "audio", "function_call", "functions", "web_search_options",
    ]  # fmt: skip
    for name in unknown:
        reply = post({"model": "mini", "messages": user("hi"), name: {}})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)


BODIES = [
    {"messages": user("What?", image(data_uri(png())), image(data_uri(png()))), "max_pixels": 10_000, "stop": "x", "seed": 1},
    {"messages": user("What?", {"type": "video_url", "video_url": {"url": data_uri(gif(), "image/gif"), "fps": 1}}), "n": 2},
    {"messages": user("hi"), "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "logit_bias": {"7": -1}, "user": None},
    {"messages": user("hi"), "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "thinking": "on"},
    {"messages": user("hi"), "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}},
    {"messages": user("hi"), "chat_template_kwargs": {"enable_thinking": False}, "mm_processor_kwargs": {"nframes": 2}},
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_what_it_allows_is_taken_and_the_answer_is_as_it_says(body, post, valid):
    body = {"model": "mini", "max_tokens": 3, **body}
    valid("ChatRequest", body)
    whole = post(body)
    assert whole.status_code == 200, whole.text
    valid("ChatCompletion", whole.json())
    events = post({**body, "stream": True, "stream_options": {"include_usage": True}}).text.split("\n\n")[:-2]
    for event in events:
        valid("ChatCompletionChunk", json.loads(event.removeprefix("data: ")))
    assert len(events) > 1


def test_responses_are_as_it_says(post, valid):
    parts = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": data_uri(png())}]
    body = {"model": "mini", "input": [{"role": "user", "content": parts}], "max_output_tokens": 3}
    valid("ResponseRequest", body)
    valid("Response", post(body, path=RESPONSES).json())
    for event in post({**body, "stream": True}, path=RESPONSES).text.split("\n\n")[:-1]:
        valid("ResponseEvent", json.loads(event.partition("data: ")[2]))


@pytest.fixture(scope="module")
def probed(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})


CHECKS = [
    not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance, checks.response_headers_conformance, checks.negative_data_rejection,
]  # fmt: skip


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "forbidden"])
@pytest.mark.parametrize(("path", "most"), [(CHAT, 40), (RESPONSES, 30), ("/v1/models/{name}", 15)], ids=str)
def test_schemathesis_finds_no_contradiction(probed, path, mode, most):
    operation = probed[path]["POST" if path in (CHAT, RESPONSES) else "GET"]
    statuses = set()

    @settings(max_examples=most, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def probe(case):
        if isinstance(case.body, dict) and path in (CHAT, RESPONSES):
            asked = _short(path, case.body)
            case.body = {**case.body, **asked} if mode is GenerationMode.POSITIVE else {**asked, **case.body}
        reply = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        statuses.add(reply.status_code)
        case.validate_response(reply, checks=CHECKS)

    probe()
    if mode is GenerationMode.POSITIVE:
        assert statuses <= {200, 400, 404} and (200 in statuses or path not in (CHAT, RESPONSES))
    else:
        # Also without a key, with another type; what is 200 all the same has been found harmless by the check of rejection.
        assert statuses <= {200, 400, 401, 404, 415} and len(statuses) > 1


def _short(path, body):
    """Answers are kept short and few, for it is not the model that is tested."""
    few = {"n": min(body["n"], 2)} if isinstance(body.get("n"), int) and body["n"] else {}
    return {"max_completion_tokens" if path == CHAT else "max_output_tokens": 2, **few}


def _told(title):
    """The first cells of the tables of a section of docs/serve.md, and of its text what stands in backticks."""
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    part = text.partition(f"### {title}\n")[2].partition("\n#")[0]
    rows = [line.split(" | ")[0] for line in part.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}, set(re.findall(r"`([^`]+)`", part))


def test_the_docs_name_every_parameter_that_is_not_openais():
    """And each that is kept to with some values alone, and each without effect; none that is not there."""
    rows, named = _told("Parameters")
    theirs: dict = {}
    for one in openais()["components"]["schemas"]["CreateChatCompletionRequest"]["allOf"]:
        theirs |= one.get("properties", {})
    ours = {name for name in KNOWN if name not in theirs and name not in ("top_p", "temperature", "user", "metadata")}
    assert ours - named == set() and {*HONOURED, *LABELS} <= rows
    assert rows - KNOWN == {"detail"}
    for name, values in HONOURED.items():
        assert all(str(value).lower().replace("'", '"') in text_of(name) for value in values if value != "in-memory"), name
    assert set(theirs) - KNOWN <= named  # those that are not taken


def text_of(name):
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))


def test_the_docs_name_every_field_of_an_answer_that_is_not_openais():
    _, named = _told("Answers")
    assert {field for fields in EXTENSIONS.values() for field in fields} <= named
    one = MediaUsage("video", (1, 1), (1, 1), ((1, 2, 2), (1, 4, 4)), 1, 2, 1.0)
    assert set(media_to_openai(one)) <= named
