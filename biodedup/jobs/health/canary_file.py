"""Canaries: synthetic mates of some enrolled subjects, kept in a file beside the gallery.

Owns how they are drawn, which of them still belong to a subject, and their file (gallery/FORMAT.md). Never searches.

1. A canary is made once, from the templates stored at that time: later searches use the same probe.
2. The same gallery, seed and count give the same bytes.
3. Every segment, and the tail, has some in each of its columns; a gallery that has grown gets more (`topped_up`).
4. They resemble enrolled templates, so they are biometric data; those of removed subjects are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from biodedup.capture.minutiae.record import (
    MINUTIA_BYTES,
    MinutiaeRecord,
    position_code,
    read_record,
    standard,
    view_of,
    write_record,
)
from biodedup.errors import GalleryDamaged, InvalidInput
from biodedup.gallery.care.canary_vectors import VECTOR
from biodedup.gallery.files import packed
from biodedup.gallery.files.column_file import ColumnFile, Stream, open_column_file, write_column_file
from biodedup.gallery.files.encryption.transform import Transform
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.names import CANARIES_NAME
from biodedup.gallery.segments.part import Int64, Part
from biodedup.gallery.segments.reader import Segment
from biodedup.gallery.snapshot import Snapshot
from biodedup.synthetic.vectors import mates_of
from biodedup.values import COLUMNS, Float32

COSINES = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
"""To the stored embedding: the mated range of the models in use."""
PART_MIN = 4
"""Canaries of each column of a segment, however small its share of the gallery."""


@dataclass(frozen=True, eq=False)
class Mate:
    """A probe for one column. cosine: to the stored embedding then; record_hash: XXH3-64 of the stored record then, 0 without."""

    cosine: float = 0.0
    embedding: Float32 | None = field(default=None, repr=False)
    minutiae: bytes | None = field(default=None, repr=False)
    record_hash: int = 0


@dataclass(frozen=True, eq=False)
class Canary:
    """A subject as it was enrolled, and its synthetic mates by column."""

    row: int
    subject_id: str
    mates: Mapping[str, Mate] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Canaries:
    """version: of the gallery when they were last looked through; each: by row."""

    gallery_id: str
    version: int
    seed: int
    each: tuple[Canary, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Standing:
    """What has become of canaries' subjects.

    present: enrolled as they were; removed: by their tombstones; gone: removed and merged away, or lost in a merge: a merge
    keeps no record of what was removed, so that the two look the same; but where the content's version has not changed since
    the canaries were looked through, nothing was removed, and they are `lost`. misfiled: the row is there, and its subject's
    id is not, or does not lead to it. ahead: rows that this gallery has never given out.
    """

    present: tuple[Canary, ...]
    removed: tuple[Canary, ...]
    gone: tuple[Canary, ...]
    lost: tuple[Canary, ...]
    misfiled: tuple[Canary, ...]
    ahead: tuple[Canary, ...]

    @property
    def kept(self) -> tuple[Canary, ...]:
        """All but those removed on purpose, as far as can be told."""
        return tuple(sorted((*self.present, *self.lost, *self.misfiled, *self.ahead), key=lambda canary: canary.row))


def standing(canaries: Canaries, snapshot: Snapshot) -> Standing:
    """Where the subjects of some canaries are now. snapshot: without open cases."""
    by_standing: dict[str, list[Canary]] = {name: [] for name in Standing.__dataclass_fields__}
    enrolled = [
        canary for canary in canaries.each if canary.row < snapshot.row_count and snapshot.is_present(canary.row)
    ]
    rows = [canary.row for canary in enrolled]
    names = snapshot.subject_ids(rows)
    ids = sorted({canary.subject_id for canary in enrolled})
    which, under = snapshot.all_rows_of(packed.pack_text(ids))
    filed = {(ids[i], row) for i, row in zip(which.tolist(), under.tolist(), strict=True)}
    for canary, name in zip(enrolled, names, strict=True):
        sound = name == canary.subject_id and (name, canary.row) in filed
        by_standing["present" if sound else "misfiled"].append(canary)
    live, tombstones = set(rows), set(snapshot.tombstones.tolist())
    for canary in canaries.each:
        if canary.row in live:
            continue
        if canary.row >= snapshot.row_count:
            by_standing["ahead"].append(canary)
        elif canary.row in tombstones:
            by_standing["removed"].append(canary)
        else:
            by_standing["lost" if snapshot.version == canaries.version else "gone"].append(canary)
    return Standing(**{name: tuple(of_one) for name, of_one in by_standing.items()})


# making ----------------------------------------------------------------------------------------------------------


def topped_up(canaries: Canaries, snapshot: Snapshot, count: int) -> Canaries:
    """With more where a part of the gallery has fewer than its share of `count` in one of its columns."""
    each = list(canaries.each)
    totals = snapshot.column_counts()
    for part in snapshot.parts:
        if not part.count:
            continue
        mine = {canary.row: canary for canary in each if part.first_row <= canary.row < part.end_row}
        presence, live = part.presence(0, part.count), snapshot.mask(part)
        drawn: set[int] = set()
        for name in part.columns:
            has = (presence & (1 << COLUMNS.index(name))) != 0
            if live is not None:
                has &= live
            wanted = max(round(count * np.count_nonzero(has) / max(totals[name], 1)), PART_MIN)
            held = sum(name in canary.mates for canary in mine.values())
            held += int(np.count_nonzero(has[part.at(np.array(sorted(drawn), np.int64))]))
            if held >= wanted:
                continue
            has[part.at(np.array([*mine, *drawn], np.int64))] = False
            free = part.rows(np.flatnonzero(has))
            rng = np.random.default_rng([canaries.seed, part.first_row, part.end_row, COLUMNS.index(name)])
            drawn |= set(rng.choice(free, min(wanted - held, len(free)), replace=False).tolist())
        each += _made(snapshot, part, sorted(drawn), canaries.seed)
    return replace(canaries, each=tuple(sorted(each, key=lambda canary: canary.row)))


def _made(snapshot: Snapshot, part: Part, rows: Sequence[int], seed: int) -> list[Canary]:
    """New canaries of some rows of a part, in all of their columns."""
    if not rows:
        return []
    mates: dict[int, dict[str, Mate]] = {row: {} for row in rows}
    positions = part.at(np.array(rows, np.int64))
    for name, column in part.columns.items():
        cells = column.cells_at(positions)
        chosen, cells = np.array(rows, np.int64)[cells >= 0], cells[cells >= 0]
        if not len(chosen):
            continue
        rng = np.random.default_rng([seed, part.first_row, int(chosen[0]), COLUMNS.index(name)])
        records = column.minutiae_at(cells)
        embeddings: Sequence[Float32 | None] = [None] * len(chosen)
        cosines = np.zeros(len(chosen))
        if column.dimension is not None:
            stored = column.vectors_at(cells)
            made = mates_of(stored, rng.choice(COSINES, len(chosen)), seed=int(rng.integers(1 << 32)))
            made /= np.linalg.norm(made, axis=1, keepdims=True)
            embeddings, cosines = list(made), np.einsum("ij,ij->i", stored, made)
        for row, cosine, embedding, record in zip(chosen.tolist(), cosines.tolist(), embeddings, records, strict=True):
            mates[row][name] = Mate(
                cosine,
                embedding,
                another_impression(record, name, rng) if record else None,
                record_hash(record),
            )
    return [Canary(row, name, mates[row]) for row, name in zip(rows, snapshot.subject_ids(rows), strict=True)]


def record_hash(record: bytes | None) -> int:
    return xxhash.xxh3_64_intdigest(record) if record else 0


def another_impression(content: bytes, column: str, rng: np.random.Generator) -> bytes:
    """A record with a seventh of its minutiae dropped, the others displaced by 1.5 pixels and 2 degrees, all rotated by up to ten
    degrees and shifted, and a tenth of spurious ones among them. The record itself where that makes no sound one."""
    record = read_record(content)
    rows = np.frombuffer(record.body, np.uint8).reshape(-1, MINUTIA_BYTES).astype(np.int64)
    points = np.stack([(rows[:, 0] & 0x3F) << 8 | rows[:, 1], (rows[:, 2] & 0x3F) << 8 | rows[:, 3]], axis=1)
    kept = rng.random(len(rows)) >= 1 / 7
    rows, points = rows[kept], points[kept].astype(np.float64)
    rotation = np.radians(rng.uniform(-10, 10))
    middle = points.mean(axis=0) if len(points) else np.zeros(2)
    x, y = (points - middle + rng.normal(0, 1.5, points.shape)).T
    moved = np.stack(
        [x * np.cos(rotation) + y * np.sin(rotation), y * np.cos(rotation) - x * np.sin(rotation)], axis=1
    )  # y points down
    moved += middle + rng.uniform(-8, 8, 2)
    angle = rows[:, 4] + np.degrees(rotation) * 256 / 360 + rng.normal(0, 2 * 256 / 360, len(rows))
    spurious = len(rows) // 10
    low, high = (points.min(axis=0), points.max(axis=0) + 1) if len(points) else (middle, middle + 1)
    moved = np.concatenate([moved, rng.uniform(low, high, (spurious, 2))]).round().astype(np.int64)
    angle = np.concatenate([angle, rng.uniform(0, 256, spurious)]).round().astype(np.int64) & 255
    rows = np.concatenate([rows, rows[:spurious]])
    inside = ((moved >= 0) & (moved < (record.width, record.height))).all(axis=1)
    (px, py), rows, angle = moved[inside].T, rows[inside], angle[inside]
    body = np.stack([(rows[:, 0] & 0xC0) | px >> 8, px & 255, py >> 8, py & 255, angle, rows[:, 5]], axis=1)
    body = rng.permutation(body[:255])
    try:
        made = write_record(
            MinutiaeRecord(record.width, record.height, body.astype(np.uint8).tobytes()), position_code(column), None
        )
        return standard(view_of(made, column))
    except InvalidInput:
        return content


# the file --------------------------------------------------------------------------------------------------------


def load(storage: Storage, folder: Path) -> Canaries | None:
    """The gallery's canaries, or None without a file. Raises GalleryDamaged, StorageUnavailable."""
    with translated(f"reading {folder / CANARIES_NAME}"):
        if CANARIES_NAME not in (storage.list_names(folder) or ()):
            return None
        try:
            file = open_column_file(storage, folder / CANARIES_NAME)
            if file.problems():
                raise file.damaged(file.problems()[0])
            return _read(file)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise GalleryDamaged(f"it holds what was never written ({type(error).__name__})") from error


