"""The promise in simulated time: a few days from fixed seeds always, months from many seeds with `make torture`."""

from __future__ import annotations

import os

import pytest

from billing_orchestration_tests.torture.simulation import DAYS, REGRESSIONS, play_seed, simulated_server

THOROUGH = "TORTURE_ROUNDS" in os.environ


@pytest.mark.skipif(not THOROUGH, reason="minutes: with `make torture`")
@pytest.mark.parametrize("seed", REGRESSIONS)
def test_seeds_that_showed_a_fault_once_are_clean(seed: int) -> None:
    with simulated_server() as (admin_url, template):
        result = play_seed(admin_url, template, seed, days=DAYS)

    assert result.faults == (), f"{REGRESSIONS[seed]}; play it again: {result.replay}"


@pytest.mark.parametrize("seed", [1, 5, *REGRESSIONS])
def test_the_promise_holds_on_every_simulated_day(seed: int) -> None:
    with simulated_server() as (admin_url, template):
        result = play_seed(admin_url, template, seed, days=8)

    assert result.faults == (), f"play it again: {result.replay}"
    assert result.runs > 8
