"""Accuracy on real captures: faces 1:1, and chimeric enrolment through the engine.

    python benchmarks/accuracy.py faces       LFW, all mated pairs, all non-mated pairs of first images
    python benchmarks/accuracy.py chimeras    LFW faces + FVC2002 and UareU fingers, first and second encounters
    python benchmarks/accuracy.py fused       the same as an evaluation: FNIR at FPIR, each capture alone and all together

A chimera is a face identity joined with fingers of other people, so that its figures do not show how face and fingers correlate in nature.
`all seeds`: the same fingers are joined with other faces in each gallery. The interval assumes that these searches are independent, which is
not quite true. Needs the real data (BIODEDUP_DATA). `--limit` uses fewer identities, `--gate quality_min=0.8` another limit of the face gate;
neither keeps a result. `fused` keeps templates in `--templates`, because fingers take long. Each person has `--fingers` fingers of the same
set, so that fingers do not tell the sensor.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from report import data_folder, record

import biodedup as bd
from biodedup.common.intervals import exact_interval
from biodedup.jobs.evaluation.comparisons import Searches
from biodedup.jobs.evaluation.evaluate import evaluate_encounters
from biodedup.jobs.evaluation.labelled import Labelled, extracted
from biodedup.jobs.shared.progress import silent

FINGER_SETS = {"fvc2002/DB1_B": 500, "fvc2002/DB2_B": 569, "fvc2002/DB3_B": 500, "fvc2002/DB4_B": 500, "uareu": 512}
POSITIONS = ("right_index", "left_index")
FUSED_POSITIONS = ("right_index", "left_index", "right_thumb", "left_thumb")
BATCH = 64
MISLABELLED = ("Mahmoud_Abbas_0012.jpg", "Recep_Tayyip_Erdogan_0004.jpg")
"""Photographs of LFW that show another person than all others of their folder: seen by eye; cosines with these are at most 0.15."""


def extract(
    captures: list[bd.Face | bd.Finger], gate: Mapping[str, float] | None = None
) -> list[bd.Template | bd.Refusal]:
    """gate: limits of `FaceConfig` in place of its defaults."""
    extractor = bd.Extractor(bd.Config(face=bd.FaceConfig(**(gate or {}))))
    results: list[bd.Template | bd.Refusal] = []
    for start in range(0, len(captures), BATCH):
        results += extractor.extract(captures[start : start + BATCH])
    return results


def interval(events: int, trials: int) -> str:
    """A share with its exact 95 % interval (Clopper and Pearson, 1934)."""
    low, high = exact_interval(events, trials)
    return f"{events / trials:.2%} [{low:.2%}, {high:.2%}], {events} of {trials}"


def faces(limit: int | None, gate: Mapping[str, float]) -> dict[str, Any]:
    """Of all identities, and of the odd-numbered ones alone: the limits of the gate were chosen on the others."""
    folders = sorted((data_folder() / "faces" / "lfw").iterdir())[:limit]
    paths = [path for folder in folders for path in sorted(folder.glob("*.jpg"))]
    results = extract([bd.Face(path) for path in paths], gate)
    odd = {folder.name for folder in folders[1::2]}
    some = [(p, r) for p, r in zip(paths, results, strict=True) if p.parent.name in odd]
    return face_figures(paths, results) | {
        f"odd-numbered identities: {name}": figure for name, figure in face_figures(*zip(*some, strict=True)).items()
    }


def face_figures(paths: Sequence[Path], results: Sequence[bd.Template | bd.Refusal]) -> dict[str, Any]:
    refused = Counter(r.reason for r in results if isinstance(r, bd.Refusal))
    kept = [(p, r) for p, r in zip(paths, results, strict=True) if isinstance(r, bd.Template)]
    names = np.array([path.parent.name for path, _ in kept])
    first = np.array([path.stem.endswith("_0001") for path, _ in kept])
    vectors = np.stack([template.embedding for _, template in kept])
    upper = np.triu_indices(len(kept), 1)
    same = names[upper[0]] == names[upper[1]]
    mated = (vectors @ vectors.T)[upper][same]
    sound = np.array([path.name not in MISLABELLED for path, _ in kept])
    sound = sound[upper[0][same]] & sound[upper[1][same]]
    nonmated = (vectors[first] @ vectors[first].T)[np.triu_indices(int(first.sum()), 1)]
    figures: dict[str, Any] = {
        "images": len(paths),
        "failure to enrol": interval(len(paths) - len(kept), len(paths)),
        "refusals": dict(refused),
        "mated pairs": len(mated),
        "non-mated pairs": len(nonmated),
    }
    for fmr in (1e-3, 1e-4, 1e-5):
        threshold = np.sort(nonmated)[-int(fmr * len(nonmated)) - 1]
        missed = int(np.count_nonzero(mated <= threshold))
        figures[f"FNMR at FMR {fmr:g}"] = f"{interval(missed, len(mated))}, cosine {threshold:.4f}"
        missed = int(np.count_nonzero(mated[sound] <= threshold))
        figures[f"FNMR at FMR {fmr:g}, right labels"] = interval(missed, int(sound.sum()))
    return figures


def fingers(limit: int | None) -> list[list[bd.Template | bd.Refusal]]:
    """Impressions of each finger, in order."""
    groups: dict[str, list[bd.Finger]] = {}
    for name, dpi in FINGER_SETS.items():
        for path in sorted((data_folder() / "fingers" / name).glob("*.png")):
            groups.setdefault(f"{name}/{path.stem.rpartition('_')[0]}", []).append(bd.Finger(path, dpi=dpi))
    kept = list(groups.values())[:limit]
    results = iter(extract([capture for group in kept for capture in group]))
    return [[next(results) for _ in group] for group in kept]


def relabelled(result: bd.Template | bd.Refusal, column: str) -> bd.Template | None:
    if isinstance(result, bd.Refusal):
        return None
    return bd.Template(column, result.model_id, result.embedding, result.minutiae, result.quality)


def chimeras(limit: int | None, seeds: int) -> dict[str, Any]:
    people = [f for f in sorted((data_folder() / "faces" / "lfw").iterdir()) if len(list(f.glob("*.jpg"))) >= 2]
    finger_results = fingers(limit and limit * len(POSITIONS))
    count = min(len(finger_results) // len(POSITIONS), limit or len(people))
    outcomes: Counter[tuple[str, str]] = Counter()
    wrong_person = 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        chosen = [people[i] for i in rng.choice(len(people), count, replace=False)]
        order = rng.permutation(len(finger_results))
        paths = [sorted(folder.glob("*.jpg")) for folder in chosen]
        face_results = iter(extract([bd.Face(path) for group in paths for path in group]))
        face_of = [[next(face_results) for _ in group] for group in paths]
        with tempfile.TemporaryDirectory() as folder, bd.Engine.open(Path(folder) / "gallery") as engine:
            for visit in range(8):
                for person in range(count):
                    images = face_of[person]
                    face = images[0] if visit == 0 else images[1 + (visit - 1) % (len(images) - 1)]
                    given = {"face": relabelled(face, "face")}
                    for place, position in enumerate(POSITIONS):
                        impressions = finger_results[order[len(POSITIONS) * person + place]]
                        given[position] = relabelled(impressions[visit], position)
                    templates = {column: template for column, template in given.items() if template is not None}
                    decision = engine.enroll(bd.Encounter(f"{person}/{visit}", templates=templates))
                    kind = "first" if visit == 0 else "second"
                    outcomes[kind, decision.outcome] += 1
                    if decision.outcome == "duplicate" and decision.candidates[0].subject_id != f"{person}/0":
                        wrong_person += 1
                    if visit and decision.outcome == "unique":
                        engine.remove(f"{person}/{visit}")  # a miss must not help the next visit
    first = {outcome: n for (kind, outcome), n in outcomes.items() if kind == "first"}
    second = {outcome: n for (kind, outcome), n in outcomes.items() if kind == "second"}
    caught = second.get("duplicate", 0) + second.get("review", 0)
    return {
        "subjects a gallery": count,
        "galleries (seeds)": seeds,
        "first encounters": first,
        "first unique": interval(first.get("unique", 0), sum(first.values())),
        "second encounters": second,
        "second duplicate or review": interval(caught, sum(second.values())),
        "duplicates of the wrong subject": wrong_person,
    }


def fused(limit: int | None, seeds: int, per_person: int, folder: Path) -> dict[str, Any]:
    """Chimeric subjects, as many as there are distinct fingers of one set for; as many encounters as the face has images, 8 at most."""
    config = bd.Config()
    pools: dict[str, dict[str, list[Labelled]]] = {}
    for name, dpi in FINGER_SETS.items():
        paths = sorted((data_folder() / "fingers" / name).glob("*.png"))
        prints = by_subject([Labelled(p.stem, p.stem.rpartition("_")[0], (bd.Finger(p, dpi=dpi),)) for p in paths])
        kept = [one for some in list(prints.values())[: limit and limit * per_person] for one in some]
        pools[name] = by_subject(extracted(kept, config, folder, silent))
    people = [f for f in sorted((data_folder() / "faces" / "lfw").iterdir()) if len(list(f.glob("*.jpg"))) >= 2]
    count = min(sum(len(pool) // per_person for pool in pools.values()), len(people), limit or len(people))
    figures: dict[str, Any] = {"chimeric subjects a gallery": count, "fingers a subject": per_person}
    searched: dict[str, list[Searches]] = {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        chosen = [people[i] for i in rng.choice(len(people), count, replace=False)]
        images = [Labelled(p.stem, f.name, (bd.Face(p),)) for f in chosen for p in sorted(f.glob("*.jpg"))[:8]]
        faces_of = by_subject(extracted(images, config, folder, silent))
        hands = [
            [pool[finger] for finger in order[low : low + per_person]]
            for pool in pools.values()
            for order in [rng.permutation(sorted(pool)).tolist()]
            for low in range(0, len(order) - per_person + 1, per_person)
        ]
        hands = [hands[i] for i in rng.permutation(len(hands))]
        made = [
            chimera(f"{person.name}/{visit}", person.name, [face, *(prints[visit] for prints in hand)])
            for person, hand in zip(chosen, hands, strict=False)
            for visit, face in enumerate(faces_of[person.name])
        ]
        for kind, columns in {"face": ("face",), "fingers": FUSED_POSITIONS, "all": ("face", *FUSED_POSITIONS)}.items():
            some = [replace(one, templates={c: t for c, t in one.templates.items() if c in columns}) for one in made]
            found = evaluate_encounters(some, config, source="chimeric", made_at=0.0, seed=seed)
            figures |= {f"seed {seed}, {kind}: {name}": text for name, text in told(found.document["identification"])}
            searched.setdefault(kind, []).append(found.comparisons.searches)
    for kind, of_all in searched.items():
        figures |= {f"all seeds, {kind}: {name}": text for name, text in pooled(of_all)}
    return figures


def pooled(of_all: list[Searches]) -> list[tuple[str, str]]:
    """FNIR at an FPIR over all galleries: the share of impostors' searches that find somebody."""
    mates = np.concatenate([one.mate_db[one.later & one.enrolled] for one in of_all])
    impostors = np.sort(np.concatenate([one.impostor_db[one.searched] for one in of_all]))[::-1]
    return [
        (
            f"FNIR at FPIR {fpir:g}",
            f"{interval(missed, len(mates))}, {threshold:.1f} dB, {len(impostors)} searches of strangers",
        )
        for fpir in (0.1, 0.01)
        for threshold in [impostors[int(fpir * len(impostors))]]
        for missed in [int(np.count_nonzero(mates <= threshold))]
    ]


