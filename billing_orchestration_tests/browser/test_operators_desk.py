"""A day at the operator's desk: code server, webserver and daemon as processes, and a real browser.

The tests are one story, in this order; each waits for what it needs, so one of them can be run alone. The daemon has
just come back after an hour. Nothing here asks how long something takes: the daemon's clock is the real one, and a tick
of the matching jobs comes every two minutes. What takes long (that tick, backfills) is launched early and looked at
later: in the meantime come tests of what it does not touch.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import dagster as dg
import pytest
from playwright.sync_api import Locator, expect

from billing_orchestration.jobs.approval import PLAN_TAG
from billing_orchestration.resources import DRY_RUN_TAG
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.browser.deployment import wait_for
from billing_orchestration_tests.browser.desk import GRID_DAYS, MATCHING, Desk
from billing_orchestration_tests.browser.ui import Ui

UTC = timezone.utc
PENDING_JOB, SUCCESSFUL_JOB = MATCHING
AUTOPAYMENT = "autopayment_job"
RECONCILIATION = "reconciliation_job"
SLOW_SCHEDULE = "matching_pending_payments_every_2_minutes_schedule"
MISSED_DAYS = (3, 2, 1)
MISSED_HOURS = (12, 11, 10)
LATE = [f"late-{days_ago}" for days_ago in MISSED_DAYS]
LOST = [f"lost-{hours_ago}" for hours_ago in MISSED_HOURS]


@dataclass(frozen=True)
class Repetition:
    """A backfill launched a second time: its id, the runs of the first, and the rows as the first left them."""

    backfill: str
    first_runs: list[dg.RunRecord]
    rows: Any


@pytest.fixture(scope="session")
def days_preview(desk: Desk, tab: Ui) -> str:
    """The id of a preview: a backfill of three missed days, each with a customer who is late since."""
    wait_for(lambda: desk.finished(AUTOPAYMENT), "the end of the daily run")
    for name, days_ago in zip(LATE, MISSED_DAYS, strict=True):
        desk.customer(name, days_ago=days_ago)
    return _backfill_days(tab, is_preview=True)


@pytest.fixture(scope="session")
def days_previewed(desk: Desk, days_preview: str) -> list[dg.RunRecord]:
    """The runs of the preview, at their end."""
    return wait_for(lambda: _all_finished(desk, AUTOPAYMENT, days_preview, 3), "the preview's end")


@pytest.fixture(scope="session")
def days_backfill(desk: Desk, tab: Ui, days_previewed: list[dg.RunRecord]) -> str:
    """The id of the backfill of these days, launched after the preview."""
    assert {name: desk.charges_of(name) for name in LATE} == dict.fromkeys(LATE, 0)
    return _backfill_days(tab)


@pytest.fixture(scope="session")
def days_again(desk: Desk, tab: Ui, days_backfill: str) -> Repetition:
    """The same days once more, after the end of the first."""
    runs = wait_for(lambda: _all_finished(desk, AUTOPAYMENT, days_backfill, 3), "the backfill's end")
    rows = _renewals(desk)
    return Repetition(_backfill_days(tab), runs, rows)


@pytest.fixture(scope="session")
def hours_backfill(desk: Desk, tab: Ui) -> str:
    """The id of a backfill of the three hours whose payments were lost. The provider answers from here on."""
    desk.service.sandbox.behave()
    return _backfill_hours(desk, tab)


@pytest.fixture(scope="session")
def hours_again(desk: Desk, tab: Ui, hours_backfill: str) -> Repetition:
    """The same hours once more, after the end of the first."""
    runs = wait_for(lambda: _all_finished(desk, SUCCESSFUL_JOB, hours_backfill, 3), "the backfill's end")
    rows = _repaired(desk)
    return Repetition(_backfill_hours(desk, tab), runs, rows)


def ticks(desk: Desk, schedule: str) -> list[dg.TickData]:  # type: ignore[name-defined]
    """The ticks of a schedule, latest first."""
    instance = desk.deployment.instance
    state = next(state for state in instance.all_instigator_state() if state.instigator_name == schedule)
    return list(instance.get_ticks(state.instigator_origin_id, state.selector_id))


def scheduled_at(record: dg.RunRecord) -> datetime:
    return datetime.fromisoformat(record.dagster_run.tags[".dagster/scheduled_execution_time"])


def test_a_daemon_that_was_down_an_hour_starts_one_run_of_each_job_and_not_thirty(desk: Desk) -> None:
    schedules = {
        PENDING_JOB: SLOW_SCHEDULE,
        SUCCESSFUL_JOB: "matching_successful_payments_every_2_minutes_schedule",
        AUTOPAYMENT: "autopayment_daily_schedule",
    }
    for job, schedule in schedules.items():
        of_ticks = {"dagster/schedule_name": schedule}
        runs = wait_for(lambda job=job, tags=of_ticks: desk.deployment.runs(job, **tags), f"a tick's run of {job}")  # type: ignore[misc]
        back = min(record.create_timestamp for record in runs)  # until then the daemon was down, or starting
        missed = [record for record in runs if scheduled_at(record) <= back]
        assert len(missed) == 1, f"{job}: {[scheduled_at(record) for record in missed]}"
    expiring = desk.deployment.runs("expire_payments_job")
    assert [record for record in expiring if scheduled_at(record) <= desk.came] == []  # not its hour


def test_the_daily_job_ran_as_of_three_o_clock_in_the_billing_time_zone_and_marks_its_day(desk: Desk, ui: Ui) -> None:
    run = wait_for(lambda: desk.finished(AUTOPAYMENT), "the end of the daily run")[0]
    at = scheduled_at(run).astimezone(desk.zone)
    assert (at.date(), at.hour, at.minute) == (desk.today, 3, 0)
    assert run.dagster_run.tags["dagster/partition"] == desk.day(0)
    assert (desk.charges_of("anna"), desk.charges_of("poor")) == (1, 0)
    ui.open_schedule("autopayment_daily_schedule")
    ui.sees(desk.zone.key)
    ui.sees("At 03:00 AM")
    ui.sees_green(AUTOPAYMENT, [desk.day(0)])


def test_a_run_tells_what_it_decided_and_why_with_sums_and_the_next_step(desk: Desk, ui: Ui) -> None:
    run = wait_for(lambda: desk.finished(AUTOPAYMENT), "the end of the daily run")[-1]
    ui.open_run(run.dagster_run.run_id, "fetch_due_subscriptions")
    slice_sizes = ui.full_message("STEP_OUTPUT")
    for text in ("open attempts", "due", "not charged: the plan is not recurring"):
        expect(slice_sizes).to_contain_text(text)
    ui.open_run(run.dagster_run.run_id, "charge_renewals")
    told = ui.full_message("STEP_OUTPUT")
    expect(told).to_contain_text("changed 2")
    for text in ("charged", "paid until", "declined", "insufficient_funds (soft)", "sum: charged, RUB", "299.00 RUB"):
        expect(told).to_contain_text(text)
    ui.picture("run")
    expect(told.get_by_role("link", name="autopayment").last).to_have_attribute("href", "/assets/billing/autopayment")


def test_a_dry_run_from_the_launchpad_shows_the_charge_and_makes_none(desk: Desk, ui: Ui) -> None:
    wait_for(lambda: desk.finished(AUTOPAYMENT), "the end of the daily run")
    bob = desk.customer("bob")
    before = desk.service.snapshot()
    ui.open_launchpad(AUTOPAYMENT)
    ui.set_dry_run()
    told = _result_of(ui, ui.launch(), "charge_renewals")
    expect(told).to_contain_text("dry run: would change 1")
    expect(told.get_by_role("link", name="approved_plan").first).to_be_visible()
    expect(told).to_contain_text(f"subscription {bob}")
    assert desk.charges_of("bob") == 0
    assert desk.service.snapshot() == before


def test_an_approved_plan_is_applied_and_what_came_after_the_preview_is_refused_with_the_reason(
    desk: Desk, ui: Ui
) -> None:
    preview = wait_for(lambda: _with_plan(desk), "a dry run that has shown its plan")
    plan = preview.dagster_run.tags[PLAN_TAG]
    zoe = desk.customer("zoe")  # due since, so not in the plan
    ui.open_asset("plans")
    ui.page.get_by_role("link", name=f"Launch {AUTOPAYMENT} with this plan").first.click()
    ui.sees("No errors")
    expect(ui.page.locator(".CodeMirror-line", has_text="approved_plan")).to_contain_text(plan)
    told = _result_of(ui, ui.launch(), "charge_renewals")
    assert (desk.charges_of("bob"), desk.charges_of("zoe")) == (1, 0)
    expect(told).to_contain_text("changed 1")
    expect(told).to_contain_text(f"subscription {zoe}")
    expect(told).to_contain_text("not in the approved plan, changed since")


def test_three_missed_days_are_selected_by_mouse_and_previewed(desk: Desk, ui: Ui, days_preview: str) -> None:
    backfill = desk.deployment.instance.get_backfill(days_preview)
    assert backfill is not None
    assert set(backfill.partition_names or ()) == {desk.day(days_ago) for days_ago in MISSED_DAYS}
    assert backfill.tags[DRY_RUN_TAG] == "true"


def test_an_entry_is_accepted_and_another_ignored_by_their_links_each_after_a_dry_run(desk: Desk, ui: Ui) -> None:
    entries = {row.external_payment_id: row.id for row in desk.service.rows("quarantine")}
    wait_for(lambda: desk.materialized("quarantine"), "the quarantine on show")
    for payment, word, decided in (("cheap", "accept", "accepted"), ("strange", "ignore", "ignored")):
        ui.open_asset("quarantine")
        ui.follow(ui.decision_link(entries[payment], word), f"entry: {entries[payment]}", f'decision: "{word}"')
        told = _result_of(ui, ui.launch(), "resolve_entry")
        expect(told).to_contain_text("dry run, nothing was written. It would do this:")
        assert desk.service.rows("quarantine", "external_payment_id = :id", id=payment)[0].resolution is None
        ui.follow(ui.next_step(told, "next: do it"), "dry_run: false")
        ui.fill_in("reason", "seen in the cabinet")
        ui.fill_in("by", "vera")
        told = _result_of(ui, ui.launch(), "resolve_entry")
        [entry] = desk.service.rows("quarantine", "external_payment_id = :id", id=payment)
        assert (entry.resolution, entry.resolved_by) == (decided, "vera")
        ui.click_link(ui.next_step(told, "next: what else waits"))
        ui.sees("Payments that wait for a person")
        expect(ui.decision_link(entries[payment], word)).to_have_count(0)
    assert (desk.service.settled("cheap"), desk.service.settled("strange")) == (["created"], [])


def test_a_previewed_backfill_charges_nobody_and_leaves_its_days_missing(
    desk: Desk, ui: Ui, days_previewed: list[dg.RunRecord]
) -> None:
    assert all(record.dagster_run.is_success for record in days_previewed)
    assert all(record.dagster_run.tags[DRY_RUN_TAG] == "true" for record in days_previewed)
    assert {name: desk.charges_of(name) for name in LATE} == dict.fromkeys(LATE, 0)
    dialog = ui.open_backfill(AUTOPAYMENT)
    _select_days(ui, dialog)
    expect(dialog).to_contain_text("Missing (3)")


def test_three_missed_days_are_selected_by_mouse_and_launched(desk: Desk, ui: Ui, days_backfill: str) -> None:
    backfill = desk.deployment.instance.get_backfill(days_backfill)
    assert backfill is not None
    assert set(backfill.partition_names or ()) == {desk.day(days_ago) for days_ago in MISSED_DAYS}


def test_what_waits_for_a_person_is_shown_with_its_reason_alerts_once_and_is_resolved_by_command(
    desk: Desk, ui: Ui
) -> None:
    # Her payment makes anna no longer due: not before her renewal.
    wait_for(lambda: desk.finished(AUTOPAYMENT), "the end of the daily run")
    [entry] = desk.service.rows("quarantine", "external_payment_id = 'odd'")
    wait_for(lambda: desk.materialized("quarantine"), "the quarantine on show")
    ui.open_asset("quarantine")
    ui.sees("metadata: metadata without a usable")
    assert desk.receiver.titles.count("3 new entries in the quarantine") == 1
    listed = desk.deployment.command("quarantine", "list")
    assert "payment odd" in listed
    assert "metadata without a usable" in listed
    anna = desk.subscriptions["anna"]
    before = desk.service.row("subscriptions", anna).ended_at
    desk.deployment.command(
        "quarantine", "resolve", str(entry.id), "--attach", str(anna), "--reason", "hers", "--by", "vera"
    )
    after = desk.service.row("subscriptions", anna).ended_at
    assert timedelta(days=27) < after - before < timedelta(days=32)
    told = desk.deployment.command("explain", "payment", "odd")
    assert "vera" in told
    assert "hers" in told
    assert "payment odd" not in desk.deployment.command("quarantine", "list")


def test_a_broken_invariant_is_red_in_the_ui_and_green_again_when_it_is_mended(desk: Desk, ui: Ui) -> None:
    [charge] = desk.service.rows(
        "settlements", "subscription_id = :id AND kind = 'renewed'", id=desk.subscriptions["anna"]
    )
    ui.open_asset("money", "checks")
    for status, verdict in (("CANCELED", "Failed"), ("SUCCEEDED", "Succeeded")):
        desk.service.execute("UPDATE payments SET status = :status WHERE id = :id", status=status, id=charge.payment_id)
        ui.execute_checks()
        ui.sees_check("no_second_success", "Succeeded")
        ui.sees_check("paid_is_granted", verdict)
        if verdict == "Failed":
            ui.sees(f"settled payment {charge.external_payment_id}: its row {charge.payment_id} is CANCELED")
            ui.picture("money_checks")
            ui.follow(ui.page.locator(f"a[href*='/{SUCCESSFUL_JOB}/playground']").first, "dry_run: true")
            ui.open_asset("money", "checks")


def test_the_backfill_of_three_days_charges_each_period_once_and_its_days_turn_green(
    desk: Desk, ui: Ui, days_again: Repetition
) -> None:
    days = [desk.day(days_ago) for days_ago in MISSED_DAYS]
    assert {record.dagster_run.tags["dagster/partition"] for record in days_again.first_runs} == set(days)
    assert all(record.dagster_run.is_success for record in days_again.first_runs)
    ui.sees_green(AUTOPAYMENT, days)
    assert {name: desk.charges_of(name) for name in LATE} == dict.fromkeys(LATE, 1)


def test_a_schedule_is_stopped_and_started_with_its_switch(desk: Desk, ui: Ui) -> None:
    name = "run_history_daily_schedule"
    ui.open(f"/locations/billing/schedules/{name}")
    for status in ("STOPPED", "RUNNING"):
        ui.switch()
        wait_for(lambda status=status: desk.schedule_status(name) == status, f"{name} {status}")  # type: ignore[misc]


def test_a_tick_that_would_overlap_is_skipped_and_the_ui_says_why(desk: Desk, ui: Ui) -> None:
    skipped = wait_for(
        lambda: [tick for tick in ticks(desk, SLOW_SCHEDULE) if tick.status.value == "SKIPPED"], "a skipped tick"
    )[-1]
    assert re.fullmatch(
        r"run \w{8} of an earlier tick is still (QUEUED|STARTING|STARTED); the next tick covers this one",
        skipped.skip_reason or "",
    )
    ui.open_schedule(SLOW_SCHEDULE)
    at = datetime.fromtimestamp(skipped.timestamp, UTC).strftime("%-I:%M:%S %p")
    row = ui.page.get_by_role("row").filter(has_text="View logs").filter(has_text=at)
    row.get_by_text("0 runs requested").first.hover()
    ui.sees(skipped.skip_reason or "")


def test_the_launchpad_describes_the_shared_run_config(desk: Desk, ui: Ui) -> None:
    for job in (AUTOPAYMENT, SUCCESSFUL_JOB):
        ui.open_launchpad(job)
        offered = ui.completions()
        assert "Show every decision. Write nothing" in offered
        assert "The instant the run stands for: ISO 8601" in offered
        assert "Stop before applying anything" in offered


def test_the_backfill_of_days_repeated_charges_nobody(desk: Desk, ui: Ui, days_again: Repetition) -> None:
    runs = wait_for(lambda: _all_finished(desk, AUTOPAYMENT, days_again.backfill, 3), "the repetition's end")
    assert all(record.dagster_run.is_success for record in runs)
    assert {name: desk.charges_of(name) for name in LATE} == dict.fromkeys(LATE, 1)
    assert _renewals(desk) == days_again.rows
    desk.service.check_books()


def test_a_second_run_of_a_job_waits_for_the_first(desk: Desk, ui: Ui) -> None:
    first = wait_for(
        lambda: [r for r in desk.deployment.runs(PENDING_JOB) if r.dagster_run.status == dg.DagsterRunStatus.STARTED],
        "a run at work",
    )[0]
    ui.open_launchpad(PENDING_JOB)
    ui.set_dry_run()
    second = ui.launch()
    ui.sees("Queued")
    desk.service.sandbox.behave()
    ui.sees("RUN_SUCCESS")
    ends = {record.dagster_run.run_id: record for record in desk.finished(PENDING_JOB)}
    assert ends[second].start_time >= ends[first.dagster_run.run_id].end_time


def test_an_outage_is_healed_by_the_first_tick_after_it_and_the_tick_marks_its_hour(
    desk: Desk, ui: Ui, answering_provider: Sandbox
) -> None:
    tick = wait_for(lambda: desk.finished(SUCCESSFUL_JOB), "the end of the first tick")[-1]
    assert tick.dagster_run.is_success
    settled = desk.service.rows("settlements", "external_payment_id = 'in-the-outage'")
    assert [row.run_id for row in settled] == [tick.dagster_run.run_id]
    hour = (scheduled_at(tick) - timedelta(hours=1)).strftime("%Y-%m-%d-%H:00")
    assert tick.dagster_run.tags["dagster/partition"] == hour
    ui.open_run(tick.dagster_run.run_id)
    ui.sees("catching up from")
    ui.sees_green(SUCCESSFUL_JOB, [hour])


def test_three_missed_hours_are_selected_by_name_and_launched(desk: Desk, ui: Ui, hours_backfill: str) -> None:
    backfill = desk.deployment.instance.get_backfill(hours_backfill)
    assert backfill is not None
    assert list(backfill.partition_names or ()) == _keys(desk)


def test_long_charging_shows_its_progress_and_a_terminated_run_goes_on_when_it_is_executed_again(
    desk: Desk, ui: Ui, answering_provider: Sandbox
) -> None:
    for name in ("carol", "dave", "erin"):
        desk.customer(name)
    answering_provider.misbehave("create", "none", delay_s=600, payment_method_id="card-of-erin")
    ui.open_launchpad(AUTOPAYMENT)
    ui.launch()
    ui.sees(" done (")
    progress = ui.page.get_by_text(" done (").first.inner_text()
    assert "charged" in progress
    assert "a second, about" in progress
    assert "to go" in progress
    assert desk.charges_of("erin") == 0
    ui.terminate()
    # The answer that it waits for still counts: a charge is never left in the air for a click.
    answering_provider.behave()
    ui.sees("RUN_CANCELED")
    [status] = {record.dagster_run.status for record in desk.finished(AUTOPAYMENT)[:1]}
    assert status == dg.DagsterRunStatus.CANCELED
    assert desk.charges_of("erin") == 1
    ui.execute_again()
    ui.sees("RUN_SUCCESS")
    assert [desk.charges_of(name) for name in ("carol", "dave", "erin")] == [1, 1, 1]


def test_the_backfill_of_three_hours_repairs_them_in_the_run_of_each_and_they_turn_green(
    desk: Desk, ui: Ui, hours_again: Repetition
) -> None:
    keys = _keys(desk)
    by_hour = {
        record.dagster_run.tags["dagster/partition"]: record.dagster_run.run_id for record in hours_again.first_runs
    }
    for payment, key in zip(LOST, keys, strict=True):
        settled = desk.service.rows("settlements", "external_payment_id = :id", id=payment)
        assert [row.run_id for row in settled] == [by_hour[key]], f"{payment} by the run of its hour"
    ui.sees_green(SUCCESSFUL_JOB, keys)
    ui.picture("grid")
    ui.open_run(by_hour[keys[0]], "apply_successful_matches")
    told = ui.full_message("STEP_OUTPUT")
    expect(told).to_contain_text("changed 1")
    expect(told).to_contain_text(f"payment {LOST[0]}")


def test_a_day_that_does_not_agree_is_red_until_a_person_decides_and_it_is_launched_again_by_its_link(
    desk: Desk, ui: Ui, answering_provider: Sandbox
) -> None:
    day = desk.day(3)
    dialog = ui.open_backfill(RECONCILIATION)
    ui.select_by_name(dialog, day, day)
    backfill = ui.launch_backfill(dialog, 1)
    [red] = wait_for(lambda: _all_finished(desk, RECONCILIATION, backfill, 1), "the end of the day's run")
    ui.open_run(red.dagster_run.run_id)
    ui.sees("RUN_FAILURE")
    told = ui.full_message("STEP_FAILURE")
    expect(told).to_contain_text(f"the books of {day} differ. Waiting for a person: 1")
    expect(told).to_contain_text("payment never-paid")
    [entry] = desk.service.rows("quarantine", "external_payment_id = 'never-paid'")
    resolving = ("quarantine", "resolve", str(entry.id), "--accept", "--reason", "never captured", "--by", "vera")
    desk.deployment.command(*resolving)
    ui.follow(ui.next_step(told, "next: launch it again"))
    ui.launch()
    ui.sees("RUN_SUCCESS")
    ui.sees_green(RECONCILIATION, [day])
    [row] = desk.service.rows("payments", "external_payment_id = 'never-paid'")
    assert row.status == "CANCELED"


def test_the_report_says_how_billing_is_doing_with_plots(desk: Desk, ui: Ui) -> None:
    wait_for(lambda: desk.finished(AUTOPAYMENT), "the end of the daily run")
    ui.open_launchpad("report_job")
    ui.click_link(ui.next_step(_result_of(ui, ui.launch(), "write_report"), "next: read it"))
    ui.page.get_by_text("[Show Markdown]").click()
    for title in ("Renewals due in the next 7 days", "Charges by day", "Declines and what came back"):
        ui.sees(title)
    plot = ui.page.locator("img[src^='data:image']").first
    plot.scroll_into_view_if_needed()
    assert plot.evaluate("image => image.naturalWidth") > 0


def test_numbers_are_plotted_over_time(desk: Desk, ui: Ui) -> None:
    ui.plots("autopayment", "charged", "charged, RUB", "declined", "declines: soft", "unknown")
    ui.plots("matching_successful_payments", "corrections")
    wait_for(lambda: desk.materialized("money"), "the first look of the money sensor")
    ui.plots("money", "quarantine: open", "unknown outcomes", "oldest unfinished payment, hours")
    ui.plots("quarantine", "open")


def test_the_backfill_of_hours_repeated_changes_nothing(desk: Desk, ui: Ui, hours_again: Repetition) -> None:
    runs = wait_for(lambda: _all_finished(desk, SUCCESSFUL_JOB, hours_again.backfill, 3), "the repetition's end")
    assert all(record.dagster_run.is_success for record in runs)
    assert all("billing/changed" not in record.dagster_run.tags for record in runs)
    assert _repaired(desk) == hours_again.rows


def test_the_first_line_of_a_failed_run_says_what_to_do(desk: Desk, ui: Ui, answering_provider: Sandbox) -> None:
    answering_provider.misbehave("list", "error_before", times=None)
    before = desk.service.snapshot()
    ui.open_launchpad(PENDING_JOB)
    run_id = ui.launch()
    ui.sees("RUN_FAILURE")
    ui.open_run(run_id, "fetch_paid_for_pending")
    failure = ui.full_message("STEP_FAILURE").inner_text()
    line = next(line for line in failure.splitlines() if "Failure:" in line)
    assert "the list of payments broke off at page 1" in line
    assert "Nothing was decided from it" in line
    assert "What to do: nothing yet, the next run covers this one" in line
    assert desk.service.snapshot() == before
    told = ui.page.get_by_role("dialog")
    answering_provider.behave()
    ui.follow(ui.next_step(told, "next: launch it again"))
    ui.launch()
    ui.sees("RUN_SUCCESS")
    ui.open_run(run_id, "fetch_paid_for_pending")
    ui.click_link(ui.next_step(ui.full_message("STEP_FAILURE"), "runbook"))
    expect(ui.page.locator(f"#{PENDING_JOB}")).to_be_in_viewport()


def test_a_failed_run_alerts_once_and_its_link_leads_to_the_run(desk: Desk, ui: Ui) -> None:
    about = f"{PENDING_JOB} failed"
    wait_for(lambda: any(title.startswith(about) for title in desk.receiver.titles), "the alert")
    [message] = [message["message"] for message in desk.receiver.messages if message["title"].startswith(about)]
    assert "the list of payments broke off at page 1" in message
    assert "The money: customers may have paid without access yet. Nothing is lost" in message
    [run_id] = re.findall(re.escape(desk.deployment.address) + r"/runs/([0-9a-f-]{36})", message)
    ui.open_run(run_id)
    ui.sees("RUN_FAILURE")
    ui.sees("the list of payments broke off at page 1")
    assert not [title for title in desk.receiver.titles if title.startswith(f"{AUTOPAYMENT} failed")]


def test_no_job_ever_ran_twice_at_a_time_and_the_ticks_came_every_two_minutes(desk: Desk) -> None:
    for job in (AUTOPAYMENT, *MATCHING):
        runs = sorted(desk.finished(job), key=lambda record: record.start_time or 0)
        for earlier, later in itertools.pairwise(runs):
            assert (later.start_time or 0) >= (earlier.end_time or 0), f"{later.dagster_run.run_id} of {job} overlaps"
    times = wait_for(lambda: _two(sorted(tick.timestamp for tick in ticks(desk, SLOW_SCHEDULE))), "two ticks")
    assert all(at % 120 == 0 for at in times)
    assert times[1] - times[0] == 120


def _result_of(ui: Ui, run_id: str, op: str) -> Locator:
    """What an op has told at the end of a green run."""
    ui.sees("RUN_SUCCESS")
    ui.open_run(run_id, op)
    return ui.event("STEP_OUTPUT")


def _with_plan(desk: Desk) -> dg.RunRecord | None:
    return next((run for run in desk.finished(AUTOPAYMENT) if PLAN_TAG in run.dagster_run.tags), None)


def _two(times: list[float]) -> list[float] | None:
    return times[-2:] if len(times) > 1 else None


def _renewals(desk: Desk) -> list[Any]:
    """What a renewal run writes, and the provider's books; the matching jobs, at work meanwhile, write none of it."""
    ours = "billing_orchestration"
    return [
        desk.service.rows(f"{ours}.renewal_attempts"),
        desk.service.rows(f"{ours}.settlements", "kind = 'renewed'"),
        desk.service.rows("subscriptions", "user_id = ANY(:late)", late=LATE),
        len(desk.service.charges()),
    ]


