"""Two front-ends at once, at the moments that a torture reaches by chance only."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import biodedup as bd
from biodedup.cluster import gallery as cluster_gallery
from biodedup.cluster.store import SegmentStore
from biodedup.gallery.segments.tail import Tail
from biodedup.testing import internals
from tests.support.vectors import again, people

NO_POLL = {"poll_ms": 3_600_000, "stale_ms_max": 3_600_000}
SMALL = bd.Config(
    policy=bd.Policy(duplicate_db=58, review_db=58),
    gallery=bd.GalleryConfig(background=False, seal_rows=10, merge_fan=2),
)


def person(i: int, vector: np.ndarray) -> bd.Encounter:
    return bd.Encounter(f"p{i}", templates={"face": vector}, encounter_id=f"e{i}")


def recalled_while(engine: bd.Engine, encounter: bd.Encounter, threads: ThreadPoolExecutor) -> bd.Decision | None:
    """What another thread recalls now, while this one changes what the front-end sees."""
    return threads.submit(engine.recall, encounter).result(10)


def test_a_row_is_seen_before_its_answer_when_a_front_end_follows_another(register, monkeypatch):
    """Or else an encounter that is sent again meanwhile is told that its subject was removed."""
    (anna,) = people(1)
    first, second = register(SMALL, cluster=NO_POLL), register(SMALL, cluster=NO_POLL)
    first.enroll(person(0, anna))
    threads, snapshot, recalled = ThreadPoolExecutor(1), cluster_gallery.Snapshot, []

    def slowly(*given: object) -> object:
        recalled.append(recalled_while(second, person(0, anna), threads))
        return snapshot(*given)

    monkeypatch.setattr(cluster_gallery, "Snapshot", slowly)
    second.refresh()
    recalled.append(recalled_while(second, person(0, anna), threads))
    assert recalled == [None, first.decision("e0")]


class Told(dict):
    """A dictionary that calls a function after each update."""

    def __init__(self, told: Callable[[], object]) -> None:
        super().__init__()
        self._told = told

    def update(self, *given: object) -> None:
        super().update(*given)
        self._told()


def test_a_row_is_seen_before_its_answer_when_another_thread_enrols_it(tmp_path):
    (anna,) = people(1)
    threads, recalled = ThreadPoolExecutor(1), []
    with bd.Engine.open(tmp_path / "g", SMALL) as engine:
        answers = Told(lambda: recalled.append(recalled_while(engine, person(0, anna), threads)))
        internals(engine).gallery._tail.answers = answers
        assert recalled == [] and engine.enroll(person(0, anna)) == recalled[0]


def test_an_encounter_that_another_thread_enrols_while_it_is_recalled_has_a_row(tmp_path, monkeypatch):
    (anna,) = people(1)
    with bd.Engine.open(tmp_path / "g", SMALL) as engine:
        gallery = internals(engine).gallery
        answer = gallery.answer

        def later(encounter_id: str) -> object:
            monkeypatch.undo()
            engine.enroll(person(0, anna))
            return answer(encounter_id)

        monkeypatch.setattr(gallery, "answer", later)
        assert "removed" not in engine.recall(person(0, anna)).reasons


def test_a_seal_of_answers_alone_is_not_made_twice(register, monkeypatch):
    (anna,) = people(1)
    first, second = register(SMALL, cluster=NO_POLL), register(SMALL, cluster=NO_POLL)
    first.enroll(person(0, anna))
    first.seal()
    assert first.enroll(person(1, again(anna, 0.9))).outcome == "duplicate"
    upload, done = SegmentStore.upload, []

    def meanwhile(store: SegmentStore, source: object, name: str) -> None:
        if not done:
            done.append(1)
            second.seal()
        upload(store, source, name)

    monkeypatch.setattr(SegmentStore, "upload", meanwhile)
    first.seal()
    assert done
    assert [decision.encounter_id for decision in first.decisions()] == ["e0", "e1"]
    assert first.info() == second.info()


def test_a_register_is_read_whatever_the_order_in_which_the_server_returns_its_segments(register, postgres):
    vectors = people(3)
    first = register(SMALL, cluster=NO_POLL)
    first.enroll(person(0, vectors[0]))
    first.seal()
    first.enroll(person(1, again(vectors[0], 0.9)))
    first.seal()  # a segment of answers alone: its rows begin where the next one's begin
    first.enroll(person(2, vectors[1]))
    first.seal()
    with postgres.connect() as connection:  # an updated row moves behind the others
        schema = register.url.rpartition("=")[2]
        connection.execute(f"UPDATE biodedup_{schema}.segment SET commits = commits WHERE first_row = end_row")
    with register(SMALL) as second:
        assert second.subject_ids() == ["p0", "p2"]
        assert second.decision("e1").outcome == "duplicate"
        assert second.enroll(person(3, again(vectors[1], 0.9))).outcome == "duplicate"


def test_a_file_that_another_front_end_removed_as_garbage_is_uploaded_again(register, tmp_path):
    first = register(SMALL, cluster={**NO_POLL, "garbage_grace_s": 0.0})
    second = register(SMALL, cluster={**NO_POLL, "garbage_grace_s": 0.0})
    vectors = people(40)
    first.add_templates([f"p{i}" for i in range(40)], {"face": vectors})
    first.reindex("faiss:Flat")
    first.reindex("native")
    second.maintain()  # removes the index from the store
    first.reindex("faiss:Flat")
    assert first.problems() == []
    with register(SMALL) as third:
        assert third.identify(bd.Encounter(templates={"face": again(vectors[3], 0.9)})).best.subject_id == "p3"


def test_a_subject_is_known_while_a_staged_row_of_it_is_forgotten():
    tail = Tail(0)
    tail.append("anna", "e0", 0, {})
    tail.append("anna", "e1", 0, {}, again=True)
    seen = []

    class Watched(dict):
        def pop(self, *given: object) -> object:
            found = super().pop(*given)
            seen.append(self.get("anna"))
            return found

    tail.positions_of = Watched(tail.positions_of)
    tail.truncate(1)
    assert tail.positions_of == {"anna": (0,)}
    assert None not in seen
