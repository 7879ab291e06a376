"""Shards that replicas elsewhere search, against the search of one process: the same answers, and what failures do. Without Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import biodedup as bd
from biodedup.cluster.cache import copies_of
from biodedup.cluster.shards import host as hosting
from biodedup.cluster.shards import ray_actors, wire
from biodedup.cluster.shards.asking import ReplicaFailed
from biodedup.cluster.shards.host import ShardHost
from biodedup.cluster.shards.remote import RemoteShards, units_of
from biodedup.cluster.store import SegmentStore
from biodedup.errors import StorageUnavailable
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.segments import indexing
from biodedup.search.multicolumn import plan as multicolumn_plan
from biodedup.search.shards import cells, native
from biodedup.search.shards import faiss as faiss_engine
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals
from tests.support.laws import FACE, FINGER
from tests.support.vectors import people

pytestmark = pytest.mark.slow

on_native = pytest.mark.parametrize("indexed", ["native"], indirect=True, scope="module")
COLUMNS = ("face", "left_index", "right_index")
ROWS = 5_000
REGISTER = "0123456789abcdef"


@dataclass
class HostReplica:
    """A replica in this process."""

    name: str
    host: ShardHost
    state: str = "alive"
    is_well: bool = True
    asked: int = 0
    told: list[str] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        return self.state != "starting"

    def search(self, sent: wire.Sent) -> Future[wire.Sent]:
        self.asked += 1
        if self.state == "dead":
            raise ReplicaFailed("dead")
        answer: Future[wire.Sent] = Future()
        answer.set_result(self.host.search(sent))
        return answer

    def take(self, entries_text: str) -> None:
        self.told.append(entries_text)


@dataclass
class Built:
    engine: bd.Engine
    vectors: dict[str, np.ndarray]
    folder: Path
    store: Path

    @property
    def snapshot(self):
        return internals(self.engine).gallery.snapshot()

    def upload(self) -> list[str]:
        """Puts all segments into the store; returns the texts that name its units."""
        store = SegmentStore(f"file://{self.store}", REGISTER)
        for copy in copies_of(segment.entry for segment in self.snapshot.segments):
            store.upload(self.folder / "segments" / copy.name, copy.stored)
        return [unit.entries_text for unit in units_of(self.snapshot)]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Iterator[Built]:
    """Sealed rows of three kinds, in groups, some removed; a tail; an open case in each; a pair that a person cleared."""
    root = tmp_path_factory.mktemp("shards")
    vectors = {column: people(ROWS, seed=i) for i, column in enumerate(COLUMNS)}
    config = bd.Config(
        gallery=bd.GalleryConfig(seal_rows=1_000_000, background=False),
        policy=bd.Policy(duplicate_db=110, review_db=50),
    )
    with pytest.MonkeyPatch.context() as patched, bd.Engine.open(root / "g", config) as engine:
        patched.setattr(multicolumn_plan, "ROWS_MIN", 1_000)
        patched.setattr(cells, "EXACT_CELLS", 0)
        patched.setattr(indexing, "CELLS_MIN", 1_000)
        patched.setattr(native, "TABLE_SHARES", native.TABLE_SHARES[:1])  # choosing the cheapest tables takes seconds
        for module in (native, faiss_engine):
            patched.setattr(module, "_SHARE_MAX", 1.0)
        laws = {"external-128": FINGER}
        patched.setattr(internals(engine).comparer, "_calibration_of", lambda model_id, *_: laws.get(model_id, FACE))

        def add(low: int, high: int, columns: tuple[str, ...]) -> None:
            for group, start in (("north", low), ("south", low + 1)):
                rows = range(start, high, 2)
                engine.add_templates(
                    [f"s{row}" for row in rows], {c: vectors[c][rows] for c in columns}, groups=[[group]] * len(rows)
                )

        def dispute(row: int) -> None:
            templates = {c: mates_of(vectors[c][row : row + 1], np.array([0.7]), seed=row)[0] for c in COLUMNS}
            engine.dispute(bd.Encounter(f"s{row}", templates=templates, encounter_id=f"case{row}"))

        add(0, 2_500, COLUMNS)
        add(2_500, 4_000, ("face", "right_index"))
        dispute(1)
        internals(engine).gallery.seal()
        add(4_000, 4_800, ("face",))
        internals(engine).gallery.seal()
        add(4_800, ROWS, COLUMNS)
        dispute(11)
        for row in range(0, ROWS, 97):
            engine.remove(f"s{row}")
        assert engine.enroll(replace(like_301(vectors), encounter_id="cleared")).outcome == "review"
        assert engine.adjudicate("cleared", "different", "clerk").outcome == "unique"
        assert len(internals(engine).gallery.snapshot().different)
        yield Built(engine, vectors, root / "g", root / "store")


@pytest.fixture(params=["native", "faiss:IVF4,SQ8"], scope="module")
def indexed(request, built) -> Built:
    built.engine.reindex(request.param)
    assert any(part.columns["face"].index for part in built.snapshot.segments) == (request.param != "native")
    return built


def host_of(built: Built, folder: Path, texts: list[str]) -> ShardHost:
    host = ShardHost(lambda folder: LocalStorage(), folder, f"file://{built.store}", REGISTER, 1 << 40, 2)
    assert [host.take(text) for text in texts] == [""] * len(texts)
    return host


@pytest.fixture(scope="module")
def host(indexed, tmp_path_factory) -> Iterator[ShardHost]:
    """Serves all segments, sealed by one engine or the other."""
    host = host_of(indexed, tmp_path_factory.mktemp("host"), indexed.upload())
    yield host
    host.close()


@pytest.fixture
def replicas(host) -> list[HostReplica]:
    return [HostReplica(f"r{i}", host) for i in range(2)]


@pytest.fixture
def elsewhere(indexed, replicas, monkeypatch) -> RemoteShards:
    """From here on the engine's searches ask the replicas."""
    shards = RemoteShards(lambda group: replicas, 1, 5.0)
    monkeypatch.setattr(internals(indexed.engine).searcher, "_shards_of", shards)
    return shards


