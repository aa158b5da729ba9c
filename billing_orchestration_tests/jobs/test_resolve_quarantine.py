"""An entry is decided from the UI: dry first, by the function of the command line, and the page shows what is left."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dagster as dg
import pytest

from billing_orchestration.database.engine import read
from billing_orchestration.database.quarantine import open_entries
from billing_orchestration.jobs.quarantine_page import age_in_words, answers, quarantine_page
from billing_orchestration.launchpad import launchpad
from billing_orchestration_tests.jobs.service import Run, Service

JOB = "resolve_quarantine_job"
MATCHING = "matching_successful_payments_job"


def decide(service: Service, entry: int, decision: str, tags: dict[str, str] | None = None, **config: Any) -> Run:
    """A person launches the job."""
    given = {"entry": entry, "decision": decision, "reason": "the customer called", "by": "vera", **config}
    return service.run(JOB, ops={"resolve_entry": given}, tags=tags)


@pytest.fixture
def entry(service: Service) -> int:
    """A customer paid 199 for what the books hold as 299."""
    plan = service.plan("299.00")
    service.paid_there("cheap", user="anna-of-example", plan_id=plan, amount="199.00")
    service.payment("cheap", amount="299.00")
    assert service.run(MATCHING).ok
    return int(service.rows("quarantine")[0].id)


def test_the_first_launch_shows_what_would_happen_and_writes_nothing(service: Service, entry: int) -> None:
    before = service.snapshot()
    run = decide(service, entry, "accept", reason="", by="")
    assert run.ok
    told = run.metadata["resolve_entry"]
    assert told["result"].startswith("dry run, nothing was written. It would do this: payment cheap (199.00 RUB)")
    assert service.snapshot() == before


def test_its_next_step_opens_the_launchpad_that_does_it(service: Service, entry: int) -> None:
    link = decide(service, entry, "accept").metadata["resolve_entry"]["next: do it"]
    parts = urlsplit(link)
    assert parts.path == f"/locations/billing/jobs/{JOB}/playground/setup"
    config = parse_qs(parts.query)["config"][0]
    for line in (f"entry: {entry}", 'decision: "accept"', 'reason: "the customer called"', "dry_run: false"):
        assert line in config


def test_an_accepted_entry_is_granted_once_and_the_audit_trail_names_the_run_and_the_person(
    service: Service, entry: int
) -> None:
    run = decide(service, entry, "accept", dry_run=False)
    assert run.ok
    assert service.settled("cheap") == ["created"]
    assert {change.run_id for change in service.rows("audit_trail", "job = 'quarantine'")} == {run.run_id}
    [closed] = service.rows("quarantine")
    assert (closed.resolution, closed.resolved_by) == ("accepted", "vera")
    again = decide(service, entry, "accept", dry_run=False)
    assert not again.ok
    assert "is resolved already: accepted" in again.failure
    service.check_books()


def test_who_launched_it_counts_before_who_is_named(service: Service, entry: int) -> None:
    assert decide(service, entry, "ignore", tags={"user": "oleg@shop"}, dry_run=False).ok
    assert service.rows("quarantine")[0].resolved_by == "oleg@shop"


def test_attached_it_pays_a_period_of_the_subscription(service: Service, entry: int) -> None:
    subscription = service.subscription(plan_id=service.plan(), ended_at=service.now)
    assert decide(service, entry, "attach", subscription=subscription, dry_run=False).ok
    assert [row.subscription_id for row in service.rows("settlements")] == [subscription]


@pytest.mark.parametrize(
    ("decision", "config", "words"),
    [
        ("attach", {}, "attach needs the id of a subscription"),
        ("accept", {"subscription": 1}, "nothing else takes one"),
        ("accept", {"reason": " "}, "needs a reason and a name"),
        ("ignore", {"by": ""}, "needs a reason and a name"),
    ],
)
def test_a_decision_that_lacks_something_is_refused_and_nothing_is_written(
    service: Service, entry: int, decision: str, config: dict[str, Any], words: str
) -> None:
    before = service.snapshot()
    run = decide(service, entry, decision, dry_run=False, **config)
    assert not run.ok
    assert words in run.failure
    assert service.snapshot() == before


def test_a_real_decision_renews_the_page_at_once(service: Service, entry: int) -> None:
    assert "quarantine" not in decide(service, entry, "ignore").materialized
    assert decide(service, entry, "ignore", dry_run=False).materialized["quarantine"] == {"open": 0}


def test_the_page_shows_age_payment_sum_reason_and_every_answer_and_no_customer(service: Service, entry: int) -> None:
    metadata = page(service, after=timedelta(days=2, hours=3)).metadata
    table = metadata["entries (1)"]
    assert isinstance(table, dg.TableMetadataValue)
    [row] = [record.data for record in table.records]
    assert row["why"] == "amount_differs: 299.00 RUB here, 199.00 RUB at the provider"
    assert (row["id"], row["age"], row["payment"], row["sum"]) == (entry, "2 d 3 h", "cheap", "199.00 RUB")
    assert "books the provider's amount" in str(row["accept"])
    assert "one period of that subscription's plan" in str(row["attach"])
    assert "nothing is granted" in str(row["ignore"])
    links = metadata[f"decide {entry}"].value
    assert [word in str(links) for word in ("[accept](", "[attach](", "[ignore](")] == [True] * 3
    assert "anna-of-example" not in str(metadata)


def test_an_entry_about_two_customers_names_neither(service: Service) -> None:
    plan = service.plan()
    subscription = service.subscription(plan_id=plan, user="owner-of-the-row")
    service.paid_there("foreign", user="name-in-the-metadata", plan_id=plan)
    service.payment("foreign", subscription_id=subscription)
    run = service.run(MATCHING)
    assert [row.kind for row in service.rows("quarantine")] == ["foreign_metadata"]
    shown = str(page(service).metadata) + str(run.metadata)
    assert "owner-of-the-row" not in shown
    assert "name-in-the-metadata" not in shown


def test_the_links_of_an_entry_are_short_enough_to_stand_on_the_page(service: Service, entry: int) -> None:
    with read(service.engine) as connection:
        [found] = open_entries(connection)
    assert len(answers(found, "billing-at-the-shop")) < 1000  # the page hides longer Markdown behind a click


@pytest.mark.parametrize(
    ("age", "words"),
    [
        (timedelta(seconds=-5), "0 min"),
        (timedelta(minutes=59), "59 min"),
        (timedelta(minutes=150), "2 h"),
        (timedelta(days=3), "3 d"),
    ],
    ids=["the clocks differ", "minutes", "hours", "days"],
)
def test_an_age_has_two_units_at_most(age: timedelta, words: str) -> None:
    assert age_in_words(age) == words


def test_a_link_quotes_whatever_it_carries() -> None:
    link = launchpad("a_job", {"ops": {"a": {"config": {"reason": 'she said: "да" & left\n#1'}}}}, tags={"day": "1&2"})
    query = parse_qs(urlsplit(link).query)
    assert query["config"] == ['ops:\n  a:\n    config:\n      reason: "she said: \\"да\\" & left\\n#1"\n']
    assert (query["tags[0][key]"], query["tags[0][value]"]) == (["day"], ["1&2"])


def page(service: Service, after: timedelta = timedelta(0)) -> dg.AssetMaterialization:
    """The page as it stands."""
    with read(service.engine) as connection:
        return quarantine_page(connection, service.now + after)
