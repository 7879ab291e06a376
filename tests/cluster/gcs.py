"""A front-end whose Ray cluster loses its GCS: searches once a second before, without, and with a new GCS, and prints each answer as a line.

A program of its own, because Ray may end the process whose GCS is gone. `python -m tests.cluster.gcs URL STORE SECONDS`
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import biodedup as bd
from biodedup.testing import internals
from tests.support.ray_cluster import started
from tests.support.vectors import again, people


def main(url: str, store: str, seconds: float) -> None:
    cluster = started()
    asked = bd.ClusterConfig(segments=store, ray_address=cluster.address, shard_deadline_ms=10_000)
    engine = bd.Engine.open(url, bd.Config(gallery=bd.GalleryConfig(background=False), cluster=asked), read_only=True)
    keeper = internals(engine).elsewhere.keeper
    while [one["state"] for one in keeper.status()] != ["serving", "serving"]:
        time.sleep(0.2)
    probes = again(people(1_001, seed=4)[[5, 8]], 0.8)

    def look(phase: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.monotonic()
            try:
                found = engine.search({"face": probes}, k=1)
                said = {"ids": found.ids[:, 0].tolist(), "incomplete": found.incomplete}
            except bd.RetryableError as error:
                said = {"error": type(error).__name__}
            sys.stdout.write(json.dumps({"phase": phase, "seconds": time.monotonic() - began, **said}) + "\n")
            sys.stdout.flush()
            time.sleep(1)

    look("before", 1)
    cluster.head_node.kill_gcs_server()
    look("without", seconds)
    threading.Thread(target=cluster.head_node.start_gcs_server, daemon=True).start()
    look("after", seconds)
    os._exit(0)  # Ray's processes end with this one


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
