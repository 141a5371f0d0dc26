"""The `p2d` application: which commands there are, and their help."""

from __future__ import annotations

from typing import Annotated

import typer

from p2d_cli import __version__
from p2d_cli.cli.commands import (
    RunSettings,
    compare_command,
    doctor_command,
    guarded,
    inspect_command,
    run_body,
    stage_body,
)
from p2d_cli.cli.options import command_for
from p2d_cli.cli.streams import prepare_streams
from p2d_cli.config import STAGE_CONFIGS
from p2d_cli.errors import EXIT_CODES
from p2d_cli.pipeline import EXPORT, STAGES
from p2d_cli.runtime.signals import BEGINS_ANEW

EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."
POSITIONAL: dict[str, tuple[str, ...]] = {"report-aer": ("evaluations",), "export": ("adapter",)}

app = typer.Typer(
    name="p2d",
    help="Adapt a causal language model with 10% of the data and 10% of the attention heads, and account for every"
    " second spent: score-heads, mine-data, train, eval, report-aer; or all of them with run.",
    epilog=EPILOG,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"p2d {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Do what all commands begin with; without a docstring of its own in the help."""
    del version
    prepare_streams()


root.__doc__ = None

for _stage in (*STAGES, EXPORT):
    app.command(_stage.name, rich_help_panel="Stages" if _stage in STAGES else "Tools")(
        guarded(
            command_for(
                STAGE_CONFIGS[_stage.name],
                stage_body(_stage.name),
                doc=_stage.purpose,
                arguments=POSITIONAL.get(_stage.name, ()),
            )
        )
    )

app.command("run", rich_help_panel="Tools")(
    guarded(
        command_for(
            RunSettings,
            run_body,
            doc="Do all stages from one recipe, skip what is up to date, and report every point of its grid.",
            arguments=("recipe",),
        )
    )
)
app.command("doctor", rich_help_panel="Tools")(guarded(doctor_command, promise=BEGINS_ANEW))
app.command("inspect", rich_help_panel="Tools")(guarded(inspect_command, promise=BEGINS_ANEW))
app.command("compare", rich_help_panel="Tools")(guarded(compare_command, promise=BEGINS_ANEW))
