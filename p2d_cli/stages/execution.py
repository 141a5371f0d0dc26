"""What all stages do alike: identify inputs, skip what is current, charge seconds, write the artifact.

A stage's `run` opens a `StageRun`, registers its inputs by digest, and hands its computation to `complete`. Nothing
here imports torch, so that a run that is up to date answers at once.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal

from p2d_cli.artifacts.digests import digest_file, digest_files, digest_json
from p2d_cli.artifacts.journal import Journal
from p2d_cli.artifacts.manifest import (
    SCHEMA_VERSIONS,
    InputEntry,
    Manifest,
    ModelIdentity,
    artifact_key,
    is_artifact,
    read_manifest,
)
from p2d_cli.artifacts.store import draft, ensure_replaceable, find_current, open_artifact, unfinished_folder
from p2d_cli.artifacts.subset import SUBSET_NAME
from p2d_cli.config import ConfigT, EvalConfig, Resolved, RowOptions
from p2d_cli.core.aer import StageCost
from p2d_cli.core.cost import StagePlan
from p2d_cli.data.prompts import read_chat_template
from p2d_cli.data.records import ColumnMap, RecordSet, read_records
from p2d_cli.data.sources import RowSource, hub_commit, locate
from p2d_cli.errors import ArtifactError, CannotCreateError, UnavailableError
from p2d_cli.modeling.model_files import ModelFiles, locate_model
from p2d_cli.pipeline import ArtifactKind, stage_named
from p2d_cli.runtime.hardware import describe_hardware, package_versions, peak_memory_gib, synchronizer
from p2d_cli.runtime.progress import Progress, SilentProgress
from p2d_cli.runtime.timing import PhaseTimer


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what."""

    force: bool = False
    """Redo the stage even if its artifact is current, and replace what is there."""
    replace_stale: bool = False
    """Replace an artifact whose inputs or settings changed; a recipe owns its folder and does so."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    timed: bool = False
    """In a dry run: load the model, and time some batches of what would be done."""
    rates: dict[tuple[Any, ...], tuple[float, float | None]] = field(default_factory=dict)
    """What such timings found, so that the stages of a recipe share them."""
    progress: Progress = field(default_factory=SilentProgress)


@dataclass(frozen=True)
class StageResult:
    """What a stage did."""

    stage: str
    out: Path
    status: Literal["done", "up-to-date", "would-run", "would-skip"]
    key: str
    inputs: dict[str, InputEntry]
    manifest: Manifest | None
    """None only for a dry run of work that is still to do."""
    wall_seconds: float
    plan: StagePlan | None = None
    """What it would take; only for a dry run of work that is still to do."""


@dataclass(frozen=True)
class Outcome:
    """What a stage's computation hands back for the manifest."""

    summary: dict[str, Any]
    settings: dict[str, Any]
    """What the report needs to know of the stage (see `p2d_cli.core.aer`)."""
    precision: str
    device: str
    tokens: int = 0
    epochs: float | None = None
    steps_done: int | None = None
    steps_planned: int | None = None
    decoration: frozenset[str] = frozenset()
    """Payload files that are not part of what the artifact says, such as pictures and logs."""
    charged: bool = True
    """Whether the stage is a cost that a run is charged for."""


