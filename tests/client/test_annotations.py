"""Boxes and points on the wire: there and back, through logs and scripts too."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mirada.client.fake import FakeClient
from mirada.client.reading import AnswerReader
from mirada.client.replay import output_from_json, output_to_json
from mirada.records.answer import annotation_from_openai, annotation_to_openai, choice_to_openai
from mirada.types import Annotation, Message, Output

SIZES: Any = {"size": (300, 200), "resized": (308, 196)}
ALL = (
    Annotation("box", ((30.0, 50.0), (150.5, 150.0)), "the sign", **SIZES, start=3, end=40),
    Annotation("point", ((1.0, 2.0),), index=2, chosen="named", **SIZES, start=50, end=60),
    Annotation("polygon", ((0.0, 0.0), (9.0, 0.0), (9.0, 9.0)), media="video", time=(1.5, 4.0), chosen="last", **SIZES),
)
OUTPUT = Output(Message("assistant", "Look there."), annotations=ALL)


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.kind)
def test_there_and_back(one):
    said = json.loads(json.dumps(annotation_to_openai(one)))
    assert annotation_from_openai(said) == one
    assert said[one.media] == one.index and ("time" in said) == (one.time is not None)
    assert ("image" in said) != ("video" in said)


def test_a_box_is_four_numbers():
    assert annotation_to_openai(ALL[0])["box"] == [30, 50, 150.5, 150]


@pytest.mark.parametrize(
    "change", [{"type": "circle"}, {"box": [1, 2]}, {"box": 3}, {"size": [1]}, {"chosen": "guessed"}, {"image": "x"}], ids=str
)
def test_what_is_none_is_an_error(change):
    with pytest.raises((KeyError, TypeError, ValueError)):
        annotation_from_openai({**annotation_to_openai(ALL[0]), **change})


def test_a_client_reads_them_and_not_the_citations_of_others():
    choice = choice_to_openai(OUTPUT)
    choice["annotations"].append({"type": "url_citation", "url_citation": {}})
    assert AnswerReader().completion({"choices": [choice]}).annotations == ALL


def test_logs_and_scripts_keep_them():
    assert output_from_json(json.loads(json.dumps(output_to_json(OUTPUT)))).annotations == ALL
    older = {key: value for key, value in output_to_json(OUTPUT).items() if key != "annotations"}
    assert output_from_json(older).annotations == ()
    assert FakeClient([OUTPUT]).submit([Message("user", "x")]).result().annotations == ALL
