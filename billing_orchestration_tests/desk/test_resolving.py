"""Resolving what stands in the quarantine: safe, once, audited; the provider's ledger is the judge of the money."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import SecretStr

from billing_orchestration.database.quarantine import close_entry, read_entry
from billing_orchestration.database.settling import settle_batch
from billing_orchestration.desk.explaining import explain_payment, explain_subscription
from billing_orchestration.desk.quarantine_report import entries_of, entry_of, listed, shown
from billing_orchestration.desk.resolving import NotResolved, Resolution, resolve
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.provider_payment import ATTEMPT_KEY, ProviderPayment
from billing_orchestration.domain.settlement_decisions import Leave
from billing_orchestration.provider.errors import ProviderError
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.waiting import start_blocked, wait_for_a_blocked_session

UTC = timezone.utc
MATCHING = "matching_successful_payments_job"
EMPTY = "the quarantine is empty: nothing waits for a person"


def person(service: Service, word: str, entry: int, attach_to: int | None = None) -> list[str]:
    """A person resolves an entry."""
    return resolve(
        service.engine,
        lambda: service.connect_provider(service.settings),
        BillingCalendar(service.settings.billing_timezone),
        entry,
        Resolution(word, "the customer called", "vera", attach_to),
        lambda: service.now,
    )


def the_entry(service: Service, external_id: str | None = None) -> Any:
    """The one entry of the quarantine (of a payment)."""
    found = service.rows("quarantine")
    [entry] = [row for row in found if external_id in (None, row.external_payment_id)]
    return entry


def quarantined(service: Service, external_id: str) -> int:
    """Let the matching job put a payment into the quarantine; give back the entry."""
    assert service.run(MATCHING).ok
    entry_id: int = the_entry(service, external_id).id
    return entry_id


def the_row_differs(service: Service) -> tuple[int, int]:
    """A customer paid 199 for what the books hold as 299; (payment row, entry)."""
    plan = service.plan("299.00")
    service.paid_there("cheap", user="anna", plan_id=plan, amount="199.00")
    row = service.payment("cheap", amount="299.00")
    return row, quarantined(service, "cheap")


# --- accept


def test_accepting_another_amount_grants_once_and_the_books_show_the_true_amount(service: Service) -> None:
    row, entry = the_row_differs(service)

    said = person(service, "accepted", entry)

    payment = service.row("payments", row)
    assert (payment.status, payment.amount, payment.currency) == ("SUCCEEDED", 199, "RUB")
    [subscription] = service.rows("subscriptions")
    assert (payment.subscription_id, subscription.user_id, subscription.status) == (subscription.id, "anna", "ACTIVE")
    assert service.settled("cheap") == ["created"]
    closed = the_entry(service)
    assert (closed.resolution, closed.resolved_by, closed.resolution_reason) == (
        "accepted",
        "vera",
        "the customer called",
    )
    assert "199.00 RUB" in said[0]
    service.check_books()
    before = service.snapshot()
    assert service.run(MATCHING).ok
    assert service.snapshot() == before


def test_a_resolution_is_in_the_audit_trail_with_who_and_why(service: Service) -> None:
    row, entry = the_row_differs(service)
    person(service, "accepted", entry)

    trail = service.rows("audit_trail", "job = 'quarantine'")

    assert len({change.run_id for change in trail}) == 1
    assert trail[0].run_id.startswith("cli-")
    changed = {(change.entity, change.entity_id): change for change in trail}
    assert changed["quarantine", str(entry)].reason == "vera: the customer called"
    assert changed["payment", str(row)].old["amount"] == "299.00"
    assert changed["payment", str(row)].new["amount"] == "199.00"


@pytest.mark.parametrize("state", ["CANCELED", None])
def test_accepting_what_is_canceled_or_nameless_here_revives_that_row(service: Service, state: str | None) -> None:
    plan = service.plan()
    service.paid_there("paid", user="anna", plan_id=plan)
    row = service.payment("paid", status=state)
    entry = quarantined(service, "paid")

    person(service, "accepted", entry)

    assert service.row("payments", row).status == "SUCCEEDED"
    assert [payment.id for payment in service.rows("payments")] == [row]
    assert service.settled("paid") == ["created"]


def test_accepting_a_test_payment_in_a_live_shop_grants_it(service: Service) -> None:
    service.provider.secret_key = "live_sandbox"
    service.settings = service.settings.model_copy(update={"yookassa_secret_key": SecretStr("live_sandbox")})
    service.paid_there("trial", user="anna", plan_id=service.plan(), test=True)
    entry = quarantined(service, "trial")
    assert the_entry(service).kind == "test_payment"

    person(service, "accepted", entry)

    assert service.settled("trial") == ["created"]


def test_what_still_cannot_be_granted_is_refused_with_the_reason_and_nothing_is_written(service: Service) -> None:
    service.paid_there("odd", metadata={"user_id": "anna"})
    entry = quarantined(service, "odd")
    before = service.snapshot()

    with pytest.raises(NotResolved, match=r"plan_id.*Nothing was written; attach or ignore it"):
        person(service, "accepted", entry)

    assert service.snapshot() == before


def test_accepting_is_possible_once_what_stood_in_the_way_is_mended(service: Service) -> None:
    plan = service.plan(unit="fortnight")
    service.paid_there("odd", user="anna", plan_id=plan)
    entry = quarantined(service, "odd")
    service.execute("UPDATE plans SET duration_unit = 'month' WHERE id = :id", id=plan)

    person(service, "accepted", entry)

    assert service.settled("odd") == ["created"]


@pytest.mark.parametrize("status", ["pending", "canceled", "waiting_for_capture"])
def test_a_payment_that_has_not_succeeded_is_never_granted(service: Service, status: str) -> None:
    service.provider.add_payment(id="open", status=status, amount="299.00", metadata={}, created_at=NOON)
    entry = _quarantine_by_hand(service, "open", "amount_differs")
    before = service.snapshot()
    subscription = service.subscription(ended_at=NOON)

    for word, target in (("accepted", None), ("attached", subscription)):
        with pytest.raises(NotResolved, match=f"is {status} at the provider"):
            person(service, word, entry, target)

    assert service.snapshot()["quarantine"] == before["quarantine"]
    assert service.settled("open") == []


def test_a_payment_refunded_since_is_recorded_and_grants_nothing(service: Service) -> None:
    row, entry = the_row_differs(service)
    service.provider.refund("cheap")

    said = person(service, "accepted", entry)

    assert service.row("payments", row).status == "REFUNDED"
    assert service.rows("subscriptions") == []
    assert "nothing is granted" in said[0]


def test_a_payment_that_the_provider_does_not_know_is_never_granted(service: Service) -> None:
    entry = _quarantine_by_hand(service, "nowhere", "amount_differs")

    with pytest.raises(NotResolved, match="knows no payment nowhere"):
        person(service, "accepted", entry)


def test_nothing_is_written_when_the_provider_does_not_answer(service: Service) -> None:
    _, entry = the_row_differs(service)
    before = service.snapshot()
    service.settings = service.settings.model_copy(update={"yookassa_api_url": "http://127.0.0.1:9/v3"})

    with pytest.raises(ProviderError):
        person(service, "accepted", entry)

    assert service.snapshot() == before


# --- renewals


def _second_success(service: Service) -> tuple[int, int]:
    """A period that was renewed, and paid once more by a charge that names the same attempt; (subscription, entry)."""
    subscription = service.subscriber(ended_at=NOON)
    assert service.run("autopayment_job").ok
    [attempt] = service.attempts(subscription)
    service.paid_there("again", metadata={ATTEMPT_KEY: str(attempt.id)})
    return subscription, quarantined(service, "again")


def test_accepting_a_second_success_is_one_more_period_for_the_customer(service: Service) -> None:
    subscription, entry = _second_success(service)
    assert service.ended_at(subscription) == datetime(2026, 4, 12, 12, tzinfo=UTC)

    person(service, "accepted", entry)

    assert service.ended_at(subscription) == datetime(2026, 5, 12, 12, tzinfo=UTC)
    assert service.settled("again") == ["extended"]
    assert [attempt.state for attempt in service.attempts(subscription)] == ["SUCCEEDED"]
    [row] = service.rows("payments", "external_payment_id = 'again'")
    assert (row.status, row.subscription_id) == ("SUCCEEDED", subscription)
    service.check_books()


def test_ignoring_a_second_success_grants_nothing_now_or_later(service: Service) -> None:
    subscription, entry = _second_success(service)

    person(service, "ignored", entry)
    service.advance(minutes=2)
    assert service.run(MATCHING).ok

    assert service.ended_at(subscription) == datetime(2026, 4, 12, 12, tzinfo=UTC)
    assert service.settled("again") == []
    assert the_entry(service).resolution == "ignored"


def _in_review(service: Service) -> tuple[int, int]:
    """A renewal that succeeded with another amount than was asked; (subscription, entry)."""
    subscription = service.subscriber(ended_at=NOON, script="pending:succeeded:60")
    assert service.run("autopayment_job").ok
    service.execute("UPDATE billing_orchestration.renewal_attempts SET amount = 300")
    service.advance(minutes=2)
    [attempt] = service.attempts(subscription)
    entry = quarantined(service, attempt.external_payment_id)
    assert [attempt.state for attempt in service.attempts(subscription)] == ["REVIEW"]
    return subscription, entry


def test_accepting_a_renewal_in_review_extends_by_a_period_and_closes_the_attempt(service: Service) -> None:
    subscription, entry = _in_review(service)

    person(service, "accepted", entry)

    assert service.ended_at(subscription) == datetime(2026, 4, 12, 12, tzinfo=UTC)
    assert [attempt.state for attempt in service.attempts(subscription)] == ["SUCCEEDED"]
    assert service.settled(the_entry(service).external_payment_id) == ["renewed"]
    service.check_books()


def test_ignoring_a_renewal_in_review_never_charges_the_period_again_and_lets_it_expire(service: Service) -> None:
    subscription, entry = _in_review(service)
    charged = len(service.charges())
    service.advance(days=4)
    assert service.run("expire_subscriptions_job").ok
    assert service.row("subscriptions", subscription).status == "ACTIVE"

    person(service, "ignored", entry)
    assert service.run("autopayment_job").ok
    assert service.run("expire_subscriptions_job").ok

    assert len(service.charges()) == charged
    assert [attempt.state for attempt in service.attempts(subscription)] == ["REVIEW"]
    assert service.row("subscriptions", subscription).status == "EXPIRED"


# --- attach


def test_attaching_grants_one_period_of_that_subscriptions_plan_and_links_the_payment(service: Service) -> None:
    yearly = service.plan("2990.00", duration=1, unit="year")
    subscription = service.subscription("boris", plan_id=yearly, ended_at=NOON + timedelta(days=5))
    service.paid_there("odd", metadata={"user_id": "anna"}, amount="299.00")
    entry = quarantined(service, "odd")

    person(service, "attached", entry, subscription)

    assert service.ended_at(subscription) == datetime(2027, 3, 17, 12, tzinfo=UTC)
    [row] = service.rows("payments")
    assert (row.status, row.subscription_id, row.amount) == ("SUCCEEDED", subscription, 299)
    assert service.settled("odd") == ["extended"]
    assert the_entry(service).resolution == "attached"


def test_attaching_to_an_expired_subscription_revives_it_from_now(service: Service) -> None:
    subscription = service.subscription(ended_at=NOON - timedelta(days=90), status="EXPIRED")
    service.paid_there("odd", metadata={"user_id": "odd"})
    entry = quarantined(service, "odd")

    person(service, "attached", entry, subscription)

    assert service.row("subscriptions", subscription).status == "ACTIVE"
    assert service.ended_at(subscription) == datetime(2026, 4, 12, 12, tzinfo=UTC)


def test_attaching_to_one_that_is_long_over_grants_a_period_that_the_customer_can_use(service: Service) -> None:
    subscription = service.subscription(ended_at=NOON - timedelta(days=90))
    service.paid_there("odd", metadata={"user_id": "odd"})
    entry = quarantined(service, "odd")

    person(service, "attached", entry, subscription)

    assert service.ended_at(subscription) == datetime(2026, 4, 12, 12, tzinfo=UTC)


@pytest.mark.parametrize("status", ["CANCELED", "PAUSED", "DELETED", "CREATED", None])
def test_attaching_to_a_subscription_that_the_customer_cannot_use_is_refused(
    service: Service, status: str | None
) -> None:
    subscription = service.subscription(ended_at=NOON, status=status)
    service.paid_there("odd", metadata={"user_id": "odd"})
    entry = quarantined(service, "odd")

    with pytest.raises(NotResolved, match="no use to the customer"):
        person(service, "attached", entry, subscription)
    with pytest.raises(NotResolved, match="subscription 4711 does not exist"):
        person(service, "attached", entry, 4711)

    assert service.settled("odd") == []


def test_a_charge_of_another_installation_can_be_attached_but_not_accepted(service: Service) -> None:
    subscription = service.subscription(ended_at=NOON)
    service.paid_there("foreign", metadata={ATTEMPT_KEY: "7c8a7b52-53a9-5d5c-9a0c-0f3f58e3f4a1"})
    entry = quarantined(service, "foreign")

    with pytest.raises(NotResolved, match="another installation's charge"):
        person(service, "accepted", entry)
    person(service, "attached", entry, subscription)

    assert service.settled("foreign") == ["extended"]


# --- ignore, and what is no payment


def test_what_was_ignored_is_left_for_ever_and_cannot_be_accepted_by_another_entry(service: Service) -> None:
    _, entry = the_row_differs(service)
    person(service, "ignored", entry)
    other = _quarantine_by_hand(service, "cheap", "test_payment")

    assert service.run(MATCHING).ok
    assert service.settled("cheap") == []
    with pytest.raises(NotResolved, match="ignored by a person's decision"):
        person(service, "accepted", other)


def test_what_was_settled_meanwhile_cannot_be_ignored_any_more(service: Service) -> None:
    plan = service.plan()
    service.paid_there("paid", user="anna", plan_id=plan)
    assert service.run(MATCHING).ok
    entry = _quarantine_by_hand(service, "paid", "amount_differs")

    with pytest.raises(NotResolved, match="settled meanwhile"):
        person(service, "ignored", entry)
    said = person(service, "accepted", entry)

    assert "granted before, nothing was added" in said[0]
    assert service.settled("paid") == ["created"]


LENGTHS = pytest.mark.parametrize("note", ["", "long " * 600], ids=["short evidence", "evidence that is cut"])


def in_quarantine(service: Service, note: str) -> tuple[ProviderPayment, int]:
    """A payment that names a plan which comes a little later, and its entry."""
    payment = service.paid("early", user="anna", plan_id=77)
    payment = replace(payment, metadata={**payment.metadata, "note": note})
    service.settle(payment)
    plan = service.plan()
    return replace(payment, metadata={**payment.metadata, "plan_id": str(plan)}), the_entry(service).id


@LENGTHS
def test_ignoring_waits_for_the_settling_of_its_payment_and_then_refuses(service: Service, note: str) -> None:
    payment, entry = in_quarantine(service, note)
    with ThreadPoolExecutor() as pool, service.engine.connect() as settling:
        calendar = BillingCalendar(service.settings.billing_timezone)
        settle_batch(settling, [payment], stamp=service.stamp(), calendar=calendar, is_live=False)
        ignoring = start_blocked(pool, service.engine, lambda: person(service, "ignored", entry))
        settling.commit()
        with pytest.raises(NotResolved, match="settled"):
            ignoring.result()
    assert the_entry(service).resolution == "settled"


@LENGTHS
def test_settling_waits_for_a_person_who_ignores_its_payment_and_then_leaves_it(service: Service, note: str) -> None:
    payment, entry = in_quarantine(service, note)
    with ThreadPoolExecutor() as pool, service.engine.connect() as ignoring:
        found = read_entry(ignoring, entry, lock=True)
        assert found is not None
        close_entry(ignoring, service.stamp(), found, "ignored", "the customer called", "vera")
        settling = start_blocked(pool, service.engine, lambda: service.settle(payment))
        ignoring.commit()
        [settled] = settling.result()
    assert isinstance(settled.decision, Leave)
    assert service.settled("early") == []


def test_a_gap_is_only_closed_and_told_again_when_it_comes_back(service: Service) -> None:
    service.execute("""
        INSERT INTO billing_orchestration.quarantine (problem_key, kind, reason, evidence, job, run_id, opened_at)
        VALUES ('job m, from 2026-03-01:gap', 'gap', 'not covered', '{}', 'm', 'r', now())
    """)
    entry = the_entry(service).id
    with pytest.raises(NotResolved, match="accept or ignore"):
        person(service, "attached", entry, 1)
    before = service.snapshot()

    person(service, "accepted", entry)

    assert the_entry(service).resolution == "mended"
    after = service.snapshot()
    assert (after["payments"], after["subscriptions"]) == (before["payments"], before["subscriptions"])


def test_ignoring_a_row_that_could_not_be_expired_does_not_lose_a_payment_that_comes_later(service: Service) -> None:
    plan = service.plan()
    row = service.payment("late")
    service.execute(
        """
        INSERT INTO billing_orchestration.quarantine
            (problem_key, kind, reason, external_payment_id, payment_id, evidence, job, run_id, opened_at)
        VALUES ('payment ' || :row, 'not_writable', 'a trigger', 'late', :row, '{}', 'm', 'r', now())
        """,
        row=row,
    )
    person(service, "ignored", the_entry(service).id)
    service.paid_there("late", user="anna", plan_id=plan)

    assert service.run(MATCHING).ok

    assert service.settled("late") == ["created"]


def test_a_second_resolve_of_an_entry_says_who_has_resolved_it(service: Service) -> None:
    _, entry = the_row_differs(service)
    person(service, "accepted", entry)
    before = service.snapshot()

    for word in ("accepted", "ignored"):
        with pytest.raises(NotResolved, match=r"resolved already: accepted on 2026-03-12 12:00 UTC by vera"):
            person(service, word, entry)

    assert service.snapshot() == before
    with pytest.raises(NotResolved, match="there is no entry 4711"):
        person(service, "ignored", 4711)


# --- races


def test_of_two_who_resolve_one_entry_at_once_one_does_and_the_other_is_told(service: Service) -> None:
    row, entry = the_row_differs(service)
    with ThreadPoolExecutor(2) as people, service.locking("payments", row):
        racing = [people.submit(person, service, word, entry) for word in ("accepted", "accepted")]
        wait_for_a_blocked_session(service.engine, 2)
    told = [future.exception() for future in racing]

    assert sorted(str(error)[:5] for error in told) == ["None", "entry"]
    assert service.settled("cheap") == ["created"]
    assert len(service.rows("subscriptions")) == 1
    service.check_books()


def test_accepting_and_ignoring_at_once_never_leaves_a_granted_payment_ignored(service: Service) -> None:
    row, entry = the_row_differs(service)
    with ThreadPoolExecutor(2) as people:
        with service.locking("payments", row):
            accepting = people.submit(person, service, "accepted", entry)
            wait_for_a_blocked_session(service.engine, 1)
            ignoring = people.submit(person, service, "ignored", entry)
            wait_for_a_blocked_session(service.engine, 2)
        accepting.result()
        assert isinstance(ignoring.exception(), NotResolved)

    assert the_entry(service).resolution == "accepted"
    assert service.settled("cheap") == ["created"]


def test_a_tick_that_settles_while_a_person_accepts_grants_once(service: Service) -> None:
    row, entry = the_row_differs(service)
    # What stood in the way is mended, so the tick settles it as well.
    service.execute("UPDATE payments SET amount = 199 WHERE id = :id", id=row)
    with ThreadPoolExecutor(1) as people:
        with service.locking("payments", row):
            tick = service.begin(MATCHING)
            wait_for_a_blocked_session(service.engine, 1)
            accepting = people.submit(person, service, "accepted", entry)
            wait_for_a_blocked_session(service.engine, 2)
        run = tick()
        error = accepting.exception()

    assert run.ok, run.failure
    assert error is None or "resolved already: settled" in str(error)
    assert service.settled("cheap") == ["created"]
    assert len(service.rows("subscriptions")) == 1
    service.check_books()


# --- what a person reads


def test_the_list_and_an_entry_say_what_is_wrong_and_what_each_resolution_does(service: Service) -> None:
    assert listed(entries_of(service.engine, with_resolved=False)) == [
        "the quarantine is empty: nothing waits for a person"
    ]
    _, entry = the_row_differs(service)

    lines = listed(entries_of(service.engine, with_resolved=False))
    row = " ".join(" ".join(lines).split())
    assert "payment cheap: amount_differs: 299.00 RUB here, 199.00 RUB at the provider" in row
    whole = "\n".join(shown(entry_of(service.engine, entry)))
    assert '"amount": "199.00 RUB"' in whole
    assert "--accept: grants the period, if that is still to be done, and books the provider's amount" in whole

    person(service, "ignored", entry)
    assert listed(entries_of(service.engine, with_resolved=False)) == [
        "the quarantine is empty: nothing waits for a person"
    ]
    assert "ignored" in listed(entries_of(service.engine, with_resolved=True))[0]
    assert (
        "ignored on 2026-03-12 12:00:00 UTC by vera: the customer called" in shown(entry_of(service.engine, entry))[-1]
    )


def explained(service: Service, what: str) -> str:
    """What `explain` says."""
    kind, name = what.split()
    connect = lambda: service.connect_provider(service.settings)  # noqa: E731
    if kind == "payment":
        return "\n".join(explain_payment(service.engine, connect, name))
    return "\n".join(explain_subscription(service.engine, connect, int(name)))


def test_a_case_is_told_in_order_from_both_sides(service: Service) -> None:
    subscription, entry = _second_success(service)
    person(service, "accepted", entry)

    told = explained(service, f"subscription {subscription}")

    charge = service.charges()[0].payment_id
    for words in (
        f"subscription {subscription} of user",
        f"at the provider, payment {charge}: succeeded, 299.00 RUB",
        "attempt 1 to charge 299.00 RUB was planned",
        "attempt 1 was sent to the provider (send 1)",
        f"provider: payment {charge} succeeded",
        "accepted: vera: the customer called",
        "ended_at 2026-04-12T12:00:00+00:00 -> 2026-05-12T12:00:00+00:00",
        "Nothing waits for a person.",
    ):
        assert words in told, told
    history = told.split("What happened (UTC):\n")[1].split("\n\n")[0].splitlines()
    assert [line[:21] for line in history] == sorted(line[:21] for line in history)


def test_a_case_is_told_without_the_provider_when_it_does_not_answer(service: Service) -> None:
    the_row_differs(service)
    service.settings = service.settings.model_copy(update={"yookassa_api_url": "http://127.0.0.1:9/v3"})

    told = explained(service, "payment cheap")

    assert "the provider did not answer, its side is missing here" in told
    assert "299.00 RUB here, 199.00 RUB at the provider" in told


def test_a_payment_is_found_by_the_providers_id_and_by_the_rows(service: Service) -> None:
    row, _ = the_row_differs(service)

    by_name, by_row = explained(service, "payment cheap"), explained(service, f"payment {row}")

    assert by_name.splitlines()[1:] == by_row.splitlines()[1:]
    assert "Waits for a person:" in by_name


def test_a_case_that_nobody_knows_is_said_so(service: Service) -> None:
    with pytest.raises(NotResolved, match="neither this database nor the provider knows a payment nothing"):
        explained(service, "payment nothing")
    with pytest.raises(NotResolved, match="knows no subscription 4711"):
        explained(service, "subscription 4711")
    # One that only the provider knows is told.
    service.paid_there("theirs", metadata={})
    assert "at the provider, payment theirs: succeeded" in explained(service, "payment theirs")


def _quarantine_by_hand(service: Service, external_id: str, kind: str) -> int:
    service.execute(
        """
        INSERT INTO billing_orchestration.quarantine
            (problem_key, kind, reason, external_payment_id, evidence, job, run_id, opened_at)
        VALUES ('payment ' || :id || ':' || :kind, :kind, 'by hand', :id, '{}', 'm', 'r', now())
        """,
        id=external_id,
        kind=kind,
    )
    found = service.rows("quarantine", "resolved_at IS NULL")
    entry_id: int = found[-1].id
    return entry_id
