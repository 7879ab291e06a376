"""The interface of a part of a gallery: a range of rows, in memory (`Tail`) or in sealed files (`Segment`).

Searches and merges use this interface alone, and do not know which kind they read.

Words: a *row* is the number of an encounter in the whole gallery, and never changes; a *position* is its place within one part; a *cell*
is a template's place within one column of one part. All three ascend together. A subject owns one row or several.
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
"""Rows copied or compared at once: as float32, their vectors stay in the processor's cache."""

Int64: TypeAlias = NDArray[np.int64]


class ScannedRows(NamedTuple):
    """What a search reads of the blocks that hold some cells of a column (codes.py). signs, outer: uint8 (b, scanned /
    8, 64); high: uint8 (n, scanned / 2), the high nibbles, n of the first 64 b cells; norms: float32 (64 b,). norm_min: no cell
    of the column has a smaller norm."""

    signs: Codes
    outer: Codes
    high: Codes
    norms: Float32
    norm_min: float


class Column(Protocol):
    """The templates of one column of a part. dimension: None where it holds minutiae only."""

    count: int
    dimension: int | None
    full: bool
    """Every row has a cell, so that cells and positions are the same numbers."""

    def cell_range(self, low: int, high: int) -> tuple[int, int]:
        """The cells of positions [low, high)."""

    def cells_at(self, positions: Int64) -> Int64:
        """The cell of each position, -1 where it has none."""

    def positions(self, low: int, high: int) -> Int64:
        """The positions of cells [low, high)."""

    def vectors(self, low: int, high: int) -> Float32: ...

    def vectors_at(self, cells: Int64) -> Float32: ...

    @property
    def index(self) -> StoredIndex | None:
        """Its FAISS index, None where it has none."""

    @property
    def codec(self) -> Codec | None:
        """None where vectors are kept as they are."""

    def coded(self, codec: Codec, low: int, high: int) -> tuple[Codes, Float32]:
        """Codes and norms of cells [low, high) (codes.py); as they are stored where they are of this codec."""

    def scanned(self, low: int, high: int) -> ScannedRows:
        """What a search reads of the whole blocks that hold cells [low, high). Only with a codec."""

    def codes_at(self, cells: Int64) -> tuple[Codes, Float32]:
        """Codes and norms of some cells; ascending ones are read in the order of the disk. Only with a codec."""

    @property
    def byte_counts(self) -> tuple[int, int]:
        """Of the files: what a scan reads, and what is read of single cells."""

    def release(self, *, forget: bool) -> None:
        """After `codes_at` of many cells: the memory that they took up is given back; forget: by the system, too."""

    def quality(self, low: int, high: int) -> Float32:
        """NaN where it was not measured."""

    def minutiae(self, low: int, high: int) -> Packed:
        """Empty where a cell has none."""

    def minutiae_at(self, cells: Int64) -> list[bytes]: ...


class Answers(Protocol):
    """The encounters that were answered while a part's rows were enrolled."""

    @property
    def count(self) -> int: ...

    @property
    def outcomes(self) -> Mapping[str, int]: ...

    def find(self, encounter_id: str, hashed: np.uint64) -> StoredDecision | None: ...

    def ids(self, low: int, high: int) -> Packed: ...

    def digests(self, low: int, high: int) -> Packed: ...

    def texts(self, low: int, high: int) -> Packed:
        """Answers, compressed by zlib."""

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """Hashes of ids, ascending, and the index of each."""


class Rows(Protocol):
    """`count` rows of the range [first_row, end_row), without the dropped ones: all that is needed to write them into a segment."""

    first_row: int
    end_row: int
    count: int

    @property
    def columns(self) -> Mapping[str, Column]: ...

    @property
    def answers(self) -> Answers: ...

    @property
    def bits(self) -> Mapping[int, int]:
        """How many rows have each presence."""

    def rows(self, positions: Int64) -> Int64: ...

    def presence(self, low: int, high: int) -> NDArray[np.uint16]:
        """Bit c is set where the row has a template in COLUMNS[c]."""

    def group_sets(self, low: int, high: int) -> NDArray[np.uint32]: ...

    def subject_ids(self, low: int, high: int) -> Packed: ...

    def encounter_ids(self, low: int, high: int) -> Packed:
        """The encounter that enrolled each row; empty for rows that were added without one."""

    def lookup(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """Hashes of subject_ids, ascending, and the position of each."""

    @property
    def again(self) -> NDArray[np.uint64]:
        """Hashes of the subject_ids of rows that were not the first under their id; some may have been removed since."""


class Part(Rows, Protocol):
    """Rows that are searched."""

    def at(self, rows: Int64) -> Int64:
        """The position of each row, -1 where it was dropped."""

    def position_range(self, low_row: int, high_row: int) -> tuple[int, int]:
        """The positions of rows [low_row, high_row)."""

    def subject_ids_at(self, positions: Int64) -> list[str]: ...

    def find(self, subject_id: str, hashed: np.uint64) -> list[int]:
        """Positions under this id, ascending."""

    def find_all(self, subject_ids: Packed, hashes: NDArray[np.uint64]) -> tuple[Int64, Int64]:
        """(index of the id, position) of every row under one of these ids; of one id, positions ascend."""


def sorted_lookup(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """The order of a look-up: by hash, equal ones by index."""
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order.astype(np.uint32)
