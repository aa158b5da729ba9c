"""Alerts to people, through apprise: Telegram, Slack, mail and a hundred more, named by ALERT_URLS.

No failure in here may reach a job: only the return value says that a receiver is dead or wrong.
The URLs hold tokens, so no text, log or event ever shows one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import urllib3

from billing_orchestration.domain.printable import without_links
from billing_orchestration.settings import Settings, SettingsError, load_what_is_right

if TYPE_CHECKING:
    from apprise import Apprise

# A message of this many characters fits into every service that people use on a phone.
_LONGEST = 3500


@dataclass(frozen=True, slots=True)
class Alert:
    """One problem, for a person on a phone: what happened, whose money it concerns, what to do, where to look."""

    title: str
    happened: str
    money: str
    do: str
    link: str

    @property
    def body(self) -> str:
        """The text below the title. `happened` may quote a stranger; its link is the only one."""
        happened = without_links(self.happened)
        return f"{happened}\n\nThe money: {self.money}\nWhat to do: {self.do}\n{self.link}"


class Alerts:
    """Where alerts go. Settings are read on first use; a fault in an unrelated one does not silence alerts."""

    def __init__(self, load: Callable[[], Settings]) -> None:
        self._load = load
        self._settings: Settings | None = None

    @property
    def settings(self) -> Settings:
        """The settings that are valid."""
        if self._settings is None:
            try:
                self._settings = self._load()
            except SettingsError:
                self._settings, _ = load_what_is_right()
        return self._settings

    @property
    def wanted(self) -> bool:
        """Whether anybody wants alerts."""
        return self.settings.alert_urls is not None

    def link(self, path: str) -> str:
        """A page of the Dagster UI."""
        return f"{self.settings.dagster_ui_url}/{path}"

    def runbook(self, heading: str) -> str:
        """What to read about it: a heading of docs/operations.md."""
        return f"{self.settings.runbook}#{heading}"

    def send(self, alert: Alert) -> bool:
        """Send to every receiver. False: not all of them took it, send it again later. Never raises; takes seconds at
        most.
        """
        if self.settings.alert_urls is None:
            return True
        # Only a run that alerts pays for it.
        from apprise import NotifyFormat  # noqa: PLC0415

        try:
            receivers, faults = read_urls(self.settings.alert_urls.get_secret_value())
            if faults or not len(receivers):
                return False
            body = alert.body if len(alert.body) <= _LONGEST else f"{alert.body[:_LONGEST]}…"
            # As text: apprise escapes it for a receiver that reads HTML or Markdown.
            return bool(receivers.notify(title=without_links(alert.title), body=body, body_format=NotifyFormat.TEXT))
        except Exception:  # noqa: BLE001 - whatever a notification library does, billing goes on
            return False


def send_report(urls: str, title: str, body: str, page: str) -> bool:
    """Send a report in Markdown with its page (HTML) attached. False: not every receiver took it. Never raises."""
    from apprise import NotifyFormat  # noqa: PLC0415

    try:
        receivers, faults = read_urls(urls)
        with TemporaryDirectory(prefix="billing-report-") as folder:
            attached = Path(folder) / "billing-report.html"
            attached.write_text(page, encoding="utf-8")
            sent = receivers.notify(
                title=title,
                body=body if len(body) <= _LONGEST else f"{body[:_LONGEST]}…",
                body_format=NotifyFormat.MARKDOWN,
                attach=[str(attached)],
            )
        return bool(sent) and not faults
    except Exception:  # noqa: BLE001 - whatever a notification library does, the report is on its asset
        return False


def beat(url: str) -> bool:
    """Tell a dead man's switch that all is well. False: it did not hear it. Never raises; takes seconds at most."""
    try:
        timeout = urllib3.Timeout(connect=3, read=5)
        return (
            urllib3.request("GET", url, timeout=timeout, retries=False, redirect=False).status < HTTPStatus.BAD_REQUEST
        )
    except (urllib3.exceptions.HTTPError, ValueError):
        return False


def read_urls(text: str) -> tuple[Apprise, int]:
    """The receivers of ALERT_URLS (separated by commas or white space), and how many of them cannot be read."""
    # Only a run that alerts pays for it.
    from apprise import Apprise  # noqa: PLC0415
    from apprise.utils.parse import parse_urls  # noqa: PLC0415

    # It logs what it cannot deliver, with addresses that hold tokens.
    logging.getLogger("apprise").disabled = True
    receivers = Apprise()
    faults = sum(not receivers.add(url) for url in parse_urls(text))  # type: ignore[no-untyped-call]
    return receivers, faults + (not len(receivers))
