"""Damages an encrypted gallery by chance and on purpose, and counts what `doctor` and `log verify` name.

    python benchmarks/tamper.py            2,000 random manipulations and 500 forgeries
    python benchmarks/tamper.py --smoke    28 and 28; keeps no result
    python benchmarks/tamper.py --count 200 --seed 7    200 of each; keeps no result

The gallery has several segments, a journal, decisions, a case, verdicts, a removed subject, two policies, an audit log, budgets, canaries, a queue, and calls of a
reader that no writer has taken in yet. A signed checkpoint of it is kept outside, and copies of it at earlier times are kept by the forger, who knows the format and not the key, as well
as another gallery of the same register's key and one of another key.

* A random manipulation flips one bit of a file, or swaps two of its blocks. Each file is as likely as the others.
* A forgery (tamper_forgeries.py) puts back what was there earlier, swaps, cuts or replaces files and blocks.

Each is done to a copy. Then the copy is opened and read in all ways, and checked by `log verify`, without and with the checkpoint, by the queue's
status and by `doctor --canaries`, until one of them names it. It is

* named: a check, or opening, says what is damaged;
* detected, not named: an error that does not say it;
* harmless: nothing is said, and every answer is as before: the bytes are those of free space, which nothing reads;
* undetected: nothing is said, and an answer is missing or another one.

Whether a check said something or not: a reading that gives another answer than before, and no error, is a wrong answer. Counted by themselves
are answers that are all those of one earlier time, such as of a whole gallery that was put back, and records (decisions, cases, verdicts,
policies, calls) that a forger put back: opening does not read all of them, `log verify` does.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from report import model_ids, record
from tamper_forgeries import FORGERIES, Forger

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.catalogue.sqlite import SqliteCatalogue
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.names import LOCK_NAME
from biodedup.jobs.enrolment.queue import Arrival
from biodedup.synthetic.vectors import mates_of

PARTS, SMOKE = {"random": 2_000, "forged": 500}, 28
KEY, OTHER_KEY = bytes(range(1, 33)), bytes(range(2, 34))
CLOCK, DIMENSION = 1.7e9, 128
PEOPLE = np.linalg.qr(np.random.default_rng(5).standard_normal((DIMENSION, 64)))[0].T.astype(np.float32)
(MODEL,) = model_ids("face", DIMENSION).values()
BLOCKS = (16, 512, 4096, 65_552)
CONFIG = bd.Config(
    gallery=bd.GalleryConfig(seal_rows=8, merge_fan=9, background=False),
    keys=lambda: KEY,
    audit="all",
)
LOOKING = replace(CONFIG, audit="changes")
"""Of readings and checks, which would otherwise write their calls beside the gallery."""
POLICY = bd.Policy(duplicate_db=60, review_db=10, required=(), subject_calls_per_day=1_000)
VERDICTS = ("named", "detected, not named", "harmless", "undetected")
WAITING = "calls of readers that wait"
SEARCHES = {"search", "identify", "verify", "subjects"}
_NAMES = {
    "gallery.key": r"gallery\.key|under key|is not encrypted|key",
    "gallery.sqlite3": r"gallery\.sqlite3|database|table|chain|counters|journal|segment|rollback|fork",
    "gallery.sqlite3-journal": r"gallery\.sqlite3|database|table|chain|counters|journal|rollback|fork",
    "all files": r"gallery\.key|gallery\.sqlite3|under key|is not encrypted|rollback|fork|checkpoint",
    "sentinels": r"canar|sentinels",
    "backlog.sqlite3": r"backlog|queue",
    "backlog.sqlite3-journal": r"backlog|queue",
    "readers.sqlite3": r"readers",
    "readers.sqlite3-journal": r"readers",
}


# the gallery, and what is read of it -------------------------------------------------------------------------------


def encounter(i: int, vector: np.ndarray | None = None) -> bd.Encounter:
    face = PEOPLE[i] if vector is None else vector
    return bd.Encounter(f"s{i}", templates={"face": face}, encounter_id=f"e{i}", model_id=MODEL)


def between(i: int, j: int) -> np.ndarray:
    return np.asarray(0.45 * PEOPLE[i] + np.sqrt(1 - 0.45**2) * PEOPLE[j], np.float32)


@dataclass
class Made:
    """now: the gallery; times: copies of earlier times, oldest first; others: of other galleries, by name."""

    now: Path
    times: list[Path]
    others: dict[str, Path]
    checkpoint: Path
    public_key: Path
    answers: dict[str, str] = field(default_factory=dict)
    earlier_answers: list[dict[str, str]] = field(default_factory=list)


def work(folder: Path, config: bd.Config) -> Iterator[None]:
    """Stops after each step, with the gallery closed."""
    rows = iter(range(64))

    def enrolled(count: int) -> Callable[[bd.Engine], object]:
        return lambda engine: [engine.enroll(encounter(next(rows))) for _ in range(count)]

    steps: list[Callable[[bd.Engine], object]] = [
        enrolled(8),
        lambda engine: engine.seal(),
        enrolled(8),
        lambda engine: engine.seal(),
        lambda engine: engine.enroll(encounter(60, between(0, 60))),
        lambda engine: engine.adjudicate("e60", "different", by="anna"),
        lambda engine: engine.remove("s3"),
        lambda engine: engine.compact(),
        enrolled(8),
        lambda engine: engine.seal(),
        lambda engine: engine.set_policy(replace(POLICY, duplicate_db=70), by="dewi", reason="stricter"),
        enrolled(8),
        lambda engine: engine.seal(),
        lambda engine: engine.enroll(encounter(61, between(1, 61))),
        lambda engine: engine.adjudicate("e61", "same", by="anna"),
        enrolled(3),
        lambda engine: engine.enroll(encounter(62, between(2, 62))),
        lambda engine: engine.remove("s5"),
        enrolled(1),
    ]
    for n, step in enumerate(steps):
        created = config if n else replace(config, policy=POLICY)
        with bd.Engine.open(folder, created, clock=lambda n=n: CLOCK + 60 * n) as engine:
            step(engine)
            engine.identify(encounter(0))
        yield


def journal_under_way(gallery: Path, out: Path) -> None:
    """A copy of SQLite's rollback journal in the middle of a transaction that changes every page, as of a machine that was switched off."""
    copy = out.with_suffix(".copy")
    shutil.copytree(gallery, copy)
    storage = LocalStorage(CONFIG.keys)
    storage.unlock(copy, new=False)
    with closing(storage.connect(copy / "gallery.sqlite3", read_only=False)) as database:
        database.execute(
            "PRAGMA cache_size=5"
        )  # pages: the others are written before the end, and the journal before them
        database.execute("BEGIN IMMEDIATE")
        for table in SqliteCatalogue.tables:
            database.execute(f"UPDATE {table} SET checksum = checksum + 1")
        shutil.copy(copy / "gallery.sqlite3-journal", out)
        database.execute("ROLLBACK")
    shutil.rmtree(copy)


