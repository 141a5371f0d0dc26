"""Writing an artifact so that it is there whole or not at all.

A stage writes its payload into a `Draft`, a hidden folder beside the output. `commit` adds the manifest last, flushes
everything to disk and renames the folder into place. An artifact that is replaced is moved aside first, and put back
by the next reader or writer if the process dies between the two renames.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from p2d_cli.artifacts.digests import digest_file
from p2d_cli.artifacts.manifest import MANIFEST_NAME, Manifest, OutputFile, is_artifact, read_manifest, verify_outputs
from p2d_cli.errors import ArtifactError, CannotCreateError, StoppedEarlyError, StorageError
from p2d_cli.pipeline import ArtifactKind


class Draft:
    """A folder in which an artifact is being written."""

    def __init__(self, folder: Path, target: Path, unfinished: Path) -> None:
        self.folder = folder
        self.unfinished = unfinished
        """Where the stage keeps what it has finished so far; it outlives the draft, but not the commit."""
        self._target = target

    def describe_outputs(self, decoration: frozenset[str]) -> dict[str, OutputFile]:
        """Return size and digest of every file written so far, by its name relative to the folder.

        Args:
            decoration: names of files that are not part of what the artifact says, such as pictures.
        """
        outputs = {}
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = path.relative_to(self.folder).as_posix()
            outputs[name] = OutputFile(
                sha256=digest_file(path), bytes=path.stat().st_size, content=name not in decoration
            )
        return outputs

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and put the folder in the target's place."""
        (self.folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        _flush(self.folder)
        aside = self._target.with_name(f".{self._target.name}.old")
        if self._target.exists():
            self._target.rename(aside)
        self.folder.rename(self._target)
        _flush_directory(self._target.parent)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(self.unfinished, ignore_errors=True)


def open_artifact(folder: Path, kind: ArtifactKind) -> Manifest:
    """Return the verified manifest of an artifact that is an input.

    Raises:
        ArtifactError: see `read_manifest` and `verify_outputs`.
    """
    _restore(folder)
    manifest = read_manifest(folder, kind=kind)
    verify_outputs(folder, manifest)
    return manifest


def find_current(folder: Path, kind: ArtifactKind, key: str) -> Manifest | None:
    """Return the manifest at `folder` if it is complete, undamaged and made with `key`."""
    _restore(folder)
    if not is_artifact(folder):
        return None
    try:
        manifest = read_manifest(folder, kind=kind)
        if manifest.key != key:
            return None
        verify_outputs(folder, manifest)
    except ArtifactError:
        return None
    return manifest


def unfinished_folder(target: Path, key: str) -> Path:
    """Return where work for an artifact of this key is kept until it is finished."""
    return target.with_name(f".{target.name}.unfinished-{key[:16]}")


@contextmanager
def draft(target: Path, kind: ArtifactKind, key: str, *, resume: bool = True) -> Iterator[Draft]:
    """Open a draft of `target`; whatever is not committed is removed when the block ends.

    Args:
        target: the output folder.
        kind: what is about to be written there.
        key: what the artifact is made with; unfinished work for another key is removed.
        resume: whether to keep unfinished work for this key.

    Raises:
        CannotCreateError: the parent folder cannot be written.
        StoppedEarlyError: another process is writing the same artifact.
        StorageError: the disk is full or failed.
    """
    folder = target.with_name(f".{target.name}.draft-{uuid.uuid4().hex[:8]}")
    unfinished = unfinished_folder(target, key)
    with _lock(target):
        for leftover in target.parent.glob(f".{target.name}.draft-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in target.parent.glob(f".{target.name}.unfinished-*"):
            if leftover != unfinished or not resume:
                shutil.rmtree(leftover, ignore_errors=True)
        folder.mkdir()
        try:
            yield Draft(folder, target, unfinished)
        except OSError as problem:
            raise StorageError(f"making the {kind} artifact {target} failed: {problem}") from problem
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        with lock:
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout:
        raise StoppedEarlyError(
            f"another p2d process is writing {target}", hint="wait for it and run the same command again"
        ) from None
    except OSError as problem:
        if problem.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}:
            raise CannotCreateError(f"cannot create {target}: {problem.strerror}") from None
        raise


def ensure_replaceable(target: Path, kind: ArtifactKind, *, replace: bool, changes: str) -> None:
    """Refuse to put an artifact where something else stands.

    Args:
        target: the output folder.
        kind: what is about to be written there.
        replace: whether an artifact of the same kind may be replaced.
        changes: what differs from the artifact that is there, for the message.

    Raises:
        CannotCreateError: something is in the way.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise CannotCreateError(f"cannot create {target}: it is a file", hint="choose another --out")
    if not any(target.iterdir()):
        return
    found = _kind_at(target)
    if found != kind:
        what = f"a {found} artifact" if found else "files that p2d did not write"
        raise CannotCreateError(
            f"cannot write a {kind} artifact to {target}: it holds {what}", hint="choose another --out"
        )
    if not replace:
        raise CannotCreateError(
            f"{target} holds a {kind} artifact that this command would not make: {changes}",
            hint="give another --out, or --force to replace it",
        )


def _kind_at(folder: Path) -> str | None:
    try:
        return read_manifest(folder).kind
    except ArtifactError:
        return None


def _restore(target: Path) -> None:
    """Put back an artifact that was moved aside by a process that died before putting the new one there."""
    aside = target.with_name(f".{target.name}.old")
    if aside.exists() and not target.exists():
        aside.rename(target)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _flush_directory(folder)


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
