"""What nobody may do by a wrong clock: nothing is given up, nothing expires, no watermark moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from billing_orchestration_tests.torture.simulation.judge import Judge


class ClocksJudge(Judge):
    """Of runs whose clocks were apart from their first moment to their last."""

    def bound_to_time(self) -> dict[str, Any]:
        """What such a run must leave: watermarks, and what was searched for in vain, was given up or has expired."""
        rows = self.rows(
            "SELECT 'watermark of ' || job AS what, covered_until::text AS value"
            " FROM billing_orchestration.watermarks"
            " UNION ALL SELECT 'absence of ' || id, 'noted' FROM billing_orchestration.renewal_attempts"
            " WHERE first_absent_at IS NOT NULL"
            " UNION ALL SELECT 'attempt ' || id, 'VOID' FROM billing_orchestration.renewal_attempts"
            # What was only written down anew after its row was lost is not given up.
            " WHERE state = 'VOID' AND last_error <> 'its record was lost: rebuilt from its payment'"
            " UNION ALL SELECT 'subscription ' || id, 'EXPIRED' FROM subscriptions WHERE status = 'EXPIRED'"
            " UNION ALL SELECT 'payment ' || id, 'EXPIRED' FROM payments WHERE status = 'EXPIRED'"
        )
        return {row.what: row.value for row in rows}

    def done_by_a_wrong_clock(self, job: str, before: Mapping[str, Any]) -> list[str]:
        """What is otherwise than before, after a run whose clocks were apart all the time."""
        return [
            f"DONE BY A WRONG CLOCK: {job} leaves {what} as {value}"
            for what, value in self.bound_to_time().items()
            if before.get(what) != value
        ]
