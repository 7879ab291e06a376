"""`doctor --canaries`: tests whether searches still find enrolled subjects, with canaries: synthetic mates of some of them.

Owns the searches for canaries (`canary_file.py`) and the verdict on the results. Never repairs.

Checksums prove that files are unchanged. They do not reveal a row that an index lost, codes that were wrong before their checksum was computed,
a kernel that computes wrongly on this processor, or a search plan with a wrong statistical model. So there are three tests:

1. The stored templates of every canary's subject are compared with the canary: are they unchanged?
2. `engine.search` searches for every canary with an embedding. The expected number of canaries that it finds follows from the similarities of
   impostors at the present size, and from `miss_risk`. If it misses a canary, numpy compares the canary with all stored rows; if numpy finds
   the subject, the search lost it. Losses that `miss_risk` allows are searched again with a risk of zero.
3. `engine.identify` runs for a few canaries with all their columns, minutiae included. 1:1 verification tells which of them it should find.

An alarm means: in a gallery that loses no more than `miss_risk`, so many losses have a probability below `FALSE_ALARM` (for all tests of a run
together). A second view of the gallery, independent of the engine's, provides the stored rows. It is taken before the engine's view and again
after it. A row that is live in both is also live in the engine's view, so that a subject that is removed during the run is not a loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrc, betainc, pdtr

from biodedup.config import Config
from biodedup.engine import Engine
from biodedup.errors import GalleryDamaged, StorageUnavailable
from biodedup.gallery.files.encryption.transform import Transform
from biodedup.gallery.files.filesystem import LocalStorage, Storage
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.segments.part import PIECE_ROWS, Int64
from biodedup.gallery.snapshot import Snapshot
from biodedup.jobs.health.canary_file import (
    Canaries,
    Canary,
    load,
    place_of,
    record_hash,
    save,
    standing,
    topped_up,
)
from biodedup.jobs.health.canary_report import REMAKE, Watch, Watched, changes_of, line_of, problems_of, vanished
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.values import Encounter, Float32, Template

COUNT = 200
SEED = 0
FALSE_ALARM = 1e-4
"""Upper bound on the probability that a sound gallery raises an alarm in one run, over all columns."""
FIRST = 20
"""A canary is found if its subject is among so many first candidates."""
IDENTIFIED = 24
"""Number of canaries that are identified with all their columns; the same number again for each column that has only minutiae."""

_COSINE_TOLERANCE = 0.01  # merging segments may encode an embedding again, which changes a cosine by about 0.0006
_SIMILARITY_TOLERANCE = 1e-3  # between a similarity of the search and of numpy
_TIE = 1e-4
_SAMPLE_ROWS = 4096


def watch(
    gallery: Path,
    config: Config | None = None,
    *,
    count: int = COUNT,
    seed: int = SEED,
    storage: Storage | None = None,
    progress: Progress = silent,
) -> Watch:
    """Searches for the gallery's canaries, and judges the results. Makes canaries if there are none, and more if the gallery has grown.

    count: approximate number of canaries in each column. Changes no file except that of the canaries; if this cannot be written, the canaries
    in memory are searched. Raises the errors of opening a gallery.
    """
    config = config or Config()
    storage = storage or LocalStorage(config.keys)
    with (
        closing(Gallery.open_to_read(gallery, storage, config.gallery, config.subject_keys)) as stored,
        Engine.open(gallery, config, read_only=True, storage=storage) as engine,
    ):
        try:
            known = load(storage, gallery)
        except GalleryDamaged as error:
            return Watch(problems=(f"canaries: their file is damaged ({error}); {REMAKE}",))
        if known is not None and known.gallery_id != stored.gallery_id:
            return Watch(problems=(f"canaries: their file belongs to another gallery; {REMAKE}",))
        snapshot = stored.snapshot().enrolled
        now = standing(known or Canaries(stored.gallery_id, snapshot.version, seed, ()), snapshot)
        kept = Canaries(stored.gallery_id, snapshot.version, seed if known is None else known.seed, now.kept)
        problems, is_kept, searched = vanished(now, known, snapshot.version), True, kept
        if not problems:
            searched = topped_up(kept, snapshot, count)
            if known is None or searched.version != known.version or searched.each != known.each:
                is_kept = _saved(storage, gallery, searched, snapshot.transform)
        made = len(searched.each) - len(kept.each)
        engine.refresh()
        stored.refresh()
        present = standing(searched, stored.snapshot().enrolled).present
        run = _Run(gallery, config, storage, engine, stored, progress)
        columns = run.columns(present)
        problems += [problem for column in columns for problem in problems_of(column)] + run.incomplete
        lines = [line_of(column) for column in columns if not problems_of(column)]
        lines += changes_of(made, now, known, is_kept, searched)
        return Watch(
            columns=tuple(columns),
            made=made,
            removed=len(now.removed),
            gone=len(now.gone),
            kept_in_file=is_kept,
            checked=tuple(lines),
            problems=tuple(problems),
        )


def forget_removed(gallery: Path, config: Config | None = None, *, storage: Storage | None = None) -> int:
    """Deletes the canaries of removed subjects. It is called before a compaction, which erases the subjects' templates. Returns the number of
    deleted canaries.

    Does not change a damaged file, or a file of another gallery. Raises the errors of opening a gallery.
    """
    storage = storage or LocalStorage((config or Config()).keys)
    with closing(Gallery.open_to_read(gallery, storage, Config().gallery)) as stored:
        try:
            known = load(storage, gallery)
        except GalleryDamaged:
            return 0
        if known is None or known.gallery_id != stored.gallery_id:
            return 0
        now = standing(known, stored.snapshot().enrolled)
        removed = {*now.removed, *now.gone}
        if removed:
            left = replace(known, each=tuple(canary for canary in known.each if canary not in removed))
            save(storage, gallery, left, stored.snapshot().transform)
        return len(removed)


def _saved(storage: Storage, gallery: Path, canaries: Canaries, transform: Transform | None) -> bool:
    try:
        save(storage, gallery, canaries, transform)
    except StorageUnavailable:  # a read-only copy or a full disk: the canaries in memory can still be searched
        return False
    return True


# searching -------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """One run of the tests. engine: the engine under test; stored: the second view, the reference for enrolled rows; incomplete: problems of
    incomplete searches."""

    gallery: Path
    config: Config
    storage: Storage
    engine: Engine
    stored: Gallery
    progress: Progress

    incomplete: list[str] = field(default_factory=list)

    def columns(self, present: Sequence[Canary]) -> list[Watched]:
        snapshot = self.stored.snapshot()
        names = [name for name in snapshot.models if any(name in canary.mates for canary in present)]
        alpha = FALSE_ALARM / (2 * len(names) + 1)
        found = []
        for done, name in enumerate(names):
            self.progress("canaries", done, len(names) + 1)
            canaries = [canary for canary in present if name in canary.mates]
            if snapshot.models[name].dimension is None:
                found.append(self._records(name, canaries))
            else:
                found.append(self._column(name, canaries, alpha))
        if present:
            self.progress("canaries", len(names), len(names) + 1)
            found.append(self._identified(present, alpha))
        self.progress("canaries", len(names) + 1, len(names) + 1)
        return found

    def _records(self, name: str, canaries: Sequence[Canary]) -> Watched:
        """Tests whether the records of a column that has only minutiae are unchanged. `_identified` searches for them."""
        changed = self._changed_records(name, canaries)
        kept = len(canaries) - len(changed)
        return _with_changed(
            Watched(
                column=name,
                canaries=len(canaries),
                found=kept,
                first=kept,
                among=0,
                expected_min=len(canaries),
                expected_first_min=len(canaries),
                p_found=1.0,
                p_first=1.0,
            ),
            self,
            changed,
        )

    def _column(self, name: str, canaries: Sequence[Canary], alpha: float) -> Watched:
        """Tests 1 and 2 for a column of embeddings. alpha: significance level of each test."""
        snapshot = self.stored.snapshot()
        probes = np.array([canary.mates[name].embedding for canary in canaries], np.float32)
        stored = snapshot.embeddings([canary.row for canary in canaries], name)
        cosine = np.einsum("ij,ij->i", stored, probes)
        made_at = np.array([canary.mates[name].cosine for canary in canaries])
        changed = [
            canary for canary, off in zip(canaries, np.abs(cosine - made_at) > _COSINE_TOLERANCE, strict=True) if off
        ]
        changed += [canary for canary in self._changed_records(name, canaries) if canary not in changed]
        result = self.engine.unrestricted().search({name: probes}, k=FIRST)
        if result.incomplete:
            self.incomplete.append(f"canaries {name}: the search is incomplete; see the log for the shard that failed")
        place = _places(result.ids, canaries)
        plan = self.engine.plan([name]).columns[0]
        risk = 0.0
        if plan.coded_rows:
            risk = max(self.config.search.miss_risk, plan.miss_bound or 0.0, plan.by_tables or 0.0)
        first, among = _expected(snapshot, name, probes, cosine, plan.rows)
        at = np.flatnonzero(place < FIRST)
        miscomputed = int((np.abs(result.similarity[at, place[at]] - cosine[at]) > _SIMILARITY_TOLERANCE).sum())
        suspects = np.flatnonzero(((place > 0) & (first >= 0.5)) | ((place >= FIRST) & (among >= 0.5)))
        rank = _exact_rank(
            self.stored.snapshot(),
            name,
            probes[suspects],
            cosine[suspects],
            [canaries[i].row for i in suspects.tolist()],
        )
        lost = suspects[(rank <= FIRST) & (place[suspects] >= rank)]
        p_lost = float(bdtrc(len(lost) - 1, len(canaries), risk)) if len(lost) else 1.0
        certain = 0
        if len(lost) and p_lost >= alpha:
            certain = self._lost_for_certain(name, [canaries[i] for i in lost.tolist()], probes[lost])
        watched = _counted(name, place, first * (1 - risk), among * (1 - risk), alpha)
        watched = replace(
            watched,
            lost=len(lost),
            p_lost=p_lost,
            certain=certain,
            lost_in=self._where([canaries[i] for i in lost.tolist()], canaries),
            miscomputed=miscomputed,
            alarm=p_lost < alpha or certain > 0,
        )
        return _with_changed(watched, self, changed)

    def _lost_for_certain(self, name: str, lost: Sequence[Canary], probes: Float32) -> int:
        """The number of lost canaries that a search with a miss risk of zero does not find either."""
        config = replace(self.config, search=replace(self.config.search, miss_risk=0.0))
        with Engine.open(self.gallery, config, read_only=True, storage=self.storage) as engine:
            place = _places(engine.unrestricted().search({name: probes}, k=FIRST).ids, lost)
        self.stored.refresh()  # subjects may have been removed meanwhile
        snapshot = self.stored.snapshot()
        return sum(
            at >= FIRST and snapshot.is_present(canary.row) for canary, at in zip(lost, place.tolist(), strict=True)
        )

    def _identified(self, present: Sequence[Canary], alpha: float) -> Watched:
        """Test 3: identifies canaries that must be found, because their 1:1 score reaches the review threshold and their strongest column makes
        them candidates."""
        engine = self.engine.unrestricted()
        models = self.stored.snapshot().models
        chosen = set(_spread(present))
        for name, model in models.items():
            if model.dimension is None:
                chosen |= set(_spread([canary for canary in present if name in canary.mates]))
        searched, places, impostors = [], [], []
        for canary in sorted(chosen, key=lambda canary: canary.row):
            encounter = Encounter(
                templates={
                    name: Template(name, models[name].model_id, mate.embedding, mate.minutiae)
                    for name, mate in canary.mates.items()
                }
            )
            decision = engine.identify(encounter)
            names = [candidate.subject_id for candidate in decision.candidates]
            place = names.index(canary.subject_id) if canary.subject_id in names else FIRST
            if place >= FIRST and decision.incomplete:
                continue  # part of the gallery was not searched
            stronger = 0.0  # expected number of impostors with a higher score
            if canary.subject_id in engine:
                alone = engine.verify(encounter, canary.subject_id)
                scanned = max((e.score_db for e in alone.evidence if e.similarity is not None), default=alone.score_db)
                in_scan, stronger = (len(engine) * 10 ** (-score / 10) for score in (scanned, alone.score_db))
                if alone.score_db < decision.review_db or in_scan > engine.config.search.candidates / 4:
                    continue  # too weak: a sound search may miss it
            searched.append(canary)
            places.append(place)
            impostors.append(stronger)
        risk = self.config.search.miss_risk
        rank = np.array(impostors, np.float64)
        among = pdtr(engine.config.search.returned - 1, rank) * (1 - risk)
        watched = _counted("all", np.array(places, np.int64), np.exp(-rank) * (1 - risk), among, alpha)
        lost = [canary for canary, place in zip(searched, places, strict=True) if place >= FIRST]
        p_lost = float(bdtrc(len(lost) - 1, len(searched), 1 - among.mean())) if lost else 1.0
        return replace(
            watched, lost=len(lost), p_lost=p_lost, lost_in=self._where(lost, searched), alarm=p_lost < alpha
        )

    def _changed_records(self, name: str, canaries: Sequence[Canary]) -> list[Canary]:
        with_records = [canary for canary in canaries if canary.mates[name].record_hash]
        records = self.stored.snapshot().minutiae([canary.row for canary in with_records], name)
        return [
            canary for canary in with_records if record_hash(records.get(canary.row)) != canary.mates[name].record_hash
        ]

    def _where(self, lost: Sequence[Canary], canaries: Sequence[Canary]) -> tuple[tuple[str, int, int], ...]:
        """(segment, lost canaries, all canaries) of each segment with lost canaries, by descending share."""
        snapshot = self.stored.snapshot()
        all_places = Counter(place_of(snapshot, canary.row) for canary in canaries)
        counts = Counter(place_of(snapshot, canary.row) for canary in lost)
        ordered = sorted(counts.items(), key=lambda item: (-item[1] / all_places[item[0]], item[0]))
        return tuple((place, number, all_places[place]) for place, number in ordered)


def _places(ids: NDArray[np.object_], canaries: Sequence[Canary]) -> Int64:
    """The rank of each canary's subject, from 0; FIRST if it was not returned."""
    same = ids == np.array([canary.subject_id for canary in canaries], object)[:, None]
    return np.where(same.any(axis=1), same.argmax(axis=1), FIRST)


