"""What must hold of every charge at the wire, before the provider sees it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from billing_orchestration_tests.torture.simulation.judge import Judge

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


class SendsJudge(Judge):
    """At the moment of a POST."""

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
