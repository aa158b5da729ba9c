"""What a payment proves about an attempt whose record is lost, and when such payments are searched for."""

from __future__ import annotations

import itertools
import uuid
from datetime import datetime, timedelta

import pytest

from billing_orchestration.domain.attempts import SCAN_MARGIN
from billing_orchestration.domain.lost_attempts import (
    Identity,
    find_lost,
    identity_of,
    parts_of,
    stretches_to_search,
)
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


def searched(whole: datetime | None, matched: datetime | None) -> tuple[datetime, datetime] | None:
    """From when the list is searched for what is not finished, and for what is paid; without the two clocks' margin."""
    stretches = stretches_to_search(NOW, whole_until=whole, matched_until=matched, earliest=EARLIEST)
    if stretches is None:
        return None
    assert stretches.whole[1] == NOW + SCAN_MARGIN
    first = stretches.unfinished or stretches.whole
    assert stretches.since == first[0]
    # No charge is created between the two.
    assert stretches.unfinished is None or stretches.unfinished[1] == stretches.whole[0]
    return first[0] + SCAN_MARGIN, stretches.whole[0] + SCAN_MARGIN


def back(since: datetime, paid_since: datetime | None = None) -> tuple[datetime, datetime]:
    """The same, each a little earlier, in case the list lags behind."""
    return since - CATCH_UP_OVERLAP, (paid_since or since) - CATCH_UP_OVERLAP


@pytest.mark.parametrize(
    ("whole", "matched", "expected"),
    [
        # A run that charges was here a moment ago: every key is young.
        (NOW - MINUTE, None, None),
        (NOW - CATCH_UP_OVERLAP, NOW - DAY, None),
        # In use: the matching job was here a moment ago, and has seen what is paid. It proves nothing about the rest.
        (NOW - CATCH_UP_OVERLAP - SECOND, NOW, back(NOW - CATCH_UP_OVERLAP - SECOND, NOW)),
        (NOW - DAY, NOW - 2 * MINUTE, back(NOW - DAY, NOW - 2 * MINUTE)),
        (NOW - 6 * DAY, NOW, back(NOW - 6 * DAY, NOW)),
        # A backup: everything since then.
        (NOW - DAY, NOW - 5 * HOUR, back(NOW - DAY, NOW - 5 * HOUR)),
        (NOW - 5 * HOUR, NOW - DAY, back(NOW - 5 * HOUR)),
        (NOW - DAY, None, back(NOW - DAY)),
        # A watermark of this minute, and nobody looked for longer than it can catch up: it may have left a gap.
        (NOW - LONGEST_CATCH_UP, NOW, back(NOW - LONGEST_CATCH_UP, NOW)),
        (NOW - LONGEST_CATCH_UP - SECOND, NOW, back(NOW - LONGEST_CATCH_UP - SECOND)),
        # No records at all: whatever can still be due.
        (None, NOW, (EARLIEST, EARLIEST)),
        (None, None, (EARLIEST, EARLIEST)),
        (NOW - 90 * DAY, NOW, (EARLIEST, EARLIEST)),
        # An instant in the future proves nothing.
        (NOW + SECOND, NOW, (EARLIEST, EARLIEST)),
        (NOW - DAY, NOW + SECOND, back(NOW - DAY)),
    ],
)
def test_the_list_is_searched_from_where_our_records_are_whole(
    whole: datetime | None, matched: datetime | None, expected: tuple[datetime, datetime] | None
) -> None:
    assert searched(whole, matched) == expected


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
