"""`billing-orchestration webserver` as a process: what it refuses to serve, and what it needs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import urllib3

from billing_orchestration_tests.fixtures.installation import ROOT, command
from billing_orchestration_tests.waiting import wait_until


@pytest.fixture
def deployed(environment: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A folder with a Dagster home and a workspace, and no setting of the shop or the database."""
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    (tmp_path / "workspace.yaml").write_text("load_from: []\n")
    environment.setenv("DAGSTER_HOME", str(tmp_path))
    return environment


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "evil.localhost"])  # noqa: S104 - refused
def test_beyond_this_machine_nothing_is_served_without_a_login(deployed: pytest.MonkeyPatch, host: str) -> None:
    process = command("webserver", "-h", host)
    assert process.returncode == 1
    assert process.stderr == (
        "billing-orchestration: UI_AUTH is not set, so the UI listens on this machine only: set it, or use"
        " --host 127.0.0.1\n"
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("UI_AUTH", "basic:vera:word-of-vera", "UI_AUTH holds a user without the hash of a password"),
        ("UI_HOSTS", "*", "UI_HOSTS must hold names"),
        ("DAGSTER_HOME", "", "DAGSTER_HOME is not set"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(deployed: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    deployed.setenv(name, value)
    process = command("webserver")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert words in line
    assert "word-of-vera" not in line


def test_a_workspace_file_that_is_not_there_is_named(deployed: pytest.MonkeyPatch) -> None:
    assert "elsewhere.yaml is no file" in command("webserver", "-w", "elsewhere.yaml").stderr


def test_a_new_login_opens_the_ui_that_has_its_hash(deployed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = command("webserver", "--new-login", "vera").stdout
    password = said.splitlines()[0].split()[-1]
    (tmp_path / ".env").write_text(next(word for word in said.split() if word.startswith("UI_AUTH=basic:vera:")))
    assert password not in (tmp_path / ".env").read_text()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-m", "billing_orchestration.cli", "webserver", "-p", str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: process.poll() is not None or _answers(url), "an answering webserver", every_s=0.2)
            assert process.poll() is None
            assert urllib3.request("GET", url, retries=False).status == 401
            known = urllib3.make_headers(basic_auth=f"vera:{password}")
            assert urllib3.request("GET", url, headers=known, retries=False).status == 200
            assert urllib3.request("GET", url, headers={**known, "Host": "evil.example"}, retries=False).status == 403
        finally:
            process.terminate()
        assert process.stderr is not None
        assert "refused '/' from 127.0.0.1: The UI is not served under this name" in process.stderr.read()


def _answers(url: str) -> bool:
    try:
        return urllib3.request("GET", url + "/server_info", retries=False, timeout=5).status == 200
    except urllib3.exceptions.HTTPError:
        return False


def test_a_user_that_the_setting_could_not_hold_is_refused(environment: pytest.MonkeyPatch) -> None:
    process = command("webserver", "--new-login", "vera:oleg")
    assert process.returncode == 1
    assert "a user's name consists of letters" in process.stderr
