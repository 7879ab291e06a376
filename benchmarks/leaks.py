"""Searches all files of an encrypted gallery for text and biometric data that must not be readable.

    python benchmarks/leaks.py            10,000 byte strings
    python benchmarks/leaks.py --smoke    a tenth of the work, without worker processes; keeps no result

A day's work is simulated twice, in the clear and encrypted, with the same people: loading, enrolments, a captured face, a case and its verdict,
removals, merges of segments, canaries, a queue, backups, a join, an audit log, a reader. After each step every file is searched: those of the gallery, of
its backup, of the working files beside it, and of the folder for temporary files. The strings are ids, notes, pieces of 16 bytes of
embeddings, of minutiae records and of the captured file, and pieces of the files of the gallery in the clear, whatever they hold there. That
the search finds them in the clear shows that it can. A temporary file that is made and removed within one step is not seen.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from report import model_ids, record
from skimage import data

import biodedup as bd
from biodedup import jobs
from biodedup.capture.minutiae.record import MinutiaeRecord, write_record
from biodedup.jobs.enrolment.queue import Arrival
from biodedup.synthetic.vectors import population

LOADED, ENROLLED, SMOKE = 1_100, 200, 10
KEY, CLOCK = bytes(range(1, 33)), 1.7e9
PIECE = 16
(MODEL,) = model_ids("face", 128).values()
CONFIG = bd.Config(
    gallery=bd.GalleryConfig(seal_rows=64, merge_fan=3, background=False), isolation=bd.IsolationConfig(), audit="all"
)
POLICY = bd.Policy(duplicate_db=60, review_db=10, required=())


class People:
    """Who is enrolled, and what must not be readable of them (`secrets`)."""

    def __init__(self, loaded: int, enrolled: int, seed: int) -> None:
        rng = random.Random(seed)
        count = loaded + enrolled
        self.loaded = loaded
        self.ids = [rng.randbytes(12).hex() for _ in range(count)]
        self.visits = [rng.randbytes(12).hex() for _ in range(enrolled)]
        self.faces = population(count, seed=seed)
        self.minutiae = [_minutiae(np.random.default_rng([seed, i])) for i in range(loaded)]
        self.note, self.purpose, self.queued = (rng.randbytes(12).hex() for _ in range(3))
        self.picture = cv2.imencode(".png", cv2.cvtColor(data.astronaut(), cv2.COLOR_RGB2BGR))[1].tobytes()
        picture = [self.picture[at : at + PIECE] for at in range(1_000, len(self.picture) - PIECE, 2_000)]
        vectors = [face.astype("<f4").tobytes() for face in self.faces]
        self.secrets = {text.encode() for text in (*self.ids, *self.visits, self.note, self.purpose, self.queued)}
        self.secrets |= {vector[at : at + PIECE] for vector in vectors for at in range(0, 512, 128)}
        self.secrets |= {one[at : at + PIECE] for one in self.minutiae for at in (30, 60)} | set(picture)


def _minutiae(rng: np.random.Generator) -> bytes:
    """A made-up record of 30 minutiae."""
    x, y = rng.integers(100, 400, (2, 30))
    body = np.stack([0x40 | (x >> 8), x & 255, y >> 8, y & 255, *rng.integers(0, 100, (2, 30))], axis=1)
    return write_record(MinutiaeRecord(500, 500, body.astype(np.uint8).tobytes()), 0, 50)


def days_work(folder: Path, config: bd.Config, people: People) -> Iterator[str]:
    """Yields the name of each step when it is done."""
    gallery, loaded = folder / "g", people.loaded

    def opened(**more: Any) -> bd.Engine:
        return bd.Engine.open(gallery, replace(config, **more), clock=lambda: CLOCK, new_id=lambda: "0" * 32)

    def load(engine: bd.Engine) -> None:
        columns: dict[str, Any] = {"face": people.faces[:loaded], "right_index": people.minutiae}
        engine.add_templates(people.ids[:loaded], columns, model_id=MODEL)

    def enrol(engine: bd.Engine) -> None:
        for i, visit in enumerate(people.visits):
            face = {"face": people.faces[loaded + i]}
            engine.enroll(bd.Encounter(people.ids[loaded + i], templates=face, encounter_id=visit, model_id=MODEL))

    def capture(engine: bd.Engine) -> None:
        engine.enroll(bd.Encounter("a-captured-person", [bd.Face(people.picture)], encounter_id="a-captured-visit"))
        engine.identify(bd.Encounter(captures=[bd.Face(people.picture)]))

    def case(engine: bd.Engine) -> None:
        near = 0.45 * people.faces[0] + np.sqrt(1 - 0.45**2) * np.random.default_rng(9).standard_normal(128) / np.sqrt(
            128
        )
        face = {"face": (near / np.linalg.norm(near)).astype(np.float32)}
        engine.enroll(bd.Encounter("one-who-waits", templates=face, encounter_id="a-case", model_id=MODEL))
        if any(True for _ in engine.cases()):
            engine.adjudicate("a-case", "different", "anna", people.note)

    def join(engine: bd.Engine) -> None:
        jobs.find_duplicates(engine, folder / "pairs.parquet")
        (folder / "pairs.parquet").unlink()  # the result, which was asked for

    def read(engine: bd.Engine) -> None:
        with bd.Engine.open(gallery, config, read_only=True) as reader:
            reader.subject(people.ids[6])
            reader.as_principal(auditor, purpose=people.purpose).subject(people.ids[7])

    auditor = bd.Principal("auditor", bd.ROLES)
    steps: dict[str, Callable[[bd.Engine], object]] = {
        "load": load,
        "enrol": enrol,
        "maintain": lambda engine: engine.maintain(),
        "capture": capture,
        "case": case,
        "remove": lambda engine: engine.remove(*people.ids[:3]),
        "look": lambda engine: engine.as_principal(auditor, purpose=people.purpose).subject(people.ids[5]),
        "read": read,
        "backup": lambda engine: engine.backup(folder / "backup"),
        "join": join,
    }
    for n, (name, step) in enumerate(steps.items()):
        with opened(**({} if n else {"policy": POLICY})) as engine:
            step(engine)
            yield name
    jobs.examine(gallery, config, canaries=True)
    with jobs.Backlog.open(gallery, config) as backlog:
        backlog.enqueue([Arrival(people.queued, people.ids[-1])], CLOCK)
        yield "queue"
    with opened() as engine:
        engine.compact()
        engine.backup(folder / "backup")
    yield "compact"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def found_in(content: bytes, strings: set[bytes]) -> set[bytes]:
    """Which of the strings are in it. Each has at least 8 bytes: words of 8 at every place are compared first."""
    by_start: dict[int, list[bytes]] = {}
    for text in strings:
        by_start.setdefault(int.from_bytes(text[:8], "little"), []).append(text)
    starts, found = np.array(sorted(by_start), np.uint64), set()
    for shift in range(min(8, max(len(content) - 7, 0))):
        words = np.frombuffer(content, "<u8", (len(content) - shift) // 8, shift)
        for place in np.flatnonzero(np.isin(words, starts)):
            at = shift + 8 * int(place)
            found |= {text for text in by_start[int(words[place])] if content.startswith(text, at)}
    return found


def pieces_of(folder: Path, count: int) -> set[bytes]:
    """From all over the files of segments and canaries in the clear."""
    rng, pieces = random.Random(1), set()
    contents = [
        path.read_bytes() for path in files_of(folder) if path.parent.name == "segments" or path.name == "sentinels"
    ]
    while len(pieces) < count:
        content = rng.choice(contents)
        at = rng.randrange(len(content) - PIECE)
        if len(set(content[at : at + PIECE])) > 8:
            pieces.add(content[at : at + PIECE])
    return pieces


def searched(folder: Path, config: bd.Config, people: People, strings: set[bytes]) -> tuple[set[bytes], dict[str, Any]]:
    """(the strings that any file held after any step, figures). Temporary files go to a folder within."""
    found: set[bytes] = set()
    files = size = 0
    (folder / "tmp").mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder / "tmp")
    try:
        for step in days_work(folder, config, people):
            for path in files_of(folder):
                content = path.read_bytes()
                hits = found_in(content, strings)
                if hits and config.keys is not None:
                    print(f"after {step}: {path.relative_to(folder)} holds {len(hits)} of the strings")
                found |= hits
                files, size = files + 1, size + len(content)
    finally:
        tempfile.tempdir = before
    return found, {"files": files, "MB": round(size / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    part = SMOKE if options.smoke else 1
    people = People(LOADED // part, ENROLLED // part, options.seed)
    config = replace(CONFIG, isolation=None) if options.smoke else CONFIG
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in days_work(folder / "first", config, people):
            pass
        strings = people.secrets | pieces_of(folder / "first", 1_500 // part)
        clear, _ = searched(folder / "clear", config, people, strings)
        sealed, figures = searched(folder / "sealed", replace(config, keys=lambda: KEY), people, strings)
    told = {"strings": len(strings), "found in the clear": len(clear), "found encrypted": len(sealed)}
    told |= {"files searched, encrypted, all steps": figures["files"], "searched, MB": figures["MB"]}
    record("leaks", told, keep=not options.smoke)


if __name__ == "__main__":
    main()
