"""The documents beside the UI: the links of alerts and pages open, and nothing but documents is served."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import urllib3
from starlette.responses import PlainTextResponse

from billing_orchestration.jobs.money_checks import CHECKS
from billing_orchestration.jobs.run_alerts import CONSEQUENCES
from billing_orchestration.settings import runbook_link
from billing_orchestration.ui.documents import Documents, documents_folder
from billing_orchestration_tests.ui.serving import HOST, listening


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(Documents(PlainTextResponse("the UI"), documents_folder(), "/dagster")) as port:
        yield f"http://{HOST}:{port}"


def get(url: str) -> urllib3.BaseHTTPResponse:
    return urllib3.request("GET", url, retries=False)


def test_every_heading_that_an_alert_or_a_page_links_to_is_an_anchor_of_the_page(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_UI_URL", "https://dagster.example/dagster")
    page = get(address + runbook_link())
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    linked = {*CONSEQUENCES, *(check.name for check in CHECKS), "quarantine", "clocksapart", "resolve_quarantine_job"}
    assert [heading for heading in linked if f'id="{heading}"' not in page.data.decode()] == []


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/dagster/docs/security.md", 200),
        ("/dagster/docs/images/run.png", 200),
        ("/dagster/docs/%2e%2e/README.md", 404),
        ("/dagster/docs/", 404),
        ("/dagster/docs//etc/passwd", 404),
    ],
)
def test_only_documents_are_served(address: str, path: str, status: int) -> None:
    assert get(address + path).status == status


@pytest.mark.parametrize(("path", "language"), [("operations.md", "en"), ("ru/operations.md", "ru")])
def test_a_page_says_its_language_and_its_own_links_lead_to_its_headings(
    address: str, path: str, language: str
) -> None:
    page = get(f"{address}/dagster/docs/{path}").data.decode()
    assert f'<html lang="{language}">' in page
    own = [unquote(anchor) for anchor in re.findall(r'href="#([^"]+)"', page)]
    assert len(own) > 5
    assert [anchor for anchor in own if f'id="{anchor}"' not in page] == []


def test_everything_else_goes_to_the_ui(address: str) -> None:
    assert get(f"{address}/dagster/runs").data == b"the UI"


def test_without_the_folder_it_says_where_the_documents_may_be() -> None:
    with listening(Documents(PlainTextResponse("the UI"), None)) as port:
        assert b"DOCS_URL" in get(f"http://{HOST}:{port}/docs/operations.md").data


@pytest.mark.parametrize(
    ("docs_url", "link"),
    [
        ("", "/docs/operations.md"),
        ("https://wiki.example/billing/", "https://wiki.example/billing/operations.md"),
        ("no address", "/docs/operations.md"),
    ],
)
def test_a_team_may_keep_the_documents_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, docs_url: str, link: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DAGSTER_UI_URL", raising=False)
    monkeypatch.setenv("DOCS_URL", docs_url)
    assert runbook_link() == link
