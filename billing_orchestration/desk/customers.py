"""One customer's data: copied out, or erased as far as the money allows. docs/personal-data.md says what that means.

Only our schema is touched. What the service's own tables and the provider hold is named, not changed.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.customers import Customer, erase, find_customer, plan_erasure
from billing_orchestration.database.engine import begin, read
from billing_orchestration.database.settling_facts import lock_user_names
from billing_orchestration.desk.resolving import Desk

JOB = "customer"


class NotDone(Exception):
    """Nothing was written, to a file or to the database. One line that says why, and what can be done."""


def export(desk: Desk, user_id: str, output: Path) -> Iterator[str]:
    """Write everything that our schema holds about a user to a new file that its owner alone may read, as JSON.

    Raises NotDone, and BillingDatabaseError.
    """
    with read(desk.engine) as connection:
        customer = find_customer(connection, _named(user_id))
    document: dict[str, Any] = {
        "user_id": user_id,
        "exported_at": desk.now().isoformat(),
        "subscriptions_of_the_service": [
            {"id": id_, "status": status} for id_, status in sorted(customer.subscriptions.items())
        ],
        "payments_of_the_service": list(customer.payments),
        **customer.ours,
    }
    try:
        with os.fdopen(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(document, file, ensure_ascii=False, indent=2)
    except OSError as error:
        raise NotDone(f"{output} cannot be made ({error.strerror}): name a new file in a folder that exists") from error
    counts = ", ".join(f"{table} {len(rows)}" for table, rows in customer.ours.items())
    yield f"{output} holds what our schema knows of this customer: {counts}"
    yield from _elsewhere(customer)


def erase_customer(desk: Desk, user_id: str, by: str, reason: str, *, yes: bool) -> list[str]:
    """Erase a user from our schema, or without `yes` show what that would do; lines for a person.

    One transaction: the user's lock, the rows read, each changed as it was read, the audit trail. Killed anywhere: all
    of it or nothing. Raises NotDone with nothing written, also while a charge's outcome is open; BillingDatabaseError.
    """
    user_id = _named(user_id)
    if yes and not reason.strip():
        raise NotDone("an erasure needs a --reason: the audit trail keeps it")
    with (begin if yes else read)(desk.engine) as connection:
        lock_user_names(connection, [user_id])
        customer = find_customer(connection, user_id)
        _refuse_open(customer)
        pseudonym = f"erased-{uuid.uuid4().hex[:12]}"
        told = plan_erasure(customer, pseudonym)
        if not told.erased and not told.kept:
            return ["our schema holds nothing about this customer", *_elsewhere(customer)]
        if yes:
            _erase(connection, desk, customer, pseudonym, f"{by}: {reason}")
    lines = [f"{'erased' if yes else 'would erase'}: {what}" for what in told.erased]
    lines += [f"kept: {what}" for what in told.kept]
    lines += _elsewhere(customer)
    lines.append(f"In what is kept the customer is {pseudonym}" if yes else "Nothing was changed: repeat with --yes")
    return lines


def _erase(connection: sa.Connection, desk: Desk, customer: Customer, pseudonym: str, reason: str) -> None:
    stamp = Stamp(JOB, f"cli-{uuid.uuid4()}", desk.now())
    if not erase(connection, stamp, customer, pseudonym, reason):
        raise NotDone("a run was at work on this customer's rows meanwhile: nothing was changed, repeat the command")


def _refuse_open(customer: Customer) -> None:
    waiting = [f"attempt {row['number']} of subscription {row['subscription_id']}" for row in customer.open_attempts]
    if waiting:
        raise NotDone(
            f"the outcome of a charge is open ({', '.join(waiting[:3])}): money may have moved, and only these records"
            " can tell. Nothing was changed; let autopayment_job or a person close it, then repeat"
        )


def _elsewhere(customer: Customer) -> Iterator[str]:
    alive = [str(id_) for id_, status in customer.subscriptions.items() if status in ("ACTIVE", "PAUSED")]
    if alive:
        yield f"note: subscription {', '.join(alive)} goes on, and its next renewal writes the customer's id again"
    yield (
        f"elsewhere: {len(customer.subscriptions)} subscriptions and {len(customer.payments)} payments in the service's"
        " tables, and what the provider keeps of them, are the service's to answer for"
    )


def _named(user_id: str) -> str:
    if not user_id.strip():
        raise NotDone("give the customer's id, as subscriptions.user_id holds it")
    return user_id
