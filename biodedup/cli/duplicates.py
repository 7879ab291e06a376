"""Defines the commands that look for duplicates: dedup, audit, merge, undo. Each runs one job."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import biodedup as bd
from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.exits import Exit
from biodedup.cli.opening import configured, in_turn
from biodedup.cli.options import (
    DEFAULT_GALLERY,
    AcrossOption,
    ConfigOption,
    FolderOption,
    GalleryOption,
    JsonOption,
    PersonOption,
    RayOption,
    SignOption,
    ThreadsOption,
    WaitOption,
)
from biodedup.cli.printing import counted, finish, print_json, print_summary, progress_bar, say
from biodedup.cli.table_options import (
    CheckOption,
    ColumnsOption,
    EncodingOption,
    IgnoreColumnsOption,
    finish_check,
    table_options,
)
from biodedup.config import Config
from biodedup.errors import InvalidInput
from biodedup.values import Cluster

_MERGE_STEP_S = 5.0
"""Seconds between two attempts of `merge --apply`, each of which checks the compared copy."""


@app.command(rich_help_panel=Panel.JOBS)
def dedup(
    source: Annotated[
        Path, typer.Argument(help="Folder of images (a folder per subject), a CSV or Parquet manifest, or a gallery.")
    ],
    result: Annotated[Path, typer.Option("--out", "-o", help="Result, .parquet or .csv.")] = Path("dedup.parquet"),
    threshold_db: Annotated[
        float | None, typer.Option(help="Link pairs with at least this score; default: the policy's threshold.")
    ] = None,
    check: CheckOption = False,
    encoding: EncodingOption = None,
    columns: ColumnsOption = None,
    ignore_columns: IgnoreColumnsOption = False,
    across_positions: AcrossOption = False,
    ray: RayOption = None,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the images of a folder, or the subjects of a manifest or a gallery, that are the same person.

    An interrupted run resumes when the same command is started again. Exit code 10: duplicates were found; 12: no duplicates were found, but
    some images or rows were refused.
    """
    is_gallery = jobs.is_gallery(source)
    if is_gallery and (check or encoding or columns or ignore_columns):
        raise InvalidInput(
            f"{source} is a gallery; omit --check and the options of tables, which are for a folder or a manifest"
        )
    if ray is not None and not is_gallery:
        raise InvalidInput(
            f"{source} is not a gallery, but --ray works only on galleries; enrol it with `enroll-batch --ray`, or omit --ray"
        )
    options = table_options(source, encoding, columns, ignore_columns=ignore_columns)
    if check:
        finish_check(jobs.check_captures(source, options), as_json)
    chosen = configured(source if is_gallery else None, config, threads=threads, across_positions=across_positions)
    if is_gallery:
        _dedup_gallery(source, result, chosen, threshold_db, ray, as_json)
    with progress_bar(lines=not as_json) as progress:
        found = jobs.dedup(source, result, chosen, threshold_db=threshold_db, options=options, progress=progress)
    summary = found.summary() | {"result": str(result)}
    if as_json:
        print_summary(summary, as_json)
    else:
        print_summary({k: v for k, v in summary.items() if k not in ("files_left_out", "refused_rows")}, as_json)
        say(*found.left_out.sentences(), *found.refused_sentences())
        _print_links_across_labels(found)
    if found.clusters:
        raise typer.Exit(Exit.DUPLICATE)
    raise typer.Exit(Exit.REFUSED if found.refusals or found.left_out.rows else Exit.DONE)


def _dedup_gallery(
    gallery: Path, result: Path, config: Config, threshold_db: float | None, ray: str | None, as_json: bool
) -> NoReturn:
    # read-only, so that others can enrol during a join of hours
    with (
        bd.Engine.open(gallery, config, read_only=True) as engine,
        progress_bar(lines=not as_json) as progress,
        jobs.ray_executor(ray) as executor,
    ):
        joined = jobs.find_duplicates(engine, result, threshold_db=threshold_db, progress=progress, executor=executor)
    print_summary(joined.summary() | {"result": str(result)}, as_json)
    for cluster in joined.clusters[:20] if not as_json else ():
        names = "  =  ".join(cluster.subject_ids[:8]) + ("  ..." if len(cluster.subject_ids) > 8 else "")
        say(f"weakest link {cluster.weakest_db:6.1f} dB  {names}{_left_out(cluster)}")
    raise typer.Exit(Exit.DUPLICATE if joined.clusters else Exit.DONE)


def _print_links_across_labels(found: jobs.DedupResult) -> None:
    """Prints the strongest links between units with different labels, such as images in different subfolders."""
    label_of = {unit.unit_id: unit.label for unit in found.units}
    links = [link for cluster in found.clusters for link in cluster.links]
    across = [link for link in links if label_of[link.subject_ids[0]] != label_of[link.subject_ids[1]]]
    for link in sorted(across, key=lambda link: -link.score_db)[:20]:
        say(f"{link.score_db:6.1f} dB  {link.subject_ids[0]}  =  {link.subject_ids[1]}")


