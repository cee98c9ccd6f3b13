"""The circuit breaker, by a clock that is moved, and what a peer's `Retry-After` comes to."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eci_pay.breaker import FAILURES_MAX, JITTER, OPEN_SECONDS_FIRST, OPEN_SECONDS_MAX, Breaker
from eci_pay.peers import RETRY_AFTER_SECONDS_MAX, retry_after_seconds


class Seconds:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds() -> Seconds:
    """The breaker's clock."""
    return Seconds()


@pytest.fixture
def breaker(seconds: Seconds) -> Breaker:
    """A breaker that has seen nothing yet."""
    return Breaker(seconds)


def fail_all(breaker: Breaker, count: int = FAILURES_MAX, *, retry_after_seconds: float = 0.0) -> list[bool]:
    """That many different things fail; tells of each whether it opened the breaker."""
    return [breaker.fail(number, retry_after_seconds=retry_after_seconds) for number in range(count)]


def assert_open_for(breaker: Breaker, at_least: float) -> None:
    """It is open for so long, or a little longer."""
    assert not breaker.is_closed
    assert at_least <= breaker.wait_seconds <= (1 + JITTER) * at_least


def fail_probe(breaker: Breaker, seconds: Seconds, *, retry_after_seconds: float = 0.0) -> None:
    """Waits until a probe may be made, a millisecond more for what rounding takes, and lets it fail."""
    seconds.now += breaker.wait_seconds + 0.001
    assert breaker.wait_seconds == 0
    assert not breaker.is_closed
    assert not breaker.fail("probe", retry_after_seconds=retry_after_seconds)


def test_it_is_closed_at_first(breaker: Breaker) -> None:
    assert (breaker.is_closed, breaker.wait_seconds) == (True, 0.0)


def test_it_opens_when_enough_different_things_have_failed(breaker: Breaker) -> None:
    assert fail_all(breaker, FAILURES_MAX - 1) == [False] * (FAILURES_MAX - 1)
    assert breaker.is_closed
    assert breaker.fail("the last") is True
    assert_open_for(breaker, OPEN_SECONDS_FIRST)


def test_one_thing_that_always_fails_does_not_open_it(breaker: Breaker) -> None:
    assert not any(breaker.fail("poison") for _ in range(100 * FAILURES_MAX))
    assert (breaker.is_closed, breaker.wait_seconds) == (True, 0.0)


def test_a_success_forgets_what_has_failed(breaker: Breaker) -> None:
    for _ in range(3):
        assert not any(fail_all(breaker, FAILURES_MAX - 1))
        assert breaker.succeed() is None
    assert breaker.is_closed


def test_open_it_tells_of_that_once(breaker: Breaker) -> None:
    assert fail_all(breaker, 5 * FAILURES_MAX).count(True) == 1


def test_failures_of_what_was_under_way_do_not_keep_it_open_for_longer(breaker: Breaker, seconds: Seconds) -> None:
    fail_all(breaker)
    wait = breaker.wait_seconds
    seconds.now += wait / 2
    fail_all(breaker, retry_after_seconds=OPEN_SECONDS_MAX)
    assert breaker.wait_seconds == pytest.approx(wait / 2)


def test_time_alone_does_not_close_it(breaker: Breaker, seconds: Seconds) -> None:
    fail_all(breaker)
    seconds.now += 1_000_000
    assert (breaker.is_closed, breaker.wait_seconds) == (False, 0.0)


def test_each_probe_that_fails_keeps_it_open_twice_as_long_up_to_a_maximum(breaker: Breaker, seconds: Seconds) -> None:
    fail_all(breaker)
    for expected in (2, 4, 8, 16, OPEN_SECONDS_MAX, OPEN_SECONDS_MAX):
        fail_probe(breaker, seconds)
        assert_open_for(breaker, expected)


def test_a_success_closes_it_and_tells_how_long_it_was_open(breaker: Breaker, seconds: Seconds) -> None:
    fail_all(breaker)
    opened_at = seconds.now
    fail_probe(breaker, seconds)
    fail_probe(breaker, seconds)
    seconds.now += 100
    assert breaker.succeed() == pytest.approx(seconds.now - opened_at)
    assert (breaker.is_closed, breaker.wait_seconds) == (True, 0.0)
    assert breaker.succeed() is None


def test_a_success_while_it_is_open_closes_it_at_once(breaker: Breaker, seconds: Seconds) -> None:
    fail_all(breaker)
    seconds.now += 0.5
    assert breaker.succeed() == pytest.approx(0.5)
    assert breaker.is_closed


