"""The main benchmark: a register of subjects with a face and ten fingers, from loading to decisions and the join.

    python benchmarks/ektp.py --folder F                     a million subjects (10 GB of disk); resumes where it was stopped
    python benchmarks/ektp.py --folder F --subjects 2e8      more of the same
    python benchmarks/ektp.py --subjects 600 --smoke         the smoke size; keeps no result

`register.py` makes the register: vectors with the distributions in the cards, and minutiae of generated prints. The first figures compare its
scores with the cards' tables. Some subjects have a second encounter: with all captures, with some missing, with poor captures, and with
exchanged labels of the hands. Each stage saves its figures in the folder. A later run does not repeat a saved stage.

Figures of 200 million subjects are extrapolated, and named so. A decision takes a fixed time plus a time per subject, both measured at a
quarter of the register and at the whole register. n nodes share the rows evenly; the time to ask them is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from register import COLUMNS, FINGER_CARD, FINGERS, MINUTIAE_CARD, MODELS, Register, cached_pool
from report import record

import biodedup as bd
from biodedup import jobs
from biodedup.match.prints.minutiae import CylinderMatcher
from biodedup.match.scores.calibration import Calibration
from biodedup.synthetic import draw_impression, draw_master

SUBJECTS, SEED = 1_000_000, 24
KINDS = ("all", "some missing", "poor", "hands exchanged")
PIECE = 16_384
NATION, NODES = 200_000_000, (16, 64, 256)
DOUBLED = 50_000
"""One subject in so many is in the register twice, for the join."""


class Run:
    """The sizes of one run, and its figures so far, in the folder."""

    def __init__(self, folder: Path, subjects: int, seed: int, prints: int, probes: int, *, smoke: bool) -> None:
        self.folder, self.subjects, self.seed, self.smoke = folder, subjects, seed, smoke
        self.gallery = folder / f"{subjects}-{seed}.gallery"
        self._path = folder / f"{subjects}-{seed}.json"
        self.figures: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.probes = 2 if smoke else probes  # of each kind, and as many impostors as of all kinds
        self.register = Register(seed, cached_pool(folder, 6 if smoke else prints, seed))
        self.doubles = max(4, subjects // DOUBLED)

    def save(self, stage: str, figures: dict[str, Any]) -> None:
        self.figures[stage] = figures
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.figures))
        new.replace(self._path)

    def open(self) -> bd.Engine:
        return bd.Engine.open(self.gallery)

    def again(self, kind: str, number: int) -> bd.Encounter:
        """A second encounter of a subject."""
        rng = np.random.default_rng([self.seed, 7, KINDS.index(kind), number])
        capture = 1 + KINDS.index(kind)
        kept = set(COLUMNS)
        if kind == "some missing":
            kept -= set(rng.choice(FINGERS, int(rng.integers(3, 8)), replace=False))
            kept -= {"face"} if rng.random() < 0.25 else set()
        templates = {}
        for column in kept:
            poor = kind == "poor" and rng.random() < 0.7
            label = _other_hand(column) if kind == "hands exchanged" else column
            vector = self.register.second_vector(column, number, capture, poor)
            minutiae = None if column == "face" else self.register.record(column, number, capture, poor)
            templates[label] = bd.Template(label, MODELS[label], vector, minutiae)
        return bd.Encounter(templates=templates)

    def impostor(self, number: int) -> bd.Encounter:
        """A subject of the same law who is not in the register."""
        outside = self.subjects + number
        templates = {}
        for column in COLUMNS:
            (vector,) = self.register.vectors(column, outside, outside + 1)
            minutiae = None if column == "face" else self.register.record(column, outside, 0)
            templates[column] = bd.Template(column, MODELS[column], vector, minutiae)
        return bd.Encounter(f"new-{number}", templates=templates, encounter_id=f"new-{number}")

    def mates(self, kind: str) -> list[int]:
        """Subjects that come again."""
        rng = np.random.default_rng([self.seed, 8, KINDS.index(kind)])
        return rng.choice(self.subjects, self.probes, replace=False).tolist()


def _other_hand(column: str) -> str:
    hand, _, finger = column.partition("_")
    return column if column == "face" else f"{'left' if hand == 'right' else 'right'}_{finger}"


# stages -------------------------------------------------------------------------------------------------------------


def laws(run: Run) -> dict[str, Any]:
    """Minutiae scores of this register beside the card's table."""
    matcher, count = CylinderMatcher(1), 60 if run.smoke else 600
    offsets, data = run.register.records("right_index", 0, count)
    records = [data[low:high].tobytes() for low, high in pairwise(offsets.tolist())]
    impostors = np.concatenate([matcher.compare(records[i], records[i + 1 :]) for i in range(0, count - 1, 4)])
    mated = [matcher.compare(records[i], [run.register.record("right_index", i, 1)])[0] for i in range(count)]
    table = Calibration.from_card(MINUTIAE_CARD.calibration)
    survival, grid = [0.5, 0.01, 0.001], np.linspace(0, 80, 8001)
    wanted = [float(grid[np.argmax(table.score_db(grid) >= -10 * np.log10(share))]) for share in survival]
    density = np.diff(-(10 ** (-table.score_db(grid) / 10))) * 10 ** (table.llr_db(grid[1:]) / 10)
    expected = np.interp([0.05, 0.5, 0.95], np.cumsum(density) / density.sum(), grid[1:])

    def told(values: Any) -> str:
        return " / ".join(f"{value:.1f}" for value in values)

    return {
        "minutiae of strangers, score at 50 / 99 / 99.9 %: here": told(np.quantile(impostors, 1 - np.array(survival))),
        "minutiae of strangers: card": told(wanted),
        "minutiae of mates, score at 5 / 50 / 95 %: here": told(np.quantile(mated, [0.05, 0.5, 0.95])),
        "minutiae of mates: card": told(expected),
        "finger model": f"{FINGER_CARD.model_id}, minutiae {MINUTIAE_CARD.model_id}",
    }


