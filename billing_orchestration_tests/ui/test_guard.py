"""The guard in front of the Dagster UI, over real sockets: each way in that is closed, and each that must stay open.

What a refused request would have done is looked up in the run history behind Dagster's own webserver, and each attack
is shown to work on that webserver without the guard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import urllib3
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from billing_orchestration.ui.guard import Guard
from billing_orchestration.ui_login import new_login, read_login
from billing_orchestration_tests.ui.serving import HOST, DagsterUi, dagster_ui, deletion, listening

NAME = "dagster.example"
JSON = {"Content-Type": "application/json"}
PASSWORD, ENTRY = new_login("vera")


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterUi]:
    with dagster_ui(tmp_path_factory.mktemp("ui")) as ui:
        yield ui


@pytest.fixture(scope="module")
def port(ui: DagsterUi) -> Iterator[int]:
    """Guarded, without a login."""
    with listening(Guard(ui.app, names={NAME})) as port:
        yield port


@pytest.fixture(scope="module")
def unguarded(ui: DagsterUi) -> Iterator[int]:
    with listening(ui.app) as port:
        yield port


@pytest.fixture(scope="module")
def by_password(ui: DagsterUi) -> Iterator[int]:
    with listening(Guard(ui.app, login=read_login(f"{ENTRY},oleg:{new_login('oleg')[1].split(':')[2]}"))) as port:
        yield port


@pytest.fixture(scope="module")
def by_proxy(ui: DagsterUi) -> Iterator[int]:
    with listening(Guard(ui.app, login=read_login("header:X-Forwarded-User"))) as port:
        yield port


@pytest.fixture
def run(ui: DagsterUi) -> str:
    return ui.add_run()


def send(port: int, method: str, path: str, headers: Mapping[str, str], body: str | None = None) -> Any:
    return urllib3.request(
        method, f"http://{HOST}:{port}{path}", headers=dict(headers), body=body, retries=False, timeout=60
    )


def delete(port: int, run: str, **headers: str) -> int:
    """Delete a run as the UI does: by POST, as JSON."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return int(send(port, "POST", "/graphql", {**JSON, **named}, json.dumps({"query": deletion(run)})).status)


# GraphQL in a form that any page can send


def by_get(port: int, run: str) -> int:
    return int(send(port, "GET", f"/graphql?{urlencode({'query': deletion(run)})}", {"Accept": "image/*"}).status)


def by_form(port: int, run: str) -> int:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    return int(send(port, "POST", f"/graphql?{urlencode({'query': deletion(run)})}", form, "a=b").status)


def by_no_type_at_all(port: int, run: str) -> int:
    return int(send(port, "POST", f"/graphql?{urlencode({'query': deletion(run)})}", {}).status)


def by_disguised_json(port: int, run: str) -> int:
    disguised = {"Content-Type": "text/plain; application/json"}
    return int(send(port, "POST", "/graphql", disguised, json.dumps({"query": deletion(run)})).status)


def by_graphql_as_such(port: int, run: str) -> int:
    return int(send(port, "POST", "/graphql", {"Content-Type": "application/graphql"}, deletion(run)).status)


@pytest.mark.parametrize("attack", [by_get, by_form, by_no_type_at_all, by_disguised_json, by_graphql_as_such])
def test_graphql_is_taken_by_post_as_json_only(
    ui: DagsterUi, port: int, unguarded: int, run: str, attack: Callable[[int, str], int]
) -> None:
    assert attack(port, run) in (405, 415)
    assert ui.has_run(run)
    attack(unguarded, run)
    assert not ui.has_run(run), "the attack does not work at all"


def test_no_link_fills_the_graphql_page_in(port: int, run: str) -> None:
    link = f"/graphql?{urlencode({'query': deletion(run)})}"
    assert send(port, "GET", link, {"Accept": "text/html"}).status == 405


@pytest.mark.parametrize("path", ["report_asset_materialization", "report_asset_check", "report_asset_observation"])
def test_dagsters_endpoints_that_report_events_are_closed(ui: DagsterUi, port: int, path: str) -> None:
    assert send(port, "POST", f"/{path}/billing/plans", JSON, "{}").status == 405
    assert ui.instance.get_asset_keys() == []


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_no_other_method_is_taken_and_no_preflight_is_answered(port: int, method: str) -> None:
    answer = send(port, method, "/graphql", {"Origin": f"http://{HOST}:{port}"})
    assert answer.status == 405
    assert not any(name.lower().startswith("access-control-") for name in answer.headers)


