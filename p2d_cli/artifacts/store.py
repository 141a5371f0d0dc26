"""Writing an artifact so that it is there whole or not at all.

A stage writes its payload into a `Draft`, a hidden folder beside the output. `commit` adds the manifest last, flushes
everything to disk and renames the folder into place. An artifact that is replaced is moved aside first, and put back
by the next reader or writer if the process dies between the two renames.

What a dead process leaves beside `heads`, and the next one clears away:
- `.heads.draft-*`: a draft, or an artifact that was replaced and not yet removed;
- `.heads.old`: the artifact that was there, between the two renames;
- `.heads.unfinished-<key>`: finished batches and checkpoints, which the next run with this key goes on from; those
  of other keys stay where they hold any;
- `.heads.lock`: see `p2d_cli.artifacts.locking`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path

from p2d_cli.artifacts.content import check_content
from p2d_cli.artifacts.digests import digest_file
from p2d_cli.artifacts.flushing import flush_directory, flush_file, flush_tree
from p2d_cli.artifacts.locking import lock_path, write_lock
from p2d_cli.artifacts.manifest import (
    MANIFEST_NAME,
    Manifest,
    OutputFile,
    guess_kind,
    is_artifact,
    read_manifest,
    verify_outputs,
)
from p2d_cli.artifacts.unfinished import is_worth_keeping
from p2d_cli.core.wording import an
from p2d_cli.errors import ArtifactError, CannotCreateError, P2DError, StoppedEarlyError, StorageError, first_line
from p2d_cli.pipeline import ArtifactKind

_CANNOT_CREATE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
)
_SHORTER_NAME = "choose a shorter name for --out"
_NAME_BYTES, _PATH_BYTES = 255, 4096
"""The longest name and path of most file systems, where the system does not tell its own."""
_PAYLOAD_BYTES = 64
"""Room for the names of an artifact's own files."""
_LONGEST_SWAP_SECONDS = 10.0
"""How long a reader waits for a writer that is between its two renames."""
_PROBE_BYTES = 4096
_STORAGE_WORDS = re.compile(r"\(os error \d+\)|PytorchStreamWriter failed|No space left on device")
"""How safetensors and torch, whose exceptions are not the system's, tell that the system would not write."""


class Draft:
    """A folder in which an artifact is being written."""

    def __init__(self, folder: Path, target: Path, unfinished: Path) -> None:
        self.folder = folder
        self.unfinished = unfinished
        """Where the stage keeps what it has finished so far; it outlives the draft, but not the commit."""
        self._target = target

    def describe_outputs(self, extras: frozenset[str]) -> dict[str, OutputFile]:
        """Return size and digest of every file written so far, by its name relative to the folder.

        Args:
            extras: names of files that are not part of what the artifact says, such as pictures.
        """
        outputs = {}
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = path.relative_to(self.folder).as_posix()
            outputs[name] = OutputFile(sha256=digest_file(path), bytes=path.stat().st_size, content=name not in extras)
        return outputs

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and put the folder in the target's place."""
        (self.folder / MANIFEST_NAME).write_text(manifest.to_json(sealed=True), encoding="utf-8")
        flush_tree(self.folder)
        _swap(self.folder, self._target)
        shutil.rmtree(self.unfinished, ignore_errors=True)


def open_artifact(folder: Path, kind: ArtifactKind | None = None) -> Manifest:
    """Return the verified manifest of an artifact; of any kind, unless one is asked for.

    Raises:
        ArtifactError: see `read_manifest`, `verify_outputs` and `check_content`.
        StorageError: see `recover`.
    """
    recover(folder)
    manifest = read_manifest(folder, kind=kind)
    verify_outputs(folder, manifest)
    check_content(folder, manifest)
    return manifest


def find_current(
    folder: Path, kind: ArtifactKind, key: str, *, is_same: Callable[[Manifest], bool] = lambda _: False
) -> Manifest | None:
    """Return the manifest at `folder` if it is complete, undamaged and made with `key`.

    Args:
        folder: the artifact.
        kind: what it has to be.
        key: what it has to be made with.
        is_same: whether a manifest with another key is of the same work all the same, as one of an older p2d may be.
    """
    recover(folder)
    if not _can_exist(folder) or not is_artifact(folder):
        return None
    try:
        manifest = read_manifest(folder, kind=kind)
        check_content(folder, manifest)
        if manifest.key != key and not is_same(manifest):
            return None
        verify_outputs(folder, manifest)
    except ArtifactError:
        return None
    return manifest


