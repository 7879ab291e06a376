"""`kit pack`: packs the captures of a team without a network into a batch file, signed by the kit and encrypted for the centre.

Owns the job from a manifest to the batch file and its report. `batch_file.py` owns the bytes, `manifest.py` the rows, `judge.py` the captures,
and `state.py` the sequence numbers. Never compares templates: the engine does.

1. A record keeps its sequence number and its encounter_id if it is packed again into another batch. No two records share a number or an id.
2. The state file is replaced before the batch file appears, so that a kit that is killed between them assigns the same numbers again.
3. A batch file is never replaced by one that lacks its records.
4. Only files that the decoders open as images or minutiae records are packed, whatever the manifest names.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from biodedup.common.described import Described
from biodedup.config import Config, IsolationConfig
from biodedup.engine import Engine
from biodedup.errors import CallerError, InvalidInput
from biodedup.gallery.care.removal import remove_gallery
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.private import make_private_folder, open_private, private_folder
from biodedup.jobs.kits.format.batch_file import RECORDS_MAX, BatchWriter
from biodedup.jobs.kits.format.keys import CentrePublic, KitKey, load_centre_public, load_key
from biodedup.jobs.kits.format.record import Record
from biodedup.jobs.kits.judge import PASSED, Judge, Judged, no_record
from biodedup.jobs.kits.manifest import Broken, Planned, read_manifest
from biodedup.jobs.kits.state import (
    Packed,
    load_state,
    note_packed,
    numbered,
    packed_before,
    replaced_sequences,
    save_state,
)
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.shared.files import write_json
from biodedup.jobs.shared.output import write_table
from biodedup.jobs.shared.page import write_page
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.values import Capture, Encounter, Face, Finger, Float32, Missing, Refusal, Template


@dataclass(frozen=True)
class PackedRecord:
    """The outcome of a planned record. sequence, encounter_id: None if it was left out; refusals: captures to take again."""

    rows: tuple[int, ...]
    subject_id: str
    sequence: int | None
    encounter_id: str | None
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class Double:
    """Two records of a batch that seem to be of the same person. score_db: None if they only share their subject_id."""

    subject_ids: tuple[str, str]
    encounter_ids: tuple[str, str]
    score_db: float | None


@dataclass(frozen=True)
class PackResult(Described):
    """A packed batch, and the problems that the team can solve before the citizens leave: recaptures and duplicates (`doubles`). unsearched:
    records that were not searched for duplicates; void: sequence numbers that no batch has any more."""

    kit_id: str
    out: Path
    digest: str
    records: tuple[PackedRecord, ...]
    broken: tuple[Broken, ...]
    doubles: tuple[Double, ...]
    unsearched: int
    void: tuple[int, ...]
    threshold_db: float
    key_expires_at: float

    @property
    def packed(self) -> tuple[PackedRecord, ...]:
        return tuple(record for record in self.records if record.sequence is not None)

    @property
    def recaptures(self) -> tuple[PackedRecord, ...]:
        return tuple(record for record in self.records if record.refusals)

    def summary(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
        sequences = [record.sequence for record in self.packed if record.sequence is not None]
        reasons = Counter(refusal.reason for record in self.records for refusal in record.refusals)
        return {
            "kit_id": self.kit_id,
            "batch": self.out.name,
            "digest": self.digest,
            "packed": len(sequences),
            "first_sequence": min(sequences, default=None),
            "last_sequence": max(sequences, default=None),
            "left_out": len(self.records) - len(sequences),
            "broken": len(self.broken),
            "records_to_recapture": len(self.recaptures),
            "refusal_reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
            "doubles": len(self.doubles),
            "not_searched": self.unsearched,
            "void_sequences": len(self.void),
            "threshold_db": round(self.threshold_db, 2),
            "key_expires": datetime.fromtimestamp(self.key_expires_at, UTC).date().isoformat(),
        }


def pack_batch(
    manifest: Path,
    out: Path,
    key: Path,
    config: Config | None = None,
    *,
    centre: Path | None = None,
    passphrase: str | None = None,
    only_good: bool = False,
    as_templates: bool = False,
    report: Path | None = None,
    options: TableOptions = DEFAULT_OPTIONS,
    clock: Callable[[], float] = time.time,
    progress: Progress = silent,
) -> PackResult:
    """Packs the records of a manifest into `out`, encrypted for a centre. Writes a table, a summary and an HTML report (`report`) beside it.

    key: the kit's private key; passphrase: of the key, if it has one. centre: the centre's .pub file; None takes `centre.pub` beside the kit's
    key. only_good: refused captures, and records without any other capture, are left out; otherwise they are packed with their refusals.
    as_templates: packs templates instead of images. A record with a file that is not a capture is not packed. Packing the same manifest again
    does not change the output. Raises InvalidInput, GalleryBusy (another process packs with this key), StorageUnavailable.
    """
    config = (config or Config(isolation=IsolationConfig())).with_policy()
    kit = load_key(key, passphrase)
    to = load_centre_public(key.with_name("centre.pub") if centre is None else centre)
    planned, broken = read_manifest(manifest, bytes_max=config.capture.bytes_max, options=options)
    if len(planned) > RECORDS_MAX:
        raise InvalidInput(
            f"{manifest} has {len(planned):,} records, a batch at most {RECORDS_MAX:,}; make several batches"
        )
    make_private_folder(out.parent)
    lock = LocalStorage().lock(key.with_suffix(".lock"))
    try:
        packing = _Packing(config, kit, out, only_good, as_templates, clock)
        packing.broken = broken
        result = packing.packed(planned, to, progress)
        _write(result, report or out.with_name(f"{out.stem}.html"))
        return result
    finally:
        lock.release()


class _Packing:
    """One run over some planned records."""

    def __init__(
        self,
        config: Config,
        kit: KitKey,
        out: Path,
        only_good: bool,
        as_templates: bool,
        clock: Callable[[], float],
    ) -> None:
        self.broken: list[Broken] = []
        self._config, self._kit, self._out, self._clock = config, kit, out, clock
        self._only_good, self._as_templates = only_good, as_templates
        self._work = out.with_name(out.name + ".work")
        self._state = load_state(kit)
        self._records: list[PackedRecord] = []
        self._sent: list[Planned] = []

    def packed(self, planned: Sequence[Planned], centre: CentrePublic, progress: Progress) -> PackResult:
        private_folder(self._work)
        before = packed_before(self._out, self._work, self._kit)
        if before is not None:  # before anything is extracted
            replaced_sequences(before, self._out, self._kit, planned)
        with translated(f"clearing {self._work}"):
            remove_gallery(LocalStorage(), self._work / "gallery")
        temporary = self._out.with_name(self._out.name + ".tmp")
        unsearched = 0
        with (
            Engine.open(self._work / "gallery", self._config, override_policy=True) as engine,
            translated(f"writing {self._out}"),
            open_private(temporary) as file,
            closing(Judge(self._config, self._work / "records")) as judge,
        ):
            writer = BatchWriter(file, self._kit, centre)
            for low in range(0, len(planned), self._config.batch_size):
                searched = self._added(writer, judge.judged(planned[low : low + self._config.batch_size]))
                unsearched += _import(engine, searched)
                progress("packing", len(self._records), len(planned))
            void = self._void(before)
            writer.finish(void)
            file.flush()
            os.fsync(file.fileno())
            subject_of = {record.encounter_id: record.subject_id for record in self._records if record.encounter_id}
            _, threshold_db = engine.policy.thresholds_db(len(engine))
            doubles = _doubles(engine, threshold_db, subject_of, progress)
        save_state(self._state, self._kit)
        self._put(temporary, before, Packed(writer.digest.hex(), self._entries(), tuple(void)))
        return PackResult(
            kit_id=self._kit.public.kit_id,
            out=self._out,
            digest=writer.digest.hex(),
            records=tuple(self._records),
            broken=tuple(self.broken),
            doubles=doubles,
            unsearched=unsearched,
            void=tuple(void),
            threshold_db=threshold_db,
            key_expires_at=self._kit.public.expires_at,
        )

    def _added(self, writer: BatchWriter, judged: Iterable[Judged]) -> list[Encounter]:
        """Writes judged records to the batch. Returns their templates as encounters, for the search for duplicates."""
        searched: list[Encounter] = []
        for planned, captures, verdicts, templates in judged:
            unusable = no_record(planned, captures, verdicts)
            if unusable is not None:
                self.broken.append(unusable)
                continue
            self._sent.append(planned)
            refusals = tuple(refusal for refusal in verdicts if refusal.reason != PASSED)
            content = _content(planned, captures, verdicts, templates, self._only_good, self._as_templates)
            if not (content.templates or any(not isinstance(c, Missing) for c in content.captures)):
                self._records.append(PackedRecord(planned.rows, content.subject_id or "", None, None, refusals))
                continue
            sequence, packed_at = numbered(self._state, content, self._clock)
            public = self._kit.public
            encounter_id = content.encounter_id or f"{public.kit_id}-{public.fingerprint.hex()[:6]}-{sequence:06d}"
            content = replace(content, encounter_id=encounter_id)
            writer.add(Record(content, sequence, planned.captured_at, packed_at, refusals))
            self._records.append(PackedRecord(planned.rows, content.subject_id or "", sequence, encounter_id, refusals))
            searched.append(Encounter(encounter_id, templates={**templates, **planned.encounter.templates}))
        return searched

    def _entries(self) -> tuple[tuple[int, str, str], ...]:
        return tuple((r.sequence, r.encounter_id or "", r.subject_id) for r in self._records if r.sequence is not None)

    def _void(self, before: Packed | None) -> list[int]:
        """The sequence numbers of the replaced file that the new file does not have."""
        if before is None:
            return []
        sequences = replaced_sequences(before, self._out, self._kit, self._sent)
        return sorted(sequences - {record.sequence for record in self._records})

    def _put(self, temporary: Path, before: Packed | None, packed: Packed) -> None:
        """Replaces the output, unless it has exactly the same records."""
        with translated(f"writing {self._out}"):
            if before is not None and before.digest == packed.digest:
                temporary.unlink()
                return
            note_packed(temporary, self._out, self._work, self._kit, packed)
            temporary.replace(self._out)
            LocalStorage().sync_folder(self._out.parent)


def _content(
    planned: Planned,
    captures: Sequence[Capture],
    verdicts: Sequence[Refusal],
    templates: Mapping[str, Template],
    only_good: bool,
    as_templates: bool,
) -> Encounter:
    """The encounter that is packed for a record."""
    missing = [capture for capture in captures if isinstance(capture, Missing)]
    images = [capture for capture in captures if isinstance(capture, Face | Finger)]
    given: dict[str, Float32 | bytes | Template] = {**planned.encounter.templates}
    if as_templates:
        images, given = [], {**templates, **given}
    elif only_good:
        images = [image for image, verdict in zip(images, verdicts, strict=True) if verdict.reason == PASSED]
    return replace(planned.encounter, captures=[*images, *missing], templates=given)


def _import(engine: Engine, encounters: Sequence[Encounter]) -> int:
    """Adds records to the working gallery. Returns the number of refused records."""
    try:
        return sum(decision.outcome == "refused" for decision in engine.import_captures(encounters))
    except CallerError:
        if len(encounters) < 2:
            return len(encounters)
        return sum(_import(engine, [encounter]) for encounter in encounters)


def _doubles(
    engine: Engine, threshold_db: float, subject_of: Mapping[str, str], progress: Progress
) -> tuple[Double, ...]:
    """Pairs that score as the same person, the highest scores first; then other pairs that share a subject_id."""
    clusters = engine.find_duplicates(
        threshold_db=threshold_db, progress=lambda done, total: progress("comparing", done, total)
    )
    found = {link.subject_ids: link.score_db for cluster in clusters for link in cluster.links}
    # a large cluster does not list all its pairs
    large_cluster_of = {
        name: number
        for number, cluster in enumerate(clusters)
        if cluster.links_left_out
        for name in cluster.subject_ids
    }
    first: dict[str, str] = {}
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    pairs: list[tuple[tuple[str, str], float | None]] = [*ranked]
    for encounter_id, subject_id in subject_of.items():
        pair = (first.setdefault(subject_id, encounter_id), encounter_id)
        in_cluster = pair[0] in large_cluster_of and large_cluster_of[pair[0]] == large_cluster_of.get(encounter_id)
        if pair[0] != encounter_id and pair not in found and pair[::-1] not in found and not in_cluster:
            pairs.append((pair, None))
    return tuple(Double((subject_of[a], subject_of[b]), (a, b), score_db) for (a, b), score_db in pairs)


def _write(result: PackResult, report: Path) -> None:
    rows = [
        {
            "sequence": record.sequence,
            "subject_id": record.subject_id,
            "encounter_id": record.encounter_id,
            "status": "left_out" if record.sequence is None else "packed",
            "rows": " ".join(map(str, record.rows)),
            "problem": "; ".join(f"{refusal.column}: {refusal.reason}" for refusal in record.refusals),
        }
        for record in result.records
    ]
    rows += [
        {
            "sequence": None,
            "subject_id": record.subject_id,
            "encounter_id": None,
            "status": "broken",
            "rows": " ".join(map(str, record.rows)),
            "problem": record.problem,
        }
        for record in result.broken
    ]
    names = ("subject_id", "encounter_id", "status", "rows", "problem")
    schema = pa.schema([("sequence", pa.int64()), *((name, pa.string()) for name in names)])
    out = result.out
    write_table(pa.Table.from_pylist(rows, schema=schema), out.with_name(f"{out.stem}.records.csv"))
    write_json(result.summary(), out.with_name(f"{out.stem}.summary.json"))
    write_page(report, "kit_pack.html", result=result, summary=result.summary())
