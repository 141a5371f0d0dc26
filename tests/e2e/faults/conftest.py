"""What the injected faults have in common: one small command a kind of artifact, made from the golden artifacts."""

import shutil
import subprocess

import pytest


@pytest.fixture(scope="session")
def golden(tiny_folder):
    return tiny_folder.parent / "golden" / "v1"


@pytest.fixture(scope="session")
def short(golden, tiny_folder, few):
    """The shortest command that makes an artifact of each kind, and with each scope of training; without --out."""
    model = ("--model", tiny_folder, "--dtype", "float32")
    train = ("train", *model, "--data", golden / "subset", "--max-steps", 1, "--batch-size", 4)
    return {
        "heads": ("score-heads", *model, "--method", "uniform"),
        "subset": ("mine-data", *model, "--pool", few["pool"], "--method", "random"),
        "adapter": (*train, "--heads", golden / "heads"),
        "lora": (*train, "--scope", "lora"),
        "attention": (*train, "--scope", "attention"),
        "full": (*train, "--scope", "full"),
        "evaluation": ("eval", *model, "--data", few["test"], "--limit", 2, "--metric", "perplexity"),
        "report": ("report-aer", golden / "evaluation", "--reference", golden / "evaluation"),
        "model": ("export", golden / "adapter", "--model", tiny_folder),
    }


@pytest.fixture
def no_model(monkeypatch):
    """Fail the test if a model is loaded."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("p2d_cli.modeling.loading.load_model", load)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of so many KiB; a function that returns its folder. Skips where mounting is not permitted."""
    mounted = []

    def mount(kib, *, name="disk"):
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "p2d-test", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def make_read_only(folder):
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
