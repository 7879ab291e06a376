"""A torture of one register: front-end processes offer the same people at the same time, while everything that can fail is made to fail.

    python -m tests.cluster.torture FOLDER --seed 1 --seconds 120 --seal-rows 32
    python -m tests.cluster.torture FOLDER --seconds 900 --front-ends 4 --people 3000 --seal-rows 200 --ray-nodes 3 --pause-s 0.15

With `--ray-nodes` actors of a Ray cluster on this machine search the sealed segments; actors are killed and stopped, and nodes and the GCS are
killed, too. Then a front-end may say that its search was incomplete, and hold the encounter for review. Front-ends that Ray ends are started
again, as by a supervisor.

Keeps every answer, every fault and the front-ends' messages in FOLDER. A seed settles the people, their pictures and the order of the
faults; how the processes interleave differs from run to run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

import biodedup as bd
from biodedup.testing import internals
from tests.support import ROOT
from tests.support.postgres import Postgres, binaries
from tests.support.ray_cluster import NODE
from tests.support.vectors import SFACE, again, people

POLICY = bd.Policy(duplicate_db=62, review_db=62)
MATE, STRANGER = 0.8, 0.44
"""Cosines: pictures of one person have more than MATE, those of two people less than STRANGER. Checked before each run."""
RAY_FAULTS = ("actor", "freeze", "node", "gcs")
RARE = {"restart": 0.6, "crash": 0.6, "node": 0.5, "gcs": 0.8}
"""Faults that stop much are left out with these probabilities."""
VIOLATED = 3
"""The exit code of a front-end that got what it must not get; with another one its supervisor starts it again."""
BLOCK = 4  # people whom each thread offers in its own order


@dataclass(frozen=True)
class Plan:
    """What a run does. seal_rows: 0 for no sealing; shared: the front-ends share one folder of copies; faults: which kinds; ray_nodes: nodes with
    shards, 0 for no Ray; pause_s: mean pause of a thread between two people."""

    seed: int = 1
    seconds: float = 120.0
    people: int = 1500
    front_ends: int = 3
    threads: int = 2
    seal_rows: int = 0
    shared: bool = False
    faults: tuple[str, ...] = ("kill", "cut", "cut_one", "stop", "restart", "crash")
    every_s: float = 1.5
    ray_nodes: int = 0
    pause_s: float = 0.0


def pictures(plan: Plan) -> np.ndarray:
    """float32 (front_ends * threads, people, 128): each thread's own picture of each person."""
    faces = _apart(people(4 * plan.people, seed=1000 + plan.seed), plan.people)
    return np.array([again(faces, 0.95, seed=2000 + 50 * plan.seed + i) for i in range(plan.front_ends * plan.threads)])


def _apart(drawn: np.ndarray, count: int) -> np.ndarray:
    """The first vectors that have a cosine below 0.3 to all that were taken before."""
    taken = np.zeros((count, drawn.shape[1]), np.float32)
    done = 0
    for vector in drawn:
        if done < count and (taken[:done] @ vector < 0.3).all():
            taken[done] = vector
            done += 1
    assert done == count, f"only {done} people of {count} are far enough apart"
    return taken


def check_distinct(shown: np.ndarray) -> tuple[float, float]:
    """(least cosine of one person's pictures, greatest of two people's). Raises AssertionError where they are not surely apart."""
    least, greatest = 1.0, -1.0
    for i, some in enumerate(shown):
        for others in shown[i:]:
            cosines = some @ others.T
            least = min(least, float(np.diagonal(cosines).min()))
            np.fill_diagonal(cosines, -1.0)
            greatest = max(greatest, float(cosines.max()))
    assert least > MATE and greatest < STRANGER, (least, greatest)
    return least, greatest


# a front-end ---------------------------------------------------------------------------------------------------------


def config(plan: Plan, folder: Path, cache: Path | None, ray_address: str | None = None) -> bd.Config:
    gallery = bd.GalleryConfig(seal_rows=plan.seal_rows or 1 << 20, merge_fan=3, background=bool(plan.seal_rows))
    cluster = bd.ClusterConfig(
        segments=f"file://{folder}/store",
        cache=cache,
        deadline_ms=4_000,
        transaction_ms_max=2_000,
        poll_ms=15,
        garbage_grace_s=60,
        ray_address=ray_address,
        shard_groups=2,
    )
    return bd.Config(policy=POLICY, gallery=gallery, cluster=cluster)


