"""What the provider's answer, its refusal, its silence or its list makes of an attempt."""

from __future__ import annotations

import dataclasses
import uuid
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain import declines
from billing_orchestration.domain.answers import (
    ProviderView,
    as_answer_to,
    attempts_to_search,
    judge_payment,
    judge_refusal,
    judge_silence,
    judge_unsent,
    merge_views,
    names_another_attempt,
    read_scan,
    scan_windows,
)
from billing_orchestration.domain.attempts import SCAN_MARGIN, State
from billing_orchestration.domain.provider_payment import (
    ATTEMPT_KEY,
    CANCELED,
    PENDING,
    WAITING_FOR_CAPTURE,
    UnusablePayment,
)
from billing_orchestration_tests.domain.given import (
    HOUR,
    NOW,
    a_decline,
    a_payment,
    a_sent_attempt,
    an_attempt,
    the_payment_of,
)

SECOND = timedelta(seconds=1)


# --- What an answer makes of an attempt


def test_a_success_is_named_as_such_and_left_to_settling() -> None:
    assert judge_payment(an_attempt(), the_payment_of(an_attempt())).state == State.SUCCEEDED


@pytest.mark.parametrize("status", [PENDING, WAITING_FOR_CAPTURE])
def test_an_unfinished_charge_is_pending_and_only_asked_about_from_then_on(status: str) -> None:
    assert judge_payment(an_attempt(), the_payment_of(an_attempt(), status=status)).state == State.PENDING


@pytest.mark.parametrize("reason", [*declines.CLASSES, "a_new_reason", None])
def test_a_decline_stops_the_period_or_leaves_it_to_a_later_attempt(reason: str | None) -> None:
    closing = judge_payment(an_attempt(), a_decline(an_attempt(), reason))
    assert closing.decline_class == declines.classify(reason)
    assert closing.state == (State.STOPPED if closing.decline_class in declines.STOPPING else State.DECLINED)
    assert (reason or "no reason given") in closing.reason
    assert "payment_network" in closing.reason


def test_a_hard_decline_stops_and_a_soft_one_does_not() -> None:
    assert judge_payment(an_attempt(), a_decline(an_attempt(), "card_expired")).state == State.STOPPED
    assert judge_payment(an_attempt(), a_decline(an_attempt(), "insufficient_funds")).state == State.DECLINED


def test_a_status_nobody_knows_is_no_outcome() -> None:
    with pytest.raises(ValueError, match="unknown status"):
        judge_payment(an_attempt(), a_payment(status="almost"))


def test_an_answer_that_names_another_attempt_is_not_about_this_one() -> None:
    mine, other = an_attempt(number=1), an_attempt(number=2)
    assert not names_another_attempt(mine, the_payment_of(mine))
    assert names_another_attempt(mine, the_payment_of(other))
    assert names_another_attempt(mine, a_payment(metadata={ATTEMPT_KEY: "something else"}))
    # One that names none may be about it.
    assert not names_another_attempt(mine, a_payment())


@pytest.mark.parametrize("kept", [{}, {"user_id": "ada"}, {ATTEMPT_KEY: None}, {"cms_name": "sdk"}])
def test_an_answer_without_the_attempts_name_is_still_about_it(kept: dict[str, Any]) -> None:
    # Else a renewal that was paid would look like a stranger's purchase, and be charged again after two empty scans.
    attempt = an_attempt()
    answer = as_answer_to(attempt, a_payment(metadata=kept))
    assert answer.claims.renewal_attempt_id == attempt.id
    assert answer.metadata["user_id"] == "ada"
    whole = the_payment_of(attempt)
    assert as_answer_to(attempt, whole) == whole
    # What names another attempt keeps its name: it is not about this one.
    foreign = the_payment_of(an_attempt(number=2))
    assert as_answer_to(attempt, foreign) == foreign


@pytest.mark.parametrize(("status_code", "tried_again"), [(400, False), (401, True), (403, True)])
def test_a_refused_charge_is_rejected_and_tried_again_only_if_the_shop_was_refused(
    status_code: int, tried_again: bool
) -> None:
    closing = judge_refusal(an_attempt(), "no", status_code=status_code, code="invalid_request", sent_before=False)
    assert (closing.state, closing.decline_reason) == (State.REJECTED, "invalid_request")
    assert (closing.decline_class, closing.needs_retry) == (str(status_code), tried_again)


def test_a_refusal_of_a_second_send_leaves_the_first_ones_outcome_unknown() -> None:
    closing = judge_refusal(an_attempt(), "no", status_code=400, code="", sent_before=True)
    assert (closing.state, closing.decline_class, closing.needs_retry) == (State.UNKNOWN, None, True)


