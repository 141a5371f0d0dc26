"""The manifest: what an artifact is, what made it, from what, at what cost.

`manifest.json` is the last file written into an artifact's folder. Where it stands and verifies, the artifact is
complete; a folder without it is not an artifact.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from p2d_cli.artifacts.digests import digest_file, digest_json
from p2d_cli.errors import ArtifactError
from p2d_cli.pipeline import ArtifactKind, stage_writing

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSIONS: dict[ArtifactKind, int] = dict.fromkeys(get_args(ArtifactKind), 1)
"""The version that this p2d writes of each kind, and the newest that it reads."""

SELF_DIGEST = "digest"
"""The key under which a manifest's file carries the digest of all its other keys."""

_SCHEMA = re.compile(r"p2d\.(\w+)/(\d{1,9})", re.ASCII)
_RERUN = "rerun the stage that wrote it, with --force"


class OutputFile(BaseModel):
    """One file of the payload."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    bytes: int
    content: bool = True
    """Whether the file is part of what the artifact says; pictures and logs are not."""


class InputEntry(BaseModel):
    """One input, identified by digest; `source` is where it lay, and is not part of its identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    digest: str
    source: str
    details: dict[str, Any] = Field(default_factory=dict)


class ModelIdentity(BaseModel):
    """Which base model an artifact belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    revision: str | None
    digest: str
    """Of the config and the weights."""
    tokenizer_digest: str | None
    """Of the tokenizer's files and chat template; None for a folder without a tokenizer."""
    model_type: str

    def describe(self) -> str:
        """Return a short text for messages."""
        tokenizer = (self.tokenizer_digest or "none")[:12]
        revision = "" if self.revision is None else f" at {self.revision[:12]}"
        return f"{self.source}{revision} ({self.model_type}, weights {self.digest[:12]}, tokenizer {tokenizer})"


class Manifest(BaseModel):
    """Everything known about an artifact."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    schema_: str = Field(alias="schema")
    key: str
    """Digest of all that determines the result; equal keys mean that nothing needs to be done."""
    identity: dict[str, Any]
    """What the key was computed from."""
    created_at: str
    status: str
    exit_code: int
    config: dict[str, dict[str, Any]]
    inputs: dict[str, InputEntry]
    outputs: dict[str, OutputFile]
    model: ModelIdentity | None
    seed: int
    seconds: dict[str, float]
    tokens: int
    peak_memory_gib: dict[str, float]
    hardware: dict[str, Any]
    precision: str
    versions: dict[str, str]
    summary: dict[str, Any]
    """The figures that the stage reports."""
    ledger: list[dict[str, Any]]
    """The costs of this artifact and of all that it was made from (`p2d_cli.core.aer.StageCost`)."""

    @field_validator("outputs")
    @classmethod
    def _plain_names(cls, outputs: dict[str, OutputFile]) -> dict[str, OutputFile]:
        for name in outputs:
            parts = Path(name).parts
            if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name:
                raise ValueError(f"output name {name!r} leaves the folder")
        return outputs

    @property
    def kind(self) -> str:
        """The kind of the artifact: the middle of its schema's name."""
        return self.schema_.split(".", 1)[1].split("/", 1)[0]

    @property
    def content_digest(self) -> str:
        """Digest of what the artifact says: equal for equal results, whenever and wherever they were made."""
        return digest_json({name: file.sha256 for name, file in self.outputs.items() if file.content})

    def to_json(self, *, sealed: bool = False) -> str:
        """Return the text of `manifest.json`.

        Args:
            sealed: whether a digest of all the other keys is added as the last one.
        """
        fields = json.loads(json.dumps(self.model_dump(mode="json", by_alias=True)))
        seal = {SELF_DIGEST: digest_json(fields)} if sealed else {}
        return json.dumps(fields | seal, indent=2, ensure_ascii=False) + "\n"


def artifact_key(identity: dict[str, Any]) -> str:
    """Return the digest of all that determines an artifact."""
    return digest_json(identity)


def is_artifact(folder: Path) -> bool:
    """Say whether `folder` holds a manifest, valid or not."""
    return (folder / MANIFEST_NAME).is_file()


