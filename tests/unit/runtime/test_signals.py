"""When a signal ends the work: at once, at the end of a batch, at the end of what is being written, or never."""

import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest

from p2d_cli.runtime import signals
from p2d_cli.runtime.signals import Interruption, courteous, deferred, listening, promising, shielded, stop_requested

QUEUE = [signal.SIGTERM, signal.SIGUSR1]


def send(number):
    os.kill(os.getpid(), number)


@contextmanager
def interrupted(*, by=None):
    """Expect a signal to end a command in this block."""
    with pytest.raises(Interruption, match=None if by is None else by.name), listening():
        yield


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def later(monkeypatch):
    """Let a signal that comes again count as another one."""
    monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", 0.0)


@pytest.mark.parametrize("number", [*QUEUE, signal.SIGINT])
def test_a_signal_ends_what_can_be_ended(number):
    with pytest.raises(Interruption, match=number.name) as ended, listening():
        send(number)
    assert ended.value.exit_code == (130 if number == signal.SIGINT else 75)
    assert "run the same command again" in ended.value.message
    assert stop_requested() == (None if number == signal.SIGINT else number.name)
    assert signals.took_effect()


@pytest.mark.parametrize("number", QUEUE)
def test_a_batch_is_finished(number):
    done = []
    with interrupted():
        with deferred():
            send(number)
            done.append(stop_requested())
        done.append("more")
    assert done == [number.name]


def test_ctrl_c_does_not_wait_for_a_batch():
    done = []
    with interrupted(), deferred():
        send(signal.SIGINT)
        done.append("more")
    assert not done


def test_the_first_ctrl_c_waits_where_courtesy_is_asked_for():
    done = []
    with interrupted(by=signal.SIGINT), courteous(lambda: None):
        with deferred():
            send(signal.SIGINT)
            done.append(stop_requested())
        done.append("more")
    assert done == ["SIGINT"]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("size", ["1", "2"])
