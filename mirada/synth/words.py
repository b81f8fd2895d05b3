"""The word list, split into training and held-out words, and the strings that text lines are made of."""

from __future__ import annotations

import bisect
import functools
import hashlib
import random
import string
from importlib import resources

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_FIXED = {name.lower() for name in MONTHS + DAYS} | {"am", "pm", "no", "com", "org", "net", "id", "to", "of", "and", "the"}
"""Words that fixed forms (dates, times, addresses) need: never held out."""
_CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_MIXED = "".join(c for c in string.ascii_letters + string.digits if c not in "IlO0")
"""Random strings mostly avoid characters that many fonts draw alike."""
_ALL = "".join(map(chr, range(33, 127)))


def is_held(word: str) -> bool:
    """Whether a word is held out: one in ten, by SHA-256 of its lower-case form."""
    word = word.lower()
    return word not in _FIXED and hashlib.sha256(word.encode()).digest()[0] % 10 == 0


@functools.lru_cache(maxsize=1)
def all_words() -> tuple[str, ...]:
    """Every word of words.txt, shortest first."""
    text = resources.files("mirada.synth").joinpath("words.txt").read_text(encoding="ascii")
    listed = (line.strip() for line in text.splitlines())
    return tuple(sorted((w for w in listed if w and not w.startswith("#")), key=lambda w: (len(w), w)))


