"""The demo's tables, read back from the run history: by codes, whatever the sentences say."""

from __future__ import annotations

from billing_orchestration.sandbox.run_story import grouped, read_run
from billing_orchestration_tests.jobs.service import Service


def test_decisions_are_counted_together_by_action_and_code(service: Service) -> None:
    for _ in range(2):
        service.subscriber()
        service.subscriber(script="canceled:insufficient_funds")
    service.subscriber(script="canceled:card_expired")
    service.subscription(plan_id=service.plan())
    service.run("autopayment_job")

    story = read_run(service.instance, "autopayment_job")

    assert story is not None
    groups = [(group.action, group.count, group.reason) for group in grouped(story.decisions)]
    assert sorted((action, count) for action, count, _ in groups) == [
        ("charged", 2), ("declined", 2), ("leave", 1), ("stopped", 1),
    ]  # fmt: skip
    assert groups[-1] == ("leave", 1, "no saved payment method")
    assert (story.counts["applied"], story.more_decisions, story.failure) == (5, 0, None)


def test_a_red_run_tells_its_failure_and_what_it_decided(service: Service) -> None:
    service.paid_there(plan_id=service.plan())
    service.run("matching_successful_payments_job", max_changes=0)

    story = read_run(service.instance, "matching_successful_payments_job")

    assert story is not None
    assert (story.failure or "").startswith("stopped before anything was applied")
    assert [group.action for group in grouped(story.decisions)] == ["settle"]
