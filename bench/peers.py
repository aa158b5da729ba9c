"""Three of the jobs beside plain workers, as one would write them with the SDK and an ORM.

One session, one row at a time, a commit after each: read what is due, ask or pay the provider, change the row. They
keep no audit trail, take no locks, check nothing again, and leave rows wrong when they are killed or meet a webhook; so
the ratio says what a plain loop costs, not what it is worth. Written for this bench.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

from sqlalchemy import Engine, create_engine, select
from sqlalchemy.dialects.postgresql import ENUM
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from bench import charging, expiry, matching
from bench.measuring import Round, Row, interleaved, run_module, values
from bench.provider import provider
from bench.stage import Database

CHARGES, SLICE, REPAIR, OVER = 300, 2000, 100, 2000
LATENCY_S = 0.05


def _labels(name: str) -> ENUM:
    labels = {
        "subscriptionstatusenum": ("CREATED", "ACTIVE", "EXPIRED", "CANCELED", "PAUSED", "DELETED"),
        "paymentmethodsenum": ("BANK_CARD", "YOO_MONEY", "SBERBANK", "TINKOFF_BANK", "SBP"),
        "paymentstatusenum": ("CREATED", "PENDING", "SUCCEEDED", "EXPIRED", "CANCELED", "REFUNDED"),
        "currencyenum": ("RUB", "USD", "EUR"),
    }
    return ENUM(*labels[name], name=name, create_type=False)


class Base(DeclarativeBase):
    """The tables, as far as the workers use them."""


class Subscription(Base):
    """A subscription."""

    __tablename__ = "subscriptions"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str]
    status: Mapped[str] = mapped_column(_labels("subscriptionstatusenum"))
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime]
    plan_id: Mapped[int]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class Payment(Base):
    """A payment."""

    __tablename__ = "payments"
    id: Mapped[int] = mapped_column(primary_key=True)
    subscription_id: Mapped[int | None]
    payment_provider_id: Mapped[int]
    payment_method: Mapped[str | None] = mapped_column(_labels("paymentmethodsenum"))
    status: Mapped[str] = mapped_column(_labels("paymentstatusenum"))
    currency: Mapped[str] = mapped_column(_labels("currencyenum"))
    amount: Mapped[Decimal]
    external_payment_id: Mapped[str | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(tzinfo=None)


def charge(engine: Engine) -> int:
    """The autopayment worker."""
    from yookassa import Payment as Provider

    now, done = charging.NOW.replace(tzinfo=None), 0
    with Session(engine, expire_on_commit=False) as session:
        due = select(Subscription).where(Subscription.status == "ACTIVE", Subscription.ended_at <= now)
        for subscription in session.scalars(due).all():
            saved = session.scalars(
                select(Payment)
                .where(Payment.subscription_id == subscription.id, Payment.status == "SUCCEEDED")
                .order_by(Payment.created_at.desc())
            ).first()
            if saved is None:
                continue
            paid = Provider.create(
                {
                    "amount": {"value": str(saved.amount), "currency": saved.currency},
                    "payment_method_id": saved.external_payment_id,
                    "capture": True,
                    "metadata": {"user_id": subscription.user_id, "plan_id": subscription.plan_id},
                },
                str(uuid.uuid4()),
            )
            if paid.status != "succeeded":
                continue
            session.add(
                Payment(
                    subscription_id=subscription.id,
                    payment_provider_id=saved.payment_provider_id,
                    payment_method=saved.payment_method,
                    status="SUCCEEDED",
                    currency=saved.currency,
                    amount=saved.amount,
                    external_payment_id=paid.id,
                    created_at=_now(),
                    updated_at=_now(),
                )
            )
            subscription.ended_at += timedelta(days=30)
            session.commit()
            done += 1
    return done


def match(engine: Engine) -> int:
    """The worker that matches pending payments."""
    from yookassa import Payment as Provider

    end, done = matching.START + timedelta(hours=1), 0
    asked: dict[str, object] = {
        "status": "succeeded",
        "limit": 100,
        "created_at.gte": matching._text(matching.START),
        "created_at.lte": matching._text(end),
    }
    paid: list[Any] = []
    while True:
        page = Provider.list(asked)
        paid += page.items
        if not page.next_cursor:
            break
        asked["cursor"] = page.next_cursor
    with Session(engine, expire_on_commit=False) as session:
        for there in paid:
            row = session.scalars(
                select(Payment).where(Payment.external_payment_id == there.id, Payment.status == "PENDING")
            ).first()
            if row is None:
                continue
            subscription = Subscription(
                user_id=there.metadata["user_id"],
                status="ACTIVE",
                started_at=_now(),
                ended_at=_now() + timedelta(days=30),
                plan_id=int(there.metadata["plan_id"]),
                created_at=_now(),
                updated_at=_now(),
            )
            session.add(subscription)
            session.flush()
            row.status, row.subscription_id, row.updated_at = "SUCCEEDED", subscription.id, _now()
            session.commit()
            done += 1
    return done


def expire(engine: Engine) -> int:
    """The worker that expires subscriptions."""
    before, done = datetime(2026, 3, 10, tzinfo=timezone.utc).replace(tzinfo=None), 0
    with Session(engine, expire_on_commit=False) as session:
        over = select(Subscription).where(Subscription.status == "ACTIVE", Subscription.ended_at < before)
        for subscription in session.scalars(over).all():
            subscription.status, subscription.updated_at = "EXPIRED", _now()
            session.commit()
            done += 1
    return done


def measure(server: Database, rounds: int) -> tuple[dict[str, list[Round]], list[Row]]:
    """The rounds and the table's lines."""
    expiry.fill(server.create("expiry", "billing"), OVER * expiry.DUE_SHARE)
    matching.fill(server.create("matching", "billing"), SLICE, REPAIR, SLICE * 10)
    charging.fill(server.create("charging", "billing"), CHARGES)
    done: dict[str, list[Round]] = {}
    with provider(LATENCY_S, matching.history(SLICE)) as api_url:

        def side(what: str, who: str) -> Mapping[str, float]:
            url = server.create("work", what)
            if who == "plain":
                told = run_module("bench.peers", what, url, api_url).told
            elif what == "expiry":
                told = run_module("bench.expiry", "subscriptions", url).told
            elif what == "matching":
                told = run_module("bench.matching", "pending", url, api_url).told
            else:
                told = run_module("bench.charging", "ours", url, api_url, 64).told
                told = {**told, "rows": told["charges"]}
            count = {"expiry": OVER, "matching": REPAIR, "charging": CHARGES}[what]
            assert told["rows"] == count, told
            return {"row_ms": told["wall_s"] / count * 1000}

        for what in ("expiry", "matching", "charging"):
            done[what] = interleaved(
                rounds, {who: (lambda what=what, who=who: side(what, who)) for who in ("ours", "plain")}
            )
    for name in ("work", "expiry", "matching", "charging"):
        server.drop(name)
    told = {
        "expiry": f"expiring {OVER:,} subscriptions",
        "matching": f"matching {SLICE:,} payments at {LATENCY_S * 1000:.0f} ms, {REPAIR} to repair",
        "charging": f"charging {CHARGES} at {LATENCY_S * 1000:.0f} ms, 64 in flight",
    }
    rows = []
    for what, rounds_of in done.items():
        faster = tuple(round_["plain"]["row_ms"] / round_["ours"]["row_ms"] for round_ in rounds_of)
        rows.append(Row(f"{told[what]}: how many times faster", "a plain worker, row by row", "", faster))
        rows.append(Row("the same: a row here", "", "", values(rounds_of, "row_ms", "ours"), " ms"))
        rows.append(Row("the same: a row there", "", "", values(rounds_of, "row_ms", "plain"), " ms"))
    return done, rows


def main(arguments: Sequence[str]) -> None:
    """WHAT URL API_URL: one plain worker; imports are not counted."""
    from yookassa import Configuration

    what, url, api_url = arguments
    Configuration.configure("100500", "live_bench", api_url=api_url)
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    worker = {"charging": charge, "matching": match, "expiry": expire}[what]
    began = time.monotonic()
    rows = worker(engine)
    print(json.dumps({"wall_s": time.monotonic() - began, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
