"""The quarantine on a terminal: a line for each entry, and one entry in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.engine import read
from billing_orchestration.database.quarantine import Entry, all_entries, open_entries, read_entry
from billing_orchestration.desk.resolving import NotResolved
from billing_orchestration.desk.tables import hanging, table
from billing_orchestration.domain.printable import printable_json
from billing_orchestration.domain.problem_kinds import kind_of


def entries_of(engine: sa.Engine, *, with_resolved: bool) -> list[Entry]:
    """What is listed, oldest first."""
    with read(engine) as connection:
        return all_entries(connection) if with_resolved else open_entries(connection)


def fields_of(entry: Entry) -> dict[str, Any]:
    """An entry for programs, with what each answer would do while it is open."""
    kind = kind_of(entry.kind)
    answers = {"accept": kind.accept, "attach": kind.attach if entry.attachable else "", "ignore": kind.ignore}
    return {
        **{field.name: getattr(entry, field.name) for field in fields(entry) if field.name != "problem_key"},
        "about": entry.subject,
        "means": kind.means,
        "answers": {word: does for word, does in answers.items() if does} if entry.resolved_at is None else {},
    }


def listed(entries: Sequence[Entry]) -> list[str]:
    """A row for each entry, and what to do next."""
    if not entries:
        return ["the quarantine is empty: nothing waits for a person"]
    waiting = sum(entry.resolved_at is None for entry in entries)
    return [
        *table([_row(entry) for entry in entries]),
        f"{waiting} open. Look at one: billing-orchestration quarantine show ID",
    ]


def _row(entry: Entry) -> tuple[str, ...]:
    state = "open" if entry.resolved_at is None else str(entry.resolution)
    about = f"{entry.subject}: {entry.kind}"
    if entry.subscription_id is not None and not entry.subject.startswith("subscription"):
        about += f" (subscription {entry.subscription_id})"
    return str(entry.id), f"{entry.opened_at:%Y-%m-%d %H:%M}", state, f"{about}: {entry.reason}"


def entry_of(engine: sa.Engine, entry_id: int) -> Entry:
    """One entry. Raises NotResolved when there is none."""
    with read(engine) as connection:
        entry = read_entry(connection, entry_id)
    if entry is None:
        raise NotResolved(f"there is no entry {entry_id} in the quarantine: billing-orchestration quarantine list")
    return entry


def shown(entry: Entry) -> list[str]:
    """One entry with its evidence and the ways to resolve it."""
    kind = kind_of(entry.kind)
    facts = {
        "about": entry.subject,
        "kind": f"{entry.kind}: {kind.means}",
        "reason": entry.reason,
        "opened": f"{entry.opened_at:%Y-%m-%d %H:%M:%S} UTC by {entry.job}, run {entry.run_id}",
        "payment at the provider": entry.external_payment_id,
        "payment row": entry.payment_id,
        "subscription": entry.subscription_id,
        "renewal attempt": entry.attempt_id,
    }
    lines = [f"entry {entry.id}"]
    for name, value in facts.items():
        if value is not None:
            lines += hanging(f"  {name}: ", str(value))
    if entry.evidence:
        lines.append("  evidence:")
        lines += [f"    {line}" for line in printable_json(entry.evidence, indent=2).split("\n")]
    if entry.resolved_at is not None:
        by = f"{entry.resolution} on {entry.resolved_at:%Y-%m-%d %H:%M:%S} UTC by {entry.resolved_by}"
        return [*lines, *hanging("  ", f"{by}: {entry.resolution_reason}")]
    lines.append(f"  what `billing-orchestration quarantine resolve {entry.id} … --reason TEXT` would do:")
    lines += hanging("    --accept: ", kind.accept)
    if entry.attachable:
        lines += hanging("    --attach SUBSCRIPTION: ", kind.attach)
    lines += hanging("    --ignore: ", kind.ignore)
    if entry.external_payment_id is not None:
        lines.append(f"  the whole case: billing-orchestration explain payment {entry.external_payment_id}")
    elif entry.subscription_id is not None:
        lines.append(f"  the whole case: billing-orchestration explain subscription {entry.subscription_id}")
    return lines
