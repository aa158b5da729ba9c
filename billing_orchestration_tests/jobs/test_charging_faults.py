"""Charging over a bad wire to a bad provider: whatever is lost, repeated or answered wrongly, one charge and one grant.

The provider's ledger is the judge of what was charged, our tables of what was granted.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from billing_orchestration.domain.attempts import Attempt
from billing_orchestration.provider.client import PaymentProvider, Timeouts
from billing_orchestration.sandbox.provider.api import ReceivedRequest
from billing_orchestration.settings import Settings
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Run, Service
from billing_orchestration_tests.torture.simulation.threads import OrderedThreads
from billing_orchestration_tests.waiting import wait_until

JOB = "autopayment_job"
MATCHING = "matching_successful_payments_job"
A_MONTH_LATER = NOON.replace(month=4)
SENT_ONCE = {"charge_renewals": {"max_sends": 1}}
ONE_AT_A_TIME = {"charge_renewals": {"max_concurrency": 1}}
BAD_REQUEST = {"type": "error", "code": "invalid_request"}
ANOTHER_ATTEMPT = "00000000-0000-0000-0000-000000000007"

# What can happen to one POST so that its sender does not learn what became of it. "Before": nothing was executed.
LOST: dict[str, dict[str, Any]] = {
    "the request is cut off": {"effect": "cut_before"},
    "the answer is cut off": {"effect": "cut_after"},
    "the request meets a reset": {"effect": "reset_before"},
    "the answer meets a reset": {"effect": "reset_after"},
    "500 before the charge": {"effect": "error_before"},
    "500 after the charge": {"effect": "error_after"},
    "HTML before the charge": {"effect": "html_before"},
    "HTML after the charge": {"effect": "html_after"},
    "HTML with 200 after the charge": {"effect": "html_after", "status": 200},
    "HTML with 403 after the charge": {"effect": "html_after", "status": 403},
    "202 before the charge": {"effect": "processing_before"},
    "202 after the charge": {"effect": "processing_after"},
    "an empty 200 after the charge": {"effect": "body_after", "status": 200, "body": ""},
    "a redirect after the charge": {"effect": "body_after", "status": 302, "body": ""},
    "a 404 in JSON after the charge": {"effect": "body_after", "status": 404, "body": '{"type": "error"}'},
    "a truncated answer": {"effect": "truncated"},
    "an answer that never ends": {"effect": "drip", "seconds": 30.0},
    "silence before the charge": {"effect": "silence_before"},
    "silence after the charge": {"effect": "silence_after"},
    "429": {"effect": "too_many_requests", "retry_after_s": 0},
    "an answer about another attempt": {"effect": "change", "set": {"metadata.renewal_attempt_id": ANOTHER_ATTEMPT}},
    "an answer in an unknown status": {"effect": "change", "set": {"status": "on_hold"}},
    "an answer in an unknown currency": {"effect": "change", "set": {"amount.currency": "KZT"}},
}  # fmt: skip
# One of each kind of loss. How each of the others is understood is the client's (provider/test_client_wire.py).
KINDS = {name: LOST[name] for name in (
    "the request is cut off", "silence after the charge", "HTML with 200 after the charge", "429",
    "an answer about another attempt",
)}  # fmt: skip


@pytest.fixture
def hasty(impatient: Service) -> Service:
    """A service that takes four fifths of a second for silence, and gives a locked row up after a fifth."""
    impatient.timeouts = Timeouts(connect_s=2.0, charge_read_s=0.8, read_s=2.0, charge_done_s=0.0)
    return impatient


def recovered(service: Service) -> None:
    """The provider answers again, and the next run has the patience for it, however busy the machine is."""
    service.sandbox.behave()
    service.timeouts = Timeouts(connect_s=10.0, charge_read_s=30.0, read_s=30.0, charge_done_s=0.0)


def lose(service: Service, subscription: int, how: Mapping[str, Any], times: int | None = 1) -> None:
    service.sandbox.misbehave("create", **{"payment_method_id": f"method-{subscription}", "times": times, **how})


def posts(service: Service, subscription: int | None = None) -> list[ReceivedRequest]:
    """The charges that arrived at the provider, of one subscription or of all."""
    found = [request for request in service.sandbox.requests if request.call == "create"]
    if subscription is None:
        return found
    return [request for request in found if request.json()["metadata"]["subscription_id"] == str(subscription)]


def keys_and_bodies(service: Service, subscription: int) -> set[tuple[str | None, bytes]]:
    return {(request.idempotence_key, request.body) for request in posts(service, subscription)}


def states(service: Service, subscription: int) -> list[str]:
    return [attempt.state for attempt in service.attempts(subscription)]


def unknown_since(service: Service, how: Mapping[str, Any], **subscription: Any) -> int:
    """A subscription whose charge was sent once, now, and whose outcome is not known."""
    subscription_id = service.subscriber(**subscription)
    lose(service, subscription_id, how)
    service.run(JOB, ops=SENT_ONCE)
    assert states(service, subscription_id) == ["UNKNOWN"]
    return subscription_id


# --- lost on the way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOST.values(), ids=LOST)
def test_a_charge_whose_answer_is_lost_is_sent_again_with_the_same_key_and_body(
    hasty: Service, how: dict[str, Any]
) -> None:
    service = hasty
    subscription = service.subscriber()
    lose(service, subscription, how)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert len(posts(service, subscription)) == 2
    assert len(keys_and_bodies(service, subscription)) == 1
    assert service.charged() == Counter([subscription])
    assert service.ended_at(subscription) == A_MONTH_LATER
    service.check_books()


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_a_charge_whose_answers_are_all_lost_is_unknown_never_failed_and_concluded_by_the_next_run(
    hasty: Service, how: dict[str, Any]
) -> None:
    service = hasty
    lost, other = service.subscriber(), service.subscriber()
    lose(service, lost, how, times=None)

    run = service.run(JOB, ops={"charge_renewals": {"max_sends": 2}})

    assert not run.ok
    assert f"subscription {lost} (unknown)" in run.failure
    assert states(service, lost) == ["UNKNOWN"]
    assert service.ended_at(lost) == NOON
    assert service.ended_at(other) == A_MONTH_LATER
    recovered(service)
    service.advance(hours=12)
    assert service.run(JOB).ok
    assert states(service, lost) == ["SUCCEEDED"]
    assert len(keys_and_bodies(service, lost)) == 1
    assert service.charged() == Counter([lost, other])
    service.check_books()


def test_a_charge_whose_answer_was_lost_is_settled_by_the_matching_job(service: Service) -> None:
    subscription = unknown_since(service, {"effect": "cut_after"})
    service.advance(minutes=2)

    assert service.run(MATCHING).ok

    assert states(service, subscription) == ["SUCCEEDED"]
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert len(service.rows("subscriptions")) == 1
    assert service.run(JOB).ok
    assert len(posts(service)) == 1
    service.check_books()


def test_an_attempt_is_committed_with_its_key_and_first_instant_before_its_request_arrives(service: Service) -> None:
    """And no transaction of ours is open while the provider works."""
    subscription = service.subscriber()
    seen: list[Any] = []

    def idle_transactions() -> set[Any]:
        where = "datname = current_database() AND state LIKE 'idle in transaction%'"
        return {(row.pid, row.xact_start) for row in service.rows("pg_stat_activity", where)}

    def look_around(document: Any) -> Any:
        # On the provider's side, which has just taken the money and has not answered yet. A transaction between two
        # of its statements passes; one that waits for the answer stays.
        found = idle_transactions()
        with suppress(TimeoutError):
            wait_until(lambda: not found & idle_transactions(), patience_s=0.5)
        seen.append((service.attempts(subscription), found & idle_transactions()))
        return document

    lose(service, subscription, {"effect": "change", "transform": look_around})

    assert service.run(JOB).ok

    [(attempts, transactions)] = seen
    [post] = posts(service, subscription)
    assert [
        (attempt.state, str(attempt.idempotence_key), attempt.body.encode(), attempt.first_sent_at)
        for attempt in attempts
    ] == [("PLANNED", post.idempotence_key, post.body, NOON)]
    assert transactions == set()


def test_a_charge_that_is_delivered_twice_is_one_charge(service: Service) -> None:
    subscription = service.subscriber()
    lose(service, subscription, {"effect": "duplicate"})

    assert service.run(JOB).ok

    assert service.charged() == Counter([subscription])
    service.check_books()


def test_an_answer_without_metadata_is_about_the_attempt_whose_key_it_answers(service: Service) -> None:
    subscription = service.subscriber()
    lose(service, subscription, {"effect": "change", "remove": ("metadata",)})

    run = service.run(JOB)

    assert run.ok, run.failure
    assert states(service, subscription) == ["SUCCEEDED"]
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert service.rows("quarantine") == []
    service.check_books()


def test_one_bad_charge_among_many_does_not_open_the_breaker(hasty: Service) -> None:
    service = hasty
    others = [service.subscriber(script="canceled") for _ in range(8)]
    bad = service.subscriber()
    lose(service, bad, {"effect": "silence_before"}, times=None)

    run = service.run(JOB, ops=ONE_AT_A_TIME)

    assert states(service, bad) == ["UNKNOWN"]
    assert [len(service.attempts(other)) for other in others] == [1] * 8
    assert f"subscription {bad} (unknown)" in run.failure


# --- answers that are not what was asked --------------------------------------------------------------------------


@pytest.mark.parametrize("other", [
    {"amount.value": "1.00"},
    {"amount.value": "299.01"},
    {"amount.currency": "EUR", "refunded_amount.currency": "EUR"},
])  # fmt: skip
def test_an_answer_with_another_amount_or_currency_goes_to_a_person_and_grants_nothing(
    service: Service, other: dict[str, str]
) -> None:
    subscription, fine = service.subscriber(), service.subscriber()
    lose(service, subscription, {"effect": "change", "set": other})

    run = service.run(JOB)

    assert states(service, subscription) == ["REVIEW"]
    assert run.report["count: in review"] == 1
    assert service.ended_at(subscription) == NOON
    [problem] = service.rows("quarantine")
    [attempt] = service.attempts(subscription)
    assert (problem.kind, problem.subscription_id, problem.attempt_id) == ("amount_differs", subscription, attempt.id)
    assert service.ended_at(fine) == A_MONTH_LATER
    # A person decides: nothing is charged again, nothing expires under their hands, nothing alerts twice.
    for _ in range(5):
        service.advance(days=1)
        service.run(JOB)
        service.run("expire_subscriptions_job")
    assert service.charged()[subscription] == 1
    assert service.row("subscriptions", subscription).status == "ACTIVE"
    assert len(service.rows("quarantine")) == 1


def test_an_amount_in_review_that_was_a_slip_of_one_answer_is_settled_by_what_the_providers_books_say(
    service: Service,
) -> None:
    subscription = service.subscriber()
    lose(service, subscription, {"effect": "change", "set": {"amount.value": "1.00"}})
    service.run(JOB)

    assert service.run(MATCHING).ok

    assert states(service, subscription) == ["SUCCEEDED"]
    assert service.ended_at(subscription) == A_MONTH_LATER
    [problem] = service.rows("quarantine")
    assert problem.resolution == "settled"
    service.check_books()


def test_a_charge_that_waits_for_capture_is_asked_about_and_never_sent_again(service: Service) -> None:
    subscription = service.subscriber()
    lose(
        service,
        subscription,
        {"effect": "change", "set": {"status": "waiting_for_capture"}, "remove": ("captured_at",)},
    )
    service.run(JOB)
    assert states(service, subscription) == ["PENDING"]
    service.sandbox.misbehave("get", "change", set={"status": "waiting_for_capture"})
    service.advance(days=1)

    held = service.run(JOB)
    service.advance(days=1)
    taken = service.run(JOB)

    assert held.reasons(f"subscription {subscription}, attempt 1") == [
        "leave: an open attempt is still waiting_for_capture at the provider"
    ]
    assert taken.ok
    assert states(service, subscription) == ["SUCCEEDED"]
    assert len(posts(service, subscription)) == 1
    service.check_books()


def test_a_pending_charge_that_is_canceled_later_is_a_decline_and_tried_again_with_a_new_key(service: Service) -> None:
    subscription = service.subscriber(script=["pending:canceled:insufficient_funds:3600", "succeeded"])
    service.run(JOB)
    service.advance(days=1)

    told = service.run(JOB)
    books = service.attempts(subscription)
    again = service.run(JOB)

    assert told.ok
    assert told.reasons(f"subscription {subscription}, attempt 1") == [
        "declined: declined by payment_network: insufficient_funds (soft)"
    ]
    # The same run makes the day's try: a second launch finds nothing to do.
    assert again.ok
    assert states(service, subscription) == ["DECLINED", "SUCCEEDED"]
    assert service.attempts(subscription) == books
    assert len(keys_and_bodies(service, subscription)) == 2
    assert service.charged() == Counter([subscription])
    service.check_books()


def test_a_pending_charge_whose_question_is_not_answered_stays_pending_and_holds_up_nobody(service: Service) -> None:
    pending = service.subscriber(script="pending:succeeded:60")
    service.run(JOB)
    service.advance(minutes=5)
    due = service.subscriber()
    payment_id = service.attempts(pending)[0].external_payment_id
    service.sandbox.misbehave("get", "error_before", payment_id=payment_id, times=None)

    run = service.run(JOB)

    assert not run.ok
    assert f"subscription {pending}, attempt 1: outcome not known" in run.failure
    assert states(service, pending) == ["PENDING"]
    assert states(service, due) == ["SUCCEEDED"]
    recovered(service)
    assert service.run(JOB).ok
    assert states(service, pending) == ["SUCCEEDED"]
    service.check_books()


def test_an_answer_about_another_payment_to_the_question_about_a_pending_one_concludes_nothing(
    service: Service,
) -> None:
    pending = service.subscriber(script="pending")
    service.run(JOB)
    service.advance(minutes=5)
    service.sandbox.misbehave(
        "get", "change", set={"status": "succeeded", "metadata.renewal_attempt_id": ANOTHER_ATTEMPT}
    )

    run = service.run(JOB)

    assert not run.ok
    assert states(service, pending) == ["PENDING"]
    assert service.ended_at(pending) == NOON
    service.check_books()


# --- refusals -----------------------------------------------------------------------------------------------------


def with_key(service: Service, key: str) -> Settings:
    from pydantic import SecretStr

    return service.settings.model_copy(update={"yookassa_secret_key": SecretStr(key)})


def test_a_wrong_shop_key_costs_one_request_and_the_right_one_charges_on_the_same_day(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(20)]

    run = service.run(JOB, load=lambda: with_key(service, "test_wrong"))

    assert not run.ok
    assert "check YOOKASSA_SHOP_ID and YOOKASSA_SECRET_KEY" in run.failure.splitlines()[0]
    assert service.sandbox.count() == 1
    assert service.rows("renewal_attempts") == []
    assert service.run(JOB).ok
    assert service.charged() == Counter(subscriptions)
    service.check_books()


def test_a_shop_key_that_is_withdrawn_during_a_run_stops_it_and_nobody_is_charged_twice(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(30)]
    service.sandbox.misbehave("create", "invalid_credentials", skip=8, times=None)

    run = service.run(JOB, ops={"charge_renewals": {"max_concurrency": 4}})

    assert not run.ok
    # Those under way at that moment, and no more.
    assert 8 < service.sandbox.count("create") <= 8 + 4
    recovered(service)
    assert service.run(JOB).ok
    assert service.charged() == Counter(subscriptions)
    service.check_books()


# Within a group of charges that were handed to the senders together: there is a next one to be sent.
@pytest.mark.parametrize("good", [4, 5, 6])
def test_a_sender_that_hears_of_a_wrong_shop_key_sends_nothing_more(service: Service, good: int) -> None:
    """One thread goes on at a time here, so nothing is under way beside the request that hears of it."""
    for _ in range(30):
        service.subscriber()
    service.sandbox.misbehave("create", "invalid_credentials", skip=good, times=None)
    seconds = [0.0]

    def pass_time(more: float) -> None:
        seconds[0] += more

    one_at_a_time = OrderedThreads(random.Random(1), lambda: seconds[0], pass_time)
    run = service.run(JOB, ops={"charge_renewals": {"max_concurrency": 4}}, threads=one_at_a_time)

    assert not run.ok
    assert service.sandbox.count("create") == good + 1


@pytest.mark.parametrize("same_run", [True, False])
def test_a_refusal_of_a_second_send_says_nothing_about_the_first(service: Service, same_run: bool) -> None:
    subscription = service.subscriber()
    lose(service, subscription, {"effect": "cut_after"})
    lose(service, subscription, {"effect": "body_before", "status": 400, "body": json.dumps(BAD_REQUEST)})

    if not same_run:
        service.run(JOB, ops=SENT_ONCE)
    run = service.run(JOB, ops={"charge_renewals": {"max_sends": 2}} if same_run else SENT_ONCE)

    assert not run.ok
    assert states(service, subscription) == ["UNKNOWN"]
    assert service.run(JOB).ok
    assert states(service, subscription) == ["SUCCEEDED"]
    assert len(keys_and_bodies(service, subscription)) == 1
    assert service.charged() == Counter([subscription])
    service.check_books()


def test_a_refused_request_goes_to_a_person_once_and_is_tried_anew_on_a_later_day(service: Service) -> None:
    subscription, other = service.subscriber(script=["bad_request", "succeeded"]), service.subscriber()

    run = service.run(JOB)
    same_day = service.run(JOB)

    assert run.ok, run.failure
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id, run.report["newly quarantined"]) == (
        "rejected", subscription, 1,
    )  # fmt: skip
    assert states(service, subscription) == ["REJECTED"]
    assert same_day.reasons(f"subscription {subscription}") == ["leave: already attempted today"]
    service.advance(days=1)
    assert service.run(JOB).ok
    assert states(service, subscription) == ["REJECTED", "SUCCEEDED"]
    assert service.charged() == Counter([subscription, other])
    service.check_books()


def test_a_shop_that_may_not_charge_stops_after_a_few_requests_and_charges_once_it_may(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(30)]
    service.sandbox.misbehave("create", "forbidden", times=None)

    run = service.run(JOB)

    assert not run.ok
    assert "recurring charges are enabled by the provider's manager" in run.failure
    assert service.sandbox.count("create") < 12
    recovered(service)
    assert service.run(JOB).ok
    assert service.charged() == Counter(subscriptions)
    service.check_books()


def test_a_provider_that_nobody_reaches_leaves_attempts_planned_and_sends_the_same_key_later(service: Service) -> None:
    subscription = service.subscriber()

    run = service.plan_renewals_only()

    assert not run.ok
    [attempt] = service.attempts(subscription)
    assert (attempt.state, attempt.first_sent_at, attempt.last_sent_at) == ("PLANNED", None, None)
    assert service.run(JOB).ok
    [sent] = posts(service)
    assert sent.idempotence_key == str(attempt.idempotence_key)
    assert sent.body.decode() == attempt.body
    assert service.charged() == Counter([subscription])
    service.check_books()


def test_a_send_that_never_left_does_not_make_an_earlier_lost_one_unsent(service: Service) -> None:
    subscription = unknown_since(service, {"effect": "cut_after"})
    service.advance(hours=1)

    service.plan_renewals_only()

    [attempt] = service.attempts(subscription)
    assert attempt.state == "UNKNOWN"
    assert attempt.first_sent_at == NOON
    service.run(JOB)
    assert service.charged() == Counter([subscription])
    service.check_books()


# --- everybody ----------------------------------------------------------------------------------------------------

EVERYBODY = {name: LOST[name] for name in ("500 before the charge", "silence after the charge")}


@pytest.mark.parametrize("how", EVERYBODY.values(), ids=EVERYBODY)
def test_a_provider_that_fails_for_everyone_gets_few_requests_and_the_rest_is_named_and_untouched(
    hasty: Service, how: dict[str, Any]
) -> None:
    service = hasty
    subscriptions = [service.subscriber() for _ in range(30)]
    service.sandbox.misbehave("create", times=None, **how)

    run = service.run(JOB)

    assert not run.ok
    assert "the provider fails for everyone" in run.failure
    assert service.sandbox.count("create") <= 8
    untouched = [subscription for subscription in subscriptions if not service.attempts(subscription)]
    assert len(untouched) >= 22
    for subscription in untouched:
        [reason] = run.reasons(f"subscription {subscription}")
        assert reason.startswith("never sent: not begun, charging stopped: the provider fails for everyone")
    recovered(service)
    assert service.run(JOB).ok
    assert service.charged() == Counter(subscriptions)
    service.check_books()


def test_a_provider_that_fails_in_the_middle_leaves_what_was_claimed_ahead_unsent(hasty: Service) -> None:
    service = hasty
    subscriptions = [service.subscriber() for _ in range(60)]
    service.sandbox.misbehave("create", "silence_after", skip=20, times=None)

    run = service.run(JOB, ops={"charge_renewals": {"max_concurrency": 8, "max_sends": 1}})

    assert not run.ok
    found = Counter(attempt.state for attempt in service.rows("renewal_attempts"))
    assert found["SUCCEEDED"] == 20
    assert found["UNKNOWN"] == service.sandbox.count("create") - 20
    planned = service.rows("renewal_attempts", "state = 'PLANNED'")
    assert all(attempt.first_sent_at is None for attempt in planned)
    recovered(service)
    assert service.run(JOB).ok
    assert service.charged() == Counter(subscriptions)
    service.check_books()


def test_everybody_slows_down_for_429_and_all_succeed_in_the_end(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(12)]
    time = SimulatedTime(service)
    service.sandbox.misbehave("create", "too_many_requests", retry_after_s=1, skip=3, times=5)

    run = service.run(JOB, threads=time.threads)

    assert run.ok, run.failure
    assert service.charged() == Counter(subscriptions)
    assert time.passed_s > 0.5
    assert all(len(keys_and_bodies(service, subscription)) == 1 for subscription in subscriptions)
    service.check_books()


def test_nobody_sends_before_the_provider_wishes_after_a_429(service: Service) -> None:
    for _ in range(6):
        service.subscriber()
    time, charged_at_s = SimulatedTime(service), []

    def note(payment: Any) -> Any:
        charged_at_s.append(time.passed_s)
        return payment

    service.sandbox.misbehave("create", "too_many_requests", retry_after_s=5, skip=2, times=1)
    service.sandbox.misbehave("create", "change", transform=note, times=None)

    assert service.run(JOB, ops={"charge_renewals": {"max_concurrency": 1}}, threads=time.threads).ok

    assert len(charged_at_s) == 6
    assert charged_at_s[2] >= 5


def test_a_storm_of_429_ends_in_charges_not_in_failures(service: Service) -> None:
    """Minutes of it: each 429 makes the pause longer, and one charge at a time asks whether it is over."""
    subscriptions = [service.subscriber() for _ in range(20)]
    time = SimulatedTime(service)
    storm = service.sandbox.misbehave("create", "too_many_requests", times=9)

    run = service.run(JOB, ops={"charge_renewals": {"resend_wait_s": 0.01}}, threads=time.threads)

    assert storm.fired == 9
    assert run.ok, run.failure
    assert service.charged() == Counter(subscriptions)
    service.check_books()


def test_a_storm_of_429_that_does_not_end_leaves_outcomes_unknown_and_the_next_run_concludes_them(
    service: Service,
) -> None:
    subscriptions = [service.subscriber() for _ in range(3)]
    time = SimulatedTime(service)
    service.sandbox.misbehave("create", "too_many_requests", times=None)

    run = service.run(JOB, threads=time.threads)

    assert not run.ok
    assert [states(service, subscription) for subscription in subscriptions] == [["UNKNOWN"]] * 3
    assert len(posts(service)) == 30  # ten sends each, and then it is left for later
    recovered(service)
    assert service.run(JOB).ok
    assert service.charged() == Counter(subscriptions)
    service.check_books()


class SimulatedTime:
    """The seconds of a run's threads and of its client: they pass where somebody would wait."""

    def __init__(self, service: Service) -> None:
        self.passed_s = 0.0
        self.threads = OrderedThreads(random.Random(1), lambda: self.passed_s, self._pass)
        timeouts = service.timeouts
        service.connect_provider = lambda settings, now=service.host_now: PaymentProvider(  # type: ignore[method-assign]
            shop_id=settings.yookassa_shop_id,
            secret_key=settings.yookassa_secret_key.get_secret_value(),
            api_url=settings.yookassa_api_url,
            timeouts=timeouts,
            threads=self.threads,
            sleep=self._pass,
            now=now,
        )

    def _pass(self, more: float) -> None:
        self.passed_s += more


