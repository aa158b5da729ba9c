"""`dagster`, the command, in a process that is killed at a step: python -m …kill_cli job execute -m … -j …

The death is told by the variable TORTURE_DEATH: name, count, before or after, as a JSON list. Without it, it lives.
"""

from __future__ import annotations

import json
import os
import sys

from billing_orchestration_tests.torture.kill_points import Death, Step, Steps


def main() -> None:
    """Watch the steps, then do what the command does."""
    told = json.loads(os.environ.get("TORTURE_DEATH", "null"))
    death = Death(Step(told[0], told[1]), told[2]) if told else None
    Steps(lambda _: None, death).watch()
    from dagster._cli import main as dagster

    sys.argv[0] = "dagster"
    dagster()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
