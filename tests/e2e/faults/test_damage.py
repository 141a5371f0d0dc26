"""A file that was cut, flipped, renamed or swapped is refused by name before a model loads, whatever it is."""

import contextlib
import json
import os
import shutil

import pytest

from p2d_cli.artifacts import checkpoints
from p2d_cli.artifacts.checkpoints import newest_checkpoint, seal_checkpoint
from p2d_cli.artifacts.journal import Journal
from p2d_cli.artifacts.manifest import read_manifest
from p2d_cli.engine import tuning as stage

PAYLOAD = {
    "heads": "head_scores.safetensors",
    "subset": "subset.parquet",
    "adapter": "adapter_model.safetensors",
    "evaluation": "metrics.json",
    "report": "aer.json",
    "model": "model.safetensors",
}
READERS = ("heads", "subset", "adapter", "evaluation", "model")
"""The kinds that another stage takes in."""
DAMAGES = ("cut", "emptied", "flipped", "renamed", "swapped")


def refused(done, code, *words):
    assert done.code == code, done.said
    for word in words:
        assert str(word) in done.said, f"{word!r} is not in: {done.said}"


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    times = path.stat()
    path.write_bytes(bytes(content))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def damage(path, how, other):
    size = path.stat().st_size
    if how == "cut":
        os.truncate(path, size - 2)  # a manifest ends in a brace and a line feed
    elif how == "emptied":
        os.truncate(path, 0)
    elif how == "flipped":
        flip(path, size - 10)
    elif how == "renamed":
        path.rename(path.with_name("copy-of-" + path.name))
    else:
        shutil.copyfile(other, path)


@pytest.fixture
def sealed(golden, tmp_path):
    """Copy a golden artifact, with a manifest as this version writes it."""

    def copy(kind):
        folder = shutil.copytree(golden / kind, tmp_path / "sealed" / kind)
        text = read_manifest(folder).to_json(sealed=True)
        (folder / "manifest.json").write_text(text)
        return folder

    return copy


@pytest.fixture
def reader(golden, tiny_folder, few, tmp_path):
    """The command of a stage that takes in an artifact of a kind."""
    model = ("--model", tiny_folder)
    out = ("--out", tmp_path / "out")

    def make(kind, folder):
        return {
            "heads": ("mine-data", *model, "--heads", folder, "--pool", few["pool"], *out),
            "subset": ("train", *model, "--scope", "lora", "--data", folder, *out),
            "adapter": ("eval", *model, "--adapter", folder, "--data", few["test"], *out),
            "evaluation": ("report-aer", folder, "--reference", golden / "evaluation", *out),
            "model": ("eval", "--model", folder, "--data", few["test"], *out),
            "report": ("inspect", folder),
        }[kind]

    return make