def save(storage: Storage, folder: Path, canaries: Canaries, transform: Transform | None) -> None:
    """Replaces the file. transform: the one that the gallery stores embeddings with. Raises StorageUnavailable."""
    with translated(f"writing {folder / CANARIES_NAME}"):
        about = {
            "gallery": canaries.gallery_id,
            "kind": "sentinels",
            "version": canaries.version,
            "seed": canaries.seed,
        }
        about |= {} if transform is None else {"turn": transform.transform_id}
        write_column_file(
            storage, folder / CANARIES_NAME, about, list(_streams(canaries.each, transform)), replaces=True
        )
        storage.sync_folder(folder)


def _streams(each: Sequence[Canary], transform: Transform | None) -> Iterable[Stream]:
    yield _stream("row", "<i8", np.array([canary.row for canary in each], np.int64))
    yield from _strings("subject_id", [canary.subject_id.encode() for canary in each])
    for name in COLUMNS:
        at = [i for i, canary in enumerate(each) if name in canary.mates]
        mates = [each[i].mates[name] for i in at]
        if not mates:
            continue
        yield _stream(f"{name}.sentinel", "<u4", np.array(at))
        yield _stream(f"{name}.cosine", "<f8", np.array([mate.cosine for mate in mates]))
        if mates[0].embedding is not None:
            vectors = np.array([mate.embedding for mate in mates])
            yield _stream(f"{name}{VECTOR}", "<f4", vectors if transform is None else transform.of(name).apply(vectors))
        yield from _strings(f"{name}.minutiae", [mate.minutiae or b"" for mate in mates])
        yield _stream(f"{name}.record_hash", "<u8", np.array([mate.record_hash for mate in mates], np.uint64))


