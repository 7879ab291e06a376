"""Measures the mean embedding and the calibration of the shipped face model on LFW, and writes them into its card.

    python models/measure_face_card.py [--half]

Statistics of a population, no training: 128 means, a spread, and the law of mated similarities. `--half` fits on one half
of the identities and reports on the other, so that what the fit flatters can be seen; it writes nothing.
Needs the faces (BIODEDUP_DATA) and about two minutes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from cardfile import data_folder, write_measured
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.mixture import GaussianMixture

from biodedup.capture.face import AlignedFace, FaceDetector
from biodedup.capture.formats import Pixels, decode
from biodedup.config import CaptureConfig, FaceConfig
from biodedup.embed.cards import load_card
from biodedup.embed.network import EmbeddingNetwork

DOUBLES = {  # photographs that stand under two names
    frozenset(pair)
    for pair in (
        ("Bart_Hendricks", "Ricky_Ray"),
        ("Emmy_Rossum", "Eva_Amurri"),
        ("Gabrielle_Rose", "Martha_Bowen"),
        ("Andrew_Caldecott", "Andrew_Gilligan"),
    )
}

OUTLIER_DB = -20.0
"""One mated capture in a hundred shows something else (another face, a profile): no face speaks against a mate by more."""


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


def pairs(paths: list[Path], vectors: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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
    return mated, cosines[~doubled]


def centred(vectors: NDArray[np.float32], mean: NDArray[np.float32]) -> NDArray[np.float32]:
    moved = vectors - mean
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def calibration(mated: NDArray[np.float64], nonmated: NDArray[np.float64]) -> dict[str, float | str | list[float]]:
    """The card's table. Non-mated: a normal law with the spread that the measured tail at 1e-5 implies, wider than the
    bulk's. Mated: two normal components."""
    mean = float(nonmated.mean())
    sd = float((np.quantile(nonmated, 1 - 1e-5) - mean) / norm.isf(1e-5))
    mixture = GaussianMixture(2, random_state=0).fit(mated[:, None])
    score = np.round(np.arange(-0.4, 1.001, 0.02), 2)
    nonmated_db = -10 / np.log(10) * norm.logsf(score, mean, sd)
    ratio = (mixture.score_samples(score[:, None]) - norm.logpdf(score, mean, sd)) * 10 / np.log(10)
    # Below the crossing a wide mated component would speak for a mate again at very low scores: keep it falling.
    llr_db = np.maximum.accumulate(np.clip(np.minimum.accumulate(ratio[::-1])[::-1], OUTLIER_DB, None))
    return {
        "score": score.tolist(),
        "llr_db": llr_db.tolist(),
        "nonmated_db": nonmated_db.tolist(),
        "measured_db": float(10 * np.log10(len(nonmated))),
        "source": f"LFW, {len(nonmated)} non-mated and {len(mated)} mated pairs; non-mated normal({mean:.4f}, {sd:.4f})",
    }


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
    tested = ~fitted if half else fitted
    mated, nonmated = pairs([path for path, use in zip(paths, tested, strict=True) if use], moved[tested])
    threshold = np.quantile(nonmated, 1 - 1e-4)
    print(
        f"non-mated: mean {nonmated.mean():.4f}, sd {nonmated.std():.4f}, {len(nonmated)} pairs; mean's norm {np.linalg.norm(mean):.3f}"
    )
    print("mated: 1, 5, 50 % at", np.quantile(mated, [0.01, 0.05, 0.5]).round(3), f"{len(mated)} pairs")
    print(f"FNMR at FMR 1e-4: {np.mean(mated < threshold):.2%}, threshold {threshold:.4f}")
    if not half:
        write_measured(
            Path(__file__).with_name("sface.toml"),
            {"measured": {"mean": mean.tolist()}, "calibration": calibration(mated, nonmated)},
        )


if __name__ == "__main__":
    main()
