"""The quarantine as a page of the UI: one row an entry, and a link for each answer that opens the launchpad filled in.

It shows ids of payments and subscriptions, and no customer's id or contact: Dagster's event log is no place for those.
"""

from datetime import datetime, timedelta
from typing import Any

import dagster as dg
import sqlalchemy as sa

from billing_orchestration.database.quarantine import Entry, count_and_last, open_entries, sums_of
from billing_orchestration.domain.printable import printable
from billing_orchestration.domain.problem_kinds import kind_of
from billing_orchestration.launchpad import LOCATION, launchpad
from billing_orchestration.settings import ui_prefix

QUARANTINE = dg.AssetKey(["billing", "quarantine"])
RESOLVE_JOB = "resolve_quarantine_job"
RESOLVE_OP = "resolve_entry"
_ENTRIES_SHOWN = 100
# Each link is some 300 bytes of the event; older entries come first, and the others move up.
_ENTRIES_LINKED = 20
_COLUMNS = ("id", "age", "payment", "sum", "why", "accept", "attach", "ignore")


def quarantine_page(connection: sa.Connection, now: datetime, location: str = LOCATION) -> dg.AssetMaterialization:
    """What is open at this moment, oldest first."""
    entries = open_entries(connection, _ENTRIES_SHOWN)
    waiting, _ = count_and_last(connection)
    sums = sums_of(connection, entries)
    metadata: dict[str, dg.MetadataValue[Any]] = {"open": dg.MetadataValue.int(waiting)}
    for entry in entries[:_ENTRIES_LINKED]:
        metadata[f"decide {entry.id}"] = dg.MetadataValue.md(answers(entry, location))
    if entries:
        cut = f"first {len(entries)} of " if waiting > len(entries) else ""
        metadata[f"entries ({cut}{waiting})"] = dg.MetadataValue.table(
            records=[dg.TableRecord(_row(entry, sums.get(entry.id, ""), now)) for entry in entries],
            schema=dg.TableSchema([dg.TableColumn(name) for name in _COLUMNS]),
        )
    return dg.AssetMaterialization(QUARANTINE, metadata=metadata)


def answers(entry: Entry, location: str = LOCATION) -> str:
    """A link for each answer that makes sense, in Markdown. Each opens a dry run: the first launch only shows."""
    words = ["accept", *(["attach"] if entry.attachable else []), "ignore"]
    links = " · ".join(f"[{word}]({resolving_link(entry.id, word, location=location)})" for word in words)
    return f"{entry.kind}: {links}"


def resolving_link(entry_id: int, decision: str, *, location: str = LOCATION, **more: Any) -> str:
    """The launchpad of resolve_quarantine_job, filled in."""
    config = {"entry": entry_id, "decision": decision, "reason": "", "by": "", "dry_run": True}
    if decision == "attach":
        config["subscription"] = 0
    return launchpad(
        RESOLVE_JOB, {"ops": {RESOLVE_OP: {"config": config | more}}}, location=location, prefix=ui_prefix()
    )


def age_in_words(age: timedelta) -> str:
    """How long something waits: the two largest units at most."""
    minutes = max(0, int(age.total_seconds()) // 60)
    days, hours = minutes // 1440, minutes % 1440 // 60
    if days:
        return f"{days} d {hours} h" if hours else f"{days} d"
    return f"{hours} h" if hours else f"{minutes} min"


def _row(entry: Entry, money: str, now: datetime) -> dict[str, str | int]:
    kind = kind_of(entry.kind)
    return {
        "id": entry.id,
        "age": age_in_words(now - entry.opened_at),
        "payment": printable(entry.subject.removeprefix("payment ")),
        "sum": printable(money),
        # The page cuts a long cell: what is wrong comes first.
        "why": printable(f"{entry.kind}: {entry.reason}"),
        "accept": kind.accept,
        "attach": kind.attach if entry.attachable else "",
        "ignore": kind.ignore,
    }
