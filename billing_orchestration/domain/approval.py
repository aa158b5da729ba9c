"""Approval: a run bound to the plan that a dry run has shown.

A plan is its changes, each one line with everything that must not differ between preview and approval (the attempt and
its body, the payment and its amount). The plan's hash is the hash of these lines in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable


def fingerprint(line: str) -> str:
    """A change's short name: enough to tell the changes of one plan apart."""
    return hashlib.sha256(line.encode()).hexdigest()[:16]


def plan_hash(fingerprints: Iterable[str]) -> str:
    """The name of a plan: equal for equal changes, in any order."""
    return hashlib.sha256("\n".join(sorted(fingerprints)).encode()).hexdigest()[:16]


def allowed(
    fingerprints: Collection[str], approved_hash: str, previewed: Collection[str] | None
) -> frozenset[str] | None:
    """Which of these changes were approved. None: unknown, so nothing may be applied.

    All of them when the plan is the approved one; else those that the preview showed (`previewed`, if it is known).
    """
    if plan_hash(fingerprints) == approved_hash:
        return frozenset(fingerprints)
    if previewed is None or plan_hash(previewed) != approved_hash:
        return None
    return frozenset(fingerprints) & frozenset(previewed)
