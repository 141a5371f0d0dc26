"""Results in words: tables and heat maps on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from p2d_cli.artifacts.manifest import Manifest
from p2d_cli.cli.streams import visible
from p2d_cli.core.cost import StagePlan
from p2d_cli.errors import P2DError
from p2d_cli.runtime.distributed import is_main_process
from p2d_cli.runtime.progress import Advance, SilentProgress
from p2d_cli.runtime.progress import Progress as ProgressProtocol
from p2d_cli.stages.comparison import ChangedRow, Comparison
from p2d_cli.stages.execution import StageResult
from p2d_cli.stages.templates import describe_prompt

SECONDS_BETWEEN_LINES = 10.0
SHADES = (238, 24, 31, 38, 73, 114, 155, 190, 220, 214, 208)
"""xterm colours from low to high, readable on light and dark."""


class PlainConsole(Console):
    """A console whose texts cannot steer the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with the control characters of the texts written out."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Leave it to the command's boundary, where rich would exit with a code of its own."""
        raise BrokenPipeError


out = PlainConsole(highlight=False)
err = PlainConsole(stderr=True, highlight=False)


class BarProgress:
    """Bars on a terminal."""

    @contextmanager
    def task(self, label: str, total: int | None, *, found: int = 0) -> Iterator[Advance]:
        """Show a bar of `total` units while the body runs; the time left is by the speed of the last 30 seconds."""
        del found
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err, transient=True) as bars:
            bar = bars.add_task(label, total=total)
            yield lambda units: bars.advance(bar, units)

    def note(self, message: str) -> None:
        """Write one line."""
        err.print(f"[dim]note:[/] {escape(message)}", soft_wrap=True)


class LineProgress:
    """A line now and then, for logs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    @contextmanager
    def task(self, label: str, total: int | None, *, found: int = 0) -> Iterator[Advance]:
        """Write a line every ten seconds while the body runs."""
        started = last = self._clock()
        done = 0

        def advance(units: int) -> None:
            nonlocal done, last
            done += units
            now = self._clock()
            if now - last >= SECONDS_BETWEEN_LINES:
                last = now
                self.note(f"{label}: {_how_far(done, total, now - started, found)}")

        yield advance

    def note(self, message: str) -> None:
        """Write one line."""
        sys.stderr.write(f"{visible(message)}\n")
        sys.stderr.flush()


def _how_far(done: int, total: int | None, seconds: float, found: int) -> str:
    if total is None:
        return f"{done}, {seconds:.0f} s"
    so_far = f"{done}/{total}, {seconds:.0f} s"
    if done <= found:
        return so_far
    left = seconds / (done - found) * (total - done)
    return f"{so_far}, about {f'{left:.0f} s' if left < 100 else seconds_text(left)} left"


def progress_for(*, quiet: bool) -> ProgressProtocol:
    """Return bars on a terminal, lines elsewhere, nothing when quiet or on a rank that is not the first."""
    if quiet or not is_main_process():
        return SilentProgress()
    return BarProgress() if err.is_terminal else LineProgress()


def print_json(document: dict[str, Any]) -> None:
    """Write one JSON document to stdout, in ASCII where the locale is not of Unicode."""
    is_unicode = (sys.stdout.encoding or "utf").lower().startswith("utf")
    text = json.dumps(document, indent=2, ensure_ascii=not is_unicode, default=str)
    # Halves of surrogate pairs, which no encoding takes, end as the escapes that JSON has for them.
    sys.stdout.write(text.translate(_JSON_CONTROLS) + "\n")


def print_error(problem: P2DError, note: str | None = None) -> None:
    """Write what went wrong and what to do next, and a note if there is one."""
    err.print(Text("error: ", style="bold red") + Text(problem.message), soft_wrap=True)
    if problem.hint:
        err.print(Text("  try: ", style="bold") + Text(problem.hint), soft_wrap=True)
    if note:
        err.print(Text(f"  {note}"), soft_wrap=True)


# --- results of stages

_JSON_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}
"""The control characters that JSON allows in a text, which a terminal might obey."""

STATUS_WORDS = {
    "done": "done",
    "up-to-date": "up to date",
    "would-run": "would run",
    "would-skip": "would skip: up to date",
}


def result_document(result: StageResult) -> dict[str, Any]:
    """Return a stage's result for `--json`."""
    document: dict[str, Any] = {
        "stage": result.stage,
        "status": result.status,
        "out": str(result.out),
        "key": result.key,
        "inputs": {name: entry.model_dump(mode="json") for name, entry in result.inputs.items()},
        "wall_seconds": round(result.wall_seconds, 3),
    }
    if result.manifest is not None:
        document |= {"seconds": result.manifest.seconds, "summary": result.manifest.summary}
    if result.plan is not None:
        document["plan"] = result.plan.to_dict()
    if result.bad_rows:
        document["bad_rows"] = result.bad_rows
    return document


