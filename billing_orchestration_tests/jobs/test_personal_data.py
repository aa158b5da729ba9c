"""Who a customer is stands in our schema only: every job on marked rows, and nothing of it in Dagster or an alert."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import dagster as dg
import pytest
from pydantic import SecretStr

from billing_orchestration.alerting import Alerts
from billing_orchestration.database.quarantine import all_entries
from billing_orchestration.definitions import SCHEDULES
from billing_orchestration.jobs.money_checks import tick
from billing_orchestration.jobs.quarantine_page import RESOLVE_JOB, RESOLVE_OP
from billing_orchestration.jobs.run_alerts import alert_about
from billing_orchestration.resources import BillingDatabase
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.fixtures.receiver import Receiver
from billing_orchestration_tests.jobs.service import Run, Service
from billing_orchestration_tests.run_history import found_in, texts

USER, EMAIL, PHONE, CARD = "customer-of-mark", "mark.of@example.ru", "79005550067", "4111111111111111"
MARKS = [USER, EMAIL, PHONE, CARD, CARD[:8], "4111 1111"]
LONG_AGO = NOON - timedelta(days=20)


@pytest.fixture
def service(service_with: Callable[..., Service], receiver: Receiver) -> Service:
    """A shop with receipts, whose team shows contacts in a view, and whose people listen."""
    service = service_with(
        billing_renewal_view="billing_renewals",
        receipts="with_payment",
        receipt_vat_code=11,
        receipt_payment_mode="full_payment",
        alert_urls=SecretStr(receiver.url),
    )
    service.execute(f"""
        CREATE VIEW billing_renewals AS SELECT id AS subscription_id, 'method-' || id AS payment_method_id,
        true AS may_charge, CASE WHEN id % 2 = 0 THEN '{EMAIL}' END AS email, '+{PHONE}' AS phone FROM subscriptions
    """)
    # The service's trigger speaks of its customers.
    words = f"RAISE EXCEPTION 'user % ({EMAIL}) is blocked', NEW.user_id"
    service.meddle("subscriptions", "NEW.user_id LIKE '%blocked%'", words, event="INSERT OR UPDATE")
    service.execute("ALTER TABLE subscriptions DISABLE TRIGGER meddle")
    return service


def named(text: str) -> str:
    """A customer's id that carries the mark."""
    return f"{USER}-{text}"


def live_through_everything(service: Service) -> None:
    """Rows of both sides from which every job has something to do, to refuse and to ask a person about."""
    plan = service.monthly
    for script in ("succeeded", "canceled:insufficient_funds", "canceled:card_expired"):
        service.subscriber(script=script, user=named(script))
    lost = service.subscriber(user=named("lost"))
    service.sandbox.misbehave("create", "error_after", payment_method_id=f"method-{lost}", times=None)
    service.subscriber(user=named("blocked renewal"))
    service.subscription(named("twice"), plan_id=plan)
    service.subscriber(user=named("twice"), ended_at=NOON - timedelta(hours=1))
    for name in ("over", "over, blocked"):
        service.subscription(named(name), ended_at=LONG_AGO)
    other = service.subscription(named("other"), ended_at=NOON + timedelta(days=3))
    service.payment(service.paid_there("foreign", user=named("foreign"), plan_id=plan), subscription_id=other)
    service.paid_there("created", user=named("created"), plan_id=plan)
    service.paid_there("blocked", user=named("blocked purchase"), plan_id=plan)
    talkative = {"user_id": named("card"), "note": f"{CARD[:4]} {CARD[4:8]} {CARD[8:12]} {CARD[12:]} {EMAIL}"}
    service.paid_there("talkative", metadata={**talkative, "card": CARD, "phone": PHONE})
    service.paid_there("odd", user=named("odd"), plan_id=plan, override={"amount": f"{EMAIL} {CARD}"})
    card = {"first6": CARD[:6], "last4": CARD[-4:], "number": CARD}
    service.paid_there("odd card", override={"amount": None, "payment_method": {"type": "bank_card", "card": card}})
    service.payment(service.paid_there("stale", status="canceled", created_at=LONG_AGO), created_at=LONG_AGO)