# --- the key's lifetime, and the search -----------------------------------------------------------------------------


def test_a_key_is_sent_again_until_23_hours_and_never_after(service: Service) -> None:
    young = unknown_since(service, {"effect": "cut_before"})
    old = unknown_since(service, {"effect": "cut_before"})
    service.execute(
        "UPDATE billing_orchestration.renewal_attempts SET first_sent_at = first_sent_at + interval '1 second'"
        " WHERE subscription_id = :id",
        id=young,
    )
    service.advance(hours=23)

    run = service.run(JOB)

    assert len(posts(service, young)) == 2
    assert states(service, young) == ["SUCCEEDED"]
    assert len(posts(service, old)) == 1
    assert states(service, old) == ["UNKNOWN"]
    assert run.reasons(f"subscription {old}, attempt 1") == [
        "first absence: outcome not known: a first complete scan did not find it, a second one decides"
    ]
    service.check_books()


def test_after_24_hours_the_same_key_would_be_a_second_charge(service: Service) -> None:
    """Why an old key is not sent again: the judge of these tests would notice."""
    subscription = unknown_since(service, {"effect": "cut_after"})
    [attempt] = service.attempts(subscription)
    client = service.connect_provider(service.settings)
    service.advance(hours=23, minutes=59)
    client.create_payment(attempt.body, str(attempt.idempotence_key))
    assert service.charged() == Counter([subscription])

    service.advance(minutes=1)
    client.create_payment(attempt.body, str(attempt.idempotence_key))

    assert service.charged() == {subscription: 2}


