"""An artifact is there whole or not at all, and nothing foreign is ever overwritten."""

import json
import os
import shutil

import pytest

from p2d_cli.artifacts.content import check_content
from p2d_cli.artifacts.digests import digest_file, digest_files, digest_json
from p2d_cli.artifacts.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSIONS,
    Manifest,
    artifact_key,
    read_manifest,
    verify_outputs,
)
from p2d_cli.artifacts.store import (
    draft,
    ensure_nameable,
    ensure_replaceable,
    find_current,
    open_artifact,
    recover,
)
from p2d_cli.errors import ArtifactError, CannotCreateError, StoppedEarlyError, StorageError
from p2d_cli.pipeline import EXPORT, STAGES

SUMMARY = {
    "method": "random",
    "heads_selected": 1,
    "heads_total": 4,
    "groups_touched": 1,
    "groups_total": 2,
    "layers_touched": 1,
}


def make_manifest(outputs, kind="heads", **changes):
    identity = {"schema": f"p2d.{kind}/1", "settings": {"seed": 0}, "inputs": {}}
    fields = {
        "schema": f"p2d.{kind}/1",
        "key": artifact_key(identity),
        "identity": identity,
        "created_at": "2026-01-01T00:00:00+00:00",
        "status": "complete",
        "exit_code": 0,
        "config": {"seed": {"value": 0, "origin": "default"}},
        "inputs": {},
        "outputs": outputs,
        "model": None,
        "seed": 0,
        "seconds": {"score": 1.5},
        "tokens": 10,
        "peak_memory_gib": {"host": 0.5},
        "hardware": {"label": "test"},
        "precision": "float32",
        "versions": {},
        "summary": SUMMARY,
        "ledger": [],
    }
    return Manifest(**(fields | changes))


def write(target, text="payload", kind="heads", extras=frozenset()):
    with draft(target, kind, "key") as place:
        (place.folder / "scores.txt").write_text(text)
        (place.folder / "picture.png").write_text("picture of " + text)
        manifest = make_manifest(place.describe_outputs(extras), kind)
        place.commit(manifest)
    return manifest


def siblings(target):
    return sorted(path.name for path in target.parent.iterdir())


def test_a_committed_artifact_verifies_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "deep" / "heads"
    written = write(target)
    assert open_artifact(target, "heads") == written
    assert siblings(target) == ["heads"]


def test_a_failure_inside_a_draft_leaves_the_old_artifact(tmp_path):
    target = tmp_path / "heads"
    before = write(target, "old")

    def fail():
        with draft(target, "heads", "key") as place:
            (place.folder / "scores.txt").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    assert open_artifact(target, "heads") == before
    assert siblings(target) == ["heads"]


def test_an_os_error_in_a_draft_is_a_storage_error(tmp_path):
    def fail():
        with draft(tmp_path / "heads", "heads", "key"):
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left") as caught:
        fail()
    assert caught.value.exit_code == 74
    assert siblings(tmp_path / "heads") == []


def test_leftovers_of_a_killed_writer_are_removed_by_the_next(tmp_path):
    target = tmp_path / "heads"
    leftover = tmp_path / ".heads.draft-deadbeef"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    write(target)
    assert siblings(target) == ["heads"]


def test_an_artifact_moved_aside_by_a_killed_writer_is_put_back(tmp_path):
    target = tmp_path / "heads"
    manifest = write(target)
    target.rename(tmp_path / ".heads.old")
    assert find_current(target, "heads", manifest.key) == manifest
    assert siblings(target) == ["heads"]


def test_a_second_writer_is_told(tmp_path):
    def both():
        with draft(tmp_path / "heads", "heads", "key"), draft(tmp_path / "heads", "heads", "key"):
            pass

    with pytest.raises(StoppedEarlyError, match="another p2d process"):
        both()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CannotCreateError), draft(tmp_path / "heads", "heads", "key"):
        pass


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotCreateError) as caught, draft(tmp_path / "file" / "heads", "heads", "key"):
        pass
    assert caught.value.exit_code == 73


@pytest.mark.parametrize("bytes_over", [0, 1, 29])
def test_a_name_that_leaves_no_room_beside_it_is_refused(tmp_path, bytes_over):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") - len("..unfinished-0123456789abcdef") + 1
    target = tmp_path / ("n" * (longest - 1 + bytes_over))
    if not bytes_over:
        ensure_nameable(target)
        write(target)
        assert find_current(target, "heads", read_manifest(target).key) is not None
        return
    with pytest.raises(CannotCreateError, match="bytes is too long") as caught:
        ensure_nameable(target)
    assert caught.value.hint == "choose a shorter name for --out"
    assert find_current(target, "heads", "key") is None


def test_folders_and_paths_that_are_too_long_are_refused(tmp_path):
    with pytest.raises(CannotCreateError, match=r"a name of 300 bytes is too long: this file system takes \d+$"):
        ensure_nameable(tmp_path / ("n" * 300) / "heads")
    with pytest.raises(CannotCreateError, match="the path is too long"):
        ensure_nameable(tmp_path.joinpath(*["n" * 100] * 50))
    with (
        pytest.raises(CannotCreateError, match="File name too long") as caught,
        draft(tmp_path / ("n" * 300), "heads", "key"),
    ):
        pass
    assert caught.value.hint == "choose a shorter name for --out"


