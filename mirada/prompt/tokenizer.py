"""Byte-level BPE over the ``tokenizers`` library, with control strings under our own control.

The library matches every added token in whatever text it is given. Here its added tokens are taken out, so that plain
text stays plain (``encode``), and control strings are looked up only where the caller says so (``encode_control``).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mirada.errors import CheckpointError, MessageError
from mirada.prompt import tokenizer_files
from mirada.prompt.spelling import BYTE_TO_CHAR, CHAR_TO_BYTE
from mirada.table import nearest


class Tokenizer:
    """Text <-> token ids. Immutable and safe to share between threads.

    ``control``: added token -> id, the strings that text can only become when asked for. ``special_ids``: those of them
    that are no part of a reply's text (turn marks, placeholders). ``names``: ``eos_token`` and the like -> string.
    """

    def __init__(self, spec: Mapping[str, Any], names: Mapping[str, str] | None = None, origin: str = "tokenizer") -> None:
        """``spec``: what a ``tokenizer.json`` holds; ``origin``: where it came from, for messages.

        Raises CheckpointError for anything but byte-level BPE.
        """
        import tokenizers

        plain, added = tokenizer_files.separate(spec)
        try:
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain, ensure_ascii=False))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{origin} is broken: {error}", "copy it again from the release") from error
        self.control: Mapping[str, int] = {token["content"]: token["id"] for token in added}
        self.special_ids = frozenset(token["id"] for token in added if token.get("special"))
        self.names: Mapping[str, str] = dict(names or {})
        self._control_ids = frozenset(self.control.values())
        self._pattern = tokenizer_files.pattern(added)
        self._bytes = _token_bytes(self._plain.get_vocab(with_added_tokens=True), self.control)
        self.vocab_size = len(self._bytes)

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``, or ``tiktoken.model`` (Kimi), or ``vocab.json`` + ``merges.txt``, and the added tokens of
        ``tokenizer_config.json``.

        Raises CheckpointError naming the file that is missing or broken.
        """
        return cls(*tokenizer_files.read(Path(path)), origin=f"the tokenizer in {path}")

    def id(self, text: str) -> int:
        """Id of a control string; CheckpointError when the vocabulary lacks it."""
        if text not in self.control:
            raise CheckpointError(
                f"the tokenizer has no token {text!r}",
                f"use the tokenizer files of this very release; {nearest(text, self.control)}",
            )
        return self.control[text]

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids. Control strings in it become ordinary text pieces."""
        ids = self._encoding(text).ids
        return ids if self._control_ids.isdisjoint(ids) else self._without_control(ids)

    def encode_control(self, text: str) -> list[int]:
        """Trusted text -> ids: control strings become their tokens, as ``tokenizers`` and transformers do."""
        ids: list[int] = []
        for piece, token in self.split(text):
            ids.extend(self.encode(piece) if token is None else (token,))
        return ids

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Plain text -> ids, and for each the index of the first character that it covers (at least in part)."""
        encoding = self._encoding(text)
        if self._control_ids.isdisjoint(encoding.ids):
            return encoding.ids, [start for start, _ in encoding.offsets]
        ids, starts = [], []
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            pieces = self._without_control([token])
            ids += pieces
            starts += [start] * len(pieces)
        return ids, starts

    def _encoding(self, text: str) -> Any:
        try:
            return self._plain.encode(text, add_special_tokens=False)
        except TypeError:
            raise MessageError("a text holds half of a surrogate pair, which is no character", "send valid Unicode") from None

    def split(self, text: str) -> Iterable[tuple[str, int | None]]:
        """Cut at control strings (leftmost, longest): (text, None) and (control string, id) in turn, no empty text."""
        done = 0
        for match in self._pattern.finditer(text):
            if match.start() > done:
                yield text[done : match.start()], None
            found = match.group()
            yield found, self.control[found if found in self.control else found.strip()]
            done = match.end()
        if done < len(text):
            yield text[done:], None

    def _without_control(self, ids: Sequence[int]) -> list[int]:
        # Only when merges can build a control string: spell it byte by byte.
        spelled: list[int] = []
        for token in ids:
            if token not in self._control_ids:
                spelled.append(token)
                continue
            for byte in self._bytes[token]:
                piece = self._plain.token_to_id(BYTE_TO_CHAR[byte])
                if piece is None:
                    raise CheckpointError(
                        f"the vocabulary has no token for byte {byte}", "use a byte-level tokenizer that holds all 256 bytes"
                    )
                spelled.append(piece)
        return spelled

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Ids -> text; bytes that are no UTF-8 become U+FFFD. ``skip_special`` leaves special tokens out."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Ids -> the bytes that they stand for. An id outside the vocabulary (a padded embedding row) is no bytes."""
        return self.join(ids, self.special_ids if skip_special else frozenset())

    def join(self, ids: Iterable[int], skip: Collection[int]) -> bytes:
        """The bytes of all ``ids`` but those in ``skip``."""
        size = self.vocab_size
        return b"".join([self._bytes[token] for token in ids if 0 <= token < size and token not in skip])

    def decoder(self, *, skip_special: bool = True, keep: Iterable[str] = ()) -> StreamDecoder:
        """A fresh incremental decoder for one reply. ``keep``: control strings that are text of it though they are special."""
        kept = {self.control[text] for text in keep if text in self.control}
        return StreamDecoder(self, self.special_ids - kept if skip_special else frozenset())


class StreamDecoder:
    """Ids in, text out as soon as it is whole: never half a character; joined, the pieces equal ``Tokenizer.decode``."""

    def __init__(self, tokenizer: Tokenizer, skip: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids complete (perhaps none yet)."""
        return self._utf8.decode(self._tokenizer.join(ids, self._skip))

    def close(self) -> str:
        """What is left of an unfinished character (as U+FFFD), if anything. The decoder can be used anew after it."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _token_bytes(vocabulary: Mapping[str, int], control: Mapping[str, int]) -> list[bytes]:
    size = 1 + max((*vocabulary.values(), *control.values()), default=-1)
    table = [b""] * size
    for token, index in vocabulary.items():
        try:
            table[index] = bytes([CHAR_TO_BYTE[char] for char in token])
        except KeyError:  # written as plain text, as whitespace tokens that were added are
            table[index] = token.encode()
    for token, index in control.items():
        table[index] = token.encode()
    return table
