"""Verifies the hash chain of a gallery: its links, the present rows, the audit log, and a checkpoint that was kept outside.

Owns the list of problems. Never changes the chain, and never verifies the signature of a checkpoint. `cluster/log.py` does the same for a
register in PostgreSQL.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from biodedup.common.described import Described
from biodedup.errors import CallerError, GalleryDamaged, StorageUnavailable
from biodedup.gallery.care.verify import connected, read_manifest
from biodedup.gallery.catalogue.approvals import wrong_signatures
from biodedup.gallery.catalogue.chain import (
    BEGUN,
    CHAINED,
    NO_LINK,
    ChainHash,
    Digest,
    Link,
    Sum,
    is_chained,
    is_listed,
    pack_row,
)
from biodedup.gallery.catalogue.readings import Readings
from biodedup.gallery.catalogue.sqlite import CatalogueTables
from biodedup.gallery.files.filesystem import MALFORMED, Storage

_NAMED_MAX = 20  # the number of problems that are named for each table


@dataclass(frozen=True)
class Mark:
    """A position in the hash chain of a gallery, as a checkpoint stores it. number, commits, value (hexadecimal): of the link."""

    gallery_id: str
    number: int
    commits: int
    value: str


@dataclass(frozen=True)
class LogReport(Described):
    """The result of a verification. keyed: whether the newest link was made with a key; first_commit, commit: of the oldest and the newest
    link; links, rows, files, calls: numbers of verified items (calls: records of the audit log); notes: what could not be verified, and
    links that computed the digests again; mark: the newest link."""

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
    calls: int = 0


def verify_chain(
    storage: Storage,
    folder: Path,
    mark: Mark | None = None,
    public_keys: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> LogReport:
    """Computes every link and the digest of every table again, and compares the digests of all segment files with the manifest. mark: from
    a checkpoint; public_keys: name of a principal -> the public keys, for the signatures of approvals. Raises NotAGallery, KeyMismatch,
    StorageUnavailable."""
    try:
        with connected(storage, folder) as catalogue:
            manifest = read_manifest(storage, folder, catalogue)
            for file in manifest.files.values():
                file.close()
            catalogue.begin_reading()
            try:
                files = [str(problem) for problem in manifest.problems]
                report = check_log(catalogue, files, len(manifest.files), mark, public_keys)
            finally:
                catalogue.rollback()
            return _with_readings(report, Readings(storage, folder, catalogue.readers_taken, read_only=True))
    except (GalleryDamaged, *MALFORMED) as error:
        return unreadable(error)


def _with_readings(report: LogReport, readings: Readings) -> LogReport:
    """What is wrong with the calls of readers that no writer has taken into the audit log yet."""
    try:
        with closing(readings):
            waiting = readings.waiting()
    except (GalleryDamaged, StorageUnavailable) as error:
        return replace(report, problems=(*report.problems, f"calls of readers cannot be read: {error}"))
    if waiting is None:
        return report
    note = f"{len(waiting.records)} calls of readers are not in the audit log yet; the next writer takes them in"
    found = [f"calls of readers: {waiting.problem}"] if waiting.problem else []
    return replace(report, problems=(*report.problems, *found), notes=(*report.notes, note))


def check_log(
    catalogue: CatalogueTables,
    problems: Sequence[str],
    files: int,
    mark: Mark | None,
    public_keys: Mapping[str, Collection[str]],
) -> LogReport:
    """Of a database alone, inside the caller's transaction. problems: of the segment files; files: how many there are."""
    return _Check(catalogue, catalogue.meta()["gallery_id"], mark, public_keys).report(problems, files)


def unreadable(error: Exception) -> LogReport:
    """Of a gallery that cannot be read. Raises the error where it is the caller's, or a lack of memory."""
    if isinstance(error, CallerError | MemoryError):
        raise error
    return LogReport(
        gallery_id="",
        keyed=False,
        first_commit=0,
        commit=0,
        links=0,
        rows=0,
        files=0,
        problems=(f"the gallery cannot be read: {error}",),
        notes=(),
        mark=None,
    )


