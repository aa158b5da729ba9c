"""Runs whole jobs, each in a process of its own that may be killed at a step: imported once, forked per run.

Started as `python -m …kill_runner`, it reads one case a line (JSON) and answers with one line. The process that forks
has one thread and no connections, so a fork of it is a clean start without the three seconds of imports.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cache, partial
from typing import Any

import dagster as dg
import sqlalchemy  # noqa: F401 - imported before the fork, not in each run
from pydantic import SecretStr

import billing_orchestration.database.expiry
import billing_orchestration.database.health
import billing_orchestration.database.matching
import billing_orchestration.database.renewals
import billing_orchestration.database.settling
import billing_orchestration.jobs.autopayment.charging  # noqa: F401
from billing_orchestration.definitions import build_definitions
from billing_orchestration.provider.client import PaymentProvider, Timeouts
from billing_orchestration.settings import Settings
from billing_orchestration_tests.torture.kill_points import Death, Step, Steps


@dataclass(frozen=True)
class Case:
    """One run of a job. `death`: name and count of a step, and "before" or "after"; None: it may live.

    `patience_s`: how long the client takes silence for slowness. `conductor`: "host:port" of whoever does something at
    that step instead, while the run waits (postgres_matrix.Conductor).
    `partition`: the key of the one that it backfills. `config` and `tags`: those that a schedule's tick asked for.
    """

    job: str
    now: str
    database_url: str
    api_url: str
    shop_id: str
    secret_key: str
    ops: Mapping[str, Any] = field(default_factory=dict)
    shards: int | None = None
    death: tuple[str, int, str] | None = None
    patience_s: float = 2.0
    conductor: str | None = None
    partition: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How it ended. `steps` are those that began, in order; a killed run ended at the last of them."""

    killed: bool
    ok: bool
    failure: str
    steps: tuple[Step, ...]


class Runner:
    """The forking process, from outside. Use it as a context."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Runner:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def warm_up(self, case: Case) -> Ended:
        """Run a case in the forking process itself: what is imported and compiled once is there for every fork.

        Its database must be one that nobody needs any more.
        """
        return self._ask("warm up", [replace(case, death=None)])[0]

    def run(self, case: Case) -> Ended:
        """Run a case to its end, whichever way it ends."""
        return self._ask("run", [case])[0]

    def race(self, cases: Sequence[Case]) -> list[Ended]:
        """Run them all at once, each in its own process."""
        return self._ask("run", cases)

    def _ask(self, order: str, cases: Sequence[Case]) -> list[Ended]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"order": order, "cases": [asdict(case) for case in cases]}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the runner has ended; its words are on stderr")
        return [
            Ended(told["killed"], told["ok"], told["failure"], tuple(Step(*step) for step in told["steps"]))
            for told in json.loads(line)
        ]


def _execute(case: Case, tell: Any) -> None:
    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        billing_database_url=case.database_url,
        yookassa_shop_id=case.shop_id,
        yookassa_secret_key=SecretStr(case.secret_key),
        yookassa_api_url=case.api_url,
    )
    now = datetime.fromisoformat(case.now)

    def connect(settings: Settings, now: Callable[[], datetime]) -> PaymentProvider:
        return PaymentProvider(
            shop_id=settings.yookassa_shop_id,
            secret_key=settings.yookassa_secret_key.get_secret_value(),
            api_url=settings.yookassa_api_url,
            timeouts=Timeouts(2.0, charge_read_s=case.patience_s, read_s=case.patience_s, charge_done_s=0.0),
            read_attempts=3,
            read_backoff_s=0.01,
            now=now,
        )

    definitions = build_definitions(
        load=lambda: settings,
        now=lambda: now,
        database_now=lambda _: now,
        steady_s=lambda: 0.0,
        connect=connect,
        renewal_shards=case.shards,
    )
    ops = {name: {"config": value} for name, value in case.ops.items()}
    config = {**case.config, **({"ops": {**case.config.get("ops", {}), **ops}} if ops else {})}
    result = definitions.get_job_def(case.job).execute_in_process(
        instance=_run_history(),
        run_config=config,
        raise_on_error=False,
        partition_key=case.partition,
        tags=dict(case.tags),
    )
    failure = ""
    for event in result.all_events:
        if event.event_type_value == "STEP_FAILURE":
            data = event.step_failure_data
            failure = str(data.user_failure_data.description if data.user_failure_data else data.error)
    tell({"ok": result.success, "failure": failure})


@cache
def _run_history() -> dg.DagsterInstance:
    """Dagster's tables, in memory: made once by the warm-up, a copy of it in each fork."""
    return dg.DagsterInstance.ephemeral()


def _start(case: Case) -> tuple[int, int]:
    """Run it in a child: its process id, and the end of a pipe to hear it out by."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    # Whatever happens, the child must not go on as the runner.
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the parent's stdout is the protocol

        def tell(word: Any) -> None:
            os.write(writing, (json.dumps(word) + "\n").encode())

        death = Death(Step(case.death[0], case.death[1]), case.death[2]) if case.death else None
        strike = partial(_wait_for, case.conductor) if case.conductor else None
        Steps(lambda step: tell({"step": [step.name, step.nth]}), death, strike).watch()
        _execute(case, tell)
    except BaseException as error:  # noqa: BLE001 - told to the parent
        os.write(writing, (json.dumps({"ok": False, "failure": repr(error)}) + "\n").encode())
    finally:
        os._exit(0)


def _wait_for(conductor: str) -> None:
    host, _, port = conductor.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.recv(1)


def _hear_out(child: int, reading: int) -> dict[str, Any]:
    with os.fdopen(reading, "rb") as pipe:
        words = [json.loads(line) for line in pipe]
    _, status = os.waitpid(child, 0)
    ends = [word for word in words if "ok" in word]
    return {
        "killed": os.WIFSIGNALED(status),
        "ok": bool(ends and ends[-1]["ok"]),
        "failure": ends[-1]["failure"] if ends else "",
        "steps": [word["step"] for word in words if "step" in word],
    }


def _warm_up(case: Case) -> dict[str, Any]:
    words: list[dict[str, Any]] = []
    _execute(case, words.append)
    # What is there now is shared by all forks, and not to be walked through by each one's collector.
    gc.collect()
    gc.freeze()
    return {"killed": False, "steps": [], **words[-1]}


def main() -> None:
    """Answer each line until there are no more."""
    # Dagster's log lines are of no use here.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for line in sys.stdin:
        asked = json.loads(line)
        cases = [Case(**case) for case in asked["cases"]]
        if asked["order"] == "run":
            started = [_start(case) for case in cases]
            answers = [_hear_out(*one) for one in started]
        else:
            answers = [_warm_up(case) for case in cases]
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
