"""The SQLite tables that are the gallery's truth.

Owns the schema and every SQL statement. Never decides, never searches, never caches. Callers hold the gallery's lock.

| table | a row is |
|---|---|
| meta | one setting of the gallery: format, version, config |
| model | one column's model_id and dimension, fixed by its first template |
| subject | one subject; row numbers are never used again; removed_version marks a tombstone |
| cell | one template: subject row and column |
| encounter | one acknowledged write: what was sent (digest), what was answered |
| held | the templates of an encounter that went to review, until somebody decides |
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.values import COLUMNS, Template

APPLICATION_ID = 0x62696F64  # "biod", so that `file` and a curious engineer recognise the database
FORMAT_VERSION = 1

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE model (column_index INTEGER PRIMARY KEY, model_id TEXT NOT NULL, dimension INTEGER);
CREATE TABLE subject (
    row INTEGER PRIMARY KEY, subject_id TEXT NOT NULL, encounter_id TEXT,
    enrolled_version INTEGER NOT NULL, removed_version INTEGER);
CREATE UNIQUE INDEX subject_live ON subject (subject_id) WHERE removed_version IS NULL;
CREATE TABLE cell (key INTEGER PRIMARY KEY, vector BLOB, minutiae BLOB, quality REAL);
CREATE TABLE encounter (
    encounter_id TEXT PRIMARY KEY, subject_id TEXT, digest BLOB NOT NULL, outcome TEXT NOT NULL,
    answer TEXT NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE held (
    encounter_id TEXT, column_index INTEGER, model_id TEXT NOT NULL, vector BLOB, minutiae BLOB, quality REAL,
    PRIMARY KEY (encounter_id, column_index)) WITHOUT ROWID;
"""

_STRIDE = 32  # cell key = row * stride + column index: one integer key keeps a subject's cells side by side


@dataclass(frozen=True)
class ColumnModel:
    """Which model a column's templates come from. dimension: None where the column holds minutiae only."""

    model_id: str
    dimension: int | None