# From where


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.localhost", f"{NAME}.evil.example", f"{NAME}:8080", "localhost."]
)
def test_a_name_that_is_not_the_uis_is_refused(ui: DagsterUi, port: int, run: str, host: str) -> None:
    assert delete(port, run, Host=host) == 403
    assert ui.has_run(run)
    assert send(port, "GET", "/", {"Host": host}).status == 403


@pytest.mark.parametrize("host", [NAME, NAME.upper(), "localhost", "localhost:8080", "127.0.0.1:3000", "[::1]:3000"])
def test_the_uis_own_names_and_those_of_this_machine_are_served(port: int, run: str, host: str) -> None:
    assert delete(port, run, Host=host, Origin=f"https://{host.lower()}") == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost:1",
        f"https://{NAME}:8443",
        f"https://{NAME}.evil.example",
        "[",
        "",
    ],
)
def test_another_pages_origin_is_refused(ui: DagsterUi, port: int, run: str, origin: str) -> None:
    assert delete(port, run, Origin=origin) == 403
    assert ui.has_run(run)
    assert send(port, "GET", "/", {"Origin": origin}).status == 403


def test_a_proxy_that_puts_its_own_host_leaves_the_origin_recognisable(port: int, run: str) -> None:
    assert delete(port, run, Host="127.0.0.1:3000", Origin=f"https://{NAME}") == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}, 403),
    ],
)
def test_a_link_from_elsewhere_leads_to_the_ui_and_nothing_else_does(
    port: int, headers: Mapping[str, str], status: int
) -> None:
    assert send(port, "GET", "/runs", headers).status == status


def test_a_navigation_from_elsewhere_sends_nothing(ui: DagsterUi, port: int, run: str) -> None:
    headers = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert delete(port, run, **headers) == 403
    assert ui.has_run(run)


# The websocket


def subscribe(port: int, run: str, **headers: str) -> str:
    """Watch a run as its page does, and hand back what the first message holds."""
    query = f'subscription {{ pipelineRunLogs(runId: "{run}") {{ __typename }} }}'
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with connect(
        f"ws://{HOST}:{port}/graphql", subprotocols=[Subprotocol("graphql-ws")], additional_headers=named
    ) as socket:
        socket.send(json.dumps({"type": "connection_init"}))
        socket.send(json.dumps({"type": "start", "id": "1", "payload": {"query": query}}))
        assert json.loads(socket.recv(60)) == {"type": "connection_ack"}
        return str(json.loads(socket.recv(60))["payload"]["data"]["pipelineRunLogs"]["__typename"])


def test_the_websocket_is_the_uis_own(port: int, run: str) -> None:
    for headers in ({}, {"Origin": f"http://{HOST}:{port}"}):
        assert subscribe(port, run, **headers) == "PipelineRunLogsSubscriptionSuccess"


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}]
)
def test_another_page_gets_no_websocket(port: int, unguarded: int, run: str, headers: Mapping[str, str]) -> None:
    with pytest.raises(InvalidStatus) as refused:
        subscribe(port, run, **headers)
    assert refused.value.response.status_code == 403
    assert subscribe(unguarded, run, **headers) == "PipelineRunLogsSubscriptionSuccess"


# Logging in


def basic(credentials: str) -> dict[str, str]:
    return urllib3.make_headers(basic_auth=credentials)


