"""reconciliation_job, whole: a day's books on both sides, what is repaired, and what is put before a person."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from billing_orchestration.desk.resolving import NotResolved, Resolution, resolve
from billing_orchestration.domain.problem_kinds import ACCEPTED, ATTACHED, IGNORED
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Run, Service

JOB = "reconciliation_job"
UTC = timezone.utc
# The job runs on the morning of the 12th, for the 11th.
MORNING = datetime(2026, 3, 12, 6, 30, tzinfo=UTC)
YESTERDAY = NOON - timedelta(days=1)
DAY = "2026-03-11"


@pytest.fixture
def shop(service: Service) -> Service:
    """A service in the morning."""
    service.set_time(MORNING)
    return service


def paid(service: Service, name: str, **fields: Any) -> str:
    """A purchase that succeeded yesterday at noon, at the provider."""
    fields.setdefault("created_at", YESTERDAY)
    fields.setdefault("plan_id", service.monthly)
    return service.paid_there(name, user=f"user of {name}", **fields)


def both_paid(service: Service, name: str, **fields: Any) -> int:
    """The same, and our row that says so."""
    paid(service, name, **fields)
    subscription = service.subscription(f"user of {name}", ended_at=NOON + timedelta(days=20))
    return service.payment(name, subscription_id=subscription, status="SUCCEEDED", created_at=YESTERDAY)


def classes(run: Run, op: str = "diff_day") -> dict[str, int]:
    """The table of classes: lines by class."""
    found: dict[str, int] = {}
    for row in run.metadata[op]["classes"]:
        found[row["class"]] = found.get(row["class"], 0) + row["lines"]
    return found


def entries(service: Service) -> list[tuple[str, str]]:
    """The open entries of the quarantine: about what, and which kind."""
    rows = service.rows("quarantine", "resolved_at IS NULL")
    return sorted((row.problem_key.rpartition(":")[0], row.kind) for row in rows)


def test_a_day_on_which_both_sides_agree_is_green_and_changes_nothing(shop: Service) -> None:
    both_paid(shop, "one")
    both_paid(shop, "two")
    shop.provider.add_payment(id="declined", status="canceled", created_at=YESTERDAY)
    before = shop.snapshot()

    run = shop.tick(JOB)

    assert run.ok, run.failure
    assert shop.snapshot() == before
    assert classes(run) == {"both sides agree": 3}
    [table] = [row for row in run.metadata["diff_day"]["classes"] if row["currency"] == "RUB"]
    assert (table["paid there"], table["paid here"]) == ("598.00", "598.00")
    [day] = shop.rows("reconciled_days")
    assert (str(day.day), day.lines, day.differences, day.unexplained) == (DAY, 3, 0, 0)


def test_a_purchase_that_the_matching_jobs_missed_is_granted(shop: Service) -> None:
    """The provider's list lagged by 70 minutes: no window of an hour ever saw the payment."""
    shop.set_time(YESTERDAY)
    paid(shop, "late-in-the-list")
    shop.provider.switches.list_lag_s = 70 * 60
    for _ in range(60):
        for job in ("matching_pending_payments_job", "matching_successful_payments_job"):
            assert shop.tick(job).ok
        shop.advance(hours=1)
        if shop.now >= MORNING:
            break
    assert shop.rows("payments") == []
    shop.set_time(MORNING)

    run = shop.tick(JOB)

    assert run.ok, run.failure
    assert run.report["applied"] == 1
    assert shop.settled("late-in-the-list") == ["created"]
    [row] = shop.rows("payments")
    assert (row.status, row.external_payment_id) == ("SUCCEEDED", "late-in-the-list")
    assert len(shop.rows("subscriptions")) == 1
    shop.check_books()
    before = shop.snapshot()
    again = shop.tick(JOB)
    assert again.ok
    assert classes(again) == {"both sides agree": 1}
    assert shop.snapshot() == before


def test_a_payment_that_an_outage_of_ten_days_hid_is_granted_by_a_backfill_of_its_day(shop: Service) -> None:
    old = NOON - timedelta(days=10)
    paid(shop, "old", created_at=old)
    row = shop.payment("old", status="PENDING", created_at=old)

    run = shop.run(JOB, partition="2026-03-02")

    assert run.ok, run.failure
    assert shop.status("payments", row) == "SUCCEEDED"
    assert shop.settled("old") == ["created"]


# --- what a person must decide -------------------------------------------------------------------------------------