def test_closed_again_it_starts_anew(breaker: Breaker, seconds: Seconds) -> None:
    fail_all(breaker)
    for _ in range(4):
        fail_probe(breaker, seconds)
    breaker.succeed()
    assert fail_all(breaker) == [False] * (FAILURES_MAX - 1) + [True]
    assert_open_for(breaker, OPEN_SECONDS_FIRST)


@pytest.mark.parametrize(
    ("asked", "open_seconds"),
    [(0.5, OPEN_SECONDS_FIRST), (7.0, 7.0), (OPEN_SECONDS_MAX, OPEN_SECONDS_MAX), (86_400.0, OPEN_SECONDS_MAX)],
)
def test_it_stays_open_as_long_as_the_other_side_asks_but_not_for_ever(
    breaker: Breaker, seconds: Seconds, asked: float, open_seconds: float
) -> None:
    fail_all(breaker, retry_after_seconds=asked)
    assert_open_for(breaker, open_seconds)
    fail_probe(breaker, seconds, retry_after_seconds=asked)
    assert_open_for(breaker, max(2 * OPEN_SECONDS_FIRST, open_seconds))


def test_breakers_that_open_together_do_not_probe_together(seconds: Seconds) -> None:
    breakers = [Breaker(seconds) for _ in range(20)]
    for breaker in breakers:
        fail_all(breaker)
    assert len({breaker.wait_seconds for breaker in breakers}) > 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, 0.0),
        ("", 0.0),
        ("0", 0.0),
        ("7", 7.0),
        (" 120 ", 120.0),
        ("007", 7.0),
        ("86400", 86_400.0),
        ("86401", RETRY_AFTER_SECONDS_MAX),
        (5000 * "9", RETRY_AFTER_SECONDS_MAX),
        ("-7", 0.0),
        ("1.5", 0.0),
        ("1e3", 0.0),
        ("7 seconds", 0.0),
        ("7, 8", 0.0),
        ("٧", 0.0),
        ("²", 0.0),
        ("soon", 0.0),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 0.0),
        ("Mon, 01 Jan 2999 00:00:00 GMT", RETRY_AFTER_SECONDS_MAX),
        ("Mon, 41 Jan 2999 00:00:00 GMT", 0.0),
        ("Mon, 01 Jan 2999 99:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_a_number_of_seconds_within_a_day_or_nothing(value: str | None, expected: float) -> None:
    assert retry_after_seconds(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Mon, 01 Jan 2999 00:00:00 +99999999999999999999",
        "Mon, 01 Jan 2999 00:00:99999999999999999999 GMT",
    ],
)
def test_retry_after_with_a_number_beyond_all_dates_says_nothing(value: str) -> None:
    assert retry_after_seconds(value) == 0.0


@pytest.mark.parametrize(
    "written",
    [lambda date: format_datetime(date, usegmt=True), "{:%A, %d-%b-%y %H:%M:%S GMT}".format, datetime.ctime],
    ids=["RFC 5322", "RFC 850", "asctime"],
)
def test_retry_after_may_be_a_date_in_each_of_the_three_forms(written: Callable[[datetime], str]) -> None:
    before = datetime.now(UTC)
    date = (before + timedelta(minutes=5)).replace(microsecond=0)
    seconds = retry_after_seconds(written(date))
    assert (date - datetime.now(UTC)).total_seconds() <= seconds <= (date - before).total_seconds()


def test_the_zone_of_a_date_counts() -> None:
    before = datetime.now(UTC)
    date = (before + timedelta(minutes=5)).replace(microsecond=0)
    for hours in (-8, 0, 5.5):
        zone = timedelta(hours=hours)
        text = format_datetime((date + zone).replace(tzinfo=None)).replace("-0000", _offset(zone))
        seconds = retry_after_seconds(text)
        assert (date - datetime.now(UTC)).total_seconds() <= seconds <= (date - before).total_seconds()


def _offset(zone: timedelta) -> str:
    minutes = round(zone.total_seconds() / 60)
    return f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}{abs(minutes) % 60:02}"


_NUMBERS = st.sampled_from(["01", "99", "06-Nov-94", "2999", "68", "00:00:00", "99:99:99", "1:2", 20 * "9", "+0530"])
_WORDS = st.sampled_from(["Mon,", "Monday,", "Jan", "Foo", "GMT", "EST", "-0000", "::", ".", ",", "(", "-", "+"])


@given(st.text() | st.lists(_NUMBERS | _WORDS).map(" ".join) | st.integers().map(str))
def test_whatever_retry_after_says_it_is_a_wait_of_at_most_a_day(value: str) -> None:
    assert 0.0 <= retry_after_seconds(value) <= RETRY_AFTER_SECONDS_MAX
