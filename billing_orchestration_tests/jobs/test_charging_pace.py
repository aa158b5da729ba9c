"""How hard one renewal run drives the provider, and who is sent next. Pure: no provider, no database, no clock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest

from billing_orchestration.domain.attempts import Attempt
from billing_orchestration.domain.provider_payment import CANCELED, PENDING
from billing_orchestration.jobs.autopayment.charging import Withheld, Work
from billing_orchestration.jobs.autopayment.pace import (
    BREAKER_LIMIT,
    MOST_NOT_GRANTED,
    MOST_REFUSED_ALIKE,
    ChargingLimits,
    Pace,
)
from billing_orchestration.jobs.autopayment.waiting import Waiting
from billing_orchestration.jobs.run_failures import FailureCode
from billing_orchestration.provider.errors import (
    Forbidden,
    NeverSent,
    OutcomeUnknown,
    RateLimited,
    RequestRejected,
    StillProcessing,
    WrongCredentials,
)
from billing_orchestration_tests.domain.given import a_due_subscription, a_payment, an_attempt

PAID = a_payment()
DECLINED = a_payment(status=CANCELED)
FAILED = OutcomeUnknown("HTTP 500")
SILENCE = OutcomeUnknown("no answer", timed_out=True)
THROTTLED = RateLimited("429")
REFUSED = RequestRejected("no", status_code=400, code="invalid_request", parameter="amount")
FORBIDDEN = Forbidden("the shop may not do this", status_code=403, code="forbidden")
WRONG_KEY = WrongCredentials("the secret key is wrong", status_code=401)
NO_RECEIPT = RequestRejected("Receipt is missing", status_code=400, code="invalid_request", parameter="receipt")

_numbers = count(1)


def a_card(method: str = "") -> Attempt:
    """An attempt of a card that nobody has seen before, or of this one."""
    number = next(_numbers)
    return an_attempt(a_due_subscription(id=number, method_id=method or f"card-{number}"))


def pace(max_concurrency: int = 16, max_sends: int = 3) -> Pace:
    return Pace(ChargingLimits(max_concurrency, max_sends, resend_wait_s=2.0), threading.Event())


def hears(made: Pace, *answers: object, card: str = "") -> Pace:
    """One send after another, each of another card (or all of this one), each with its answer."""
    for answer in answers:
        made.note(made.begin(a_card(card)), answer)  # type: ignore[arg-type]
    return made


def grows_to(made: Pace, width: int) -> Pace:
    while made.width < width:
        made.granted()
    return made


# --- the width


def test_the_first_charge_goes_alone_until_its_grant_is_committed() -> None:
    made = pace()
    assert made.room(0, 0) == 1
    assert made.room(1, 0) == 0
    # Answered, and not written yet; and an answer is no grant.
    assert hears(made, PAID).room(0, 1) == 0
    assert hears(made, *[PAID, DECLINED] * 20).room(0, 0) == 1
    made.granted()
    assert made.room(0, 0) == 2


@pytest.mark.parametrize("answer", [PAID, a_payment(status=PENDING), DECLINED, REFUSED])
def test_the_width_grows_with_committed_grants_and_not_with_answers(answer: object) -> None:
    made = pace(4)
    widths = []
    for _ in range(5):
        hears(made, *[answer] * 4)
        widths.append(made.width)
        made.granted()
    assert widths == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("failure", [FAILED, SILENCE, FORBIDDEN, NeverSent("refused"), KeyError("odd")])
def test_every_failure_halves_the_width_but_never_to_nothing(failure: object) -> None:
    made = grows_to(pace(), 16)
    assert [hears(made, failure).width for _ in range(5)] == [8, 4, 2, 1, 1]


def test_a_card_that_hangs_while_others_are_answered_does_not_slow_them_down() -> None:
    made = grows_to(pace(), 16)
    hanging = [made.begin(a_card()) for _ in range(10)]
    hears(made, PAID)
    for sent in hanging:
        made.note(sent, SILENCE)
    assert (made.width, made.is_stopped, made.in_doubt) == (16, False, False)


def test_a_429_halves_the_width_once_a_burst_and_is_remembered_for_the_run() -> None:
    made = grows_to(pace(), 16)
    burst = [made.begin(a_card()) for _ in range(16)]
    for sent in burst:
        made.note(sent, THROTTLED)
    assert made.width == 8
    # As many grants as the width for each further one, where one was enough before.
    widths = []
    for _ in range(8 + 9):
        made.granted()
        widths.append(made.width)
    assert widths == [8] * 7 + [9] * 9 + [10]
    hears(made, THROTTLED)
    assert made.width == 5
    hears(made, FAILED)
    # What a failure took comes back at once, up to where the 429 came.
    assert [grows_to(made, 5).width, made.is_stopped] == [5, False]


def test_what_was_withheld_is_no_answer_and_changes_nothing() -> None:
    made = hears(grows_to(pace(), 2), *[Withheld("not sent")] * 20)
    assert (made.width, made.is_stopped, made.in_doubt) == (2, False, False)


def test_at_full_width_some_are_claimed_ahead_so_that_no_sender_waits_for_the_database() -> None:
    full = grows_to(pace(), 16)
    assert full.room(0, 0) == 24
    assert full.room(16, 0) == 8
    # Few seats free: wait for more, which then share a statement.
    assert full.room(20, 0) == 0
    assert grows_to(pace(), 8).room(8, 0) == 0


def test_nothing_more_is_claimed_while_the_database_is_behind() -> None:
    full = grows_to(pace(), 16)
    assert full.room(0, 23) == 24
    assert full.room(0, 24) == 0


# --- the books


def test_a_few_paid_charges_in_a_row_that_cannot_be_granted_stop_the_run() -> None:
    made = grows_to(pace(), 16)
    for _ in range(MOST_NOT_GRANTED - 1):
        made.not_granted("payments_id_seq is at its end")
        assert (made.room(0, 0), made.room(1, 0), made.is_stopped) == (1, 0, False)
    made.not_granted("payments_id_seq is at its end")
    assert (made.is_stopped, made.stop_code) == (True, FailureCode.NOT_GRANTED)
    assert "3 charges in a row are paid and not granted yet, last: payments_id_seq is at its end" in str(
        made.stop_reason
    )


def test_a_grant_in_between_shows_that_the_books_take_what_is_charged() -> None:
    made = pace()
    for _ in range(20):
        made.not_granted("a trigger refuses this row")
        made.not_granted("a trigger refuses this row")
        made.granted()
    assert not made.is_stopped


# --- the breaker


def failing(*failures: object) -> Pace:
    """A run in which these happen, one after another, each to another card."""
    return hears(pace(), *failures)


@pytest.mark.parametrize(
    ("failures", "stops"),
    [
        ([FAILED] * (BREAKER_LIMIT - 1), False),
        ([FAILED] * BREAKER_LIMIT, True),
        # Silence costs the whole timeout.
        ([SILENCE] * (BREAKER_LIMIT // 2 - 1), False),
        ([SILENCE] * (BREAKER_LIMIT // 2), True),
        # Six cards that answer 500, or two that hang: others are tried in between.
        ([FAILED] * 6 + [PAID] + [FAILED] * 6, False),
        ([SILENCE, SILENCE, DECLINED] * 9, False),
        ([*[FAILED] * 7, REFUSED, *[FAILED] * 7], False),
        # A 429 slows down, and is no failure.
        ([THROTTLED] * 100, False),
        *(([odd] * BREAKER_LIMIT, True) for odd in (NeverSent("refused"), StillProcessing("202"), KeyError("odd"))),
        *(([odd] * (BREAKER_LIMIT - 1), False) for odd in (NeverSent("no"), StillProcessing("202"), KeyError("odd"))),
    ],
)
def test_the_breaker_opens_when_one_card_after_another_fails_and_nothing_is_heard(
    failures: list[object], stops: bool
) -> None:
    made = failing(*failures)
    assert made.is_stopped is stops
    assert made.stop_code == (FailureCode.PROVIDER_FAILS if stops else None)


def test_a_card_that_fails_again_and_again_counts_once() -> None:
    assert not hears(pace(), *[FAILED] * 100, card="the bad one").is_stopped
    made = hears(failing(*[FAILED] * (BREAKER_LIMIT - 2)), *[FAILED] * 100, card="the bad one")
    assert not made.is_stopped  # a card fewer than it takes
    assert hears(made, FAILED).is_stopped


def test_cards_that_are_known_to_fail_alone_do_not_open_the_breaker_at_the_end() -> None:
    bad = [a_card() for _ in range(20)]
    made = pace()
    for attempt in bad:
        made.note(made.begin(attempt), SILENCE)
        hears(made, PAID)
    # All others are done; these are sent once more, one after another.
    for attempt in bad:
        made.note(made.begin(attempt), SILENCE)
    assert not made.is_stopped


def test_cards_that_hang_while_others_are_answered_never_open_the_breaker() -> None:
    made = pace()
    hanging = [made.begin(a_card()) for _ in range(64)]
    hears(made, PAID)
    for sent in hanging:
        made.note(sent, SILENCE)
    assert not made.is_stopped


def test_a_provider_that_falls_silent_in_the_middle_opens_it_soon() -> None:
    made = hears(pace(), *[PAID] * 50)
    under_way = [made.begin(a_card()) for _ in range(8)]
    for sent in under_way[:3]:
        made.note(sent, SILENCE)
    assert not made.is_stopped
    made.note(under_way[3], SILENCE)
    assert made.stop_reason == (
        "the provider fails for everyone (8 failures, nothing heard between them), last: no answer"
    )
    assert made.room(0, 0) == 0


@pytest.mark.parametrize(
    ("cause", "relief"),
    [
        (lambda made: hears(made, FAILED), lambda made: hears(made, PAID)),
        (lambda made: hears(made, REFUSED), lambda made: hears(made, DECLINED)),
        (lambda made: made.not_granted("no"), lambda made: made.granted()),
    ],
    ids=["a failure", "a refusal", "no grant"],
)
def test_other_customers_are_tried_while_it_is_in_doubt_whether_all_would_fail(
    cause: Callable[[Pace], object], relief: Callable[[Pace], object]
) -> None:
    made = pace()
    assert not made.in_doubt
    cause(made)
    assert made.in_doubt
    relief(made)
    assert not made.in_doubt


# --- the shop


def test_a_wrong_shop_key_stops_at_once_and_the_first_reason_is_kept() -> None:
    stopped = failing(WRONG_KEY, *[FAILED] * 10)
    assert (stopped.stop_reason, stopped.stop_code) == ("the secret key is wrong", "WrongCredentials")
    stopped.stop()
    assert stopped.stop_reason == "the secret key is wrong"


def test_a_shop_that_must_send_receipts_is_told_by_the_first_refusal() -> None:
    assert failing(NO_RECEIPT).stop_reason == "Receipt is missing"
    # Also later in a run. But what is wrong with a receipt that was sent may be the customer's.
    assert failing(PAID, NO_RECEIPT).is_stopped
    made = pace()
    attempt = a_card()
    with_receipt = replace(attempt, body=attempt.body.replace('"capture":true', '"capture":true,"receipt":{}'))
    made.note(made.begin(with_receipt), NO_RECEIPT)
    assert not made.is_stopped


@pytest.mark.parametrize("refusal", [REFUSED, FORBIDDEN])
def test_one_refusal_of_the_first_charges_is_the_shops(refusal: RequestRejected) -> None:
    assert not failing(*[refusal] * (MOST_REFUSED_ALIKE - 1)).is_stopped
    made = failing(*[refusal] * MOST_REFUSED_ALIKE)
    assert (made.is_stopped, made.stop_code, made.refuses_the_shop) == (True, FailureCode.SHOP_REFUSED, True)
    assert f"the first {MOST_REFUSED_ALIKE} charges were refused alike. In its words: {refusal}" in str(
        made.stop_reason
    )
    assert len(made.refused_alike) == MOST_REFUSED_ALIKE


@pytest.mark.parametrize(
    "answers",
    [
        # Somebody was charged, or only declined: the refusals are those customers' own.
        [PAID, *[REFUSED] * 50],
        [REFUSED, REFUSED, DECLINED, *[REFUSED] * 50],
        # Not alike.
        [REFUSED, RequestRejected("no", status_code=400, code="invalid_request", parameter="description")] * 9,
        [REFUSED, RequestRejected("no", status_code=400, code="unsupported", parameter="amount")] * 9,
    ],
)
def test_refusals_of_some_customers_are_not_the_shops(answers: list[object]) -> None:
    made = failing(*answers)
    assert (made.is_stopped, made.refuses_the_shop) == (False, False)


def test_one_card_that_is_refused_for_many_subscriptions_is_one_refusal() -> None:
    assert not hears(pace(), *[REFUSED] * 50, card="shared").is_stopped


def test_the_end_of_a_run_stops_without_a_reason() -> None:
    over = pace()
    over.stop()
    assert (over.is_stopped, over.stop_reason) == (True, None)


# --- the waits


def test_each_wait_before_a_resend_is_three_times_longer_up_to_a_minute() -> None:
    patient = pace(max_sends=6)
    assert [patient.wait_before_resend(sends, 0, 0.0) for sends in range(1, 7)] == [2.0, 6.0, 18.0, 54.0, 60.0, None]


def test_the_providers_own_wish_is_honoured_up_to_a_minute() -> None:
    assert pace().wait_before_resend(1, 0, 30.0) == 30.0
    assert pace().wait_before_resend(1, 0, 0.5) == 2.0
    assert pace().wait_before_resend(1, 0, 3600.0) == 60.0


def test_an_attempt_that_was_throttled_may_be_sent_ten_times_and_its_other_sends_still_count() -> None:
    assert pace().wait_before_resend(9, 9, 0.0) is not None
    assert pace().wait_before_resend(10, 10, 0.0) is None
    assert pace().wait_before_resend(4, 1, 0.0) is None


def test_nothing_is_sent_again_after_a_stop() -> None:
    assert failing(WRONG_KEY).wait_before_resend(1, 0, 0.0) is None


# --- who is sent next


def work(number: int, method: str = "", *, sent_before: bool = False) -> Work:
    attempt = an_attempt(a_due_subscription(id=number, method_id=method or f"card-{number}"))
    return Work(attempt, is_new=not sent_before, sent_before=sent_before, order=number)


def test_attempts_are_sent_in_their_order_as_far_as_there_is_room() -> None:
    first, second, third = works = [work(1), work(2), work(3)]
    waiting = Waiting(works)
    assert waiting.take(2, 0.0) == ([first, second], [])
    assert waiting.take(2, 0.0) == ([third], [])
    assert not waiting


def test_while_in_doubt_the_next_come_from_the_other_end_and_before_any_resend() -> None:
    """What failed before stands first: those at the other end are least like it."""
    works = [work(number) for number in range(1, 5)]
    waiting = Waiting(works)
    again = work(9)
    waiting.send_again(again, at=0.0)
    assert waiting.take(1, 1.0, in_doubt=True) == ([works[3]], [])
    assert waiting.take(9, 1.0, in_doubt=True) == ([works[2], works[1], works[0]], [])
    assert waiting.has_some(1.0)
    assert waiting.take(9, 1.0, in_doubt=True) == ([again], [])
    assert not waiting.has_some(1.0)


def test_a_resend_comes_first_once_it_is_due() -> None:
    waiting = Waiting([work(2)])
    again = work(1)
    waiting.send_again(again, at=10.0)
    assert waiting.next_at == 10.0
    assert [one.order for one in waiting.take(1, 9.9)[0]] == [2]
    assert waiting.take(1, 10.0) == ([again], [])


def test_one_card_is_charged_once_at_a_time() -> None:
    first, behind = work(1, "card"), work(2, "card")
    waiting = Waiting([first, behind])
    assert waiting.take(9, 0.0) == ([first], [])
    # Also while the first waits for another send.
    waiting.send_again(first, at=10.0)
    assert waiting.take(9, 0.0) == ([], [])
    waiting.release(first, declined=False)
    assert waiting.take(9, 0.0) == ([behind], [])


def test_a_card_that_was_declined_is_not_tried_for_another_subscription() -> None:
    first, behind, lost = work(1, "card"), work(2, "card"), work(3, "card", sent_before=True)
    waiting = Waiting([first, behind, lost])
    waiting.take(9, 0.0)
    waiting.release(first, declined=True)
    # Unless money may have moved already: the same key only asks what became of it.
    assert waiting.take(9, 0.0) == ([lost], [behind])


def test_after_a_stop_those_that_wait_for_another_send_are_told_from_those_that_were_not_begun() -> None:
    first, behind, ready = work(1, "card"), work(2, "card"), work(3)
    waiting = Waiting([first, behind, ready])
    assert waiting.take(1, 0.0) == ([first], [])
    waiting.send_again(first, at=10.0)
    assert waiting.give_up() == ([first], [behind, ready])
    assert not waiting
