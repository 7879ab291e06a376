"""Gives every segment the FAISS index that the gallery's settings name: trains codecs, builds indexes, drops indexes of other engines.

Owns the order of these steps. Never searches. Each step is a commit of its own. So searches continue with the present index of each
segment, and an interrupted run continues where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from biodedup.errors import InvalidInput
from biodedup.gallery.files import index_codec
from biodedup.gallery.files.index_codec import FaissCodec
from biodedup.gallery.segments import indexing
from biodedup.gallery.segments.indexing import sample_of
from biodedup.gallery.segments.layout import INDEX, file_name
from biodedup.gallery.segments.part import Column
from biodedup.gallery.segments.reader import Segment
from biodedup.gallery.snapshot import Snapshot
from biodedup.gallery.transaction import Transaction
from biodedup.index_spec import IndexSpec

_log = logging.getLogger("biodedup.gallery")


@dataclass(frozen=True)
class IndexLimits:
    """threads: for training and building; miss_risk: the limit that a codec must keep."""

    threads: int = 1
    miss_risk: float = 1e-3


class Indexed(Protocol):
    """The methods of a gallery that indexing calls (gallery.py)."""

    limits: IndexLimits

    def snapshot(self) -> Snapshot: ...

    def transaction(self) -> AbstractContextManager[Transaction]: ...

    def write_index(
        self, segment: Segment, column: str, codec: FaissCodec, go_on: Callable[[], bool]
    ) -> tuple[str, str]: ...

    def remove_index_files(self, names: Sequence[str]) -> None: ...


@dataclass(frozen=True)
class _Step:
    """One step. segment: the segment to index, None to train a codec for the column; codec: for the index, None to drop the index."""

    column: str
    segment: Segment | None = None
    codec: FaissCodec | None = None


class Indexing:
    """The steps for one gallery. The caller ensures that only one thread runs them, and that no thread merges meanwhile."""

    def __init__(self, gallery: Indexed) -> None:
        self._gallery = gallery
        self._failed: set[tuple[str, IndexSpec]] = set()
        """(column, engine) for which no codec can be trained. These columns are searched with the native engine."""

    def is_due(self) -> bool:
        """Whether a segment lacks its index, or has an index that it should not have."""
        return next(self._steps(self._gallery.snapshot()), None) is not None

    def progress(self) -> tuple[int, int]:
        """(cells in segments with the wanted index, cells in all segments)."""
        snapshot = self._gallery.snapshot()
        total = sum(column.count for _, _, column in _indexable(snapshot))
        left = sum(s.segment.columns[s.column].count for s in self._steps(snapshot) if s.segment is not None)
        return total - left, total

    def run(self, go_on: Callable[[], bool] = lambda: True, report: Callable[[int, int], None] | None = None) -> None:
        """Runs steps until every segment has its index. go_on: raises to stop; report: receives `progress` after each step."""
        while (step := next(self._steps(self._gallery.snapshot()), None)) is not None:
            go_on()
            if step.segment is None:
                self._train(step.column)
            else:
                self._index(step.segment, step.column, step.codec, go_on)
            if report is not None:
                report(*self.progress())
        self._drop_unused_codecs()

    def codec_for(self, column: str, spec: IndexSpec) -> FaissCodec | None:
        """A codec trained on a column's rows; None if there are too few rows. Raises InvalidInput if FAISS cannot make the index."""
        columns = [
            segment.columns[column] for segment in self._gallery.snapshot().segments if column in segment.columns
        ]
        dimension = columns[0].dimension if columns else None
        if spec.is_native or dimension is None:
            return None
        wanted = index_codec.training_rows_min(spec, dimension)
        if not _large(columns) or sum(c.count for c in columns) < wanted:
            return None
        sample = sample_of(columns, index_codec.training_rows_max(spec, dimension))
        with index_codec.threads(self._gallery.limits.threads, len(sample)):
            transform = self._gallery.snapshot().transform
            return index_codec.train(spec, sample, None if transform is None else transform.of(column))

    def _steps(self, snapshot: Snapshot) -> Iterator[_Step]:
        settings = snapshot.indexing
        for name, segment, column in _indexable(snapshot):
            codec = settings.wanted(name)
            if codec is None and not settings.spec(name).is_native:
                if self._can_train(snapshot, name):
                    yield _Step(name)
                continue  # the index of an earlier engine is used until there is a codec
            wanted = codec if column.count > indexing.CELLS_MIN else None
            present = None if column.index is None else column.index.codec_id
            if present != (None if wanted is None else wanted.codec_id):
                yield _Step(name, segment, wanted)

    def _can_train(self, snapshot: Snapshot, name: str) -> bool:
        spec = snapshot.indexing.spec(name)
        columns = [segment.columns[name] for segment in snapshot.segments if name in segment.columns]
        if (name, spec) in self._failed or not _large(columns):
            return False
        try:
            wanted = index_codec.training_rows_min(spec, columns[0].dimension or 0)
        except InvalidInput as error:
            self._give_up(name, spec, str(error))
            return False
        return sum(column.count for column in columns) >= wanted

    def _train(self, column: str) -> None:
        settings = self._gallery.snapshot().indexing
        spec = settings.spec(column)
        try:
            codec = self.codec_for(column, spec)
        except InvalidInput as error:
            self._give_up(column, spec, str(error))
            return
        if codec is None or not (settings.forced or codec.keeps(self._gallery.limits.miss_risk)):
            self._give_up(
                column, spec, f"it misses mates with a probability of up to {codec.lost_bound if codec else 1:.2g}"
            )
            return
        with self._gallery.transaction() as transaction:
            transaction.add_codec(column, codec)

    def _give_up(self, column: str, spec: IndexSpec, why: str) -> None:
        self._failed.add((column, spec))
        _log.warning("column %s is searched by the native engine: index %s: %s", column, spec, why)

    def _index(self, segment: Segment, column: str, codec: FaissCodec | None, go_on: Callable[[], bool]) -> None:
        kind, digest = (None, "") if codec is None else self._gallery.write_index(segment, column, codec, go_on)
        try:
            with self._gallery.transaction() as transaction:
                transaction.replace_index(segment, column, kind, digest)
        except BaseException:
            published = {s.entry.number: s.entry.files for s in self._gallery.snapshot().segments}
            if kind is not None and kind not in published.get(segment.entry.number, {}):
                self._gallery.remove_index_files([file_name(segment.entry.number, kind)])
            raise
        engine = "native" if codec is None else codec.spec
        _log.info("column %s of a segment of %d rows is indexed by %s", column, segment.count, engine)

    def _drop_unused_codecs(self) -> None:
        snapshot = self._gallery.snapshot()
        used = {kind for segment in snapshot.segments for kind in segment.entry.files}
        unused = [
            (column, codec.codec_id)
            for column, codecs in snapshot.indexing.codecs.items()
            for codec in codecs
            if column + INDEX + codec.codec_id not in used and codec is not snapshot.indexing.wanted(column)
        ]
        if unused:
            with self._gallery.transaction() as transaction:
                for column, codec_id in unused:
                    transaction.drop_codec(column, codec_id)


def _indexable(snapshot: Snapshot) -> Iterator[tuple[str, Segment, Column]]:
    """(column name, segment, column) of every column of embeddings in segments."""
    for segment in snapshot.segments:
        for name, column in segment.columns.items():
            if column.dimension is not None and column.codec is not None:
                yield name, segment, column


def _large(columns: Sequence[Column]) -> bool:
    """Whether one of the columns has enough cells for an index."""
    return any(column.count > indexing.CELLS_MIN and column.codec is not None for column in columns)
