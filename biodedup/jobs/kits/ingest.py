"""`kit ingest`: enrols the records of field kits' batch files at the centre, and reports the outcome of every record.

Owns the job from files to outcomes, and the check of a key's rights. `batch_file.py` owns bytes and signatures, `trust.py` trusted keys,
`ledger.py` bookkeeping, and the engine decides.

1. A file is accepted only if a trusted kit signed it. If a file was cut off, its complete records are accepted.
2. Each record is enrolled under an id that is bound to its kit's key (`names.py`). So a record that arrives twice is enrolled once, and no kit
   can use an id of another kit or of the centre.
3. A file that exceeds the limits of its key is refused as a whole. A record of a group that its key may not write is refused alone.
4. A kit's clock is reported, but decides nothing.
5. An interrupted run that is started again with the same batches resumes, and ends with the same bytes: records are decided in chunks that
   depend only on the files, each chunk after all earlier ones. Two things may differ: scores by hundredths of a decibel, because sealing in
   the background rounds embeddings to eight bits; and a key may expire meanwhile.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from biodedup.config import Config, IsolationConfig
from biodedup.engine import Engine
from biodedup.errors import BatchDamaged, CallerError, EncounterConflict
from biodedup.gallery.answers import digest_of
from biodedup.gallery.files.private import make_private_folder
from biodedup.jobs.kits.format.batch_file import RECORDS_MAX, BatchReader
from biodedup.jobs.kits.format.keys import CentreKey
from biodedup.jobs.kits.format.record import Record
from biodedup.jobs.kits.ledger import Ledger, Taker
from biodedup.jobs.kits.names import bound_id, prefix_of, unusable_id
from biodedup.jobs.kits.outcomes import (
    BatchOutcome,
    Entry,
    Examined,
    Gap,
    IngestResult,
    Outcome,
    Reused,
    clock_doubts,
    cut_text,
    decided_outcome,
    described,
    received_outcome,
    write_result,
)
from biodedup.jobs.kits.trust import Trusted, TrustedKey, load_trusted
from biodedup.jobs.shared.known_subject import verify_or_dispute
from biodedup.jobs.shared.output import check_table_name
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.values import CAPTURES_MAX, Decision, Encounter, Missing, Verification

_CHUNK_BYTES_MAX = 64 << 20
_DAY_S = 86_400.0


def examine_batch(
    path: Path,
    trusted: Trusted,
    centre: Sequence[CentreKey] = (),
    *,
    allow_unencrypted: bool = False,
    now: float | None = None,
) -> Examined:
    """Checks every signature of a file, and the rights of its key. Problems are in `state` and `problem` of the result. centre: the private keys
    that open encrypted files; now: seconds since 1970, None takes this machine's clock. Raises only StorageUnavailable."""
    entries: list[Entry] = []
    last_packed_at: float | None = None
    public: TrustedKey | None = None
    try:
        with BatchReader(path, trusted, centre, allow_unencrypted=allow_unencrypted) as batch:
            if batch.public is not None:
                public = trusted[batch.public.fingerprint]
                if problem := public.barred(time.time() if now is None else now):
                    return Examined(path, "refused", f"{path}: the key of kit {public.kit_id} {problem}; nothing of it was taken", public)  # fmt: skip
                batch.records_max = min(RECORDS_MAX, public.trust.encounters_batch_max)
            for record in batch:
                assert public is not None, "records come with a key"
                entries.append(_entry(record, public))
                last_packed_at = max(record.packed_at, last_packed_at or record.packed_at)
    except BatchDamaged as error:
        return Examined(path, "damaged", str(error), public)
    except CallerError as error:
        return Examined(path, "refused", str(error), public)
    if len({entry.sequence for entry in entries}) < len(entries):
        return Examined(path, "refused", f"{path} gives one sequence to two records; nothing of it was taken. Pack it again", public)  # fmt: skip
    problem = "" if batch.whole else cut_text(path, public, entries)
    return Examined(
        path=path,
        state="whole" if batch.whole else "cut",
        problem=problem,
        public=public,
        digest=batch.digest.hex(),
        entries=tuple(entries),
        void=batch.void,
        last_packed_at=last_packed_at,
    )


def _entry(record: Record, public: TrustedKey) -> Entry:
    encounter_id = record.encounter.encounter_id or ""
    forbidden = public.trust.forbidden(tuple(record.encounter.groups))
    refused = "reserved_id" if unusable_id(encounter_id) else ""
    if forbidden:
        refused = f"group_not_allowed: {', '.join(forbidden)}"
    return Entry(record.sequence, encounter_id, refused)


