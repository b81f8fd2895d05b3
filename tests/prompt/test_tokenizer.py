from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocab import CONTROL, SPECIAL, oracle, spec, tokenizer

from mirada.errors import CheckpointError, MessageError
from mirada.prompt.tokenizer import Tokenizer

PIECES = st.sampled_from(
    [*CONTROL, "\n", "\n\n", " ", "the", " the", "é", "e\u0301", "漢", "👍🏽", "12", "<", "|>", "'s", "\t"]
)
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join)


@settings(max_examples=120)
@given(TEXTS)
def test_with_control_strings_it_equals_the_library(text):
    assert tokenizer().encode_control(text) == oracle().encode(text, add_special_tokens=False).ids


@settings(max_examples=120)
@given(TEXTS)
def test_plain_text_never_becomes_a_control_token_and_comes_back(text):
    import unicodedata

    ids = tokenizer().encode(text)
    assert not set(ids) & set(tokenizer().control.values())
    assert tokenizer().decode(ids) == unicodedata.normalize("NFC", text)


def test_every_control_string_alone():
    for text in CONTROL:
        assert tokenizer().encode_control(text) == [tokenizer().id(text)]
        assert len(tokenizer().encode(text)) > 1
        assert tokenizer().decode([tokenizer().id(text)], skip_special=True) == ("" if text in SPECIAL else text)


@settings(max_examples=100)
@given(st.lists(st.integers(0, tokenizer().vocab_size + 5), max_size=40), st.booleans(), st.data())
def test_streamed_text_equals_the_whole_and_has_no_half_characters(ids, skip, data):
    whole = tokenizer().decode(ids, skip_special=skip)
    decoder = tokenizer().decoder(skip_special=skip)
    pieces, at = [], 0
    while at < len(ids):
        size = data.draw(st.integers(1, 5))
        pieces.append(decoder.feed(ids[at : at + size]))
        at += size
        assert whole.startswith("".join(pieces))
    assert "".join(pieces) + decoder.close() == whole


def test_a_character_of_several_tokens_comes_out_whole():
    ids = tokenizer().encode("👍🏽")
    decoder = tokenizer().decoder()
    assert len(ids) > 2
    assert [piece for piece in [decoder.feed([token]) for token in ids] if piece] == ["👍", "🏽"]
    assert decoder.feed(ids[:1] + ids[-1:]) + decoder.close() == tokenizer().decode(ids[:1] + ids[-1:])


@settings(max_examples=100)
@given(TEXTS)
def test_decode_equals_the_library(text):
    ids = tokenizer().encode_control(text)
    assert tokenizer().decode(ids) == oracle().decode(ids, skip_special_tokens=False)
    assert tokenizer().decode(ids, skip_special=True) == oracle().decode(ids, skip_special_tokens=True)


def test_offsets_point_at_the_first_character_of_each_token():
    text = "assistant\n\nthe 漢é👍"
    ids, starts = tokenizer().encode_offsets(text)
    assert ids == tokenizer().encode(text)
    for token, start in zip(ids, starts, strict=True):
        piece = tokenizer().decode_bytes([token])
        assert piece in text[start:].encode()
    assert starts == sorted(starts)