@pytest.mark.parametrize(("script", "state", "extended"), [
    ("succeeded", "SUCCEEDED", True), ("canceled:card_expired", "STOPPED", False), ("pending", "PENDING", False),
])  # fmt: skip
def test_a_lost_charge_that_a_search_finds_is_concluded_as_if_it_had_answered(
    service: Service, script: str, state: str, extended: bool
) -> None:
    subscription = unknown_since(service, {"effect": "cut_after"}, script=script)
    service.advance(hours=24)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert states(service, subscription) == [state]
    assert service.ended_at(subscription) == (A_MONTH_LATER if extended else NOON)
    assert len(posts(service, subscription)) == 1
    service.check_books()


def lost_before_arriving(service: Service) -> int:
    """A charge that never arrived, the day after: it has been searched for once."""
    subscription = unknown_since(service, {"effect": "cut_before"})
    service.advance(hours=24)
    service.run(JOB)
    [attempt] = service.attempts(subscription)
    assert (attempt.state, attempt.first_absent_at) == ("UNKNOWN", service.now)
    return subscription


def test_a_charge_that_two_searches_an_hour_apart_do_not_find_is_void_and_a_new_one_follows(service: Service) -> None:
    subscription = lost_before_arriving(service)
    service.advance(minutes=59)
    early = service.run(JOB)
    assert states(service, subscription) == ["UNKNOWN"]
    assert early.reasons(f"subscription {subscription}, attempt 1") == [
        "leave: outcome not known: the second scan must come an hour after the first"
    ]
    service.advance(minutes=1)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert states(service, subscription) == ["VOID", "SUCCEEDED"]
    first, second = service.attempts(subscription)
    assert first.idempotence_key != second.idempotence_key
    assert service.charged() == Counter([subscription])
    assert service.ended_at(subscription) == A_MONTH_LATER
    service.check_books()


