"""Compares labelled encounters exhaustively: every mated pair, all impostor pairs or a sample of them, and 1:N searches.

Owns the choice of pairs and searches, and the resulting arrays. The engine's `Comparer` computes the evidence; nothing is approximate.

The gallery of the searches holds each subject's first encounter, if it could be enrolled. A subject's later encounters are searched.

1. A search is *mated* if its subject is in the gallery.
2. The same search is also *non-mated*: with its own subject left out of the gallery (leave one out).
3. The only encounter of a subject is searched in this way, too, so that every subject has a non-mated search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.config import Config
from biodedup.embed.extractor import Extractor
from biodedup.jobs.evaluation.labelled import Labelled
from biodedup.jobs.shared.progress import Progress
from biodedup.match.candidates import similarities_of
from biodedup.match.compare import Comparer
from biodedup.match.prints.minutiae import CylinderMatcher
from biodedup.match.ranked import Ranked
from biodedup.match.scores.calibrations import NO_SAMPLE, SAMPLE_SIZE, Calibrations, ImpostorSample
from biodedup.values import BIT, COLUMNS, Float32, Refusal

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Compared pairs. a < b: numbers of the encounters, int64 (n,); mated, extrapolated: bool (n,); score_db, llr_db: float64 (n,). raw:
    (column of a, `similarity` or `minutiae`) -> float64 (n,), NaN if it was not used."""

    a: Int64
    b: Int64
    mated: Bool
    score_db: Float64
    llr_db: Float64
    extrapolated: Bool
    raw: Mapping[tuple[str, str], Float64]


@dataclass(frozen=True, eq=False)
class Searches:
    """Searches. probe: numbers of the encounters, int64 (n,).

    later: bool (n,), the probe is not the subject's first encounter; enrolled: bool (n,), another encounter of the subject is in the gallery;
    searched: bool (n,), the probe has templates. mate_db: float64 (n,), -inf if the mate was not compared; rank: int64 (n,), rank of the mate
    from 1, behind all subjects with the same score; 0 if it was not compared. impostor_db: float64 (n,), the highest score of another subject,
    -inf if there is none; impostor: int64 (n,), the encounter of that subject, or -1.
    """

    probe: Int64
    later: Bool
    enrolled: Bool
    searched: Bool
    mate_db: Float64
    rank: Int64
    impostor_db: Float64
    impostor: Int64


@dataclass(frozen=True, eq=False)
class Comparisons:
    """All comparisons of some encounters. subject: int64 (n,), the number of each encounter's subject; gallery: bool (n,), whether the encounter
    is in the gallery of the searches. nonmated_possible: number of impostor pairs that exist; sampled: `pairs` holds a sample of them."""

    encounters: Sequence[Labelled]
    subject: Int64
    gallery: Bool
    pairs: Pairs
    searches: Searches
    nonmated_possible: int
    sampled: bool
    models: Mapping[str, str]
    calibrations: Calibrations


class _TemplateColumns:
    """Templates in memory, as columns. Implements `Candidates` of the comparer without a loop over rows."""

    def __init__(self, encounters: Sequence[Labelled]) -> None:
        templates = [encounter.templates for encounter in encounters]
        self._presence = np.array([sum(BIT[column] for column in columns) for columns in templates], np.uint16)
        self._models: dict[str, str] = {}
        self._vectors: dict[str, Float32] = {}
        self._index: dict[str, Int64] = {}
        self._records: dict[str, dict[int, bytes]] = {}
        for column in COLUMNS:
            rows = [(row, columns[column]) for row, columns in enumerate(templates) if column in columns]
            if not rows:
                continue
            self._models[column] = rows[0][1].model_id
            vectors = [template.embedding for _, template in rows if template.embedding is not None]
            complete = len(vectors) == len(rows)  # templates of one model either all have an embedding, or none has
            self._vectors[column] = np.array(vectors, np.float32) if complete else np.zeros((len(rows), 0), np.float32)
            self._index[column] = np.zeros(len(templates), np.int64)
            self._index[column][[row for row, _ in rows]] = np.arange(len(rows))
            self._records[column] = {row: template.minutiae for row, template in rows if template.minutiae is not None}

    def presence(self, rows: Int64) -> NDArray[np.uint16]:
        return np.asarray(self._presence[rows])

    def similarities(self, rows: Int64, column: str, probes: Float32, which: Int64) -> Float32 | None:
        vectors = self._vectors[column][self._index[column][rows]]
        return similarities_of(vectors, column, probes, which) if vectors.shape[1] else None

    def minutiae(self, rows: Int64, column: str) -> dict[int, bytes]:
        records = self._records[column]
        return {row: records[row] for row in rows.tolist() if row in records} if records else {}

    def model_ids(self) -> Mapping[str, str]:
        return self._models