def not_paid_there(service: Service) -> tuple[str, str]:
    paid(service, "unpaid", status="canceled")
    subscription = service.subscription("user of unpaid")
    service.payment("unpaid", subscription_id=subscription, status="SUCCEEDED", created_at=YESTERDAY)
    return "payment unpaid", "not_paid_there"


def never_there(service: Service) -> tuple[str, str]:
    subscription = service.subscription("nobody")
    service.payment("never-there", subscription_id=subscription, status="SUCCEEDED", created_at=YESTERDAY)
    return "payment never-there", "not_paid_there"


def without_an_id(service: Service) -> tuple[str, str]:
    subscription = service.subscription("nobody")
    row = service.payment(None, subscription_id=subscription, status="SUCCEEDED", created_at=YESTERDAY)
    return f"payment {row}", "not_paid_there"


def made_paid_by_hand(service: Service) -> tuple[str, str]:
    """An old row that somebody turned SUCCEEDED yesterday."""
    old = YESTERDAY - timedelta(days=40)
    paid(service, "old", status="canceled", created_at=old)
    row = service.payment("old", subscription_id=service.subscription(), status="SUCCEEDED", created_at=old)
    at = YESTERDAY.replace(tzinfo=None)
    service.execute("UPDATE payments SET updated_at = :at WHERE id = :id", at=at, id=row)
    return "payment old", "not_paid_there"


def refunded_there(service: Service) -> tuple[str, str]:
    both_paid(service, "back")
    service.provider.refund("back", at=YESTERDAY + timedelta(hours=1))
    return f"refund {refund_of(service, 'back')}", "refunded_there"


def refunded_in_part(service: Service) -> tuple[str, str]:
    both_paid(service, "part")
    service.provider.refund("part", "99.00", at=YESTERDAY + timedelta(hours=1))
    return f"refund {refund_of(service, 'part')}", "refunded_there"


def refunded_long_after(service: Service) -> tuple[str, str]:
    old = YESTERDAY - timedelta(days=40)
    paid(service, "long-ago", created_at=old)
    service.payment("long-ago", subscription_id=service.subscription(), status="SUCCEEDED", created_at=old)
    service.provider.refund("long-ago", at=YESTERDAY)
    return f"refund {refund_of(service, 'long-ago')}", "refunded_there"


def refunded_here(service: Service) -> tuple[str, str]:
    row = both_paid(service, "kept")
    service.execute("UPDATE payments SET status = 'REFUNDED' WHERE id = :id", id=row)
    return "payment kept", "refunded_here"


def amount_differs(service: Service) -> tuple[str, str]:
    row = both_paid(service, "dear")
    service.execute("UPDATE payments SET amount = 199 WHERE id = :id", id=row)
    return "payment dear", "amount_differs"


def doubled_here(service: Service) -> tuple[str, str]:
    service.tolerate_duplicates()
    both_paid(service, "twice")
    service.payment("twice", subscription_id=service.subscription(), status="SUCCEEDED", created_at=YESTERDAY)
    return "payment twice", "doubled_here"


def refund_of(service: Service, payment_id: str) -> str:
    [entry] = [
        entry for entry in service.provider.ledger() if entry.kind == "refund" and entry.payment_id == payment_id
    ]
    return str(entry.refund_id)


DIFFERENCES = [
    not_paid_there,
    never_there,
    without_an_id,
    made_paid_by_hand,
    refunded_there,
    refunded_in_part,
    refunded_long_after,
    refunded_here,
    amount_differs,
    doubled_here,
]


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda case: case.__name__)
def test_a_difference_opens_one_entry_and_takes_nothing_back(
    shop: Service, difference: Callable[[Service], tuple[str, str]]
) -> None:
    both_paid(shop, "other")
    entry = difference(shop)
    before = shop.snapshot()

    first, second = shop.tick(JOB), shop.tick(JOB)

    for run in (first, second):
        assert not run.ok
        assert run.failure.startswith(
            f"the books of {DAY} differ. Waiting for a person: 1 (billing-orchestration quarantine list)."
        )
        assert run.report["failure code"] == "DayDiffers"
    assert (first.report["newly quarantined"], second.report["newly quarantined"]) == (1, 0)
    assert entries(shop) == [entry]
    after = shop.snapshot()
    for table in ("subscriptions", "payments", "settlements"):
        assert after[table] == before[table]
    [day] = shop.rows("reconciled_days")
    assert (day.differences, day.unexplained) == (1, 0)
    [told] = shop.rows("quarantine")
    assert told.evidence["books"]["day"] == DAY


