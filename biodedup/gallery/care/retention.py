"""Retention: finds the decisions and cases whose retention period has ended, and erases them.

Owns the choice of records that are due, and their erasure from the files. Never removes an enrolled subject, its templates, or an open
case.

1. A decision `refused` is due when it is older than its limit. A closed case is due when its last verdict is older than its limit. Requests
   and answers are erased, and the templates of a case that was not enrolled. Their encounter_ids may be used again.
2. Sealed decisions are erased by rewriting their segments. Each segment is one commit. The last commit erases the records of cases and
   records the run. So an interrupted run is continued by the next run.
3. Pairs of rows that were judged different stay judged: they name rows, and no encounter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import InvalidInput
from biodedup.gallery.answers import StoredDecision, inflated, parsed
from biodedup.gallery.files import packed
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.segments.part import PIECE_ROWS, Answers, Column, Int64, Part, sorted_lookup
from biodedup.gallery.segments.reader import Segment
from biodedup.gallery.snapshot import Snapshot

DAY_S = 86_400.0
_STEP = "retention:"


@dataclass(frozen=True)
class Due:
    """The records that are due. refused, cases: encounter_ids, ascending; waiting: open cases older than the limit, which are not
    erased."""

    refused: tuple[str, ...]
    cases: tuple[str, ...]
    waiting: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.refused or self.cases)

    @property
    def digest(self) -> str:
        """The SHA-256 of the encounter_ids, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.refused, self.cases]).encode()).hexdigest()


@dataclass(frozen=True)
class Limits:
    """Decisions and verdicts before these times, in seconds since 1970, are due. None keeps all of them."""

    refused_before: float | None
    cases_before: float | None

    @classmethod
    def of(cls, refused_days: float | None, cases_days: float | None, now: float) -> Limits:
        return cls(*(None if days is None else now - DAY_S * days for days in (refused_days, cases_days)))


def due(gallery: Gallery, limits: Limits) -> Due:
    """The records that are due. It reads every decision in segments with refusals."""
    snapshot, closed, waiting = gallery.snapshot(), set[str](), []
    known = gallery.closed_cases()
    if limits.cases_before is not None:
        closed = {encounter_id for encounter_id, at in known.items() if at < limits.cases_before}
        for encounter_id in gallery.open_cases():
            answer = gallery.answer(encounter_id)
            if answer is not None and _decided_at(answer) < limits.cases_before:
                waiting.append(encounter_id)
    refused: set[str] = set()
    if limits.refused_before is not None:
        for part in snapshot.parts:
            if part.answers.outcomes.get("refused"):
                found = _stored(part.answers)
                refused.update(
                    name for name, stored in found if _is_due(stored, limits.refused_before) and name not in known
                )
    return Due(tuple(sorted(refused)), tuple(sorted(closed)), tuple(waiting))


def erase(gallery: Gallery, limits: Limits, facts: Mapping[str, Any]) -> tuple[Due, int]:
    """Erases the records that are due, and records the run as a job step. facts: for that record, JSON values. Returns (the erased records,
    the number of rewritten segments)."""
    if gallery.problems() is not None:
        raise InvalidInput("a register in PostgreSQL does not support retention yet; its records are kept")
    wanted = due(gallery, limits)
    if not wanted:
        return wanted, 0
    gallery.seal()
    snapshot, rewritten = gallery.snapshot(), 0

    def without(segment: Segment) -> SegmentWithoutAnswers | None:
        nonlocal rewritten
        keep = np.array(list(_kept(segment.answers, wanted, limits.refused_before)), bool)
        removed = snapshot.mask(segment)
        if keep.all() and (removed is None or not wanted.cases):
            return None
        rewritten += 1
        return SegmentWithoutAnswers(segment, keep)

    gallery.rewrite(without)
    with gallery.transaction() as transaction:
        transaction.forget_cases(wanted.cases)
        name = f"{_STEP}{next_number(gallery.snapshot())}"
        transaction.record_step(name, {**facts, "refused": len(wanted.refused), "cases": len(wanted.cases)})
    return wanted, rewritten


def next_number(snapshot: Snapshot) -> int:
    """The number of the next run."""
    return 1 + sum(name.startswith(_STEP) for name in snapshot.steps)


