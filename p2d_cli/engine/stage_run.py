"""What all stages do alike: skip what is current, share the work, charge seconds, write the artifact.

A stage's `run` opens a `StageRun`, registers its inputs, and hands its computation to `complete`. Nothing here imports
torch, so that a run that is up to date answers at once.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal

from p2d_cli.artifacts.journal import Journal
from p2d_cli.artifacts.manifest import SCHEMA_VERSIONS, InputEntry, Manifest, ModelIdentity, artifact_key
from p2d_cli.artifacts.store import (
    clear_leftovers,
    draft,
    ensure_nameable,
    ensure_replaceable,
    find_current,
    unfinished_folder,
    unfinished_of_others,
)
from p2d_cli.artifacts.unfinished import DIVERGED_NAME, Origin, progress_in
from p2d_cli.config import ConfigT, Resolved, RowOptions, StageConfig
from p2d_cli.core.aer import StageCost
from p2d_cli.data.prompts import PromptTemplate
from p2d_cli.data.records import OpenCheck
from p2d_cli.engine.cost import StagePlan
from p2d_cli.engine.identity import changes_of, ensure_nothing_lost, identity_differences, recorded_identity
from p2d_cli.engine.inputs import StageInputs
from p2d_cli.errors import CannotCreateError, DataError, NonFiniteError, UnavailableError
from p2d_cli.modeling.model_files import ModelFiles
from p2d_cli.pipeline import ArtifactKind, stage_named
from p2d_cli.runtime import distributed, signals
from p2d_cli.runtime.hardware import (
    combine_hardware,
    describe_hardware,
    forget_peak_memory,
    highest_memory_gib,
    package_versions,
    peak_memory_gib,
    synchronizer,
    whereabouts,
)
from p2d_cli.runtime.progress import LogProgress, Progress, SilentProgress
from p2d_cli.runtime.timing import PhaseTimer

Planning = Callable[[Path | None], StagePlan]
"""Tells what a stage would take, given the folder with what an interrupted run has finished."""
Whereabouts = tuple[dict[str, Any], tuple[str, str], dict[str, float]]
"""What one rank ran on: its hardware, its host and device, and the most memory that it had in use, in GiB."""
Shown = Literal["prompt", "example", "conversation", "episode"]
"""What of a row a stage shows: the prompt alone, with its answer, with every answer as a target, or among others."""


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what."""

    force: bool = False
    """Redo the stage even if its artifact is current, and replace what is there; an interrupted redo goes on."""
    replace_stale: bool = False
    """Replace an artifact whose inputs or settings changed; a recipe owns its folder and does so."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    timed: bool = False
    """In a dry run: load the model, and time some batches of what would be done."""
    rates: dict[tuple[Any, ...], tuple[float, float | None]] = field(default_factory=dict)
    """What such timings found, so that the stages of a recipe share them."""
    planned: dict[str, StageConfig] = field(default_factory=dict)
    """In a dry run of a recipe: settings of the stages whose artifacts are still to be made, by their folder."""
    nothing_kept: Callable[[], str] = lambda: signals.BEGINS_ANEW
    """What to say of an interruption where nothing of the stage is kept; a recipe has finished stages."""
    progress: Progress = field(default_factory=SilentProgress)
    rank_logs: bool = False
    """Whether ranks other than the first, which show nothing, write a log beside the output."""

    @property
    def go_on(self) -> str:
        """What to do to go on after an interruption: a recipe with `--force` would redo its finished stages as well."""
        is_forced_recipe = self.force and self.replace_stale
        return "run the same command without --force to go on" if is_forced_recipe else signals.GO_ON


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
    bad_rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rows that it would leave out, of those that were read, as in a manifest's summary; likewise."""


@dataclass(frozen=True)
class Outcome:
    """What a stage's computation hands back for the manifest."""

    summary: dict[str, Any]
    settings: dict[str, Any]
    """What the report needs to know of the stage (see `p2d_cli.core.aer`)."""
    precision: str
    device: str
    tokens: int = 0
    tokens_planned: int | None = None
    epochs: float | None = None
    steps_done: int | None = None
    steps_planned: int | None = None
    extras: frozenset[str] = frozenset()
    """Payload files that are not part of what the artifact says, such as pictures and logs."""
    charged: bool = True
    """Whether the stage is a cost that a run is charged for."""
    warnings: Sequence[str] = ()
    """What a user should know before relying on the result, a sentence each; part of the summary."""


