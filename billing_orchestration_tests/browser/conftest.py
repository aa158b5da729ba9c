"""One desk for all tests of this folder: to start it takes a quarter of a minute, and to wait for ticks longer."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

from billing_orchestration.database.engine import create_engine
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.browser.desk import Desk, open_desk
from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.fixtures.receiver import Receiver

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from billing_orchestration_tests.browser.ui import Ui

# `make browser` brings Playwright; without it a plain pytest passes these tests by.
collect_ignore_glob = [] if importlib.util.find_spec("playwright") else ["test_*.py"]


@pytest.fixture(scope="session")
def desk(
    postgres_server: Server,
    migrated_template: str,
    sandbox_server: Sandbox,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Desk]:
    """The deployment after an outage, with work waiting. Its lists are slow until `answering_provider`."""
    sandbox_server.reset()
    receiver = Receiver()
    with postgres_server.database(migrated_template) as billing_url, postgres_server.database() as run_history_url:
        engine = create_engine(billing_url, application_name="tests")
        try:
            with open_desk(
                tmp_path_factory.mktemp("deployment"), engine, billing_url, run_history_url, sandbox_server, receiver
            ) as desk:
                yield desk
                sandbox_server.behave()  # a run that still waits for it ends, instead of being ended
        finally:
            engine.dispose()
            receiver.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, started once."""
    from billing_orchestration_tests.browser.ui import started_browser

    with started_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def tab(desk: Desk, browser: Browser) -> Iterator[Ui]:
    """One tab for all tests: the UI's code, some megabytes, is loaded and compiled once."""
    from billing_orchestration_tests.browser.ui import browsing

    with browsing(browser, desk.deployment.address) as tab:
        yield tab


@pytest.fixture
def ui(tab: Ui) -> Ui:
    """The tab; each page that is opened in it starts with an empty profile (nothing typed before is kept)."""
    return tab


@pytest.fixture
def answering_provider(desk: Desk) -> Iterator[Sandbox]:
    """The provider in good health, before and after: what it held back so far goes on at once."""
    sandbox = desk.service.sandbox
    sandbox.behave()
    yield sandbox
    sandbox.behave()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what was on the screen when a test failed."""
    report = yield
    tab: Ui | None = getattr(item, "funcargs", {}).get("ui")
    if tab is not None and report.when == "call" and report.failed:
        report.sections.append(("on the screen", tab.shown()))
    return report