def encounters(vectors: dict[str, np.ndarray]) -> list[bd.Encounter]:
    found = []
    for i, row in enumerate(range(1, ROWS, 811)):
        columns = (COLUMNS, ("face",), ("face", "right_index"))[i % 3]
        cosine = np.array([(0.75, 0.45)[i % 2]])
        templates = {c: mates_of(vectors[c][row : row + 1], cosine, seed=row)[0] for c in columns}
        found.append(bd.Encounter(templates=templates, model_id=None))
    return found


def like_301(vectors: dict[str, np.ndarray]) -> bd.Encounter:
    """Of a person whose face is like that of s301, and whose finger is not."""
    face = mates_of(vectors["face"][301:302], np.array([0.6]), seed=301)[0]
    return bd.Encounter("like301", templates={"face": face, "right_index": people(1, seed=301)[0]})


def answers(built: Built) -> list[object]:
    """Of searches by every column, in groups and in all, and of decisions."""
    engine, faces = built.engine, mates_of(built.vectors["face"][1:4_990:499], np.full(10, 0.6), seed=3)
    found: list[object] = []
    for groups in (None, ["north"], ["south", "nowhere"], ["nowhere"]):
        for column in COLUMNS:
            result = engine.search({column: faces}, k=7, groups=groups)
            found.append((groups, column, result.ids.tolist(), result.similarity.tobytes(), result.incomplete))
    for encounter in encounters(built.vectors):
        found.append(replace(engine.identify(encounter), decided_at=""))
    found += [replace(engine.identify(encounters(built.vectors)[0], groups=["north"]), decided_at="")]
    found += [replace(engine.identify(like_301(built.vectors)), decided_at="")]
    return found


