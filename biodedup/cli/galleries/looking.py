"""Defines the commands that show the content of a gallery: list, subject, callers. Each calls one method of the engine or one job."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.opening import configured, looked_into, opened
from biodedup.cli.options import DEFAULT_GALLERY, ConfigOption, GalleryOption, JsonOption, PersonOption, PurposeOption
from biodedup.cli.printing import counted, print_json, say, show_table
from biodedup.values import ListedSubject


@app.command("list", rich_help_panel=Panel.GALLERY)
def list_subjects(
    group: Annotated[list[str] | None, typer.Option("--group", help="Only subjects of this group. Repeatable.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="List at most this many subjects.")] = 50,
    result: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all subjects to a table, .parquet or .csv.")
    ] = None,
    by: PersonOption = "",
    purpose: PurposeOption = "",
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the enrolled subjects, in order of enrolment, with their groups and columns."""
    with looked_into(gallery, configured(gallery, config), by, purpose) as engine:
        count = len(engine) if not group else sum(1 for _ in engine.subjects(group))
        first = list(islice(engine.subjects(group), limit))
        groups = engine.groups()
        if result is not None:
            jobs.write_subjects(engine, result, groups=group)
    if as_json:
        print_json({"subjects": count, "listed": [subject.to_dict() for subject in first], "groups": groups})
        return
    if first:
        show_table(map(_cells, first), ("subject", "rows", "groups", "columns"))
    more = f"; {count - len(first):,} more, --out FILE writes all" if count > len(first) and result is None else ""
    where = f", in the groups {', '.join(group)}" if group else ""
    say(f"{counted(count, 'subject')}{where}{more}" + (f"; all are in {result}" if result is not None else ""))
    if groups and not group:
        names = ", ".join(f"{name} {number:,}" for name, number in islice(groups.items(), 20))
        say(f"groups: {names}" + (f", and {len(groups) - 20:,} more" if len(groups) > 20 else ""))


def _cells(subject: ListedSubject) -> tuple[str, str, str, str]:
    return subject.subject_id, str(len(subject.rows)), ", ".join(subject.groups), ", ".join(subject.columns)


@app.command("subject", rich_help_panel=Panel.GALLERY)
def show_subject(
    subject_id: str,
    by: PersonOption = "",
    purpose: PurposeOption = "",
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the records of one subject: rows, groups, decisions, open cases. Shows no biometric data."""
    with looked_into(gallery, configured(gallery, config), by, purpose) as engine:
        subject, labels = engine.subject(subject_id), engine.config.labels
    if as_json:
        print_json(subject.to_dict())
        return
    state = "enrolled" if subject.enrolled else "not enrolled"
    say(f"{subject.subject_id}: {state}" + (f", in the groups {', '.join(subject.groups)}" if subject.groups else ""))
    rows = [
        (
            str(encounter.row),
            encounter.encounter_id,
            ", ".join(encounter.groups),
            ", ".join(f"{name}{_quality(t.quality)}" for name, t in encounter.templates.items()),
            ", ".join(dict.fromkeys(template.model_id for template in encounter.templates.values())),
        )
        for encounter in subject.encounters
    ]
    if rows:
        show_table(rows, ("row", "encounter", "groups", "columns (quality)", "models"))
    history = [
        (
            _moment(decision.decided_at),
            decision.encounter_id or "",
            labels.of(decision.outcome),
            "" if decision.best is None else f"{decision.best.key} {decision.best.score_db:.1f} dB",
            "" if decision.adjudicated is None else f"{decision.adjudicated.ruling}, by {decision.adjudicated.by}",
        )
        for decision in subject.decisions
    ]
    if history:
        show_table(history, ("decided at (UTC)", "encounter", "outcome", "strongest candidate", "verdict"))
    for encounter_id in subject.open_cases:
        say(f"waits for a verdict: {encounter_id}; biodedup cases show {encounter_id}")


@app.command("callers", rich_help_panel=Panel.GALLERY)
def show_callers(
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the lock-outs of callers that approached a subject, and the requests for calls that need two people."""
    with opened(gallery, configured(gallery, config)) as engine:
        alarms, approvals = engine.alarms(), engine.approvals()
    if as_json:
        print_json({"alarms": [a.to_dict() for a in alarms], "approvals": [a.to_dict() for a in approvals]})
        return
    if alarms:
        show_table(
            [(_moment(a.at), a.kind, a.caller, a.subject_id) for a in alarms],
            ("at (UTC)", "alarm", "caller", "subject"),
        )
    rows = [
        (
            str(a.number),
            a.action,
            a.requested_by,
            _moment(a.requested_at),
            a.approved_by or "",
            _moment(a.approved_at or 0),
        )
        for a in approvals
    ]
    if rows:
        show_table(rows, ("request", "action", "asked by", "at (UTC)", "approved by", "at (UTC)"))
    say(f"{len(alarms)} alarms, {len(approvals)} requests")


def _quality(quality: float | None) -> str:
    return "" if quality is None else f" ({quality:.3g})"


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}" if seconds else ""