def many_payments(service: Service, at: datetime, count: int = 150) -> None:
    service.provider.add_payments({"id": f"crowd-{number}", "created_at": at} for number in range(count))


def test_a_search_that_broke_off_proves_nothing_absent(service: Service) -> None:
    many_payments(service, NOON)
    subscription = lost_before_arriving(service)
    service.advance(hours=2)
    service.sandbox.misbehave("list", "error_before", page=2, times=None)

    run = service.run(JOB)

    assert not run.ok
    assert states(service, subscription) == ["UNKNOWN"]
    assert len(posts(service)) == 1
    recovered(service)
    assert service.run(JOB).ok
    assert states(service, subscription) == ["VOID", "SUCCEEDED"]
    service.check_books()


def test_a_first_search_that_broke_off_does_not_count_as_the_first(service: Service) -> None:
    subscription = unknown_since(service, {"effect": "cut_before"})
    service.advance(hours=24)
    service.sandbox.misbehave("list", "error_before", times=None)
    assert not service.run(JOB).ok
    recovered(service)
    service.advance(hours=2)

    service.run(JOB)

    assert states(service, subscription) == ["UNKNOWN"]
    assert service.attempts(subscription)[0].first_absent_at == service.now


def test_an_item_that_may_be_the_lost_charge_proves_nothing_absent(service: Service) -> None:
    subscription = lost_before_arriving(service)
    service.provider.add_payment(id="odd", created_at=NOON, method_id=f"method-{subscription}")
    service.advance(hours=2)

    run = service.run(JOB)

    assert not run.ok
    assert "may be this charge" in run.failure
    assert states(service, subscription) == ["UNKNOWN"]
    assert len(posts(service)) == 1


