"""Two front-ends at once, at the moments that a torture reaches by chance only."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

import biodedup as bd
from biodedup.cluster import gallery as cluster_gallery
from biodedup.cluster.store import SegmentStore
from biodedup.gallery.segments.tail import Tail
from biodedup.testing import internals
from tests.support.vectors import SFACE, again, people

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

    def slowly(**given: object) -> object:
        recalled.append(recalled_while(second, person(0, anna), threads))
        return snapshot(**given)

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
        internals(engine).tail.answers = answers
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_subject_is_known_while_a_staged_row_of_it_is_forgotten():
    tail = Tail(0)
    tail.append("anna", "e0", 0, {})
    tail.append("anna", "e1", 0, {}, repeated=True)
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


class Failing:
    """Loses the connection of a front-end at its nth statement, or group of statements that are sent together, from now: before the server
    has it, or after, so that the reply is lost."""

    def __init__(self, engine: bd.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._catalogue = internals(engine).catalogue
        self.left, self._after = 0, False
        run, send = self._catalogue._run, self._catalogue._send
        monkeypatch.setattr(self._catalogue, "_run", lambda *given: self._count(run, *given))
        monkeypatch.setattr(self._catalogue, "_send", lambda: self._count(send) if self._catalogue._unsent else None)

    def arm(self, nth: int, *, after: bool) -> None:
        self.left, self._after = nth, after

    def _count(self, call: Callable[..., object], *given: object) -> object:
        self.left -= 1
        if self.left:
            return call(*given)
        if self._after:
            call(*given)
        self._catalogue._connection.close()
        raise bd.StorageUnavailable("the connection was lost")


def until_answered(call: Callable[[], object]) -> object:
    for _ in range(5):
        try:
            return call()
        except bd.RetryableError:
            pass
    raise AssertionError("it is never answered")


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", ["enroll", "seal", "change", "refresh"])
def test_whichever_statement_is_the_last_of_a_connection_nothing_is_lost_nor_done_twice(
    register, monkeypatch, step, after
):
    """Before each step another front-end has committed, so that following it fails at each of its statements, too."""
    vectors = people(120)
    first, second = register(SMALL, cluster=NO_POLL), register(SMALL, cluster=NO_POLL)
    failing, rows, outcomes = Failing(first, monkeypatch), set(), {}

    def enroll(engine: bd.Engine, i: int, vector: np.ndarray) -> None:
        outcomes[f"e{i}"] = until_answered(lambda: engine.enroll(person(i, vector))).outcome
        if outcomes[f"e{i}"] == "unique":
            rows.add(f"p{i}")

    for nth in range(1, 40):
        at, shown = 3 * nth, vectors[nth]
        enroll(second, at, shown)
        failing.arm(nth, after=after)
        if step == "seal":
            until_answered(first.seal)
        elif step == "refresh":
            until_answered(first.refresh)
        elif step == "change":
            update = bd.Encounter(f"p{at}", templates={"face": again(shown, 0.9)}, encounter_id=f"u{at}")
            assert until_answered(lambda sent=update: first.update(sent)).outcome == "unique"
        else:
            enroll(first, at + 1, again(shown, 0.9))
            enroll(first, at + 2, vectors[nth + 60])
            assert [outcomes[f"e{at + i}"] for i in range(3)] == ["unique", "duplicate", "unique"]
        if failing.left > 0:
            assert nth > 5
            break
    else:
        raise AssertionError("it takes more statements")
    failing.left = 0
    third = register(SMALL)
    for engine in (first, second, third):
        engine.refresh()
        assert set(engine.subject_ids()) == rows
        assert {name: engine.decision(name).outcome for name in outcomes} == outcomes
        assert {d.encounter_id for d in engine.decisions()} >= outcomes.keys()
        assert len(list(engine.decisions())) == len({d.encounter_id for d in engine.decisions()})
        assert engine.problems() == []
    assert first.info() == second.info() == third.info()


def test_nothing_is_written_where_the_connection_is_used_for_something_else_within_a_transaction(register):
    """A call of the caller's own functions, such as `new_id`, comes from within."""
    first = register(SMALL, cluster=NO_POLL)
    template = bd.Template("face", SFACE, people(1)[0])
    with pytest.raises(AssertionError), internals(first).gallery.transaction() as transaction:
        with suppress(AssertionError):
            first.verdicts()
        transaction.add("anna", {"face": template})
    with register(SMALL) as second:
        assert second.subject_ids() == []
        assert second.problems() == []
    first.enroll(person(0, people(1)[0]))
    assert first.subject_ids() == ["p0"]
