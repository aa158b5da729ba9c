"""What an undisturbed run must have done: nothing it was to see is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from billing_orchestration_tests.torture.simulation.judge import DAY, UTC, Judge, naive


class RunsJudge(Judge):
    """After a green run."""

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
            half_written_at = journal.half_written.get(entry.payment_id)
            if half_written_at is not None and (min(now, provider_now) - half_written_at < timedelta(seconds=61)):
                continue  # its handler may still be at work: its row's time is compared with the provider's clock
            # The jobs leave it a minute by the provider's clock, which tells whole seconds.
            left_to_webhook = provider_now - captured_at < timedelta(seconds=61)
            in_gap = any(start <= captured_at <= end for start, end in journal.gaps)
            if not visible or left_to_webhook or in_gap:
                continue
            if entry.payment_id in journal.poisoned:
                if entry.payment_id not in quarantined | settled and entry.payment_id not in journal.refunded:
                    found.append(f"NOT SHOWN: {entry.payment_id} ({journal.poisoned[entry.payment_id]})")
            elif entry.payment_id not in settled | (
                canceled_or_final - journal.service_rows - set(journal.half_written)
            ):
                if entry.payment_id in quarantined and self._is_for_a_person(entry):
                    continue
                why = "in quarantine, and nothing was wrong with it" if entry.payment_id in quarantined else "lost"
                found.append(f"NOT GRANTED: {entry.payment_id}, paid {captured_at} (provider's clock), {why}")
        return found

    def _is_for_a_person(self, entry: Any) -> bool:
        """Whether the tables do not say enough to settle it."""
        journal = self._journal
        if entry.payment_id in journal.lost:
            return True  # its attempt is gone: whether the rest still fits is not for this judge to say
        if "renewal_attempt_id" in entry.metadata:
            number = int(entry.metadata["subscription_id"])
            # Nobody can tell from the tables who moved the subscription's end.
            moved_at = journal.moved.get(number)
            return (moved_at is not None and moved_at >= self._sent_at(entry)) or (
                entry.payment_id in journal.service_rows and self._granted_beside(entry)
            )
        if entry.payment_id in journal.half_written:
            # Whether the handler had granted it before it died, nobody can tell from a subscription that has changed.
            changed = self.rows(
                "SELECT 1 FROM subscriptions WHERE user_id = %s AND updated_at >= %s",
                entry.metadata.get("user_id"), naive(entry.at - timedelta(minutes=15)),
            )  # fmt: skip
            return bool(changed)
        # Without a row there is only the price to compare with, which has changed since.
        rows = self.rows("SELECT 1 FROM payments WHERE external_payment_id = %s", entry.payment_id)
        plan_id = str(entry.metadata.get("plan_id", ""))
        prices = self.rows(
            "SELECT 1 FROM prices WHERE plan_id::text = %s AND amount = %s AND currency::text = %s",
            plan_id, entry.amount, entry.currency,
        )  # fmt: skip
        changed_at = [journal.plan_changed.get(int(plan_id)) if plan_id.isdigit() else None, journal.restored_at]
        has_changed = any(at is not None and at >= entry.at - timedelta(minutes=15) for at in changed_at)
        return not rows and (has_changed or not prices)

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
            if row.id not in self._journal.elsewhere  # its own shop's work
            and (
                (payment := payments.get(row.external_payment_id)) is None
                or (payment.status != "waiting_for_capture" and row.external_payment_id not in self._journal.poisoned)
            )
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
                # A charge that is not granted: it is paid, or may be.
                " AND NOT EXISTS (SELECT FROM billing_orchestration.quarantine q WHERE q.subscription_id = s.id"
                " AND q.attempt_id IS NOT NULL AND q.resolved_at IS NULL"
                " AND q.kind IN ('unknown_attempt', 'not_writable', 'unreadable', 'second_success'))"
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
            f"NOT EXPLAINED: subscription {number} was due, and the run says nothing of it"
            for number in due
            if not (told.get(f"subscription {number}") or "").strip()
        ]

    def chargeable(self, payments: Iterable[Any], as_of: datetime, now: datetime) -> dict[int, datetime]:
        """Subscriptions that an undisturbed run has to charge, without an if or but, each with its old end.

        Ended today or yesterday and nothing was tried for that period; one price; one card, saved by its customer, who
        has no other subscription, on which nothing else was tried today, and which no decline has stopped for good,
        for whatever period. Others may be charged as well. `payments`: all of the provider's.
        """
        today, found, stopped = self.billing_day(as_of), {}, self.hard_declines(payments)
        for row in self.rows(
            "SELECT s.id, s.user_id, s.ended_at, p.duration, p.duration_unit,"
            " (SELECT array_agg(currency::text) FROM prices WHERE plan_id = s.plan_id) AS currencies,"
            " (SELECT array_agg(DISTINCT a.payment_method_id) FROM billing_orchestration.saved_methods a"
            "  WHERE a.subscription_id = s.id) AS kept"
            " FROM subscriptions s JOIN plans p ON p.id = s.plan_id"
            " WHERE s.status = 'ACTIVE' AND p.is_recurring AND s.ended_at IS NOT NULL"
            " AND (SELECT count(*) FROM subscriptions o WHERE o.user_id = s.user_id) = 1"
            " AND NOT EXISTS (SELECT FROM billing_orchestration.renewal_attempts a WHERE a.subscription_id = s.id"
            "                 AND (a.period_start = s.ended_at"
            "                      OR a.state IN ('PLANNED', 'UNKNOWN', 'PENDING', 'REVIEW')))"
            " AND NOT EXISTS (SELECT FROM billing_orchestration.settlements t WHERE t.subscription_id = s.id"
            "                 AND t.kind <> 'refunded' AND t.period_end > s.ended_at)"
            " AND NOT EXISTS (SELECT FROM billing_orchestration.quarantine q"
            "                 WHERE q.subscription_id = s.id AND q.resolved_at IS NULL"
            "                 AND q.kind IN ('unknown_attempt', 'two_active', 'unreadable', 'second_success'))"
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
            if method in self._journal.refunded or method in stopped:
                continue  # the service may not have written it down; the provider says so
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

    def not_charged(self, chargeable: Mapping[int, datetime], payments: Iterable[Any]) -> list[str]:
        """After an undisturbed run: those of them that it did not even try.

        Nor must it, where the database was set back and has lost a charge that may yet be paid.
        """
        lost = {
            (payment.metadata["subscription_id"], payment.metadata["period_start"])
            for payment in payments
            if payment.id in self._journal.lost and payment.status != "canceled"
            and "renewal_attempt_id" in payment.metadata
        }  # fmt: skip
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
            if (number, ended_at) not in tried and (str(number), ended_at.replace(tzinfo=UTC).isoformat()) not in lost
        ]
