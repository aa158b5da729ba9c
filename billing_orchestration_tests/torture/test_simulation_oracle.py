"""The simulation's judge can complain of books: for each thing that it says there are books that make it say it.

Some quiet days are played once; each test gets a copy of their database and of the provider's ledger, in which all is
well, spoils something, and wants to hear of it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from billing_orchestration_tests.torture.simulation.judge import DAY
from billing_orchestration_tests.torture.simulation_books import OURS, Books, books, played

__all__ = ["books", "played"]


def test_it_has_nothing_to_say_about_books_that_agree(books: Books) -> None:
    assert books.complaints() == []
    assert books.unsettled() == []
    assert books.oracle.stale_subscriptions(books.now - DAY) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, "CHARGED TWICE: payment"),
        ({"payment_id": "another"}, "CHARGED TWICE: key"),
        ({"payment_id": "another", "idempotence_key": "another"}, "CHARGED TWICE: subscription and period"),
    ],
)
def test_it_sees_a_second_charge(books: Books, change: dict[str, str], complaint: str) -> None:
    entry = next(entry for entry in books.ledger if entry.kind == "charge" and entry.payment_id == books.renewed())
    books.ledger.append(replace(entry, **change))

    assert any(
        words.startswith(complaint) and "charges in the provider's ledger" in words for words in books.complaints()
    )


SPOILED_TABLES = {
    "another amount in the settlement": (
        f"UPDATE billing_orchestration.settlements SET amount = 1 WHERE {OURS}", ", the charge was of "),
    "a settlement out of nothing": (
        f"UPDATE billing_orchestration.settlements SET external_payment_id = 'made-up' WHERE {OURS}",
        ", for which no money moved"),
    "a grant without a payment row": (f"DELETE FROM payments WHERE {OURS}", " was granted and has "),
    "a grant with two payment rows": (
        "INSERT INTO payments SELECT id + 100000, subscription_id, payment_provider_id, payment_method, status,"
        f" currency, amount, external_payment_id, created_at, updated_at FROM payments WHERE {OURS}",
        " finished payment rows"),
    "another amount in the row": (f"UPDATE payments SET amount = 1 WHERE {OURS}", ", the ledger "),
    "a row of another subscription": (
        f"UPDATE payments SET subscription_id = subscription_id + 1 WHERE {OURS}", "its grant went to"),
    "a refund that nobody made": (f"UPDATE payments SET status = 'REFUNDED' WHERE {OURS}", "nobody refunded"),
    "a finished row without a grant": (
        f"DELETE FROM billing_orchestration.settlements WHERE {OURS}", "is SUCCEEDED without a grant"),
    "a grant that is called a refund": (
        f"UPDATE billing_orchestration.settlements SET kind = 'refunded' WHERE {OURS}", "recorded as refunded"),
    "an end that was moved": (
        "UPDATE subscriptions SET ended_at = ended_at + interval '1 day' WHERE id = (SELECT subscription_id FROM"
        f" payments WHERE {OURS})", "paid periods of"),
    "a start that was moved": (
        "UPDATE subscriptions SET started_at = started_at + interval '1 day' WHERE id = (SELECT subscription_id FROM"
        f" payments WHERE {OURS})", "and now says"),
    "a subscription that is gone": (
        f"DELETE FROM subscriptions WHERE id = (SELECT subscription_id FROM payments WHERE {OURS})",
        "which does not exist"),
    "an attempt that stays unknown": (
        "UPDATE billing_orchestration.renewal_attempts SET state = 'UNKNOWN', last_sent_at = now() - interval '9 years'"
        f" WHERE {OURS}", " undisturbed days"),
    "an attempt that is pending and paid": (
        f"UPDATE billing_orchestration.renewal_attempts SET state = 'PENDING' WHERE {OURS}",
        " is PENDING, the provider says "),
    "a subscription that is expired and not over": (
        "UPDATE subscriptions SET status = 'EXPIRED', ended_at = now() + interval '9 years' WHERE id = (SELECT"
        f" subscription_id FROM payments WHERE {OURS})", "EXPIRED TOO EARLY"),
    "a subscription that is expired while it is charged": (
        "WITH a AS (UPDATE billing_orchestration.renewal_attempts SET state = 'UNKNOWN' WHERE "
        f"{OURS} RETURNING subscription_id) UPDATE subscriptions SET status = 'EXPIRED' FROM a"
        " WHERE id = a.subscription_id",
        "EXPIRED IN THE MIDDLE OF A CHARGE"),
    "a decline without a reason": (
        "UPDATE billing_orchestration.renewal_attempts SET last_error = ' ', state = 'DECLINED'"
        f" WHERE {OURS}", "WITHOUT A REASON: "),
    "a change without a reason": (
        "UPDATE billing_orchestration.audit_trail SET reason = ''", "WITHOUT A REASON: "),
    "a row of another shop that was changed": (
        "INSERT INTO billing_orchestration.audit_trail (at, job, run_id, entity, entity_id, action, reason)"
        " VALUES (now(), 'm', 'r', 'payment', '4711', 'expired', 'is old')", "TOUCHED ANOTHER SHOP'S ROW: "),
    "a problem without a reason": (
        "INSERT INTO billing_orchestration.quarantine (problem_key, kind, reason, evidence, job, run_id, opened_at)"
        " VALUES ('payment x:metadata', 'metadata', '', '{}', 'm', 'r', now())", "WITHOUT A REASON: "),
}  # fmt: skip


@pytest.mark.parametrize("spoiled", SPOILED_TABLES)
def test_it_sees_spoiled_tables(books: Books, spoiled: str) -> None:
    statement, complaint = SPOILED_TABLES[spoiled]
    books.journal.elsewhere[4711] = "another shop's"
    books.execute(statement)

    assert any(complaint in words for words in books.complaints()), books.complaints()


_OF_THE_GRANT = "SELECT subscription_id FROM billing_orchestration.settlements WHERE settled_at = %s"


@pytest.mark.parametrize(("minutes_ago", "is_seen"), [([4], False), ([6], True), ([360, 0], False), ([0, 360], False)])
def test_a_grant_may_be_of_the_period_that_its_plan_had_minutes_before(
    books: Books, minutes_ago: list[int], is_seen: bool
) -> None:
    [created] = books.connection.execute(
        "SELECT s.plan_id, t.settled_at, p.duration, p.duration_unit FROM billing_orchestration.settlements t"
        " JOIN subscriptions s ON s.id = t.subscription_id JOIN plans p ON p.id = s.plan_id"
        " WHERE t.kind = 'created' AND p.duration_unit = 'days' ORDER BY t.settled_at LIMIT 1"
    ).fetchall()
    plan_id, settled_at, *period = created
    books.execute(f"DELETE FROM subscriptions WHERE plan_id <> {plan_id}")
    books.execute(f"UPDATE plans SET duration = 100 WHERE id = {plan_id}")
    complaint = "paid periods of 100 days"
    assert any(complaint in words for words in books.complaints())

    books.journal.period_before[plan_id] = tuple(period)
    books.journal.period_changed[plan_id] = tuple(settled_at + timedelta(minutes=minutes) for minutes in minutes_ago)

    number = f"subscription {books.connection.execute(_OF_THE_GRANT, [settled_at]).fetchone()[0]} "
    assert any(words.startswith(number) and complaint in words for words in books.complaints()) == is_seen


@pytest.mark.parametrize(("began", "has_asked"), [(-1, False), (1, True)])
def test_only_a_run_after_the_last_send_has_asked_about_a_pending_charge(
    books: Books, began: int, has_asked: bool
) -> None:
    sent_at = books.now - timedelta(hours=1)
    books.execute(
        f"UPDATE billing_orchestration.renewal_attempts SET state = 'PENDING', last_sent_at = '{sent_at}' WHERE {OURS}"
    )
    books.journal.undisturbed["autopayment_job"] = [sent_at + timedelta(seconds=began)]

    assert any("is PENDING" in words for words in books.complaints()) == has_asked


def test_a_pending_charge_whose_record_nobody_can_read_may_stay_open(books: Books) -> None:
    books.execute(f"UPDATE billing_orchestration.renewal_attempts SET state = 'PENDING' WHERE {OURS}")
    complaints = [words for words in books.complaints() if "is PENDING" in words]
    assert complaints
    books.journal.unreadable.add(books.renewed())
    assert [words for words in books.complaints() if "is PENDING" in words] == complaints[1:]


def test_runs_before_the_database_was_set_back_have_concluded_nothing(books: Books) -> None:
    sent_at = books.now - timedelta(days=5)
    books.execute(
        f"UPDATE billing_orchestration.renewal_attempts SET state = 'UNKNOWN', last_sent_at = '{sent_at}' WHERE {OURS}"
    )
    books.journal.undisturbed["autopayment_job"] = [sent_at + timedelta(days=day, hours=1) for day in range(4)]
    assert any("is UNKNOWN since" in words for words in books.complaints())
    books.journal.restored_at = books.now
    assert not any("is UNKNOWN since" in words for words in books.complaints())


def test_it_sees_a_grant_of_the_services_for_what_was_granted_here(books: Books) -> None:
    for payment_id in (books.renewed(), "made-up"):
        books.journal.note_grant(payment_id, 1, (1, "month"), books.now)

    found = "\n".join(books.complaints())
    assert "GRANTED TWICE" in found
    assert " by the service, and the ledger has no charge" in found


def test_it_sees_a_grant_of_what_was_refunded_or_to_be_set_aside(books: Books) -> None:
    books.journal.refunded[books.renewed()] = False
    books.journal.poisoned[books.renewed()] = "metadata"

    found = "\n".join(books.complaints())
    assert "refunded in full before it was granted" in found
    assert "GRANTED WRONGLY" in found


def test_it_sees_a_paid_payment_that_is_lost_or_set_aside_or_not_shown(books: Books) -> None:
    books.execute(f"DELETE FROM payments WHERE {OURS}")
    lost = books.renewed()
    books.execute(f"DELETE FROM billing_orchestration.settlements WHERE {OURS}")
    assert any(f"NOT GRANTED: {lost}" in words and words.endswith("lost") for words in books.unsettled())

    books.journal.poisoned[lost] = "metadata"
    assert any(f"NOT SHOWN: {lost}" in words for words in books.unsettled())

    del books.journal.poisoned[lost]
    books.execute(
        "INSERT INTO billing_orchestration.quarantine (problem_key, kind, reason, evidence, job, run_id, opened_at,"
        f" external_payment_id) VALUES ('x', 'metadata', 'y', '{{}}', 'm', 'r', now(), '{lost}')"
    )
    assert any("nothing was wrong with it" in words for words in books.unsettled())


def test_it_sees_a_row_that_the_service_wrote_and_nobody_granted(books: Books) -> None:
    books.journal.service_rows.add(books.renewed())
    books.execute(f"DELETE FROM billing_orchestration.settlements WHERE {OURS}")

    assert any("NOT GRANTED" in words for words in books.unsettled())


def test_it_sees_a_purchase_of_which_the_service_wrote_only_the_row(books: Books) -> None:
    [bought] = books.oracle.rows(
        "SELECT external_payment_id AS id FROM billing_orchestration.settlements WHERE kind = 'created' LIMIT 1"
    )
    books.journal.half_written[bought.id] = books.now - DAY
    books.execute(f"DELETE FROM billing_orchestration.settlements WHERE external_payment_id = '{bought.id}'")

    assert any(f"NOT GRANTED: {bought.id}" in words for words in books.unsettled())
    # Its handler may still be at work, by a clock of its own.
    for ahead in (0, 50):
        books.journal.half_written[bought.id] = books.now + timedelta(seconds=ahead)
        assert not any(bought.id in words for words in books.unsettled())


def test_an_end_that_somebody_has_moved_is_counted_from_there(books: Books) -> None:
    [renewed] = books.oracle.rows(f"SELECT subscription_id AS id FROM payments WHERE {OURS}")
    assert books.oracle.close_chapter(renewed.id, books.ledger) == []
    books.execute(
        "UPDATE subscriptions SET ended_at = ended_at + interval '3 days',"
        f" status = CASE status WHEN 'EXPIRED' THEN 'ACTIVE' ELSE status END WHERE id = {renewed.id}"
    )
    assert any("paid periods of" in words for words in books.complaints())
    assert any("paid periods of" in words for words in books.oracle.close_chapter(renewed.id, books.ledger))

    # From here on it is as it should be.
    assert books.complaints() == []


def test_it_sees_what_the_expiring_jobs_have_left(books: Books) -> None:
    books.execute(f"UPDATE payments SET status = 'PENDING', created_at = created_at - interval '1 year' WHERE {OURS}")
    books.execute("UPDATE subscriptions SET status = 'ACTIVE', ended_at = ended_at - interval '1 year'")

    assert any("OPEN TOO LONG: payment" in words for words in books.oracle.stale_payments(books.payments, books.now))
    assert any("OPEN TOO LONG: subscription" in words for words in books.oracle.stale_subscriptions(books.now))


@pytest.mark.parametrize("reason", [None, "", " "])
def test_it_sees_a_due_subscription_of_which_a_run_says_nothing(books: Books, reason: str | None) -> None:
    books.execute("UPDATE subscriptions SET status = 'ACTIVE'")
    due = books.oracle.due(books.now, 30)
    assert due
    decisions = [{"subject": f"subscription {number}", "reason": "told"} for number in due]

    assert books.oracle.unexplained(due, decisions) == []
    spoiled = [{**decisions[0], "reason": reason}, *decisions[1:]]
    [complaint] = books.oracle.unexplained(due, spoiled)
    assert complaint.startswith("NOT EXPLAINED: ")


def nothing_was_sent(books: Books) -> dict[int, datetime]:
    """Subscriptions that are due and must be charged, of which the last run has charged none."""
    books.execute(
        "DELETE FROM payments WHERE external_payment_id IN"
        " (SELECT external_payment_id FROM billing_orchestration.renewal_attempts)"
    )
    books.execute("UPDATE billing_orchestration.renewal_attempts SET state = 'DECLINED', first_sent_at = NULL,"
                  " last_sent_at = NULL, period_start = period_start - interval '1 year'")  # fmt: skip
    books.execute(f"UPDATE subscriptions SET status = 'ACTIVE', ended_at = '{books.now - timedelta(hours=1)}'")
    return books.oracle.chargeable(books.payments.values(), books.now, books.now)


def test_it_sees_due_subscriptions_that_could_be_charged_and_were_not(books: Books) -> None:
    sent = books.oracle.rows(
        f"SELECT subscription_id, period_start FROM billing_orchestration.renewal_attempts WHERE {OURS}"
    )
    assert books.oracle.not_charged({row.subscription_id: row.period_start for row in sent}, ()) == []

    chargeable = nothing_was_sent(books)

    assert chargeable
    assert [words.partition(" ended")[0] for words in books.oracle.not_charged(chargeable, ())] == [
        f"NOT CHARGED: subscription {number}" for number in chargeable
    ]


@pytest.mark.parametrize(
    ("decline", "must_be_charged"),
    [
        ("card_expired", False),
        ("permission_revoked", False),
        ("insufficient_funds", True),
        ("general_decline", True),
        ("3d_secure_failed", True),
        # Its customer's own purchase with it, not a charge of ours.
        ("card_expired, of a purchase", True),
        ("card_expired, lost with a database that was set back", True),
    ],
)
def test_a_card_that_was_declined_for_good_in_an_earlier_period_need_not_be_charged_and_any_other_must(
    books: Books, decline: str, must_be_charged: bool
) -> None:
    renewal = copy.deepcopy(books.payments[books.renewed()])
    number = next(iter(nothing_was_sent(books)))
    [card] = books.oracle.rows(
        "SELECT external_payment_id AS id FROM payments WHERE subscription_id = %s AND status = 'SUCCEEDED'", number
    )
    renewal.id, renewal.method_id, renewal.status = "declined", card.id, "canceled"
    renewal.cancellation = {"party": "payment_network", "reason": decline.partition(",")[0]}
    if "purchase" in decline:
        del renewal.metadata["renewal_attempt_id"]
    if "lost" in decline:
        books.journal.lost.add(renewal.id)
    books.payments[renewal.id] = renewal

    chargeable = books.oracle.chargeable(books.payments.values(), books.now, books.now)

    complaints = books.oracle.not_charged(chargeable, ())
    assert any(f"NOT CHARGED: subscription {number} " in words for words in complaints) == must_be_charged


@pytest.mark.parametrize(
    ("status", "change", "must_be_charged"),
    [
        ("pending", None, False),
        ("succeeded", None, False),
        ("canceled", None, True),
        # Another period's; a purchase; one that the database has not lost.
        ("pending", "period_start", True),
        ("pending", "renewal_attempt_id", True),
        ("pending", "kept", True),
    ],
)
def test_what_a_lost_charge_may_yet_pay_for_need_not_be_charged(
    books: Books, status: str, change: str | None, must_be_charged: bool
) -> None:
    renewal = copy.deepcopy(books.payments[books.renewed()])
    number, period_start = int(renewal.metadata["subscription_id"]), books.now.replace(tzinfo=None) - DAY
    renewal.id, renewal.status = "lost", status
    renewal.metadata["period_start"] = period_start.replace(tzinfo=timezone.utc).isoformat()
    if change == "period_start":
        renewal.metadata["period_start"] = books.now.isoformat()
    elif change == "renewal_attempt_id":
        del renewal.metadata["renewal_attempt_id"]
    if change != "kept":
        books.journal.lost.add(renewal.id)

    found = books.oracle.not_charged({number: period_start}, [renewal])

    assert any(f"NOT CHARGED: subscription {number} ended" in words for words in found) == must_be_charged
