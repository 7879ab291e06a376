"""A front-end of test_head.py: searches and enrols until its standard input ends, and prints each answer as a line.

A program of its own, because Ray ends a process that has been without its head for a minute. `python -m tests.cluster.head URL STORE CACHE ADDRESS`
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from typing import Any

import biodedup as bd
from biodedup.testing import internals
from tests.support.ray_head import FRONT_END
from tests.support.vectors import SFACE, again, people

NODES = 4
FIRST_NEW = 1_001
PEOPLE = people(FIRST_NEW + 1_000, seed=4)


def joined(address: str) -> None:
    """Joins the cluster through the node of front-ends, once all nodes are there."""
    import ray

    until = time.monotonic() + 240
    while True:
        try:
            ray.init(
                address=address,
                _node_ip_address=FRONT_END,
                namespace="biodedup",
                log_to_driver=False,
                logging_level="warning",
            )
            break
        except Exception:  # Ray's errors here have no common class
            if time.monotonic() > until:
                raise
            time.sleep(1)
    while sum(node["Alive"] for node in ray.nodes()) < NODES:
        assert time.monotonic() < until
        time.sleep(0.5)


def look(engine: bd.Engine, person: int) -> dict[str, Any]:
    """Searches for two people whose rows the actors hold, enrols a new person, and offers that person again under another id."""
    began = time.monotonic()
    found = engine.search({"face": again(PEOPLE[[5, 8]], 0.8)}, k=1)
    face = bd.Template("face", SFACE, PEOPLE[person])
    offered = [bd.Encounter(f"{name}{person}", templates={"face": face}) for name in ("new", "twin")]
    outcomes = [engine.enroll(encounter).outcome for encounter in offered]
    seconds = time.monotonic() - began
    return {"ids": found.ids[:, 0].tolist(), "incomplete": found.incomplete, "outcomes": outcomes, "seconds": seconds}


def main(url: str, store: str, cache: str, address: str) -> None:
    joined(address)
    cluster = bd.ClusterConfig(segments=store, cache=cache, ray_address=address, shard_deadline_ms=10_000)
    engine = bd.Engine.open(url, bd.Config(gallery=bd.GalleryConfig(background=False), cluster=cluster))
    keeper = internals(engine).elsewhere.keeper
    while [one["state"] for one in keeper.status()] != ["serving", "serving"]:
        time.sleep(0.2)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    for person in itertools.count(FIRST_NEW):
        sys.stdout.write(json.dumps(look(engine, person)) + "\n")
        sys.stdout.flush()
        time.sleep(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
