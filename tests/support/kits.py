"""Field kits for tests: two kits, a centre, and batch files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

import biodedup as bd
from biodedup import jobs
from biodedup.jobs.kits.format.batch_file import BatchReader, BatchWriter
from biodedup.jobs.kits.format.keys import CentreKey, KitKey, load_centre_key, load_key
from biodedup.jobs.kits.format.record import Record, encode

from .vectors import people

MONDAY = 1_790_000_000.0  # the kits' keys are made
FRIDAY = MONDAY + 4 * 86_400
YEAR = 365 * 86_400


class Stop(BaseException):
    """A job is killed here."""


def stop_at(stage: str, count: int):
    def progress(at: str, done: int, total: int) -> None:
        if at == stage and done >= count:
            raise Stop

    return progress


def table(vectors: np.ndarray, names: list[str] | None = None, **columns: list[object]) -> pa.Table:
    names = names or [f"s{i}" for i in range(len(vectors))]
    return pa.table({"subject_id": names, "face": [v.tolist() for v in vectors], **columns})


def packed(centre: Path, kit: str, out: str, content: pa.Table, clock: float = MONDAY + 86_400) -> Path:
    manifest = centre / f"{out}.parquet"
    pa.parquet.write_table(content, manifest)
    jobs.pack_batch(manifest, centre / out, centre / f"{kit}.key", clock=lambda: clock)
    return centre / out


def forged(centre: Path, kit: str, out: str, records: list[Record], void: tuple[int, ...] = ()) -> Path:
    """A batch that a kit signs, whatever `pack` would say of it."""
    to = load_centre_key(centre / "centre.key").public
    with (centre / out).open("wb") as file:
        writer = BatchWriter(file, load_key(centre / f"{kit}.key"), to)
        for record in records:
            writer.add(record)
        writer.finish(void)
    return centre / out


def a_record(
    number: int, encounter_id: str, vector: np.ndarray, subject_id: str, groups: tuple[str, ...] = ()
) -> Record:
    encounter = bd.Encounter(subject_id, (), {"face": vector}, encounter_id, groups)
    return Record(encounter, number, None, MONDAY + 100)


def ingested(
    folder: Path,
    *batches: Path,
    out: str = "o.parquet",
    gallery: str = "g",
    now: float = FRIDAY,
    batch_size: int = 4,
    **more,
) -> jobs.IngestResult:
    more.setdefault("centre", [load_centre_key(folder / "centre.key")])
    config = bd.Config(batch_size=batch_size)
    return jobs.ingest_batches(
        batches, folder / gallery, folder / "trusted", folder / out, config, clock=lambda: now, **more
    )


def outcomes(result: jobs.IngestResult) -> list[str]:
    return [outcome.outcome for outcome in result.outcomes]


def enrolled(centre: Path, gallery: str = "g") -> list[str]:
    with bd.Engine.open(centre / gallery, read_only=True) as engine:
        return engine.subject_ids()


def records_of(count: int, start: int = 1) -> list[Record]:
    rng = np.random.default_rng(start)
    return [
        Record(
            bd.Encounter(
                f"s{i}",
                [bd.Face(rng.bytes(int(rng.integers(1, 300)))), bd.Missing("left_thumb", "bandaged")],
                {"right_index": bd.Template("right_index", "m", people(1, i)[0], b"minutiae", 0.4)},
                f"e{i}",
                ["village"],
            ),
            i,
            MONDAY + i,
            MONDAY + 100,
            (bd.Refusal("face", "blurred", "", 0.01, 0.1),),
        )
        for i in range(start, start + count)
    ]


def written(
    keys: tuple[KitKey, CentreKey], records: list[Record], void: tuple[int, ...] = (), *, encrypted: bool = True
) -> bytes:
    """The same bytes for the same records: the ephemeral key is fixed, which only a test may do."""
    file = io.BytesIO()
    ephemeral = X25519PrivateKey.from_private_bytes(bytes(range(32)))
    writer = BatchWriter(file, keys[0], keys[1].public if encrypted else None, ephemeral)
    for record in records:
        writer.add(record)
    writer.finish(void)
    return file.getvalue()


def read(path: Path, key: KitKey, centre: CentreKey | None = None) -> tuple[list[Record], BatchReader]:
    centre = centre or load_centre_key(path.parent / "centre.key")
    with BatchReader(path, {key.public.fingerprint: key.public}, [centre], allow_unencrypted=True) as batch:
        return list(batch), batch


def payloads(records: list[Record]) -> list[bytes]:
    return [encode(record) for record in records]
