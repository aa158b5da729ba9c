"""Reconciliation: both sides' books of one day, line by line, each line in exactly one class, and sums that close.

A line is a payment or a refund. A payment belongs to the day on which it succeeded (one that did not: on which it was
created), a refund to the day on which it was asked for. So the days of a month add up to the month.

The two sides are frames: a line of the provider's each, a row of ours each. Amounts are whole kopecks (cents), so that
sums are exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import (
    CANCELED,
    SUCCEEDED,
    ProviderPayment,
    ProviderRefund,
    UnusablePayment,
)
from billing_orchestration.domain.reconciled import (
    AGREES,
    AMOUNT_DIFFERS,
    CANCELED_THERE,
    CLASSES,
    DOUBLED_HERE,
    FOREIGN,
    GRANTED_TO_NOBODY,
    NOT_PAID_THERE,
    PAID_THERE,
    QUIET,
    REFUNDED_HERE,
    REFUNDED_THERE,
    UNREADABLE,
    Day,
)

PAYMENT, REFUND = "payment", "refund"
# What is not at the provider at all, and what it shows in a form that nobody can read.
ABSENT, UNREAD = "absent", "unreadable"
_OPEN_ROWS = ("PENDING", "CREATED", "")
# The row that stands for a payment, of several with its id: the first of these.
_RANK = {status: rank for rank, status in enumerate(("SUCCEEDED", "REFUNDED", "PENDING", "CREATED", "EXPIRED"))}

# A line of the provider's. `in_full`: its payment was refunded in full. `ours`: its metadata has one of our keys.
# `attempt`: it names a renewal attempt. `known`: its payment could be read, which matters for a refund.
THERE = ("line", "id", "payment_id", "at", "there", "kopecks", "currency", "fee", "in_full", "ours", "attempt", "known")
# A row of the service's payments. `payment_id` is never null: a row without the provider's id has one of its own.
HERE = ("row", "payment_id", "status", "kopecks", "currency", "linked", "at")
# What is added up, by class and currency.
SUMS = ("paid_there", "fee", "refunded_there", "paid_here", "refunded_here")


def to_kopecks(amount: Decimal) -> int:
    """An amount with two places, as whole kopecks."""
    return int(amount.scaleb(2))


def to_amount(kopecks: int) -> Decimal:
    """Whole kopecks as an amount with two places."""
    return Decimal(int(kopecks)).scaleb(-2)


# --- the two sides as frames --------------------------------------------------------------------------------------


def there_frame(
    payments: Iterable[ProviderPayment],
    refunds: Iterable[ProviderRefund],
    unusable: Sequence[UnusablePayment],
    day: Day,
) -> pd.DataFrame:
    """The provider's side: a day's payments and refunds, and older payments that its refunds and our rows name."""
    known = {payment.id: payment for payment in payments}
    lines: list[tuple[Any, ...]] = [_payment_line(payment) for payment in known.values()]
    lines += [_refund_line(refund, known.get(refund.payment_id)) for refund in refunds]
    for number, item in enumerate(unusable):
        name = item.payment_id if item.payment_id and item.payment_id not in known else f"\x00unreadable {number}"
        lines.append((PAYMENT, name, name, day.start, UNREAD, 0, "", 0, False, True, False, False))
    frame = pd.DataFrame(lines, columns=list(THERE))
    frame["at"] = pd.to_datetime(frame["at"], utc=True)
    return frame.astype({"kopecks": "int64", "fee": "int64", **dict.fromkeys(THERE[8:], "bool")})


def _payment_line(payment: ProviderPayment) -> tuple[Any, ...]:
    amount, income = payment.money.amount, payment.income_amount
    return (
        PAYMENT,
        payment.id,
        payment.id,
        day_instant(payment),
        payment.status,
        to_kopecks(amount),
        payment.money.currency,
        0 if income is None else to_kopecks(amount - income),
        payment.refunded_in_full,
        payment.is_ours,
        payment.claims.names_an_attempt,
        True,
    )


def _refund_line(refund: ProviderRefund, payment: ProviderPayment | None) -> tuple[Any, ...]:
    money = refund.money
    about = (
        (payment.refunded_in_full, payment.is_ours, payment.claims.names_an_attempt, True)
        if payment is not None
        else (False, True, False, False)
    )
    return (REFUND, refund.id, refund.payment_id, refund.created_at, refund.status, to_kopecks(money.amount),
            money.currency, 0, *about)  # fmt: skip


def day_instant(payment: ProviderPayment) -> datetime:
    """The instant by which a payment belongs to a day: its success, else its creation."""
    return payment.succeeded_at if payment.status == SUCCEEDED else payment.created_at


def here_frame(rows: Iterable[tuple[Any, ...]]) -> pd.DataFrame:
    """Our side: rows of the service's payments, as HERE names their columns, once each."""
    frame = pd.DataFrame(list(rows), columns=list(HERE)).drop_duplicates("row")
    frame = frame.assign(
        status=frame["status"].fillna(""),
        currency=frame["currency"].fillna(""),
        at=pd.to_datetime(frame["at"], utc=True),
    )
    names = frame["payment_id"]
    frame["payment_id"] = names.where(names.notna(), "\x00row " + frame["row"].astype(str))
    return frame.astype({"row": "int64", "kopecks": "int64", "linked": "bool"})


