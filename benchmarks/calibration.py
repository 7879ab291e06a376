"""Compares the nominal FMR of calibrated scores with the measured FMR, on data that was not used for the fit.

    python benchmarks/calibration.py --folder cache    faces, fingers, and both, chimeric; half an hour, later runs a minute
    python benchmarks/calibration.py --smoke           a few generated fingers, no data needed; keeps no result

A figure is the measured FMR at 20, 30 and 40 dB, as a multiple of the nominal one, with the exact 95 % interval of independent pairs
(Clopper and Pearson, 1934). Pairs of one subject are not independent, so that true intervals are wider. A rate with fewer than ten expected
matches in a set is left out.

Faces: fitted on one half of LFW's identities, measured on the other; then the shipped table on sets that it never saw. Fingers: each set by
tables fitted on the others (embedding, minutiae, both), and generated fingers by the shipped tables. Fused: faces of the second
half joined at random with fingers of a set that was left out (chimeras). Moved: the table is moved to the impostor scores of half of the
people of a set, as in a gallery of these people. Own strangers: the table is fitted again on these impostor scores without labels, as
`calibrate GALLERY` does. Both are measured on the other half: the mean and the range of twenty such halvings. `folder` keeps all scores; needs the real
data (BIODEDUP_DATA).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from report import data_folder, record

import biodedup as bd
from biodedup.embed.cards import load_card
from biodedup.match.prints.minutiae import CylinderMatcher
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.calibrations import moved
from biodedup.match.scores.fitting import COSINE_POWER, NONMATED_MIN, Nonmates, fit, measured_fmr, refit
from biodedup.match.scores.fusion import fused_score_db
from biodedup.synthetic import draw_impression, draw_master

FACES = {"meds": ("faces/meds/*.jpg", "-"), "orl": ("faces/orl/*/*.pgm", "/"), "yale": ("faces/yale/*.jpg", ".")}
FINGERS = {
    "fvc2002/DB1_B": 500, "fvc2002/DB2_B": 569, "fvc2002/DB3_B": 500, "fvc2002/DB4_B": 500, "uareu": 512, "socofing": 200,
}  # fmt: skip
DOUBLES = (
    {"Bart_Hendricks", "Ricky_Ray"},
    {"Emmy_Rossum", "Eva_Amurri"},
    {"Gabrielle_Rose", "Martha_Bowen"},
    {"Andrew_Caldecott", "Andrew_Gilligan"},
)
NOMINAL_DB = (20, 30, 40)
EXPECTED_MIN = 10
HALVINGS, PEOPLE_MIN = 20, 30
GENERATED_SEED, JOIN_SEED = 4711, 1
JOINED = 2_000_000
BATCH = 32
Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """All pairs of a set, as far as they count. a, b: whose the two are."""

    similarity: Float64
    minutiae: Float64
    a: NDArray[np.int64]
    b: NDArray[np.int64]

    @property
    def mated(self) -> NDArray[np.bool_]:
        return self.a == self.b

    @property
    def impostors(self) -> Float64:
        """Their similarities."""
        return self.similarity[~self.mated]

    def of(self, people: NDArray[np.bool_]) -> Scores:
        """Pairs of these people. people: bool, by number."""
        kept = people[self.a] & people[self.b]
        return Scores(self.similarity[kept], self.minutiae[kept], self.a[kept], self.b[kept])

    def nonmates(self, name: str, values: Float64) -> Nonmates:
        apart = ~self.mated
        return Nonmates(name, values[apart], self.a[apart], self.b[apart])


def scored(
    captures: Sequence[bd.Face | bd.Finger], owners: Sequence[str], config: bd.Config, cache: Path | None
) -> Scores:
    """All pairs of the captures that are accepted; kept in cache."""
    if cache is not None and cache.exists():
        with np.load(cache) as kept:
            return Scores(**kept)
    extractor = bd.Extractor(config)
    results = [r for i in range(0, len(captures), BATCH) for r in extractor.extract(captures[i : i + BATCH])]
    kept_pairs = [(r, owner) for r, owner in zip(results, owners, strict=True) if isinstance(r, bd.Template)]
    of = np.unique([owner for _, owner in kept_pairs], return_inverse=True)[1].astype(np.int64)
    vectors = np.array([template.embedding for template, _ in kept_pairs])
    records = [template.minutiae for template, _ in kept_pairs]
    a, b = np.triu_indices(len(of), 1)
    minutiae = np.zeros(len(a))
    if all(record is not None for record in records):
        compare = CylinderMatcher().compare
        parts = [compare(one, records[i + 1 :]) for i, one in enumerate(records[:-1])]
        minutiae = np.concatenate(parts).astype(np.float64)
    found = Scores((vectors @ vectors.T)[a, b].astype(np.float64), minutiae, of[a], of[b])
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, similarity=found.similarity, minutiae=found.minutiae, a=found.a, b=found.b)
    return found


def rates(name: str, score_db: Float64) -> dict[str, str]:
    figures = {}
    for nominal_db in NOMINAL_DB:
        one = measured_fmr(score_db, nominal_db)
        if one.pairs * one.nominal >= EXPECTED_MIN:
            bounds = f"[{one.low / one.nominal:.2f}, {one.high / one.nominal:.2f}]"
            figures[f"{name}: FMR at {nominal_db} dB"] = f"{one.ratio:.2f} times nominal {bounds}, {one.pairs} pairs"
    return figures


def in_halves(name: str, one: Scores, score_db_by: Callable[[Scores, Scores], Float64]) -> dict[str, str]:
    """score_db_by: (people to go by, others) -> score_db of the others' non-mated pairs."""
    people, found, pairs = 1 + int(max(one.a.max(), one.b.max())), [], []
    for seed in range(HALVINGS):
        half = np.random.default_rng(seed).permutation(people) < people // 2
        fitted, others = one.of(half), one.of(~half)
        if np.count_nonzero(~fitted.mated) < NONMATED_MIN:
            continue
        score_db = score_db_by(fitted, others)
        found.append([measured_fmr(score_db, nominal_db).ratio for nominal_db in NOMINAL_DB])
        pairs.append(len(score_db))
    return {
        f"{name}: FMR at {nominal_db} dB": f"{np.mean(ratios):.2f} times nominal, {min(ratios):.2f} to {max(ratios):.2f}"
        for nominal_db, ratios in zip(NOMINAL_DB if found else (), zip(*found, strict=True), strict=True)
        if np.mean(pairs) * 10 ** (-nominal_db / 10) >= EXPECTED_MIN
    }


