"""The commands: settings to config, config to stage, result to words."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from p2d_cli.cli.options import Invocation
from p2d_cli.cli.streams import abandon_unwritable_streams
from p2d_cli.config import (
    REQUIRED,
    STAGE_CONFIGS,
    Resolved,
    StageConfig,
    TrainConfig,
    input_setting,
    resolve,
    setting,
)
from p2d_cli.errors import (
    EXIT_CODES,
    LESS_MEMORY,
    ArtifactError,
    DataError,
    MemoryExhaustedError,
    P2DError,
    StorageError,
    UsageError,
    first_line,
    is_out_of_memory,
    without_secrets,
)
from p2d_cli.pipeline import stage_named
from p2d_cli.recipes.recipe import find_recipe, read_recipe
from p2d_cli.runtime import signals


class RunSettings(StageConfig):
    """The flags of `p2d run`; they hold for every stage that has them."""

    recipe: str = input_setting(REQUIRED, "Recipe, a TOML file, or quickstart, which comes with p2d.")
    out: str | None = setting(  # type: ignore[assignment]  # a recipe may name the folder itself
        None, "Folder for all artifacts.", panel="Input and output"
    )


Parameters = ParamSpec("Parameters")
DEBUG_VARIABLE = "P2D_DEBUG"
CHANGED_ROWS = 5
"""How many `compare` shows unless asked for more."""


def guarded(command: Callable[Parameters, None], *, promise: str = signals.UNBEGUN) -> Callable[Parameters, None]:
    """Catch every error once, at the command boundary, and end with the documented exit code.

    Args:
        command: the command.
        promise: what is said when a signal ends it, unless its work says something else; see `signals.promising`.
    """

    @wraps(command)
    def boundary(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            with signals.listening(), signals.promising(lambda: promise):
                command(*args, **kwargs)
                sys.stdout.flush()
        except P2DError as problem:
            _fail(problem)
        except signals.Interruption as interruption:
            _stop(interruption)
        except KeyboardInterrupt:
            _stop(signals.Interruption(signal.SIGINT, signals.AGAIN))
        except BrokenPipeError:
            abandon_unwritable_streams()
            raise typer.Exit(0) from None
        except OSError as problem:
            _fail(_of_the_system(problem))
        except typer.Exit:
            raise
        except Exception as problem:  # noqa: BLE001 - the one place where every error ends
            if is_out_of_memory(problem):
                _fail(MemoryExhaustedError(f"out of memory: {first_line(problem)}", hint=LESS_MEMORY))
            _fail_internally(problem)

    return boundary


def _of_the_system(problem: OSError) -> P2DError:
    if problem.errno == errno.ENAMETOOLONG:  # an output's name was measured before anything was written
        name = os.fsdecode(problem.filename or "")
        message = f"no such file or folder: a name of {len(os.fsencode(name))} bytes is too long: {name:.60}..."
        return DataError(message, hint="is it the name of a file?")
    return StorageError(f"{problem}")


def _fail_internally(problem: Exception) -> NoReturn:
    """Report a defect of p2d itself: one line, and the traceback only for those who ask."""
    if DEBUG_VARIABLE in os.environ:
        sys.stderr.write(without_secrets(traceback.format_exc()))
    described = f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
    _fail(P2DError(f"internal error: {described}", hint=f"set {DEBUG_VARIABLE}=1 for the traceback, and report it"))


def _fail(problem: P2DError) -> NoReturn:
    from p2d_cli.cli.ranks import exit_note, speaking
    from p2d_cli.cli.terminal import print_error

    with speaking(problem) as speaks:
        if speaks:
            # The exit code tells it all the same, where nobody listens.
            with suppress(OSError):
                _tell_program(problem.exit_code, problem.message, problem.hint)
                sys.stdout.flush()
            with suppress(OSError):
                print_error(problem, exit_note(problem.exit_code))
    abandon_unwritable_streams()
    raise typer.Exit(problem.exit_code)


def _stop(interruption: signals.Interruption) -> NoReturn:
    """Say in one line that a signal ended the command; on a terminal, below the `^C` that it shows."""
    _tell_program(interruption.exit_code, interruption.message, None)
    start = "\n" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{start}{interruption.message}\n")
    raise typer.Exit(interruption.exit_code)


def _tell_program(code: int, message: str, hint: str | None) -> None:
    """With `--json`, say on stdout as well why there is no result."""
    if "--json" in sys.argv:
        from p2d_cli.cli.terminal import print_json

        document = {"status": "error", "exit_code": code, "meaning": EXIT_CODES[code], "message": message, "hint": hint}
        print_json(document)


def stage_body(name: str) -> Callable[[dict[str, Any], Invocation], None]:
    """Return what the command of one stage does with its flags."""

    def body(settings: dict[str, Any], invocation: Invocation) -> None:
        resolved = _resolve_stage(name, settings, invocation.config)
        if invocation.print_config:
            _print_config(resolved, as_json=invocation.json)
            return
        from p2d_cli.cli.render import print_result, result_document
        from p2d_cli.cli.terminal import print_json

        stage = importlib.import_module(stage_named(name).module)
        result = stage.run(resolved, _run_options(invocation))
        if invocation.json:
            print_json(result_document(result))
        else:
            print_result(result)

    return body


def _resolve_stage(name: str, settings: dict[str, Any], source: Path | None) -> Resolved[Any]:
    """Merge flags with the stage's part of a recipe; for train, with the part that is for its scope."""
    recipe = read_recipe(source) if source is not None else None
    resolved = resolve(STAGE_CONFIGS[name], flags=settings, recipe=recipe.table(name) if recipe is not None else {})
    if recipe is not None and isinstance(resolved.config, TrainConfig):
        scope = resolved.config.resolved_scope
        of_scope = resolve(TrainConfig, flags=settings, recipe=recipe.table(name, scope))
        return replace(of_scope, aimed=of_scope.aimed | recipe.own_of(scope).keys())
    return resolved


