"""Defines the commands on bulk enrolment: enroll-batch, and status, which shows its queue. Each runs one job."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.opening import configured, created
from biodedup.cli.options import (
    DEFAULT_GALLERY,
    ConfigOption,
    FolderOption,
    IndexOption,
    JsonOption,
    ModelIdOption,
    RayOption,
    ThreadsOption,
    WaitOption,
    index_engines,
    model_ids,
)
from biodedup.cli.printing import finish, print_json, print_summary, progress_bar, say, show_table, span
from biodedup.cli.table_options import (
    CheckOption,
    ColumnsOption,
    DateFormatOption,
    EncodingOption,
    IgnoreColumnsOption,
    finish_check,
    table_options,
)
from biodedup.config import IsolationConfig, LabelConfig
from biodedup.outcomes import MEANINGS

ManifestArgument = Annotated[
    Path,
    typer.Argument(
        help="Parquet or CSV with one row for each capture (subject_id, encounter_id, path, position, dpi, groups), or one row for each "
        "encounter (subject_id, encounter_id, and face, right_index, ...: paths, bytes or embeddings). Other columns are copied to the result."
    ),
]
PageOption = Annotated[Path | None, typer.Option("--report", help="Also write an HTML page for officials.")]
AnnounceOption = Annotated[
    bool, typer.Option("--announce", help="Only add the encounters to the queue; their captures arrive later.")
]
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Retry captures on which the program failed or took too long.")
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch",
        min=1,
        help="Records that are decided and committed together. Default: the setting batch_size, or 256.",
    ),
]
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="Worker processes that extract templates.")]
CaptureSecondsOption = Annotated[
    float, typer.Option("--capture-seconds", min=1, help="Time limit for a capture; a slower worker is killed.")
]


@app.command(rich_help_panel=Panel.JOBS)
def enroll_batch(
    manifest: ManifestArgument,
    result: Annotated[Path, typer.Option("--out", "-o", help="Outcomes, .parquet or .csv.")] = Path("outcomes.parquet"),
    report: PageOption = None,
    announce: AnnounceOption = False,
    retry_failed: RetryOption = False,
    batch: BatchOption = None,
    workers: WorkersOption = 2,
    capture_s_max: CaptureSecondsOption = IsolationConfig.capture_s_max,
    ray: RayOption = None,
    model_id: ModelIdOption = None,
    index: IndexOption = None,
    check: CheckOption = False,
    encoding: EncodingOption = None,
    columns: ColumnsOption = None,
    date_format: DateFormatOption = None,
    ignore_columns: IgnoreColumnsOption = False,
    wait: WaitOption = 0,
    gallery: FolderOption = DEFAULT_GALLERY,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Enrol every person of a manifest who is not enrolled yet.

    An interrupted run resumes when the same command is started again; a completed one changes nothing.
    """
    more = {"batch_size": batch, "gallery.index": index_engines(index)}
    chosen = configured(gallery, config, threads=threads, more=more, usual={"batch_size": 256})
    options = table_options(manifest, encoding, columns, date_format, ignore_columns)
    if check:
        finish_check(jobs.check_encounters(manifest, options), as_json)
    if not jobs.is_gallery(gallery):
        _accept(manifest, result, options)
    with created(gallery, chosen, wait) as engine, jobs.Backlog.open(gallery, chosen) as backlog:
        if announce:
            count = jobs.announce(backlog, manifest, options=options)
            finish({"announced": count}, f"announced {count:,} encounters", as_json)
            return
        with progress_bar(lines=not as_json) as progress, jobs.ray_executor(ray) as executor:
            done = jobs.enroll_batch(
                engine,
                backlog,
                manifest,
                result,
                report=report,
                workers=workers,
                capture_s_max=capture_s_max,
                retry_failed=retry_failed,
                model_id=model_ids(model_id),
                options=options,
                progress=progress,
                executor=executor,
            )
    summary = done.summary() | {"result": str(result)} | ({"report": str(report)} if report else {})
    print_summary(summary if as_json else _labelled(summary, chosen.labels), as_json)
    for outcome in ("duplicate", "review", "refused"):
        if done.outcomes[outcome]:
            raise typer.Exit(MEANINGS[outcome].exit_code)


def _accept(manifest: Path, result: Path, options: jobs.TableOptions) -> None:
    """Raises InvalidInput if the manifest or the name of the result cannot be used, so that no gallery is created for it."""
    from biodedup.jobs.shared.output import check_table_name  # imported here, so that --help does not load pyarrow

    check_table_name(result)
    jobs.accept_encounters(manifest, options)


def _labelled(summary: Mapping[str, object], labels: LabelConfig) -> dict[str, object]:
    """The summary with the register's words for outcomes. If a word is also the name of another count, the outcome is added in brackets."""
    words = {name: labels.of(name) for name in summary}
    return {
        name if word == name else f"{word} ({name})" if word in summary else word: summary[name]
        for name, word in words.items()
    }


@app.command(rich_help_panel=Panel.JOBS)
def status(
    report: PageOption = None,
    gallery: FolderOption = DEFAULT_GALLERY,
    as_json: JsonOption = False,
) -> None:
    """Show the queue of bulk enrolments: how many encounters have each status, since when, and when the queue will be empty."""
    chosen = configured(gallery, None)
    now = jobs.queue_status(gallery, time.time(), chosen)
    if report is not None:
        jobs.write_status_page(report, now, chosen.labels)
    if as_json:
        print_json(now.to_dict())
        return
    show_table(
        (
            (chosen.labels.of(name), f"{line.count:,}", span(line.oldest_s), span(line.median_s))
            for name, line in now.lines.items()
        ),
        ("status", "encounters", "oldest", "median age"),
    )
    say(f"received: {now.intake_hour:,.0f} in the last hour; {now.intake_day:,.1f} per hour in the last day")
    say(
        f"decided: {now.decided_hour:,.0f} per hour in the last hour; {now.decided_day:,.0f} per hour in the last day (from the first "
        "decision in this time, and over at least 10 minutes)"
    )
    say(f"{now.waiting:,} wait; at this rate the queue is empty in {span(now.clear_s) or 'an unknown time'}")
    if now.warning:
        say(f"warning: {now.warning}")