def test_what_never_left_stays_planned_may_be_sent_again_and_gives_its_claim_back_at_the_runs_end() -> None:
    closing = judge_unsent(an_attempt(), "refused connection", sent_before=False)
    assert (closing.state, closing.word, closing.resend, closing.needs_retry) == ("PLANNED", "never sent", True, True)
    assert (closing.never_sent, closing.given_up().never_sent) == (False, True)


def test_a_send_that_never_left_says_nothing_about_an_earlier_one() -> None:
    closing = judge_unsent(an_attempt(), "refused connection", sent_before=True)
    assert (closing.state, closing.word, closing.resend, closing.needs_retry) == ("UNKNOWN", "unknown", True, True)
    assert not closing.given_up().never_sent


@pytest.mark.parametrize("is_recognised", [True, False])
def test_silence_and_what_is_not_recognised_is_unknown_and_never_failed(is_recognised: bool) -> None:
    closing = judge_silence(an_attempt(), "HTTP 502", is_recognised=is_recognised)
    assert (closing.state, closing.reason, closing.needs_retry) == (State.UNKNOWN, "HTTP 502", True)
    # Another send asks for the same charge; but not after an error that nobody knows.
    assert closing.resend is is_recognised


def test_only_silence_leaves_the_provider_at_work_on_a_charge() -> None:
    attempt = an_attempt()
    answers = [
        judge_payment(attempt, the_payment_of(attempt, status=PENDING)),
        judge_refusal(attempt, "no", status_code=400, code="", sent_before=False),
        judge_refusal(attempt, "no", status_code=400, code="", sent_before=True),
        judge_unsent(attempt, "refused connection", sent_before=True),
        judge_silence(attempt, "HTTP 500", is_recognised=True, answered=True),
    ]
    assert [closing.unanswered for closing in answers] == [False] * 5
    assert judge_silence(attempt, "the connection was cut", is_recognised=True).unanswered


def test_only_attempts_that_may_have_been_sent_and_are_too_old_to_send_again_are_searched() -> None:
    old = 30 * HOUR
    searched = [a_sent_attempt(number=1, ago=old), a_sent_attempt(number=2, state=State.PLANNED, ago=old)]
    not_searched = [
        a_sent_attempt(number=3, ago=22 * HOUR),
        a_sent_attempt(number=4, state=State.PENDING, ago=old),
        an_attempt(number=5),
    ]
    assert attempts_to_search([*searched, *not_searched], NOW) == searched


# --- Where to search


def test_a_search_reaches_from_before_the_first_send_to_after_the_last() -> None:
    first, last = NOW - 40 * HOUR, NOW - 20 * HOUR
    attempt = a_sent_attempt(first_sent_at=first, last_sent_at=last)
    assert scan_windows([attempt], NOW) == [(first - SCAN_MARGIN, last + SCAN_MARGIN, (attempt,))]
    once = dataclasses.replace(attempt, last_sent_at=None)
    assert scan_windows([once], NOW) == [(first - SCAN_MARGIN, first + SCAN_MARGIN, (once,))]


def test_searches_that_overlap_are_one_and_others_stay_apart() -> None:
    a = a_sent_attempt(number=1, ago=100 * HOUR)
    b = a_sent_attempt(number=2, ago=100 * HOUR - 2 * SCAN_MARGIN)
    c = a_sent_attempt(number=3, ago=100 * HOUR - 4 * SCAN_MARGIN - SECOND)
    windows = scan_windows([c, a, b], NOW)
    assert [attempts for _, _, attempts in windows] == [(a, b), (c,)]


def test_what_was_never_sent_is_not_searched() -> None:
    assert scan_windows([an_attempt()], NOW) == []
    assert scan_windows([], NOW) == []


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.timedeltas(timedelta(0), timedelta(days=5)), st.none() | st.timedeltas(timedelta(0), timedelta(hours=23))
        ),
        max_size=8,
    )
)
def test_every_send_is_searched_with_its_margin_in_exactly_one_window(
    sends: list[tuple[timedelta, timedelta | None]],
) -> None:
    attempts = [
        a_sent_attempt(
            number=number,
            first_sent_at=NOW - ago,
            last_sent_at=None if later is None else NOW - ago + later,
        )
        for number, (ago, later) in enumerate(sends, 1)
    ]
    windows = scan_windows(attempts, NOW)
    assert sorted(a.number for _, _, covered in windows for a in covered) == [a.number for a in attempts]
    for start, end, covered in windows:
        for attempt in covered:
            assert attempt.first_sent_at is not None
            last = attempt.last_sent_at or attempt.first_sent_at
            if last - NOW > timedelta(minutes=2):  # a wrong clock wrote it: it may have been sent at any time
                assert start <= NOW - timedelta(days=7)
                assert end >= NOW
                continue
            assert start <= attempt.first_sent_at - SCAN_MARGIN
            assert end >= last + SCAN_MARGIN
    assert all(end < start for (_, end, _), (start, _, _) in pairwise(windows))


# --- What a complete scan says