def of_one_model(encounters: Sequence[Labelled]) -> list[Labelled]:
    """The encounters with templates of one model in each column. Templates of the less frequent models are refused, as a gallery refuses them."""
    models: dict[str, Counter[str]] = {}
    for encounter in encounters:
        for column, template in encounter.templates.items():
            models.setdefault(column, Counter())[template.model_id] += 1
    kept = {column: counts.most_common(1)[0][0] for column, counts in models.items()}
    return [
        encounter
        if all(template.model_id == kept[column] for column, template in encounter.templates.items())
        else replace(
            encounter,
            templates={c: t for c, t in encounter.templates.items() if t.model_id == kept[c]},
            refusals=(
                *encounter.refusals,
                *(Refusal(c, "other_model") for c, t in encounter.templates.items() if t.model_id != kept[c]),
            ),
        )
        for encounter in encounters
    ]


def compare_all(
    encounters: Sequence[Labelled],
    config: Config,
    rng: np.random.Generator,
    *,
    nonmated_max: int,
    progress: Progress,
) -> Comparisons:
    """Compares all encounters with each other.

    If there are more than nonmated_max impostor pairs, `pairs` has a random sample of about this size (each pair with the same probability).
    Searches always compare with the whole gallery.
    """
    encounters = of_one_model(encounters)
    subject = _subject_numbers(encounters)
    usable = np.array([encounter.enrolled for encounter in encounters], bool)
    first = np.zeros(len(subject), bool)
    first[np.unique(subject, return_index=True)[1]] = True
    gallery = first & usable
    single = np.bincount(subject)[subject] == 1

    compared = np.flatnonzero(usable)
    possible = _impostor_pairs(subject[compared])
    sampled = possible > nonmated_max
    share = nonmated_max / possible if sampled else 1.0

    columns = _TemplateColumns(encounters)
    calibrations = _calibrations(encounters, gallery, columns, config)
    matcher = CylinderMatcher(config.threads)
    comparer = Comparer(calibrations.of, matcher, calibrations.with_minutiae)
    rows = np.arange(len(encounters))
    parts: list[Pairs] = []
    probes = np.flatnonzero(~first | single)
    later = ~first[probes]
    searches = _empty_searches(probes, later, later & np.isin(subject[probes], subject[gallery]), usable[probes])
    search_of = np.full(len(encounters), -1)
    search_of[probes] = np.arange(len(probes))
    try:
        for done, a in enumerate(compared.tolist(), start=1):
            paired = usable & (rows > a)
            if sampled:
                paired &= (subject == subject[a]) | (rng.random(len(rows)) < share)
            searched = gallery & (rows != a) if search_of[a] >= 0 else np.zeros(len(rows), bool)
            ranked = comparer.compare(encounters[a].templates, columns, np.flatnonzero(paired | searched))
            parts.append(_pairs_of(ranked, a, paired, subject, encounters[a]))
            if search_of[a] >= 0:
                _fill_search(searches, int(search_of[a]), ranked, searched, subject, a)
            if done % 64 == 0 or done == len(compared):
                progress("comparing", done, len(compared))
    finally:
        matcher.close()
    return Comparisons(
        encounters=encounters,
        subject=subject,
        gallery=gallery,
        pairs=_concatenated(parts),
        searches=searches,
        nonmated_possible=possible,
        sampled=sampled,
        models=columns.model_ids(),
        calibrations=calibrations,
    )


def _subject_numbers(encounters: Sequence[Labelled]) -> Int64:
    """The number of each encounter's subject. Subjects are numbered in the order of their first encounters."""
    names = dict.fromkeys(encounter.subject_id for encounter in encounters)
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[encounter.subject_id] for encounter in encounters], np.int64)