def ingest_batches(
    batches: Sequence[Path],
    gallery: Path,
    trusted: Path,
    out: Path,
    config: Config | None = None,
    *,
    centre: Sequence[CentreKey] = (),
    allow_unencrypted: bool = False,
    report: Path | None = None,
    clock: Callable[[], float] = time.time,
    progress: Progress = silent,
) -> IngestResult:
    """Enrols the records of batch files in a gallery. Writes `out` (.parquet or .csv) with one row for each record, and a summary and an HTML
    report beside it. If every file is refused, results of an earlier run are not overwritten.

    trusted: the folder with the kits' .pub files and the centre's records of them (`trust.py`). centre: the private keys that open the batches.
    allow_unencrypted: files of version 1 are accepted. A refused file is in the result, and does not stop the other files. Raises InvalidInput
    (no trusted keys), GalleryBusy, GalleryDamaged, StorageUnavailable.
    """
    check_table_name(out)
    keys = load_trusted(trusted)
    make_private_folder(out.parent)
    examined, now = [], clock()
    for number, path in enumerate(batches, start=1):
        examined.append(examine_batch(path, keys, centre, allow_unencrypted=allow_unencrypted, now=now))
        progress("checking", number, len(batches))
    usable = [file for file in examined if file.entries]
    if not usable:
        files = tuple(described(file, None, 0.0) for file in examined)
        result = IngestResult(files, (), (), (), now, keys.problems)
        return write_result(result, out, report, (config or Config()).labels)
    with Engine.open(gallery, config or Config(isolation=IsolationConfig()), clock=clock) as engine:
        ledger = Ledger(gallery, engine.config.keys)
        try:
            run, received_at = ledger.run([file.digest for file in usable], now)
            job = _Ingest(engine, ledger, run, received_at, progress)
            job.reader = partial(BatchReader, trusted=keys, centre=centre, allow_unencrypted=allow_unencrypted)
            result = replace(job.result(examined), trust_problems=keys.problems)
            result = write_result(result, out, report, engine.config.labels)
            ledger.finish(run)
            return result
        finally:
            ledger.close()


