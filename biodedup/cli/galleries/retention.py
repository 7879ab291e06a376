"""Defines the commands that erase records whose retention period has ended: retention plan, retention run. Each runs one job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.exits import Exit
from biodedup.cli.opening import configured, in_turn
from biodedup.cli.options import DEFAULT_GALLERY, ConfigOption, FolderOption, JsonOption, PersonOption, WaitOption
from biodedup.cli.printing import finish

retention = typer.Typer(
    no_args_is_help=True, help="Erase refused decisions and closed cases whose retention period has ended."
)
app.add_typer(retention, name="retention", rich_help_panel=Panel.CARE)


@retention.command()
def plan(gallery: FolderOption = DEFAULT_GALLERY, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the records that the gallery's policy no longer keeps (keep_refused_days, keep_cases_days). Erases nothing."""
    found = jobs.retention_plan(gallery, configured(gallery, config))
    lines = [f"due: {len(found.refused)} refused decisions, {len(found.cases)} closed cases"]
    if found.waiting:
        lines.append(f"{len(found.waiting)} open cases are older, but wait for a verdict")
    finish(found.to_dict(), lines, as_json)


@retention.command()
def run(
    key: Annotated[
        Path | None, typer.Option("--sign", help="The private key that signs the receipt (`biodedup log key`).")
    ] = None,
    receipt: Annotated[
        Path | None, typer.Option("--receipt", help="The file of the signed receipt; it must not exist.")
    ] = None,
    by: PersonOption = "",
    wait: WaitOption = 0,
    gallery: FolderOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Erase the records that are due, and read the gallery again to check that they are gone. Exit code 4: some are not.

    Backups keep the records until they are updated.
    """
    chosen = configured(gallery, config)
    result = in_turn(gallery, wait, lambda: jobs.run_retention(gallery, chosen, key=key, receipt=receipt, by=by))
    lines = [f"erased {result.refused} refused decisions and {result.cases} closed cases"]
    lines += [f"wrong: {problem}" for problem in result.problems]
    finish(result.to_dict(), lines, as_json)
    if result.problems:
        raise typer.Exit(Exit.DAMAGED)
