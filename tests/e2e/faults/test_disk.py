"""Disks that are full or cannot be written: the documented code, and the last good artifact as it was."""

import contextlib
import json
import os
import shutil
import subprocess

import pytest

from p2d_cli.artifacts.store import open_artifact

ROOM_KIB = {"heads": 8, "subset": 8, "adapter": 60, "lora": 60, "attention": 900, "full": 900, "evaluation": 8,
            "report": 12, "model": 700}  # fmt: skip
"""Less than the artifact takes, and enough to begin it."""
USUAL = ("heads", "subset", "adapter", "full", "model")


def refused(done, code, *words):
    assert done.code == code, done.said
    for word in words:
        assert str(word) in done.said, f"{word!r} is not in: {done.said}"


def siblings(folder):
    return sorted(path.name for path in folder.iterdir())


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.parametrize(
    "work", ROOM_KIB if "P2D_SLOW" in os.environ else ["heads", "subset", "adapter", "full", "model"]
)
def test_a_full_disk_is_74_and_leaves_no_half_artifact(p2d, short, small_disk, work):
    disk = small_disk(ROOM_KIB[work])
    done = p2d(*short[work], "--out", disk / "out")
    refused(done, 74, disk / "out", "same command again")
    assert not (disk / "out").exists()
    assert [name for name in siblings(disk) if not name.startswith(".out.unfinished")] == []
    remount(disk, "size=16m")
    done = p2d(*short[work], "--out", disk / "out")
    assert done.code == 0, done.said
    assert siblings(disk) == ["out"]


def test_a_full_disk_leaves_the_last_good_artifact(p2d, short, small_disk):
    disk = small_disk(4000)
    assert p2d(*short["model"], "--out", disk / "out").code == 0
    before = open_artifact(disk / "out", "model")
    done = p2d(*short["model"], "--seed", 3, "--force", "--out", disk / "out")
    refused(done, 74, disk / "out")
    assert open_artifact(disk / "out", "model") == before
    assert siblings(disk) == ["out"]
    remount(disk, "size=16m")
    assert p2d(*short["model"], "--seed", 3, "--force", "--out", disk / "out").code == 0
    assert siblings(disk) == ["out"]


def test_a_disk_that_is_full_from_the_first_byte(p2d, short, small_disk, no_model):
    disk = small_disk(4)
    with (disk / "filler").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(b"x" * 512):
            pass
    done = p2d(*short["adapter"], "--out", disk / "out")
    refused(done, 74, disk / "out", "No space left")
    assert siblings(disk) == ["filler"]


def test_a_disk_that_fills_up_under_a_journal(p2d, short, small_disk, few):
    """What was finished before is kept, and gone on from once there is room."""
    disk = small_disk(16)
    command = ("eval", *short["evaluation"][1:5], "--data", few["test"], "--metric", "perplexity")
    command = (*command, "--token-budget", 40, "--out", disk / "out")
    (disk / "filler").write_bytes(b"x" * 4096 * 2)
    done = p2d(*command)
    while done.code == 0:  # less and less room, until the journal is what does not fit
        shutil.rmtree(disk / "out")
        with (disk / "filler").open("ab") as stream:
            stream.write(b"x" * 512)
        done = p2d(*command)
    refused(done, 74, "No space left")
    (disk / "filler").unlink()
    remount(disk, "size=1m")
    assert p2d(*command).code == 0
    assert siblings(disk) == ["out"]


def test_a_disk_that_fills_up_under_a_checkpoint(p2d, short, small_disk, tmp_path):
    """The training stops with 74, and goes on from the last checkpoint that was whole."""
    command = [word for word in short["lora"] if word not in {"--max-steps", 1}]
    command += ["--epochs", 3, "--checkpoint-minutes", 0]
    assert p2d(*command, "--out", tmp_path / "out").code == 0
    disk = small_disk(700)
    done = p2d(*command, "--out", disk / "out")
    refused(done, 74, disk / "out", "same command again")
    assert not (disk / "out").exists()
    remount(disk, "size=16m")
    done = p2d(*command, "--out", disk / "out")
    assert done.code == 0, done.said
    assert "going on from checkpoint-" in done.said
    assert siblings(disk) == ["out"]
    weights = "out/adapter_model.safetensors"
    assert (disk / weights).read_bytes() == (tmp_path / weights).read_bytes()


def test_a_read_only_output_is_73_before_a_model_loads(p2d, short, small_disk, no_model):
    disk = small_disk(4096)
    (disk / "kept").mkdir()
    remount(disk, "ro")
    for out in (disk / "out", disk / "new" / "deep" / "out", disk / "kept"):
        refused(p2d(*short["adapter"], "--out", out), 73, f"cannot create {out}", "Read-only file system")
    assert siblings(disk) == ["kept"]


