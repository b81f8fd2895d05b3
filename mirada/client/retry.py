"""When to ask again, and after how long: full-jitter exponential backoff that obeys ``Retry-After``.

After M. Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015): the pause is uniform between zero and a bound
that doubles, so that clients that were refused together do not come back together.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from mirada.errors import SettingsError

Random = Callable[[], float]
"""A number in [0, 1)."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Attempts beside the first, and the pauses between them, in seconds."""

    retries: int = 4
    first: float = 0.5
    """Upper bound of the first pause; doubled for each further one."""
    longest: float = 30.0
    """Upper bound of any."""
    obey: float = 120.0
    """The longest ``Retry-After`` that is waited for; a server that asks for more is not asked again."""
    after_tokens: bool = False
    """Ask again also when a stream broke off after pieces of it were passed on. The new answer must begin with them: where it
    does not (sampling without a seed), the request fails."""

    def __post_init__(self) -> None:
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise SettingsError(f"retries={self.retries!r} is no number of attempts", "give a whole number of at least 0")
        for name in ("first", "longest", "obey"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise SettingsError(f"{name}={value!r} is no number of seconds", "give a number of at least 0")

    def pause(self, attempt: int, asked: float | None = None, chance: Random = random.random) -> float | None:
        """Seconds before attempt ``attempt`` + 1 (``attempt`` counts from 0); None: do not ask again. ``asked``: what the
        server asks for; the jitter comes on top of it, for it said the same to others."""
        if attempt >= self.retries or (asked is not None and asked > self.obey):
            return None
        jitter = chance() * min(self.longest, self.first * 2 ** min(attempt, 60))
        return jitter if asked is None else asked + min(jitter, max(1.0, asked / 4))


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """``Retry-After`` in seconds: a number, or an HTTP date (RFC 9110, 10.2.3). None if it says nothing usable."""
    value = (value or "").strip()
    if not value:
        return None
    if value.replace(".", "", 1).isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())
