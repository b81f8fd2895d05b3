"""The files of a tokenizer, and their form: read them, and take control strings apart from the plain vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirada.errors import CheckpointError
from mirada.prompt import tiktoken_files
from mirada.prompt.spelling import content_of

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 cuts text into words before merging (Qwen2 ``tokenizer.json``, pre_tokenizer)."""

MAX_IDS = 1 << 24
"""Larger ids are refused: tables are as long as the largest id."""
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def read(directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """-> (contents in the form of ``tokenizer.json``, ``eos_token`` and the like). Raises CheckpointError."""
    if not directory.is_dir():
        raise CheckpointError(f"there is no directory {directory}", "give the folder that holds the checkpoint's files")
    settings = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").exists() else {}
    if (directory / "tokenizer.json").exists():
        spec = read_json(directory / "tokenizer.json")
    elif (directory / "tiktoken.model").exists():
        spec = tiktoken_files.read(directory, settings)
    else:
        spec = _from_merges(directory)
    _add_tokens(spec, settings, directory)
    names = {name: content_of(settings[name]) for name in NAMES if settings.get(name)}
    return spec, names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError naming the file when it is missing, broken or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "copy the file from the release") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "copy the file again from the release") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object", "copy the file again from the release")
    return value


def _from_merges(directory: Path) -> dict[str, Any]:
    missing = [name for name in ("vocab.json", "merges.txt") if not (directory / name).exists()]
    if missing:
        raise CheckpointError(
            f"{directory} has neither tokenizer.json nor {' nor '.join(missing)} (nor tiktoken.model)",
            f"copy tokenizer.json (or {' and '.join(missing)}, or tiktoken.model) from the model's release",
        )
    try:
        lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{directory / 'merges.txt'} cannot be read: {error}", "copy it again from the release"
        ) from error
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [line.rstrip("\r").split(" ") for line in lines if line.strip()]
    bad = next((merge for merge in merges if len(merge) != 2), None)
    if bad is not None:
        raise CheckpointError(f"{directory / 'merges.txt'} has a line that is no pair: {' '.join(bad)!r}", "copy it again")
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": read_json(directory / "vocab.json"), "merges": merges},
    }


def _add_tokens(spec: dict[str, Any], settings: Mapping[str, Any], directory: Path) -> None:
    """Put the added tokens of ``tokenizer_config.json`` beside those of ``tokenizer.json``; they must agree."""
    added = {token["content"]: token for token in _checked(spec.get("added_tokens") or [])}
    taken = {token["id"]: token["content"] for token in added.values()}
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        content = content_of(token)
        if not index.isdecimal():
            raise CheckpointError(
                f"{directory}: tokenizer_config.json gives {content!r} the id {index!r}", "ids are whole numbers"
            )
        old = added.get(content, {}).get("id", taken.get(int(index)))
        if content in added and added[content]["id"] == int(index):
            continue
        if old is not None:
            raise CheckpointError(
                f"{directory}: tokenizer_config.json gives {content!r} the id {index}, but tokenizer.json disagrees ({old!r})",
                "take both files from the same release",
            )
        added[content] = {**(token if isinstance(token, Mapping) else {}), "content": content, "id": int(index)}
        taken[int(index)] = content
    spec["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def _checked(tokens: Any) -> list[Mapping[str, Any]]:
    for token in tokens:
        if (
            not isinstance(token, Mapping)
            or not isinstance(token.get("content"), str)
            or not token["content"]
            or "id" not in token
        ):
            raise CheckpointError(f"the tokenizer has a broken added token: {token!r}", "each has a content and an id")
    return list(tokens)


def separate(spec: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """-> (the tokenizer without control strings, the control strings).

    Added tokens of white space alone stay in the tokenizer: they are text. Truncation, padding and post-processing
    are switched off: a prompt is never cut or framed behind the renderer's back.
    """
    model = spec.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), Mapping):
        raise CheckpointError("the tokenizer is not a BPE model", "only byte-level BPE tokenizers (as Qwen's) are handled")
    if "ByteLevel" not in json.dumps(spec.get("pre_tokenizer")):
        raise CheckpointError("the tokenizer's BPE is not byte-level", "only byte-level BPE tokenizers (as Qwen's) are handled")
    added = [dict(token) for token in _checked(spec.get("added_tokens") or [])]
    ids = [*model["vocab"].values(), *(token["id"] for token in added)]
    bad = next((index for index in ids if not isinstance(index, int) or not 0 <= index < MAX_IDS), None)
    if bad is not None:
        raise CheckpointError(f"the tokenizer has a token with the id {bad!r}", f"ids are whole numbers below {MAX_IDS}")
    control = [token for token in added if token["content"].strip()]
    blank = [token for token in added if not token["content"].strip()]
    vocab = dict(model["vocab"]) | {token["content"]: token["id"] for token in blank}
    plain = dict(spec) | {
        "added_tokens": blank,
        "model": dict(model) | {"vocab": vocab},
        "truncation": None,
        "padding": None,
        "post_processor": None,
    }
    return plain, control


def pattern(control: Sequence[Mapping[str, Any]]) -> re.Pattern[str]:
    """Matches any control string: leftmost, longest first, with the flags of its added token."""
    if not control:
        return re.compile(r"(?!)")
    return re.compile("|".join(_one(token) for token in sorted(control, key=lambda token: -len(token["content"]))))


def _one(token: Mapping[str, Any]) -> str:
    text = re.escape(token["content"])
    if token.get("single_word"):
        text = rf"(?<!\w){text}(?!\w)"
    # Blanks are looked at from the first of a run alone, else a long run costs the square of its length.
    before = r"(?:(?<!\s)\s+)?" if token.get("lstrip") else ""
    return before + text + (r"\s*" if token.get("rstrip") else "")
