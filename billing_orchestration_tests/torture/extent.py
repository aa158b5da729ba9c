"""How much of the torture is asked for: some of it in `make test`, more in `make torture`, all of it in a night."""

from __future__ import annotations

import os

# `make torture` sets it, a night to how long it goes on; 0: what twenty minutes have room for.
ROUNDS = int(os.environ.get("TORTURE_ROUNDS") or 0)
THOROUGH = "TORTURE_ROUNDS" in os.environ
NIGHT = ROUNDS > 0
FIRST = int(os.environ.get("TORTURE_FIRST") or 0)


def is_its_turn(number: int, shares: int) -> bool:
    """Whether the `number`-th of many is tried, where a short torture has time for a share of them.

    As many runs as there are shares try all of them, each with a FIRST of its own. A night leaves nothing out, and
    neither does `make test`, which chooses otherwise.
    """
    return NIGHT or not THOROUGH or number % shares == FIRST % shares