def make(folder: Path) -> Made:
    times = []
    for n, _ in enumerate(work(folder / "now", CONFIG)):
        times.append(folder / "times" / str(n))
        shutil.copytree(folder / "now", times[-1])
        journal_under_way(folder / "now", times[-1].with_suffix(".journal"))
    others = {
        "same key": CONFIG,
        "another key": replace(CONFIG, keys=lambda: OTHER_KEY),
        "clear": replace(CONFIG, keys=None),
    }
    for name, config in others.items():
        for _ in work(folder / name, config):
            pass
    for name, config in {"now": CONFIG, **others}.items():
        jobs.examine(folder / name, config, canaries=True)
        with jobs.Backlog.open(folder / name, config) as backlog:
            backlog.enqueue([Arrival(f"e{i}", f"s{i}") for i in range(40, 60)], CLOCK)
        with bd.Engine.open(folder / name, config, read_only=True, clock=lambda: CLOCK + 3_600) as engine:
            for i in (1, 2, 4):
                engine.subject(f"s{i}")
    jobs.make_signing_key(folder / "auditor.key")
    jobs.log_checkpoint(folder / "now", folder / "auditor.key", folder / "checkpoint", CONFIG, clock=lambda: CLOCK)
    galleries = {name: folder / name for name in others}
    return Made(folder / "now", times[:-1], galleries, folder / "checkpoint", folder / "auditor.pub")