def _stream(name: str, dtype: str, array: NDArray[Any]) -> Stream:
    return Stream(name, dtype, array.shape, [array])


def _strings(name: str, values: Sequence[bytes]) -> Iterable[Stream]:
    offsets, data = packed.to_arrays(packed.pack(values))
    return _stream(f"{name}.offset", "<i8", offsets), _stream(f"{name}.bytes", "|u1", data)


def _read(file: ColumnFile) -> Canaries:
    about = file.about
    mates: list[dict[str, Mate]] = [{} for _ in range(file.shape("row")[0])]
    for name in COLUMNS:
        if f"{name}.sentinel" not in file:
            continue
        at: Int64 = file.read(f"{name}.sentinel").astype(np.int64)
        vectors = _vectors(file, name) or [None] * len(at)
        columns = (file.read(f"{name}.cosine"), vectors, _read_strings(file, f"{name}.minutiae"))
        hashes = file.read(f"{name}.record_hash").tolist()
        for i, cosine, vector, record, hashed in zip(at.tolist(), *columns, hashes, strict=True):
            mates[i][name] = Mate(float(cosine), vector, record or None, hashed)
    names = [name.decode() for name in _read_strings(file, "subject_id")]
    each = (Canary(*fields) for fields in zip(file.read("row").tolist(), names, mates, strict=True))
    return Canaries(about["gallery"], about["version"], about["seed"], tuple(each))


def _vectors(file: ColumnFile, column: str) -> list[Float32 | None]:
    if f"{column}{VECTOR}" not in file:
        return []
    stored = file.read(f"{column}{VECTOR}").copy()
    return list(stored if "turn" not in file.about else file.transforms(file.about["turn"]).of(column).invert(stored))


def _read_strings(file: ColumnFile, name: str) -> list[bytes]:
    strings: list[bytes] = packed.from_arrays(file.read(f"{name}.offset"), file.read(f"{name}.bytes")).to_pylist()
    return strings


def place_of(snapshot: Snapshot, row: int) -> str:
    """The segment that holds a row, in words."""
    part = next((part for part in snapshot.parts if part.first_row <= row < part.end_row), None)
    if part is None:
        return "no segment"
    return f"segment {part.entry.number}" if isinstance(part, Segment) else "the journal"
