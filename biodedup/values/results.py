"""The results of searches and joins, and the content of a gallery: search results, links, clusters and subjects.

Owns their fields, and their form as tables. Never searches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from biodedup.common.described import Described, Tabular
from biodedup.values.checks import Float32
from biodedup.values.columns import COLUMNS
from biodedup.values.decisions import Decision, Evidence, Kind, counted, in_db
from biodedup.values.encounters import EnrolledEncounter


@dataclass(frozen=True, eq=False)
class SearchResult(Tabular):
    """The most similar subjects of each probe.

    ids: object (q, k) of subject_id, padded with ''. similarity: float32 (q, k), descending, padded with -inf. incomplete: part of the
    gallery could not be searched. The result unpacks as `ids, similarity = result`.
    """

    ids: NDArray[np.object_]
    similarity: Float32
    gallery_version: int
    incomplete: bool = False

    _columns: ClassVar[Mapping[str, str]] = {
        "probe": "int64",
        "rank": "int64",
        "subject_id": "string",
        "similarity": "float32",
    }

    def __repr__(self) -> str:
        count, k = self.ids.shape
        incomplete = ", incomplete" if self.incomplete else ""
        return f"SearchResult({count} probe{'' if count == 1 else 's'}, k={k}, gallery_version={self.gallery_version}{incomplete})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: each probe has a list of its subjects, without the padding."""
        probes: list[list[dict[str, Any]]] = [[] for _ in self.ids]
        for row in self._rows():
            probes[row["probe"]].append({"subject_id": row["subject_id"], "similarity": row["similarity"]})
        return {"probes": probes, "gallery_version": self.gallery_version, "incomplete": self.incomplete}

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "probe": probe,
                "rank": rank,
                "subject_id": str(subject_id),
                "similarity": float(self.similarity[probe, rank - 1]),
            }
            for probe, ids in enumerate(self.ids)
            for rank, subject_id in enumerate(ids, 1)
            if subject_id
        ]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ids, self.similarity))


@dataclass(frozen=True)
class Link(Described):
    """Two subjects whose score says that they are one person. kind: as in `Candidate`. A person should judge every kind except
    `same_person` and `swapped_fingers`."""

    subject_ids: tuple[str, str]
    score_db: float
    extrapolated: bool
    evidence: tuple[Evidence, ...]
    kind: Kind = "same_person"

    def __repr__(self) -> str:
        return f"Link({self.subject_ids[0]!r}, {self.subject_ids[1]!r}, {in_db(self.score_db, self.extrapolated)}, {self.kind})"


@dataclass(frozen=True)
class Cluster(Tabular):
    """Subjects connected by links. One false link can connect the records of two people.

    weakest_db: the score of the weakest link without which the cluster would fall apart. links: all links, or, of more than 1,000, a
    spanning tree, the 100 strongest and the 100 weakest. links_left_out: how many links are left out; a link that the search found from
    both subjects may count twice.
    """

    subject_ids: tuple[str, ...]
    links: tuple[Link, ...]
    weakest_db: float
    links_left_out: int = 0

    _columns: ClassVar[Mapping[str, str]] = {
        "subject_a": "string",
        "subject_b": "string",
        "kind": "string",
        "score_db": "float64",
        "extrapolated": "bool",
    }

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self.subject_ids[:3])) + (", ..." if len(self.subject_ids) > 3 else "")
        links = counted(self.links, "link") + (f" and {self.links_left_out} left out" if self.links_left_out else "")
        return f"Cluster({counted(self.subject_ids, 'subject')}: {names}; {links}, weakest {self.weakest_db:.1f} dB)"

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "subject_a": link.subject_ids[0],
                "subject_b": link.subject_ids[1],
                "kind": link.kind,
                "score_db": link.score_db,
                "extrapolated": link.extrapolated,
            }
            for link in self.links
        ]


@dataclass(frozen=True)
class ListedSubject(Described):
    """An enrolled subject without its templates: its rows, their encounters, its groups, and the columns that have a template.
    encounter_ids: "" for a row that was loaded without an encounter_id."""

    subject_id: str
    rows: tuple[int, ...]
    encounter_ids: tuple[str, ...]
    groups: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Subject(Tabular):
    """Everything that a gallery holds of one subject_id.

    encounters: its rows, oldest first; empty if it is not enrolled. decisions: the present decisions on its encounters, oldest first.
    open_cases: its encounters that wait for a verdict.
    """

    subject_id: str
    encounters: tuple[EnrolledEncounter, ...]
    decisions: tuple[Decision, ...] = ()
    open_cases: tuple[str, ...] = ()

    _columns: ClassVar[Mapping[str, str]] = {
        "row": "int64",
        "encounter_id": "string",
        "groups": "string",
        "columns": "string",
    }

    def __repr__(self) -> str:
        rows = counted(self.encounters, "encounter") if self.enrolled else "not enrolled"
        waiting = f", {counted(self.open_cases, 'open case')}" if self.open_cases else ""
        return f"Subject({self.subject_id!r}, {rows}, {counted(self.decisions, 'decision')}{waiting})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without biometric data: a template is shown by its model_id and quality."""
        more = {"enrolled": self.enrolled, "groups": list(self.groups)}
        return {"subject_id": self.subject_id, **more, **super().to_dict()}

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "row": encounter.row,
                "encounter_id": encounter.encounter_id or None,
                "groups": ";".join(encounter.groups),
                "columns": ";".join(encounter.templates),
            }
            for encounter in self.encounters
        ]

    @property
    def enrolled(self) -> bool:
        return bool(self.encounters)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of all its rows."""
        return tuple(sorted({group for encounter in self.encounters for group in encounter.groups}))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that have a template."""
        held = {column for encounter in self.encounters for column in encounter.templates}
        return tuple(column for column in COLUMNS if column in held)
