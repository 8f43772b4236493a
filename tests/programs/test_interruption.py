"""Tests of `programs/interruption.py`: real signals, sent to this process, wherever one can find a run."""

import os
import signal
import threading
import time

import pytest

from programs.interruption import Interrupted, StopRequest, catch_stop_signals, leave_stop_signals


SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers_stay():
    """Whatever a test does, the handlers of the test run are what they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_until_it_is_asked_for(number):
    done = []
    with catch_stop_signals() as stop:
        assert stop.signal_number == 0
        signal.raise_signal(number)
        done.append("the step")
        assert stop.signal_number == number
    assert done == ["the step"]


@pytest.mark.parametrize("number", SIGNALS)
def test_inside_at_once_a_signal_ends_the_work_where_it_is(number):
    done = []
    with catch_stop_signals() as stop:
        with pytest.raises(Interrupted, match=signal.Signals(number).name) as caught:
            with stop.at_once():
                done.append("begun")
                signal.raise_signal(number)
                done.append("ended")
        assert caught.value.signal_number == stop.signal_number == number
    assert done == ["begun"]


def test_a_signal_from_another_process_ends_a_wait():
    """As the kernel delivers it, in the middle of a call that would have taken long."""
    started = time.monotonic()
    with catch_stop_signals() as stop:
        sender = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        sender.start()
        with pytest.raises(Interrupted), stop.at_once():
            time.sleep(30)
        sender.join()
    assert time.monotonic() - started < 20


def test_a_signal_that_came_before_at_once_keeps_the_work_from_beginning():
    done = []
    with catch_stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            with stop.at_once():
                done.append("begun")
    assert done == []


def test_after_at_once_a_signal_waits_again():
    with catch_stop_signals() as stop:
        with stop.at_once():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM


def test_after_an_error_inside_at_once_a_signal_waits_again():
    with catch_stop_signals() as stop:
        with pytest.raises(ZeroDivisionError), stop.at_once():
            _ = 1 / 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM


@pytest.mark.parametrize("place", ["before it", "within it"])
def test_no_signal_is_lost_at_the_entrance_of_at_once(monkeypatch, place):
    """It can come between any two lines: one that finds `at_once` half entered ends the work as well."""

    class Watched(StopRequest):
        """Sends the signal when `at_once` first reads, or sets, what it goes by."""

        sent = False

        def __setattr__(self, name, value):
            if place == "before it" and name == "_at_once" and value:
                self.send()
            super().__setattr__(name, value)
            if place == "within it" and name == "_at_once" and value:
                self.send()

        def send(self):
            if not Watched.sent:
                Watched.sent = True
                signal.raise_signal(signal.SIGTERM)

    done = []
    monkeypatch.setattr("programs.interruption.StopRequest", Watched)
    with catch_stop_signals() as stop:
        with pytest.raises(Interrupted):
            with stop.at_once():
                done.append("begun")
    assert Watched.sent and done == []


@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_ctrl_c_ends_the_program_where_it_is(first):
    with catch_stop_signals() as stop:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal_number == first


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("at_once", [False, True])
def test_a_second_sigterm_changes_nothing(first, at_once):
    """A cluster sends one to every process, and the launcher hands its own on: the checkpoint is being written."""
    with catch_stop_signals() as stop:
        if at_once:
            with pytest.raises(Interrupted), stop.at_once():
                signal.raise_signal(first)
        else:
            signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == first


@pytest.mark.parametrize("error", [None, ValueError, Interrupted])
def test_the_former_handlers_come_back(error):
    received = []

    def own(number, frame):
        received.append(number)

    former = {number: signal.signal(number, own) for number in SIGNALS}
    try:
        try:
            with catch_stop_signals():
                assert signal.getsignal(signal.SIGTERM) is not own
                if error is not None:
                    raise error(signal.SIGTERM)
        except (ValueError, Interrupted):
            assert error is not None
        assert [signal.getsignal(number) for number in SIGNALS] == [own, own]
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_a_handler_that_python_did_not_set_does_not_stand_in_the_way(monkeypatch):
    """`signal.signal` answers None for one that a C library set, and takes no None."""
    set_handler, asked = signal.signal, []

    def answer_none(number, handler):
        asked.append(handler)
        former = set_handler(number, handler)
        return None if len(asked) == 1 else former

    monkeypatch.setattr("programs.interruption.signal.signal", answer_none)
    before = signal.getsignal(signal.SIGTERM)
    with catch_stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
    set_handler(signal.SIGTERM, before)


def test_a_worker_leaves_the_signals_to_the_run():
    with catch_stop_signals() as stop:
        leave_stop_signals(3)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        assert stop.signal_number == 0
