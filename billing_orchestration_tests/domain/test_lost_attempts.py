"""What a payment proves about an attempt whose record is lost, and when such payments are searched for."""

from __future__ import annotations

import itertools
import uuid
from datetime import datetime, timedelta

import pytest

from billing_orchestration.domain.attempts import SCAN_MARGIN
from billing_orchestration.domain.lost_attempts import Identity, find_lost, identity_of, parts_of, stretch_to_search
from billing_orchestration.domain.provider_payment import CANCELED, PENDING, SUCCEEDED, WAITING_FOR_CAPTURE
from billing_orchestration.domain.run_scope import CATCH_UP_OVERLAP, LONGEST_CATCH_UP
from billing_orchestration_tests.domain.given import DAY, HOUR, NOW, an_attempt, the_payment_of

MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
EARLIEST = NOW - 31 * DAY
ID = an_attempt().id


@pytest.mark.parametrize("number", [1, 2, 99])
def test_a_payment_proves_whose_attempt_it_is_by_the_derived_id(number: int) -> None:
    attempt = an_attempt(number=number)
    expected = Identity(attempt.subscription_id, attempt.period_start, number)
    assert identity_of(the_payment_of(attempt)) == expected


@pytest.mark.parametrize("change", ["subscription_id", "period_start", "renewal_attempt_id"])
@pytest.mark.parametrize("value", ["13", "2026-03-12T09:00:01+00:00", "2026-03-12T09:00:00", "", None, 7, ["x"]])
def test_one_that_does_not_derive_proves_nothing(change: str, value: object) -> None:
    payment = the_payment_of(an_attempt())
    odd = the_payment_of(an_attempt(), metadata={**payment.metadata, change: value})
    assert identity_of(odd) is None


def since(whole: datetime | None, matched: datetime | None) -> datetime | None:
    """From when the list is searched, without the margin for two clocks."""
    stretch = stretch_to_search(NOW, whole_until=whole, matched_until=matched, earliest=EARLIEST)
    if stretch is None:
        return None
    assert stretch[1] == NOW + SCAN_MARGIN
    return stretch[0] + SCAN_MARGIN


@pytest.mark.parametrize(
    ("whole", "matched", "expected"),
    [
        # In use: the matching job was here a moment ago.
        (NOW - DAY, NOW - 2 * MINUTE, None),
        (NOW - DAY, NOW - CATCH_UP_OVERLAP, None),
        (NOW - 6 * DAY, NOW, None),
        (NOW - MINUTE, None, None),
        # A backup: everything since then.
        (NOW - DAY, NOW - 5 * HOUR, NOW - 5 * HOUR - CATCH_UP_OVERLAP),
        (NOW - 5 * HOUR, NOW - DAY, NOW - 5 * HOUR - CATCH_UP_OVERLAP),
        (NOW - DAY, None, NOW - DAY - CATCH_UP_OVERLAP),
        # A watermark of this minute, and nobody looked for longer than it can catch up: it may have left a gap.
        (NOW - LONGEST_CATCH_UP - SECOND, NOW, NOW - LONGEST_CATCH_UP - SECOND - CATCH_UP_OVERLAP),
        # No records at all: whatever can still be due.
        (None, NOW, EARLIEST),
        (None, None, EARLIEST),
        (NOW - 90 * DAY, NOW, EARLIEST),
        # An instant in the future proves nothing.
        (NOW + SECOND, NOW, EARLIEST),
        (NOW - DAY, NOW + SECOND, NOW - DAY - CATCH_UP_OVERLAP),
    ],
)
def test_the_list_is_searched_from_where_our_records_are_whole(
    whole: datetime | None, matched: datetime | None, expected: datetime | None
) -> None:
    assert since(whole, matched) == expected


def test_a_long_stretch_is_searched_in_parts_without_a_gap() -> None:
    parts = list(parts_of((NOW - 31 * DAY, NOW + HOUR)))
    assert (parts[0][0], parts[-1][1]) == (NOW - 31 * DAY, NOW + HOUR)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(parts))
    assert max(end - start for start, end in parts) == DAY


@pytest.mark.parametrize(
    ("status", "known", "settled", "lost"),
    [
        (SUCCEEDED, {}, False, "successes"),
        (SUCCEEDED, {ID: False}, False, "successes"),  # its attempt was set back to an earlier state, or given up
        (SUCCEEDED, {ID: True}, False, None),  # its answer may be on its way to another run
        (SUCCEEDED, {ID: True}, True, None),
        (SUCCEEDED, {}, True, None),
        (PENDING, {}, False, "unfinished"),
        (PENDING, {ID: False}, False, "unfinished"),
        (WAITING_FOR_CAPTURE, {}, False, "unfinished"),
        (PENDING, {ID: True}, False, None),
        (CANCELED, {}, False, None),
    ],
)
def test_lost_is_what_is_paid_and_not_settled_or_unfinished_and_not_known(
    status: str, known: dict[uuid.UUID, bool], settled: bool, lost: str | None
) -> None:
    attempt = an_attempt()
    payment = the_payment_of(attempt, status=status)
    found = find_lost([payment], known, {payment.id} if settled else set())
    assert {name for name in ("successes", "unfinished") if getattr(found, name)} == ({lost} if lost else set())
    held = set() if lost is None else {attempt.id}
    assert (set(found.attempts), set(found.subscriptions)) == (held, {12} if held else set())
