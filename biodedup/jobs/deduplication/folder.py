"""`dedup`: finds images of a folder, or subjects of a manifest, that belong to the same person.

Owns the job from a folder to a result file. Never extracts or compares: it fills a working gallery beside the result, so that an interrupted
job resumes, and asks the engine for clusters.

1. The job compares *units*: a unit is an image of a folder, or a subject of a manifest with all its captures.
2. A unit whose files changed (size or time) since the last run is extracted again. A unit whose files are gone is removed.
3. Results are replaced as a whole, never half-written.
4. A row of a manifest that cannot be used is refused with its number. The other rows are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import comb
from pathlib import Path
from typing import Any

import pyarrow as pa

from biodedup.common.described import Described
from biodedup.config import Config, IsolationConfig
from biodedup.engine import Engine
from biodedup.errors import InvalidInput
from biodedup.gallery.files.private import make_private_folder
from biodedup.jobs.manifests.captures import (
    LeftOut,
    RefusedRow,
    Row,
    images_of,
    label_of,
    mark_of,
    no_images,
    read_rows,
)
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.shared.files import write_json
from biodedup.jobs.shared.output import check_table_name, write_table
from biodedup.jobs.shared.progress import Progress, silent, warn
from biodedup.texts import KnownId
from biodedup.values import CAPTURES_MAX, Capture, Cluster, Encounter, Face, Finger, Refusal


@dataclass(frozen=True)
class Unit:
    """An image of a folder, or a subject of a manifest. unit_id: unique; label: the subject in whose folder the image is, None if unknown;
    refused: the rows of the subject that cannot be used; rows: the manifest's row of each capture."""

    unit_id: str
    label: str | None
    captures: tuple[Capture, ...]
    refused: tuple[RefusedRow, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def encounter_id(self) -> str:
        """A digest that changes with the size or time of a file, so that a resumed job knows which units are finished."""
        return mark_of(self.unit_id, self.captures)


@dataclass(frozen=True)
class DedupResult(Described):
    """The clusters of units that belong to the same person. refusals: unit_id -> why the unit was not compared; left_out: skipped files and
    rows; impostor_pairs: expected number of pairs of different people that reach the threshold, N(N - 1)/2 times FMR."""

    units: tuple[Unit, ...]
    clusters: tuple[Cluster, ...]
    refusals: dict[str, tuple[Refusal, ...]]
    threshold_db: float
    left_out: LeftOut = field(default_factory=LeftOut)
    impostor_pairs: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The counts, JSON-ready. If several units have the same label, also the pairwise precision and recall against the labels; pairs with
        an unlabelled unit are ignored there."""
        label_of = {unit.unit_id: unit.label for unit in self.units}
        links = [link for cluster in self.clusters for link in cluster.links]
        summary: dict[str, Any] = {
            "units": len(self.units),
            "compared": len(self.units) - len(self.refusals),
            "refused": len(self.refusals),
            "refusal_reasons": _counted(refusals[0].reason for refusals in self.refusals.values()),
            "threshold_db": round(self.threshold_db, 2),
            "pairs": len(links),
            "pairs_expected_by_chance": float(f"{self.impostor_pairs:.3g}"),
            "pairs_left_out": sum(cluster.links_left_out for cluster in self.clusters),
            "clusters": len(self.clusters),
            "units_in_clusters": sum(len(cluster.subject_ids) for cluster in self.clusters),
        }
        mated = sum(comb(n, 2) for n in _counted(unit.label for unit in self.units if unit.label is not None).values())
        if mated:
            compared = (u.label for u in self.units if u.label is not None and u.unit_id not in self.refusals)
            mated_compared = sum(comb(n, 2) for n in _counted(compared).values())
            same, labelled = self._labelled_pairs(label_of)
            summary |= {
                "pairs_of_one_label": same,
                "pairs_across_labels": labelled - same,
                "precision": round(same / labelled, 6) if labelled else None,
                "recall": round(same / mated, 6),
                "recall_of_compared": round(same / mated_compared, 6) if mated_compared else None,
            }
        return summary | (self.left_out.to_dict() if self.left_out else {})

    def _labelled_pairs(self, label_of: Mapping[str, str | None]) -> tuple[int, int]:
        """(number of linked pairs with the same label, number of linked pairs with two labels). If links of a cluster were left out, all pairs
        of its units count."""
        same = labelled = 0
        for cluster in self.clusters:
            if cluster.links_left_out:
                sizes = Counter(label for name in cluster.subject_ids if (label := label_of[name]) is not None)
                same += sum(comb(n, 2) for n in sizes.values())
                labelled += comb(sizes.total(), 2)
                continue
            ends = [[label_of[name] for name in link.subject_ids] for link in cluster.links]
            ends = [pair for pair in ends if None not in pair]
            same += sum(a == b for a, b in ends)
            labelled += len(ends)
        return same, labelled

    def refused_sentences(self, units_max: int = 20) -> list[str]:
        """The refused units, as sentences with row, path and reason. Rows that could not be read are in `left_out`."""
        refused = [unit for unit in self.units if unit.unit_id in self.refusals and unit.captures]
        report = []
        for unit in refused[:units_max]:
            for number, capture in enumerate(unit.captures):
                row = f"row {unit.rows[number]}: " if unit.rows else ""
                reasons = [
                    refusal.reason
                    for refusal in self.refusals[unit.unit_id]
                    if refusal.column in ("encounter", capture.column)
                ]
                path = (
                    f" ({capture.data})"
                    if isinstance(capture, (Face, Finger)) and isinstance(capture.data, Path)
                    else ""
                )
                report.append(
                    f"{row}{unit.unit_id}{path} refused: {', '.join(dict.fromkeys(reasons)) or 'not compared'}"
                )
        if len(refused) > units_max:
            report.append(f"... and {len(refused) - units_max:,} more")
        return report


def units_of(source: Path, options: TableOptions = DEFAULT_OPTIONS) -> tuple[list[Unit], LeftOut]:
    """Reads the units of a folder or a manifest. Returns (units, skipped files or rows).

    In a folder, each image is a unit, and its first-level folder is its label. A CSV or Parquet manifest has the columns subject_id and path
    (relative to the manifest), and optionally position (`face`, or the position of a finger) and dpi. Raises InvalidInput.
    """
    if source.is_dir():
        images, left_out = images_of(source)
        if not images:
            raise no_images(source, left_out)
        return [Unit(name, label_of(path), (Face(source / path),)) for name, path in images.items()], left_out
    if not source.exists():
        raise InvalidInput(f"{source} does not exist; name a folder of images, or a CSV or Parquet manifest")
    rows, left_out = read_rows(source, options)
    return _manifest_units(rows, left_out)


def dedup(
    source: Path,
    out: Path,
    config: Config | None = None,
    *,
    threshold_db: float | None = None,
    options: TableOptions = DEFAULT_OPTIONS,
    progress: Progress = silent,
) -> DedupResult:
    """Finds units that belong to the same person. Writes the units to `out` (.parquet or .csv), and the pairs and a summary beside it.

    threshold_db: None takes the policy's duplicate threshold for the number of units; options: how a manifest is read. Raises InvalidInput,
    GalleryBusy (another job writes this result), StorageUnavailable.
    """
    check_table_name(out)
    for suffix in {".csv", ".parquet"} - {out.suffix}:
        other = out.with_suffix(suffix)
        if other.exists() and _working_folder(other).exists():
            raise InvalidInput(
                f"{other} is a result, and its summary {_summary_of(out)} would be overwritten; name the new result differently"
            )
    config = (config or Config(isolation=IsolationConfig())).with_policy()
    units, left_out = units_of(source, options)
    make_private_folder(out.parent)
    with Engine.open(_working_folder(out), config, override_policy=True) as engine:
        refusals = _fill(engine, units, config.batch_size, progress)
        if threshold_db is None:
            threshold_db = engine.policy.link_db(len(engine))
        estimate = engine.plan_join(threshold_db).estimate
        warn(progress, estimate.warnings(), len(engine))
        clusters = engine.find_duplicates(
            threshold_db=threshold_db, progress=lambda done, total: progress("comparing", done, total)
        )
    result = DedupResult(tuple(units), tuple(clusters), refusals, threshold_db, left_out, estimate.impostor_pairs)
    _write(result, out)
    return result


def _manifest_units(rows: Sequence[Row], left_out: LeftOut) -> tuple[list[Unit], LeftOut]:
    """A unit for each subject, and for each row without a subject_id; in the order of their first rows."""
    captures: dict[str, list[Capture]] = {}
    numbers: dict[str, list[int]] = {}
    refused = list(left_out.rows)
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(row.subject_id, row.number)
        of_subject = captures.setdefault(row.subject_id, [])
        if len(of_subject) < CAPTURES_MAX:
            of_subject.append(row.capture)
            numbers.setdefault(row.subject_id, []).append(row.number)
        else:
            detail = f"the subject has more than {CAPTURES_MAX} captures; name the best ones"
            refused.append(RefusedRow(row.number, row.subject_id, Refusal("encounter", "invalid_input", detail)))
    refused_of: dict[str, list[RefusedRow]] = {}
    for bad in refused:
        name = bad.subject_id
        if name is None:
            name = f"row {bad.number}"
            while name in captures:
                name += "~"
        first[name] = min(bad.number, first.get(name, bad.number))
        refused_of.setdefault(name, []).append(bad)
    units = [
        Unit(name, None, tuple(captures.get(name, ())), tuple(refused_of.get(name, ())), tuple(numbers.get(name, ())))
        for name in sorted(first, key=lambda name: first[name])
    ]
    return units, LeftOut(rows=tuple(sorted(refused, key=lambda row: row.number)))


def _fill(engine: Engine, units: Sequence[Unit], batch_size: int, progress: Progress) -> dict[str, tuple[Refusal, ...]]:
    """Brings the working gallery up to date with the units. Returns unit_id -> its refusals."""
    for gone in set(engine.subject_ids()) - {unit.unit_id for unit in units if unit.captures}:
        engine.remove(gone)
    refusals = {unit.unit_id: tuple(row.refusal for row in unit.refused) for unit in units if not unit.captures}
    units = [unit for unit in units if unit.captures]
    stream = iter(units)
    done = 0
    while batch := list(islice(stream, batch_size)):
        # a file name may hold characters that other ids may not have
        encounters = [Encounter(KnownId(u.unit_id), u.captures, encounter_id=u.encounter_id) for u in batch]
        for decision in engine.import_captures(encounters):
            assert decision.subject_id is not None, "every unit has an id"
            if decision.outcome == "refused":
                refusals[decision.subject_id] = decision.refusals
        done += len(batch)
        progress("embedding", done, len(units))
    return refusals


def _write(result: DedupResult, out: Path) -> None:
    cluster_of = {
        name: number for number, cluster in enumerate(result.clusters, start=1) for name in cluster.subject_ids
    }
    label_of = {unit.unit_id: unit.label for unit in result.units}
    units = pa.table(
        {
            "unit_id": pa.array([unit.unit_id for unit in result.units], pa.string()),
            "label": pa.array([unit.label for unit in result.units], pa.string()),
            "cluster": pa.array([cluster_of.get(unit.unit_id) for unit in result.units], pa.int64()),
            "refusal": pa.array(
                [
                    refusals[0].reason if (refusals := result.refusals.get(unit.unit_id)) else None
                    for unit in result.units
                ],
                pa.string(),
            ),
            "detail": pa.array(
                ["; ".join(row.sentence for row in unit.refused) or None for unit in result.units], pa.string()
            ),
        }
    )
    links = [(number, link) for number, c in enumerate(result.clusters, start=1) for link in c.links]
    pairs = pa.table(
        {
            "cluster": pa.array([number for number, _ in links], pa.int64()),
            "unit_id_a": pa.array([link.subject_ids[0] for _, link in links], pa.string()),
            "unit_id_b": pa.array([link.subject_ids[1] for _, link in links], pa.string()),
            "label_a": pa.array([label_of[link.subject_ids[0]] for _, link in links], pa.string()),
            "label_b": pa.array([label_of[link.subject_ids[1]] for _, link in links], pa.string()),
            "score_db": pa.array([link.score_db for _, link in links], pa.float64()),
            "extrapolated": pa.array([link.extrapolated for _, link in links], pa.bool_()),
            "kind": pa.array([link.kind for _, link in links], pa.string()),
        }
    )
    write_table(units, out)
    write_table(pairs, out.with_name(f"{out.stem}.pairs{out.suffix}"))
    write_json(result.summary(), _summary_of(out))


def _working_folder(out: Path) -> Path:
    return out.with_name(out.name + ".work")


def _summary_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}.summary.json")


def _counted(items: Iterable[str | None]) -> dict[str | None, int]:
    """item -> its number of occurrences, the most frequent first."""
    return dict(sorted(Counter(items).items(), key=lambda entry: (-entry[1], str(entry[0]))))
