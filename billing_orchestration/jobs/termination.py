"""How a run that moves money ends when it is terminated: what is under way is concluded first, then it is Canceled.

Dagster raises the interrupt in the main thread, wherever it happens to be. Here it is held back instead, and delivered
when nothing is under way any more.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import dagster as dg

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class HeldBack:
    """`signal`: the one that came, if any."""

    signal: int | None = None


@contextmanager
def interrupts_held_back(on_interrupt: Callable[[], None]) -> Iterator[HeldBack]:
    """Keep the signals that end a run until the end of the block; call `on_interrupt` as each comes.

    `on_interrupt` runs in a signal's handler: it must take no lock. Outside the main thread signals do not arrive.
    """
    held = HeldBack()
    if threading.current_thread() is not threading.main_thread():
        yield held
        return

    def hold(number: int, _: FrameType | None) -> None:
        held.signal = number
        on_interrupt()

    before = [(number, signal.signal(number, hold)) for number in _SIGNALS]
    try:
        yield held
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def is_being_canceled(context: dg.OpExecutionContext) -> bool:
    """Whether a person has pressed Terminate. A failure then ends the run as Canceled, with its report."""
    run = context.instance.get_run_by_id(context.run_id)
    return run is not None and run.status is dg.DagsterRunStatus.CANCELING


def deliver(held: int) -> None:
    """Deliver a signal that was held back: Dagster raises it here, and may resume the run in another process."""
    signal.raise_signal(held)
