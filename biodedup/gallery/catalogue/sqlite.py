"""The database of a gallery: the manifest, which lists the valid segments, and the journal, which holds the rows that are not in a segment
yet.

Owns the tables, the checksums of their rows, and the SQL for SQLite. Never decides, never searches, never caches. Callers hold the
gallery's lock. `CatalogueTables` defines the meaning of the rows for any database; `SqliteCatalogue` holds all statements that are specific
to SQLite.

| table | a row is |
|---|---|
| meta | one setting of the gallery: id, config, state (the counters, see `State`) |
| model | one column's model_id and dimension, fixed by its first template |
| group_set | one combination of groups that at least one row belongs to |
| segment | one sealed segment: its range of rows, its files and their digests |
| tombstone | one removed row that a segment or the journal still stores |
| subject | journal: one row |
| cell | journal: one template: row and column |
| encounter | journal: one acknowledged write: the digest of the request, and the answer |
| pending | one row that belongs to an open case, and the encounter of that case |
| held | templates of an open case, in galleries of formats 1 to 3; a writer makes a pending row of them |
| review_case | an encounter that went to review: the request, and the present decision if it has changed |
| verdict | the ruling of a person on a case and one of its candidates; never deleted |
| judged | one pair of rows that belong to two people, by a verdict |
| link | one open case, and another open case that is its candidate |
| job_step | one step that a job has completed: its name and its result; never deleted |
| policy | one version of the policy: its content, who stored it, when, why; never deleted |
| budget | the calls of a caller, or about a subject, that still count towards a limit (engine/callers/budgets.py) |
| alarm | one lock-out of a caller; never deleted |
| approval | one call that needs two people: its digest, who requested it, who approved it; never deleted |
| approval_signature | the signature of a request or of an approval (approvals.py) |
| card | one model card that was used: digests of the card and of its weights (engine/callers/binding.py) |
| audit | one call, with the hash that chains it to the previous call (audit.py) |
| audit_span | many old calls, packed; never deleted, but its content may move to an archive file |
| index_codec | one trained FAISS codec of a column: its factory string, its properties, the empty index |
| chain | one link of the hash chain over the commits (chain.py) |
| digest | the digest of the present rows of one table |
| row_change | the rows that a commit inserted and deleted, by the first bytes of their hashes; journal rows until they are sealed |

Every row ends with a checksum of its values, since SQLite has no checksums. A row with a wrong checksum raises GalleryDamaged.
"""

from __future__ import annotations

import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from biodedup.common import quality as quality_scale
from biodedup.errors import GalleryDamaged
from biodedup.gallery.answers import StoredDecision
from biodedup.gallery.catalogue.approvals import SIGNATURE_COLUMNS, signature_row
from biodedup.gallery.catalogue.audit import (
    AUDIT_COLUMNS,
    SPAN_ROWS,
    UNPACKED_MAX,
    AuditCheck,
    AuditHead,
    AuditRecord,
    AuditSpan,
    chained,
    pack_records,
)
from biodedup.gallery.catalogue.chain import (
    AUDIT_HEAD,
    BEGUN,
    CHAIN_COLUMNS,
    COVERED,
    JOURNAL,
    NO_LINK,
    ChainHash,
    Digest,
    Link,
    RowChange,
    Sum,
    changes_in,
    is_chained,
    pack_row,
)
from biodedup.gallery.catalogue.chain_writer import ChainWriter
from biodedup.gallery.catalogue.readings import TAKEN, Place
from biodedup.gallery.files.encryption.transform import Transform, transform_id_of
from biodedup.gallery.files.index_codec import FaissCodec
from biodedup.gallery.index_settings import IndexSettings, asked_in, read_settings
from biodedup.gallery.policies import PolicyVersion, from_settings, from_text, to_text
from biodedup.gallery.segments.layout import SegmentEntry
from biodedup.texts import KnownId
from biodedup.values import COLUMNS, Float32, Template, Verdict

APPLICATION_ID = 0x62696F64  # "biod": `file` shows it
FORMAT_VERSION = 5
READABLE = (2, 3, 4, 5)
"""Formats that this release reads directly. 2 to 4: segments store vectors in an older form, until they are merged. 3: a subject has one
row, and the templates of open cases are in `held`. A writer upgrades the tables; older releases cannot open the gallery afterwards."""

COLUMNS_OF = {
    "meta": "key TEXT PRIMARY KEY, value TEXT",
    "model": "column_index INTEGER PRIMARY KEY, model_id TEXT, dimension INTEGER",
    "group_set": "number INTEGER PRIMARY KEY, names TEXT",
    "segment": "number INTEGER PRIMARY KEY, first_row INTEGER, end_row INTEGER, files TEXT",
    "tombstone": "row INTEGER PRIMARY KEY, version INTEGER",
    "subject": "row INTEGER PRIMARY KEY, subject_id TEXT, encounter_id TEXT, group_set INTEGER",
    "cell": "key INTEGER PRIMARY KEY, vector BLOB, minutiae BLOB, quality REAL",
    "encounter": "encounter_id TEXT PRIMARY KEY, digest BLOB, outcome TEXT, answer TEXT",
    "held": "key TEXT PRIMARY KEY, model_id TEXT, vector BLOB, minutiae BLOB, quality REAL",
    "review_case": "encounter_id TEXT PRIMARY KEY, request TEXT, decision TEXT",
    "verdict": "number INTEGER PRIMARY KEY, encounter_id TEXT, subject_id TEXT, candidate TEXT, ruling TEXT, judged_by TEXT, "
    "judged_at REAL, note TEXT",
    "pending": "row INTEGER PRIMARY KEY, encounter_id TEXT",
    "judged": "number INTEGER PRIMARY KEY, row INTEGER, other INTEGER",
    "link": "number INTEGER PRIMARY KEY, encounter_id TEXT, other TEXT",
    "job_step": "name TEXT PRIMARY KEY, facts TEXT",
    "policy": "version INTEGER PRIMARY KEY, policy TEXT, set_by TEXT, set_at REAL, reason TEXT",
    "index_codec": "key TEXT PRIMARY KEY, spec TEXT, card TEXT, trained BLOB",
    "budget": "key TEXT PRIMARY KEY, until REAL, climbs INTEGER",
    "alarm": "number INTEGER PRIMARY KEY, kind TEXT, caller TEXT, subject_id TEXT, raised_at REAL",
    "approval": "number INTEGER PRIMARY KEY, action TEXT, digest BLOB, facts TEXT, requested_by TEXT, requested_at REAL, "
    "approved_by TEXT, approved_at REAL",
    "card": "number INTEGER PRIMARY KEY, model_id TEXT, digest TEXT, weights TEXT, bound_at REAL",
    **AUDIT_COLUMNS,
    **SIGNATURE_COLUMNS,
}
_EVERY = COLUMNS_OF | CHAIN_COLUMNS
ADDED = {
    "review_case": "cases",
    "verdict": "cases",
    "pending": "encounters",
    "judged": "encounters",
    "link": "encounters",
    "policy": "policies",
    "job_step": "job_steps",
    "index_codec": "index_codecs",
    "chain": "chain",
    "digest": "chain",
    "row_change": "chain",
    "budget": "budgets",
    "alarm": "access",
    "approval": "access",
    "audit": "audit",
    "audit_span": "audit",
    "approval_signature": "signatures",
    "card": "cards",
}
"""Table that older releases did not have -> the row of `meta` which says that the table exists. A writer creates missing tables when it
opens."""

ADDED_SETTINGS = frozenset(ADDED.values())
_RENEWED = ADDED_SETTINGS - {"encounters"}
"""Settings that `SqliteCatalogue.renew` sets. `Transaction.adopt_cases` sets `encounters`."""

INDEXED = {"verdict": ("encounter_id",), "link": ("encounter_id", "other")}

REPLACED = ("meta", "review_case", "encounter", "budget", "approval", "digest", "audit_span")
"""Tables in which `put` replaces a row with the same key. In `encounter`: an encounter that was refused may be sent again."""

STRIDE = (
    32  # cell key = row * STRIDE + column index: with an integer key the cells of a row are neighbours in the B-tree
)


@dataclass(frozen=True)
class ColumnModel:
    """The model of a column's templates. dimension: of the embeddings, None if the column holds only minutiae."""

    model_id: str
    dimension: int | None


@dataclass(frozen=True)
class State:
    """The counters of a gallery. version: of the content, which search results state; commits: the number of transactions, including
    sealing and merging; row_count: row numbers that were ever assigned; next_segment: the number of the next segment; extra_rows: live rows
    beyond the first row of their subject. All but extra_rows only grow. commit_id: a random id of the last commit, which distinguishes it
    from another writer's commit with the same number."""

    version: int = 0
    commits: int = 0
    row_count: int = 0
    next_segment: int = 1
    extra_rows: int = 0
    commit_id: str = ""


@dataclass(frozen=True)
class JournalCell:
    """One template of the journal. vector: float32 bytes, or None; quality: on the scale of files (`common.quality`)."""

    row: int
    column: str
    vector: bytes | None
    minutiae: bytes | None
    quality: float | None


class CatalogueTables(ABC):
    """The meaning of the rows of a gallery's tables, for any database. Subclasses execute the statements. Each commit adds a link
    to the hash chain (chain.py)."""

    tables: Mapping[str, str] = COLUMNS_OF | CHAIN_COLUMNS
    chain: ChainWriter
    transforms: Callable[[str], Transform] | None = None
    """transform_id -> the secret transform of stored embeddings; None without a key."""

    # the gallery itself -----------------------------------------------------------------------------------------

    def create(self, gallery_id: str, config: str) -> None:
        """Creates the tables of a new gallery and their first rows, inside the caller's transaction."""
        self.lay_tables(gallery_id, config)
        self.add_policy(PolicyVersion(1, from_settings(config)))
        self.set_index(asked_in(config))
        self.set_state(State())

    def meta(self) -> dict[str, str]:
        return {key: value for key, value, *_ in self._all("meta")}

    def state(self) -> State:
        for _, text in self._all("meta", None, "key = ?", ("state",)):
            try:
                state = State(**json.loads(text))
            except (TypeError, ValueError, RecursionError):
                break
            values = [(getattr(state, name), default) for name, default in vars(State()).items()]
            if all(_is_counter(value, default) for value, default in values):
                return state
        raise GalleryDamaged("the counters are lost; `biodedup doctor --repair` computes them from the rows")

    def set_state(self, state: State) -> None:
        self.put("meta", [("state", json.dumps(vars(state)))])
        self.chain.state = state

    def policies(self) -> list[PolicyVersion]:
        """All versions of the policy, the version in force last. In a gallery without the table, its settings hold the only version."""
        rows = list(self._all("policy", "version"))
        if not rows and ADDED["policy"] not in self.meta():
            return [PolicyVersion(1, from_settings(self.meta()["config"]))]
        if [version for version, *_ in rows] != list(range(1, len(rows) + 1)) or not rows:
            raise GalleryDamaged("table policy lacks versions; run `biodedup doctor`")
        return [PolicyVersion(n, from_text(text, f"policy version {n}"), by, at, why) for n, text, by, at, why in rows]

    def add_policy(self, policy: PolicyVersion) -> None:
        at = None if policy.at is None else float(policy.at)
        self.put("policy", [(policy.version, to_text(policy.policy), policy.by, at, policy.reason)])

    def models(self) -> dict[str, ColumnModel]:
        known = list(self._all("model"))
        if not all(0 <= index < len(COLUMNS) and (size is None or 0 < size <= 1 << 16) for index, _, size in known):
            raise GalleryDamaged("a row of table model names no valid column; run `biodedup doctor`")
        return {COLUMNS[index]: ColumnModel(model_id, dimension) for index, model_id, dimension in known}

    def transform(self) -> Transform | None:
        """The transform of the journal's embeddings and of new segments; older segments name their own. Raises GalleryDamaged."""
        if self.transforms is None:
            return None
        transform_id = next((value for _, value, *_ in self._all("meta", None, "key = ?", ("turn",))), "")
        return self.transforms(transform_id) if transform_id else None

    def has_subject_keys(self) -> bool:
        """Whether minutiae are sealed by keys of subjects (files/encryption/subject_keys.py)."""
        return "subject_keys" in self.meta()

    def set_subject_keys(self) -> None:
        self.put("meta", [("subject_keys", "1")])

    def transform_ids(self) -> set[str]:
        """The transforms that the journal and the index codecs use."""
        cards = (json.loads(card) for _, _, card, *_ in self._all("index_codec"))
        return {self.meta().get("turn", ""), *(card.get("turn", "") for card in cards)} - {""}

    def set_transform(self, transform_id: str) -> None:
        """Sets the transform for new embeddings; "" for none. The journal must be empty."""
        self.put("meta", [("turn", transform_id)])

    def add_model(self, column: str, model: ColumnModel) -> None:
        self.put("model", [(COLUMNS.index(column), model.model_id, model.dimension)])

    def group_sets(self) -> dict[int, frozenset[str]]:
        sets = {number: frozenset(json.loads(names)) for number, names in self._all("group_set")}
        if sorted(sets) != list(range(1, len(sets) + 1)) or not all(
            type(n) is str for some in sets.values() for n in some
        ):
            raise GalleryDamaged("a row of table group_set is invalid; run `biodedup doctor`")
        return sets

    def add_group_set(self, number: int, names: Iterable[str]) -> None:
        self.put("group_set", [(number, json.dumps(sorted(names)))])

    def compared_with_chain(self) -> AbstractContextManager[None]:
        """Inside the context, compares each table that is read completely with the hash chain. Raises GalleryDamaged."""
        return self.chain.comparing()

    def problems(self) -> list[str]:
        """Problems that the database's own check, the checksums of all rows and the rules of the journal show."""
        problems = self.database_problems()
        for table in self.tables:
            problems += self._table_problems(table)
        if problems:
            return problems
        rows = {row for row, *_ in self._all("subject")}
        removed = {row for row, _ in self._all("tombstone")}
        with_cells = {key // STRIDE for key, *_ in self._all("cell")}
        if orphans := len(with_cells - rows):
            problems.append(f"the journal holds templates of {orphans} rows without a subject")
        if bare := len(rows - with_cells - removed):
            problems.append(f"{bare} enrolled subjects of the journal have no template")
        return problems + self.audit_check().problems

    def has_encounters(self) -> bool:
        """Whether open cases have rows, and verdicts name rows. False in galleries of formats 1 to 3 until `Transaction.adopt_cases`."""
        return "encounters" in self.meta()

    def set_encounters(self) -> None:
        self.put("meta", [("encounters", "1")])

    # index engines ----------------------------------------------------------------------------------------------

    def index_settings(self) -> IndexSettings:
        """The configured index engine of each column, and the trained codecs. Raises GalleryDamaged."""
        rows = list(self._all("index_codec", "key"))
        codecs = [(key.partition("/")[0], spec, card, trained) for key, spec, card, trained in rows]
        return read_settings(self.meta().get("index"), codecs, self.transforms, transform_id_of(self.transform()))

    def set_index(self, settings: IndexSettings) -> None:
        """Stores the configured engines. The codecs are stored by `add_codec`."""
        self.put("meta", [("index", settings.to_json())])

    def add_codec(self, column: str, codec: FaissCodec) -> None:
        row = (f"{column}/{codec.codec_id}", str(codec.spec), json.dumps(codec.card()), codec.trained)
        self.put("index_codec", [row])

    def drop_codec(self, column: str, codec_id: str) -> None:
        self._delete("index_codec WHERE key = ?", [(f"{column}/{codec_id}",)])

    # the manifest -----------------------------------------------------------------------------------------------

    def segments(self) -> list[SegmentEntry]:
        """The segments, in the order of their rows. A segment without rows holds only answers; its first_row and end_row are equal."""
        entries = [SegmentEntry(n, first, end, json.loads(files)) for n, first, end, files in self._all("segment")]
        return sorted(entries, key=lambda entry: (entry.first_row, entry.end_row, entry.number))

    def add_segment(self, entry: SegmentEntry) -> None:
        values = (entry.number, entry.first_row, entry.end_row, json.dumps(dict(entry.files)))
        self.put("segment", [values])

    def drop_segments(self, numbers: Iterable[int]) -> None:
        self._delete("segment WHERE number = ?", ((number,) for number in numbers))

    def tombstones(self) -> list[int]:
        return sorted(row for row, _ in self._all("tombstone"))

    def removal_versions(self) -> list[int]:
        """The version of the content that each recorded removal made."""
        return [version for _, version in self._all("tombstone")]

    def add_tombstone(self, row: int, version: int) -> None:
        """Records that a row is removed, and deletes its templates from the journal."""
        self.put("tombstone", [(row, version)])
        self._delete("cell WHERE key BETWEEN ? AND ?", [(row * STRIDE, row * STRIDE + STRIDE - 1)])

    def drop_tombstones(self, rows: Iterable[int]) -> None:
        self._delete("tombstone WHERE row = ?", ((row,) for row in rows))

    # the journal ------------------------------------------------------------------------------------------------

    def subjects(self) -> list[tuple[int, str, str, int]]:
        """(row, subject_id, encounter_id, group_set), by row."""
        return list(self._all("subject", "row"))

    def add_subjects(self, rows: Iterable[tuple[int, str, str, int]]) -> None:
        """rows: (row, subject_id, encounter_id, group_set)."""
        self.put("subject", rows)

    def cells(self) -> Iterator[JournalCell]:
        """The templates of the journal, ordered by row."""
        transform = self.transform()
        for key, vector, minutiae, quality in self._all("cell", "key"):
            column = COLUMNS[key % STRIDE]
            if transform is not None and vector and not len(vector) % 4:
                vector = _blob(transform.of(column).invert(np.frombuffer(vector, "<f4")[None]))
            yield JournalCell(key // STRIDE, column, vector, minutiae, quality)

    def add_cells(self, cells: Iterable[tuple[int, Template]]) -> None:
        """Inserts templates. cells: (row, template)."""
        self.put_cells(JournalCell(row, t.column, *_blobs(t)) for row, t in cells)

    def put_cells(self, cells: Iterable[JournalCell]) -> None:
        """Inserts templates in the form that `cells` returns."""
        transform = self.transform()

        def stored(cell: JournalCell) -> bytes | None:
            if transform is None or cell.vector is None:
                return cell.vector
            return _blob(transform.of(cell.column).apply(np.frombuffer(cell.vector, "<f4")[None]))

        self.put("cell", ((c.row * STRIDE + COLUMNS.index(c.column), stored(c), c.minutiae, c.quality) for c in cells))

    def answers(self) -> dict[str, StoredDecision]:
        """encounter_id -> the digest of the request, and the answer."""
        return {key: StoredDecision(digest, outcome, answer) for key, digest, outcome, answer in self._all("encounter")}

    def add_answer(self, encounter_id: str, answer: StoredDecision) -> None:
        self.put("encounter", [(encounter_id, answer.digest, answer.outcome, answer.text)])

    def job_steps(self) -> dict[str, str]:
        """Name of a step that a job has completed -> its result (JSON)."""
        return {name: facts for name, facts in self._all("job_step")}

    def add_job_step(self, name: str, facts: str) -> None:
        self.put("job_step", [(name, facts)])

    # callers ----------------------------------------------------------------------------------------------------

    def budget(self, key: str) -> tuple[float, int] | None:
        """(until, climbs) of a key, None if the table has no row. Their meaning: engine/callers/budgets.py."""
        for _, until, climbs in self._all("budget", None, "key = ?", (key,)):
            return until, climbs
        return None

    def put_budget(self, key: str, until: float, climbs: int) -> None:
        self.put("budget", [(key, float(until), climbs)])

    def forget_budgets(self, now: float) -> None:
        """Deletes the budgets that have expired. now: seconds since 1970."""
        self._delete("budget WHERE until <= ?", [(float(now),)])

    def drop_budget(self, key: str) -> None:
        self._delete("budget WHERE key = ?", [(key,)])

    def check_budgets(self) -> None:
        """Compares all of them with the hash chain, before this transaction changes any. Raises GalleryDamaged."""
        with self.compared_with_chain():
            for _ in self._all("budget"):
                pass

    def alarms(self) -> list[tuple[Any, ...]]:
        """(number, kind, caller, subject_id, raised_at), oldest first."""
        return list(self._all("alarm", "number"))

    def add_alarm(self, kind: str, caller: str, subject_id: str, raised_at: float) -> None:
        self.put("alarm", [(self._last_number("alarm") + 1, kind, caller, subject_id, float(raised_at))])

    def approvals(self) -> list[tuple[Any, ...]]:
        """The rows of table `approval`, oldest first."""
        return list(self._all("approval", "number"))

    def put_approval(self, number: int | None, row: Sequence[Any]) -> int:
        """Inserts or replaces a row. number: of the row that is replaced, None for a new row; row: without its number. Returns the
        number."""
        number = self._last_number("approval") + 1 if number is None else number
        self.put("approval", [(number, *row)])
        return number

    def cards(self) -> list[tuple[Any, ...]]:
        """(number, model_id, digest, weights, bound_at), oldest first."""
        return list(self._all("card", "number"))

    def add_card(self, row: Sequence[Any]) -> None:
        """Inserts a row of table `card`. row: without its number."""
        self.put("card", [(self._last_number("card") + 1, *row)])

    def approval_signatures(self) -> list[tuple[Any, ...]]:
        """The rows of table `approval_signature`, by approval."""
        return list(self._all("approval_signature", "number"))

    def put_approval_signature(self, row: Sequence[Any], method: str, key: str, signature: bytes) -> None:
        """Inserts a signature. row: of table `approval`, which the signature covers."""
        self.put("approval_signature", [signature_row(row, method, key, signature)])

    # the audit log ----------------------------------------------------------------------------------------------

    def audit_hash(self) -> ChainHash:
        """The hash that chains the records of the audit log."""
        return self.chain.hash

    def audit_check(self) -> AuditCheck:
        """Verifies every record. Raises GalleryDamaged."""
        check = AuditCheck(self.audit_hash())
        for span in self.audit_spans():
            check.span(span)
        check.rows(self.audit_rows(), self.audit_head())
        return check

    def audit_head(self) -> AuditHead:
        """The head of the audit log. Raises GalleryDamaged."""
        for _, text in self._all("meta", None, "key = ?", (AUDIT_HEAD,)):
            return AuditHead.from_json(text)
        return AuditHead()

    def audit_rows(self) -> Iterator[tuple[Any, ...]]:
        """The unpacked records, oldest first, each with its hash value."""
        return self._all("audit", "number")

    def audit_spans(self) -> Iterator[AuditSpan]:
        """Packed records, oldest first."""
        return (AuditSpan(*row) for row in self._all("audit_span", "number"))

    def put_audit_span(self, span: AuditSpan) -> None:
        self.put("audit_span", [span.values])

    def add_audit(self, records: Sequence[AuditRecord]) -> None:
        """Appends records and numbers them. Packs old records when there are many, or when the key has changed."""
        head, chain_hash = self.audit_head(), self.audit_hash()
        if head.number >= head.first and head.key_id != chain_hash.key_id:
            head = self._pack_audit(head, head.number)
        numbered = [replace(record, number=number) for number, record in enumerate(records, head.number + 1)]
        values = list(chained(chain_hash, head.value, numbered))
        self.put("audit", [(*record.values, value) for record, value in zip(numbered, values, strict=True)])
        head = AuditHead(head.first, numbered[-1].number, values[-1], chain_hash.key_id)
        if head.number - head.first >= UNPACKED_MAX:
            head = self._pack_audit(head, head.first + SPAN_ROWS - 1)
        self.put("meta", [(AUDIT_HEAD, head.to_json())])

    def _pack_audit(self, head: AuditHead, last: int) -> AuditHead:
        """Packs the records up to number `last`. If they are damaged it changes nothing, so that `log verify` can report them."""
        before = NO_LINK
        try:
            for span in self._all("audit_span", None, "last = ?", (head.first - 1,)):
                before = AuditSpan(*span).value
            rows = list(self._all("audit", "number", "number <= ?", (last,)))
        except GalleryDamaged:
            return head
        if [row[0] for row in rows] != list(range(head.first, last + 1)):
            return head
        self.put_audit_span(pack_records(rows, before, head.key_id))
        self._delete("audit WHERE number <= ?", [(last,)])
        return replace(head, first=last + 1)

    def readers_taken(self) -> Place:
        """Of the newest record of a reader that is in the audit log. Raises GalleryDamaged."""
        return Place.from_json(next((value for _, value in self._all("meta", None, "key = ?", (TAKEN,))), None))

    def put_readers_taken(self, place: Place) -> None:
        self.put("meta", [(TAKEN, place.to_json())])

    def put_held(self, rows: Iterable[tuple[str, int, str, bytes | None, bytes | None, float | None]]) -> None:
        """Inserts held templates. rows: (encounter_id, column index, model_id, vector, minutiae, quality)."""
        self.put("held", ((f"{encounter_id}/{COLUMNS[index]}", *rest) for encounter_id, index, *rest in rows))

    # cases ------------------------------------------------------------------------------------------------------

    def pending(self) -> dict[int, str]:
        """row -> the encounter of the open case that it belongs to."""
        return {row: encounter_id for row, encounter_id in self._all("pending", "row")}

    def add_pending(self, row: int, encounter_id: str) -> None:
        self.put("pending", [(row, encounter_id)])

    def drop_pending(self, row: int) -> None:
        self._delete("pending WHERE row = ?", [(row,)])

    def linked(self, encounter_id: str) -> set[str]:
        """The open cases that are candidates of this case, or have it as a candidate."""
        where = "encounter_id = ? OR other = ?"
        found = self._all("link", "number", where, (encounter_id, encounter_id))
        return {case for _, *pair in found for case in pair} - {encounter_id}

    def link(self, encounter_id: str, others: Iterable[str]) -> None:
        """Replaces the open cases that are candidates of a case."""
        self._delete("link WHERE encounter_id = ?", [(encounter_id,)])
        first = self._last_number("link") + 1
        self.put("link", ((number, encounter_id, other) for number, other in enumerate(others, first)))

    def unlink(self, encounter_id: str) -> None:
        """Deletes all links of a case, when it is closed."""
        self._delete("link WHERE encounter_id = ? OR other = ?", [(encounter_id, encounter_id)])

    def judged(self) -> dict[int, tuple[int, ...]]:
        """row -> the rows that verdicts assign to another person, in both directions."""
        return paired((row, other) for _, row, other in self._all("judged", "number"))

    def add_judged(self, pairs: Iterable[tuple[int, int]]) -> None:
        first = self._last_number("judged") + 1
        self.put("judged", ((number, row, other) for number, (row, other) in enumerate(pairs, first)))

    def held_cases(self) -> list[str]:
        """The encounters whose templates are in `held`, ordered by id."""
        return list(dict.fromkeys(key.rsplit("/", 1)[0] for key in self._keys("held")))

    def held(self, encounter_id: str) -> dict[str, Template]:
        """column -> the template in `held`."""
        templates = {}
        names = {f"{encounter_id}/{column}": column for column in COLUMNS}
        where = f"key IN ({','.join('?' * len(names))})"
        for key, model_id, vector, minutiae, quality in self._all("held", "key", where, tuple(names)):
            embedding = None if vector is None else np.frombuffer(vector, "<f4")
            templates[names[key]] = Template(
                names[key], model_id, embedding, minutiae, quality_scale.from_stored(names[key], quality)
            )
        return templates

    def drop_held(self, encounter_id: str) -> None:
        self._delete("held WHERE key = ?", ((f"{encounter_id}/{column}",) for column in COLUMNS))

    def case(self, encounter_id: str) -> tuple[str, str | None] | None:
        """(the request, the present decision or None if the answer's decision has not changed), JSON. None if the table has no such case:
        releases before 0.3.0 did not store cases."""
        for _, request, decision in self._all("review_case", None, "encounter_id = ?", (encounter_id,)):
            return request, decision
        return None

    def cases(self) -> Iterator[tuple[str, str | None]]:
        """(encounter_id, the present decision as in `case`) of every case in the table."""
        for encounter_id, _, decision in self._all("review_case"):
            yield encounter_id, decision

    def forget_cases(self, encounter_ids: Iterable[str]) -> None:
        """Deletes the requests, the present decisions and the verdicts of closed cases."""
        names = [(encounter_id,) for encounter_id in encounter_ids]
        self._delete("review_case WHERE encounter_id = ?", names)
        self._delete("verdict WHERE encounter_id = ?", names)

    def put_case(self, encounter_id: str, request: str, decision: str | None) -> None:
        self.put("review_case", [(encounter_id, request, decision)])

    def verdicts(self, encounter_id: str | None = None) -> Iterator[Verdict]:
        """The verdicts on one encounter, or all verdicts, oldest first."""
        where, values = ("", ()) if encounter_id is None else ("encounter_id = ?", (encounter_id,))
        for _, *fields in self._all("verdict", "number", where, values):
            named, subject_id, candidate, ruling, by, at, note = fields
            # KnownId: stored text is not checked again, because the rules for new text may be stricter
            yield Verdict(
                encounter_id=named,
                subject_id=subject_id,
                candidate=candidate,
                ruling=ruling,
                by=KnownId(by),
                at=at,
                note=KnownId(note),
            )

    def add_verdicts(self, verdicts: Iterable[Verdict]) -> None:
        for number, v in enumerate(verdicts, self._last_number("verdict") + 1):
            fields = (v.encounter_id, v.subject_id, v.candidate, v.ruling, v.by, float(v.at), v.note)
            self.put("verdict", [(number, *fields)])

    def clear_journal(self) -> None:
        """Deletes the rows of the journal, after a segment was written with them."""
        for table in JOURNAL:
            self._delete(table)

    # the hash chain ---------------------------------------------------------------------------------------------

    def links(self) -> Iterator[Link]:
        """The chain, oldest first. Raises GalleryDamaged."""
        return (Link(*row) for row in self._all("chain", "number"))

    def last_links(self) -> list[Link]:
        """The newest link and the link before it; fewer if the chain is shorter."""
        return [Link(*row) for row in self._all("chain", "number DESC LIMIT 2")]

    def link_of(self, version: int) -> Link | None:
        """The first link with a version of the content, by binary search: versions only grow. None if no link has it, and for the version
        at which the chain began."""
        low, high, first = 1, self._last_number("chain") if self.chain.exists() else 0, None
        while low <= high:
            middle = (low + high) // 2
            link = next((Link(*row) for row in self._all("chain", None, "number = ?", (middle,))), None)
            if link is None:
                return None
            at = json.loads(link.state)[0]
            if at == version:
                first = link
            low, high = (middle + 1, high) if at < version else (low, middle - 1)
        return None if first is None or first.reason == BEGUN else first

    def digests(self) -> dict[str, Digest]:
        """Table -> its stored digest, at the newest link. Raises GalleryDamaged."""
        return {name: Digest(rows, int.from_bytes(total, "big")) for name, rows, total in self._all("digest")}

    def row_changes(self) -> Iterator[RowChange]:
        """The stored lists of changed rows, oldest first. Raises GalleryDamaged."""
        for _, link, _, packed in self._all("row_change", "number"):
            yield from changes_in(link, packed)

    def forget_journal_changes(self) -> None:
        self._delete("row_change WHERE journal = 1")

    # implemented for each database ------------------------------------------------------------------------------

    @abstractmethod
    def lay_tables(self, gallery_id: str, config: str) -> None:
        """Creates the tables, and stores the gallery's id and settings."""

    @abstractmethod
    def put(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        """Inserts rows with their checksums. In the tables of REPLACED, a row with the same key is replaced."""

    @abstractmethod
    def exists(self, table: str) -> bool:
        """Whether the database has a table."""

    @abstractmethod
    def rows_of(self, table: str) -> Iterator[tuple[Any, ...]]:
        """Every row of a table, without its checksum. Raises GalleryDamaged."""

    @abstractmethod
    def _all(
        self, table: str, order: str | None = None, where: str = "", which: tuple[Any, ...] = ()
    ) -> Iterator[tuple[Any, ...]]:
        """Rows without their checksums. where: a condition with a `?` for each value of `which`. Raises GalleryDamaged."""

    @abstractmethod
    def _delete(self, which: str, values: Iterable[tuple[Any, ...]] = ((),)) -> None:
        """Deletes rows, once for each element of `values`. which: the table, and a WHERE condition with a `?` for each value."""

    @abstractmethod
    def _last_number(self, table: str) -> int:
        """The greatest `number` of a table, 0 if it is empty."""

    @abstractmethod
    def _keys(self, table: str) -> list[str]:
        """Every `key` of a table, ascending."""

    @abstractmethod
    def database_problems(self) -> list[str]:
        """Problems that the database's own check finds."""

    @abstractmethod
    def _table_problems(self, table: str) -> list[str]:
        """Problems that reading every row of a table finds."""


class SqliteCatalogue(CatalogueTables):
    """The tables in SQLite, over one connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.erased = False
        """Whether rows were deleted that the rollback journal may still hold. The gallery resets it."""
        self.chain = ChainWriter(self, getattr(connection, "chain_key", None))
        self.transforms = getattr(connection, "transforms", None)

    # transactions ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self.chain.begin()

    def begin_reading(self) -> None:
        """Begins a read transaction: from its first statement until `rollback`, no writer can commit."""
        self._connection.execute("BEGIN")

    def commit(self) -> None:
        self.chain.extend()
        self._connection.execute("COMMIT")
        if self.chain.anew == COVERED:
            self.chain.anew = ""

    def rollback(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()

    def copy_to(self, target: sqlite3.Connection) -> None:
        self._connection.backup(target)

    # the schema -------------------------------------------------------------------------------------------------

    def lay_tables(self, gallery_id: str, config: str) -> None:
        for table in self.tables:
            self._create(table)
        self._connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        self.put("meta", [("gallery_id", gallery_id), ("config", config), ("format", str(FORMAT_VERSION))])
        self.put("meta", [(name, "1") for name in sorted(ADDED_SETTINGS)])

    def is_current(self) -> bool:
        """Whether `renew` has nothing to do."""
        return self.identify()[1] == FORMAT_VERSION and _RENEWED <= self.meta().keys()

    def renew(self) -> None:
        """Creates the tables that a gallery of an older format lacks, inside the caller's transaction."""
        first, settings = self.policies(), self.meta()
        if "chain" in settings and ADDED["budget"] not in settings:
            self.chain.anew = COVERED
        for table, setting in ADDED.items():
            if setting not in settings and not self.exists(table):
                self._create(table)
                if table == "policy":
                    self.add_policy(first[0])
        self._connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        self.put("meta", [("format", str(FORMAT_VERSION)), *((setting, "1") for setting in sorted(_RENEWED))])

    def _create(self, table: str) -> None:
        for statement in _schema([table]).values():
            self._connection.execute(statement)

    def exists(self, table: str) -> bool:
        """Whether the database has a table."""
        query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
        return bool(self._connection.execute(query, (table,)).fetchone()[0])

    def identify(self) -> tuple[int, int, int]:
        """(application_id, user_version, number of schema objects). They identify the kind of database."""
        queries = ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        first, second, third = (int(self._connection.execute(query).fetchone()[0]) for query in queries)
        return first, second, third

    def check_schema(self) -> None:
        """Called before any table is read. Raises GalleryDamaged if the database holds a table, view or trigger that this program does not
        create: a view or a trigger would run foreign SQL."""
        expected, found = _schema(self.tables), set()
        for kind, name, table, sql in self._connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"):
            if (kind, name, sql) == ("index", f"sqlite_autoindex_{table}_1", None) and ("table", table) in expected:
                continue  # SQLite makes this index for a text primary key
            if sql is None or expected.get((kind, name)) != sql:
                raise GalleryDamaged(
                    f"the database holds a {kind} {name!r:.60} that this program does not create; restore it from a backup"
                )
            found.add((kind, name))
        if lacking := [name for kind, name in expected if (kind, name) not in found | set(_schema(ADDED))]:
            raise GalleryDamaged(f"table {lacking[0]} is lost; restore the database from a backup")

    def has_own(self, table: str) -> bool:
        """Whether a table exists with exactly our schema."""
        query = "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?"
        return bool(self._connection.execute(query, (table,)).fetchone() == (_schema([table])["table", table],))

    # rows with checksums ----------------------------------------------------------------------------------------

    def put(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        marks = ",".join("?" * (self.tables[table].count(",") + 2))
        verb = "REPLACE" if table in REPLACED else "INSERT"
        if table in REPLACED and table not in CHAIN_COLUMNS:
            rows = list(rows)
            key = table_columns(table)[0][0]
            self._note_dropped(f"{table} WHERE {key} = ?", [(row[0],) for row in rows])
        self._connection.executemany(f"{verb} INTO {table} VALUES ({marks})", self._noted(table, rows))

    def _noted(self, table: str, rows: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
        """Rows with their checksums; each is added to the chain's changes."""
        for row in rows:
            packed = pack_row(row)
            self.chain.put(table, row, packed)
            yield (*row, _checksum(packed))

    def _note_dropped(self, which: str, values: Iterable[tuple[Any, ...]]) -> None:
        """Adds the rows that a deletion will remove to the chain's changes. which, values: as in `_delete`."""
        table = which.partition(" ")[0]
        for some in values:
            for *row, _ in self._connection.execute(f"SELECT * FROM {which}", some):
                self.chain.drop(table, row)

    def rows_of(self, table: str) -> Iterator[tuple[Any, ...]]:
        """All rows of a table without their checksums, in the order of insertion. Raises GalleryDamaged."""
        return self._all(table, "rowid")

    def _all(
        self, table: str, order: str | None = None, where: str = "", which: tuple[Any, ...] = ()
    ) -> Iterator[tuple[Any, ...]]:
        if table in ADDED and not self.exists(table):
            if ADDED[table] in self.meta():
                raise GalleryDamaged(f"table {table} is lost; run `biodedup doctor`")
            return
        query = (
            f"SELECT * FROM {table}" + (f" WHERE {where}" if where else "") + (f" ORDER BY {order}" if order else "")
        )
        yield from self._checked(table, query, which, None if where else self.chain.reading(table))

    def _checked(
        self, table: str, query: str, which: tuple[Any, ...] = (), rows: Sum | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Rows whose types and checksums are right. rows: collects them for the comparison with the chain. Raises GalleryDamaged."""
        for *values, checksum in self._connection.execute(query, which):
            packed = pack_row(values) if has_types_of(table, values) else b""
            if not packed or _checksum(packed) != checksum:
                raise GalleryDamaged(f"a row of table {table} is damaged; run `biodedup doctor`")
            if rows is not None and is_chained(table, values):
                rows.add(packed)
            yield tuple(values)
        if rows is not None:
            self.chain.was_read(table, rows)

    def _delete(self, which: str, values: Iterable[tuple[Any, ...]] = ((),)) -> None:
        """Every deletion goes through here: `erased` tells the gallery to wipe SQLite's rollback journal, which may hold old content."""
        values = list(values)
        if which in JOURNAL:
            self.chain.changes.empty(which)
        elif which.partition(" ")[0] not in CHAIN_COLUMNS:
            self._note_dropped(which, values)
        self._connection.executemany(f"DELETE FROM {which}", values)
        self.erased = True

    def _last_number(self, table: str) -> int:
        return int(self._connection.execute(f"SELECT coalesce(max(number), 0) FROM {table}").fetchone()[0])

    def _keys(self, table: str) -> list[str]:
        return [key for (key,) in self._connection.execute(f"SELECT key FROM {table} ORDER BY key")]

    def database_problems(self) -> list[str]:
        return [text for (text,) in self._connection.execute("PRAGMA integrity_check(20)") if text != "ok"]

    def _table_problems(self, table: str) -> list[str]:
        try:
            for _ in self._all(table):
                pass
        except (GalleryDamaged, sqlite3.DatabaseError) as error:
            return [str(error)]
        return []


def paired(
    pairs: Iterable[tuple[int, int]], known: Mapping[int, tuple[int, ...]] | None = None
) -> dict[int, tuple[int, ...]]:
    """row -> its partners, in both directions, added to `known`."""
    found = dict(known or {})
    for pair in pairs:
        for row, other in (pair, pair[::-1]):
            if other not in found.get(row, ()):
                found[row] = (
                    *found.get(row, ()),
                    other,
                )  # a tuple: most rows have one partner, and a set takes four times the memory
    return found


def _is_counter(value: Any, default: Any) -> bool:
    return type(value) is type(default) and (type(value) is str or 0 <= value < 1 << 62)


def _schema(tables: Iterable[str]) -> dict[tuple[str, str], str]:
    """(type, name) -> the SQL statement that creates it."""
    made = {}
    for table in tables:
        made["table", table] = f"CREATE TABLE {table} ({_EVERY[table]}, checksum INTEGER NOT NULL)"
        for column in INDEXED.get(table, ()):
            name = f"{table}_{column.removesuffix('_id')}"
            made["index", name] = f"CREATE INDEX {name} ON {table} ({column})"
    return made


_NULLABLE = {
    "dimension",
    "vector",
    "minutiae",
    "quality",
    "decision",
    "candidate",
    "set_by",
    "set_at",
    "reason",
    "approved_by",
    "approved_at",
}
_PYTHON_TYPES = {"TEXT": str, "INTEGER": int, "REAL": float, "BLOB": bytes}
_TYPES_OF = {
    table: [(_PYTHON_TYPES[spec.split()[1]], spec.split()[0] in _NULLABLE) for spec in columns.split(", ")]
    for table, columns in _EVERY.items()
}


def table_columns(table: str) -> list[tuple[str, type]]:
    """The name and the Python type of each column of a table, without its checksum."""
    names = [spec.split()[0] for spec in _EVERY[table].split(", ")]
    return [(name, kind) for name, (kind, _) in zip(names, _TYPES_OF[table], strict=True)]


def has_types_of(table: str, values: Sequence[Any]) -> bool:
    """Whether values have the types of the table's columns. SQLite itself does not enforce types."""
    types = _TYPES_OF[table]
    return len(values) == len(types) and all(
        type(value) is kind or (value is None and nullable)
        for value, (kind, nullable) in zip(values, types, strict=True)
    )


def row_checksum(values: Sequence[Any]) -> int:
    """XXH3 of the values with their types and lengths, as SQLite's signed integer."""
    return _checksum(pack_row(values))


def _checksum(packed: bytes) -> int:
    return xxhash.xxh3_64_intdigest(packed) - (1 << 63)


def _blob(vector: Float32) -> bytes:
    return np.asarray(vector, "<f4").tobytes()


def _blobs(template: Template) -> tuple[bytes | None, bytes | None, float | None]:
    vector = None if template.embedding is None else _blob(template.embedding)
    return vector, template.minutiae, quality_scale.as_stored(template.column, template.quality)