def test_a_vocabulary_whose_merges_build_a_control_string():
    made = spec()
    vocab = made["model"]["vocab"]
    left, first = "<", []
    for right in "think>":
        vocab.setdefault(left + right, 5000 + len(left))
        first.append([left, right])
        left += right
    made["model"]["merges"] = first + made["model"]["merges"]
    think = next(token for token in made["added_tokens"] if token["content"] == "<think>")
    vocab["<think>"] = think["id"]
    # The word pattern keeps "<" and letters apart, so a vocabulary without one is needed to merge across them.
    made["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    merging = Tokenizer(made)
    assert merging._plain.encode("a<think>b").ids[1] == think["id"]
    assert think["id"] not in merging.encode("a<think>b")
    assert merging.decode(merging.encode("a<think>b")) == "a<think>b"
    assert merging.encode_control("<think>") == [think["id"]]
    ids, starts = merging.encode_offsets("a<think>b")
    assert ids == merging.encode("a<think>b") and len(starts) == len(ids)


def test_a_text_is_never_cut_or_framed_by_settings_of_the_file():
    made = spec()
    made["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    made["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    made["post_processor"]["trim_offsets"] = True
    text = "one  two the\n\n three four"
    assert Tokenizer(made).encode(text) == tokenizer().encode(text)
    assert Tokenizer(made).encode_offsets(text) == tokenizer().encode_offsets(text)


def test_added_white_space_stays_text():
    made = spec()
    index = max(token["id"] for token in made["added_tokens"]) + 7
    made["added_tokens"].append(
        {
            "id": index,
            "content": "    ",
            "special": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    )
    padded = Tokenizer(made)
    assert padded.encode("a    b")[1:-1] == [index]
    assert padded.decode(padded.encode("a    b")) == "a    b"
    assert "    " not in padded.control


def test_the_longest_control_string_counts():
    made = spec()
    made["added_tokens"].append(made["added_tokens"][-1] | {"content": "<think>ing", "id": 9999})
    assert Tokenizer(made).encode_control("<think>ing<think>in")[0] == 9999
    assert Tokenizer(made).encode_control("<think>in")[0] == tokenizer().id("<think>")


def test_flags_of_added_tokens():
    made = spec()
    for token in made["added_tokens"]:
        token["rstrip"] = token["content"] == "<think>"
        token["lstrip"] = token["content"] == "</think>"
    import tokenizers

    text = "a <think>  b </think> c"
    assert Tokenizer(made).encode_control(text) == tokenizers.Tokenizer.from_str(json.dumps(made)).encode(text).ids


def test_long_runs_of_blanks_before_a_token_that_takes_them():
    made = spec()
    for token in made["added_tokens"]:
        token["lstrip"] = True
    reader = Tokenizer(made)
    blank, think = " " * 20_000, (" \n <think>", reader.id("<think>"))
    began = time.process_time()
    assert list(reader.split(f"a{blank}b \n <think> \n <think>{blank}")) == [
        (f"a{blank}b", None), think, think, (blank, None),
    ]  # fmt: skip
    assert time.process_time() - began < 0.5  # one look per place, not one per pair of them


def test_half_a_surrogate_pair_is_a_message_error():
    with pytest.raises(MessageError, match="surrogate"):
        tokenizer().encode("a\ud83d")


def test_an_unknown_control_string_names_the_nearest():
    with pytest.raises(CheckpointError, match=r"no token '<\|frames\|>'.*<\|frame\|>"):
        tokenizer().id("<|frames|>")


# files

LEVEL = '{"pre_tokenizer": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": %s}}'


def write(directory, *, merges=True, **config):
    made = spec()
    (directory / "vocab.json").write_text(json.dumps(made["model"]["vocab"]), encoding="utf-8")
    if merges:
        lines = ["#version: 0.2", *(" ".join(merge) for merge in made["model"]["merges"]), ""]
        (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    added = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in made["added_tokens"]}
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def test_from_vocab_and_merges(tmp_path):
    read = Tokenizer.from_directory(write(tmp_path))
    for text in ("the user's é e\u0301 漢\n\n 12", "<|im_start|>user\nhi <think>"):
        assert read.encode_control(text) == tokenizer().encode_control(text)
        assert read.encode(text) == tokenizer().encode(text)
    assert read.control == tokenizer().control and read.special_ids == tokenizer().special_ids
    assert read.names == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_from_tokenizer_json_with_more_tokens_in_the_config(tmp_path):
    made = spec()
    last = made["added_tokens"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    config = {"added_tokens_decoder": {str(last["id"]): {"content": last["content"], "special": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert Tokenizer.from_directory(tmp_path).control == tokenizer().control


def test_disagreeing_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec()), encoding="utf-8")
    config = {"added_tokens_decoder": {"9": {"content": "<|im_end|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="the id 9"):
        Tokenizer.from_directory(tmp_path)


def test_missing_merges_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor merges\.txt"):
        Tokenizer.from_directory(write(tmp_path, merges=False))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", "{", "not JSON"),
        ("tokenizer.json", "[]", "holds a list"),
        ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": []}}', "not a BPE"),
        ("tokenizer.json", '{"model": {"vocab": {}}, "pre_tokenizer": {"type": "Whitespace"}}', "not byte-level"),
        ("tokenizer.json", LEVEL % '{"a": 0}, "merges": [["x", "y"]]', "tokenizer in .* is broken"),
        ("tokenizer.json", LEVEL % '{"a": 99999999999}', "the id 99999999999"),
        ("tokenizer.json", '{"added_tokens": [{"id": 3}], "model": {"type": "BPE", "vocab": {}}}', "broken added token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "the id 'x'"),
        ("merges.txt", "#version: 0.2\na b c\n", "no pair: 'a b c'"),
        ("vocab.json", "nonsense", "vocab.json is not JSON"),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json is not JSON"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path, name, text, said):
    write(tmp_path)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        Tokenizer.from_directory(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="there is no directory"):
        Tokenizer.from_directory(tmp_path / "none")
