"""`dedup` of a gallery: everybody against everybody, for hours, and still to the end.

Owns the notes of an interrupted join and the result files. Never compares itself.

Each tile's links are appended to the notes, a line each, and synced before the next one begins; a join of the same gallery,
version, threshold and way of comparing goes on behind the last whole line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from biodedup.engine import Engine
from biodedup.gallery.gallery import DATABASE_NAME, translated
from biodedup.jobs.progress import Progress, silent
from biodedup.jobs.results import check_table_name, write_table
from biodedup.search.clusters import clusters_of
from biodedup.values import Cluster, Link


@dataclass(frozen=True)
class JoinResult:
    """Who of a gallery is one person. subjects: how many were compared."""

    clusters: tuple[Cluster, ...]
    subjects: int
    threshold_db: float

    def summary(self) -> dict[str, Any]:
        """Counts, JSON-ready."""
        return {
            "subjects": self.subjects,
            "threshold_db": round(self.threshold_db, 2),
            "pairs": sum(len(cluster.links) for cluster in self.clusters),
            "clusters": len(self.clusters),
            "subjects_in_clusters": sum(len(cluster.subject_ids) for cluster in self.clusters),
            "clusters_of_more_than_two": sum(len(cluster.subject_ids) > 2 for cluster in self.clusters),
        }


def is_gallery(folder: Path) -> bool:
    return (folder / DATABASE_NAME).is_file()


def find_duplicates(
    engine: Engine, out: Path, *, threshold_db: float | None = None, progress: Progress = silent
) -> JoinResult:
    """Joins a gallery with itself and writes `out` (.parquet or .csv): a row for each pair, with its cluster and that
    cluster's weakest link. Interrupted, it goes on where it was (`out`.notes).

    Raises InvalidInput, GalleryDamaged, StorageUnavailable.
    """
    check_table_name(out)
    if threshold_db is None:
        threshold_db, _ = engine.config.policy.thresholds_db(len(engine))
    out.parent.mkdir(parents=True, exist_ok=True)
    info = engine.info()
    key = {"gallery": info["gallery_id"], "version": info["gallery_version"], "threshold_db": threshold_db}
    if engine.config.search.across_positions:
        key["across_positions"] = True
    notes = out.with_name(out.name + ".notes")
    done, links = _resumed(notes, key)
    with translated(f"writing {notes}"), notes.open("a") as file:
        if not done:
            file.write(json.dumps(key) + "\n")
        for tile in engine.join(threshold_db=threshold_db, skip=done):
            found = [[*link.subject_ids, link.score_db, link.extrapolated, link.kind] for link in tile.links]
            file.write(json.dumps({"done": tile.done, "links": found}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            links += _links(found)
            progress("comparing", tile.done, tile.total)
    result = JoinResult(tuple(clusters_of(links)), len(engine), threshold_db)
    _write(result, out)
    with translated(f"removing {notes}"):
        notes.unlink()
    return result


def _resumed(notes: Path, key: dict[str, Any]) -> tuple[int, list[Link]]:
    """What was done and found before; notes of another join, and a line cut short, are dropped."""
    done, links, sound = 0, list[Link](), 0
    lines = notes.read_bytes().splitlines(keepends=True) if notes.exists() else []
    if lines and _parsed(lines[0]) == key:
        sound = len(lines[0])
        for line in lines[1:]:
            tile = _parsed(line)
            if tile is None:
                break
            done, sound = tile["done"], sound + len(line)
            links += _links(tile["links"])
    if lines:
        with notes.open("r+b") as file:
            file.truncate(sound if done else 0)
    return done, links


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _links(found: list[list[Any]]) -> list[Link]:
    return [Link((a, b), score_db, extrapolated, (), kind) for a, b, score_db, extrapolated, kind in found]


def _rows(result: JoinResult) -> Iterator[tuple[int, float, Link]]:
    for number, cluster in enumerate(result.clusters, start=1):
        for link in cluster.links:
            yield number, cluster.weakest_db, link


def _write(result: JoinResult, out: Path) -> None:
    rows = list(_rows(result))
    table = pa.table(
        {
            "cluster": pa.array([number for number, _, _ in rows], pa.int64()),
            "subject_id_a": pa.array([link.subject_ids[0] for _, _, link in rows], pa.string()),
            "subject_id_b": pa.array([link.subject_ids[1] for _, _, link in rows], pa.string()),
            "score_db": pa.array([link.score_db for _, _, link in rows], pa.float64()),
            "extrapolated": pa.array([link.extrapolated for _, _, link in rows], pa.bool_()),
            "kind": pa.array([link.kind for _, _, link in rows], pa.string()),
            "weakest_db": pa.array([weakest for _, weakest, _ in rows], pa.float64()),
        }
    )
    write_table(table, out)
