"""A gallery of template-only subjects: load, open, search, memory; exact search as the peer.

    python benchmarks/scale.py                  a million subjects, 128 numbers each
    python benchmarks/scale.py --subjects 5000  the smoke size; keeps no result

Peer in the same run, on the same rows: FAISS's bare exact kernel. Recall is against it.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
from report import model_ids, record

import biodedup as bd
from biodedup.synthetic.vectors import mates_of, population

SUBJECTS, PROBES, BATCH_ROWS = 1_000_000, 256, 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=SUBJECTS)
    count = parser.parse_args().subjects
    vectors = population(count)
    probes = mates_of(vectors[:PROBES], np.full(PROBES, 0.6))
    names = [f"s{i:07d}" for i in range(count)]
    figures: dict[str, object] = {"subjects": count, "dimension": vectors.shape[1]}
    with tempfile.TemporaryDirectory() as folder:
        gallery = Path(folder) / "gallery"
        started = time.perf_counter()
        with bd.Engine.open(gallery) as engine:
            for i in range(0, count, BATCH_ROWS):
                engine.add_templates(
                    names[i : i + BATCH_ROWS],
                    {"face": vectors[i : i + BATCH_ROWS]},
                    model_id=model_ids("face", vectors.shape[1]),
                )
        figures["loaded, subjects a second"] = round(count / (time.perf_counter() - started))
        figures["disk, bytes a subject"] = round(
            sum(f.stat().st_size for f in gallery.rglob("*") if f.is_file()) / count
        )
        started = time.perf_counter()
        engine = bd.Engine.open(gallery)
        figures["open, s"] = round(time.perf_counter() - started, 2)
        with engine:
            singles = []
            for probe in probes[:30]:
                started = time.perf_counter()
                engine.search({"face": probe[None]}, k=10)
                singles.append(1000 * (time.perf_counter() - started))
            figures["one probe, p50 ms"] = round(float(np.median(singles)), 1)
            started = time.perf_counter()
            ids, _ = engine.search({"face": probes}, k=10)
            ours = PROBES / (time.perf_counter() - started)
        started = time.perf_counter()
        _, exact = faiss.knn(probes, vectors, 10, metric=faiss.METRIC_INNER_PRODUCT)
        peer = PROBES / (time.perf_counter() - started)
    figures["batches of 256, probes a second"] = round(ours, 1)
    figures["of the bare kernel's rate"] = round(ours / peer, 2)
    shared = [
        len(set(ours) & set(theirs)) / 10 for ours, theirs in zip(ids, np.array(names, object)[exact], strict=True)
    ]
    figures["recall@10"] = round(float(np.mean(shared)), 4)
    figures["mates at cosine 0.6 that are first"] = float(np.mean(ids[:, 0] == np.array(names[:PROBES], object)))
    figures["peak memory, bytes a subject"] = round(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / count)
    record("scale", figures, keep=count == SUBJECTS)


if __name__ == "__main__":
    main()