def test_what_is_up_to_date_on_a_read_only_disk_is_up_to_date(p2d, short, small_disk):
    disk = small_disk(4096)
    assert p2d(*short["heads"], "--out", disk / "out").code == 0
    (disk / ".out.draft-deadbeef").mkdir()
    remount(disk, "ro")
    assert "up to date" in p2d(*short["heads"], "--out", disk / "out").said
    refused(p2d(*short["heads"], "--out", disk / "out", "--force"), 73, "Read-only file system")
    refused(p2d(*short["heads"], "--seed", 5, "--out", disk / "out"), 73, "--force")


def test_inputs_may_be_read_only(p2d, pipeline, tiny_folder, few, small_disk, tmp_path):
    """Model, rows and artifacts alike."""
    disk = small_disk(8192)
    shutil.copytree(tiny_folder, disk / "model")
    for name in ("heads", "subset", "adapter", "evaluation"):
        shutil.copytree(pipeline / name, disk / name)
    for name in ("pool", "target", "test"):
        shutil.copy(few[name], disk / f"{name}.jsonl")
    remount(disk, "ro")
    model = ("--model", disk / "model", "--dtype", "float32")
    train = ("train", *model, "--heads", disk / "heads", "--data", disk / "subset", "--max-steps", 1)
    commands = {
        "subset": ("mine-data", *model, "--heads", disk / "heads", "--pool", disk / "pool.jsonl"),
        "adapter": train,
        "evaluation": ("eval", *model, "--adapter", disk / "adapter", "--data", disk / "test.jsonl", "--limit", 2),
        "model": ("export", disk / "adapter", "--model", disk / "model"),
        "report": ("report-aer", disk / "evaluation", "--reference", disk / "evaluation"),
    }
    for name, command in commands.items():
        done = p2d(*command, "--out", tmp_path / name)
        assert done.code == 0, f"{name}: {done.said}"


def test_an_artifact_moved_aside_on_a_read_only_disk_is_named(p2d, short, small_disk, few, tiny_folder, tmp_path):
    disk = small_disk(4096)
    assert p2d(*short["heads"], "--out", disk / "out").code == 0
    (disk / "out").rename(disk / ".out.old")
    remount(disk, "ro")
    mine = ("mine-data", "--model", tiny_folder, "--heads", disk / "out", "--pool", few["pool"])
    refused(p2d(*mine, "--out", tmp_path / "s"), 74, disk / ".out.old", "cannot be put back", "rename it by hand")


def test_a_mount_point_and_the_current_folder_are_no_outputs(p2d, short, small_disk, tmp_path, monkeypatch, no_model):
    """They cannot be renamed, or pull the ground from under a shell; told before the work, not behind it."""
    disk = small_disk(4096)
    refused(p2d(*short["adapter"], "--out", disk), 73, "it is a mount point", "name a folder in it")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(p2d(*short["adapter"], "--out", "."), 73, "it is the current folder", "name a folder in it")


def test_an_output_that_is_a_link_is_written_behind_the_link(p2d, short, tmp_path):
    """As where a scratch disk is linked into a home."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch" / "out")
    for seed in (0, 1):
        assert p2d(*short["heads"], "--seed", seed, "--out", tmp_path / "out", "--force").code == 0
        assert (tmp_path / "out").is_symlink()
        assert json.loads((tmp_path / "scratch" / "out" / "manifest.json").read_text())["seed"] == seed
    assert siblings(tmp_path) == ["out", "scratch"]
    assert siblings(tmp_path / "scratch") == ["out"]


def test_a_device_that_fails_under_a_flush_leaves_the_old_artifact(p2d, short, tmp_path, monkeypatch):
    """What fsync says is believed: an artifact that may not be on the disk is not put in place."""
    assert p2d(*short["heads"], "--out", tmp_path / "out").code == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()

    def fail(_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        done = p2d(*short["heads"], "--seed", 1, "--force", "--out", tmp_path / "out")
    refused(done, 74, "Input/output error")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert siblings(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_old_artifact_back(p2d, short, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert p2d(*short["heads"], "--out", out).code == 0
    before = (out / "manifest.json").read_bytes()
    rename = os.rename

    def fail(source, target, **options):
        if str(target) == str(out) and ".draft-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        refused(p2d(*short["heads"], "--seed", 1, "--force", "--out", out), 74, "No space left")
    assert (out / "manifest.json").read_bytes() == before
    assert siblings(tmp_path) == ["out"]
