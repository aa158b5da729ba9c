"""A run's last event: one sentence, the next step, the table, sums; each number once, and none that is zero."""

from __future__ import annotations

import pytest

from billing_orchestration.definitions import build_definitions
from billing_orchestration.domain.decisions import Action, Decision
from billing_orchestration.jobs.run_report import decisions_in, describe_decisions, read_result
from billing_orchestration_tests.jobs.service import Service

JOBS = [
    "autopayment_job",
    "expire_payments_job",
    "expire_subscriptions_job",
    "matching_pending_payments_job",
    "matching_successful_payments_job",
]


def last_event(service: Service, job: str, **given: object) -> dict[str, object]:
    """Its metadata."""
    run = service.run(job, **given)  # type: ignore[arg-type]
    return next(told for op, told in run.metadata.items() if op.startswith(("apply_", "charge_")) or op == "failure")


def test_a_renewal_run_shows_each_number_once(service: Service) -> None:
    service.subscriber()
    service.subscriber(script="canceled:insufficient_funds")
    told = last_event(service, "autopayment_job")
    assert told.pop("decisions (2)")
    assert told.pop("as_of")
    assert told.pop("next: numbers over time")
    assert told == {
        "result": "changed 2",
        "sum: charged, RUB": 299.0,
        "sum: declined, RUB": 299.0,
        "count: charged": 1,
        "count: declined": 1,
        "declines: soft": 1,
    }


@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_found_nothing_says_so_in_two_lines(service: Service, job: str) -> None:
    told = last_event(service, job)
    assert list(told) == ["result", "as_of"]
    assert told["result"] == "nothing to do"


def test_the_table_leaves_its_code_to_programs(service: Service) -> None:
    service.subscription(plan_id=service.plan())
    table = last_event(service, "autopayment_job", dry_run=True)["decisions (1)"]
    assert isinstance(table, list)
    assert table[0]["code"] == "no_method"


def test_the_table_breaks_lines_between_words_and_programs_read_the_sentence_back() -> None:
    reason = "declined by payment_network: insufficient_funds (soft), so it is tried again tomorrow"

    told = describe_decisions([Decision(Action.LEAVE, "subscription 1", reason)])

    [cell] = [record.data["reason"] for record in told["decisions (1)"].value.records]
    assert max(map(len, cell.splitlines())) <= 44
    assert cell.split() == reason.split()
    assert [row["reason"] for row in decisions_in(told)[0]] == [reason]


def test_a_dry_run_links_to_its_approval(service: Service) -> None:
    service.subscriber()
    told = last_event(service, "autopayment_job", dry_run=True)
    assert told["result"] == "dry run: would change 1"
    assert "approved_plan" in str(told["next: approve this plan"])


@pytest.mark.parametrize(
    ("sentence", "counts"),
    [
        ("nothing to do", (0, 0, 0, 0, 0)),
        ("changed 12, skipped 3, quarantined 2 (new 1), to retry 4", (12, 3, 2, 1, 4)),
        ("dry run: would change 7", (7, 0, 0, 0, 0)),
    ],
)
def test_programs_read_the_sentence_back(sentence: str, counts: tuple[int, ...]) -> None:
    assert tuple(read_result(sentence).values()) == counts


def test_no_asset_has_the_name_of_a_job(service: Service) -> None:
    repository = build_definitions(load=lambda: service.settings).get_repository_def()
    jobs = {job.name for job in repository.get_all_jobs()}
    assert jobs & {key.path[-1] for key in repository.asset_graph.get_all_asset_keys()} == set()
