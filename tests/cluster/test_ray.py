"""A register whose segments are searched by actors of a real Ray cluster: what dies, and what the front-end then says."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup.testing import internals
from tests.support.vectors import again, people

ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
]

VECTORS = people(3_000, seed=4)


@pytest.fixture(scope="module")
def address():
    """Two nodes on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, namespace="biodedup", log_to_driver=False, logging_level="warning")
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def front_end(register, address, tmp_path: Path):
    """A front-end of a register with 3,000 sealed people and one in the tail."""
    config = bd.Config(gallery=bd.GalleryConfig(background=False))
    with register(config) as engine:
        engine.add_templates([f"s{i}" for i in range(2_999)], {"face": VECTORS[:2_999]})
        engine.seal()
        engine.add_templates(["s2999"], {"face": VECTORS[2_999:]})
        engine.remove("s7")
    engine = register(config, cluster={"ray_address": address, "cache": tmp_path / "c", "shard_deadline_ms": 1_500})
    yield engine
    for replica in actors(engine):
        ray.kill(replica._actor)


def actors(engine: bd.Engine) -> list:
    return engine._elsewhere._replicas[0]


def process_of(replica) -> int:
    return ray.get(replica.call("process_id", "load"), timeout=30)


def search(engine: bd.Engine):
    probes = again(VECTORS[[5, 7, 2_999]], 0.8)
    return engine.search({"face": probes}, k=5)


def test_actors_on_two_nodes_answer_as_one_process_and_survive_what_dies(front_end, register, monkeypatch):
    there = search(front_end)
    here = search(register())
    assert there.ids.tolist() == here.ids.tolist() and there.similarity.tobytes() == here.similarity.tobytes()
    assert there.ids[:, 0].tolist()[::2] == ["s5", "s2999"]
    assert not there.incomplete
    first, second = actors(front_end)
    nodes = {ray.get(r._actor.__ray_call__.remote(node_id), timeout=30) for r in (first, second)}
    assert len(nodes) == 2

    # from here on no search of a unit happens in this process
    monkeypatch.setattr("biodedup.cluster.shards.remote.RemoteShard._here", _never)

    stopped = process_of(first)
    os.kill(stopped, signal.SIGSTOP)
    try:
        started = time.monotonic()
        for _ in range(4):
            assert search(front_end).ids.tolist() == here.ids.tolist()
        assert time.monotonic() - started < 8  # one deadline, not four
    finally:
        os.kill(stopped, signal.SIGCONT)

    os.kill(process_of(first), signal.SIGKILL)
    for _ in range(3):
        found = search(front_end)
        assert found.ids.tolist() == here.ids.tolist() and not found.incomplete

    for replica in (first, second):
        ray.kill(replica._actor)
    decision = front_end.identify(bd.Encounter(templates={"face": people(1, seed=99)[0]}))
    assert decision.incomplete and decision.outcome != "unique"
    assert search(front_end).incomplete


def test_actors_are_told_of_a_new_segment_and_meanwhile_nothing_is_missed(front_end):
    front_end.seal()
    found = search(front_end)
    assert found.ids[2, 0] == "s2999" and not found.incomplete
    until = time.monotonic() + 30
    while min(len(ray.get(r.call("generations", "load"), timeout=30)) for r in actors(front_end)) < 2:
        assert time.monotonic() < until
        search(front_end)
        time.sleep(0.2)
    assert search(front_end).ids.tolist() == found.ids.tolist()


def node_id(actor: object) -> str:
    return str(ray.get_runtime_context().get_node_id())


def _never(self):
    raise AssertionError("a replica has these segments")


def test_a_vector_of_a_removed_person_is_not_found_by_an_actor(front_end):
    assert "s7" not in search(front_end).ids.tolist()[1]
    assert internals(front_end).gallery.snapshot().tombstones.tolist() == [7]
    assert np.isfinite(search(front_end).similarity).all()
