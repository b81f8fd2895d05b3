"""The fonts that synth draws with (fonts.txt): file, Debian package and SHA-256 of each, for training and held out.

Training and held-out fonts are of different families. The hashes were taken from Debian 12 (bookworm); another
release may ship other versions of a file, which the font set ``debian`` refuses and ``debian-any`` accepts.
``builtin`` is the one face embedded in Pillow: it needs no package, and is the same for both splits.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mirada.errors import NotAvailable, SettingsError

FONT_ROOT = Path("/usr/share/fonts")
FONT_SETS = ("debian", "debian-any", "builtin")


@dataclass(frozen=True, slots=True)
class FontFile:
    """One font file: Debian package, path below ``FONT_ROOT``, SHA-256 in hex."""

    package: str
    path: str
    sha256: str

    @property
    def name(self) -> str:
        return Path(self.path).name


BUILTIN = FontFile("", "builtin", "")


@functools.cache
def listed_fonts(split: str) -> tuple[FontFile, ...]:
    """The fonts of one split (``train`` or ``held``) from fonts.txt."""
    text = resources.files("mirada.synth").joinpath("fonts.txt").read_text(encoding="ascii")
    rows = (line.split() for line in text.splitlines() if line and not line.startswith("#"))
    return tuple(FontFile(package, path, sha256) for its_split, package, sha256, path in rows if its_split == split)


def font_files(fonts: str, split: str) -> tuple[FontFile, ...]:
    """The files of a font set for one split. Raises SettingsError for an unknown set."""
    if fonts not in FONT_SETS:
        raise SettingsError(f"font set {fonts!r} is unknown", f"use one of {', '.join(FONT_SETS)}")
    if fonts == "builtin":
        return (BUILTIN,)
    return listed_fonts(split)


def missing_packages(split: str | None = None) -> list[str]:
    """Debian packages whose files are not on this machine (of one split, or of both)."""
    files = [file for its_split in ("train", "held") if split in (its_split, None) for file in listed_fonts(its_split)]
    return sorted({file.package for file in files if not (FONT_ROOT / file.path).is_file()})


@functools.cache
def font_bytes(file: FontFile, strict: bool, root: Path = FONT_ROOT) -> bytes:
    """The checked bytes of a font file.

    Raises NotAvailable when the file is absent (naming every missing package), or when ``strict`` and its hash differs.
    """
    path = root / file.path
    if not path.is_file():
        packages = " ".join(missing_packages() or [file.package])
        raise NotAvailable(
            f"font file {path} is missing",
            f"run: apt-get install --no-install-recommends {packages}; or draw with fonts='builtin'",
        )
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if strict and digest != file.sha256:
        raise NotAvailable(
            f"font file {path} has SHA-256 {digest}, expected {file.sha256}",
            f"install the Debian 12 version of {file.package}, or accept other versions with fonts='debian-any'",
        )
    return data
