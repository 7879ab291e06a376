"""Commands on several registers: merge, undo. Each runs one job."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

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
    counted,
    finish,
    print_json,
    print_summary,
    progress_bar,
    say,
)


@app.command(rich_help_panel=Panel.JOBS)
def merge(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Districts' galleries: FOLDER or NAME=FOLDER; only read.")
    ],
    result: Annotated[
        Path, typer.Option("--out", "-o", help="Result, .parquet; four files more are written beside it.")
    ] = Path("merge.parquet"),
    into: Annotated[
        str | None,
        typer.Option(help="The central gallery, FOLDER or NAME=FOLDER; if it holds subjects, they are compared, too."),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Bring the result into the central gallery.")] = False,
    rule: Annotated[
        str,
        typer.Option(
            help="The record that survives: most_captures, best_quality, newest, oldest, or district (with --prefer)."
        ),
    ] = "most_captures",
    prefer: Annotated[
        list[str] | None,
        typer.Option(help="A district whose records stay where the rule ties, best first. Repeatable."),
    ] = None,
    min_db: Annotated[
        float | None, typer.Option(help="Link from this score on, extrapolated or not; default: the policy's.")
    ] = None,
    across_positions: AcrossOption = False,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the subjects of several galleries that are one person. Changes nothing without --apply.

    An interrupted run resumes when the same command is started again.
    """
    from biodedup.jobs.merging.registers import named  # here, so that help texts need not load the engine

    centre = None if into is None else named(into)[1]
    chosen = configured(centre, config, threads=threads, across_positions=across_positions)
    with progress_bar(lines=not as_json) as progress:
        found = jobs.merge(
            sources,
            result,
            into=into,
            apply=apply,
            rule=rule,
            prefer=prefer or (),
            min_db=min_db,
            config=chosen,
            progress=progress,
        )
    applied = None if found.applied is None else asdict(found.applied)
    if as_json:
        print_json(found.summary | {"merge_id": found.merge_id, "result": str(result), "applied": applied})
    else:
        shown = {key: value for key, value in found.summary.items() if key != "districts"}
        print_summary({"districts": len(found.summary["districts"])} | shown | {"result": str(result)}, as_json)
        report = result.with_name(f"{result.stem}.html")
        say(f"report: {report}")
        if found.applied is not None:
            one = found.applied
            say(
                f"applied: {one.added:,} added, {one.left_out:,} left out, {one.removed:,} removed, {one.completed:,} survivors "
                f"completed; {counted(one.subjects, 'subject')}. "
                f"To take it back: biodedup undo {one.merge_id} --gallery FOLDER"
            )
        elif found.summary["clusters"]:
            say("nothing was changed; look at the report, then --into FOLDER --apply")
    raise typer.Exit(Exit.DUPLICATE if found.summary["clusters"] and found.applied is None else Exit.DONE)


@app.command(rich_help_panel=Panel.JOBS)
def undo(
    merge_id: Annotated[str, typer.Argument(metavar="MERGE", help="As `merge --apply` told it.")],
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Undo a merge: restore the subjects and templates that the gallery had before.

    An interrupted run resumes when the same command is started again.
    """
    with progress_bar(lines=not as_json) as progress:
        undone = jobs.undo(merge_id, gallery, configured(gallery, config), progress=progress)
    text = (
        f"undone: {undone.restored:,} restored, {undone.reverted:,} survivors reverted, {undone.withdrawn:,} withdrawn; "
        f"{counted(undone.subjects, 'subject')}"
    )
    if undone.kept_changed:
        text += f"; enrolled anew since, left as they are: {', '.join(undone.kept_changed[:20])}"
    finish(asdict(undone), text, as_json)
