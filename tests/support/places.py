"""A gallery in a folder, or a register in PostgreSQL, for tests that forge its database: the same calls for both."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import biodedup as bd
from biodedup import jobs
from biodedup.cluster.catalogue import _commit_column as commit_column
from biodedup.cluster.key import chain_key_of
from biodedup.cluster.opening import connect
from biodedup.gallery.catalogue.sqlite import CatalogueTables, SqliteCatalogue, row_checksum, table_columns
from biodedup.gallery.files.filesystem import LocalStorage


@dataclass
class Place:
    """config: of all that open it."""

    config: bd.Config

    gallery: Any = None
    """What commands name."""

    def open(self, **more: Any) -> bd.Engine:
        return bd.Engine.open(self.gallery, self.config, **more)

    def verified(self, **more: Any) -> Any:
        return jobs.verify_log(self.gallery, self.config, **more)

    def problems(self, **more: Any) -> list[str]:
        return list(self.verified(**more).problems)

    def rows(self, table: str) -> list[tuple[Any, ...]]:
        with self.catalogue() as catalogue:
            return list(catalogue.rows_of(table))

    def content(self) -> dict[str, list[tuple[Any, ...]]]:
        """What the gallery holds. The lists of changes only help to name what is wrong."""
        with self.catalogue() as catalogue:
            return {table: list(catalogue.rows_of(table)) for table in catalogue.tables if table != "row_change"}

    def put(self, table: str, row: Any) -> None:
        """Forges a row, in the place of the one with its key, with a right checksum."""
        key = table_columns(table)[0][0]
        self.run(f"DELETE FROM {table} WHERE {key} = ?", (row[0],))
        self.insert(table, row)

    @contextmanager
    def catalogue(self) -> Iterator[CatalogueTables]:
        raise NotImplementedError

    def run(self, statement: str, values: Any = ()) -> list[tuple[Any, ...]]:
        """What an attacker with the database's key, or of a gallery in the clear, can do."""
        raise NotImplementedError

    def insert(self, table: str, row: Any) -> None:
        raise NotImplementedError

    def kept(self) -> Any:
        """Everything, for `put_back`."""
        raise NotImplementedError

    def put_back(self, kept: Any) -> None:
        raise NotImplementedError


@dataclass
class Folder(Place):
    gallery: Path = Path()

    @contextmanager
    def catalogue(self) -> Iterator[CatalogueTables]:
        with closing(
            LocalStorage(self.config.keys).connect(self.gallery / "gallery.sqlite3", read_only=True)
        ) as database:
            yield SqliteCatalogue(database)

    def run(self, statement: str, values: Any = ()) -> list[tuple[Any, ...]]:
        storage = LocalStorage(self.config.keys)
        with closing(storage.connect(self.gallery / "gallery.sqlite3", read_only=False)) as database:
            return database.execute(statement, values).fetchall()

    def insert(self, table: str, row: Any) -> None:
        marks = ",".join("?" * (len(row) + 1))
        self.run(f"INSERT INTO {table} VALUES ({marks})", (*row, row_checksum(row)))

    def kept(self) -> Any:
        kept = self.gallery.with_name(f"{self.gallery.name}-kept")
        shutil.rmtree(kept, ignore_errors=True)
        return shutil.copytree(self.gallery, kept)

    def put_back(self, kept: Any) -> None:
        shutil.rmtree(self.gallery)
        shutil.copytree(kept, self.gallery)


@dataclass
class Register(Place):
    gallery: str = ""
    postgres: Any = None
    connection: Any = None

    @classmethod
    def new(cls, config: bd.Config, postgres: Any, name: str, store: Path) -> Register:
        cluster = bd.ClusterConfig(segments=f"file://{store}", poll_ms=600_000, stale_ms_max=600_000)
        return cls(replace(config, cluster=cluster), postgres.url(name), postgres)

    @property
    def schema(self) -> str:
        return "biodedup_" + self.gallery.rpartition("=")[2]

    @contextmanager
    def catalogue(self) -> Iterator[CatalogueTables]:
        assert self.config.cluster is not None
        with closing(connect(self.gallery, self.config.cluster)) as catalogue:
            catalogue.open("", "", create=False)
            catalogue.take_key(chain_key_of(LocalStorage(self.config.keys), catalogue.key_file))
            catalogue.begin_reading()
            yield catalogue
            catalogue.rollback()

    def run(self, statement: str, values: Any = ()) -> list[tuple[Any, ...]]:
        if self.connection is None:
            self.connection = self.postgres.connect()
            self.connection.execute(f'SET search_path TO "{self.schema}"')
        cursor = self.connection.execute(statement.replace("?", "%s"), values)
        return cursor.fetchall() if cursor.description else []

    def insert(self, table: str, row: Any) -> None:
        names = ", ".join([f'"{name}"' for name, _ in table_columns(table)] + ["checksum", commit_column(table)])
        commit = self.run("SELECT max(commits) FROM commit_log")[0][0]
        self.run(
            f"INSERT INTO {table} ({names}) VALUES ({','.join('?' * (len(row) + 2))})",
            (*row, row_checksum(row), commit),
        )

    def kept(self) -> Any:
        found = self.run("SELECT table_name FROM information_schema.tables WHERE table_schema = ?", (self.schema,))
        return {table: self.run(f'SELECT * FROM "{table}"') for (table,) in found}

    def put_back(self, kept: Any) -> None:
        for table, rows in kept.items():
            self.run(f'DELETE FROM "{table}"')
            for row in rows:
                self.run(f'INSERT INTO "{table}" VALUES ({",".join("?" * len(row))})', row)