def load_to(run: Run, end: int) -> dict[str, Any]:
    """Loads subjects up to this number. Drawing them is not counted."""
    drawing, marks = [0.0], []
    with run.open() as engine:
        begun = len(engine)

        def batches() -> Iterator[Any]:
            for low in range(0, end, PIECE):
                high = min(low + PIECE, end)
                if run.register.subject_id(high - 1) in engine:
                    continue
                started = time.perf_counter()
                batch = run.register.batch(low, high)
                drawing[0] += time.perf_counter() - started
                marks.append((time.perf_counter() - drawing[0], low))
                yield batch

        started = time.perf_counter()
        result = jobs.load(engine, batches(), batch_rows=PIECE)
        took = time.perf_counter() - started - drawing[0]
        assert result.refused == 0, result
        added = len(engine) - begun
    steady = (marks[-1][1] - marks[1][1]) / (marks[-1][0] - marks[1][0]) if len(marks) > 2 else None
    return {
        "loaded, subjects": added,
        "loaded, subjects a second": round(added / took) if added else None,
        "loaded after the first batch, subjects a second": steady and round(steady),
        "load, peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def load_doubles(run: Run) -> None:
    """Some subjects once more, under other ids."""
    with run.open() as engine:
        encounters = []
        for number in range(run.doubles):
            of = number * (run.subjects // run.doubles)
            templates = {
                c: bd.Template(
                    c,
                    MODELS[c],
                    run.register.second_vector(c, of, 9, False),
                    None if c == "face" else run.register.record(c, of, 9),
                )
                for c in COLUMNS
            }
            encounters.append(bd.Encounter(f"double-{of}", templates=templates, encounter_id=f"double-{of}"))
        engine.import_captures(encounters)


def read(run: Run) -> dict[str, Any]:
    """In a process of its own: what opening and the first decisions take."""
    before = _resident()
    started = time.perf_counter()
    with run.open() as engine:
        opened = time.perf_counter() - started
        opened_size = _resident()
        for number in range(3):
            engine.identify(run.impostor(number))
        after, count = _resident(), len(engine)
    disk = sum(file.stat().st_size for file in run.gallery.rglob("*") if file.is_file())
    return {
        "open, s": round(opened, 3),
        "open and three decisions, s": round(time.perf_counter() - started, 2),
        "disk, bytes a subject": round(disk / count),
        "memory of its own after opening, bytes a subject": round(
            (opened_size["RssAnon"] - before["RssAnon"]) / count, 1
        ),
        "memory of its own after decisions, bytes a subject": round((after["RssAnon"] - before["RssAnon"]) / count, 1),
        "mapped files in memory after decisions, bytes a subject": round(
            (after["RssFile"] - before["RssFile"]) / count
        ),
    }


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.partition(":") for line in lines)
    return {key: 1024 * int(text.split()[0]) for key, _, text in fields if key in ("RssAnon", "RssFile")}


def decide(run: Run) -> dict[str, Any]:
    """One decision at a time: its time, what it compares, and who is found."""
    taken: dict[str, list[float]] = {"mate": [], "stranger": []}
    compared: dict[str, list[int]] = {"mate": [], "stranger": []}
    figures: dict[str, Any] = {}
    with run.open() as engine:
        _timed(engine, run.impostor(0), [], [])  # compiles
        for kind, across in [*((kind, False) for kind in KINDS), ("hands exchanged", True)]:
            found = {"duplicate": 0, "review": 0}
            numbers = run.mates(kind)
            told = f"{kind}{', across positions' if across else ''}"
            for number in numbers:
                times, counts = (taken["mate"], compared["mate"]) if not across else ([], [])
                decision = _timed(engine, run.again(kind, number), times, counts, across=across)
                best = decision.best
                if best is not None and best.subject_id in (run.register.subject_id(number), f"double-{number}"):
                    found[decision.outcome] = found.get(decision.outcome, 0) + 1
            missed = 1 - found["duplicate"] / len(numbers)
            figures[f"{told}: FNIR at the policy's threshold"] = round(missed, 4)
            figures[f"{told}: neither duplicate nor review"] = round(missed - found["review"] / len(numbers), 4)
        outcomes = []
        for number in range(run.probes * len(KINDS)):
            decision = _timed(engine, run.impostor(number), taken["stranger"], compared["stranger"])
            outcomes.append(decision.outcome)
        figures["FPIR, duplicate"] = round(outcomes.count("duplicate") / len(outcomes), 4)
        figures["FPIR, duplicate or review"] = round(1 - outcomes.count("unique") / len(outcomes), 4)
        figures["policy, duplicate from dB"] = round(decision.duplicate_db, 1)
    for who, times in taken.items():
        figures[f"decision on a {who}, p50 / p99 ms"] = f"{np.median(times):.1f} / {np.quantile(times, 0.99):.1f}"
        figures[f"minutiae compared, a {who}, mean / most"] = f"{np.mean(compared[who]):.0f} / {max(compared[who])}"
    figures["p50 ms"] = float(np.median(taken["stranger"]))
    return figures


def _timed(
    engine: bd.Engine, encounter: bd.Encounter, taken: list[float], compared: list[int], *, across: bool = False
) -> bd.Decision:
    started = time.perf_counter()
    decision = engine.identify(encounter, across_positions=across)
    taken.append(1000 * (time.perf_counter() - started))
    if len(taken) <= 40 or len(taken) % 10 == 0:
        with bd.explain() as steps:
            engine.identify(encounter, across_positions=across)
        compared.append(sum(step["minutiae"] for step in steps.of("comparisons")))
    return decision


def batches(run: Run) -> dict[str, Any]:
    """Batches of 64 impostors are searched, decided and committed; then removed again."""
    count, size = (16, 8) if run.smoke else (min(640, 64 * (1 + run.probes // 10)), 64)
    config = bd.Config(batch_size=size)
    with bd.Engine.open(run.gallery, config) as engine:
        known = [f"new-{number}" for number in range(count) if f"new-{number}" in engine]
        if known:
            engine.remove(*known)
        encounters = [run.impostor(number) for number in range(count)]
        stamp = int(time.time())
        sent = [
            bd.Encounter(e.subject_id, templates=e.templates, encounter_id=f"{e.encounter_id}-{stamp}")
            for e in encounters
        ]
        started = time.perf_counter()
        engine.identify(run.impostor(count))  # plans the search, which takes seconds and is kept
        first = time.perf_counter() - started
        started = time.perf_counter()
        outcomes = [decision.outcome for decision in engine.enroll_many(sent)]
        took = time.perf_counter() - started
        entered = [e.subject_id for e, outcome in zip(sent, outcomes, strict=True) if outcome == "unique"]
        engine.remove(*entered)
    return {
        f"decisions a second, batches of {size}, commit included": round(count / took, 1),
        "of these, enrolled": f"{len(entered)} of {count}",
        "first decision of a process, s": round(first, 1),
    }


def extraction(run: Run) -> dict[str, Any]:
    """From pixels to templates: a portrait and ten generated prints a person."""
    from skimage import data

    people, rng = 1 if run.smoke else 8, np.random.default_rng([run.seed, 9])
    persons = [
        [bd.Face(np.asarray(data.astronaut(), np.uint8))]
        + [bd.Finger(draw_impression(rng, draw_master(rng)).image, finger) for finger in FINGERS]
        for _ in range(people)
    ]
    with bd.Extractor() as extractor:
        extractor.extract(persons[0][:2])
        started = time.perf_counter()
        results = extractor.extract([capture for person in persons for capture in person])
        took = time.perf_counter() - started
    prints = [capture for person in persons for capture in person[1:]]
    with bd.Extractor(bd.Config(threads=1)) as extractor:
        extractor.extract(prints[:2])
        started = time.process_time()
        extractor.extract(prints)
        one_core = time.process_time() - started
    refused = sum(isinstance(result, bd.Refusal) for result in results)
    return {
        "extraction, persons a second": round(people / took, 2),
        "a finger on one core, ms": round(1000 * one_core / len(prints), 1),
        "of its captures, refused": f"{refused} of {len(results)}",
    }


def join(run: Run, minutes: float) -> dict[str, Any]:
    """N:N, as far as it comes in some minutes, after a compaction, whose time counts."""
    found: set[tuple[str, str]] = set()
    done, total = 0, 1
    with run.open() as engine:
        started = time.perf_counter()
        engine.compact()  # one segment is searched several times as fast as many, and a journal
        for tile in engine.join():
            found |= {tuple(sorted(link.subject_ids)) for link in tile.links}
            done, total = tile.done, tile.total
            if time.perf_counter() - started > 60 * minutes:
                break
        took = (time.perf_counter() - started) / 60
    planted = {
        tuple(sorted((run.register.subject_id(of), f"double-{of}")))
        for of in (number * (run.subjects // run.doubles) for number in range(run.doubles))
    }
    figures: dict[str, Any] = {"join, minutes": round(took, 2), "join, share done": round(done / total, 4)}
    if done == total:
        figures["join, planted pairs found"] = f"{len(planted & found)} of {len(planted)}"
        figures["join, pairs that were not planted"] = len(found - planted)
    else:
        figures["join of all, minutes, extrapolated"] = round(took * total / max(done, 1), 1)
    return figures


def national(run: Run) -> dict[str, Any]:
    """200 million subjects on n nodes like this machine."""
    small, whole = run.figures["decide at a quarter"]["p50 ms"], run.figures["decide"]["p50 ms"]
    slope = max(whole - small, 0.0) / (0.75 * run.subjects)
    fixed = max(whole - slope * run.subjects, 0.0)
    rate = run.figures["load"]["loaded, subjects a second"]
    size = run.figures["read"]["disk, bytes a subject"]
    figures: dict[str, Any] = {}
    for nodes in NODES:
        share = NATION / nodes
        figures[f"{NATION:,} on {nodes} nodes, one decision, ms, extrapolated"] = round(fixed + slope * share)
        figures[f"{NATION:,} on {nodes} nodes, loaded in hours, extrapolated"] = rate and round(share / rate / 3600, 2)
        figures[f"{NATION:,} on {nodes} nodes, disk a node, GB, extrapolated"] = round(share * size / 1e9, 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=lambda text: int(float(text)), default=SUBJECTS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--prints", type=int, default=200, help="generated prints that fingers are made from")
    parser.add_argument(
        "--folder", type=Path, help="keep the register's gallery and the figures here, and go on with what is there"
    )
    parser.add_argument(
        "--probes", type=int, default=200, help="of each kind of second encounter; impostors are as many as all of them"
    )
    parser.add_argument("--join-minutes", type=float, default=20.0)
    parser.add_argument("--smoke", action="store_true", help="few probes")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(folder, options.subjects, options.seed, options.prints, options.probes, smoke=options.smoke)
        stages: dict[str, Callable[[], dict[str, Any]]] = {
            "laws": lambda: laws(run),
            "load of a quarter": lambda: load_to(run, run.subjects // 4),
            "decide at a quarter": lambda: decide_at_a_quarter(run),
            "load": lambda: load_all(run),
            "read": lambda: read(run),
            "decide": lambda: decide(run),
            "batches": lambda: batches(run),
            "extraction": lambda: extraction(run),
            "join": lambda: join(run, options.join_minutes),
            "200 million": lambda: national(run),
        }
        if options.stage:
            run.save(options.stage, stages[options.stage]())
            return
        for stage in stages:  # each in a process of its own, so that nothing is warm and memory is its own
            if stage in run.figures:
                continue
            if run.smoke:
                run.save(stage, stages[stage]())
            else:
                command = [sys.executable, __file__, "--folder", str(folder), "--stage", stage]
                command += [
                    "--subjects",
                    str(options.subjects),
                    "--seed",
                    str(options.seed),
                    "--prints",
                    str(options.prints),
                ]
                command += ["--join-minutes", str(options.join_minutes), "--probes", str(options.probes)]
                subprocess.run(command, check=True)
                run = Run(folder, options.subjects, options.seed, options.prints, options.probes, smoke=options.smoke)
        figures = {"subjects": options.subjects, "seed": options.seed, "captures a subject": len(COLUMNS)}
        for stage, found in run.figures.items():
            where = f"{stage}: " if stage.endswith("quarter") else ""
            figures |= {f"{where}{name}": value for name, value in found.items()}
        record("ektp", figures, keep=options.subjects >= SUBJECTS)


def decide_at_a_quarter(run: Run) -> dict[str, Any]:
    """The time of a decision on a impostor, in the gallery as it is."""
    taken: list[float] = []
    with run.open() as engine:
        _timed(engine, run.impostor(0), [], [])
        for number in range(1, 1 + 4 * run.probes):
            started = time.perf_counter()
            engine.identify(run.impostor(number))
            taken.append(1000 * (time.perf_counter() - started))
        count = len(engine)
    return {"subjects": count, "p50 ms": float(np.median(taken))}


def load_all(run: Run) -> dict[str, Any]:
    figures = load_to(run, run.subjects)
    load_doubles(run)
    return figures


if __name__ == "__main__":
    main()
