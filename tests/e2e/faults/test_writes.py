"""Death at every step by which a stage changes the disk leaves the old artifact or the new one, never a mixture.

What a killed process leaves is what the disk holds at that moment. So one run of a command is filmed: before each step
(a file opened for writing, a folder made, a rename, a removal, a flush) and half-way through each file, the output
folder is copied. Each copy is what SIGKILL would have left there; that the film does not lie is shown by real kills.
"""

import builtins
import contextlib
import importlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import warnings
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch

from p2d_cli.artifacts.manifest import read_manifest
from p2d_cli.artifacts.store import open_artifact
from p2d_cli.errors import ArtifactError

STEPS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync", "truncate", "ftruncate")
SLOW = "P2D_SLOW" in os.environ
"""Whether the next run is tried on every image, and not on one of each shape only."""
WORK = ("heads", "subset", "adapter", "full", "evaluation", "report", "model")
WORK += ("lora", "attention") if SLOW else ()  # the files of adapter and full over again
MODULES = {
    "heads": "score_heads",
    "subset": "mine_data",
    "evaluation": "evaluate",
    "report": "report_aer",
    "model": "export",
    **dict.fromkeys(("adapter", "lora", "attention", "full"), "train"),
}


def siblings(folder):
    return sorted(path.name for path in folder.iterdir())


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def kind_of(work):
    return "adapter" if work in {"lora", "attention", "full"} else work


def stage_of(work):
    return importlib.import_module(f"p2d_cli.stages.{MODULES[work]}")