def test_replicas_give_the_answers_of_one_process_bit_for_bit(indexed, replicas, monkeypatch):
    here = answers(indexed)
    shards = RemoteShards(lambda group: replicas, 3, 5.0)
    monkeypatch.setattr(internals(indexed.engine).searcher, "_shards_of", shards)
    there = answers(indexed)
    for own, other in zip(here, there, strict=True):
        assert own == other
    assert sum(replica.asked for replica in replicas) > len(there)  # each answer came from there
    assert all(replica.asked > len(there) // 2 for replica in replicas)
    assert not any(replica.told for replica in replicas)


def test_several_columns_are_searched_at_once_elsewhere_too(indexed, replicas, elsewhere, monkeypatch):
    kinds = []
    search = HostReplica.search

    def noted(self, sent):
        kinds.append(wire.received(sent)[0]["kind"])
        return search(self, sent)

    monkeypatch.setattr(HostReplica, "search", noted)
    indexed.engine.identify(encounters(indexed.vectors)[0])
    native_engine = not any(part.columns["face"].index for part in indexed.snapshot.segments)
    assert ("multicolumn" in kinds) == native_engine


@on_native
def test_the_other_replica_answers_for_one_that_is_dead_and_the_dead_one_is_asked_last(indexed, replicas, elsewhere):
    here = indexed.engine.search({"face": indexed.vectors["face"][1:4]}, k=3)
    replicas[0].state = "dead"
    for _ in range(4):
        there = indexed.engine.search({"face": indexed.vectors["face"][1:4]}, k=3)
        assert not there.incomplete
        assert there.similarity.tobytes() == here.similarity.tobytes()
    assert replicas[0].asked <= 1 + 2 * len(units_of(indexed.snapshot))


@on_native
def test_without_any_replica_a_search_is_incomplete_and_never_unique(indexed, replicas, elsewhere):
    for replica in replicas:
        replica.state = "dead"
    (stranger,) = people(1, seed=77)
    decision = indexed.engine.identify(bd.Encounter(templates={"face": stranger}))
    assert decision.incomplete
    assert decision.outcome != "unique"
    assert indexed.engine.search({"face": stranger[None]}, k=3).incomplete


def test_rows_since_a_search_are_searched_here_because_the_register_is_locked_meanwhile(
    indexed, replicas, elsewhere, monkeypatch
):
    """Whether they are still in the journal or were sealed by another front-end."""
    ids = indexed.snapshot.models
    probes = [
        {column: bd.Template(column, ids[column].model_id, indexed.vectors[column][row]) for column in columns}
        for row, columns in ((4_500, ("face",)), (3_950, ("face", "right_index")), (4_900, COLUMNS))
    ]
    searcher, snapshot = internals(indexed.engine).searcher, indexed.snapshot
    there = searcher.search(snapshot, probes, from_row=3_900)
    assert [replica.asked for replica in replicas] == [0, 0]
    monkeypatch.setattr(searcher, "_shards_of", faiss_engine.shards)
    here = searcher.search(snapshot, probes, from_row=3_900)
    assert [found.comparisons.rows.tolist() for found in there] == [found.comparisons.rows.tolist() for found in here]
    assert all(len(found.comparisons.rows) for found in there) and not any(found.incomplete for found in there)


@on_native
def test_removed_rows_and_new_ones_are_seen_at_once(indexed, replicas, elsewhere):
    probe = {"face": indexed.vectors["face"][501:502]}
    assert indexed.engine.search(probe, k=1).ids[0, 0] == "s501"
    indexed.engine.remove("s501")
    assert indexed.engine.search(probe, k=1).ids[0, 0] != "s501"
    indexed.engine.add_templates(["s501"], {"face": indexed.vectors["face"][501:502]})
    assert indexed.engine.search(probe, k=1).ids[0, 0] == "s501"


@on_native
@pytest.mark.parametrize("state", ["outdated", "starting"])
def test_this_process_searches_what_replicas_have_not_opened_yet_and_tells_them(indexed, tmp_path, monkeypatch, state):
    texts = indexed.upload()
    replica = HostReplica("new", host_of(indexed, tmp_path / "new", []), "starting" if state == "starting" else "alive")
    here = answers(indexed)
    monkeypatch.setattr(internals(indexed.engine).searcher, "_shards_of", RemoteShards(lambda group: [replica], 1, 5.0))
    assert answers(indexed) == here
    assert sorted(replica.told) == ([] if state == "starting" else sorted(texts))
    replica.host.close()


@on_native
def test_a_host_refuses_a_generation_that_it_does_not_have(indexed, replicas):
    message = wire.view_message(indexed.snapshot, wire.generation_of("other"), 0, 10)
    about, _ = wire.received(replicas[0].host.search(message.sent()))
    assert about["status"] == "outdated"


@on_native
def test_a_message_of_another_version_is_refused(indexed, replicas):
    about, _ = wire.received(replicas[0].host.search((wire.WIRE_VERSION + 1, "{}", {})))
    assert about["status"] == "failed"
    assert "upgrade" in about["reason"]
    with pytest.raises(StorageUnavailable, match="version"):
        wire.received((wire.WIRE_VERSION + 1, "{}", {}))


@on_native
def test_a_unit_whose_file_was_changed_in_the_store_is_not_served(indexed, tmp_path):
    texts = indexed.upload()
    host = ShardHost(lambda folder: LocalStorage(), tmp_path / "n", f"file://{indexed.store}", REGISTER, 1 << 40, 1)
    (changed,) = indexed.store.rglob(f"{indexed.snapshot.segments[0].entry.number}.face.{_digest(indexed)}")
    content = changed.read_bytes()
    try:
        changed.write_bytes(content[:-100] + bytes(100))
        assert any("damaged" in host.take(text) for text in texts)
        assert len(host.generations()) < len(texts)
    finally:
        changed.write_bytes(content)
    assert [host.take(text) for text in texts] == [""] * len(texts)
    host.close()


def _digest(built: Built) -> str:
    return str(built.snapshot.segments[0].entry.files["face"])


@on_native
def test_a_replica_that_lacks_kept_arrays_gets_them_once(indexed, replicas, elsewhere, monkeypatch):
    sent = []
    search = replicas[0].host.search
    monkeypatch.setattr(replicas[0].host, "search", lambda message: sent.append(len(message[2])) or search(message))
    replicas[1].state = "dead"
    for _ in range(3):
        indexed.engine.search({"face": indexed.vectors["face"][1:2]}, k=1)
    assert sorted(sent, reverse=True)[len(units_of(indexed.snapshot))] == min(sent)


@on_native
def test_a_host_with_a_full_queue_refuses(host, indexed, monkeypatch):
    monkeypatch.setattr(hosting, "_WAITING_MOST", 0)
    monkeypatch.setattr(host, "_present", hosting._SEARCHES)
    message = wire.view_message(indexed.snapshot, wire.generation_of("other"), 0, 10)
    assert wire.received(host.search(message.sent()))[0] == {"status": "busy", "kept": []}
    monkeypatch.setattr(host, "_present", hosting._SEARCHES - 1)
    assert wire.received(host.search(message.sent()))[0]["status"] == "outdated"
    assert host.about()["waiting"] == 0 and host.idle_s == 0


@on_native
def test_a_host_tells_how_long_its_last_searches_took(host, indexed, monkeypatch):
    monkeypatch.setattr(host, "_seconds", deque())
    assert host.about()["p50_ms"] is host.about()["p99_ms"] is None
    message = wire.view_message(indexed.snapshot, wire.generation_of("other"), 0, 10)
    moments = iter([1.0, 1.002, 2.0, 2.004, 3.0, 3.1])
    clock = SimpleNamespace(perf_counter=lambda: next(moments), monotonic=time.monotonic)
    monkeypatch.setattr(hosting, "time", clock)
    for _ in range(3):
        host.search(message.sent())
    assert host.about()["p50_ms"] == 4.0 and 90 < host.about()["p99_ms"] <= 100


def test_nodes_without_processors_hold_no_shards_and_others_what_they_state_and_the_settings_allow():
    class Ray:
        @staticmethod
        def nodes():
            return [
                {"NodeID": "head", "Alive": True, "Resources": {"memory": 1e9}},
                {"NodeID": "worker", "Alive": True, "Resources": {"CPU": 2.0, "memory": 8e9}},
                {"NodeID": "silent", "Alive": True, "Resources": {"CPU": 2.0}},
                {"NodeID": "lost", "Alive": False, "Resources": {"CPU": 2.0}},
            ]

    def alive(**settings: int) -> dict[str, int]:
        return ray_actors.RayNodes(Ray(), bd.ClusterConfig(segments="file:///s", **settings), "register", 1).alive()

    assert alive() == {"worker": 8 * 10**9, "silent": ray_actors._UNSTATED_BYTES}
    assert alive(node_bytes_max=10**6) == {"worker": 10**6, "silent": 10**6}
    with pytest.raises(bd.InvalidInput, match="node_bytes_max is 0, wanted at least 1"):
        alive(node_bytes_max=0)
