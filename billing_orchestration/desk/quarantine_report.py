"""The quarantine on a terminal: a line for each entry, and one entry in full."""

from __future__ import annotations

import json

import sqlalchemy as sa

from billing_orchestration.database.engine import read
from billing_orchestration.database.quarantine import Entry, all_entries, open_entries, read_entry
from billing_orchestration.desk.resolving import NotResolved
from billing_orchestration.domain.problem_kinds import kind_of


def listed(engine: sa.Engine, *, with_resolved: bool) -> list[str]:
    """A line for each entry, oldest first, and what to do next."""
    with read(engine) as connection:
        entries = all_entries(connection) if with_resolved else open_entries(connection)
    if not entries:
        return ["the quarantine is empty: nothing waits for a person"]
    waiting = sum(entry.resolved_at is None for entry in entries)
    return [
        *(_line(entry) for entry in entries),
        f"{waiting} open. Look at one: billing-orchestration quarantine show ID",
    ]


def _line(entry: Entry) -> str:
    state = "open" if entry.resolved_at is None else str(entry.resolution)
    about = f"{entry.subject}: {entry.kind}"
    if entry.subscription_id is not None and not entry.subject.startswith("subscription"):
        about += f" (subscription {entry.subscription_id})"
    return f"{entry.id:>6}  {entry.opened_at:%Y-%m-%d %H:%M}  {state:<8}  {about}: {entry.reason}"


def shown(engine: sa.Engine, entry_id: int) -> list[str]:
    """One entry with its evidence and the ways to resolve it. Raises NotResolved when there is none."""
    with read(engine) as connection:
        entry = read_entry(connection, entry_id)
    if entry is None:
        raise NotResolved(f"there is no entry {entry_id} in the quarantine: billing-orchestration quarantine list")
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
    lines += [f"  {name}: {value}" for name, value in facts.items() if value is not None]
    if entry.evidence:
        lines.append("  evidence:")
        lines += [f"    {line}" for line in json.dumps(entry.evidence, ensure_ascii=False, indent=2).splitlines()]
    if entry.resolved_at is not None:
        return [
            *lines,
            f"  {entry.resolution} on {entry.resolved_at:%Y-%m-%d %H:%M:%S} UTC by {entry.resolved_by}:"
            f" {entry.resolution_reason}",
        ]
    lines.append(f"  what `billing-orchestration quarantine resolve {entry.id} … --reason TEXT` would do:")
    lines.append(f"    --accept: {kind.accept}")
    if kind.attach and entry.about_provider_payment and not entry.about_books:
        lines.append(f"    --attach SUBSCRIPTION: {kind.attach}")
    lines.append(f"    --ignore: {kind.ignore}")
    if entry.external_payment_id is not None:
        lines.append(f"  the whole case: billing-orchestration explain payment {entry.external_payment_id}")
    elif entry.subscription_id is not None:
        lines.append(f"  the whole case: billing-orchestration explain subscription {entry.subscription_id}")
    return lines
