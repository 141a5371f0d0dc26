"""Results in words: tables and heat maps on stdout."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from p2d_cli.artifacts.manifest import Manifest
from p2d_cli.artifacts.pool_index import IndexFound
from p2d_cli.cli.terminal import out, seconds_text
from p2d_cli.core.geometry import ReadingHeads
from p2d_cli.core.wording import bytes_text, count_text
from p2d_cli.engine.cost import StagePlan
from p2d_cli.engine.prompts import describe_prompt
from p2d_cli.engine.rate_probe import RateProbe, losses_of
from p2d_cli.engine.stage_run import StageResult
from p2d_cli.registry import HEAD_METHODS, ROW_METHODS
from p2d_cli.reporting.table import number_text, share_text
from p2d_cli.stages.comparison import Comparison
from p2d_cli.stages.examination import Examination

SHADES = (238, 24, 31, 38, 73, 114, 155, 190, 220, 214, 208)
"""xterm colours from low to high, readable on light and dark."""
FOLDERS_NAMED = 3
"""How many folders are named beside a warning that all of them have."""


def _table(headings: Sequence[str], *, no_wrap: Collection[str]) -> Table:
    """Return an empty table whose first column is of names, the others of figures."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=heading in no_wrap)
    return table


# --- results of stages


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
    status = result.status.replace("-", " ") + (": up to date" if result.status == "would-skip" else "")
    seconds = f"  {result.wall_seconds:.1f} s" if result.status == "done" else ""
    line = Text.assemble((result.stage, "bold"), f" {status}", (seconds, "dim"), f"  {result.out}")
    out.print(line, soft_wrap=True)
    if result.manifest is not None:
        print_summary(result.manifest)
        return
    for name, entry in result.inputs.items():
        out.print(f"  {name:<12} {entry.kind:<10} {entry.digest[:12]}  {escape(entry.source)}", soft_wrap=True)
    if result.plan is not None:
        print_plan(result.plan)


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
    is_timed = plan.seconds is not None
    headings = ["  work", "rows", "forward", "backward", "tokens", "TFLOP", *["time"] * is_timed]
    table = _table(headings, no_wrap=headings)
    for work in plan.works:
        counts = (f"{count:,}" for count in (work.rows, work.passes, work.backward_passes, work.tokens))
        seconds = [seconds_text(work.seconds)] * is_timed
        table.add_row(f"  {work.name}", *counts, f"{work.flops / 1e12:,.3g}", *seconds)
    return table


