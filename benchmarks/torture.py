"""Kills a real writer at random moments, again and again, on one gallery, and audits what is there afterwards.

    python benchmarks/torture.py             200 kills of a writer, 40 of the command line, 20 full disks, 300 flipped bits
    python benchmarks/torture.py --encrypted the same on an encrypted gallery
    python benchmarks/torture.py --kills 3   the smoke size; keeps no result

The writer enrols from four threads (each person under two ids, by two threads at once), in batches, updates, removes, loads and
compacts, in a gallery whose tail is so small that it seals and merges all the while. It tells what it begins and what was
acknowledged. The auditor opens the gallery as a reader and as a writer, verifies every checksum, and looks for

* lost: an acknowledged enrolment, update, removal, load or decision that is not there;
* admitted: a person enrolled under two ids;
* wrong: a subject whose own vector does not find it, or a resent encounter with another decision;
* unreadable: a gallery that does not open, or whose check finds a problem;
* chain: a hash chain of the commits that does not verify (after every tenth kill, and at the end).

SIGKILL leaves the system's page cache alone: what a loss of power would take is tested by failing and ordering every call
to the disk (tests/gallery/test_crash.py).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from report import record
from skimage import data

import biodedup as bd
from biodedup import jobs
from biodedup.embed.cards import load_card
from biodedup.synthetic.vectors import mates_of, population

KILLS, CLI_KILLS, FULL_DISKS, FLIPS = 200, 40, 20, 300
KEY = "TORTURE_KEY"
"""The variable with the gallery's key, which the writer and the command line inherit; not set: a gallery in the clear."""
LOAD_ROWS = 96
MODEL = load_card("sface").model_id


def config() -> bd.Config:
    keys = bd.KeyProvider(environment=KEY) if KEY in os.environ else None
    return bd.Config(gallery=bd.GalleryConfig(seal_rows=48, merge_fan=2), keys=keys)


def person(number: int) -> np.ndarray:
    return population(1, seed=1_000_000 + number)[0]


def capture(number: int, which: int) -> np.ndarray:
    """One of a person's embeddings."""
    return mates_of(person(number)[None], np.array([0.9]), seed=10 * number + which)[0]


def loaded(number: int) -> np.ndarray:
    return population(LOAD_ROWS, seed=10**10 + number)


# the writer ------------------------------------------------------------------------------------------------------


