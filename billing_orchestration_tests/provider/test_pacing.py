"""The pace that all threads share, and the bounded concurrency. Time is a number that the tests move."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from billing_orchestration.provider import pacing
from billing_orchestration.provider.errors import OutcomeUnknown, WrongCredentials
from billing_orchestration.provider.pacing import LONGEST_PAUSE_S, RateLimit
from billing_orchestration.threads import OF_THE_SYSTEM

map_concurrently = partial(pacing.map_concurrently, threads=OF_THE_SYSTEM)


class Clock:
    """Sleeping moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def pace(clock: Clock, rate: float | None = None) -> RateLimit:
    return RateLimit(rate, clock=clock, sleep=clock.sleep)


def test_without_a_cap_nobody_waits(clock: Clock) -> None:
    shared = pace(clock)
    for _ in range(1000):
        shared.wait_turn()
    assert clock.slept == []


def test_a_cap_spaces_the_requests_evenly(clock: Clock) -> None:
    shared = pace(clock, 10)
    for _ in range(21):
        shared.wait_turn()
    assert clock.now == pytest.approx(1002.0)


def test_an_idle_time_is_not_saved_up_for_a_burst(clock: Clock) -> None:
    shared = pace(clock, 10)
    shared.wait_turn()
    clock.now += 60
    shared.wait_turn()
    shared.wait_turn()
    assert clock.slept == [pytest.approx(0.1)]


@pytest.mark.parametrize("rate", [0, -1.0, float("nan")])
def test_a_cap_that_would_never_send_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="above zero"):
        RateLimit(rate)


def test_after_a_429_nobody_sends_before_the_wish_is_over(clock: Clock) -> None:
    shared = pace(clock)
    assert shared.slow_down(7) == 7
    shared.wait_turn()
    assert clock.now >= 1007


def test_a_429_overtakes_a_thread_that_already_waits_for_its_turn(clock: Clock) -> None:
    shared = pace(clock, 1)
    shared.wait_turn()
    plain_sleep = clock.sleep

    def sleep_and_hear_of_a_429(seconds: float) -> None:
        plain_sleep(seconds)
        if len(clock.slept) == 1:
            shared.slow_down(30)

    shared._sleep = sleep_and_hear_of_a_429
    shared.wait_turn()
    assert clock.now >= 1031


def test_a_429_without_a_wish_pauses_longer_each_time_up_to_a_minute(clock: Clock) -> None:
    shared = pace(clock)
    pauses = []
    for _ in range(9):
        pauses.append(shared.slow_down())
        clock.now += pauses[-1]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    shared.answered()
    assert shared.slow_down() == 1


def test_the_429s_of_one_burst_are_one_slow_down(clock: Clock) -> None:
    shared = pace(clock)
    pauses = [shared.slow_down() for _ in range(64)]
    assert set(pauses) == {1}
    clock.now += 1
    assert shared.slow_down() == 2


def test_a_wish_of_a_day_is_capped(clock: Clock) -> None:
    assert pace(clock).slow_down(86_400) == LONGEST_PAUSE_S


def test_after_a_pause_the_waiting_do_not_start_all_at_once(clock: Clock) -> None:
    shared = pace(clock)
    shared.slow_down(5)
    starts = []
    for _ in range(10):
        shared.wait_turn()
        starts.append(clock.now)
    assert len(set(starts)) == 10
    for _ in range(30):
        shared.answered()
    clock.slept.clear()
    clock.now += 10
    for _ in range(10):
        shared.wait_turn()
    assert clock.slept == []


# --- turns that are taken ahead of the work before a request


def turn_by_turn(shared: RateLimit, clock: Clock, seconds: float) -> list[float]:
    """When requests went, by somebody who asks for turns as soon as there are some."""
    sent: list[float] = []
    began = clock.now
    while clock.now < began + seconds:
        count = shared.turns(64)
        shared.take(count)
        sent.extend([clock.now - began] * count)
        clock.now += max(shared.next_turn_s(), 0.001)
    return sent


def test_without_a_cap_there_are_turns_for_everybody(clock: Clock) -> None:
    shared = pace(clock)
    assert shared.turns(64) == 64
    shared.take(64)
    assert (shared.turns(64), shared.is_paused) == (64, False)