def _by_payment(here: pd.DataFrame) -> pd.DataFrame:
    """One line for each payment that rows name: the row that stands for it, and what the others say."""
    rows = here.assign(
        succeeded=here["status"] == "SUCCEEDED",
        refunded=here["status"] == "REFUNDED",
        rank=here["status"].map(_RANK).fillna(len(_RANK)) - here["linked"] / 2,
    ).sort_values(["rank", "row"])
    rows["paid_kopecks"] = rows["kopecks"].where(rows["succeeded"] | rows["refunded"], 0)
    numbers = ["rows", "succeeded", "refunded", "paid_kopecks"]
    counts = rows.assign(rows=1).groupby("payment_id", sort=False)[numbers].sum().reset_index()
    holders = rows.drop_duplicates("payment_id").rename(
        columns={"status": "here", "kopecks": "kopecks_here", "currency": "currency_here", "at": "at_here"}
    )
    wanted = ["payment_id", "row", "here", "kopecks_here", "currency_here", "linked", "at_here"]
    return holders[wanted].merge(counts, on="payment_id")


# --- the diff -----------------------------------------------------------------------------------------------------


def reconcile(there: pd.DataFrame, here: pd.DataFrame, settled: Collection[str], day: Day) -> pd.DataFrame:
    """Compare both sides of a day. Each line comes out once, with its `class`, and what it adds to the SUMS.

    `there` and `here`: see THERE and HERE. `here` holds every row of the payments in `there`, and `there` every payment
    that a paid row in `here` names, if the provider knows it. `settled`: which payments are in our settlements.
    A payment of another day that a row of this day brings along is a line only where it differs, and only if that day
    is not compared as well (`day.since`).
    """
    lines = there.merge(_by_payment(here), on="payment_id", how="outer", validate="m:1")
    lines = _filled(lines)
    lines["class"] = _classes(lines, lines["payment_id"].isin(list(settled)).to_numpy())
    own = (lines["at"] >= pd.Timestamp(day.start)) & (lines["at"] < pd.Timestamp(day.end))
    brought = (lines["line"] == PAYMENT) & (lines["at"] < pd.Timestamp(day.since)) & ~lines["class"].isin(QUIET)
    lines = lines[own | brought].reset_index(drop=True)
    is_payment, succeeded = lines["line"] == PAYMENT, lines["there"] == SUCCEEDED
    # What belongs to another day was added up there.
    counted = (lines["at"] >= pd.Timestamp(day.start)) | ~succeeded
    agreed_refund = ~is_payment & succeeded & (lines["class"] == AGREES)
    wrong_refund = is_payment & (lines["class"] == REFUNDED_HERE)
    return lines.assign(
        paid_there=lines["kopecks"].where(is_payment & succeeded & counted, 0),
        fee=lines["fee"].where(is_payment & succeeded & counted, 0),
        refunded_there=lines["kopecks"].where(~is_payment & succeeded, 0),
        paid_here=lines["paid_kopecks"].where(is_payment & counted, 0),
        refunded_here=lines["kopecks"].where(agreed_refund, lines["kopecks_here"].where(wrong_refund, 0)),
    )