class StageRun(Generic[ConfigT]):
    """One run of one stage."""

    def __init__(self, stage: str, resolved: Resolved[ConfigT], options: RunOptions) -> None:
        self.stage = stage_named(stage)
        self.kind: ArtifactKind = self.stage.writes
        self.resolved = resolved
        self.config = resolved.config
        self.options = options
        self.progress = options.progress
        self.timer = PhaseTimer()
        self.inputs: dict[str, InputEntry] = {}
        self.manifests: dict[str, Manifest] = {}
        """Manifests of the inputs that are artifacts, by the input's name."""
        self.model_identity: ModelIdentity | None = None
        self.scorer: ModelIdentity | None = None
        """The model that does this stage's work, where it is not the one that the work is for."""
        self.devices: dict[str, int] = {}
        """The devices of a divided model, each with its number of modules; empty for a model on one device."""
        self.facts: dict[str, Any] = {}
        """What to add to the stage's own summary."""
        self._ledger: dict[str, dict[str, Any]] = {}
        self._unfinished: Path | None = None
        self._started = time.perf_counter()

    @property
    def system(self) -> str | None:
        """The system prompt of rows that bring none: as given, else in an evaluation the one of the training."""
        given = self.config.system if isinstance(self.config, RowOptions) else None
        trained = trained_prompt(self)
        return (trained["system"] if given is None and trained is not None else given) or None

    def use_device(self, device: str) -> None:
        """Synchronise with `device` when a phase begins or ends."""
        self.timer.synchronize_with(synchronizer(device))

    def model(self, spec: str, *, name: str = "model", with_tokenizer: bool = True) -> ModelFiles:
        """Locate and identify a model; the one called `model` is the artifact's base model.

        A model that an earlier stage wrote brings the costs of its making.
        """
        files = locate_model(spec)
        if is_artifact(files.folder):
            self.manifests[name] = open_artifact(files.folder, _kind_of(files.folder))
            self._inherit(self.manifests[name])
        identity = identify_model(files)
        entry = {"weights": identity.digest, "tokenizer": identity.tokenizer_digest if with_tokenizer else None}
        self.inputs[name] = InputEntry(
            kind="model", digest=digest_json(entry), source=spec, details=identity.model_dump(mode="json")
        )
        if name == "model":
            self.model_identity = identity
        return files

    def rows(self, name: str, spec: str) -> RowSource:
        """Locate and identify rows: a subset artifact, a file, a folder or a hub id."""
        config = self.config
        if not isinstance(config, RowOptions):
            raise TypeError(f"{type(config).__name__} has no settings for rows")
        if config.chat_template is not None:
            self._open_chat_template(config.chat_template)
        folder = Path(spec).expanduser()
        if is_artifact(folder):
            self.artifact(name, spec, "subset")
            return locate(str(folder / SUBSET_NAME))
        source = locate(spec, split=config.split, revision=config.revision)
        if source.files:
            digest = digest_files(source.files)
        else:
            digest = digest_json([source.repo, source.config_name, source.split, hub_commit(source) or source.revision])
        self.inputs[name] = InputEntry(kind="rows", digest=digest, source=spec)
        return source

    def _open_chat_template(self, spec: str) -> None:
        path = Path(spec).expanduser()
        read_chat_template(path)
        self.inputs["chat_template"] = InputEntry(kind="template", digest=digest_file(path), source=spec)

    def artifact(self, name: str, spec: str, kind: ArtifactKind, *, same_model: bool = False) -> Manifest:
        """Open an artifact of another stage, verified, and take over the costs of its making.

        Args:
            name: the input's name.
            spec: its folder.
            kind: the kind that it must be of.
            same_model: whether it must have been made with this run's base model.

        Raises:
            ArtifactError: not such an artifact, or made with another model.
        """
        manifest = open_artifact(Path(spec).expanduser(), kind)
        if same_model and self.model_identity is not None:
            ensure_same_model(manifest, self.model_identity, spec)
        self._inherit(manifest)
        self.inputs[name] = InputEntry(kind=kind, digest=manifest.content_digest, source=spec)
        self.manifests[name] = manifest
        return manifest

    def read(self, source: RowSource, *, need_completion: bool = True, limit: int | None = None) -> RecordSet:
        """Read rows as records, telling what was left out."""
        config = self.config
        if not isinstance(config, RowOptions):
            raise TypeError(f"{type(config).__name__} has no settings for rows")
        records = read_records(
            source,
            columns=ColumnMap(
                prompt=config.prompt_column,
                completion=config.completion_column,
                messages=config.messages_column,
                id=config.id_column,
                system=config.system_column,
                choices=config.choices_column,
            ),
            system=self.system,
            limit=limit,
            skip_bad_rows=config.skip_bad_rows,
            need_completion=need_completion,
        )
        for note in records.notes:
            self.progress.note(note)
        if records.skipped:
            self.progress.note(f"{source.spec}: {len(records.skipped)} bad rows left out, first: {records.skipped[0]}")
        return records

    def journal(self, label: str, plan: Sequence[Sequence[int]]) -> Journal:
        """Open the record of the finished batches of `plan`, those of an interrupted run included.

        Args:
            label: what the batches are for; several journals of a stage need different labels.
            plan: the row indices of each batch.
        """
        return Journal(self._scratch / f"{label.replace(' ', '-')}.jsonl", plan)

    def scratch(self, name: str) -> Path:
        """Return a folder that outlives an interrupted run of this very work, and goes once the artifact is there."""
        folder = self._scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def _scratch(self) -> Path:
        if self._unfinished is None:
            raise RuntimeError("a stage keeps unfinished work while it computes, not before")
        return self._unfinished

    def complete(
        self, compute: Callable[[Path], Outcome], plan: Callable[[Path], StagePlan] | None = None
    ) -> StageResult:
        """Skip, plan or do the work, and leave the artifact.

        Args:
            compute: writes the payload into the folder it is given.
            plan: tells what that would take; it is given the folder with what an interrupted run has finished.
        """
        identity = self._identity()
        key = artifact_key(identity)
        current = None if self.options.force else find_current(self.config.out, self.kind, key)
        if current is not None:
            return self._result("would-skip" if self.options.dry_run else "up-to-date", key, current)
        self._ensure_room(identity)
        if self.options.dry_run:
            return self._result("would-run", key, None, self._plan(plan, key))
        with draft(self.config.out, self.kind, key, resume=not self.options.force) as place:
            self._unfinished = place.unfinished
            outcome = compute(place.folder)
            manifest = self._manifest(key, identity, outcome, place.describe_outputs(outcome.decoration))
            place.commit(manifest)
        return self._result("done", key, manifest)

    def _plan(self, plan: Callable[[Path], StagePlan] | None, key: str) -> StagePlan | None:
        try:
            return plan(unfinished_folder(self.config.out, key)) if plan is not None else None
        except UnavailableError as missing:
            # What a data set is can be known before its rows are here.
            self.progress.note(f"no plan: {missing.message}")
            return None

    def _identity(self) -> dict[str, Any]:
        return {
            "schema": f"p2d.{self.kind}/{SCHEMA_VERSIONS[self.kind]}",
            "settings": self.config.identity(),
            "inputs": {name: entry.digest for name, entry in self.inputs.items()},
        }

    def _ensure_room(self, identity: dict[str, Any]) -> None:
        out = self.config.out
        for entry in self.inputs.values():
            if entry.kind != "rows" and Path(entry.source).expanduser().resolve() == out.resolve():
                raise CannotCreateError(f"--out {out} is also an input", hint="choose another --out")
        replace = self.options.force or self.options.replace_stale
        ensure_replaceable(out, self.kind, replace=replace, changes=_changes(out, identity))

    def _inherit(self, manifest: Manifest) -> None:
        self._ledger |= {entry["artifact"]: entry for entry in manifest.ledger}

    def _manifest(self, key: str, identity: dict[str, Any], outcome: Outcome, outputs: dict[str, Any]) -> Manifest:
        accelerators = sum(name.startswith("cuda") for name in self.devices)
        hardware = describe_hardware(outcome.device, accelerators=max(accelerators, 1))
        peak = peak_memory_gib(outcome.device)
        seconds = {name: round(value, 6) for name, value in self.timer.seconds.items()}
        worker = self.scorer or self.model_identity
        cost = StageCost(
            stage=self.stage.name,
            artifact=key,
            seconds=seconds,
            # A stage that ran no model is the same work on any hardware, and compares with all.
            hardware=hardware["label"] if outcome.precision else "",
            precision=outcome.precision,
            epochs=outcome.epochs,
            steps_done=outcome.steps_done,
            steps_planned=outcome.steps_planned,
            model=worker.digest if worker else "",
            tokens=outcome.tokens,
            peak_gib=peak.get("device", peak["host"]),
            settings=outcome.settings | ({"scorer_model": self.scorer.source} if self.scorer else {}),
        )
        ledger = list(self._ledger.values()) + ([cost.to_dict()] if outcome.charged else [])
        return Manifest(
            schema_=identity["schema"],
            key=key,
            identity=identity,
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            status="complete",
            exit_code=0,
            config=self.resolved.provenance(),
            inputs=self.inputs,
            outputs=outputs,
            model=self.model_identity,
            seed=self.config.seed,
            seconds=seconds,
            tokens=outcome.tokens,
            peak_memory_gib=peak,
            hardware=hardware,
            precision=outcome.precision,
            versions=package_versions(),
            summary={**outcome.summary, **self.facts},
            ledger=ledger,
        )

    def _result(
        self,
        status: Literal["done", "up-to-date", "would-run", "would-skip"],
        key: str,
        manifest: Manifest | None,
        plan: StagePlan | None = None,
    ) -> StageResult:
        return StageResult(
            stage=self.stage.name,
            out=self.config.out,
            status=status,
            key=key,
            inputs=dict(self.inputs),
            manifest=manifest,
            wall_seconds=time.perf_counter() - self._started,
            plan=plan,
        )