def run_all(service: Service) -> list[Run]:
    """Every job, after dry runs of two; then two decisions of a person."""
    service.execute("ALTER TABLE subscriptions ENABLE TRIGGER meddle")
    runs = [service.run(job, dry_run=True) for job in ("autopayment_job", "expire_subscriptions_job")]
    once = {"autopayment_job": {"charge_renewals": {"max_sends": 1}}}
    runs += [service.run(job, ops=once.get(job)) for job in (schedule.job_name for schedule in SCHEDULES)]
    # A person decides in the UI: what is shown first, and what is done.
    for entry in service.rows("quarantine", "kind IN ('foreign_metadata', 'metadata')"):
        decision = {"entry": entry.id, "decision": "attach", "subscription": 1, "reason": "asked", "by": "vera"}
        for dry_run in (True, False):
            runs.append(service.run(RESOLVE_JOB, ops={RESOLVE_OP: {**decision, "dry_run": dry_run}}))
    return runs


def test_no_customer_is_named_in_the_run_history_or_an_alert(
    service: Service, receiver: Receiver, capfd: pytest.CaptureFixture[str]
) -> None:
    live_through_everything(service)
    alerts = Alerts(lambda: service.settings)
    runs = run_all(service)
    for run in runs:
        if not run.ok and (dagster_run := service.instance.get_run_by_id(run.run_id)):
            alert_about(service.instance, dagster_run, alerts)
    seen = tick(service.instance, None, BillingDatabase(lambda: service.settings), alerts, service.now)
    assert isinstance(seen, dg.SensorResult)
    for event in seen.asset_events:
        service.instance.report_runless_asset_event(event)

    told = [*texts(service.instance), *(("an alert", str(message)) for message in receiver.messages)]
    told += [("stdout", (streams := capfd.readouterr()).out), ("stderr", streams.err)]
    assert found_in(told, MARKS) == []
    # That there was something to find: the rows were worked on, refused and alerted about.
    history = "\n".join(text for _, text in told)
    assert "is blocked" in history
    kinds = {row.kind for row in service.rows("quarantine")}
    assert kinds >= {"not_writable", "two_active", "foreign_metadata", "unreadable", "metadata"}, kinds
    assert "autopayment_job failed (2026-03-12)" in receiver.titles
    states = {row.state for row in service.rows("renewal_attempts")}
    assert states >= {"SUCCEEDED", "DECLINED", "STOPPED", "REJECTED"}, states
    # Evidence keeps of a card its last four digits only, and says who it is about: it is ours.
    with service.engine.connect() as connection:
        evidence = {entry.external_payment_id: str(entry.evidence) for entry in all_entries(connection)}
    assert found_in(list(evidence.items()), [EMAIL, CARD[:6], "4111 1111"]) == []
    assert "…1111" in evidence["talkative"]
    assert "'last4': '1111'" in evidence["odd card"]
    assert named("foreign") in evidence["foreign"]


@pytest.mark.parametrize("code", ["P0001", "42501"], ids=["refused", "as if without rights"])
def test_a_trigger_that_refuses_every_row_names_nobody_in_the_runs_failure(service: Service, code: str) -> None:
    for number in range(120):
        service.subscription(named(f"{number}"), ended_at=LONG_AGO)
    service.execute("DROP TRIGGER meddle ON subscriptions; DROP FUNCTION meddle()")
    words = f"RAISE EXCEPTION 'user % ({EMAIL}) is blocked', NEW.user_id USING ERRCODE = '{code}'"
    service.meddle("subscriptions", "true", words)

    run = service.run("expire_subscriptions_job", max_changes=200)

    assert not run.ok
    assert "is blocked" in run.failure
    assert found_in(list(texts(service.instance)), MARKS) == []
