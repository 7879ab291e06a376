"""Captures per second: from image to template on one core, in batches, with all steps.

    python benchmarks/captures.py             LFW faces and FVC2002 fingers
    python benchmarks/captures.py --smoke     a few captures that need no data

Comparison in the same run: the share of the time that the networks alone take (ONNX Runtime on ready input).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import cv2
import numpy as np
from report import data_folder, record
from skimage import data

import biodedup as bd
from biodedup.capture.fingers.finger import resampled
from biodedup.capture.fingers.oriented import RIDGE_DPI
from biodedup.capture.fingers.ridges import ridge_map
from biodedup.embed.cards import load_card
from biodedup.embed.finger_input import finger_input
from biodedup.embed.finger_network import FingerNetwork
from biodedup.embed.network import EmbeddingNetwork
from biodedup.synthetic import draw_impression, draw_master

BATCH = 32


def rate(extractor: bd.Extractor, captures: list[Any]) -> tuple[float, int]:
    """(captures a second, refused), after one batch of warming up."""
    extractor.extract(captures[:4])
    started = time.perf_counter()
    results = [r for i in range(0, len(captures), BATCH) for r in extractor.extract(captures[i : i + BATCH])]
    return len(captures) / (time.perf_counter() - started), sum(isinstance(r, bd.Refusal) for r in results)


def vector_ms(pictures: list[np.ndarray]) -> float:
    """Milliseconds from a finger's picture at 500 dpi to its vector: enhancement, minutiae of the ridge map, network; one core."""
    network = FingerNetwork(load_card("finger256"), 1)

    def embed(some: list[np.ndarray]) -> None:
        network.embed([finger_input(ridge_map(resampled(picture, 500, RIDGE_DPI))) for picture in some])

    embed(pictures[:2])
    started = time.perf_counter()
    embed(pictures)
    return 1000 * (time.perf_counter() - started) / len(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    cv2.setNumThreads(options.threads)
    if options.smoke:
        faces = [bd.Face(np.asarray(data.astronaut()))] * 8
        fingers: list[Any] = []
    else:
        faces = [bd.Face(path) for path in sorted((data_folder() / "faces" / "lfw").glob("*/*.jpg"))[:512]]
        fingers = [
            bd.Finger(path) for path in sorted((data_folder() / "fingers" / "fvc2002").glob("DB[134]_B/*.png"))[:160]
        ]
    extractor = bd.Extractor(bd.Config(threads=options.threads))
    faces_s, refused = rate(extractor, faces)
    network = EmbeddingNetwork(load_card("sface"), options.threads)
    images = np.zeros((64, 112, 112, 3), np.uint8)
    network.embed(images[:4])
    started = time.perf_counter()
    network.embed(images)
    bare_s = len(images) / (time.perf_counter() - started)
    figures = {
        "threads": options.threads,
        "faces": len(faces),
        "faces a second": round(faces_s, 1),
        "of the bare network's rate": round(faces_s / bare_s, 2),
        "faces refused": refused,
    }
    if fingers:
        fingers_s, refused = rate(extractor, fingers)
        figures |= {"fingers": len(fingers), "fingers a second": round(fingers_s, 1), "fingers refused": refused}
        pictures = [np.asarray(cv2.imread(str(finger.data), cv2.IMREAD_GRAYSCALE)) for finger in fingers]
    else:
        rng = np.random.default_rng(0)
        master = draw_master(rng)
        pictures = [draw_impression(rng, master).image for _ in range(4)]
    figures["finger, picture to vector, ms"] = round(vector_ms(pictures), 1)
    record("captures", figures, keep=not options.smoke)


if __name__ == "__main__":
    main()