def trained_prompt(job: StageRun[Any]) -> dict[str, Any] | None:
    """Return what is on record of the prompts that an evaluation's adapter or model was trained with, if anything."""
    if not isinstance(job.config, EvalConfig):
        return None
    records = (job.manifests[name].summary.get("template") for name in ("adapter", "model") if name in job.manifests)
    return next((record for record in records if record is not None), None)


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
    """Refuse an artifact that was made with another model or tokenizer.

    Args:
        manifest: the artifact's.
        model: what it should have been made with.
        spec: where the artifact lies.
        flag: the flag that named the model.

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


def _kind_of(folder: Path) -> ArtifactKind:
    kind: Any = read_manifest(folder).kind
    return kind  # type: ignore[no-any-return]  # read_manifest accepts no other kinds


def identity_differences(identity: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return what differs between the identities of two artifacts, as `setting limit` or `input data`."""
    return [
        f"{part[:-1]} {name}"
        for part in ("settings", "inputs")
        for name in sorted({*identity[part], *other.get(part, {})})
        if identity[part].get(name) != other.get(part, {}).get(name)
    ]


def _changes(out: Path, identity: dict[str, Any]) -> str:
    """Say in what the artifact at `out` differs from the one that would be made."""
    try:
        differences = identity_differences(identity, read_manifest(out).identity)
    except ArtifactError:
        return "it is damaged"
    return "it differs in " + ", ".join(differences) if differences else "it is damaged, or --force was not given"