@pytest.fixture
def other(golden, pipeline, tmp_path):
    """The same file of another artifact of the same kind."""
    folders = {"model": golden / "model", "report": pipeline / "report"}

    def find(kind):
        if kind != "model":
            return folders.get(kind, pipeline / kind) / PAYLOAD[kind]
        return pipeline / "full" / PAYLOAD["model"]

    return find


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("kind", PAYLOAD)
def test_a_damaged_payload_is_refused_by_name(p2d, sealed, reader, other, no_model, kind, how, tmp_path):
    folder = sealed(kind)
    damage(folder / PAYLOAD[kind], how, other(kind))
    words = {"renamed": "is missing", "cut": "bytes", "emptied": "bytes"}.get(how, "damaged")
    where = folder if (kind, how) == ("model", "renamed") else folder / PAYLOAD[kind]
    if where == folder:
        words = "has no model.safetensors"
    refused(p2d(*reader(kind, folder)), 65, where, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_whole_model_is_refused(p2d, copy_of, reader, no_model, file):
    folder = copy_of("full")
    flip(folder / file, (folder / file).stat().st_size // 2)
    refused(p2d(*reader("model", folder)), 65, folder / file, "damaged")


@pytest.mark.parametrize("kind", PAYLOAD)
def test_a_damaged_manifest_is_refused(p2d, sealed, reader, other, no_model, kind):
    folder = sealed(kind)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for how in ("cut", "emptied", "swapped"):
        damage(path, how, other(kind).with_name("manifest.json"))
        refused(p2d(*reader(kind, folder)), 65, path if how != "swapped" else folder)
        path.write_bytes(whole)
    # What the payload's digests do not tell: the costs, the settings, the summary.
    ledger = whole.index(b'"created_at": "2') + len(b'"created_at": "')
    path.write_bytes(whole)
    flip(path, ledger)
    refused(p2d(*reader(kind, folder)), 65, path, "is damaged, or was edited: expected digest")
    path.unlink()
    if kind in {"heads", "evaluation", "report"}:
        refused(p2d(*reader(kind, folder)), 65, folder, "manifest.json")


def test_every_flipped_bit_of_a_manifest_is_found(sealed):
    from p2d_cli.errors import ArtifactError

    path = sealed("evaluation") / "manifest.json"
    whole = path.read_bytes()
    before = read_manifest(path.parent)
    for position in range(0, len(whole), 7 if "P2D_SLOW" not in os.environ else 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(ArtifactError):
            assert read_manifest(path.parent) == before, f"bit {position % 8} of byte {position}"


def test_a_damaged_artifact_can_be_made_anew(p2d, short, tmp_path):
    """With --force only: it may be somebody's, and it may be asked what became of it."""
    out = tmp_path / "out"
    for name in ("head_scores.safetensors", "manifest.json"):
        assert p2d(*short["heads"], "--out", out, "--force").code == 0
        damage(out / name, "cut", None)
        refused(p2d(*short["heads"], "--out", out), 73, "damaged", "--force")
        assert p2d(*short["heads"], "--out", out, "--force").code == 0
        assert p2d("inspect", out).code == 0


# --- identity


def test_a_newer_schema_shows_both(p2d, sealed, reader, no_model):
    for kind in READERS:
        folder = sealed(kind)
        path = folder / "manifest.json"
        path.write_text(path.read_text().replace(f'"p2d.{kind}/1"', f'"p2d.{kind}/2"'))
        refused(p2d(*reader(kind, folder)), 65, f"p2d.{kind}/2", f"reads up to p2d.{kind}/1", "upgrade p2d")


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "tokenizer.json"])
def test_heads_of_another_model_or_tokenizer_show_both(p2d, golden, tiny_folder, few, no_model, changed, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    path = other / changed
    if changed == "model.safetensors":
        flip(path, path.stat().st_size - 1)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "another"}))
    made_with = read_manifest(golden / "heads").model
    mine = ("mine-data", "--model", other, "--heads", golden / "heads", "--pool", few["pool"])
    refused(
        p2d(*mine, "--out", tmp_path / "out"),
        65,
        "was made with another model",
        made_with.describe(),
        f"{other} (llama, weights",
    )


def test_heads_of_another_revision_show_both(p2d, golden, few, no_model, tmp_path, tiny_folder, monkeypatch):
    """Of a hub model; the same name, another commit."""
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("b" * 40)
    shutil.copytree(tiny_folder, snapshot)
    flip(snapshot / "model.safetensors", -1)
    monkeypatch.setattr("p2d_cli.modeling.model_files._snapshot", lambda *_, **__: snapshot)
    mine = ("mine-data", "--model", "some/model", "--heads", golden / "heads", "--pool", few["pool"])
    refused(p2d(*mine, "--out", tmp_path / "out"), 65, "another model", "some/model", "b" * 12)


# --- unfinished work