def _filled(lines: pd.DataFrame) -> pd.DataFrame:
    """The outer join without holes: what the provider does not have is a payment that is absent there."""
    is_here_only = lines["line"].isna()
    lines["at"] = lines["at"].where(~is_here_only, lines["at_here"])
    # What has no id of the provider's is shown without one.
    names = lines["payment_id"].where(~lines["payment_id"].str.startswith("\x00"), "")
    lines["id"] = lines["id"].where(lines["line"] == REFUND, names)
    holes: dict[str, Any] = {"line": PAYMENT, "there": ABSENT, "currency": "", "here": "", "currency_here": ""}
    numbers = ("kopecks", "fee", "row", "kopecks_here", "rows", "succeeded", "refunded", "paid_kopecks")
    flags = ("in_full", "ours", "attempt", "known", "linked")
    lines = lines.fillna({**holes, **dict.fromkeys(numbers, 0)})
    for flag in flags:
        lines[flag] = lines[flag] == True  # noqa: E712 - a hole is no
    return lines.drop(columns="at_here").astype(dict.fromkeys(numbers, "int64"))


def _classes(lines: pd.DataFrame, settled: Any) -> Any:
    """The class of each line: the first condition that holds. Every line has one."""
    is_payment = (lines["line"] == PAYMENT).to_numpy()
    there = {status: (lines["there"] == status).to_numpy() for status in (SUCCEEDED, CANCELED, UNREAD)}
    paid = there[SUCCEEDED]
    in_full, ours, attempt, known, linked = (
        lines[name].to_numpy() for name in ("in_full", "ours", "attempt", "known", "linked")
    )
    rows, succeeded, refunded = (lines[name].to_numpy() for name in ("rows", "succeeded", "refunded"))
    other_money = (
        (lines["kopecks"] != lines["kopecks_here"]) | (lines["currency"] != lines["currency_here"])
    ).to_numpy()
    is_open = (rows > 0) & lines["here"].isin(_OPEN_ROWS).to_numpy()
    nobodys = ~ours & (rows == 0) & ~settled
    conditions: list[tuple[Any, Any]] = [
        (there[UNREAD], UNREADABLE),
        # Refunds.
        (~is_payment & ~paid, AGREES),
        (~is_payment & ~known, UNREADABLE),
        (~is_payment & (refunded > 0), np.where(in_full, AGREES, REFUNDED_HERE)),
        (~is_payment, np.where(nobodys, FOREIGN, REFUNDED_THERE)),
        # Payments that the provider took no money for.
        (~paid & (succeeded > 0), NOT_PAID_THERE),
        (~paid & (refunded > 0), REFUNDED_HERE),
        (there[CANCELED] & is_open, CANCELED_THERE),
        (~paid, AGREES),
        # Payments that it did take money for.
        (succeeded + refunded == 0, np.where(nobodys, FOREIGN, PAID_THERE)),
        (succeeded + refunded > 1, DOUBLED_HERE),
        ((succeeded > 0) & ~linked & ~settled, GRANTED_TO_NOBODY),
        # The service's webhook wrote the row; our attempt is still open.
        (attempt & ~settled, PAID_THERE),
        (other_money, AMOUNT_DIFFERS),
        (refunded > 0, np.where(in_full, AGREES, REFUNDED_HERE)),
        (succeeded == 1, AGREES),
    ]
    classes: Any = np.select([condition for condition, _ in conditions], [name for _, name in conditions], default="")
    assert (classes != "").all(), "a line without a class"  # noqa: S101 - a line in no class is a fault of this module
    return classes


# --- one line in words -------------------------------------------------------------------------------------------


def subject_of(line: Any) -> str:
    """How a person reads a line: by the provider's id, else by our row."""
    return f"{line.line} {line.id}" if line.id else f"payment {line.row}" if line.row else "an item without an id"


