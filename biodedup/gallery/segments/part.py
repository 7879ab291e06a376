"""The interface of a part of a gallery: a range of rows, in memory (`Tail`) or in files (`Segment`).

Searches and merges only use this interface, for both kinds of parts.

Terms: a *row* is the number of an encounter in the whole gallery, and never changes. A *position* is the index of a row within one part. A
*cell* is the index of a template within one column of one part. All three ascend together. A subject has one or more rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.answers import StoredDecision
from biodedup.gallery.files.codec import Codec
from biodedup.gallery.files.codes import Codes
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.segments.stored_index import StoredIndex
from biodedup.values import Float32

PIECE_ROWS = 1 << 13
"""The number of rows that are copied or compared in one step. Their vectors (float32) fit into the processor's cache."""

Int64: TypeAlias = NDArray[np.int64]


class ScannedRows(NamedTuple):
    """The data that a search reads for b blocks of a column's cells (codes.py). signs, outer: uint8 (b, scanned / 8, 64); high: uint8
    (n, scanned / 2), the high nibbles of the n <= 64 b cells; norms: float32 (64 b,); norm_min: the smallest norm in the column."""

    signs: Codes
    outer: Codes
    high: Codes
    norms: Float32
    norm_min: float


class Column(Protocol):
    """The templates of one column of a part. dimension: of the embeddings, None if the column holds only minutiae."""

    count: int
    dimension: int | None
    full: bool
    """Whether every row has a cell. Then cells and positions are the same numbers."""

    def cell_range(self, low: int, high: int) -> tuple[int, int]:
        """The cells of positions [low, high)."""

    def cells_at(self, positions: Int64) -> Int64:
        """The cell of each position, -1 for a position without a cell."""

    def positions(self, low: int, high: int) -> Int64:
        """The positions of cells [low, high)."""

    def vectors(self, low: int, high: int) -> Float32: ...

    def vectors_at(self, cells: Int64) -> Float32: ...

    @property
    def index(self) -> StoredIndex | None:
        """The FAISS index of the column, or None."""

    @property
    def codec(self) -> Codec | None:
        """The codec of the vectors; None if they are stored without a codec."""

    def coded(self, codec: Codec, low: int, high: int) -> tuple[Codes, Float32]:
        """Codes and norms of cells [low, high) (codes.py). They are read if they are stored with this codec, else computed."""

    def scanned(self, low: int, high: int) -> ScannedRows:
        """The data that a search reads for the whole blocks with cells [low, high). Only with a codec."""

    def codes_at(self, cells: Int64) -> tuple[Codes, Float32]:
        """Codes and norms of some cells. Ascending cells are read in the order of the disk. Only with a codec."""

    @property
    def byte_counts(self) -> tuple[int, int]:
        """(bytes of the file that a scan reads, bytes of the file from which single cells are read)."""

    def release(self, *, forget: bool) -> None:
        """Releases the memory of cells that `codes_at` has read. forget: also drop them from the system's cache."""

    def quality(self, low: int, high: int) -> Float32:
        """The stored qualities of cells [low, high); NaN for a quality that was not measured."""

    def minutiae(self, low: int, high: int) -> Packed:
        """The minutiae records of cells [low, high); empty for a cell without one."""

    def minutiae_at(self, cells: Int64) -> list[bytes]: ...


class Answers(Protocol):
    """The answers to encounters that are stored with a part."""

    @property
    def count(self) -> int: ...

    @property
    def outcomes(self) -> Mapping[str, int]: ...

    def find(self, encounter_id: str, hashed: np.uint64) -> StoredDecision | None: ...

    def ids(self, low: int, high: int) -> Packed: ...

    def digests(self, low: int, high: int) -> Packed: ...

    def texts(self, low: int, high: int) -> Packed:
        """The answers, compressed with zlib."""

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """(hashes of the ids, ascending; the index of each)."""


class Rows(Protocol):
    """`count` rows of the range [first_row, end_row), with everything that is needed to write them into a segment. Merged parts lack
    removed rows."""

    first_row: int
    end_row: int
    count: int

    @property
    def columns(self) -> Mapping[str, Column]: ...

    @property
    def answers(self) -> Answers: ...

    @property
    def bits(self) -> Mapping[int, int]:
        """presence -> the number of rows with it."""

    def rows(self, positions: Int64) -> Int64: ...

    def presence(self, low: int, high: int) -> NDArray[np.uint16]:
        """The presence of each row: bit c is set if the row has a template in COLUMNS[c]."""

    def group_sets(self, low: int, high: int) -> NDArray[np.uint32]: ...

    def subject_ids(self, low: int, high: int) -> Packed: ...

    def encounter_ids(self, low: int, high: int) -> Packed:
        """The encounter_id of each row; empty for a row that was added without an encounter."""

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """(hashes of the subject_ids, ascending; the position of each)."""

    @property
    def repeated(self) -> NDArray[np.uint64]:
        """Hashes of the subject_ids that had a row already when a row of this part was added. Such rows may have been removed since."""


class Part(Rows, Protocol):
    """Rows that can be searched."""

    def at(self, rows: Int64) -> Int64:
        """The position of each row, -1 for a row that a merge has dropped."""

    def position_range(self, low_row: int, high_row: int) -> tuple[int, int]:
        """The positions of rows [low_row, high_row)."""

    def subject_ids_at(self, positions: Int64) -> list[str]: ...

    def find(self, subject_id: str, hashed: np.uint64) -> list[int]:
        """The positions of rows with this subject_id, ascending. hashed: its hash."""

    def find_all(self, subject_ids: Packed, hashes: NDArray[np.uint64]) -> tuple[Int64, Int64]:
        """(index of the id, position) of every row with one of these ids. The positions of an id ascend."""


def sorted_lookup(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """The arrays of a look-up: (hashes in ascending order, the index of each). Equal hashes are ordered by index."""
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order.astype(np.uint32)
