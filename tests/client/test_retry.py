"""Pauses between attempts."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from mirada.client.retry import Retry, retry_after
from mirada.errors import SettingsError

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


def test_the_bound_doubles_up_to_the_longest():
    policy = Retry(retries=6, first=1, longest=10)
    assert [policy.pause(n, chance=lambda: 1.0) for n in range(7)] == [1, 2, 4, 8, 10, 10, None]
    assert [policy.pause(n, chance=lambda: 0.0) for n in range(3)] == [0, 0, 0]
    assert policy.pause(5, chance=lambda: 0.25) == 2.5
    assert Retry(retries=5000).pause(4999, chance=lambda: 1.0) == 30


def test_what_the_server_asks_for_is_waited_for_or_not_at_all():
    policy = Retry(obey=60)
    assert policy.pause(0, 20, chance=lambda: 0.0) == 20
    assert 20 < (policy.pause(0, 20, chance=lambda: 0.9) or 0) < 21
    assert policy.pause(0, 61) is None and policy.pause(4, 0) is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        (" 0.5 ", 0.5),
        ("Sat, 21 Nov 2026 12:00:30 GMT", 30.0),
        ("Sat, 21 Nov 2026 11:00:00 GMT", 0.0),
        ("Sat, 21 Nov 2026 14:00:10 +0200", 10.0),
        ("soon", None),
        ("-3", None),
        ("", None),
        (None, None),
        ("1e9", None),
    ],
)
def test_retry_after(value, seconds):
    assert retry_after(value, NOW) == seconds


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"retries": True}, {"first": -1}, {"longest": float("nan")}, {"obey": "x"}])
def test_what_is_no_policy(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Retry(**wrong)


@pytest.mark.parametrize("year", ["9" * 20, "2020 00:00:00 +" + "9" * 14])
def test_a_date_of_any_length_says_nothing(year):
    """And is no defect of ours: the server's error is what is told."""
    assert retry_after(f"Mon, 01 Jan {year} 00:00:00 GMT") is None
