"""`upcoming`: what the next renewal runs would decide, before they do; and what those runs then do."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from billing_orchestration.desk.upcoming import Upcoming, find_upcoming, in_form
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service


def upcoming(service: Service, days: int = 3) -> dict[int, Upcoming]:
    provider = service.connect_provider(service.settings)
    return {
        line.subscription: line for line in find_upcoming(service.engine, provider, service.settings, service.now, days)
    }


def test_who_will_be_charged_when_how_much_and_with_which_card(service: Service) -> None:
    tomorrow = service.subscriber(ended_at=NOON + timedelta(days=1))
    today = service.subscriber(ended_at=NOON)
    later = service.subscriber(ended_at=NOON + timedelta(days=4))
    no_method = service.subscription(ended_at=NOON + timedelta(days=2))

    before = service.snapshot()
    told = upcoming(service)

    assert list(told) == [today, tomorrow, no_method]
    line = told[tomorrow]
    assert (line.on, line.charged, line.amount, line.currency, line.card) == (
        "2026-03-13 03:00",
        "yes",
        "299.00",
        "RUB",
        "4444",
    )
    assert (told[today].on, told[today].charged) == ("2026-03-13 03:00", "yes")
    assert (told[no_method].on, told[no_method].charged, told[no_method].code) == (
        "2026-03-14 03:00",
        "no",
        "no_method",
    )
    assert later not in told
    assert service.snapshot() == before
    assert {request.method for request in service.sandbox.requests} == {"GET"}


def test_the_run_of_that_day_charges_exactly_those(service: Service) -> None:
    for days in (0, 1, 1):
        service.subscriber(ended_at=NOON + timedelta(days=days))
    service.subscription(ended_at=NOON + timedelta(days=1))
    told = {id_ for id_, line in upcoming(service, days=1).items() if line.charged == "yes"}

    service.set_time((NOON + timedelta(days=1)).replace(hour=3, minute=0))
    service.run("autopayment_job")

    assert set(service.charged()) == told
    assert len(told) == 3


def test_no_consent_and_an_inactive_card_are_told_as_such(service_with: Callable[..., Service]) -> None:
    service = service_with(billing_renewal_view="billing_renewals")
    service.execute("""
        CREATE VIEW billing_renewals AS SELECT s.id AS subscription_id, 'card'::text AS payment_method_id,
            s.id % 2 = 1 AS may_charge, NULL::text AS email, NULL::text AS phone FROM subscriptions s
    """)
    service.provider.add_method("card", "succeeded", status="inactive")
    inactive, no = service.subscription(ended_at=NOON), service.subscription(ended_at=NOON)

    told = upcoming(service)

    assert (told[inactive].charged, told[inactive].code, told[inactive].card) == ("no", "method_inactive", "")
    assert (told[no].charged, told[no].code) == ("no", "no_consent")


def test_each_form_in_the_language_of_the_deployment() -> None:
    line = Upcoming(12, "ada", "2026-03-13 03:00", "yes", "299.00", "RUB", "4444", "", "ends, today")
    assert in_form([line], "csv", "ru") == [
        "подписка,пользователь,когда,списание,сумма,валюта,карта,код,причина",
        '12,ada,2026-03-13 03:00,да,299.00,RUB,4444,,"ends, today"',
    ]
    header, row = in_form([line], "table", "en")
    assert header.split() == ["subscription", "user", "on", "charged", "amount", "currency", "card", "code", "reason"]
    assert row.startswith("12            ada")


def test_a_customers_id_becomes_no_formula_breaks_no_line_and_is_not_translated() -> None:
    for user, shown in (("=1+1", "'=1+1"), ("+7 900", "'+7 900"), ("a\u2028b\rc", "a\\u2028b\\rc"), ("yes", "yes")):
        line = Upcoming(7, user, "2026-03-15 03:00", "yes", "299.00", "RUB", "", "", "due")
        assert in_form([line], "csv", "ru")[1:] == [f"7,{shown},2026-03-15 03:00,да,299.00,RUB,,,due"]