def print_result(result: StageResult) -> None:
    """Write what a stage did, in what time, where it is, and its main figures, or what they would take."""
    seconds = f"  {result.wall_seconds:.1f} s" if result.status == "done" else ""
    line = Text.assemble((result.stage, "bold"), f" {STATUS_WORDS[result.status]}", (seconds, "dim"), f"  {result.out}")
    out.print(line, soft_wrap=True)
    if result.manifest is None:
        for name, entry in result.inputs.items():
            out.print(f"  {name:<12} {entry.kind:<10} {entry.digest[:12]}  {escape(entry.source)}", soft_wrap=True)
        if result.plan is not None:
            print_plan(result.plan)
        return
    print_summary(result.manifest)


# --- plans of dry runs


def print_plan(plan: StagePlan) -> None:
    """Write what a stage would take: rows, passes and tokens, memory and disk by part, unfinished work, seconds."""
    counted = "all read" if plan.exact else "estimated from a sample"
    out.print("  rows: " + ", ".join(f"{name} {count:,}" for name, count in plan.rows.items()) + f" ({counted})")
    if plan.works:
        out.print(_works_table(plan))
    for title, parts in (("memory", plan.memory), ("disk", plan.disk)):
        if parts:
            listed = ", ".join(f"{part} {bytes_text(size)}" for part, size in parts.items())
            out.print(f"  {title}: {bytes_text(sum(parts.values()))} ({listed})", soft_wrap=True)
    if plan.seconds is not None:
        beside = "".join(f", {name} {seconds_text(value)}" for name, value in plan.other_seconds.items())
        out.print(f"  time: about {seconds_text(plan.seconds)}{beside and f' (of it{beside[1:]})'}, loading left out")
    for line in plan.resume:
        out.print(f"  would resume {escape(line)}", soft_wrap=True)
    for line in plan.notes:
        out.print(f"  {escape(line)}", style="dim", soft_wrap=True)