def test_a_scan_finds_an_attempt_by_its_id_in_the_metadata() -> None:
    mine, other = a_sent_attempt(number=1), a_sent_attempt(number=2)
    payment = the_payment_of(mine)
    view = read_scan([mine, other], [a_payment(), payment], [])
    assert view == ProviderView({mine.id: payment}, frozenset({mine.id, other.id}), {}, ())


def test_a_scan_of_several_payments_hears_first_who_has_the_money() -> None:
    attempt = a_sent_attempt()
    declined = a_decline(attempt, "insufficient_funds", id="1", created_at=NOW - 3 * HOUR)
    pending = the_payment_of(attempt, id="2", status=PENDING, captured_at=None, created_at=NOW - 2 * HOUR)
    paid = the_payment_of(attempt, id="3", created_at=NOW - HOUR)
    paid_again = the_payment_of(attempt, id="4", created_at=NOW)
    for order in ([declined, pending, paid, paid_again], [paid_again, paid, pending, declined]):
        view = read_scan([attempt], order, [])
        assert view.answers[attempt.id] == paid
        # The further success is not lost: settling puts it to a person.
        assert view.extra == (paid_again,)
    assert read_scan([attempt], [declined, pending], []).answers[attempt.id] == pending
    assert read_scan([attempt], [declined], []).answers[attempt.id] == declined


@pytest.mark.parametrize(
    "evidence",
    [
        "garbage",
        None,
        ["a list"],
        {"id": "pay-9"},
        {"id": "pay-9", "metadata": None},
        {"id": "pay-9", "metadata": "garbage"},
    ],
)
def test_a_record_whose_metadata_cannot_be_read_proves_no_attempt_absent(evidence: Any) -> None:
    attempt = a_sent_attempt()
    view = read_scan([attempt], [], [UnusablePayment("pay-9", "odd", evidence)])
    assert (view.answers, view.scanned) == ({}, frozenset())
    assert attempt.id in view.silent


def test_a_record_that_names_the_attempt_and_cannot_be_read_proves_only_the_others_absent() -> None:
    mine, other = a_sent_attempt(number=1), a_sent_attempt(number=2)
    odd = UnusablePayment("pay-9", "amount is missing", {"metadata": {ATTEMPT_KEY: str(mine.id)}})
    view = read_scan([mine, other], [], [odd])
    assert set(view.silent) == {mine.id}
    assert view.scanned == {other.id}


def test_an_odd_record_of_somebody_else_proves_everybody_absent_all_the_same() -> None:
    attempt = a_sent_attempt()
    odd = UnusablePayment("pay-9", "amount is missing", {"metadata": {"user_id": "boris"}})
    assert read_scan([attempt], [], [odd]) == ProviderView({}, frozenset({attempt.id}), {}, ())


def test_an_attempt_that_is_found_is_told_even_beside_odd_records() -> None:
    attempt = a_sent_attempt()
    view = read_scan([attempt], [the_payment_of(attempt)], [UnusablePayment(None, "odd", None)])
    assert attempt.id in view.answers
    assert view.silent == {}


@pytest.mark.parametrize(
    ("changes", "proves_absent"),
    [
        ({"method_id": "card-of-ada"}, False),
        ({"method_id": "card-of-ada", "metadata": {ATTEMPT_KEY: None}}, False),
        ({"method_id": "card-of-ada", "status": PENDING}, False),
        ({"method_id": "card-of-ada", "status": CANCELED}, True),
        ({"method_id": "card-of-boris"}, True),
        ({"method_id": None}, True),
        ({"method_id": "card-of-ada", "id": "card-of-ada"}, True),
        ({"method_id": "card-of-ada", "metadata": {ATTEMPT_KEY: str(uuid.UUID(int=1))}}, True),
        ({"method_id": "card-of-ada", "metadata": {ATTEMPT_KEY: "garbled"}}, False),
    ],
)
def test_money_that_moved_by_the_same_card_in_nobodys_name_proves_no_attempt_absent(
    changes: dict[str, Any], proves_absent: bool
) -> None:
    attempt = a_sent_attempt()
    view = read_scan([attempt], [a_payment(**changes)], [])
    assert (attempt.id in view.scanned) is proves_absent
    assert (attempt.id in view.silent) is not proves_absent


def test_partial_views_add_up() -> None:
    a, b, c = (a_sent_attempt(number=number) for number in (1, 2, 3))
    extra = the_payment_of(a, id="2")
    merged = merge_views(
        [
            ProviderView({a.id: the_payment_of(a)}, frozenset({a.id}), {}, (extra,)),
            ProviderView({}, frozenset({b.id}), {}),
            ProviderView({}, frozenset(), {c.id: "silence"}),
        ]
    )
    assert merged == ProviderView({a.id: the_payment_of(a)}, frozenset({a.id, b.id}), {c.id: "silence"}, (extra,))
    assert merge_views([]) == ProviderView()
