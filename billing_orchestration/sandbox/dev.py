"""`make dev`: the demo's data with the Dagster UI open, the schedules running, the sandbox provider answering.

Ctrl-C ends what was started here and nothing else; the data stays for the next time.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from billing_orchestration.sandbox.demo import interrupt_on_signals, make_console, play
from billing_orchestration.sandbox.stage import Stage, StageError, has_data, open_stage, project_root

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
            return _serve(stage, root, arguments.port, console)
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


def _serve(stage: Stage, root: Path, port: int, console: Console) -> int:
    with _dagster_dev(stage, root, port) as (process, log):
        console.print("\nThe webserver, the daemon and the code location start …")
        _wait_until_open(process, port, log)
        console.print(f"Dagster UI:        http://localhost:{port}", style="bold green")
        for name, where in (
            ("runs", f"http://localhost:{port}/runs"),
            ("schedules (on)", f"http://localhost:{port}/automation"),
            ("billing database", f"psql '{stage.billing_url}'"),
            ("sandbox provider", stage.env["YOOKASSA_API_URL"]),
            ("its ledger", stage.env["YOOKASSA_API_URL"].removesuffix("/v3") + "/sandbox/ledger"),
            ("log", str(log)),
        ):
            console.print(f"{name + ':':<18} {where}")
        console.print("Ctrl-C ends it; the data stays. make dev ARGS=--fresh starts over.", soft_wrap=True)
        code = process.wait()
    raise StageError(f"Dagster ended by itself (exit code {code}), see {log}")


@contextmanager
def _dagster_dev(stage: Stage, root: Path, port: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Webserver, daemon and code server as children of one process, in a session of their own."""
    log = stage.folder / "logs" / "dagster.log"
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(root / "workspace.yaml"), "-h", HOST, "-p", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=stage.env,
            cwd=stage.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle, so that the order of ends is ours
        )
    try:
        yield process, log
    finally:
        process.terminate()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
        # Its code server ends a moment after it, and a run that is under way later still.
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


def _wait_until_open(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise StageError(f"Dagster did not start, see {log}")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/server_info", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise StageError(f"the webserver did not answer on port {port}, see {log}") from None
            time.sleep(0.3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
