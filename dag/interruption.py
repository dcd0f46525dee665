"""Signals that ask a job to stop, noticed instead of obeyed at once, so that it can save what it has and leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# SIGTERM: a machine shuts down, a queue cancels or requeues the job. SIGUSR1: Slurm's warning before a time limit (--signal=USR1@60).
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """A job was asked to stop, by the signal of this number, and saved what it had."""

    def __init__(self, number: int, saved: str):
        super().__init__(number, saved)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}; {self.args[1]}; the same command goes on from there"


@contextmanager
def noticing(also: Callable[[int], None] = lambda number: None) -> Iterator[Callable[[], int]]:
    """Within, the signals do nothing but set the answer of the yielded function: the number of the first that came, 0 before.

    also: called with the number of each. Only a process's main thread can do this; elsewhere the answer stays 0 and the signals do what they did.
    """
    came: list[int] = []

    def note(number: int, frame) -> None:
        came.append(number)
        also(number)

    handled = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in handled}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
