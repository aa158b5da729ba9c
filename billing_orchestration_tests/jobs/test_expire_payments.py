"""expire_payments_job, whole: what becomes of a PENDING payment that nobody finished, by what the provider says."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta, timezone
from typing import Any

import pytest

from billing_orchestration.domain.expiry import ListedThere, StalePayment
from billing_orchestration.jobs.expire_payments import PAGE
from billing_orchestration.jobs.inquiry import Inquiry
from billing_orchestration.resources import ProviderConnection
from billing_orchestration.threads import OF_THE_SYSTEM
from billing_orchestration_tests.books import NOON, stored
from billing_orchestration_tests.jobs.service import Service

UTC = timezone.utc
JOB = "expire_payments_job"


def stale(service: Service, external_id: str | None, *, days: float = 8, **row: Any) -> int:
    """A payment that has been PENDING for more than seven days."""
    row.setdefault("created_at", service.now - timedelta(days=days))
    return service.payment(external_id, status=row.pop("status", "PENDING"), **row)


def there(service: Service, external_id: str, status: str = "succeeded", **fields: Any) -> str:
    """What the provider knows of it."""
    fields.setdefault("created_at", service.now - timedelta(days=8))
    return service.paid_there(external_id, status=status, **fields)


def no_lists(service: Service) -> None:
    """The lists break off: each payment is asked about by its id."""
    service.sandbox.misbehave("list", "error_before", times=None)


# --- Which rows


def test_the_days_until_expiry_are_a_setting(service_with: Callable[..., Service]) -> None:
    service = service_with(pending_payment_ttl_days=30)
    older, younger = stale(service, None, days=30.01), stale(service, None, days=29.99)

    assert service.run(JOB).ok

    assert service.statuses("payments", older, younger) == ["EXPIRED", "PENDING"]


# --- By what the provider says


def test_one_that_never_got_a_provider_id_expires_without_asking(service: Service) -> None:
    payments = [stale(service, None), stale(service, "")]

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.statuses("payments", *payments) == ["EXPIRED", "EXPIRED"]
    assert "never got a payment at the provider" in run.reasons(f"payment {payments[0]}")[0]
    assert service.sandbox.count() == 0


def test_one_that_is_pending_or_canceled_there_expires(service: Service) -> None:
    payments = {said: stale(service, there(service, said, said)) for said in ("pending", "canceled")}

    run = service.run(JOB)

    assert run.ok, run.failure
    for said, payment in payments.items():
        assert service.status("payments", payment) == "EXPIRED"
        assert f"{said} at the provider" in run.reasons(f"payment {payment}")[0]
    assert service.rows("subscriptions") == []


def test_one_that_the_provider_does_not_find_expires(service: Service) -> None:
    payment = stale(service, "never arrived")

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.status("payments", payment) == "EXPIRED"
    assert "does not know it" in run.reasons(f"payment {payment}")[0]


def test_one_whose_money_is_held_stays_pending_and_is_reported(service: Service) -> None:
    payment = stale(service, there(service, "held", "waiting_for_capture"))

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.status("payments", payment) == "PENDING"
    assert "money is held" in run.reasons(f"payment {payment}")[0]


def test_one_that_is_paid_there_is_settled_as_the_matching_jobs_would(service: Service) -> None:
    plan = service.plan()
    payment = stale(service, there(service, "paid", user="anna", plan_id=plan, method_type="sberbank"))
    subscription = service.subscription("boris", plan_id=plan, ended_at=NOON + timedelta(days=1))
    renewed = stale(service, there(service, "paid too", user="boris", plan_id=plan))

    run = service.run(JOB)

    assert run.ok, run.failure
    [his, hers] = service.rows("subscriptions")
    assert (his.id, his.ended_at) == (subscription, stored(2026, 4, 13, 12, 0))
    assert (hers.user_id, hers.status, hers.ended_at) == ("anna", "ACTIVE", stored(2026, 4, 12, 12, 0))
    row = service.row("payments", payment)
    assert (row.status, row.subscription_id, row.payment_method) == ("SUCCEEDED", hers.id, "SBERBANK")
    assert service.row("payments", renewed).subscription_id == subscription
    assert [service.settled("paid"), service.settled("paid too")] == [["created"], ["extended"]]
    service.check_books()


def test_one_that_was_paid_and_refunded_in_full_is_recorded_as_refunded(service: Service) -> None:
    payment = stale(service, there(service, "returned", plan_id=service.plan(), refunded_amount="299.00"))

    assert service.run(JOB).ok

    assert service.status("payments", payment) == "REFUNDED"
    assert service.rows("subscriptions") == []


def test_one_that_is_paid_with_another_amount_goes_to_a_person_and_does_not_expire(service: Service) -> None:
    payment = stale(service, there(service, "paid", plan_id=service.plan()), amount="1.00")

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.status("payments", payment) == "PENDING"
    assert service.quarantined("paid") == ["amount_differs"]


def test_one_whose_record_cannot_be_used_goes_to_a_person_once_and_stays_pending(service: Service) -> None:
    payment = stale(service, there(service, "odd", plan_id=service.plan(), override={"amount": None}))

    runs = [service.run(JOB) for _ in range(2)]

    assert all(run.ok for run in runs)
    assert service.status("payments", payment) == "PENDING"
    assert service.quarantined("odd") == ["unreadable"]
    assert [run.report["newly quarantined"] for run in runs] == [1, 0]


def test_an_unknown_status_there_goes_to_a_person(service: Service) -> None:
    payment = stale(service, there(service, "odd", override={"status": "half_paid"}))

    assert service.run(JOB).ok

    assert service.status("payments", payment) == "PENDING"
    assert service.quarantined("odd") == ["unreadable"]


def test_an_answer_about_another_payment_is_no_answer(service: Service) -> None:
    payment = stale(service, there(service, "asked", "canceled"))
    service.sandbox.misbehave("get", "change", times=None, set={"id": "another"})

    run = service.run(JOB)

    assert not run.ok
    assert service.status("payments", payment) == "PENDING"


NO_ANSWERS: dict[str, dict[str, Any]] = {
    "an HTML 404": {"effect": "html_before", "status": 404},
    "an HTML 403": {"effect": "html_before", "status": 403},
    "HTML instead of JSON": {"effect": "html_before", "status": 200},
    "a 500": {"effect": "error_before"},
    "a 429": {"effect": "too_many_requests", "retry_after_s": 0},
    "a 202": {"effect": "body_before", "status": 202, "body": '{"type": "processing"}'},
    "a 403": {"effect": "forbidden"},
    "a reset": {"effect": "reset_before"},
    "a cut": {"effect": "cut_before"},
    "a truncated answer": {"effect": "truncated"},
    "an empty answer": {"effect": "body_before", "status": 200, "body": ""},
    "a list instead of a payment": {"effect": "body_before", "status": 200, "body": "[]"},
}


def test_about_which_the_provider_does_not_answer_stays_pending_and_the_run_is_red_at_its_end(service: Service) -> None:
    plan = service.plan()
    no_lists(service)
    silent = {}
    for name, effect in NO_ANSWERS.items():
        payment_id = there(service, name.replace(" ", "-"), "pending")
        service.sandbox.misbehave("get", times=None, payment_id=payment_id, **effect)
        silent[name] = stale(service, payment_id)
        # So that no ten of them come in a row: that would be a provider which fails for everyone.
        stale(service, there(service, f"answered-after-{payment_id}", "pending"))
    paid = stale(service, there(service, "paid", plan_id=plan))
    unpaid = stale(service, there(service, "unpaid", "pending"))

    run = service.run(JOB)

    assert not run.ok
    assert f"{len(NO_ANSWERS)} must be retried" in run.failure
    assert "everything else was applied" in run.failure
    assert {name: service.status("payments", payment) for name, payment in silent.items()} == dict.fromkeys(
        silent, "PENDING"
    )
    assert service.statuses("payments", paid, unpaid) == ["SUCCEEDED", "EXPIRED"]
    service.sandbox.behave()
    assert service.run(JOB).ok
    assert {service.status("payments", payment) for payment in silent.values()} == {"EXPIRED"}


def test_silence_about_one_is_no_answer(service: Service) -> None:
    service.timeouts = type(service.timeouts)(connect_s=1.0, charge_read_s=0.2, read_s=0.2)
    silent = stale(service, there(service, "silent", "canceled"))
    other = stale(service, there(service, "other", "canceled"))
    service.sandbox.misbehave("get", "silence_before", times=None, payment_id="silent")

    run = service.run(JOB)

    assert not run.ok
    assert service.statuses("payments", silent, other) == ["PENDING", "EXPIRED"]


def test_an_answer_that_comes_after_a_hiccup_counts(service: Service) -> None:
    payment = stale(service, there(service, "unpaid", "canceled"))
    service.sandbox.misbehave("get", "error_before", times=2)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.status("payments", payment) == "EXPIRED"
    assert service.sandbox.count("get") == 3


def test_a_400_about_one_goes_to_a_person_and_does_not_expire_it(service: Service) -> None:
    payment = stale(service, "odd")
    body = '{"type": "error", "id": "1", "code": "invalid_request", "description": "payment_id is malformed"}'
    service.sandbox.misbehave("get", "body_before", times=None, status=400, body=body)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.status("payments", payment) == "PENDING"
    assert service.quarantined("odd") == ["unreadable"]


def test_ids_that_would_be_another_path_ask_about_themselves_alone(service: Service) -> None:
    odd = ["../payments", "a/b", "?status=succeeded", "..", "%2e", "пла тёж", "x" * 300]
    payments = [stale(service, name) for name in odd]

    run = service.run(JOB)

    # Whatever the provider makes of them: none is taken for paid, and none is answered by a list.
    assert {service.status("payments", payment) for payment in payments} <= {"EXPIRED", "PENDING"}
    assert service.sandbox.count("list") == 0
    assert service.rows("subscriptions") == []
    assert run.report["applied"] == sum(service.status("payments", payment) == "EXPIRED" for payment in payments)


def test_a_wrong_shop_key_fails_the_run_after_one_request_and_changes_nothing(service: Service) -> None:
    for number in range(20):
        stale(service, there(service, f"unpaid-{number}", "canceled"))
    stale(service, None)
    service.provider.secret_key = "test_another"
    before = service.snapshot()

    run = service.run(JOB)

    assert not run.ok
    assert "YOOKASSA_SECRET_KEY" in run.failure
    assert service.sandbox.count() == 1
    assert service.snapshot() == before


def test_a_provider_that_fails_for_everyone_is_not_asked_about_everyone(service: Service) -> None:
    payments = [stale(service, there(service, f"unpaid-{number}", "pending")) for number in range(60)]
    nameless = stale(service, None)
    no_lists(service)
    service.sandbox.misbehave("get", "error_before", times=None)

    run = service.run(JOB)

    assert not run.ok
    assert "60 must be retried" in run.failure
    assert {service.status("payments", payment) for payment in payments} == {"PENDING"}
    assert service.status("payments", nameless) == "EXPIRED"
    # Ten silences in a row, each asked three times, and what was in flight meanwhile.
    assert service.sandbox.count("get") <= 3 * (10 + 8)


def test_the_provider_is_asked_about_several_at_a_time_and_never_about_more_than_configured(service: Service) -> None:
    for number in range(24):
        stale(service, there(service, f"unpaid-{number}", "pending"))
    no_lists(service)
    service.sandbox.misbehave("get", "none", delay_s=0.02, times=None)

    run = service.run(JOB, ops={"fetch_stale_at_provider": {"max_concurrency": 3}})

    assert run.ok, run.failure
    assert 1 < service.sandbox.peak_in_flight <= 3
    assert service.sandbox.count("get") == 24


# --- By the lists of unpaid payments


@pytest.mark.parametrize(("status", "pages"), [("canceled", 2), ("pending", 3)])
def test_many_that_are_unpaid_there_take_a_page_of_the_list_instead_of_a_request_each(
    service: Service, status: str, pages: int
) -> None:
    payments = [stale(service, there(service, f"unpaid-{number}", status)) for number in range(120)]

    run = service.run(JOB)

    assert run.ok, run.failure
    assert {service.status("payments", payment) for payment in payments} == {"EXPIRED"}
    assert {row["code"] for row in run.decisions} == {f"{status}_at_provider"}
    assert (service.sandbox.count("list"), service.sandbox.count("get")) == (pages, 0)
    assert run.number("fetch_stale_at_provider", "of them, unpaid by the provider's lists") == 120


def test_pages_of_rows_that_are_of_one_time_read_its_list_once(service: Service) -> None:
    inquiry = Inquiry(
        ProviderConnection(lambda: service.settings, service.connect_provider, service.host_now),
        8,
        OF_THE_SYSTEM,
        print,
    )
    at = service.now - timedelta(days=8)
    names = [there(service, f"canceled-{number}", "canceled") for number in range(60)]
    rows = [StalePayment(number, name, None, created_at=at) for number, name in enumerate(names)]

    answers = [inquiry.ask_about(page) for page in (rows[:20], rows[20:40], rows[40:])]

    assert [answer for found in answers for answer in found.values()] == [ListedThere("canceled")] * 60
    assert (service.sandbox.count("list"), service.sandbox.count("get")) == (1, 0)


def test_pages_of_rows_that_follow_within_seconds_use_what_the_first_of_them_has_read(service: Service) -> None:
    inquiry = Inquiry(
        ProviderConnection(lambda: service.settings, service.connect_provider, service.host_now),
        8,
        OF_THE_SYSTEM,
        print,
    )
    first = service.now - timedelta(days=8)
    rows = []
    for number in range(80):
        at = first + timedelta(seconds=number)
        name = there(service, f"canceled-{number}", "canceled", created_at=at)
        rows.append(StalePayment(number, name, None, created_at=at))

    answers = [inquiry.ask_about(rows[start : start + 20]) for start in range(0, 80, 20)]

    assert [answer for found in answers for answer in found.values()] == [ListedThere("canceled")] * 80
    assert service.sandbox.count("get") == 0


@pytest.mark.parametrize("again", ["succeeded", "waiting_for_capture", "not usable"])
def test_what_a_list_shows_twice_and_not_alike_is_asked_about(service: Service, again: str) -> None:
    for number in range(20):
        stale(service, there(service, f"paid-{number}", plan_id=service.monthly))
    unpaid = {
        "id": "paid-0",
        "status": "pending",
        "paid": False,
        "test": True,
        "amount": {"value": "299.00", "currency": "RUB"},
        "created_at": f"{service.now - timedelta(days=8):%Y-%m-%dT%H:%M:%S}.000Z",
    }
    otherwise = {**unpaid, "amount": None} if again == "not usable" else {**unpaid, "status": again}
    for items in ([unpaid, otherwise], [otherwise, unpaid]):
        body = json.dumps({"type": "list", "items": items})
        service.sandbox.misbehave("list", "body_before", times=None, body=body, status=200)
        found = service.connect_provider(service.settings).lists.in_status(
            "pending", service.now - timedelta(days=9), service.now, 1
        )
        assert found == frozenset()

    assert service.run(JOB).ok
    assert service.scalars("SELECT DISTINCT status::text FROM payments") == ["SUCCEEDED"]


def test_whatever_the_lists_do_not_show_as_unpaid_is_asked_about(service: Service) -> None:
    for number in range(40):
        stale(service, there(service, f"canceled-{number}", "canceled"))
    others = {
        "paid": stale(service, there(service, "paid", plan_id=service.monthly)),
        "open": stale(service, there(service, "open", "pending")),
        "held": stale(service, there(service, "held", "waiting_for_capture")),
        "created at another time there": stale(
            service, there(service, "elsewhen", "canceled", created_at=service.now - timedelta(days=2))
        ),
        "unknown there": stale(service, "unknown"),
    }

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.sandbox.count("get") == len(others)
    assert {name: service.status("payments", payment) for name, payment in others.items()} == {
        "paid": "SUCCEEDED",
        "open": "EXPIRED",
        "held": "PENDING",
        "created at another time there": "EXPIRED",
        "unknown there": "EXPIRED",
    }


def test_a_list_that_lags_behind_expires_nothing_that_is_paid_meanwhile(service: Service) -> None:
    # It still shows everything as it was before; only by its id does the provider say that one is paid.
    payments = [stale(service, there(service, f"late-{number}", plan_id=service.monthly)) for number in range(40)]
    service.sandbox.misbehave("list", "body_before", times=None, body='{"type": "list", "items": []}', status=200)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert {service.status("payments", payment) for payment in payments} == {"SUCCEEDED"}


@pytest.mark.parametrize("why", ["it breaks off", "it is too long"])
def test_a_list_that_is_not_whole_is_not_used(service: Service, why: str) -> None:
    payments = [stale(service, there(service, f"canceled-{number}", "canceled")) for number in range(40)]
    if why == "it breaks off":
        service.sandbox.misbehave("list", "error_before", times=None)
    else:
        for number in range(200):
            before = service.now - timedelta(days=8, minutes=1)
            there(service, f"of-somebody-else-{number}", "canceled", created_at=before)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert {service.status("payments", payment) for payment in payments} == {"EXPIRED"}
    assert service.sandbox.count("get") == 40
    assert service.sandbox.count("list") <= 3


def test_a_few_are_asked_about_without_a_list(service: Service) -> None:
    for number in range(19):
        stale(service, there(service, f"canceled-{number}", "canceled"))

    assert service.run(JOB).ok
    assert (service.sandbox.count("list"), service.sandbox.count("get")) == (0, 19)


def test_a_row_from_before_all_time_is_asked_about_like_any_other(service: Service) -> None:
    old = stale(service, there(service, "old", "canceled"))
    service.execute("UPDATE payments SET created_at = '-infinity' WHERE id = :id", id=old)
    for number in range(40):
        stale(service, there(service, f"canceled-{number}", "canceled"))

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.status("payments", old) == "EXPIRED"


# --- Duplicates


def test_of_several_rows_with_one_paid_id_one_is_settled_and_the_others_expire_as_duplicates(service: Service) -> None:
    service.tolerate_duplicates()
    plan = service.plan()
    there(service, "paid", plan_id=plan)
    payments = [stale(service, "paid") for _ in range(3)]

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.statuses("payments", *payments) == ["SUCCEEDED", "EXPIRED", "EXPIRED"]
    assert len(service.rows("subscriptions")) == 1
    assert "duplicate" in run.reasons(f"payment {payments[1]}")[0]
    assert service.sandbox.count("get") == 1
    service.check_books()


def test_the_customers_own_row_never_expires_as_a_duplicate(service: Service) -> None:
    service.tolerate_duplicates()
    plan = service.plan()
    subscription = service.subscription("anna", plan_id=plan)
    there(service, "paid", plan_id=plan)
    duplicates = [stale(service, "paid"), stale(service, "paid", status="SUCCEEDED", days=60)]
    own = stale(service, "paid", subscription_id=subscription)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.statuses("payments", *duplicates, own) == ["EXPIRED", "SUCCEEDED", "SUCCEEDED"]
    assert service.settled("paid") == ["extended"]
    assert service.ended_at(subscription) == NOON + timedelta(days=31)


def test_a_row_that_names_a_subscription_which_the_payment_was_not_granted_to_does_not_expire_as_a_duplicate(
    service: Service,
) -> None:
    service.tolerate_duplicates()
    plan = service.plan()
    granted, other = (service.subscription("anna", plan_id=plan, ended_at=NOON + timedelta(days=day)) for day in (1, 2))
    there(service, "paid", plan_id=plan)
    service.paid_row("paid", granted)
    row = stale(service, "paid", subscription_id=other)
    duplicate = stale(service, "paid", subscription_id=granted)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.statuses("payments", row, duplicate) == ["PENDING", "EXPIRED"]
    assert f"names subscription {other}" in run.reasons(f"payment {row}")[0]


def test_a_duplicate_of_a_payment_that_was_settled_before_expires_whichever_row_is_older(service: Service) -> None:
    service.tolerate_duplicates()
    plan = service.plan()
    there(service, "paid", plan_id=plan)
    older = stale(service, "paid", amount="1.00")
    settled = stale(service, "paid")
    younger = stale(service, "paid")
    # As if a matching job had settled it long ago.
    service.run("matching_pending_payments_job", as_of=NOON - timedelta(days=8))
    assert service.status("payments", settled) == "SUCCEEDED"

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.statuses("payments", older, settled, younger) == [
        "EXPIRED",
        "SUCCEEDED",
        "EXPIRED",
    ]
    assert f"payment {settled} holds" in run.reasons(f"payment {older}")[0]
    assert len(service.rows("subscriptions")) == 1


def test_duplicates_of_a_payment_that_goes_to_a_person_stay_pending(service: Service) -> None:
    service.tolerate_duplicates()
    there(service, "odd", metadata={})
    payments = [stale(service, "odd") for _ in range(2)]

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.statuses("payments", *payments) == ["PENDING", "PENDING"]
    assert service.quarantined("odd") == ["metadata"]


# --- Changed meanwhile, refused, repeated


def test_a_row_that_the_webhook_finishes_while_the_provider_is_asked_is_skipped_and_reported(service: Service) -> None:
    payment = stale(service, there(service, "unpaid", "canceled"))
    reassigned = stale(service, there(service, "unpaid too", "canceled"))

    def webhook(document: Any) -> Any:
        service.execute("UPDATE payments SET status = 'SUCCEEDED' WHERE id = :id", id=payment)
        service.execute("UPDATE payments SET external_payment_id = 'a new one' WHERE id = :id", id=reassigned)
        return document

    service.sandbox.misbehave("get", "change", transform=webhook)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.statuses("payments", payment, reassigned) == ["SUCCEEDED", "PENDING"]
    assert run.reasons(f"payment {payment}") == ["skip: changed meanwhile, no longer PENDING"]
    assert run.report["skipped"] == 2
    # What is plotted is what happened.
    assert run.materialized[JOB.removesuffix("_job")]["expired"] == 0


def test_one_row_that_the_database_refuses_goes_to_a_person_once_and_never_stops_the_others(service: Service) -> None:
    payments = [stale(service, None) for _ in range(5)]
    service.refuse_changes_of("payments", payments[2])

    runs = [service.run(JOB) for _ in range(2)]

    assert [run.failure for run in runs] == ["", ""]
    assert service.statuses("payments", *payments) == [
        "EXPIRED",
        "EXPIRED",
        "PENDING",
        "EXPIRED",
        "EXPIRED",
    ]
    assert "not this one" in runs[0].reasons(f"payment {payments[2]}")[0]
    assert [run.report["newly quarantined"] for run in runs] == [1, 0]
    [problem] = service.rows("quarantine")
    assert (problem.kind, problem.payment_id) == ("not_writable", payments[2])


def test_of_several_pages_each_row_is_decided_once_and_one_that_is_refused_stops_no_other(service: Service) -> None:
    plan = service.plan()
    paid = stale(service, there(service, "paid", plan_id=plan), days=8)
    service.execute(
        """
        INSERT INTO payments (payment_provider_id, status, currency, amount, created_at, updated_at)
        SELECT :provider, 'PENDING', 'RUB', 1.00, '2026-02-01'::timestamp + n * interval '1 s', '2026-02-01'
        FROM generate_series(1, :count) AS n
        """,
        provider=service.provider_id,
        count=2 * PAGE + 10,
    )
    [odd] = service.scalars("SELECT id FROM payments ORDER BY id OFFSET 1100 LIMIT 1")
    service.refuse_changes_of("payments", odd)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.status("payments", paid) == "SUCCEEDED"
    assert service.scalars("SELECT id FROM payments WHERE status = 'PENDING'") == [odd]
    assert run.materialized[JOB.removesuffix("_job")] == {"expired": 2 * PAGE + 9, "settled late": 1, "kept pending": 0}
    assert run.report["newly quarantined"] == 1
    assert len(run.decisions) == 100
    assert run.number("fetch_stale_payments", "stale PENDING payments") == 2 * PAGE + 11


def test_a_row_that_somebody_keeps_locked_is_left_for_another_try(service: Service) -> None:
    locked, free = stale(service, None), stale(service, None)
    with service.locking("payments", locked):
        run = service.run(JOB, load=service.impatient)

    assert not run.ok
    assert f"payment {locked}" in run.failure
    assert service.statuses("payments", locked, free) == ["PENDING", "EXPIRED"]
    assert service.run(JOB).ok
    assert service.status("payments", locked) == "EXPIRED"


def test_a_second_run_changes_nothing(service: Service) -> None:
    plan = service.plan()
    stale(service, None)
    stale(service, there(service, "paid", plan_id=plan))
    stale(service, there(service, "unpaid", "canceled"))
    stale(service, there(service, "held", "waiting_for_capture"))
    stale(service, there(service, "odd", plan_id=plan, metadata={}))
    assert service.run(JOB).ok
    before = service.snapshot()

    assert service.run(JOB).ok

    assert service.snapshot() == before


# --- What a run tells


def test_every_change_is_in_the_audit_trail_with_run_id_old_and_new_value_and_reason(service: Service) -> None:
    payment = stale(service, there(service, "unpaid", "canceled"))

    run = service.run(JOB)

    [entry] = service.audit(run)
    assert (entry.job, entry.entity, entry.entity_id, entry.action) == (JOB, "payment", str(payment), "expired")
    assert (entry.old, entry.new) == ({"status": "PENDING"}, {"status": "EXPIRED"})
    assert entry.external_payment_id == "unpaid"
    assert "PENDING for more than 7 days, and canceled at the provider" in entry.reason
    assert entry.at == NOON
    assert service.row("payments", payment).updated_at == stored(2026, 3, 12, 12, 0)


def test_a_run_shows_its_slices_sums_and_numbers_of_the_day(service: Service) -> None:
    stale(service, None, amount="100.00")
    stale(service, None, amount="50.50")
    stale(service, there(service, "paid", plan_id=service.plan()))
    stale(service, there(service, "held", "waiting_for_capture"))

    run = service.run(JOB)

    assert run.number("fetch_stale_payments", "stale PENDING payments") == 4
    assert run.number("fetch_stale_at_provider", "asked") == 2
    assert run.report["sum: expire, RUB"] == pytest.approx(150.5)
    assert (run.report["applied"], run.report["skipped"]) == (3, 1)
    assert run.materialized == {JOB.removesuffix("_job"): {"expired": 2, "settled late": 1, "kept pending": 1}}


def test_an_amount_that_is_no_number_stops_neither_the_run_nor_its_report(service: Service) -> None:
    odd, usual = stale(service, None), stale(service, None)
    service.execute("UPDATE payments SET amount = 'NaN' WHERE id = :id", id=odd)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.statuses("payments", odd, usual) == ["EXPIRED", "EXPIRED"]
    # A sum that is no number could not be shown: the page of the run would not load.
    assert run.report["sum: expire, RUB"] == pytest.approx(299.0)