def test_a_password_opens_the_ui_with_its_websocket(by_password: int, run: str) -> None:
    known = {"Authorization": basic(f"vera:{PASSWORD}")["authorization"]}
    assert subscribe(by_password, run, **known) == "PipelineRunLogsSubscriptionSuccess"
    assert send(by_password, "GET", "/", known).status == 200
    assert delete(by_password, run, **known) == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Basic",
        "Basic !",
        "Basic dmVyYQ==",
        f"Bearer {PASSWORD}",
        basic(f"oleg:{PASSWORD}")["authorization"],
        basic(f"vera:{PASSWORD}x")["authorization"],
        basic("vera:")["authorization"],
        basic(ENTRY.removeprefix("basic:"))["authorization"],
    ],
    # A password is drawn anew in each process, and each must collect the same tests.
    ids=["none", "empty", "no words", "no base64", "no password", "a token", "another user", "one sign more",
         "an empty password", "the entry itself"],
)  # fmt: skip
def test_nobody_gets_in_without_the_password(
    ui: DagsterUi, by_password: int, run: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = send(by_password, "GET", "/", headers)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert send(by_password, "GET", "/index.html", headers).status == 401
    assert delete(by_password, run, **headers) == 401
    assert ui.has_run(run)
    with pytest.raises(InvalidStatus) as refused:
        subscribe(by_password, run, **headers)
    assert refused.value.response.status_code == 401


def test_a_login_does_not_open_the_door_to_other_pages(ui: DagsterUi, by_password: int, run: str) -> None:
    known = basic(f"vera:{PASSWORD}")["authorization"]
    assert delete(by_password, run, Authorization=known, Origin="https://evil.example") == 403
    assert ui.has_run(run)


def test_the_login_proxy_names_somebody(ui: DagsterUi, by_proxy: int, run: str) -> None:
    for headers in ({}, {"X_Forwarded_User": " "}, {"X_Forwarded_Usher": "vera"}):
        assert delete(by_proxy, run, **headers) == 403
    assert ui.has_run(run)
    assert delete(by_proxy, run, X_Forwarded_User="vera") == 200


def test_only_the_login_proxy_itself_is_believed(ui: DagsterUi, run: str) -> None:
    for peers, status in (("10.0.0.5,172.18.0.0/16", 403), ("10.0.0.5,127.0.0.0/8", 200)):
        with listening(Guard(ui.app, login=read_login(f"header:X-Forwarded-User from {peers}"))) as port:
            forged = {"X_Forwarded_User": "vera", "X_Forwarded_For": "10.0.0.5", "Forwarded": "for=10.0.0.5"}
            assert delete(port, run, **forged) == status


def test_a_health_check_on_the_machine_itself_needs_no_login(by_password: int, by_proxy: int) -> None:
    for port in (by_password, by_proxy):
        assert send(port, "GET", "/server_info", {}).status == 200
        assert send(port, "GET", "/server_info/", {}).status in (401, 403)


# What it shows


def test_pages_and_static_files_are_served_and_none_may_be_framed(port: int) -> None:
    index = send(port, "GET", "/", {})
    script = next(part.split(b'"')[0] for part in index.data.split(b'src="')[1:] if b".js" in part.split(b'"')[0])
    for path, accept in (("/", "*/*"), ("/runs/x", "*/*"), ("/graphql", "text/html"), (script.decode(), "*/*")):
        answer = send(port, "GET", path, {"Accept": accept})
        assert answer.status == 200, path
        assert "frame-ancestors 'none'" in answer.headers.getlist("Content-Security-Policy")
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "script-src" in index.headers["Content-Security-Policy"], "Dagster's own policy stays"


def test_under_a_path_of_its_own_the_rules_are_the_same(tmp_path: Path) -> None:
    with dagster_ui(tmp_path, prefix="/dagster") as ui:
        run = ui.add_run()
        with listening(Guard(ui.app, prefix="/dagster")) as port:
            query = urlencode({"query": deletion(run)})
            assert send(port, "GET", f"/dagster/graphql?{query}", {"Accept": "image/*"}).status == 405
            assert ui.has_run(run)
            assert send(port, "POST", "/dagster/graphql", JSON, json.dumps({"query": deletion(run)})).status == 200
            assert not ui.has_run(run)


# Read only


@pytest.mark.parametrize("read_only", [False, True])
def test_a_read_only_ui_shows_runs_and_changes_nothing(tmp_path: Path, read_only: bool) -> None:
    with dagster_ui(tmp_path, read_only=read_only) as ui:
        run = ui.add_run()
        with listening(Guard(ui.app)) as port:
            assert subscribe(port, run) == "PipelineRunLogsSubscriptionSuccess"
            delete(port, run)
            assert ui.has_run(run) is read_only
