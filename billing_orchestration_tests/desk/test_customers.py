"""One customer's data: exported whole, erased as far as the money allows, and the promise holds afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from billing_orchestration.desk.customers import NotDone, erase_customer, export
from billing_orchestration.desk.resolving import Desk, Resolution, resolve
from billing_orchestration_tests.books import OURS
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.run_history import found_in

ANNA, EMAIL = "anna-of-the-mark", "anna.mark@example.ru"
JOBS = ("autopayment_job", "matching_pending_payments_job", "matching_successful_payments_job")


@pytest.fixture
def service(service_with: Callable[..., Service]) -> Service:
    """A shop whose receipts go to the customer."""
    service = service_with(
        billing_renewal_view="billing_renewals",
        receipts="with_payment",
        receipt_vat_code=11,
        receipt_payment_mode="full_payment",
    )
    service.execute(f"""
        CREATE VIEW billing_renewals AS SELECT id AS subscription_id, 'method-' || id AS payment_method_id,
        true AS may_charge, CASE WHEN user_id LIKE 'anna%' THEN '{EMAIL}' ELSE 'b@example.ru' END AS email,
        NULL::text AS phone FROM subscriptions
    """)
    return service


def desk_of(service: Service) -> Desk:
    return Desk(
        service.engine,
        lambda: service.connect_provider(service.settings),
        service.calendar,
        service.settings,
        lambda: service.now,
    )


def lived(service: Service) -> tuple[int, int]:
    """Two customers who renewed, bought more, and had a problem that a person has ignored."""
    anna, boris = service.subscriber(user=ANNA), service.subscriber(user="boris")
    for user in (ANNA, "boris"):
        service.paid_there(f"bought by {user[:4]}", user=user, plan_id=service.plan())
        service.paid_there(f"odd of {user[:4]}", metadata={"user_id": user, "note": f"{user} {EMAIL}"})
    for job in JOBS:
        assert service.run(job).ok
    desk = desk_of(service)
    for entry in service.rows("quarantine"):
        user = entry.evidence["item"]["metadata"]["user_id"]
        word = Resolution("ignored", f"{user} was asked", "vera")
        resolve(service.engine, desk.connect, service.calendar, entry.id, word, desk.now)
    return anna, boris


def everything(service: Service) -> list[tuple[str, str]]:
    """Our whole schema, as text."""
    return [(table, str(row)) for table in OURS for row in service.rows(table)]


def erase(service: Service, **given: Any) -> list[str]:
    return erase_customer(desk_of(service), ANNA, "vera", "request 17", **{"yes": True, **given})


def test_everything_of_ours_about_one_customer_is_exported_and_nothing_of_another(
    service: Service, tmp_path: Path
) -> None:
    anna, boris = lived(service)
    file = tmp_path / "anna.json"

    [told, elsewhere] = [line for line in export(desk_of(service), ANNA, file) if not line.startswith("note")]

    written = json.loads(file.read_text())
    assert file.stat().st_mode & 0o777 == 0o600
    assert {table: len(written[table]) for table in OURS} == {
        "renewal_attempts": 1, "settlements": 2, "saved_methods": len(written["saved_methods"]), "quarantine": 1,
        "audit_trail": len(written["audit_trail"]),
    }  # fmt: skip
    assert EMAIL in written["renewal_attempts"][0]["body"]
    assert written["renewal_attempts"][0]["amount"] == "299.00"
    assert {row["entity"] for row in written["audit_trail"]} >= {"subscription", "payment", "attempt", "quarantine"}
    assert anna in [row["id"] for row in written["subscriptions_of_the_service"]]
    assert boris not in [row["id"] for row in written["subscriptions_of_the_service"]]
    assert "boris" not in file.read_text()
    assert "renewal_attempts 1" in told
    assert "in the service's tables" in elsewhere
    with pytest.raises(NotDone, match="File exists"):
        list(export(desk_of(service), ANNA, file))


def test_an_erasure_is_shown_first_and_changes_nothing(service: Service) -> None:
    lived(service)
    before = service.snapshot()

    lines = erase(service, yes=False)

    assert service.snapshot() == before
    assert lines[-1] == "Nothing was changed: repeat with --yes"
    assert "would erase: 2 settlements: the user's id" in lines
    assert any(line.startswith("kept: 1 renewal attempts") and "charged twice" in line for line in lines)
    assert any(line.startswith("note: subscription") and "goes on" in line for line in lines)


def test_an_erased_customer_is_named_nowhere_in_our_schema_and_the_promise_holds(service: Service) -> None:
    anna, _ = lived(service)
    service.execute("UPDATE subscriptions SET status = 'EXPIRED', user_id = 'gone' WHERE user_id = :user", user=ANNA)
    charged, others = service.charged(), service.rows("renewal_attempts", "user_id = 'boris'")

    lines = erase(service)

    assert found_in(everything(service), [ANNA, EMAIL]) == []
    pseudonym = lines[-1].rpartition(" ")[2]
    [attempt] = service.attempts(anna)
    assert (attempt.user_id, attempt.state) == (pseudonym, "SUCCEEDED")
    assert json.loads(attempt.body)["metadata"]["user_id"] == pseudonym
    assert "customer" not in json.loads(attempt.body)["receipt"]
    [proof] = service.rows("audit_trail", "entity = 'customer'")
    assert (proof.entity_id, proof.action, proof.reason) == (pseudonym, "erased", "vera: request 17")
    assert service.rows("renewal_attempts", "user_id = 'boris'") == others
    # Back again, with what they paid: granted and charged once, and the last word stands.
    service.execute("UPDATE subscriptions SET status = 'ACTIVE', user_id = :user WHERE user_id = 'gone'", user=ANNA)
    before = service.snapshot()
    for job in JOBS:
        assert service.run(job).ok
    assert service.snapshot() == before
    assert service.charged() == charged
    service.check_books()


def test_nobody_is_erased_while_the_outcome_of_a_charge_is_open(service: Service) -> None:
    for state in ("UNKNOWN", "PENDING", "PLANNED", "REVIEW"):
        service.attempt(service.subscription(ANNA), state=state)
        before = service.snapshot()
        with pytest.raises(NotDone, match="the outcome of a charge is open"):
            erase(service)
        assert service.snapshot() == before
        service.execute("UPDATE billing_orchestration.renewal_attempts SET state = 'VOID'")
    assert erase(service)[-1].startswith("In what is kept the customer is erased-")


def test_what_waits_for_a_person_or_may_still_renew_stays_and_is_named(service: Service) -> None:
    service.subscriber(user=ANNA)
    service.paid_there("odd", metadata={"user_id": ANNA})
    for job in JOBS:
        assert service.run(job).ok
    service.execute("""
        INSERT INTO billing_orchestration.saved_methods SELECT id, 'card', 'RUB', 1, 'bought', now() FROM subscriptions
        ON CONFLICT DO NOTHING
    """)

    lines = erase(service)

    assert any("open quarantine entries (1): resolve them" in line for line in lines)
    assert any("saved methods: their subscriptions may still renew" in line for line in lines)
    assert service.rows("saved_methods")
    [entry] = service.rows("quarantine")
    assert entry.evidence["item"]["metadata"]["user_id"] == ANNA


def test_an_erasure_needs_a_reason_and_a_customer(service: Service) -> None:
    with pytest.raises(NotDone, match="needs a --reason"):
        erase_customer(desk_of(service), ANNA, "vera", " ", yes=True)
    with pytest.raises(NotDone, match="give the customer's id"):
        erase_customer(desk_of(service), " ", "vera", "request", yes=False)
    assert erase(service)[0] == "our schema holds nothing about this customer"