def decide(service: Service, word: str, attach_to: int | None = None) -> list[str]:
    """A person resolves the only open entry."""
    [entry] = service.rows("quarantine", "resolved_at IS NULL")
    ruling = Resolution(word, "seen in the cabinet", "vera", attach_to)
    connect = lambda: service.connect_provider(service.settings)  # noqa: E731
    return resolve(service.engine, connect, service.calendar, entry.id, ruling, lambda: service.now)


# What becomes of the rows, in the order of their ids, when a person accepts the provider's truth.
TRUTH: dict[Callable[[Service], tuple[str, str]], list[tuple[str, str]]] = {
    not_paid_there: [("CANCELED", "299.00")],
    never_there: [("EXPIRED", "299.00")],
    without_an_id: [("EXPIRED", "299.00")],
    made_paid_by_hand: [("CANCELED", "299.00")],
    refunded_there: [("REFUNDED", "299.00")],
    refunded_in_part: [("SUCCEEDED", "299.00")],
    refunded_long_after: [("REFUNDED", "299.00")],
    refunded_here: [("SUCCEEDED", "299.00")],
    amount_differs: [("SUCCEEDED", "299.00")],
    doubled_here: [("SUCCEEDED", "299.00"), ("EXPIRED", "299.00")],
}


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda case: case.__name__)
def test_accepted_the_row_takes_the_providers_truth_and_no_grant_is_touched(
    shop: Service, difference: Callable[[Service], tuple[str, str]]
) -> None:
    difference(shop)
    shop.tick(JOB)
    before = shop.snapshot()

    told = decide(shop, ACCEPTED)

    assert "is closed as accepted" in told[-1]
    assert [(row.status, str(row.amount)) for row in shop.rows("payments")] == TRUTH[difference]
    after = shop.snapshot()
    assert (after["subscriptions"], after["settlements"]) == (before["subscriptions"], before["settlements"])
    changed = [row for row in after["payments"] if row not in before["payments"]]
    audited = shop.rows("audit_trail", "action = 'corrected'")
    assert [entry.entity_id for entry in audited] == [str(row.id) for row in changed]
    assert all("vera: seen in the cabinet" in entry.reason for entry in audited)
    again = shop.tick(JOB)
    assert again.ok, again.failure
    assert entries(shop) == []


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda case: case.__name__)
def test_ignored_the_books_stay_and_the_day_is_green(
    shop: Service, difference: Callable[[Service], tuple[str, str]]
) -> None:
    difference(shop)
    shop.tick(JOB)
    before = shop.snapshot()

    decide(shop, IGNORED)
    run = shop.tick(JOB)

    assert run.ok, run.failure
    assert entries(shop) == []
    assert shop.snapshot()["payments"] == before["payments"]
    [day] = shop.rows("reconciled_days")
    assert (day.differences, day.unexplained) == (1, 0)


def test_an_entry_about_books_grants_nothing_by_attaching(shop: Service) -> None:
    amount_differs(shop)
    shop.tick(JOB)
    with pytest.raises(NotResolved, match="holds nothing that could be granted"):
        decide(shop, ATTACHED, 1)


def test_an_ignored_difference_does_not_keep_a_later_payment_from_being_settled(shop: Service) -> None:
    purchase = shop.provider.purchase(
        "299.00",
        method_type="cash",
        created_at=YESTERDAY,
        metadata={"user_id": "anna", "plan_id": str(shop.monthly), "payment_provider_id": str(shop.provider_id)},
    )
    row = shop.payment(purchase.id, subscription_id=shop.subscription("anna"), status="SUCCEEDED", created_at=YESTERDAY)
    assert not shop.tick(JOB).ok
    decide(shop, IGNORED)
    shop.execute("UPDATE payments SET status = 'PENDING' WHERE id = :id", id=row)
    shop.provider.pay(purchase.id)

    assert shop.run("matching_pending_payments_job").ok
    assert shop.settled(purchase.id) == ["extended"]


def test_the_second_part_of_a_refund_is_a_difference_of_its_own(shop: Service) -> None:
    row = both_paid(shop, "part")
    shop.provider.refund("part", "99.00", at=YESTERDAY + timedelta(hours=1))
    shop.tick(JOB)
    decide(shop, ACCEPTED)
    shop.provider.refund("part", "200.00", at=YESTERDAY + timedelta(hours=2))

    assert not shop.tick(JOB).ok
    decide(shop, ACCEPTED)

    assert shop.status("payments", row) == "REFUNDED"
    assert shop.tick(JOB).ok