def write(gallery: Path, run: int, limit: int | None) -> None:
    """Works until it is killed. Lines: what begins, and what was acknowledged."""
    told = threading.Lock()

    def say(**line: Any) -> None:
        with told:
            os.write(1, (json.dumps(line) + "\n").encode())

    with bd.Engine.open(gallery, config()) as engine:
        say(what="open")
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        def work(thread: int) -> None:
            rng = np.random.default_rng([run, thread])
            mine: list[str] = []
            # two threads meet at each person; numbers of this run alone
            for step in range(10_000):
                number = 100_000 * run + 1000 * (thread // 2) + step % 1000
                subject = f"p{number}-{thread % 2}"
                encounter = bd.Encounter(
                    subject,
                    templates={"face": capture(number, thread % 2)},
                    encounter_id=f"e-{subject}",
                    groups=["g"],
                    model_id=MODEL,
                )
                attempt(say, "enroll", [subject], lambda e=encounter: [engine.enroll(e)], mine)
                choice = rng.random()
                if mine and choice < 0.08:
                    gone = mine.pop(int(rng.integers(len(mine))))
                    attempt(say, "remove", [gone], lambda g=gone: engine.remove(g))
                elif mine and choice < 0.16:
                    again = mine[int(rng.integers(len(mine)))]
                    encounter = bd.Encounter(
                        again,
                        templates={"face": person(int(again[1:-2]))},
                        encounter_id=f"u-{again}-{step}",
                        model_id=MODEL,
                    )
                    attempt(say, "update", [again], lambda e=encounter: [engine.update(e)])
                elif choice < 0.22:
                    number = 100_000 * run + 50_000 + 1000 * thread + 10 * step
                    batch = [
                        bd.Encounter(f"b{n}-0", templates={"face": person(n)}, encounter_id=f"e-b{n}-0", model_id=MODEL)
                        for n in range(number, number + 6)
                    ]
                    names = [str(encounter.subject_id) for encounter in batch]
                    attempt(say, "enroll_many", names, lambda b=batch: list(engine.enroll_many(b)))
                elif choice < 0.25:
                    number = 10_000 * run + 1000 * thread + step
                    names = [f"l{number}-{i}" for i in range(LOAD_ROWS)]
                    table = pa.table({"subject_id": names, "face": loaded(number).tolist()})
                    attempt(
                        say, "load", [f"l{number}"], lambda t=table: jobs.load(engine, t.to_batches(), model_id=MODEL)
                    )
                elif choice < 0.26:
                    attempt(say, "compact", [], engine.compact)

        threads = [threading.Thread(target=work, args=(t,), daemon=True) for t in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def attempt(say: Any, what: str, subjects: list[str], action: Any, mine: list[str] | None = None) -> None:
    say(what=what, begin=subjects)
    try:
        result = action()
    except bd.StorageUnavailable as error:
        say(what=what, refused=subjects, text=str(error)[:200])
        time.sleep(0.01)
        return
    except bd.UnknownSubject:
        say(what=what, refused=subjects)
        return
    decisions = result if isinstance(result, list) else []
    outcomes = [decision.outcome for decision in decisions]
    say(what=what, done=subjects, outcomes=outcomes, encounters=[d.encounter_id for d in decisions])
    if mine is not None and outcomes == ["unique"]:
        mine += subjects


# the auditor -----------------------------------------------------------------------------------------------------


class Auditor:
    """What must be there. A subject: 'in', 'out', or None where an operation was under way when the writer died."""

    def __init__(self, gallery: Path) -> None:
        self.gallery = gallery
        self.subjects: dict[str, str | None] = {}
        self.vectors: dict[str, tuple[str, int]] = {}
        self.decisions: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.under_way: Counter[str] = Counter()
        self.thorough = False
        self.audits = 0

    def hear(self, told: str) -> None:
        pending: dict[str, str] = {}
        lines = [json.loads(line) for line in told.splitlines(keepends=True) if line.endswith("\n")]
        if not lines:
            self.under_way["opening"] += 1
        open_now: Counter[str] = Counter()
        for line in lines:
            what = line["what"]
            for subject in line.get("begin", ()):
                pending[subject] = what
                self.subjects.setdefault(subject, "out")
            if "begin" in line:
                open_now[what] += 1
            if "done" in line or "refused" in line:
                open_now[what] -= 1
            if "refused" in line:
                self.counts["refused"] += 1
                for subject in line["refused"]:  # before or after: the next acknowledgement, or the gallery, tells
                    pending.pop(subject, None)
                    self.subjects[subject] = None
            if "done" in line:
                self.counts[f"acknowledged {what}"] += max(1, len(line["outcomes"]))
                for i, subject in enumerate(line["done"]):
                    pending.pop(subject, None)
                    if what == "remove":
                        self.subjects[subject] = "out"
                    elif what == "load" or line["outcomes"][i] == "unique":
                        self.subjects[subject] = "in"
                        self.vectors[subject] = (what, i)
                for encounter_id, outcome in zip(line["encounters"], line["outcomes"], strict=True):
                    self.decisions[encounter_id] = outcome
        self.under_way.update({what: 1 for what, count in open_now.items() if count > 0})
        for subject in pending:
            self.subjects[subject] = None

    def audit(self) -> None:
        """After a kill: as a reader, then as a writer."""
        left = list((self.gallery / "segments").glob("*.new")) if self.gallery.exists() else []
        self.counts["kills that left a half-written file"] += bool(left)
        try:
            with bd.Engine.open(self.gallery, config(), read_only=True) as engine:
                self._compare(engine)
            with bd.Engine.open(self.gallery, config()) as engine:
                problems = engine.problems()
                self._compare(engine)
        except bd.NotAGallery:
            self.counts["unreadable"] += bool(self.decisions)
            return
        except bd.BiodedupError as error:
            self._found("unreadable", str(error))
            return
        if problems:
            self._found("unreadable", problems[0])

    def _compare(self, engine: bd.Engine) -> None:
        enrolled = set(engine.subject_ids())
        for subject, expected in self.subjects.items():
            names = [f"{subject}-{i}" for i in range(LOAD_ROWS)] if subject.startswith("l") else [subject]
            there = {name in enrolled for name in names}
            if len(there) > 1 or (expected is not None and there != {expected == "in"}):
                self._found("lost", f"{subject}: wanted {expected}, found {there}")
        decisions = list(self.decisions.items())
        if not self.thorough:  # the newest, and a part of the rest
            self.audits += 1
            decisions = decisions[-500:] + decisions[self.audits % 17 :: 17]
        for encounter_id, outcome in decisions:
            stored = engine.decision(encounter_id)
            if stored is None or stored.outcome != outcome:
                self._found("lost", f"decision {encounter_id}")
        persons = Counter(subject[1:].split("-")[0] for subject in enrolled if subject.startswith("p"))
        for number, count in persons.items():
            if count > 1:
                self._found("admitted", f"person {number}")
        self._search(engine, enrolled)

    def _search(self, engine: bd.Engine, enrolled: set[str]) -> None:
        """The latest subjects find themselves."""
        names = [s for s in list(self.vectors)[-400:] if s in enrolled and s[0] in "pb"]
        if names:
            probes = np.array([person(int(name[1:].split("-")[0])) for name in names])
            ids, similarity = engine.search({"face": probes}, k=1)
            for name, found, value in zip(names, ids[:, 0], similarity[:, 0], strict=True):
                if found != name or value < 0.89:
                    self._found("wrong", f"{name} finds {found} at {value:.3f}")
        for number in [s[1:] for s in list(self.subjects)[-400:] if s.startswith("l") and self.subjects[s] == "in"][
            -3:
        ]:
            ids, _ = engine.search({"face": loaded(int(number))}, k=1)
            if list(ids[:, 0]) != [f"l{number}-{i}" for i in range(LOAD_ROWS)]:
                self._found("wrong", f"load {number}")

    def resend(self) -> None:
        """A resent encounter gets the decision that it got, and what was under way can be sent again."""
        with bd.Engine.open(self.gallery, config()) as engine:
            version = engine.gallery_version
            for encounter_id, outcome in list(self.decisions.items())[-20:]:
                if encounter_id.startswith("e-p"):
                    subject = encounter_id[2:]
                    number, which = subject[1:].split("-")
                    encounter = bd.Encounter(
                        subject,
                        templates={"face": capture(int(number), int(which))},
                        encounter_id=encounter_id,
                        groups=["g"],
                        model_id=MODEL,
                    )
                    if engine.enroll(encounter).outcome != outcome:
                        self._found("wrong", f"{encounter_id} sent again")
            if engine.gallery_version != version:
                self._found("wrong", "a resent encounter changed the gallery")

    def verify_chain(self) -> None:
        for problem in jobs.verify_log(self.gallery, config()).problems:
            self._found("chain", problem)

    def _found(self, what: str, text: str) -> None:
        self.counts[what] += 1
        print(f"{what}: {text}", file=sys.stderr)


def torture_writer(auditor: Auditor, kills: int, rng: np.random.Generator) -> None:
    for run in range(kills):
        command = [sys.executable, __file__, "--write", str(auditor.gallery), "--run", str(run)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        told = ""
        if run % 10:  # every tenth is killed at any moment from its start on, opening included
            told = process.stdout.readline()
            time.sleep(rng.uniform(0.02, 1.0))
        else:
            time.sleep(rng.uniform(0.3, 2.0))
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read()
        process.wait()
        auditor.hear(told)
        auditor.audit()
        if run % 10 == 5:
            auditor.resend()
            auditor.verify_chain()


def fill_disks(auditor: Auditor, times: int, rng: np.random.Generator) -> None:
    """A limit on the size of files stands for a full disk: journal, database or segment fail to grow."""
    for i in range(times):
        size = max((f.stat().st_size for f in auditor.gallery.rglob("*") if f.is_file()), default=0)
        limit = int(rng.uniform(0.02, 1.3) * size) + 4096
        command = [sys.executable, __file__, "--write", str(auditor.gallery), "--run", str(5000 + i)]
        process = subprocess.Popen([*command, "--limit", str(limit)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        told = process.stdout.readline()
        time.sleep(0.7)
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read()
        process.wait()
        auditor.hear(told)
        auditor.audit()


def torture_command_line(folder: Path, kills: int, rng: np.random.Generator, counts: Counter[str]) -> None:
    """kill -9 of `biodedup load`, `enroll` and `compact`; the same command again must come to its end."""
    gallery = folder / "cli"
    count = 500_000
    vectors = population(count, seed=3)
    names = [f"s{i}" for i in range(count)]
    cells = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    pa.parquet.write_table(pa.table({"subject_id": names, "face": cells}), folder / "t.parquet", row_group_size=20_000)
    cv2.imwrite(str(folder / "face.png"), data.astronaut()[..., ::-1])
    settings = folder / "settings.toml"
    settings.write_text(f'[keys]\nenvironment = "{KEY}"\n' if KEY in os.environ else "")
    common = ["--gallery", str(gallery), "--config", str(settings)]
    commands = {
        "load": ["load", str(folder / "t.parquet"), "--model-id", MODEL],
        "enroll": ["enroll", "astronaut", "--face", str(folder / "face.png"), "--encounter-id", "e1"],
        "compact": ["compact"],
    }
    for kill in range(kills):
        name = ("load", "enroll", "compact", "load")[kill % 4]
        command = [sys.executable, "-m", "biodedup.cli", *commands[name], *common]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=float(rng.uniform(0.9, 2.2)))
            counts["command lines that ended before the kill"] += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            counts["command lines killed"] += 1
        if not gallery.exists() or not (gallery / "gallery.sqlite3").exists():
            continue
        try:
            with bd.Engine.open(gallery, config(), read_only=True) as engine:
                batch = 1 << 16
                rows = len(engine) - ("astronaut" in engine)
                if rows % batch and rows != count:
                    counts["lost"] += 1
                    print(f"lost: {rows} rows after {name}", file=sys.stderr)
                if engine.problems():
                    counts["unreadable"] += 1
        except bd.BiodedupError as error:
            counts["unreadable"] += 1
            print(f"unreadable: {error}", file=sys.stderr)
    for name in ("load", "enroll", "compact"):
        command = [sys.executable, "-m", "biodedup.cli", *commands[name], *common, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            counts["unreadable"] += 1
            print(f"unreadable: {name}: {done.stderr}", file=sys.stderr)
    with bd.Engine.open(gallery, config(), read_only=True) as engine:
        ids, _ = engine.search({"face": vectors[::100]}, k=1)
        counts["lost"] += len(engine) != count + 1
        counts["wrong"] += int((ids[:, 0] != np.array(names[::100], object)).sum())


def flip(auditor: Auditor, times: int, rng: np.random.Generator, counts: Counter[str]) -> None:
    """A flipped bit is reported or changes no answer; in a segment it is always reported, and its file is named."""
    gallery = auditor.gallery
    with bd.Engine.open(gallery, config()) as engine:
        for low in (0, 40):
            ids = [f"f{i}" for i in range(low, low + 40)]
            if ids[0] not in engine:
                engine.add_templates(ids, {"face": population(40, seed=40 + low)}, model_id=MODEL)
        engine.maintain()
    decisions = list(auditor.decisions)[-30:]

    def answers() -> Any:
        with bd.Engine.open(gallery, config(), read_only=True) as engine:
            listed = engine.subject_ids()
            probes = np.array([person(i) for i in range(40)])
            ids, similarity = engine.search({"face": probes}, k=3)
            known = [name in engine for name in listed[::50]]
            return listed, ids.tolist(), similarity.tolist(), known, [engine.decision(e) for e in decisions]

    before = answers()
    files = [f for f in sorted(gallery.rglob("*")) if f.is_file() and f.name != "writer.lock"]
    for i in range(times):
        path = files[i % len(files)]
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[int(rng.integers(len(sound)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        report: Any = ["refused"]
        try:
            report = jobs.examine(gallery, config()).problems
        except bd.BiodedupError:
            pass
        try:
            same = answers() == before
        except bd.BiodedupError:
            same = True  # it was said
            counts["flips that raised"] += 1
        counts["flips"] += 1
        counts["flips that doctor reports"] += bool(report)
        if not same and not report:
            counts["wrong"] += 1
            print(f"wrong: {path.name} answers otherwise and nobody knows", file=sys.stderr)
        if path.parent.name == "segments" and not (report and f"segment {path.name.split('.')[0]}," in report[0]):
            counts["wrong"] += 1
            print(f"wrong: {path.name} is damaged and not named", file=sys.stderr)
        path.write_bytes(sound)
        journal = gallery / "gallery.sqlite3-journal"
        if path.name.startswith("gallery.sqlite3") and not journal.exists() and journal in files:
            files.remove(journal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encrypted", action="store_true")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write is not None:
        write(arguments.write, arguments.run, arguments.limit)
        return
    if arguments.encrypted:
        os.environ[KEY] = secrets.token_hex(32)
    rng = np.random.default_rng(arguments.seed)
    share = arguments.kills / KILLS
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        auditor = Auditor(Path(folder) / "g")
        torture_writer(auditor, arguments.kills, rng)
        if not auditor.decisions:
            sys.exit("the writer acknowledged nothing; the machine is too slow for these intervals")
        fill_disks(auditor, max(1, round(FULL_DISKS * share)), rng)
        auditor.thorough = True
        auditor.audit()
        auditor.verify_chain()
        counts: Counter[str] = Counter()
        torture_command_line(Path(folder), max(1, round(CLI_KILLS * share)), rng, counts)
        flip(auditor, max(10, round(FLIPS * share)), rng, counts)
    counts.update(auditor.counts)
    bad = {what: counts.pop(what, 0) for what in ("lost", "admitted", "wrong", "unreadable", "chain")}
    figures: dict[str, Any] = {"kills of the writer": arguments.kills, "seed": arguments.seed}
    if arguments.encrypted:
        figures["encrypted"] = True
    figures |= {f"killed during {what}": count for what, count in sorted(auditor.under_way.items())}
    figures |= dict(sorted(counts.items())) | bad
    record("torture", figures, keep=arguments.kills == KILLS)
    sys.exit(1 if any(bad.values()) else 0)


if __name__ == "__main__":
    main()