class Catalogue:
    """The statements, over one connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    # transactions ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._connection.execute("COMMIT")

    def rollback(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()

    # the gallery itself -----------------------------------------------------------------------------------------

    def create(self, meta: dict[str, str]) -> None:
        """Lays the schema, inside the caller's transaction."""
        for statement in _SCHEMA.split(";"):
            if statement.strip():
                self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        self._connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())

    def identify(self) -> tuple[int, int, int]:
        """(application_id, user_version, number of tables): what kind of file this is."""
        one = self._one
        return one("PRAGMA application_id"), one("PRAGMA user_version"), one("SELECT count(*) FROM sqlite_master")

    def meta(self) -> dict[str, str]:
        return dict(self._connection.execute("SELECT key, value FROM meta"))

    def set_meta(self, key: str, value: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def models(self) -> dict[str, ColumnModel]:
        rows = self._connection.execute("SELECT column_index, model_id, dimension FROM model")
        return {COLUMNS[index]: ColumnModel(model_id, dimension) for index, model_id, dimension in rows}

    def add_model(self, column: str, model: ColumnModel) -> None:
        values = (COLUMNS.index(column), model.model_id, model.dimension)
        self._connection.execute("INSERT INTO model VALUES (?, ?, ?)", values)

    def integrity_problems(self) -> list[str]:
        """SQLite's own check of every page, and the rules that the tables keep among themselves."""
        problems = [text for (text,) in self._connection.execute("PRAGMA integrity_check(20)") if text != "ok"]
        orphans = self._one(
            f"SELECT count(*) FROM cell WHERE NOT EXISTS "
            f"(SELECT 1 FROM subject WHERE row = cell.key / {_STRIDE} AND removed_version IS NULL)"
        )
        if orphans:
            problems.append(f"{orphans} cells belong to no enrolled subject")
        bare = self._one(
            f"SELECT count(*) FROM subject WHERE removed_version IS NULL AND NOT EXISTS "
            f"(SELECT 1 FROM cell WHERE key BETWEEN row * {_STRIDE} AND row * {_STRIDE} + {_STRIDE - 1})"
        )
        if bare:
            problems.append(f"{bare} enrolled subjects have no template")
        for column, model in self.models().items():
            wrong = self._one(
                f"SELECT count(*) FROM cell WHERE key % {_STRIDE} = {COLUMNS.index(column)} "
                f"AND vector IS NOT NULL AND length(vector) != {4 * (model.dimension or 0)}"
            )
            if wrong:
                problems.append(
                    f"{wrong} vectors of column {column} have another length than {model.dimension} numbers"
                )
        return problems

    # subjects ---------------------------------------------------------------------------------------------------

    def subjects(self) -> Iterator[tuple[int, str]]:
        """(row, subject_id) of the enrolled, by row."""
        yield from self._connection.execute(
            "SELECT row, subject_id FROM subject WHERE removed_version IS NULL ORDER BY row"
        )

    def row_count(self) -> int:
        """One more than the highest row ever given."""
        return int(self._one("SELECT coalesce(max(row) + 1, 0) FROM subject"))

    def row_of(self, subject_id: str) -> int | None:
        query = "SELECT row FROM subject WHERE subject_id = ? AND removed_version IS NULL"
        found = self._connection.execute(query, (subject_id,)).fetchone()
        return None if found is None else int(found[0])

    def add_subjects(self, rows: Iterable[tuple[int, str, str | None]], version: int) -> None:
        """rows: (row, subject_id, encounter_id)."""
        values = ((row, subject_id, encounter_id, version) for row, subject_id, encounter_id in rows)
        self._connection.executemany("INSERT INTO subject VALUES (?, ?, ?, ?, NULL)", values)

    def remove(self, row: int, version: int) -> None:
        self._connection.execute("UPDATE subject SET removed_version = ? WHERE row = ?", (version, row))
        low = row * _STRIDE
        self._connection.execute("DELETE FROM cell WHERE key BETWEEN ? AND ?", (low, low + _STRIDE - 1))

    # templates --------------------------------------------------------------------------------------------------

    def add_cells(self, cells: Iterable[tuple[int, Template]]) -> None:
        """cells: (row, template)."""
        self._connection.executemany(
            "INSERT INTO cell VALUES (?, ?, ?, ?)",
            ((row * _STRIDE + COLUMNS.index(template.column), *_blobs(template)) for row, template in cells),
        )

    def add_vectors(self, rows: Iterable[int], column: str, vectors: NDArray[np.float32]) -> None:
        index = COLUMNS.index(column)
        self._connection.executemany(
            "INSERT INTO cell VALUES (?, ?, NULL, NULL)",
            ((row * _STRIDE + index, vector.tobytes()) for row, vector in zip(rows, vectors, strict=True)),
        )

    def presence(self) -> Iterator[tuple[int, int]]:
        """(row, column index) of every cell, by row."""
        yield from self._connection.execute(f"SELECT key / {_STRIDE}, key % {_STRIDE} FROM cell ORDER BY key")

    def vectors(self, column: str) -> Iterator[tuple[int, bytes]]:
        """(row, vector) of a column's cells, by row."""
        yield from self._connection.execute(
            f"SELECT key / {_STRIDE}, vector FROM cell WHERE key % {_STRIDE} = ? AND vector IS NOT NULL ORDER BY key",
            (COLUMNS.index(column),),
        )

    def templates(self, row: int, models: dict[str, ColumnModel]) -> dict[str, Template]:
        """All templates of one row."""
        low = row * _STRIDE
        found = self._connection.execute(
            f"SELECT key % {_STRIDE}, vector, minutiae, quality FROM cell WHERE key BETWEEN ? AND ? ORDER BY key",
            (low, low + _STRIDE - 1),
        )
        templates = {}
        for index, vector, minutiae, quality in found:
            column = COLUMNS[index]
            embedding = None if vector is None else np.frombuffer(vector, np.float32)
            templates[column] = Template(column, models[column].model_id, embedding, minutiae, quality)
        return templates

    def minutiae(self, rows: Sequence[int], column: str) -> dict[int, bytes]:
        """Minutiae records of those of the rows that have one in this column."""
        index = COLUMNS.index(column)
        records: dict[int, bytes] = {}
        for start in range(0, len(rows), 500):  # below SQLite's limit on bound values in its oldest builds
            keys = [row * _STRIDE + index for row in rows[start : start + 500]]
            marks = ",".join("?" * len(keys))
            query = f"SELECT key, minutiae FROM cell WHERE key IN ({marks}) AND minutiae IS NOT NULL"
            records.update((key // _STRIDE, record) for key, record in self._connection.execute(query, keys))
        return records

    # encounters -------------------------------------------------------------------------------------------------

    def answer(self, encounter_id: str) -> tuple[bytes, str] | None:
        """(digest of what was sent, answer as JSON), or None."""
        query = "SELECT digest, answer FROM encounter WHERE encounter_id = ?"
        found: tuple[bytes, str] | None = self._connection.execute(query, (encounter_id,)).fetchone()
        return found

    def add_encounter(
        self, encounter_id: str, subject_id: str | None, digest: bytes, outcome: str, answer: str, version: int
    ) -> None:
        values = (encounter_id, subject_id, digest, outcome, answer, version)
        self._connection.execute("INSERT INTO encounter VALUES (?, ?, ?, ?, ?, ?)", values)

    def hold(self, encounter_id: str, templates: Iterable[Template]) -> None:
        self._connection.executemany(
            "INSERT INTO held VALUES (?, ?, ?, ?, ?, ?)",
            ((encounter_id, COLUMNS.index(t.column), t.model_id, *_blobs(t)) for t in templates),
        )

    def outcomes(self) -> dict[str, int]:
        return dict(
            self._connection.execute("SELECT outcome, count(*) FROM encounter GROUP BY outcome ORDER BY outcome")
        )

    def _one(self, query: str) -> Any:
        return self._connection.execute(query).fetchone()[0]


def _blobs(template: Template) -> tuple[bytes | None, bytes | None, float | None]:
    vector = None if template.embedding is None else template.embedding.tobytes()
    return vector, template.minutiae, template.quality