def unfinished_folder(target: Path, key: str) -> Path:
    """Return where work for an artifact of this key is kept until it is finished."""
    return _hidden(_resolved(target), f"unfinished-{key[:16]}")


def unfinished_of_others(target: Path, key: str) -> list[Path]:
    """Return where interrupted runs with other keys have left what their own commands would go on from."""
    place = _resolved(target)
    if not (place.parent.is_dir() and _can_exist(place)):
        return []
    found = place.parent.glob(f"{escape(unfinished_folder(place, '').name)}*")
    return sorted(path for path in found if path != unfinished_folder(place, key) and is_worth_keeping(path))


@contextmanager
def draft(target: Path, kind: ArtifactKind, key: str, *, resume: bool = True, discard: bool = False) -> Iterator[Draft]:
    """Open a draft of `target`; whatever is not committed is removed when the block ends.

    Args:
        target: the output folder.
        kind: what is about to be written there.
        key: what the artifact is made with.
        resume: whether to keep unfinished work for this key.
        discard: whether to remove unfinished work for other keys also where there is something to go on from.

    Raises:
        CannotCreateError: the parent folder cannot be written.
        StoppedEarlyError: another process is writing the same artifact.
        StorageError: the disk is full or failed.
    """
    place = _resolved(target)
    unfinished = unfinished_folder(place, key)
    with _sole_writer(target, place):
        folder = _hidden(place, f"draft-{uuid.uuid4().hex[:8]}")
        try:
            _put_back(place)
            others = () if discard else unfinished_of_others(place, key)
            _sweep(place, unfinished_folder(place, ""), keep={unfinished, *others} if resume else others)
            folder.mkdir()
            # Fail on a full disk now, not after hours of work.
            probe = folder / "probe"
            probe.write_bytes(bytes(_PROBE_BYTES))
            flush_file(probe)
            probe.unlink()
            yield Draft(folder, place, unfinished)
        except P2DError:
            raise
        except Exception as problem:
            if (cause := _storage_problem(problem)) is None:
                raise
            if getattr(cause, "errno", None) == errno.ENAMETOOLONG:
                raise CannotCreateError(f"cannot create {target}: {first_line(cause)}", hint=_SHORTER_NAME) from problem
            raise StorageError(
                f"making the {kind} artifact {target} failed: {first_line(cause)}",
                hint="make room or mend the disk, and run the same command again: what was finished is kept",
            ) from problem
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def clear_leftovers(target: Path, key: str) -> None:
    """Remove what a dead writer left beside an artifact that is complete and was made with `key`.

    Nothing is done where another process is writing, or where nothing can be written.
    """
    place = _resolved(target)
    own = unfinished_folder(place, key)
    if not _leftovers(place, own) and not lock_path(place).exists():
        return
    with suppress(OSError, StoppedEarlyError), write_lock(place):
        _put_back(place)
        _sweep(place, own)


def recover(target: Path) -> None:
    """Put back an artifact that was moved aside by a process that died before putting the new one there.

    Raises:
        StorageError: it cannot be put back, as on a disk that cannot be written.
    """
    place = _resolved(target)
    aside = _hidden(place, "old")
    deadline = time.monotonic() + _LONGEST_SWAP_SECONDS
    while _can_exist(aside) and aside.exists() and not place.exists():
        try:
            with write_lock(place):
                _put_back(place)
        except StoppedEarlyError:
            # Its writer is alive, and between its two renames.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        except OSError as problem:
            raise StorageError(
                f"{target} was moved aside to {aside} by a process that died, and cannot be put back: "
                f"{problem.strerror}",
                hint="rename it by hand where it can be written",
            ) from None


