"""What stops a run of charges and what does not: bad cards, a refused shop, books that take nothing, a person."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from billing_orchestration.jobs.termination import interrupts_held_back
from billing_orchestration.provider.client import Timeouts
from billing_orchestration.resources import utc_now
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.interleaving import Worker
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.waiting import wait_for_a_blocked_session, wait_until

JOB = "autopayment_job"
ROOT = Path(__file__).parents[2]
SENT_ONCE = {"charge_renewals": {"max_sends": 1}}


def due_before(service: Service, count: int) -> list[int]:
    """Subscriptions that are overdue, and so stand first."""
    return [service.subscriber(ended_at=NOON - timedelta(days=1)) for _ in range(count)]


def spoil(service: Service, subscriptions: list[int], effect: str) -> None:
    for subscription in subscriptions:
        service.sandbox.misbehave("create", effect, times=None, payment_method_id=f"method-{subscription}")


# --- bad cards


@pytest.mark.parametrize(("count", "effect"), [(2, "silence_before"), (6, "error_before"), (6, "silence_before")])
def test_cards_that_hang_or_fail_never_stop_the_others(service: Service, count: int, effect: str) -> None:
    service.timeouts = Timeouts(connect_s=2.0, charge_read_s=0.5, read_s=2.0, charge_done_s=0.0)
    bad = due_before(service, count)
    others = [service.subscriber() for _ in range(30)]
    spoil(service, bad, effect)

    run = service.run(JOB, ops=SENT_ONCE)

    assert service.charged() == Counter(others)
    assert "fails for everyone" not in run.failure
    assert {attempt.state for number in bad for attempt in service.attempts(number)} == {"UNKNOWN"}
    service.check_books()


# --- the shop

_REFUSED = {
    "type": "error",
    "code": "invalid_request",
    "parameter": "payment_method_data",
    "description": "Not here",
}
REFUSALS: dict[str, tuple[dict[str, Any], str, int]] = {
    "401": ({"effect": "invalid_credentials"}, "check YOOKASSA_SHOP_ID and YOOKASSA_SECRET_KEY", 1),
    "403": ({"effect": "forbidden"}, "recurring", 6),
    "400, all alike": ({"effect": "body_before", "status": 400, "body": json.dumps(_REFUSED)}, "Not here", 6),
}


@pytest.mark.parametrize(("how", "words", "most"), REFUSALS.values(), ids=REFUSALS)
def test_a_shop_that_is_refused_stops_after_a_few_requests_and_all_are_charged_once_it_is_mended(
    service: Service, how: dict[str, Any], words: str, most: int
) -> None:
    subscriptions = [service.subscriber() for _ in range(60)]
    service.sandbox.misbehave("create", times=None, **how)

    run = service.run(JOB)

    assert not run.ok
    assert words in run.failure
    assert service.sandbox.count("create") <= most
    assert service.rows("quarantine") == []
    service.sandbox.behave()
    again = service.run(JOB)
    assert again.ok, again.failure
    assert service.charged() == Counter(subscriptions)
    service.check_books()


def test_a_shop_that_must_send_receipts_is_told_by_one_request(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(20)]
    service.provider.switches.receipts = "demanded"

    run = service.run(JOB)

    assert not run.ok
    assert "Receipt is missing" in run.failure
    assert service.sandbox.count("create") == 1
    assert service.rows("quarantine") == []
    service.provider.switches.receipts = "off"
    assert service.run(JOB).ok
    assert service.charged() == Counter(subscriptions)


def test_a_wrong_code_in_every_receipt_is_told_by_one_request(service_with: Callable[..., Service]) -> None:
    service = service_with(receipts="with_payment", receipt_vat_code=11, receipt_payment_mode="full_payment",
                           receipt_measure="slices", receipt_fallback_email="shop@example.ru")  # fmt: skip
    subscriptions = [service.subscriber() for _ in range(3)]
    service.provider.switches.receipts = "demanded"

    run = service.run(JOB)

    assert not run.ok
    assert "measure" in run.failure
    assert service.sandbox.count("create") == 1
    assert service.rows("quarantine") == []
    service.settings = service.settings.model_copy(update={"receipt_measure": "piece"})
    assert service.run(JOB).ok
    assert service.charged() == Counter(subscriptions)


def test_a_refused_charge_of_one_customer_is_closed_by_the_next_success_of_that_subscription(service: Service) -> None:
    refused = service.subscriber(script=["bad_request", "succeeded"])
    other = service.subscriber()
    service.run(JOB)
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id, entry.resolved_at) == ("rejected", refused, None)
    service.advance(days=1)

    assert service.run(JOB).ok

    assert service.charged() == Counter([refused, other])
    [entry] = service.rows("quarantine")
    assert entry.resolution == "settled"


# --- the books


def test_the_first_charge_goes_alone_until_its_grant_is_committed(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(12)]
    with service.engine.begin() as somebody:
        # Charged, and nobody can write it down yet.
        somebody.execute(sa.text("LOCK TABLE payments IN EXCLUSIVE MODE"))
        worker = Worker(service).start(JOB)
        wait_for_a_blocked_session(service.engine)
        assert service.sandbox.count("create") == 1
        assert service.charged() == Counter(subscriptions[:1])

    assert worker.finished().ok
    assert service.charged() == Counter(subscriptions)


def test_books_that_take_no_grant_stop_the_run_after_a_few_charges_and_these_are_granted_later(
    service: Service,
) -> None:
    subscriptions = [service.subscriber() for _ in range(40)]
    service.execute("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'no room' USING ERRCODE = '23514'; END $$
    """)
    service.execute("CREATE TRIGGER refuse BEFORE INSERT ON payments FOR EACH ROW EXECUTE FUNCTION refuse()")

    run = service.run(JOB)

    assert not run.ok
    assert "the books cannot take what is charged: 3 charges in a row are paid and not granted" in run.failure
    assert len(service.charges()) == 3
    assert "paid at the provider" in run.failure
    service.execute("DROP TRIGGER refuse ON payments")
    assert service.run(JOB).ok
    assert service.charged() == Counter(subscriptions)
    service.check_books()