@pytest.mark.parametrize("rate", [0.5, 3, 100, 1000, 5000])
def test_turns_keep_to_the_cap(clock: Clock, rate: float) -> None:
    sent = turn_by_turn(pace(clock, rate), clock, 20.0)
    assert len(sent) == pytest.approx(20 * rate, abs=max(1, 0.01 * rate))
    # In no second more than the cap, but for those that are given a moment early.
    for second in range(20):
        assert sum(second <= at < second + 1 for at in sent) <= rate + max(1, 0.005 * rate)


def test_a_turn_is_used_up_only_when_it_is_taken(clock: Clock) -> None:
    shared = pace(clock, 1)
    assert (shared.turns(9), shared.turns(9)) == (1, 1)
    shared.take(1)
    assert (shared.turns(9), shared.next_turn_s()) == (0, 1.0)
    clock.now += 1
    assert shared.turns(9) == 1
    # An idle time is not saved up for a burst.
    clock.now += 60
    assert shared.turns(9) == 1


def test_after_a_429_there_are_no_turns_before_the_wish_is_over_and_then_one_by_one(clock: Clock) -> None:
    shared = pace(clock)
    shared.slow_down(7)
    assert (shared.turns(9), shared.is_paused, shared.next_turn_s()) == (0, True, 7.0)
    clock.now += 7
    assert not shared.is_paused
    assert shared.turns(9) == 1
    shared.take(1)
    assert shared.turns(9) == 0
    for _ in range(30):
        shared.answered()
    assert shared.turns(9) == 9


# --- map_concurrently --------------------------------------------------------------------------------------------


def test_every_item_is_answered_once_and_faults_are_answers() -> None:
    def halve(number: int) -> int:
        if number % 2:
            raise OutcomeUnknown(f"{number} is odd")
        return number // 2

    answers = dict(map_concurrently(halve, range(100), 8))
    assert len(answers) == 100
    assert all(answers[number] == number // 2 for number in range(0, 100, 2))
    assert all(isinstance(answers[number], OutcomeUnknown) for number in range(1, 100, 2))


def test_the_first_item_goes_alone() -> None:
    others_began = threading.Event()

    def first_looks_around(number: int) -> bool:
        if number:
            others_began.set()
            return True
        return others_began.wait(0.1)

    assert next(map_concurrently(first_looks_around, range(10), 8)) == (0, False)


def test_up_to_the_bound_are_in_flight_and_never_more() -> None:
    together = threading.Barrier(8)
    lock = threading.Lock()
    busy, most = 0, 0

    def count(number: int) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        if 100 <= number < 108:
            together.wait(timeout=10)  # breaks unless eight of them run side by side
        with lock:
            busy -= 1

    assert all(not isinstance(result, Exception) for _, result in map_concurrently(count, range(120), 8))
    assert most == 8


def test_wrong_credentials_cost_one_request() -> None:
    asked: list[int] = []

    def refuse(number: int) -> None:
        asked.append(number)
        raise WrongCredentials("no", status_code=401)

    with pytest.raises(WrongCredentials):
        list(map_concurrently(refuse, range(100), 8))
    assert asked == [0]


def test_wrong_credentials_in_the_middle_stop_the_handing_out_and_lose_no_answer() -> None:
    asked: list[int] = []

    def revoked_at_fifty(number: int) -> int:
        asked.append(number)
        if number == 50:
            raise WrongCredentials("no", status_code=401)
        return number

    answered: list[int] = []

    def take_all() -> None:
        answered.extend(item for item, _result in map_concurrently(revoked_at_fifty, range(1000), 4))

    with pytest.raises(WrongCredentials):
        take_all()
    # Whatever was in flight beside it is answered too; nothing is handed out after it.
    assert sorted([*answered, 50]) == sorted(asked)
    assert set(range(50)) < set(asked)
    assert len(asked) < 200


def test_a_caller_that_stops_gets_nothing_more_sent() -> None:
    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        return number

    for item, _ in map_concurrently(ask, range(10_000), 4):
        if item >= 20:
            break
    assert len(asked) < 60


def test_items_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    answers = map_concurrently(lambda number: number, items(), 4)
    next(answers)
    assert len(taken) <= 4


def test_what_is_no_exception_but_an_interrupt_ends_the_iteration() -> None:
    def interrupted(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(map_concurrently(interrupted, range(10), 4))


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        map_concurrently(str, [], 0)
