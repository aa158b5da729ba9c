"""The deployment as operators run it: code server, webserver and daemon as processes, on a Dagster home of their own.

They get deploy/dagster.yaml, an environment with the settings of .env.example and nothing else of ours, and the
commands that the Dockerfile and the compose example use. All of them listen on free ports of this machine and end with
the test, with every run that they have started.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from billing_orchestration_tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
MODULE = "billing_orchestration.definitions"
_OURS = (
    "BILLING_",
    "YOOKASSA_",
    "DAGSTER_",
    "PENDING_PAYMENT_",
    "SUBSCRIPTION_GRACE_",
    "RUN_HISTORY_",
    "RECONCILIATION_",
    "RENEWAL_",
    "HEARTBEAT_",
    "ALERT_",
    "UI_",
)
_SECRET = ("BILLING_", "YOOKASSA_", "ALERT_", "HEARTBEAT_")
# Only a test that would fail anyway waits this long; a tick of the matching jobs comes every two minutes.
PATIENCE_S = 300.0
_END_TIMEOUT_S = 20.0

wait_for = partial(wait_until, patience_s=PATIENCE_S, every_s=0.25)


@dataclass
class Deployment:
    """Running processes by name, and the run history they write."""

    folder: Path
    env: dict[str, str]
    instance: dg.DagsterInstance
    code_port: int
    web_port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Of the webserver."""
        return f"http://{HOST}:{self.web_port}"

    def start_code_server(self) -> None:
        """Start the code server, as the Dockerfile's CMD does, and wait until it answers."""
        # fmt: off
        self._start(
            "code", ["dagster", "api", "grpc", "-m", MODULE, "-h", HOST, "-p", str(self.code_port),
                     "--location-name", "billing"],
        )
        # fmt: on
        # Asking is a process of its own, which costs as much as the server's start: not before somebody listens.
        wait_for(lambda: self._alive("code") and self._listens(self.code_port), "a listening code server")
        health = ["dagster", "api", "grpc-health-check", "-p", str(self.code_port)]
        wait_for(lambda: self._alive("code") and self._run(health) == 0, "a healthy code server")

    def start_webserver(self) -> None:
        """Start the webserver and wait until it answers."""
        command = ["billing-orchestration", "webserver", "-h", HOST, "-p", str(self.web_port), *self._where_the_code_is]
        self._start("webserver", command)
        wait_for(lambda: self._alive("webserver") and self._answers(), "an answering webserver")

    def start_daemon(self) -> None:
        """Start the daemon; its first work is what tells that it runs."""
        self._start("daemon", ["dagster-daemon", "run", *self._where_the_code_is])

    def stop(self, name: str) -> None:
        """End a process as a redeployment does; the runs of a code server end with it."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Its own session: only what it has started itself.
            with _nobody_there():
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def runs(self, job: str, **tags: str) -> list[dg.RunRecord]:
        """The runs of a job, latest first."""
        return list(self.instance.get_run_records(dg.RunsFilter(job_name=job, tags=tags or None)))

    def command(self, *words: str) -> str:
        """Run `billing-orchestration` with the deployment's settings, and hand back what it prints."""
        done = subprocess.run(
            _as_module(["billing-orchestration", *words]),
            env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def log_of(self, name: str) -> str:
        """What a process has written."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    @property
    def _where_the_code_is(self) -> list[str]:
        return ["-w", str(ROOT / "workspace.grpc.yaml")]

    def _start(self, name: str, command: Sequence[str]) -> None:
        # Only the code server gets what deploy/compose gives it alone: the shop's key and the billing database.
        env = {key: value for key, value in self.env.items() if name == "code" or not key.startswith(_SECRET)}
        with (self.folder / f"{name}.log").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                _as_module(command),
                env=env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _run(self, command: Sequence[str]) -> int:
        return subprocess.run(
            _as_module(command),
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode

    def _alive(self, name: str) -> bool:
        if self.processes[name].poll() is not None:
            raise RuntimeError(f"{name} ended by itself: {self.log_of(name)[-2000:]}")
        return True

    def _listens(self, port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) == 0

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/server_info", timeout=5):  # noqa: S310 - our own address
                return True
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def deployed(folder: Path, settings: Mapping[str, str]) -> Iterator[Deployment]:
    """Prepare a deployment in a folder: home, environment, ports. Start its parts with its methods; all end here."""
    home = folder / "home"
    home.mkdir()
    shutil.copy(ROOT / "deploy" / "dagster.yaml", home / "dagster.yaml")
    env = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    # Without compiled files each run costs 2.5 times the CPU.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    code_port = _free_port()
    env |= {
        "DAGSTER_HOME": str(home),
        "DAGSTER_CODE_SERVER_HOST": HOST,
        "DAGSTER_CODE_SERVER_PORT": str(code_port),
        "PYTHONUNBUFFERED": "1",
        **settings,
    }
    with _environment(env["DAGSTER_POSTGRES_URL"]):
        instance = dg.DagsterInstance.from_config(str(home))
    with instance:
        deployment = Deployment(folder, env, instance, code_port, _free_port())
        try:
            yield deployment
        finally:
            for name in ("daemon", "webserver", "code"):
                if name in deployment.processes:
                    deployment.stop(name)


@contextmanager
def _environment(run_history: str) -> Iterator[None]:
    before = os.environ.get("DAGSTER_POSTGRES_URL")
    os.environ["DAGSTER_POSTGRES_URL"] = run_history
    try:
        yield
    finally:
        if before is None:
            del os.environ["DAGSTER_POSTGRES_URL"]
        else:
            os.environ["DAGSTER_POSTGRES_URL"] = before


@contextmanager
def _nobody_there() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return


def _as_module(command: Sequence[str]) -> list[str]:
    # The console scripts of this environment, whether or not it is on the PATH.
    return [str(Path(sys.executable).parent / command[0]), *command[1:]]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: Any = probe.getsockname()[1]
    return int(port)
