"""A register whose segments are searched by actors of a real Ray cluster: what dies, and what the front-end then says."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup.cluster.shards.placement import Place
from biodedup.testing import internals
from tests.support import ROOT
from tests.support.shell import run
from tests.support.vectors import again, people

ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")

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


def test_what_fits_on_no_node_is_not_started_and_the_command_says_why(front_end, register, cluster, tmp_path):
    taken = {one["process_id"] for one in status(front_end)}
    asked = {"ray_address": cluster.address, "cache": tmp_path / "d", "node_bytes_max": 1_000}
    small = register(cluster=asked)
    assert status(small) == [] and search(small).incomplete and not is_unique(small)
    settings = (
        f'[cluster]\nsegments = "file://{tmp_path}/store"\nray_address = "{cluster.address}"\nnode_bytes_max = 1000\n'
    )
    (tmp_path / "settings.toml").write_text(settings)
    command = ("cluster", "status", register.url, "--config", "settings.toml")
    code, out, error = run(*command, "--json", cwd=tmp_path)
    assert code == 0, error
    told = json.loads(out)
    (shortage,) = told["shortages"]
    assert "room for 0 replicas, wanted 2" in shortage and "1,000, 1,000 bytes left; start another node" in shortage
    assert {one["bytes_max"] for one in told["nodes"]} == {1_000}
    assert all(one["scanned_bytes"] > 1_000 for one in told["nodes"])  # of the other front-end's actors
    assert {one["process_id"] for one in told["replicas"]} == taken
    code, out, error = run(*command, cwd=tmp_path)
    assert code == 0 and shortage.split(":")[0] in out.replace("\n", " "), error
    small.close()
    register(cluster={**asked, "node_bytes_max": 10**6})  # it has room, and takes the note away
    code, out, error = run(*command, "--json", cwd=tmp_path)
    assert code == 0 and json.loads(out)["shortages"] == [], error


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


def test_searches_go_on_without_a_gcs_and_a_front_end_that_is_started_again_finds_everything(
    front_end, register, cluster, tmp_path
):
    command = [sys.executable, "-m", "tests.cluster.gcs", register.url, f"file://{tmp_path}/store", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["phase"] for one in said} == {"before", "without", "after"}, done.stderr
    assert {(*one["ids"], one["incomplete"]) for one in said} == {("s5", "s8", False)}
    # Ray ends that front-end about a minute later. This one is in a cluster that was started anew, and only the store and PostgreSQL are the same.
    assert search(front_end).ids[0, 0] == "s5" and not search(front_end).incomplete


def test_actors_search_an_encrypted_register_whose_key_their_nodes_fetch(register, cluster, tmp_path, monkeypatch):
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "key").chmod(0o600)
    config = bd.Config(gallery=bd.GalleryConfig(background=False), keys=bd.KeyProvider(file=tmp_path / "key"))
    with register(config) as engine:
        engine.add_templates([f"s{i}" for i in range(LAST)], {"face": VECTORS[:LAST]})
        engine.seal()
    engine = register(config, cluster={"ray_address": cluster.address, "cache": tmp_path / "c"})
    until(lambda: states(engine) == ["serving", "serving"])
    monkeypatch.setattr("biodedup.cluster.shards.remote.RemoteShard._here", _never)
    found = engine.search({"face": again(VECTORS[[5, 8]], 0.8)}, k=1)
    assert found.ids[:, 0].tolist() == ["s5", "s8"] and not found.incomplete
    internals(engine).elsewhere.keeper.close()
    for replica in actors(engine):
        replica.end()


@contextmanager
def searching(engine: bd.Engine) -> Iterator[list[str]]:
    """Searches all the time; the answers that are not those of an undisturbed gallery come into the list."""
    expected, ended, wrong = search(engine).ids.tolist(), threading.Event(), []

    def look() -> None:
        while not ended.is_set():
            found = search(engine)
            if found.incomplete or found.ids.tolist() != expected:
                wrong.append(f"incomplete: {found.incomplete}")
            time.sleep(0.1)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield wrong
    finally:
        ended.set()
        thread.join()


def test_a_node_that_the_command_starts_takes_replicas_and_one_is_drained_meanwhile_every_search_is_complete(
    front_end, cluster, tmp_path
):
    known = {node["NodeID"] for node in ray.nodes()}
    address = ("--ray", cluster.address, "--json")
    code, _, error = run("cluster", "up", "shards", "--cpus", 1, *address, cwd=tmp_path)
    assert code == 0, error
    until(lambda: sum(node["Alive"] for node in ray.nodes()) == 3)
    (new,) = (node["NodeID"] for node in ray.nodes() if node["NodeID"] not in known)
    try:
        until(lambda: states(front_end) == ["serving", "serving"])
        drained = status(front_end)[0]["node"]
        with searching(front_end) as wrong:
            code, out, error = run("cluster", "drain", drained[:16], "--wait", 200, *address, cwd=tmp_path)
            assert code == 0, error
            assert json.loads(out)["ended"] >= 1 and json.loads(out)["asked"] == 0
            until(lambda: states(front_end) == ["serving", "serving"])
        assert wrong == []
        assert drained not in {one["node"] for one in status(front_end)}
        code, _, error = run("cluster", "drain", drained[:16], "--undo", *address, cwd=tmp_path)
        assert code == 0, error
    finally:
        end_node(new)
    until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
    until(lambda: states(front_end) == ["serving", "serving"])


def end_node(node: str) -> None:
    """Kills the Ray process of a node that this process did not start, whose other processes end with it."""
    for about in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (about / "cmdline").read_bytes()
            if b"raylet" in line.split(b"\0")[0] and node.encode() in line:
                os.kill(int(about.name), signal.SIGKILL)


def test_an_upgrade_ends_the_actors_of_another_release_and_no_search_is_incomplete(
    front_end, register, cluster, tmp_path, monkeypatch
):
    (tmp_path / "settings.toml").write_text(f'[cluster]\nsegments = "file://{tmp_path}/store"\n')
    elsewhere = internals(front_end).elsewhere
    with monkeypatch.context() as patched:
        patched.setattr("biodedup.cluster.shards.wire.release", lambda: "0.0.1/1")
        old = elsewhere.keeper._nodes.start(Place(0, status(front_end)[0]["node"], 0))
    assert "/0.0.1/1/" in old.name and old.about().result(timeout=60)
    asked = ("cluster", "upgrade", register.url, "--ray", cluster.address, "--config", "settings.toml", "--wait", 100)
    with searching(front_end) as wrong:
        code, out, error = run(*asked, "--json", cwd=tmp_path)
    assert code == 0, error
    told = json.loads(out)
    assert (told["serving"], told["wanted"], told["ended"], told["asked"]) == (2, 2, 1, 0)
    assert wrong == [] and states(front_end) == ["serving", "serving"]


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
