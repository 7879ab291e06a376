"""The command `evaluate`, which runs one job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from biodedup import jobs
from biodedup.cli.base import (
    ConfigOption,
    DpiOption,
    Exit,
    JsonOption,
    ModelIdOption,
    Panel,
    ThreadsOption,
    app,
    configured,
    model_ids,
    print_json,
    progress_bar,
    say,
    show_table,
)
from biodedup.cli.table_options import (
    CheckOption,
    ColumnsOption,
    EncodingOption,
    IgnoreColumnsOption,
    finish_check,
    table_options,
)


@app.command(rich_help_panel=Panel.CARE)
def evaluate(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of images (a folder per subject); CSV or Parquet manifest (subject_id, path, optionally position, dpi, "
            "encounter_id, and columns to group by); or Parquet of templates (subject_id, face, right_index, ...)."
        ),
    ],
    result: Annotated[Path, typer.Option("--out", "-o", help="Result, .json.")] = Path("evaluation.json"),
    report: Annotated[
        Path | None, typer.Option("--report", help="HTML report; default: beside the result. Holds captures.")
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Numbers only; needs no matplotlib.")] = False,
    pictures: Annotated[int, typer.Option(min=0, help="Pairs shown of each kind of error.")] = 12,
    finger: Annotated[bool, typer.Option("--finger", help="The folder's images are fingers.")] = False,
    dpi: DpiOption = None,
    minutiae: Annotated[str | None, typer.Option(help="Minutiae extractor: mindtct or leader.")] = None,
    record_model_id: Annotated[
        str | None, typer.Option(help="What extracted the minutiae records of the source.")
    ] = None,
    model_id: ModelIdOption = None,
    verify_fmr: Annotated[float | None, typer.Option(help="FMR that 1:1 decisions are made at.")] = None,
    nonmated_max: Annotated[
        int, typer.Option(min=1, help="At most this many impostor pairs; of more, a random sample.")
    ] = 2_000_000,
    seed: Annotated[int, typer.Option(help="Of that sample and of the bootstrap.")] = 0,
    check: CheckOption = False,
    encoding: EncodingOption = None,
    columns: ColumnsOption = None,
    ignore_columns: IgnoreColumnsOption = False,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure error rates on labelled captures or templates, in the terms of ISO/IEC 19795-1.

    An interrupted run resumes when the same command is started again. Exit code 12: some rows were refused.

    Writes the numbers (.json), what they were counted from (.pairs.parquet, .searches.parquet, .encounters.parquet) and a report.
    Templates stay in RESULT.work for the next run; delete it when you are done.
    """
    options = table_options(source, encoding, columns, ignore_columns=ignore_columns)
    if check:
        finish_check(jobs.check_captures(source, options, carried=True), as_json)
    given = {
        "finger.minutiae": minutiae,
        "finger.record_model_id": record_model_id,
        "policy.verify_fmr": verify_fmr,
    }
    chosen = configured(None, config, threads=threads, more=given)
    page = None if no_report else report or result.with_suffix(".html")
    with progress_bar(lines=not as_json) as progress:
        found = jobs.evaluate(
            source,
            result,
            chosen,
            report=page,
            finger=finger,
            dpi=dpi,
            model_id=model_ids(model_id),
            seed=seed,
            nonmated_max=nonmated_max,
            pictures=pictures,
            options=options,
            progress=progress,
        ).document
    code = Exit.REFUSED if found["left_out"]["rows_refused"] else Exit.DONE
    if as_json:
        print_json(found)
        raise typer.Exit(code)
    counts, searches = found["counts"], found["identification"]
    say(
        f"{counts['subjects']:,} subjects, {counts['encounters']:,} encounters, {counts['mated_pairs']:,} mated and "
        f"{counts['nonmated_pairs']:,} non-mated pairs; {result}{'' if page is None else f', {page}'}"
    )
    for row in found["left_out"]["refused_rows"][:20]:
        say(f"row {row['row']} refused: {row['detail'] or row['reason']}")
    if files := found["left_out"]["files_left_out"]:
        say(f"{sum(files.values()):,} files left out: {', '.join(f'{suffix} {n:,}' for suffix, n in files.items())}")
    rows: list[tuple[str, ...]] = []
    _row(rows, "FTE", "", found["failure_to_enrol"]["rate"])
    at_policy = found["verification"]["at_policy"]
    for row in ([] if at_policy is None else [at_policy]) + found["verification"]["at_fmr"]:
        at = f"FMR {row['target']:g}{' stated' if row is at_policy else ''}, {row['threshold_db']:.1f} dB"
        if row is at_policy:
            _row(rows, "FMR", at, row["fmr"])
        _row(rows, "FNMR", at, row["fnmr"])
    for row in searches["at_policy"] + searches["at_fpir"]:
        at = row["outcome"] if "outcome" in row else f"FPIR {row['target']:g}"
        at += f", N = {row['gallery_subjects']:,}, {row['threshold_db']:.1f} dB"
        if "outcome" in row:
            _row(rows, "FPIR", at, row["fpir"])
        _row(rows, "FNIR", at, row["fnir"])
    show_table(rows, ("rate", "at", "value", "95 %", "events"))
    raise typer.Exit(code)


def _row(rows: list[tuple[str, ...]], name: str, at: str, rate: dict[str, Any]) -> None:
    if rate["value"] is not None:
        low, high = rate["interval"]
        events = f"{rate['events']:,} of {rate['trials']:,}"
        rows.append((name, at, f"{rate['value']:.3%}", f"{low:.3%} to {high:.3%}", events))
