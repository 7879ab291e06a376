"""A fresh gallery: how often a person who is not enrolled comes out `duplicate`, while the gallery has few people or none.

    python benchmarks/fresh_gallery.py --folder cache     MEDS, ORL, Yale, UareU, LFW; some minutes, of which extraction the most
    python benchmarks/fresh_gallery.py --smoke            synthetic faces, no data needed; keeps no result

A set's people are drawn and put in an order by chance, again and again, for galleries of 4 to 300 people. Each comes once, by a capture
drawn by chance, and is enrolled into a gallery that was empty: a first encounter. Then another capture of each who was enrolled is searched
for. UareU's fingers are taken for people with one finger each. LFW, on which the face card was fitted, is there for galleries that
the others are too small for.

Told of each set: first encounters, how many came out `duplicate` (the figure that counts: at most 1 in 1,000; with the 95 % upper
bound of Clopper and Pearson, as if encounters were independent) and how many `review`; mates that came out `duplicate`, that were
found (`duplicate` or `review`), and how many were searched for. `another camera`: LFW's faces with something added that all have in
common, so that all impostors are more alike by this much (cosine): what a camera that nobody knows may do.

`folder` keeps the templates; needs the real data (BIODEDUP_DATA).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from report import data_folder, record
from scipy.stats import beta

import biodedup as bd
from biodedup.embed.cards import load_card

SIZES = (4, 6, 8, 12, 16, 24, 32, 48, 64, 100, 150, 200, 300)
ENCOUNTERS = 4_000
"""First encounters of each set, at least."""
SEED = 21
CAMERAS = (0.05, 0.1, 0.15, 0.2)
BATCH = 32
PATTERNS = {
    "meds": ("faces/meds/*.jpg", "-"),
    "orl": ("faces/orl/*/*.pgm", "/"),
    "yale": ("faces/yale/*.jpg", "."),
    "uareu": ("fingers/uareu/*.png", "_"),
    "lfw": ("faces/lfw/*/*_000[1-3].jpg", "/"),
}
DOUBLES = {
    "Bart_Hendricks", "Emmy_Rossum", "Gabrielle_Rose", "Andrew_Caldecott", "Raul_Ibanez",
    "Bison_Dele", "Chyung_Dai-chul", "Prince_Felipe", "Sepp_Blatter",
}  # fmt: skip
"""People of LFW of whom a picture stands under another name, too, or who stand under two names."""
Set: TypeAlias = Mapping[str, Sequence[bd.Template]]
"""Templates by person."""


def owner_of(path: Path, separator: str) -> str:
    if separator == "/":
        return path.parent.name
    return path.stem.rpartition("_")[0] if separator == "_" else path.name.split(separator)[0]


def templates_of(name: str, folder: Path | None) -> Set:
    """Of a set, extracted once and kept in the folder; refused captures are left out."""
    kept = None if folder is None else folder / f"fresh_{name}.parquet"
    found: dict[str, list[bd.Template]] = {}
    if kept is not None and kept.exists():
        for row in pq.read_table(kept).to_pylist():
            vector = np.array(row["embedding"], np.float32)
            one = bd.Template(row["column"], row["model_id"], vector, row["minutiae"], row["quality"])
            found.setdefault(row["owner"], []).append(one)
        return found
    pattern, separator = PATTERNS[name]
    paths = sorted(data_folder().glob(pattern))
    extractor = bd.Extractor(bd.Config())
    for low in range(0, len(paths), BATCH):
        some = paths[low : low + BATCH]
        captures = [bd.Finger(path, "right_index", 512) if name == "uareu" else bd.Face(path) for path in some]
        for path, result in zip(some, extractor.extract(captures), strict=True):
            if isinstance(result, bd.Template):
                found.setdefault(owner_of(path, separator), []).append(result)
    if kept is not None:
        keep(found, kept)
    return found


def keep(templates: Set, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [vars(one) | {"owner": owner} for owner, some in templates.items() for one in some]
    pq.write_table(pa.Table.from_pylist(rows), path)


def by_another_camera(faces: Set, shift: float) -> Set:
    """All faces with something in common; cosines of impostors grow by about `shift`."""
    common = np.random.default_rng(SEED).standard_normal(128)
    common *= np.sqrt(shift / (1 - shift)) / np.linalg.norm(common)

    def seen(one: bd.Template) -> bd.Template:
        assert one.embedding is not None
        return bd.Template("face", one.model_id, unit(one.embedding + common))

    return {owner: [seen(one) for one in some] for owner, some in faces.items()}


def unit(vector: NDArray[np.floating]) -> NDArray[np.float32]:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def synthetic(people: int, seed: int) -> Set:
    """Faces as unlike as directions drawn by chance, with mates at a cosine of 0.8."""
    rng = np.random.default_rng(seed)
    model_id, found = load_card("sface").model_id, {}
    for i in range(people):
        one, noise = (unit(rng.standard_normal(128)) for _ in range(2))
        both = [one, unit(0.8 * one + 0.6 * unit(noise - (noise @ one) * one))]
        found[f"s{i}"] = [bd.Template("face", model_id, vector) for vector in both]
    return found


@dataclass
class Counts:
    """What became of first encounters, and of mates."""

    first: dict[str, int] = field(default_factory=dict)
    mates: dict[str, int] = field(default_factory=dict)
    galleries: int = 0

    def told(self) -> str:
        first, false = sum(self.first.values()), self.first.get("duplicate", 0)
        upper = 1.0 if false == first else float(beta.ppf(0.95, false + 1, first - false))
        mates = sum(self.mates.values())
        found = mates - self.mates.get("missed", 0)
        return (
            f"{false} of {first} first encounters duplicate ({1000 * false / first:.2f} in 1,000, at most {1000 * upper:.2f}), "
            f"{self.first.get('review', 0) / first:.1%} review; mates {self.mates.get('duplicate', 0) / mates:.1%} duplicate, "
            f"{found / mates:.2%} found of {mates}; {self.galleries} galleries"
        )


def gallery(people: Set, order: Sequence[str], rng: np.random.Generator, folder: Path, counts: Counts) -> None:
    """One fresh gallery."""
    mates = {}
    counts.galleries += 1
    with bd.Engine.open(folder, bd.Config(gallery=bd.GalleryConfig(background=False), threads=1)) as engine:
        for owner in order:
            captures = [people[owner][i] for i in rng.permutation(len(people[owner]))[:2].tolist()]
            template = captures[0]
            decision = engine.enroll(bd.Encounter(owner, templates={template.column: template}))
            counts.first[decision.outcome] = counts.first.get(decision.outcome, 0) + 1
            if decision.outcome == "unique" and len(captures) > 1:
                mates[owner] = captures[1]
        for owner, template in mates.items():
            decision = engine.identify(bd.Encounter(templates={template.column: template}))
            reached = [one.subject_id for one in decision.candidates if one.score_db >= decision.review_db]
            found = decision.outcome if owner in reached else "missed"
            counts.mates[found] = counts.mates.get(found, 0) + 1


def orders(people: Set, sizes: Sequence[int], encounters: int, rng: np.random.Generator) -> Iterator[list[str]]:
    """People drawn for a gallery of each size in turn, until there are encounters enough. A set too small for two of the
    sizes has one gallery of all."""
    names = sorted(people)
    sizes = sorted({min(size, len(names)) for size in sizes})
    drawn = 0
    while drawn < encounters:
        for size in sizes:
            yield [names[i] for i in rng.permutation(len(names))[:size].tolist()]
            drawn += size


def measure(people: Set, sizes: Sequence[int], encounters: int) -> str:
    rng, counts = np.random.default_rng(SEED), Counts()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for number, order in enumerate(orders(people, sizes, encounters, rng)):
            gallery(people, order, rng, Path(folder) / str(number), counts)
    return counts.told()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--folder", type=Path, help="where templates are kept: biometric data")
    parser.add_argument("--encounters", type=int, default=ENCOUNTERS)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.smoke:
        record("fresh_gallery", {"synthetic": measure(synthetic(24, SEED), (4, 24), 50)}, keep=False)
        return
    figures = {}
    sets = {name: templates_of(name, options.folder) for name in PATTERNS}
    sets["lfw"] = {owner: some for owner, some in sets["lfw"].items() if owner not in DOUBLES}
    for name, people in sets.items():
        figures[name] = measure(people, SIZES, options.encounters)
        print(f"{name}: {figures[name]}", flush=True)
    for shift in CAMERAS:
        name = f"another camera, strangers {shift:g} more alike"
        figures[name] = measure(by_another_camera(sets["lfw"], shift), SIZES, options.encounters)
        print(f"{name}: {figures[name]}", flush=True)
    record("fresh_gallery", figures, keep=options.encounters >= ENCOUNTERS)


if __name__ == "__main__":
    main()