def by_subject(encounters: list[Labelled]) -> dict[str, list[Labelled]]:
    found: dict[str, list[Labelled]] = {}
    for one in encounters:
        found.setdefault(one.subject_id, []).append(one)
    return found


def chimera(encounter_id: str, subject_id: str, parts: list[Labelled]) -> Labelled:
    """The face under its column, fingers under the positions in order."""
    given = [
        relabelled(t, c)
        for c, one in zip(("face", *FUSED_POSITIONS), parts, strict=False)
        for t in one.templates.values()
    ]
    return Labelled(encounter_id, subject_id, templates={one.column: one for one in given if one is not None})


def told(found: dict[str, Any]) -> list[tuple[str, str]]:
    def text(rate: dict[str, Any]) -> str:
        low, high = rate["interval"]
        return f"{rate['value']:.2%} [{low:.2%}, {high:.2%}], {rate['events']} of {rate['trials']}"

    return [
        (
            f"FNIR at FPIR {row['target']:g}, N = {row['gallery_subjects']}",
            f"{text(row['fnir'])}, {row['threshold_db']:.1f} dB",
        )
        for row in found["at_fpir"]
    ] + [("mate first", text(found["cmc"]["rank_1"]) if found["cmc"] else "no searches")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("faces", "chimeras", "fused"), nargs="?", default="faces")
    parser.add_argument("--limit", type=int, help="fewer identities")
    parser.add_argument("--seeds", type=int, default=5, help="chimeric galleries")
    parser.add_argument("--fingers", type=int, choices=(1, 2, 4), default=2, help="fingers of a fused chimera")
    parser.add_argument("--templates", type=Path, default=Path("templates"), help="folder that keeps fused templates")
    parser.add_argument(
        "--gate", nargs="*", default=[], metavar="LIMIT=VALUE", help="faces: other limits of FaceConfig"
    )
    options = parser.parse_args()
    gate = {name: float(value) for name, value in (text.split("=") for text in options.gate)}
    if options.what == "fused":
        figures = fused(options.limit, options.seeds, options.fingers, options.templates)
    else:
        figures = faces(options.limit, gate) if options.what == "faces" else chimeras(options.limit, options.seeds)
    record(options.what, figures, keep=options.limit is None and not gate)


if __name__ == "__main__":
    main()
