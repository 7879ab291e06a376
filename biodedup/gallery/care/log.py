"""Verifies the hash chain of a gallery: its links, the rows that they wrote, and a checkpoint that was kept outside.

Owns the list of what is wrong. Never changes the chain, and never checks a signature.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from biodedup.common.described import Described
from biodedup.errors import GalleryDamaged
from biodedup.gallery.care.verify import connected, read_manifest
from biodedup.gallery.catalogue.chain import (
    BEGUN,
    CHAINED,
    NO_LINK,
    Digest,
    Link,
    changes_in,
    is_chained,
    pack_row,
)
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue
from biodedup.gallery.files.filesystem import ODD_CONTENT, Storage

_NAMED_MAX = 20  # problems of one table that are named


@dataclass(frozen=True)
class Mark:
    """A place in the chain of a gallery, as a checkpoint keeps it. value: hexadecimal."""

    gallery_id: str
    number: int
    commits: int
    value: str


@dataclass(frozen=True)
class LogReport(Described):
    """keyed: whether the newest link is of a key; first_commit, commit: of the oldest and the newest link; links, rows, files: how many were
    checked; problems: what is wrong; notes: what could not be checked, and where digests were taken anew. mark: the newest link."""

    gallery_id: str
    keyed: bool
    first_commit: int
    commit: int
    links: int
    rows: int
    files: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    mark: Mark | None


def verify_chain(storage: Storage, folder: Path, mark: Mark | None = None) -> LogReport:
    """Recomputes every link and the digest of every table, and compares the heads of all segment files with the manifest. Raises NotAGallery,
    KeyMismatch, StorageUnavailable."""
    with connected(storage, folder) as catalogue:
        gallery_id = ""
        try:
            gallery_id = catalogue.meta()["gallery_id"]
            manifest = read_manifest(storage, folder, catalogue)
            files = [str(problem) for problem in manifest.problems]
            checked = len(manifest.files)
            for file in manifest.files.values():
                file.close()
            catalogue.begin_reading()
            try:
                return _Check(catalogue, gallery_id, mark).report(files, checked)
            finally:
                catalogue.rollback()
        except (GalleryDamaged, *ODD_CONTENT) as error:
            return LogReport(gallery_id, False, 0, 0, 0, 0, 0, (f"{type(error).__name__}: {error}",), (), None)


class _Check:
    def __init__(self, catalogue: SqliteCatalogue, gallery_id: str, mark: Mark | None) -> None:
        self._catalogue, self._gallery_id, self._mark = catalogue, gallery_id, mark
        self._hash = catalogue.chain_hash
        self._live: dict[str, Counter[bytes]] = {}
        self._commit_of: dict[tuple[str, bytes], int] = {}
        self._at_mark: Link | None = None
        self.problems: list[str] = []
        self.notes: list[str] = []

    def report(self, problems: Sequence[str], files: int) -> LogReport:
        self.problems += problems
        first = last = None
        links = rows = 0
        for link in self._catalogue.links() if self._catalogue.has_chain() else ():
            first = first or link
            self._follow(link, last)
            last, links = link, links + 1
        if first is None or last is None:
            self.problems.append("the gallery has no hash chain yet; its next writer begins it")
            return LogReport(self._gallery_id, False, 0, 0, 0, 0, files, tuple(self.problems), (), None)
        if first.commits > 0:
            self.notes.append(f"the chain is checked from commit {first.commits} on; commits before are not in it")
        rows = self._compare(last)
        if self._mark is not None:
            self._meet(self._mark, first, last)
        mark = Mark(self._gallery_id, last.number, last.commits, last.value.hex())
        counts = (bool(last.key_id), first.commits, last.commits, links, rows, files)
        return LogReport(self._gallery_id, *counts, tuple(self.problems), tuple(self.notes), mark)

    def _follow(self, link: Link, before: Link | None) -> None:
        """One link, behind the one before it."""
        name = f"link {link.number} (commit {link.commits})"
        if before is not None and (link.number != before.number + 1 or link.previous != before.value):
            self.problems.append(f"{name} does not follow link {before.number}: a commit was dropped or forged")
        if before is None and (link.number != 1 or link.previous != NO_LINK):
            self.notes.append(f"the links before link {link.number} are pruned; a checkpoint proves it")
        if before is not None and not link.reason and link.commits <= before.commits:
            self.problems.append(f"{name} repeats an earlier commit: the counters were put back")
        if link.key_id not in ("", self._hash.key_id):
            self.notes.append(f"{name} is of key {link.key_id}, which is not at hand: its value was not computed")
        elif link.key_id == self._hash.key_id and self._hash.completed(link) != link:
            self.problems.append(f"{name} was changed: its value is not that of its content")
        if link.reason:
            if link.reason != BEGUN:
                self.notes.append(f"{name} took the digests anew: {link.reason}")
            self._live, self._commit_of = {}, {}
        for table, short, put in changes_in(link.changes):
            live = self._live.setdefault(table, Counter())
            live[short] += 1 if put else -1
            if put:
                self._commit_of[table, short] = link.commits
            elif live[short] < 0:
                self.problems.append(f"table {table}: {name} dropped a row that no commit wrote: it was forged")
            if not live[short]:
                del live[short]
        if self._mark is not None and link.number == self._mark.number:
            self._at_mark = link

    def _compare(self, last: Link) -> int:
        """The present rows with what the links say. Returns how many there are."""
        if last.key_id != self._hash.key_id:
            self.notes.append("the newest link is of another key: rows are not checked until the next commit")
            return 0
        stored, rows = self._catalogue.digests(), 0
        if self._hash.content(stored) != last.content:
            self.problems.append("table digest: its rows are not those of the newest link; they were put back or forged")
        if json.loads(last.state) != vars(self._catalogue.state()):
            self.problems.append("the counters are not those of the newest link: they, or the chain, were put back")
        for table in CHAINED:
            found, forged, lost = self._compare_table(table)
            rows += found.rows
            lines = [f"table {table}: the row {key!r} is not as a commit wrote it" for key in forged]
            lines += [f"table {table}: a row that commit {commit} wrote is lost or changed" for commit in lost]
            if found != stored.get(table, Digest()) and not lines:
                lines = [f"table {table}: its rows are not those that the commits left"]
            self.problems += lines[:_NAMED_MAX]
            if len(lines) > _NAMED_MAX:
                self.problems.append(f"table {table}: {len(lines) - _NAMED_MAX} more")
        return rows

    def _compare_table(self, table: str) -> tuple[Digest, list[object], list[int]]:
        """(digest of the rows, keys of rows that no link put, commits whose rows are not there)."""
        found, left, forged = Digest(), Counter(self._live.get(table, ())), []
        for row in self._catalogue.rows_of(table):
            if is_chained(table, row):
                value = self._hash.row(table, pack_row(row))
                found = found.plus(1, int.from_bytes(value, "big"))
                if left[value[:8]] > 0:
                    left[value[:8]] -= 1
                else:
                    forged.append(row[0])
        return found, forged, [self._commit_of[table, short] for short in left.elements()]

    def _meet(self, mark: Mark, first: Link, last: Link) -> None:
        if mark.gallery_id != self._gallery_id:
            text = f"the checkpoint is of gallery {mark.gallery_id}, this is {self._gallery_id}"
        elif mark.number > last.number:
            text = f"rollback: the checkpoint knows commit {mark.commits}, the newest here is commit {last.commits}"
        elif mark.number < first.number:
            text = f"the checkpoint is of commit {mark.commits}; older links than of commit {first.commits} are not here: use a newer one"
        elif self._at_mark is None or (self._at_mark.value.hex(), self._at_mark.commits) != (mark.value, mark.commits):
            text = f"fork: commit {mark.commits} is not the one that the checkpoint knows; this gallery has another history"
        else:
            return
        self.problems.append(text)
