"""How the files of a tokenizer spell tokens: bytes as letters, control strings plainly or with their flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _byte_to_char() -> dict[int, str]:
    # GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for code points from 256 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}


BYTE_TO_CHAR = _byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def content_of(token: Any) -> str:
    """The string of an added token: of ``{"content": ..}``, or as it is."""
    return token["content"] if isinstance(token, Mapping) else str(token)