def _works_table(plan: StagePlan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    headings = ("  work", "rows", "forward", "backward", "tokens", "TFLOP", "time")
    for heading in headings[: 7 if plan.seconds is not None else 6]:
        table.add_column(heading, justify="left" if heading == "  work" else "right", no_wrap=True)
    for work in plan.works:
        cells = [work.rows, work.passes, work.backward_passes, work.tokens]
        time_cell = [] if plan.seconds is None else [seconds_text(work.seconds)]
        table.add_row(f"  {work.name}", *(f"{cell:,}" for cell in cells), f"{work.flops / 1e12:,.3g}", *time_cell)
    return table


def print_plan_totals(results: Sequence[StageResult]) -> None:
    """Write what all stages of a recipe would take together."""
    total = plan_totals(results)
    tokens, passes = total["tokens"], total["forward_passes"]
    out.print(
        f"in all: {passes:,} forward and {total['backward_passes']:,} backward passes, {tokens:,} tokens, memory up to"
        f" {bytes_text(total['peak_memory_bytes'])}, disk {bytes_text(total['disk_bytes'])}"
        + ("" if total["seconds"] is None else f", about {seconds_text(total['seconds'])}"),
        soft_wrap=True,
    )


def plan_totals(results: Sequence[StageResult]) -> dict[str, Any]:
    """Return the sums over all planned stages; the memory is that of the largest."""
    plans = [result.plan.to_dict() for result in results if result.plan is not None]
    summed = ("forward_passes", "backward_passes", "tokens", "flops", "disk_bytes")
    seconds = [plan["seconds"] for plan in plans if plan["seconds"] is not None]
    return {
        **{name: sum(plan[name] for plan in plans) for name in summed},
        "peak_memory_bytes": max((plan["memory_bytes"] for plan in plans), default=0),
        "seconds": sum(seconds) if seconds else None,
        "exact": all(plan["exact"] for plan in plans),
    }


def bytes_text(size: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def seconds_text(seconds: float | None) -> str:
    """Return a duration in the unit that suits it."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def print_summary(manifest: Manifest) -> None:
    """Write the main figures of an artifact."""
    describe: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
        "heads": _heads_lines,
        "subset": _subset_lines,
        "adapter": _adapter_lines,
        "evaluation": _evaluation_lines,
        "report": _report_lines,
        "model": lambda summary: [f"{summary['parameters']:,} parameters, {summary['dtype']}, base {summary['base']}"],
    }
    for line in [*describe[manifest.kind](manifest.summary), *_bad_row_lines(manifest.summary)]:
        if isinstance(line, str):
            out.print("  " + escape(line), soft_wrap=True)
        else:
            out.print(line)


def _bad_row_lines(summary: dict[str, Any]) -> list[str]:
    return [
        f"{bad['count']} bad rows of --{name} were left out, the first: {bad['first'][0]}"
        for name, bad in summary.get("bad_rows", {}).items()
    ]


def _heads_lines(summary: dict[str, Any]) -> list[Any]:
    lines = [
        f"{summary['heads_selected']} of {summary['heads_total']} heads by {summary['method']}, in"
        f" {summary['layers_touched']} layers and {summary['groups_touched']} of {summary['groups_total']} KV groups"
    ]
    if (share := summary.get("best_target_share")) is not None:
        lines.append(
            f"best head looks at the target demo {share:.0%} of the time, chance {summary['chance_target_share']:.0%}"
        )
    if (best := summary.get("best_separation")) is not None:
        lines.append(f"best head tells target rows from pool rows with ROC area {best:.3f}, chance 0.5")
    if "proxy_first_loss" in summary:
        lines.append(
            f"proxy: {summary['proxy_steps']} updates on {summary['proxy_rows']} rows,"
            f" loss {summary['proxy_first_loss']:.3f} -> {summary['proxy_last_loss']:.3f}"
        )
    if (repeat := summary.get("repeatability")) is not None:
        lines.append(
            f"between {repeat['draws']} draws: rank correlation {repeat['mean_spearman']:.2f},"
            f" overlap {repeat['mean_jaccard']:.2f} (chance {repeat['chance_jaccard']:.2f})"
        )
    return lines


def _subset_lines(summary: dict[str, Any]) -> list[Any]:
    lines = [f"{summary['rows_selected']:,} of {summary['rows_total']:,} rows by {summary['method']}"]
    if (scorer := summary.get("scorer_model")) is not None:
        lines.append(f"read by {scorer['source']} ({scorer['model_type']}), a stand-in for the model they are for")
    if "episodes" in summary:
        lines.append(f"{summary['episodes']:,} episodes, {summary['heads_read']} heads read")
    if summary.get("affinity") == "readout":
        lines.append(
            f"{summary['heads_read']} heads read, told from {summary['rows_background']:,} background rows;"
            f" target rows at {summary['target_affinity']:.2f} deviations, the cut at {summary['cut_score']:.2f}"
        )
    if "floor_score" in summary:
        lines.append(
            f"none scores below {summary['floor_score']:.2f}, the {summary['floor_quantile']:g} quantile of target rows"
            " that were held out"
        )
    if "precision" in summary:
        lines.append(
            f"{summary['precision']:.1%} of them are of the target's task ({summary['rows_relevant']:,} such rows in"
            f" the pool, {summary['recall']:.1%} found), chance {summary['chance_precision']:.1%}"
        )
    if summary.get("truncated_rows"):
        lines.append(f"{summary['truncated_rows']} rows were cut to fit the context")
    if summary.get("rows_not_listed"):
        lines.append(f"{summary['rows_not_listed']:,} rows share too few words with the target and were not read")
    if summary.get("rows_that_are_targets"):
        lines.append(f"{summary['rows_that_are_targets']} pool rows are target rows as well and were left out")
    if summary.get("truncated_demos"):
        lines.append(f"{summary['truncated_demos']} demos were cut to fit the context")
    if summary.get("unparsed_answers"):
        lines.append(f"{summary['unparsed_answers']} generated answers could not be parsed and were left out")
    unread = summary.get("rows_that_are_targets", 0) + summary.get("rows_not_listed", 0)
    if unscored := summary["rows_without_score"] - unread:
        lines.append(f"{unscored} rows could not be scored and come last")
    return lines


def _adapter_lines(summary: dict[str, Any]) -> list[Any]:
    first = summary["first_loss"]
    started = "" if first is None else f"loss {first:.3f} -> {summary['final_loss']:.3f}, "
    return [
        f"scope {summary['scope']}: {started}{summary['updates']} updates on {summary['rows']:,} rows,"
        f" peak lr {summary['learning_rate']:g}",
        f"trained {summary['trained_parameters']:,} of {summary['total_parameters']:,} parameters"
        f" ({summary['trainable_share']:.2%})",
    ]


def _evaluation_lines(summary: dict[str, Any]) -> list[Any]:
    width = max([20, *map(len, summary["metrics"])])
    lines = [
        f"{name:<{width}} {_number(metric['value'])}  [{_number(metric['low'])}, {_number(metric['high'])}]"
        f"  {metric['count']} rows"
        for name, metric in summary["metrics"].items()
    ]
    lines += [f"{name}: {count}" for name, count in summary.items() if name.endswith("_unparsed")]
    return lines


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _report_lines(summary: dict[str, Any]) -> list[Any]:
    metric = next(iter(summary["rows"][0]["metrics"]), None)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("run", metric or "score", "AER", "speed-up", "STR", "seconds", "params"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=heading != "run")
    for row in summary["rows"]:
        table.add_row(*_report_cells(row, metric), style="bold" if row["is_reference"] else None)
    lines: list[Any] = [table]
    if summary.get("groups"):
        lines = [_seeds_table(summary["groups"], metric), "", table]
    if summary["reference"]["extrapolated"]:
        lines.append("the reference's time is extrapolated from measured steps")
    lines.append("* control, = reference, ! another model, hardware, precision or number of epochs")
    if any(row.get("scorer_model") for row in summary["rows"]):
        lines.append("^ a smaller model chose the rows; its seconds are charged")
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    return lines


def _seeds_table(groups: list[dict[str, Any]], metric: str | None) -> Table:
    """Return the runs that differ in nothing but their seed, as one each."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("over seeds", metric or "score", "lowest - highest", "AER", "speed-up", "runs"):
        table.add_column(heading, justify="left" if heading == "over seeds" else "right", no_wrap=heading == "AER")
    for group in groups:
        score, ends = group["metrics"].get(metric), group["ranges"].get(metric)
        table.add_row(
            f"{group['name']}{' =' if group['is_reference'] else ' *' if group['is_control'] else ''}",
            "" if score is None else _with_margin(score),
            "" if ends is None else f"{ends[0]:.3f} - {ends[1]:.3f}",
            f"{group['aer']:.3f}",
            "" if group["speedup"] is None else f"{group['speedup']:.1f}x",
            str(len(group["members"])),
            style="bold" if group["is_reference"] else None,
        )
    return table


def _report_cells(row: dict[str, Any], metric: str | None) -> list[str]:
    marks = "=" * row["is_reference"] + "*" * row["is_control"] + "!" * bool(row["mixed"])
    marks += "^" * (row.get("scorer_model") is not None)
    score = row["metrics"].get(metric)
    speedup = row["speedup"]
    share = row.get("trainable_share")
    return [
        f"{row['name']}{' ' + marks if marks else ''}",
        "" if score is None else _with_margin(score),
        f"{row['aer']:.3f}",
        "" if speedup is None else f"{speedup:.1f}x",
        f"{row['str_ratio']:.3f}",
        f"{row['total_seconds']:.1f}",
        "" if share is None else f"{share:.2%}",
    ]


def _with_margin(score: dict[str, Any]) -> str:
    if score["low"] is None or score["high"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} ±{(score['high'] - score['low']) / 2:.3f}"


# --- inspect


def print_manifest(folder: Path, manifest: Manifest) -> None:
    """Write what an artifact is and what made it."""
    out.print(Text.assemble((f"{manifest.kind} artifact", "bold"), f"  {folder}"), soft_wrap=True)
    out.print(f"  {manifest.schema_}, made {manifest.created_at}, {len(manifest.outputs)} files verified")
    print_summary(manifest)
    if manifest.model is not None:
        out.print(f"\n[bold]model[/]  {escape(manifest.model.describe())}", soft_wrap=True)
    if (shown := manifest.summary.get("template")) is not None:
        out.print(f"[bold]prompts[/]  {escape(describe_prompt(shown))}", soft_wrap=True)
    out.print("\n[bold]inputs[/]")
    for name, entry in manifest.inputs.items():
        out.print(f"  {name:<14} {entry.kind:<11} {entry.digest[:12]}  {escape(entry.source)}", soft_wrap=True)
    out.print("\n[bold]settings[/] (those that are not defaults)")
    for name, setting in manifest.config.items():
        if setting["origin"] != "default":
            out.print(f"  {name:<18} {setting['value']!s:<24} [dim]{setting['origin']}[/]", soft_wrap=True)
    phases = ", ".join(f"{name} {value:.2f} s" for name, value in manifest.seconds.items())
    peak = ", ".join(f"{name} {value:.2f} GiB" for name, value in manifest.peak_memory_gib.items())
    out.print("\n[bold]cost[/]")
    out.print(f"  {phases or 'none'}; {manifest.tokens:,} tokens; peak memory {peak}", soft_wrap=True)
    made_in = ", ".join(filter(None, (manifest.hardware["label"], manifest.precision)))
    out.print(f"  {escape(made_in)}", soft_wrap=True)


def print_heat_map(scores_LH: Any, selected_LH: Any) -> None:
    """Draw heads as coloured cells, layers downward; `#` marks a selected head."""
    low, high = float(scores_LH.min()), float(scores_LH.max())
    span = high - low or 1.0
    out.print("\n[bold]heads[/] (layers downward, heads across; # selected)")
    for layer in range(scores_LH.shape[0]):
        line = Text(f"  {layer:>3} ")
        for head in range(scores_LH.shape[1]):
            level = int((float(scores_LH[layer, head]) - low) / span * (len(SHADES) - 1))
            mark = "#" if selected_LH[layer, head] else " "
            line.append(f"{mark}{mark}", style=f"bold black on color({SHADES[level]})")
        out.print(line)
    scale = Text("      ")
    for shade in SHADES:
        scale.append("  ", style=f"on color({shade})")
    out.print(scale + Text(f"  {low:.3g} to {high:.3g}"))


def print_extremes(rows: list[tuple[str, float, str]], title: str) -> None:
    """Write rows with their scores, one a line, cut to the width of the terminal."""
    out.print(f"\n[bold]{title}[/]")
    for identifier, score, text in rows:
        shown = " ".join(text.split())[: max(20, out.width - 32)]
        out.print(f"  {score:>10.4g}  {escape(identifier)}  [dim]{escape(shown)}[/]", overflow="ellipsis", no_wrap=True)


# --- compare


def comparison_document(found: Comparison, rows: int | None) -> dict[str, Any]:
    """Return a comparison for `--json`, with the first `rows` changed rows, or all."""
    document = asdict(found)
    return document | {"changed_rows": len(found.changed), "changed": document["changed"][:rows]}


def print_comparison(found: Comparison, rows: int) -> None:
    """Write a comparison: a line a metric, and the first `rows` rows that changed."""
    out.print(Text.assemble(("A", "bold"), f"  {found.first}"), soft_wrap=True)
    out.print(Text.assemble(("B", "bold"), f"  {found.second}"), soft_wrap=True)
    made = f", made with another {escape(', '.join(found.differences))}" if found.differences else ""
    out.print(f"{found.rows} rows{made}\n")
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("metric", "A", "B", "B - A", f"{found.confidence:.0%} interval", "won", "lost"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=heading != "metric")
    for name, metric in found.metrics.items():
        values = (f"{metric.first:.4f}", f"{metric.second:.4f}", f"{metric.difference:+.4f}")
        sure = "*" if metric.low > 0 or metric.high < 0 else " "
        interval = f"[{metric.low:+.4f}, {metric.high:+.4f}]{sure}"
        table.add_row(name, *values, interval, str(metric.won), str(metric.lost))
    out.print(table)
    out.print("won, lost: rows on which B is better, worse; * the interval excludes 0", style="dim")
    if found.left_out:
        out.print(f"not compared: {escape(', '.join(found.left_out))}", style="dim")
    out.print(f"\n[bold]{len(found.changed)} of {found.rows} rows changed[/]")
    for row in found.changed[:rows]:
        _print_changed_row(row)
    if (hidden := len(found.changed) - rows) > 0:
        out.print(f"  {hidden} more: --rows {len(found.changed)} shows all, --json too", style="dim")


def _print_changed_row(row: ChangedRow) -> None:
    changes = ", ".join(f"{name} {before:.4g} -> {after:.4g}" for name, (before, after) in row.changes.items())
    out.print(Text.assemble(f"  {row.id}  ", (changes, "dim")), soft_wrap=True)
    texts = {"prompt": row.prompt, "reference": row.reference, "A": row.answers[0], "B": row.answers[1]}
    for name, text in texts.items():
        if text is not None:
            shown = " ".join(text.split())
            out.print(Text.assemble((f"    {name:<10} ", "dim"), shown), overflow="ellipsis", no_wrap=True)