def test_an_unreadable_item_that_names_the_attempt_proves_nothing_absent(service: Service) -> None:
    subscription = lost_before_arriving(service)
    [attempt] = service.attempts(subscription)
    service.provider.add_payment(
        id="odd", created_at=NOON, metadata={"renewal_attempt_id": str(attempt.id)}, override={"status": "who knows"}
    )
    service.advance(hours=2)

    run = service.run(JOB)

    assert not run.ok
    assert states(service, subscription) == ["UNKNOWN"]


def test_a_list_that_lags_is_why_absence_takes_two_searches(service: Service) -> None:
    subscription = unknown_since(service, {"effect": "cut_after"})
    service.provider.switches = replace(service.provider.switches, list_lag_s=24.5 * 3600)
    service.advance(hours=24)
    service.run(JOB)
    assert states(service, subscription) == ["UNKNOWN"]
    service.advance(hours=1)

    assert service.run(JOB).ok

    assert states(service, subscription) == ["SUCCEEDED"]
    assert service.charged() == Counter([subscription])
    service.check_books()


def test_a_success_that_a_search_missed_twice_and_that_comes_late_goes_to_a_person(service: Service) -> None:
    """The provider's list lags by more than a day: a second charge may follow, and it is not hidden."""
    subscription = unknown_since(service, {"effect": "cut_after"})
    service.provider.switches = replace(service.provider.switches, list_lag_s=26 * 3600)
    service.advance(hours=24)
    service.run(JOB)
    service.advance(hours=1)
    service.run(JOB)
    assert states(service, subscription) == ["VOID", "SUCCEEDED"]
    service.advance(hours=1)

    service.run(MATCHING, as_of=NOON + timedelta(minutes=30))

    [problem] = service.rows("quarantine")
    assert problem.kind == "second_success"
    assert "Refund one only if both are paid" in problem.reason
    assert service.ended_at(subscription) == A_MONTH_LATER