def _impostor_pairs(subject: Int64) -> int:
    """The number of pairs of encounters of two subjects."""
    encounters = np.unique(subject, return_counts=True)[1]
    return int((len(subject) * (len(subject) - 1) - (encounters * (encounters - 1)).sum()) // 2)


def _calibrations(
    encounters: Sequence[Labelled], gallery: Bool, columns: _TemplateColumns, config: Config
) -> Calibrations:
    samples = {name: _impostor_sample(encounters, gallery, name) for name in set(columns.model_ids().values())}
    use_gallery = config.stated_policy.use_gallery_impostors
    return Calibrations(
        Extractor(config).cards,
        lambda model_id: samples.get(model_id, NO_SAMPLE),
        use_gallery_impostors=lambda: use_gallery,
    )


def _pairs_of(ranked: Ranked, a: int, paired: Bool, subject: Int64, probe: Labelled) -> Pairs:
    kept = paired[ranked.rows]
    b = ranked.rows[kept]
    raw = {}
    for column in probe.templates:
        for kind, values in zip(("similarity", "minutiae"), ranked.raw(column), strict=True):
            raw[column, kind] = values[kept]
    return Pairs(
        a=np.full(len(b), a, np.int64),
        b=b,
        mated=subject[b] == subject[a],
        score_db=ranked.score_db[kept],
        llr_db=ranked.llr_db[kept],
        extrapolated=ranked.extrapolated()[kept],
        raw=raw,
    )


def _fill_search(searches: Searches, at: int, ranked: Ranked, searched: Bool, subject: Int64, a: int) -> None:
    """Sets the results of one search. at: number of the search; searched: bool (encounters,), the gallery; a: the probe's encounter."""
    kept = searched[ranked.rows]
    rows, score_db, llr_db = ranked.rows[kept], ranked.score_db[kept], ranked.llr_db[kept]
    mate = subject[rows] == subject[a]
    if (~mate).any():
        strongest = int(np.argmax(~mate))  # rows are ordered by descending score
        searches.impostor_db[at], searches.impostor[at] = score_db[strongest], rows[strongest]
    if mate.any():
        (i,) = np.flatnonzero(mate)
        at_least = (score_db > score_db[i]) | ((score_db == score_db[i]) & (llr_db >= llr_db[i]))
        searches.mate_db[at], searches.rank[at] = score_db[i], np.count_nonzero(at_least)


def _empty_searches(probes: Int64, later: Bool, enrolled: Bool, searched: Bool) -> Searches:
    count = len(probes)
    return Searches(
        probe=probes,
        later=later,
        enrolled=enrolled,
        searched=searched,
        mate_db=np.full(count, -np.inf),
        rank=np.zeros(count, np.int64),
        impostor_db=np.full(count, -np.inf),
        impostor=np.full(count, -1, np.int64),
    )


def _concatenated(parts: Sequence[Pairs]) -> Pairs:
    kinds = {"a": np.int64, "b": np.int64, "mated": bool, "score_db": float, "llr_db": float, "extrapolated": bool}
    whole: dict[str, NDArray[Any]] = {
        name: np.concatenate([np.zeros(0, kind), *(getattr(part, name) for part in parts)])
        for name, kind in kinds.items()
    }
    raw = {}
    for column in COLUMNS:
        for kind in ("similarity", "minutiae"):
            key = (column, kind)
            raw_parts = [part.raw[key] if key in part.raw else np.full(len(part.a), np.nan) for part in parts]
            values = np.concatenate([np.zeros(0), *raw_parts])
            if not np.isnan(values).all():
                raw[key] = values
    return Pairs(**whole, raw=raw)


def _impostor_sample(encounters: Sequence[Labelled], gallery: Bool, model_id: str) -> ImpostorSample:
    """A sample of a model's embeddings, one for each subject of the gallery, as a real gallery keeps for its calibration."""
    enrolled = (encounters[row].templates for row in np.flatnonzero(gallery).tolist())
    first = (next((t.embedding for t in columns.values() if t.model_id == model_id), None) for columns in enrolled)
    vectors = [vector for vector in first if vector is not None][:SAMPLE_SIZE]
    return ImpostorSample(model_id, len(vectors), lambda: np.array(vectors, np.float32)) if vectors else NO_SAMPLE
