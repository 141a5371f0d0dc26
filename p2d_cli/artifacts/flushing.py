"""Getting files to the disk itself, so that they are there after a power cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NOT_FLUSHABLE = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM})
"""What file systems answer that do not flush directories."""


def flush_tree(folder: Path) -> None:
    """Flush every file below `folder`, and every directory from the innermost to `folder` itself."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            flush_file(Path(root, name))
        flush_directory(Path(root))


def flush_file(path: Path) -> None:
    """Flush a file's bytes."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def flush_directory(folder: Path) -> None:
    """Flush the names in a directory."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in _NOT_FLUSHABLE:
            raise
    finally:
        os.close(descriptor)
