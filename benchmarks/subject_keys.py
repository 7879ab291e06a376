"""What keys of subjects cost, which minutiae are sealed by: sealing and opening a record, and enrolling with and without, in turns.

    python benchmarks/subject_keys.py            a minute of one core
    python benchmarks/subject_keys.py --smoke    little work, once; keeps no result

Times of the processor. Records have 40 minutiae; each subject has a face vector and one finger's record, and is loaded with others, without
a search. The files are in a temporary folder, so that the disk counts little where that folder is in memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import model_ids, record

import biodedup as bd
from biodedup.capture.minutiae.record import MinutiaeRecord, write_record
from biodedup.gallery.files.encryption.subject_keys import SubjectKeys
from biodedup.synthetic.vectors import population

_SIDE = 800


def records(count: int, seed: int = 1) -> list[bytes]:
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        x, y = rng.integers(200, 500, (2, 40))
        body = np.stack([0x40 | (x >> 8), x & 255, y >> 8, y & 255, rng.integers(0, 256, 40), np.full(40, 80)], axis=1)
        made.append(write_record(MinutiaeRecord(_SIDE, _SIDE, body.astype(np.uint8).tobytes()), 2, 50))
    return made


def us_a_record(some: list[bytes], folder: Path) -> tuple[float, float]:
    """(to seal one, to open one)."""
    keys = SubjectKeys(folder, "g", read_only=False, new=True)
    slots = keys.allocate(len(some))
    started = time.process_time()
    sealed = [keys.seal(slot, 2, one) for slot, one in zip(slots, some, strict=True)]
    middle = time.process_time()
    assert keys.opened(2, sealed) == some
    ended = time.process_time()
    keys.close()
    return 1e6 * (middle - started) / len(some), 1e6 * (ended - middle) / len(some)


def us_a_row(vectors: np.ndarray[Any, Any], some: list[bytes], folder: Path, *, keys: bool) -> tuple[float, float]:
    """(to load a row, to read its record)."""
    config = bd.Config(
        gallery=bd.GalleryConfig(background=False), subject_keys=folder / "keys" if keys else None, audit="none"
    )
    names = [f"s{i}" for i in range(len(some))]
    finger = bd.Extractor(bd.Config()).model_ids["finger"]
    models = {**model_ids("face", vectors.shape[1]), "right_index": finger}
    with bd.Engine.open(folder / f"g{keys}", config) as engine:
        started = time.process_time()
        engine.add_templates(names, {"face": vectors, "right_index": some}, model_id=models)
        loaded = time.process_time()
        for name in names:
            engine.templates(name)
        ended = time.process_time()
    return 1e6 * (loaded - started) / len(some), 1e6 * (ended - loaded) / len(some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    count, turns = (200, 1) if options.smoke else (10_000, 5)
    some, vectors, alone, whole = records(count), population(count), [], []
    for _ in range(turns + 1):  # the first one warms
        with tempfile.TemporaryDirectory() as name:
            alone.append(us_a_record(some, Path(name) / "alone"))
            whole.append([us_a_row(vectors, some, Path(name), keys=keys) for keys in (False, True)])
    seal, opened = np.median(alone[1:], axis=0)
    (load, read), (load_sealed, read_sealed) = np.median(np.array(whole[1:]), axis=0)
    figures = {
        "a record: us to seal, to open": f"{seal:.1f}, {opened:.1f}",
        "loading: us a row without, with": f"{load:.0f}, {load_sealed:.0f}",
        "reading a row's templates: us without, with": f"{read:.0f}, {read_sealed:.0f}",
        "bytes a row of keys, bytes a record": "32, 28",
    }
    record("subject_keys", figures, keep=not options.smoke)


if __name__ == "__main__":
    main()
