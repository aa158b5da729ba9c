"""What a team deploys unchanged: each container gets only what it needs, and only the UI is reached from outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
COMPOSE = (ROOT / "deploy" / "compose" / "compose.yaml").read_text()
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
NETWORKS: dict[str, Any] = yaml.safe_load(COMPOSE)["networks"]


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
    for name in set(re.findall(r"\$\{(\w+)", COMPOSE)):
        assert re.search(rf"^(?:# )?{name}=", example, re.MULTILINE), name