def given_up(service: Service) -> tuple[int, Attempt]:
    """A subscription whose first try was given up as one that never arrived, and that attempt."""
    subscription = service.subscriber(script=["pending", "succeeded"], ended_at=NOON - timedelta(days=1))
    sent_at = NOON - timedelta(hours=26)
    return subscription, service.attempt(
        subscription, state="VOID", method=f"method-{subscription}", first_sent_at=sent_at
    )


def paid_late(service: Service, attempt: Attempt) -> None:
    """It turns out to be paid, and a matching tick hears of it beside the second try."""
    service.provider.add_payment(
        id="late",
        amount="299.00",
        created_at=attempt.first_sent_at,
        captured_at=service.now - timedelta(minutes=5),
        metadata=json.loads(attempt.body)["metadata"],
        method_id=attempt.payment_method_id,
    )
    assert service.tick(MATCHING).ok
    assert service.quarantined("late") == ["second_success"]


def granted_by_the_late_payment(service: Service, subscription: int) -> None:
    """The period is granted once, its entry closed, and nobody was charged by a call of ours."""
    assert service.charged() == Counter()
    assert service.settled("late") == ["renewed"]
    assert service.ended_at(subscription) == A_MONTH_LATER - timedelta(days=1)
    assert [(entry.kind, entry.resolution) for entry in service.rows("quarantine")] == [("second_success", "settled")]


