"""Lists cases and shows them for adjudication, and exports their verdicts. A case is an encounter that a person has to judge.

Owns the tables and pages of cases. Never decides: `Engine.adjudicate` records a verdict.

1. A table has one row for each case and candidate. A case without candidates has one row.
2. Every file is replaced as a whole. The same gallery and time give the same bytes.
3. Pages and tables hold ids, scores and reasons, but no captures and no templates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from biodedup.common.described import Described
from biodedup.config import LabelConfig
from biodedup.engine import Engine
from biodedup.gallery.files.private import make_private_folder
from biodedup.jobs.explanation.explain import explain_templates
from biodedup.jobs.shared.output import check_table_name, write_table
from biodedup.jobs.shared.page import write_page
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.match.judgement import texts_of
from biodedup.values import Candidate, Case, Decision, Evidence, Verdict, strong

PAGE_CASES_MAX = 200
_DAY_S = 86_400.0

CASE_SCHEMA = pa.schema(
    [
        ("encounter_id", pa.string()),
        ("subject_id", pa.string()),
        ("asks", pa.string()),
        ("outcome", pa.string()),
        ("label", pa.string()),
        ("opened_at", pa.timestamp("us", "UTC")),
        ("age_days", pa.float64()),
        ("reasons", pa.string()),
        ("duplicate_db", pa.float64()),
        ("review_db", pa.float64()),
        ("candidate", pa.string()),
        ("candidate_case", pa.string()),
        ("score_db", pa.float64()),
        ("extrapolated", pa.bool_()),
        ("kind", pa.string()),
        ("ruling", pa.string()),
        ("judged_by", pa.string()),
        ("judged_at", pa.timestamp("us", "UTC")),
        ("note", pa.string()),
    ]
)
PAIR_SCHEMA = pa.schema(
    [
        ("similarity", pa.float64()),
        ("minutiae", pa.float64()),
        ("mated", pa.bool_()),
        ("position", pa.string()),
        ("subject_a", pa.string()),
        ("subject_b", pa.string()),
    ]
)


@dataclass(frozen=True)
class CasesResult(Described):
    """The cases of a gallery. cases: oldest first; now: the time at which their ages are computed, in seconds since 1970."""

    cases: tuple[Case, ...]
    now: float

    def summary(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
        waiting = [case for case in self.cases if not case.closed]
        ages = [(self.now - case.opened_at) / _DAY_S for case in waiting]
        return {
            "open": len(waiting),
            "closed": len(self.cases) - len(waiting),
            "oldest_days": round(max(ages), 1) if ages else 0.0,
            "verdicts": sum(len(case.verdicts) for case in self.cases),
        }


@dataclass(frozen=True)
class ExportResult(Described):
    """The export of verdicts as pairs of captures. cases: cases with a verdict on a candidate; pairs: rows, one for each compared capture; same,
    different: verdicts; without_evidence: verdicts whose candidate has no compared capture."""

    cases: int
    pairs: int
    same: int
    different: int
    without_evidence: int


def list_cases(
    engine: Engine,
    out: Path | None = None,
    *,
    page: Path | None = None,
    closed: bool = False,
    clock: Callable[[], float] = time.time,
    progress: Progress = silent,
) -> CasesResult:
    """Lists the open cases, oldest first, and writes them as a table and an HTML page if paths are given.

    out: the table (.parquet or .csv); page: the page; closed: closed cases that have a verdict are included. Raises InvalidInput,
    GalleryDamaged, StorageUnavailable.
    """
    if out is not None:
        check_table_name(out)
    found = list(engine.cases())
    if closed:
        waiting = {case.encounter_id for case in found}
        judged = dict.fromkeys(verdict.encounter_id for verdict in engine.verdicts())
        found += [engine.case(encounter_id) for encounter_id in judged if encounter_id not in waiting]
    cases = sorted(found, key=lambda case: (case.opened_at, case.encounter_id))
    result = CasesResult(tuple(cases), clock())
    progress("reading cases", len(cases), len(cases))
    if out is not None:
        make_private_folder(out.parent)
        write_table(pa.Table.from_pylist(list(_rows(result, engine.config.labels)), CASE_SCHEMA), out)
    if page is not None:
        make_private_folder(page.parent)
        shown = [_page_entry(case, result.now) for case in cases[:PAGE_CASES_MAX]]
        _write_page(engine, result, page, "Cases to judge", shown)
    return result


def show_case(
    engine: Engine,
    encounter_id: str,
    page: Path,
    *,
    explained: bool = True,
    clock: Callable[[], float] = time.time,
) -> Case:
    """Writes the HTML page of one case. explained: for an open case, also writes a page for each candidate that explains the comparison.

    Raises InvalidInput if the encounter is not a case, GalleryDamaged, StorageUnavailable.
    """
    case = engine.case(encounter_id)
    result = CasesResult((case,), clock())
    make_private_folder(page.parent)
    links = _explain_candidates(engine, case, page) if explained else {}
    shown = _page_entry(case, result.now, links)
    _write_page(engine, result, page, f"Case {encounter_id}", [shown])
    return case


def export_outcomes(engine: Engine, out: Path, *, progress: Progress = silent) -> ExportResult:
    """Writes the verdicts as labelled pairs of captures with their raw scores, for `calibrate`: `same` is mated, `different` is non-mated.

    out: the table (.parquet or .csv). Raises InvalidInput, GalleryDamaged, StorageUnavailable.
    """
    check_table_name(out)
    verdicts = [v for v in engine.verdicts() if v.candidate is not None and v.ruling != "recapture"]
    rows: list[dict[str, Any]] = []
    without_evidence = 0
    for done, verdict in enumerate(verdicts, start=1):
        evidence = _evidence(engine.case(verdict.encounter_id), verdict)
        without_evidence += not evidence
        rows += [_pair(verdict, part) for part in evidence]
        progress("reading verdicts", done, len(verdicts))
    make_private_folder(out.parent)
    write_table(pa.Table.from_pylist(rows, PAIR_SCHEMA), out)
    same = sum(verdict.ruling == "same" for verdict in verdicts)
    cases = len({verdict.encounter_id for verdict in verdicts})
    return ExportResult(cases, len(rows), same, len(verdicts) - same, without_evidence)


def reasons_of(decision: Decision) -> tuple[str, ...]:
    """The reasons why a person has to judge a decision, as sentences."""
    if decision.reasons:
        return texts_of(decision)
    reasons = []
    if any(candidate.score_db >= decision.review_db for candidate in strong(decision)):
        reasons.append("an enrolled person is similar, but not certainly the same person")
    if decision.incomplete:
        reasons.append("part of the gallery could not be searched")
    return tuple(reasons)


def _rows(result: CasesResult, labels: LabelConfig) -> Iterator[dict[str, Any]]:
    for case in result.cases:
        decision = case.decision
        about = {
            "encounter_id": case.encounter_id,
            "subject_id": case.subject_id,
            "asks": _requested_action(case),
            "outcome": decision.outcome,
            "label": labels.of(decision.outcome),
            "opened_at": _microseconds(case.opened_at),
            "age_days": round((result.now - case.opened_at) / _DAY_S, 6),
            "reasons": "; ".join(reasons_of(decision)),
            "duplicate_db": decision.duplicate_db,
            "review_db": decision.review_db,
        }
        for candidate, verdict in _candidates(case):
            row = dict(about)
            if candidate is not None:
                row |= {
                    "candidate": candidate.subject_id,
                    "candidate_case": candidate.case or None,
                    "score_db": candidate.score_db,
                    "extrapolated": candidate.extrapolated,
                    "kind": getattr(candidate, "kind", ""),
                }
            if verdict is not None:
                row |= {
                    "candidate": verdict.candidate,
                    "ruling": verdict.ruling,
                    "judged_by": verdict.by,
                    "judged_at": _microseconds(verdict.at),
                    "note": verdict.note,
                }
            yield row


def _candidates(case: Case) -> list[tuple[Candidate | None, Verdict | None]]:
    """The candidates without a verdict, then the verdicts with their candidates. A verdict on the whole case, or on a former candidate, has no
    candidate here."""
    known = {candidate.key: candidate for candidate in (*case.decision.candidates, *case.decision.cleared)}
    waiting: list[tuple[Candidate | None, Verdict | None]] = [(candidate, None) for candidate in case.undecided]
    judged = [(known.get(verdict.candidate or ""), verdict) for verdict in case.verdicts]
    return waiting + judged or [(None, None)]


def _write_page(
    engine: Engine, result: CasesResult, page: Path, title: str, entries: Sequence[Mapping[str, Any]]
) -> None:
    write_page(
        page,
        "cases.html",
        label=engine.config.labels.of,
        title=title,
        cases=entries,
        summary=result.summary(),
        more=len(result.cases) - len(entries),
        gallery=engine.info()["gallery_id"],
        made=result.now,
    )


def _page_entry(case: Case, now: float, links: dict[str, str] | None = None) -> dict[str, Any]:
    """The values of a case for the template `cases.html`. links: candidate -> name of the page that explains it."""
    decision = case.decision
    listed = _candidates(case)
    names = {candidate.key for candidate, _ in listed if candidate is not None}
    return {
        "case": case,
        "decision": decision,
        "asks": _requested_action(case),
        "disputed": any(verdict.own for verdict in case.verdicts) or case.subject_id in names,
        "age_days": (now - case.opened_at) / _DAY_S,
        "reasons": reasons_of(decision),
        "candidates": [
            {
                "name": candidate.key if candidate is not None else verdict and verdict.candidate,
                "candidate": candidate,
                "kind": candidate.kind.replace("_", " ") if candidate is not None else "",
                "verdict": verdict,
            }
            for candidate, verdict in listed
            if candidate is not None or verdict is not None
        ],
        "strongest_db": max((c.score_db for c, _ in listed if c is not None), default=None),
        "weaker": [candidate for candidate in decision.candidates if candidate.key not in names],
        "templates": [case.templates[column] for column in sorted(case.templates)],
        "links": links or {},
    }


def _requested_action(case: Case) -> str:
    return "update" if case.replaces else "enrol"


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _explain_candidates(engine: Engine, case: Case, page: Path) -> dict[str, str]:
    """Writes a page for each undecided candidate. Returns candidate -> name of its page."""
    links = {}
    existing = [candidate for candidate in case.undecided if candidate.case or candidate.subject_id in engine]
    for number, candidate in enumerate(existing, start=1):
        path = page.with_name(f"{page.stem}.{number}.html")
        names = (case.subject_id, candidate.subject_id)
        templates = engine.case(candidate.case).templates if candidate.case else engine.templates(candidate.subject_id)
        explain_templates(case.templates, templates, path, engine=engine, names=names)
        links[candidate.key] = path.name
    return links


def _evidence(case: Case, verdict: Verdict) -> Sequence[Evidence]:
    known = (*case.decision.candidates, *case.decision.cleared)
    return next((c.evidence for c in known if verdict.candidate in (c.key, c.subject_id)), ())


def _pair(verdict: Verdict, part: Evidence) -> dict[str, Any]:
    return {
        "similarity": part.similarity,
        "minutiae": part.minutiae,
        "mated": verdict.ruling == "same",
        "position": part.column,
        # if a disputed encounter is not of its stated subject, the person is unknown: the encounter_id stands for the subject
        "subject_a": verdict.encounter_id if verdict.own and verdict.ruling == "different" else verdict.subject_id,
        "subject_b": verdict.candidate,
    }
