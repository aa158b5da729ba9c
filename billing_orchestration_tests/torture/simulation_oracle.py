"""The judge of the simulation: compares the provider's ledger with the tables, by its own SQL and its own arithmetic.

Nothing in here comes from `billing_orchestration.domain`, `.database` or `.provider`: it must not share their mistakes.
What it is told by the simulation (the `Journal`) are facts of the world outside the code under test: which
subscriptions were there before, what the service's own webhook granted, when a customer was refunded.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone, tzinfo
from typing import Any

import psycopg
from psycopg.rows import namedtuple_row

UTC = timezone.utc
DAY = timedelta(days=1)
# An attempt whose outcome is unknown: sent on day 0, too old for its key on day 1 (first scan), second scan on day 2.
UNDISTURBED_RUNS_UNTIL_KNOWN = 3


# The classes of the provider's cancellation reasons, from its documentation and not from the code under test.
FINAL_DECLINES = frozenset((
    "permission_revoked", "card_expired", "payment_method_restricted", "invalid_card_number", "country_forbidden",
    "fraud_suspected", "identification_required", "unsupported_mobile_operator", "3d_secure_failed", "invalid_csc",
    "expired_on_confirmation", "loan_declined", "loan_declined_by_payer", "loan_application_expired",
    "canceled_by_merchant", "expired_on_capture", "deal_expired",
))  # fmt: skip
SOFT_DECLINES = frozenset((
    "insufficient_funds", "issuer_unavailable", "payment_method_limit_exceeded", "internal_timeout",
    "rejected_by_timeout",
))  # fmt: skip
# What autopayment_job's max_overdue_days is by default.
MOST_DAYS_OVERDUE = 30


def naive(instant: datetime) -> datetime:
    """As the service's tables hold it."""
    return instant.astimezone(UTC).replace(tzinfo=None)


def last_day_of_month(day: date) -> int:
    """28 to 31."""
    return ((day.replace(day=28) + timedelta(days=4)).replace(day=1) - DAY).day


