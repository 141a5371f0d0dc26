"""SHA-256 of files, remembered for large files that have not changed since.

Touching a file changes its time but not its digest; the remembered digest is then computed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

REMEMBERED_BYTES = 16 * 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def digest_json(value: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    A file of 16 MiB or more is read only if its size, time or inode changed since its digest was remembered. A file in
    a hub cache is a link to one in the folder `blobs` that is named by its own SHA-256, which is taken as it stands.
    """
    if path.is_symlink() and (blob := path.readlink()).parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    status = path.stat()
    if status.st_size < REMEMBERED_BYTES:
        return read_digest(path)
    stamp = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
    remembered = _recall()
    if stamp not in remembered:
        remembered[stamp] = read_digest(path)
        _remember(remembered)
    return remembered[stamp]


def digest_files(files: Sequence[Path], names: Sequence[str] | None = None) -> str:
    """Return one digest for several files: of their names and contents, in the order of their names.

    Args:
        files: where they lie.
        names: what counts as their names, where files of several folders may be called the same.
    """
    names = [file.name for file in files] if names is None else names
    return digest_json(sorted((name, digest_file(file)) for name, file in zip(names, files, strict=True)))


def read_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read now."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _memory_file() -> Path:
    """Return where digests are remembered.

    Raises:
        RuntimeError: the user has no home, as in some containers.
    """
    if base := os.environ.get("P2D_CACHE_DIR"):
        return Path(base) / "digests.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "p2d" / "digests.json"


def _recall() -> dict[str, str]:
    try:
        remembered = json.loads(_memory_file().read_bytes())
    except (OSError, ValueError, RuntimeError):
        return {}
    return remembered if isinstance(remembered, dict) else {}


def _remember(remembered: dict[str, str]) -> None:
    """Write the digests aside and rename; a home that cannot be written only costs the time saved."""
    with suppress(OSError, RuntimeError):
        memory = _memory_file()
        memory.parent.mkdir(parents=True, exist_ok=True)
        aside = memory.with_name(f"{memory.name}.{uuid.uuid4().hex[:8]}")
        try:
            aside.write_text(json.dumps(dict(list(remembered.items())[-1000:])), encoding="utf-8")
            aside.replace(memory)
        finally:
            aside.unlink(missing_ok=True)