def readings() -> dict[str, Callable[[bd.Engine], object]]:
    probes = mates_of(PEOPLE[:32], np.full(32, 0.8), seed=2)

    def searched(engine: bd.Engine) -> object:
        found = engine.search({"face": probes}, k=5)
        return found.ids.tolist(), found.similarity.tolist()

    return {
        "search": searched,
        "identify": lambda engine: [engine.identify(encounter(i)).outcome for i in (1, 3, 20, 40)],
        "verify": lambda engine: [engine.verify(encounter(i), "s20").accepted for i in (20, 21)],
        "subjects": lambda engine: engine.subject_ids(),
        "decisions": lambda engine: [str(engine.decision(f"e{i}")) for i in range(64)],
        "cases": lambda engine: [str(case) for case in engine.cases()],
        "verdicts": lambda engine: engine.verdicts(),
        "policies": lambda engine: engine.policies(),
        "calls": lambda engine: [call for call in engine.audit_records() if call.number],
        WAITING: lambda engine: [call for call in engine.audit_records() if not call.number],
    }


READINGS = readings()


def answers(gallery: Path) -> tuple[dict[str, str], list[str]]:
    """(what each reading gives, as text; the errors of the others)."""
    given, errors = {}, []
    try:
        with bd.Engine.open(gallery, LOOKING, read_only=True) as engine:
            for name, reading in READINGS.items():
                try:
                    given[name] = repr(reading(engine))
                except bd.BiodedupError as error:
                    errors.append(str(error))
    except bd.BiodedupError as error:
        errors.append(str(error))
    return given, errors


# one manipulation --------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """by: what said something first; problems: all that was said."""

    kind: str
    file: str
    what: str
    by: str
    problems: list[str]
    wrong: list[str]
    earlier: bool
    missing: list[str]

    @property
    def verdict(self) -> str:
        if not self.problems:
            return "undetected" if self.wrong or self.missing else "harmless"
        text = " ".join(self.problems)
        segment, _, _ = self.file.removeprefix("segments/").partition(".")
        pattern = _NAMES.get(self.file, rf"segment {segment}\b|{re.escape(self.file)}|segments|{segment}\.")
        return "named" if re.search(pattern, text) else "detected, not named"


def checks(gallery: Path, made: Made) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """(the name of a check, what returns what it says)."""

    def said(check: Callable[[], list[str]]) -> Callable[[], list[str]]:
        def run() -> list[str]:
            try:
                return check()
            except bd.BiodedupError as error:
                return [str(error)]

        return run

    def queue() -> list[str]:
        jobs.queue_status(gallery, CLOCK, CONFIG)
        return []

    sealed = {"checkpoint": made.checkpoint, "public_key": made.public_key}
    yield "log verify", said(lambda: list(jobs.verify_log(gallery, CONFIG).problems))
    yield "queue", said(queue)
    yield "checkpoint", said(lambda: list(jobs.verify_log(gallery, CONFIG, **sealed).problems))
    yield "doctor", said(lambda: list(jobs.examine(gallery, LOOKING, canaries=True, clock=lambda: CLOCK).problems))


def tried(made: Made, scratch: Path, kind: str, damage: Callable[[Path], tuple[str, str]]) -> Outcome | None:
    """None where nothing was changed."""
    gallery = scratch / "g"
    shutil.copytree(made.now, gallery)
    try:
        file, what = damage(gallery)
        if contents(gallery) == contents(made.now):
            return None
        given, errors = answers(gallery)
        wrong = [name for name, text in given.items() if text != made.answers[name]]
        of_database = {name: text for name, text in given.items() if name != WAITING}
        earlier = any(
            all(text == then.get(name) for name, text in of_database.items()) for then in made.earlier_answers
        )
        missing = sorted(made.answers.keys() - given.keys())
        outcome = Outcome(
            kind, file, what, "opening" if errors else "", errors, wrong, bool(wrong) and earlier, missing
        )
        for name, check in checks(gallery, made):
            if outcome.verdict == "named":
                break
            found = check()
            outcome.by, outcome.problems = outcome.by or (name if found else ""), outcome.problems + found
        return outcome
    finally:
        shutil.rmtree(gallery)


