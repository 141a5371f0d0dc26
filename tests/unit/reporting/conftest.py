from collections.abc import Callable

import pytest

from p2d_cli.core.aer import AerReport, AerRow, MetricValue, Reference


def _row(name: str, total: float = 100.0, score: float | None = 0.8, **other) -> AerRow:
    metrics = {} if score is None else {"exact_match": MetricValue(score, score - 0.02, score + 0.03, 700)}
    stages = {"score_heads_seconds": 0.1 * total, "mine_data_seconds": 0.3 * total, "train_seconds": 0.6 * total}
    shares = {"head_share": 0.1, "row_share": 0.1, "trainable_share": 0.0213, "peak_gib": 4.125}
    flags = {"is_control": False, "is_reference": False, "mixed": ()}
    ratios = {"aer": total / 1000, "speedup": 1000 / total if total else None, "str_ratio": 0.4 * total / 1000}
    fields = {"path": f"runs/{name}", "total_seconds": total, "metrics": metrics, **stages, **shares, **flags, **ratios}
    return AerRow(name=name, **(fields | other))


def _report(*rows: AerRow, extrapolated: bool = False, **other) -> AerReport:
    rows = (*rows, _row("full fine-tuning", 1000.0, 0.84, is_reference=True))
    reference = Reference(1000.0, extrapolated, 40 if extrapolated else 100, 100)
    ordered = tuple(sorted(rows, key=lambda row: (row.aer, row.name)))
    return AerReport(reference, ordered, **({"flags": (), "warnings": ()} | other))


@pytest.fixture(scope="session")
def row() -> Callable[..., AerRow]:
    """Make a row; the total is in seconds, of a reference that took 1,000."""
    return _row


@pytest.fixture(scope="session")
def make_report() -> Callable[..., AerReport]:
    """Make a report of rows and a reference."""
    return _report


@pytest.fixture
def report() -> AerReport:
    """A report with one row of each kind and everything that is marked."""
    return _report(
        _row("base model", 0.0, 0.31),
        _row("contrast heads, p2d rows", 90.0, 0.85),
        _row("random heads, p2d rows", 80.0, 0.86, is_control=True),
        _row("pad heads, p2d rows", 120.0, 0.82, mixed=("hardware", "precision"), head_share=None, peak_gib=None),
        _row("not scored", 50.0, None),
        extrapolated=True,
        flags=("run 'pad heads, p2d rows', train: hardware is A, the reference's is B",),
        warnings=("'contrast heads, p2d rows' is not better than a control",),
    )
