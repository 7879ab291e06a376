"""Front-ends of one register on PostgreSQL: enrolments a second, of several processes that enrol at once.

    python benchmarks/front_ends.py                      four processes with eight threads each, a minute
    python benchmarks/front_ends.py --processes 1        one process
    python benchmarks/front_ends.py --gallery FOLDER --ray-nodes 3   into a register that is not empty, searched by Ray actors
    python benchmarks/front_ends.py --smoke              a few seconds; keeps no result

The server is the tests' own: a wheel's binaries on this machine, `fsync` on, reached over a socket. Subjects have a face vector each, all
different; each enrolment searches what is enrolled so far. The peer, in the same run: as many connections that insert a row of as many
bytes and commit, one row a transaction. `--gallery`: of `national.py --only build`; its rows are moved to the register before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psycopg

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' server

from nodes import moved, ray_cluster
from report import record

import biodedup as bd
from tests.support.vectors import SFACE, people


def front_end(url: str, segments: str, address: str, number: int, threads: int, seconds: float) -> None:
    """One process: prints a line when it is ready, begins at a line of its input, and prints two lines: the processor time of an enrolment,
    and the time of each, in ms. address: of Ray, or ''."""
    vectors = people(int(1_000 * seconds), seed=1_000 + number)
    cluster = bd.ClusterConfig(segments=segments, ray_address=address or None)
    taken: list[float] = []
    with bd.Engine.open(url, bd.Config(cluster=cluster, threads=1)) as engine:
        engine.enroll(bd.Encounter(f"first-{number}", templates={"face": people(1, seed=number)[0]}, model_id=SFACE))
        print("ready", flush=True)
        sys.stdin.readline()
        end, cpu_s = time.monotonic() + seconds, time.process_time()

        def enrol(first: int) -> None:
            for i in range(first, len(vectors), threads):
                if time.monotonic() > end:
                    return
                started = time.perf_counter()
                decision = engine.enroll(bd.Encounter(f"s{number}-{i}", templates={"face": vectors[i]}, model_id=SFACE))
                taken.append(1000 * (time.perf_counter() - started))
                # a few of the vectors drawn resemble one another
                assert decision.outcome in ("unique", "review") and not decision.incomplete, decision

        workers = [threading.Thread(target=enrol, args=(first,)) for first in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        cpu_s = time.process_time() - cpu_s
    print(f"{1000 * cpu_s / max(len(taken), 1):.3f}", flush=True)
    print(" ".join(f"{value:.2f}" for value in taken), flush=True)


def commits(base: str, connections: int, seconds: float) -> float:
    """Rows a second that so many connections insert and commit one by one."""
    with psycopg.connect(base, autocommit=True) as connection:
        connection.execute("CREATE TABLE peer (id bigserial PRIMARY KEY, content bytea)")
    counts, end = [0] * connections, time.monotonic() + seconds

    def insert(at: int) -> None:
        with psycopg.connect(base, autocommit=True) as connection:
            while time.monotonic() < end:
                connection.execute("INSERT INTO peer (content) VALUES (%s)", (bytes(2_000),))
                counts[at] += 1

    workers = [threading.Thread(target=insert, args=(at,)) for at in range(connections)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--gallery", type=Path, help="what the register has before")
    parser.add_argument("--ray-nodes", type=int, default=0, help="3: searched by actors")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--front-end", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.processes, options.threads, options.seconds = 2, 2, 2.0
    if options.front_end:
        url, segments, address, number = options.front_end
        front_end(url, segments, address, int(number), options.threads, options.seconds)
        return
    with ExitStack() as stack:
        register = stack.enter_context(moved(options.gallery, 0))
        address = stack.enter_context(ray_cluster()).address if options.ray_nodes else ""
        given = [*("--threads", str(options.threads)), *("--seconds", str(options.seconds)), "--front-end"]
        command = [sys.executable, __file__, *given, register.url, register.segments, address]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        running = [subprocess.Popen([*command, str(n)], **pipes) for n in range(options.processes)]
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        printed = [process.communicate()[0].split("\n") for process in running]
        cpu_ms = np.mean([float(lines[0]) for lines in printed])
        taken = np.array([float(ms) for lines in printed for ms in lines[1].split()])
        peer = commits(register.url.partition("&gallery=")[0], options.processes, min(options.seconds, 10.0))
    rate = len(taken) / options.seconds
    figures = {
        "processes, threads each": f"{options.processes}, {options.threads}",
        "rows before": register.rows,
        "Ray": bool(options.ray_nodes),
        "enrolments a second": round(rate, 1),
        "processor time of an enrolment, ms": round(float(cpu_ms), 2),
        "enrolment, ms p50 / p99": f"{np.median(taken):.1f} / {np.quantile(taken, 0.99):.1f}",
        "peer: single-row commits a second": round(peer, 1),
        "ratio": round(rate / peer, 3),
    }
    record("front-ends", figures, keep=not options.smoke)


if __name__ == "__main__":
    main()