class FrontEnd:
    """One process. Each of its threads offers its own pictures, and notes each answer before it goes on."""

    def __init__(self, folder: Path, number: int) -> None:
        about = json.loads((folder / "plan.json").read_text())
        self._url = about.pop("url")
        self._plan = Plan(**about)
        self._folder, self._number = folder, number
        self._shown = pictures(self._plan)
        cache = folder / ("cache" if self._plan.shared else f"cache-{number}")
        self._cache = cache
        self._engine: bd.Engine | None = None
        self._opening = threading.Lock()

    def _opened(self) -> bd.Engine:
        """Ray may have been started anew elsewhere since."""
        address = (self._folder / "ray").read_text() if self._plan.ray_nodes else None
        return bd.Engine.open(self._url, config(self._plan, self._folder, self._cache, address))

    def run(self) -> None:
        threading.excepthook = _ended_by
        threads = [threading.Thread(target=self._offer_all, args=(i,)) for i in range(self._plan.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._engine is not None:
            self._engine.close()

    def _offer_all(self, thread: int) -> None:
        own = self._number * self._plan.threads + thread
        answers = self._folder / f"answers-{own}.jsonl"
        done = [json.loads(line)["person"] for line in answers.read_text().splitlines()] if answers.exists() else []
        chance, known = random.Random(f"{self._plan.seed} {own} {len(done)}"), set(done)
        with answers.open("a") as noted:
            for person in self._order(chance):
                if (self._folder / "end").exists():
                    return
                if person not in known:
                    time.sleep(chance.expovariate(1 / self._plan.pause_s) if self._plan.pause_s else 0)
                    self._offer(own, person, noted)
                    done.append(person)
                if chance.random() < 0.15:
                    self._offer(own, chance.choice(done), noted)  # sent again

    def _order(self, chance: random.Random) -> Iterator[int]:
        for first in range(0, self._plan.people, BLOCK):
            block = list(range(first, min(first + BLOCK, self._plan.people)))
            chance.shuffle(block)
            yield from block

    def _offer(self, own: int, person: int, noted: TextIO) -> None:
        face = bd.Template("face", SFACE, self._shown[own, person])
        encounter = bd.Encounter(f"s{person}-{own}", templates={"face": face}, encounter_id=f"e{person}-{own}")
        began = time.time()
        decision = self._call(lambda engine: engine.enroll(encounter))
        best = decision.candidates[0] if decision.candidates else None
        line = {
            "person": person,
            "encounter": decision.encounter_id,
            "subject": decision.subject_id,
            "outcome": decision.outcome,
            "reasons": list(decision.reasons),
            "incomplete": decision.incomplete,
            "version": decision.gallery_version,
            "best": best and [best.subject_id, best.score_db, best.evidence[0].similarity, list(best.rows)],
            "time": [began, time.time()],
        }
        noted.write(json.dumps(line) + "\n")
        noted.flush()

    def _call(self, call: Callable[[bd.Engine], bd.Decision]) -> bd.Decision:
        while True:
            try:
                with self._opening:
                    if self._engine is None:
                        self._engine = self._opened()
                    engine = self._engine
                return call(engine)
            except bd.RetryableError as error:
                sys.stderr.write(f"{time.time():.3f} {type(error).__name__}: {error}\n")
                time.sleep(0.02)


def _persisting(start: Callable[[], Any]) -> Any:
    """Ray gives up the start of a node after 30 s, which a loaded machine exceeds; a supervisor tries again."""
    for _ in range(10):
        try:
            return start()
        except Exception as error:  # Ray's own has no class
            sys.stderr.write(f"{time.time():.3f} Ray does not start: {error}\n")
    raise AssertionError("Ray does not start")


def _ended_by(failure: threading.ExceptHookArgs) -> None:
    """Ends the process when one of its threads fails."""
    threading.__excepthook__(failure)
    sys.stderr.flush()
    os._exit(VIOLATED)


# the faults ------------------------------------------------------------------------------------------------------------


class Run:
    """One run in a folder: starts the front-ends, makes the faults, and checks the answers."""

    def __init__(self, server: Postgres, url: str, folder: Path, plan: Plan) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps({**asdict(plan), "url": url}))
        self._server, self._url, self._folder, self._plan = server, url, folder, plan
        self._chance = random.Random(plan.seed)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._done: Counter[str] = Counter()
        self._ray: Any = None

    def run(self) -> dict[str, object]:
        """Returns counts. Raises AssertionError where a promise is broken."""
        cosines = check_distinct(pictures(self._plan))
        with bd.Engine.open(self._url, config(self._plan, self._folder, None)):
            pass
        if self._plan.ray_nodes:
            self._start_ray()
        self._processes = [self._start(i) for i in range(self._plan.front_ends)]
        try:
            self._make_faults()
            if self._ray is not None:
                self._check_ray()
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
            if self._ray is not None:
                self._ray.shutdown()
        codes = [process.returncode for process in self._processes]
        assert VIOLATED not in codes and (self._plan.ray_nodes or not any(codes)), codes
        counts = self.check()
        return {"seed": self._plan.seed, "cosines": cosines, "faults": dict(self._done), **counts}

    def _make_faults(self) -> None:
        while not all(file.exists() and file.stat().st_size for file in self._answers()):
            self._fail_if_one_failed()
            time.sleep(0.05)
        until = time.monotonic() + self._plan.seconds
        while time.monotonic() < until and any(process.poll() is None for process in self._processes):
            time.sleep(self._chance.expovariate(1 / self._plan.every_s))
            self._fail_if_one_failed()
            fault = self._chance.choice(self._plan.faults)
            if self._chance.random() < RARE.get(fault, 0):
                continue
            self._note(fault)
            getattr(self, f"_{fault}")()
            self._done[fault] += 1
        (self._folder / "end").touch()
        for process in self._processes:
            process.wait(120)

    def _fail_if_one_failed(self) -> None:
        for i, process in enumerate(self._processes):
            code = process.poll()
            assert not code or (self._plan.ray_nodes and code != VIOLATED), f"a front-end failed: {self._folder}/err-*"
            if code:
                self._done["front-ends that Ray ended"] += 1
                self._processes[i] = self._start(i)

    def _kill(self) -> None:
        i = self._chance.randrange(len(self._processes))
        self._processes[i].kill()
        self._processes[i].wait()
        self._processes[i] = self._start(i)

    def _cut(self) -> None:
        self._server.terminate_backends()

    def _cut_one(self) -> None:
        """The connection of a front-end that is in a transaction, where there is one."""
        query = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'biodedup' "
            "AND state LIKE '%transaction%' LIMIT 1"
        )
        for _ in range(20):
            with self._server.connect() as connection:
                if connection.execute(query).fetchall():
                    return

    def _stop(self) -> None:
        process = self._chance.choice(self._processes)
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            time.sleep(self._chance.choice([0.1, 0.5, 3.0, 6.0]))
            process.send_signal(signal.SIGCONT)

    def _restart(self) -> None:
        self._server.stop()
        self._server.start()

    def _crash(self) -> None:
        self._server.stop(signal.SIGQUIT)
        self._server.start()

    # of Ray ----------------------------------------------------------------------------------------------------------

    def _start_ray(self) -> None:
        """A head without shards, which front-ends join by, and the nodes."""
        from tests.support.ray_cluster import without_driver

        self._ray = _persisting(lambda: without_driver(self._plan.ray_nodes))
        (self._folder / "ray").write_text(self._ray.address)

    def _actors(self) -> list[int]:
        """The process ids of actors."""
        raylets = [node.all_processes.get("raylet", []) for node in self._ray.worker_nodes]
        parents = {info.process.pid for several in raylets for info in several}
        found = []
        for about in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                is_actor = (about / "cmdline").read_bytes().startswith(b"ray::ShardActor")
                if is_actor and int((about / "stat").read_text().rpartition(")")[2].split()[1]) in parents:
                    found.append(int(about.name))
        return sorted(found)

    def _actor(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._chance.choice(self._actors() or [0x7FFFFFFF]), signal.SIGKILL)

    def _freeze(self) -> None:
        struck = self._chance.choice(self._actors() or [0x7FFFFFFF])
        with suppress(ProcessLookupError):
            os.kill(struck, signal.SIGSTOP)
            time.sleep(self._chance.choice([0.5, 3.0, 15.0]))
            os.kill(struck, signal.SIGCONT)

    def _node(self) -> None:
        node = self._chance.choice(sorted(self._ray.worker_nodes, key=lambda node: str(node.node_id)))
        self._ray.remove_node(node, allow_graceful=False)
        time.sleep(self._chance.choice([1.0, 20.0]))
        _persisting(lambda: self._ray.add_node(**NODE))

    def _gcs(self) -> None:
        """Without Redis a GCS that was killed comes back without its state, so that all of Ray is started anew."""
        self._ray.head_node.kill_gcs_server()
        time.sleep(self._chance.choice([2.0, 10.0]))
        self._ray.shutdown()
        self._start_ray()

    def _check_ray(self) -> None:
        """In the end a front-end finds all replicas again, and they answer as one process does."""
        import ray

        shown = pictures(self._plan)[0][:: self._plan.people // 50]
        with bd.Engine.open(self._url, config(self._plan, self._folder, None), read_only=True) as here:
            expected = here.search({"face": shown}, k=1).ids.tolist()
        ended = config(self._plan, self._folder, self._folder / "cache-ray", self._ray.address)
        with bd.Engine.open(self._url, ended, read_only=True) as there:
            until = time.monotonic() + 240
            keeper = internals(there).elsewhere.keeper
            while any(one["state"] != "serving" for one in keeper.status()) or len(keeper.status()) < 4:
                assert time.monotonic() < until, keeper.status()
                time.sleep(0.5)
            found = there.search({"face": shown}, k=1)
            assert not found.incomplete and found.ids.tolist() == expected
        if ray.is_initialized():
            ray.shutdown()

    def _note(self, fault: str) -> None:
        with (self._folder / "faults").open("a") as noted:
            noted.write(f"{time.time():.3f} {fault}\n")

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.cluster.torture", str(self._folder), "--front-end", str(number)]
        told = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        told["RAY_NUM_REDIS_GET_RETRIES"] = "1"  # to join a head that is gone: the next try asks where the new one is
        with (self._folder / f"err-{number}").open("ab") as errors:
            return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **told}, stderr=errors)

    def _answers(self) -> list[Path]:
        return [self._folder / f"answers-{i}.jsonl" for i in range(self._plan.front_ends * self._plan.threads)]

    # the promises ----------------------------------------------------------------------------------------------------

    def check(self) -> dict[str, object]:
        """Compares all answers with what two new front-ends hold."""
        given = [json.loads(line) for file in self._answers() for line in file.read_text().splitlines()]
        with (
            bd.Engine.open(self._url, config(self._plan, self._folder, None)) as first,
            bd.Engine.open(self._url, config(self._plan, self._folder, self._folder / "cache-check")) as second,
        ):
            enrolled = first.subject_ids()
            problems = _same_rows(first, second) + _answer_problems(first, given) + _row_problems(enrolled, given)
            problems += [f"problems(): {text}" for engine in (first, second) for text in engine.problems()]
            segments = len(internals(first).gallery.snapshot().segments)
        (self._folder / "problems").write_text("\n".join(problems))
        assert not problems, "\n".join(problems[:20])
        different = {answer["encounter"]: answer for answer in given}.values()
        outcomes = Counter(answer["outcome"] for answer in different)
        incomplete = sum(answer["incomplete"] for answer in different)
        again_sent = len(given) - sum(outcomes.values())
        return {
            "outcomes": dict(outcomes),
            "said to be incomplete": incomplete,
            "sent again": again_sent,
            "rows": len(enrolled),
            "segments": segments,
        }


