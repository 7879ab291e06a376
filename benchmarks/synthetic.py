"""Generated fingerprints beside real ones: how they look in numbers, and how fast they are drawn.

    python benchmarks/synthetic.py                     300 generated impressions beside FVC2002 DB1-4_B
    python benchmarks/synthetic.py --sheet sheet.jpg   and a contact sheet: a finger a row
    python benchmarks/synthetic.py --smoke             a few generated ones, no data needed

Density: MINDTCT minutiae of quality 30 or more a square millimetre of ridges. Period: of ridges, in pixels at 500 dpi. Figures are
10 %, 50 % and 90 % quantiles over the impressions of a set.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from report import data_folder, record

from biodedup.capture.fingers.finger import DPI, MM_PER_PIXEL, resampled
from biodedup.capture.fingers.nbis_parts import extract, nfiq2
from biodedup.capture.fingers.oriented import RIDGE_DPI
from biodedup.capture.fingers.ridges import ridge_map
from biodedup.synthetic import draw_impression, draw_master

REAL = {"DB1_B": 500, "DB2_B": 569, "DB3_B": 500, "DB4_B": 500}
QUALITY_MIN = 30
SHEET_FINGERS, SHEET_IMPRESSIONS = 4, 6


def generated(rng: np.random.Generator, count: int) -> Iterator[NDArray[np.uint8]]:
    for _ in range(count // 3):
        master = draw_master(rng)
        for _ in range(3):
            yield draw_impression(rng, master).image


def real(name: str, dpi: float) -> Iterator[NDArray[np.uint8]]:
    for path in sorted((data_folder() / "fingers" / "fvc2002" / name).glob("*.png")):
        yield resampled(np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), np.uint8), dpi)


def looks(images: Iterator[NDArray[np.uint8]]) -> dict[str, str]:
    """Quantiles over a set of images at 500 dpi."""
    found: list[tuple[float, ...]] = []
    for image in images:
        ridges = ridge_map(resampled(image, DPI, RIDGE_DPI))
        area_mm2 = float(ridges.inside.sum()) * (MM_PER_PIXEL * DPI / RIDGE_DPI) ** 2
        if area_mm2 < 20:
            continue
        try:
            minutiae, score = extract(image), nfiq2(image)
        except ValueError:  # NFIQ 2 finds nothing to work on; as rare in real sets
            continue
        sure = int(np.count_nonzero(np.frombuffer(minutiae.body, np.uint8).reshape(-1, 6)[:, 5] >= QUALITY_MIN))
        period = float(np.median(ridges.period[ridges.inside > 0])) * DPI / RIDGE_DPI
        found.append((sure / area_mm2, period, score, area_mm2))
    names = ("minutiae a mm2", "ridge period, pixels", "NFIQ 2", "area, mm2")
    quantiles = np.quantile(found, (0.1, 0.5, 0.9), axis=0).T
    return {name: " / ".join(f"{value:.3g}" for value in row) for name, row in zip(names, quantiles, strict=True)}


def sheet(path: Path) -> None:
    rng = np.random.default_rng(2)
    rows = []
    for _ in range(SHEET_FINGERS):
        master = draw_master(rng)
        rows.append(np.hstack([draw_impression(rng, master, 200).image for _ in range(SHEET_IMPRESSIONS)]))
    cv2.imwrite(str(path), np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, 80])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--impressions", type=int, default=300)
    parser.add_argument("--sheet", type=Path, help="where to write a contact sheet")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.sheet:
        sheet(options.sheet)
    rng = np.random.default_rng(1)
    master = draw_master(rng)  # compiles
    count = 3 if options.smoke else 40
    started = time.perf_counter()
    masters = [draw_master(rng) for _ in range(count)]
    masters_s = count / (time.perf_counter() - started)
    started = time.perf_counter()
    for master in masters:
        draw_impression(rng, master, RIDGE_DPI)
    figures: dict[str, Any] = {
        "masters a second, one core": round(masters_s, 2),
        "impressions a second, one core": round(count / (time.perf_counter() - started), 1),
    }
    sets = {"generated": generated(rng, 6 if options.smoke else options.impressions)}
    if not options.smoke:
        sets |= {f"FVC2002 {name}": real(name, dpi) for name, dpi in REAL.items()}
    for name, images in sets.items():
        figures |= {f"{name}: {what}": value for what, value in looks(images).items()}
    record("synthetic", figures, keep=not options.smoke)


if __name__ == "__main__":
    main()
