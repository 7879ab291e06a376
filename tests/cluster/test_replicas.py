"""What front-ends do with the replicas of a group, with replicas and nodes that only pretend: order, deadlines, hedges, places, releases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pytest

import biodedup as bd
from biodedup.cluster import status
from biodedup.cluster.shards import asking, wire
from biodedup.cluster.shards import keeper as keeping
from biodedup.cluster.shards.asking import Asker, ReplicaFailed
from biodedup.cluster.shards.keeper import GroupUnits, Keeper, Lost
from biodedup.cluster.shards.placement import Place, by_rendezvous, group_of, places_of
from biodedup.search.shards.base import QueueFull, ShardHits, ShardQuery
from biodedup.search.shards.fan_out import FanOut

QUESTION = wire.Message({"kind": "column", "generation": "g"}, {"probe.": np.zeros((1, 4), np.float32)})
DONE, BUSY = ({"status": "done"}, {"status": "busy"})
OUTDATED = {"status": "outdated"}


@dataclass
class Pretended:
    """A replica. says: the status that it answers, an exception, or None: it never answers."""

    name: str
    says: object = field(default_factory=lambda: DONE)
    is_ready: bool = True
    is_well: bool = True
    asked: int = 0
    unanswered: list[Future[wire.Sent]] = field(default_factory=list)

    def search(self, sent: wire.Sent) -> Future[wire.Sent]:
        self.asked += 1
        if isinstance(self.says, QueueFull):
            raise self.says
        answer: Future[wire.Sent] = Future()
        if isinstance(self.says, Exception):
            answer.set_exception(self.says)
        elif self.says is not None:
            answer.set_result(wire.Message({**self.says, "by": self.name}).sent())
        else:
            self.unanswered.append(answer)
        return answer

    def take(self, entries_text: str) -> None:
        raise AssertionError("an asker tells nothing")


def by(said: asking.Answered) -> str | None:
    return None if said.answer is None else said.answer[0]["by"]


# asking --------------------------------------------------------------------------------------------------------


def test_replicas_are_asked_in_turn():
    replicas, asker = [Pretended("a"), Pretended("b")], Asker(60)
    assert [by(asker.ask(replicas, QUESTION)) for _ in range(4)] == ["a", "b", "a", "b"]


@pytest.mark.parametrize("says", [ReplicaFailed("dead"), QueueFull("full"), BUSY, OUTDATED, {"status": "failed"}])
def test_the_other_replica_answers_where_one_does_not(says):
    replicas, asker = [Pretended("a", says), Pretended("b")], Asker(60)
    assert [by(asker.ask(replicas, QUESTION)) for _ in range(3)] == ["b"] * 3


def test_a_replica_that_failed_is_asked_last_for_a_while(monkeypatch):
    replicas, asker = [Pretended("a", ReplicaFailed("dead")), Pretended("b")], Asker(60)
    for _ in range(6):
        asker.ask(replicas, QUESTION)
    assert replicas[0].asked == 1
    monkeypatch.setattr(asking, "SUSPECT_S", 0.0)
    asker.suspect(replicas[0])
    for _ in range(6):
        asker.ask(replicas, QUESTION)
    assert replicas[0].asked > 1


def test_a_replica_that_is_not_well_is_asked_last():
    replicas, asker = [Pretended("a", is_well=False), Pretended("b")], Asker(60)
    assert [by(asker.ask(replicas, QUESTION)) for _ in range(3)] == ["b"] * 3
    replicas[1].says = ReplicaFailed("dead")
    assert by(asker.ask(replicas, QUESTION)) == "a"


def test_a_replica_that_stands_still_costs_one_deadline_and_not_one_a_question():
    replicas, asker = [Pretended("a", None), Pretended("b")], Asker(0.2)
    started = time.monotonic()
    assert [by(asker.ask(replicas, QUESTION)) for _ in range(20)] == ["b"] * 20
    assert replicas[0].asked == 1
    assert time.monotonic() - started >= 0.2


def test_without_answers_it_says_what_every_replica_did():
    replicas = [Pretended("a", None), Pretended("b", ReplicaFailed("dead")), Pretended("c", is_ready=False)]
    said = Asker(0.05).ask(replicas, QUESTION)
    assert said.answer is None and said.starting == 1 and said.full == 0
    assert sorted(said.failures) == ["a: no answer within 0.1 s", "b: dead"]
    assert Asker(1).ask([], QUESTION) == asking.Answered()


def test_a_slow_question_is_hedged_after_the_usual_time_and_the_first_answer_counts():
    replicas, asker = [Pretended("a"), Pretended("b")], Asker(60)
    for _ in range(asking._LATENCIES_MIN):
        asker.ask(replicas, QUESTION)
    replicas[0].says = None
    assert by(asker.ask(replicas, QUESTION)) == "b"  # at once, and not after the deadline of a minute
    other = wire.Message({**QUESTION.about, "generation": "h"}, QUESTION.arrays)
    assert asker._hedge_s(asking._size_of(other)) == 60  # nothing is known of it


def test_a_replica_that_was_too_slow_is_asked_last_until_it_answers():
    replicas, asker = [Pretended("a"), Pretended("b")], Asker(60)
    for _ in range(asking._LATENCIES_MIN):
        asker.ask(replicas, QUESTION)
    replicas[0].says, before = None, replicas[0].asked
    assert [by(asker.ask(replicas, QUESTION)) for _ in range(50)] == ["b"] * 50
    assert replicas[0].asked == before + 1
    replicas[0].says = DONE
    replicas[0].unanswered.pop().set_result(wire.Message(DONE).sent())
    assert {by(asker.ask(replicas, QUESTION)) for _ in range(2)} == {"a", "b"}


def test_a_slow_replica_is_asked_last_also_where_no_hedge_is_left(monkeypatch):
    replicas, asker = [Pretended("a"), Pretended("b")], Asker(60)
    for _ in range(asking._LATENCIES_MIN):
        asker.ask(replicas, QUESTION)
    replicas[0].says, before = None, replicas[0].asked
    monkeypatch.setattr(asker, "may_hedge", lambda: noticed.set())
    noticed = threading.Event()
    stuck = threading.Thread(target=asker.ask, args=(replicas, QUESTION))
    stuck.start()
    assert noticed.wait(30)
    assert [by(asker.ask(replicas, QUESTION)) for _ in range(6)] == ["b"] * 6
    assert replicas[0].asked == before + 1
    replicas[0].unanswered.pop().set_result(wire.Message(DONE).sent())
    stuck.join()


def test_a_slow_replica_that_then_fails_stays_last():
    replicas, asker = [Pretended("a"), Pretended("b")], Asker(60)
    for _ in range(asking._LATENCIES_MIN):
        asker.ask(replicas, QUESTION)
    replicas[0].says = None
    asker.ask(replicas, QUESTION)
    asker.ask(replicas, QUESTION)
    replicas[0].unanswered.pop().set_exception(ReplicaFailed("dead"))
    assert [by(asker.ask(replicas, QUESTION)) for _ in range(4)] == ["b"] * 4


def test_a_slow_cluster_is_not_asked_twice_as_much():
    replicas, asker = [Pretended("a"), Pretended("b")], Asker(60)
    hedges = sum(asker.may_hedge() for _ in range(100))
    assert hedges == asking._HEDGES_MOST
    for _ in range(20):
        asker.ask(replicas, QUESTION)
    assert sum(asker.may_hedge() for _ in range(100)) == 2


def test_a_queue_that_is_full_refuses_the_whole_search():
    fan_out = FanOut()

    class Full:
        def search(self, probes, query):
            raise QueueFull("too much to do; try again later")

    class Empty:
        def search(self, probes, query):
            none = np.zeros(0, np.int64)
            return ShardHits(none, none, np.zeros(0, np.float32), np.zeros(len(probes), np.float32), 0, 0)

    with pytest.raises(bd.RetryableError, match="try again later"):
        fan_out.nearest([Empty(), Full()], np.zeros((1, 4), np.float32), ShardQuery("face", 1, 1, 0.0))
    fan_out.close()


# places --------------------------------------------------------------------------------------------------------


def test_a_node_that_goes_changes_only_the_groups_that_it_had():
    nodes = [f"node{i}" for i in range(5)]
    before = {group: by_rendezvous(str(group), nodes)[:2] for group in range(200)}
    after = {group: by_rendezvous(str(group), nodes[:-1])[:2] for group in range(200)}
    moved = [group for group in before if before[group] != after[group]]
    assert moved and all("node4" in before[group] for group in moved)
    counts = [sum(names[0] == node for names in before.values()) for node in nodes]
    assert min(counts) > 20


def places(nodes: Iterable[str], replicas: int, *, unwell: Collection[str] = ()) -> list[Place]:
    """Of one group, on nodes that have room."""
    return list(places_of("r", [10], dict.fromkeys(nodes, 100), replicas, [unwell]).places[0])


def test_replicas_are_on_different_nodes_where_there_are_so_many():
    assert len({place.node for place in places("abc", 2)}) == 2
    assert places("a", 2) == [Place(0, "a", 0), Place(0, "a", 1)]
    assert places("", 2) == []


def test_an_unwell_node_is_taken_only_where_the_others_do_not_suffice():
    assert "b" not in {place.node for place in places("abc", 2, unwell={"b"})}
    assert "b" in {place.node for place in places("abc", 3, unwell={"b"})}


def test_places_are_those_of_the_hash_alone_where_all_of_them_fit():
    nodes, sizes = {f"node{i}": 10**6 for i in range(7)}, [(37 * group) % 1000 for group in range(50)]
    found = places_of("r", sizes, nodes, 2, [()] * 50).places
    assert [[place.node for place in two] for two in found] == [by_rendezvous(f"r/{g}", nodes)[:2] for g in range(50)]


@pytest.mark.parametrize("seed", range(20))
def test_no_node_gets_more_than_it_may_hold_and_every_group_has_a_replica_before_one_has_two(seed):
    random = np.random.default_rng(seed)
    sizes, room = random.integers(1, 100, 12).tolist(), {f"n{i}": int(random.integers(50, 400)) for i in range(6)}
    unwell = [set(random.choice(list(room), int(random.integers(0, 3)))) for _ in sizes]
    found, left = places_of("r", sizes, room, 2, unwell)
    held = dict.fromkeys(room, 0)
    for size, several in zip(sizes, found, strict=True):
        assert len({place.node for place in several}) == len(several)
        for place in several:
            held[place.node] += size
    assert all(held[node] <= room[node] for node in room) and min(left.values()) >= 0
    without = [size for size, several in zip(sizes, found, strict=True) if not several]
    second = [size for size, several in zip(sizes, found, strict=True) if len(several) == 2]
    assert all(size < min(without, default=101) for size in second)


def test_a_substitute_takes_no_place_of_another_group():
    sizes, room = [60, 60], {"a": 60, "b": 60, "c": 60}
    before = places_of("r", sizes, room, 1, [(), ()]).places
    (home,), (other,) = before
    after = places_of("r", sizes, room, 1, [{home.node}, ()]).places
    assert after[1] == [other] and after[0][0].node not in {home.node, other.node}


def test_units_are_spread_over_groups():
    counts = np.bincount([group_of(str(unit), 4) for unit in range(400)])
    assert len(counts) == 4 and counts.min() > 60


# keeping -------------------------------------------------------------------------------------------------------

UNITS = [GroupUnits({"g0": "text0"}, 10), GroupUnits({"g1": "text1"}, 10)]


class Machine:
    """An actor on a pretended node."""

    def __init__(self, name: str, release: str) -> None:
        self.name, self.release, self.is_ready, self.is_well = name, release, True, True
        self.generations: set[str] = set()
        self.state = "well"
        self.opens = True

    def about(self) -> Future[dict]:
        answer: Future[dict] = Future()
        if self.state == "well":
            answer.set_result({"release": self.release, "generations": sorted(self.generations)})
        elif self.state != "silent":
            answer.set_exception(Lost() if self.state == "lost" else ReplicaFailed("unavailable"))
        return answer

    def take(self, text: str) -> None:
        if self.opens:
            self.generations.add(text.replace("text", "g"))

    def end(self) -> None:
        self.state = "ended"

    def search(self, sent: wire.Sent) -> Future[wire.Sent]:
        raise AssertionError("a keeper does not search")


class Cluster:
    """Pretended nodes, a clock, and the actors of all keepers."""

    def __init__(self, *nodes: str) -> None:
        self.nodes, self.now, self.release = list(nodes), 0.0, {}
        self.stopping: list[str] = []
        self.room: dict[str, int] = {}
        self.noted: dict[int, str] | None = None
        self.actors: dict[Place, Machine] = {}

    def alive(self) -> dict[str, int]:
        return {node: self.room.get(node, 1_000) for node in self.nodes}

    def note(self, shortages: dict[int, str]) -> None:
        self.noted = dict(shortages)

    def drained(self) -> list[str]:
        return self.stopping

    def start(self, place: Place) -> Machine:
        known = self.actors.get(place)
        if known is None or known.state in ("ended", "lost"):
            known = self.actors[place] = Machine(str(place), self.release.get(place.node, "1"))
        return known

    def keeper(self, replicas: int = 2) -> Keeper:
        return Keeper(self, "register", "1", lambda: UNITS, replicas, lambda: self.now)

    def run(self, keeper: Keeper, seconds: float, look: Callable[[], None] = lambda: None) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += 1
            keeper.step()
            look()

    def serving(self, keeper: Keeper, group: int) -> set[str]:
        return {one["node"] for one in keeper.status() if one["group"] == group and one["state"] == "serving"}


def started(*nodes: str) -> tuple[Cluster, Keeper]:
    cluster = Cluster(*nodes)
    keeper = cluster.keeper()
    cluster.run(keeper, 5)
    assert [len(cluster.serving(keeper, group)) for group in (0, 1)] == [2, 2]
    return cluster, keeper


def test_two_front_ends_share_their_actors():
    cluster, _ = started("a", "b", "c")
    count = len(cluster.actors)
    cluster.run(cluster.keeper(), 5)
    assert len(cluster.actors) == count == 4


def test_the_groups_of_a_lost_node_are_placed_on_the_remaining_ones():
    cluster, keeper = started("a", "b", "c")
    (lost, *_) = cluster.serving(keeper, 0)
    cluster.nodes.remove(lost)
    cluster.run(keeper, 1)
    assert lost not in {one["node"] for one in keeper.status()}
    cluster.run(keeper, 4)
    assert cluster.serving(keeper, 0) == cluster.serving(keeper, 1) == set(cluster.nodes)


def test_a_node_that_joins_gets_its_groups_and_meanwhile_the_old_replicas_serve():
    cluster, keeper = started("a", "b")
    cluster.nodes += [f"n{i}" for i in range(20)]  # some of them are preferred
    placed = places_of("register", [10, 10], cluster.alive(), 2, [(), ()])
    successors = [place for several in placed.places for place in several]
    assert {place.node for place in successors} - {"a", "b"}
    starts = cluster.start

    def slow(place: Place) -> Machine:
        machine = starts(place)
        machine.opens = False
        return machine

    cluster.start = slow
    cluster.run(
        keeper, 20, lambda: _check(len(cluster.serving(keeper, 0)) >= 2 and len(cluster.serving(keeper, 1)) >= 2)
    )
    for machine in cluster.actors.values():
        machine.opens = True
    cluster.run(keeper, 60, lambda: _check(len(cluster.serving(keeper, 0)) >= 2))
    assert sorted(tuple(one[name] for name in Place._fields) for one in keeper.status()) == sorted(successors)


def test_a_drained_node_is_left_once_others_serve_and_is_used_again_where_there_is_no_other():
    cluster, keeper = started("a", "b", "c")
    (drained, *_) = cluster.serving(keeper, 0)
    cluster.stopping.append(drained)
    cluster.run(
        keeper, 5, lambda: _check(len(cluster.serving(keeper, 0)) >= 2 and len(cluster.serving(keeper, 1)) >= 2)
    )
    assert drained not in cluster.serving(keeper, 0) | cluster.serving(keeper, 1)
    for node in cluster.nodes.copy():
        if node != drained:
            cluster.nodes.remove(node)
    cluster.run(keeper, 5)
    assert cluster.serving(keeper, 0) == {drained}


def _check(holds: bool) -> None:
    assert holds


@pytest.mark.parametrize("state", ["silent", "unavailable"])
def test_a_replica_that_is_unwell_gets_a_substitute_and_returns_when_it_answers(state):
    cluster, keeper = started("a", "b", "c")
    before = cluster.serving(keeper, 0)
    (place,) = [place for place in cluster.actors if place.group == 0 and place.node == min(before)]
    cluster.actors[place].state = state
    cluster.run(keeper, 3)
    assert len(cluster.serving(keeper, 0)) <= 2
    cluster.run(keeper, keeping.SILENT_S + 5)
    assert len(cluster.serving(keeper, 0)) == 2 and cluster.serving(keeper, 0) != before
    assert not cluster.actors[place].is_well
    cluster.actors[place].state = "well"
    kept = keeper._kept[place]
    if state == "silent":
        kept.asked.set_result({"release": "1", "generations": ["g0"]})
    cluster.run(keeper, 10)
    assert cluster.serving(keeper, 0) == before and cluster.actors[place].is_well
    assert len([one for one in keeper.status() if one["group"] == 0]) == 2


def test_an_actor_that_is_dead_for_good_is_started_anew():
    cluster, keeper = started("a", "b")
    dead = next(iter(cluster.actors))
    cluster.actors[dead].state = "lost"
    cluster.run(keeper, 6)
    assert cluster.actors[dead].state == "well" and dead.node in cluster.serving(keeper, dead.group)


def test_an_actor_of_another_release_is_ended_and_replaced_once_its_node_is_upgraded():
    cluster = Cluster("a", "b", "c")
    cluster.release = {"a": "0", "b": "0"}
    keeper = cluster.keeper()
    cluster.run(keeper, 10)
    assert cluster.serving(keeper, 0) == {"c"} == cluster.serving(keeper, 1)
    assert all(machine.state == "ended" for place, machine in cluster.actors.items() if place.node != "c")
    cluster.release = {}
    cluster.run(keeper, 60)
    assert len(cluster.serving(keeper, 0)) == len(cluster.serving(keeper, 1)) == 2


def test_replicas_stay_while_nobody_says_which_nodes_there_are():
    cluster, keeper = started("a", "b")
    cluster.alive = _unknown
    cluster.run(keeper, 5)
    assert cluster.serving(keeper, 0) == {"a", "b"}


def _unknown() -> dict[str, int]:
    raise OSError("no answer")


def test_a_replica_without_room_is_not_started_and_the_shortage_says_what_to_do():
    cluster = Cluster("a", "b")
    cluster.room = {"a": 25, "b": 15}
    keeper = cluster.keeper()
    cluster.run(keeper, 5)
    assert {len(cluster.serving(keeper, group)) for group in (0, 1)} == {1, 2}
    (short,) = cluster.noted
    text = keeper.shortage(short)
    assert text == cluster.noted[short]
    assert (
        f"group {short} has room for 1 replicas, wanted 2: a replica takes 10 bytes, and the 2 nodes have 5, 5 bytes"
        in text
    )
    assert "start another node" in text and "--memory" in text and keeper.shortage(1 - short) == ""
    cluster.nodes.append("c")
    cluster.run(keeper, 5)
    assert len(cluster.serving(keeper, short)) == 2 and keeper.shortage(short) == "" and cluster.noted == {}


def test_a_group_that_has_grown_keeps_its_replicas_where_no_node_has_room_for_it():
    cluster = Cluster("a", "b")
    units = [GroupUnits({"g0": "text0"}, 10)]
    keeper = Keeper(cluster, "register", "1", lambda: units, 2, lambda: cluster.now)
    cluster.run(keeper, 5)
    units[0] = GroupUnits({"g5": "text5"}, 10_000)
    cluster.run(keeper, 5)
    assert cluster.serving(keeper, 0) == {"a", "b"} and "wanted 2" in keeper.shortage(0)


def test_a_shortage_that_could_not_be_shown_is_shown_later():
    cluster = Cluster("a")
    cluster.room = {"a": 5}
    keeper = cluster.keeper(1)
    note = cluster.note
    cluster.note = lambda shortages: _unknown()
    cluster.run(keeper, 2)
    assert cluster.noted is None and keeper.shortage(0)
    cluster.note = note
    cluster.run(keeper, 1)
    assert set(cluster.noted) == {0, 1}


def test_a_new_segment_is_opened_by_all_replicas_and_until_then_they_are_opening():
    cluster = Cluster("a", "b")
    units = [GroupUnits({"g0": "text0"}, 10)]
    keeper = Keeper(cluster, "register", "1", lambda: units, 2, lambda: cluster.now)
    cluster.run(keeper, 5)
    units[0] = GroupUnits({"g5": "text5"}, 10)
    assert {one["state"] for one in keeper.status()} == {"opening"}
    cluster.run(keeper, 5)
    assert {one["state"] for one in keeper.status()} == {"serving"}


def test_a_keeper_whose_step_fails_goes_on(monkeypatch):
    monkeypatch.setattr(keeping, "_STEP_S", 0.01)
    cluster, steps = Cluster("a"), threading.Semaphore(0)
    watcher = cluster.keeper(1)

    def fail() -> None:
        steps.release()
        raise ValueError("a defect")

    watcher.step = fail
    watcher.watch()
    assert steps.acquire(timeout=60) and steps.acquire(timeout=60)
    watcher.close()


# status --------------------------------------------------------------------------------------------------------


def test_status_says_what_each_replica_has_lacks_and_has_for_nothing():
    told = {"searching": 1, "waiting": 2, "process_id": 7, "scanned_bytes": 50}
    seen = [
        (Place(0, "a", 0), "1/1", {"segments": [1, 2, 9], **told, "p50_ms": 3.5, "p99_ms": 40.0}),
        (Place(0, "b", 0), "1/1", {"segments": [1], **told}),
        (Place(0, "c", 0), "1/1", None),
        (Place(1, "a", 0), "1/1", {"segments": [3], **told}),
        (Place(0, "b", 0), "2/1", {"segments": [2], **told}),  # of another release, whose places may differ
    ]
    replicas = status.replicas_of({1, 2, 3, 4}, seen)
    assert [(one.p50_ms, one.p99_ms) for one in replicas[:3]] == [(3.5, 40.0), (None, None), (None, None)]
    found = [(one.node, one.state, one.segments, one.lacking, one.old) for one in replicas]
    assert found == [
        ("a", "serving", 2, 0, 1),
        ("b", "opening", 1, 1, 0),
        ("c", "silent", 0, 0, 0),
        ("a", "serving", 1, 0, 0),
        ("b", "serving", 1, 0, 0),
    ]
