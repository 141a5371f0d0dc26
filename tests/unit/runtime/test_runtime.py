"""Time, seeds, hardware."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from p2d_cli.runtime.hardware import (
    available_bytes,
    combine_hardware,
    describe_hardware,
    highest_memory_gib,
    package_versions,
    peak_memory_gib,
    synchronizer,
)
from p2d_cli.runtime.progress import LogProgress, SilentProgress
from p2d_cli.runtime.seeding import derive_seed, generator, seed_everything
from p2d_cli.runtime.timing import PhaseTimer, Throughput


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_phases_add_up_and_an_inner_phase_pauses_the_outer():
    clock = FakeClock()
    timer = PhaseTimer(clock)
    with timer.phase("outer"):
        clock.now += 1
        with timer.phase("inner"):
            clock.now += 10
        clock.now += 2
    with timer.phase("outer"):
        clock.now += 4
    assert timer.seconds == {"outer": 7.0, "inner": 10.0}


def test_a_phase_that_fails_is_still_charged():
    clock = FakeClock()
    timer = PhaseTimer(clock)

    def fail():
        with timer.phase("x"):
            clock.now += 3
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.now += 5
    assert timer.seconds == {"x": 3.0}


def test_the_device_is_waited_for_at_both_ends():
    timer = PhaseTimer(FakeClock())
    waits = []
    timer.synchronize_with(lambda: waits.append(1))
    with timer.phase("x"):
        assert len(waits) == 1
    assert len(waits) == 2


def test_seeds_differ_by_purpose_and_repeat():
    assert derive_seed(0, "a") == 4012647919, "the same on every machine"
    assert len({derive_seed(seed, purpose, n) for seed in (0, 1) for purpose in "ab" for n in (0, 1)}) == 8
    assert generator(1, "x").random() == generator(1, "x").random()


def test_seed_everything_fixes_the_global_generators():
    draws = []
    for _ in range(2):
        seed_everything(7)
        draws.append((torch.rand(1).item(), np.random.random()))
    assert draws[0] == draws[1]


def test_hardware_is_described_and_comparable():
    described = describe_hardware("cpu")
    assert described["label"] == describe_hardware("cpu")["label"]
    assert described["cores"] >= 1
    assert describe_hardware("mps")["label"].startswith("mps")
    assert package_versions()["torch"] == torch.__version__
    assert 0.01 < peak_memory_gib("cpu")["host"] < 1000
    synchronizer("cpu")()


def test_several_devices_are_counted_and_shared_ones_once():
    one = {"label": "1 x NVIDIA H100", "accelerators": 1, "accelerator_gib": 79.6}
    two = combine_hardware([one, one], [("a", "0"), ("a", "1")])
    assert (two["label"], two["accelerators"], two["processes"], two["hosts"]) == ("2 x NVIDIA H100", 2, 2, 1)
    assert combine_hardware([one, one], [("a", "0"), ("b", "0")])["hosts"] == 2
    assert combine_hardware([one, one], [("a", "0"), ("a", "0")])["label"] == "1 x NVIDIA H100, 2 processes"
    other = one | {"label": "1 x NVIDIA A100"}
    mixed = combine_hardware([one, other, one], [("a", "0"), ("a", "1"), ("a", "2")])
    assert mixed["label"] == "1 x NVIDIA A100 + 2 x NVIDIA H100"
    cpu = {"label": "EPYC, 8 cores"}
    assert combine_hardware([cpu, cpu], [("a", "cpu"), ("b", "cpu")])["label"] == (
        "2 processes on EPYC, 8 cores, 2 machines"
    )
    assert combine_hardware([cpu], [("a", "cpu")]) == cpu


def test_the_highest_memory_counts():
    assert highest_memory_gib([{"host": 1.0, "device": 3.0}, {"host": 2.0, "device": 1.0}]) == {
        "host": 2.0,
        "device": 3.0,
    }


@pytest.mark.parametrize("window", [0.5, 10.0])
def test_throughput_is_that_of_the_last_seconds_of_work(window):
    speed = Throughput(window)
    assert speed.add(100, 1.0) == 100
    pieces = [(100, 1.0)]
    for units in range(20, 400, 20):
        pieces.append((units, 0.25))
        while sum(seconds for _, seconds in pieces[1:]) >= window:
            pieces.pop(0)
        expected = sum(units for units, _ in pieces) / sum(seconds for _, seconds in pieces)
        assert speed.add(*pieces[-1]) == pytest.approx(expected)
    assert Throughput().add(5, 0.0) == 0.0


def test_silence():
    progress = SilentProgress()
    with progress.task("x", 3) as advance:
        advance(1)
        advance(1, "loss 1.0", at_once=True)
    progress.note("nothing")


def test_a_log_tells_what_was_begun_and_what_came_of_it(tmp_path):
    log = LogProgress(tmp_path / "new" / ".x.rank1.log")
    with log.task("read rows", 3) as advance:
        advance(2)
    log.note("enough")
    begun, ended, note = (tmp_path / "new" / ".x.rank1.log").read_text().splitlines()
    assert begun.endswith(" read rows: 3 to do")
    assert " read rows: 2/3 in " in ended
    assert note.endswith(" enough")


def test_a_log_ends_with_what_was_told_last(tmp_path):
    with LogProgress(tmp_path / "log").task("train", 3) as advance:
        advance(1, "loss 2.0")
        advance(1, "loss 1.0", at_once=True)
        advance(1)
    assert (tmp_path / "log").read_text().rstrip().endswith(" s; loss 1.0")


def test_a_large_parent_is_not_charged_to_its_child():
    code = "from p2d_cli.runtime.hardware import peak_memory_gib; print(peak_memory_gib('cpu')['host'])"
    ballast = bytearray(b"x" * 2**29)
    child = subprocess.run((sys.executable, "-c", code), check=True, capture_output=True, text=True)
    assert len(ballast) == 2**29
    assert float(child.stdout) < 0.4


def machine(root, *, meminfo="MemAvailable:  8192 kB\n", cgroup="", **files):
    """Fake what the kernel says."""
    for name, text in {"proc/meminfo": meminfo, "proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def limited(folder, limit, used, names=("memory.max", "memory.current")):
    return {f"sys/fs/cgroup/{folder}{name}": text for name, text in zip(names, (limit, used), strict=True)}


OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("", {}, 2**23),
        ("0::/job/step\n", limited("job/", "5000", "2000") | limited("job/step/", "max", "1000"), 3000),
        ("0::/job/step\n", limited("job/step/", "900", "1000"), 0),
        ("0::/\n", limited("", "7000", "1000"), 6000),
        ("0::/elsewhere\n", limited("", "7000", "1000"), 6000),  # the path of the host, seen in a container
        ("3:cpu:/x\n2:memory,other:/slurm/job\n", limited("memory/slurm/", "4096", "96", OLD), 4000),
        ("0::/job\n", limited("job/", str(2**40), "0"), 2**23),
    ],
)
def test_memory_that_may_be_taken_is_that_of_the_narrowest_group(tmp_path, cgroup, files, expected):
    assert available_bytes(machine(tmp_path, cgroup=cgroup, **files)) == expected


def test_a_system_that_says_nothing_is_taken_to_have_4_gib(tmp_path):
    assert available_bytes(tmp_path) == 4 * 2**30
    assert available_bytes() > 0
