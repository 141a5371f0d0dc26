"""What a manifest has to say, by the kind of the artifact, where its own schema leaves that to the stages.

The stages write more than this; here stands what other commands rely on. A manifest that says something else is
refused before it is used, so that nobody behind has to doubt it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

from p2d_cli.artifacts.digests import digest_json
from p2d_cli.artifacts.manifest import MANIFEST_NAME, Manifest
from p2d_cli.errors import ArtifactError


class _Part(BaseModel):
    """Keys that are known, among others that are not looked at."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class _Template(_Part):
    name: str
    digest: str
    origin: str | None
    system: str | None


class _Summary(_Part):
    template: _Template | None = None
    warnings: list[str] = []


class _Repeatability(_Part):
    draws: int
    mean_spearman: float
    mean_jaccard: float
    chance_jaccard: float


class _Heads(_Summary):
    method: str
    heads_selected: int
    heads_total: int
    groups_touched: int
    groups_total: int
    layers_touched: int
    repeatability: _Repeatability | None = None
    best_target_share: float | None = None
    chance_target_share: float | None = None
    best_separation: float | None = None
    heads_reading_all: int | None = None
    heads_reading_best: int | None = None
    depths: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    area: float | None = None
    area_low: float | None = None
    area_high: float | None = None
    rows: int | None = None
    proxy_steps: int | None = None
    proxy_rows: int | None = None
    proxy_first_loss: float = 0.0
    proxy_last_loss: float = 0.0

    @model_validator(mode="after")
    def _whole(self) -> _Heads:
        """Refuse figures of which a part is missing."""
        parts = (("heads_reading_all", "heads_reading_best", "depths"), ("area", "area_low", "area_high", "rows"))
        for names in parts:
            missing = [name for name in names if getattr(self, name) is None]
            if missing and getattr(self, names[0]) is not None:
                raise ValueError(f"{', '.join(missing)} missing beside {names[0]}")
        return self


class _Index(_Part):
    rows_found: int
    rows_added: int
    seconds_shared: float
    targets: int


class _Subset(_Summary):
    method: str
    rows_selected: int
    rows_total: int
    rows_without_score: int
    rows_that_are_targets: int = 0
    rows_not_listed: int = 0
    episodes: int = 0
    heads_read: int = 0
    heads_read_first: int = 0
    rows_read_on: int = 0
    index: _Index | None = None
    rows_background: int = 0
    target_affinity: float = 0.0
    cut_score: float = 0.0
    floor_quantile: float = 0.0
    floor_score: float = 0.0


class _Adapter(_Summary):
    scope: str
    rows: int
    updates: int
    learning_rate: float
    first_loss: float | None
    final_loss: float | None
    best_update: int | None = None
    best_eval_loss: float | None = None
    untrained_eval_loss: float | None = None
    trained_parameters: int
    total_parameters: int
    trainable_share: float


class _Metric(BaseModel):
    model_config = ConfigDict(extra="forbid")

    value: float | None
    low: float | None
    high: float | None
    count: int


class _Evaluation(_Summary):
    metrics: dict[str, _Metric]


class _Reference(_Part):
    extrapolated: bool


class _ReportRow(_Part):
    name: str
    is_reference: bool
    is_control: bool
    mixed: list[str]
    metrics: dict[str, _Metric]
    aer: float
    speedup: float | None
    str_ratio: float
    total_seconds: float
    trainable_share: float | None = None


class _Report(_Summary):
    reference: _Reference
    rows: list[_ReportRow]
    warnings: list[str]


class _Model(_Summary):
    base: str
    parameters: int
    dtype: str


_SUMMARIES: dict[str, type[_Summary]] = {
    "heads": _Heads,
    "subset": _Subset,
    "adapter": _Adapter,
    "evaluation": _Evaluation,
    "report": _Report,
    "model": _Model,
}


class _Setting(BaseModel):
    model_config = ConfigDict(extra="forbid")

    value: Any
    origin: str


class _Identity(_Part):
    settings: dict[str, Any]
    inputs: dict[str, Any]


class _Hardware(_Part):
    label: str


class _Cost(_Part):
    artifact: str


class _Content(_Part):
    identity: _Identity
    config: dict[str, _Setting]
    hardware: _Hardware
    ledger: list[_Cost]


def check_content(folder: Path, manifest: Manifest) -> None:
    """Refuse a manifest that does not say what one of its kind says.

    Raises:
        ArtifactError: naming the first key that is missing or of another type.
    """
    fields = {name: getattr(manifest, name) for name in _Content.model_fields}
    try:
        _Content.model_validate(fields, strict=True)
        _SUMMARIES[manifest.kind].model_validate(manifest.summary, strict=True)
        digest_json(manifest.model_dump(mode="json"))
    except ValidationError as problems:
        first = problems.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _refusal(folder, f"{where}: {first['msg']}") from None
    except (UnicodeEncodeError, PydanticSerializationError, RecursionError):
        raise _refusal(folder, "a text in it is no Unicode") from None


def _refusal(folder: Path, found: str) -> ArtifactError:
    path = folder / MANIFEST_NAME
    return ArtifactError(f"{path} does not say what p2d writes there: {found}", hint="rerun the stage that wrote it")
