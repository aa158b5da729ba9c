"""The whole comparison: the provider's ledger against the tables, at any moment."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from billing_orchestration_tests.torture.simulation.judge import DAY, UTC, Judge, end_of_next_period

# An attempt whose outcome is unknown: sent on day 0, too old for its key on day 1 (first scan), second scan on day 2.
UNDISTURBED_RUNS_UNTIL_KNOWN = 3
# What a run takes from reading a plan to granting by it.
A_RUN = timedelta(minutes=5)


class BooksJudge(Judge):
    """Charges, grants, rows, periods, and what is still open."""

    def violations(self, ledger: Sequence[Any], payments: Mapping[str, Any], now: datetime) -> list[str]:
        """Every disagreement. `ledger`: the provider's entries; `payments`: its payments by id; `now`: our clock."""
        found: list[str] = []
        charged = {entry.payment_id: entry for entry in ledger if entry.kind == "charge"}
        found.extend(self._nobody_is_charged_twice(ledger))
        found.extend(self._grants_follow_successes(charged, payments))
        found.extend(self._nothing_stays_open(payments, now))
        found.extend(self.expired_unduly(now))
        found.extend(self._everything_has_a_reason())
        found.extend(self._nobody_touches_another_shop())
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
        # A settlement that only records the service's own grant has a period, too, and has moved no end.
        moved_here = {
            row.external_payment_id
            for row in self.rows("SELECT external_payment_id FROM billing_orchestration.audit_trail"
                                 " WHERE entity = 'subscription' AND external_payment_id IS NOT NULL")
        }  # fmt: skip
        for payment_id, row in ours.items():
            if payment_id not in charged:
                yield f"GRANTED UNPAID: settlement of {payment_id}, for which no money moved"
                continue
            if row.kind == "refunded" or row.period_end is None:
                continue
            if payment_id in journal.service_grants and payment_id in moved_here:
                yield f"GRANTED TWICE: {payment_id} by the service's webhook and by {row.kind} here"
            if journal.refunded.get(payment_id) is False:
                yield f"GRANTED UNPAID: {payment_id} was refunded in full before it was granted"
            if payment_id in journal.poisoned:
                yield f"GRANTED WRONGLY: {payment_id} was to be set aside ({journal.poisoned[payment_id]})"
            entry = charged[payment_id]
            if (row.amount, row.currency) != (entry.amount, entry.currency):
                yield f"settlement of {payment_id} says {row.amount} {row.currency}, the charge was of {entry.amount}"
        grants = self._grants()
        for payment_id in sorted(set(grants) - set(charged)):
            yield f"GRANTED UNPAID: {payment_id} by the service, and the ledger has no charge"
        yield from self._rows_agree(grants, ours, charged)
        yield from self._periods_add_up(grants, charged)

    def _grants(self) -> dict[str, int]:
        """Which subscription each payment was granted to, by us and by the service."""
        return {
            **self._journal.service_grants,
            **{
                row.id: row.subscription_id
                for row in self.rows(
                    "SELECT external_payment_id AS id, subscription_id FROM billing_orchestration.settlements"
                    " WHERE kind <> 'refunded' AND period_end IS NOT NULL"
                )
            },
        }

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
                without_grant = self._journal.service_rows | set(self._journal.half_written)
                if row.status == "SUCCEEDED" and not accounted and payment_id not in without_grant:
                    yield f"payment {row.id} ({payment_id}) is SUCCEEDED without a grant"
        for payment_id, row in ours.items():
            if row.kind == "refunded" and self._journal.refunded.get(payment_id) is not False:
                yield f"{payment_id} was recorded as refunded and not granted, which it was not by then"

    def close_chapter(self, number: int, ledger: Sequence[Any]) -> list[str]:
        """Right before somebody moves a subscription's end or plan: what is wrong with its end so far."""
        journal, grants = self._journal, self._grants()
        mine = {payment_id: to for payment_id, to in grants.items() if to == number}
        charged = {entry.payment_id: entry for entry in ledger if entry.kind == "charge"}
        found = [words for words in self._periods_add_up(mine, charged) if f"subscription {number} " in words]
        rows = self.rows("SELECT started_at, ended_at FROM subscriptions WHERE id = %s", number)
        journal.before[number] = (rows[0].started_at, rows[0].ended_at)
        journal.counted[number] = set(mine)
        return found

    def _granted_at(self, payment_id: str) -> datetime:
        rows = self.rows(
            "SELECT settled_at FROM billing_orchestration.settlements WHERE external_payment_id = %s", payment_id
        )
        if rows:
            settled_at: datetime = rows[0].settled_at
            return settled_at
        return self._journal.service_granted_at[payment_id]

    def _periods_add_up(self, grants: Mapping[str, int], charged: Mapping[str, Any]) -> Iterator[str]:
        journal = self._journal
        granted: dict[int, list[str]] = defaultdict(list)
        for payment_id, number in grants.items():
            granted[number].append(payment_id)
        subscriptions = self.rows(
            "SELECT s.id, s.plan_id, s.started_at, s.ended_at, p.duration, p.duration_unit FROM subscriptions s"
            " JOIN plans p ON p.id = s.plan_id WHERE s.status <> 'CREATED'"
        )
        for row in subscriptions:
            started_at, begins = journal.before.get(row.id, (row.started_at, row.started_at))
            ends = [begins]
            paid = set(granted.pop(row.id, ())) - journal.counted.get(row.id, set())
            for payment_id in sorted(paid, key=self._granted_at) if len(paid) > 1 else paid:
                ends = [
                    end_of_next_period(self._rules.zone, started_at, end, *period)
                    for end in ends
                    for period in self._periods_of(payment_id, charged.get(payment_id), row)
                ]
            if row.started_at != started_at:
                yield f"subscription {row.id} started {started_at} and now says {row.started_at}"
            if row.ended_at not in ends:
                yield (
                    f"subscription {row.id} ends {row.ended_at}; {len(paid)} paid periods of {row.duration}"
                    f" {row.duration_unit} from {started_at} end {ends[0]}"
                )
        for subscription_id in granted:
            yield f"granted to subscription {subscription_id}, which does not exist"

    def _periods_of(self, payment_id: str, entry: Any, row: Any) -> list[tuple[int, str]]:
        """What a payment may have granted to a subscription: mostly one period."""
        journal = self._journal
        if payment_id in journal.service_periods:
            return [journal.service_periods[payment_id]]
        agreed = journal.agreed.get(entry.metadata.get("renewal_attempt_id", "")) if entry is not None else None
        if agreed is not None and payment_id in journal.lost:
            # What was frozen with its attempt is lost, too: it grants the period that its plan has by then.
            return [*agreed, (row.duration, row.duration_unit)]
        if agreed is not None:
            return agreed
        found = [(row.duration, row.duration_unit)]
        changed_at = journal.period_changed.get(row.plan_id, ())
        if any(abs(self._granted_at(payment_id) - at) < A_RUN for at in changed_at):
            # Its plan was read right before the change.
            found.append(journal.period_before[row.plan_id])
        return found

    def _nothing_stays_open(self, payments: Mapping[str, Any], now: datetime) -> Iterator[str]:
        runs = self._journal.undisturbed["autopayment_job"]
        for row in self.rows(
            "SELECT id, state, first_sent_at, last_sent_at, planned_at, external_payment_id, subscription_id"
            " FROM billing_orchestration.renewal_attempts WHERE state IN ('PLANNED', 'UNKNOWN', 'PENDING')"
        ):
            since = row.last_sent_at or row.planned_at
            if self._journal.restored_at is not None:
                since = max(since, self._journal.restored_at)  # what runs did before that is lost
            days = {self.billing_day(at) for at in runs if at > since}
            if row.state == "PENDING":
                payment = payments.get(row.external_payment_id)
                final_at = payment.changed_at - self._rules.provider_skew if payment is not None else since
                # By a run that began after the charge was final and after it was sent: the answer to a charge that is
                # sent again may be the first one, which was "pending".
                asked = [at for at in runs if at > max(final_at, since)]
                if row.external_payment_id in self._journal.unreadable:
                    continue
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

    def _nobody_touches_another_shop(self) -> Iterator[str]:
        for row in self.rows(
            "SELECT entity_id, action FROM billing_orchestration.audit_trail WHERE entity = 'payment'"
            " AND entity_id = ANY(%s)",
            [str(number) for number in self._journal.elsewhere],
        ):
            yield f"TOUCHED ANOTHER SHOP'S ROW: payment {row.entity_id}, {row.action}"
