"""The engine: the path of the data, from captures to a durable decision.

Owns the order of the stages, and is the only place that branches between them. Never decodes, compares or stores itself.

    extract -> search a snapshot -> (under the writer's lock) search what came since -> decide -> commit -> answer

1. Nothing is answered before its commit is durable.
2. Enrolment is linearizable: the commit compares the probe with every row that its search had not seen, those of the
   same batch included, so that of two simultaneous enrolments of one person at most one is unique.
3. An `encounter_id` seen before gets the answer it got then, and changes nothing.
4. Decisions that wait for the lock together are committed together: one sync of the disk acknowledges them all.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.capture.minutiae_record import standard, view_of
from biodedup.config import EXTERNAL_MINUTIAE, Config
from biodedup.embed.cards import ModelCard, load_card, shipped_cards
from biodedup.embed.extractor import Extractor
from biodedup.errors import (
    BiodedupError,
    CallerError,
    EngineClosed,
    InvalidInput,
    ModelMismatch,
    StorageUnavailable,
    SubjectExists,
    UnknownSubject,
)
from biodedup.gallery.answers import (
    answered_before,
    batch_answered_before,
    digest_of,
    digest_of_batch,
    from_json,
    to_json,
)
from biodedup.gallery.cases import Request, closed, closes, reconsidered, ruled
from biodedup.gallery.catalogue import ColumnModel
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.health import Copied, backup, inspect
from biodedup.gallery.packed import pack_text
from biodedup.gallery.snapshot import Snapshot
from biodedup.gallery.storage import LocalStorage, Storage
from biodedup.gallery.tail import Answer
from biodedup.gallery.transaction import Transaction, exists, mismatch
from biodedup.match import calibrations
from biodedup.match.compare import Comparer, InHand, compare_templates
from biodedup.match.fusion import mated_quantile_db, mated_share_below
from biodedup.match.judgement import BELIEVED, judge, kinds_of
from biodedup.match.minutiae import CylinderMatcher
from biodedup.match.pairs import PairComparer, record_candidates, record_score, record_verification
from biodedup.match.ranked import Comparison, Ranked
from biodedup.search.across import comparable_bits
from biodedup.search.clusters import clusters_of
from biodedup.search.gather import Gathering
from biodedup.search.plan import SearchPlan, plan_of
from biodedup.search.rescore import JOIN_ROWS, PROBES, Found, Searcher, SnapshotRows
from biodedup.trace import tracing, untraced
from biodedup.values import (
    COLUMNS,
    FINGER_POSITIONS,
    Candidate,
    Case,
    Cluster,
    Column,
    Decision,
    Encounter,
    Float32,
    Kind,
    Link,
    Missing,
    Outcome,
    Refusal,
    Ruling,
    Score,
    SearchResult,
    Template,
    Verdict,
    Verification,
    check_groups,
    check_id,
    unit_rows,
)


@dataclass(frozen=True)
class _Probe:
    """An encounter after extraction. refusals: captures that were declined."""

    encounter: Encounter
    templates: Mapping[str, Template]
    refusals: tuple[Refusal, ...] = ()

    @property
    def missing(self) -> tuple[Missing, ...]:
        return tuple(capture for capture in self.encounter.captures if isinstance(capture, Missing))


@dataclass(frozen=True)
class _Expected:
    """How a mate would score. attainable_db: nearly all of them score less; fnir: the share of them below review_db."""

    attainable_db: float
    review_db: float
    fnir: float


@dataclass(eq=False)
class _Request:
    """Probes of one caller that wait to be settled. replaces: an update, not a new subject; across: positions are searched
    across; spare: so many more are looked at."""

    probes: Sequence[_Probe]
    seen: Sequence[Found]
    snapshot: Snapshot
    digests: Sequence[bytes]
    replaces: bool
    across: bool
    spare: int
    answers: list[Decision | CallerError] = field(default_factory=list)
    error: BiodedupError | None = None
    done: bool = False


@dataclass(eq=False)
class _Sought:
    """Encounters with the answers known so far. request: those that are to be settled, places: where they stand; None: nobody is."""

    answers: list[Decision | CallerError | None]
    places: tuple[int, ...] = ()
    request: _Request | None = None


@dataclass(frozen=True)
class Loaded:
    """What became of a batch of templates. added: new subjects; present: enrolled before with the same templates;
    conflicting: indices of those that are enrolled with others, which were kept."""

    added: int
    present: int
    conflicting: tuple[int, ...]


@dataclass(frozen=True)
class JoinedTile:
    """A piece of an N:N join. done: subjects compared with all behind them, of total; links: pairs that reached the
    threshold; reached: (row behind the last one compared, rows of the gallery), for another join to go on from."""

    done: int
    total: int
    links: tuple[Link, ...]
    reached: tuple[int, int]


class Engine:
    """An open gallery with its models. Thread-safe; close it, or use it as a context manager."""

    def __init__(self, gallery: Gallery, config: Config, clock: Callable[[], float], new_id: Callable[[], str]) -> None:
        self.config = config
        self._gallery = gallery
        self._clock = clock
        self._new_id = new_id
        self._extractor = Extractor(config)
        known = calibrations.Calibrations(self._extractor.cards, self._sample)
        self._calibrations = known
        self._matcher = CylinderMatcher(config.threads)
        self._comparer = Comparer(known.of, self._matcher, known.with_minutiae)
        self.pairs = PairComparer(known, self._comparer)
        """Compares two sets of templates as searches of this gallery do."""
        self._searcher = Searcher(self._comparer, config.search, config.threads, config.policy)
        self._seek = Gathering(self._found_now, PROBES)
        self._seek_nearest = Gathering(self._nearest_each, PROBES)
        self._waiting: list[_Request] = []
        self._waiting_lock = threading.Lock()
        self._closed = False
        self._refuse_other_models()

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: Config | None = None,
        *,
        read_only: bool = False,
        storage: Storage | None = None,
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> Engine:
        """Opens the gallery in a folder, creating it where the folder is absent or empty.

        storage, clock, new_id: the seams to the disk, the time in seconds, and fresh identifiers.
        Raises NotAGallery, ModelMismatch, GalleryBusy (another writer), GalleryDamaged, StorageUnavailable.
        """
        config = config or Config()
        gallery = Gallery.open(
            Path(path),
            storage=storage or LocalStorage(),
            config=config.gallery,
            settings=config.to_dict(),
            gallery_id=new_id(),
            read_only=read_only,
        )
        try:
            return cls(gallery, config, clock, new_id)
        except BaseException:
            gallery.close()
            raise

    def close(self) -> None:
        """Releases the gallery. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self._gallery.close()
            self._searcher.close()
            self._matcher.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Subjects enrolled."""
        return self._gallery.snapshot().live_count

    def __contains__(self, subject_id: object) -> bool:
        self._check_open()
        return isinstance(subject_id, str) and self._gallery.snapshot().row_of(subject_id) is not None

    @property
    def gallery_version(self) -> int:
        """Grows by one with every durable change."""
        return self._gallery.snapshot().version

    # decided enrolment ------------------------------------------------------------------------------------------

    def enroll(self, encounter: Encounter, *, across_positions: bool | None = None) -> Decision:
        """Searches the whole gallery and enrols the subject if nobody in it is the same person.

        Only `unique` adds the subject. `review` keeps the templates aside; `duplicate` and `refused` keep the decision.
        across_positions: compare each finger with fingers of all positions; `Candidate.swaps` says which labels look wrong. None:
        as `SearchConfig.across_positions` says, here and wherever it can be given.
        Raises SubjectExists, EncounterConflict, ModelMismatch, InvalidInput; StorageUnavailable if nothing was written.
        """
        self._check_open()
        (answer,) = self._settled([encounter], self._across(across_positions))
        if isinstance(answer, CallerError):
            raise answer
        return answer

    def update(self, encounter: Encounter, *, across_positions: bool | None = None) -> Decision:
        """Replaces an enrolled subject's templates and groups by those of a new encounter, unless they are somebody else's.

        Everybody but the subject is searched. `unique` replaces; `duplicate`, `review` and `refused` leave the subject as
        it was. Raises UnknownSubject, EncounterConflict, ModelMismatch, InvalidInput, StorageUnavailable.
        """
        self._check_open()
        (answer,) = self._settled([encounter], self._across(across_positions), replaces=True)
        if isinstance(answer, CallerError):
            raise answer
        return answer

    def enroll_many(
        self, encounters: Iterable[Encounter], *, across_positions: bool | None = None
    ) -> Iterator[Decision]:
        """Enrols a stream; decisions come in its order. Captures are embedded, and decisions committed, in batches.

        The next batch is read and searched while one is committed; what the one before it added is searched for at the commit.

        An encounter that `enroll` would raise a CallerError for comes out `refused`, with the text as its detail.
        """
        self._check_open()
        across, stream = self._across(across_positions), iter(encounters)
        batches = iter(lambda: list(islice(stream, self.config.batch_size)), [])
        for batch, sought in self._sought_ahead(batches, across):
            self._check_open()
            for encounter, answer in zip(batch, self._answered(sought), strict=True):
                yield self._as_refused(encounter, answer) if isinstance(answer, CallerError) else answer

    def _sought_ahead(
        self, batches: Iterator[list[Encounter]], across: bool
    ) -> Iterator[tuple[list[Encounter], _Sought]]:
        """Each batch with what was found; the next one is searched while the caller has this one."""
        if tracing() is not None:  # a trace tells one thing after the other
            yield from ((batch, self._sought(batch, across)) for batch in batches)
            return
        with ThreadPoolExecutor(1, "biodedup-ahead") as pool:
            before: tuple[list[Encounter], Future[_Sought]] | None = None
            for batch in chain(batches, [None]):
                following = None if batch is None else (batch, pool.submit(self._sought, batch, across))
                if before is not None:
                    yield before[0], before[1].result()
                before = following

    def _settled(
        self, encounters: Sequence[Encounter], across: bool, *, replaces: bool = False
    ) -> list[Decision | CallerError]:
        return self._answered(self._sought(encounters, across, replaces=replaces))

    def _sought(self, encounters: Sequence[Encounter], across: bool, *, replaces: bool = False) -> _Sought:
        """Prepares encounters, and searches the gallery as it is."""
        answers: list[Decision | CallerError | None] = [None] * len(encounters)
        digests = [digest_of(encounter, "update" if replaces else "enroll") for encounter in encounters]
        for i, encounter in enumerate(encounters):
            try:
                _require_subject(encounter)
                answers[i] = answered_before(self._gallery.answer, encounter, digests[i])
            except CallerError as error:
                answers[i] = error
        todo = [i for i, answer in enumerate(answers) if answer is None]
        probes: dict[int, _Probe] = {}
        for i, probe in zip(todo, self._prepare([encounters[i] for i in todo]), strict=True):
            if isinstance(probe, CallerError):
                answers[i] = probe
                continue
            try:
                self._check_models(probe.templates)
                probes[i] = probe
            except CallerError as error:
                answers[i] = error
        if not probes:
            return _Sought(answers)
        different = self._gallery.snapshot().different
        spare = max(len(different.get(probe.encounter.subject_id or "", ())) for probe in probes.values())
        seen = self._seek((None, across, spare), [probe.templates for probe in probes.values()])
        found, snapshot = [one for one, _ in seen], seen[0][1]
        sent = [digests[i] for i in probes]
        request = _Request(list(probes.values()), found, snapshot, sent, replaces, across, spare)
        return _Sought(answers, tuple(probes), request)

    def _answered(self, sought: _Sought) -> list[Decision | CallerError]:
        """Settles and commits what was searched for."""
        if sought.request is not None:
            answers = self._committed(sought.request)
            for i, probe, answer in zip(sought.places, sought.request.probes, answers, strict=True):
                sought.answers[i] = answer
                if (steps := tracing()) is not None and isinstance(answer, Decision):
                    record_candidates(steps, probe.templates, answer, self._templates)
        return [answer for answer in sought.answers if answer is not None]

    def _committed(self, request: _Request) -> list[Decision | CallerError]:
        """Whoever gets the lock first settles and commits for all who wait."""
        with self._waiting_lock:
            self._waiting.append(request)
        with self._gallery.lock:
            if not request.done:
                with self._waiting_lock:
                    group, self._waiting = self._waiting, []
                try:
                    with untraced(), self._gallery.transaction() as transaction:  # probes of several callers
                        for one in group:
                            self._settle_request(transaction, one)
                except BaseException as error:
                    for one in group:
                        one.error = _for_waiting(error)
                    if not isinstance(error, BiodedupError):
                        raise
                finally:
                    for one in group:
                        one.done = True
        if request.error is not None:
            raise request.error
        return request.answers

    def _settle_request(self, transaction: Transaction, request: _Request) -> None:
        for probe, found, digest in zip(request.probes, request.seen, request.digests, strict=True):
            try:
                answer = answered_before(transaction.answer, probe.encounter, digest)
                request.answers.append(answer or self._settle(transaction, probe, found, digest, request))
            except CallerError as error:
                request.answers.append(error)

    def _settle(
        self, transaction: Transaction, probe: _Probe, found: Found, digest: bytes, request: _Request
    ) -> Decision:
        decision = self._decided(transaction, probe, found, request)
        asked = Request(request.replaces, tuple(probe.encounter.groups), request.across)
        return self._recorded(transaction, probe, decision, digest, asked)

    def _recorded(
        self, transaction: Transaction, probe: _Probe, decision: Decision, digest: bytes, asked: Request
    ) -> Decision:
        """Stages a new decision, and what follows from it."""
        encounter_id = probe.encounter.encounter_id or self._new_id()
        decision = replace(decision, encounter_id=encounter_id)
        if decision.outcome == "unique":
            self._write(transaction, probe, encounter_id)
        elif decision.outcome == "review":
            transaction.hold(encounter_id, probe.templates.values(), asked)
        transaction.record(encounter_id, Answer(digest, decision.outcome, to_json(decision)))
        return decision

    def _decided(self, transaction: Transaction, probe: _Probe, found: Found, request: _Request) -> Decision:
        """Decides inside the transaction, so that no row can slip in between the search and the commit."""
        subject_id = probe.encounter.subject_id
        assert subject_id is not None, "_require_subject has seen to it"
        now = transaction.snapshot()
        replaced = now.row_of(subject_id)
        if replaced is not None and not request.replaces:
            raise exists(subject_id)
        if replaced is None and request.replaces:
            raise UnknownSubject(f"subject {subject_id!r} is not enrolled; enrol it, there is nothing to update")
        self._check_models(probe.templates, transaction.models)
        (since,) = self._searcher.search(
            now,
            [probe.templates],
            from_row=request.snapshot.row_count,
            across=request.across,
            spare=request.spare,
        )
        return self._decide(probe, _merged(found, since), now, version=transaction.version, besides=replaced)

    @staticmethod
    def _write(transaction: Transaction, probe: _Probe, encounter_id: str) -> None:
        """Enrols, or replaces who is enrolled."""
        subject_id = probe.encounter.subject_id
        assert subject_id is not None, "_require_subject has seen to it"
        if transaction.snapshot().row_of(subject_id) is not None:
            transaction.remove(subject_id)
        transaction.add(subject_id, probe.templates, encounter_id, probe.encounter.groups)

    @staticmethod
    def _complete(transaction: Transaction, probe: _Probe) -> None:
        """Gives an enrolled subject the templates of columns that it lacks. What it has stays: the verdict does not say which is better."""
        subject_id = probe.encounter.subject_id
        assert subject_id is not None, "of a case"
        now = transaction.snapshot()
        row = now.row_of(subject_id)
        assert row is not None, "_decided has seen to it"
        enrolled = now.templates(row)
        if probe.templates.keys() <= enrolled.keys():
            return
        (encounter_id,), (groups,) = now.encounter_ids([row]), now.groups([row])
        transaction.remove(subject_id)
        transaction.add(subject_id, {**probe.templates, **enrolled}, encounter_id, groups)

    def _as_refused(self, encounter: Encounter, error: CallerError) -> Decision:
        refusal = Refusal("encounter", _snake_case(type(error).__name__), str(error))
        duplicate_db, review_db = self.config.policy.thresholds_db(len(self))
        return Decision(
            "refused",
            encounter.subject_id,
            encounter.encounter_id,
            (),
            (refusal,),
            (),
            duplicate_db,
            review_db,
            len(self),
            self.gallery_version,
            decided_at=self._clock(),
        )

    # cases: what went to review -----------------------------------------------------------------------------------

    def dispute(self, encounter: Encounter) -> Decision:
        """Opens a case for an encounter whose subject is enrolled and whose captures look like somebody else's, as `verify` said: a
        person judges whether they are the subject's. The decision, `review`, has the subject as its candidate.

        Raises UnknownSubject, EncounterConflict, ModelMismatch, InvalidInput (without a usable capture, too), StorageUnavailable.
        """
        self._check_open()
        _require_subject(encounter)
        digest = digest_of(encounter)
        (probe,) = self._prepare([encounter])
        if isinstance(probe, CallerError):
            raise probe
        if not probe.templates:
            raise InvalidInput("no capture of the encounter can be used; a case needs one to judge")
        with self._gallery.transaction() as transaction:
            answer = answered_before(transaction.answer, encounter, digest)
            if answer is not None:
                return answer
            decision = self._disputed(transaction, probe)
            asked = Request(False, tuple(encounter.groups), False)
            return self._recorded(transaction, probe, decision, digest, asked)

    def _disputed(self, transaction: Transaction, probe: _Probe) -> Decision:
        subject_id = probe.encounter.subject_id
        assert subject_id is not None, "_require_subject has seen to it"
        now = transaction.snapshot()
        row = now.row_of(subject_id)
        if row is None:
            raise UnknownSubject(f"subject {subject_id!r} is not enrolled; enrol it, there is nothing to dispute")
        self._check_models(probe.templates, transaction.models)
        compared = self._comparer.compare(probe.templates, SnapshotRows(now), [row])
        decision = self._decide(probe, Found(compared), now, version=transaction.version)
        (own,) = decision.candidates or (Candidate(subject_id, 1, 0.0, False, ()),)
        kind: Kind = "another_person" if own.kind in ("", *BELIEVED) else own.kind
        return replace(
            decision,
            outcome="review",
            candidates=(replace(own, kind=kind),),
            compared=len(decision.candidates),
            reasons=tuple(dict.fromkeys(("another_person", kind))),
        )

    def cases(self) -> Iterator[Case]:
        """The open cases, in the order of their encounter_ids."""
        self._check_open()
        for encounter_id in self._gallery.open_cases():
            case = self._gallery.case(encounter_id)
            if case is not None and not case.closed:
                yield case

    def case(self, encounter_id: str) -> Case:
        """One case, open or closed. Raises InvalidInput for an encounter that never went to review."""
        self._check_open()
        case = self._gallery.case(encounter_id)
        if case is None:
            raise InvalidInput(f"encounter {encounter_id!r} is no case: it is unknown, or was decided without review")
        return case

    def verdicts(self) -> list[Verdict]:
        """All that were ever given, oldest first."""
        self._check_open()
        return self._gallery.verdicts()

    def adjudicate(
        self, encounter_id: str, ruling: Ruling, by: str, note: str = "", *, candidate: str | None = None
    ) -> Decision:
        """Takes a person's verdict on a case and returns the decision as it stands then.

        `same`: the encounter is of that candidate; it is a duplicate, and not enrolled. `different`: it is not; once nobody is
        left, among the candidates and in a search of all who are enrolled by now, the subject is enrolled or updated from the
        templates that were kept; otherwise it stays in `review`. The pair is never raised again, in no search and no join.
        `recapture`: refused; the templates are dropped. candidate: None means the only one, or with `different` all.

        Where the subject itself is the candidate (`dispute`), `different` refuses the encounter; `same` accepts it, once nobody else is
        left as above, and adds the templates of columns that the subject lacks.

        The same verdict again changes nothing. Raises EncounterConflict for another one on what was judged, SubjectExists or
        UnknownSubject where the subject was enrolled or removed otherwise, InvalidInput, StorageUnavailable.
        """
        self._check_open()
        case = self.case(encounter_id)
        wanted = ruled(case, ruling, candidate, by, 0.0, note)  # raises before anybody is searched for
        searches = any(verdict.ruling == "different" or not closes(verdict) for verdict in wanted)
        probe = _Probe(
            Encounter(case.subject_id, case.decision.missing, encounter_id=encounter_id, groups=case.groups),
            case.templates,
            case.decision.refusals,
        )
        spare = len(self._gallery.snapshot().different.get(case.subject_id, ())) + len(case.decision.candidates)
        seen = self._seek((None, case.across_positions, spare), [case.templates]) if searches else []
        with self._gallery.transaction() as transaction:
            now = transaction.case(encounter_id)
            assert now is not None, "a case stays one"
            verdicts = ruled(now, ruling, candidate, by, self._clock(), note)
            if not verdicts:
                return now.decision
            transaction.judge(verdicts)
            if closes(verdicts[-1]):
                decision = closed(now, verdicts[-1])
            else:
                ((found, snapshot),) = seen
                own = any(
                    verdict.own for verdict in (*now.verdicts, *verdicts)
                )  # the subject is enrolled, and it is theirs
                replaces = own or case.replaces
                request = _Request([probe], [found], snapshot, [], replaces, case.across_positions, spare)
                decision = reconsidered(now, verdicts, self._decided(transaction, probe, found, request))
                if decision.outcome == "unique" and own:
                    self._complete(transaction, probe)
                elif decision.outcome == "unique":
                    self._write(transaction, probe, encounter_id)
            transaction.revise(now, decision)
        return decision

    # searches that write nothing --------------------------------------------------------------------------------

    def identify(
        self,
        encounter: Encounter,
        *,
        groups: Collection[str] | None = None,
        across_positions: bool | None = None,
    ) -> Decision:
        """1:N: the search and decision of `enroll`, with nothing written. subject_id may be None.

        groups: search only subjects that belong to one of them. across_positions: as for `enroll`.
        """
        self._check_open()
        (probe,) = self._prepare([encounter])
        if isinstance(probe, CallerError):
            raise probe
        self._check_models(probe.templates)
        spare = len(self._gallery.snapshot().different.get(encounter.subject_id or "", ()))
        ((found, snapshot),) = self._seek((_checked(groups), self._across(across_positions), spare), [probe.templates])
        decision = self._decide(probe, found, snapshot, version=snapshot.version)
        if (steps := tracing()) is not None:
            record_candidates(steps, probe.templates, decision, self._templates)
        return decision

    def _found_now(
        self, key: tuple[tuple[str, ...] | None, bool, int], probes: list[Mapping[str, Template]]
    ) -> list[tuple[Found, Snapshot]]:
        (groups, across, spare), snapshot = key, self._gallery.snapshot()
        with untraced():  # probes of several callers
            results = self._searcher.search(snapshot, probes, groups=groups, across=across, spare=spare)
        return [(found, snapshot) for found in results]

    def _across(self, asked: bool | None) -> bool:
        return self.config.search.across_positions if asked is None else asked

    def verify(self, encounter: Encounter, subject_id: str) -> Verification:
        """1:1, at `policy.verify_fmr`. Raises UnknownSubject. Without a usable capture nothing is accepted."""
        self._check_open()
        (probe,) = self._prepare([encounter])
        if isinstance(probe, CallerError):
            raise probe
        self._check_models(probe.templates)
        snapshot = self._gallery.snapshot()
        row = snapshot.row_of(subject_id)
        if row is None:
            raise UnknownSubject(f"subject {subject_id!r} is not enrolled; enrol it first, or check the id")
        templates = snapshot.templates(row)
        threshold_db = -10 * float(np.log10(self.config.policy.verify_fmr))
        compared = self._comparer.compare(probe.templates, InHand(templates), [0])
        if not compared:
            return Verification(subject_id, False, 0.0, threshold_db, False, (), probe.refusals)
        best = compared[0]
        (kind,) = kinds_of([best], threshold_db, threshold_db)
        result = Verification(
            subject_id,
            kind in BELIEVED,
            best.score_db,
            threshold_db,
            best.extrapolated,
            best.evidence,
            probe.refusals,
            kind,
        )
        if (steps := tracing()) is not None:
            record_verification(steps, probe.templates, templates, result)
        return result

    def search(
        self, probes: Mapping[str, NDArray[Any]], k: int = 20, *, groups: Collection[str] | None = None
    ) -> SearchResult:
        """Nearest subjects by one column's embeddings; every row is compared.

        probes: column -> float32 (q, d), unit rows; one column. groups: search only subjects that belong to one of them.
        Returns ids (q, k), similarity float32 (q, k), descending.
        """
        self._check_open()
        if len(probes) != 1:
            raise InvalidInput(
                f"search takes probes of one column, got {len(probes)}; use identify for several captures"
            )
        if not isinstance(k, int) or k < 1:
            raise InvalidInput(f"k is {k!r}, wanted a whole number of at least 1")
        ((column, vectors),) = probes.items()
        _, rows = self._embeddings(column, vectors)
        key = (column, k, _checked(groups))
        if len(rows) >= PROBES or not len(rows):  # a batch by itself
            return self._nearest_now(key, rows)
        found = self._seek_nearest(key, list(rows))
        ids, similarity = np.stack([one.ids for one in found]), np.stack([one.similarity for one in found])
        return SearchResult(ids, similarity, found[0].gallery_version, found[0].incomplete)

    def _nearest_each(self, key: tuple[str, int, tuple[str, ...] | None], probes: list[Float32]) -> list[SearchResult]:
        found = self._nearest_now(key, np.array(probes))
        return [replace(found, ids=ids, similarity=near) for ids, near in zip(found.ids, found.similarity, strict=True)]

    def _nearest_now(self, key: tuple[str, int, tuple[str, ...] | None], probes: Float32) -> SearchResult:
        column, k, groups = key
        snapshot = self._gallery.snapshot()
        found = self._searcher.nearest(snapshot, column, probes, k, groups=groups)
        there = found.rows >= 0
        names = np.full(there.shape, "", object)
        names[there] = snapshot.subject_ids(found.rows[there].tolist())
        return SearchResult(names, found.similarity, snapshot.version, bool(found.failures))

    def plan(self, columns: Collection[str] = ("face",)) -> SearchPlan:
        """How a search of these columns is done at present, and what it may miss; `plan.explain()` says it with its evidence."""
        self._check_open()
        for column in columns:
            if column not in _COLUMN_SET:
                raise InvalidInput(f"column {column!r} is not known; use face or a finger position")
        snapshot = self._gallery.snapshot()
        together = self._searcher.together(snapshot, columns)
        return plan_of(snapshot, tuple(columns), self.config.search.miss_risk, together)

    def find_duplicates(
        self, *, threshold_db: float | None = None, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Cluster]:
        """N:N: clusters of enrolled subjects that score as one person. `jobs.find_duplicates` can be interrupted.

        threshold_db: None takes the policy's duplicate threshold. progress: called with subjects done and their total.
        """
        found: list[Link] = []
        for tile in self.join(threshold_db=threshold_db):
            found += tile.links
            progress(tile.done, tile.total)
        return clusters_of(found)

    def join(
        self,
        *,
        threshold_db: float | None = None,
        skip: int = 0,
        among: Sequence[str] | None = None,
        since: tuple[int, int] | None = None,
    ) -> Iterator[JoinedTile]:
        """N:N, tile by tile: each compares some subjects with all that were enrolled after them, as of now. Pairs that were judged
        different are left out.

        threshold_db: None takes the policy's duplicate threshold. skip: subjects that are done already. among: only these subjects,
        each with everybody, so that a pair of two of them comes up twice; those not enrolled are passed over. since: (row, rows):
        of `among`, only those from this row on, and besides everybody who was enrolled or updated since there were so many rows.
        """
        self._check_open()
        if threshold_db is None:
            threshold_db, _ = self.config.policy.thresholds_db(len(self))
        snapshot = self._gallery.snapshot()
        live = snapshot.live_rows() if among is None else np.unique(snapshot.rows_of(pack_text(among)))
        live = live[live >= 0]
        if since is not None:
            everybody = snapshot.live_rows()
            live = np.union1d(live[live >= since[0]], everybody[everybody >= since[1]])
        for start in range(skip, len(live), JOIN_ROWS):
            self._check_open()
            rows = live[start : start + JOIN_ROWS].tolist()
            found = self._searcher.pairs(snapshot, rows, threshold_db, with_all=among is not None)
            kinds = [kinds_of([pair], threshold_db, threshold_db)[0] for _, pair in found]
            names = snapshot.subject_ids([row for pair in found for row in (pair[0], pair[1].row)])
            links = [
                Link((names[2 * i], names[2 * i + 1]), pair.score_db, pair.extrapolated, pair.evidence, kind)
                for i, ((_, pair), kind) in enumerate(zip(found, kinds, strict=True))
                if not snapshot.are_different(names[2 * i], names[2 * i + 1])
            ]
            yield JoinedTile(start + len(rows), len(live), tuple(links), (rows[-1] + 1, snapshot.row_count))

    # undecided changes ------------------------------------------------------------------------------------------

    def add_templates(
        self,
        subject_ids: Sequence[str],
        templates: Mapping[str, NDArray[Any] | Sequence[bytes | None]],
        *,
        groups: Sequence[Sequence[str]] | None = None,
        encounter_id: str | None = None,
    ) -> int:
        """Adds subjects without a search, all or none. Returns how many were added.

        templates: column -> float32 (n, d), unit rows; or, of a finger, n minutiae records, None where a subject has none: they
        are of `FingerConfig.record_model_id`. groups: of each subject. encounter_id names the whole call: sent again, it adds
        nothing and returns 0. Raises InvalidInput, SubjectExists, ModelMismatch, EncounterConflict, StorageUnavailable.
        """
        return self._add(subject_ids, templates, groups, encounter_id, keep_enrolled=False).added

    def load_templates(
        self,
        subject_ids: Sequence[str],
        templates: Mapping[str, NDArray[Any] | Sequence[bytes | None]],
        *,
        groups: Sequence[Sequence[str]] | None = None,
        encounter_id: str | None = None,
    ) -> Loaded:
        """As `add_templates`, but subjects that are enrolled already are kept as they are, and told apart: the same
        templates, or others."""
        while True:
            try:
                return self._add(subject_ids, templates, groups, encounter_id, keep_enrolled=True)
            except SubjectExists:
                continue  # enrolled by another thread since they were told apart

    def _add(
        self,
        subject_ids: Sequence[str],
        templates: Mapping[str, NDArray[Any] | Sequence[bytes | None]],
        groups: Sequence[Sequence[str]] | None,
        encounter_id: str | None,
        *,
        keep_enrolled: bool,
    ) -> Loaded:
        self._check_open()
        ids = [str(s) if isinstance(s, np.str_) else s for s in subject_ids]
        for subject_id in ids:
            check_id(subject_id, "subject_id")
        if len(set(ids)) != len(ids):
            raise InvalidInput(f"subject_ids holds {len(ids) - len(set(ids))} repetitions; each subject is one row")
        if not templates:
            raise InvalidInput("templates is empty; pass at least one column, as {'face': vectors}")
        named: list[tuple[str, ...]] = [()] * len(ids) if groups is None else [check_groups(some) for some in groups]
        columns = {column: self._column(column, cells) for column, cells in templates.items()}
        for what, count in [("groups", len(named)), *((f"column {c}", len(v)) for c, (_, v) in columns.items())]:
            if count != len(ids):
                raise InvalidInput(f"{what} has {count} rows for {len(ids)} subject_ids; pass one row each")
        if all(isinstance(cells, list) for _, cells in columns.values()):
            for subject_id, *records in zip(ids, *(cells for _, cells in columns.values()), strict=True):
                if not any(records):
                    raise InvalidInput(f"subject {subject_id!r} has no template; leave it out")
            columns = {column: (model_id, cells) for column, (model_id, cells) in columns.items() if any(cells)}
        digest = digest_of_batch(ids, columns, named)
        if encounter_id is not None:
            check_id(encounter_id, "encounter_id")
            if batch_answered_before(self._gallery.snapshot().answer(encounter_id), encounter_id, digest):
                return Loaded(0, len(ids), ())
        present, conflicting = 0, tuple[int, ...]()
        if keep_enrolled:
            enrolled, same = self._compare_enrolled(ids, columns)
            present, conflicting = int(np.count_nonzero(same)), tuple(np.flatnonzero(enrolled & ~same).tolist())
            new = np.flatnonzero(~enrolled)
            ids, named = [ids[i] for i in new.tolist()], [named[i] for i in new.tolist()]
            columns = {column: (model_id, _at(cells, new)) for column, (model_id, cells) in columns.items()}
        answer = Answer(digest, "loaded", json.dumps({"added": len(ids)}))
        if len(ids) < self.config.gallery.seal_rows:
            with self._gallery.transaction() as transaction:
                if encounter_id is not None:
                    if batch_answered_before(transaction.answer(encounter_id), encounter_id, digest):
                        return Loaded(0, len(ids) + present, conflicting)
                    transaction.record(encounter_id, answer)
                if ids:
                    transaction.add_many(ids, columns, named)
            return Loaded(len(ids), present, conflicting)
        # Many rows: into a segment at once, written while others enrol, and attached if nobody was enrolled meanwhile.
        with self._gallery.transaction() as transaction:
            group_sets = transaction.group_sets_of(named)
        entry = self._gallery.write_rows(ids, {column: cells for column, (_, cells) in columns.items()}, group_sets)
        try:
            with self._gallery.transaction() as transaction:
                if encounter_id is not None and batch_answered_before(
                    transaction.answer(encounter_id), encounter_id, digest
                ):
                    self._gallery.discard_rows(entry)
                    return Loaded(0, len(ids) + present, conflicting)
                transaction.refuse_enrolled(ids)
                transaction.settle_models(columns)
                transaction.attach(entry)
                if encounter_id is not None:
                    transaction.record(encounter_id, answer)
        except CallerError:  # anything else may have been committed all the same; what was not, the next writer sweeps
            self._gallery.discard_rows(entry)
            raise
        return Loaded(len(ids), present, conflicting)

    def _compare_enrolled(
        self, ids: Sequence[str], columns: Mapping[str, tuple[str, Column]]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(enrolled, enrolled with these very templates), bool (n,) each."""
        snapshot = self._gallery.snapshot()
        rows = snapshot.rows_of(pack_text(ids))
        enrolled = rows >= 0
        same = enrolled.copy()
        at = np.flatnonzero(enrolled)
        for column, (_, cells) in columns.items():
            if not isinstance(cells, np.ndarray):
                records = snapshot.minutiae(rows[at].tolist(), column)
                for i in at.tolist():
                    same[i] &= records.get(int(rows[i]), b"") == cells[i]
                continue
            has = (snapshot.presence(rows[at].tolist()) >> COLUMNS.index(column) & 1) == 1
            same[at[~has]] = False
            stored = snapshot.embeddings(rows[at[has]].tolist(), column)
            cosines = np.einsum("ij,ij->i", stored, cells[at[has]]) if len(stored) else np.zeros(0)
            same[at[has]] &= cosines > _SAME_COSINE
        return enrolled, same

    def admit(self, encounters: Sequence[Encounter]) -> list[Decision]:
        """Adds subjects from their captures without a search, in one commit: an archive to be deduplicated afterwards.

        Decisions have no candidates; `unique` here means added. A subject_id that is enrolled is replaced: its newest
        encounter counts. An encounter_id seen before changes nothing.
        """
        self._check_open()
        for encounter in encounters:
            _require_subject(encounter)
        digests = [digest_of(encounter) for encounter in encounters]
        known = [answered_before(self._gallery.answer, *pair) for pair in zip(encounters, digests, strict=True)]
        answers = dict(enumerate(known))
        todo = [i for i, answer in answers.items() if answer is None]
        with_probe = dict(zip(todo, self._prepare([encounters[i] for i in todo]), strict=True))
        with self._gallery.transaction() as transaction:
            for i, probe in with_probe.items():
                if isinstance(probe, CallerError):
                    answers[i] = self._as_refused(encounters[i], probe)
                    continue
                self._check_models(probe.templates, transaction.models)
                subject_id, encounter_id = encounters[i].subject_id, encounters[i].encounter_id or self._new_id()
                assert subject_id is not None, "_require_subject has seen to it"
                now = transaction.snapshot()
                if now.row_of(subject_id) is not None:
                    transaction.remove(subject_id)
                decision = self._decide(probe, Found(), now, version=transaction.version)
                outcome: Outcome = "unique" if probe.templates else "refused"  # nothing was searched, nothing is judged
                answers[i] = decision = replace(decision, encounter_id=encounter_id, outcome=outcome, reasons=())
                if outcome == "unique":
                    transaction.add(subject_id, probe.templates, encounter_id, encounters[i].groups)
                transaction.record(encounter_id, Answer(digests[i], decision.outcome, to_json(decision)))
        return [answer for answer in answers.values() if answer is not None]

    def remove(self, subject_id: str) -> None:
        """Removes a subject; the next search does not see it. Raises UnknownSubject."""
        self._check_open()
        with self._gallery.transaction() as transaction:
            transaction.remove(subject_id)

    # care of the gallery ----------------------------------------------------------------------------------------

    def compact(self) -> None:
        """Merges what is stored into one segment, while searches and enrolments go on. The templates of removed subjects
        are gone from the disk afterwards. Needs free disk of the gallery's size. Raises StorageUnavailable."""
        self._check_open()
        self._gallery.compact()

    def tidy(self) -> None:
        """Seals and merges what is due, now instead of in the background; after a bulk load, for example."""
        self._check_open()
        self._gallery.maintain()

    def refresh(self) -> int:
        """With read_only: sees what the writer has committed since. Returns the version now seen."""
        self._check_open()
        self._gallery.refresh()
        return self.gallery_version

    # looking in -------------------------------------------------------------------------------------------------

    def subject_ids(self) -> list[str]:
        """The enrolled, in order of enrolment."""
        self._check_open()
        return list(self._gallery.snapshot().all_subject_ids())

    def are_enrolled(self, subject_ids: Sequence[str]) -> NDArray[np.bool_]:
        """bool (n,): which of these are enrolled."""
        return np.asarray(self.rows_of(subject_ids) >= 0)

    def rows_of(self, subject_ids: Sequence[str]) -> NDArray[np.int64]:
        """int64 (n,): the row of each, -1 where it is not enrolled. Rows only grow; who is updated gets another one."""
        self._check_open()
        return self._gallery.snapshot().rows_of(pack_text(subject_ids))

    def templates(self, subject_id: str) -> dict[str, Template]:
        """column -> the template enrolled there; embeddings of a sealed row in eight bits a number. Raises UnknownSubject."""
        self._check_open()
        found = self._templates(subject_id)
        if found is None:
            raise UnknownSubject(f"subject {subject_id!r} is not enrolled; enrol it first, or check the id")
        return found

    def _templates(self, subject_id: str) -> dict[str, Template] | None:
        snapshot = self._gallery.snapshot()
        row = snapshot.row_of(subject_id)
        return None if row is None else snapshot.templates(row)

    def decision(self, encounter_id: str) -> Decision | None:
        """The decision that an encounter got, or None for one never seen; of a case, as it stands by now."""
        self._check_open()
        stored = self._gallery.answer(encounter_id)
        return None if stored is None or '"added"' in stored[1] else from_json(stored[1])

    def info(self) -> dict[str, Any]:
        """Counts, models and thresholds, JSON-ready."""
        self._check_open()
        snapshot = self._gallery.snapshot()
        duplicate_db, review_db = self.config.policy.thresholds_db(snapshot.live_count)
        counts = snapshot.column_counts()
        models = {
            column: {"model_id": model.model_id, "dimension": model.dimension, "subjects": counts[column]}
            for column, model in snapshot.models.items()
        }
        return {
            "gallery_id": self._gallery.gallery_id,
            "gallery_version": snapshot.version,
            "subjects": snapshot.live_count,
            "removed_not_erased": len(snapshot.tombstones),
            "segments": len(snapshot.parts) - 1,
            "sealed_rows": snapshot.parts[-1].first_row,
            "columns": models,
            "groups": sorted(set().union(*snapshot.group_sets.values())),
            "encounters": snapshot.outcomes(),
            "open_cases": len(self._gallery.open_cases()),
            "duplicate_db": round(duplicate_db, 2),
            "review_db": round(review_db, 2),
        }

    def problems(self) -> list[str]:
        """What a full check of the stored data finds wrong; empty when sound."""
        self._check_open()
        return [str(problem) for problem in inspect(self._gallery.storage, self._gallery.folder)]

    def backup(self, target: str | Path) -> Copied:
        """Copies the gallery as of now to a folder, while others go on; again, it copies only segments that are new.

        The copy is a gallery, with what jobs keep beside it. Raises InvalidInput where the folder holds something else,
        GalleryDamaged, StorageUnavailable.
        """
        self._check_open()
        return backup(self._gallery.storage, self._gallery.folder, Path(target))

    # the stages -------------------------------------------------------------------------------------------------

    def _prepare(self, encounters: Sequence[Encounter]) -> list[_Probe | CallerError]:
        """Templates of each encounter. Captures of all of them are extracted together."""
        captures = [c for encounter in encounters for c in encounter.captures if not isinstance(c, Missing)]
        results: list[Template | Refusal | CallerError] = []
        try:
            results.extend(self._extractor.extract(captures))
        except CallerError:
            for capture in captures:  # one bad record never stops a batch: find it
                try:
                    results.extend(self._extractor.extract([capture]))
                except CallerError as error:
                    results.append(error)
        extracted = iter(results)
        return [self._probe(encounter, extracted) for encounter in encounters]

    def _probe(
        self, encounter: Encounter, extracted: Iterator[Template | Refusal | CallerError]
    ) -> _Probe | CallerError:
        mine = [next(extracted) for capture in encounter.captures if not isinstance(capture, Missing)]
        templates: dict[str, Template] = {}
        refusals = []
        try:
            for column, given in encounter.templates.items():
                templates[column] = self._given(column, given)
            for result in mine:
                if isinstance(result, CallerError):
                    return result
                if isinstance(result, Refusal):
                    refusals.append(result)
                    continue
                kept, spare = _better(templates.get(result.column), result)
                templates[result.column] = kept
                if spare is not None:
                    refusals.append(Refusal(spare.column, "superseded", "a better capture was kept", spare.quality))
        except CallerError as error:
            return error
        return _Probe(encounter, templates, tuple(refusals))

    def _given(self, column: str, given: Float32 | bytes | Template) -> Template:
        if isinstance(given, bytes):
            given = Template(column, self.config.finger.record_model_id, minutiae=given)
        if isinstance(given, Template):
            if given.column != column:
                raise InvalidInput(
                    f"the template under {column!r} is one of {given.column!r}; file it under its column"
                )
            return _sound(given, self._calibrations)
        model, rows = self._embeddings(column, np.asarray(given)[None])
        return Template(column, model, rows[0])

    def _column(self, column: str, cells: NDArray[Any] | Sequence[bytes | None]) -> tuple[str, Column]:
        """(model_id, unit rows) of bare embeddings, or (model_id, records as galleries store them)."""
        if isinstance(cells, np.ndarray) or not all(cell is None or isinstance(cell, bytes) for cell in cells):
            return self._embeddings(column, np.asarray(cells))
        if column not in FINGER_POSITIONS:
            raise InvalidInput(f"column {column!r} cannot hold minutiae; use a finger position")
        model_id = self.config.finger.record_model_id
        return model_id, [
            _sound(Template(column, model_id, minutiae=cell), self._calibrations).minutiae or b"" if cell else b""
            for cell in cells
        ]

    def _embeddings(self, column: str, vectors: NDArray[Any]) -> tuple[str, Float32]:
        """(model_id, unit rows) of bare embeddings: the column's model, if the dimension agrees."""
        if column not in _COLUMN_SET:
            raise InvalidInput(f"column {column!r} is not known; use face or a finger position")
        rows = unit_rows(vectors, what=f"the {column} vectors")
        known = self._gallery.snapshot().models.get(column)
        if known is not None:
            if known.dimension != rows.shape[1]:
                raise mismatch(column, known, ColumnModel("given vectors", rows.shape[1]))
            return known.model_id, rows
        if column == "face":
            card = load_card(self.config.face.model, self.config.face.model_folder)
            if card.dimension == rows.shape[1]:
                return card.model_id, rows
        return f"{calibrations.EXTERNAL}{rows.shape[1]}", rows

    def _decide(
        self, probe: _Probe, found: Found, now: Snapshot, *, version: int, besides: int | None = None
    ) -> Decision:
        """besides: the row that is being replaced, no candidate for itself."""
        policy = self.config.policy
        duplicate_db, band_db = policy.thresholds_db(now.live_count)
        returned, cleared = _first(
            found.comparisons,
            self.config.search.returned,
            lambda rows: now.are_live(rows) & (rows != (-1 if besides is None else besides)),
            now.rows_different(probe.encounter.subject_id),
        )
        compared = now.count_with(comparable_bits(probe.templates, now.models, across=found.across))
        expected = self._expected(probe.templates, now, band_db, across=found.across) if compared else None
        review_db = band_db if expected is None or policy.review_db is not None else expected.review_db
        verdict = judge(
            returned,
            duplicate_db,
            review_db,
            band_db=band_db,
            incomplete=found.incomplete,
            usable=bool(probe.templates),
            nothing_in_common=not compared and now.live_count > 0,
            trust_extrapolation=policy.trust_extrapolation,
        )
        names = now.subject_ids([c.row for c in (*returned, *cleared)])
        return Decision(
            verdict.outcome,
            probe.encounter.subject_id,
            probe.encounter.encounter_id,
            _candidates(names, returned, verdict.kinds),
            probe.refusals,
            probe.missing,
            duplicate_db,
            review_db,
            now.live_count,
            version,
            tuple(sorted({template.model_id for template in probe.templates.values()})),
            found.incomplete,
            self._clock(),
            verdict.reasons,
            None if expected is None else expected.attainable_db,
            None if expected is None else expected.fnir,
            compared,
            _candidates(names[len(returned) :], cleared, kinds_of(cleared, duplicate_db, review_db)),
        )

    def _expected(self, templates: Mapping[str, Template], now: Snapshot, band_db: float, *, across: bool) -> _Expected:
        """How a mate scores with these captures, those aside that nobody enrolled has; the review threshold follows from it."""
        calibrations = tuple(
            law.of(templates[column].embedding is not None and templates[column].minutiae is not None)
            for column, law in sorted(self._comparer.laws(templates).items())
            if now.count_with(comparable_bits({column: templates[column]}, now.models, across=across))
        )
        review_db = min(band_db, mated_quantile_db(self.config.policy.fnir_review, calibrations))
        attainable_db = mated_quantile_db(_ATTAINED_SHARE, calibrations)
        return _Expected(attainable_db, review_db, mated_share_below(review_db, calibrations))

    def _check_models(self, templates: Mapping[str, Template], models: Mapping[str, ColumnModel] | None = None) -> None:
        models = self._gallery.snapshot().models if models is None else models
        for column, template in templates.items():
            known = models.get(column)
            got = ColumnModel(template.model_id, None if template.embedding is None else len(template.embedding))
            if known is not None and known != got:
                raise mismatch(column, known, got)

    def _refuse_other_models(self) -> None:
        for column, known in self._gallery.snapshot().models.items():
            mine = self._extractor.model_ids["face" if column == "face" else "finger"]
            if known.model_id != mine and not known.model_id.startswith(calibrations.EXTERNAL):
                raise ModelMismatch(
                    f"{self._gallery.folder}: column {column} holds templates of {known.model_id}, the config names {mine}; "
                    "open it with the config that made it, or enrol anew into another folder"
                )

    def _sample(self, model_id: str) -> Float32:
        """Embeddings of a model that has no card, for its calibration."""
        snapshot = self._gallery.snapshot()
        for column, model in snapshot.models.items():
            if model.model_id == model_id and model.dimension is not None:
                return snapshot.sample(column, calibrations.SAMPLE_SIZE)
        return np.zeros((0, 1), np.float32)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine was closed; open it again")


