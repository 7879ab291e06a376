"""Measures the mean embedding and the calibration of the shipped face model on LFW, and writes them into its card.

    python models/measure_face_card.py [--half]

Statistics of a population, no training: 128 means, and the distributions of mated and non-mated similarities (`biodedup.match.scores.fitting`).
`--half` fits on one half of the identities and reports on the other, to show the bias of the fit; it writes nothing.
Needs the faces (BIODEDUP_DATA) and about two minutes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cardfile import data_folder, write_measured
from numpy.typing import NDArray

from biodedup.capture.faces.face import AlignedFace, FaceDetector
from biodedup.capture.pictures.formats import Pixels, decode
from biodedup.config import CaptureConfig, FaceConfig
from biodedup.embed.cards import load_card
from biodedup.embed.network import EmbeddingNetwork
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.fitting import COSINE_POWER, Nonmates, fit, measured_fmr

DOUBLES = {  # photographs that stand under two names
    frozenset(pair)
    for pair in (
        ("Bart_Hendricks", "Ricky_Ray"),
        ("Emmy_Rossum", "Eva_Amurri"),
        ("Gabrielle_Rose", "Martha_Bowen"),
        ("Andrew_Caldecott", "Andrew_Gilligan"),
    )
}

KNOTS = np.round(np.arange(-0.4, 1.001, 0.02), 2)


def embeddings(folder: Path) -> tuple[list[Path], NDArray[np.float32]]:
    """Paths of the faces that pass the gate, and their unit embeddings before the mean is removed."""
    card = replace(load_card("sface"), mean=None)
    network = EmbeddingNetwork(card, threads=2)
    weights = load_card("yunet").weights
    assert weights is not None
    detector = FaceDetector(FaceConfig(), weights)
    paths, images = [], []
    for path in sorted(folder.glob("*/*.jpg")):
        pixels = decode(path, "face", CaptureConfig())
        face = detector.align(pixels) if isinstance(pixels, Pixels) else pixels
        if isinstance(face, AlignedFace):
            paths.append(path)
            images.append(face.image)
    return paths, network.embed(np.stack(images))


def pairs(paths: list[Path], vectors: NDArray[np.float32]) -> tuple[NDArray[np.float64], Nonmates]:
    """Cosines of all mated pairs, and of all non-mated pairs of first images; known doubles left out."""
    names = np.array([path.parent.name for path in paths])
    upper = np.triu_indices(len(names), 1)
    cosines = (vectors @ vectors.T)[upper].astype(np.float64)
    mated = cosines[names[upper[0]] == names[upper[1]]]
    first = np.array([path.stem.endswith("_0001") for path in paths])
    upper = np.triu_indices(int(first.sum()), 1)
    cosines = (vectors[first] @ vectors[first].T)[upper].astype(np.float64)
    a, b = names[first][upper[0]], names[first][upper[1]]
    doubled = np.zeros(len(cosines), bool)
    for one, other in map(sorted, DOUBLES):
        doubled |= ((a == one) & (b == other)) | ((a == other) & (b == one))
    return mated, Nonmates("LFW", cosines[~doubled], upper[0][~doubled], upper[1][~doubled])


def centred(vectors: NDArray[np.float32], mean: NDArray[np.float32]) -> NDArray[np.float32]:
    moved = vectors - mean
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def calibration(mated: NDArray[np.float64], nonmated: Nonmates) -> dict[str, Any]:
    """The card's table."""
    source = f"LFW, {len(nonmated.scores)} non-mated and {len(mated)} mated pairs"
    return fit([mated], [nonmated], KNOTS, source=source, power=COSINE_POWER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", action="store_true", help="fit on half of the identities, report on the others")
    half = parser.parse_args().half
    folder = data_folder() / "faces" / "lfw"
    paths, vectors = embeddings(folder)
    total = len(list(folder.glob("*/*.jpg")))
    print(f"{len(paths)} of {total} images pass the gate; failure to enrol {1 - len(paths) / total:.2%}")
    first = np.array([path.stem.endswith("_0001") for path in paths])
    names = sorted({path.parent.name for path in paths})
    fitted = np.array([not half or names.index(path.parent.name) % 2 == 0 for path in paths])
    mean = vectors[first & fitted].mean(axis=0)
    moved = centred(vectors, mean)
    mated, nonmated = pairs([path for path, use in zip(paths, fitted, strict=True) if use], moved[fitted])
    table = calibration(mated, nonmated)
    if half:
        mated, nonmated = pairs([path for path, use in zip(paths, ~fitted, strict=True) if use], moved[~fitted])
    scores = nonmated.scores
    print(
        f"non-mated: mean {scores.mean():.4f}, sd {scores.std():.4f}, {len(scores)} pairs; mean's norm {np.linalg.norm(mean):.3f}"
    )
    print("mated: 1, 5, 50 % at", np.quantile(mated, [0.01, 0.05, 0.5]).round(3), f"{len(mated)} pairs")
    threshold = np.quantile(scores, 1 - 1e-4)
    print(f"FNMR at FMR 1e-4: {np.mean(mated < threshold):.2%}, threshold {threshold:.4f}")
    score_db = Calibration.from_card(table).score_db(scores)
    for nominal_db in (20, 30, 40, 50):
        found = measured_fmr(score_db, nominal_db)
        print(
            f"nominal FMR {found.nominal:g}: measured {found.measured:.3g} [{found.low:.3g}, {found.high:.3g}]"
            + (" (not fitted)" if half else "")
        )
    if not half:
        measured = {"measured": {"mean": mean.tolist()}, "calibration": table}
        write_measured(Path(__file__).with_name("sface.toml"), measured)


if __name__ == "__main__":
    main()