class _Check:
    """One verification. It collects problems and notes."""

    def __init__(
        self,
        catalogue: CatalogueTables,
        gallery_id: str,
        mark: Mark | None,
        public_keys: Mapping[str, Collection[str]],
    ) -> None:
        self._public_keys = public_keys
        self._catalogue, self._gallery_id, self._mark = catalogue, gallery_id, mark
        self._hash = catalogue.chain.hash
        self._at_mark: Link | None = None
        self._begun = 0  # the number of the newest link that computed the digests from all rows
        self._commit_of: dict[int, int] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []

    def report(self, problems: Sequence[str], files: int) -> LogReport:
        self.problems += [*self._catalogue.database_problems(), *problems]
        first = last = None
        links = rows = 0
        for link in self._catalogue.links() if self._catalogue.chain.exists() else ():
            first = first or link
            self._follow(link, last)
            last, links = link, links + 1
        if first is None or last is None:
            self.problems.append("the gallery has no hash chain yet; the next writer starts it")
            return LogReport(
                gallery_id=self._gallery_id,
                keyed=False,
                first_commit=0,
                commit=0,
                links=0,
                rows=0,
                files=files,
                problems=tuple(self.problems),
                notes=(),
                mark=None,
            )
        if first.commits > 0:
            self.notes.append(f"the chain begins at commit {first.commits}; earlier commits are not covered")
        rows = self._compare(last)
        calls = self._audited()
        self._check_approvals()
        if self._mark is not None:
            self._compare_mark(self._mark, last)
        mark = Mark(self._gallery_id, last.number, last.commits, last.value.hex())
        counts = (bool(last.key_id), first.commits, last.commits, links, rows, files)
        return LogReport(self._gallery_id, *counts, tuple(self.problems), tuple(self.notes), mark, calls)

    def _audited(self) -> int:
        """Verifies the audit log. Returns the number of records."""
        try:
            check = self._catalogue.audit_check()
        except GalleryDamaged as error:
            self.problems.append(str(error))
            return 0
        self.problems += check.problems
        self.notes += check.notes
        return check.records

    def _check_approvals(self) -> None:
        """Verifies the signatures of requests and approvals."""
        try:
            approvals, signatures = self._catalogue.approvals(), self._catalogue.approval_signatures()
        except GalleryDamaged as error:
            self.problems.append(str(error))
            return
        about = (self._gallery_id, approvals, signatures, self._hash, self._public_keys)
        for wrong, text in wrong_signatures(*about):
            (self.problems if wrong else self.notes).append(text)

    def _follow(self, link: Link, before: Link | None) -> None:
        """Verifies a link and its connection to the previous link."""
        name = f"link {link.number} (commit {link.commits})"
        number, previous = (0, NO_LINK) if before is None else (before.number, before.value)
        if link.number != number + 1:
            self.problems.append(
                f"links {number + 1} to {link.number - 1} of the chain are missing: commits were deleted"
            )
        elif link.key_id not in ("", self._hash.key_id):
            self.notes.append(f"{name} was made with key {link.key_id}, which is not available: it was not verified")
        elif self._hash_of(link).completed(link, previous) != link:
            self.problems.append(
                f"{name} does not follow the link before: it was changed, or restored from an older copy"
            )
        if before is not None and not link.reason and link.commits <= before.commits:
            self.problems.append(f"{name} repeats an earlier commit: the counters were restored from an older copy")
        if link.reason:
            self._begun = link.number
            if link.reason != BEGUN:
                self.notes.append(f"{name} computed the digests from all rows: {link.reason}")
        self._commit_of[link.number] = link.commits
        if self._mark is not None and link.number == self._mark.number:
            self._at_mark = link

    def _hash_of(self, link: Link) -> ChainHash:
        return self._hash if link.key_id else ChainHash(None)

    def _compare(self, last: Link) -> int:
        """Compares the present rows with the newest link. Returns the number of rows."""
        if last.key_id != self._hash.key_id:
            self.notes.append("the newest link was made with another key: rows are not verified until the next commit")
            return 0
        stored, rows = self._catalogue.digests(), 0
        if self._hash.content(stored) != last.content:
            self.problems.append(
                "table digest: its rows disagree with the newest link; they were forged, or restored from an older copy"
            )
        if json.loads(last.state) != list(vars(self._catalogue.state()).values()):
            self.problems.append(
                "the counters disagree with the newest link: they, or the chain, were restored from an older copy"
            )
        for table in CHAINED:
            wanted = stored.get(table, Digest())
            try:
                present = self._present(table)
            except GalleryDamaged as error:
                self.problems.append(str(error))
                continue
            rows += present.rows
            if present != wanted:
                self.problems += self._named(table, present, wanted)
        return rows

    def _present(self, table: str) -> Digest:
        rows = Sum(self._hash, table)
        for row in self._catalogue.rows_of(table):
            if is_chained(table, row):
                rows.add(pack_row(row))
        return rows.digest

    def _named(self, table: str, present: Digest, wanted: Digest) -> list[str]:
        """The differing rows of a table, as far as the lists of changed rows identify them."""
        left: dict[bytes, list[int]] = {}  # first bytes of a row's hash -> the links that inserted it
        for change in self._catalogue.row_changes():
            if change.table == table and change.link >= self._begun:
                if change.put:
                    left.setdefault(change.start, []).append(change.link)
                elif left.get(change.start):
                    left[change.start].pop()
        lines = []
        for row in self._catalogue.rows_of(table):
            if is_chained(table, row):
                _, (start,) = self._hash.rows(table, [pack_row(row)])
                if left.get(start):
                    left[start].pop()
                elif is_listed(table, row):
                    lines.append(f"table {table}: no commit wrote the row {row[0]!r} in this form")
        links = sorted(link for several in left.values() for link in several)
        lines += [f"table {table}: a row of commit {self._commit_of.get(n, '?')} is missing or changed" for n in links]
        if len(lines) > _NAMED_MAX:
            lines = [*lines[:_NAMED_MAX], f"table {table}: {len(lines) - _NAMED_MAX} more problems"]
        counts = f"table {table}: its {present.rows} rows differ from the {wanted.rows} rows of the last commit"
        return [f"{counts}: rows were changed, forged, deleted or restored from an older copy", *lines]

    def _compare_mark(self, mark: Mark, last: Link) -> None:
        """Compares the chain with a checkpoint."""
        if mark.gallery_id != self._gallery_id:
            text = f"the checkpoint belongs to gallery {mark.gallery_id}, got gallery {self._gallery_id}"
        elif mark.number > last.number:
            text = f"rollback: the checkpoint is of commit {mark.commits}, the newest commit here is {last.commits}"
        elif self._at_mark is None or (self._at_mark.value.hex(), self._at_mark.commits) != (mark.value, mark.commits):
            text = f"fork: commit {mark.commits} differs from the checkpoint's; this gallery has another history"
        else:
            return
        self.problems.append(text)
