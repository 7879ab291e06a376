"""What a secret transform of the stored embeddings costs, and how far two galleries of the same people can be linked without the secrets.

Two encrypted galleries of the same vectors, with and without `GalleryConfig.renewable`: processor time of a batch of 256 and of `rekey`, recall@10
against exact search. A third one holds other captures of the same people (cosine `mated`): cosines between what is stored, and the attack that
aligns the principal axes of two whole galleries. `anisotropy` is how far these differ: variances fall from 1 to 1 / anisotropy.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import biodedup as bd
from biodedup.testing import internals

DIMENSION, KEY, K = 128, bytes(range(32)), 10


def people(rows: int, anisotropy: float, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors about a mean, so that strangers have the cosine 0.08 of SFace."""
    scales = np.sqrt(np.geomspace(1, 1 / anisotropy, DIMENSION))
    vectors = rng.standard_normal((rows, DIMENSION)) * scales
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[:, DIMENSION // 2] += np.sqrt(0.08)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def mates(vectors: np.ndarray, cosine: float, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(vectors.shape)
    noise -= np.einsum("ij,ij->i", noise, vectors)[:, None] * vectors
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return np.asarray(cosine * vectors + np.sqrt(1 - cosine**2) * noise, np.float32)


def load(folder: Path, vectors: np.ndarray, *, renewable: bool) -> bd.Engine:
    config = bd.Config(gallery=bd.GalleryConfig(background=False, renewable=renewable), keys=lambda: KEY)
    engine = bd.Engine.open(folder, config)
    engine.add_templates([str(i) for i in range(len(vectors))], {"face": vectors}, model_id="sface")
    engine.compact()
    return engine


def timed(engine: bd.Engine, probes: np.ndarray, rounds: int) -> tuple[float, np.ndarray]:
    found = engine.search({"face": probes}, k=K).ids
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        engine.search({"face": probes}, k=K)
        seconds.append(time.process_time() - began)
    return min(seconds), found


def stored(engine: bd.Engine) -> np.ndarray:
    """As the files hold them."""
    snapshot = internals(engine).gallery.snapshot()
    columns = [segment.columns["face"] for segment in snapshot.segments]
    return np.concatenate(
        [
            c.vectors(0, c.count) if c.codec.transform is None else c.codec.transform.apply(c.vectors(0, c.count))
            for c in columns
        ]
    )


def aligned(vectors: np.ndarray) -> np.ndarray:
    """In the principal axes about their mean, each with the sign of its third moment."""
    centred = vectors - vectors.mean(axis=0)
    coordinates = centred @ np.linalg.eigh(centred.T @ centred)[1]
    coordinates *= np.sign((coordinates**3).sum(axis=0))
    return coordinates / np.linalg.norm(coordinates, axis=1, keepdims=True)


def linked(one: np.ndarray, other: np.ndarray, probes: int = 200) -> float:
    """Share of rows whose nearest row in the other gallery is the same person's."""
    return float((np.argmax(one[:probes] @ other.T, axis=1) == np.arange(min(probes, len(one)))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--anisotropy", type=float, default=20.0)
    parser.add_argument("--mated", type=float, default=0.7)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    vectors = people(arguments.rows, arguments.anisotropy, rng)
    probes = mates(vectors[:256], 0.8, rng)
    exact = np.argsort(-(probes @ vectors.T), axis=1)[:, :K].astype(str)
    with tempfile.TemporaryDirectory() as folder:
        others = mates(vectors, arguments.mated, rng)
        held = {"plain": vectors, "a": vectors, "b": others}
        engines = {name: load(Path(folder) / name, rows, renewable=name != "plain") for name, rows in held.items()}
        seconds = {}
        for name in ("plain", "a"):
            seconds[name], found = timed(engines[name], probes, arguments.rounds)
            recall = np.mean([len(set(f) & set(e)) / K for f, e in zip(found.tolist(), exact.tolist(), strict=True)])
            print(
                f"{name if name == 'plain' else 'renewable'}: recall@10 {recall:.4f}, batch of 256 {1000 * seconds[name]:.0f} ms of CPU"
            )
        print(f"batch of 256, renewable over plain: {seconds['a'] / seconds['plain']:.2f} x")
        plain, a, b = (stored(engines[name]) for name in ("plain", "a", "b"))
        cosines = np.einsum("ij,ij->i", a, b)
        print(
            f"stored vectors of the same person under two keys: cosine mean {cosines.mean():.3f}, sd {cosines.std():.3f}"
        )
        print(
            f"linked by comparing rows: {linked(a, b):.3f}; by aligned principal axes: {linked(aligned(a), aligned(b)):.3f}"
        )
        began = time.process_time()
        engines["a"].rekey()
        print(f"rekey: {len(vectors) / (time.process_time() - began):.0f} rows a second of CPU")
        moved = np.einsum("ij,ij->i", internals(engines["a"]).gallery.snapshot().sample("face", 5_000), plain[:5_000])
        print(f"cosine of a row before and after: lowest {moved.min():.5f}")
        for engine in engines.values():
            engine.close()


if __name__ == "__main__":
    main()
