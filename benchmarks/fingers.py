"""How well fingers are told apart: embedding, minutiae and both, on real captures.

    python benchmarks/fingers.py verify                   equal error rates, FVC protocol
    python benchmarks/fingers.py identify --fillers 20000 where a finger's mates rank in a gallery
    python benchmarks/fingers.py verify --minutiae mindtct
    python benchmarks/fingers.py verify --limit 3         three fingers a set; keeps no result

FVC protocol: mated, all pairs of a finger's 8 impressions; non-mated, the first impressions across the fingers of a set. Everything goes
through `Extractor` with its quality gate; rates are of accepted captures, and with a refused one as a mate that scores nothing. `identify` searches all later
impressions of UareU among the first impressions of every set, SOCOFing and generated fingers that the network never saw.
Needs the real data (BIODEDUP_DATA).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from report import data_folder, record

import biodedup as bd
from biodedup.capture.fingers.oriented import RIDGE_DPI
from biodedup.capture.fingers.ridges import ridge_map
from biodedup.embed.cards import joint_id, load_card, minutiae_card, shipped_cards
from biodedup.embed.finger_input import FingerInput, finger_input
from biodedup.embed.finger_network import FingerNetwork
from biodedup.match.scores.calibrations import Calibrations
from biodedup.match.staged import FINGER_FROM_DB
from biodedup.synthetic import draw_impression, draw_master

SETS = {
    "fvc2002/DB1_B": 500, "fvc2002/DB2_B": 569, "fvc2002/DB3_B": 500, "fvc2002/DB4_B": 500, "uareu": 512, "sfinge_demo": 500,
}  # fmt: skip
FILLER_SEED, DRAWN = 77, 100  # models/finger_data.py draws from other seeds
BATCH = 32
Float64 = NDArray[np.float64]


def read_set(extractor: bd.Extractor, name: str, dpi: float, limit: int | None) -> dict[str, list[bd.Template | None]]:
    """Finger -> templates of its impressions, None where refused."""
    groups: dict[str, list[bd.Finger]] = {}
    for path in sorted((data_folder() / "fingers" / name).glob("*.png")):
        groups.setdefault(path.stem.rpartition("_")[0], []).append(bd.Finger(path, dpi=dpi))
    kept = dict(list(groups.items())[:limit])
    captures = [capture for group in kept.values() for capture in group]
    results = [r for i in range(0, len(captures), BATCH) for r in extractor.extract(captures[i : i + BATCH])]
    each = iter(r if isinstance(r, bd.Template) else None for r in results)
    return {finger: [next(each) for _ in group] for finger, group in kept.items()}


Pair = tuple[bd.Template | None, bd.Template | None]


def pairs_of(fingers: dict[str, list[bd.Template | None]]) -> tuple[list[Pair], list[Pair]]:
    """(mated, non-mated) of the FVC protocol."""
    mated = [(a, b) for prints in fingers.values() for i, a in enumerate(prints) for b in prints[i + 1 :]]
    firsts = [prints[0] for prints in fingers.values()]
    return mated, [(a, b) for i, a in enumerate(firsts) for b in firsts[i + 1 :]]


def scores(pairs: Sequence[Pair]) -> dict[str, Float64]:
    """What is compared -> raw scores, -inf where a capture was refused."""
    found: dict[str, list[float]] = {"embedding": [], "minutiae": [], "both": []}
    for a, b in pairs:
        result = None if a is None or b is None else bd.compare(a, b)
        for name in found:
            value: float | None
            if result is None:
                value = None
            else:
                value = {"embedding": result.similarity, "minutiae": result.minutiae, "both": result.llr_db}[name]
            found[name].append(-np.inf if value is None else float(value))
    return {name: np.array(values) for name, values in found.items()}


def equal_error_rate(mated: Float64, nonmated: Float64) -> float:
    """Where the share of mates below a threshold meets that of non-mates at or above it."""
    thresholds = np.unique(np.concatenate([mated, nonmated]))
    fnmr = np.searchsorted(np.sort(mated), thresholds) / len(mated)
    fmr = 1 - np.searchsorted(np.sort(nonmated), thresholds) / len(nonmated)
    at = int(np.argmin(np.abs(fnmr - fmr)))
    return float(fnmr[at] + fmr[at]) / 2


def verify(limit: int | None, minutiae: str) -> dict[str, Any]:
    extractor = bd.Extractor(bd.Config(finger=bd.FingerConfig(minutiae=minutiae)))
    figures: dict[str, Any] = {"minutiae": minutiae}
    means: dict[str, list[tuple[float, float]]] = {}
    real: list[dict[str, Float64]] = []
    for name, dpi in SETS.items():
        fingers = read_set(extractor, name, dpi, limit)
        mated, nonmated = map(scores, pairs_of(fingers))
        real += [mated] if name != "sfinge_demo" else []
        refused = sum(template is None for prints in fingers.values() for template in prints)
        figures[f"{name}: refused"] = f"{refused} of {sum(map(len, fingers.values()))}"
        for what in mated:
            accepted = equal_error_rate(*(v[np.isfinite(v)] for v in (mated[what], nonmated[what])))
            as_misses = equal_error_rate(mated[what], nonmated[what][np.isfinite(nonmated[what])])
            means.setdefault(what, []).append((accepted, as_misses))
            figures[f"{name}: EER {what}"] = f"{accepted:.2%}, refusals as misses {as_misses:.2%}"
    for what, rates in means.items():
        accepted, as_misses = np.mean(rates[:4], axis=0)
        figures[f"FVC2002 mean: EER {what}"] = f"{accepted:.2%}, refusals as misses {as_misses:.2%}"
    return figures | left_out({what: np.concatenate([one[what] for one in real]) for what in means})


def left_out(mated: dict[str, Float64]) -> dict[str, str]:
    """Of mated pairs that reach so many dB by embedding and minutiae, those whose minutiae a search does not compare (match/staged.py)."""
    model_id = joint_id(load_card("finger256"), minutiae_card("skeleton"))
    accepted = np.isfinite(mated["both"])
    by_embedding = Calibrations(shipped_cards()).of(model_id).llr_db(mated["embedding"][accepted])
    lost = {
        least: by_embedding[mated["both"][accepted] >= least] < FINGER_FROM_DB for least in (50, 55, 60, 65, 70, 75)
    }
    return {f"mates from {least} dB: not compared": f"{np.count_nonzero(w)} of {len(w)}" for least, w in lost.items()}


def drawn(number: int, folder: Path | None) -> list[FingerInput]:
    """What the network sees of DRAWN generated fingers, half of them the others' mirror images, an impression each; kept in folder,
    for networks to come."""
    path = folder and folder / f"fillers-{number:04}.npz"
    if path and path.exists():
        with np.load(path) as kept:
            return [FingerInput(d, m, (0, 0)) for d, m in zip(kept["directions"], kept["minutiae"], strict=True)]
    rng = np.random.default_rng([FILLER_SEED, number])
    masters = [draw_master(rng) for _ in range(DRAWN // 2)]
    masters += [
        replace(m, ridges=m.ridges[:, ::-1], core=(m.ridges.shape[1] - 1 - m.core[0], m.core[1])) for m in masters
    ]
    prints = [finger_input(ridge_map(draw_impression(rng, master, RIDGE_DPI).image)) for master in masters]
    if path:
        directions, minutiae = np.stack([one.directions for one in prints]), np.stack([one.minutiae for one in prints])
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, directions=directions, minutiae=minutiae)
        unfinished.rename(path)
    return prints


def embedded(number: int, folder: Path | None) -> NDArray[np.float32]:
    cv2.setNumThreads(1)
    return FingerNetwork(load_card("finger256"), 1).embed(drawn(number, folder))


def fillers(count: int, folder: Path | None) -> NDArray[np.float32]:
    """Embeddings of generated fingers."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = pool.map(embedded, range(-(-count // DRAWN)), repeat(folder))
        return np.concatenate([np.zeros((0, 256), np.float32), *rows])[:count]


