"""Looks up subjects: their rows, groups, decisions and open cases.

Owns the results of `Engine.subject`, `subjects`, `decisions` and `groups`. Never changes anything and never compares templates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import islice

import numpy as np

from biodedup.errors import UnknownSubject
from biodedup.gallery.answers import StoredDecision, from_json, inflated
from biodedup.gallery.files import packed
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.segments.part import PIECE_ROWS
from biodedup.gallery.snapshot import Snapshot
from biodedup.values import COLUMNS, Decision, ListedSubject, Subject

_BATCH = 1_024


def subject_of(gallery: Gallery, subject_id: str) -> Subject:
    """The rows, decisions and open cases of a subject. Raises UnknownSubject for an id that is not enrolled and has no decision."""
    snapshot = gallery.snapshot()
    decisions = tuple(decisions_of(gallery, subject_id))
    encounters = tuple(snapshot.encounters_of(subject_id))
    if not encounters and not decisions:
        raise UnknownSubject(f"subject {subject_id!r} is not enrolled, and has no decision; check the id")
    waiting = tuple(snapshot.pending[row] for row in snapshot.pending_under(subject_id))
    return Subject(subject_id, encounters, decisions, waiting)


def decisions_of(gallery: Gallery, subject_id: str | None) -> Iterator[Decision]:
    """The decisions on one subject, or on all, in the order of the first answers. It reads every answer, because answers are not indexed by
    subject."""
    snapshot = gallery.snapshot()
    needle = None if subject_id is None else json.dumps(subject_id).encode()
    for part in snapshot.parts:
        answers = part.answers
        for low in range(0, answers.count, PIECE_ROWS):
            high = min(low + PIECE_ROWS, answers.count)
            ids, digests, texts = (read(low, high) for read in (answers.ids, answers.digests, answers.texts))
            for i, data in enumerate(texts):
                text = inflated(data.as_py())
                if needle is not None and needle not in text:
                    continue
                stored = StoredDecision.read(digests[i].as_py(), text.decode())
                decision = _present_decision(gallery, snapshot, packed.text(ids[i : i + 1])[0], stored)
                if decision is not None and subject_id in (None, decision.subject_id):
                    yield decision


def _present_decision(
    gallery: Gallery, snapshot: Snapshot, encounter_id: str, stored: StoredDecision
) -> Decision | None:
    """The present decision of a stored answer. None for an answer that is not a decision, and for a refusal that a later decision on the
    same encounter has replaced."""
    if stored.kind != "decision":
        return None
    if stored.outcome == "refused":
        newest = snapshot.answer(encounter_id)
        return from_json(stored.text) if newest is None or newest.text == stored.text else None
    if stored.outcome == "review":
        stored = gallery.answer(encounter_id) or stored
    return from_json(stored.text)


def listed(snapshot: Snapshot, groups: Collection[str] | None) -> Iterator[ListedSubject]:
    """The enrolled subjects, in the order of enrolment. groups: only subjects in one of these groups; None for all."""
    ids = snapshot.all_subject_ids()
    while batch := list(islice(ids, _BATCH)):
        which, rows = snapshot.all_rows_of(packed.pack_text(batch))
        order = np.argsort(which, kind="stable")
        numbers = rows[order].tolist()
        facts = zip(
            which[order].tolist(),
            numbers,
            snapshot.encounter_ids(numbers),
            snapshot.groups(numbers),
            snapshot.presence(numbers).tolist(),
            strict=True,
        )
        of: list[list[tuple[int, str, frozenset[str], int]]] = [[] for _ in batch]
        for index, *fact in facts:
            of[index].append(tuple(fact))
        for subject_id, several in zip(batch, of, strict=True):
            own = frozenset[str]().union(*(names for _, _, names, _ in several))
            if groups is None or own.intersection(groups):
                bits = int(np.bitwise_or.reduce([bits for *_, bits in several]))
                columns = tuple(name for bit, name in enumerate(COLUMNS) if bits >> bit & 1)
                encounters = tuple(encounter_id for _, encounter_id, _, _ in several)
                yield ListedSubject(
                    subject_id, tuple(row for row, *_ in several), encounters, tuple(sorted(own)), columns
                )


def group_counts(snapshot: Snapshot) -> dict[str, int]:
    """group -> the number of enrolled subjects in it, ordered by name. A subject with several rows counts once."""
    enrolled, counts = snapshot.enrolled, Counter[str]()
    several = (
        {int(hashed) for part in snapshot.parts for hashed in part.repeated.tolist()} if snapshot.extra_rows else set()
    )
    known = np.array(sorted(several), np.uint64)
    numbers = Counter[int]()
    groups_of: dict[int, set[str]] = {}
    for part in snapshot.parts:
        mask = enrolled.mask(part)
        for low in range(0, part.count, PIECE_ROWS):
            high = min(low + PIECE_ROWS, part.count)
            live = np.ones(high - low, bool) if mask is None else mask[low:high]
            sets = part.group_sets(low, high)
            if len(known):
                hashes = packed.hashes(part.subject_ids(low, high))
                shared = live & np.isin(hashes, known)
                for at in np.flatnonzero(shared).tolist():
                    names = snapshot.group_sets.get(int(sets[at]), frozenset())
                    groups_of.setdefault(int(hashes[at]), set()).update(names)
                live = live & ~shared
            present, times = np.unique(sets[live], return_counts=True)
            numbers.update(dict(zip(present.tolist(), times.tolist(), strict=True)))
    for number, count in numbers.items():
        counts.update(dict.fromkeys(snapshot.group_sets.get(number, ()), count))
    for joined in groups_of.values():
        counts.update(joined)
    return dict(sorted(counts.items()))