def _run_options(invocation: Invocation) -> Any:
    from p2d_cli.cli.terminal import progress_for
    from p2d_cli.engine.stage_run import RunOptions

    if invocation.time and not invocation.dry_run:
        raise UsageError("--time belongs to --dry-run: a run that is no dry one takes its time", hint="add --dry-run")
    return RunOptions(
        force=invocation.force,
        dry_run=invocation.dry_run,
        timed=invocation.time,
        progress=progress_for(quiet=invocation.quiet),
        rank_logs=invocation.verbose,
    )


def _print_config(resolved: Resolved[Any], *, as_json: bool) -> None:
    from p2d_cli.cli.terminal import out, print_json

    provenance = resolved.provenance()
    if as_json:
        print_json(provenance)
        return
    for name, known in provenance.items():
        out.print(f"{name:<20} {known['value']!s:<32} [dim]{known['origin']}[/]", soft_wrap=True)


def run_body(settings: dict[str, Any], invocation: Invocation) -> None:
    """Do a whole recipe."""
    from p2d_cli.cli.render import (
        plan_totals,
        print_plan_totals,
        print_result,
        print_warnings_of,
        result_document,
    )
    from p2d_cli.cli.terminal import print_json
    from p2d_cli.stages.run import RecipeRun

    if invocation.config is not None:
        raise UsageError("p2d run takes its settings from its recipe", hint="leave --config out")
    given = resolve(RunSettings, flags=settings)
    # Variables go over the recipe: those of the stages' settings in each stage, these here.
    variables = {name: getattr(given.config, name) for name in ("seed", "out") if given.origins[name] == "variable"}
    overrides = {name: value for name, value in settings.items() if name != "recipe"} | variables
    source = find_recipe(given.config.recipe)
    recipe = read_recipe(source)
    if invocation.print_config:
        print_json(recipe.model_dump(mode="json", by_alias=True))
        return
    options = _run_options(invocation)
    outcome = RecipeRun(
        recipe, overrides, options, lambda stage, folder: options.progress.note(f"{stage} -> {folder}"), source
    ).run()
    if invocation.json:
        document = {"out": str(outcome.out), "stages": [result_document(result) for result in outcome.stages]}
        print_json(document | ({"total": plan_totals(outcome.stages)} if invocation.dry_run else {}))
        return
    hidden = 0 if invocation.verbose or invocation.dry_run else len(outcome.stages) - 1
    for result in outcome.stages[hidden:]:
        print_result(result)
    print_warnings_of(outcome.stages[:hidden], outcome.out)
    if invocation.dry_run:
        print_plan_totals(outcome.stages)
    skipped = sum(result.status in {"up-to-date", "would-skip"} for result in outcome.stages)
    sys.stdout.write(f"{len(outcome.stages)} stages, {skipped} of them up to date, in {outcome.out}\n")


def _expanded(folder: Path) -> Path:
    try:
        return folder.expanduser()
    except RuntimeError:
        raise ArtifactError(f"there is nothing at {folder}: that home folder is not known") from None


def inspect_command(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact, or an index.", metavar="ARTIFACT")],
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON document.")] = False,
) -> None:
    """Verify an artifact and show what made it: inputs, settings, cost; for heads a heat map, for rows the best."""
    from p2d_cli.artifacts.pool_index import IndexFound
    from p2d_cli.cli.render import print_extremes, print_heat_map, print_index, print_manifest
    from p2d_cli.cli.terminal import err, print_json
    from p2d_cli.stages.inspection import inspect

    artifact = _expanded(artifact)
    found = inspect(artifact)
    if isinstance(found, IndexFound):
        if json:
            print_json({"verified": True, "kind": "index", **asdict(found)})
        else:
            print_index(found)
        return
    if json:
        print_json({"folder": str(artifact), "verified": True, **found.manifest.model_dump(mode="json", by_alias=True)})
        return
    print_manifest(artifact, found.manifest)
    if found.heads is not None:
        print_heat_map(found.heads.scores_LH, found.heads.selected_LH, found.heads.reading)
    if found.best_rows:
        print_extremes(list(found.best_rows), "best rows")
    if found.last_rows:
        print_extremes(list(found.last_rows), "last rows chosen")
    for warning in found.warnings:
        err.print(f"[yellow]warning:[/] {warning}")


def doctor_command(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model: folder or hub id. Its weights are not read.", metavar="MODEL")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Say what p2d can do with a model, and why not: its heads, and each method, scope and stage; reads no weights."""
    from p2d_cli.cli.render import print_examination
    from p2d_cli.cli.terminal import print_json
    from p2d_cli.stages.examination import examine

    found = examine(model)
    if json:
        print_json(found.to_dict())
    else:
        print_examination(found)


def compare_command(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluation.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Folder of another one, of the same rows.", metavar="B")],
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=0, metavar="N", help="Show so many changed rows (default 5, with --json all)."),
    ] = None,
    confidence: Annotated[float, typer.Option("--confidence", help="Level of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the bootstrap.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Compare two evaluations of the same rows: paired differences with intervals, and the rows that changed."""
    from p2d_cli.cli.render import comparison_document, print_comparison
    from p2d_cli.cli.terminal import print_json
    from p2d_cli.stages.comparison import compare

    if not 0.0 < confidence < 1.0:
        raise UsageError(f"--confidence {confidence} is not between 0 and 1")
    found = compare(_expanded(first), _expanded(second), confidence=confidence, seed=seed)
    if json:
        print_json(comparison_document(found, rows))
    else:
        print_comparison(found, CHANGED_ROWS if rows is None else rows)
