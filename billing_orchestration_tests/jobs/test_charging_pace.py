"""How hard one renewal run drives the provider, and who is sent next. Pure: no provider, no database, no clock."""

from __future__ import annotations

import threading

import pytest

from billing_orchestration.domain.provider_payment import CANCELED, PENDING
from billing_orchestration.jobs.autopayment.charging import Withheld, Work
from billing_orchestration.jobs.autopayment.pace import BREAKER_LIMIT, ChargingLimits, Pace
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
FAILED = OutcomeUnknown("HTTP 500")
SILENCE = OutcomeUnknown("no answer", timed_out=True)
THROTTLED = RateLimited("429")
REFUSED = RequestRejected("no", status_code=400)
FORBIDDEN = Forbidden("no", status_code=403)
WRONG_KEY = WrongCredentials("the secret key is wrong", status_code=401)


def pace(*answers: object, max_concurrency: int = 16, max_sends: int = 3) -> Pace:
    """A pace that has heard these answers."""
    made = Pace(ChargingLimits(max_concurrency, max_sends, resend_wait_s=2.0), threading.Event())
    for answer in answers:
        made.note(answer)  # type: ignore[arg-type]
    return made


# --- the width


def test_the_first_charge_goes_alone() -> None:
    assert pace().room(0, 0) == 1
    assert pace().room(1, 0) == 0


@pytest.mark.parametrize("answer", [PAID, a_payment(status=PENDING), a_payment(status=CANCELED), REFUSED])
def test_every_answer_that_the_provider_has_understood_doubles_the_width_up_to_max_concurrency(answer: object) -> None:
    assert [pace(*[answer] * count).width for count in range(6)] == [1, 2, 4, 8, 16, 16]


@pytest.mark.parametrize("failure", [FAILED, SILENCE, THROTTLED, FORBIDDEN, NeverSent("refused"), KeyError("odd")])
def test_every_failure_halves_the_width_but_never_to_nothing(failure: object) -> None:
    wide = [PAID] * 4
    assert [pace(*wide, *[failure] * count).width for count in range(4)] == [16, 8, 4, 2]
    assert pace(failure).width == 1


def test_what_was_withheld_is_no_answer_and_changes_nothing() -> None:
    assert pace(PAID, FAILED, PAID, *[Withheld("not sent")] * 20).width == 2
    assert not pace(*[Withheld("not sent")] * 20).is_stopped


def test_at_full_width_some_are_claimed_ahead_so_that_no_sender_waits_for_the_database() -> None:
    full = pace(*[PAID] * 4)
    assert full.room(0, 0) == 24
    assert full.room(16, 0) == 8
    # Few seats free: wait for more, which then share a statement.
    assert full.room(20, 0) == 0
    assert pace(*[PAID] * 3).room(8, 0) == 0


def test_nothing_more_is_claimed_while_the_database_is_behind() -> None:
    full = pace(*[PAID] * 4)
    assert full.room(0, 23) == 24
    assert full.room(0, 24) == 0


# --- the breaker


def test_failures_in_a_row_open_the_breaker_and_an_answer_in_between_closes_it() -> None:
    almost = [FAILED] * (BREAKER_LIMIT - 1)
    assert not pace(*almost).is_stopped
    assert not pace(*almost, PAID, *almost).is_stopped
    stopped = pace(*almost, FAILED)
    assert stopped.is_stopped
    assert stopped.stop_reason == "the provider fails for everyone (6 times in a row), last: HTTP 500"
    assert stopped.stop_code == FailureCode.PROVIDER_FAILS
    assert stopped.room(0, 0) == 0


@pytest.mark.parametrize("failure", [FORBIDDEN, NeverSent("refused"), StillProcessing("202"), KeyError("odd")])
def test_every_kind_of_failure_counts_once(failure: object) -> None:
    assert not pace(*[failure] * (BREAKER_LIMIT - 1)).is_stopped
    assert pace(*[failure] * BREAKER_LIMIT).is_stopped


def test_silence_counts_double_since_it_costs_the_whole_timeout() -> None:
    assert not pace(*[SILENCE] * (BREAKER_LIMIT // 2 - 1)).is_stopped
    assert pace(*[SILENCE] * (BREAKER_LIMIT // 2)).is_stopped


def test_a_429_slows_down_and_never_opens_the_breaker() -> None:
    assert not pace(*[THROTTLED] * 100).is_stopped


def test_a_wrong_shop_key_stops_at_once_and_the_first_reason_is_kept() -> None:
    stopped = pace(WRONG_KEY, *[FAILED] * 10)
    assert stopped.stop_reason == "the secret key is wrong"
    stopped.stop()
    assert (stopped.stop_reason, stopped.stop_code) == ("the secret key is wrong", "WrongCredentials")


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
    assert pace(WRONG_KEY).wait_before_resend(1, 0, 0.0) is None


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