def _left_out(cluster: Cluster) -> str:
    """A note on a large cluster of which the result does not list all links."""
    count = cluster.links_left_out
    return f"  ({counted(len(cluster.subject_ids), 'record')}; {count:,} links are not listed)" if count else ""


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
        float | None,
        typer.Option(help="Records with at least this score count as one person; default: the policy's threshold."),
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
    """Check a roll, such as a voter list, against a gallery: people listed twice, not enrolled, or enrolled under two ids, by district.

    An interrupted run resumes when the same command is started again. Exit code 10: duplicates were found; 12: no duplicates were found, but
    some lines were refused.
    """
    options = table_options(roll, encoding, columns, ignore_columns=ignore_columns)
    if check:
        finish_check(jobs.check_roll(roll, options), as_json)
    chosen = configured(gallery, config, threads=threads, across_positions=across_positions)
    with bd.Engine.open(gallery, chosen, read_only=True) as engine, progress_bar(lines=not as_json) as progress:
        findings = jobs.audit(
            engine, roll, result, report=report, threshold_db=threshold_db, options=options, progress=progress
        )
    summary = findings.summary() | {"result": str(result)} | ({"report": str(report)} if report is not None else {})
    if as_json:
        print_summary(summary, as_json)
    else:
        print_summary({k: v for k, v in summary.items() if k not in ("findings", "districts")}, as_json)
        for kind, text in jobs.AUDIT_KINDS.items():
            say(f"{summary['findings'][kind]:>8,}  {text}")
    if any(summary["findings"][kind] for kind in ("two_ids", "listed_twice", "enrolled_twice")):
        raise typer.Exit(Exit.DUPLICATE)
    raise typer.Exit(Exit.REFUSED if summary["findings"]["refused"] else Exit.DONE)


@app.command(rich_help_panel=Panel.JOBS)
def merge(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Districts' galleries: FOLDER or NAME=FOLDER. They are only read."),
    ],
    result: Annotated[
        Path, typer.Option("--out", "-o", help="Result, .parquet; four more files are written beside it.")
    ] = Path("merge.parquet"),
    into: Annotated[
        str | None,
        typer.Option(help="The central gallery, FOLDER or NAME=FOLDER. Its subjects are compared, too."),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Apply the result to the central gallery.")] = False,
    rule: Annotated[
        str,
        typer.Option(
            help="The record that survives: most_captures, best_quality, newest, oldest, or district (with --prefer)."
        ),
    ] = "most_captures",
    prefer: Annotated[
        list[str] | None,
        typer.Option(
            help="A district whose records survive if the rule has a tie. Repeatable, the most preferred first."
        ),
    ] = None,
    min_db: Annotated[
        float | None,
        typer.Option(help="Link pairs with at least this score, extrapolated or not; default: the policy's threshold."),
    ] = None,
    across_positions: AcrossOption = False,
    ray: RayOption = None,
    by: PersonOption = "",
    sign: SignOption = None,
    wait: WaitOption = 0,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find subjects of several galleries that are the same person. Changes nothing without --apply.

    An interrupted run resumes when the same command is started again.
    """
    from biodedup.jobs.merging.registers import named  # imported here, so that --help does not load the engine

    centre = None if into is None else named(into)[1]
    chosen = configured(centre, config, threads=threads, across_positions=across_positions)
    with progress_bar(lines=not as_json) as progress, jobs.ray_executor(ray) as executor:
        work = partial(
            jobs.merge,
            sources,
            result,
            into=into,
            apply=apply,
            rule=rule,
            prefer=prefer or (),
            min_db=min_db,
            config=chosen,
            by=by,
            sign=sign,
            progress=progress,
            executor=executor,
        )
        merged = in_turn(centre, wait, work, _MERGE_STEP_S) if apply and centre is not None else work()
    _print_merge(merged, result, centre, as_json)
    raise typer.Exit(Exit.DUPLICATE if merged.summary["clusters"] and merged.applied is None else Exit.DONE)


def _print_merge(merged: jobs.MergeResult, result: Path, centre: Path | None, as_json: bool) -> None:
    summary, applied = merged.summary, merged.applied
    if as_json:
        print_json(
            summary
            | {"merge_id": merged.merge_id, "result": str(result)}
            | {"applied": None if applied is None else asdict(applied)}
        )
        return
    shown = {key: value for key, value in summary.items() if key != "districts"}
    print_summary({"districts": len(summary["districts"])} | shown | {"result": str(result)}, as_json)
    say(f"report: {result.with_name(f'{result.stem}.html')}")
    if applied is not None:
        say(
            f"applied: {applied.added:,} added, {applied.left_out:,} left out, {applied.removed:,} removed, "
            f"{applied.completed:,} survivors completed; {counted(applied.subjects, 'subject')}. "
            f"To undo it: biodedup undo {applied.merge_id} --gallery {centre}"
        )
        if waiting := summary["clusters_to_adjudicate"]:
            say(
                f"{counted(waiting, 'cluster')} to be decided by hand: see the report; `biodedup explain A B --gallery {centre}` shows two "
                "records, `biodedup remove ID` removes one"
            )
    elif summary["clusters"]:
        say("nothing was changed; read the report, then run again with --into FOLDER --apply")


@app.command(rich_help_panel=Panel.JOBS)
def undo(
    merge_id: Annotated[
        str, typer.Argument(metavar="MERGE", help="The id of the merge, which `merge --apply` printed.")
    ],
    by: PersonOption = "",
    sign: SignOption = None,
    wait: WaitOption = 0,
    gallery: FolderOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Undo a merge: restore the subjects and templates that the gallery had before.

    An interrupted run resumes when the same command is started again.
    """
    with progress_bar(lines=not as_json) as progress:
        work = partial(jobs.undo, merge_id, gallery, configured(gallery, config), by=by, sign=sign, progress=progress)
        undone = in_turn(gallery, wait, work)
    text = (
        f"undone: {undone.restored:,} restored, {undone.reverted:,} survivors reverted, {undone.withdrawn:,} withdrawn; "
        f"{counted(undone.subjects, 'subject')}"
    )
    if undone.kept_changed:
        text += f"; enrolled again since the merge, not changed: {', '.join(undone.kept_changed[:20])}"
    finish(asdict(undone), text, as_json)