def contents(gallery: Path) -> dict[str, bytes]:
    """Of all files but the writer's lock, which holds the number of a process."""
    files = sorted(path for path in gallery.rglob("*") if path.is_file() and path.name != LOCK_NAME)
    return {str(path.relative_to(gallery)): path.read_bytes() for path in files}


def at_random(made: Made, rng: random.Random) -> tuple[str, Callable[[Path], tuple[str, str]]]:
    files = contents(made.now)
    name = rng.choice(sorted(files))
    content = bytearray(files[name])
    if rng.random() < 0.5:
        at = rng.randrange(8 * len(content))
        content[at // 8] ^= 1 << at % 8
        kind, what = "bit", f"bit {at % 8} of byte {at // 8}"
    else:
        size = rng.choice([size for size in BLOCKS if 2 * size <= len(content)])
        i, j = (size * rng.randrange(len(content) // size) for _ in range(2))
        content[i : i + size], content[j : j + size] = content[j : j + size], content[i : i + size]
        kind, what = "blocks", f"blocks of {size} at {i} and {j}"

    def damage(gallery: Path) -> tuple[str, str]:
        (gallery / name).write_bytes(content)
        return name, what

    return kind, damage


# all of them -------------------------------------------------------------------------------------------------------


def run(
    made: Made, scratch: Path, count: int, draw: Callable[[int], tuple[str, Callable[[Path], tuple[str, str]]]]
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    n = 0
    while len(outcomes) < count:
        outcome = tried(made, scratch, *draw(n))
        n += 1
        if outcome is not None:
            outcomes.append(outcome)
            if outcome.verdict != "named" or (outcome.wrong and not outcome.earlier):
                told = (outcome.kind, outcome.file, outcome.what, outcome.verdict, outcome.by, outcome.wrong)
                print(*told, outcome.problems[:1], sep="; ", flush=True)
    return outcomes


def figures(name: str, outcomes: list[Outcome]) -> dict[str, Any]:
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    first = Counter(outcome.by for outcome in outcomes if outcome.by)
    harmless = Counter(outcome.file for outcome in outcomes if outcome.verdict == "harmless")
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    of_searches = [outcome for outcome in wrong if not outcome.earlier and SEARCHES.intersection(outcome.wrong)]
    of_records = [outcome for outcome in wrong if not outcome.earlier and not SEARCHES.intersection(outcome.wrong)]
    return {
        name: len(outcomes),
        f"{name}: of each kind": dict(sorted(Counter(outcome.kind for outcome in outcomes).items())),
        **{f"{name}: {verdict}": verdicts[verdict] for verdict in VERDICTS},
        f"{name}: harmless, in": dict(harmless.most_common()),
        f"{name}: first told by": dict(first.most_common()),
        f"{name}: wrong answers of searches": len(of_searches),
        f"{name}: records of another time answered": len(of_records),
        f"{name}: all answers of one earlier time": sum(outcome.earlier for outcome in wrong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, help="so many of each part; keeps no result")
    parser.add_argument("--part", choices=PARTS, help="only these")
    options = parser.parse_args()
    parts = PARTS if options.part is None else {options.part: PARTS[options.part]}
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make(folder)
        made.answers, errors = answers(made.now)
        problems = [text for _, check in checks(made.now, made) for text in check()]
        if errors or problems:
            raise SystemExit(f"the gallery is not sound to begin with: {[*errors, *problems][0]}")
        made.earlier_answers = [answers(then)[0] for then in made.times]
        forger = Forger(made.now, made.times, made.others, rng)
        kinds = list(FORGERIES)
        told: dict[str, Any] = {"seed": options.seed, "files": len(contents(made.now))}
        told["bytes"] = sum(map(len, contents(made.now).values()))

        def forgery(n: int) -> tuple[str, Callable[[Path], tuple[str, str]]]:
            kind = kinds[n % len(kinds)]
            return kind, lambda gallery: FORGERIES[kind](forger, gallery)

        draws = {"random": lambda n: at_random(made, rng), "forged": forgery}
        for part, count in parts.items():
            rng.seed(options.seed)
            count = SMOKE if options.smoke else options.count or count
            told |= figures(part, run(made, folder, count, draws[part]))
    record("tamper", told, keep=not (options.smoke or options.count))


if __name__ == "__main__":
    main()