@pytest.mark.parametrize("shards", [None, 2], ids=["whole", "in shards"])
def test_a_late_success_beside_a_pending_try_is_granted_once_that_one_is_declined_and_nothing_is_charged(
    service: Service, shards: int | None
) -> None:
    subscription, first = given_up(service)
    assert service.run(JOB).ok
    second = service.attempts(subscription)[1]
    assert second.state == "PENDING"
    paid_late(service, first)
    service.advance(days=1)
    assert service.run(JOB).ok
    assert service.quarantined("late") == ["second_success"], "the second try is pending still"
    service.provider.cancel(second.external_payment_id, "insufficient_funds", party="payment_network")

    run = service.run(JOB, shards=shards)

    assert run.ok, run.failure
    assert states(service, subscription) == ["SUCCEEDED", "DECLINED"]
    granted_by_the_late_payment(service, subscription)


def test_a_late_success_beside_a_try_that_never_arrived_keeps_it_from_being_sent_again(service: Service) -> None:
    subscription, first = given_up(service)
    method, sent_at = first.payment_method_id, NOON - timedelta(hours=1)
    service.attempt(subscription, number=2, state="UNKNOWN", method=method, first_sent_at=sent_at)
    paid_late(service, first)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert posts(service) == []
    assert states(service, subscription) == ["VOID", "UNKNOWN"]
    for hours in (23, 1):
        service.advance(hours=hours)
        service.run(JOB)
    assert states(service, subscription) == ["SUCCEEDED", "VOID"]
    granted_by_the_late_payment(service, subscription)


def test_a_late_success_beside_a_try_that_is_paid_too_is_left_to_a_person_and_holds_no_later_period(
    service: Service,
) -> None:
    subscription, first = given_up(service)
    assert service.run(JOB).ok
    paid_late(service, first)
    service.provider.pay(service.attempts(subscription)[1].external_payment_id)
    service.advance(days=1)
    assert service.run(JOB).ok
    assert (service.settled("late"), service.quarantined("late")) == ([], ["second_success"])
    service.set_time(A_MONTH_LATER)

    assert service.run(JOB).ok

    assert service.charged() == {subscription: 2}, "the period that the second try has paid, and the next one"
    assert service.quarantined("late") == ["second_success"]


# --- planned and never sent -----------------------------------------------------------------------------------------


def planned_yesterday(service: Service) -> int:
    subscription = service.subscriber()
    service.plan_renewals_only()
    service.advance(days=1)
    return subscription


def test_a_price_that_changed_before_the_first_send_is_charged_by_a_new_attempt(service: Service) -> None:
    subscription = planned_yesterday(service)
    service.execute("UPDATE prices SET amount = 349")

    run = service.run(JOB)

    assert run.ok, run.failure
    assert states(service, subscription) == ["VOID", "SUCCEEDED"]
    assert [str(charge.amount) for charge in service.charges()] == ["349.00"]
    assert service.ended_at(subscription) == A_MONTH_LATER
    service.check_books()


def test_a_method_that_was_replaced_before_the_first_send_is_charged_by_a_new_attempt(service: Service) -> None:
    subscription = planned_yesterday(service)
    service.provider.add_method("new-card")
    service.payment("new-card", subscription_id=subscription, status="SUCCEEDED", created_at=NOON)

    assert service.run(JOB).ok

    assert [charge.payment_method_id for charge in service.charges()] == ["new-card"]
    assert states(service, subscription) == ["VOID", "SUCCEEDED"]
    service.check_books()


def test_a_planned_attempt_whose_period_is_not_due_any_more_is_void_and_never_sent(service: Service) -> None:
    subscription = planned_yesterday(service)
    service.execute("UPDATE subscriptions SET status = 'CANCELED'")

    assert service.run(JOB).ok

    assert states(service, subscription) == ["VOID"]
    assert posts(service) == []


@pytest.mark.parametrize(
    ("how", "state"),
    [
        ({"effect": "change", "set": {"amount.value": "1.00"}}, "REVIEW"),
        ({"effect": "change", "set": {"status": "pending"}}, "PENDING"),
        (LOST["silence after the charge"], "UNKNOWN"),
    ],
    ids=["in review", "pending", "unknown"],
)
def test_a_day_that_support_adds_while_a_paid_charge_is_not_settled_brings_no_second_one(
    hasty: Service, how: Mapping[str, Any], state: str
) -> None:
    service = hasty
    subscription = service.subscriber()
    lose(service, subscription, how)
    service.run(JOB, ops=SENT_ONCE)
    assert states(service, subscription) == [state]
    service.execute("UPDATE subscriptions SET ended_at = ended_at + interval '1 day'")
    service.advance(hours=22)
    recovered(service)
    service.sandbox.misbehave("get", effect="change", set={"status": "pending"})

    run = service.run(JOB)

    assert service.charged() == {subscription: 1}
    assert len(posts(service, subscription)) == 1
    assert any("2026-03-12" in reason for reason in run.reasons(f"subscription {subscription}"))


