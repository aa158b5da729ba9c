"""A page of another site, open in the browser of an operator, against the Dagster UI: it changes and reads nothing.

The same page deletes runs through Dagster's webserver as it comes, so each of its ways is a real one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from billing_orchestration.ui.guard import Guard
from billing_orchestration.ui_login import new_login, read_login
from billing_orchestration_tests.browser.ui import PATIENCE_S
from billing_orchestration_tests.ui.serving import DagsterUi, dagster_ui, deletion, listening
from billing_orchestration_tests.waiting import wait_until

# Each takes the UI's address and a mutation. A browser lets any page send them without asking the UI first.
WAYS = {
    "an image": "(ui, query) => { new Image().src = `${ui}/graphql?query=${encodeURIComponent(query)}` }",
    "a fetch by GET": "(ui, query) => fetch(`${ui}/graphql?query=${encodeURIComponent(query)}`, {mode: 'no-cors'})",
    "a form": """(ui, query) => {
        const form = document.createElement('form')
        form.method = 'POST'
        form.action = `${ui}/graphql?query=${encodeURIComponent(query)}`
        document.body.append(form)
        form.submit()
    }""",
    "JSON as text": """(ui, query) => fetch(`${ui}/graphql`, {
        method: 'POST', mode: 'no-cors', body: JSON.stringify({query}),
        headers: {'Content-Type': 'text/plain; application/json'},
    })""",
    "a beacon": "(ui, query) => navigator.sendBeacon(`${ui}/graphql?query=${encodeURIComponent(query)}`)",
    "a fetch with a login": """(ui, query) => fetch(`${ui}/graphql?query=${encodeURIComponent(query)}`, {
        method: 'POST', mode: 'no-cors', credentials: 'include',
    })""",
}
WEBSOCKET = """ui => new Promise(done => {
    const socket = new WebSocket(`${ui.replace('http', 'ws')}/graphql`, 'graphql-ws')
    socket.onopen = () => done('open')
    socket.onerror = () => done('refused')
})"""
FRAME = """ui => new Promise(done => {
    const frame = document.createElement('iframe')
    frame.onload = done
    frame.src = ui
    document.body.append(frame)
})"""
OWN_FETCH = """query => fetch('/graphql', {
    method: 'POST', body: JSON.stringify({query}), headers: {'Content-Type': 'application/json'},
}).then(answer => answer.status)"""
PASSWORD, ENTRY = new_login("vera")


class Answered:
    """An application, and the status of each answer to GraphQL."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.statuses: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start" and scope["path"] == "/graphql":
                self.statuses.append(message["status"])

        await self._app(scope, receive, note)


@pytest.fixture(scope="module")
def dagster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterUi]:
    with dagster_ui(tmp_path_factory.mktemp("ui")) as dagster:
        yield dagster


@pytest.fixture
def answered(dagster: DagsterUi) -> Answered:
    """The guarded UI, with a login."""
    return Answered(Guard(dagster.app, login=read_login(ENTRY)))


@pytest.fixture
def guarded(answered: Answered) -> Iterator[str]:
    with listening(answered) as port:
        yield f"http://localhost:{port}"


@pytest.fixture
def unguarded(dagster: DagsterUi) -> Iterator[str]:
    with listening(dagster.app) as port:
        yield f"http://localhost:{port}"


@pytest.fixture
def hostile() -> Iterator[str]:
    """Another site: 127.0.0.1, where the UI is localhost."""
    with listening(Starlette(routes=[Route("/", lambda _: HTMLResponse("<h1>You have won</h1>"))])) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(browser: Browser, guarded: str) -> Iterator[Page]:
    """The tab of an operator who has just logged in: the browser sends the password along by itself."""
    context = browser.new_context(http_credentials={"username": "vera", "password": PASSWORD})
    try:
        page = context.new_page()
        page.goto(guarded, wait_until="commit")
        yield page
    finally:
        context.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_hostile_page_changes_nothing(
    page: Page, dagster: DagsterUi, guarded: str, unguarded: str, answered: Answered, hostile: str, way: str
) -> None:
    run = dagster.add_run()
    page.goto(hostile)
    answered.statuses.clear()
    page.evaluate(f"([ui, query]) => {{ ({WAYS[way]})(ui, query) }}", [guarded, deletion(run)])
    wait_until(lambda: answered.statuses or page.wait_for_timeout(20), "the guard's answer")
    assert set(answered.statuses) == {403}
    assert dagster.has_run(run)
    again = page.context.new_page()
    again.goto(hostile)
    again.evaluate(f"([ui, query]) => {{ ({WAYS[way]})(ui, query) }}", [unguarded, deletion(run)])
    wait_until(lambda: not dagster.has_run(run) or again.wait_for_timeout(20), "Dagster to do it without the guard")


def test_a_hostile_page_gets_no_websocket(page: Page, guarded: str, unguarded: str, hostile: str) -> None:
    page.goto(hostile)
    assert page.evaluate(WEBSOCKET, guarded) == "refused"
    assert page.evaluate(WEBSOCKET, unguarded) == "open"


def test_a_hostile_page_cannot_frame_the_ui(page: Page, guarded: str, unguarded: str, hostile: str) -> None:
    for address, framed in ((guarded, False), (unguarded, True)):
        page.goto(hostile)
        page.evaluate(FRAME, address)
        assert ("/_next/static/" in page.frames[1].content()) is framed


def test_a_name_that_leads_to_this_machine_opens_nothing(page: Page, guarded: str) -> None:
    page.goto(guarded.replace("localhost", "evil.localhost"))
    assert page.inner_text("body") == "The UI is not served under this name: add it to UI_HOSTS."


def test_the_ui_itself_works_behind_the_guard_also_by_a_link_from_elsewhere(
    page: Page, dagster: DagsterUi, guarded: str, hostile: str
) -> None:
    run = dagster.add_run()
    page.goto(hostile)
    page.evaluate("link => { location.href = link }", f"{guarded}/runs")
    page.get_by_text(run[:8]).first.wait_for(timeout=PATIENCE_S * 1000)
    assert page.evaluate(WEBSOCKET, guarded) == "open"
    assert page.evaluate(OWN_FETCH, deletion(run)) == 200
    assert not dagster.has_run(run)
