"""The promise in simulated time: a few days from fixed seeds always, months from many seeds with `make torture`."""

from __future__ import annotations

import pytest

from billing_orchestration_tests.torture.simulation import play_seed, simulated_server


@pytest.mark.parametrize("seed", [1, 5])
def test_the_promise_holds_on_every_simulated_day(seed: int) -> None:
    with simulated_server() as (admin_url, template):
        result = play_seed(admin_url, template, seed, days=8)

    assert result.faults == (), f"play it again: {result.replay}"
    assert result.runs > 8