def _person(subject_id: str) -> int:
    return int(subject_id[1:].partition("-")[0])


def _same_rows(first: bd.Engine, second: bd.Engine) -> list[str]:
    ids = first.subject_ids()
    if ids != second.subject_ids() or first.rows_of(ids).tolist() != second.rows_of(ids).tolist():
        return ["two front-ends see different rows"]
    recorded = [Counter(d.encounter_id for d in engine.decisions()) for engine in (first, second)]
    twice = [encounter_id for encounter_id, times in recorded[0].items() if times > 1]
    found = [] if recorded[0] == recorded[1] else ["two front-ends see different decisions"]
    return found + [f"{len(twice)} decisions are listed twice: {twice[:5]}"] * bool(twice)


def _answer_problems(engine: bd.Engine, given: list[dict]) -> list[str]:
    """Answers that are not the first ones, or not those that the register holds; duplicates of another person."""
    first: dict[str, dict] = {}
    found = []
    for answer in given:
        name = answer["encounter"]
        same = first.setdefault(name, answer)
        if any(same[field] != answer[field] for field in ("outcome", "subject", "reasons", "version", "best")):
            found.append(f"{name} got two answers: {same} and {answer}")
    for name, answer in first.items():
        held = engine.decision(name)
        if held is None or held.outcome != answer["outcome"] or held.gallery_version != answer["version"]:
            found.append(f"{name}: the register does not hold the answer {answer}")
        if answer["outcome"] == "duplicate":
            subject_id, _, similarity, _ = answer["best"]
            waits = "open_case" in answer["reasons"] and _is_open_case(subject_id, first)
            if _person(subject_id) != answer["person"] or similarity < MATE or not (waits or subject_id in engine):
                found.append(f"{name} is a duplicate of another person, or of no row: {answer}")
        elif answer["outcome"] == "review" and (answer["incomplete"] or _resembles_itself(answer)):
            pass  # for a person to judge: the search was incomplete, or the mate waits in such a case
        elif answer["outcome"] != "unique" or answer["incomplete"]:
            found.append(f"{name} is neither unique nor a duplicate: {answer}")
    return found