def identify(limit: int | None, count: int, folder: Path | None) -> dict[str, Any]:
    extractor = bd.Extractor()
    gallery, names, probes, owners = [], [], [], []
    for name, dpi in SETS.items():
        for finger, prints in read_set(extractor, name, dpi, limit).items():
            if prints[0] is not None:
                gallery.append(prints[0].embedding)
                names.append(f"{name}/{finger}")
                if name == "uareu":
                    kept = [template.embedding for template in prints[1:] if template is not None]
                    probes += kept
                    owners += [len(names) - 1] * len(kept)
    others = sorted((data_folder() / "fingers" / "socofing").glob("*.png"))[: limit and 10 * limit]
    for i in range(0, len(others), BATCH):
        # without its drawn frame
        pictures = [
            np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))[2:-4, 2:-4] for path in others[i : i + BATCH]
        ]
        found = extractor.extract([bd.Finger(picture, dpi=200) for picture in pictures])
        gallery += [template.embedding for template in found if isinstance(template, bd.Template)]
    everybody = np.concatenate([np.array(gallery, np.float32), fillers(count, folder)])
    scored = np.array(probes) @ everybody.T
    before = (scored > scored[np.arange(len(owners)), owners][:, None]).sum(axis=1)
    share = before / len(everybody)
    return {
        "gallery": len(everybody),
        "mated searches": len(before),
        "mate first": f"{np.mean(before == 0):.2%}",
        "mate in the first 100": f"{np.mean(before < 100):.2%}",
        "mate in the first 1 %": f"{np.mean(share < 0.01):.2%}",
        "share that holds 99 % of mates": f"{np.quantile(share, 0.99):.2%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("verify", "identify"), nargs="?", default="verify")
    parser.add_argument("--minutiae", choices=("skeleton", "mindtct", "leader"), default="skeleton")
    parser.add_argument("--limit", type=int, help="fewer fingers a set")
    parser.add_argument("--fillers", type=int, default=20_000, help="generated fingers in the gallery")
    parser.add_argument("--folder", type=Path, help="where the generated fingers are kept")
    options = parser.parse_args()
    if options.what == "verify":
        record("fingers-verify", verify(options.limit, options.minutiae), keep=options.limit is None)
    else:
        figures = identify(options.limit, options.fillers, options.folder)
        record("fingers-identify", figures, keep=options.limit is None)


if __name__ == "__main__":
    main()
