"""The public class `Engine`: enrols, searches, verifies and adjudicates on one open gallery.

Owns the order of the steps of each call. Other modules decode, compare and store.

    enroll:    prepare -> search -> (under the writer's lock) search the newer rows -> decide -> commit -> answer
    identify:  prepare -> search -> decide -> answer

Each step has a module:

    prepare.py   turns an encounter into a probe: checked templates
    search.py    searches the newest snapshot, for several callers at once
    sample.py    draws the subjects of that snapshot that calibrate the scores
    decide.py    turns the candidates into a decision, by the policy in force (policy.py)
    enrol.py     searches, locks, decides, commits: `enroll`, `update`, `enroll_many`
    review.py    keeps cases and verdicts: `dispute`, `adjudicate`
    load.py      adds subjects without a search: `add_templates`, `load_templates`, `import_captures`

Invariants:

1. A call returns its answer after the commit is durable.
2. Enrolment is linearizable: under the lock, a probe is compared with every row that is newer than its search, including the rows of its
   own batch. If two calls enrol one person at the same time, at most one outcome is `unique`.
3. A repeated `encounter_id` returns the first answer and changes nothing. A refusal of captures is the exception: with other captures,
   the encounter is decided again.
4. Group commit: decisions that wait for the lock are committed together, with one sync of the disk.
5. A decision uses the calibration of the snapshot that was searched.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from biodedup.common.arguments import checked, checked_methods
from biodedup.common.memory import within_memory
from biodedup.common.renamed import renamed
from biodedup.common.tables import differences
from biodedup.config import Config, Policy
from biodedup.embed.extractor import Extractor
from biodedup.engine.callers.approvals import Approval, Approvals, Approve, Signer, needs_none, signer_of
from biodedup.engine.callers.audit import AuditLog, Call, audited, counted, current_call, move_old, named, read_archive
from biodedup.engine.callers.binding import BoundModel, ModelBinding
from biodedup.engine.callers.budgets import Alarm, Budgets
from biodedup.engine.callers.disclosure import disclosed_decision, disclosed_search, disclosed_verification
from biodedup.engine.callers.export_right import note_export
from biodedup.engine.decide import Decider
from biodedup.engine.enrol import Answer, Enrolment, PreparedBatch
from biodedup.engine.info import info_of, notes_of
from biodedup.engine.joining import JoinedTile, Joining
from biodedup.engine.load import ArrowBatch, Cells, Loaded, Loader
from biodedup.engine.log import EngineLog
from biodedup.engine.policy import PolicyInForce
from biodedup.engine.prepare import (
    Preparer,
    Probe,
    check_column,
    check_models,
    in_memory,
    refuse_other_models,
    require_subject,
)
from biodedup.engine.receipt import Receipt, receipt_of
from biodedup.engine.review import Review
from biodedup.engine.sample import GallerySamples
from biodedup.engine.search import BatchedSearch
from biodedup.engine.subjects import decisions_of, group_counts, listed, subject_of
from biodedup.errors import (
    NOT_TAKEN,
    BudgetExhausted,
    EngineClosed,
    InvalidInput,
    NotAllowed,
    SubjectExists,
    UnknownSubject,
)
from biodedup.gallery.answers import digest_of, from_json
from biodedup.gallery.care.backup import Copied, backup
from biodedup.gallery.care.canary_vectors import rekey_canaries
from biodedup.gallery.care.history import NotedClock, finite
from biodedup.gallery.care.retention import Due, Limits, due, erase, next_number
from biodedup.gallery.care.verify import inspect
from biodedup.gallery.cases import earlier_answer
from biodedup.gallery.catalogue.audit import AuditRecord, chosen
from biodedup.gallery.catalogue.chain import Link as ChainLink
from biodedup.gallery.files.filesystem import LocalStorage, Storage
from biodedup.gallery.files.index_codec import refuse_unknown
from biodedup.gallery.files.packed import Packed, pack_text
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.indexing import IndexLimits
from biodedup.gallery.policies import PolicyVersion, differences_in_words
from biodedup.gallery.snapshot import Snapshot
from biodedup.gallery.transaction import Transaction
from biodedup.index_spec import EVERY_COLUMN, parse_specs
from biodedup.match.compare import Comparer
from biodedup.match.pairs import PairComparer, record_candidates, record_verification, shipped_pair_comparer
from biodedup.match.prints.minutiae import CylinderMatcher
from biodedup.match.scores.calibrations import Calibrations
from biodedup.principals import Principal
from biodedup.search.clusters import Links
from biodedup.search.explain import JoinPlan, SearchPlan, plan_of
from biodedup.search.searcher import Searcher
from biodedup.search.selfjoin.join import SelfJoin
from biodedup.search.shards import faiss as faiss_engine
from biodedup.search.shards import faiss_view
from biodedup.texts import KnownId
from biodedup.trace import tracing
from biodedup.values import (
    NOTE_LENGTH_MAX,
    Candidate,
    Case,
    Cluster,
    Decision,
    Encounter,
    EnrolledEncounter,
    ListedSubject,
    Ruling,
    Score,
    SearchResult,
    Subject,
    Template,
    Verdict,
    Verification,
    check_groups,
    check_id,
    check_text,
)

if TYPE_CHECKING:
    from biodedup.cluster.shards.ray_actors import RayShards


@within_memory
@checked_methods
class Engine:
    """An open gallery with its models. Thread-safe. Close it after use, or use it as a context manager.

    Every method raises OutOfMemory if the memory is too small. The call then acknowledges nothing, and the engine stays usable. Every
    method raises InvalidInput for an argument of the wrong type.
    """

    def __new__(cls, *given: Any, **named: Any) -> Engine:
        gallery = given[0] if given else named.get("gallery")
        if not isinstance(gallery, Gallery):
            raise InvalidInput(
                f"an engine is made by opening a gallery, got {type(gallery).__name__}; write bd.Engine.open(folder)"
            )
        return super().__new__(cls)

    def __init__(
        self,
        gallery: Gallery,
        config: Config,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        override_policy: bool = False,
    ) -> None:
        self._config, self._gallery = config, gallery
        self._clock = clock = finite(clock)
        self._policy = PolicyInForce(gallery, config.policy, override=override_policy)
        clock = NotedClock(clock, gallery.snapshot)
        self._extractor = Extractor(config)
        self._log = EngineLog(config.log)
        samples = GallerySamples(gallery)
        known = Calibrations(
            self._extractor.cards, samples.latest, use_gallery_impostors=lambda: self.policy.use_gallery_impostors
        )
        self._matcher = CylinderMatcher(config.threads)
        self._comparer = Comparer(known.of, self._matcher, known.with_minutiae, known.replay_of)
        self._pairs = PairComparer(known, self._comparer)
        self._elsewhere = _shards_elsewhere(gallery, config)
        self._searcher = Searcher(
            self._comparer, config.search, config.threads, self._policy, self._elsewhere or faiss_engine.shards
        )
        self._preparer = Preparer(gallery, self._extractor, known, config, self._policy, self._clock)
        self._join = SelfJoin(self._searcher, self._comparer, config.search)
        self._searches = BatchedSearch(gallery, self._searcher, self._join, samples, self._log)
        self._decider = Decider(config, self._policy, self._comparer, samples, clock)
        self._enrolment = Enrolment(
            gallery, self._preparer, self._searches, self._decider, new_id, config.gallery.encounters_max, log=self._log
        )
        self._review = Review(
            gallery=gallery,
            preparer=self._preparer,
            searches=self._searches,
            decider=self._decider,
            enrolment=self._enrolment,
            clock=clock,
            log=self._log,
        )
        self._loader = Loader(
            gallery=gallery,
            preparer=self._preparer,
            decider=self._decider,
            new_id=new_id,
            seal_rows=config.gallery.seal_rows,
            log=self._log,
            threads=config.threads,
        )
        self._budgets = Budgets(gallery, self._policy, self._clock, self._log)
        self._approvals = Approvals(gallery, self._clock, self._log)
        self._binding = ModelBinding(gallery, self._extractor.cards, self._clock)
        self._audit = AuditLog(gallery, config.audited, self._clock)
        self._caller: Principal | None = None
        self._purpose = ""
        self._sign: Signer | None = None
        self._restricted = True
        self._closed = threading.Event()
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
        """Opens the gallery in a folder, and creates it if the folder is absent or empty.

        path: the folder, or the URL of a register on several machines, `postgresql://user@host/database?gallery=NAME`, with
        `Config.cluster`. Any number of processes may write to a register. read_only: open without the right to write; a register must
        exist already.
        A gallery keeps its first policy until `set_policy` stores another policy. A given config.policy must equal the stored policy.
        override_policy: use config.policy in this process only, and store nothing.
        storage, clock, new_id: the disk, the time in seconds, and new identifiers; tests replace them. A time before the newest decision
        is accepted, with a warning in the log `biodedup.gallery`.
        Raises NotAGallery, KeyMismatch, PolicyMismatch, IndexMismatch, ModelMismatch, GalleryBusy (another writer), GalleryDamaged, StorageUnavailable.
        """
        config = config or Config()
        if config.gallery.renewable and config.keys is None:
            raise InvalidInput(
                "renewable templates need an encrypted gallery; state a key by Config.keys, or leave renewable out"
            )
        for spec in parse_specs(config.gallery.index or {}).values():
            refuse_unknown(spec)
        opened = _opened_register if _is_register(path) else _opened_folder
        gallery = opened(str(path), config, storage or LocalStorage(config.keys), new_id(), read_only)
        try:
            return cls(gallery, config, clock, new_id, override_policy)
        except BaseException:
            gallery.close()
            raise

    def close(self) -> None:
        """Releases the gallery and its files at once. Earlier answers stay valid.

        A call that still reads in another thread raises EngineClosed, and so does an unfinished generator. A second close does nothing. In
        a forked child, close does nothing, because the gallery belongs to the parent process.
        """
        if not self._closed.is_set():
            self._closed.set()
            self._audit.close()
            self._extractor.close()
            self._gallery.close()
            if self._gallery.is_of_this_process:
                if self._elsewhere is not None:
                    self._elsewhere.close()
                self._searcher.close()
                self._matcher.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of enrolled subjects."""
        return self._gallery.snapshot().live_count

    def __contains__(self, subject_id: object) -> bool:
        self.check_open()
        return isinstance(subject_id, str) and self._gallery.snapshot().row_of(subject_id) is not None

    @property
    def folder(self) -> Path | None:
        """The gallery's folder; None for a register in PostgreSQL."""
        return self._gallery.folder if self._config.cluster is None else None

    @property
    def gallery_version(self) -> int:
        """The version of the gallery. It grows by one with every durable change."""
        return self._gallery.snapshot().version

    @property
    def pairs(self) -> PairComparer:
        """Compares two sets of templates, with the calibration that searches of this gallery use."""
        self._gallery.check_process()
        return self._pairs

    # settings ---------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The configuration at opening, with the policy in force."""
        return self._config if self._config.policy == self.policy else replace(self._config, policy=self.policy)

    @property
    def policy(self) -> Policy:
        """The policy in force: the gallery's policy, or the policy that overrides it in this process."""
        return self._policy()

    def policies(self) -> list[PolicyVersion]:
        """All versions of the gallery's policy, oldest first."""
        self._check("audit", "administer")
        return list(self._gallery.policies)

    @audited(changes=True)
    def set_policy(self, policy: Policy, *, by: str = "", reason: str) -> PolicyVersion:
        """Stores a policy as the next version of the gallery's policy. It takes effect at once. The present policy changes nothing.

        by: the person who changes the policy; with `as_principal`, always the principal. reason: why the policy changes. A read-only engine
        sees the new policy after `refresh`.
        Raises InvalidInput, NotAllowed, ApprovalNeeded (`Policy.two_people`), StorageUnavailable.
        """
        self._check("administer")
        by = self._signed(by, "administer")
        version = self._gallery.policies[-1].version

        def facts() -> dict[str, Any]:
            changes = differences(self._gallery.policies[-1].policy, policy)
            return {
                "after_version": version,
                "changes": differences_in_words(changes, "now", "as asked for"),
                "reason": reason,
            }

        if policy == self._gallery.policies[-1].policy:
            return self._policy.store(policy, by, reason, self._clock)
        approve = self._approvals.require("policy", self._caller, facts, sign=self._sign)
        stored = self._policy.store(policy, by, reason, self._clock, approve)
        if stored.version != version:
            self._log.policy_set(stored.version)
        return stored

    def bound_models(self) -> list[BoundModel]:
        """The model cards behind the gallery's decisions, oldest first. A changed card is listed again."""
        self._check("audit", "administer")
        return [BoundModel(*row) for row in self._gallery.cards()]

    @audited(changes=True)
    def accept_models(self) -> list[str]:
        """Notes changed model cards in the hash chain. A card is changed if this process has another version than the gallery.

        Without this call, the first commit after the change notes the card. If `Policy.two_people` names `model`, commits that change the
        gallery's content raise NotAllowed until two people have called this method.
        Returns the model_ids of the changed cards. Raises NotAllowed, ApprovalNeeded, StorageUnavailable."""
        self._check("administer")
        with self._gallery.transaction() as transaction:
            changed = {card.model_id: card.digest for card in self._binding.changed(transaction)}
        if changed:
            approve = self._approvals.require("model", self._caller, lambda: changed, sign=self._sign)
            with self._gallery.transaction() as transaction:
                approve(transaction)
                self._binding.note(transaction, self._binding.changed(transaction))
        return sorted(changed)

    # callers ------------------------------------------------------------------------------------------------------

    def as_principal(self, principal: Principal | str, *, purpose: str = "", key: Path | None = None) -> Engine:
        """Returns this engine for one caller. The caller's roles and budgets apply, and records name the caller.

        The two engines share everything; closing one closes both.
        principal: a Principal, or a name in `Config.identities`. If the configuration has identities, a principal with an unknown name or
        with more roles than configured raises NotAllowed. This method also raises NotAllowed on an engine that already has a principal.
        purpose: why the caller calls, in words for the audit log (`Config.audit`).
        key: the file of the caller's Ed25519 private key, PEM. The key signs requests and approvals of calls that need two people. It is
        required for these calls if the identity states a public key.
        """
        self.check_open()
        known = self._config.identities
        if isinstance(principal, str):
            principal = self._config.identity(principal)
        elif known is not None:
            configured = self._config.identity(principal.name)
            if more := set(principal.roles) - set(configured.roles):
                raise NotAllowed(
                    f"{principal.name!r} is configured without the role {sorted(more)[0]}; leave it out, or configure it"
                )
            principal = replace(principal, public_keys=configured.public_keys)
        if self._caller is not None:
            raise NotAllowed(
                f"this engine is {self._caller.name!r}'s; ask the engine that was opened for another principal's"
            )
        check_text(purpose, "the purpose", NOTE_LENGTH_MAX)
        view = self._view(principal, restricted=True, purpose=purpose)
        view._sign = None if key is None else signer_of(principal, key)
        return view

    @audited()
    def unrestricted(self) -> Engine:
        """Returns this engine with all scores and without budgets, for jobs that measure. A principal needs the role `administer`."""
        self._check("administer")
        return self._view(self._caller, restricted=False, purpose=self._purpose)

    @audited()
    def approvals(self) -> list[Approval]:
        """The requests and approvals of calls that need two people, oldest first."""
        self._check("audit", "supervise", "administer", "review")
        return self._approvals.listed()

    @audited()
    def alarms(self) -> list[Alarm]:
        """The lock-outs of callers whose scores climbed towards a subject (`Policy.climbs_max`), oldest first."""
        self._check("audit", "supervise", "administer")
        return self._budgets.alarms()

    @audited(changes=True)
    def end_lockout(self, caller: str, subject_id: str) -> None:
        """Ends the lock-out of a caller from a subject. Does nothing if there is no lock-out."""
        self._check("supervise")
        self._budgets.release(caller, subject_id)

    # enrolment with a search ------------------------------------------------------------------------------------

    @audited()
    def enroll(self, encounter: Encounter, *, across_positions: bool | None = None) -> Decision:
        """Searches the gallery, and enrols the subject if no enrolled subject or open case is the same person.

        The outcome `unique` enrols the subject. `review` opens a case, which holds the templates. `duplicate` and `refused` record the
        decision only. An encounter that lacks a capture of `Policy.required` is `refused` with the reason `incomplete`. Its refusals name
        each missing capture. The complete encounter may be sent again with the same encounter_id.
        across_positions: compare each finger with fingers of all positions; `Candidate.swaps` lists the labels that look wrong. None means
        `SearchConfig.across_positions`, here and in other calls.
        Raises SubjectExists, EncounterConflict, ModelMismatch, InvalidInput. Raises StorageUnavailable if nothing was written. Raises
        CaptureUnavailable if a capture's file is absent or unreadable; nothing was recorded, so send the encounter again.
        """
        return self._enrol(encounter, across_positions, replaces=False)

    @audited()
    def update(
        self,
        encounter: Encounter,
        *,
        across_positions: bool | None = None,
        replace: bool = False,
        reason: str = "",
    ) -> Decision:
        """Adds an encounter to an enrolled subject, if the captures match this subject and no other subject.

        The captures are compared 1:1 with the subject's rows, at `policy.verify_fmr`, and 1:N with the rest of the gallery. `unique`: the
        encounter becomes another row of the subject, and columns without a new capture stay. If the subject then has more than
        `GalleryConfig.encounters_max` rows, the best rows are kept. `review`: the encounter opens a case; the reason `another_person`
        means that the captures did not verify as the subject. `duplicate`: the captures match another subject. Only `unique` changes the
        subject.
        replace: replace all rows of the subject, without a verification. This needs a reason, which the decision records. A principal needs
        the role `supervise`. With `Policy.two_people`, a second principal must send the same call.
        Raises UnknownSubject, EncounterConflict, ModelMismatch, InvalidInput, CaptureUnavailable, StorageUnavailable.
        """
        if replace != bool(reason):
            raise InvalidInput("replace=True and a reason go together: say why all that is enrolled is to be replaced")
        check_text(reason, "the reason", NOTE_LENGTH_MAX)
        if replace:
            self._check("supervise")
            if self._approvals.needed("replace"):
                encounter, approve = self._approved_replacement(encounter, reason)
                return self._enrol(encounter, across_positions, replaces=True, reason=reason, approve=approve)
        return self._enrol(encounter, across_positions, replaces=True, reason=reason)

    def _approved_replacement(self, encounter: Encounter, reason: str) -> tuple[Encounter, Approve | None]:
        """Returns the encounter with its captures read, and its approval. Two people must send the same content."""
        require_subject(encounter)
        encounter = in_memory(encounter, self.config.capture)
        subject_id, operation = str(encounter.subject_id), f"replace: {reason}"
        if earlier_answer(self._gallery.answer, encounter, digest_of(encounter, operation), self._gallery.snapshot):
            return encounter, None  # a repeated encounter gets its first answer, and changes nothing
        named = replace(
            encounter, encounter_id=encounter.encounter_id or "unnamed"
        )  # only an encounter with an id has a digest
        digest = digest_of(named, operation).hex()
        facts = {"subject_id": subject_id, "reason": reason}

        def about(transaction: Transaction) -> Any:
            return [digest, _rows_of(transaction.snapshot(), [subject_id])]

        return encounter, self._approvals.require("replace", self._caller, lambda: facts, about, self._sign)

    def _enrol(
        self,
        encounter: Encounter,
        across_positions: bool | None,
        *,
        replaces: bool,
        reason: str = "",
        approve: Approve | None = None,
    ) -> Decision:
        self._check("supervise" if reason else "enrol")
        self._take(subjects=[encounter.subject_id] if replaces and encounter.subject_id else ())
        prepared = self._enrolment.search([encounter], self._across(across_positions), replaces=replaces, reason=reason)
        (answer,) = self._enrolment.commit(prepared, approve)
        if (call := current_call()) is not None:
            call.itemised = bool(prepared.fresh)
        if isinstance(answer, NOT_TAKEN):
            raise answer
        return self._named(self._told(answer))

    def enroll_many(
        self, encounters: Iterable[Encounter], *, across_positions: bool | None = None
    ) -> Iterator[Decision]:
        """Enrols a stream of encounters in batches of `Config.batch_size`. Decisions come in the order of the stream.

        While a batch is committed, the next batch is prepared and searched. Rows of the previous batch are searched at the commit.

        If `enroll` would raise a CallerError or CaptureUnavailable for an encounter, its decision is `refused`, with the error's text as
        the detail. This decision is not recorded, and the encounter may be sent again.
        """
        with self._audit.made(self._new_call("enroll_many")) as call:
            call.itemised = True  # a call is recorded here only if it fails
            self._check("enrol")
        across, stream = self._across(across_positions), map(_encounter, encounters)
        batches = iter(lambda: list(islice(stream, self._config.batch_size)), [])
        for batch, prepared in self._enrolment.ahead(batches, across):
            for encounter, answer in zip(batch, self._committed(batch, prepared), strict=True):
                if isinstance(answer, NOT_TAKEN):
                    answer = self._decider.refused(encounter, answer, self._gallery.snapshot())
                    self._log.decided("enroll, not recorded", answer)
                yield self._named(self._told(answer))

    def _committed(self, batch: Sequence[Encounter], prepared: PreparedBatch) -> list[Answer]:
        """Commits a batch of a stream, records the call, and returns the answers."""
        with self._audit.made(self._new_call("enroll_many")) as call:
            call.count, call.itemised = len(batch), True
            self._check("enrol")
            self._take(len(batch))
            answers = self._enrolment.commit(prepared)
            for i, (encounter, answer) in enumerate(zip(batch, answers, strict=True)):
                if i not in prepared.fresh:
                    outcome = answer.outcome if isinstance(answer, Decision) else type(answer).__name__
                    call.changed_nothing("enroll", encounter, outcome)
            return answers

    # cases: encounters in review ----------------------------------------------------------------------------------

    @audited()
    def dispute(self, encounter: Encounter) -> Decision:
        """Opens a case for an enrolled subject whose new captures did not verify. A person then judges whether they are of the subject.

        The decision is `review`, with the subject as its candidate. Raises UnknownSubject, EncounterConflict, ModelMismatch,
        InvalidInput (also if no capture is usable), CaptureUnavailable, StorageUnavailable.
        """
        self._check("enrol")
        self._take(subjects=[encounter.subject_id] if encounter.subject_id else ())
        return self._told(self._review.dispute(encounter))

    @audited()
    def cases(self) -> Iterator[Case]:
        """The open cases, ordered by encounter_id."""
        self._check("review", "audit")
        yield from self._review.open_cases()

    @audited()
    def case(self, encounter_id: str) -> Case:
        """Returns one case, open or closed. Raises InvalidInput if the encounter never went to review."""
        self._check("review", "audit")
        return self._review.case(encounter_id)

    @audited()
    def verdicts(self) -> list[Verdict]:
        """All verdicts, oldest first."""
        self._check("review", "audit")
        return self._gallery.verdicts()

    @audited(changes=True)
    def adjudicate(
        self, case: str | Case, ruling: Ruling, by: str = "", note: str = "", *, candidate: str | None = None
    ) -> Decision:
        """Records a person's verdict on a case, and returns the new decision.

        ruling `same`: the encounter is of the candidate. It becomes a `duplicate` and is not enrolled. `different`: the encounter is not of
        the candidate. The subject is enrolled or updated if the case has no other candidate and a new search returns none. Otherwise the
        case stays in `review`. `recapture`: the encounter is refused, and its templates are dropped.
        A verdict covers the rows that were compared. If a candidate gets another row, it needs another verdict. Open cases that are linked
        with this case are decided again. A repeated verdict changes nothing.

        case: the encounter_id, or the Case that the person saw. With a Case, a candidate that was added or changed since then raises
        EncounterConflict. candidate: the `Candidate.key` that the verdict is about. None means the only candidate; for `different`, it
        means all candidates.

        The subject itself may be the candidate (`dispute`, or an update that did not verify). Then `different` refuses the encounter.
        `same` adds the encounter to the subject as another row, if no other candidate is left. If the subject has been enrolled again since
        the case was opened, the captures must verify against its new rows; otherwise the case stays open.

        by: the person; with `as_principal`, always the principal. With `Policy.two_people`, the first call raises ApprovalNeeded.

        Raises EncounterConflict if the verdict contradicts an earlier verdict. Raises SubjectExists or UnknownSubject if another call has
        enrolled or removed the subject. Raises InvalidInput, StorageUnavailable.
        """
        self._check("review")
        by = self._signed(by, "review")
        encounter_id = case.encounter_id if isinstance(case, Case) else case
        facts = {"encounter_id": encounter_id, "ruling": ruling, "candidate": candidate}

        def about(transaction: Transaction) -> Any:
            now = transaction.case(encounter_id)
            return [] if now is None else sorted((one.key, list(map(int, one.rows))) for one in now.undecided)

        if self._approvals.needed("adjudicate"):
            self._review.case(encounter_id)  # raises InvalidInput if there is no case
        approve = self._approvals.require("adjudicate", self._caller, lambda: facts, about, self._sign)
        return self._review.adjudicate(case, ruling, by, note, candidate, approve=approve)

    # searches that write nothing --------------------------------------------------------------------------------

    @audited()
    def identify(
        self,
        encounter: Encounter,
        *,
        groups: Collection[str] | None = None,
        across_positions: bool | None = None,
        from_db: float | None = None,
    ) -> Decision:
        """Searches and decides 1:N as `enroll` does, and writes nothing. The encounter needs no subject_id.

        groups: search only subjects in at least one of these groups. across_positions: as in `enroll`. from_db: the lowest score in dB of
        a candidate, if lower than the review threshold. A lower from_db takes longer and changes no outcome.
        """
        self._check("search")
        if from_db is not None and not isfinite(from_db):
            raise InvalidInput(f"from_db is {from_db}, wanted a finite number of decibels")
        self._take()
        probe, across = self._prepared(encounter), self._across(across_positions)
        seen = self._searches.search([probe], across=across, groups=_checked(groups), from_db=from_db)
        check_models(probe.templates, seen.snapshot.models)  # a column may get its first model before the search
        decider = self._decider.calibrated_on(seen.snapshot)
        decision = decider.decide(probe, seen.found[0], seen.snapshot, version=seen.snapshot.version)
        self._log.decided("identify", decision, level=logging.DEBUG)
        if (steps := tracing()) is not None:
            record_candidates(steps, probe.templates, decision, seen.found[0].comparisons, self._gallery.templates_of)
        disclosed = self._told(decision)
        self._count_candidates(disclosed.candidates)
        return disclosed

    @audited()
    def verify(self, encounter: Encounter, subject_id: str) -> Verification:
        """Compares an encounter 1:1 with an enrolled subject, at `policy.verify_fmr`. Without a usable capture, it is not accepted. Raises
        UnknownSubject."""
        self._check("verify")
        self._take(subjects=[subject_id])
        probe = self._prepared(encounter)
        snapshot = self._gallery.snapshot()
        templates = snapshot.best_templates(subject_id)
        if templates is None:
            raise _unknown(subject_id)
        decider = self._decider.calibrated_on(snapshot)
        result = decider.verify(probe, subject_id, snapshot, snapshot.rows_under(subject_id))
        if (steps := tracing()) is not None:
            record_verification(steps, probe.templates, templates, result)
        if not self._restricted:
            return result
        self._budgets.verified(self._name, probe.templates, result)
        return disclosed_verification(result, self.policy)

    @audited()
    def search(
        self,
        probes: Mapping[str, NDArray[Any]],
        k: int = 20,
        *,
        groups: Collection[str] | None = None,
        model_id: str | None = None,
        min_similarity: float | None = None,
    ) -> SearchResult:
        """Returns the k nearest subjects of each probe, by the embeddings of one column.

        In a large gallery, each of the k nearest rows is missed with a probability of at most `SearchConfig.miss_risk`; with 0, none is
        missed.
        probes: one column -> float32 (q, d), unit rows. groups: search only subjects in at least one of these groups. model_id: the model
        of the probes; None means the model of the column. min_similarity: leave out subjects below this cosine; the search is faster.
        Raises ModelMismatch if the column has another model or dimension.
        Returns ids (q, k), similarity float32 (q, k), descending; "" and -inf in the places that no subject takes.
        """
        self._check("search")
        if len(probes) != 1:
            raise InvalidInput(
                f"search takes probes of one column, got {len(probes)}; use identify for several captures"
            )
        if k < 1:
            raise InvalidInput(f"k is {k!r}, wanted a whole number of at least 1")
        if min_similarity is not None and not -1 <= min_similarity <= 1:
            raise InvalidInput(f"min_similarity is {min_similarity!r}, wanted a cosine from -1 to 1")
        ((column, vectors),) = probes.items()
        rows = self._preparer.probes_of(column, vectors, model_id)
        counted(len(rows))
        self._take(len(rows))
        result = self._searches.nearest(column, rows, int(k), _checked(groups), min_similarity)
        if not self._restricted:
            return result
        disclosed = self._told_search(column, result)
        self._count_named(disclosed.ids[disclosed.ids != ""].tolist())
        return disclosed

    def plan(self, columns: Collection[str] = ("face",)) -> SearchPlan:
        """Returns the present plan of a search of these columns, with the share of mates that it may miss; see `SearchPlan.explain`."""
        self._check("search", "administer")
        for column in columns:
            check_column(column)
        snapshot = self._gallery.snapshot()
        scanned = self._searcher.scanned(snapshot, columns)
        chosen, rescored = (columns, ()) if scanned is None else (scanned.scanned or columns, scanned.others)
        multicolumn = self._searcher.multicolumn_query(snapshot, chosen, rescored)
        apart = self._searcher.apart(snapshot, chosen)
        joint = self._searcher.joint(snapshot, multicolumn)
        return plan_of(
            snapshot=snapshot,
            columns=tuple(columns),
            miss_risk=self._config.search.miss_risk,
            multicolumn=multicolumn,
            apart=apart,
            scanned=scanned,
            joint=joint,
        )

    def plan_join(self, threshold_db: float | None = None, *, listed: int | None = None) -> JoinPlan:
        """Returns the present plan of a join of all subjects, with the share of mates that it may miss. `plan.estimate` estimates the
        duration and the number of impostor pairs.

        threshold_db: the lowest score of a pair, in dB; None means `Policy.link_db`. listed: the number of subjects to
        compare with all; None means all. For a large gallery, this takes some seconds. A join that follows reuses the plan.
        """
        self._check("administer")
        if threshold_db is None:
            threshold_db = self.policy.link_db(len(self))
        buckets, estimate = self._join.estimate(self._gallery.snapshot(), len(self), threshold_db, listed=listed)
        return JoinPlan(buckets, self._config.search.miss_risk, estimate)

    @audited()
    def find_duplicates(
        self, *, threshold_db: float | None = None, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Cluster]:
        """Returns the clusters of duplicates that `join` finds. progress: called with the number of compared subjects and of all subjects.

        A large gallery takes long; `jobs.find_duplicates` can be interrupted and continued."""
        links = Links()
        for tile in self.join(threshold_db=threshold_db):
            links.add(tile.links, tile.left_out)
            progress(tile.done, tile.total)
        return links.clusters()

    @audited()
    def join(
        self,
        *,
        threshold_db: float | None = None,
        skip: int = 0,
        subject_ids: Sequence[str] | None = None,
        since: tuple[int, int] | None = None,
        among: Sequence[str] | None = None,
    ) -> Iterator[JoinedTile]:
        """Compares N:N, tile by tile, on one snapshot. Each tile compares some subjects with all subjects that were enrolled later.

        Pairs with the verdict `different` are left out. In a large gallery, a pair may be returned more than once, and a mate is missed
        with a probability of at most `SearchConfig.miss_risk`.

        threshold_db: the lowest score of a pair, in dB; None means `Policy.link_db`. skip: the number of subjects to skip,
        because an earlier call compared them. subject_ids: compare only these subjects, each with all others; a pair of two of them is
        returned twice. Ids of subjects that are not enrolled are ignored.
        since: (row, rows). Of subject_ids, compare only rows with at least the number `row`. Also compare every subject that was enrolled
        or updated after the gallery had `rows` rows. among: deprecated name of subject_ids.
        """
        if among is not None:
            warnings.warn("join(among=...) is join(subject_ids=...) now", DeprecationWarning, stacklevel=2)
            subject_ids = among
        joining = self._joining(threshold_db, subject_ids, since)
        for step in joining.steps(skip):
            yield joining.tile(step)
            self.check_open()

    @audited()
    def joining(
        self,
        *,
        threshold_db: float | None = None,
        subject_ids: Sequence[str] | None = None,
        since: tuple[int, int] | None = None,
    ) -> Joining:
        """Returns the join of `join` as independent steps. The arguments are those of `join`."""
        return self._joining(threshold_db, subject_ids, since)

    def _joining(
        self, threshold_db: float | None, subject_ids: Sequence[str] | None, since: tuple[int, int] | None
    ) -> Joining:
        self._check("administer")
        if threshold_db is None:
            threshold_db = self.policy.link_db(len(self))
        snapshot = self._gallery.snapshot().enrolled
        live = snapshot.live_rows()
        rows = live if subject_ids is None else np.unique(snapshot.all_rows_of(_packed(subject_ids))[1])
        if since is not None:
            rows = np.union1d(rows[rows >= since[0]], live[live >= since[1]])
        with_all = subject_ids is not None or since is not None
        return self._searches.joining(snapshot, rows, threshold_db, with_all=with_all)

    # changes without a search -----------------------------------------------------------------------------------

    @audited()
    def add_templates(
        self,
        subject_ids: Sequence[str] | ArrowBatch,
        templates: Mapping[str, Cells] | None = None,
        *,
        model_id: str | Mapping[str, str] | None = None,
        groups: Sequence[Sequence[str]] | None = None,
        encounter_id: str | None = None,
    ) -> int:
        """Adds subjects without a search, all or none. Returns the number of added subjects.

        templates: column -> float32 (n, d), unit rows. A finger may have n minutiae records instead, of the model
        `FingerConfig.record_model_id`, with None for a subject without a record. model_id: the model of the vectors, one for all columns
        or one for each; optional if the column has a model already. groups: the groups of each subject. encounter_id: names the
        whole call. A repeated call adds nothing and returns 0.

        Instead, subject_ids may be a pyarrow.RecordBatch or Table that holds the ids, and the vectors, minutiae, qualities and models of
        all columns ("Templates in Arrow" in docs/reference/schemas.md). Leave out templates and groups then. An unusable row raises
        InvalidInput. Raises InvalidInput, SubjectExists, ModelMismatch, EncounterConflict, StorageUnavailable.
        """
        self._check("administer")
        return self._load(subject_ids, templates, model_id, groups, encounter_id, keep_enrolled=False).added

    @audited()
    def load_templates(
        self,
        subject_ids: Sequence[str] | ArrowBatch,
        templates: Mapping[str, Cells] | None = None,
        *,
        model_id: str | Mapping[str, str] | None = None,
        groups: Sequence[Sequence[str]] | None = None,
        encounter_id: str | None = None,
    ) -> Loaded:
        """Adds subjects as `add_templates` does, and keeps subjects that are enrolled already.

        The result counts the enrolled subjects whose templates are the same, and lists the enrolled subjects whose templates differ. An
        unusable row of an Arrow batch is left out, and `refused` names it."""
        while True:
            self._check("administer")
            try:
                return self._load(subject_ids, templates, model_id, groups, encounter_id, keep_enrolled=True)
            except SubjectExists:
                continue  # another thread enrolled a subject after the comparison

    def _load(
        self,
        subject_ids: Sequence[str] | ArrowBatch,
        templates: Mapping[str, Cells] | None,
        model_id: str | Mapping[str, str] | None,
        groups: Sequence[Sequence[str]] | None,
        encounter_id: str | None,
        *,
        keep_enrolled: bool,
    ) -> Loaded:
        if isinstance(subject_ids, pa.RecordBatch | pa.Table):
            if templates is not None or groups is not None:
                raise InvalidInput(
                    "an Arrow batch holds the templates and groups itself; leave templates and groups out"
                )
            return self._loader.add_arrow(subject_ids, encounter_id, model_id=model_id, keep_enrolled=keep_enrolled)
        if templates is None:
            raise InvalidInput(
                "templates is empty; pass at least one column, as {'face': vectors}, or an Arrow record batch"
            )
        add = self._loader.add
        return add(subject_ids, templates, groups, encounter_id, model_id=model_id, keep_enrolled=keep_enrolled)

    @audited()
    def import_captures(self, encounters: Sequence[Encounter]) -> list[Decision]:
        """Adds subjects from their captures without a search, in one commit. Use it for an archive, and deduplicate the archive afterwards.

        Decisions have no candidates. `unique` means that the subject was added, with its usable captures. `Policy.required` is not applied.
        The new encounter of an enrolled subject replaces its rows. A repeated encounter_id changes nothing.
        """
        self._check("administer")
        listed = list(map(_encounter, encounters))
        if any(one.subject_id is not None and one.subject_id in self for one in listed):  # replaces rows
            self._check("supervise")
            if self._approvals.needed("replace"):
                raise NotAllowed(
                    "an encounter is of an enrolled subject, and replacing one takes two people; leave it out, and use update(replace=True)"
                )
        return self._loader.import_captures(listed)

    def admit(self, encounters: Sequence[Encounter]) -> list[Decision]:
        """Deprecated: `import_captures`."""
        renamed("Engine.admit", "Engine.import_captures")
        return self.import_captures(encounters)

    @audited(changes=True)
    def remove(self, subject_id: str, *others: str) -> None:
        """Removes one or several subjects, in one commit, from all later searches.

        Raises UnknownSubject, and removes none, if one of them is not enrolled. Raises NotAllowed, ApprovalNeeded (`Policy.two_people`)."""
        named(subject_id, *others)
        self._check("supervise")
        names = sorted({subject_id, *others})

        def about(transaction: Transaction) -> Any:
            return _rows_of(transaction.snapshot(), names)

        approve = self._approvals.require("remove", self._caller, lambda: {"subject_ids": names}, about, self._sign)
        with self._gallery.transaction() as transaction:
            approve(transaction)
            for name in dict.fromkeys((subject_id, *others)):
                transaction.remove(name)
        self._log.removed(list(dict.fromkeys((subject_id, *others))))

    # care of the gallery ----------------------------------------------------------------------------------------

    @audited()
    def retention_due(self) -> Due:
        """The refused decisions and closed cases past the policy's retention periods (`Policy.keep_refused_days`, `keep_cases_days`)."""
        self._check("administer", "audit")
        return due(self._gallery, self._limits())

    @audited(changes=True)
    def run_retention(self) -> tuple[Due, int, int | None, ChainLink | None]:
        """Erases the records of `retention_due`. Enrolments and searches continue meanwhile.

        `jobs.run_retention` also verifies the erasure and signs a receipt. Returns the erased records, the number of rewritten segments,
        and the number and hash chain link of this run's note. The last two are None if nothing was due. Raises InvalidInput for a register
        on PostgreSQL. Raises StorageUnavailable.
        """
        self._check("administer")
        limits = self._limits()
        facts = {**vars(limits), "policy_version": self._gallery.policies[-1].version, "at": self._clock()}
        erased, segments = erase(self._gallery, limits, facts)
        if not erased:
            return erased, segments, None, None
        snapshot = self._gallery.snapshot()
        return erased, segments, next_number(snapshot) - 1, self._gallery.chain_link(snapshot.version)

    def _limits(self) -> Limits:
        policy = self._gallery.policies[-1].policy
        return Limits.of(policy.keep_refused_days, policy.keep_cases_days, self._clock())

    @audited(changes=True)
    def compact(self) -> None:
        """Merges all segments into one segment, and erases the templates of removed subjects from the disk.

        Searches and enrolments continue meanwhile. The free disk space must be at least the size of the gallery. Raises
        StorageUnavailable."""
        self._check("administer")
        self._gallery.compact()

    @audited(changes=True)
    def maintain(self) -> None:
        """Seals rows and merges segments at once, instead of in the background. Use it after a bulk load, for example."""
        self._check("administer")
        self._gallery.maintain()

    @audited(changes=True)
    def seal(self) -> None:
        """Seals the rows of the journal into a segment at once. `maintain` does so only for many rows."""
        self._check("administer")
        self._gallery.seal()

    def index(self, column: str) -> str:
        """The index engine that is configured for a column: `native`, or `faiss:FACTORY`."""
        self._check("administer", "audit")
        check_column(column)
        return str(self._gallery.snapshot().indexing.spec(column))

    @audited(changes=True)
    def reindex(
        self,
        index: str | Mapping[str, str],
        *,
        force: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Changes the index engine of all or some columns, and builds the indexes of all sealed rows; see `GalleryConfig.index`.

        Searches and enrolments continue meanwhile, and use the present index of each segment. A repeated call continues an interrupted
        call, and so does the maintenance in the background. If a column has too few rows to train its index, the index is built later,
        when it has enough rows.
        force: use an index even if it misses more than `SearchConfig.miss_risk`. Without force, such an index raises InvalidInput, and
        nothing changes. progress: called with the number of indexed rows and of all rows. Raises InvalidInput, StorageUnavailable.
        """
        self._check("administer")
        specs, now = parse_specs(index), self._gallery.snapshot().indexing
        if isinstance(index, Mapping) and EVERY_COLUMN not in index:
            specs = {**now.specs, **specs}
        approve: Approve = needs_none  # the continuation of an approved call needs no approval
        if (specs, force) != (now.specs, now.forced):
            facts = {"index": {column: str(spec) for column, spec in sorted(specs.items())}, "force": force}
            approve = self._approvals.require("index", self._caller, lambda: facts, sign=self._sign)
        self._gallery.reindex(specs, force=force, report=progress, approve=approve)

    @audited(changes=True)
    def rekey(self, *, renewable: bool = True, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
        """Stores all embeddings with a new secret transform, segment by segment (renewable templates, `GalleryConfig.renewable`).

        Searches and enrolments continue meanwhile, with segments of both transforms. A repeated call continues an interrupted one. At the end,
        the secret of the old transform is destroyed. After that, this gallery's key file can neither invert nor link copies of old files. A
        vector is quantised once more, which changes a cosine by 0.0006 (standard deviation). Minutiae are not transformed.
        renewable: False stores embeddings without a transform. progress: called with the number of finished segments and of all segments.
        Returns the id of the transform, "" for none. Raises InvalidInput if the gallery is not encrypted, NotAllowed, ApprovalNeeded
        (`Policy.two_people`), KeyMismatch, StorageUnavailable.
        """
        self._check("administer")
        with self._gallery.rekeying:
            approve: Approve = needs_none  # as in `reindex`
            if not self._gallery.rekey_goes_on(renewable=renewable):
                facts = {"rekey": "renewable" if renewable else "plain"}
                approve = self._approvals.require("key", self._caller, lambda: facts, sign=self._sign)
                self._end_rekey()  # destroys the secret that an interrupted change left
            transform_id = self._gallery.rekey(renewable=renewable, report=progress, approve=approve)
            self._end_rekey()
        return transform_id

    def _end_rekey(self) -> None:
        """Destroys the secrets of transforms that no stored row uses."""
        rekey_canaries(self._gallery.storage, self._gallery.folder, self._gallery.snapshot().transform)
        self._gallery.forget_transforms()

    @audited()
    def faiss_index(self, column: str = "face") -> Any:
        """Returns a `faiss.IndexShards` over the sealed rows of a column, for direct use of FAISS. `maintain` or `compact` seals rows.

        Its ids are row numbers, int64; `subjects_of_rows` returns their subjects. Rows that are removed or pending at the time of the call
        are left out. The index shares memory with the engine: search it, and never change it. Similarities are FAISS's estimates. Raises
        InvalidInput if the column has no FAISS index.
        """
        self._check("administer")
        self._exported(f"the FAISS index of {column}")
        check_column(column)
        return faiss_view.shards_of(self._gallery.snapshot(), column)

    @audited()
    def faiss_copies(self, column: str = "face") -> Iterator[tuple[int, Any, NDArray[np.int64], list[str]]]:
        """Yields a copy of each segment's index in `faiss_index`: (segment number, index, rows int64 (n,), their n subject_ids)."""
        self._check("administer")
        self._exported(f"FAISS indexes of {column}")
        check_column(column)
        snapshot = self._gallery.snapshot()
        for number, index, rows in faiss_view.copies_of(snapshot, column):
            yield number, index, rows, snapshot.subject_ids(rows.tolist())
            self.check_open()

    @audited()
    def subjects_of_rows(self, rows: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Returns the subject_id of each row number, '' for a row that is unknown or removed. rows: integers (n,)."""
        self._check("administer")
        snapshot = self._gallery.snapshot().enrolled
        numbers = np.asarray(rows)
        if numbers.ndim != 1 or not (np.issubdtype(numbers.dtype, np.integer) or not numbers.size):
            raise InvalidInput(
                f"rows: shape {numbers.shape}, dtype {numbers.dtype}; wanted int64 (n,), as faiss_index answers"
            )
        numbers = numbers.astype(np.int64)
        inside = (numbers >= 0) & (numbers < snapshot.row_count)
        there = np.zeros(len(numbers), bool)
        there[inside] = snapshot.are_present(numbers[inside])
        names = np.full(len(numbers), "", object)
        names[there] = snapshot.subject_ids(numbers[there].tolist())
        return list(names)

    def tidy(self) -> None:
        """Deprecated: `maintain`."""
        renamed("Engine.tidy", "Engine.maintain")
        self.maintain()

    def refresh(self) -> int:
        """Reads the writer's newest commits, in an engine that was opened with read_only. Returns the new `gallery_version`."""
        self.check_open()
        self._gallery.refresh()
        return self.gallery_version

    # read access ------------------------------------------------------------------------------------------------

    @audited()
    def subject_ids(self) -> list[str]:
        """The ids of all enrolled subjects, in order of enrolment."""
        self._check("audit", "administer")
        return list(self._gallery.snapshot().all_subject_ids())

    @audited()
    def subjects(self, groups: Collection[str] | None = None) -> Iterator[ListedSubject]:
        """The enrolled subjects without their templates, in order of enrolment. groups: only subjects in at least one of these groups."""
        self._check("audit", "administer")
        for subject in listed(self._gallery.snapshot(), _checked(groups)):
            yield subject
            self.check_open()

    @audited()
    def subject(self, subject_id: str) -> Subject:
        """Returns the records of a subject: its rows, the decisions on its encounters, and its open cases.

        A subject that was removed or never enrolled is returned too, if the gallery holds a decision about it. The call reads every
        decision, as `decisions` does. Templates are left out if `Config.allow_template_export` is False. Raises UnknownSubject."""
        self._check("audit", "administer")
        check_id(subject_id, "subject_id")
        subject = subject_of(self._gallery, subject_id)
        if self._config.allow_template_export is False:
            return replace(subject, encounters=tuple(replace(one, templates={}) for one in subject.encounters))
        return subject

    def groups(self) -> dict[str, int]:
        """group -> number of its enrolled subjects, ordered by name."""
        self._check("audit", "administer")
        return group_counts(self._gallery.snapshot())

    def are_enrolled(self, subject_ids: Sequence[str]) -> NDArray[np.bool_]:
        """bool (n,): whether each subject is enrolled."""
        return np.asarray(self.rows_of(subject_ids) >= 0)

    @audited()
    def rows_of(self, subject_ids: Sequence[str]) -> NDArray[np.int64]:
        """int64 (n,): the newest row of each subject, -1 if not enrolled. Row numbers only grow. An update gives a subject another row."""
        self._check("administer", "audit")
        return self._gallery.snapshot().rows_of(_packed(subject_ids))

    @audited()
    def templates(self, subject_id: str) -> dict[str, Template]:
        """column -> the subject's template of the highest quality; of equal qualities, the newest. Embeddings of sealed rows are quantised
        to eight bits per dimension. Raises UnknownSubject."""
        self._check("administer")
        self._exported("of one subject", subject_id)
        templates = self._gallery.templates_of(subject_id)
        if templates is None:
            raise _unknown(subject_id)
        return templates

    @audited()
    def encounters(self, subject_id: str) -> list[EnrolledEncounter]:
        """The encounters of an enrolled subject with their rows, oldest first. Raises UnknownSubject."""
        self._check("administer")
        self._exported("of one subject", subject_id)
        encounters = self._gallery.snapshot().encounters_of(subject_id)
        if not encounters:
            raise _unknown(subject_id)
        return encounters

    @audited()
    def decision(self, encounter_id: str) -> Decision | None:
        """The decision on an encounter, None for an unknown encounter_id. A case has its present decision."""
        self._check("audit", "review")
        stored = self._gallery.answer(encounter_id)
        return None if stored is None or stored.kind != "decision" else from_json(stored.text)

    @audited()
    def decisions(self, subject_id: str | None = None) -> Iterator[Decision]:
        """The present decisions on the encounters of a subject, or on all encounters, in the order of the decisions. Reads every decision
        of the gallery."""
        self._check("audit", "review")
        for decision in decisions_of(self._gallery, subject_id):
            yield decision
            self.check_open()

    @audited()
    def audit_records(
        self,
        *,
        since: float | None = None,
        until: float | None = None,
        principal: str | None = None,
        subject_id: str | None = None,
    ) -> Iterator[AuditRecord]:
        """Yields the records of the audit log (`Config.audit`), oldest first, without the records in archive files.

        since, until: only calls at or after `since` and before `until`, in seconds since 1970. principal: only calls of this principal.
        subject_id: only calls about this subject. Records of readers come last, with the number 0, until a writer adds them to the log.
        Raises GalleryDamaged."""
        self._check("audit")
        self._audit.flush()
        spans, rows = self._gallery.audit_log()
        waiting = self._gallery.waiting_readings()
        rows += [] if waiting is None else [replace(record, number=0) for record in waiting.records]
        for record in chosen(spans, rows, since, until):
            if principal in (None, record.principal) and subject_id in (None, record.subject_id):
                yield record
                self.check_open()

    @audited(changes=True)
    def archive_audit(self, out: Path, *, before: float) -> int:
        """Moves packed records of the audit log that are older than `before` (seconds since 1970) to a new file. This limits the size of
        the gallery. The new file is not encrypted. The gallery keeps the hashes that prove the moved records.

        Returns the number of moved records; if it is 0, no file is written. The newest 2,000 to 4,000 records are not packed yet and stay.
        Raises InvalidInput if the file exists. Raises StorageUnavailable."""
        self._check("administer")
        with self._gallery.transaction() as transaction:
            return move_old(transaction, self._gallery.storage, out, before)

    @audited()
    def archived_audit(self, file: Path) -> Iterator[AuditRecord]:
        """Yields the records of a file of `archive_audit`, oldest first, checked against the gallery's hashes. Raises InvalidInput,
        GalleryDamaged."""
        self._check("audit")
        yield from read_archive(self._gallery, file)

    @audited()
    def receipt(self, encounter_id: str) -> Receipt:
        """Returns the evidence of a decision, and its place in the gallery's log. `jobs.write_receipt` signs it. Raises InvalidInput if the
        gallery holds no decision on the encounter."""
        self._check("audit")
        return receipt_of(self._gallery, encounter_id, self._extractor.cards)

    @audited()
    def recall(self, encounter: Encounter) -> Decision | None:
        """Returns the earlier decision on this encounter, None if the encounter is new. Writes nothing. Raises EncounterConflict if the
        encounter_id was used with other content."""
        self._check("enrol")
        encounter = in_memory(encounter, self.config.capture)
        known = earlier_answer(self._gallery.answer, encounter, digest_of(encounter), self._gallery.snapshot)
        return None if known is None else self._named(self._told(known))

    def info(self) -> dict[str, Any]:
        """Returns counts, models and thresholds, as values that JSON can hold."""
        self._check("audit", "administer")
        return info_of(self._gallery, self.policy)

    def problems(self) -> list[str]:
        """Checks all stored data, and returns the faults; empty if the data is sound."""
        self._check("audit", "administer")
        own = self._gallery.problems()
        return own if own is not None else [str(p) for p in inspect(self._gallery.storage, self._gallery.folder)]

    def notes(self, now: float) -> list[str]:
        """Returns warnings that are not faults: ids that look alike, decisions after the clock was set back. now: the time in seconds."""
        self._check("audit", "administer")
        return notes_of(self._gallery.snapshot(), now)

    @audited()
    def backup(self, target: str | Path) -> Copied:
        """Copies the gallery and the files of jobs beside it to a folder. A later backup to the same folder copies only new segments.

        Raises InvalidInput if the folder holds something else, GalleryDamaged, StorageUnavailable.
        """
        self._check("administer")
        self._gallery.refuse_backup()
        return backup(self._gallery.storage, self._gallery.folder, Path(target))

    # shared -----------------------------------------------------------------------------------------------------

    def _across(self, across_positions: bool | None) -> bool:
        return self._config.search.across_positions if across_positions is None else across_positions

    def _prepared(self, encounter: Encounter) -> Probe:
        probe = self._preparer.probe(encounter)
        check_models(probe.templates, self._gallery.snapshot().models)
        return probe

    def check_open(self) -> None:
        """Raises EngineClosed if the engine is closed. Raises InvalidInput in a forked child of the process that opened it."""
        self._gallery.check_process()
        if self._closed.is_set():
            raise EngineClosed("the engine was closed; open it again")

    def _check(self, *roles: str) -> None:
        """Raises EngineClosed if the engine is closed. Raises NotAllowed if the caller has none of these roles."""
        self.check_open()
        if self._caller is None:
            return
        self._caller.require(*roles)
        if tracing() is not None and self.policy.disclosure != "full" and "audit" not in self._caller.roles:
            raise NotAllowed("a trace shows scores that the policy does not disclose; it needs the role audit")

    def _take(self, calls: int = 1, subjects: Collection[str] = ()) -> None:
        """Counts calls, and answers about subjects, against the budgets. Raises BudgetExhausted."""
        if self._restricted and (calls or subjects):
            self._budgets.take(self._name, calls, self._enrolled(dict.fromkeys(subjects, 1)))

    def _count_named(self, subjects: Iterable[str], cases: Iterable[str] = ()) -> None:
        """Counts each enrolled subject and each open case that an answer names, once per occurrence. Raises BudgetExhausted."""
        counts, of_cases = Counter(subjects), Counter(cases)
        if self._restricted and (counts or of_cases):
            self._budgets.name(self._name, self._enrolled(counts), of_cases)

    def _count_candidates(self, candidates: Iterable[Candidate]) -> None:
        """As `_count_named`, for the candidates of an answer."""
        candidates = tuple(candidates)
        self._count_named((c.subject_id for c in candidates if not c.case), (c.case for c in candidates if c.case))

    def _enrolled(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Returns the counts of enrolled subjects. Empty if the policy has no budget of answers about subjects."""
        if not counts or not self._budgets.of_subjects:
            return {}
        rows = self._gallery.snapshot().rows_of(_packed(list(counts)))
        return {name: count for (name, count), row in zip(counts.items(), rows.tolist(), strict=True) if row >= 0}

    def _named(self, decision: Decision) -> Decision:
        """Counts the subjects and cases that a finished decision names. If a budget is exhausted, returns the decision without candidates."""
        try:
            self._count_candidates(c for c in decision.candidates if c.case or c.subject_id != decision.subject_id)
        except BudgetExhausted:
            return replace(decision, candidates=(), cleared=())
        return decision

    @property
    def _name(self) -> str:
        """The caller's name, "" without a caller."""
        return "" if self._caller is None else self._caller.name

    def _told(self, decision: Decision) -> Decision:
        """Returns the part of a decision that the policy discloses."""
        return disclosed_decision(decision, self.policy) if self._restricted else decision

    def _signed(self, by: str, role: str) -> str:
        """Returns the name to record for a person's act: the principal's name, or `by` without a principal. If the configuration has
        identities, `by` must be an identity with the role. Raises NotAllowed."""
        if self._caller is not None:
            if by not in ("", self._caller.name):
                raise NotAllowed(f"by is {by!r}, and {self._caller.name!r} calls; leave `by` out")
            return self._caller.name
        if self._config.identities is not None:
            self._config.identity(by).require(role)
        return by

    def _exported(self, what: str, subject_id: str = "") -> None:
        """Logs an export of templates. Raises NotAllowed if `Config.allow_template_export` forbids it."""
        note_export(self._config, what, caller=self._name, subject_id=subject_id)

    def _told_search(self, column: str, result: SearchResult) -> SearchResult:
        """Returns the part of a search result that the policy discloses."""
        snapshot = self._gallery.snapshot()
        model = snapshot.models.get(column)
        if model is None:
            return result  # the column is empty
        _, review_db = self.policy.thresholds_db(snapshot.searched_count)
        score_db = self._pairs.calibrations.of(model.model_id).score_db
        return disclosed_search(result, self.policy, review_db, score_db)

    def _view(self, caller: Principal | None, *, restricted: bool, purpose: str) -> Engine:
        view = object.__new__(Engine)
        view.__dict__.update(self.__dict__, _caller=caller, _restricted=restricted, _purpose=purpose)
        return view

    def _new_call(self, kind: str, *, in_commit: bool = False) -> Call:
        return Call(self._audit, kind, self._name, self._purpose, in_commit=in_commit)


def _rows_of(snapshot: Snapshot, subject_ids: Sequence[str]) -> list[list[int]]:
    """Returns the rows of each subject; an approval holds for these rows only. The ids are looked up one by one, because a request names
    few subjects. Raises UnknownSubject."""
    rows = [list(map(int, snapshot.rows_under(name))) for name in subject_ids]
    for name, of_subject in zip(subject_ids, rows, strict=True):
        if not of_subject:
            raise _unknown(name)
    return rows


@checked
def compare(a: Template, b: Template) -> Score:
    """Compares two templates 1:1, without a gallery.

    Returns score_db = -10 log10(FMR), the similarity of embeddings, and the minutiae score of fingers; a score that does not apply is None.
    Raises ModelMismatch if the templates are of two models. Raises InvalidInput for a face against a finger, and for an unsound record.
    """
    return shipped_pair_comparer().score(a, b)


def _is_register(path: str | Path) -> bool:
    return isinstance(path, str) and path.startswith(("postgresql://", "postgres://"))


def _opened_folder(path: str, config: Config, storage: Storage, gallery_id: str, read_only: bool) -> Gallery:
    if config.cluster is not None:
        raise InvalidInput(
            "config.cluster is of a register in PostgreSQL, and a folder was named; leave it out, or write postgresql://..."
        )
    return Gallery.open(
        Path(path),
        storage=storage,
        config=config.gallery,
        settings=config.to_dict(),
        gallery_id=gallery_id,
        read_only=read_only,
        limits=IndexLimits(config.threads, config.search.miss_risk),
        subject_keys=config.subject_keys,
    )


def _opened_register(path: str, config: Config, storage: Storage, gallery_id: str, read_only: bool) -> Gallery:
    if config.subject_keys is not None:
        raise InvalidInput("keys of subjects are for a gallery in a folder; leave subject_keys out")
    if config.gallery.renewable:
        raise InvalidInput("renewable templates are for a gallery in a folder; leave gallery.renewable out")
    try:
        from biodedup.cluster.opening import open_register  # a gallery in a folder needs no psycopg
    except ImportError as error:
        raise InvalidInput(f"a register in PostgreSQL needs {error.name}; pip install 'biodedup[cluster]'") from error
    return open_register(
        path,
        config.cluster,
        storage=storage,
        config=config.gallery,
        settings=config.to_dict(),
        gallery_id=gallery_id,
        read_only=read_only,
        limits=IndexLimits(config.threads, config.search.miss_risk),
    )


def _shards_elsewhere(gallery: Gallery, config: Config) -> RayShards | None:
    """Returns the client of the processes that search a register's segments; None if this process searches them."""
    if config.cluster is None or config.cluster.ray_address is None:
        return None
    from biodedup.cluster.gallery import ClusterGallery
    from biodedup.cluster.key import ActorKey
    from biodedup.cluster.shards.ray_actors import RayShards  # only Ray actors need this import

    assert isinstance(gallery, ClusterGallery), "only a register has Config.cluster"
    key = ActorKey.of(config.keys, gallery.key_file)
    return RayShards(config.cluster, gallery.register_id, config.threads, gallery.snapshot, key)


def _encounter(item: object) -> Encounter:
    """Checks an item of a stream of encounters. Raises InvalidInput."""
    if not isinstance(item, Encounter):
        raise InvalidInput(
            f"a stream of encounters holds {type(item).__name__}, wanted Encounter; write bd.Encounter(subject_id, [bd.Face(path)])"
        )
    return item


def _unknown(subject_id: str) -> UnknownSubject:
    return UnknownSubject(f"subject {subject_id!r} is not enrolled; enrol it first, or check the id")


def _packed(subject_ids: Sequence[str]) -> Packed:
    """Returns the ids in the form that look-ups take. Characters that UTF-8 cannot encode become `?`; no enrolled id has such characters.
    Raises InvalidInput for an item that is not a str."""
    for subject_id in subject_ids:
        if not isinstance(subject_id, str):
            raise InvalidInput(f"a subject_id is a str, got {type(subject_id).__name__}; convert it, as str(value)")
    return pack_text([subject_id.encode("utf-8", "replace").decode() for subject_id in subject_ids])


def _checked(groups: Collection[str] | None) -> tuple[str, ...] | None:
    """Checks and returns the groups of a search. Old galleries may have groups that the present rules for new ids refuse."""
    if groups is None or isinstance(groups, str):
        return None if groups is None else check_groups(groups)
    return check_groups([KnownId(group) if isinstance(group, str) else group for group in groups])