@dataclass(eq=False)
class _Ingest:
    """One run over some examined files."""

    engine: Engine
    ledger: Ledger
    run: int
    received_at: float
    progress: Progress
    reader: Callable[[Path], BatchReader] | None = None
    done: int = 0
    total: int = 0

    def result(self, examined: Sequence[Examined]) -> IngestResult:
        self.total = sum(len(file.entries) for file in examined)
        outcomes: list[Outcome] = []
        batches: list[BatchOutcome] = []
        reused: list[Reused] = []
        keys: dict[str, str] = {}
        digests = set[str]()
        for number, file in enumerate(map(self._within_limits, examined)):
            first = None
            if file.public is not None and file.entries:
                key, kit_id = file.public.fingerprint.hex(), file.public.kit_id
                first = self.ledger.first_received(file.digest, kit_id, key, file.path.name, self.run, self.received_at)
                if file.digest in digests:
                    first = self.received_at
                digests.add(file.digest)
                keys[key] = kit_id
                names = {entry.sequence: entry.encounter_id for entry in file.entries}
                before = self.ledger.arrived(key, kit_id, names, file.void)
                reused += [Reused(kit_id, n, names[n], name) for n, name in sorted(before.items())]
                outcomes += self._enrolled(number, file)
            batches.append(described(file, first, self.received_at))
        gaps = [Gap(kit_id, key[:16], *span) for key, kit_id in keys.items() for span in self.ledger.absent(key)]
        return IngestResult(tuple(batches), tuple(outcomes), tuple(gaps), tuple(reused), self.received_at)

    def _within_limits(self, file: Examined) -> Examined:
        """The file, unchanged, or refused if it exceeds a limit of its key, as counted by the ledger."""
        if file.public is None or not file.entries:
            return file
        key, trust = file.public, file.public.trust
        new = sum(
            self._is_new(bound_id(key.fingerprint, entry.encounter_id)) for entry in file.entries if not entry.refused
        )
        today = self.ledger.taken_since(prefix_of(key.fingerprint), self.received_at - _DAY_S)
        void = self.ledger.void_with(key.fingerprint.hex(), file.void)
        if today + new > trust.encounters_day_max:
            problem = (
                f"{new:,} new encounters after {today:,} within a day; its key may bring {trust.encounters_day_max:,}"
            )
        elif void > trust.void_max:
            problem = f"{void:,} void sequences in all; its key may declare {trust.void_max:,}"
        else:
            return file
        problem = (
            f"{file.path} of kit {key.kit_id} has {problem}; nothing of it was taken. Ask the team why, and only then raise the limit "
            "with `biodedup kit trust`"
        )
        self.total -= len(file.entries)
        return replace(file, state="refused", problem=problem, entries=(), void=())

    def _is_new(self, encounter_id: str) -> bool:
        """Whether no run has accepted the encounter. Encounters that this run accepted before an interruption count as today's."""
        return self.engine.decision(encounter_id) is None and self.ledger.taker(encounter_id) is None

    def _enrolled(self, number: int, file: Examined) -> Iterator[Outcome]:
        """Enrols the records of a file, and yields their outcomes in order. number: of the file in this run."""
        assert file.public is not None, "a batch with records has a key"
        kit_id, batch = file.public.kit_id, file.path.name
        previous: float | None = None
        for first, records in self._chunks(file):
            entries = file.entries[first : first + len(records)]
            names = self._names(file.public, records)
            self._note_takers(number, first, kit_id, entries, names)
            decisions = self.engine.enroll_many(
                [
                    _under(record, name)
                    for record, name, entry in zip(records, names, entries, strict=True)
                    if not entry.refused
                ]
            )
            for place, (record, name, entry) in enumerate(zip(records, names, entries, strict=True), start=first):
                doubts = clock_doubts(record, file.public, previous, self.received_at)
                received = received_outcome(batch, kit_id, record, name, self.received_at, doubts)
                if entry.refused:
                    yield replace(received, reason=entry.refused)
                else:
                    taker = self.ledger.taker(name)
                    here = taker is not None and (taker.run, taker.file, taker.place) == (self.run, number, place)
                    outcome_of = partial(decided_outcome, received, taker, here)
                    outcome = self._with_subject(_under(record, name), outcome_of(next(decisions)), outcome_of)
                    yield self._first_answer(number, place, outcome)
                previous = record.captured_at if record.captured_at is not None else previous
                self.done += 1
                self.progress("enrolling", self.done, self.total)

    def _first_answer(self, number: int, place: int, outcome: Outcome) -> Outcome:
        """The outcome of a record before this run was interrupted. Meanwhile a later file may have brought the same encounter with new captures,
        so that the refused record is now in conflict with it."""
        if outcome.outcome == "refused":
            self.ledger.note_refused(self.run, number, place, json.dumps(asdict(outcome)))
        elif outcome.outcome == "conflict" and (before := self.ledger.refused(self.run, number, place)):
            return Outcome(**json.loads(before))
        return outcome

    def _chunks(self, file: Examined) -> Iterator[tuple[int, list[Record]]]:
        """(position of the first record, records) of each chunk that is decided and committed together. Chunks depend only on the file."""
        assert self.reader is not None, "set by the job"
        chunk: list[Record] = []
        byte_count = first = 0
        with self.reader(file.path) as batch:
            # only the records that were examined: the file may grow meanwhile
            for record, _ in zip(batch, file.entries, strict=False):
                chunk.append(record)
                byte_count += record.byte_count
                if len(chunk) >= self.engine.config.batch_size or byte_count >= _CHUNK_BYTES_MAX:
                    yield first, chunk
                    first, chunk, byte_count = first + len(chunk), [], 0
        if chunk:
            yield first, chunk

    def _names(self, public: TrustedKey, records: Sequence[Record]) -> list[str]:
        """The id of each encounter in the gallery. The id is bound to the kit's key, with two exceptions: content that the gallery already has
        under the kit's own id (from releases without bound ids), and content that another key brought under the same id (a copy)."""
        unbound: dict[int, str] = {}
        wanted: list[tuple[str, bytes, str]] = []
        for place, record in enumerate(records):
            own = record.encounter.encounter_id or ""
            with suppress(EncounterConflict):  # another encounter's id, with other content
                if self.engine.recall(record.encounter) is not None:
                    unbound[place] = own
            wanted.append((own, digest_of(record.encounter), bound_id(public.fingerprint, own)))
        names = self.ledger.names_of([naming for place, naming in enumerate(wanted) if place not in unbound])
        return [
            unbound[place] if place in unbound else names[own, digest] for place, (own, digest, _) in enumerate(wanted)
        ]

    def _note_takers(
        self, number: int, first: int, kit_id: str, entries: Sequence[Entry], names: Sequence[str]
    ) -> None:
        takers: dict[str, Taker] = {}
        for place, (entry, name) in enumerate(zip(entries, names, strict=True), start=first):
            before = self.engine.decision(name)
            if not entry.refused and name not in takers and (before is None or not before.final):
                takers[name] = Taker(self.run, number, place, kit_id, entry.sequence)
        self.ledger.take(takers)

    def _with_subject(
        self, encounter: Encounter, outcome: Outcome, outcome_of: Callable[[Decision], Outcome]
    ) -> Outcome:
        """The outcome of an encounter, which is compared with its subject if the subject_id is already enrolled. outcome_of: the outcome of a
        decision on this record."""
        if outcome.outcome != "subject_exists":
            return outcome
        match verify_or_dispute(self.engine, encounter, encounter.subject_id or ""):
            case Verification():
                return replace(outcome, reason="subject_exists: the same person")
            case Decision() as disputed:
                return outcome_of(disputed)
        return replace(outcome, reason="subject_exists: cannot be compared")


def _under(record: Record, name: str) -> Encounter:
    """The encounter of a record, with its id in the gallery. If it has only templates, it also states the captures that the kit refused. If it has
    images, captures that `--only-good` left out count as not sent."""
    encounter = replace(record.encounter, encounter_id=name)
    if any(not isinstance(capture, Missing) for capture in encounter.captures):
        return encounter
    declined = [refusal for refusal in record.refusals if refusal.column not in encounter.templates]
    return replace(encounter, declined=declined[:CAPTURES_MAX])
