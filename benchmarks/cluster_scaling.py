"""How long a search takes on 1, 4, 16 and 64 nodes, simulated from measured pieces; no cluster is started.

    python benchmarks/cluster_scaling.py             200 million faces
    python benchmarks/cluster_scaling.py --smoke     few draws; keeps no result

Measured here: the front-end's work for each node (encoding the query, decoding the answer, its part of the merge). Taken from the other
benchmarks: the rates of a scan (`speed.py`, 10 million rows of 128 numbers on two cores) and what a call of a Ray actor costs (`nodes.py
overhead`: 3.3 ms for three groups). Assumed: a node is eight times as fast as those two cores; the work for calls is done one after another,
which is the worst case; a node's time varies by a log-normal factor. With hedging, a node that is slower than the 95th percentile is asked
a second time, and the faster answer counts.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from report import record

from biodedup.cluster.shards import wire
from biodedup.search.shards.base import ShardHits
from biodedup.search.shards.fan_out import top_k

ROWS, NODES, K, DIMENSION = 200_000_000, (1, 4, 16, 64), 10, 128
SCAN_S = {1: 0.0201, 256: 0.634}
"""Probes -> seconds for 10 million rows on two cores (`speed.py`, 2026-11-30)."""
SCAN_ROWS, NODE_SPEED, SPREAD, CALL_S, DRAWS = 10_000_000, 8.0, 0.25, 0.0033 / 3, 20_000


def hits_of(probes: int, node: int) -> ShardHits:
    rng = np.random.default_rng([5, node])
    which = np.repeat(np.arange(probes), K)
    similarity = rng.random(len(which), np.float32)
    rows = rng.integers(0, ROWS, len(which))
    return ShardHits(which, rows, similarity, np.zeros(probes, np.float32), 1, SCAN_ROWS)


def front_end_s(probes: int, nodes: int) -> float:
    """Seconds of the front-end for all nodes, the median of nine: queries encoded, answers decoded and merged."""
    vectors = np.zeros((probes, DIMENSION), np.float32)
    answers = [wire.hits_message(hits_of(probes, node)).sent() for node in range(nodes)]
    took = []
    for _ in range(9):
        started = time.perf_counter()
        for _ in range(nodes):
            wire.Message({"kind": "nearest"}, {"probe.": vectors}).sent()
        hits = [wire.hits_of(*wire.received(answer), 1) for answer in answers]
        top_k(hits, probes, K)
        took.append(time.perf_counter() - started)
    return float(np.median(took))


def simulated(probes: int, nodes: int, draws: int, *, hedged: bool) -> np.ndarray:
    """Seconds of each search, float64 (draws,)."""
    rng = np.random.default_rng([7, probes, nodes])
    scan = SCAN_S[probes] * ROWS / SCAN_ROWS / NODE_SPEED / nodes
    took = scan * rng.lognormal(0.0, SPREAD, (draws, nodes))
    if hedged and nodes > 1:
        late = float(np.quantile(took, 0.95))
        took = np.minimum(took, np.where(took > late, late + scan * rng.lognormal(0.0, SPREAD, took.shape), np.inf))
    return np.asarray(took.max(axis=1) + nodes * CALL_S + front_end_s(probes, nodes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    figures: dict[str, Any] = {"rows": ROWS}
    for probes in SCAN_S:
        each = front_end_s(probes, 16) / 16 + CALL_S
        figures[f"{probes} probes: front-end, ms a node"] = round(1000 * each, 2)
        for nodes in NODES:
            plain, hedged = (simulated(probes, nodes, 200 if smoke else DRAWS, hedged=on) for on in (False, True))
            p50, p99, p99_hedged = np.quantile(plain, 0.5), np.quantile(plain, 0.99), np.quantile(hedged, 0.99)
            figures[f"{probes} probes, {nodes} nodes: p50, p99, p99 hedged, ms"] = (
                f"{1000 * p50:.0f}, {1000 * p99:.0f}, {1000 * p99_hedged:.0f}"
            )
        whole = SCAN_S[probes] * ROWS / SCAN_ROWS / NODE_SPEED
        figures[f"{probes} probes: most nodes that make a search faster"] = round(float(np.sqrt(whole / each)))
    record("cluster_scaling", figures, keep=not smoke)


if __name__ == "__main__":
    main()