def compare(a: Template, b: Template) -> Score:
    """1:1, without a gallery. score_db = -10 log10(FMR); similarity for embeddings, minutiae for fingers, else None.

    Raises ModelMismatch for templates of two models, InvalidInput for a face against a finger and for an unsound record.
    """
    pairs = _shipped_pair_comparer()
    a, b = _sound(a, pairs.calibrations), _sound(b, pairs.calibrations)
    score = compare_templates(pairs.comparer, a, b)
    if (steps := tracing()) is not None:
        record_score(steps, a, b, score)
    return score


def pair_comparer(cards: Sequence[ModelCard]) -> PairComparer:
    """Compares templates of these models without a gallery."""
    known = calibrations.Calibrations(cards, lambda model_id: np.zeros((0, 1), np.float32))
    return PairComparer(known, Comparer(known.of, CylinderMatcher(), known.with_minutiae))


@cache
def _shipped_pair_comparer() -> PairComparer:
    return pair_comparer(shipped_cards())


_COLUMN_SET = frozenset(COLUMNS)
_ATTAINED_SHARE = 0.95
_FIRST_ROWS = 64  # looked at together; the tenth that counts is nearly always among them
_SAME_COSINE = 0.999  # between a vector and its own eight-bit code it is above 0.9995 (tests/test_gallery.py)


