"""Two writers on one output: the second is told of the first, whoever that is; the dead hold nothing."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from p2d_cli.artifacts.locking import lock_path, write_lock
from p2d_cli.artifacts.store import find_current, open_artifact, recover
from p2d_cli.errors import StoppedEarlyError

HOLDER = {"host": socket.gethostname(), "pid": 0, "since": "2026-01-01T00:00:00+00:00", "command": "p2d train"}
HOLD = """
import sys
from pathlib import Path
from p2d_cli.artifacts.locking import write_lock
sys.argv = ["/somewhere/p2d", "train", "--out", "a b"]
with write_lock(Path(sys.stdin.readline().strip())):
    print("held", flush=True)
    sys.stdin.readline()
"""
COMPETE = """
import os, sys, time
from pathlib import Path
from p2d_cli.artifacts import locking
from p2d_cli.errors import StoppedEarlyError
if sys.argv[2] == "soft":
    locking._flock = lambda descriptor: False
target, inside, turns = Path(sys.argv[1]), sys.argv[1] + ".inside", 0
while turns < 60:
    try:
        with locking.write_lock(target):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another process is inside
            time.sleep(0)
            os.unlink(inside)
            turns += 1
    except StoppedEarlyError:
        time.sleep(0)
"""


def siblings(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the lock of a target; it lets go when it reads a line."""
    with ExitStack() as stack:

        def start(target):
            process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=-1, stdout=-1, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            process.stdin.write(f"{target}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "held\n"
            return process

        yield start


def test_the_second_writer_is_told_who_the_first_is(p2d, short, holder, tmp_path, no_model):
    first = holder(tmp_path / "out")
    done = p2d(*short["heads"], "--out", tmp_path / "out", "--json")
    assert done.code == 75
    assert done.json["exit_code"] == 75
    for word in (f"pid {first.pid} on {socket.gethostname()} since 20", "`p2d train --out 'a b'`"):
        assert word in done.json["message"]
    assert "run the same command again" in done.json["hint"]
    # Others are told the same: asking for the lock leaves the note of its holder alone.
    assert f"pid {first.pid}" in p2d(*short["heads"], "--out", tmp_path / "out").said
    first.communicate("\n")
    assert p2d(*short["heads"], "--out", tmp_path / "out").code == 0
    assert siblings(tmp_path) == ["out"]


def test_a_killed_holder_holds_nothing(p2d, short, holder, tmp_path):
    first = holder(tmp_path / "out")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert lock_path(tmp_path / "out").exists()
    assert p2d(*short["heads"], "--out", tmp_path / "out").code == 0
    assert siblings(tmp_path) == ["out"]


def test_an_artifact_that_came_while_waiting_is_not_overwritten(p2d, short, tmp_path, monkeypatch):
    """Between looking for an artifact and getting the lock, another process may have written one."""
    from p2d_cli.engine import stage_run

    real, seeds, came = stage_run.draft, [], []
    out = ("--out", tmp_path / "out")

    def draft_late(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(stage_run, "draft", real)
            assert p2d(*short["heads"], "--seed", seeds[-1], *out).code == 0
        came.append((tmp_path / "out" / "manifest.json").read_bytes())
        return real(*arguments, **options)

    for seed, code in ((0, 0), (7, 73)):
        seeds.append(seed)
        with monkeypatch.context() as patch:
            patch.setattr(stage_run, "draft", draft_late)
            assert p2d(*short["heads"], *out).code == code
        assert (tmp_path / "out" / "manifest.json").read_bytes() == came[-1]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("kind", ["flock", "soft"])
def test_many_writers_take_turns(kind, tmp_path):
    """The holder removes the lock file while others are opening it; still no two are ever inside."""
    command = [sys.executable, "-c", COMPETE, str(tmp_path / "out"), kind]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert siblings(tmp_path) == []


def test_threads_of_one_process_exclude_each_other(tmp_path):
    inside, most, turns = [0], [0], [0]

    def compete():
        mine = 0
        while mine < 30:
            try:
                with write_lock(tmp_path / "out"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0)
                    inside[0] -= 1
                    mine += 1
                    turns[0] += 1
            except StoppedEarlyError:
                time.sleep(0)

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, turns) == ([1], [120])


def test_a_lock_whose_file_was_removed_is_not_a_lock(tmp_path, monkeypatch):
    """A waiter that opened the file before its holder removed it locks a file that nobody else will find."""
    real, opened = fcntl.flock, []

    def flock_late(descriptor, operation):
        if not opened:
            opened.append(os.fstat(descriptor).st_ino)
            lock_path(tmp_path / "out").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with write_lock(tmp_path / "out"):
        assert lock_path(tmp_path / "out").exists()
        with pytest.raises(StoppedEarlyError), write_lock(tmp_path / "out"):
            pass


# --- file systems without flock


@pytest.fixture
def without_flock(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_without_flock_the_file_is_the_lock(p2d, short, without_flock, tmp_path):
    with write_lock(tmp_path / "out"):
        done = p2d(*short["heads"], "--out", tmp_path / "out")
    assert done.code == 75, done.said
    assert f"pid {os.getpid()}" in done.said
    assert p2d(*short["heads"], "--out", tmp_path / "out").code == 0
    assert siblings(tmp_path) == ["out"]


@pytest.mark.parametrize("left", ["dead", "empty", "nonsense"])
def test_without_flock_a_file_left_over_does_not_block(p2d, short, without_flock, tmp_path, left):
    text = {"dead": json.dumps(HOLDER | {"pid": dead_pid()}), "empty": "", "nonsense": "\x00\xff"}[left]
    lock_path(tmp_path / "out").write_text(text)
    assert p2d(*short["heads"], "--out", tmp_path / "out").code == 0
    assert siblings(tmp_path) == ["out"]


def test_without_flock_a_holder_on_another_machine_is_believed(p2d, short, without_flock, tmp_path):
    lock_path(tmp_path / "out").write_text(json.dumps(HOLDER | {"host": "elsewhere", "pid": dead_pid()}))
    done = p2d(*short["heads"], "--out", tmp_path / "out")
    assert done.code == 75
    assert "on elsewhere since 2026-01-01" in done.said
    assert "if that process is gone, remove" in done.said


# --- readers


def test_a_reader_waits_for_a_writer_between_its_renames(p2d, short, tmp_path):
    """The folder is missing for a moment while it is replaced; nobody may put the old one in the new one's way."""
    out, aside = tmp_path / "out", tmp_path / ".out.old"
    assert p2d(*short["heads"], "--out", out).code == 0
    key = open_artifact(out, "heads").key
    held, go_on = threading.Event(), threading.Event()

    def swap():
        with write_lock(out):
            out.rename(aside)
            held.set()
            go_on.wait()
            assert aside.exists(), "a reader meddled"
            aside.rename(out)

    writer = threading.Thread(target=swap)
    writer.start()
    held.wait()
    threading.Timer(0.3, go_on.set).start()
    found = find_current(out, "heads", key)
    writer.join()
    assert found is not None
    assert not aside.exists()


def test_every_reader_finds_an_artifact_that_was_moved_aside(p2d, pipeline, copy_of, tiny_folder, few, tmp_path):
    """Whatever its kind, and through whichever option it comes."""
    model = ("--model", tiny_folder, "--dtype", "float32")
    places = {name: copy_of(name) for name in ("heads", "subset", "adapter", "full", "evaluation")}
    commands = {
        "heads": ("mine-data", *model, "--heads", places["heads"], "--pool", few["pool"]),
        "subset": ("train", *model, "--scope", "lora", "--data", places["subset"]),
        "adapter": ("export", places["adapter"]),
        "full": ("eval", "--model", places["full"], "--data", few["test"]),
        "evaluation": ("report-aer", places["evaluation"], "--reference", pipeline / "full-evaluation"),
    }
    for name, command in commands.items():
        aside = places[name].with_name(f".{name}.old")
        places[name].rename(aside)
        done = p2d(*command, "--dry-run", "--out", tmp_path / f"out-{name}")
        assert done.code == 0, f"{name}: {done.said}"
        assert not aside.exists()
    places["heads"].rename(places["heads"].with_name(".heads.old"))
    assert p2d("inspect", places["heads"]).code == 0
    recover(places["heads"])