def _kept(answers: Answers, wanted: Due, refused_before: float | None) -> Iterator[bool]:
    """Whether each answer is kept. A refused encounter that was sent again has several answers."""
    cases, refused = set(wanted.cases), set(wanted.refused)
    for name, stored in _stored(answers):
        late = refused_before is not None and name in refused and _is_due(stored, refused_before)
        yield not (name in cases or late)


def _stored(answers: Answers) -> Iterator[tuple[str, StoredDecision]]:
    for low in range(0, answers.count, PIECE_ROWS):
        high = min(low + PIECE_ROWS, answers.count)
        digests, texts = answers.digests(low, high).to_pylist(), answers.texts(low, high).to_pylist()
        for name, digest, data in zip(packed.text(answers.ids(low, high)), digests, texts, strict=True):
            yield name, StoredDecision.read(digest, inflated(data).decode())


def _is_due(stored: StoredDecision, before: float) -> bool:
    return stored.outcome == "refused" and _decided_at(stored) < before


def _decided_at(stored: StoredDecision) -> float:
    at = parsed(stored.text).get("decided_at")
    return float(at) if isinstance(at, (int, float)) else np.inf


class SegmentWithoutAnswers:
    """A segment without some of its answers. Implements `Rows`. keep: the answers to keep, bool (answers,)."""

    def __init__(self, part: Part, keep: NDArray[np.bool_]) -> None:
        self.first_row, self.end_row, self.count = part.first_row, part.end_row, part.count
        self._part = part
        self.answers = _SomeAnswers(part.answers, keep)

    @property
    def columns(self) -> Mapping[str, Column]:
        return self._part.columns

    @property
    def bits(self) -> Mapping[int, int]:
        return self._part.bits

    @property
    def repeated(self) -> NDArray[np.uint64]:
        return self._part.repeated

    def rows(self, positions: Int64) -> Int64:
        return self._part.rows(positions)

    def presence(self, low: int, high: int) -> NDArray[np.uint16]:
        return self._part.presence(low, high)

    def group_sets(self, low: int, high: int) -> NDArray[np.uint32]:
        return self._part.group_sets(low, high)

    def subject_ids(self, low: int, high: int) -> Packed:
        return self._part.subject_ids(low, high)

    def encounter_ids(self, low: int, high: int) -> Packed:
        return self._part.encounter_ids(low, high)

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        return self._part.lookup()


class _SomeAnswers:
    """Some of the answers of a part. Implements `Answers`."""

    def __init__(self, answers: Answers, keep: NDArray[np.bool_]) -> None:
        self._answers = answers
        self._at = np.flatnonzero(keep)
        self.count = len(self._at)

    @cached_property
    def outcomes(self) -> Mapping[str, int]:
        counts = dict.fromkeys(self._answers.outcomes, 0)
        for low in range(0, self.count, PIECE_ROWS):
            texts, digests = (
                self.texts(low, low + PIECE_ROWS).to_pylist(),
                self.digests(low, low + PIECE_ROWS).to_pylist(),
            )
            for digest, data in zip(digests, texts, strict=True):
                counts[StoredDecision.read(digest, inflated(data).decode()).outcome] += 1
        return {outcome: count for outcome, count in counts.items() if count}

    def find(self, encounter_id: str, hashed: np.uint64) -> StoredDecision | None:
        raise NotImplementedError("these answers are only written")

    def ids(self, low: int, high: int) -> Packed:
        return self._some(self._answers.ids, low, high)

    def digests(self, low: int, high: int) -> Packed:
        return self._some(self._answers.digests, low, high)

    def texts(self, low: int, high: int) -> Packed:
        return self._some(self._answers.texts, low, high)

    def _some(self, read: Any, low: int, high: int) -> Packed:
        at = self._at[low:high]
        if not len(at):
            return packed.pack([])
        first = int(at[0])
        return read(first, int(at[-1]) + 1).take(at - first)

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        pieces = [packed.hashes(self.ids(low, low + PIECE_ROWS)) for low in range(0, self.count, PIECE_ROWS)]
        return sorted_lookup(np.concatenate([np.zeros(0, np.uint64), *pieces]))