def _sound(template: Template, known: calibrations.Calibrations) -> Template:
    """The template, its record in the form that galleries store. Raises InvalidInput for an unsound record, and where nothing is
    known of how its extractor's minutiae score."""
    if template.minutiae is None:
        return template
    if not known.knows(template.model_id):
        raise InvalidInput(
            f"minutiae of {template.model_id!r} have no calibration here; name the configured extractor's model_id, or "
            f"{EXTERNAL_MINUTIAE!r}"
        )
    return replace(template, minutiae=standard(view_of(template.minutiae, template.column)))


def _at(cells: Column, rows: NDArray[np.int64]) -> Column:
    return cells[rows] if isinstance(cells, np.ndarray) else [cells[row] for row in rows.tolist()]


def _checked(groups: Collection[str] | None) -> tuple[str, ...] | None:
    return None if groups is None else check_groups(groups)


def _for_waiting(error: BaseException) -> BiodedupError:
    """What those hear whose decisions were to be committed by another thread that failed."""
    if isinstance(error, BiodedupError):
        return type(error)(str(error))
    return StorageUnavailable(
        f"the commit was interrupted ({type(error).__name__}); nothing was acknowledged; send it again"
    )


def _merged(first: Found, since: Found) -> Found:
    """Two searches of disjoint rows as one."""
    return Found(first.comparisons.with_others(since.comparisons), first.incomplete or since.incomplete, first.across)


