"""What makes two artifacts the same: the digests of models and rows, and in what two identities differ."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import shorten
from typing import Any

from pydantic import ValidationError

from p2d_cli.artifacts.content import check_content
from p2d_cli.artifacts.digests import digest_file, digest_files, digest_json
from p2d_cli.artifacts.manifest import Manifest, ModelIdentity, read_manifest
from p2d_cli.artifacts.store import unfinished_of_others
from p2d_cli.artifacts.unfinished import Origin, progress_in
from p2d_cli.config import FORMER_NAMES, STAGE_CONFIGS, declared
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.data.sources import hub_commit
from p2d_cli.errors import ArtifactError, CannotCreateError
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.pipeline import stage_writing

_LONGEST_VALUE = 60


def identify_model(files: ModelFiles) -> ModelIdentity:
    """Digest a model's config and weights, and apart from them its tokenizer and chat template."""
    weights = sorted((path.name, digest_file(path)) for path in files.weights)
    return ModelIdentity(
        source=files.spec,
        revision=files.revision,
        digest=digest_json([digest_file(files.config_path), weights]),
        tokenizer_digest=digest_files(files.tokenizer) if files.tokenizer else None,
        model_type=files.model_type,
    )


def ensure_same_model(manifest: Manifest, model: ModelIdentity, spec: str, flag: str = "--model") -> None:
    """Refuse the artifact at `spec` if it was made with another model or tokenizer than `flag` names.

    Raises:
        ArtifactError: naming both.
    """
    made_with = manifest.model
    if made_with is None:
        return
    tokenizers = {made_with.tokenizer_digest, model.tokenizer_digest} - {None}
    if made_with.digest != model.digest or len(tokenizers) > 1:
        raise ArtifactError(
            f"{spec} was made with another model\n  it was made with: {made_with.describe()}\n"
            f"  {flag + ' is:':<17} {model.describe()}",
            hint=f"give {flag} {made_with.source}, or make it again with this model",
        )


def identity_differences(identity: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return what differs between the identities of two artifacts, as `setting limit` or `input data`."""
    return [
        f"{part[:-1]} {name}"
        for part in ("settings", "inputs")
        for name in sorted({*identity[part], *other.get(part, {})})
        if identity[part].get(name, ...) != other.get(part, {}).get(name, ...)
    ]


def recorded_identity(manifest: Manifest) -> dict[str, Any]:
    """Return an artifact's identity as this version of p2d writes it, from the settings that were recorded.

    Versions differ in the settings they have and in those that an identity leaves out. A setting that the artifact's
    version did not have counts as neutral; one that has gone since is kept, so that it differs from any of today.
    """
    model = STAGE_CONFIGS[stage_writing(manifest.kind).name]
    extras = {name: declared(field) for name, field in model.model_fields.items()}
    values = {name: extra["neutral"] for name, extra in extras.items() if "neutral" in extra}
    known = {FORMER_NAMES.get(name, name): entry.get("value") for name, entry in manifest.config.items()}
    values |= {name: value for name, value in known.items() if name in extras}
    if values.get("method") == "auto":
        # The rule may have been another one then, or the method that of scores which were there.
        values["method"] = manifest.summary.get("method")
    try:
        settings = model.model_validate(values).identity()
    except ValidationError:
        return manifest.identity
    recorded = manifest.identity.get("settings", {})
    gone = {name: value for name, value in recorded.items() if FORMER_NAMES.get(name, name) not in extras}
    return manifest.identity | {"settings": settings | gone}


def digest_rows(source: RowSource) -> str:
    """Digest the files of rows, or name the revision of a hub data set."""
    if source.files:
        files = digest_files(source.files, source.names)
        return digest_json([files, source.labels]) if source.labels else files
    return digest_json([source.repo, source.config_name, source.split, hub_commit(source) or source.revision])


def changes_of(out: Path, identity: dict[str, Any]) -> str:
    """Say in what the artifact at `out` differs from the one that would be made, and of settings, both values."""
    try:
        manifest = read_manifest(out)
        check_content(out, manifest)
        recorded = recorded_identity(manifest)
    except ArtifactError:
        return "it is damaged"
    return _differences(identity, recorded) or "a file of it is damaged"


def ensure_nothing_lost(out: Path, key: str, identity: dict[str, Any]) -> None:
    """Refuse to work at `out` where an interrupted run with other settings has left something to go on from.

    Raises:
        CannotCreateError: naming what it left, and what differs.
    """
    for folder in unfinished_of_others(out, key):
        recorded = Origin.load(folder).identity
        differences = _differences(identity, recorded) if recorded else ""
        raise CannotCreateError(
            f"an interrupted run has left {progress_in(folder)} of another {out}: "
            f"{differences or 'it differs in what made it, another version of p2d'}",
            hint="finish it with its own command, give another --out, or --force to discard it",
        )


def _differences(identity: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Say in what two identities differ, settings with both values; nothing if they do not."""
    kind = identity["schema"].removeprefix("p2d.").partition("/")[0]
    fields = STAGE_CONFIGS[stage_writing(kind).name].model_fields
    found = []
    for difference in identity_differences(identity, recorded):
        part, name = difference.split(" ", 1)
        if part == "setting":
            neutral = declared(fields[name]).get("neutral") if name in fields else None
            there, now = (_value_text(one["settings"].get(name, neutral)) for one in (recorded, identity))
            difference += f" ({there} there, {now} now)"
        found.append(difference)
    return "it differs in " + ", ".join(found) if found else ""


def _value_text(value: Any) -> str:
    """Return a setting's value as a flag would give it, cut where it is long."""
    if value is None:
        return "not set"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return shorten(value if isinstance(value, str) else json.dumps(value), _LONGEST_VALUE, placeholder="...")
