"""The dead man's switch is told of each matching tick that has covered its hour, and of no other run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from pydantic import SecretStr

from billing_orchestration.settings import Settings
from billing_orchestration_tests.fixtures.receiver import Receiver
from billing_orchestration_tests.jobs.service import Run, Service

TICK = {"dagster/schedule_name": "matching_pending_payments_every_2_minutes_schedule"}


def run(service: Service, receiver: Receiver, **given: Any) -> Run:
    def load() -> Settings:
        return service.settings.model_copy(update={"heartbeat_url": SecretStr(receiver.heartbeat_url)})

    return service.run("matching_pending_payments_job", load=load, **given)


def test_a_tick_that_has_covered_its_hour_is_a_heartbeat(service: Service, receiver: Receiver) -> None:
    assert run(service, receiver, tags=TICK).ok

    assert receiver.beats == 1


@pytest.mark.parametrize("what", ["a dry run", "a backfill", "a list that broke off"])
def test_a_run_that_covers_nothing_of_the_present_is_none(service: Service, receiver: Receiver, what: str) -> None:
    if what == "a dry run":
        run(service, receiver, tags=TICK, dry_run=True)
    elif what == "a backfill":
        run(service, receiver, partition="2026-03-10-10:00")
    else:
        service.sandbox.misbehave("list", "error_before", times=None)
        assert not run(service, receiver, tags=TICK).ok

    assert receiver.beats == 0


def test_a_switch_that_does_not_answer_harms_no_run_and_is_not_named(service: Service, receiver: Receiver) -> None:
    receiver.status = 500

    done = run(service, receiver, tags=TICK, as_of=service.now + timedelta(0))

    assert done.ok, done.failure
    assert receiver.beats == 1
    assert not any("token-of-the-heartbeat" in line for line in done.log)