# --- the turn


def test_who_cancels_while_a_charge_waits_for_its_turn_is_not_charged(service: Service) -> None:
    subscriptions = [service.subscriber() for _ in range(5)]
    worker = Worker(service).start(JOB, ops={"charge_renewals": {"max_requests_per_second": 0.5}})
    wait_until(lambda: service.sandbox.count("create") >= 2, "the second charge was sent")
    service.execute("UPDATE subscriptions SET status = 'CANCELED' WHERE id = ANY(:ids)", ids=subscriptions[2:])

    assert worker.finished().ok

    assert service.sandbox.count("create") == 2
    assert service.charged() == Counter(subscriptions[:2])


# --- a person


def test_interrupts_are_held_back_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    told: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with interrupts_held_back(lambda: told.append("now")) as held:
            signal.raise_signal(signal.SIGTERM)
            assert (heard, told, held.signal) == ([], ["now"], signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_there_is_nothing_to_hold_back() -> None:
    seen: list[Any] = []

    def block() -> None:
        with interrupts_held_back(lambda: None) as held:
            seen.append(held.signal)

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert seen == [None]


@pytest.mark.parametrize(
    ("by_a_person", "status"), [(True, dg.DagsterRunStatus.CANCELED), (False, dg.DagsterRunStatus.FAILURE)]
)
def test_a_terminated_run_concludes_what_is_under_way_and_begins_nothing_more(
    service_with: Callable[..., Service],
    healthy: pytest.MonkeyPatch,
    tmp_path: Path,
    by_a_person: bool,
    status: dg.DagsterRunStatus,
) -> None:
    service = service_with(now=utc_now())
    under_way, *others = [service.subscriber() for _ in range(4)]
    service.sandbox.misbehave("create", "none", delay_s=30.0, payment_method_id=f"method-{under_way}")
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "billing_orchestration.definitions", "-j", JOB]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: service.sandbox.count("create") or process.poll() is not None, "a charge is under way")
        with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
            [run] = instance.get_runs()
            if by_a_person:
                instance.report_run_canceling(run)
            os.kill(process.pid, signal.SIGINT)
            # The answer that it waits for still counts.
            service.sandbox.behave()
            process.wait(60)
            found = instance.get_run_by_id(run.run_id)
    finally:
        process.kill()
        process.wait()

    assert found is not None
    assert found.status is status
    assert service.sandbox.count("create") == 1
    assert service.charged() == Counter([under_way])
    assert [attempt.state for attempt in service.attempts(under_way)] == ["SUCCEEDED"]
    assert [service.attempts(number) for number in others] == [[]] * 3
    service.check_books()