def test_a_refund_on_its_way_is_counted_and_differs_once_it_has_arrived(shop: Service) -> None:
    both_paid(shop, "back")
    shop.provider.refund("back", at=YESTERDAY + timedelta(hours=1), result="pending")

    before = shop.tick(JOB)

    assert before.ok, before.failure
    assert before.metadata["fetch_provider_day"]["refunds on their way"] == 1
    [refund] = shop.provider.document()["refunds"]
    shop.provider.succeed_refund(refund["id"])
    after = shop.tick(JOB)
    assert after.metadata["fetch_provider_day"]["refunds on their way"] == 0
    assert entries(shop) == [(f"refund {refund['id']}", "refunded_there")]


def test_an_entry_is_closed_when_both_sides_agree_again(shop: Service) -> None:
    amount_differs(shop)
    not_paid_there(shop)
    assert not shop.tick(JOB).ok
    shop.execute("UPDATE payments SET amount = 299 WHERE external_payment_id = 'dear'")

    run = shop.tick(JOB)

    assert entries(shop) == [("payment unpaid", "not_paid_there")]
    [closed] = shop.rows("quarantine", "resolved_at IS NOT NULL")
    assert (closed.resolution, closed.resolved_by) == ("settled", JOB)
    assert [(entry.entity, entry.action) for entry in shop.audit(run)] == [("quarantine", "resolved")]


# --- what settling leaves ------------------------------------------------------------------------------------------


def test_a_paid_purchase_that_settling_quarantines_makes_the_day_red_until_a_person_decides(shop: Service) -> None:
    shop.paid_there("of-nobody", created_at=YESTERDAY, metadata={"user_id": "anna"})

    run = shop.tick(JOB)

    assert not run.ok
    assert "Waiting for a person: 1" in run.failure
    assert entries(shop) == [("payment of-nobody", "metadata")]
    decide(shop, IGNORED)
    assert shop.tick(JOB).ok


def test_what_was_granted_before_and_has_lost_its_row_is_before_nobody(shop: Service) -> None:
    paid(shop, "granted")
    assert shop.tick(JOB).ok
    shop.execute("DELETE FROM payments")

    run = shop.tick(JOB)

    assert not run.ok
    assert "Before nobody: 1 (look at each with billing-orchestration explain)" in run.failure
    assert "payment granted" in run.failure
    [day] = shop.rows("reconciled_days")
    assert (day.differences, day.unexplained) == (1, 1)


def test_a_purchase_refunded_in_full_before_anyone_saw_it_is_recorded_as_refunded(shop: Service) -> None:
    paid(shop, "back")
    shop.provider.refund("back", at=YESTERDAY + timedelta(hours=1))

    run = shop.tick(JOB)

    assert run.ok, run.failure
    assert [row.status for row in shop.rows("payments")] == ["REFUNDED"]
    assert shop.rows("subscriptions") == []
    assert shop.tick(JOB).ok


def test_a_part_refund_of_what_is_only_granted_now_is_shown_in_the_same_run(shop: Service) -> None:
    paid(shop, "part")
    shop.provider.refund("part", "99.00", at=YESTERDAY + timedelta(hours=1))

    first = shop.tick(JOB)
    before = shop.snapshot()
    second = shop.tick(JOB)

    assert not first.ok
    assert shop.settled("part") == ["created"]
    assert entries(shop) == [(f"refund {refund_of(shop, 'part')}", "refunded_there")]
    assert not second.ok
    assert shop.snapshot() == before


def test_foreign_payments_and_their_refunds_are_counted_and_left_alone(shop: Service) -> None:
    shop.provider.add_payment(id="a-mug", amount="900.00", created_at=YESTERDAY)
    shop.provider.refund("a-mug", at=YESTERDAY)
    before = shop.snapshot()

    run = shop.tick(JOB)

    assert run.ok, run.failure
    assert classes(run) == {"foreign: not this service's": 2}
    assert shop.snapshot() == before


def test_foreign_payments_are_a_persons_where_the_shop_wants_it_so(service_with: Callable[..., Service]) -> None:
    shop = service_with(foreign_payments="quarantine")
    shop.set_time(MORNING)
    shop.provider.add_payment(id="a-mug", amount="900.00", created_at=YESTERDAY)
    assert not shop.tick(JOB).ok
    assert entries(shop) == [("payment a-mug", "metadata")]


