"""`kit pack`: what a team captured offline, as one signed batch file that the centre can take.

Owns the job from a manifest to the batch file, its report, and the kit's sequence numbers. Bytes are `kit_file`'s, rows of the
manifest `kit_manifest`'s, comparisons the engine's.

1. A record keeps its sequence and its encounter_id in whichever batch it is packed again; no two records share one.
2. The state file is replaced before the batch file appears, so that a kit killed between them makes the same bytes again.
3. A batch file is never replaced by one that lacks its records.
4. What the extractor said of a record is kept beside the output: packing again after a recapture extracts the recapture alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from biodedup.config import Config
from biodedup.embed.extractor import Extractor
from biodedup.engine import Engine
from biodedup.errors import BiodedupError, CallerError, InvalidInput
from biodedup.gallery.answers import digest_of
from biodedup.gallery.gallery import translated
from biodedup.gallery.storage import LocalStorage
from biodedup.jobs.kit_file import BatchReader, BatchWriter, Record, decode, encode
from biodedup.jobs.kit_keys import KitKey, load_key
from biodedup.jobs.kit_manifest import Broken, Planned, read_manifest
from biodedup.jobs.progress import Progress, silent
from biodedup.jobs.results import write_json, write_page, write_table
from biodedup.values import Capture, Encounter, Face, Finger, Float32, Missing, Refusal, Template

_PASSED = ""  # the reason of a capture's verdict that is no refusal


@dataclass(frozen=True)
class PackedRecord:
    """What became of a planned record. sequence, encounter_id: None where it was left out; refusals: to be captured again."""

    rows: tuple[int, ...]
    subject_id: str
    sequence: int | None
    encounter_id: str | None
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class Double:
    """Two records of one batch that look like one person; score_db is None where they only share their subject_id."""

    subject_ids: tuple[str, str]
    encounter_ids: tuple[str, str]
    score_db: float | None


@dataclass(frozen=True)
class PackResult:
    """A batch file, and what the team should know before the citizens have left. void: sequences that no batch will bring."""

    kit_id: str
    out: Path
    digest: str
    records: tuple[PackedRecord, ...]
    broken: tuple[Broken, ...]
    doubles: tuple[Double, ...]
    unsearched: int
    void: tuple[int, ...]
    threshold_db: float

    @property
    def packed(self) -> tuple[PackedRecord, ...]:
        return tuple(record for record in self.records if record.sequence is not None)

    @property
    def recaptures(self) -> tuple[PackedRecord, ...]:
        return tuple(record for record in self.records if record.refusals)

    def summary(self) -> dict[str, Any]:
        """Counts, JSON-ready."""
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
        }


def pack_batch(
    manifest: Path,
    out: Path,
    key: Path,
    config: Config | None = None,
    *,
    only_good: bool = False,
    as_templates: bool = False,
    report: Path | None = None,
    clock: Callable[[], float] = time.time,
    progress: Progress = silent,
) -> PackResult:
    """Packs a manifest's records into `out`, with a table, a summary and an HTML report (`report`) beside it.

    only_good: leave out refused captures, and records of which nothing is left; otherwise they are packed with the refusal noted.
    as_templates: pack what the extractor made of the captures, and no images. The same manifest into the same output makes the same
    bytes. Raises InvalidInput, GalleryBusy (this kit packs already), StorageUnavailable.
    """
    config = (config or Config()).with_policy()
    kit = load_key(key)
    planned, broken = read_manifest(manifest, bytes_max=config.capture.bytes_max)
    with translated(f"writing beside {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
    lock = LocalStorage().lock(key.with_suffix(".lock"))
    try:
        state = _state(kit)
        replaced = _replaced(out, kit, planned)
        work = out.with_name(out.name + ".work")
        judge = _Judge(config, work / "records")
        shutil.rmtree(work / "gallery", ignore_errors=True)
        temporary = out.with_name(out.name + ".tmp")
        records: list[PackedRecord] = []
        unsearched = 0
        with (
            Engine.open(work / "gallery", config, override_policy=True) as engine,
            translated(f"writing {out}"),
            temporary.open("wb") as file,
        ):
            writer = BatchWriter(file, kit)
            for low in range(0, len(planned), config.batch_size):
                chunk = planned[low : low + config.batch_size]
                searched: list[Encounter] = []
                for one, captures, verdicts, templates in judge.judged(chunk):
                    refusals = tuple(refusal for refusal in verdicts if refusal.reason != _PASSED)
                    content = _content(one, captures, verdicts, templates, only_good, as_templates)
                    if not (content.templates or any(not isinstance(c, Missing) for c in content.captures)):
                        records.append(PackedRecord(one.rows, content.subject_id or "", None, None, refusals))
                        continue
                    sequence, packed_at = _numbered(state, content, clock)
                    encounter_id = content.encounter_id or f"{kit.public.kit_id}-{kit.public.fingerprint.hex()[:6]}-{sequence:06d}"  # fmt: skip
                    content = replace(content, encounter_id=encounter_id)
                    writer.add(Record(content, sequence, one.captured_at, packed_at, refusals))
                    records.append(PackedRecord(one.rows, content.subject_id or "", sequence, encounter_id, refusals))
                    searched.append(Encounter(encounter_id, templates={**templates, **one.encounter.templates}))
                unsearched += _admit(engine, searched)
                progress("packing", len(records), len(planned))
            void = sorted(replaced - {record.sequence for record in records})
            writer.finish(void)
            file.flush()
            os.fsync(file.fileno())
            subject_of = {record.encounter_id: record.subject_id for record in records if record.encounter_id}
            _, threshold_db = engine.policy.thresholds_db(len(engine))
            doubles = _doubles(engine, threshold_db, subject_of, progress)
        write_json(state, kit.state)
        with translated(f"writing {out}"):
            temporary.replace(out)
            LocalStorage().sync_folder(out.parent)
        result = PackResult(
            kit.public.kit_id,
            out,
            writer.digest.hex(),
            tuple(records),
            tuple(broken),
            doubles,
            unsearched,
            tuple(void),
            threshold_db,
        )
        _write(result, report or out.with_name(f"{out.stem}.html"))
        return result
    finally:
        lock.release()


class _Judge:
    """What the extractor says of captures, remembered in a folder under their content and the gate's settings."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._extractor: Extractor | None = None
        settings = {name: config.to_dict()[name] for name in ("face", "finger", "capture")}
        self._settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
        with translated(f"writing {folder}"):
            folder.mkdir(parents=True, exist_ok=True)

    def judged(
        self, chunk: Sequence[Planned]
    ) -> Iterator[tuple[Planned, tuple[Capture, ...], tuple[Refusal, ...], Mapping[str, Template]]]:
        """(planned, captures as bytes, a verdict for each that is not missing, its best templates), in order."""
        captures = [tuple(_in_memory(capture) for capture in one.encounter.captures) for one in chunk]
        paths = [self._path(one) for one in captures]
        known = [_remembered(path) for path in paths]
        fresh = [i for i, one in enumerate(known) if one is None]
        todo = [[c for c in captures[i] if not isinstance(c, Missing)] for i in fresh]
        if any(todo) and self._extractor is None:
            self._extractor = Extractor(self._config)
        flat = [c for some in todo for c in some]
        results = iter(self._extractor.extract(flat) if self._extractor is not None and flat else ())
        for i, some in zip(fresh, todo, strict=True):
            mine = [next(results) for _ in some]
            verdicts = tuple(one if isinstance(one, Refusal) else Refusal(one.column, _PASSED) for one in mine)
            best: dict[str, Template] = {}
            for one in mine:
                if isinstance(one, Template) and (
                    one.column not in best or (one.quality or 0) > (best[one.column].quality or 0)
                ):
                    best[one.column] = one
            known[i] = verdicts, best
            if some:
                remembered = Record(Encounter("-", templates=best, encounter_id="-"), 0, None, 0.0, verdicts)
                with translated(f"writing {paths[i]}"):
                    temporary = paths[i].with_suffix(".tmp")
                    temporary.write_bytes(encode(remembered))
                    temporary.replace(paths[i])
        for planned, own, judged in zip(chunk, captures, known, strict=True):
            assert judged is not None, "every one was judged"
            yield planned, own, *judged

    def _path(self, captures: Sequence[Capture]) -> Path:
        digest = digest_of(Encounter("-", captures, encounter_id="-"))
        return self._folder / f"{hashlib.sha256(self._settings + digest).hexdigest()}.record"


