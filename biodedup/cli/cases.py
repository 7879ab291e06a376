"""Defines the commands on cases: list, show, decide, export. Each calls one method of the engine or one job."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.exits import Exit
from biodedup.cli.opening import acting, configured, existing, looked_into, opened
from biodedup.cli.options import (
    DEFAULT_GALLERY,
    ConfigOption,
    GalleryOption,
    JsonOption,
    PersonOption,
    PurposeOption,
    RegisterUrl,
    SignOption,
    WaitOption,
)
from biodedup.cli.printing import finish, print_evidence, print_json, print_refusals, progress_bar, say, show_table
from biodedup.values import Case, Ruling

cases = typer.Typer(
    no_args_is_help=True, help="Adjudicate: list and show cases in review, decide them, export the verdicts."
)
app.add_typer(cases, name="cases", rich_help_panel=Panel.JOBS)

_SHOWN_MAX = 50


@cases.command("list")
def list_cases(
    result: Annotated[Path | None, typer.Option("--out", "-o", help="Also write a table, .parquet or .csv.")] = None,
    page: Annotated[Path | None, typer.Option("--report", help="Also write an HTML page.")] = None,
    closed: Annotated[bool, typer.Option("--all", help="Also list decided cases.")] = False,
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the cases that wait for a verdict, oldest first."""
    with (
        opened(gallery, configured(gallery, config)) as engine,
        progress_bar(lines=not as_json) as progress,
    ):
        labels = engine.config.labels
        found = jobs.list_cases(engine, result, page=page, closed=closed, progress=progress)
    if as_json:
        print_json(found.summary() | {"cases": [_document(case) for case in found.cases]})
        return
    rows = []
    for case in found.cases[:_SHOWN_MAX]:
        named = [f"{c.subject_id} {c.score_db:.1f} dB" for c in case.undecided]
        days = f"{(found.now - case.opened_at) / 86_400:.1f}"
        state = labels.of(case.decision.outcome) if case.closed else "waiting"
        rows.append((case.encounter_id, case.subject_id, days, ", ".join(named), state))
    if found.cases:
        show_table(rows, ("case", "subject", "days", "candidates", "state"))
    if len(found.cases) > _SHOWN_MAX:
        say(f"... and {len(found.cases) - _SHOWN_MAX:,} more; --out writes all of them")
    say(f"{found.summary()['open']:,} waiting")


@cases.command()
def show(
    encounter_id: str,
    page: Annotated[Path | None, typer.Option("--report", help="Also write an HTML page.")] = None,
    by: PersonOption = "",
    purpose: PurposeOption = "",
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one case: its candidates, the evidence of each capture, the thresholds, and refused captures."""
    with looked_into(gallery, configured(gallery, config), by, purpose) as engine:
        labels = engine.config.labels
        case = engine.case(encounter_id) if page is None else jobs.show_case(engine, encounter_id, page)
    if as_json:
        print_json(_document(case))
        return
    decision = case.decision
    say(f"case {case.encounter_id}, subject {case.subject_id}: {'; '.join(jobs.reasons_of(decision)) or labels.of(decision.outcome)}")  # fmt: skip
    say(f"duplicate from {decision.duplicate_db:.1f} dB, review from {decision.review_db:.1f} dB")
    for candidate in case.undecided:
        which = f"{candidate.subject_id} (open case {candidate.case})" if candidate.case else candidate.subject_id
        say(f"to be judged: {which} at {candidate.score_db:.1f} dB")
        print_evidence(candidate.evidence)
    for verdict in case.verdicts:
        about = "" if verdict.candidate is None else f" {verdict.candidate}"
        say(f"judged{about}: {verdict.ruling}, by {verdict.by}.", *(f"  {line}" for line in verdict.note.splitlines()))
    print_refusals(decision.refusals)
    if page is not None:
        pages = [page.with_name(f"{page.stem}.{number}.html") for number in range(1, len(case.undecided) + 1)]
        beside = [path.name for path in pages if path.exists()]
        say(
            f"the page is {page}"
            + (f"; beside it, an explanation of each candidate: {', '.join(beside)}" if beside else "")
        )


@cases.command()
def decide(
    encounter_id: str,
    ruling: Annotated[str, typer.Argument(metavar="same|different|recapture")],
    by: Annotated[str, typer.Option("--by", help="Who decides.")],
    candidate: Annotated[
        str | None,
        typer.Option(
            "--candidate",
            help="The candidate of the verdict: a subject_id, or the encounter_id of an open case. Needed for `same` if there are several.",
        ),
    ] = None,
    note: Annotated[str, typer.Option("--note", help="Kept with the verdict.")] = "",
    purpose: PurposeOption = "",
    sign: SignOption = None,
    wait: WaitOption = 0,
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record a verdict: the same person, different people, or new captures are needed.

    Exit code 11: the case stays open, because another candidate waits for a verdict.
    """
    chosen = configured(gallery, config)
    with existing(gallery, chosen, wait) as engine:
        linked = engine.case(encounter_id).linked
        decision = acting(engine, by, sign, purpose).adjudicate(
            encounter_id, cast(Ruling, ruling), by, note, candidate=candidate
        )
        case = engine.case(encounter_id)
        others = [engine.case(other) for other in linked]
    known = () if isinstance(gallery, RegisterUrl) else (decision, *(other.decision for other in others))
    for decided in known:  # the queue of bulk enrolments is in the gallery's folder
        jobs.note_verdict(gallery, decided, time.time(), chosen)
    waiting = ", ".join(c.key for c in case.undecided)
    text = {
        "unique": f"{case.subject_id} is enrolled",
        "duplicate": f"{case.subject_id} is a duplicate of {case.verdicts[-1].candidate}; not enrolled",
        "refused": f"refused: {''.join(refusal.detail for refusal in decision.refusals[-1:])}",
        "review": f"still open; to be judged: {waiting or 'the search was incomplete, try again'}",
    }[decision.outcome]
    if others:
        text += "; linked cases: " + ", ".join(
            f"{other.encounter_id} {chosen.labels.of(other.decision.outcome) if other.closed else 'still open'}"
            for other in others
        )
    finish(_document(case), text, as_json)
    raise typer.Exit(Exit.REVIEW if decision.outcome == "review" else Exit.DONE)


@cases.command()
def export(
    result: Annotated[Path, typer.Option("--out", "-o", help="Pairs for `calibrate`, .parquet or .csv.")] = Path(
        "judged.parquet"
    ),
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export the verdicts as pairs of captures with their scores: `same` is mated, `different` is non-mated."""
    with (
        opened(gallery, configured(gallery, config)) as engine,
        progress_bar(lines=not as_json) as progress,
    ):
        exported = jobs.export_outcomes(engine, result, progress=progress)
    text = (
        f"{exported.pairs:,} pairs are in {result}; verdicts: {exported.same:,} same, {exported.different:,} different"
    )
    finish(asdict(exported) | {"result": str(result)}, text, as_json)


def _document(case: Case) -> dict[str, Any]:
    return {
        "encounter_id": case.encounter_id,
        "subject_id": case.subject_id,
        "opened_at": case.opened_at,
        "asks": "update" if case.replaces else "enrol",
        "reasons": list(jobs.reasons_of(case.decision)),
        "undecided": [candidate.key for candidate in case.undecided],
        "linked": list(case.linked),
        "verdicts": [verdict.to_dict() for verdict in case.verdicts],
        "decision": case.decision.to_dict(),
    }
