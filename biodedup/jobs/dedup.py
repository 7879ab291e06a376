"""`dedup`: which images of a folder, or which subjects of a manifest, are the same person.

Owns the job from a folder to a result file. Never embeds or compares itself: it fills a working gallery beside the
result, so that an interrupted job goes on where it was, and asks the engine for the clusters.

1. A *unit* is what gets compared: an image of a folder, or a subject of a manifest with all its captures.
2. A unit whose files changed (size or time) since the last run is extracted again; one that is gone is removed.
3. Results are replaced, never half-written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import comb
from pathlib import Path
from typing import Any

import pyarrow as pa

from biodedup.config import Config
from biodedup.engine import Engine
from biodedup.errors import InvalidInput
from biodedup.jobs.manifest import images_of, label_of, mark_of, no_images, read_table, rows_of
from biodedup.jobs.progress import Progress, silent
from biodedup.jobs.results import check_table_name, write_json, write_table
from biodedup.values import Capture, Cluster, Encounter, Face, Refusal


@dataclass(frozen=True)
class Unit:
    """unit_id: unique; label: the subject it is filed under, None where unknown."""

    unit_id: str
    label: str | None
    captures: tuple[Capture, ...]

    @property
    def encounter_id(self) -> str:
        """Changes when a file's size or time does, so that a resumed job knows what is done already."""
        return mark_of(self.unit_id, self.captures)


@dataclass(frozen=True)
class DedupResult:
    """What was found. refusals: unit_id -> why it could not be compared."""

    units: tuple[Unit, ...]
    clusters: tuple[Cluster, ...]
    refusals: dict[str, tuple[Refusal, ...]]
    threshold_db: float

    def summary(self) -> dict[str, Any]:
        """Counts, and pairwise precision and recall against the labels where units of one label repeat; JSON-ready."""
        label_of = {unit.unit_id: unit.label for unit in self.units}
        links = [link for cluster in self.clusters for link in cluster.links]
        summary: dict[str, Any] = {
            "units": len(self.units),
            "compared": len(self.units) - len(self.refusals),
            "refused": len(self.refusals),
            "refusal_reasons": _counted(refusals[0].reason for refusals in self.refusals.values()),
            "threshold_db": round(self.threshold_db, 2),
            "pairs": len(links),
            "clusters": len(self.clusters),
            "units_in_clusters": sum(len(cluster.subject_ids) for cluster in self.clusters),
        }
        mated = sum(comb(n, 2) for n in _counted(unit.label for unit in self.units if unit.label is not None).values())
        if mated:
            compared = (u.label for u in self.units if u.label is not None and u.unit_id not in self.refusals)
            mated_compared = sum(comb(n, 2) for n in _counted(compared).values())
            same = sum(label_of[link.subject_ids[0]] == label_of[link.subject_ids[1]] for link in links)
            summary |= {
                "pairs_of_one_label": same,
                "pairs_across_labels": len(links) - same,
                "precision": round(same / len(links), 6) if links else None,
                "recall": round(same / mated, 6),
                "recall_of_compared": round(same / mated_compared, 6) if mated_compared else None,
            }
        return summary


def units_of(source: Path) -> list[Unit]:
    """The units of a folder (an image each, filed under its first-level folder) or of a CSV or Parquet manifest.

    A manifest has the columns subject_id and path (relative to the manifest), and may have position (`face`, or a
    finger's position) and dpi. Raises InvalidInput.
    """
    if source.is_dir():
        units = _folder_units(source)
        if not units:
            raise no_images(source)
        return units
    if not source.exists():
        raise InvalidInput(f"{source} does not exist; name a folder of images, or a CSV or Parquet manifest")
    return _manifest_units(source)


def dedup(
    source: Path,
    out: Path,
    config: Config | None = None,
    *,
    threshold_db: float | None = None,
    progress: Progress = silent,
) -> DedupResult:
    """Finds the units that are one person and writes `out` (.parquet or .csv), its pairs and its summary beside it.

    Raises InvalidInput, GalleryBusy (another job has this result), StorageUnavailable.
    """
    check_table_name(out)
    config = config or Config()
    units = units_of(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Engine.open(out.with_name(out.name + ".work"), config) as engine:
        refusals = _fill(engine, units, config.batch_size, progress)
        if threshold_db is None:
            threshold_db = config.policy.link_db(len(engine))
        clusters = engine.find_duplicates(
            threshold_db=threshold_db, progress=lambda done, total: progress("comparing", done, total)
        )
    result = DedupResult(tuple(units), tuple(clusters), refusals, threshold_db)
    _write(result, out)
    return result


def _folder_units(folder: Path) -> list[Unit]:
    return [Unit(relative.as_posix(), label_of(relative), (Face(folder / relative),)) for relative in images_of(folder)]


def _manifest_units(manifest: Path) -> list[Unit]:
    captures: dict[str, list[Capture]] = {}
    for row in rows_of(read_table(manifest), manifest):
        captures.setdefault(row.subject_id, []).append(row.capture)
    return [Unit(subject_id, None, tuple(found)) for subject_id, found in captures.items()]


def _fill(engine: Engine, units: Sequence[Unit], batch_size: int, progress: Progress) -> dict[str, tuple[Refusal, ...]]:
    for gone in set(engine.subject_ids()) - {unit.unit_id for unit in units}:
        engine.remove(gone)
    refusals: dict[str, tuple[Refusal, ...]] = {}
    stream = iter(units)
    done = 0
    while batch := list(islice(stream, batch_size)):
        encounters = [Encounter(unit.unit_id, unit.captures, encounter_id=unit.encounter_id) for unit in batch]
        for decision in engine.admit(encounters):
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
    write_json(result.summary(), out.with_name(f"{out.stem}.summary.json"))


def _counted(items: Iterable[str | None]) -> dict[str | None, int]:
    return dict(sorted(Counter(items).items(), key=lambda entry: (-entry[1], str(entry[0]))))