def _remembered(path: Path) -> tuple[tuple[Refusal, ...], Mapping[str, Template]] | None:
    try:
        record = decode(path.read_bytes(), 1)
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None  # never judged, or its file was lost to a power cut
    templates = {c: given for c, given in record.encounter.templates.items() if isinstance(given, Template)}
    return record.refusals, templates


def _in_memory(capture: Capture) -> Capture:
    """A capture that is judged and packed from the very same bytes. A file that cannot be read is empty, which the gate refuses."""
    if isinstance(capture, Missing):
        return capture
    assert isinstance(capture.data, Path), "the manifest names files"
    try:
        content = capture.data.read_bytes()
    except OSError:
        content = b""
    return replace(capture, data=content)


def _content(
    planned: Planned,
    captures: Sequence[Capture],
    verdicts: Sequence[Refusal],
    templates: Mapping[str, Template],
    only_good: bool,
    as_templates: bool,
) -> Encounter:
    """What is sent of a record."""
    missing = [capture for capture in captures if isinstance(capture, Missing)]
    images = [capture for capture in captures if isinstance(capture, Face | Finger)]
    given: dict[str, Float32 | bytes | Template] = {**planned.encounter.templates}
    if as_templates:
        images, given = [], {**templates, **given}
    elif only_good:
        images = [image for image, verdict in zip(images, verdicts, strict=True) if verdict.reason == _PASSED]
    return replace(planned.encounter, captures=[*images, *missing], templates=given)


