"""Bulk enrolment: `enroll_batch` against a large gallery, every row of it searched, from templates and from face images.

    python benchmarks/bulk.py                                 ten million rows, 12,000 templates
    python benchmarks/bulk.py --images FOLDER --limit 2000    and face images of a folder, LFW for example
    python benchmarks/bulk.py --smoke                         small, with re-captures of a portrait; keeps no result
    python benchmarks/bulk.py --gallery FOLDER                a gallery that is kept for further runs (made if absent)

A tenth of the templates are of people in the gallery, at mated cosines of 0.75 and more, which are above every threshold. Their outcome must
be `duplicate` or `review`. Processor use: processor time of this process and its workers, divided by wall time and number of cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from report import model_ids, record
from skimage import data

import biodedup as bd
from biodedup import jobs
from biodedup.jobs.demonstration import recaptures
from biodedup.synthetic.vectors import mates_of, population

ROWS, TEMPLATES, BATCH_ROWS = 10_000_000, 12_000, 250_000


def processor_s() -> float:
    """Processor seconds of this process and of its children that have ended."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def make_gallery(folder: Path, rows: int) -> int:
    """Makes the gallery; returns its number of rows, which is larger than `rows` if an earlier run kept it."""
    with bd.Engine.open(folder) as engine:
        for number, first in enumerate(range(len(engine), rows, BATCH_ROWS)):
            count = min(BATCH_ROWS, rows - first)
            names = [f"synthetic-{i:08d}" for i in range(first, first + count)]
            engine.add_templates(names, {"face": population(count, seed=number)}, model_id=model_ids("face", 128))
        engine.maintain()
        return len(engine)


def template_manifest(path: Path, count: int, rows: int, run: int) -> int:
    """Writes embeddings of impostors and of enrolled people; returns how many are of the latter. run: new ids for each."""
    vectors = population(count, seed=987_654 + run)
    mates = min(count // 10, BATCH_ROWS, rows)
    chosen = np.linspace(0, count - 1, mates).astype(np.int64)
    enrolled = population(min(BATCH_ROWS, rows), seed=0)[:mates]
    cosines = np.random.default_rng(5).uniform(0.75, 0.95, mates)
    vectors[chosen] = mates_of(enrolled, cosines)
    cells = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = {
        "subject_id": [f"new-{run}-{i}" for i in range(count)],
        "encounter_id": [f"t{run}-{i}" for i in range(count)],
    }
    pa.parquet.write_table(pa.table(table | {"face": cells}), path)
    return mates


def image_manifest(path: Path, folder: Path | None, limit: int, run: int) -> int:
    """Writes paths of a folder's images, or re-captures of the portrait that scikit-image ships; returns how many."""
    if folder is None:
        folder = path.parent / "portraits"
        folder.mkdir()
        for name, content in recaptures(np.asarray(data.astronaut(), np.uint8)).items():
            (folder / f"{name}.jpg").write_bytes(content)
    images = sorted(found for found in folder.rglob("*") if found.suffix.lower() in (".jpg", ".jpeg", ".png"))[:limit]
    columns = {
        "subject_id": [f"image-{run}-{i}" for i in range(len(images))],
        "encounter_id": [f"i{run}-{i}" for i in range(len(images))],
        "path": [str(image.absolute()) for image in images],
    }
    pa.parquet.write_table(pa.table(columns), path)
    return len(images)


def enroll(gallery: Path, manifest: Path, options: argparse.Namespace) -> tuple[jobs.BatchResult, dict[str, Any]]:
    config = bd.Config(batch_size=options.batch, threads=options.threads)
    used, started = processor_s(), time.perf_counter()
    with bd.Engine.open(gallery, config) as engine, jobs.Backlog.open(gallery) as backlog:
        result = jobs.enroll_batch(
            engine, backlog, manifest, manifest.with_name("outcomes.parquet"), workers=options.workers
        )
        size = len(engine)
    seconds = time.perf_counter() - started
    shares = {name: round(part / result.seconds["all"], 2) for name, part in result.seconds.items() if name != "all"}
    return result, {
        "gallery at the end": size,
        "subjects a second": round(result.records / result.seconds["all"], 1),
        "share of time searching and committing": shares["searching"],
        "share of time waiting for extraction": shares["waiting"],
        "processor use, of all cores": round((processor_s() - used) / seconds / (os.cpu_count() or 1), 2),
        **{name: count for name, count in result.statuses.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=ROWS)
    parser.add_argument("--templates", type=int, default=TEMPLATES)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--limit", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gallery", type=Path)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.templates, options.batch, options.workers = 5_000, 300, 64, 1
    figures: dict[str, Any] = {
        "rows": options.rows,
        "batch": options.batch,
        "threads, workers": f"{options.threads}, {options.workers}",
    }
    with tempfile.TemporaryDirectory() as folder:
        gallery = options.gallery or Path(folder) / "gallery"
        run = make_gallery(gallery, options.rows)
        work = Path(folder) / "work"
        work.mkdir()
        if options.templates:
            mates = template_manifest(work / "templates.parquet", options.templates, options.rows, run)
            result, told = enroll(gallery, work / "templates.parquet", options)
            figures |= {f"templates: {name}": value for name, value in told.items()}
            found = result.statuses["duplicate"] + result.statuses["adjudicate"]
            figures["templates: enrolled people found again"] = f"{found} of {mates}"
        if options.smoke or options.images:
            count = image_manifest(work / "images.parquet", options.images, options.limit, run)
            _, told = enroll(gallery, work / "images.parquet", options)
            figures |= {"images": count} | {f"images: {name}": value for name, value in told.items()}
        shutil.rmtree(work)
    record("bulk", figures, keep=not options.smoke)


if __name__ == "__main__":
    main()
