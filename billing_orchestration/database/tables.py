"""The tables, as SQLAlchemy sees them: the service's own (names and types are facts) and ours.

The service's tables live in `public` and belong to the service: it goes on writing to them, and nothing here but
`migrate` on an empty database ever creates them. Their timestamps are `timestamp without time zone` holding UTC;
`UtcNaive` turns them into aware UTC instants and back, so that no naive instant is seen in Python.
Everything of ours lives in the schema `billing_orchestration`, with `timestamptz`.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from billing_orchestration.database.conventions import SCHEMA, naive_utc, sql_list
from billing_orchestration.domain.attempts import ALL_STATES, LIVE, OPEN, State
from billing_orchestration.domain.declines import HARD


class UtcNaive(sa.types.TypeDecorator[datetime]):
    """`timestamp without time zone` holding UTC <-> aware UTC datetime."""

    impl = sa.DateTime(timezone=False)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:  # noqa: ARG002  # SQLAlchemy's signature
        """Refuse a naive instant, store an aware one as naive UTC."""
        return None if value is None else naive_utc(value)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:  # noqa: ARG002  # SQLAlchemy's signature
        """Return an aware UTC instant."""
        return None if value is None else value.replace(tzinfo=timezone.utc)


service = sa.MetaData()

subscription_status = pg.ENUM(
    "CREATED", "ACTIVE", "EXPIRED", "CANCELED", "PAUSED", "DELETED",
    name="subscriptionstatusenum", metadata=service,
)  # fmt: skip
payment_method = pg.ENUM(
    "BANK_CARD", "YOO_MONEY", "SBERBANK", "TINKOFF_BANK", "SBP",
    name="paymentmethodsenum", metadata=service,
)  # fmt: skip
payment_status = pg.ENUM(
    "CREATED", "PENDING", "SUCCEEDED", "EXPIRED", "CANCELED", "REFUNDED",
    name="paymentstatusenum", metadata=service,
)  # fmt: skip
currency = pg.ENUM("RUB", "USD", "EUR", name="currencyenum", metadata=service)

plans = sa.Table(
    "plans",
    service,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("description", sa.String),
    sa.Column("is_active", sa.Boolean),
    sa.Column("is_recurring", sa.Boolean),
    sa.Column("duration", sa.Integer),
    sa.Column("duration_unit", sa.String),
    sa.Column("created_at", UtcNaive, nullable=False),
    sa.Column("updated_at", UtcNaive, nullable=False),
)
prices = sa.Table(
    "prices",
    service,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("plan_id", sa.ForeignKey("plans.id"), nullable=False),
    sa.Column("currency", currency),
    sa.Column("amount", sa.Numeric(8, 2), nullable=False),
)
payment_providers = sa.Table(
    "payment_providers",
    service,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("description", sa.String),
    sa.Column("is_active", sa.Boolean),
    sa.Column("created_at", UtcNaive, nullable=False),
    sa.Column("updated_at", UtcNaive, nullable=False),
)
subscriptions = sa.Table(
    "subscriptions",
    service,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("user_id", sa.String, nullable=False),
    sa.Column("status", subscription_status),
    sa.Column("started_at", UtcNaive),
    sa.Column("ended_at", UtcNaive),
    sa.Column("plan_id", sa.ForeignKey("plans.id")),
    sa.Column("created_at", UtcNaive, nullable=False),
    sa.Column("updated_at", UtcNaive, nullable=False),
)
payments = sa.Table(
    "payments",
    service,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("subscription_id", sa.ForeignKey("subscriptions.id")),
    sa.Column("payment_provider_id", sa.ForeignKey("payment_providers.id"), nullable=False),
    sa.Column("payment_method", payment_method),
    sa.Column("status", payment_status),
    sa.Column("currency", currency),
    sa.Column("amount", sa.Numeric(8, 2), nullable=False),
    sa.Column("external_payment_id", sa.String),
    sa.Column("created_at", UtcNaive, nullable=False),
    sa.Column("updated_at", UtcNaive, nullable=False),
    sa.CheckConstraint("amount > 0", name="payments_amount_check"),
)

ours = sa.MetaData(schema=SCHEMA)
Instant = sa.DateTime(timezone=True)


renewal_attempts = sa.Table(
    "renewal_attempts",
    ours,
    sa.Column("id", sa.Uuid, primary_key=True),
    # No foreign keys into the service's tables: the service may delete its rows, our record of a charge stays.
    sa.Column("subscription_id", sa.BigInteger, nullable=False),
    sa.Column("period_start", UtcNaive, nullable=False, comment="the old ended_at"),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("idempotence_key", sa.Uuid, nullable=False, unique=True),
    sa.Column("body", sa.Text, nullable=False, comment="the exact JSON text that is sent, frozen with the key"),
    sa.Column("amount", sa.Numeric(8, 2), nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("plan_id", sa.BigInteger, nullable=False),
    sa.Column("payment_provider_id", sa.BigInteger, nullable=False),
    sa.Column("payment_method_id", sa.Text, nullable=False),
    sa.Column("planned_at", Instant, nullable=False),
    sa.Column("first_sent_at", Instant, comment="committed before the first send; NULL: certainly never sent"),
    sa.Column("last_sent_at", Instant),
    sa.Column("sends", sa.Integer, nullable=False, server_default="0"),
    sa.Column(
        "unanswered", sa.Boolean, nullable=False, server_default="false",
        comment="the last send was claimed, and nothing says that the provider has finished with it",
    ),
    sa.Column("external_payment_id", sa.Text, comment="the provider's id of the NEW payment"),
    sa.Column("decline_party", sa.Text),
    sa.Column("decline_reason", sa.Text, comment="the provider's own word, as received"),
    sa.Column("decline_class", sa.Text),
    sa.Column("last_error", sa.Text, comment="what the last answer, or its absence, said"),
    sa.Column("first_absent_at", Instant, comment="the first complete scan that did not find the attempt"),
    sa.Column("closed_at", Instant),
    sa.Column("run_id", sa.Text, nullable=False, comment="the Dagster run that planned it"),
    sa.Column("shop_id", sa.Text, comment="the shop that it is charged by; NULL: planned before revision 0009"),
    sa.Column("period_count", sa.Integer, comment="the period that is paid for, frozen with the price"),
    sa.Column("period_unit", sa.Text),
    sa.CheckConstraint(f"state IN {sql_list(*ALL_STATES)}", name="renewal_attempts_state_check"),
    sa.UniqueConstraint("subscription_id", "period_start", "number", name="renewal_attempts_identity"),
    sa.Index(
        "renewal_attempts_one_live_per_period", "subscription_id", "period_start",
        unique=True, postgresql_where=sa.text(f"state IN {sql_list(*LIVE)}"),
    ),
    sa.Index(
        "renewal_attempts_open", "state", "subscription_id",
        postgresql_where=sa.text(f"state IN {sql_list(*OPEN, State.REVIEW)}"),
    ),
    sa.Index("renewal_attempts_external_payment_id", "external_payment_id"),
    sa.Index("renewal_attempts_last_sent_at", "last_sent_at"),
    sa.Index(
        "renewal_attempts_stopped_methods", "payment_method_id",
        postgresql_where=sa.text(f"state = '{State.STOPPED}' AND decline_class = '{HARD}'"),
    ),
    sa.Index(
        "renewal_attempts_closed_at", "closed_at", postgresql_using="brin", postgresql_with={"pages_per_range": 32}
    ),
)  # fmt: skip

settlements = sa.Table(
    "settlements",
    ours,
    sa.Column("external_payment_id", sa.Text, primary_key=True, comment="one grant per provider payment: this key"),
    sa.Column("kind", sa.Text, nullable=False, comment="renewed | extended | created | refunded"),
    sa.Column("payment_id", sa.BigInteger, nullable=False),
    sa.Column("subscription_id", sa.BigInteger),
    sa.Column("attempt_id", sa.Uuid),
    sa.Column("user_id", sa.Text),
    sa.Column("plan_id", sa.BigInteger),
    sa.Column("amount", sa.Numeric(8, 2), nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("period_start", UtcNaive),
    sa.Column("period_end", UtcNaive),
    sa.Column("settled_at", Instant, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Index("settlements_subscription_id", "subscription_id"),
    sa.Index("settlements_settled_at", "settled_at", postgresql_using="brin", postgresql_with={"pages_per_range": 32}),
)

saved_methods = sa.Table(
    "saved_methods",
    ours,
    sa.Column("subscription_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("payment_method_id", sa.Text, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("payment_provider_id", sa.BigInteger, nullable=False),
    sa.Column("saved_by_external_payment_id", sa.Text, nullable=False),
    sa.Column("saved_at", Instant, nullable=False),
)

asked_methods = sa.Table(
    "asked_methods",
    ours,
    sa.Column("payment_provider_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("about", sa.Text, primary_key=True, comment="payment | method"),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("answer", sa.Text, nullable=False),
    sa.Column("payment_method_id", sa.Text, comment="what is charged"),
    sa.Column("asked_at", Instant, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
)

quarantine = sa.Table(
    "quarantine",
    ours,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("problem_key", sa.Text, nullable=False, comment="subject and kind: one open entry per problem"),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("external_payment_id", sa.Text),
    sa.Column("payment_id", sa.BigInteger),
    sa.Column("subscription_id", sa.BigInteger),
    sa.Column("attempt_id", sa.Uuid),
    sa.Column("evidence", pg.JSONB, nullable=False),
    sa.Column("job", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("opened_at", Instant, nullable=False),
    sa.Column("resolved_at", Instant),
    sa.Column("resolution", sa.Text, comment="settled | ignored | accepted | attached"),
    sa.Column("resolution_reason", sa.Text),
    sa.Column("resolved_by", sa.Text),
    sa.Index(
        "quarantine_one_open_per_problem", "problem_key",
        unique=True, postgresql_where=sa.text("resolved_at IS NULL"),
    ),
    sa.Index("quarantine_external_payment_id", "external_payment_id"),
    sa.Index("quarantine_problem_key", "problem_key"),
)  # fmt: skip

reconciled_days = sa.Table(
    "reconciled_days",
    ours,
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("starts_at", Instant, nullable=False),
    sa.Column("ends_at", Instant, nullable=False),
    sa.Column("lines", sa.Integer, nullable=False),
    sa.Column("differences", sa.Integer, nullable=False, comment="left after repairs"),
    sa.Column("unexplained", sa.Integer, nullable=False, comment="of them, those that are before nobody"),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("reconciled_at", Instant, nullable=False),
)

watermarks = sa.Table(
    "watermarks",
    ours,
    sa.Column("job", sa.Text, primary_key=True),
    sa.Column("covered_until", Instant, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("updated_at", Instant, nullable=False),
)

audit_trail = sa.Table(
    "audit_trail",
    ours,
    sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
    sa.Column("at", Instant, nullable=False),
    sa.Column("job", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("entity", sa.Text, nullable=False, comment="subscription | payment | attempt | quarantine"),
    sa.Column("entity_id", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("old", pg.JSONB),
    sa.Column("new", pg.JSONB),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("external_payment_id", sa.Text),
    # An expiry writes a hundred thousand entries, and an index on them costs a good part of the UPDATE that they are
    # about. This key finds an entity's entries too; a run's are among those of its time.
    sa.PrimaryKeyConstraint("entity_id", "id", name="audit_trail_pkey"),
    sa.Index("audit_trail_at", "at", postgresql_using="brin", postgresql_with={"pages_per_range": 32}),
    sa.Index(
        "audit_trail_external_payment_id",
        "external_payment_id",
        postgresql_where=sa.text("external_payment_id IS NOT NULL"),
    ),
)
