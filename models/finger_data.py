"""Generates the training data of the finger network: impressions of synthetic fingers, as the network's inputs.

    python models/finger_data.py FOLDER --masters 8000

Chunks of 50 masters with their own seeds are written one by one. The same command continues where it was stopped, and several
processes share the work. A chunk holds directions int8, minutiae float16, pose float32 (x, y of the core in pixels from the centre,
angle in radians), master int32, pattern int8.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import cv2
import numpy as np

from biodedup.capture.fingers.oriented import RIDGE_DPI
from biodedup.capture.fingers.ridges import ridge_map
from biodedup.embed.finger_input import finger_input
from biodedup.synthetic import draw_impression, draw_master
from biodedup.synthetic.masters import PATTERNS, TIP_PX, Pattern

CHUNK, IMPRESSIONS = 50, 8
SEED = 20261126
_ARCHES = 0.1  # beside those that nature draws: their pose is hard to find, and one finger in thirty does not teach it
_LONG_TIPS = 0.12  # the core at the picture's lower edge, or below it


def chunk(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([SEED, number])
    rows = []
    for i in range(CHUNK):
        pattern: Pattern | None = "arch" if rng.random() < _ARCHES else None
        master = draw_master(rng, pattern, rng.uniform(170, 250) if rng.random() < _LONG_TIPS else TIP_PX)
        for _ in range(IMPRESSIONS):
            impression = draw_impression(rng, master, RIDGE_DPI)
            given = finger_input(ridge_map(impression.image))
            pose = (impression.core[0] - given.centre[0], impression.core[1] - given.centre[1], impression.angle)
            rows.append(
                (given.directions, given.minutiae, pose, number * CHUNK + i, list(PATTERNS).index(master.pattern))
            )
    directions, minutiae, poses, masters, patterns = zip(*rows, strict=True)
    return {
        "directions": np.clip(np.rint(np.stack(directions) * 127), -127, 127).astype(np.int8),
        "minutiae": np.stack(minutiae).astype(np.float16),
        "pose": np.array(poses, np.float32),
        "master": np.array(masters, np.int32),
        "pattern": np.array(patterns, np.int8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--masters", type=int, default=8000)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    for number in range(options.masters // CHUNK):
        path = options.folder / f"{number:04}.npz"
        claim = path.with_suffix(f".{os.getpid()}.tmp")
        if path.exists() or any(options.folder.glob(f"{number:04}.*.tmp")):
            continue
        claim.touch()
        started = time.perf_counter()
        with claim.open("wb") as file:
            np.savez_compressed(file, **chunk(number))
        claim.rename(path)
        print(f"chunk {number}: {CHUNK / (time.perf_counter() - started):.1f} masters a second", flush=True)


if __name__ == "__main__":
    main()
