import os
import signal
import threading

import pytest

from fr_jax.training.interrupt import StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_only_noted(number, code, capfd):
    with StopRequest() as stop:
        assert (stop.signal, stop.exit_code) == (None, 0)
        os.kill(os.getpid(), number)
        assert (stop.signal, stop.exit_code) == (number, code)
    error = capfd.readouterr().err
    assert "Stopping after this step" in error and "Ctrl-C again" in error


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_afterwards_interrupts_at_once(first):
    with StopRequest() as stop:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.exit_code == 128 + first


def test_further_sigterms_change_nothing():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert stop.exit_code == 143


def test_earlier_handlers_come_back():
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in StopRequest.SIGNALS] != before
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before


def test_outside_the_main_thread_it_does_nothing():
    noted = []

    def work():
        with StopRequest() as stop:
            noted.append(stop.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [None]


def test_the_signal_of_another_process_is_not_the_first_of_two():
    with StopRequest() as stop:
        stop.signal = signal.SIGINT  # as the processes of a run have agreed
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