@pytest.mark.parametrize("arrived", [True, False])
def test_an_unknown_charge_of_a_period_that_is_not_due_any_more_is_not_sent_again_but_searched_for(
    service: Service, arrived: bool
) -> None:
    subscription = unknown_since(service, {"effect": "cut_after" if arrived else "cut_before"})
    service.execute("UPDATE subscriptions SET status = 'CANCELED'")
    service.advance(hours=1)
    assert service.run(JOB).ok
    assert states(service, subscription) == ["UNKNOWN"]
    service.advance(hours=23)
    service.run(JOB)
    service.advance(hours=1)
    service.run(JOB)

    assert states(service, subscription) == (["SUCCEEDED"] if arrived else ["VOID"])
    assert len(posts(service)) == 1
    assert service.charged() == (Counter([subscription]) if arrived else Counter())
    service.check_books()


# --- paid, and our own books refuse ---------------------------------------------------------------------------------


def settle_later(service: Service, run: Run, subscription: int, other: int) -> None:
    """What a success that could not be settled looks like, and how it ends."""
    assert not run.ok
    assert f"subscription {subscription} (unknown): paid at the provider" in run.failure
    assert service.ended_at(subscription) == NOON
    assert service.ended_at(other) == A_MONTH_LATER
    service.advance(minutes=2)


def test_a_success_whose_settling_meets_a_locked_row_is_settled_by_the_matching_job(hasty: Service) -> None:
    service = hasty
    subscription, other = service.subscriber(), service.subscriber()
    # Raises what a lock that is kept too long raises, at the moment of the extension.
    service.execute("""
        CREATE FUNCTION keep_locked() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE lock_not_available; END $$
    """)
    service.execute(f"""
        CREATE TRIGGER keep_locked BEFORE UPDATE ON subscriptions
        FOR EACH ROW WHEN (old.id = {subscription}) EXECUTE FUNCTION keep_locked()
    """)

    run = service.run(JOB)

    settle_later(service, run, subscription, other)
    service.execute("DROP TRIGGER keep_locked ON subscriptions")
    assert service.run(MATCHING).ok
    assert states(service, subscription) == ["SUCCEEDED"]
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert service.charged() == Counter([subscription, other])
    service.check_books()


@pytest.mark.parametrize("healer", [MATCHING, JOB])
def test_a_success_that_the_services_own_tables_refuse_is_settled_once_they_take_it(
    service: Service, healer: str
) -> None:
    subscription, other = service.subscriber(service.plan("299.00")), service.subscriber(service.plan("199.00"))
    service.execute("ALTER TABLE payments ADD CONSTRAINT cheap CHECK (amount < 250) NOT VALID")

    run = service.run(JOB)

    settle_later(service, run, subscription, other)
    # Until a person has looked it is refused again, told once, and never charged again.
    refused = [service.run(name) for name in (MATCHING, JOB, MATCHING, JOB)]
    assert service.ended_at(subscription) == NOON
    assert [problem.kind for problem in service.rows("quarantine")] == ["not_writable"]
    assert not refused[-1].ok
    service.execute("ALTER TABLE payments DROP CONSTRAINT cheap")
    assert service.run(healer).ok
    assert states(service, subscription) == ["SUCCEEDED"]
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert service.charged() == Counter([subscription, other])
    [problem] = service.rows("quarantine")
    assert problem.resolution == "settled"
    service.check_books()


# --- a provider that breaks its own rules ---------------------------------------------------------------------------


def test_two_successes_for_one_attempt_are_one_grant_and_a_case_for_a_person(service: Service) -> None:
    subscription = service.subscriber()
    service.run(JOB)
    [charge] = service.charges()
    service.advance(minutes=5)
    service.provider.add_payment(id="again", amount="299.00", metadata=dict(charge.metadata))

    service.run(MATCHING)
    service.run(MATCHING)

    assert service.ended_at(subscription) == A_MONTH_LATER
    [problem] = service.rows("quarantine")
    assert (problem.kind, problem.external_payment_id) == ("second_success", "again")


def test_two_successes_that_a_search_finds_are_one_grant_and_a_case_for_a_person(service: Service) -> None:
    subscription = unknown_since(service, {"effect": "cut_after"})
    [charge] = service.charges()
    service.advance(minutes=5)
    service.provider.add_payment(id="again", amount="299.00", metadata=dict(charge.metadata))
    service.advance(hours=24)

    service.run(JOB)

    assert states(service, subscription) == ["SUCCEEDED"]
    assert service.ended_at(subscription) == A_MONTH_LATER
    assert [problem.kind for problem in service.rows("quarantine")] == ["second_success"]


def test_a_decline_and_a_pending_charge_of_one_attempt_count_as_pending(service: Service) -> None:
    subscription = unknown_since(service, {"effect": "cut_after"}, script="canceled:insufficient_funds")
    [attempt] = service.attempts(subscription)
    service.provider.add_payment(
        id="later",
        status="pending",
        amount="299.00",
        created_at=NOON + timedelta(minutes=1),
        metadata=json.loads(attempt.body)["metadata"],
    )
    service.advance(hours=24)

    service.run(JOB)

    assert states(service, subscription) == ["PENDING"]
    assert service.attempts(subscription)[0].external_payment_id == "later"
