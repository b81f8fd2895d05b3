"""``mirada doctor --parity``: files, references, exit codes, and what is printed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny

from mirada.cli import doctor_parity
from mirada.cli.doctor_parity import Asked


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("parity"), "qwen2_vl", seed=5)


def test_without_a_file_the_kernels_are_measured_by_plain_attention(mirada, qwen):
    done = mirada("doctor", "--model", qwen, "--parity", "--json")
    made = json.loads(done.out)
    assert done.code == 0 and made["first_beyond"] is None and made["ours"]["precision"] == "float32"
    assert [row["stage"] for row in made["stages"]][-1] == "greedy" and all(row["within"] for row in made["stages"])


def test_an_altered_layer_is_named_and_the_exit_code_is_one(mirada, qwen, tmp_path):
    file = tmp_path / "a.safetensors"
    done = mirada("doctor", "--model", qwen, "--parity", "--record", file)
    assert done.code == 0 and "are in" in done.out
    assert mirada("doctor", "--model", qwen, "--parity", file).code == 0
    weights = qwen / "model.safetensors"
    kept, held = weights.read_bytes(), load_file(weights)
    held["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(held, weights)
    try:
        done = mirada("doctor", "--model", qwen, "--parity", file)
    finally:
        weights.write_bytes(kept)
    shown = " ".join(done.out.split())
    assert done.code == 1 and "The first stage beyond its limits is 'decoder layer 1'." in shown
    assert shown.count("beyond") > 1 and "decoder layer 0" in shown


def test_a_mode_is_measured_by_float32(mirada, qwen):
    made = json.loads(mirada("doctor", "--model", qwen, "--parity", "--quant", "int8", "--json").out)
    rows = {row["stage"]: row for row in made["stages"]}
    assert made["theirs"]["precision"] == "float32" and made["ours"]["precision"].startswith("int8")
    assert rows["projector"]["largest"] == 0 < rows["decoder layer 0"]["typical"] < rows["decoder layer 0"]["limit"]["typical"]


def test_a_picture_and_a_question_of_ones_own(mirada, qwen, picture, tmp_path):
    file = tmp_path / "a.safetensors"
    words = ("doctor", "--model", qwen, "--parity", "--image", picture, "--question", "Red?")
    assert mirada(*words, "--record", file).code == 0
    made = json.loads(mirada("doctor", "--model", qwen, "--parity", file, "--json").out)
    assert made["ours"]["question"] == "Red?" and made["stages"][0]["shape"] == [60, 90, 3]
    done = mirada("doctor", "--model", qwen, "--parity", file, "--question", "Blue?")
    assert done.code == 2 and "another question" in done.err
    other = mirada("doctor", "--model", make_tiny(tmp_path / "keye", "KeyeVL1_5"), "--parity", file)
    assert other.code == 1 and "another model: its model_type is qwen2_vl" in other.err


def test_bad_usage(mirada, qwen, tmp_path):
    for words, said in (
        (("--parity",), "needs a model"),
        (("--model", qwen, "--record", "a"), "are for --parity"),
        (("--model", qwen, "--parity", "--against", "vllm"), "--against vllm is unknown"),
        (("--model", qwen, "--parity", "a", "--against", "eager"), "beside --against"),
        (("--model", qwen, "--parity", "--quant", "int8", "--dtype", "bfloat16"), "beside --dtype"),
        (("--model", qwen, "--parity", "--image", tmp_path / "no.png"), "no.png"),
    ):
        done = mirada("doctor", *words)
        assert done.code == 2 and said in done.err, words
    done = mirada("doctor", "--model", qwen, "--parity", tmp_path / "no")
    assert done.code == 1 and "cannot be read as a recording" in done.err


def test_what_is_not_finite_is_null_in_json(qwen):
    ours, theirs = doctor_parity.measure(Asked(str(qwen)))
    ours.stages["decoder layer 0"][0, 0] = float("inf")
    from mirada.models.parity import compare

    made = doctor_parity._as_json(Asked(str(qwen)), ours, theirs, compare(ours, theirs))
    row = next(row for row in made["stages"] if row["stage"] == "decoder layer 0")
    assert row["largest"] is None and not row["within"] and json.dumps(made, allow_nan=False)
    assert torch.isfinite(theirs.stages["logits"]).all()