def refitted(table: Mapping[str, Any], one: Scores, values: Float64, power: float) -> Calibration:
    return Calibration.from_card(refit(table, [one.nonmates("", values)], source="", power=power, replicates=2))


def faces(folder: Path | None, config: bd.Config) -> tuple[dict[str, str], Calibration, Float64]:
    """(figures, the table of the first half of LFW, non-mated similarities of the second)."""
    paths = sorted((data_folder() / "faces" / "lfw").glob("*/*.jpg"))
    names = sorted({path.parent.name for path in paths})
    number = {name: i for i, name in enumerate(names)}
    figures, halves = {}, []
    for half in (0, 1):
        # who stands under two names is left out
        some = [path for path in paths if number[path.parent.name] % 2 == half]
        some = [path for path in some if not any(path.parent.name in pair for pair in DOUBLES)]
        owners = [path.parent.name for path in some]
        halves.append(scored([bd.Face(path) for path in some], owners, config, folder and folder / f"lfw{half}.npz"))
    shipped = load_card("sface").calibration
    assert shipped is not None
    knots = np.array(shipped["score"], np.float64)
    first, second = halves
    mated = first.similarity[first.mated]
    table = Calibration.from_card(
        fit([mated], [first.nonmates("LFW", first.similarity)], knots, source="LFW, one half", power=COSINE_POWER)
    )
    others = second.nonmates("LFW", second.similarity).scores
    figures |= rates("face, LFW, other half", table.score_db(others))
    for name, (pattern, separator) in FACES.items():
        paths = sorted(data_folder().glob(pattern))
        owners = [path.parent.name if separator == "/" else path.name.split(separator)[0] for path in paths]
        found = scored([bd.Face(path) for path in paths], owners, config, folder and folder / f"{name}.npz")
        score_db = Calibration.from_card(shipped).score_db(found.similarity[~found.mated])
        figures |= rates(f"face, {name}, shipped table", score_db)

        def by_own(fitted: Scores, others: Scores) -> Float64:
            own = refitted(shipped, fitted, fitted.similarity, COSINE_POWER)
            return own.score_db(others.impostors)

        def by_moving(half: Scores, others: Scores) -> Float64:
            there = moved(Calibration.from_card(shipped), half.impostors, "")
            return there.score_db(others.impostors)

        figures |= in_halves(f"face, {name}, moved", found, by_moving)
        figures |= in_halves(f"face, {name}, own strangers", found, by_own)
    return figures, table, others


