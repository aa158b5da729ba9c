"""No value becomes a part of a statement, of a format or of a pattern, whoever chose it."""

from __future__ import annotations

from datetime import timedelta

from billing_orchestration.database.customers import find_customer
from billing_orchestration.definitions import SCHEDULES
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service

HOSTILE = """'; DROP TABLE payments; -- " %s %(id)s :id $1 {0} \\ \\1 .* \N{SNOWMAN}"""


def test_a_hostile_value_is_a_value_in_every_job(service: Service) -> None:
    plan = service.monthly
    service.execute("UPDATE plans SET name = :name, description = :name", name=HOSTILE)
    renewed = service.subscriber(user=HOSTILE, method=f"method {HOSTILE}")
    bought = service.paid_there(f"bought {HOSTILE}", user=f"new {HOSTILE}", plan_id=plan)
    service.paid_there(f"odd {HOSTILE}", metadata={"user_id": HOSTILE, HOSTILE: HOSTILE})
    over = service.subscription(HOSTILE, ended_at=NOON - timedelta(days=60), plan_id=service.plan())
    service.payment(f"stale {HOSTILE}", created_at=NOON - timedelta(days=20))
    service.meddle("payments", "NEW.external_payment_id LIKE 'stale%'", "RAISE EXCEPTION '%', NEW.external_payment_id")

    for schedule in SCHEDULES:
        assert service.run(str(schedule.job_name)).ok

    assert service.charged() == {renewed: 1}
    assert service.settled(bought) == ["created"]
    assert service.status("subscriptions", over) == "EXPIRED"
    assert service.quarantined(f"odd {HOSTILE}") == ["metadata"]
    with service.engine.connect() as connection:
        customer = find_customer(connection, HOSTILE)
    assert {row["user_id"] for row in (*customer.renewal_attempts, *customer.settlements)} == {HOSTILE}
    assert {row["evidence"]["item"]["metadata"][HOSTILE] for row in customer.quarantine} == {HOSTILE}
    service.check_books()
