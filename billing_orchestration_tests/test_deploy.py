"""What a team deploys unchanged: each container gets only what it needs, and only the UI is reached from outside."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
COMPOSE = (ROOT / "deploy" / "compose" / "compose.yaml").read_text()
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
NETWORKS: dict[str, Any] = yaml.safe_load(COMPOSE)["networks"]
DOCKER_RUNS = (ROOT / "deploy" / "compose" / "docker-runs.yaml").read_text()
UNITS = sorted((ROOT / "deploy" / "systemd").iterdir())


def test_only_the_code_server_has_the_shops_key_and_all_settings() -> None:
    assert [name for name, service in SERVICES.items() if "env_file" in service] == ["code"]
    given = {name: set(service["environment"]) for name, service in SERVICES.items()}
    code_server = {"DAGSTER_POSTGRES_URL", "DAGSTER_CODE_SERVER_HOST", "DAGSTER_CODE_SERVER_PORT"}
    assert given["migrate"] == {"BILLING_DATABASE_URL"}
    assert given["daemon"] == code_server
    assert given["webserver"] == code_server | {"UI_AUTH", "UI_HOSTS", "UI_READ_ONLY", "DAGSTER_UI_URL"}


def test_the_code_server_is_reached_by_webserver_and_daemon_only() -> None:
    neighbours = {
        name
        for name, service in SERVICES.items()
        for network in service["networks"]
        if network in SERVICES["code"]["networks"] and network != "outside"
    }
    assert neighbours == {"code", "webserver", "daemon", "run-history"}
    assert [name for name in SERVICES if "outside" in SERVICES[name]["networks"]] == ["migrate", "code"]
    assert [name for name, network in NETWORKS.items() if network.get("internal")] == ["code", "run-history"]


def test_only_the_guarded_ui_is_published_and_to_this_machine_only() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "webserver": ["127.0.0.1:3000:3000"]
    }
    assert SERVICES["webserver"]["command"][:2] == ["billing-orchestration", "webserver"]


def test_each_variable_of_the_compose_file_is_in_the_example_of_settings() -> None:
    example = (ROOT / ".env.example").read_text()
    for name in set(re.findall(r"\$\{(\w+)", COMPOSE + DOCKER_RUNS)):
        assert re.search(rf"^(?:# )?{name}=", example, re.MULTILINE), name


def test_runs_in_containers_have_the_instance_of_all_others_but_for_the_launcher() -> None:
    own, shared = (
        yaml.safe_load((ROOT / "deploy" / name).read_text()) for name in ("compose/dagster.yaml", "dagster.yaml")
    )
    launcher = own.pop("run_launcher")
    del shared["run_launcher"]
    assert own == shared
    named = {network["name"] for network in yaml.safe_load(DOCKER_RUNS)["networks"].values()}
    assert set(launcher["config"]["networks"]) == named


def test_only_daemon_and_webserver_reach_dockers_socket() -> None:
    services = yaml.safe_load(DOCKER_RUNS)["services"]
    given = {
        name for name, service in services.items() if any("docker.sock" in volume for volume in service["volumes"])
    }
    assert given == {"webserver", "daemon"}
    assert set(services) <= set(SERVICES)
    assert "docker.sock" not in COMPOSE


class Repeated(dict[str, str]):
    """A section in which a key may stand several times, as in systemd's files."""

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, list) and key in self:
            self[key].extend(value)  # type: ignore[attr-defined]
        else:
            super().__setitem__(key, value)


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, dict_type=Repeated, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path)
    return parser


def test_systemd_takes_the_units() -> None:
    """By systemd itself where it is; where it is not, by a parser of its form."""
    if shutil.which("systemd-analyze"):
        told = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", *map(str, UNITS)], capture_output=True, text=True, check=False
        )
        # What they start is installed on a server only.
        faults = [line for line in told.stderr.splitlines() if "/opt/billing/" not in line and "deploy/systemd" in line]
        assert faults == []
    for path in UNITS:
        sections = unit(path)
        assert "Description" in sections["Unit"]
        if path.suffix == ".service":
            assert sections["Service"]["User"] == "billing"
            assert sections["Service"]["NoNewPrivileges"] == "yes"


def test_only_units_that_reach_the_shop_read_its_key() -> None:
    readers = {
        path.stem
        for path in UNITS
        if "/etc/billing/settings.env" in unit(path).get("Service", "EnvironmentFile", fallback="")
    }
    assert readers == {"billing-code", "billing-migrate", "billing-live"}


def test_a_code_server_that_stops_tells_its_runs_and_waits_longer_than_a_charge() -> None:
    service = unit(ROOT / "deploy" / "systemd" / "billing-code.service")["Service"]
    assert service["KillMode"] == "control-group"
    assert int(service["TimeoutStopSec"]) > 60