def end_of_next_period(zone: tzinfo, started_at: datetime, ended_at: datetime, duration: int, unit: str) -> datetime:
    """One period after `ended_at` (both naive UTC), the wall clock's time and the anchor day kept (SPEC 4)."""
    end = ended_at.replace(tzinfo=UTC).astimezone(zone)
    if unit == "days":
        day = end.date() + duration * DAY
    else:
        start = started_at.replace(tzinfo=UTC).astimezone(zone)
        anchor = end.day
        if start.day > end.day and end.day == last_day_of_month(end.date()):
            anchor = start.day
        month_number = end.month - 1 + duration * (12 if unit == "year" else 1)
        first = date(end.year + month_number // 12, month_number % 12 + 1, 1)
        day = first.replace(day=min(anchor, last_day_of_month(first)))
    wall = datetime(day.year, day.month, day.day, end.hour, end.minute, end.second, end.microsecond, tzinfo=zone)
    return naive(wall)


@dataclass
class Journal:
    """Facts of the world that neither the tables nor the ledger hold."""

    # Payments and subscriptions that were there before the first run: (started_at, ended_at), naive UTC.
    history: set[str] = field(default_factory=set)
    before: dict[int, tuple[datetime, datetime]] = field(default_factory=dict)
    # The service's own webhook: provider payment -> subscription it extended or created.
    service_grants: dict[str, int] = field(default_factory=dict)
    # Renewals whose row the service's webhook wrote as SUCCEEDED without granting anything: the grant is our work.
    service_rows: set[str] = field(default_factory=set)
    # Whose card a saved method is: method -> user.
    methods: dict[str, str] = field(default_factory=dict)
    # From here on nothing happens but what closes by its rule.
    calm: bool = False
    # Refunded in full: provider payment -> whether anybody had granted it by then.
    refunded: dict[str, bool] = field(default_factory=dict)
    # Successes that must not be granted but shown to a person, with the kind of problem.
    poisoned: dict[str, str] = field(default_factory=dict)
    # Stretches (aware UTC, the provider's clock) that no matching run covers until an operator backfills them.
    gaps: list[tuple[datetime, datetime]] = field(default_factory=list)
    # When the service, or a customer there, last changed a subscription (aware UTC, our clock).
    touched: dict[int, datetime] = field(default_factory=dict)
    # Instants (aware UTC, our clock) of undisturbed, green runs, by job.
    undisturbed: dict[str, list[datetime]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Rules:
    """The numbers behind the rules, and how the two clocks differ: the provider's minus ours."""

    zone: tzinfo
    grace_days: int
    ttl_days: int
    provider_skew: timedelta
    list_lag: timedelta


class Oracle:
    """One installation's judge. `violations` runs every check; the others are for certain moments."""

    def __init__(self, connection: psycopg.Connection[Any], journal: Journal, rules: Rules) -> None:
        self._connection = connection
        self._journal = journal
        self._rules = rules

    def rows(self, statement: str, *values: Any) -> list[Any]:
        """Whatever a statement of the oracle's own finds."""
        with self._connection.cursor(row_factory=namedtuple_row) as cursor:
            return cursor.execute(statement, values).fetchall()

    def billing_day(self, instant: datetime) -> date:
        """The billing day of an aware instant."""
        return instant.astimezone(self._rules.zone).date()

    # --- the whole comparison

    def violations(self, ledger: Sequence[Any], payments: Mapping[str, Any], now: datetime) -> list[str]:
        """Every disagreement. `ledger`: the provider's entries; `payments`: its payments by id; `now`: our clock."""
        found: list[str] = []
        charged = {entry.payment_id: entry for entry in ledger if entry.kind == "charge"}
        found.extend(self._nobody_is_charged_twice(ledger))
        found.extend(self._grants_follow_successes(charged, payments))
        found.extend(self._nothing_stays_open(payments, now))
        found.extend(self.expired_unduly(now))
        found.extend(self._everything_has_a_reason())
        return found

    def _nobody_is_charged_twice(self, ledger: Sequence[Any]) -> Iterator[str]:
        by_payment = Counter(entry.payment_id for entry in ledger if entry.kind == "charge")
        by_key = Counter(entry.idempotence_key for entry in ledger if entry.kind == "charge" and entry.idempotence_key)
        by_period = Counter(
            (entry.metadata.get("subscription_id"), entry.metadata.get("period_start"))
            for entry in ledger
            if entry.kind == "charge" and entry.idempotence_key
        )
        for what, counts in (("payment", by_payment), ("key", by_key), ("subscription and period", by_period)):
            for name, count in counts.items():
                if count > 1:
                    yield f"CHARGED TWICE: {what} {name} has {count} charges in the provider's ledger"

    def _grants_follow_successes(self, charged: Mapping[str, Any], payments: Mapping[str, Any]) -> Iterator[str]:
        journal = self._journal
        ours = {
            row.external_payment_id: row
            for row in self.rows(
                "SELECT external_payment_id, kind, payment_id, subscription_id, amount, currency, period_end,"
                " settled_at"
                " FROM billing_orchestration.settlements"
            )
        }
        grants: dict[str, int] = dict(journal.service_grants)
        for payment_id, row in ours.items():
            if payment_id not in charged:
                yield f"GRANTED UNPAID: settlement of {payment_id}, for which no money moved"
                continue
            if row.kind == "refunded" or row.period_end is None:
                continue
            if payment_id in journal.service_grants:
                yield f"GRANTED TWICE: {payment_id} by the service's webhook and by {row.kind} here"
            if journal.refunded.get(payment_id) is False:
                yield f"GRANTED UNPAID: {payment_id} was refunded in full before it was granted"
            if payment_id in journal.poisoned:
                yield f"GRANTED WRONGLY: {payment_id} was to be set aside ({journal.poisoned[payment_id]})"
            grants[payment_id] = row.subscription_id
            entry = charged[payment_id]
            if (row.amount, row.currency) != (entry.amount, entry.currency):
                yield f"settlement of {payment_id} says {row.amount} {row.currency}, the ledger {entry.amount}"
        for payment_id in set(grants) - set(charged):
            yield f"GRANTED UNPAID: {payment_id}"
        yield from self._rows_agree(grants, ours, charged)
        yield from self._periods_add_up(grants)

    def _rows_agree(
        self, grants: Mapping[str, int], ours: Mapping[str, Any], charged: Mapping[str, Any]
    ) -> Iterator[str]:
        by_id: dict[str, list[Any]] = defaultdict(list)
        for row in self.rows(
            "SELECT id, external_payment_id, status::text AS status, amount, currency::text AS currency,"
            " subscription_id FROM payments WHERE external_payment_id IS NOT NULL"
        ):
            by_id[row.external_payment_id].append(row)
        for payment_id, subscription_id in grants.items():
            if payment_id not in charged:
                continue
            final = [row for row in by_id[payment_id] if row.status in ("SUCCEEDED", "REFUNDED")]
            if len(final) != 1:
                yield f"{payment_id} was granted and has {len(final)} finished payment rows"
                continue
            row, entry = final[0], charged[payment_id]
            if (row.amount, row.currency) != (entry.amount, entry.currency):
                yield f"payment {row.id} says {row.amount} {row.currency}, the ledger {entry.amount} {entry.currency}"
            if row.subscription_id != subscription_id:
                yield f"payment {row.id} is linked to {row.subscription_id}, its grant went to {subscription_id}"
            if row.status == "REFUNDED" and payment_id not in self._journal.refunded:
                yield f"payment {row.id} is REFUNDED, and nobody refunded {payment_id}"
        for payment_id, rows in by_id.items():
            for row in rows:
                accounted = payment_id in grants or payment_id in self._journal.history
                # When a row that the service wrote without a grant must have one, is `unsettled`'s question.
                if row.status == "SUCCEEDED" and not accounted and payment_id not in self._journal.service_rows:
                    yield f"payment {row.id} ({payment_id}) is SUCCEEDED without a grant"
        for payment_id, row in ours.items():
            if row.kind == "refunded" and self._journal.refunded.get(payment_id) is not False:
                yield f"{payment_id} was recorded as refunded and not granted, which it was not by then"

    def _periods_add_up(self, grants: Mapping[str, int]) -> Iterator[str]:
        counts = Counter(grants.values())
        subscriptions = self.rows(
            "SELECT s.id, s.started_at, s.ended_at, p.duration, p.duration_unit FROM subscriptions s"
            " JOIN plans p ON p.id = s.plan_id WHERE s.status <> 'CREATED'"
        )
        for row in subscriptions:
            number = counts.pop(row.id, 0)
            started_at, expected = self._journal.before.get(row.id, (row.started_at, row.started_at))
            for _ in range(number):
                expected = end_of_next_period(self._rules.zone, started_at, expected, row.duration, row.duration_unit)
            if row.started_at != started_at:
                yield f"subscription {row.id} started {started_at} and now says {row.started_at}"
            if row.ended_at != expected:
                yield (
                    f"subscription {row.id} ends {row.ended_at}; {number} paid periods of {row.duration}"
                    f" {row.duration_unit} from {started_at} end {expected}"
                )
        for subscription_id in counts:
            yield f"granted to subscription {subscription_id}, which does not exist"

    def _nothing_stays_open(self, payments: Mapping[str, Any], now: datetime) -> Iterator[str]:
        runs = self._journal.undisturbed["autopayment_job"]
        for row in self.rows(
            "SELECT id, state, first_sent_at, last_sent_at, planned_at, external_payment_id, subscription_id"
            " FROM billing_orchestration.renewal_attempts WHERE state IN ('PLANNED', 'UNKNOWN', 'PENDING')"
        ):
            since = row.last_sent_at or row.planned_at
            days = {self.billing_day(at) for at in runs if at > since}
            if row.state == "PENDING":
                payment = payments.get(row.external_payment_id)
                final_at = payment.changed_at - self._rules.provider_skew if payment is not None else since
                # By a run that began after the charge was final and after it was sent: the answer to a charge that is
                # sent again may be the first one, which was "pending".
                asked = [at for at in runs if at > max(final_at, since)]
                if payment is None or (payment.status in ("succeeded", "canceled") and asked):
                    told = payment.status if payment is not None else "unknown"
                    yield f"OPEN TOO LONG: attempt {row.id} is PENDING, the provider says {told} since {final_at}"
            elif len(days) > UNDISTURBED_RUNS_UNTIL_KNOWN:
                yield f"OPEN TOO LONG: attempt {row.id} is {row.state} since {since}, over {len(days)} undisturbed days"

    def expired_unduly(self, now: datetime) -> Iterator[str]:
        """Expired and not over with its grace by now, or while a charge is open. A day too early shows only today."""
        last = self.billing_day(now) - self._rules.grace_days * DAY
        for row in self.rows(
            "SELECT s.id, s.ended_at, (SELECT min(a.state) FROM billing_orchestration.renewal_attempts a"
            " WHERE a.subscription_id = s.id AND (a.state IN ('UNKNOWN', 'PENDING')"
            " OR (a.state = 'PLANNED' AND a.first_sent_at IS NOT NULL))) AS state"
            " FROM subscriptions s WHERE s.status = 'EXPIRED'"
        ):
            if self.billing_day(row.ended_at.replace(tzinfo=UTC)) > last:
                yield f"EXPIRED TOO EARLY: subscription {row.id} ends {row.ended_at}"
            if row.state is not None:
                yield f"EXPIRED IN THE MIDDLE OF A CHARGE: subscription {row.id}, with an open charge ({row.state})"

    def _everything_has_a_reason(self) -> Iterator[str]:
        for table, where in (
            ("quarantine", "coalesce(trim(reason), '') = ''"),
            ("audit_trail", "coalesce(trim(reason), '') = ''"),
            ("renewal_attempts", "state NOT IN ('PLANNED', 'SUCCEEDED') AND coalesce(trim(last_error), '') = ''"),
        ):
            for row in self.rows(f"SELECT id FROM billing_orchestration.{table} WHERE {where}"):
                yield f"WITHOUT A REASON: {table} {row.id}"

    # --- what holds right after an undisturbed run

    def unsettled(
        self, ledger: Sequence[Any], payments: Mapping[str, Any], as_of: datetime, now: datetime
    ) -> list[str]:
        """After a green tick of both matching jobs: successes that it was to see, and that nobody has in the books."""
        rules, journal = self._rules, self._journal
        settled = {
            row.id for row in self.rows("SELECT external_payment_id AS id FROM billing_orchestration.settlements")
        }
        quarantined = {
            row.id
            for row in self.rows(
                "SELECT external_payment_id AS id FROM billing_orchestration.quarantine"
                " WHERE external_payment_id IS NOT NULL"
            )
        }
        canceled_or_final = {
            row.id
            for row in self.rows(
                "SELECT external_payment_id AS id FROM payments WHERE status IN ('SUCCEEDED', 'REFUNDED')"
                " AND external_payment_id IS NOT NULL"
            )
        }
        provider_now = now + rules.provider_skew
        found = []
        for entry in ledger:
            if entry.kind != "charge" or entry.payment_id in journal.history:
                continue
            payment = payments[entry.payment_id]
            captured_at = payment.captured_at
            visible = captured_at <= as_of and provider_now - payment.changed_at >= rules.list_lag
            left_to_webhook = timedelta(0) <= now - captured_at < timedelta(seconds=61) or captured_at > now
            in_gap = any(start <= captured_at <= end for start, end in journal.gaps)
            if not visible or left_to_webhook or in_gap:
                continue
            if entry.payment_id in journal.poisoned:
                if entry.payment_id not in quarantined | settled and entry.payment_id not in journal.refunded:
                    found.append(f"NOT SHOWN: {entry.payment_id} ({journal.poisoned[entry.payment_id]})")
            elif entry.payment_id not in settled | (canceled_or_final - journal.service_rows):
                if entry.payment_id in quarantined & journal.service_rows and self._granted_beside(entry):
                    continue  # nobody can tell from the tables who moved the subscription's end
                why = "in quarantine, and nothing was wrong with it" if entry.payment_id in quarantined else "lost"
                found.append(f"NOT GRANTED: {entry.payment_id}, paid {captured_at} (provider's clock), {why}")
        return found

    def _granted_beside(self, entry: Any) -> bool:
        """Whether anything else was granted to the subscription that a renewal is for, since it was charged."""
        number = int(entry.metadata["subscription_id"])
        ours = self.rows(
            "SELECT external_payment_id AS id FROM billing_orchestration.settlements"
            " WHERE subscription_id = %s AND external_payment_id <> %s AND settled_at >= %s - interval '30 minutes'",
            number, entry.payment_id, self._sent_at(entry),
        )  # fmt: skip
        theirs = [id_ for id_, granted in self._journal.service_grants.items() if granted == number]
        return bool(ours or set(theirs) - {entry.payment_id})

    def _sent_at(self, entry: Any) -> datetime:
        rows = self.rows(
            "SELECT first_sent_at FROM billing_orchestration.renewal_attempts WHERE id::text = %s",
            entry.metadata["renewal_attempt_id"],
        )
        sent: datetime = rows[0].first_sent_at
        return sent

    def stale_payments(self, payments: Mapping[str, Any], as_of: datetime) -> list[str]:
        """After an undisturbed run of expire_payments_job: PENDING rows it was to expire or settle."""
        return [
            f"OPEN TOO LONG: payment {row.id} is PENDING since {row.created_at}"
            for row in self.rows(
                "SELECT id, created_at, external_payment_id FROM payments WHERE status = 'PENDING' AND created_at < %s",
                naive(as_of - self._rules.ttl_days * DAY),
            )
            if (payment := payments.get(row.external_payment_id)) is None
            or (payment.status != "waiting_for_capture" and row.external_payment_id not in self._journal.poisoned)
        ]

    def stale_subscriptions(self, as_of: datetime) -> list[str]:
        """After an undisturbed run of expire_subscriptions_job: ACTIVE ones that are over, and not held back."""
        last = self.billing_day(as_of) - self._rules.grace_days * DAY
        return [
            f"OPEN TOO LONG: subscription {row.id} is ACTIVE and ended {row.ended_at}"
            for row in self.rows(
                "SELECT id, ended_at FROM subscriptions s WHERE status = 'ACTIVE' AND ended_at IS NOT NULL"
                " AND NOT EXISTS (SELECT FROM billing_orchestration.renewal_attempts a WHERE a.subscription_id = s.id"
                " AND a.state IN ('PLANNED', 'UNKNOWN', 'PENDING', 'REVIEW'))"
            )
            if self.billing_day(row.ended_at.replace(tzinfo=UTC)) <= last
        ]

    def due(self, as_of: datetime, max_overdue_days: int) -> list[int]:
        """The subscriptions that a run of autopayment_job has to charge or to give a reason for."""
        today = self.billing_day(as_of)
        return [
            row.id
            for row in self.rows(
                "SELECT s.id, s.ended_at FROM subscriptions s JOIN plans p ON p.id = s.plan_id"
                " WHERE s.status = 'ACTIVE' AND p.is_recurring AND s.ended_at IS NOT NULL"
            )
            if 0 <= (today - self.billing_day(row.ended_at.replace(tzinfo=UTC))).days <= max_overdue_days
        ]

    def unexplained(self, due: Iterable[int], decisions: Sequence[Mapping[str, Any]]) -> list[str]:
        """Due subscriptions that a finished run of autopayment_job neither charged nor gave a reason for."""
        told = {row["subject"].partition(",")[0]: row["reason"] for row in decisions}
        return [
            f"WITHOUT A REASON: subscription {number} was due and the run says nothing of it"
            for number in due
            if not (told.get(f"subscription {number}") or "").strip()
        ]

    def chargeable(self, as_of: datetime, now: datetime) -> dict[int, datetime]:
        """Subscriptions that an undisturbed run has to charge, without an if or but, each with its old end.

        Ended today or yesterday and nothing was tried for that period; one price; one card, saved by its customer, who
        has no other subscription, and on which nothing else was tried today. Others may be charged as well.
        """
        today, found = self.billing_day(as_of), {}
        for row in self.rows(
            "SELECT s.id, s.user_id, s.ended_at, p.duration, p.duration_unit,"
            " (SELECT array_agg(currency::text) FROM prices WHERE plan_id = s.plan_id) AS currencies,"
            " (SELECT array_agg(DISTINCT a.payment_method_id) FROM billing_orchestration.saved_methods a"
            "  WHERE a.subscription_id = s.id) AS kept"
            " FROM subscriptions s JOIN plans p ON p.id = s.plan_id"
            " WHERE s.status = 'ACTIVE' AND p.is_recurring AND s.ended_at IS NOT NULL"
            " AND (SELECT count(*) FROM subscriptions o WHERE o.user_id = s.user_id) = 1"
            " AND NOT EXISTS (SELECT FROM billing_orchestration.renewal_attempts a WHERE a.subscription_id = s.id"
            "                 AND (a.period_start = s.ended_at OR a.state IN ('PLANNED', 'UNKNOWN', 'PENDING')))"
        ):
            overdue = (today - self.billing_day(row.ended_at.replace(tzinfo=UTC))).days
            if overdue not in (0, 1) or len(row.currencies or ()) != 1:
                continue
            paid = self.rows(
                "SELECT external_payment_id AS method, currency::text AS currency, status::text AS status FROM payments"
                " WHERE subscription_id = %s AND status IN ('SUCCEEDED', 'REFUNDED') AND external_payment_id NOT IN"
                " (SELECT external_payment_id FROM billing_orchestration.renewal_attempts"
                "  WHERE external_payment_id IS NOT NULL)",
                row.id,
            )
            methods = {payment.method for payment in paid} | set(row.kept or ())
            money = {(payment.currency, payment.status) for payment in paid}
            if len(methods) != 1 or money != {(row.currencies[0], "SUCCEEDED")}:
                continue
            (method,) = methods
            tried = self.rows(
                "SELECT last_sent_at FROM billing_orchestration.renewal_attempts"
                " WHERE payment_method_id = %s AND last_sent_at IS NOT NULL",
                method,
            )
            if self._journal.methods.get(method) == row.user_id and self.billing_day(now) not in {
                self.billing_day(one.last_sent_at) for one in tried
            }:
                found[row.id] = row.ended_at
        return found

    def not_charged(self, chargeable: Mapping[int, datetime]) -> list[str]:
        """After an undisturbed run: those of them that it did not even try."""
        tried = {
            (row.subscription_id, row.period_start)
            for row in self.rows(
                "SELECT subscription_id, period_start FROM billing_orchestration.renewal_attempts"
                " WHERE first_sent_at IS NOT NULL"
            )
        }
        return [
            f"NOT CHARGED: subscription {number} ended {ended_at}, its card was there, and nothing was sent"
            for number, ended_at in chargeable.items()
            if (number, ended_at) not in tried
        ]

    # --- at the wire: every POST, before the provider sees it

    def wrong_charge(self, key: str, body: str, payments: Iterable[Any], as_of: datetime, now: datetime) -> list[str]:
        """What is wrong with asking for a charge at all, when its key is sent for the first time.

        `payments`: all of the provider's, also those that nobody here has heard of yet.
        """
        document = json.loads(body)
        metadata, method_id = document["metadata"], document["payment_method_id"]
        rows = self.rows(
            "SELECT s.id, s.user_id, s.plan_id, p.is_recurring, a.sends FROM subscriptions s"
            " JOIN plans p ON p.id = s.plan_id"
            " JOIN billing_orchestration.renewal_attempts a ON a.subscription_id = s.id"
            " WHERE s.id = %s AND a.idempotence_key::text = %s",
            int(metadata["subscription_id"]), key,
        )  # fmt: skip
        if not rows:
            return []  # `wrong_send` says so
        row = rows[0]
        began = self.billing_day(datetime.fromisoformat(metadata["period_start"]))
        overdue = (self.billing_day(as_of) - began).days
        found = []
        # A payment that saved no card is nobody's method: the provider refuses it.
        owner = self._journal.methods.get(method_id, row.user_id)
        if owner != row.user_id or metadata["user_id"] != row.user_id:
            found.append(f"CHARGED A STRANGER: method {method_id} for subscription {row.id} of {row.user_id}")
        if not row.is_recurring:
            found.append(f"CHARGED UNWANTED: the plan of subscription {row.id} is not recurring")
        if began > self.billing_day(now) or overdue < 0:
            found.append(f"CHARGED EARLY: subscription {row.id} for a period from {began}")
        earlier = [
            payment
            for payment in payments
            if payment.metadata.get("renewal_attempt_id") and payment.idempotence_key != key
            and (payment.metadata["subscription_id"], payment.metadata["period_start"])
            == (metadata["subscription_id"], metadata["period_start"])
        ]  # fmt: skip
        declined = [(payment.cancellation or {}).get("reason") for payment in earlier if payment.status == "canceled"]
        if any(payment.status != "canceled" for payment in earlier):
            found.append(f"CHARGED AGAIN: subscription {row.id} has an uncanceled payment for {began} already")
        if any(reason in FINAL_DECLINES for reason in declined):
            found.append(f"CHARGED AGAIN: subscription {row.id} for {began} after {declined}")
        if sum(reason not in FINAL_DECLINES and reason not in SOFT_DECLINES for reason in declined) >= 3:
            found.append(f"CHARGED TOO OFTEN: subscription {row.id} for {began} after {declined}")
        if overdue > (self._rules.grace_days if declined else MOST_DAYS_OVERDUE):
            found.append(f"CHARGED TOO LATE: subscription {row.id}, {overdue} days overdue, after {declined}")
        if row.sends == 1:  # sent for the first time in its life: an older body may have an older price
            asked = (document["amount"]["value"], document["amount"]["currency"])
            prices = [
                (f"{price.amount:.2f}", price.currency)
                for price in self.rows(
                    "SELECT amount, currency::text AS currency FROM prices WHERE plan_id = %s", row.plan_id
                )
                if price.currency == asked[1]
            ]
            if prices != [asked]:
                found.append(f"CHARGED WRONGLY: subscription {row.id} {asked}, the plan's prices are {prices}")
        return found

    def _changed_since(self, subscription_id: int, instant: datetime) -> bool:
        touched = self._journal.touched.get(subscription_id)
        settled = self.rows(
            "SELECT 1 FROM billing_orchestration.settlements WHERE subscription_id = %s AND settled_at >= %s",
            subscription_id, instant,
        )  # fmt: skip
        return bool(settled) or (touched is not None and touched >= instant)

    def wrong_send(self, key: str, body: str, began: datetime) -> list[str]:
        """What is wrong with a charge that is about to be sent, by the tables as they are committed at this moment.

        `began` (aware UTC, our clock): when the run did that sends it.
        """
        rows = self.rows(
            "SELECT a.state, a.body, a.first_sent_at, a.last_sent_at, a.period_start, a.subscription_id,"
            " s.status::text AS status, s.ended_at"
            " FROM billing_orchestration.renewal_attempts a JOIN subscriptions s ON s.id = a.subscription_id"
            " WHERE a.idempotence_key::text = %s",
            key,
        )
        if not rows:
            return [f"SENT WITHOUT A RECORD: key {key} is not in the database at the moment of its POST"]
        row = rows[0]
        found = []
        if row.first_sent_at is None:
            found.append(f"SENT WITHOUT A RECORD: key {key} is sent, first_sent_at is not committed")
        if row.body != body:
            found.append(f"key {key} is sent with another body than the frozen one")
        if row.state not in ("PLANNED", "UNKNOWN"):
            found.append(f"key {key} is sent while its attempt is {row.state}")
        # Else a send without another look would be excused by whatever has changed since the send before it.
        if row.last_sent_at is not None and row.last_sent_at < began:
            found.append(f"SENT WITHOUT A LOOK: key {key} was claimed at {row.last_sent_at}, its run began {began}")
        # Between the last look at it, which is committed with `last_sent_at`, and this moment it may have changed.
        if (row.status != "ACTIVE" or row.ended_at != row.period_start) and not (
            row.last_sent_at is not None and self._changed_since(row.subscription_id, row.last_sent_at)
        ):
            found.append(
                f"CHARGED UNWANTED: key {key} is sent while its subscription is {row.status}, ends {row.ended_at},"
                f" period {row.period_start}"
            )
        return found