def test_the_second_ctrl_c_does_not_wait(size, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    done = []
    with interrupted(by=signal.SIGINT), courteous(lambda: None), deferred(), shielded():
        send(signal.SIGINT)
        done.append("once")
        send(signal.SIGINT)
        done.append("twice")
    assert done == ["once"]


def test_a_quick_second_ctrl_c_does_not_wait_either():
    """Within a fifth of a second, as an impatient person presses it."""
    done = []
    with interrupted(by=signal.SIGINT), courteous(lambda: None), deferred():
        send(signal.SIGINT)
        done.append("once")
        time.sleep(0.2)
        send(signal.SIGINT)
        done.append("twice")
    assert done == ["once"]


def test_courtesy_without_a_batch_has_nothing_to_wait_for():
    done = []
    with interrupted(by=signal.SIGINT), courteous(lambda: None):
        send(signal.SIGINT)
        done.append("more")
    assert not done


def test_courtesy_ends_with_its_block():
    with listening():
        with courteous(lambda: None):
            pass
        with pytest.raises(Interruption), deferred():
            send(signal.SIGINT)


def test_several_processes_agree_on_a_ctrl_c_too(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with interrupted(by=signal.SIGINT), courteous(lambda: None):
        with deferred():
            send(signal.SIGINT)
        assert stop_requested() == "SIGINT", "it is for the work to stop"


def test_an_interruption_promises_what_was_kept_where_it_came():
    kept = ["nothing"]
    with listening(), promising(lambda: "not this"), promising(lambda: f"{kept[-1]} is kept"):
        kept.append("update 3")
        with pytest.raises(Interruption) as ended:
            send(signal.SIGTERM)
    assert ended.value.message == "stopped by SIGTERM; update 3 is kept"
    with listening(), pytest.raises(Interruption) as ended:
        send(signal.SIGINT)
    assert ended.value.message == f"interrupted; {signals.UNBEGUN}"


def test_how_long_a_signal_may_wait():
    told, came, deadlines = [], {}, {}
    with listening():
        signals._await(signal.SIGINT, 10.0, came, deadlines)
        assert deadlines == {signal.SIGINT: 11.5}
        came.clear()
        with courteous(lambda: told.append("told")):
            signals._await(signal.SIGINT, 10.0, came, deadlines)
            assert deadlines == {signal.SIGINT: 10.0 + signals.COURTESY_SECONDS}
            signals._await(signal.SIGINT, 10.1, came, deadlines)  # the same one, passed on
            assert deadlines == {signal.SIGINT: 10.0 + signals.COURTESY_SECONDS}
            signals._await(signal.SIGINT, 20.0, came, deadlines)
            assert deadlines == {signal.SIGINT: 21.5}
            signals._await(signal.SIGTERM, 20.0, came, deadlines)
            assert deadlines == {signal.SIGINT: 21.5, signal.SIGTERM: 40.0}
    assert told == ["told"], "once"


@pytest.mark.parametrize("number", [*QUEUE, signal.SIGINT])
def test_what_is_being_written_is_finished(number):
    done = []
    with interrupted():
        with shielded():
            with deferred(), shielded():
                send(number)
            done.append("written")
        done.append("more")
    assert done == ["written"]


def test_what_is_learnt_in_a_batch_waits_for_what_is_written_behind_it():
    done = []
    with interrupted():
        with deferred():
            send(signal.SIGTERM)
            shield = shielded()
            shield.__enter__()
        done.append("written")
        shield.__exit__(None, None, None)
    assert done == ["written"]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("number", [*QUEUE, signal.SIGINT])
def test_a_signal_that_comes_again_means_it(number):
    done = []
    with interrupted(), shielded():
        send(number)
        done.append("once")
        send(number)
        done.append("twice")
    assert done == ["once"]


def test_a_signal_that_is_passed_on_twice_is_one():
    done = []
    with interrupted(), deferred():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        done.append("finished")
    assert done == ["finished"]


def test_a_warning_and_the_order_are_two():
    """SIGUSR1 minutes before, then SIGTERM: neither breaks off the batch; Ctrl-C does."""
    done = []
    with interrupted(by=signal.SIGINT), deferred():
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        done.append(stop_requested())
        send(signal.SIGINT)
        done.append("more")
    assert done == ["SIGTERM"]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("number", QUEUE)
def test_several_processes_take_note_and_agree(number, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with listening(), deferred():
        send(number)
        with shielded():
            send(number)
    assert stop_requested() == number.name
    with interrupted():
        send(signal.SIGINT)


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (*QUEUE, signal.SIGINT)]
    with listening():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (*QUEUE, signal.SIGINT)] == before
    with listening():
        assert stop_requested() is None


def test_what_the_parent_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening():
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_leaves_signals_alone():
    problems = []

    def command():
        try:
            with listening(), shielded():
                pass
        except ValueError as problem:
            problems.append(problem)

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert not problems


def test_an_error_is_not_hidden_by_a_signal_that_waits():
    def fail():
        send(signal.SIGTERM)
        raise ValueError("the error")

    with pytest.raises(ValueError, match="the error"), listening(), shielded():
        fail()


@contextmanager
def forked():
    """A child that waits for a signal, and ends with 99 if it lives on after it."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write_end, b"!")
            signal.pause()
        finally:
            os._exit(99)
    assert os.read(read_end, 1) == b"!"
    os.close(read_end)
    os.close(write_end)
    yield child


@pytest.mark.parametrize("number", [*QUEUE, signal.SIGINT])
def test_a_forked_child_dies_of_signals(number):
    """As a worker of a pool must, which is ended by one."""
    with listening(), deferred(), forked() as child:
        os.kill(child, number)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number


def test_a_child_keeps_the_handlers_of_a_process_whose_command_is_over():
    with listening():
        pass
    previous = signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    try:
        with forked() as child:
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    finally:
        signal.signal(signal.SIGTERM, previous)
