"""One writer an artifact: a lock file beside it that names its holder.

The lock is the kernel's (`flock`), which goes with the process that holds it, however that ends. The file is removed on
release, so whoever gets the lock makes sure that the file it locked is still the one of that name. On file systems
without `flock` the file itself is the lock: it is created by one process only, and taken from one that has died.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from p2d_cli.errors import StoppedEarlyError

_NO_FLOCK = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})
_ATTEMPTS = 1000
"""How often a lock file may vanish under a process that tries to lock it, before it gives up."""


@contextmanager
def write_lock(target: Path) -> Iterator[None]:
    """Hold the right to write `target` while the block runs.

    Args:
        target: the artifact's folder, there or not; its parent must be there.

    Raises:
        StoppedEarlyError: another process holds it; the message names it.
        OSError: the lock file cannot be created.
    """
    path = lock_path(target)
    for _ in range(_ATTEMPTS):
        try:
            descriptor = _acquire(path)
        except BlockingIOError:
            raise _taken(target, path) from None
        if descriptor is not None:
            break
    else:
        raise _taken(target, path)
    try:
        yield
    finally:
        # Removed before it is unlocked: whoever waits for this very file finds that it has lost its name.
        with contextlib.suppress(OSError):
            if _is_named(descriptor, path):
                path.unlink()
        os.close(descriptor)


def lock_path(target: Path) -> Path:
    """Return where the lock file of an artifact lies."""
    return target.with_name(f".{target.name}.lock")


def _acquire(path: Path) -> int | None:
    """Return a descriptor of the locked file, or None if the file was removed meanwhile.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    with contextlib.ExitStack() as unless_taken:
        unless_taken.callback(os.close, descriptor)
        if not _flock(descriptor):
            unless_taken.close()
            return _create(path)
        if not _is_named(descriptor, path):
            return None
        os.ftruncate(descriptor, 0)
        _describe_holder(descriptor)
        unless_taken.pop_all()
    return descriptor


def _flock(descriptor: int) -> bool:
    """Lock an open file; False where the file system knows no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in _NO_FLOCK:
            return False
        raise
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    """Say whether an open file is still the one that `path` names."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _create(path: Path) -> int | None:
    """Take the lock by creating the file, in the place of a dead holder's or of an empty one."""
    holder = _holder(path)
    if holder is not None and not _is_dead(holder):
        raise BlockingIOError(errno.EAGAIN, "the lock is held")
    # Only one process at a time may replace a dead holder's file, or it could replace the next holder's.
    replacing = _replacing(path)
    try:
        replacing.mkdir()
    except FileExistsError:
        raise BlockingIOError(errno.EAGAIN, "the lock is being taken") from None
    try:
        if _holder(path) != holder:
            return None
        fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _describe_holder(descriptor)
            fresh.replace(path)
        except BaseException:
            os.close(descriptor)
            fresh.unlink(missing_ok=True)
            raise
    finally:
        replacing.rmdir()
    return descriptor


def _replacing(path: Path) -> Path:
    return path.with_name(f"{path.name}.replacing")


def _describe_holder(descriptor: int) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    # A full disk costs others the name of the holder, not the holder its work.
    with contextlib.suppress(OSError):
        os.write(descriptor, json.dumps(holder).encode())


def _holder(path: Path) -> dict[str, Any] | None:
    """Return what a lock file says of its holder, if anything."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) and {"host", "pid", "since", "command"} <= holder.keys() else None


def _is_dead(holder: dict[str, Any]) -> bool:
    """Say whether the holder is a process of this machine that has ended; of other machines nothing is known."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except OSError as problem:
        return isinstance(problem, ProcessLookupError)
    return False


def _taken(target: Path, path: Path) -> StoppedEarlyError:
    holder = _holder(path)
    who = "" if holder is None else ": pid {pid} on {host} since {since}, `{command}`".format_map(holder)
    hint = "wait for it and run the same command again"
    if holder is not None and holder["host"] != socket.gethostname():
        hint += f"; if that process is gone, remove {path}"
    elif _replacing(path).exists():
        hint += f"; if there is none, remove {_replacing(path)}"
    return StoppedEarlyError(f"another p2d process is writing {target}{who}", hint=hint)
