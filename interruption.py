"""SIGTERM and Ctrl-C, taken where a run can be left: between two steps, or anywhere in work that is done again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop.

    Attributes:
        signal_number: which signal asked.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopRequest:
    """What a signal asks, until the run can do it.

    Attributes:
        signal_number: the signal that came, 0 while none did.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._at_once = False

    def receive(self, signal_number: int, frame: FrameType | None) -> None:
        """The handler. A second signal ends the program where it is."""
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = signal_number
        if self._at_once:
            raise Interrupted(signal_number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises `Interrupted` wherever it finds the program, as does one that came before."""
        if self.signal_number:
            raise Interrupted(self.signal_number)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Inside, SIGTERM and Ctrl-C are requests; the former handlers come back on exit. For the main thread alone.

    Source: [ours] clusters announce with SIGTERM that they take the machine back.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
