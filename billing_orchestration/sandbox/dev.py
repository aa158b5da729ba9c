"""`make dev`: the demo's data with the Dagster UI open, the schedules running, the sandbox provider answering.

Ctrl-C ends what was started here and nothing else; the data stays for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from billing_orchestration.sandbox.demo import interrupt_on_signals, make_console, play
from billing_orchestration.sandbox.stage import MODULE, Stage, StageError, has_data, open_stage, project_root

HOST = "127.0.0.1"
DEFAULT_PORT = 3000
_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 30.0
_LATECOMERS_S = 15.0


def main(argv: Sequence[str] = ()) -> int:
    """Open the UI on the demo's data, playing the demo first where there is none."""
    parser = argparse.ArgumentParser(prog="make dev", description="Open the Dagster UI on the demo's data.")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="of the UI (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="start over, even if an earlier demo left data")
    arguments = parser.parse_args(argv)
    console = make_console()
    interrupt_on_signals()
    try:
        root = project_root()
        _refuse_busy(arguments.port)
        fresh = arguments.fresh or not has_data(root)
        with open_stage(root, fresh=fresh) as stage:
            if fresh:
                play(stage, console)
            _serve(stage, arguments.port, console)
    except StageError as error:
        print(f"dev: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndev: ended, with everything it started. The data stays in .demo/", file=sys.stderr)
        return 0


def _refuse_busy(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise StageError(
                f"port {port} cannot be used ({error}): choose another, make dev ARGS='--port 3001'"
            ) from None


def _serve(stage: Stage, port: int, console: Console) -> NoReturn:
    console.print("\nThe code server, the webserver and the daemon start …")
    with _dagster(stage, port) as parts:
        address = f"http://localhost:{port}"
        console.print(f"Dagster UI:        {address}", style="bold green")
        for name, where in (
            ("runs", f"{address}/runs"),
            ("schedules (on)", f"{address}/automation"),
            ("billing database", f"psql '{stage.billing_url}'"),
            ("sandbox provider", stage.env["YOOKASSA_API_URL"]),
            ("its ledger", stage.env["YOOKASSA_API_URL"].removesuffix("/v3") + "/sandbox/ledger"),
            ("logs", str(stage.folder / "logs")),
        ):
            console.print(f"{name + ':':<18} {where}")
        console.print("Ctrl-C ends it; the data stays. make dev ARGS=--fresh starts over.", soft_wrap=True)
        while True:
            for part in parts:
                part.check()
            time.sleep(1)


@dataclass(frozen=True, slots=True)
class _Part:
    """One of Dagster's processes."""

    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raise StageError if it has ended."""
        if self.process.poll() is not None:
            raise StageError(f"Dagster ended by itself (exit code {self.process.returncode}), see {self.log}")

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until it is ready. Raises StageError if it ends, or takes too long."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise StageError(f"{self.log.stem} did not answer, see {self.log}")
            time.sleep(0.3)


@contextmanager
def _dagster(stage: Stage, port: int) -> Iterator[Sequence[_Part]]:
    """Code server, webserver and daemon, as in a deployment; they end in the opposite order."""
    # The code server asks for no login: its socket is in a folder of this user's own.
    with tempfile.TemporaryDirectory(prefix="billing-dev-") as folder, ExitStack() as stack:
        code_socket = str(Path(folder) / "code")
        workspace = stage.folder / "workspace.yaml"
        # JSON is YAML.
        location = {"grpc_server": {"socket": code_socket, "location_name": "billing"}}
        workspace.write_text(json.dumps({"load_from": [location]}), encoding="utf-8")

        def start(name: str, *command: str) -> _Part:
            return stack.enter_context(_started(stage, name, command))

        dagster = ("-m", "dagster")
        # fmt: off
        code = start(
            "code", *dagster, "code-server", "start", "-s", code_socket, "-m", MODULE, "--location-name", "billing",
            "--use-python-environment-entry-point",
        )
        # fmt: on
        health = [sys.executable, *dagster, "api", "grpc-health-check", "-s", code_socket]
        code.wait_until(
            lambda: (
                os.path.exists(code_socket)
                and subprocess.run(
                    health, env=stage.env, stdin=subprocess.DEVNULL, capture_output=True, check=False
                ).returncode
                == 0
            )
        )
        web = start("webserver", "-m", "billing_orchestration.cli", "webserver", "-w", str(workspace), "-p", str(port))
        daemon = start("daemon", "-m", "dagster._daemon", "run", "-w", str(workspace))
        web.wait_until(lambda: _answers(port))
        switch_on = ("billing_orchestration.cli", "start", "--without-doctor", "-w", str(workspace))
        switched = subprocess.run(
            [sys.executable, "-m", *switch_on],
            env=stage.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if switched.returncode:
            raise StageError(f"the schedules cannot be switched on: {switched.stderr.strip()}")
        yield code, web, daemon


@contextmanager
def _started(stage: Stage, name: str, command: Sequence[str]) -> Iterator[_Part]:
    """A process in a session of its own, ended with all that it started."""
    log = stage.folder / "logs" / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=stage.env,
            cwd=stage.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle, so that the order of ends is ours
        )
    try:
        yield _Part(process, log)
    finally:
        process.terminate()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
        # A run that is under way ends a moment after its code server.
        deadline = time.monotonic() + _LATECOMERS_S
        while _signal_group(process.pid, signal.SIGTERM if time.monotonic() > deadline - 5 else 0):
            if time.monotonic() > deadline:
                _signal_group(process.pid, signal.SIGKILL)
                break
            time.sleep(0.2)


def _signal_group(leader: int, number: int) -> bool:
    """Signal a process group of our own, only what it started itself; 0 asks. False when nobody of it is left."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return False
    return True


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/server_info", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