def _is_open_case(subject_id: str, first: dict[str, dict]) -> bool:
    """Whether its encounter is held for review, or its process was killed before it noted the answer."""
    held = first.get(f"e{subject_id[1:]}")
    return held is None or held["outcome"] == "review"


def _resembles_itself(answer: dict) -> bool:
    return answer["best"] is not None and _person(answer["best"][0]) == answer["person"] and answer["best"][2] >= MATE


def _row_problems(enrolled: list[str], given: list[dict]) -> list[str]:
    """People with more rows than one, or with none though no case of theirs waits."""
    waiting = {answer["person"] for answer in given if answer["outcome"] == "review"}
    rows = defaultdict(list)
    for subject_id in enrolled:
        rows[_person(subject_id)].append(subject_id)
    found = [f"person {person} is enrolled twice: {ids}" for person, ids in rows.items() if len(ids) > 1]
    for answer in given:
        if answer["outcome"] == "unique" and rows[answer["person"]] != [answer["subject"]]:
            found.append(f"acknowledged, and not there: {answer}")
        elif not rows[answer["person"]] and answer["person"] not in waiting:
            found.append(f"person {answer['person']} has no row: {answer}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--front-end", type=int)
    for name in ("seed", "people", "front_ends", "threads", "seal_rows", "ray_nodes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Plan, name))
    for name in ("seconds", "every_s", "pause_s"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Plan, name))
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--faults", nargs="*")
    given = vars(parser.parse_args())
    if given["faults"] is None:
        given["faults"] = (*Plan.faults, *(RAY_FAULTS if given["ray_nodes"] else ()))
    folder, number = given.pop("folder"), given.pop("front_end")
    if number is not None:
        FrontEnd(folder, number).run()
        return
    source = binaries()
    assert source is not None, "there is no PostgreSQL"
    server = Postgres(source)
    try:
        report = Run(server, server.url("torture"), folder.resolve(), Plan(**given)).run()
        sys.stdout.write(json.dumps(report) + "\n")
    finally:
        server.close()


if __name__ == "__main__":
    main()
