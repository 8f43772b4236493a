"""SIGTERM and Ctrl-C, taken where a run can be left: between steps, or in work that is done again. [ours]"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop, by the signal `signal_number`."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopRequest:
    """What a signal asks, until the run can do it; `signal_number` is 0 while none came."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._at_once = False

    def receive(self, signal_number: int, frame: FrameType | None) -> None:
        """The handler. A second Ctrl-C ends the program where it is.

        A second SIGTERM changes nothing: a cluster sends one to every process, and a launcher hands its own on, while
        the processes may be writing what the first one asked for.
        """
        if self.signal_number:
            if signal_number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal_number = signal_number
        if self._at_once:
            raise Interrupted(signal_number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises `Interrupted` wherever it finds the program, as does one that came before."""
        # Set before the look at what came: a signal between the two finds it set, and none is lost.
        self._at_once = True
        try:
            if self.signal_number:
                raise Interrupted(self.signal_number)
            yield
        finally:
            self._at_once = False


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Inside, SIGTERM and Ctrl-C are requests; the former handlers come back on exit. For the main thread alone.

    Clusters announce with SIGTERM that they take the machine back.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None is a handler that was not set from Python, and cannot be set from there again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave_stop_signals(worker: int = 0) -> None:
    """For a process that works for the run, which a signal to the whole group is for, and which ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