def finger_set(name: str, dpi: float, folder: Path | None, config: bd.Config) -> Scores:
    paths = sorted((data_folder() / "fingers" / name).glob("*.png"))
    if name == "socofing":  # a finger has one impression, in a drawn frame
        images = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)[2:-4, 2:-4] for path in paths]
        captures, owners = [bd.Finger(image, dpi=dpi) for image in images], [path.stem for path in paths]
    else:
        captures = [bd.Finger(path, dpi=dpi) for path in paths]
        owners = [path.stem.rpartition("_")[0] for path in paths]
    return scored(captures, owners, config, folder and folder / f"{name.replace('/', '_')}.npz")


def generated(count: int, folder: Path | None, config: bd.Config) -> Scores:
    """Two impressions each of generated fingers."""
    captures, owners = [], []
    for finger in range(count if folder is None or not (folder / "generated.npz").exists() else 0):
        rng = np.random.default_rng([GENERATED_SEED, finger])
        master = draw_master(rng)
        captures += [bd.Finger(draw_impression(rng, master).image, dpi=500) for _ in range(2)]
        owners += [str(finger)] * 2
    return scored(captures, owners, config, folder and folder / "generated.npz")


@dataclass(frozen=True, eq=False)
class Tables:
    """How a finger's embedding, its minutiae, and the sum of both llr_db are calibrated."""

    embedding: Calibration
    minutiae: Calibration
    both: Calibration

    def summed(self, one: Scores) -> Float64:
        return self.embedding.llr_db(one.similarity) + self.minutiae.llr_db(one.minutiae)

    def rates(self, name: str, one: Scores) -> dict[str, str]:
        apart = ~one.mated
        figures = rates(f"{name}, embedding", self.embedding.score_db(one.similarity[apart]))
        figures |= rates(f"{name}, minutiae", self.minutiae.score_db(one.minutiae[apart]))
        return figures | rates(f"{name}, both", self.both.score_db(self.summed(one)[apart]))


def shipped_tables() -> Tables:
    embedding, minutiae = load_card("finger256"), load_card("skeleton_cylinders")
    assert embedding.calibration is not None and minutiae.calibration is not None
    both = embedding.both[minutiae.model_id]
    return Tables(*(Calibration.from_card(table) for table in (embedding.calibration, minutiae.calibration, both)))


def fitted_tables(sets: Mapping[str, Scores]) -> Tables:
    """At the shipped tables' knots."""
    shipped = shipped_tables()

    def table(values: Mapping[str, Float64], like: Calibration, power: float) -> Calibration:
        mated = [values[name][one.mated] for name, one in sets.items() if one.mated.any()]
        nonmated = [one.nonmates(name, values[name]) for name, one in sets.items()]
        return Calibration.from_card(
            fit(mated, nonmated, like.score, source=", ".join(sets), power=power, replicates=2)
        )

    embedding = table({name: one.similarity for name, one in sets.items()}, shipped.embedding, COSINE_POWER)
    minutiae = table({name: one.minutiae for name, one in sets.items()}, shipped.minutiae, 1.0)
    first = Tables(embedding, minutiae, shipped.both)
    return Tables(
        embedding, minutiae, table({name: first.summed(one) for name, one in sets.items()}, shipped.both, 1.0)
    )