def test_a_payload_whose_name_is_too_long_is_no_failing_disk(tmp_path):
    with pytest.raises(CannotCreateError) as caught, draft(tmp_path / "heads", "heads", "key") as place:
        (place.folder / ("n" * 300)).write_text("")
    assert caught.value.exit_code == 73


def test_what_has_a_long_name_is_recovered_from_nothing(tmp_path):
    (tmp_path / ("n" * 253)).write_text("")
    recover(tmp_path / ("n" * 253))
    recover(tmp_path / ("n" * 300))


def test_find_current_wants_the_same_key_and_undamaged_files(tmp_path):
    target = tmp_path / "heads"
    manifest = write(target)
    assert find_current(target, "heads", "another") is None
    assert find_current(target, "heads", "another", is_same=lambda found: found.key == manifest.key) == manifest
    assert find_current(tmp_path / "nothing", "heads", manifest.key) is None
    (target / "scores.txt").write_text("pAyload")
    assert find_current(target, "heads", manifest.key) is None


def test_touching_a_file_is_not_a_change(tmp_path):
    target = tmp_path / "heads"
    manifest = write(target)
    os.utime(target / "scores.txt", (1, 1))
    assert find_current(target, "heads", manifest.key) == manifest


@pytest.mark.parametrize(("damage", "words"), [("flip", "sha256"), ("cut", "bytes"), ("remove", "missing")])
def test_damage_is_refused_by_name(tmp_path, damage, words):
    target = tmp_path / "heads"
    write(target)
    path = target / "scores.txt"
    if damage == "flip":
        path.write_text("paYload")
    elif damage == "cut":
        path.write_text("pay")
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match=words) as caught:
        open_artifact(target, "heads")
    assert "scores.txt" in caught.value.message
    assert caught.value.exit_code == 65


def test_content_digest_ignores_pictures(tmp_path):
    first = write(tmp_path / "a", extras=frozenset({"picture.png"}))
    (tmp_path / "b").mkdir()
    with draft(tmp_path / "b", "heads", "key") as place:
        (place.folder / "scores.txt").write_text("payload")
        (place.folder / "picture.png").write_text("drawn by another version")
        second = make_manifest(place.describe_outputs(frozenset({"picture.png"})))
    assert first.content_digest == second.content_digest
    assert first.content_digest != write(tmp_path / "c", "other", extras=frozenset({"picture.png"})).content_digest


# --- what stands in the way


def test_foreign_files_are_never_replaced_even_when_asked(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(CannotCreateError, match="did not write"):
        ensure_replaceable(tmp_path, "heads", replace=True, changes="")


def test_an_artifact_of_another_kind_is_never_replaced(tmp_path):
    write(tmp_path / "x", kind="subset")
    with pytest.raises(CannotCreateError, match="holds a subset artifact"):
        ensure_replaceable(tmp_path / "x", "heads", replace=True, changes="")


def test_the_same_kind_is_replaced_only_when_asked(tmp_path):
    write(tmp_path / "x")
    with pytest.raises(CannotCreateError, match="it differs in setting ratio") as caught:
        ensure_replaceable(tmp_path / "x", "heads", replace=False, changes="it differs in setting ratio")
    assert caught.value.exit_code == 73
    assert "--force" in caught.value.hint
    ensure_replaceable(tmp_path / "x", "heads", replace=True, changes="")


def test_nothing_or_an_empty_folder_is_free(tmp_path):
    ensure_replaceable(tmp_path / "new", "heads", replace=False, changes="")
    ensure_replaceable(tmp_path, "heads", replace=False, changes="")


def test_a_file_is_in_the_way(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(CannotCreateError, match="it is a file"):
        ensure_replaceable(tmp_path / "x", "heads", replace=True, changes="")


# --- manifests


def edit(target, **changes):
    path = target / MANIFEST_NAME
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | changes))


def test_manifest_survives_a_round_trip(tmp_path):
    manifest = write(tmp_path / "heads")
    assert read_manifest(tmp_path / "heads", kind="heads") == manifest
    assert manifest.kind == "heads"


def test_a_newer_schema_is_refused_by_name(tmp_path):
    write(tmp_path / "heads")
    edit(tmp_path / "heads", schema="p2d.heads/2")
    with pytest.raises(ArtifactError, match=r"p2d\.heads/2.*reads up to p2d\.heads/1"):
        read_manifest(tmp_path / "heads")


@pytest.mark.parametrize("schema", ["p2d.cats/1", "heads", "", None, 7])
def test_an_unknown_schema_is_refused(tmp_path, schema):
    write(tmp_path / "heads")
    edit(tmp_path / "heads", schema=schema)
    with pytest.raises(ArtifactError, match="no schema that p2d knows"):
        read_manifest(tmp_path / "heads")


