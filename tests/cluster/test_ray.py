"""A register whose segments are searched by actors of a real Ray cluster: what dies, and what the front-end then says."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup.testing import internals
from tests.support.shell import run
from tests.support.vectors import again, people

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
]

LAST = 1_000
VECTORS = people(LAST + 1, seed=4)


@pytest.fixture
def front_end(register, cluster, tmp_path: Path):
    """A front-end of a register with 1,000 sealed people and one in the tail."""
    config = bd.Config(gallery=bd.GalleryConfig(background=False))
    with register(config) as engine:
        engine.add_templates([f"s{i}" for i in range(LAST)], {"face": VECTORS[:LAST]})
        engine.seal()
        engine.add_templates([f"s{LAST}"], {"face": VECTORS[LAST:]})
        engine.remove("s7")
    asked = {"ray_address": cluster.address, "cache": tmp_path / "c", "shard_deadline_ms": 10_000}
    engine = register(config, cluster=asked)
    until(lambda: states(engine) == ["serving", "serving"])
    yield engine
    internals(engine).elsewhere.keeper.close()
    for replica in actors(engine):
        replica.end()


def until(holds, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


def actors(engine: bd.Engine) -> list:
    return internals(engine).elsewhere.keeper.replicas_of(0)


def status(engine: bd.Engine) -> list[dict]:
    return internals(engine).elsewhere.keeper.status()


def states(engine: bd.Engine) -> list[str]:
    return [one["state"] for one in status(engine)]


def process_ids(engine: bd.Engine) -> set[int]:
    return {one["process_id"] for one in status(engine)}


def search(engine: bd.Engine):
    probes = again(VECTORS[[5, 7, LAST]], 0.8)
    return engine.search({"face": probes}, k=5)


def is_unique(engine: bd.Engine) -> bool:
    decision = engine.identify(bd.Encounter(templates={"face": people(1, seed=99)[0]}))
    assert decision.incomplete == (decision.outcome != "unique")
    return decision.outcome == "unique"


def test_actors_on_two_nodes_answer_as_one_process_and_one_may_die_or_stand_still(front_end, register, monkeypatch):
    there = search(front_end)
    here = search(register())
    assert there.ids.tolist() == here.ids.tolist() and there.similarity.tobytes() == here.similarity.tobytes()
    assert there.ids[:, 0].tolist()[::2] == ["s5", f"s{LAST}"] and "s7" not in there.ids[1].tolist()
    assert not there.incomplete
    first, second = status(front_end)
    assert first["node"] != second["node"]

    # from here on no search of a unit happens in this process
    monkeypatch.setattr("biodedup.cluster.shards.remote.RemoteShard._here", _never)

    os.kill(first["process_id"], signal.SIGSTOP)
    try:
        for _ in range(4):
            found = search(front_end)
            assert found.ids.tolist() == here.ids.tolist() and not found.incomplete
        until(lambda: "silent" in states(front_end))
    finally:
        os.kill(first["process_id"], signal.SIGCONT)
    until(lambda: states(front_end) == ["serving", "serving"])

    os.kill(first["process_id"], signal.SIGKILL)
    for _ in range(3):
        found = search(front_end)
        assert found.ids.tolist() == here.ids.tolist() and not found.incomplete
    assert is_unique(front_end)
    until(lambda: states(front_end) == ["serving", "serving"] and first not in status(front_end))


def test_without_replicas_a_search_is_incomplete_and_never_unique_and_they_come_again(front_end, monkeypatch):
    internals(front_end).elsewhere.keeper.close()
    ended = {one["process_id"] for one in status(front_end)}
    for replica in actors(front_end):
        replica.end()
    assert search(front_end).incomplete and not is_unique(front_end)
    internals(front_end).elsewhere.keeper._ended.clear()
    internals(front_end).elsewhere.keeper.watch()
    until(lambda: states(front_end) == ["serving", "serving"] and ended.isdisjoint(process_ids(front_end)))
    monkeypatch.setattr("biodedup.cluster.shards.remote.RemoteShard._here", _never)
    assert is_unique(front_end) and not search(front_end).incomplete


def test_actors_open_a_new_segment_and_meanwhile_nothing_is_missed(front_end):
    front_end.seal()
    found = search(front_end)
    assert found.ids[2, 0] == f"s{LAST}" and not found.incomplete
    until(lambda: states(front_end) == ["serving", "serving"])
    assert search(front_end).ids.tolist() == found.ids.tolist()


def test_the_command_shows_nodes_and_replicas_and_starts_none(front_end, register, cluster, tmp_path):
    settings = f'[cluster]\nsegments = "file://{tmp_path}/store"\n'
    (tmp_path / "settings.toml").write_text(settings)
    asked = ("cluster", "status", register.url, "--ray", cluster.address, "--config", "settings.toml")
    code, out, error = run(*asked, "--json", cwd=tmp_path)
    assert code == 0, error
    told = json.loads(out)
    assert (told["segments"], told["unserved"], told["rows"]) == (1, [], LAST + 1)
    assert {(one["state"], one["node"], one["process_id"]) for one in told["replicas"]} == {
        ("serving", one["node"], one["process_id"]) for one in status(front_end)
    }
    assert sum(one["replicas"] for one in told["nodes"]) == 2
    code, out, error = run(*asked, cwd=tmp_path)
    assert code == 0 and "serving" in out and f"{LAST + 1:,} rows" in out, error


def test_a_lost_node_and_one_that_joins(front_end, cluster):
    lost = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    expected = search(front_end).ids.tolist()
    nodes = {one["node"] for one in status(front_end)}
    victim = next(node for node in (lost, *cluster.worker_nodes) if node.node_id in nodes)
    cluster.remove_node(victim, allow_graceful=False)

    def replaced() -> bool:
        found = search(front_end)
        assert found.ids.tolist() == expected and not found.incomplete
        placed = status(front_end)
        return victim.node_id not in {one["node"] for one in placed} and states(front_end) == ["serving", "serving"]

    until(replaced)
    assert is_unique(front_end)


def test_answers_are_right_or_incomplete_while_actors_die_and_the_gallery_changes(front_end):
    random, ended, wrong, complete = np.random.default_rng(5), threading.Event(), [], itertools.count()
    removed = [f"s{i}" for i in range(100, 200)]

    def look() -> None:
        """Searches for people who are enrolled all the time, for one after the other."""
        for i in itertools.cycle(range(10, 90)):
            if ended.is_set():
                return
            try:
                templates = {"face": again(VECTORS[[i]], 0.8)[0]}
                decision = front_end.identify(bd.Encounter(templates=templates))
            except bd.RetryableError:
                continue
            strongest = decision.candidates[0].subject_id if decision.candidates else None
            if decision.outcome == "unique" or (not decision.incomplete and strongest != f"s{i}"):
                wrong.append((i, decision.outcome, strongest))
            if not decision.incomplete:
                next(complete)

    searches = [threading.Thread(target=look) for _ in range(2)]
    for thread in searches:
        thread.start()
    try:
        for step in range(9):
            running = [one["process_id"] for one in status(front_end) if one["process_id"]]
            struck = int(random.choice(running)) if running else None
            with suppress(ProcessLookupError):
                if struck is not None:
                    os.kill(struck, signal.SIGSTOP if step % 3 else signal.SIGKILL)
            front_end.remove(removed.pop())
            front_end.add_templates([f"n{step}"], {"face": people(1, seed=1_000 + step)})
            front_end.seal()
            if step % 4 == 3:
                front_end.compact()
            time.sleep(1)
            with suppress(ProcessLookupError):
                if struck is not None:
                    os.kill(struck, signal.SIGCONT)
            probes = np.concatenate([people(1, seed=1_000 + step), VECTORS[[int(removed[-1][1:])]]])
            found = front_end.search({"face": probes}, k=1)
            assert found.incomplete or found.ids.tolist() == [[f"n{step}"], [removed[-1]]]
    finally:
        ended.set()
        for thread in searches:
            thread.join()
    assert wrong == []
    assert next(complete) > 0
    until(lambda: states(front_end) == ["serving", "serving"] and not search(front_end).incomplete)


def _never(self):
    raise AssertionError("a replica has these segments")