def _numbered(state: dict[str, Any], content: Encounter, clock: Callable[[], float]) -> tuple[int, float]:
    """(sequence, packed_at) of a record: what it had before, or the next."""
    digest = digest_of(replace(content, encounter_id=content.encounter_id or "-"))
    name = hashlib.sha256(digest + (content.encounter_id or "").encode()).hexdigest()
    if name not in state["records"]:
        state["records"][name] = [state["next_sequence"], round(clock(), 3)]
        state["next_sequence"] += 1
    sequence, packed_at = state["records"][name]
    return sequence, packed_at


def _state(kit: KitKey) -> dict[str, Any]:
    try:
        state = json.loads(kit.state.read_text())
        if state["kit_id"] == kit.public.kit_id and state["next_sequence"] > max(
            (sequence for sequence, _ in state["records"].values()), default=0
        ):
            return dict(state)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise InvalidInput(
        f"{kit.state} is missing or is not the state of kit {kit.public.kit_id}, and sequence numbers must not be given out twice; "
        "restore it, or make new keys with `biodedup kit keys` and send the new .pub file to the centre"
    )


def _replaced(out: Path, kit: KitKey, planned: Sequence[Planned]) -> set[int]:
    """Sequences of the batch file that is to be replaced, and those that it had voided itself."""
    if not out.exists():
        return set()
    own = f"{kit.public.kit_id}-{kit.public.fingerprint.hex()[:6]}-"
    subjects = {one.encounter.subject_id for one in planned if one.encounter.encounter_id is None}
    encounters = {one.encounter.encounter_id for one in planned}
    sequences, lost = set[int](), 0
    try:
        with BatchReader(out, {kit.public.fingerprint: kit.public}) as batch:
            for record in batch:
                sequences.add(record.sequence)
                name = record.encounter.encounter_id or ""
                lost += name not in encounters and not (
                    name.startswith(own) and record.encounter.subject_id in subjects
                )
            sequences.update(batch.void)
    except BiodedupError:
        raise InvalidInput(f"{out} exists and is not a sound batch of this kit; name another file") from None
    if lost:
        raise InvalidInput(
            f"{out} holds {lost} records that this manifest does not name, or names in broken rows; they would be lost: name another file"
        )
    return sequences


def _admit(engine: Engine, encounters: Sequence[Encounter]) -> int:
    """Adds records to the working gallery; returns how many it could not take."""
    try:
        return sum(decision.outcome == "refused" for decision in engine.admit(encounters))
    except CallerError:
        if len(encounters) < 2:
            return len(encounters)
        return sum(_admit(engine, [one]) for one in encounters)


def _doubles(
    engine: Engine, threshold_db: float, subject_of: Mapping[str, str], progress: Progress
) -> tuple[Double, ...]:
    """Pairs that score as one person, strongest first; then encounters that share a subject_id and do not."""
    found = {
        link.subject_ids: link.score_db
        for cluster in engine.find_duplicates(
            threshold_db=threshold_db, progress=lambda done, total: progress("comparing", done, total)
        )
        for link in cluster.links
    }
    first: dict[str, str] = {}
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    pairs: list[tuple[tuple[str, str], float | None]] = [*ranked]
    for encounter_id, subject_id in subject_of.items():
        pair = (first.setdefault(subject_id, encounter_id), encounter_id)
        if pair[0] != encounter_id and pair not in found and pair[::-1] not in found:
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
            "subject_id": one.subject_id,
            "encounter_id": None,
            "status": "broken",
            "rows": " ".join(map(str, one.rows)),
            "problem": one.problem,
        }
        for one in result.broken
    ]
    names = ("subject_id", "encounter_id", "status", "rows", "problem")
    schema = pa.schema([("sequence", pa.int64()), *((name, pa.string()) for name in names)])
    out = result.out
    write_table(pa.Table.from_pylist(rows, schema=schema), out.with_name(f"{out.stem}.records.csv"))
    write_json(result.summary(), out.with_name(f"{out.stem}.summary.json"))
    write_page(report, "kit_pack.html", result=result, summary=result.summary())
