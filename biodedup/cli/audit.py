"""The command `audit`, which runs one job: it checks a roll against a gallery."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import biodedup as bd
from biodedup import jobs
from biodedup.cli.base import (
    DEFAULT_GALLERY,
    AcrossOption,
    ConfigOption,
    Exit,
    GalleryOption,
    JsonOption,
    Panel,
    ThreadsOption,
    app,
    configured,
    print_summary,
    progress_bar,
    say,
)
from biodedup.cli.table_options import (
    CheckOption,
    ColumnsOption,
    EncodingOption,
    IgnoreColumnsOption,
    finish_check,
    table_options,
)


@app.command(rich_help_panel=Panel.JOBS)
def audit(
    roll: Annotated[
        Path,
        typer.Argument(
            metavar="ROLL", help="CSV or Parquet with subject_id, or with path and position; optionally district."
        ),
    ],
    result: Annotated[Path, typer.Option("--out", "-o", help="Findings, .parquet or .csv.")] = Path("audit.parquet"),
    report: Annotated[Path | None, typer.Option("--report", help="The report, an HTML page.")] = None,
    threshold_db: Annotated[
        float | None, typer.Option(help="Two count as one person from this score on; default: the policy's.")
    ] = None,
    check: CheckOption = False,
    encoding: EncodingOption = None,
    columns: ColumnsOption = None,
    ignore_columns: IgnoreColumnsOption = False,
    across_positions: AcrossOption = False,
    gallery: GalleryOption = DEFAULT_GALLERY,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a roll, such as a voter list: people listed twice, not enrolled, or enrolled under two ids, by district.

    An interrupted run resumes when the same command is started again. Exit code 10: doubles were found; 12: none were found, and some lines
    were refused.
    """
    options = table_options(roll, encoding, columns, ignore_columns=ignore_columns)
    if check:
        finish_check(jobs.check_roll(roll, options), as_json)
    chosen = configured(gallery, config, threads=threads, across_positions=across_positions)
    with bd.Engine.open(gallery, chosen, read_only=True) as engine, progress_bar(lines=not as_json) as progress:
        found = jobs.audit(
            engine, roll, result, report=report, threshold_db=threshold_db, options=options, progress=progress
        )
    summary = found.summary() | {"result": str(result)} | ({"report": str(report)} if report is not None else {})
    if as_json:
        print_summary(summary, as_json)
    else:
        print_summary({k: v for k, v in summary.items() if k not in ("findings", "districts")}, as_json)
        for kind, text in jobs.AUDIT_KINDS.items():
            say(f"{summary['findings'][kind]:>8,}  {text}")
    doubles = sum(summary["findings"][kind] for kind in ("two_ids", "listed_twice", "enrolled_twice"))
    if doubles:
        raise typer.Exit(Exit.DUPLICATE)
    raise typer.Exit(Exit.REFUSED if summary["findings"]["refused"] else Exit.DONE)
