"""Kimi's vocabulary: the same ids as ``tiktoken``, control strings only where they are asked for, broken files named."""

from __future__ import annotations

import base64
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_deepseek import KIMI_CONTROL, write_tiktoken

from mirada.errors import CheckpointError
from mirada.prompt import tiktoken_files
from mirada.prompt.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "kimi_vl" / "tokenizer"
MADE = Tokenizer.from_directory(GOLDEN)
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text("aAbBzZ'sSdtTreEvVlLmM 1234567890.,!\n\r\t世界漢字ひら가나éÉñ🙂\u0301\u200d", max_size=60),
    st.lists(
        st.sampled_from(["Hello", " world", "'s", "'LL", "the", "第123章", "世界", "\n\n", "   ", "[EOS]", "<|im_end|>", "Ǆ"]),
        max_size=20,
    ).map("".join),
)


@cache
def reference() -> Any:
    tiktoken = pytest.importorskip("tiktoken", reason="pip install 'mirada[parity]'")
    ranks = tiktoken_files.read_ranks(GOLDEN / "tiktoken.model")
    return tiktoken.Encoding("kimi", pat_str=tiktoken_files.PATTERN, mergeable_ranks=ranks, special_tokens=dict(MADE.control))


@pytest.mark.reference
@given(text=TEXTS)
@settings(max_examples=300)
def test_ids_are_those_of_tiktoken(text: str) -> None:
    theirs = reference()
    assert MADE.encode(text) == theirs.encode(text, disallowed_special=())
    assert MADE.encode_control(text) == theirs.encode(text, allowed_special="all")


@pytest.mark.reference
def test_ids_of_random_vocabularies_are_those_of_tiktoken() -> None:
    """Tokens that no merge leads to, tokens of broken UTF-8, many splits of one word."""
    tiktoken = pytest.importorskip("tiktoken", reason="pip install 'mirada[parity]'")
    for seed in range(6):
        rng = random.Random(seed)
        tokens = [bytes([byte]) for byte in range(256)]
        alphabet = [b"a", b"b", b"c", b" ", b"\xe4", b"\xb8", b"\x96"]
        while len(tokens) < 330:
            if rng.random() < 0.8:
                made = rng.choice(tokens[-90:] + alphabet) + rng.choice(alphabet)
            else:
                made = b"".join(rng.choices(alphabet, k=rng.randint(2, 5)))
            if made not in tokens:
                tokens.append(made)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        theirs = tiktoken.Encoding("x", pat_str=tiktoken_files.PATTERN, mergeable_ranks=ranks, special_tokens={})
        ours = Tokenizer(tiktoken_files.spec(ranks, {}))
        for _ in range(40):
            text = "".join(rng.choices(["a", "b", "c", " ", "世", "界"], k=rng.randint(1, 30)))
            assert ours.encode(text) == theirs.encode(text, disallowed_special=()), (seed, text)


@given(text=TEXTS)
@settings(max_examples=100)
def test_plain_text_never_holds_a_control_id_and_reads_back(text: str) -> None:
    ids = MADE.encode(text)
    assert not set(ids) & set(MADE.control.values())
    assert MADE.decode(ids) == text
    stream = MADE.decoder()
    assert "".join(stream.feed([token]) for token in ids) + stream.close() == text


def test_names_come_from_the_config_and_the_rest_are_numbered() -> None:
    assert MADE.vocab_size == 511 + 258
    assert MADE.id("<|im_end|>") == 513 and MADE.id("[PAD]") == 766
    assert MADE.id("<|reserved_token_516|>") == 516 and MADE.id("<|reserved_token_768|>") == 768
    assert MADE.special_ids == frozenset(range(511, 769))
    assert MADE.names == {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    assert MADE.decode([72, 513, 105], skip_special=True) == "Hi"


def test_a_tokenizer_json_beside_it_is_read_instead(tmp_path: Path) -> None:
    write_tiktoken(tmp_path)
    spec = tiktoken_files.read(tmp_path, {})
    spec["model"]["vocab"]["zq"] = len(spec["model"]["vocab"])
    spec["model"]["merges"].append(("z", "q"))
    spec["added_tokens"] = []
    (tmp_path / "tokenizer_config.json").unlink()
    before = Tokenizer.from_directory(tmp_path).encode("zq")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert len(before) == 2 and len(Tokenizer.from_directory(tmp_path).encode("zq")) == 1


def _lines(*more: bytes) -> bytes:
    lines = [base64.b64encode(bytes([byte])) + b" " + str(byte).encode() for byte in range(256)]
    return b"\n".join([*lines, *more])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (_lines(b"YWI=257"), r"broken line 257: b'YWI=257'"),
        (_lines(b"YWI= 255"), "broken line 257"),
        (_lines(b"YWI= 300"), "broken line 257"),
        (_lines(b"!!!! 256"), "broken line 257"),
        (_lines(b"YQ== 256"), "broken line 257"),
        (_lines(b" 256"), "broken line 257"),
        (b"YQ== 0\nYg== 1", "no token for byte 0"),
        (b"", "no token for byte 0"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"tiktoken\.model.*{named}"):
        Tokenizer.from_directory(tmp_path)


def test_another_class_of_tokenizer_is_refused(tmp_path: Path) -> None:
    write_tiktoken(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    with pytest.raises(CheckpointError, match="QWenTokenizer"):
        Tokenizer.from_directory(tmp_path)


def test_a_name_for_an_id_of_the_ranks_is_refused(tmp_path: Path) -> None:
    ids = write_tiktoken(tmp_path, KIMI_CONTROL)
    settings_ = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings_["added_tokens_decoder"][str(ids["[BOS]"] + 300)] = {"content": "[FAR]", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    assert Tokenizer.from_directory(tmp_path).id("[FAR]") == ids["[BOS]"] + 300
    settings_["added_tokens_decoder"]["65"] = {"content": "[NEAR]", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    with pytest.raises(CheckpointError, match=r"'\[NEAR\]' the id 65"):
        Tokenizer.from_directory(tmp_path)


def test_no_tokenizer_at_all_names_every_form(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*tiktoken\.model"):
        Tokenizer.from_directory(tmp_path)
