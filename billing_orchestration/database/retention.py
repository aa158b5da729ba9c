"""What our schema has kept of customers long enough. Never attempts and settlements: they hold the promise."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

_EMPTY_EVIDENCE = sa.text("""
    UPDATE billing_orchestration.quarantine
    SET evidence = CASE WHEN jsonb_exists(evidence, 'books') THEN '{"books": null}' ELSE '{}' END::jsonb
    WHERE id = ANY(ARRAY(
        SELECT id FROM billing_orchestration.quarantine
        WHERE resolved_at < :before AND evidence NOT IN ('{}', '{"books": null}') ORDER BY id LIMIT :size))
""")
# That somebody was erased stays proved.
_DELETE_AUDIT = sa.text("""
    DELETE FROM billing_orchestration.audit_trail WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM billing_orchestration.audit_trail
        WHERE at < :before AND entity <> 'customer' LIMIT :size))
""")
_COUNT_OLD = sa.text("""
    SELECT (SELECT count(*) FROM billing_orchestration.quarantine
            WHERE resolved_at < :before AND evidence NOT IN ('{}', '{"books": null}')) AS evidence,
           (SELECT count(*) FROM billing_orchestration.audit_trail
            WHERE at < :before AND entity <> 'customer') AS audit,
           has_table_privilege('billing_orchestration.audit_trail', 'DELETE') AS may_delete
""")


def count_old(connection: sa.Connection, before: datetime) -> tuple[int, int, bool]:
    """Entries with evidence, and entries of the audit trail, older than an instant; whether the latter may go."""
    found = connection.execute(_COUNT_OLD, {"before": before}).one()
    return found.evidence, found.audit, found.may_delete


def empty_old_evidence(connection: sa.Connection, before: datetime, size: int) -> int:
    """Empty the evidence of entries resolved before an instant; the entry and its last word stay. Returns how many."""
    return connection.execute(_EMPTY_EVIDENCE, {"before": before, "size": size}).rowcount


def delete_old_audit(connection: sa.Connection, before: datetime, size: int) -> int:
    """Delete entries of the audit trail from before an instant; return how many."""
    return connection.execute(_DELETE_AUDIT, {"before": before, "size": size}).rowcount