def fingers_moved(name: str, one: Scores, tables: Tables) -> dict[str, str]:
    """tables: of other sets."""

    def there(half: Scores) -> Tables:
        return replace(tables, embedding=moved(tables.embedding, half.impostors, ""))

    def by_embedding(half: Scores, others: Scores) -> Float64:
        return there(half).embedding.score_db(others.impostors)

    def by_both(half: Scores, others: Scores) -> Float64:
        return tables.both.score_db(there(half).summed(others)[~others.mated])

    return in_halves(f"finger, {name} left out, embedding, moved", one, by_embedding) | in_halves(
        f"finger, {name} left out, both, moved", one, by_both
    )


def fingers_on_own_impostors(name: str, one: Scores) -> dict[str, str]:
    embedding, minutiae = load_card("finger256"), load_card("skeleton_cylinders")
    added, both = Calibration.from_card(minutiae.calibration), embedding.both[minutiae.model_id]

    def by_minutiae(fitted: Scores, others: Scores) -> Float64:
        own = refitted(minutiae.calibration, fitted, fitted.minutiae, 1.0)
        return own.score_db(others.minutiae[~others.mated])

    def by_both(fitted: Scores, others: Scores) -> Float64:
        alone = refitted(embedding.calibration, fitted, fitted.similarity, COSINE_POWER)

        def summed(some: Scores) -> Float64:
            return alone.llr_db(some.similarity) + added.llr_db(some.minutiae)

        return refitted(both, fitted, summed(fitted), 1.0).score_db(summed(others)[~others.mated])

    return in_halves(f"finger, {name}, own strangers, minutiae", one, by_minutiae) | in_halves(
        f"finger, {name}, own strangers, both", one, by_both
    )


def fused(name: str, face: Calibration, faces: Float64, tables: Tables, finger: Scores) -> dict[str, str]:
    """A face and one or two fingers, of pairs of impostors joined by chance."""
    rng = np.random.default_rng(JOIN_SEED)
    fingers_db = tables.both.llr_db(tables.summed(finger)[~finger.mated])
    total = face.llr_db(rng.choice(faces, JOINED))
    figures = {}
    for count in (1, 2):
        total = total + rng.choice(fingers_db, JOINED)
        score_db, _ = fused_score_db(total, (face, *[tables.both] * count))
        figures |= rates(f"chimeric, face and {count} of {name}", score_db)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--folder", type=Path, help="where scores are kept")
    parser.add_argument("--fingers", type=int, default=200, help="generated fingers")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    config = bd.Config()
    if options.smoke:
        record("calibration", shipped_tables().rates("generated fingers", generated(36, None, config)), keep=False)
        return
    figures: dict[str, Any] = {}
    told, face, impostors = faces(options.folder, config)
    figures |= told
    sets = {name: finger_set(name, dpi, options.folder, config) for name, dpi in FINGERS.items()}
    for name, one in sets.items():
        tables = fitted_tables({other: sets[other] for other in sets if other != name})
        figures |= tables.rates(f"finger, {name} left out", one)
        figures |= fused(name, face, impostors, tables, one)
        if len(np.unique(one.a)) >= PEOPLE_MIN:
            figures |= fingers_moved(name, one, tables)
            half = np.random.default_rng(0).permutation(1 + int(one.b.max())) % 2 > 0
            there = replace(tables, embedding=moved(tables.embedding, one.of(half).impostors, ""))
            figures |= fused(f"{name}, moved", face, impostors, there, one.of(~half))
            figures |= fingers_on_own_impostors(name, one)
    figures |= shipped_tables().rates("generated fingers", generated(options.fingers, options.folder, config))
    record("calibration", figures, keep=True)


if __name__ == "__main__":
    main()
