"""``tiktoken.model`` (Kimi's vocabulary) in the form of ``tokenizer.json``, so that the ``tokenizers`` library reads it.

The file lists tokens in the order of their ranks; merging takes the pair whose joint token ranks lowest. So each token of two
bytes and more is one merge: of the two parts that its bytes come to with the tokens before it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from mirada.errors import CheckpointError
from mirada.prompt.spelling import BYTE_TO_CHAR, content_of

NAME = "tiktoken.model"
CLASS = "TikTokenTokenizer"
RESERVED = 256 + 2
"""Ids after the ranks that are control strings (Moonshot ``tokenization_moonshot.py``)."""

_UPPER, _LOWER = (rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_LEAD, _TAIL = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_LEAD}{_UPPER}*{_LOWER}+{_TAIL}",
        f"{_LEAD}{_UPPER}+{_LOWER}*{_TAIL}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How Kimi cuts text into words before merging: Han characters apart, digits by three."""


def read(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``tokenizer.json`` that mean the same. ``settings``: of ``tokenizer_config.json``.

    Raises CheckpointError naming the file that is broken.
    """
    if settings.get("tokenizer_class", CLASS) != CLASS:
        raise CheckpointError(
            f"{directory}: {NAME} belongs to the tokenizer class {settings['tokenizer_class']!r}",
            f"only {CLASS} (Kimi) is known, since the file does not say how text is cut into words",
        )
    ranks, named = read_ranks(directory / NAME), settings.get("added_tokens_decoder") or {}
    taken = next((index for index in named if index.isdecimal() and int(index) < len(ranks)), None)
    if taken is not None:
        raise CheckpointError(
            f"{directory}: tokenizer_config.json gives {content_of(named[taken])!r} the id {taken}, a token of {NAME}",
            "take both files from the same release",
        )
    return spec(ranks, named)


def spec(ranks: Mapping[bytes, int], named: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``tokenizer.json`` for these ranks; ``named``: id -> control string."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": control(len(ranks), named),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {_spell(token): rank for token, rank in ranks.items()},
            "merges": merges(ranks),
            # A word that is a token is that token, even where its merges would not lead there.
            "ignore_merges": True,
        },
    }


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token -> rank, in order of rank. Raises CheckpointError naming the line that is broken, or what is missing."""
    ranks: dict[bytes, int] = {}
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}", "copy the file from the release") from error
    for number, line in enumerate(filter(None, lines)):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
            good = int(rank) == number == len(ranks) - 1
        except ValueError:
            good = False
        if not good:
            raise CheckpointError(
                f"{file} has a broken line {number + 1}: {line[:60]!r}",
                "each line holds a token of its own in base64 and its rank, from 0 on; copy the file again from the release",
            )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"{file} has no token for byte {missing[0]}", "copy the file again from the release")
    return ranks


def control(first: int, named: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The control strings after the ranks: as ``added_tokens_decoder`` names them, else by their number."""
    made = []
    for index in range(first, first + RESERVED):
        token = named.get(str(index), f"<|reserved_token_{index}|>")
        made.append({"content": content_of(token), "id": index, "special": True, "normalized": False})
    return made


def merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """The two parts of each token, in order of rank. A token that nothing leads to (only a whole word can be it) has none."""
    made = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _merge(token, ranks, rank)
            if len(parts) == 2:
                made.append((_spell(parts[0]), _spell(parts[1])))
    return made


def _merge(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """Byte-pair merging with the ranks below ``below``: the lowest pair first, the leftmost of equals."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, below) for a, b in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= below:
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _spell(token: bytes) -> str:
    return "".join([BYTE_TO_CHAR[byte] for byte in token])
