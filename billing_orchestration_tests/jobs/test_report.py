"""The daily report: what it counts, that it draws, whom it is sent to, and that it names no customer and no secret."""

from __future__ import annotations

import base64
from datetime import timedelta

import pytest
from pydantic import SecretStr

from billing_orchestration.database.engine import read
from billing_orchestration.jobs.report.composing import Counted, as_html, as_markdown, count, sections
from billing_orchestration_tests.fixtures.receiver import Receiver
from billing_orchestration_tests.jobs.service import Service

JOB = "report_job"


def counted(service: Service) -> Counted:
    with read(service.engine) as connection:
        return count(connection, service.now, "UTC")


def rows(service: Service, title: str) -> list[list[str]]:
    """The rows of a section, without the header."""
    [section] = [section for section in sections(counted(service)) if section.title.startswith(title)]
    return [list(row) for row in section.rows[1:]]


@pytest.fixture
def two_days(service: Service) -> Service:
    """A card that pays at once, one that is declined and pays the next day, one that never pays; one due next week."""
    service.subscriber(user="anna-of-example")
    late = service.subscriber(script=["canceled:insufficient_funds", "succeeded"])
    service.subscriber(script="canceled:insufficient_funds")
    service.subscriber(script="canceled:card_expired")
    service.subscription(plan_id=service.monthly, ended_at=service.now + timedelta(days=5))
    assert service.run("autopayment_job").ok
    service.advance(days=1)
    assert service.run("autopayment_job").ok
    assert len(service.attempts(late)) == 2
    return service


def test_charges_and_revenue_stand_by_billing_day(two_days: Service) -> None:
    assert rows(two_days, "Charges") == [["2026-03-13", "1", "1", "0", "0"], ["2026-03-12", "1", "3", "0", "0"]]
    assert rows(two_days, "Revenue") == [
        ["2026-03-13", "1", "299.00", "0.00", "", "RUB"],
        ["2026-03-12", "1", "299.00", "0.00", "", "RUB"],
    ]
    assert rows(two_days, "Renewals due") == [["2026-03-17", "1"]]


def test_a_decline_that_pays_the_next_day_is_recovered_in_its_class(two_days: Service) -> None:
    assert rows(two_days, "Declines") == [
        ["hard", "1", "0 (0%)", "0 (0%)", "0 (0%)", "0 (0%)"],
        ["soft", "2", "1 (50%)", "1 (50%)", "1 (50%)", "1 (50%)"],
    ]


def test_what_waits_what_is_unknown_and_the_slowest_repair_have_their_age(service: Service) -> None:
    plan = service.plan()
    service.paid_there("slow", user="boris", plan_id=plan, created_at=service.now - timedelta(minutes=50))
    service.paid_there("odd", metadata={"user_id": "boris"})
    lost = service.subscriber()
    service.sandbox.misbehave("create", "error_after", payment_method_id=f"method-{lost}", times=None)
    assert service.run("matching_successful_payments_job").ok
    assert not service.run("autopayment_job", ops={"charge_renewals": {"max_sends": 1}}).ok
    service.advance(days=2)
    assert rows(service, "Quarantine") == [["metadata", "0", "1", "0"]]
    assert rows(service, "Unknown") == [["RUB", "1", "299.00", "2 d"]]
    [[payment, kind, took]] = rows(service, "Slowest")
    assert (kind, took) == ("created", "50 min")
    assert payment.startswith("row ")


def test_the_job_shows_it_on_its_asset_with_plots_and_changes_nothing(two_days: Service) -> None:
    before = two_days.snapshot()
    run = two_days.run(JOB)
    assert run.ok
    assert run.materialized["report"]["result"].startswith("1 charged and 1 declined on 2026-03-13; ")
    shown = run.materialized["report"]["report"]
    assert "1 charged and 1 declined on 2026-03-13" in shown
    assert shown.count("](data:image/png;base64,") == 3
    image = shown.split("](data:image/png;base64,")[1].split(")")[0]
    assert base64.b64decode(image).startswith(b"\x89PNG")
    assert two_days.snapshot() == before


def test_fees_come_from_the_days_that_were_reconciled(service: Service) -> None:
    service.subscriber()
    assert service.run("autopayment_job").ok
    service.advance(days=1)
    service.run("reconciliation_job")
    run = service.run(JOB)
    table = run.materialized["report"]["report"].split("### Revenue by day")[1]
    [line] = [line for line in table.splitlines() if line.startswith("| 2026-03-12")]
    fee = line.split("|")[5].strip()
    assert float(fee) > 0


def test_it_names_no_customer_and_no_secret(two_days: Service) -> None:
    of = counted(two_days)
    for text in (as_markdown(of, {}), as_html(of, {}), str(two_days.run(JOB).metadata)):
        assert "anna-of-example" not in text
        assert "method-" not in text
        assert two_days.sandbox.secret_key not in text


def test_it_is_sent_if_asked_and_a_dry_run_is_sent_to_nobody(two_days: Service) -> None:
    receiver = Receiver()
    try:
        two_days.settings = two_days.settings.model_copy(update={"report_urls": SecretStr(receiver.url)})
        assert two_days.run(JOB, dry_run=True).materialized == {}
        assert receiver.titles == []
        assert two_days.run(JOB).metadata["write_report"]["sent to REPORT_URLS"] == "yes"
        assert receiver.titles == ["billing report, 2026-03-13"]
    finally:
        receiver.close()


def test_a_receiver_that_is_dead_does_not_fail_the_report(two_days: Service) -> None:
    dead = two_days.settings.model_copy(update={"report_urls": SecretStr("json://127.0.0.1:9/secret-of-the-receiver")})
    run = two_days.run(JOB, load=lambda: dead)
    assert run.ok
    assert run.metadata["write_report"]["sent to REPORT_URLS"].startswith("no: ")
    assert "secret-of-the-receiver" not in str(run)


def test_an_installation_without_a_charge_has_a_report_too(service: Service) -> None:
    run = service.run(JOB)
    assert run.ok
    assert "no charge in 30 days; 0 wait for a person; 0 outcomes unknown" in run.materialized["report"]["report"]
