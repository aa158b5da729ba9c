"""The Dagster UI in a real browser: pages by name, clicks as an operator makes them, and what is on the screen.

Selectors go by what a person reads wherever there is such a text. Grids and editors have none: there they go by the
stable part of a class name.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

# Where pictures for the README go; without it none is taken, so that a test run leaves no trace.
PICTURES = os.environ.get("SCREENSHOTS")
NAMES = ("chromium", "chromium-browser", "google-chrome")
# Nothing here needs the network beyond this machine, and the tests may run as root in a container.
# A run of a job is launched and over within seconds; ticks, which take longer, are waited for in the run history.
PATIENCE_S = 90.0
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Wide enough for what the pages show side by side, links included.
SIZE = {"width": 1440, "height": 900}
_GREEN = re.compile("success")


def find_browser() -> str:
    """The path of a Chromium: CHROMIUM, or the first on the PATH. Raises FileNotFoundError that says how to get one."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        raise FileNotFoundError("no Chromium was found: install the package chromium, or name one: CHROMIUM=/path")
    return found


@contextmanager
def started_browser() -> Iterator[Browser]:
    """Lend a running Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def browsing(browser: Browser, address: str) -> Iterator[Ui]:
    """Lend a tab. What the UI keeps of what was typed goes with each page that is opened; its own code stays cached."""
    context = browser.new_context(viewport=SIZE, timezone_id="UTC", locale="en-US")  # type: ignore[arg-type]
    context.add_init_script("localStorage.clear()")
    try:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_S * 1000)
        expect.set_options(timeout=PATIENCE_S * 1000)
        yield Ui(page, address)
    finally:
        context.close()


class Ui:
    """One tab."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self._address = address

    def open(self, path: str) -> None:
        """Open a page of the UI."""
        self.page.goto(self._address + path, wait_until="commit")

    def shown(self) -> str:
        """The address and what a person reads on the page now, for a test that failed."""
        return f"{self.page.url}\n{self.page.locator('body').inner_text()[:6000]}"

    def sees(self, text: str) -> None:
        """Wait until a text is on the screen."""
        expect(self.page.get_by_text(text).first).to_be_visible()

    def picture(self, name: str) -> None:
        """Take a picture for the README, if pictures are asked for."""
        if PICTURES:
            Path(PICTURES).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(PICTURES) / f"{name}.png", animations="disabled")

    # --- a job's partitions

    def open_backfill(self, job: str) -> Locator:
        """Open the dialog that launches a backfill."""
        self.open(f"/locations/billing/jobs/{job}/partitions")
        self.page.get_by_role("button", name="Launch backfill").click()
        dialog = self.page.get_by_role("dialog")
        expect(dialog).to_contain_text(f"Launch {job} backfill")
        return dialog

    def select_by_mouse(self, dialog: Locator, first: int, last: int, count: int) -> None:
        """Drag over the bar, from the middle of one of its `count` partitions to the middle of another."""
        bar = dialog.locator("[class*=PartitionStatusBar_partitionSpansContainer]")
        expect(bar).to_be_visible()
        box = bar.bounding_box()
        assert box is not None
        y, width = box["y"] + box["height"] / 2, box["width"] / count
        self.page.mouse.move(box["x"] + width * (first + 0.5), y)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + width * (last + 0.5), y, steps=10)
        self.page.mouse.up()

    def add_tag(self, dialog: Locator, name: str, value: str) -> None:
        """Give the runs of a backfill a tag."""
        dialog.get_by_role("button", name="Add tags to backfill runs").click()
        self.page.get_by_placeholder("Tag Key").fill(name)
        self.page.get_by_placeholder("Tag Value").fill(value)
        self.page.get_by_role("button", name="Apply").click()
        expect(self.page.get_by_placeholder("Tag Key")).to_have_count(0)  # until then there are two dialogs
        expect(dialog).to_contain_text(name)

    def select_by_name(self, dialog: Locator, first: str, last: str) -> None:
        """Type a range, as one does in a grid of thousands."""
        dialog.locator("input[placeholder^='ex:']").fill(f"[{first}...{last}]")
        self.page.keyboard.press("Enter")

    def launch_backfill(self, dialog: Locator, runs: int) -> str:
        """Include what is complete already, launch, and hand back the backfill's id."""
        expect(dialog.get_by_text("Completed (")).to_be_visible()
        completed = dialog.locator("label", has_text="Completed (")
        if not completed.locator("input").is_checked():
            completed.click()
        dialog.get_by_role("button", name=f"Submit {runs} run").click()
        toast = self.page.get_by_text("Created backfill")
        expect(toast).to_be_visible()
        return toast.inner_text().split()[-1]

    def sees_green(self, job: str, partitions: Sequence[str]) -> None:
        """Wait until the grid shows the last run of each of these partitions in green."""
        self.open(f"/locations/billing/jobs/{job}/partitions")
        self.page.get_by_role("button", name="Show per-step status").click()
        for partition in partitions:
            column = self.page.locator("[class*=RunMatrixUtils_gridColumn]").filter(has_text=partition)
            expect(column.locator("[class*=RunMatrixUtils_square]").first).to_have_attribute("class", _GREEN)

    # --- the launchpad

    def open_launchpad(self, job: str) -> None:
        """Open a job's launchpad, with its editor loaded and checked."""
        self.open(f"/locations/billing/jobs/{job}/playground")
        self.sees("No errors")

    def click_link(self, link: Locator) -> None:
        """Click a link. The page that some open in a tab of its own is opened in this one."""
        if link.get_attribute("target") != "_blank":
            link.click()
            return
        with self.page.context.expect_page() as opened:
            link.click()
        address = opened.value.url
        opened.value.close()
        self.page.goto(address, wait_until="commit")

    def follow(self, link: Locator, *lines: str) -> None:
        """Follow a link to a launchpad, which opens filled in with these lines."""
        self.click_link(link)
        for line in lines:
            expect(self.page.locator(".CodeMirror-line", has_text=line).first).to_be_visible()
        self.sees("No errors")

    def fill_in(self, field: str, words: str) -> None:
        """Write words between the empty quotes of a field."""
        self.page.locator(".CodeMirror-line", has_text=f'{field}: ""').click()
        self.page.keyboard.press("End")
        self.page.keyboard.press("ArrowLeft")
        self.page.keyboard.type(words)
        expect(self.page.locator(".CodeMirror-line", has_text=f'{field}: "{words}"')).to_be_visible()

    def completions(self) -> str:
        """What the editor offers for the fields of the resource `run`, with their descriptions."""
        self.page.locator(".CodeMirror-line", has_text="dry_run").click()
        self.page.keyboard.press("Home")
        self.page.keyboard.press("Control+Space")
        hints = self.page.locator(".CodeMirror-hints")
        expect(hints).to_be_visible()
        text = hints.inner_text()
        self.page.keyboard.press("Escape")
        return text

    def set_dry_run(self) -> None:
        """Make it a dry run, with a double click on the value."""
        self.page.locator(".CodeMirror-line", has_text="dry_run").get_by_text("false").dblclick()
        self.page.keyboard.type("true")
        expect(self.page.locator(".CodeMirror-line", has_text="dry_run: true")).to_be_visible()
        self.sees("No errors")

    def launch(self) -> str:
        """Launch, and hand back the run's id. The UI asks first where a job has partitions and none is chosen."""
        self.page.get_by_role("button", name="Launch Run").click()
        confirm = self.page.get_by_role("dialog").get_by_role("button", name="Confirm")
        expect(confirm.or_(self.page.get_by_text("Run of ")).first).to_be_visible()
        if confirm.is_visible():
            confirm.click()
        self.page.wait_for_url("**/runs/*")
        return self.page.url.rsplit("/", 1)[-1].partition("?")[0]

    # --- an asset

    def open_asset(self, name: str, view: str = "overview") -> None:
        """Open the page of an asset of ours."""
        self.open(f"/assets/billing/{name}?view={view}")

    def plots(self, name: str, *numbers: str) -> None:
        """Wait until an asset's page draws these numbers."""
        self.open_asset(name)
        self.page.get_by_role("button", name="Plots").click()
        for number in numbers:
            expect(self.page.get_by_text(number, exact=True).first).to_be_visible()
        assert self.page.locator("canvas").count() >= len(numbers)

    def decision_link(self, entry: int, word: str) -> Locator:
        """One of an entry's links on the quarantine's page."""
        row = self.page.locator("tr").filter(has=self.page.get_by_text(f"decide {entry}", exact=True))
        return row.get_by_role("link", name=word, exact=True)

    def execute_checks(self) -> None:
        """Run all checks of the asset whose checks are shown."""
        self.page.get_by_role("button", name="Execute all").click()

    def sees_check(self, name: str, verdict: str) -> None:
        """Wait for a check's verdict in the list, and open it."""
        item = self.page.locator("[class*=AssetChecks_checkRow]").filter(has_text=name)
        expect(item).to_contain_text(verdict)
        item.click()

    # --- a run

    def open_run(self, run_id: str, op: str = "") -> None:
        """Open a run's page, with the events of one op or of all."""
        self.open(f"/runs/{run_id}" + (f"?logs=step%3A{op}" if op else ""))

    def event(self, event: str) -> Locator:
        """The last event of a type among those that are shown."""
        row = self.page.locator("[class*=VirtualizedTable_row]", has_text=event).last
        expect(row).to_be_visible()
        return row

    def full_message(self, event: str) -> Locator:
        """Open an event in full, by its type, as a click on "View full message" does."""
        row = self.event(event)
        row.get_by_role("button", name="View full message").click()
        return self.page.get_by_role("dialog")

    def next_step(self, told: Locator, name: str) -> Locator:
        """The link beside the name of a next step."""
        return told.locator("tr").filter(has=self.page.get_by_text(name, exact=True)).get_by_role("link").first

    def terminate(self) -> None:
        """Terminate the run whose page is shown."""
        self.page.get_by_role("button", name="Terminate").click()
        self.page.get_by_role("dialog").get_by_role("button", name=re.compile("Terminate")).click()

    def execute_again(self) -> str:
        """Re-execute the whole run whose page is shown, and hand back the new run's id."""
        before = self.page.url
        self.page.get_by_role("button", name="Re-execute all").click()
        self.page.wait_for_url(lambda url: "/runs/" in url and url != before)
        return self.page.url.rsplit("/", 1)[-1].partition("?")[0]

    # --- schedules

    def switch(self) -> None:
        """Flip the switch of the schedule whose page is shown."""
        self.page.locator("tr", has_text="Running").locator("label").first.click()

    def open_schedule(self, name: str) -> None:
        """Open a schedule's page, with its ticks."""
        self.open(f"/locations/billing/schedules/{name}")
        self.sees("Tick history")
