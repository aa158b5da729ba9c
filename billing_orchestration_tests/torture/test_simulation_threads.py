"""The threads of a simulation: one at a time, in an order of the seed's, and nobody waits for real seconds."""

from __future__ import annotations

import ast
import queue
import random
from pathlib import Path

import pytest

import billing_orchestration
from billing_orchestration_tests.torture.simulation.threads import OrderedThreads, Stuck


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds


def ordered(seed: int) -> tuple[OrderedThreads, _Clock]:
    clock = _Clock()
    return OrderedThreads(random.Random(seed), lambda: clock.now_s, clock.pass_time), clock


def steps_of_three(seed: int) -> list[str]:
    threads, _ = ordered(seed)
    told: list[str] = []

    def work(name: str) -> None:
        for number in range(4):
            told.append(f"{name}{number}")
            threads.give_way()

    started = [threads.start(work, name, name=name) for name in "abc"]
    for thread in started:
        thread.join()
    assert threads.left_behind() == []
    return told


def test_a_seed_is_an_order_and_different_seeds_are_different_orders() -> None:
    assert [steps_of_three(seed) for seed in range(20)] == [steps_of_three(seed) for seed in range(20)]
    assert len({tuple(steps_of_three(seed)) for seed in range(20)}) > 15


@pytest.mark.parametrize("seed", range(20))
def test_a_queue_hands_over_everything_once(seed: int) -> None:
    threads, _ = ordered(seed)
    orders, answers = threads.make_queue(), threads.make_queue()

    def work() -> None:
        while (order := orders.get()) is not None:
            threads.give_way()
            answers.put(order * 2)

    started = [threads.start(work, name=f"worker {number}") for number in range(3)]
    for number in [*range(10), None, None, None]:
        orders.put(number)
    told = [answers.get() for _ in range(10)]
    for thread in started:
        thread.join()

    assert sorted(told) == [number * 2 for number in range(10)]
    with pytest.raises(queue.Empty):
        answers.get_nowait()


@pytest.mark.parametrize("seed", range(20))
def test_a_wait_ends_in_simulated_time_when_nothing_comes(seed: int) -> None:
    threads, clock = ordered(seed)

    with pytest.raises(queue.Empty):
        threads.make_queue().get(timeout=3600.0)
    assert clock.now_s == 3700.0

    happened = threads.make_event()
    assert not happened.wait(timeout=0.5)
    threads.start(happened.set, name="sets it")
    assert happened.wait(timeout=7200.0)
    # It was there before the wait was over.
    assert clock.now_s == 3700.5


@pytest.mark.parametrize("seed", range(20))
def test_a_lock_is_held_by_one_at_a_time(seed: int) -> None:
    threads, _ = ordered(seed)
    turn = threads.make_lock()
    inside: list[int] = []

    def work(number: int) -> int:
        with turn:
            inside.append(number)
            threads.give_way()
            assert inside == [number]
            inside.clear()
        return number

    with threads.make_pool(4, "pool") as pool:
        futures = [pool.submit(work, number) for number in range(8)]
        assert [future.result() for future in futures] == list(range(8))
    assert threads.left_behind() == []


def test_an_exception_of_a_pool_reaches_who_asks() -> None:
    threads, _ = ordered(1)
    with threads.make_pool(1, "pool") as pool:
        future = pool.submit(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            future.result()


def test_a_deadlock_and_a_thread_left_behind_are_told() -> None:
    threads, _ = ordered(1)
    threads.start(threads.make_queue().get, name="waits for nobody")

    assert threads.left_behind() == ["waits for nobody"]
    with pytest.raises(Stuck, match="main, waits for nobody"):
        threads.make_queue().get()


PACKAGE = Path(billing_orchestration.__file__).parent
# The provider of a demonstration is no part of a run.
PARTS_OF_A_RUN = sorted(
    set(PACKAGE.rglob("*.py")) - {PACKAGE / "threads.py"} - set((PACKAGE / "sandbox").rglob("*.py"))
)


def test_all_threads_of_a_run_are_made_by_what_the_simulation_hands_in() -> None:
    """Whatever is made elsewhere would go on beside the order that is drawn, and a seed would tell two stories."""
    made = {"Thread", "SimpleQueue", "Queue", "Event", "Condition", "ThreadPoolExecutor", "Timer", "Barrier",
            "Lock", "RLock", "Semaphore", "BoundedSemaphore"}  # fmt: skip
    # Held for some arithmetic: nobody gives way while holding it.
    allowed = {("provider/pacing.py", "Lock")}
    # In the code server, which no run has.
    allowed |= {("jobs/matching_look.py", "Thread")}
    found = []
    for path in PARTS_OF_A_RUN:
        where = str(path.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = node.attr
                if node.value.id in ("threading", "queue", "futures") and name in made and (where, name) not in allowed:
                    found.append(f"{where}:{node.lineno}: {node.value.id}.{name}")
            elif isinstance(node, ast.ImportFrom) and node.module in ("threading", "queue", "concurrent.futures"):
                found.extend(f"{where}:{node.lineno}: {name.name}" for name in node.names if name.name in made)
    assert found == []


def test_the_systems_own_threads_are_only_ever_a_default() -> None:
    """A call that names them would pass by what the simulation hands in."""
    found = []
    for path in PARTS_OF_A_RUN:
        tree = ast.parse(path.read_text())
        defaults = {
            id(default)
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            for default in (*node.args.defaults, *node.args.kw_defaults)
        }
        for node in ast.walk(tree):
            named = isinstance(node, ast.Name) and node.id == "OF_THE_SYSTEM" and id(node) not in defaults
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Threads"
            if named or called:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []
