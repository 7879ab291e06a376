"""The messages between a front-end and an actor that searches segments.

Owns their encoding and its version. Never sends a message and never searches.

A message is a version, a text (JSON) and named arrays. These are plain types, so that no class of this library is pickled, and releases
with the same message version understand each other. Large arrays that many queries share (numbers of removed rows, evidence tables, trained
codecs) are *kept*: a query contains only their digests, and the arrays are sent once to each actor that lacks them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from biodedup.errors import StorageUnavailable
from biodedup.gallery.index_settings import IndexSettings, read_settings
from biodedup.gallery.segments.layout import SegmentEntry
from biodedup.gallery.snapshot import Snapshot
from biodedup.search.multicolumn.plan import LlrTable, MultiColumnHits, MultiColumnPlan, MultiColumnQuery
from biodedup.search.shards.base import ShardHits, ShardQuery

WIRE_VERSION = 1
"""Increased with every change of a message. It is part of the actors' names, so that front-ends of another version start their own
actors."""


def release() -> str:
    """The release and message version, which a front-end and its actors must share."""
    import biodedup

    return f"{biodedup.__version__}/{WIRE_VERSION}"


Arrays = dict[str, NDArray[Any]]
Sent = tuple[int, str, Arrays]
"""A message as it is sent: (version, text, arrays)."""


@dataclass(frozen=True)
class Message:
    """A message before it is sent. about: values for the JSON text; arrays: by name; kept: digest -> an array that the receiver may
    have."""

    about: dict[str, Any]
    arrays: Arrays = field(default_factory=dict)
    kept: Arrays = field(default_factory=dict)

    def keep(self, array: NDArray[Any]) -> str:
        """Adds a kept array; returns its digest."""
        plain = np.ascontiguousarray(array)
        digest = xxhash.xxh3_128_hexdigest(plain.dtype.str.encode() + plain.tobytes())
        self.kept[digest] = plain
        return digest

    def sent(self, missing: Sequence[str] = ()) -> Sent:
        """The message in its sent form. missing: digests of the kept arrays that the receiver lacks, which are included."""
        about = {**self.about, "kept": sorted(self.kept)}
        return WIRE_VERSION, json.dumps(about), self.arrays | {name: self.kept[name] for name in missing}


def received(sent: Sent) -> tuple[dict[str, Any], Arrays]:
    """(the parsed text, writable copies of the arrays). Raises StorageUnavailable for another version."""
    version, text, arrays = sent
    if version != WIRE_VERSION:
        raise StorageUnavailable(f"got a message of version {version}, wanted {WIRE_VERSION}; upgrade all nodes")
    return json.loads(text), {name: np.array(array, order="C") for name, array in arrays.items()}


# segments ----------------------------------------------------------------------------------------------------------


def entries_text(entries: Sequence[SegmentEntry]) -> str:
    """The entries of segments as text, from which an actor can fetch and open them. Equal texts mean equal files."""
    return json.dumps([[e.number, e.first_row, e.end_row, dict(sorted(e.files.items()))] for e in entries])


def entries_of(text: str) -> list[SegmentEntry]:
    return [SegmentEntry(*entry) for entry in json.loads(text)]


def generation_of(entries: str) -> str:
    """The name of an exact set of segments: the hash of their `entries_text`."""
    return xxhash.xxh3_128_hexdigest(entries.encode())


# queries -----------------------------------------------------------------------------------------------------------


def view_message(snapshot: Snapshot, generation: str, first_row: int, end_row: int) -> Message:
    """A message with the parts of a snapshot that a shard needs besides its segments: removed rows and index engines."""
    low, high = np.searchsorted(snapshot.tombstones, (first_row, end_row))
    message = Message({"generation": generation})
    message.about["tombstones"] = message.keep(snapshot.tombstones[low:high])
    codecs = [
        [column, str(codec.spec), json.dumps(codec.card()), message.keep(np.frombuffer(codec.trained, np.uint8))]
        for column, several in sorted(snapshot.indexing.codecs.items())
        for codec in several
    ]
    message.about["indexing"] = {"settings": snapshot.indexing.to_json(), "codecs": codecs}
    return message


def indexing_of(about: Mapping[str, Any], kept: Mapping[str, NDArray[Any]]) -> IndexSettings:
    codecs = [(column, spec, card, kept[digest].tobytes()) for column, spec, card, digest in about["codecs"]]
    return read_settings(about["settings"], codecs)


def group_numbers(snapshot: Snapshot, groups: frozenset[str] | None) -> list[int] | None:
    """The numbers of the group sets that contain one of these groups; None for no restriction."""
    return None if groups is None else sorted(n for n, names in snapshot.group_sets.items() if names & groups)


def query_message(query: ShardQuery, message: Message) -> None:
    """Adds a query to a message."""
    skip, groups = query.skip_covered, query.groups
    message.about["query"] = {
        "column": query.column,
        "k": query.k,
        "total_rows": query.total_rows,
        "miss_risk": query.miss_risk,
        "groups": None if groups is None else sorted(groups),
        "from_row": query.from_row,
        "end_row": query.end_row,
        "skip_covered": None if skip is None else _multicolumn_text(skip, message),
    }
    message.arrays.update(_given({"min_similarity": query.min_similarity, "least": query.least}))


def query_of(
    about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], kept: Mapping[str, NDArray[Any]]
) -> ShardQuery:
    skip = about["skip_covered"]
    return ShardQuery(
        column=about["column"],
        k=about["k"],
        total_rows=about["total_rows"],
        miss_risk=about["miss_risk"],
        min_similarity=arrays.get("min_similarity"),
        least=arrays.get("least"),
        groups=_groups_of(about),
        from_row=about["from_row"],
        end_row=about["end_row"],
        skip_covered=None if skip is None else multicolumn_of(skip, kept),
    )


def multicolumn_message(query: MultiColumnQuery, message: Message) -> None:
    """Adds a multi-column query to a message."""
    message.about["query"] = _multicolumn_text(query, message)


def _multicolumn_text(query: MultiColumnQuery, message: Message) -> dict[str, Any]:
    return {
        "plans": [[sorted(names), asdict(plan)] for names, plan in query.plans.items()],
        "llr_tables": {column: message.keep(table.llr_db) for column, table in query.llr_tables.items()},
        "k": query.k,
        "floor_llr_db": float(query.floor_llr_db),
        "groups": None if query.groups is None else sorted(query.groups),
        "from_row": query.from_row,
    }


def multicolumn_of(about: Mapping[str, Any], kept: Mapping[str, NDArray[Any]]) -> MultiColumnQuery:
    return MultiColumnQuery(
        {frozenset(names): _plan_of(plan) for names, plan in about["plans"]},
        {column: LlrTable(kept[digest]) for column, digest in about["llr_tables"].items()},
        about["k"],
        about["floor_llr_db"],
        _groups_of(about),
        about["from_row"],
    )


def _plan_of(about: Mapping[str, Any]) -> MultiColumnPlan:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in about.items()}
    return MultiColumnPlan(**values)


def _groups_of(about: Mapping[str, Any]) -> frozenset[str] | None:
    return None if about["groups"] is None else frozenset(about["groups"])


def _given(arrays: Mapping[str, NDArray[Any] | None]) -> Arrays:
    return {name: array for name, array in arrays.items() if array is not None}


# answers -----------------------------------------------------------------------------------------------------------

_HITS = ("which", "rows", "similarity", "complete_above")
_MULTI_HITS = ("which", "rows", "llr_db")


def hits_message(hits: ShardHits | MultiColumnHits) -> Message:
    if isinstance(hits, ShardHits):
        counts = {"rows_scanned": int(hits.rows_scanned), "compared": int(hits.compared)}
        return Message({"status": "done", "counts": counts}, {name: getattr(hits, name) for name in _HITS})
    counts = {"rows_scanned": int(hits.rows_scanned), "passed": int(hits.passed)}
    return Message({"status": "done", "counts": counts}, {name: getattr(hits, name) for name in _MULTI_HITS})


def hits_of(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], version: int) -> ShardHits:
    named: dict[str, Any] = {name: arrays[name] for name in _HITS}
    return ShardHits(**named, **about["counts"], version=version)


def multicolumn_hits_of(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> MultiColumnHits:
    named: dict[str, Any] = {name: arrays[name] for name in _MULTI_HITS}
    return MultiColumnHits(**named, **about["counts"])
