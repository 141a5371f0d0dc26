"""The inputs of a stage: located, identified by digest, and read.

What an input was made of is charged to whoever uses it: its manifest's ledger joins that of the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from p2d_cli.artifacts.digests import digest_file, digest_json
from p2d_cli.artifacts.head_scores import load_head_scores
from p2d_cli.artifacts.manifest import InputEntry, Manifest, ModelIdentity, is_artifact
from p2d_cli.artifacts.store import open_artifact, recover
from p2d_cli.artifacts.subset import SUBSET_NAME
from p2d_cli.config import EvalConfig, MineDataConfig, RowOptions, ScoreHeadsConfig, StageConfig, TrainConfig
from p2d_cli.core.geometry import SelectedHeads
from p2d_cli.core.head_selection import select_readers
from p2d_cli.data.chat_templates import read_chat_template
from p2d_cli.data.pool import Pool, open_pool
from p2d_cli.data.raw_rows import RowSource
from p2d_cli.data.records import Check, ColumnMap, OpenCheck, Record, RecordSet, SkippedRows, read_records, scan_records
from p2d_cli.data.sources import locate
from p2d_cli.engine.cost import assumed_heads
from p2d_cli.engine.identity import digest_rows, ensure_same_model, identify_model
from p2d_cli.errors import DataError
from p2d_cli.modeling.model_files import ModelFiles, locate_model
from p2d_cli.modeling.suitability import read_layout
from p2d_cli.pipeline import ArtifactKind
from p2d_cli.runtime import distributed
from p2d_cli.runtime.progress import Progress


class StageInputs:
    """What one run of a stage reads."""

    def __init__(
        self,
        config: StageConfig,
        progress: Progress,
        row_check: Callable[[ModelFiles], OpenCheck | None],
        planned: Mapping[str, StageConfig],
    ) -> None:
        self.entries: dict[str, InputEntry] = {}
        """What identifies each input, by its name."""
        self.manifests: dict[str, Manifest] = {}
        """Manifests of the inputs that are artifacts, by the input's name."""
        self.base_model: ModelIdentity | None = None
        """The input called `model`."""
        self.ledger: dict[str, dict[str, Any]] = {}
        """What the inputs cost to make, by the key of each artifact."""
        self.bad_rows: dict[str, dict[str, Any]] = {}
        """How many rows of an input were left out, and the first of them, by the input's name."""
        self.reader: ModelFiles | None = None
        """The model that reads the rows: the one called `model`, unless a stage lets another one read."""
        self._config = config
        self._progress = progress
        self._row_check = row_check
        """Returns what opens the check of rows that a model is to read."""
        self.waiting: set[str] = set()
        """Names of the inputs that are only planned yet."""
        self.mined: dict[RowSource, MineDataConfig] = {}
        """Pools that stand for rows which are still to be mined of them."""
        self._planned = planned
        self._names: dict[RowSource, str] = {}
        """The input's name of each source of rows."""

    @property
    def system_prompt(self) -> str | None:
        """The system prompt of rows that bring none: as given, else in an evaluation the one of the training."""
        given = self._config.system if isinstance(self._config, RowOptions) else None
        trained = self.trained_prompt
        return (trained["system"] if given is None and trained is not None else given) or None

    @property
    def trained_prompt(self) -> dict[str, Any] | None:
        """What is on record of the prompts that an evaluation's adapter or model was trained with, if anything."""
        if not isinstance(self._config, EvalConfig):
            return None
        made = (self.manifests[name] for name in ("adapter", "model") if name in self.manifests)
        records = (manifest.summary.get("template") for manifest in made)
        return next((record for record in records if record is not None), None)

    def planned(self, name: str, spec: str) -> StageConfig | None:
        """Return the settings of the stage that is to make an input, in a dry run that has only planned it."""
        if (found := self._planned.get(spec)) is not None:
            self.waiting.add(name)
        return found

    def model(self, spec: str, *, name: str = "model", with_tokenizer: bool = True) -> ModelFiles:
        """Locate and identify a model; the one called `model` is the artifact's base model.

        A model that an earlier stage wrote brings the costs of its making. One that is still to be trained is stood for
        by its base model.
        """
        trained = self.planned(name, spec)
        if isinstance(trained, TrainConfig):
            return self.model(trained.model, name=name, with_tokenizer=with_tokenizer)
        recover(Path(spec).expanduser())
        files = locate_model(spec)
        if is_artifact(files.folder):
            self.manifests[name] = open_artifact(files.folder)
            self.ledger |= {entry["artifact"]: entry for entry in self.manifests[name].ledger}
        identity = distributed.from_main(lambda: identify_model(files))
        entry = {"weights": identity.digest, "tokenizer": identity.tokenizer_digest if with_tokenizer else None}
        self.entries[name] = InputEntry(
            kind="model", digest=digest_json(entry), source=spec, details=identity.model_dump(mode="json")
        )
        if name == "model":
            self.base_model = identity
            self.reader = files
        return files

    def rows(self, name: str, spec: str) -> RowSource:
        """Locate and identify rows: a subset artifact, a file, a folder or a hub id.

        Rows that are still to be mined are stood for by those of their pool.
        """
        mined = self.planned(name, spec)
        if isinstance(mined, MineDataConfig):
            source = self.rows(name, mined.pool)
            self.mined[source] = mined
            return source
        config = self._row_options
        self.open_chat_template()
        folder = Path(spec).expanduser()
        recover(folder)
        if is_artifact(folder):
            self.artifact(name, spec, "subset")
            source = locate(str(folder / SUBSET_NAME))
        else:
            source = locate(spec, split=config.split, revision=config.revision)
            self.entries[name] = InputEntry(kind="rows", digest=digest_rows(source), source=spec)
        self._names[source] = name
        for note in source.notes:
            self._progress.note(note)
        return source

    def open_chat_template(self) -> None:
        """Register the file of `--chat-template` and its arguments as inputs, if there are any.

        Raises:
            DataError: it cannot be read.
        """
        if arguments := self._row_options.chat_template_kwargs:
            self.entries["chat_template_kwargs"] = InputEntry(
                kind="template", digest=digest_json(arguments), source=json.dumps(arguments)
            )
        spec = self._row_options.chat_template
        if spec is None:
            return
        path = Path(spec).expanduser()
        if path.exists() and not path.is_file():
            raise DataError(f"--chat-template {spec} is no file", hint="give a file with a Jinja template")
        read_chat_template(path)
        self.entries["chat_template"] = InputEntry(kind="template", digest=digest_file(path), source=spec)

    def artifact(self, name: str, spec: str, kind: ArtifactKind, *, same_model: bool = False) -> Manifest:
        """Open an artifact of another stage, verified, and take over the costs of its making.

        Raises:
            ArtifactError: not such an artifact, or made with another model.
        """
        manifest = open_artifact(Path(spec).expanduser(), kind)
        if same_model and self.base_model is not None:
            ensure_same_model(manifest, self.base_model, spec)
        self.ledger |= {entry["artifact"]: entry for entry in manifest.ledger}
        self.entries[name] = InputEntry(kind=kind, digest=manifest.content_digest, source=spec)
        self.manifests[name] = manifest
        return manifest

    def heads(self, spec: str, files: ModelFiles, *, of: tuple[ModelIdentity, str] | None = None) -> SelectedHeads:
        """Return the selected heads of a heads artifact; of one that is only planned, as many of them.

        They must be of the model `of`, given with the flag that named it; by default of this run's base model.

        Raises:
            ArtifactError: not a heads artifact, or of another model.
        """
        scored = self.planned("heads", spec)
        if isinstance(scored, ScoreHeadsConfig):
            shape = read_layout(files).geometry
            assumed_LH, reading = assumed_heads(shape, scored.ratio, scored.resolved_layers), None
            if scored.reads_apart:
                deepest_LH = np.arange(assumed_LH.size).reshape(assumed_LH.shape)
                reading = select_readers(deepest_LH, scored.depth, shape.exists_LH, shape.layers)
            return SelectedHeads(assumed_LH, shape.total_heads, reading)
        manifest = self.artifact("heads", spec, "heads", same_model=of is None)
        if of is not None:
            ensure_same_model(manifest, of[0], spec, of[1])
        found = load_head_scores(Path(spec).expanduser())
        return SelectedHeads(found.selected_LH, found.geometry.total_heads, found.reading)

    def read(self, source: RowSource, *, limit: int | None = None) -> RecordSet:
        """Read rows as records, telling what was left out."""
        records = read_records(
            source,
            columns=self._columns(),
            system=self.system_prompt,
            limit=limit,
            skip_bad_rows=self._row_options.skip_bad_rows,
            open_check=None if self.reader is None else self._row_check(self.reader),
        )
        self._tell(source, records.notes, SkippedRows.of(records.skipped))
        return records

    def pool(self, source: RowSource, target: Sequence[Record] = ()) -> Pool:
        """Read through a pool once, telling what was left out; its rows are then read again where they are needed.

        Rows that are in `target` as well are not to be chosen.
        """
        config = self._row_options
        open_check = None if self.reader is None else self._row_check(self.reader)
        remembered = None if open_check is None else _remembered(open_check)

        def scan(*, skip: Callable[[str], None], with_fields: bool = False) -> Iterator[Record]:
            return scan_records(
                source,
                columns=self._columns(),
                system=self.system_prompt,
                skip=skip if config.skip_bad_rows else None,
                with_fields=with_fields,
                open_check=remembered,
            )

        with self._progress.task("count rows of the pool", None) as advance:
            pool = open_pool(scan, target, advance=advance)
        self._tell(source, pool.notes, pool.skipped)
        return pool

    @property
    def _row_options(self) -> RowOptions:
        if not isinstance(self._config, RowOptions):
            raise TypeError(f"{type(self._config).__name__} has no settings for rows")
        return self._config

    def _columns(self) -> ColumnMap:
        return ColumnMap(**{one.name: getattr(self._row_options, f"{one.name}_column") for one in fields(ColumnMap)})

    def _tell(self, source: RowSource, notes: Sequence[str], skipped: SkippedRows) -> None:
        for note in notes:
            self._progress.note(note)
        if not skipped.count:
            return
        self._progress.note(f"{source.spec}: {skipped.count} bad rows left out, first: {skipped.first[0]}")
        left_out = {"count": skipped.count, "first": list(skipped.first)}
        self.bad_rows[self._names[source]] = left_out


def _remembered(open_check: OpenCheck) -> OpenCheck:
    """Return a check of a pool's rows that is made in the first pass alone, though the pool is read for each use.

    Rows are remembered by their order, which is the same in each pass.
    """
    refused: set[int] = set()
    passes = count()

    def open_remembered() -> Check:
        check = open_check() if next(passes) == 0 else None
        places = count()

        def checked(record: Record) -> None:
            place = next(places)
            if check is None:
                if place in refused:
                    raise DataError("refused when it was read first")
                return
            try:
                check(record)
            except DataError:
                refused.add(place)
                raise

        return checked

    return open_remembered
