"""Which succeeded provider payments the books lack: the diffs of both matching jobs."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.matching import MatchingDiff, by_provider_id, diff_pending, diff_successful
from billing_orchestration.domain.provider_payment import ATTEMPT_KEY, ProviderPayment
from billing_orchestration.domain.settlement_decisions import PaymentRow
from billing_orchestration_tests.domain.given import NOW, a_payment, a_row, an_attempt, the_payment_of

MINUTE = timedelta(minutes=1)
STATUSES = ("CREATED", "PENDING", "SUCCEEDED", "EXPIRED", "CANCELED", "REFUNDED", None)


def successful(
    paid: list[ProviderPayment], *rows: PaymentRow, settled: tuple[str, ...] = (), grace: timedelta = MINUTE
) -> MatchingDiff:
    return diff_successful(paid, by_provider_id(rows), frozenset(settled), now=NOW, webhook_grace=grace)


def pending(
    paid: list[ProviderPayment], *rows: PaymentRow, nameless: tuple[PaymentRow, ...] = (), grace: timedelta = MINUTE
) -> MatchingDiff:
    return diff_pending(paid, by_provider_id(rows), nameless, now=NOW, webhook_grace=grace)


# --- matching_pending_payments_job


def test_pending_here_and_succeeded_there_is_settled() -> None:
    paid = [a_payment(id="pay-1"), a_payment(id="pay-2")]
    diff = pending(paid, a_row("PENDING", external_payment_id="pay-2"))
    assert diff == MatchingDiff(to_settle=(paid[1],), reported=(), agreed=1)


def test_a_pending_row_that_nobody_paid_is_left_alone() -> None:
    diff = pending([], a_row("PENDING"))
    assert diff == MatchingDiff((), (), 0)


# --- matching_successful_payments_job


def test_a_success_without_any_row_is_settled() -> None:
    payment = a_payment()
    assert successful([payment]) == MatchingDiff((payment,), (), 0)


@pytest.mark.parametrize("status", ["CREATED", "PENDING", "EXPIRED"])
def test_a_success_whose_row_is_created_pending_or_expired_is_settled(status: str) -> None:
    payment = a_payment()
    assert successful([payment], a_row(status)).to_settle == (payment,)


@pytest.mark.parametrize("status", ["CANCELED", None])
def test_a_success_whose_row_says_canceled_or_nothing_goes_to_settling_which_asks_a_person(status: str | None) -> None:
    payment = a_payment()
    assert successful([payment], a_row(status)).to_settle == (payment,)


@pytest.mark.parametrize("status", ["SUCCEEDED", "REFUNDED"])
def test_a_success_that_the_service_holds_as_succeeded_or_refunded_is_left(status: str) -> None:
    assert successful([a_payment()], a_row(status, subscription_id=12)) == MatchingDiff((), (), 1)


def test_of_several_rows_with_one_provider_id_one_success_is_enough() -> None:
    rows = [a_row("PENDING", id=1), a_row("SUCCEEDED", id=2, subscription_id=12), a_row("EXPIRED", id=3)]
    diff = successful([a_payment()], *rows)
    assert (diff.to_settle, diff.agreed) == ((), 1)


def test_rows_that_share_one_provider_id_are_reported_as_duplicates_of_the_one_that_is_settled() -> None:
    rows = [a_row("EXPIRED", id=1), a_row("PENDING", id=2), a_row("SUCCEEDED", id=3, subscription_id=12)]
    assert [(d.action, d.subject) for d in successful([a_payment()], *rows).reported] == [
        ("leave", "payment 1"),
        ("leave", "payment 2"),
    ]
    assert [d.subject for d in successful([a_payment()], *rows[:2]).reported] == ["payment 1"]
    diff = pending([a_payment()], a_row(id=1), a_row(id=2))
    assert (len(diff.to_settle), [d.subject for d in diff.reported]) == (1, ["payment 2"])
    closed = [a_row("CANCELED", id=1), a_row("CANCELED", id=2)]
    assert [d.subject for d in successful([a_payment()], *closed).reported] == ["payment 2"]
    assert all("payment 3" in d.reason and "pay-1" in d.reason for d in successful([a_payment()], *rows).reported)


def test_a_pending_row_without_a_provider_id_is_reported_with_the_reason() -> None:
    diff = pending([], nameless=(a_row(external_payment_id=None),))
    [report] = diff.reported
    assert (report.action, report.subject) == ("leave", "payment 7")
    assert "no provider id" in report.reason


def test_a_payment_that_these_jobs_have_settled_is_never_settled_again() -> None:
    assert successful([a_payment()], settled=("pay-1",)).to_settle == ()
    assert successful([a_payment()], a_row("EXPIRED"), settled=("pay-1",)).to_settle == ()


def test_a_renewal_of_ours_that_the_webhook_has_written_still_closes_its_attempt() -> None:
    renewal = the_payment_of(an_attempt())
    row = a_row("SUCCEEDED", external_payment_id=renewal.id, subscription_id=12)
    assert successful([renewal], row).to_settle == (renewal,)
    assert successful([renewal], row, settled=(renewal.id,)) == MatchingDiff((), (), 1)


def test_a_success_that_the_service_granted_to_nobody_is_settled() -> None:
    payment = a_payment()
    half_settled = a_row("SUCCEEDED", subscription_id=None)
    assert successful([payment], half_settled) == MatchingDiff((payment,), (), 0)
    # Its webhook may be between its two steps; and what we have settled ourselves is granted, whatever the row says.
    assert [d.code for d in successful([a_payment(captured_at=NOW)], half_settled).reported] == ["left_to_webhook"]
    assert successful([payment], half_settled, settled=("pay-1",)) == MatchingDiff((), (), 1)
    assert successful([payment], a_row("REFUNDED", subscription_id=None)) == MatchingDiff((), (), 1)


@pytest.mark.parametrize(("age_s", "left"), [(0, True), (59, True), (60, False), (3600, False)])
def test_a_payment_younger_than_a_minute_may_be_left_to_the_webhook(age_s: int, left: bool) -> None:
    payment = a_payment(created_at=NOW - timedelta(hours=1), captured_at=NOW - timedelta(seconds=age_s))
    diff = successful([payment])
    assert (diff.to_settle == ()) is left
    assert [decision.action for decision in diff.reported] == (["leave"] if left else [])
    assert diff.agreed == 0


def test_the_age_of_a_payment_without_a_capture_is_that_of_its_creation() -> None:
    assert successful([a_payment(created_at=NOW, captured_at=None)]).to_settle == ()
    assert len(successful([a_payment(created_at=NOW - MINUTE, captured_at=None)]).to_settle) == 1


@pytest.mark.parametrize("status", STATUSES)
def test_a_payment_younger_than_a_minute_is_left_to_the_webhook_with_a_row_too(status: str | None) -> None:
    # The webhook takes no locks: it may have read this row, and be about to grant.
    payment, row = a_payment(captured_at=NOW - timedelta(seconds=59)), a_row(status)
    for diff in (successful([payment], row), *([pending([payment], row)] if status == "PENDING" else [])):
        assert diff.to_settle == ()
        is_left = [(decision.action, decision.code) for decision in diff.reported] == [("leave", "left_to_webhook")]
        assert is_left is (status != "REFUNDED")
        assert diff.agreed == (status == "REFUNDED")


def test_the_pending_job_settles_what_is_a_minute_old() -> None:
    payment = a_payment(captured_at=NOW - MINUTE)
    assert pending([payment], a_row("PENDING")) == MatchingDiff((payment,), (), 0)


def test_without_a_grace_everything_is_repaired_at_once_even_if_the_providers_clock_is_ahead() -> None:
    for captured_at in (NOW, NOW + timedelta(seconds=5), NOW + timedelta(hours=1)):
        payment = a_payment(captured_at=captured_at)
        assert successful([payment], grace=timedelta(0)).to_settle == (payment,)
        assert pending([payment], a_row("PENDING"), grace=timedelta(0)).to_settle == (payment,)


def test_what_is_settled_goes_in_the_order_in_which_it_was_paid() -> None:
    late_capture = a_payment(id="a", created_at=NOW - 50 * MINUTE, captured_at=NOW - 5 * MINUTE)
    early = a_payment(id="c", created_at=NOW - 20 * MINUTE, captured_at=NOW - 19 * MINUTE)
    never_captured = a_payment(id="b", created_at=NOW - 10 * MINUTE, captured_at=None)
    expected = (early, never_captured, late_capture)
    assert successful([late_capture, never_captured, early]).to_settle == expected
    rows = [a_row(external_payment_id=name) for name in "abc"]
    assert pending([late_capture, never_captured, early], *rows).to_settle == expected


def test_rows_without_a_provider_id_match_nothing() -> None:
    assert by_provider_id([a_row(external_payment_id=None)]) == {}
    duplicate = [a_row(id=1), a_row(id=2)]
    assert by_provider_id(duplicate) == {"pay-1": duplicate}


@settings(max_examples=100, deadline=None)
@given(
    books=st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(STATUSES)), max_size=8),
    settled=st.frozensets(st.sampled_from("abcdef")),
    ages=st.lists(st.integers(0, 300), min_size=6, max_size=6),
)
def test_every_success_is_settled_agreed_or_left_to_the_webhook_and_only_one_of_these(
    books: list[tuple[str, str | None]], settled: frozenset[str], ages: list[int]
) -> None:
    paid = [
        a_payment(id=name, captured_at=NOW - timedelta(seconds=age)) for name, age in zip("abcdef", ages, strict=True)
    ]
    rows = [
        a_row(status, id=number, external_payment_id=name, subscription_id=1)
        for number, (name, status) in enumerate(books)
    ]
    diff = diff_successful(paid, by_provider_id(rows), settled, now=NOW, webhook_grace=MINUTE)
    left = [decision for decision in diff.reported if "webhook" in decision.reason]
    assert len(diff.to_settle) + diff.agreed + len(left) == len(paid)
    for payment in diff.to_settle:
        assert payment.id not in settled
        assert not {status for name, status in books if name == payment.id} & {"SUCCEEDED", "REFUNDED"}


def test_a_payment_without_a_row_and_without_any_of_our_keys_is_foreign() -> None:
    others = a_payment(metadata={"order": "7"})
    diff = successful([others], grace=timedelta(minutes=30))
    assert (diff.to_settle, diff.agreed, diff.foreign) == ((), 0, 1)
    assert [(decision.subject, decision.code) for decision in diff.reported] == [(f"payment {others.id}", Code.FOREIGN)]


@pytest.mark.parametrize(
    "key", ["user_id", "plan_id", "payment_provider_id", ATTEMPT_KEY, "subscription_id", "period_start"]
)
def test_metadata_with_one_of_our_keys_is_a_persons(key: str) -> None:
    for value in ("7", "", None):
        partly = a_payment(metadata={key: value, "order": "7"})
        assert successful([partly]).to_settle == (partly,)


def test_what_may_be_ours_is_not_foreign() -> None:
    nameless, partly = a_payment(metadata={}), a_payment(metadata={"plan_id": ""})
    assert successful([nameless], a_row("PENDING")).to_settle == (nameless,)
    assert successful([partly]).to_settle == (partly,)
    assert successful([nameless], settled=(nameless.id,)).agreed == 1
    told = diff_successful([nameless], {}, frozenset(), now=NOW, webhook_grace=MINUTE, leaves_foreign=False)
    assert (told.to_settle, told.foreign) == ((nameless,), 0)
