"""What must hold of every charge at the wire, before the provider sees it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any

from billing_orchestration_tests.torture.simulation.judge import (
    DAY,
    HARD_DECLINES,
    UTC,
    Judge,
    end_of_next_period,
    naive,
)

# The classes of the provider's cancellation reasons, from its documentation and not from the code under test.
FINAL_DECLINES = HARD_DECLINES | frozenset((
    "3d_secure_failed", "invalid_csc", "expired_on_confirmation", "loan_declined", "loan_declined_by_payer",
    "loan_application_expired", "canceled_by_merchant", "expired_on_capture", "deal_expired",
))  # fmt: skip
SOFT_DECLINES = frozenset((
    "insufficient_funds", "issuer_unavailable", "payment_method_limit_exceeded", "internal_timeout",
    "rejected_by_timeout",
))  # fmt: skip
# What autopayment_job's max_overdue_days is by default.
MOST_DAYS_OVERDUE = 30
# What a long run takes, and the clocks of whoever writes rows.
SOME_MINUTES = timedelta(minutes=30)


class SendsJudge(Judge):
    """At the moment of a POST."""

    def wrong_charge(self, key: str, body: str, payments: Iterable[Any], as_of: datetime, now: datetime) -> list[str]:
        """What is wrong with asking for a charge at all, when its key is sent for the first time.

        `payments`: all of the provider's, also those that nobody here has heard of yet.
        """
        document = json.loads(body)
        metadata = document["metadata"]
        rows = self.rows(
            "SELECT s.id, s.user_id, s.plan_id, s.started_at, s.ended_at, p.is_recurring, p.duration, p.duration_unit,"
            " a.id::text AS attempt_id, a.sends, a.period_start, a.last_sent_at"
            " FROM subscriptions s JOIN plans p ON p.id = s.plan_id"
            " JOIN billing_orchestration.renewal_attempts a ON a.subscription_id = s.id"
            " WHERE s.id = %s AND a.idempotence_key::text = %s",
            int(metadata["subscription_id"]), key,
        )  # fmt: skip
        if not rows:
            return []  # `wrong_send` says so
        row = rows[0]
        is_new = row.sends == 1  # an older body may have an older price
        plan_changed_at = self._journal.plan_changed.get(row.plan_id)
        is_as_claimed = not (
            plan_changed_at and row.last_sent_at and plan_changed_at >= row.last_sent_at - self._journal.behind
        )
        moment = now if self._rules.holds("old backfills") else as_of
        payments = list(payments)
        return [
            *self._whose(row, document),
            *self._when(row, moment, now),
            *self._after_what(row, key, metadata, payments, moment),
            *(self._what_for(row, document) if is_new and is_as_claimed else ()),
            *(self._beside_what(row) if self._rules.holds("helping hands") else ()),
            *(self._by_which_card(row, document["payment_method_id"], payments) if is_new else ()),
            *(self._by_a_stopped_card(row, document["payment_method_id"], payments) if is_new else ()),
        ]

    def _whose(self, row: Any, document: Any) -> Iterator[str]:
        # A payment that saved no card is nobody's method: the provider refuses it.
        method_id = document["payment_method_id"]
        owner = self._journal.methods.get(method_id, row.user_id)
        if owner != row.user_id or document["metadata"]["user_id"] != row.user_id:
            yield f"CHARGED A STRANGER: method {method_id} for subscription {row.id} of {row.user_id}"

    def _when(self, row: Any, moment: datetime, now: datetime) -> Iterator[str]:
        began = self.billing_day(row.period_start.replace(tzinfo=UTC))
        if began > self.billing_day(now) or began > self.billing_day(moment):
            yield f"CHARGED EARLY: subscription {row.id} for a period from {began}"
        end = end_of_next_period(self._rules.zone, row.started_at, row.period_start, row.duration, row.duration_unit)
        last = self.billing_day(moment) - self._rules.grace_days * DAY
        if row.period_start == row.ended_at and self.billing_day(end.replace(tzinfo=UTC)) <= last:
            yield f"CHARGED FOR WHAT IS OVER: subscription {row.id} for a period from {began} to {end}"

    def _after_what(
        self, row: Any, key: str, metadata: Any, payments: Iterable[Any], moment: datetime
    ) -> Iterator[str]:
        began = self.billing_day(row.period_start.replace(tzinfo=UTC))
        overdue = (self.billing_day(moment) - began).days
        earlier = [
            payment
            for payment in payments
            if payment.metadata.get("renewal_attempt_id") and payment.idempotence_key != key
            and all(payment.metadata[name] == metadata[name] for name in ("subscription_id", "period_start", "user_id"))
        ]  # fmt: skip
        # A database that was set back knows of no decline since.
        declined = [
            (payment.cancellation or {}).get("reason") for payment in earlier
            if payment.status == "canceled" and payment.id not in self._journal.lost
        ]  # fmt: skip
        if any(payment.status != "canceled" for payment in earlier):
            yield f"CHARGED AGAIN: subscription {row.id} has an uncanceled payment for {began} already"
        if any(reason in FINAL_DECLINES for reason in declined):
            yield f"CHARGED IN VAIN: subscription {row.id} for {began} after {declined}"
        if sum(reason not in FINAL_DECLINES and reason not in SOFT_DECLINES for reason in declined) >= 3:
            yield f"CHARGED TOO OFTEN: subscription {row.id} for {began} after {declined}"
        if overdue > (self._rules.grace_days if declined else MOST_DAYS_OVERDUE):
            yield f"CHARGED TOO LATE: subscription {row.id}, {overdue} days overdue, after {declined}"

    def _what_for(self, row: Any, document: Any) -> Iterator[str]:
        if not row.is_recurring:
            yield f"CHARGED UNWANTED: the plan of subscription {row.id} is not recurring"
        asked = (document["amount"]["value"], document["amount"]["currency"])
        prices = [
            (f"{price.amount:.2f}", price.currency)
            for price in self.rows(
                "SELECT amount, currency::text AS currency FROM prices WHERE plan_id = %s", row.plan_id
            )
            if price.currency == asked[1]
        ]
        if prices != [asked]:
            yield f"CHARGED WRONGLY: subscription {row.id} {asked}, the plan's prices are {prices}"

    def _beside_what(self, row: Any) -> Iterator[str]:
        for other in self.rows(
            "SELECT id, state FROM billing_orchestration.renewal_attempts WHERE subscription_id = %s AND id::text <> %s"
            " AND (state IN ('UNKNOWN', 'PENDING', 'REVIEW') OR (state = 'PLANNED' AND first_sent_at IS NOT NULL))",
            row.id, row.attempt_id,
        ):  # fmt: skip
            yield f"CHARGED BESIDE AN OPEN CHARGE: subscription {row.id}, whose attempt {other.id} is {other.state}"
        for paid in self.rows(
            "SELECT external_payment_id AS id, period_end FROM billing_orchestration.settlements"
            " WHERE subscription_id = %s AND kind <> 'refunded' AND period_end > %s",
            row.id, row.period_start,
        ):  # fmt: skip
            yield (
                f"CHARGED WITHIN A PAID PERIOD: subscription {row.id} from {row.period_start}, and {paid.id} has paid"
                f" until {paid.period_end}"
            )
        for later in self.rows(
            "SELECT o.id, o.ended_at FROM subscriptions o JOIN subscriptions s ON s.id = %s"
            " AND o.user_id = s.user_id AND o.plan_id = s.plan_id AND o.id <> s.id"
            " WHERE o.status = 'ACTIVE' AND o.ended_at > s.ended_at",
            row.id,
        ):
            yield f"CHARGED BESIDE A LATER ONE: subscription {row.id}, and {later.id} of its plan ends {later.ended_at}"

    def _by_which_card(self, row: Any, method_id: str, payments: Iterable[Any]) -> Iterator[str]:
        """Only what was there some minutes before: what happens during a run may come too late for it."""
        if not self._rules.holds("newer cards") or row.last_sent_at is None:
            return
        by_id = {payment.id: payment for payment in payments}
        purchases = [
            (by_id[paid.id], paid.status)
            for paid in self.rows(
                "SELECT external_payment_id AS id, status::text AS status FROM payments WHERE subscription_id = %s"
                " AND status IN ('SUCCEEDED', 'REFUNDED') AND updated_at < %s ORDER BY created_at, id",
                row.id, naive(row.last_sent_at - SOME_MINUTES),
            )
            if paid.id in by_id and "renewal_attempt_id" not in by_id[paid.id].metadata
        ]  # fmt: skip
        saved = [payment for payment, status in purchases if payment.method_saved and status == "SUCCEEDED"]
        used = max((payment.created_at for payment in saved if payment.method_id == method_id), default=None)
        # One that the provider has refunded does not count, whether or not the service's row says so yet.
        newer = [
            (payment.created_at, payment.method_id) for payment in saved
            if used is not None and payment.created_at > used and payment.refunded < payment.amount
        ]  # fmt: skip
        if newer:
            yield f"CHARGED AN OLD CARD: subscription {row.id} by {method_id}, and its newest is {max(newer)[1]}"
        refunded = {payment.method_id for payment, status in purchases if payment.method_saved and status == "REFUNDED"}
        if method_id in refunded - {payment.method_id for payment in saved}:
            yield f"CHARGED A REFUNDED CARD: subscription {row.id} by {method_id}, whose purchase was refunded"

    def _by_a_stopped_card(self, row: Any, method_id: str, payments: Iterable[Any]) -> Iterator[str]:
        """Only what was written down some minutes before: another run may hear of it while this one is under way."""
        if row.last_sent_at is None:
            return
        declines = {
            payment.metadata["renewal_attempt_id"]: payment for payment in self.hard_declines(payments)[method_id]
        }
        for told in self.rows(
            "SELECT id::text AS id, closed_at FROM billing_orchestration.renewal_attempts"
            " WHERE id::text = ANY(%s) AND id::text <> %s AND closed_at < %s",
            list(declines), row.attempt_id, row.last_sent_at - SOME_MINUTES,
        ):  # fmt: skip
            yield (
                f"CHARGED A STOPPED CARD: subscription {row.id} by {method_id}, which was declined for good"
                f" at {told.closed_at}: {declines[told.id].cancellation}"
            )

    def _changed_since(self, subscription_id: int, instant: datetime) -> bool:
        instant -= self._journal.behind
        touched = self._journal.touched.get(subscription_id)
        settled = self.rows(
            "SELECT 1 FROM billing_orchestration.settlements WHERE subscription_id = %s AND settled_at >= %s",
            subscription_id, instant,
        )  # fmt: skip
        return bool(settled) or (touched is not None and touched >= instant)

    def periods_asked_for(self, key: str) -> list[tuple[int, str]]:
        """What a charge pays for: its plan's period as the run saw it last; two if it was changed just then."""
        rows = self.rows(
            "SELECT p.id, p.duration, p.duration_unit, a.last_sent_at FROM billing_orchestration.renewal_attempts a"
            " JOIN plans p ON p.id = a.plan_id WHERE a.idempotence_key::text = %s",
            key,
        )
        if not rows:
            return []
        plan, journal = rows[0], self._journal
        found = [(plan.duration, plan.duration_unit)]
        changed_at = max(journal.period_changed.get(plan.id, ()), default=None)
        if changed_at and plan.last_sent_at and changed_at >= plan.last_sent_at - journal.behind:
            found.append(journal.period_before[plan.id])
        return found

    def claimed_at(self, key: str) -> datetime | None:
        """When the run that is about to send a key has claimed it, by PostgreSQL's clock."""
        rows = self.rows(
            "SELECT last_sent_at FROM billing_orchestration.renewal_attempts WHERE idempotence_key::text = %s", key
        )
        claimed_at: datetime | None = rows[0].last_sent_at if rows else None
        return claimed_at

    def wrong_send(self, key: str, body: str, began: datetime) -> list[str]:
        """What is wrong with a charge that is about to be sent, by the tables as they are committed at this moment.

        `began` (aware UTC): when the run did that sends it.
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
        if row.last_sent_at is not None and row.last_sent_at < began - self._journal.behind:
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
