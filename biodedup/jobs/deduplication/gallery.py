"""`dedup` of a gallery: compares all subjects with all subjects (a self-join), and resumes after an interruption.

Owns the checkpoint file and the result file. Never compares templates.

The join is done in tiles. The links of a tile are one line of the checkpoint file, synced before the next tile begins. A join of the same
gallery version with the same threshold and method resumes after the last complete line. If rows were sealed into a segment meanwhile, the
join starts again, because the order of its tiles has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from biodedup.common.described import Described
from biodedup.common.executors import LOCAL, Executor
from biodedup.config import SearchConfig
from biodedup.engine import Engine
from biodedup.gallery.files.names import DATABASE_NAME
from biodedup.gallery.files.private import make_private_folder
from biodedup.jobs.deduplication.tiles import joined_tiles
from biodedup.jobs.shared.checkpoint import CheckpointFile
from biodedup.jobs.shared.output import check_table_name, write_table
from biodedup.jobs.shared.progress import Progress, silent, warn
from biodedup.search.clusters import Links
from biodedup.values import Cluster, Evidence, Kind, Link


@dataclass(frozen=True)
class JoinResult(Described):
    """The clusters of subjects that are the same person. subjects: number of subjects compared; plan: the method of the join and what it may
    miss, as a sentence."""

    clusters: tuple[Cluster, ...]
    subjects: int
    threshold_db: float
    plan: str
    impostor_pairs: float = 0.0
    """Expected number of pairs of different people that reach the threshold, N(N - 1)/2 times FMR."""

    def summary(self) -> dict[str, Any]:
        """The counts, JSON-ready."""
        return {
            "subjects": self.subjects,
            "threshold_db": round(self.threshold_db, 2),
            "pairs": sum(len(cluster.links) for cluster in self.clusters),
            "pairs_expected_by_chance": float(f"{self.impostor_pairs:.3g}"),
            "pairs_left_out": sum(cluster.links_left_out for cluster in self.clusters),
            "clusters": len(self.clusters),
            "subjects_in_clusters": sum(len(cluster.subject_ids) for cluster in self.clusters),
            "clusters_of_more_than_two": sum(len(cluster.subject_ids) > 2 for cluster in self.clusters),
            "plan": self.plan,
        }


def is_gallery(folder: Path) -> bool:
    """Whether a folder holds a gallery."""
    return (folder / DATABASE_NAME).is_file()


def find_duplicates(
    engine: Engine,
    out: Path,
    *,
    threshold_db: float | None = None,
    progress: Progress = silent,
    executor: Executor = LOCAL,
) -> JoinResult:
    """Joins a gallery with itself and writes `out` (.parquet or .csv): a row for each pair, with its cluster and the cluster's weakest score.

    An interrupted join resumes (`out`.notes). A cluster with more than 1,000 links is written in part (`Cluster.links_left_out`).
    threshold_db: None takes the policy's duplicate threshold for the gallery's size; executor: where tiles are compared (`jobs.ray_executor`).
    Raises InvalidInput, GalleryDamaged, StorageUnavailable.
    """
    check_table_name(out)
    if threshold_db is None:
        threshold_db = engine.policy.link_db(len(engine))
    make_private_folder(out.parent)
    with join_checkpoint(engine, out.with_name(out.name + ".notes"), threshold_db) as notes:
        plan = engine.plan_join(threshold_db)
        warn(progress, plan.estimate.warnings(), len(engine))
        links = join_links(engine, notes, threshold_db, progress, executor)
        impostor_pairs = plan.estimate.impostor_pairs
        result = JoinResult(tuple(links.clusters()), len(engine), threshold_db, plan.explain(), impostor_pairs)
        _write(result, out)
        notes.remove()
    return result


def join_checkpoint(engine: Engine, path: Path, threshold_db: float) -> CheckpointFile:
    """The checkpoint file of a join of the gallery's current version."""
    info = engine.info()
    key = {"gallery": info["gallery_id"], "version": info["gallery_version"], "threshold_db": threshold_db}
    key["sealed_rows"] = info["sealed_rows"]
    if engine.config.search.across_positions:
        key["across_positions"] = True
    if engine.config.search.miss_risk != SearchConfig.miss_risk:
        key["miss_risk"] = engine.config.search.miss_risk
    return CheckpointFile(path, key, engine.config.keys)


def join_links(
    engine: Engine, notes: CheckpointFile, threshold_db: float, progress: Progress, executor: Executor = LOCAL
) -> Links:
    """The links of a gallery's join with itself. Tiles of the checkpoint file are not compared again."""
    links = Links()
    for tile in notes.entries:
        links.add((_link(*values) for values in tile["links"]), tile.get("left_out"))
    done = notes.entries[-1]["done"] if notes.entries else 0
    for tile in joined_tiles(engine, threshold_db, done, executor, progress):
        evidence = [[asdict(part) for part in link.evidence] for link in tile.links]
        found = [
            [*link.subject_ids, link.score_db, link.extrapolated, parts, link.kind]
            for link, parts in zip(tile.links, evidence, strict=True)
        ]
        left_out = {"left_out": tile.left_out} if tile.left_out else {}
        notes.append({"done": tile.done, "links": found} | left_out)
        links.add(tile.links, tile.left_out)
        progress("comparing", tile.done, tile.total)
    return links


def _link(a: str, b: str, score_db: float, extrapolated: bool, evidence: list[dict[str, Any]], kind: Kind) -> Link:
    return Link((a, b), score_db, extrapolated, tuple(Evidence(**part) for part in evidence), kind)


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