@dataclass(frozen=True)
class _Decision:
    """What rank 0 decided: the result if there is nothing to do, else where the work goes."""

    result: StageResult | None = None
    folder: Path = Path()
    unfinished: Path = Path()
    num_embeddings: int | None = None


class StageRun(Generic[ConfigT]):
    """One run of one stage, on one rank or several that share it.

    Rank 0 decides whether there is anything to do, holds the lock, and writes the artifact.
    """

    def __init__(self, stage: str, resolved: Resolved[ConfigT], options: RunOptions) -> None:
        self.stage = stage_named(stage)
        self.kind: ArtifactKind = self.stage.writes
        self.resolved = resolved
        self.config = resolved.config
        self.options = options
        self.progress = self._progress()
        self.timer = PhaseTimer()
        self.inputs = StageInputs(self.config, self.progress, self._row_check, options.planned)
        self.prompts: dict[tuple[str, bool], tuple[Any, PromptTemplate]] = {}
        """Tokenizers and templates that were loaded; see `p2d_cli.engine.prompts.open_prompts`."""
        self.shown: Shown | None = None
        """What of its rows the stage shows to a model; None where no model reads them."""
        self.scorer: ModelIdentity | None = None
        """The model that does this stage's work, where it is not the one that the work is for."""
        self.devices: dict[str, int] = {}
        """The devices of a divided model, each with its number of modules; empty for a model on one device."""
        self.facts: dict[str, Any] = {}
        """What to add to the stage's own summary."""
        self.rules: dict[str, str] = {}
        """What the identity says beside the settings: by which rule a model settles one that is not given."""
        self.num_embeddings: int | None = None
        """How many tokens the model that reads rows has embeddings for, once it was checked."""
        self._unfinished: Path | None = None
        self._identity: dict[str, Any] = {}
        self._key: str | None = None
        self.promise: Callable[[], str] = self._kept
        """What is said of the work when a signal ends it before the artifact is there; see `signals.promising`."""
        self._is_committed = False
        self._until_committed = ExitStack()
        self._started = time.perf_counter()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the artifact; the other ranks only share the work."""
        return distributed.is_main_process()

    @property
    def kept(self) -> str:
        """What to say of an interruption behind finished work."""
        return f"what was finished is kept, {self.options.go_on}"

    def _promise(self) -> str:
        return signals.COMPLETE if self._is_committed else self.promise()

    def _kept(self) -> str:
        has_progress = self._unfinished is not None and progress_in(self._unfinished)
        return self.kept if has_progress else self.options.nothing_kept()

    def use_device(self, device: str) -> None:
        """Synchronise with `device` when a phase begins or ends."""
        self.timer.synchronize_with(synchronizer(device))

    def require_device(self) -> None:
        """Refuse a device that this machine does not have, also where the stage itself would not use it.

        Raises:
            UsageError, UnavailableError: see `p2d_cli.modeling.loading.resolve_device`.
        """
        if self.config.device not in {"auto", "cpu"}:
            from p2d_cli.modeling.loading import resolve_device

            resolve_device(distributed.own_device(self.config.device))

    def require_attention(self) -> None:
        """Refuse an attention implementation that this machine or the model lacks, whether or not the stage uses it.

        Raises:
            UnavailableError: see `require_installed` and `require_attention` in `p2d_cli.modeling`.
        """
        config, files = self.config, self.inputs.reader
        if not isinstance(config, RowOptions) or config.attn_implementation == "auto" or files is None:
            return
        from p2d_cli.modeling.attention_kernels import require_installed
        from p2d_cli.modeling.checkpoints import require_attention
        from p2d_cli.modeling.loading import resolve_device, resolve_dtype

        device = resolve_device(distributed.own_device(config.device))
        require_installed(config.attn_implementation, device, resolve_dtype(config.dtype, device))
        require_attention(files, config.attn_implementation)

    def journal(self, label: str, plan: Sequence[Sequence[int]]) -> Journal:
        """Open the record of the finished batches of `plan`, those of an interrupted run included.

        Several journals of a stage need different labels.
        """
        return Journal(self._scratch / f"{label.replace(' ', '-')}.jsonl", plan, work=f"{self.key} {label}")

    def scratch(self, name: str) -> Path:
        """Return a folder that outlives an interrupted run of this very work, and goes once the artifact is there."""
        folder = self._scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def until_committed(self, context: AbstractContextManager[None]) -> None:
        """Enter a context that lasts until the artifact is there."""
        self._until_committed.enter_context(context)

    def see_through(self) -> None:
        """Let signals wait until the artifact is there: the work is done, and writing it does not take long."""
        self._until_committed.enter_context(signals.shielded())

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Charge the body of the `with` block to the phase `save`; from here on, signals wait for the commit."""
        self.see_through()
        with self.timer.phase("save"):
            yield

    @contextmanager
    def drawing(self, name: str) -> Iterator[None]:
        """Do without the picture `name` where it cannot be drawn, and say so."""
        try:
            yield
        except UnavailableError as missing:
            self.progress.note(f"no {name}: {missing.message}")

    @property
    def key(self) -> str:
        """The key of the artifact that is being made: unfinished work of another one is of no use for it."""
        if self._key is None:
            raise RuntimeError("a stage has a key once all of its inputs are known")
        return self._key

    @cached_property
    def _scratch(self) -> Path:
        if self._unfinished is None:
            raise RuntimeError("a stage keeps unfinished work while it computes, not before")
        if self.is_main:
            Origin(self._identity, forced=self.options.force).save(self._unfinished)
        return self._unfinished

    def complete(
        self,
        compute: Callable[[Path], Outcome],
        plan: Planning | None = None,
        *,
        alone: bool = False,
        check: Callable[[], int | None] = lambda: None,
    ) -> StageResult:
        """Skip, plan or do the work, and leave the artifact.

        Args:
            compute: writes the payload into the folder it is given, on rank 0; all ranks call it, and share its work.
            plan: tells what that would take; it is given the folder with what an interrupted run has finished.
            alone: whether there is no work to share: only rank 0 calls `compute`, and the others wait for it.
            check: refuses a model that could not do the work, before it is planned or begun; returns how many tokens it
                has embeddings for, or None where no rows are shown to it.
        """
        if self.inputs.waiting:
            return self._foretell(plan, check)
        self._identity = {
            "schema": f"p2d.{self.kind}/{SCHEMA_VERSIONS[self.kind]}",
            "settings": self.config.identity() | self.rules,
            "inputs": {name: entry.digest for name, entry in self.inputs.entries.items()},
        }
        self._key = artifact_key(self._identity)
        with ExitStack() as held:
            decision = distributed.from_main(lambda: self._decide(plan, check, held))
            self.num_embeddings = decision.num_embeddings
            if decision.result is not None:
                return replace(decision.result, wall_seconds=time.perf_counter() - self._started)
            self._ensure_same_everywhere()
            self._unfinished = decision.unfinished
            forget_peak_memory()
            with ExitStack() as self._until_committed:
                self.until_committed(signals.promising(self._promise))
                manifest = self._do(compute, decision.folder, alone=alone)
                self._is_committed = True
        return self._result("done", manifest)

    def _foretell(self, plan: Planning | None, check: Callable[[], int | None]) -> StageResult:
        """Plan a stage some of whose inputs are artifacts that are only planned themselves."""
        self.require_device()
        self.num_embeddings = check()
        self.require_attention()
        found = plan(None) if plan is not None else None
        if found is not None:
            told = "inputs that are still to be made are stood for by others like them"
            found = replace(found, notes=(*found.notes, told))
        result = self._result("would-run", plan=found)
        left_out = {name: bad for name, bad in result.bad_rows.items() if name not in self.inputs.waiting}
        return replace(result, inputs={}, bad_rows=left_out)

    def _row_check(self, files: ModelFiles) -> OpenCheck | None:
        from p2d_cli.engine.prompts import open_row_check

        return open_row_check(self, files)

    def _progress(self) -> Progress:
        """Return what the stage reports to; a rank that shows nothing may keep a log of its own."""
        if self.is_main or not self.options.rank_logs:
            return self.options.progress
        out = self.config.out
        return LogProgress(out.with_name(f".{out.name}.rank{distributed.rank()}.log"))

    def _decide(self, plan: Planning | None, check: Callable[[], int | None], held: ExitStack) -> _Decision:
        """See whether the artifact is current, and open a draft if it has to be made; `held` keeps the lock."""
        if (current := self._current()) is not None:
            if self.options.dry_run:
                return _Decision(self._result("would-skip", current))
            clear_leftovers(self.config.out, self.key)
            return _Decision(self._result("up-to-date", current))
        self._ensure_room()
        self._mind_unfinished()
        self.require_device()
        self.num_embeddings = check()
        self.require_attention()
        if self.options.dry_run:
            return _Decision(self._result("would-run", plan=self._plan(plan)))
        self._draft = held.enter_context(
            draft(self.config.out, self.kind, self.key, resume=self._goes_on(), discard=self.options.force)
        )
        # Another process may have put an artifact there while this one waited for its turn.
        if (current := self._current()) is not None:
            return _Decision(self._result("up-to-date", current))
        self._ensure_room()
        return _Decision(None, self._draft.folder, self._draft.unfinished, self.num_embeddings)

    def _goes_on(self) -> bool:
        """Say whether to go on from unfinished work of this key; with `--force`, only from what `--force` began."""
        return not self.options.force or self._is_half_redone()

    def _is_half_redone(self) -> bool:
        return Origin.load(unfinished_folder(self.config.out, self.key)).forced

    def _current(self) -> Manifest | None:
        """Return the manifest of the artifact that is there, if it is what would be made.

        A recipe that was interrupted in a redo goes on with it, with or without `--force`.
        """
        if self.options.force or (self.options.replace_stale and self._is_half_redone()):
            return None
        return find_current(
            self.config.out, self.kind, self.key, is_same=lambda other: recorded_identity(other) == self._identity
        )

    def _ensure_room(self) -> None:
        out = self.config.out
        ensure_nameable(out)
        for entry in self.inputs.entries.values():
            if entry.kind != "rows" and Path(entry.source).expanduser().resolve() == out.resolve():
                raise CannotCreateError(f"--out {out} is also an input", hint="choose another --out")
        replace = self.options.force or self.options.replace_stale
        ensure_replaceable(out, self.kind, replace=replace, changes=changes_of(out, self._identity))

    def _mind_unfinished(self) -> None:
        """Refuse to discard what interrupted runs have left, or say what becomes of it.

        `--force` discards it, as it does an artifact. A recipe, whose stages are redone whenever it changes, leaves it.
        """
        out, own = self.config.out, unfinished_folder(self.config.out, self.key)
        if not self.options.force and not self.options.replace_stale:
            ensure_nothing_lost(out, self.key, self._identity)
        for folder in unfinished_of_others(out, self.key):
            done = "is discarded" if self.options.force else f"stays in {folder} until you remove it"
            self.progress.note(f"what an interrupted run with other settings has left, {progress_in(folder)}, {done}")
        if self.options.force and (left := progress_in(own)):
            goes_on = f"goes on, unless you remove {own}" if self._goes_on() else "is discarded"
            self.progress.note(f"--force: what an interrupted run has left, {left}, {goes_on}")

    def _plan(self, plan: Planning | None) -> StagePlan | None:
        try:
            resumed = unfinished_folder(self.config.out, self.key) if self._goes_on() else None
            return plan(resumed) if plan is not None else None
        except UnavailableError as missing:
            # What a data set is can be known before its rows are here.
            self.progress.note(f"no plan: {missing.message}")
            return None

    def _ensure_same_everywhere(self) -> None:
        """Refuse to share work between machines that see other rows, or settings."""
        for number, other in enumerate(distributed.exchange(self._identity)):
            if differences := identity_differences(self._identity, other):
                raise DataError(
                    f"rank {number} and rank {distributed.rank()} see different {', '.join(differences)}",
                    hint="give all machines the same files, on a file system that they share, and the same settings",
                )

    def _do(self, compute: Callable[[Path], Outcome], folder: Path, *, alone: bool) -> Manifest:
        """Do the work and commit it; every rank gets the manifest."""

        def finish() -> Manifest:
            outcome = compute(folder)
            self.see_through()
            return self._commit(outcome, [self._whereabouts(outcome.device)])

        if alone:
            return distributed.from_main(finish)
        with distributed.explained_losses(), self._open_to_other_settings():
            outcome = compute(folder)
        self.see_through()
        ranks = distributed.exchange(self._whereabouts(outcome.device))
        return distributed.from_main(lambda: self._commit(outcome, ranks))

    @contextmanager
    def _open_to_other_settings(self) -> Iterator[None]:
        """Where a value is not finite, let a command with other settings discard what led to it.

        A stage that computes in float32 does not hint at float32.
        """
        try:
            yield
        except NonFiniteError as problem:
            if self.is_main and self._unfinished is not None and self._unfinished.exists():
                (self._unfinished / DIVERGED_NAME).touch()
            from p2d_cli.modeling.loading import resolve_device, resolve_dtype

            device = resolve_device(distributed.own_device(self.config.device))
            if str(resolve_dtype(self.config.dtype, device)) == "torch.float32":
                problem.forget_float32()
            raise

    def _whereabouts(self, device: str) -> Whereabouts:
        accelerators = sum(name.startswith("cuda") for name in self.devices)
        hardware = describe_hardware(device, accelerators=max(accelerators, 1))
        return hardware, whereabouts(device), peak_memory_gib(device)

    def _commit(self, outcome: Outcome, ranks: Sequence[Whereabouts]) -> Manifest:
        """Write the manifest, with what this run cost, and put the artifact in its place."""
        outputs = self._draft.describe_outputs(outcome.extras)
        hardware = combine_hardware([kind for kind, _, _ in ranks], [where for _, where, _ in ranks])
        peak = highest_memory_gib([gib for _, _, gib in ranks])
        seconds = {name: round(value, 6) for name, value in self.timer.seconds.items()}
        bad_rows = self.inputs.bad_rows
        worker = self.scorer or self.inputs.base_model
        cost = StageCost(
            stage=self.stage.name,
            artifact=self.key,
            seconds=seconds,
            # A stage that ran no model is the same work on any hardware, and compares with all.
            hardware=hardware["label"] if outcome.precision else "",
            precision=outcome.precision,
            epochs=outcome.epochs,
            steps_done=outcome.steps_done,
            steps_planned=outcome.steps_planned,
            model=worker.digest if worker else "",
            tokens=outcome.tokens,
            tokens_planned=outcome.tokens_planned,
            peak_gib=peak.get("device", peak["host"]),
            settings=outcome.settings | ({"scorer_model": self.scorer.source} if self.scorer else {}),
        )
        manifest = Manifest(
            schema_=self._identity["schema"],
            key=self.key,
            identity=self._identity,
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            status="complete",
            exit_code=0,
            config=self.resolved.provenance(),
            inputs=self.inputs.entries,
            outputs=outputs,
            model=self.inputs.base_model,
            seed=self.config.seed,
            seconds=seconds,
            tokens=outcome.tokens,
            peak_memory_gib=peak,
            hardware=hardware,
            precision=outcome.precision,
            versions=package_versions(),
            summary={"warnings": list(outcome.warnings)}
            | outcome.summary
            | self.facts
            | ({"bad_rows": bad_rows} if bad_rows else {}),
            ledger=[*self.inputs.ledger.values(), *([cost.to_dict()] if outcome.charged else [])],
        )
        self._draft.commit(manifest)
        return manifest

    def _result(
        self,
        status: Literal["done", "up-to-date", "would-run", "would-skip"],
        manifest: Manifest | None = None,
        plan: StagePlan | None = None,
    ) -> StageResult:
        return StageResult(
            stage=self.stage.name,
            out=self.config.out,
            status=status,
            key=manifest.key if manifest is not None else self._key or "",
            inputs=dict(self.inputs.entries),
            manifest=manifest,
            wall_seconds=time.perf_counter() - self._started,
            plan=plan,
            bad_rows=dict(self.inputs.bad_rows) if manifest is None else {},
        )
