"""Copies of a picture: the share that the limits of `[replay]` in the cards find, and the share of pairs of different captures that they report as copies.

    python benchmarks/replay.py              odd-numbered people and fingers, the report half: five minutes of one core
    python benchmarks/replay.py --tuning     even-numbered ones, on which the limits were chosen
    python benchmarks/replay.py --smoke      one portrait that needs no data

A copy is the picture after one of `WAYS`. Pairs of different captures: mated pairs of each set.
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from report import data_folder, record
from skimage import data

import biodedup as bd
from biodedup.embed.cards import load_card

Picture = np.ndarray[Any, Any]


def compressed(quality: int) -> Callable[[Picture], Picture]:
    def copy(image: Picture) -> Picture:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "JPEG", quality=quality)
        return np.asarray(Image.open(out))

    return copy


def cropped(share: float) -> Callable[[Picture], Picture]:
    def copy(image: Picture) -> Picture:
        y, x = (int(share * size) for size in image.shape[:2])
        return np.ascontiguousarray(image[y : -(y // 2) or None, x // 2 : -x or None])

    return copy


def turned(degrees: float) -> Callable[[Picture], Picture]:
    def copy(image: Picture) -> Picture:
        size = image.shape[1], image.shape[0]
        turn = cv2.getRotationMatrix2D((size[0] / 2, size[1] / 2), degrees, 1)
        return cv2.warpAffine(image, turn, size, borderMode=cv2.BORDER_REPLICATE)

    return copy


WAYS: dict[str, Callable[[Picture], Picture]] = {
    "the same picture": lambda image: image,
    "JPEG quality 90": compressed(90),
    "JPEG quality 60": compressed(60),
    "JPEG quality 30": compressed(30),
    "cropped by 4 %": cropped(0.04),
    "cropped by 8 %": cropped(0.08),
    "brighter": lambda image: np.clip(image * 1.15 + 5, 0, 255).astype(np.uint8),
    "turned by 3 degrees": turned(3),
    "turned by 10 degrees": turned(10),
}


def grouped(folder: Path, owner: Callable[[Path], str]) -> list[list[Path]]:
    owners: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        owners[owner(path)].append(path)
    return list(owners.values())


def people(modality: str) -> dict[str, list[list[Path]]]:
    """set -> the pictures of each person or finger."""
    folder = data_folder()
    if modality == "face":
        lfw = [paths[:3] for paths in grouped(folder / "faces/lfw", lambda path: path.parent.name) if len(paths) > 1]
        return {
            "LFW": lfw,
            "MEDS": grouped(folder / "faces/meds", lambda path: path.name.split("-")[0]),
            "ORL": grouped(folder / "faces/orl", lambda path: path.parent.name),
            "Yale": grouped(folder / "faces/yale", lambda path: path.name.split(".")[0]),
        }
    sets = {name: grouped(folder / f"fingers/fvc2002/{name}", _finger) for name in ("DB1_B", "DB2_B", "DB3_B", "DB4_B")}
    return sets | {"UareU": grouped(folder / "fingers/uareu", _finger)}


def _finger(path: Path) -> str:
    return path.name.rpartition("_")[0]


def capture(modality: str, image: Picture) -> bd.Face | bd.Finger:
    if modality == "face":
        return bd.Face(np.ascontiguousarray(image))
    return bd.Finger(np.ascontiguousarray(image), position="right_index", dpi=500)


def embeddings(extractor: bd.Extractor, modality: str, images: list[Picture]) -> Iterator[Any]:
    """None for a picture that is refused."""
    for result in extractor.extract([capture(modality, image) for image in images]):
        yield result.embedding if isinstance(result, bd.Template) else None


def figures(modality: str, limit: float, sets: dict[str, list[list[Picture]]]) -> dict[str, Any]:
    """Share of copies that reach the limit, by way; pairs of different captures that do, by set."""
    shown: dict[str, Any] = {}
    copies: dict[str, list[float]] = {way: [] for way in WAYS}
    with bd.Extractor(bd.Config()) as extractor:
        for name, owners in sets.items():
            mated = []
            for images in owners:
                first, *others = embeddings(extractor, modality, images)
                kept = [one for one in (first, *others) if one is not None]
                mated += [float(one @ other) for one, other in combinations(kept, 2)]
                if first is None:
                    continue
                changed = embeddings(extractor, modality, [way(images[0]) for way in WAYS.values()])
                for way, vector in zip(WAYS, changed, strict=True):
                    if vector is not None:
                        copies[way].append(float(first @ vector))
            if mated:
                reached = int(np.sum(np.array(mated) >= limit))
                shown[f"{name}: different captures at the limit"] = f"{reached} of {len(mated)}; most {max(mated):.3f}"
    for way, values in copies.items():
        shown[f"{way}: share found"] = f"{np.mean(np.array(values) >= limit):.3f} of {len(values)}"
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    cards = {"face": load_card("sface"), "finger": load_card("finger256")}
    for modality, card in cards.items():
        assert card.replay is not None
        if options.smoke:
            sets = {"portrait": [[data.astronaut()]]} if modality == "face" else {}
        else:
            mode, half = ("RGB" if modality == "face" else "L"), 0 if options.tuning else 1
            sets = {
                name: [
                    [np.asarray(Image.open(path).convert(mode)) for path in paths] for paths in owners[half::2][:120]
                ]
                for name, owners in people(modality).items()
            }
        if sets:
            record(
                f"replay of a {modality}",
                {"limit": card.replay, **figures(modality, card.replay, sets)},
                keep=not options.smoke,
            )


if __name__ == "__main__":
    main()