@pytest.fixture
def interrupted(p2d, short, tmp_path, monkeypatch):
    """A training that was interrupted behind two checkpoints; its command, and the folder of the checkpoints."""

    def make(scope):
        command = [word for word in short[scope] if word not in {"--max-steps", 1}]
        command += ["--epochs", 3, "--checkpoint-minutes", 0, "--out", tmp_path / "out"]
        sealed = []

        def seal(folder, progress):
            checkpoints.seal_checkpoint(folder, progress)
            sealed.append(folder)
            if len(sealed) == 3:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(stage, "seal_checkpoint", seal)
            assert p2d(*command).code == 130
        root = next(tmp_path.glob(".out.unfinished-*/checkpoints/micro-batch-*"))
        assert sorted(path.name for path in root.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
        return command, root

    return make


def test_training_goes_on_from_the_newest_checkpoint_that_verifies(p2d, interrupted, tmp_path):
    command, root = interrupted("lora")
    kept = shutil.copytree(root, tmp_path / "kept")
    files = {
        "adapter_model.safetensors": DAMAGES,
        "optimizer.pt": ("cut", "flipped"),
        "trainer_state.json": ("flipped", "swapped"),
        "p2d_seal.json": ("cut", "swapped"),
    }
    for name, ways in files.items():
        for how in ways:
            damage(root / "checkpoint-3" / name, how, root / "checkpoint-2" / name)
            key = json.loads((kept / "checkpoint-3" / "p2d_seal.json").read_text())["progress"]["work"]
            found, problems = newest_checkpoint(root, work=key)
            assert found.folder.name == "checkpoint-2", f"{name} {how}"
            assert len(problems) == 1
            shutil.rmtree(root / "checkpoint-3")
            shutil.copytree(kept / "checkpoint-3", root / "checkpoint-3")
    flip(root / "checkpoint-3" / "optimizer.pt", 1000)
    done = p2d(*command)
    assert done.code == 0, done.said
    assert "not going on from checkpoint-3: optimizer.pt has other bytes than were written" in done.said
    assert "going on from checkpoint-2" in done.said
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_checkpoint_in_disguise_is_not_gone_on_from(p2d, interrupted, tmp_path):
    """Renamed to look newer, of another run, or with a file more than it was written with."""
    command, root = interrupted("lora")
    shutil.copytree(root / "checkpoint-3", root / "checkpoint-4")
    shutil.copytree(root / "checkpoint-3", root / "checkpoint-5")
    foreign = json.loads((root / "checkpoint-3" / "p2d_seal.json").read_text())["progress"]
    (root / "checkpoint-5" / "p2d_seal.json").unlink()
    seal_checkpoint(root / "checkpoint-5", foreign | {"work": "another"})
    (root / "checkpoint-3" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    done = p2d(*command)
    assert done.code == 0, done.said
    assert "checkpoint-5: it is of another run" in done.said
    assert "checkpoint-4: it was written as checkpoint-3" in done.said
    assert "checkpoint-3: pytorch_model.bin was added to it" in done.said
    assert "going on from checkpoint-2" in done.said


@pytest.mark.parametrize("how", ["cut", "flipped", "swapped", "renamed"])
def test_a_damaged_journal_costs_time_and_nothing_else(p2d, short, tmp_path, monkeypatch, how):
    command = (*short["evaluation"], "--limit", 8, "--token-budget", 40)
    add = Journal.add

    def add_and_stop(self, batch, *arguments, **costs):
        add(self, batch, *arguments, **costs)
        if batch == 1:
            raise KeyboardInterrupt

    journals = {}
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_and_stop)
        for name, seed in (("out", 0), ("other", 1)):
            assert p2d(*command, "--seed", seed, "--out", tmp_path / name).code == 130
            [journals[name]] = tmp_path.glob(f".{name}.unfinished-*/*.jsonl")
    damage(journals["out"], how, journals["other"])
    done = p2d(*command, "--out", tmp_path / "out")
    assert done.code == 0, done.said
    assert ("1 of" in done.said) == (how in {"cut", "flipped"}), done.said
    assert "2 of" not in done.said
    assert p2d(*command, "--out", tmp_path / "undisturbed").code == 0
    metrics = [(tmp_path / name / "metrics.json").read_text() for name in ("out", "undisturbed")]
    assert metrics[0] == metrics[1]