@contextmanager
def _sole_writer(target: Path, place: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            _make_folders(place.parent)
            stack.enter_context(write_lock(place))
        except OSError as problem:
            if problem.errno in _CANNOT_CREATE:
                hint = _SHORTER_NAME if problem.errno == errno.ENAMETOOLONG else None
                raise CannotCreateError(f"cannot create {target}: {problem.strerror}", hint=hint) from None
            raise StorageError(f"cannot write beside {target}: {problem.strerror or problem}") from None
        yield


def ensure_nameable(target: Path) -> None:
    """Refuse a name that leaves no room for what lies beside an artifact while it is made.

    Raises:
        CannotCreateError: a part of the path is too long, or the whole.
    """
    place = _resolved(target)
    longest_name = _longest_of(place, "PC_NAME_MAX", _NAME_BYTES)
    longest_path = _longest_of(place, "PC_PATH_MAX", _PATH_BYTES)
    beside = unfinished_folder(place, "0" * 64)
    for part in (*place.parts[1:-1], beside.name):
        if len(os.fsencode(part)) > longest_name:
            raise CannotCreateError(
                f"cannot create {target}: a name of {len(os.fsencode(part))} bytes is too long: this file system takes "
                f"{longest_name}" + (", and p2d keeps unfinished work beside it" if part == beside.name else ""),
                hint=_SHORTER_NAME,
            )
    if len(os.fsencode(beside)) + _PAYLOAD_BYTES >= longest_path:
        raise CannotCreateError(f"cannot create {target}: the path is too long", hint=_SHORTER_NAME)


def _longest_of(place: Path, limit: str, otherwise: int) -> int:
    """Return a limit of the file system that a path will lie on."""
    try:
        return os.pathconf(next(folder for folder in place.parents if folder.exists()), limit)
    except (OSError, ValueError):
        return otherwise


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
    _ensure_movable(target)
    if not any(target.iterdir()):
        return
    found = guess_kind(target)
    if found != kind:
        what = f"{an(found)} artifact" if found else "files that p2d did not write"
        raise CannotCreateError(
            f"cannot write {an(kind)} artifact to {target}: it holds {what}", hint="choose another --out"
        )
    if not replace:
        raise CannotCreateError(
            f"{target} holds {an(kind)} artifact that this command would not make: {changes}",
            hint="give another --out, or --force to replace it",
        )


def _ensure_movable(target: Path) -> None:
    """Refuse what cannot be renamed, as an artifact's folder is: a mount point, or the folder that one stands in."""
    is_mount = os.path.ismount(target)
    if is_mount or _resolved(target) == _resolved(Path()):
        what = "a mount point" if is_mount else "the current folder"
        raise CannotCreateError(
            f"cannot put an artifact in place of {target}: it is {what}", hint="name a folder in it"
        )


# --- putting in place


def _swap(new: Path, target: Path) -> None:
    """Rename `new` to `target`; what is there is moved aside, and back if that fails."""
    aside = _hidden(target, "old")
    if target.exists():
        target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        _put_back(target)
        raise
    flush_directory(target.parent)
    _discard_aside(target)


def _put_back(target: Path) -> None:
    """Undo the first half of a swap; for the holder of the lock."""
    aside = _hidden(target, "old")
    if aside.exists() and not target.exists():
        aside.rename(target)
        flush_directory(target.parent)


def _discard_aside(target: Path) -> None:
    """Remove what was replaced; under another name first, lest half of it be put back."""
    aside = _hidden(target, "old")
    if not aside.exists():
        return
    doomed = _hidden(target, f"draft-{uuid.uuid4().hex[:8]}")
    with suppress(OSError):
        aside.rename(doomed)
        shutil.rmtree(doomed)


def _sweep(target: Path, unfinished: Path, *, keep: Collection[Path] = ()) -> None:
    """Remove what dead writers left; for the holder of the lock."""
    if target.exists():
        _discard_aside(target)
    for leftover in _leftovers(target, unfinished):
        if leftover not in keep and leftover != _hidden(target, "old"):
            shutil.rmtree(leftover, ignore_errors=True)


def _leftovers(target: Path, unfinished: Path) -> list[Path]:
    """Return what lies beside an artifact for a while only; unfinished work if its name begins as the one given."""
    starts = (_hidden(target, "draft-").name, unfinished.name)
    old = _hidden(target, "old")
    return [path for path in target.parent.iterdir() if path.name.startswith(starts) or path == old]


def _resolved(target: Path) -> Path:
    """Return where an artifact lies in truth: it is the folder behind a link that is replaced, not the link."""
    return Path(os.path.realpath(target))


def _hidden(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.{suffix}"


def _make_folders(folder: Path) -> None:
    """Make a folder and those above it, so that they outlive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush_directory(path.parent)


def _can_exist(path: Path) -> bool:
    """Say whether a name is short enough to be that of a file."""
    try:
        path.exists()
    except OSError as problem:
        return problem.errno != errno.ENAMETOOLONG
    return True


def _storage_problem(problem: BaseException | None) -> BaseException | None:
    """Return what the system had against writing: this exception or one that it came from; None if it is another."""
    while problem is not None and not isinstance(problem, OSError) and not _STORAGE_WORDS.search(str(problem)):
        problem = problem.__cause__
    return problem
