"""Defines the commands on labelled data: evaluate measures error rates, calibrate fits a model's calibration. Each runs one job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.exits import Exit
from biodedup.cli.opening import configured
from biodedup.cli.options import ConfigOption, DpiOption, JsonOption, ModelIdOption, RayOption, ThreadsOption, model_ids
from biodedup.cli.printing import print_json, progress_bar, say, show_table
from biodedup.cli.table_options import (
    CheckOption,
    ColumnsOption,
    EncodingOption,
    IgnoreColumnsOption,
    finish_check,
    table_options,
)

LabelledArgument = Annotated[
    Path,
    typer.Argument(
        help="Folder of images, with a subfolder for each subject; CSV or Parquet manifest (subject_id, path, optionally position, dpi, "
        "encounter_id, and columns to group by); or Parquet of templates (subject_id, face, right_index, ...)."
    ),
]
NonmatedOption = Annotated[int, typer.Option(min=1, help="Compare at most this many impostor pairs, a random sample.")]


@app.command(rich_help_panel=Panel.CARE)
def evaluate(
    source: LabelledArgument,
    result: Annotated[Path, typer.Option("--out", "-o", help="Result, .json.")] = Path("evaluation.json"),
    report: Annotated[
        Path | None, typer.Option("--report", help="HTML report; default: beside the result. Holds captures.")
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Numbers only; needs no matplotlib.")] = False,
    pictures: Annotated[int, typer.Option(min=0, help="Number of pairs in the report for each type of error.")] = 12,
    finger: Annotated[bool, typer.Option("--finger", help="The folder's images are fingers.")] = False,
    dpi: DpiOption = None,
    minutiae: Annotated[str | None, typer.Option(help="Minutiae extractor: skeleton, mindtct or leader.")] = None,
    record_model_id: Annotated[
        str | None, typer.Option(help="The model_id of the source's minutiae records: the program that extracted them.")
    ] = None,
    model_id: ModelIdOption = None,
    verify_fmr: Annotated[float | None, typer.Option(help="The FMR of 1:1 decisions.")] = None,
    nonmated_max: NonmatedOption = 2_000_000,
    seed: Annotated[int, typer.Option(help="Seed of the sample of impostor pairs and of the bootstrap.")] = 0,
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

    Writes the rates (.json), the compared pairs and searches (.pairs.parquet, .searches.parquet, .encounters.parquet) and a report.
    RESULT.work keeps templates for the next run; delete it when you no longer need it.
    """
    options = table_options(source, encoding, columns, ignore_columns=ignore_columns)
    if check:
        finish_check(jobs.check_captures(source, options, carried=True), as_json)
    more = {"finger.minutiae": minutiae, "finger.record_model_id": record_model_id, "policy.verify_fmr": verify_fmr}
    chosen = configured(None, config, threads=threads, more=more)
    page = None if no_report else report or result.with_suffix(".html")
    with progress_bar(lines=not as_json) as progress:
        document = jobs.evaluate(
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
    if as_json:
        print_json(document)
    else:
        _print_evaluation(document, [result] if page is None else [result, page])
    raise typer.Exit(Exit.REFUSED if document["left_out"]["rows_refused"] else Exit.DONE)


def _print_evaluation(document: dict[str, Any], files: list[Path]) -> None:
    counts = document["counts"]
    say(
        f"{counts['subjects']:,} subjects, {counts['encounters']:,} encounters, {counts['mated_pairs']:,} mated and "
        f"{counts['nonmated_pairs']:,} non-mated pairs; {', '.join(map(str, files))}"
    )
    _print_left_out(document["left_out"])
    show_table(_rates(document), ("rate", "at", "value", "95 %", "events"))


def _print_left_out(left_out: dict[str, Any]) -> None:
    for row in left_out["refused_rows"][:20]:
        say(f"row {row['row']} refused: {row['detail'] or row['reason']}")
    if files := left_out["files_left_out"]:
        say(f"{sum(files.values()):,} files left out: {', '.join(f'{suffix} {n:,}' for suffix, n in files.items())}")


def _rates(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """A table row for each measured rate."""
    rows: list[tuple[str, ...]] = []
    _row(rows, "FTE", "", document["failure_to_enrol"]["rate"])
    verification, searches = document["verification"], document["identification"]
    at_policy = verification["at_policy"]
    for row in ([] if at_policy is None else [at_policy]) + verification["at_fmr"]:
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
    return rows


def _row(rows: list[tuple[str, ...]], name: str, at: str, rate: dict[str, Any]) -> None:
    if rate["value"] is not None:
        low, high = rate["interval"]
        events = f"{rate['events']:,} of {rate['trials']:,}"
        rows.append((name, at, f"{rate['value']:.3%}", f"{low:.3%} to {high:.3%}", events))


@app.command(rich_help_panel=Panel.CARE)
def calibrate(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="Parquet or CSV with similarity, minutiae or both, and mated; if known subject_a, subject_b, position. Or a gallery, if "
            "its subjects are different people."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="The model: a model_id, finger256-3+mindtct-1 for embedding and minutiae, or the path of a card. An unknown model_id is an "
            "external model; its card has no weights.",
        ),
    ],
    card: Annotated[Path, typer.Option("--out", help="Where to write the card (.toml).")],
    dimension: Annotated[
        int | None, typer.Option("--dimension", min=1, help="Dimension of the embeddings of an external model.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the held-out half and of the interval.")] = 0,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a model's calibration on your labelled pairs, or on a gallery's impostor pairs, and write the model's card."""
    with progress_bar(lines=not as_json) as show, jobs.ray_executor(ray) as executor:
        result = jobs.calibrate(
            pairs,
            model,
            card,
            dimension=dimension,
            seed=seed,
            progress=show,
            config=configured(pairs, None),
            executor=executor,
        )
    if as_json:
        print_json(result.summary())
        return
    for name, rows in result.held_out.items():
        cells = []
        for row in rows:
            before = "" if "fmr_before" not in row else f"{row['fmr_before']:.2g}"
            bounds = f"{row['fmr_low']:.2g} to {row['fmr_high']:.2g}"
            cells.append((f"{row['nominal_fmr']:g}", before, f"{row['fmr']:.2g}", bounds))
        show_table(
            cells,
            ("nominal FMR", "card before", "fitted", "95 %"),
            title=f"{name}, measured on held-out pairs",
        )
    if not result.held_out:
        say("there are too few pairs to hold half of them out: the quality of the fit was not measured")
    for row in result.positions:
        if row["differs"]:
            say(f"{row['position']}: the measured FMR is {row['fmr']:.2g}, the nominal FMR is {row['nominal_fmr']:g}")
    say(f"{result.card}: fitted on {result.nonmated:,} non-mated and {result.mated:,} mated pairs")