def _spread(canaries: Sequence[Canary]) -> list[Canary]:
    """At most IDENTIFIED canaries, evenly spread over the gallery."""
    chosen = np.unique(np.linspace(0, len(canaries) - 1, min(IDENTIFIED, len(canaries))).round().astype(np.int64))
    return [canaries[i] for i in chosen.tolist()]


def _with_changed(watched: Watched, run: _Run, changed: Sequence[Canary]) -> Watched:
    snapshot = run.stored.snapshot()
    places = tuple(dict.fromkeys(place_of(snapshot, canary.row) for canary in changed))
    return replace(watched, changed=len(changed), changed_in=places)


# expected results ------------------------------------------------------------------------------------------------


def _expected(
    snapshot: Snapshot, name: str, probes: Float32, cosine: Float32, rows: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The probabilities that each probe's mate is the first candidate, and that it is among the FIRST.

    The number of more similar impostors follows from the distribution of cosines between random directions (as in
    `search/native/column_statistics.py`), with the mean and standard deviation of each probe's similarities to a sample of the column. The most
    similar row of the sample is excluded, since it may be the mate.
    """
    sample = snapshot.sample(name, _SAMPLE_ROWS)
    similarity = np.sort((probes @ sample.T).astype(np.float64), axis=1)[:, :-1]
    if similarity.shape[1] < 2:
        return np.ones(len(probes)), np.ones(len(probes))
    mean, sd = similarity.mean(axis=1), similarity.std(axis=1)
    above = np.clip(cosine - mean, 0, 1)
    freedom = np.maximum(1 / np.maximum(sd, 1e-6) ** 2, 3.0) - 1
    impostors = max(rows - 1, 0) * betainc(freedom / 2, 0.5, 1 - above**2) / 2
    return np.exp(-impostors), pdtr(FIRST - 1, impostors)


def _exact_rank(snapshot: Snapshot, name: str, probes: Float32, cosine: Float32, rows: Sequence[int]) -> Int64:
    """The rank of each probe's subject among all live stored rows, computed by numpy, from 1. Ties count as better ranks of others."""
    ahead = np.zeros(len(probes), np.int64)
    own = np.array(rows, np.int64)
    for part in snapshot.parts if len(probes) else ():
        column = part.columns.get(name)
        mask = snapshot.mask(part)
        for low in range(0, column.count if column is not None else 0, PIECE_ROWS):
            assert column is not None
            high = min(low + PIECE_ROWS, column.count)
            positions = column.positions(low, high)
            others = part.rows(positions)[None, :] != own[:, None]
            if mask is not None:
                others &= mask[positions]
            ahead += ((probes @ column.vectors(low, high).T >= cosine[:, None] - _TIE) & others).sum(axis=1)
    return ahead + 1


def _counted(name: str, place: Int64, first: NDArray[np.float64], among: NDArray[np.float64], alpha: float) -> Watched:
    """Counts found canaries and tests the counts. The binomial distribution with the mean probability overestimates the probability of few
    successes in trials with different probabilities (Hoeffding, 1956), so that false alarms are rarer than stated."""
    n = len(place)
    found, at_first = int((place < FIRST).sum()), int((place == 0).sum())
    found_min, p_found = _least(found, among, alpha)
    first_min, p_first = _least(at_first, first, alpha)
    return Watched(
        column=name,
        canaries=n,
        found=found,
        first=at_first,
        among=FIRST,
        expected_min=found_min,
        expected_first_min=first_min,
        p_found=p_found,
        p_first=p_first,
    )


def _least(count: int, chances: NDArray[np.float64], alpha: float) -> tuple[int, float]:
    """(the smallest count that is not significant at alpha, the probability of `count` or fewer)."""
    n = len(chances)
    if not n:
        return 0, 1.0
    cumulative = bdtr(np.arange(n + 1), n, float(chances.mean()))
    return int(np.searchsorted(cumulative, alpha)), float(cumulative[count])