def test_another_kind_is_refused_and_says_who_writes_the_right_one(tmp_path):
    write(tmp_path / "x", kind="subset")
    with pytest.raises(ArtifactError, match=r"an artifact of kind heads .* found one of kind subset") as caught:
        open_artifact(tmp_path / "x", "heads")
    assert "p2d score-heads" in caught.value.hint


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b", "..\\x"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    write(tmp_path / "heads")
    edit(tmp_path / "heads", outputs={name: {"sha256": "0" * 64, "bytes": 1, "content": True}})
    with pytest.raises(ArtifactError, match="leaves the folder"):
        read_manifest(tmp_path / "heads")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": "p2d.heads/1"}', "[" * 100_000])
def test_a_broken_manifest_is_refused(tmp_path, text):
    write(tmp_path / "heads")
    (tmp_path / "heads" / MANIFEST_NAME).write_text(text)
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path / "heads")


def test_a_folder_without_manifest_is_not_an_artifact(tmp_path):
    write(tmp_path / "heads")
    (tmp_path / "heads" / MANIFEST_NAME).unlink()
    with pytest.raises(ArtifactError, match="unfinished or foreign"):
        open_artifact(tmp_path / "heads", "heads")
    with pytest.raises(ArtifactError, match="nothing there"):
        open_artifact(tmp_path / "none", "heads")


def test_every_kind_that_a_stage_writes_has_a_schema():
    assert {stage.writes for stage in (*STAGES, EXPORT)} == set(SCHEMA_VERSIONS)


def test_verify_reads_nested_files(tmp_path):
    with draft(tmp_path / "heads", "heads", "key") as place:
        (place.folder / "inner").mkdir()
        (place.folder / "inner" / "a.bin").write_bytes(b"1234")
        manifest = make_manifest(place.describe_outputs(frozenset()))
        place.commit(manifest)
    assert set(manifest.outputs) == {"inner/a.bin"}
    verify_outputs(tmp_path / "heads", manifest)


# --- digests


def test_large_files_are_remembered_until_they_change(tmp_path, monkeypatch):
    monkeypatch.setenv("P2D_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("p2d_cli.artifacts.digests.REMEMBERED_BYTES", 4)
    path = tmp_path / "large"
    path.write_bytes(b"12345678")
    first = digest_file(path)
    reads = []
    monkeypatch.setattr("p2d_cli.artifacts.digests.read_digest", lambda path: reads.append(path) or "fresh")
    assert digest_file(path) == first
    assert not reads
    path.write_bytes(b"12345679")
    os.utime(path, ns=(1, 1))
    assert digest_file(path) == "fresh"


def test_a_memory_that_cannot_be_read_or_written_costs_only_time(tmp_path, monkeypatch):
    memory = tmp_path / "cache"
    memory.write_text("a file where the folder should be")
    monkeypatch.setenv("P2D_CACHE_DIR", str(memory))
    monkeypatch.setattr("p2d_cli.artifacts.digests.REMEMBERED_BYTES", 1)
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert digest_file(path) == digest_file(path)


def test_a_link_into_a_hub_cache_is_known_by_its_blob(tmp_path):
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("a" * 64)
    blob.write_text("weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert digest_file(tmp_path / "model.safetensors") == "a" * 64


def test_any_other_link_is_read_whatever_its_name(tmp_path):
    (tmp_path / ("a" * 64)).write_text("weights")
    (tmp_path / "link").symlink_to(tmp_path / ("a" * 64))
    assert digest_file(tmp_path / "link") == digest_file(tmp_path / ("a" * 64)) != "a" * 64


def test_digests_see_content_and_names_and_no_order(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    first = digest_files([tmp_path / "a", tmp_path / "b"])
    assert first == digest_files([tmp_path / "b", tmp_path / "a"])
    shutil.copy(tmp_path / "a", tmp_path / "b")
    assert first != digest_files([tmp_path / "a", tmp_path / "b"])
    assert digest_json({"x": 1, "y": 2}) == digest_json({"y": 2, "x": 1})


READERS = {"heads_reading_all": 8, "heads_reading_best": 4, "depths": [1, 3]}
SURENESS = {"area": 0.9, "area_low": 0.8, "area_high": 1.0, "rows": 12}


@pytest.mark.parametrize("more", [READERS, SURENESS, READERS | SURENESS])
def test_heads_may_say_who_reads_and_how_surely(tmp_path, more):
    manifest = make_manifest({}, summary=SUMMARY | more)
    check_content(tmp_path, manifest)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        *((READERS | {name: None}, name) for name in ("heads_reading_best", "depths")),
        *((SURENESS | {name: None}, name) for name in ("area_low", "area_high", "rows")),
        (READERS | {"depths": [1]}, "depths"),
        (READERS | {"heads_reading_all": "8"}, "heads_reading_all"),
    ],
)
def test_a_summary_of_heads_that_says_half_is_refused(tmp_path, more, named):
    with pytest.raises(ArtifactError, match=named):
        check_content(tmp_path, make_manifest({}, summary=SUMMARY | more))
