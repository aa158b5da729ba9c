"""A process that has loaded the libraries, and forks for each mutant: to load them is half of what a mutant costs.

Run by its path, not as a module: nothing of the project may be loaded before a copy's own. It reads one request a line
(JSON: folder, module, arguments, environment) and answers with the child's process id, then with its exit code.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIBRARIES = (
    "alembic.command",
    "dagster",
    "hypothesis",
    "pandas",
    "psycopg",
    "pydantic_settings",
    "pytest",
    "requests",
    "sqlalchemy",
    "urllib3",
    "yookassa",
)
OUTPUT = "output"
# To load the libraries and to fork take seconds; whoever waits this long waits for a dead process.
_LONGEST_START_S = 120.0


class Zygote:
    """Runs modules, one at a time, each in a fork of a warm process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            bufsize=0,  # a line that lies in a buffer would be waited for in vain
        )

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()

    def run(
        self, folder: Path, module: str, arguments: Sequence[str], environment: Mapping[str, str], longest_s: float
    ) -> int:
        """The exit code of a module of `folder`, which holds what it says in OUTPUT. Raises TimeoutError."""
        assert self._process.stdin is not None
        request = {
            "folder": str(folder),
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
        }
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        child = self._answer(_LONGEST_START_S)
        try:
            return self._answer(longest_s)
        except TimeoutError:
            os.killpg(child, signal.SIGKILL)
            self._answer(_LONGEST_START_S)
            raise

    def _answer(self, longest_s: float) -> int:
        stream = self._process.stdout
        assert stream is not None
        if not select.select([stream], [], [], longest_s)[0]:
            raise TimeoutError
        line = stream.readline()
        if not line:
            raise RuntimeError(f"the process that forks has ended: exit code {self._process.wait()}")
        return int(line)


def _become(request: Mapping[str, Any]) -> int:
    """Run the requested module as if this process had been started for it."""
    os.setsid()
    os.chdir(request["folder"])
    with open(os.devnull) as nothing, Path(OUTPUT).open("w") as output:
        for descriptor, stream in ((0, nothing), (1, output), (2, output)):
            os.dup2(stream.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = request["folder"]
    sys.argv = [request["module"], *request["arguments"]]
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as Python itself ends
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Load, then fork for each request, until nobody is there to ask."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            code = _become(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
