"""The engine: the path of the data, from captures to a durable decision.

Owns the public class: which stages a call goes through, and in which order. Never decodes, compares or stores itself.

    extract -> search a snapshot -> (under the writer's lock) search what came since -> decide -> commit -> answer

The machinery of the stages lies beside it, each part in a module of its own:

    probes.py       encounters become templates, which are checked
    searches.py     the gallery as it is, searched for several callers at once
    deciding.py     what was found becomes a decision
    enrolment.py    search, wait for the lock, settle, commit: `enroll`, `update`, `enroll_many`
    review.py       cases and verdicts: `dispute`, `adjudicate`
    loading.py      subjects added without a search: `add_templates`, `load_templates`, `import_captures`

What holds throughout:

1. Nothing is answered before its commit is durable.
2. Enrolment is linearizable: the commit compares the probe with every row that its search had not seen, those of the
   same batch included, so that of two simultaneous enrolments of one person at most one is unique.
3. An `encounter_id` seen before gets the answer it got then, and changes nothing. Only a refusal of captures is not final: with
   other captures the encounter is decided anew.
4. Decisions that wait for the lock together are committed together: one sync of the disk acknowledges them all.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.config import Config, Policy
from biodedup.embed.extractor import Extractor
from biodedup.engine.decide import Decider
from biodedup.engine.enrol import Enrolment
from biodedup.engine.load import Cells, Loaded, Loader
from biodedup.engine.policy import PolicyInForce
from biodedup.engine.prepare import Preparer, Probe, check_column, check_models, in_memory, refuse_other_models
from biodedup.engine.review import Review
from biodedup.engine.search import Searches
from biodedup.errors import NOT_TAKEN, EngineClosed, InvalidInput, SubjectExists, UnknownSubject
from biodedup.gallery.answers import answered_before, digest_of, from_json
from biodedup.gallery.care.health import Copied, backup, inspect
from biodedup.gallery.care.history import NotedClock, date_notes
from biodedup.gallery.care.lookalikes import look_alikes
from biodedup.gallery.files.filesystem import LocalStorage, Storage
from biodedup.gallery.files.packed import Packed, pack_text
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.policies import PolicyVersion
from biodedup.match.calibrations import SAMPLE_SIZE, Calibrations, Drawn
from biodedup.match.compare import Comparer
from biodedup.match.minutiae import CylinderMatcher
from biodedup.match.pairs import PairComparer, record_candidates, record_verification, shipped_pair_comparer
from biodedup.memory import within_memory
from biodedup.renamed import renamed
from biodedup.search.clusters import clusters_of
from biodedup.search.explain import JoinPlan, SearchPlan, plan_of
from biodedup.search.searcher import Searcher
from biodedup.texts import KnownId
from biodedup.trace import tracing
from biodedup.values import (
    NOTE_LENGTH_MAX,
    Case,
    Cluster,
    Decision,
    Encounter,
    EnrolledEncounter,
    Link,
    Ruling,
    Score,
    SearchResult,
    Template,
    Verdict,
    Verification,
    check_groups,
    check_text,
)


@dataclass(frozen=True)
class JoinedTile:
    """A piece of an N:N join. done: subjects compared with all behind them, of total, or as much of the work; links: pairs that reached
    the threshold; reached: (row behind the last one compared, rows of the gallery), for another join to go on from."""

    done: int
    total: int
    links: tuple[Link, ...]
    reached: tuple[int, int]


@within_memory
class Engine:
    """An open gallery with its models. Thread-safe; close it, or use it as a context manager.

    Every method raises OutOfMemory where memory does not suffice: nothing was acknowledged, and the engine stays usable.
    """

    def __init__(
        self,
        gallery: Gallery,
        config: Config,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        override_policy: bool = False,
    ) -> None:
        self._config = config
        self._clock = clock
        self._gallery = gallery
        self._policy = PolicyInForce(gallery, config.policy, override=override_policy)
        clock = NotedClock(clock, gallery.snapshot)
        self._extractor = Extractor(config)
        self._drawn_of: dict[str, tuple[int, str, NDArray[np.int64]]] = {}
        known = Calibrations(self._extractor.cards, self._drawn, own_strangers=lambda: self.policy.own_strangers)
        self._matcher = CylinderMatcher(config.threads)
        self._comparer = Comparer(known.of, self._matcher, known.with_minutiae)
        self._pairs = PairComparer(known, self._comparer)
        self._searcher = Searcher(self._comparer, config.search, config.threads, self._policy)
        self._preparer = Preparer(gallery, self._extractor, known, config)
        self._searches = Searches(gallery, self._searcher)
        self._decider = Decider(config, self._policy, self._comparer, clock)
        self._enrolment = Enrolment(
            gallery, self._preparer, self._searches, self._decider, new_id, config.gallery.encounters_max
        )
        self._review = Review(gallery, self._preparer, self._searches, self._decider, self._enrolment, clock)
        self._loader = Loader(gallery, self._preparer, self._decider, new_id, config.gallery.seal_rows)
        self._closed = False
        refuse_other_models(gallery, self._extractor)

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: Config | None = None,
        *,
        read_only: bool = False,
        override_policy: bool = False,
        storage: Storage | None = None,
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> Engine:
        """Opens the gallery in a folder, creating it where the folder is absent or empty.

        A gallery keeps the policy that it is created with, until `set_policy` stores another one, and every opener decides by it.
        config.policy, where given, has to be the same; override_policy: decide by it all the same, in this process alone, and store nothing.
        storage, clock, new_id: the seams to the disk, the time in seconds, and fresh identifiers. A clock that tells a time before the
        newest decision's is believed all the same; a warning in the log `biodedup` says so.
        Raises NotAGallery, PolicyMismatch, ModelMismatch, GalleryBusy (another writer), GalleryDamaged, StorageUnavailable.
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
            return cls(gallery, config, clock, new_id, override_policy)
        except BaseException:
            gallery.close()
            raise

    def close(self) -> None:
        """Releases the gallery and its files at once. What was answered stays valid; a call that is still reading in another thread, and
        a generator that has not ended, raise EngineClosed. Closing twice does nothing, nor does closing in a child of a fork: it is the
        parent's."""
        if not self._closed:
            self._closed = True
            self._extractor.close()
            self._gallery.close()
            if self._gallery.is_of_this_process:
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

    @property
    def pairs(self) -> PairComparer:
        """Compares two sets of templates as searches of this gallery do."""
        self._gallery.check_process()
        return self._pairs

    # settings ---------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """What it was opened with, and the policy in force."""
        return self._config if self._config.policy == self.policy else replace(self._config, policy=self.policy)

    @property
    def policy(self) -> Policy:
        """What decisions are made by: the gallery's policy, or the one that overrides it in this process."""
        return self._policy()

    def policies(self) -> list[PolicyVersion]:
        """Every version of the gallery's policy, the first one first."""
        self._check_open()
        return list(self._gallery.policies)

    def set_policy(self, policy: Policy, *, by: str, reason: str) -> PolicyVersion:
        """Stores a policy as the gallery's next version, which decides from now on; the present one again changes nothing.

        by: who changes it; reason: why. Readers see it when they refresh. Raises InvalidInput, StorageUnavailable.
        """
        self._check_open()
        return self._policy.store(policy, by, reason, self._clock)

    # decided enrolment ------------------------------------------------------------------------------------------

    def enroll(self, encounter: Encounter, *, across_positions: bool | None = None) -> Decision:
        """Searches the whole gallery and enrols the subject if nobody in it is the same person.

        Only `unique` adds the subject. `review` keeps the templates aside; `duplicate` and `refused` keep the decision. An encounter that
        lacks captures that `Policy.required` asks for is `refused`, with the reason `incomplete`, and its refusals name each of them.
        Repaired, it may be sent again under its encounter_id.
        across_positions: compare each finger with fingers of all positions; `Candidate.swaps` says which labels look wrong. None:
        as `SearchConfig.across_positions` says, here and wherever it can be given.
        Raises SubjectExists, EncounterConflict, ModelMismatch, InvalidInput; StorageUnavailable if nothing was written;
        CaptureUnavailable if a capture's file is absent or cannot be read: nothing is recorded, send the encounter again with it.
        """
        return self._enrol(encounter, across_positions, replaces=False)

    def update(
        self,
        encounter: Encounter,
        *,
        across_positions: bool | None = None,
        replace: bool = False,
        reason: str = "",
    ) -> Decision:
        """Adds an encounter to an enrolled subject, if its captures verify as the subject's and nobody else's.

        The captures are compared 1:1 with what is enrolled, at `policy.verify_fmr`, and with everything else. `unique`: the encounter
        is a further row of the subject; columns that were not sent stay. Of too many rows the best are kept
        (`GalleryConfig.encounters_max`). `review`: a case; with the reason `another_person` the captures were not confirmed as the
        subject's. `duplicate`: they are somebody else's. All but `unique` leave the subject as it was.
        replace: all that was enrolled of the subject is replaced, without being verified against; reason, which is needed then, stands
        in the decision. Raises UnknownSubject, EncounterConflict, ModelMismatch, InvalidInput, CaptureUnavailable, StorageUnavailable.
        """
        if replace != bool(reason):
            raise InvalidInput("replace=True and a reason go together: say why all that is enrolled is to be replaced")
        check_text(reason, "the reason", NOTE_LENGTH_MAX)
        return self._enrol(encounter, across_positions, replaces=True, reason=reason)

    def _enrol(
        self, encounter: Encounter, across_positions: bool | None, *, replaces: bool, reason: str = ""
    ) -> Decision:
        self._check_open()
        sought = self._enrolment.seek([encounter], self._across(across_positions), replaces=replaces, reason=reason)
        (answer,) = self._enrolment.commit(sought)
        if isinstance(answer, NOT_TAKEN):
            raise answer
        return answer

    def enroll_many(
        self, encounters: Iterable[Encounter], *, across_positions: bool | None = None
    ) -> Iterator[Decision]:
        """Enrols a stream; decisions come in its order. Captures are embedded, and decisions committed, in batches.

        The next batch is read and searched while one is committed; what the one before it added is searched for at the commit.

        An encounter that `enroll` would raise a CallerError or CaptureUnavailable for comes out `refused`, with the text as its detail;
        nothing is recorded of it, and it may be sent again.
        """
        self._check_open()
        across, stream = self._across(across_positions), iter(encounters)
        batches = iter(lambda: list(islice(stream, self._config.batch_size)), [])
        for batch, sought in self._enrolment.ahead(batches, across):
            self._check_open()
            for encounter, answer in zip(batch, self._enrolment.commit(sought), strict=True):
                if isinstance(answer, NOT_TAKEN):
                    answer = self._decider.refused(encounter, answer, self._gallery.snapshot())
                yield answer

    # cases: what went to review -----------------------------------------------------------------------------------

    def dispute(self, encounter: Encounter) -> Decision:
        """Opens a case for an encounter whose subject is enrolled and whose captures look like somebody else's, as `verify` said: a
        person judges whether they are the subject's. The decision, `review`, has the subject as its candidate.

        Raises UnknownSubject, EncounterConflict, ModelMismatch, InvalidInput (without a usable capture, too), CaptureUnavailable,
        StorageUnavailable.
        """
        self._check_open()
        return self._review.dispute(encounter)

    def cases(self) -> Iterator[Case]:
        """The open cases, in the order of their encounter_ids."""
        self._check_open()
        yield from self._review.open_cases()

    def case(self, encounter_id: str) -> Case:
        """One case, open or closed. Raises InvalidInput for an encounter that never went to review."""
        self._check_open()
        return self._review.case(encounter_id)

    def verdicts(self) -> list[Verdict]:
        """All that were ever given, oldest first."""
        self._check_open()
        return self._gallery.verdicts()

    def adjudicate(
        self, case: str | Case, ruling: Ruling, by: str, note: str = "", *, candidate: str | None = None
    ) -> Decision:
        """Takes a person's verdict on a case and returns the decision as it stands then.

        `same`: the encounter is of that candidate; it is a duplicate, and not enrolled. `different`: it is not; once no candidate is
        left, in the list and in a search of all that is enrolled or waits by now, the subject is enrolled or updated; otherwise the case
        stays in `review`. The verdict is about the rows that were compared: these pairs are raised in no search of the case and in no
        join again, but a subject that gets another row is asked about anew. `recapture`: refused; the templates are dropped.
        case: its encounter_id, or the Case that was looked at: then a candidate that came or changed meanwhile raises EncounterConflict,
        so that nothing is judged unseen. candidate: the subject_id of one, or the encounter_id of one that is an open case
        (`Candidate.key`); None means the only one, or with `different` all. Open cases that are linked with this one are decided again; one that has no candidate left is enrolled.

        Where the subject itself is the candidate (`dispute`, an update that was not confirmed), `different` refuses the encounter;
        `same` accepts it, once no other is left as above, as a further row of the subject; if the subject was enrolled anew meanwhile,
        the captures are verified against its new rows, or asked about again.

        The same verdict again changes nothing. Raises EncounterConflict for another one on what was judged, SubjectExists or
        UnknownSubject where the subject was enrolled or removed otherwise, InvalidInput, StorageUnavailable.
        """
        self._check_open()
        return self._review.adjudicate(case, ruling, by, note, candidate)

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
        probe = self._prepared(encounter)
        seen = self._searches.seek([probe], across=self._across(across_positions), groups=_checked(groups))
        decision = self._decider.decide(probe, seen.found[0], seen.snapshot, version=seen.snapshot.version)
        if (steps := tracing()) is not None:
            record_candidates(steps, probe.templates, decision, self._gallery.templates_of)
        return decision

    def verify(self, encounter: Encounter, subject_id: str) -> Verification:
        """1:1, at `policy.verify_fmr`. Raises UnknownSubject. Without a usable capture nothing is accepted."""
        self._check_open()
        probe = self._prepared(encounter)
        snapshot = self._gallery.snapshot()
        templates = snapshot.best_templates(subject_id)
        if templates is None:
            raise _unknown(subject_id)
        result = self._decider.verify(probe, subject_id, snapshot, snapshot.rows_under(subject_id))
        if (steps := tracing()) is not None:
            record_verification(steps, probe.templates, templates, result)
        return result

    def search(
        self,
        probes: Mapping[str, NDArray[Any]],
        k: int = 20,
        *,
        groups: Collection[str] | None = None,
        model_id: str | None = None,
    ) -> SearchResult:
        """Nearest subjects by one column's embeddings; every row is compared.

        probes: column -> float32 (q, d), unit rows; one column. groups: search only subjects that belong to one of them. model_id: what
        made the probes; it must be the column's, which None takes for granted. Raises ModelMismatch.
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
        rows = self._preparer.probes_of(column, vectors, model_id)
        return self._searches.nearest(column, rows, k, _checked(groups))

    def plan(self, columns: Collection[str] = ("face",)) -> SearchPlan:
        """How a search of these columns is done at present, and what it may miss; `plan.explain()` says it with its evidence."""
        self._check_open()
        for column in columns:
            check_column(column)
        snapshot = self._gallery.snapshot()
        together = self._searcher.together(snapshot, columns)
        return plan_of(snapshot, tuple(columns), self._config.search.miss_risk, together)

    def plan_join(self, threshold_db: float | None = None) -> JoinPlan:
        """How a join of everybody with everybody is done at present, for pairs that reach a threshold, and what it may miss. Takes some
        seconds for a large gallery, of which the join itself is spared those."""
        self._check_open()
        if threshold_db is None:
            threshold_db = self.policy.link_db(len(self))
        return JoinPlan(self._searcher.caps(self._gallery.snapshot(), threshold_db), self._config.search.miss_risk)

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
        different are left out. Of a large gallery of faces each compares those that meet in some caps (search/caps.py), so that a pair may
        come up more than once; that a mate is missed has at most the probability `SearchConfig.miss_risk`.

        threshold_db: None takes the policy's duplicate threshold. skip: subjects that are done already. among: only these subjects,
        each with everybody, so that a pair of two of them comes up twice; those not enrolled are passed over. since: (row, rows):
        of `among`, only those from this row on, and besides everybody who was enrolled or updated since there were so many rows.
        """
        self._check_open()
        if threshold_db is None:
            threshold_db = self.policy.link_db(len(self))
        snapshot = self._gallery.snapshot()
        snapshot = snapshot.enrolled
        live = snapshot.live_rows() if among is None else np.unique(snapshot.all_rows_of(_packed(among))[1])
        if since is not None:
            everybody = snapshot.live_rows()
            live = np.union1d(live[live >= since[0]], everybody[everybody >= since[1]])
        for done, row, links in self._searches.join(
            snapshot, live, threshold_db, with_all=among is not None, skip=skip
        ):
            yield JoinedTile(done, len(live), tuple(links), (row, snapshot.row_count))
            self._check_open()

    # undecided changes ------------------------------------------------------------------------------------------

    def add_templates(
        self,
        subject_ids: Sequence[str],
        templates: Mapping[str, Cells],
        *,
        model_id: str | Mapping[str, str] | None = None,
        groups: Sequence[Sequence[str]] | None = None,
        encounter_id: str | None = None,
    ) -> int:
        """Adds subjects without a search, all or none. Returns how many were added.

        templates: column -> float32 (n, d), unit rows; or, of a finger, n minutiae records, None where a subject has none: they
        are of `FingerConfig.record_model_id`. model_id: what made the vectors, one for all or by column; it can be left out where the
        gallery's column has a model already. groups: of each subject. encounter_id names the whole call: sent again, it adds
        nothing and returns 0. Raises InvalidInput, SubjectExists, ModelMismatch, EncounterConflict, StorageUnavailable.
        """
        self._check_open()
        return self._loader.add(
            subject_ids, templates, groups, encounter_id, model_id=model_id, keep_enrolled=False
        ).added

    def load_templates(
        self,
        subject_ids: Sequence[str],
        templates: Mapping[str, Cells],
        *,
        model_id: str | Mapping[str, str] | None = None,
        groups: Sequence[Sequence[str]] | None = None,
        encounter_id: str | None = None,
    ) -> Loaded:
        """As `add_templates`, but subjects that are enrolled already are kept as they are, and told apart: the same
        templates, or others."""
        while True:
            self._check_open()
            try:
                return self._loader.add(
                    subject_ids, templates, groups, encounter_id, model_id=model_id, keep_enrolled=True
                )
            except SubjectExists:
                continue  # enrolled by another thread since they were told apart

    def import_captures(self, encounters: Sequence[Encounter]) -> list[Decision]:
        """Adds subjects from their captures without a search, in one commit: an archive to be deduplicated afterwards.

        Decisions have no candidates; `unique` here means added, from those of its captures that can be used: `Policy.required` is not
        asked for. A subject_id that is enrolled is replaced: its newest encounter counts. An encounter_id seen before changes nothing.
        """
        self._check_open()
        return self._loader.import_captures(encounters)

    def admit(self, encounters: Sequence[Encounter]) -> list[Decision]:
        """Deprecated: `import_captures`."""
        renamed("Engine.admit", "Engine.import_captures")
        return self.import_captures(encounters)

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

    def maintain(self) -> None:
        """Seals and merges what is due, now instead of in the background; after a bulk load, for example."""
        self._check_open()
        self._gallery.maintain()

    def tidy(self) -> None:
        """Deprecated: `maintain`."""
        renamed("Engine.tidy", "Engine.maintain")
        self.maintain()

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
        """int64 (n,): the newest row of each, -1 where it is not enrolled. Rows only grow; a subject that is updated gets another one."""
        self._check_open()
        return self._gallery.snapshot().rows_of(_packed(subject_ids))

    def templates(self, subject_id: str) -> dict[str, Template]:
        """column -> the best template enrolled there, by quality, then the newest; embeddings of a sealed row in eight bits a number.
        Raises UnknownSubject."""
        self._check_open()
        templates = self._gallery.templates_of(subject_id)
        if templates is None:
            raise _unknown(subject_id)
        return templates

    def encounters(self, subject_id: str) -> list[EnrolledEncounter]:
        """The encounters that an enrolled subject owns, oldest first. Raises UnknownSubject."""
        self._check_open()
        owned = self._gallery.snapshot().encounters_of(subject_id)
        if not owned:
            raise _unknown(subject_id)
        return owned

    def decision(self, encounter_id: str) -> Decision | None:
        """The decision that an encounter got, or None for one never seen; of a case, as it stands by now."""
        self._check_open()
        stored = self._gallery.answer(encounter_id)
        return None if stored is None or '"added"' in stored[1] else from_json(stored[1])

    def recall(self, encounter: Encounter) -> Decision | None:
        """The decision that this very encounter got, or None for one never seen. Writes nothing. Raises EncounterConflict where its id was
        sent with other content."""
        self._check_open()
        encounter = in_memory(encounter, self.config.capture)
        return answered_before(self._gallery.answer, encounter, digest_of(encounter))

    def info(self) -> dict[str, Any]:
        """Counts, models and thresholds, JSON-ready."""
        self._check_open()
        snapshot = self._gallery.snapshot()
        duplicate_db, review_db = self.policy.thresholds_db(snapshot.searched_count)
        counts = snapshot.column_counts()
        models = {
            column: {"model_id": model.model_id, "dimension": model.dimension, "subjects": counts[column]}
            for column, model in snapshot.models.items()
        }
        return {
            "gallery_id": self._gallery.gallery_id,
            "gallery_version": snapshot.version,
            "subjects": snapshot.live_count,
            "rows": snapshot.live_count + snapshot.extra_rows,
            "removed_not_erased": len(snapshot.tombstones),
            "segments": len(snapshot.parts) - 1,
            "sealed_rows": snapshot.parts[-1].first_row,
            "columns": models,
            "groups": sorted(set().union(*snapshot.group_sets.values())),
            "encounters": snapshot.outcomes(),
            "open_cases": len(self._gallery.open_cases()),
            "policy": {"version": self._gallery.policies[-1].version, **asdict(self.policy)},
            "duplicate_db": round(duplicate_db, 2),
            "review_db": round(review_db, 2),
        }

    def problems(self) -> list[str]:
        """What a full check of the stored data finds wrong; empty when sound."""
        self._check_open()
        return [str(problem) for problem in inspect(self._gallery.storage, self._gallery.folder)]

    def notes(self, now: float) -> list[str]:
        """What is odd in the gallery and no damage: ids that look alike, decisions dated by a clock that was set back. now: seconds."""
        self._check_open()
        snapshot = self._gallery.snapshot()
        count, groups = look_alikes(snapshot)
        told = [f"subject ids that look alike: {', '.join(map(repr, names))}" for names in groups]
        if count > len(groups):
            told.append(f"... and {count - len(groups):,} groups more of subject ids that look alike")
        return told + date_notes(snapshot, now)

    def backup(self, target: str | Path) -> Copied:
        """Copies the gallery as of now to a folder, while others go on; again, it copies only segments that are new.

        The copy is a gallery, with what jobs keep beside it. Raises InvalidInput where the folder holds something else,
        GalleryDamaged, StorageUnavailable.
        """
        self._check_open()
        return backup(self._gallery.storage, self._gallery.folder, Path(target))

    # shared -----------------------------------------------------------------------------------------------------

    def _across(self, asked: bool | None) -> bool:
        return self._config.search.across_positions if asked is None else asked

    def _prepared(self, encounter: Encounter) -> Probe:
        probe = self._preparer.probe(encounter)
        check_models(probe.templates, self._gallery.snapshot().models)
        return probe

    def _drawn(self, model_id: str) -> Drawn:
        """Some of the enrolled, for calibrations."""
        snapshot = self._gallery.snapshot()
        version, column, rows = self._drawn_of.get(model_id, (-1, "", np.zeros(0, np.int64)))
        if version != snapshot.version:
            column, rows = snapshot.drawn(model_id, SAMPLE_SIZE)
            self._drawn_of[model_id] = snapshot.version, column, rows
        key = column, rows.tobytes(), snapshot.sealed_before(rows)  # sealing rounds vectors
        return Drawn(key, len(rows), lambda: snapshot.embeddings(rows, column))

    def _check_open(self) -> None:
        self._gallery.check_process()
        if self._closed:
            raise EngineClosed("the engine was closed; open it again")


def compare(a: Template, b: Template) -> Score:
    """1:1, without a gallery. score_db = -10 log10(FMR); similarity for embeddings, minutiae for fingers, else None.

    Raises ModelMismatch for templates of two models, InvalidInput for a face against a finger and for an unsound record.
    """
    return shipped_pair_comparer().score(a, b)


def _unknown(subject_id: str) -> UnknownSubject:
    return UnknownSubject(f"subject {subject_id!r} is not enrolled; enrol it first, or check the id")


def _packed(subject_ids: Sequence[str]) -> Packed:
    """For look-ups: an undecodable file name is nobody's id."""
    return pack_text([subject_id.encode("utf-8", "replace").decode() for subject_id in subject_ids])


def _checked(groups: Collection[str] | None) -> tuple[str, ...] | None:
    """Groups to search in: galleries may have some that are older than the rules for new ones."""
    if groups is None or isinstance(groups, str):
        return None if groups is None else check_groups(groups)
    return check_groups([KnownId(group) if isinstance(group, str) else group for group in groups])
