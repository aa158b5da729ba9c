"""The sandbox provider as a process of its own: started by the demo, ended with it, its books kept in a file.

The child also ends (and keeps its books) when its starter vanishes: its standard input is a pipe from the starter.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_END_TIMEOUT_S = 15.0


@contextmanager
def provider_process(
    state_file: Path, *, shop_id: str, secret_key: str, env: Mapping[str, str], log: Path
) -> Iterator[str]:
    """Yield the base address (without /v3) of a sandbox on a free port. Raises RuntimeError if it does not start."""
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(state_file), shop_id, secret_key],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=dict(env),
            text=True,
            start_new_session=True,  # a Ctrl-C in the terminal is its starter's to handle
        )
    try:
        line = process.stdout.readline() if process.stdout else ""
        _, found, address = line.partition("http://")
        if not found:
            raise RuntimeError(f"the sandbox provider did not start, see {log}")
        yield "http://" + address.partition("/v3")[0]
    finally:
        process.terminate()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_starter() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """The child."""
    from billing_orchestration.sandbox.provider.server import serve

    state_file, shop_id, secret_key = sys.argv[1:]
    threading.Thread(target=_end_with_starter, daemon=True).start()
    serve(port=0, shop_id=shop_id, secret_key=secret_key, state_file=Path(state_file))


if __name__ == "__main__":
    main()