@functools.lru_cache(maxsize=2)
def words(split: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Words of a split, shortest first, and their lengths."""
    chosen = tuple(w for w in all_words() if is_held(w) == (split == "held"))
    return chosen, tuple(map(len, chosen))


@functools.lru_cache(maxsize=1)
def held_words() -> frozenset[str]:
    return frozenset(words("held")[0])


def pick_word(rng: random.Random, split: str, max_chars: int = 12, min_chars: int = 2) -> str:
    """A lower-case word of ``min_chars`` to ``max_chars`` letters (at least 2)."""
    listed, lengths = words(split)
    low, high = bisect.bisect_left(lengths, min_chars), bisect.bisect_right(lengths, max(max_chars, 2))
    return listed[rng.randrange(low, high)]


def _cased(rng: random.Random, word: str) -> str:
    roll = rng.random()
    return word if roll < 0.5 else word.capitalize() if roll < 0.75 else word.upper()


def _word(rng: random.Random, split: str, limit: int) -> str:
    return _cased(rng, pick_word(rng, split, limit))


def _phrase(rng: random.Random, split: str, limit: int) -> str:
    target = rng.randint(min(5, limit), limit)
    parts, left = [], target
    while left >= 2:
        word = pick_word(rng, split, min(left, 12)) if rng.random() < 0.9 else str(rng.randrange(10 ** min(left, 4)))
        parts.append(word)
        left -= len(word) + 1
    roll = rng.random()
    text = " ".join(parts)
    if roll < 0.45:
        text = text[0].upper() + text[1:]
    elif roll < 0.6:
        text = " ".join(w.capitalize() for w in parts)
    elif roll < 0.75:
        text = text.upper()
    if len(text) < limit and rng.random() < 0.2:
        text += rng.choice(".!?:")
    return text


def _number(rng: random.Random, split: str, limit: int) -> str:
    digits = rng.randint(1, min(limit, 8))
    text = "".join(rng.choices(string.digits, k=digits))
    if digits > 1 and text[0] == "0":
        text = rng.choice("123456789") + text[1:]
    roll = rng.random()
    if digits > 3 and roll < 0.2 and digits + (digits - 1) // 3 <= limit:
        return f"{int(text):,}"
    if roll > 0.85 and digits + 2 <= limit:
        return f"{text}.{rng.randrange(10)}"
    if roll > 0.78 and digits + 1 <= limit:
        return rng.choice((f"-{text}", f"{text}%", f"#{text}", f"+{text}"))
    return text


def _price(rng: random.Random, split: str, limit: int) -> str:
    whole = str(rng.randrange(1, 10 ** min(max(limit - 4, 1), 4)))
    return rng.choice((f"${whole}.{rng.randrange(100):02d}", f"${whole}.{rng.choice((0, 50, 95, 99)):02d}", f"${whole}"))


def _date(rng: random.Random, split: str, limit: int) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2035)
    name = MONTHS[month - 1]
    forms = (f"{year}-{month:02d}-{day:02d}", f"{day:02d}/{month:02d}/{year}", f"{day} {name} {year}", f"{name} {day}, {year}",
             f"{day}.{month}.{year}", f"{name} {year}", f"{DAYS[day % 7]} {day} {name}", f"{month}/{day}", f"{day} {name}",
             f"{year}")  # fmt: skip
    fitting = [form for form in forms if len(form) <= limit]
    return rng.choice(fitting)


def _time(rng: random.Random, split: str, limit: int) -> str:
    hour, minute = rng.randrange(24), rng.randrange(60)
    forms = [f"{hour:02d}:{minute:02d}", f"{hour}:{minute:02d}"]
    if limit >= 8:
        forms += [
            f"{hour % 12 + 1}:{minute:02d} {rng.choice(('am', 'pm', 'AM', 'PM'))}",
            f"{hour:02d}:{minute:02d}:{rng.randrange(60):02d}",
        ]
    return rng.choice(forms)


def _code(rng: random.Random, split: str, limit: int) -> str:
    """A string of a pattern: A is a capital letter, 9 a digit, the rest stands for itself."""
    patterns = ("A9", "A99", "AA99")
    if limit >= 6:
        patterns = ("A9-999", "AA-999", "AAA999", "#99999")
    if limit >= 10 and rng.random() < 0.5:
        patterns = ("AAA-99-AA", "999-99-99", "v9.9.99")
    pools = {"A": _CODE_LETTERS, "9": string.digits}
    return "".join(rng.choice(pools.get(char, char)) for char in rng.choice(patterns))


def _email(rng: random.Random, split: str, limit: int) -> str:
    end = rng.choice((".com", ".org", ".net"))
    name = pick_word(rng, split, min(8, limit - 8))
    host = pick_word(rng, split, min(8, limit - len(name) - 5))
    return f"{name}@{host}{end}"


def _random(rng: random.Random, split: str, limit: int) -> str:
    pool = rng.choice((_MIXED, _MIXED, string.ascii_lowercase, string.ascii_uppercase, string.digits, _ALL))
    count = rng.randint(1, min(limit, 12))
    return "".join(rng.choices(pool, k=count))


_KINDS = {
    "word": (_word, 2, 30), "number": (_number, 1, 14), "price": (_price, 5, 5), "date": (_date, 5, 5), "time": (_time, 5, 4),
    "code": (_code, 4, 6), "phrase": (_phrase, 8, 24), "email": (_email, 16, 1), "random": (_random, 1, 14),
}  # fmt: skip
LINE_KINDS: tuple[str, ...] = tuple(_KINDS)


def _has_held(text: str) -> bool:
    """Whether a held-out word stands in ``text`` by chance (as in a random string)."""
    token = []
    for char in text.lower() + " ":
        if char.isalpha():
            token.append(char)
        elif token:
            if "".join(token) in held_words():
                return True
            token = []
    return False


def line_text(rng: random.Random, split: str, max_chars: int) -> tuple[str, str]:
    """A text of 1 to ``max_chars`` characters and its kind (an entry of LINE_KINDS).

    Training texts hold no held-out word; in the held split every dictionary word is a held-out one.
    """
    fitting = [(name, make, weight) for name, (make, least, weight) in _KINDS.items() if least <= max_chars]
    # Beyond 16 characters only phrases grow, so they take a larger share of the longer levels.
    weights = [weight * (3 if name == "phrase" and max_chars > 16 else 1) for name, _, weight in fitting]
    while True:
        name, make, _ = rng.choices(fitting, weights)[0]
        text = make(rng, split, max_chars)
        if 0 < len(text) <= max_chars and (split == "held" or not _has_held(text)):
            return text, name
