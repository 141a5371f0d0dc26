"""Rows as p2d uses them: a context that ends with a user's message or a tool's, and the completion that answers it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from p2d_cli.core.turns import TurnFrame
from p2d_cli.data.messages import Message as Message
from p2d_cli.data.raw_rows import BadRow, RowSource
from p2d_cli.data.row_content import Record as Record
from p2d_cli.data.row_content import read_record
from p2d_cli.data.row_shapes import AmbiguousColumnsError, Layout, find_layout
from p2d_cli.data.row_shapes import ColumnMap as ColumnMap
from p2d_cli.data.sources import scan_rows
from p2d_cli.errors import DataError

_SKIPPED_SHOWN = 5
_PARTS_SHOWN = 8
Check = Callable[[Record], None]
"""Raises a `DataError`, without the row's name, for a record that cannot be used."""
OpenCheck = Callable[[], Check]


@dataclass(frozen=True)
class RecordSet:
    """The rows that were read, and what there is to tell about the reading."""

    records: tuple[Record, ...]
    skipped: tuple[str, ...]
    """The problem of each row left out, in order."""
    notes: tuple[str, ...]


def read_records(
    source: RowSource,
    *,
    columns: ColumnMap | None = None,
    system: str | None = None,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    need_completion: bool = True,
    open_check: OpenCheck | None = None,
) -> RecordSet:
    """Read the rows of a source as records, under unique ids, at most `limit` of them.

    `skip_bad_rows` leaves out rows that cannot be read or used, and lists them, instead of stopping. The other
    arguments, and the errors, are those of `scan_records`.
    """
    skipped: list[str] = []
    rows = scan_records(
        source,
        columns=columns,
        system=system,
        skip=skipped.append if skip_bad_rows else None,
        need_completion=need_completion,
        open_check=open_check,
    )
    records, notes, unread = list(islice(rows, limit)), [], UnreadParts()
    [(commonest, times)] = Counter(record.id for record in records).most_common(1)
    if times > 1:
        records = [replace(record, id=record.where) for record in records]
        notes.append(repeated_ids_note(commonest, times))
    for record in records:
        unread.add(record)
    return RecordSet(records=tuple(records), skipped=tuple(skipped), notes=(*notes, *unread.notes()))


def scan_records(
    source: RowSource,
    *,
    columns: ColumnMap | None = None,
    system: str | None = None,
    skip: Callable[[str], None] | None = None,
    need_completion: bool = True,
    with_fields: bool = True,
    open_check: OpenCheck | None = None,
) -> Iterator[Record]:
    """Yield the rows of a source as records, one after the other; their ids may repeat.

    The first row decides which columns hold what; later rows must have these columns too.

    Args:
        source: where the rows lie.
        columns: columns named by the user.
        system: the system message of rows that bring none.
        need_completion: whether a row without an answer is a bad row.
        skip: is told the problem of each bad row, which is then left out; without it the first one is an error.
        with_fields: whether the records keep their rows' columns beside what p2d shows of them.
        open_check: makes what refuses records for another reason, which are bad rows as well; called if there are any.

    Raises:
        DataError: a bad row, by file and line; columns that fit no shape or several; no records at all.
        UnavailableError: a hub data set that is neither cached nor reachable.
    """
    layout: Layout | None = None
    check: Check | None = None
    bad = SkippedRows()
    found = 0
    for row in scan_rows(source):
        record: Record | None = None
        try:
            if isinstance(row, BadRow):
                raise row.problem
            layout = layout or find_layout(row, columns or ColumnMap(), need_completion=need_completion)
            record = read_record(row, layout, system=system, need_completion=need_completion)
            problem = None
        except AmbiguousColumnsError:
            raise
        except DataError as refusal:
            problem = refusal
        if record is not None and open_check is not None:
            check = check or open_check()  # what it raises is no fault of the row
            problem = _refusal(check, record)
        if problem is not None:
            if skip is None:
                raise problem
            skip(problem.message)
            bad(problem.message)
        elif record is not None:
            found += 1
            yield record if with_fields else replace(record, fields={})
    if not found:
        tally = f"; {bad.count} bad rows, the first: {bad.first[0]}" if bad.count else ""
        raise DataError(f"no usable rows in {source.spec}{tally}")


def _refusal(check: Check, record: Record) -> DataError | None:
    """Return why a check refuses a record, under the row's name."""
    try:
        check(record)
    except DataError as problem:
        if problem.message.startswith(f"{record.where}: "):
            return problem
        hints = [problem.hint] if problem.hint else []
        hint = "; ".join([*hints, "--skip-bad-rows leaves such rows out"])
        return DataError(f"{record.where}: {problem.message}", hint=hint)
    return None


@dataclass
class UnreadParts:
    """What rows carry that bears on their meaning, and that p2d neither shows nor heeds, counted."""

    rows: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def add(self, record: Record) -> None:
        """Count a row's."""
        if record.unread:
            self.rows += 1
            self.parts.update(dict.fromkeys(record.unread, 1))
            self.first = self.first or record.where

    def notes(self) -> tuple[str, ...]:
        """Say in one note what it was, if anything."""
        if not self.rows:
            return ()
        named = ", ".join(f"{name} ({count})" for name, count in self.parts.most_common(_PARTS_SHOWN))
        if len(self.parts) > _PARTS_SHOWN:
            named += f" and {len(self.parts) - _PARTS_SHOWN} others"
        return (f"{self.rows} rows carry what p2d neither shows to the model nor heeds, first {self.first}: {named}",)


@dataclass
class SkippedRows:
    """How many bad rows were left out, and the problems of the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, problems: Iterable[str]) -> SkippedRows:
        """Count these."""
        skipped = cls()
        for problem in problems:
            skipped(problem)
        return skipped

    def __call__(self, problem: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < _SKIPPED_SHOWN:
            self.first.append(problem)


def require_number(record: Record) -> None:
    """Refuse a row whose answer states no number, for metrics that compare numbers.

    Raises:
        DataError: naming the row.
    """
    from p2d_cli.core.metrics import number_match  # which needs numpy

    try:
        number_match("", TurnFrame().without_reasoning(record.completion), "flexible")
    except DataError as problem:
        raise DataError(f"{record.where}: {problem.message}", hint=problem.hint) from None


def repeated_ids_note(commonest: str, times: int) -> str:
    """Say that rows lose their own ids because some repeat."""
    return f"ids repeat ('{commonest}' stands {times} times): rows are named by their place in the file instead"