def test_a_record_that_nobody_can_read_is_one_entry_and_a_red_day(shop: Service) -> None:
    paid(shop, "odd", override={"amount": {"value": "x", "currency": "RUB"}})
    first, second = shop.tick(JOB), shop.tick(JOB)
    assert not first.ok
    assert not second.ok
    assert entries(shop) == [("payment odd", "unreadable")]
    decide(shop, IGNORED)
    assert shop.tick(JOB).ok


# --- nothing is decided from a part --------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "what"), [("list", "payments"), ("list_refunds", "refunds")])
def test_a_list_that_breaks_off_fails_the_run_before_anything_is_applied(shop: Service, call: str, what: str) -> None:
    paid(shop, "missing-here")
    for number in range(150):
        both_paid(shop, f"p-{number}")
        shop.provider.refund(f"p-{number}", at=YESTERDAY)
    shop.sandbox.misbehave(call, "error_before", times=None, skip=1)
    before = shop.snapshot()

    run = shop.tick(JOB)

    assert not run.ok
    assert f"the list of {what} broke off at page 2" in run.failure
    assert shop.snapshot() == before
    assert shop.rows("reconciled_days") == []


def test_a_paid_row_that_cannot_be_looked_up_fails_the_run_before_anything_is_applied(shop: Service) -> None:
    made_paid_by_hand(shop)
    paid(shop, "missing-here")
    shop.sandbox.misbehave("get", "error_before", times=None)
    before = shop.snapshot()

    run = shop.tick(JOB)

    assert not run.ok
    assert "payment old could not be looked up" in run.failure
    assert shop.snapshot() == before


# --- the run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_all_and_writes_nothing(shop: Service) -> None:
    paid(shop, "missing-here")
    amount_differs(shop)
    before = shop.snapshot()

    run = shop.tick(JOB, dry_run=True)

    assert not run.ok
    assert "Waiting for a person: 1" in run.failure
    assert "This was a dry run: nothing was written" in run.failure
    assert run.report["applied"] == 1
    assert shop.snapshot() == before
    assert shop.rows("reconciled_days") == []


def test_max_changes_stops_the_run_before_it_settles_anything(shop: Service) -> None:
    for name in ("one", "two"):
        paid(shop, name)
    before = shop.snapshot()
    run = shop.tick(JOB, max_changes=1)
    assert not run.ok
    assert "it would make 2 changes, max_changes is 1" in run.failure
    assert shop.snapshot() == before
    assert shop.tick(JOB, max_changes=2).ok


def test_the_day_is_counted_where_the_accountants_are(service_with: Callable[..., Service]) -> None:
    shop = service_with(reconciliation_timezone="Europe/Moscow")
    shop.set_time(MORNING)
    # 23:30 of the 10th in UTC is the 11th in Moscow, and 21:30 of the 11th is the 12th.
    paid(shop, "of-the-11th", created_at=datetime(2026, 3, 10, 23, 30, tzinfo=UTC))
    paid(shop, "of-the-12th", created_at=datetime(2026, 3, 11, 21, 30, tzinfo=UTC))

    run = shop.tick(JOB)

    assert run.ok, run.failure
    assert shop.settled("of-the-11th") == ["created"]
    assert shop.settled("of-the-12th") == []


def test_the_numbers_of_a_red_day_are_plotted_with_its_tables(shop: Service) -> None:
    shop.provider.switches.fee_percent = 3.0
    both_paid(shop, "back")
    shop.provider.refund("back", at=YESTERDAY)

    run = shop.tick(JOB)

    assert not run.ok
    told = run.materialized["reconciliation"]
    numbers = {
        name: told[name] for name in ("paid, RUB", "fees, RUB", "refunds, RUB", "differences", "differences left")
    }
    assert numbers == {"paid, RUB": 299.0, "fees, RUB": 8.97, "refunds, RUB": 299.0, "differences": 1,
                       "differences left": 1}  # fmt: skip
    assert [row["class"] for row in told["classes"]] == ["both sides agree", "refunded there, not here"]
    assert [row["code"] for row in told["decisions (1)"]] == ["refunded_there"]


def test_a_launch_without_a_partition_marks_the_day_that_it_has_reconciled(shop: Service) -> None:
    def tags(run: Run) -> dict[str, str]:
        record = shop.instance.get_run_by_id(run.run_id)
        assert record is not None
        return dict(record.tags)

    assert tags(shop.run(JOB))["dagster/partition"] == DAY
    assert "dagster/partition" not in tags(shop.run(JOB, dry_run=True))
