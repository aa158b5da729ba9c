"""`plan JOB`: the decisions and the hash of a dry run, for CI, with nothing written on either side."""

from __future__ import annotations

from datetime import timedelta

import dagster as dg
import pytest

from billing_orchestration.definitions import PLANNED, build_definitions
from billing_orchestration.planning import NotPlanned, make_plan
from billing_orchestration_tests.fixtures.installation import command
from billing_orchestration_tests.jobs.service import Service


@pytest.fixture
def definitions(service: Service) -> dg.Definitions:
    return build_definitions(
        load=lambda: service.settings,
        now=service.host_now,
        steady_s=service.steady_s,
        connect=service.connect_provider,
        database_now=service.database_now,
    )


def test_a_plan_shows_each_decision_and_the_hash_that_approves_it(
    service: Service, definitions: dg.Definitions
) -> None:
    due = service.subscriber()

    plan = make_plan(definitions, "autopayment_job", None)

    assert [(row["action"], row["subject"]) for row in plan.decisions] == [("charge", f"subscription {due}")]
    assert plan.changes == plan.total == 1
    assert plan.as_data()["plan"] == plan.plan
    header, line, comes_to = plan.as_table("en")
    assert header.split() == ["action", "subject", "amount", "code", "reason"]
    assert line.startswith(f"charge  subscription {due}  299.00 RUB")
    assert comes_to == f"autopayment_job as of 2026-03-12T12:00:00+00:00: 1 changes, plan {plan.plan}"
    assert next(plan.as_table("ru")).split() == ["действие", "предмет", "сумма", "код", "причина"]
    assert "действие" not in str(plan.as_data())
    assert len(service.provider.ledger()) == 0, "nothing was charged"
    assert service.run("autopayment_job", as_of=service.now, approved_plan=plan.plan).ok
    assert len(service.provider.ledger()) == 1


@pytest.mark.parametrize("job", PLANNED)
def test_each_job_has_a_plan_and_one_without_changes_says_so(definitions: dg.Definitions, job: str) -> None:
    assert make_plan(definitions, job, None).changes == 0


@pytest.mark.parametrize(("language", "header"), [("ru", "действие"), ("en", "action")])
def test_a_terminal_shows_a_plan_in_the_language_of_the_deployment(
    healthy: pytest.MonkeyPatch, service: Service, language: str, header: str
) -> None:
    service.subscriber()
    healthy.setenv("BILLING_LANGUAGE", language)
    process = command("plan", "autopayment_job")
    assert (process.returncode, process.stdout.split()[0]) == (0, header), process.stderr


def test_a_plan_that_cannot_be_made_says_why_in_the_runs_own_words(
    service: Service, definitions: dg.Definitions
) -> None:
    with pytest.raises(NotPlanned, match=r"expire_subscriptions_job: .*future"):
        make_plan(definitions, "expire_subscriptions_job", service.now + timedelta(days=2))
