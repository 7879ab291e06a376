"""`load FOLDER`: restores a gallery from its export.

Owns the reading and the checks of the export. Never changes an existing gallery: the export is loaded into a new folder, which gets its name
when it is complete. Memory is bounded by a row group, and a few bytes per row.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import NDArray

from biodedup.common import quality as quality_scale
from biodedup.common.described import Described
from biodedup.config import Config
from biodedup.errors import BiodedupError, GalleryDamaged, InvalidInput
from biodedup.gallery.answers import StoredDecision
from biodedup.gallery.care.rebuild import Content, rebuild_gallery
from biodedup.gallery.care.removal import refuse_foreign, remove_gallery
from biodedup.gallery.catalogue.sqlite import ColumnModel
from biodedup.gallery.files import packed
from biodedup.gallery.files.codec import Codec
from biodedup.gallery.files.codes import Codes
from biodedup.gallery.files.encryption.subject_keys import SubjectKeys, refuse_keys_within
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.index_settings import read_settings
from biodedup.gallery.segments.part import PIECE_ROWS, Int64, ScannedRows, sorted_lookup
from biodedup.gallery.segments.stored_index import StoredIndex
from biodedup.jobs.exchange.gallery_files import (
    ABOUT_NAME,
    CODECS,
    CODECS_NAME,
    DECISIONS,
    DECISIONS_NAME,
    FILE_OF,
    ROWS_NAME,
    About,
    ExportedPart,
    described,
    read_about,
    rows_schema,
    table_schema,
)
from biodedup.jobs.manifests.check import Checked
from biodedup.jobs.shared.files import sync_folder
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.values import COLUMNS, Float32

_LENGTH_TOLERANCE = 1e-3
"""The largest difference between the length of a vector and 1."""


@dataclass(frozen=True)
class LoadedGallery(Described):
    """The restored gallery. subjects: number of enrolled subjects; rows: their encounters, and encounters of open cases; decisions: stored
    answers, including receipts of loads; version: of the gallery."""

    subjects: int
    rows: int
    decisions: int
    version: int


def load_gallery(
    export: Path, gallery: Path, config: Config | None = None, *, progress: Progress = silent
) -> LoadedGallery:
    """Restores a gallery that `export_gallery` wrote, in an absent or empty folder: with the same ids, rows, groups, templates, decisions, cases,
    verdicts, policies and version. The first writer builds FAISS indexes. With `Config.subject_keys` the minutiae of each row are sealed by a
    new key.

    Raises InvalidInput if the folder is not empty or the export is not complete, StorageUnavailable; then the folder is unchanged.
    """
    config = config or Config()
    storage = LocalStorage(config.keys)
    about = read_about(export)
    _refuse_taken(gallery)
    new = gallery.with_name(f".{gallery.name}.new")
    refuse_foreign(storage, new)
    remove_gallery(storage, new)  # an interrupted run may have left a part
    total = sum(part.rows for part in about.parts)
    try:
        with _understood(export), _new_keys(config.subject_keys, gallery, about.gallery_id) as keys:
            rebuild_gallery(
                storage, new, _content(export, about, keys), lambda done: progress("loading", done, max(total, 1))
            )
        with closing(Gallery.open_to_read(new, storage, config.gallery, config.subject_keys)) as opened:
            snapshot = opened.snapshot()
        if snapshot.present_count != total:
            raise InvalidInput(
                f"{export} gives {snapshot.present_count:,} rows, wanted {total:,}; export the gallery again"
            )
        with translated(f"writing {gallery}"):
            _refuse_taken(gallery)
            new.replace(gallery)
            sync_folder(gallery.parent)
    except BaseException:
        with suppress(BiodedupError, OSError):
            remove_gallery(storage, new)
        raise
    decisions = sum(part.decisions for part in about.parts)
    return LoadedGallery(snapshot.live_count, total, decisions, about.state.version)


def check_export(export: Path) -> Checked:
    """Reads a whole export, compares each file with its SHA-256, and checks every row. Writes nothing. Raises InvalidInput, which names the
    damaged file."""
    about = read_about(export)
    with _understood(export):
        for name, stated in about.files.items():
            if not (export / name).is_file():
                raise InvalidInput(f"{export / name} is missing; export the gallery again")
            if described(export / name) != stated:
                raise InvalidInput(f"{export / name} is not the file that was exported; export the gallery again")
        content = _content(export, about)
        for part in (*content.sealed, content.journal):
            assert isinstance(part, _ImportedPart), "this module made it"
            part.check()
        for table in FILE_OF:
            for _ in content.table(table):
                pass
    return Checked(str(export), sum(part.rows for part in about.parts))


@contextmanager
def _new_keys(folder: Path | None, gallery: Path, gallery_id: str) -> Iterator[SubjectKeys | None]:
    """The keys of subjects in this folder; None without a folder. Raises InvalidInput, StorageUnavailable."""
    if folder is None:
        yield None
        return
    refuse_keys_within(gallery, folder)
    with closing(SubjectKeys(folder, gallery_id, read_only=False, new=True)) as keys:
        yield keys


def _refuse_taken(gallery: Path) -> None:
    if gallery.is_symlink() or (gallery.exists() and (not gallery.is_dir() or any(gallery.iterdir()))):
        raise InvalidInput(
            f"{gallery} is not empty, but an export is loaded into a new gallery. Name another folder; `biodedup merge` merges two "
            "galleries"
        )


@contextmanager
def _understood(export: Path) -> Iterator[None]:
    """Turns the errors of reading a damaged export into InvalidInput."""
    try:
        yield
    except FileNotFoundError as error:
        raise InvalidInput(f"{error.filename or export} is missing; export the gallery again") from None
    except BiodedupError as error:
        if isinstance(error, GalleryDamaged):
            raise InvalidInput(f"{export} is damaged: {error}; export the gallery again") from error
        raise
    except (pa.ArrowException, LookupError, ValueError, TypeError, ArithmeticError, OSError, zlib.error) as error:
        raise InvalidInput(
            f"{export} is damaged ({type(error).__name__}: {error}); export the gallery again"
        ) from error


def _content(export: Path, about: About, keys: SubjectKeys | None = None) -> Content:
    """The export in the form from which `rebuild_gallery` makes a gallery. keys: seal its minutiae."""

    def table(name: str) -> Iterator[tuple[Any, ...]]:
        path = export / FILE_OF[name]
        batches = _opened(path, table_schema(name)).iter_batches()
        while True:
            with _understood(path):
                batch = next(batches, None)
            if batch is None:
                return
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    models = {COLUMNS[index]: ColumnModel(model_id, size) for index, model_id, size in table("model")}
    numbers = {frozenset(json.loads(names)): number for number, names in table("group_set")}
    rows = Slices(export / ROWS_NAME, rows_schema(models))
    decisions = Slices(export / DECISIONS_NAME, DECISIONS)
    codecs = _codecs(export)
    parts: list[_ImportedPart] = []
    first_row = first_decision = 0
    for stated in about.parts:
        for codec_id in set(stated.codecs.values()) - codecs.keys():
            raise InvalidInput(f"{export / CODECS_NAME} lacks the codec {codec_id}; export the gallery again")
        of_part = {name: codecs[codec_id] for name, codec_id in stated.codecs.items()}
        answers = _ImportedAnswers(decisions, first_decision, stated.decisions)
        of_rows = _Range(rows, first_row, stated.rows)
        parts.append(_ImportedPart(stated, models, of_rows, answers, of_part, numbers, keys))
        first_row, first_decision = first_row + stated.rows, first_decision + stated.decisions
    if (first_row, first_decision) != (rows.count, decisions.count) or not parts or parts[-1].sealed:
        raise InvalidInput(f"the rows of {export} are not those that {ABOUT_NAME} states; export the gallery again")
    index = read_settings(about.index, ())
    return Content(
        gallery_id=about.gallery_id,
        settings=about.settings,
        state=about.state,
        index=index,
        sealed=parts[:-1],
        journal=parts[-1],
        table=table,
        subject_keys=keys is not None,
    )


def _opened(path: Path, schema: Any) -> Any:
    """Opens a Parquet file of the export. Page checksums are verified during reading."""
    with _understood(path):
        file = pa.parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
    if not file.schema_arrow.equals(schema):
        raise InvalidInput(f"{path} has the columns {file.schema_arrow.names}, wanted {schema.names}; export again")
    return file


def _codecs(export: Path) -> dict[str, Codec]:
    codecs = {}
    for row in _opened(export / CODECS_NAME, CODECS).read().to_pylist():
        rotation = np.frombuffer(row["rotation"], "<f4").reshape(-1, row["dimension"])
        codec = Codec.from_card(json.loads(row["card"]), rotation)
        if codec.codec_id != row["codec_id"]:
            raise InvalidInput(f"{export / CODECS_NAME} has another codec than {row['codec_id']}; export again")
        codecs[codec.codec_id] = codec
    return codecs


class Slices:
    """Reads ranges of rows of a Parquet file, one column at a time. Caches the row groups that were read last."""

    def __init__(self, path: Path, schema: Any) -> None:
        self._path = path
        self._file = file = _opened(path, schema)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *counts]).tolist()
        self._kept: tuple[str, int, int, Any] = ("", 0, 0, None)

    @property
    def count(self) -> int:
        return int(self._starts[-1])

    def read(self, name: str, low: int, high: int) -> Any:
        """Rows [low, high) of a column, an Arrow array."""
        if low >= high:
            return pa.array([], self._file.schema_arrow.field(name).type)
        first, last = bisect_right(self._starts, low) - 1, bisect_right(self._starts, high - 1)
        if self._kept[:3] != (name, first, last):
            with _understood(self._path):
                groups = self._file.read_row_groups(range(first, last), columns=[name], use_threads=False)
                self._kept = (name, first, last, groups.column(0).combine_chunks())
        cells = self._kept[3]
        if isinstance(cells, pa.ChunkedArray):  # in some releases of Arrow, combine_chunks returns this
            cells = pa.concat_arrays(cells.chunks)
        return cells.slice(low - self._starts[first], high - low)


@dataclass(frozen=True, eq=False)
class _Range:
    """The rows of one part in a file: `count` rows from `first` on, numbered from 0."""

    slices: Slices
    first: int
    count: int

    def read(self, name: str, low: int, high: int) -> Any:
        return self.slices.read(name, self.first + low, self.first + min(high, self.count))

    def pieces(self) -> Iterator[tuple[int, int]]:
        for low in range(0, self.count, PIECE_ROWS):
            yield low, min(low + PIECE_ROWS, self.count)

    def whole(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        """A whole column of numbers."""
        pieces = [np.zeros(0, dtype)]
        for low, high in self.pieces():
            pieces.append(self.read(name, low, high).to_numpy(zero_copy_only=False).astype(dtype, copy=False))
        return np.concatenate(pieces)


class _ImportedPart:
    """A part of an export. Implements `Rows`, from which segments are written."""

    def __init__(
        self,
        stated: ExportedPart,
        models: Mapping[str, ColumnModel],
        rows: _Range,
        answers: _ImportedAnswers,
        codecs: Mapping[str, Codec],
        numbers: Mapping[frozenset[str], int],
        keys: SubjectKeys | None,
    ) -> None:
        self.first_row, self.end_row, self.count = stated.first_row, stated.end_row, stated.rows
        self.sealed = stated.sealed
        self.answers = answers
        self._rows = rows
        self._models, self._codecs, self._numbers = models, codecs, numbers
        self._keys = keys

    @cached_property
    def _slots(self) -> range:
        """A key for each row."""
        assert self._keys is not None, "_sealed checks it"
        return self._keys.allocate(self.count)

    def _sealed(self, column: int, positions: Int64, records: Packed) -> Packed:
        """Records of a column, each sealed by the key of its row, if the gallery has such keys. column: its index."""
        if self._keys is None or pa.compute.sum(pa.compute.binary_length(records)).as_py() in (None, 0):
            return records
        each = zip(positions.tolist(), records.to_pylist(), strict=True)
        return packed.pack([self._keys.seal(self._slots[at], column, record) if record else b"" for at, record in each])

    @cached_property
    def _row_numbers(self) -> NDArray[np.int64]:
        rows = self._rows.whole("row", np.int64)
        if len(rows) and not (self.first_row <= rows[0] and rows[-1] < self.end_row and (np.diff(rows) > 0).all()):
            raise InvalidInput(f"rows {self.first_row} to {self.end_row} of the export are out of order; export again")
        return rows

    @cached_property
    def _presence(self) -> NDArray[np.uint16]:
        presence = self._rows.whole("presence", np.uint16)
        known = sum(1 << index for index, column in enumerate(COLUMNS) if column in self._models)
        if (presence & ~np.uint16(known)).any() or not presence.all():
            raise InvalidInput("a row of the export has templates of no column; export again")
        return presence

    @cached_property
    def _group_sets(self) -> NDArray[np.uint32]:
        pieces = [np.zeros(0, np.uint32)]
        for low, high in self._rows.pieces():
            names = self._rows.read("groups", low, high).to_pylist()
            pieces.append(np.array([self._numbers[frozenset(listed)] if listed else 0 for listed in names], np.uint32))
        return np.concatenate(pieces)

    @cached_property
    def columns(self) -> Mapping[str, _ImportedColumn]:
        columns = {}
        for index, name in enumerate(COLUMNS):
            positions = np.flatnonzero(self._presence >> index & 1)
            if len(positions):
                dimension = self._models[name].dimension
                codec, seal = self._codecs.get(name), partial(self._sealed, index)
                columns[name] = _ImportedColumn(name, dimension, self._rows, positions, codec, seal)
        return columns

    @property
    def bits(self) -> Mapping[int, int]:
        counts = np.bincount(self._presence)
        return {bits: int(counts[bits]) for bits in np.flatnonzero(counts).tolist()}

    def rows(self, positions: Int64) -> Int64:
        return self._row_numbers[positions]

    def presence(self, low: int, high: int) -> NDArray[np.uint16]:
        return self._presence[low:high]

    def group_sets(self, low: int, high: int) -> NDArray[np.uint32]:
        return self._group_sets[low:high]

    def subject_ids(self, low: int, high: int) -> Packed:
        ids = self._rows.read("subject_id", low, high)
        if ids.null_count:
            raise InvalidInput("a row of the export has no subject_id; export again")
        return packed.pack_text(ids)

    def encounter_ids(self, low: int, high: int) -> Packed:
        return packed.pack_text(pa.compute.fill_null(self._rows.read("encounter_id", low, high), ""))

    @cached_property
    def repeated(self) -> NDArray[np.uint64]:
        pieces = [np.zeros(0, np.uint64)]
        for low, high in self._rows.pieces():
            marked = self._rows.read("again", low, high)
            pieces.append(packed.hashes(self.subject_ids(low, high).filter(marked)))
        return np.unique(np.concatenate(pieces))

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        pieces = [packed.hashes(self.subject_ids(low, high)) for low, high in self._rows.pieces()]
        return sorted_lookup(np.concatenate([np.zeros(0, np.uint64), *pieces]))

    def check(self) -> None:
        """Reads all cells. Raises the errors of reading."""
        _ = self._row_numbers, self._group_sets
        for low, high in self._rows.pieces():
            self.subject_ids(low, high)
            self.encounter_ids(low, high)
        for column in self.columns.values():
            for low in range(0, column.count, PIECE_ROWS):
                high = min(low + PIECE_ROWS, column.count)
                column.vectors(low, high)
                column.minutiae(low, high)
                column.quality(low, high)
        for low in range(0, self.answers.count, PIECE_ROWS):
            self.answers.texts(low, min(low + PIECE_ROWS, self.answers.count))


class _ImportedColumn:
    """A column of an `_ImportedPart`. positions: of the rows that have a template, in the part, ascending; seal: (positions, their records) ->
    the records as they are stored."""

    def __init__(
        self,
        name: str,
        dimension: int | None,
        rows: _Range,
        positions: Int64,
        codec: Codec | None,
        seal: Callable[[Int64, Packed], Packed],
    ) -> None:
        self.dimension, self.count, self.codec = dimension, len(positions), codec
        self.full = self.count == rows.count
        self.index: StoredIndex | None = None
        self.byte_counts = (0, 0)
        self._name, self._rows, self._positions = name, rows, positions
        self._seal = seal

    def cell_range(self, low: int, high: int) -> tuple[int, int]:
        first, last = np.searchsorted(self._positions, (low, high))
        return int(first), int(last)

    def positions(self, low: int, high: int) -> Int64:
        return self._positions[low:high]

    def _cells(self, name: str, low: int, high: int) -> Any:
        """Cells [low, high) of a column of the file, an Arrow array."""
        positions = self._positions[low:high]
        if not len(positions):
            return self._rows.read(name, 0, 0)
        first, last = int(positions[0]), int(positions[-1])
        return self._rows.read(name, first, last + 1).take(pa.array(positions - first))

    def vectors(self, low: int, high: int) -> Float32:
        count = min(high, self.count) - low
        if self.dimension is None:
            return np.zeros((count, 0), np.float32)
        lists = self._cells(self._name, low, high)
        flat = lists.flatten()
        lengths = pa.compute.list_value_length(lists)
        if (
            lists.null_count
            or flat.null_count
            or (len(lists) and set(lengths.unique().to_pylist()) != {self.dimension})
        ):
            raise InvalidInput(
                f"column {self._name} of the export lacks vectors of {self.dimension} numbers; export again"
            )
        vectors = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, self.dimension)
        lengths = np.linalg.norm(vectors, axis=1)
        if not (np.abs(lengths - 1) < _LENGTH_TOLERANCE).all():
            raise InvalidInput(
                f"column {self._name} of the export has vectors that are not of unit length; export again"
            )
        return np.asarray(vectors, np.float32)

    def coded(self, codec: Codec, low: int, high: int) -> tuple[Codes, Float32]:
        return codec.encode(self.vectors(low, high))

    def quality(self, low: int, high: int) -> Float32:
        values = self._cells(f"{self._name}_quality", low, high).cast(pa.float32())
        stated = pa.compute.fill_null(values, np.nan).to_numpy(zero_copy_only=False)
        return quality_scale.each_of_table(self._name, stated)

    def minutiae(self, low: int, high: int) -> Packed:
        if self._name == "face":
            return packed.empties(min(high, self.count) - low)
        records = self._cells(f"{self._name}_minutiae", low, high)
        if self.dimension is None and records.null_count:
            raise InvalidInput(f"column {self._name} of the export lacks minutiae; export again")
        return self._seal(self._positions[low:high], pa.compute.fill_null(records, b"").cast(pa.large_binary()))

    # methods that writing a segment does not need ----------------------------------------------------------------

    def cells_at(self, positions: Int64) -> Int64:
        raise NotImplementedError("an export is read in order")

    def vectors_at(self, cells: Int64) -> Float32:
        raise NotImplementedError("an export is read in order")

    def scanned(self, low: int, high: int) -> ScannedRows:
        raise NotImplementedError("an export is not searched")

    def codes_at(self, cells: Int64) -> tuple[Codes, Float32]:
        raise NotImplementedError("an export is not searched")

    def release(self, *, forget: bool) -> None:
        pass

    def minutiae_at(self, cells: Int64) -> list[bytes]:
        raise NotImplementedError("an export is read in order")


class _ImportedAnswers:
    """The answers of an `_ImportedPart`."""

    def __init__(self, decisions: Slices, first: int, count: int) -> None:
        self.count = count
        self._range = _Range(decisions, first, count)

    @property
    def outcomes(self) -> Mapping[str, int]:
        counts: dict[str, int] = {}
        for low, high in self._range.pieces():
            for entry in self._range.read("outcome", low, high).value_counts().to_pylist():
                counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
        return counts

    def find(self, encounter_id: str, hashed: np.uint64) -> StoredDecision | None:
        raise NotImplementedError("an export is read in order")

    def ids(self, low: int, high: int) -> Packed:
        return packed.pack_text(self._range.read("encounter_id", low, high))

    def digests(self, low: int, high: int) -> Packed:
        return self._range.read("digest", low, high).cast(pa.large_binary())

    def texts(self, low: int, high: int) -> Packed:
        texts = self._range.read("answer", low, high).to_pylist()
        return packed.pack([zlib.compress(text.encode()) for text in texts])

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        pieces = [packed.hashes(self.ids(low, high)) for low, high in self._range.pieces()]
        return sorted_lookup(np.concatenate([np.zeros(0, np.uint64), *pieces]))
