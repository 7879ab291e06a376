"""Defines the commands on one subject: enroll, identify, verify, update, remove. Each calls one method of the engine."""

from __future__ import annotations

from typing import Annotated

import typer

import biodedup as bd
from biodedup.cli.base import Panel, app
from biodedup.cli.exits import Exit
from biodedup.cli.opening import acting, configured, created, existing, looked_into
from biodedup.cli.options import (
    DEFAULT_GALLERY,
    AcrossOption,
    ConfigOption,
    DpiOption,
    EncounterOption,
    FaceOption,
    FingerOption,
    GalleryOption,
    GroupOption,
    IndexOption,
    JsonOption,
    MissingOption,
    PersonOption,
    PurposeOption,
    SignOption,
    ThreadsOption,
    WaitOption,
    captures_of,
    index_engines,
)
from biodedup.cli.printing import complain, finish, finish_decision, print_evidence, print_json, print_refusals, say
from biodedup.errors import InvalidInput, UnknownSubject
from biodedup.values import Encounter

_LATER_SIZE = 1_000_000
"""Number of subjects for which the first enrolment states the threshold, as an example."""


@app.command(rich_help_panel=Panel.SUBJECTS)
def enroll(
    subject_id: str,
    face: FaceOption = None,
    finger: FingerOption = None,
    missing: MissingOption = None,
    dpi: DpiOption = None,
    encounter_id: EncounterOption = None,
    group: GroupOption = None,
    across_positions: AcrossOption = False,
    index: IndexOption = None,
    wait: WaitOption = 0,
    gallery: GalleryOption = DEFAULT_GALLERY,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Enrol a subject, unless the person is enrolled already."""
    captures = captures_of(face, finger, missing, dpi)
    encounter = Encounter(subject_id, captures, encounter_id=encounter_id, groups=group or ())
    chosen = configured(gallery, config, threads=threads, more={"gallery.index": index_engines(index)})
    with created(gallery, chosen, wait) as engine:
        decision = engine.enroll(encounter, across_positions=across_positions or None)
        note = "" if decision.gallery_size else _threshold_note(decision, engine.policy)
        finish_decision(decision, as_json, captures, note, labels=engine.config.labels)


def _threshold_note(decision: bd.Decision, policy: bd.Policy) -> str:
    """Explains the thresholds of the first decision in an empty gallery."""
    later_db, _ = policy.thresholds_db(_LATER_SIZE)
    return (
        f"the gallery was empty. Of pairs of different people, one in {10 ** (decision.duplicate_db / 10):,.0f} scores "
        f"{decision.duplicate_db:.0f} dB. The thresholds rise with the number of subjects: duplicate from {later_db:.0f} dB at {_LATER_SIZE:,}"
    )


@app.command(rich_help_panel=Panel.SUBJECTS)
def identify(
    face: FaceOption = None,
    finger: FingerOption = None,
    dpi: DpiOption = None,
    group: GroupOption = None,
    across_positions: AcrossOption = False,
    from_db: Annotated[
        float | None,
        typer.Option(help="Also list weaker candidates with at least this score. The outcome stays the same."),
    ] = None,
    by: PersonOption = "",
    purpose: PurposeOption = "",
    gallery: GalleryOption = DEFAULT_GALLERY,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search the gallery for the person on these captures. It only writes the record of the call, if --by is given."""
    encounter = Encounter(None, captures_of(face, finger, None, dpi))
    chosen = configured(gallery, config, threads=threads)
    with looked_into(gallery, chosen, by, purpose, searched=True) as engine:
        if group and not by:  # a caller's role may allow a search, but not the list of groups
            known = engine.groups()
            absent = [name for name in group if name not in known]
            if absent:
                complain(f"no subject is in the group {', '.join(map(repr, absent))}; `biodedup list` shows the groups")
        decision = engine.identify(
            encounter, groups=group or None, across_positions=across_positions or None, from_db=from_db
        )
        finish_decision(decision, as_json, encounter.captures, labels=engine.config.labels)


@app.command(rich_help_panel=Panel.SUBJECTS)
def verify(
    subject_id: str,
    face: FaceOption = None,
    finger: FingerOption = None,
    dpi: DpiOption = None,
    by: PersonOption = "",
    purpose: PurposeOption = "",
    gallery: GalleryOption = DEFAULT_GALLERY,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare captures with one enrolled subject."""
    encounter = Encounter(None, captures_of(face, finger, None, dpi))
    chosen = configured(gallery, config, threads=threads)
    with looked_into(gallery, chosen, by, purpose, searched=True) as engine:
        result = engine.verify(encounter, subject_id)
        disclosed = engine.policy.disclosure == "full"
    if as_json:
        print_json(result.to_dict())
    else:
        word = "accepted" if result.accepted else "not accepted"
        say(f"{word}: {result.score_db:.1f} dB, threshold {result.threshold_db:.1f} dB")
        print_evidence(result.evidence)
        print_refusals(result.refusals, encounter.captures)
        if disclosed and not result.evidence and not result.refusals:
            say(
                "  nothing was compared: the subject has no enrolled capture of this kind; `biodedup subject ID` lists the enrolled ones"
            )
    raise typer.Exit(Exit.DONE if result.accepted else Exit.NOT_ACCEPTED)


@app.command(rich_help_panel=Panel.SUBJECTS)
def update(
    subject_id: str,
    face: FaceOption = None,
    finger: FingerOption = None,
    missing: MissingOption = None,
    dpi: DpiOption = None,
    encounter_id: EncounterOption = None,
    group: GroupOption = None,
    across_positions: AcrossOption = False,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace all encounters of the subject, without verification."),
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="The reason for --replace; kept with the decision.")] = "",
    by: PersonOption = "",
    purpose: PurposeOption = "",
    sign: SignOption = None,
    wait: WaitOption = 0,
    gallery: GalleryOption = DEFAULT_GALLERY,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add an encounter to an enrolled subject, if it verifies against the subject.

    Otherwise it becomes a case for adjudication (exit code 11).
    """
    if replace != bool(reason.strip()):
        raise InvalidInput(
            "--replace and --reason TEXT go together: state why everything enrolled of the subject is replaced"
        )
    captures = captures_of(face, finger, missing, dpi)
    encounter = Encounter(subject_id, captures, encounter_id=encounter_id, groups=group or ())
    with existing(gallery, configured(gallery, config, threads=threads), wait) as engine:
        across = across_positions or None
        decision = acting(engine, by, sign, purpose).update(
            encounter, across_positions=across, replace=replace, reason=reason
        )
        note = f"{subject_id}: {'all encounters were replaced by this one' if replace else 'this encounter was added'}"
        finish_decision(decision, as_json, captures, note, labels=engine.config.labels)


@app.command(rich_help_panel=Panel.SUBJECTS)
def remove(
    subject_ids: Annotated[list[str], typer.Argument(metavar="SUBJECT_ID...")],
    by: PersonOption = "",
    purpose: PurposeOption = "",
    sign: SignOption = None,
    wait: WaitOption = 0,
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove subjects. If one of them is not enrolled, none is removed. The next search does not return them."""
    subject_ids = list(dict.fromkeys(subject_ids))
    with existing(gallery, configured(gallery, config), wait) as engine:
        absent = [name for name, there in zip(subject_ids, engine.are_enrolled(subject_ids), strict=True) if not there]
        if absent:
            raise UnknownSubject(f"not enrolled: {', '.join(map(repr, absent))}; nothing was removed, correct the ids")
        acting(engine, by, sign, purpose).remove(*subject_ids)
        size = len(engine)
    finish({"removed": subject_ids, "subjects": size}, f"removed {len(subject_ids)}, {size:,} remain", as_json)
