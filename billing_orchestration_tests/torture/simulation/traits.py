"""What distinguishes one simulated installation from another."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import timedelta

from billing_orchestration.sandbox.provider.switches import Switches
from billing_orchestration_tests.torture.simulation.mishaps import draw_mishaps

ZONES = ("UTC", "Europe/Moscow", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Pacific/Auckland")
MINUTE = timedelta(minutes=1)


@dataclass(frozen=True)
class Traits:
    """What distinguishes one simulated installation from another; all drawn from the seed."""

    zone: str = "UTC"
    grace_days: int = 3
    ttl_days: int = 7
    provider_skew: timedelta = timedelta(0)
    service_skew: timedelta = timedelta(0)
    list_lag: timedelta = timedelta(0)
    page_size: int = 100
    max_concurrency: int = 1
    switches: Switches = field(default_factory=Switches)
    writes_unknown: bool = False
    settles_renewals: str = "leave"
    accidents: float = 1.0
    mishaps: frozenset[str] = frozenset()


def draw_traits(seed: int, mishaps: frozenset[str] = frozenset()) -> Traits:
    """What kind of installation a seed is. `mishaps`: those that befall it in any case."""
    draw = random.Random(f"traits {seed}")
    # What is tolerated: beyond five minutes nothing is charged.
    skews = (timedelta(0), timedelta(seconds=100), timedelta(seconds=-280), timedelta(seconds=draw.randint(-280, 280)))
    is_quiet = seed % 7 == 0
    return Traits(
        zone=draw.choice(ZONES),
        grace_days=draw.choice((1, 3, 3, 3, 5)),
        ttl_days=draw.choice((7, 7, 7, 3)),
        provider_skew=draw.choice(skews),
        service_skew=draw.choice(skews),
        # With the clocks 5 minutes apart a lag below 5 minutes stays within the overlap of two windows (15 minutes).
        list_lag=timedelta(seconds=draw.choice((0, 0, 20, 60, 240))),
        page_size=draw.choice((2, 5, 100)),
        max_concurrency=4 if seed % 5 == 0 else 1,
        switches=Switches(
            replay=draw.choice(("original", "current")),
            remember_errors=draw.choice((True, False)),
            captured_order=draw.choice(("created_at", "captured_at")),
            serialise_keys=draw.random() < 0.5,
        ),
        writes_unknown=draw.random() < 0.5,
        settles_renewals=draw.choice(("leave", "leave", "grant", "row")),
        accidents=0.0 if is_quiet else draw.choice((0.5, 1.0, 1.0, 2.0)),
        mishaps=mishaps if is_quiet else draw_mishaps(draw) | mishaps,
    )