def _repaired(desk: Desk) -> list[Any]:
    """What the runs of the missed hours have written; the tests between two backfills change other rows."""
    return [
        desk.service.rows("subscriptions", "user_id = ANY(:lost)", lost=LOST),
        desk.service.rows("payments", "external_payment_id = ANY(:lost)", lost=LOST),
    ]


def _keys(desk: Desk) -> list[str]:
    return [desk.hour(hours_ago).strftime("%Y-%m-%d-%H:00") for hours_ago in MISSED_HOURS]


def _select_days(ui: Ui, dialog: Locator) -> None:
    # The grid is today and the days before it; the missed ones are next to the last.
    ui.select_by_mouse(dialog, GRID_DAYS - max(MISSED_DAYS), GRID_DAYS - min(MISSED_DAYS), GRID_DAYS + 1)


def _backfill_days(ui: Ui, *, is_preview: bool = False) -> str:
    dialog = ui.open_backfill(AUTOPAYMENT)
    _select_days(ui, dialog)
    if is_preview:
        ui.add_tag(dialog, DRY_RUN_TAG, "true")
    return ui.launch_backfill(dialog, len(MISSED_DAYS))


def _backfill_hours(desk: Desk, ui: Ui) -> str:
    keys = _keys(desk)
    dialog = ui.open_backfill(SUCCESSFUL_JOB)
    ui.select_by_name(dialog, keys[0], keys[-1])
    return ui.launch_backfill(dialog, len(keys))


def _all_finished(desk: Desk, job: str, backfill: str, count: int) -> list[dg.RunRecord] | None:
    records = desk.finished(job, **{"dagster/backfill": backfill})
    return records if len(records) == count else None