def print_plan_totals(results: Sequence[StageResult]) -> None:
    """Write what all stages of a recipe would take together."""
    total = plan_totals(results)
    time = "" if total["seconds"] is None else f", about {seconds_text(total['seconds'])}"
    out.print(
        f"in all: {total['forward_passes']:,} forward and {total['backward_passes']:,} backward passes,"
        f" {total['tokens']:,} tokens, memory up to {bytes_text(total['peak_memory_bytes'])},"
        f" disk {bytes_text(total['disk_bytes'])}{time}",
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


# --- what an artifact holds


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
    for line in describe[manifest.kind](manifest.summary):
        if isinstance(line, str):
            out.print("  " + escape(line), soft_wrap=True)
        else:
            out.print(line)
    for name, bad in manifest.summary.get("bad_rows", {}).items():
        text = f"{bad['count']} bad rows of --{name} were left out, the first: {bad['first'][0]}"
        out.print("  " + escape(text), soft_wrap=True)
    for warning in manifest.summary.get("warnings", ()):
        print_warning(warning)


def print_warnings_of(results: Sequence[StageResult], out_folder: Path) -> None:
    """Write the warnings of stages whose results are not shown, each once, with the folders that it is of."""
    found: dict[str, list[str]] = {}
    for result in results:
        for warning in result.manifest.summary.get("warnings", ()) if result.manifest is not None else ():
            where = result.out.relative_to(out_folder) if result.out.is_relative_to(out_folder) else result.out
            found.setdefault(warning, []).append(str(where))
    for warning, folders in found.items():
        more = f" and {len(folders) - FOLDERS_NAMED} more" if len(folders) > FOLDERS_NAMED else ""
        print_warning(f"{', '.join(folders[:FOLDERS_NAMED])}{more}: {warning}")


def print_warning(text: str) -> None:
    """Write what a user should know before relying on a result."""
    out.print(Text.assemble("  ", ("warning:", "yellow"), f" {text}"), soft_wrap=True)


def _heads_lines(summary: dict[str, Any]) -> list[Any]:
    method = summary["method"]
    lines = [
        f"{summary['heads_selected']} of {summary['heads_total']} heads by {method}, in"
        f" {count_text(summary['layers_touched'], 'layer')} and {summary['groups_touched']} of"
        f" {summary['groups_total']} KV groups"
    ]
    if summary.get("heads_reading_all") is not None:
        lines.append(_readers_line(summary))
    lines += HEAD_METHODS[method].describe(summary) if method in HEAD_METHODS else []
    if (repeat := summary.get("repeatability")) is not None:
        lines.append(
            f"between {repeat['draws']} draws: rank correlation {repeat['mean_spearman']:.2f},"
            f" overlap {repeat['mean_jaccard']:.2f} (chance {repeat['chance_jaccard']:.2f})"
        )
    return lines


def _readers_line(summary: dict[str, Any]) -> str:
    """Say which heads read rows, where these are others than the trained ones."""
    first, both = (f"the first {depth} layers" if depth > 1 else "the first layer" for depth in summary["depths"])
    count = summary["heads_reading_all"]
    readers = f"{count} heads of {first} read" if count > 1 else f"1 head of {first} reads"
    return f"{readers} all rows, {summary['heads_reading_best']} of {both} the best"


def _subset_lines(summary: dict[str, Any]) -> list[Any]:
    method = summary["method"]
    lines = [f"{summary['rows_selected']:,} of {summary['rows_total']:,} rows by {method}"]
    if (scorer := summary.get("scorer_model")) is not None:
        lines.append(f"read by {scorer['source']} ({scorer['model_type']}), a stand-in for the model they are for")
    lines += ROW_METHODS[method].describe(summary) if method in ROW_METHODS else []
    if "precision" in summary:
        lines.append(
            f"{summary['precision']:.1%} of them are of the target's task ({summary['rows_relevant']:,} such rows in"
            f" the pool, {summary['recall']:.1%} found), chance {summary['chance_precision']:.1%}"
        )
    if summary.get("answers_total", summary["rows_total"]) < summary["rows_total"] / 2:
        lines.append(
            f"they hold {summary['answers_selected']:,} different answers, of {summary['answers_total']:,} in the pool"
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
    unread = sum(summary.get(f"rows_{why}", 0) for why in ("that_are_targets", "not_listed", "not_read_on"))
    if unscored := summary["rows_without_score"] - unread:
        lines.append(f"{unscored} rows could not be scored and come last")
    return lines


def _adapter_lines(summary: dict[str, Any]) -> list[Any]:
    first = summary["first_loss"]
    started = "" if first is None else f"loss {first:.3f} -> {summary['final_loss']:.3f}, "
    # Adapters of earlier versions do not know the rows of an update.
    size = f", batch size {summary['batch_size']}" if "batch_size" in summary else ""
    return [
        f"scope {summary['scope']}: {started}{count_text(summary['updates'], 'update')} on"
        f" {count_text(summary['rows'], 'row')}{size}, peak lr {summary['learning_rate']:g}",
        *_rate_lines(summary),
        *_held_out_lines(summary),
        f"trained {summary['trained_parameters']:,} of {summary['total_parameters']:,} parameters"
        f" ({summary['trainable_share']:.2%}){_channels_text(summary)}{_frozen_text(summary)}",
    ]


def _rate_lines(summary: dict[str, Any]) -> list[str]:
    """Say which rates were tried beforehand, where some were."""
    tried = RateProbe(losses_of(summary.get("lr_probe") or {}))
    return [f"rates tried, by held-out loss: {tried.described()}"] if tried.losses else []


def _channels_text(summary: dict[str, Any]) -> str:
    """Say which share of the channels was trained, and whether heads were."""
    if not summary.get("channels"):
        return ""
    return f", {'heads and' if summary['heads_trained'] else 'only'} {share_text(summary['channels'])} of the channels"


def _frozen_text(summary: dict[str, Any]) -> str:
    """Say how many layers were computed once a row, if their outputs were kept."""
    if summary.get("frozen_kept") not in {"memory", "disk"}:
        return ""
    return f", {count_text(summary['frozen_layers'], 'frozen layer')} computed once a row"


def _held_out_lines(summary: dict[str, Any]) -> list[str]:
    """Say which update was kept for its loss on held-out rows, where there were any."""
    if summary.get("best_update") is None or summary.get("best_eval_loss") is None:
        return []
    untrained = summary.get("untrained_eval_loss")
    before = "" if untrained is None else f"{untrained:.3f} untrained, "
    best = f"{summary['best_eval_loss']:.3f} after update {summary['best_update']}, whose weights are kept"
    return [f"held-out loss {before}{best}"]


def _evaluation_lines(summary: dict[str, Any]) -> list[Any]:
    width = max([20, *map(len, summary["metrics"])])
    lines = []
    for name, metric in summary["metrics"].items():
        value, low, high = ("?" if (x := metric[part]) is None else f"{x:.4f}" for part in ("value", "low", "high"))
        lines.append(f"{name:<{width}} {value}  [{low}, {high}]  {metric['count']} rows")
    return lines + [f"{name}: {count}" for name, count in summary.items() if name.endswith("_unparsed")]


def _report_lines(summary: dict[str, Any]) -> list[Any]:
    metric = next(iter(summary["rows"][0]["metrics"]), None)
    headings = ("run", metric or "score", "AER", "speed-up", "STR", "seconds", "params")
    table = _table(headings, no_wrap=headings[1:])
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
    return lines


def _report_cells(row: dict[str, Any], metric: str | None) -> list[str]:
    marks = "=" * row["is_reference"] + "*" * row["is_control"] + "!" * bool(row["mixed"])
    marks += "^" * (row.get("scorer_model") is not None)
    share = row.get("trainable_share")
    return [
        f"{row['name']}{' ' + marks if marks else ''}",
        _score(row, metric),
        f"{row['aer']:.3f}",
        _speedup(row),
        f"{row['str_ratio']:.3f}",
        f"{row['total_seconds']:.1f}",
        "" if share is None else f"{share:.2%}",
    ]


def _seeds_table(groups: list[dict[str, Any]], metric: str | None) -> Table:
    """Return the runs that differ in nothing but their seed, as one each."""
    headings = ("over seeds", metric or "score", "lowest - highest", "AER", "speed-up", "runs")
    table = _table(headings, no_wrap=("AER",))
    for group in groups:
        ends = group["ranges"].get(metric)
        table.add_row(
            f"{group['name']}{' =' if group['is_reference'] else ' *' if group['is_control'] else ''}",
            _score(group, metric),
            "" if ends is None else f"{ends[0]:.3f} - {ends[1]:.3f}",
            f"{group['aer']:.3f}",
            _speedup(group),
            str(len(group["members"])),
            style="bold" if group["is_reference"] else None,
        )
    return table


def _score(run: dict[str, Any], metric: str | None) -> str:
    """Return the score of a run, or of a group of them, with its interval, which need not lie evenly around it."""
    if (score := run["metrics"].get(metric)) is None:
        return ""
    value, low, high = (None if score[part] is None else number_text(score[part]) for part in ("value", "low", "high"))
    return f"{value}" if low is None or high is None else f"{value} [{low}, {high}]"


def _speedup(run: dict[str, Any]) -> str:
    return "" if run["speedup"] is None else f"{run['speedup']:.1f}x"


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


def print_heat_map(scores_LH: Any, selected_LH: Any, reading: ReadingHeads | None = None) -> None:
    """Draw heads as coloured cells, layers downward, and mark the chosen ones; a head without score is left blank.

    `#` is a selected head, `a` one that reads all rows, `b` one that reads the best of them, `c` one that does both; a
    capital is a head that is selected as well. Cells become narrow where the heads of a layer do not fit the terminal,
    and layers are continued below where that is not enough. Without colours a dot is a head without a mark.
    """
    marks_LH = _marks(selected_LH, reading)
    known = [score for score in scores_LH.ravel().tolist() if not math.isnan(score)]
    low, high = min(known), max(known)
    span = high - low or 1.0
    legend = "; # selected" if reading is None else ""
    out.print(f"\n[bold]heads[/] (layers downward, heads across{legend})")
    if reading is not None:
        out.print(f"  {_marks_legend(set(marks_LH.ravel().tolist()))}", soft_wrap=True)
    has_colours = out.color_system is not None and not out.no_color
    num_heads, room = scores_LH.shape[1], max(out.width - 6, 1)
    cell = 2 if 2 * num_heads <= room else 1
    for start in range(0, num_heads, room // cell):
        heads = slice(start, min(start + room // cell, num_heads))
        if heads != slice(0, num_heads):
            out.print(f"      heads {start} to {heads.stop - 1}")
        for layer, (scores_H, marks_H) in enumerate(zip(scores_LH[:, heads], marks_LH[:, heads], strict=True)):
            line = Text(f"  {layer:>3} ")
            for score, mark in zip(scores_H.tolist(), marks_H.tolist(), strict=True):
                if math.isnan(score):  # the layer has no such head
                    line.append(cell * " ")
                    continue
                shade = SHADES[int((score - low) / span * (len(SHADES) - 1))]
                line.append(cell * (mark or (" " if has_colours else ".")), style=f"bold black on color({shade})")
            out.print(line)
    scale = Text("      ")
    for shade in SHADES if has_colours else ():
        scale.append("  ", style=f"on color({shade})")
    out.print(scale + Text(f"{'  ' if has_colours else 'scores '}{low:.3g} to {high:.3g}"))


def _marks(selected_LH: Any, reading: ReadingHeads | None) -> Any:
    """Return the letter that marks each head, str [L, H], empty for one that was not chosen."""
    if reading is None:
        return np.where(selected_LH, "#", "")
    letters_LH = np.array(["", "a", "b", "c"])[reading.shallow_LH + 2 * reading.deep_LH]
    return np.where(selected_LH, np.where(letters_LH == "", "#", np.char.upper(letters_LH)), letters_LH)


def _marks_legend(marks: set[str]) -> str:
    legend = "# trained, a reads all rows, b the best"
    if marks & {"c", "C"}:
        legend += ", c both"
    return legend + ("; capital: trained too" if marks & {"A", "B", "C"} else "")


def print_index(found: IndexFound) -> None:
    """Write what the index of a pool holds, what it has cost, and who used it."""
    out.print(Text.assemble(("index of a pool", "bold"), f"  {found.folder}"), soft_wrap=True)
    out.print(f"  {found.schema}, {2 * found.shards} files verified")
    layers = "the first layer" if found.depth == 1 else f"the first {found.depth} layers"
    by_heads = f" by {found.heads} heads of {layers}"
    kept = f", {escape(found.source['keeps'])}" if "keeps" in found.source else by_heads
    out.print(f"  {found.rows:,} rows{kept}, {bytes_text(found.bytes)}")
    users = count_text(found.targets, "subset")
    out.print(f"  cost {found.seconds:.2f} s and {found.tokens:,} tokens; used for {users}")
    out.print("\n[bold]made with[/]")
    for name, value in found.source.items():
        shown = value[:12] if isinstance(value, str) else value
        out.print(f"  {escape(name):<14} {escape(str(shown))}", soft_wrap=True)


def print_extremes(rows: list[tuple[str, float, str]], title: str) -> None:
    """Write rows with their scores, one a line, cut to the width of the terminal."""
    out.print(f"\n[bold]{title}[/]")
    for identifier, score, text in rows:
        shown = " ".join(text.split())[: max(20, out.width - 32)]
        out.print(f"  {score:>10.4g}  {escape(identifier)}  [dim]{escape(shown)}[/]", overflow="ellipsis", no_wrap=True)


# --- doctor


def print_examination(found: Examination) -> None:
    """Write what p2d can do with a model, a line a stage, and why it cannot do the rest."""
    where = "weights are here" if found.has_weights else "its weights are not here"
    stored = f", quantised ({found.quantised})" if found.quantised else ""
    out.print(f"[bold]{escape(found.model)}[/]: {escape(found.model_type)}{escape(stored)}; {where}", soft_wrap=True)
    for line in _head_lines(found):
        out.print(f"  {line}", soft_wrap=True)
    for stage in found.stages:
        names = found.can(stage)
        out.print(f"  {stage:<12} {'yes' if names == (stage,) else ', '.join(names) or '[red]no[/]'}", soft_wrap=True)
    for reason, lacking in found.reasons().items():
        what = "; ".join(
            stage if not found.can(stage) else f"{stage} {', '.join(names)}" for stage, names in lacking.items()
        )
        out.print(f"[yellow]not[/] {escape(what)}:\n  {escape(reason)}", soft_wrap=True)


def _head_lines(found: Examination) -> list[str]:
    """Say how many heads there are, and how layers differ in them."""
    shape = found.geometry
    if shape is None:
        return []
    kinds = Counter(layer for layer in shape.layers if layer.num_heads)
    lines = [f"{shape.total_heads:,} heads in {kinds.total()} of {shape.num_layers} layers"]
    lines += [
        f"  {count_text(count, 'layer')} of {count_text(kind.num_heads, 'head')} of size {kind.head_dim} in"
        f" {count_text(kind.num_groups, 'key/value group')}"
        for kind, count in kinds.items()
    ]
    if found.gated:
        lines.append(f"  layers where a head owns a gate beside its query: {len(found.gated)}")
    if found.sharing:
        lines.append(f"  layers that take keys and values from others, so that heads own q and o: {len(found.sharing)}")
    return lines


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
    headings = ("metric", "A", "B", "B - A", f"{found.confidence:.0%} interval", "won", "lost")
    table = _table(headings, no_wrap=headings[1:])
    for name, metric in found.metrics.items():
        values = (f"{metric.first:.4f}", f"{metric.second:.4f}", f"{metric.difference:+.4f}")
        sure = "*" if metric.low > 0 or metric.high < 0 else " "
        interval = f"[{metric.low:+.4f}, {metric.high:+.4f}]{sure}"
        table.add_row(name, *values, interval, str(metric.won), str(metric.lost))
    out.print(table)
    out.print("won, lost: rows on which B is better, worse; * the interval excludes 0", style="dim")
    for warning in found.warnings:
        print_warning(warning)
    if found.left_out:
        out.print(f"not compared: {escape(', '.join(found.left_out))}", style="dim")
    out.print(f"\n[bold]{len(found.changed)} of {found.rows} rows changed[/]")
    for row in found.changed[:rows]:
        changes = ", ".join(f"{name} {before:.4g} -> {after:.4g}" for name, (before, after) in row.changes.items())
        out.print(Text.assemble(f"  {row.id}  ", (changes, "dim")), soft_wrap=True)
        texts = {"prompt": row.prompt, "reference": row.reference, "A": row.answers[0], "B": row.answers[1]}
        for name, text in texts.items():
            if text is not None:
                shown = (f"    {name:<10} ", "dim"), " ".join(text.split())
                out.print(Text.assemble(*shown), overflow="ellipsis", no_wrap=True)
    if (hidden := len(found.changed) - rows) > 0:
        out.print(f"  {hidden} more: --rows {len(found.changed)} shows all, --json too", style="dim")
