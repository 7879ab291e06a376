"""Settings of searches and of a gallery's storage, on one machine or on several.

Owns their defaults and their ranges. Never opens a gallery.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

from biodedup.common.arguments import check_fields
from biodedup.config.ranges import check_range
from biodedup.errors import InvalidInput
from biodedup.index_spec import parse_specs
from biodedup.values import COLUMNS


@dataclass(frozen=True)
class SearchConfig:
    """How many rows a search compares, and its accepted risk of a miss."""

    candidates: int = 100
    """Rows per probe that the scan of embeddings passes on to the comparison of all captures. A higher number finds more mates of poor
    captures, and takes longer."""
    finger_rows_max: int = 5_000
    """Maximum number of rows per probe that are compared by minutiae because they have no embedding in common with the probe. If there are
    more, the search is incomplete."""
    returned: int = 10
    """Candidates that a decision keeps: first those that resemble the probe, then those with the most similar embeddings. If the probe and
    the gallery share a single embedding, such as a face, a search only looks for candidates that reach the review threshold. If minutiae add
    to embeddings, candidates that do not resemble the probe are kept only up to five candidates in all."""
    miss_risk: float = 1e-3
    """Maximum probability of each of two misses: that the scan of a column, which first estimates similarities, loses a row that an exact
    comparison would find; and that a candidate of the scan which resembles the probe by its minutiae is left out. At least 0, below 0.5.
    Below 0.001 all minutiae of the candidates are compared, and with 0 every row is compared exactly; both take longer. A single finger that
    agrees although all other captures disagree, such as an operator's own, is left out in about 5 of 1,000 cases at any risk from 0.001 on.
    The share is higher if rows are compared in several columns at once; `engine.plan(columns)` states it."""
    capture_correlation: float = 0.3
    """Assumed correlation, from 0 to below 1, between the scores of two captures of a subject with their mates (rank correlation on a normal
    scale): a subject with one poor finger often has several. The search over several columns is planned with it."""
    across_positions: bool = False
    """Whether each finger is compared with fingers of all positions, so that a search also finds mates with wrong labels. It costs m x n
    comparisons a row for m fingers of a probe and n of the gallery, in n passes; ten by ten take about twice as long as ten. A call may
    override it; a join cannot."""
    scanned: tuple[str, ...] = ()
    """Columns of embeddings that a search scans in every row, such as `("face", "right_index", "left_index")`; (): all columns of a probe.
    The other columns are compared for the candidates alone. The search then reads less memory and may miss more: `engine.plan(columns)`
    states how much. Rows that share no scanned column with a probe are searched in all its columns. A join scans all columns."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_scanned()
        for name in ("candidates", "finger_rows_max", "returned"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted at least 1")
        if not 0 <= self.miss_risk < 0.5:
            raise InvalidInput(f"miss_risk is {self.miss_risk}, wanted a probability of at least 0 and less than 0.5")
        if not 0 <= self.capture_correlation < 1:
            raise InvalidInput(f"capture_correlation is {self.capture_correlation}, wanted at least 0 and less than 1")

    def _check_scanned(self) -> None:
        unknown = [column for column in self.scanned if column not in COLUMNS]
        if unknown:
            raise InvalidInput(f"scanned names {unknown[0]!r}, which is no column; use {', '.join(COLUMNS)}")
        if len(set(self.scanned)) < len(self.scanned):
            raise InvalidInput(f"scanned is {self.scanned}, wanted each column once")
        if self.scanned and self.miss_risk <= 0:
            raise InvalidInput(
                "scanned leaves columns out, got miss_risk=0, which allows no miss; leave scanned out, or allow a risk such as 0.001"
            )


@dataclass(frozen=True)
class GalleryConfig:
    """When rows move from the journal to sealed segments, when segments are merged, and how many rows a subject keeps."""

    seal_rows: int = 16_384
    """Number of rows in the journal at which they are sealed into a segment. Rows of the journal are in memory and compared exactly."""
    merge_fan: int = 8
    """Number of neighbouring segments of one size that are merged into one segment of the next size."""
    background: bool = True
    """Whether a thread of the engine seals and merges. False: only `compact`, `maintain` and bulk loads seal and merge."""
    segment_rows: int = 1 << 24
    """Number of rows from which a segment is not merged any more. It bounds the disk space and the time that a merge needs."""
    encounters_max: int = 3
    """Rows (encounters) that a subject keeps, chosen by quality and spread over time. A subject keeps more rows if each has a column that
    the others lack."""
    index: str | dict[str, str] | None = None
    """The index engine of a new gallery: `native`, or `faiss:FACTORY` with a factory string of FAISS, such as `faiss:IVF2048,PQ64x4fs`. With
    `,nprobe=N` at its end a search reads only N inverted lists. A dict gives an engine for each column, `*` for all others. None: `native` in
    a new gallery. An existing gallery keeps its engine until `Engine.reindex` changes it; if another engine is stated, opening raises
    IndexMismatch."""
    renewable: bool = False
    """Whether a new gallery stores renewable templates (ISO/IEC 24745): embeddings rotated by a secret orthogonal transform, which
    `biodedup key rekey` replaces. Scores do not change. It needs `Config.keys`. An existing gallery does not change: if it has no transform,
    opening it for writing with True raises InvalidInput."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.index is not None:
            parse_specs(self.index)
        for name, minimum in (("seal_rows", 1), ("merge_fan", 2), ("segment_rows", 1), ("encounters_max", 1)):
            if getattr(self, name) < minimum:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted at least {minimum}")


@dataclass(frozen=True)
class ClusterConfig:
    """A register on several machines: `Engine.open("postgresql://user@host/database?gallery=register", Config(cluster=ClusterConfig(...)))`.

    A front-end is a process that enrols and searches in the register."""

    segments: str = ""
    """The place of the sealed segments, for all machines: `file:///folder` (such as NFS) or `s3://bucket/folder`."""
    cache: Path | None = None
    """Folder of this machine's copies of the segments. Several front-ends may share it. None: a temporary folder, removed at the end."""
    cache_bytes_max: int = 1 << 40
    """Maximum size of these copies, in bytes. A front-end searches its own copies, so that all segments have to fit."""
    deadline_ms: int = 10_000
    """How long a front-end waits for a connection to PostgreSQL, and for the other front-ends' commits, before it raises a
    RetryableError."""
    transaction_ms_max: int = 60_000
    """Time without a statement after which PostgreSQL ends a front-end's transaction, so that a stopped process does not block the other
    front-ends."""
    poll_ms: int = 100
    """How often a front-end reads the commits of the other front-ends. Before each of its own commits it reads them as well."""
    stale_ms_max: int = 5_000
    """Time without contact to PostgreSQL after which a search raises a RetryableError, since it may miss people enrolled meanwhile."""
    garbage_grace_s: float = 86_400.0
    """How long the segment store keeps files that no manifest names any more. It must be longer than any search, merge or start takes."""

    ray_address: str | None = None
    """Ray cluster whose actors search the sealed segments: `host:port`, `auto` for the cluster of this machine, `local` for a new cluster in
    this process. None: each front-end searches all segments itself."""
    replicas: int = 2
    """How many actors hold each group of segments, on different nodes if there are enough nodes."""
    shard_groups: int = 1
    """How many groups the segments are divided into. All front-ends of a register use the same number."""
    shard_deadline_ms: int = 5_000
    """How long a front-end waits for one replica's part of a search before it asks the next replica."""
    node_bytes_max: int | None = None
    """How many bytes of scanned data the actors of this register may hold on one node. The memory that the node states to Ray
    (`biodedup cluster up shards --memory`, `ray start --memory`) is a second limit; None: the only one. All front-ends of a register use
    the same number."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.segments:
            raise InvalidInput("segments is empty, wanted where the segments are: file:///folder or s3://bucket/folder")
        check_range(self, 1, inf, "cache_bytes_max", "deadline_ms", "transaction_ms_max", "poll_ms", "stale_ms_max")
        check_range(self, 1, inf, "replicas", "shard_groups", "shard_deadline_ms")
        check_range(self, 0, inf, "garbage_grace_s")
        if self.node_bytes_max is not None:
            check_range(self, 1, inf, "node_bytes_max")