def money_of(line: Any) -> Money | None:
    """What a line is about: the provider's amount, else ours."""
    kopecks, currency = (line.kopecks, line.currency) if line.currency else (line.kopecks_here, line.currency_here)
    return Money(to_amount(kopecks), currency) if currency else None


def reason_of(line: Any) -> str:
    """Why a line is in its class."""
    here = _here_in_words(line)
    if line.there == UNREAD or (line.line == REFUND and not line.known):
        return f"{CLASSES[UNREADABLE] if line.there == UNREAD else 'its payment cannot be read'}; here: {here}"
    if line.line == REFUND:
        part, money = "in full" if line.in_full else "in part", Money(to_amount(line.kopecks), line.currency)
        return f"payment {line.payment_id} was given back {part}, {money} of it by this refund; here: {here}"
    there = "unknown to the provider" if line.there == ABSENT else f"{line.there} at the provider"
    if line.currency:
        there += f", {Money(to_amount(line.kopecks), line.currency)}"
    if line.there == SUCCEEDED and line.in_full:
        there += ", given back in full"
    return f"{there}; here: {here}"


def _here_in_words(line: Any) -> str:
    if not line.rows:
        return "no row"
    money = f", {Money(to_amount(line.kopecks_here), line.currency_here or 'no currency')}"
    words = f"payment {line.row} is {line.here or 'without a status'}{money}"
    if line.here == "SUCCEEDED" and not line.linked:
        words += ", linked to no subscription"
    return words + (f", and {line.rows - 1} more with its id" if line.rows > 1 else "")


# --- sums ---------------------------------------------------------------------------------------------------------


def sum_up(lines: pd.DataFrame) -> pd.DataFrame:
    """The sums of each class and currency: lines, and the SUMS in kopecks. In the order of CLASSES."""
    there = lines[["class", "currency", *SUMS[:3]]].assign(lines=1)
    here = lines[["class", "currency_here", *SUMS[3:]]].rename(columns={"currency_here": "currency"})
    here.loc[lines["line"] == REFUND, "currency"] = lines["currency"]
    there.loc[there["currency"] == "", "currency"] = here["currency"]
    both = pd.concat([there, here], ignore_index=True).fillna(0)
    sums = both.groupby(["class", "currency"], sort=True)[["lines", *SUMS]].sum().astype("int64").reset_index()
    sums = sums[(sums[["lines", *SUMS]] != 0).any(axis=1)]
    order = {name: number for number, name in enumerate(CLASSES)}
    return sums.sort_values("class", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)


@dataclass(frozen=True, slots=True)
class Totals:
    """What the provider took and gave back on a day, in kopecks by currency, added up without any frame."""

    paid: Mapping[str, int]
    refunded: Mapping[str, int]


def provider_totals(payments: Iterable[ProviderPayment], refunds: Iterable[ProviderRefund], day: Day) -> Totals:
    """Add up the provider's slice itself."""
    paid: dict[str, int] = {}
    refunded: dict[str, int] = {}
    for payment in payments:
        if payment.status == SUCCEEDED and day.start <= day_instant(payment) < day.end:
            currency = payment.money.currency
            paid[currency] = paid.get(currency, 0) + to_kopecks(payment.money.amount)
    for refund in refunds:
        if refund.status == SUCCEEDED and day.start <= refund.created_at < day.end:
            currency = refund.money.currency
            refunded[currency] = refunded.get(currency, 0) + to_kopecks(refund.money.amount)
    return Totals(paid, refunded)


def unclosed(sums: pd.DataFrame, totals: Totals) -> list[str]:
    """Where the classes do not add up to the provider's totals, in words. Empty: they close to the kopeck."""
    faults = []
    for column, word, expected in (
        ("paid_there", "paid", totals.paid),
        ("refunded_there", "refunded", totals.refunded),
    ):
        found = sums.groupby("currency")[column].sum()
        for currency in sorted({*found[found != 0].index, *expected}):
            classes, total = int(found.get(currency, 0)), expected.get(currency, 0)
            if classes != total:
                faults.append(
                    f"{word} at the provider {Money(to_amount(total), currency)}, and in all classes together"
                    f" {Money(to_amount(classes), currency)}"
                )
    return faults