def _first(
    ranked: Ranked,
    count: int,
    which_count: Callable[[NDArray[np.int64]], NDArray[np.bool_]],
    different: Collection[int],
) -> tuple[list[Comparison], list[Comparison]]:
    """(the first so many of the rows that count, those before them that were judged to be somebody else)."""
    first: list[int] = []
    cleared: list[int] = []
    for low in range(0, len(ranked), _FIRST_ROWS):
        rows = ranked.rows[low : low + _FIRST_ROWS]
        for at in np.flatnonzero(which_count(rows)).tolist():
            if len(first) < count:
                (cleared if int(rows[at]) in different else first).append(low + at)
        if len(first) == count:
            break
    comparisons = ranked.at(first + cleared)
    return comparisons[: len(first)], comparisons[len(first) :]


def _candidates(
    names: Sequence[str], comparisons: Sequence[Comparison], kinds: Sequence[Kind]
) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(name, rank, c.score_db, c.extrapolated, c.evidence, c.charge_db, kind, c.interval_db)
        for rank, (name, c, kind) in enumerate(zip(names, comparisons, kinds, strict=False), start=1)
    )


def _better(a: Template | None, b: Template) -> tuple[Template, Template | None]:
    """(the template to keep, the one it supersedes), by quality; the first where they are equal."""
    if a is None:
        return b, None
    return (b, a) if (b.quality or 0.0) > (a.quality or 0.0) else (a, b)


def _require_subject(encounter: Encounter) -> None:
    if encounter.subject_id is None:
        raise InvalidInput("the encounter has no subject_id; enrolment needs one, identify does not")


def _snake_case(name: str) -> str:
    return "".join("_" + letter.lower() if letter.isupper() else letter for letter in name).lstrip("_")
