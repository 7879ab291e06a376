"""The face quality gate: the share of clean and of damaged pictures that it refuses, by quality and by signs of artefacts.

    python benchmarks/face_gate.py                    odd-numbered identities of LFW, MEDS, ORL, Yale: an hour of one core
    python benchmarks/face_gate.py --people 40        fewer identities of each set
    python benchmarks/face_gate.py --plot curve.svg   also draws the curve of errors against discarded captures
    python benchmarks/face_gate.py --smoke            one portrait that needs no data

Clean: the share refused; FNMR at FMR 1e-4, with the threshold from the set's own impostors, after the captures of lowest quality are discarded.
Damaged (`spoilt` in the figures): a picture of each person in each of `WAYS`; FMR at 40 dB among pairs of accepted pictures of the same way. The gate's limits were chosen on
the even-numbered identities of LFW and on MEDS, ORL and Yale.
"""

from __future__ import annotations

import argparse
import io
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from report import data_folder, record
from skimage import data

import biodedup as bd
from biodedup.capture.pictures.formats import decode
from biodedup.embed.cards import load_card
from biodedup.match.scores.calibration import Calibration
from biodedup.trace import explain
from biodedup.values import Float32

DISCARDED = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
FMR = 1e-4
Picture = np.ndarray[Any, Any]


def noise(deviation: float) -> Callable[[Picture], Picture]:
    return lambda im: np.clip(im + np.random.default_rng(1).normal(0, deviation, im.shape), 0, 255).astype(np.uint8)


def compressed(quality: int) -> Callable[[Picture], Picture]:
    def spoilt(image: Picture) -> Picture:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "JPEG", quality=quality)
        return np.asarray(Image.open(out))

    return spoilt


def lined(period: float, degrees: float, wave: float) -> Callable[[Picture], Picture]:
    def spoilt(image: Picture) -> Picture:
        y, x = np.mgrid[: image.shape[0], : image.shape[1]]
        turn = np.radians(degrees)
        along = x * np.sin(turn) + y * np.cos(turn) + wave * np.sin(x / 9)
        return np.where(
            (np.sin(along * 2 * np.pi / period) > 0.4)[..., None], (image * 0.7 + 76).astype(np.uint8), image
        )

    return spoilt


def dithered(image: Picture) -> Picture:
    return np.asarray(Image.fromarray(image).convert("1").convert("RGB"))


def covered(image: Picture, shade: int = 15, *, mask: bool = True) -> Picture:
    """Glasses of this grey level, and a mask, where the detector finds a face; else as it is."""
    with explain() as steps:
        EXTRACTOR.extract([bd.Face(image)])
    faces = steps.of("face")
    if not faces or faces[0]["image"].shape != image.shape:
        return image
    marks = faces[0]["landmarks"]
    apart = float(np.linalg.norm(marks[1] - marks[0]))
    across = (marks[1] - marks[0]) / apart
    down = np.array([-across[1], across[0]])
    out = np.ascontiguousarray(image).copy()
    for eye in marks[:2]:
        axes, turn = (int(0.42 * apart), int(0.34 * apart)), float(np.degrees(np.arctan2(across[1], across[0])))
        cv2.ellipse(out, tuple(int(v) for v in eye), axes, turn, 0, 360, (shade,) * 3, -1, cv2.LINE_AA)
    if not mask:
        return out
    nose, mouth = marks[2], marks[3:].mean(axis=0)
    cloth = [nose - 0.7 * apart * across, nose, nose + 0.7 * apart * across]
    cloth += [mouth + apart * (side * across + 0.7 * down) for side in (0.5, -0.5)]
    cv2.fillPoly(out, [np.round(cloth).astype(np.int32)], (150, 190, 215), cv2.LINE_AA)
    return out


WAYS: Mapping[str, Callable[[Picture], Picture]] = {
    "as it is": lambda image: image,
    "negative": lambda image: 255 - image,
    "noise 45": noise(45),
    "noise 60": noise(60),
    "1 bit": dithered,
    "wavy lines": lined(9, 0, 6),
    "straight lines": lined(8, 30, 0),
    "JPEG quality 2": compressed(2),
    "JPEG quality 3": compressed(3),
    "glasses and mask": covered,
    "dark glasses": lambda image: covered(image, mask=False),
    "grey glasses": lambda image: covered(image, 45, mask=False),
}
CONFIG = bd.Config()
EXTRACTOR = bd.Extractor(CONFIG)


def pictures(paths: list[Path]) -> list[Picture]:
    decoded = [decode(path, "face", CONFIG.capture) for path in paths]
    return [np.ascontiguousarray(one.rgb) for one in decoded if not isinstance(one, bd.Refusal)]