class Film:
    """Calls `frame` before each step by which this process changes what lies below a folder."""

    def __init__(self, patch, folder, frame):
        self._folder, self._frame = str(folder), frame
        self._busy = False
        for module, name in [(os, step) for step in STEPS] + [(os, "open")]:
            patch.setattr(module, name, self._before(getattr(module, name)))
        for module, name in ((builtins, "open"), (io, "open")):
            patch.setattr(module, name, self._before_opening(getattr(module, name)))
        for module in (safetensors.torch, safetensors.numpy):
            patch.setattr(module, "serialize_file", self._half_way(module.serialize_file, 1))
        patch.setattr(pq, "write_table", self._half_way(pq.write_table, 1))
        patch.setattr(pathlib.Path, "write_text", self._half_way(pathlib.Path.write_text, 0))
        patch.setattr(shutil, "copyfile", self._half_way(shutil.copyfile, 1))

    def shoot(self):
        if not self._busy:
            self._busy = True
            try:
                self._frame()
            finally:
                self._busy = False

    def _before(self, step):
        def filmed(*arguments, **options):
            self.shoot()
            return step(*arguments, **options)

        return filmed

    def _before_opening(self, opening):
        def filmed(file, mode="r", *arguments, **options):
            if set(mode) & set("wxa+") and str(file).startswith(self._folder):
                self.shoot()
            return opening(file, mode, *arguments, **options)

        return filmed

    def _half_way(self, writing, position):
        """Film a file when it is half there as well; only files that the function made itself."""

        def filmed(*arguments, **options):
            self.shoot()
            result = writing(*arguments, **options)
            path = pathlib.Path(arguments[position])
            if not self._busy and str(path).startswith(self._folder):
                whole = path.read_bytes()
                self._busy = True
                path.write_bytes(whole[: len(whole) // 2])
                self._busy = False
                self.shoot()
                self._busy = True
                path.write_bytes(whole)
                self._busy = False
            return result

        return filmed


def tree(folder):
    """Everything below a folder, with the random parts of names, and what depends on the clock, taken out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"draft-[0-9a-f]{8}", "draft", path.relative_to(folder).as_posix())
        found[name] = None if path.is_dir() else path.read_bytes()
    return found


def film(folder, images, run):
    """Run something, and copy `folder` to `images` whenever it has changed before a step; return the copies."""
    frames, last = [], [None]

    def frame():
        now = tree(folder)
        if now != last[0]:
            last[0] = now
            frames.append(shutil.copytree(folder, images / f"{len(frames):03}"))

    with pytest.MonkeyPatch.context() as patch:
        camera = Film(patch, folder, frame)
        done = run()
        camera.shoot()
    assert done.code == 0, done.said
    return frames


class Replay:
    """Puts a recorded result of a stage in the place of its computation."""

    def __init__(self, work, folder):
        self._stage, self._folder, self._outcome = stage_of(work), folder, None
        self._compute = self._stage._compute

    def _record(self, *arguments):
        self._outcome = self._compute(*arguments)
        shutil.copytree(arguments[-1], self._folder)
        return self._outcome

    @contextlib.contextmanager
    def recording(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self._stage, "_compute", self._record)
            yield

    @contextlib.contextmanager
    def playing(self, mark=b""):
        """Give the recorded payload, with `mark` at the end of each file."""

        def play(*arguments):
            for path in self._folder.iterdir():
                (arguments[-1] / path.name).write_bytes(path.read_bytes() + mark)
            return replace(self._outcome)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self._stage, "_compute", play)
            yield


@pytest.fixture
def filmed(p2d, short, tmp_path):
    """Film a work's command, without and with an older artifact in its place; the images of both, and the replay."""

    def make(work):
        replay = Replay(work, tmp_path / "payload")
        command = short[work]
        (tmp_path / "first").mkdir()
        (tmp_path / "images").mkdir()
        out = ("--out", tmp_path / "first" / "out")
        with replay.recording():
            first = film(tmp_path / "first", tmp_path / "images" / "first", lambda: p2d(*command, *out))
        (tmp_path / "second").mkdir()
        out = ("--out", tmp_path / "second" / "out")
        with replay.playing(b"old"):
            assert p2d(*command, "--seed", 7, *out).code == 0
        with replay.playing():
            second = film(tmp_path / "second", tmp_path / "images" / "second", lambda: p2d(*command, *out, "--force"))
        return replay, first, second

    return make


def found_at(folder, kind):
    """Return the key of the artifact that the next reader finds, verified, or None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("P2D_CACHE_DIR", str(folder.parent / "none"))
        try:
            return open_artifact(folder, kind).key
        except ArtifactError as problem:
            return None if "nothing there" in problem.message else problem.message


def shape(image):
    """Which kinds of things lie beside and in the place of the output."""
    names = frozenset(re.sub(r"(draft|unfinished)-.*", r"\1", path.name) for path in image.iterdir())
    return names, (image / "out" / "manifest.json").is_file() and manifest_of(image / "out")["key"]


@pytest.mark.parametrize("work", WORK)
def test_death_at_any_step_leaves_the_old_artifact_or_the_new_one(p2d, short, filmed, work, tmp_path):
    replay, first, second = filmed(work)
    kind = kind_of(work)
    new = manifest_of(first[-1] / "out")["key"]
    old = manifest_of(second[0] / "out")["key"]
    assert new != old
    assert len(first) > 8, "the draft, its files half and whole, the manifest, the rename"
    seen = {"first": [], "second": []}
    tried = set()
    for name, images in (("first", first), ("second", second)):
        for image in images:
            reader = shutil.copytree(image, tmp_path / "readers" / f"{name}-{image.name}")
            seen[name].append(found_at(reader / "out", kind))
            if (name, shape(image)) in tried and not SLOW:
                continue
            tried.add((name, shape(image)))
            with replay.playing():
                done = p2d(*short[work], "--out", image / "out", "--force" if name == "second" else "--quiet")
            assert done.code == 0, f"{name} {image.name}: {done.said}"
            assert manifest_of(image / "out")["key"] == new
            assert siblings(image) == ["out"], f"{name} {image.name}"
    assert len(tried) > 8, sorted(map(str, tried))
    # First what was there before, and from one step on what is there now.
    for before, keys in ((None, seen["first"]), (old, seen["second"])):
        turn = keys.index(new)
        assert set(keys[:turn]) == {before}
        assert set(keys[turn:]) == {new}


def test_what_is_up_to_date_is_cleared_of_leftovers_as_well(p2d, short, filmed, tmp_path):
    """After a death behind the last rename the next run has nothing to do but to tidy up."""
    _, _, second = filmed("heads")
    tidied = 0
    for image in second:
        keys = {path.name: read_manifest(path).key for path in [image / "out"] if path.is_dir()}
        if keys.get("out") != manifest_of(second[-1] / "out")["key"]:
            continue
        left = siblings(image)
        done = p2d(*short["heads"], "--out", image / "out", "--dry-run")
        assert (done.code, siblings(image)) == (0, left), "a dry run changes nothing"
        assert "up to date" in p2d(*short["heads"], "--out", image / "out").said
        assert siblings(image) == ["out"]
        tidied += left != ["out"]
    assert tidied > 2


def kill_at(folder, run, count):
    """Fork, run something there, and kill it in earnest before its step of that number that changed `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        last, steps = [None], [0]

        def frame():
            now = tree(folder)
            steps[0] += now != last[0]
            last[0] = now
            if steps[0] == count + 1:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with pytest.MonkeyPatch.context() as patch:
                Film(patch, folder, frame)
                run()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"it ended by itself: {status}"
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process with threads")
@pytest.mark.parametrize("work", ["heads", "model"] if SLOW else ["heads"])
def test_the_film_does_not_lie(p2d, short, filmed, work, tmp_path):
    """A real SIGKILL leaves the files that the film shows, at steps early, half-way and between the two renames."""
    replay, _, second = filmed(work)
    middle = next(index for index, image in enumerate(second) if not (image / "out").exists())
    for step in sorted({2, len(second) // 2, middle, middle + 1}):
        place = tmp_path / f"killed-{step}"
        shutil.copytree(second[0], place)
        with replay.playing():
            kill_at(place, lambda place=place: p2d(*short[work], "--out", place / "out", "--force"), step)
            assert sorted(tree(place)) == sorted(tree(second[step])), f"step {step}"
            kept = found_at(place / "out", work)
            assert kept == found_at(second[step] / "out", work)
            done = p2d(*short[work], "--out", place / "out", "--force")
        assert done.code == 0, done.said
        assert siblings(place) == ["out"]


def test_everything_is_flushed_before_it_is_put_in_place(p2d, short, tmp_path, monkeypatch):
    """After a power cut a rename may be on the disk and the bytes may not: each file and folder is flushed first."""
    flushed, renamed = [], []
    fsync, rename = os.fsync, os.rename

    def note_flush(descriptor):
        flushed.append(pathlib.Path(f"/proc/self/fd/{descriptor}").resolve())
        fsync(descriptor)

    def note_rename(source, target, **options):
        if pathlib.Path(target) == tmp_path / "deep" / "out":
            files = [path for path in pathlib.Path(source).rglob("*") if path.is_file()]
            assert len(files) > 3
            assert {*files, pathlib.Path(source)} <= set(flushed)
            assert flushed.index(pathlib.Path(source)) > max(flushed.index(path) for path in files)
            renamed.append(len(flushed))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "rename", note_rename)
    assert p2d(*short["model"], "--out", tmp_path / "deep" / "out").code == 0
    assert flushed[0] == tmp_path, "the folder in which a folder was made for it"
    assert len(renamed) == 1
    assert tmp_path / "deep" in flushed[renamed[0] :], "the rename itself"