def read_manifest(folder: Path, *, kind: ArtifactKind | None = None) -> Manifest:
    """Read a folder's manifest, without looking at the payload.

    Raises:
        ArtifactError: no manifest, not valid, of a newer schema, or of another kind than `kind`.
    """
    path = folder / MANIFEST_NAME
    expected = f"an artifact of kind {kind}" if kind else "an artifact"
    if not path.is_file():
        found = "a file" if folder.exists() else "nothing there"
        if folder.is_dir():
            found = "an unfinished or foreign folder: it has no manifest.json"
        hint = f"give the folder that p2d {stage_writing(kind).name} wrote" if kind else "give a folder that p2d wrote"
        raise ArtifactError(f"expected {expected} at {folder}, found {found}", hint=hint)
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise ArtifactError(f"{path} is not valid JSON: {problem}", hint=_RERUN) from None
    _check_schema(fields, path, kind)
    digest = fields.pop(SELF_DIGEST, None)
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as problems:
        first = problems.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path} is not a valid manifest: {where}: {first['msg']}", hint=_RERUN) from None
    _check_digest(fields, digest, path)
    return manifest


def _check_digest(fields: dict[str, Any], digest: Any, path: Path) -> None:
    """Compare a manifest with the digest that it carries; the first ones that p2d wrote carry none."""
    try:
        found = digest_json(fields)
    except ValueError as problem:
        raise ArtifactError(f"{path} is not a valid manifest: {problem}", hint=_RERUN) from None
    if digest is not None and digest != found:
        raise ArtifactError(
            f"{path} is damaged, or was edited: expected digest {str(digest)[:16]}..., found {found[:16]}...",
            hint=_RERUN,
        )


def guess_kind(folder: Path) -> str | None:
    """Return the kind of artifact at `folder` even if its manifest is damaged; None for what p2d did not write."""
    try:
        text = (folder / MANIFEST_NAME).read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r'"schema": "p2d\.(\w+)/', text[:200])
    return match[1] if match is not None and match[1] in SCHEMA_VERSIONS else None


def _check_schema(fields: Any, path: Path, kind: ArtifactKind | None) -> None:
    schema = fields.get("schema") if isinstance(fields, dict) else None
    match = _SCHEMA.fullmatch(schema) if isinstance(schema, str) else None
    if match is None or match[1] not in SCHEMA_VERSIONS:
        raise ArtifactError(f"{path} names no schema that p2d knows: {schema!r}")
    found, version = match[1], int(match[2])
    known = SCHEMA_VERSIONS[found]
    if version > known:
        raise ArtifactError(
            f"{path} has schema {schema}, and this p2d reads up to p2d.{found}/{known}", hint="upgrade p2d"
        )
    if kind is not None and found != kind:
        raise ArtifactError(
            f"expected an artifact of kind {kind} at {path.parent}, found one of kind {found}",
            hint=f"give the folder that p2d {stage_writing(kind).name} wrote",
        )


def verify_outputs(folder: Path, manifest: Manifest) -> None:
    """Compare every payload file with its size and digest.

    Raises:
        ArtifactError: naming the first file that is missing or differs, or that is a link to somewhere else.
    """
    for name, expected in manifest.outputs.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", hint=_RERUN)
        _refuse_link_outwards(folder, path)
        size = path.stat().st_size
        if size != expected.bytes:
            raise ArtifactError(f"{path} is damaged: expected {expected.bytes} bytes, found {size}", hint=_RERUN)
        # Of the file itself, since a link may bear any name.
        if (found := digest_file(path.resolve())) != expected.sha256:
            raise ArtifactError(
                f"{path} is damaged: expected sha256 {expected.sha256[:16]}..., found {found[:16]}...", hint=_RERUN
            )


def _refuse_link_outwards(folder: Path, path: Path) -> None:
    """Refuse a payload file that lies elsewhere, unless that is the store of the hub cache that the folder is in."""
    root, real = folder.resolve(), path.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(home) for home in homes):
        raise ArtifactError(
            f"{path} is a link to {real}, outside of the artifact", hint="copy the artifact with the files themselves"
        )
