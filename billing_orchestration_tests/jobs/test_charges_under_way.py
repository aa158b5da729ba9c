"""A charge that the provider may still be at work on: no second request with its key meanwhile, whoever asks.

The provider of these tests does not serialise a key: two requests with it that are under way at once are two charges.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

import pytest

from billing_orchestration.provider.client import Timeouts
from billing_orchestration.resources import utc_now
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.waiting import wait_until

JOB = "autopayment_job"
# How long the provider works on the charge, and by when it has finished with any.
_WORKS_S = 1.2
_DONE_S = 3.0


@pytest.fixture
def live(service_with: Callable[..., Service]) -> Service:
    """A service in real time, whose provider serialises no key."""
    service = service_with(now=utc_now())
    service.clock = utc_now
    service.provider.switches.serialise_keys = False
    return service


def at_work_on(service: Service, subscription: int) -> None:
    """The provider works that long on the first charge of a subscription."""
    service.sandbox.misbehave("create", "none", delay_s=_WORKS_S, payment_method_id=f"method-{subscription}")


def test_a_charge_whose_connection_is_cut_while_the_provider_works_is_charged_once(live: Service) -> None:
    service = live
    slow, *others = (service.subscriber() for _ in range(4))
    at_work_on(service, slow)
    service.timeouts = Timeouts(connect_s=2.0, charge_read_s=0.3, read_s=2.0, charge_done_s=_DONE_S)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.charged() == Counter([slow, *others])
    posts = [request for request in service.sandbox.requests if request.call == "create"]
    methods = [request.json()["payment_method_id"] for request in posts]
    # The others did not wait for it.
    assert methods.index(f"method-{slow}") == 0
    assert methods[-1] == f"method-{slow}"
    service.check_books()


def test_a_clock_that_is_set_ahead_while_the_provider_works_brings_no_second_send_forward(live: Service) -> None:
    service = live
    slow = service.subscriber()
    at_work_on(service, slow)
    service.timeouts = Timeouts(connect_s=2.0, charge_read_s=0.5, read_s=2.0, charge_done_s=_DONE_S)
    run = service.begin(JOB)
    wait_until(lambda: service.sandbox.count("create") == 1)
    service.host_ahead = timedelta(seconds=110)

    assert run().ok

    assert service.charged() == Counter([slow])
    service.check_books()


def test_another_machine_whose_clock_is_ahead_waits_as_long_as_any_other(live: Service) -> None:
    service = live
    slow = service.subscriber()
    at_work_on(service, slow)
    service.timeouts = Timeouts(connect_s=2.0, charge_read_s=0.3, read_s=2.0, charge_done_s=_DONE_S)
    assert not service.run(JOB, ops={"charge_renewals": {"max_sends": 1}}).ok
    service.host_ahead = timedelta(seconds=110)

    assert service.run(JOB).ok

    assert service.charged() == Counter([slow])
    service.check_books()


def test_a_run_that_is_killed_during_a_charge_and_launched_again_at_once_charges_once(
    live: Service, healthy: pytest.MonkeyPatch
) -> None:
    service = live
    slow, other = service.subscriber(), service.subscriber()
    at_work_on(service, slow)
    service.timeouts = Timeouts(connect_s=2.0, charge_read_s=10.0, read_s=10.0, charge_done_s=_DONE_S)
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "billing_orchestration.definitions", "-j", JOB]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: service.sandbox.count("create") or run.poll() is not None, "its charge is under way")
    finally:
        run.kill()
        run.wait()
    wait_until(lambda: not service.rows("pg_locks", "locktype = 'advisory'"), "its locks are gone with it")

    again = service.run(JOB)

    assert again.ok, again.failure
    assert service.charged() == Counter([slow, other])
    # The other did not wait for it.
    assert [
        request.json()["payment_method_id"] for request in service.sandbox.requests if request.call == "create"
    ] == [f"method-{number}" for number in (slow, other, slow)]
    service.check_books()


def test_an_answered_failure_is_sent_again_at_once(service: Service) -> None:
    subscription = service.subscriber()
    service.timeouts = Timeouts(connect_s=2.0, charge_read_s=2.0, read_s=2.0)
    service.sandbox.misbehave("create", "error_after")

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.charged() == Counter([subscription])


def test_an_attempt_that_may_be_under_way_for_ever_is_left_to_the_next_run(service: Service) -> None:
    """As with a clock that stands still: a run does not wait for it without end."""
    subscription, other = service.subscriber(), service.subscriber()
    service.sandbox.misbehave("create", "cut_after", payment_method_id=f"method-{subscription}")
    service.timeouts = Timeouts(connect_s=2.0, charge_read_s=2.0, read_s=2.0, charge_done_s=0.05)

    run = service.run(JOB)

    assert not run.ok
    assert f"subscription {subscription} (unknown): not sent again: the provider may still be at work" in run.failure
    assert service.sandbox.count("create") == 2
    assert service.charged() == Counter([subscription, other])