def clean_sets(people: int | None) -> dict[str, dict[str, list[Path]]]:
    """set -> person -> paths."""
    folder = data_folder() / "faces"
    names = sorted(path for path in (folder / "lfw").iterdir())[1::2]
    sets = {
        "LFW": {path.name: sorted(path.iterdir()) for path in names},
        "MEDS": grouped(folder / "meds", lambda path: path.name.split("-")[0]),
        "ORL": {path.name: sorted(path.glob("*.pgm")) for path in sorted((folder / "orl").iterdir()) if path.is_dir()},
        "Yale": grouped(folder / "yale", lambda path: path.name.split(".")[0]),
    }
    return {name: dict(list(owners.items())[:people]) for name, owners in sets.items()}


def grouped(folder: Path, owner: Callable[[Path], str]) -> dict[str, list[Path]]:
    owners: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        owners.setdefault(owner(path), []).append(path)
    return owners


def clean_figures(owners: Mapping[str, list[Path]]) -> tuple[dict[str, Any], list[float]]:
    """(figures, FNMR for each of DISCARDED)."""
    reasons: Counter[str] = Counter()
    vectors, quality, who = [], [], []
    for index, paths in enumerate(owners.values()):
        for result in EXTRACTOR.extract([bd.Face(path) for path in paths]):
            if isinstance(result, bd.Refusal):
                reasons[result.reason] += 1
            else:
                vectors.append(result.embedding)
                quality.append(result.quality or 0.0)
                who.append(index)
    total = len(who) + sum(reasons.values())
    curve = errors(np.array(vectors, np.float32), np.array(quality), np.array(who))
    return {"pictures": total, "refused": round(sum(reasons.values()) / total, 4), **dict(reasons)}, curve


def errors(vectors: Float32, quality: np.ndarray[Any, Any], who: np.ndarray[Any, Any]) -> list[float]:
    """FNMR at FMR 1e-4 after the captures of least quality are discarded, for each share of DISCARDED."""
    first, second = np.triu_indices(len(vectors), 1)
    scores, same = (vectors @ vectors.T)[first, second], who[first] == who[second]
    least = np.minimum(quality[first], quality[second])
    threshold = np.quantile(scores[~same], 1 - FMR)
    kept = [least >= np.quantile(quality, share) for share in DISCARDED]
    return [round(float(np.mean(scores[same & keep] < threshold)), 4) for keep in kept]


def spoilt_figures(portraits: list[Picture]) -> dict[str, Any]:
    """way -> share accepted, FMR at 40 dB, reasons; and the FMR over all ways together."""
    card = load_card(CONFIG.face.model)
    calibration = Calibration.from_card(card.calibration)
    figures: dict[str, Any] = {}
    alike = pairs = 0
    for way, spoil in WAYS.items():
        results = [EXTRACTOR.extract([bd.Face(np.ascontiguousarray(spoil(image)))])[0] for image in portraits]
        accepted = np.array([r.embedding for r in results if isinstance(r, bd.Template)], np.float32).reshape(-1, 128)
        scores = (accepted @ accepted.T)[np.triu_indices(len(accepted), 1)]
        strong = int(np.count_nonzero(calibration.score_db(scores) >= 40)) if len(scores) else 0
        reasons = Counter(result.reason for result in results if isinstance(result, bd.Refusal))
        figures[way] = {"accepted": len(accepted), "pairs at 40 dB": strong, "pairs": len(scores), **dict(reasons)}
        print(way, figures[way], flush=True)
        if way != "as it is":
            alike, pairs = alike + strong, pairs + len(scores)
    figures["FMR at 40 dB, spoilt"] = round(alike / pairs, 6) if pairs else None
    return figures


def draw(curves: Mapping[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot([100 * share for share in DISCARDED], [100 * rate for rate in curve], marker="o", label=name)
    axes.set(xlabel="captures of least quality discarded, %", ylabel="FNMR at FMR 1e-4, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--people", type=int)
    parser.add_argument("--spoilt", type=int, default=120, help="people whose pictures are spoilt")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.smoke:
        record("face_gate", {"spoilt": spoilt_figures([np.asarray(data.astronaut())])}, keep=False)
        return
    figures: dict[str, Any] = {}
    curves: dict[str, list[float]] = {}
    sets = clean_sets(options.people)
    for name, owners in sets.items():
        figures[name], curves[name] = clean_figures(owners)
        figures[name]["FNMR at FMR 1e-4 after discarding " + ", ".join(map(str, DISCARDED))] = curves[name]
        print(name, figures[name], flush=True)
    if options.plot is not None:
        draw(curves, options.plot)
    people = list(sets["LFW"].values())
    chosen = people[:: max(len(people) // options.spoilt, 1)][: options.spoilt]
    figures["spoilt"] = spoilt_figures(pictures([paths[0] for paths in chosen]))
    record("face_gate", figures, keep=True)


if __name__ == "__main__":
    main()
