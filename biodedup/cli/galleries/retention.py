"""Commands on what the policy keeps no longer: retention plan, retention run. Each runs one job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biodedup import jobs
from biodedup.cli.base import (
    DEFAULT_GALLERY,
    ConfigOption,
    Exit,
    FolderOption,
    JsonOption,
    Panel,
    PersonOption,
    app,
    configured,
    finish,
)

retention = typer.Typer(
    no_args_is_help=True, help="Erase refused decisions and closed cases that the policy keeps no longer."
)
app.add_typer(retention, name="retention", rich_help_panel=Panel.CARE)


@retention.command()
def plan(gallery: FolderOption = DEFAULT_GALLERY, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List what is due by the gallery's policy (keep_refused_days, keep_cases_days). Erases nothing."""
    found = jobs.retention_plan(gallery, configured(gallery, config))
    lines = [f"due: {len(found.refused)} refused decisions, {len(found.cases)} closed cases"]
    if found.waiting:
        lines.append(f"{len(found.waiting)} open cases are older, and wait for a verdict")
    finish(found.to_dict(), lines, as_json)


@retention.command()
def run(
    key: Annotated[
        Path | None, typer.Option("--sign", help="The private key that signs the receipt, of `biodedup log key`.")
    ] = None,
    receipt: Annotated[
        Path | None, typer.Option("--receipt", help="The file of the signed receipt; it must not exist.")
    ] = None,
    by: PersonOption = "",
    gallery: FolderOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Erase what is due, and read the gallery again to see that it is gone. Exit code 4 where it is not.

    Backups keep it until they are brought up to date.
    """
    result = jobs.run_retention(gallery, configured(gallery, config), key=key, receipt=receipt, by=by)
    lines = [f"erased {result.refused} refused decisions and {result.cases} closed cases"]
    lines += [f"wrong: {problem}" for problem in result.problems]
    finish(result.to_dict(), lines, as_json)
    if result.problems:
        raise typer.Exit(Exit.DAMAGED)
