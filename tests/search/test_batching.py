"""Callers who ask at the same time share a pass, and notice nothing of it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import biodedup as bd
from biodedup.search.batching import Batcher
from biodedup.search.native.scanner import in_turn
from biodedup.testing import internals


class Slow:
    """Doubles numbers; the first calls wait until they are let go."""

    def __init__(self, fails=()):
        self.calls, self.fails, self.go = [], set(fails), threading.Event()

    def __call__(self, key, items):
        self.calls.append((key, list(items)))
        assert self.go.wait(30)
        if self.fails & set(items):
            raise ValueError("a bad item")
        return [2 * item for item in items]


def until(holds):
    """Waits for what other threads do; fails where it does not come."""
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def asked(gathering, slow, questions, held=2):
    """Asks all questions on threads of their own, the first `held` of which keep the others waiting."""
    with ThreadPoolExecutor(len(questions)) as pool:
        futures = []
        for i, (key, items) in enumerate(questions):
            futures.append(pool.submit(gathering, key, items))
            while i < held and len(slow.calls) <= i:
                pass
        while len(gathering._waiting) < len(questions) - held:
            pass
        slow.go.set()
        return futures


def test_those_who_wait_are_run_together_and_each_gets_its_own():
    slow = Slow()
    gathering = Batcher(slow, batch_size=100)
    questions = [("a", [i, i + 100]) for i in range(8)]
    answers = [future.result() for future in asked(gathering, slow, questions)]
    assert answers == [[2 * item for item in items] for _, items in questions]
    assert 3 <= len(slow.calls) <= 4
    assert sorted(item for _, items in slow.calls for item in items) == sorted(item for _, items in questions for item in items)  # fmt: skip


def test_keys_are_kept_apart_and_no_pass_grows_beyond_its_most():
    slow = Slow()
    gathering = Batcher(slow, batch_size=4)
    questions = [("ab"[i % 2], [i, -i]) for i in range(12)]
    answers = [future.result() for future in asked(gathering, slow, questions)]
    assert answers == [[2 * item for item in items] for _, items in questions]
    assert all(len(items) <= 4 for _, items in slow.calls)
    assert all(("a", "b")[abs(item) % 2] == key for key, items in slow.calls for item in items)


def test_who_asks_for_one_does_not_wait_for_those_who_ask_for_a_hundred():
    slow = Slow()
    gathering = Batcher(slow, batch_size=100)
    with ThreadPoolExecutor(4) as pool:
        many = [pool.submit(gathering, "a", list(range(100))) for _ in range(2)]
        until(lambda: len(slow.calls) == 2)
        few = [pool.submit(gathering, "a", [i]) for i in range(2)]
        try:
            until(lambda: len(slow.calls) == 4)
        finally:
            slow.go.set()
        assert [len(items) for _, items in slow.calls] == [100, 100, 1, 1]
    assert [one.result() for one in few] == [[0], [2]]
    assert all(len(one.result()) == 100 for one in many)


def test_who_asks_for_one_waits_for_a_hundred_who_ask_for_one_each():
    """Or else each would make a pass of his own beside theirs, and none would be shared."""
    calls, gates = [], [threading.Event() for _ in range(8)]

    def run(key, items):
        calls.append(list(items))
        assert gates[len(calls) - 1].wait(30)
        return items

    gathering = Batcher(run, batch_size=1_000)
    with ThreadPoolExecutor(64) as pool:
        try:
            first = [pool.submit(gathering, "a", [i]) for i in range(2)]
            until(lambda: len(calls) == 2)
            many = [pool.submit(gathering, "a", [i]) for i in range(2, 42)]
            until(lambda: len(gathering._waiting) == 40)
            gates[0].set()
            until(lambda: len(calls) == 3)
            assert len(calls[2]) == 40
            late = [pool.submit(gathering, "a", [i]) for i in range(42, 50)]
            until(lambda: len(gathering._waiting) == 8 or len(calls) > 3)
            assert len(calls) == 3
        finally:
            for gate in gates:
                gate.set()
        assert [one.result() for one in (*first, *many, *late)] == [[i] for i in range(50)]
    assert [len(items) for items in calls] == [1, 1, 40, 8]


def test_an_error_reaches_only_the_caller_of_the_item():
    slow = Slow(fails=[5])
    gathering = Batcher(slow, batch_size=100)
    futures = asked(gathering, slow, [("a", [i]) for i in range(8)])
    for i, future in enumerate(futures):
        if i == 5:
            with pytest.raises(ValueError, match="a bad item"):
                future.result()
        else:
            assert future.result() == [2 * i]


@pytest.mark.slow
def test_searches_on_many_threads_answer_as_they_would_one_after_the_other(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((10_000, 64), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    certain = bd.Config(search=bd.SearchConfig(miss_risk=0.0))  # what is lost by chance depends on who shares a pass
    with bd.Engine.open(tmp_path / "g", certain) as engine:
        engine.add_templates([f"s{i}" for i in range(len(vectors))], {"face": vectors})
        real, passes = internals(engine).searcher.nearest, []

        def counting(*given, **named):
            passes.append(len(given[2]))
            return real(*given, **named)

        internals(engine).searcher.nearest = counting
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda i: engine.search({"face": vectors[i : i + 1]}, k=3), range(160)))
            decided = list(
                pool.map(lambda i: engine.identify(bd.Encounter(templates={"face": vectors[i]})), range(160))
            )
        assert len(passes) < 320 and sum(passes) == 320
        for i, (result, decision) in enumerate(zip(found, decided, strict=True)):
            assert result.ids.shape == (1, 3) and result.ids[0, 0] == decision.best.subject_id == f"s{i}"
            alone = engine.search({"face": vectors[i : i + 1]}, k=3).similarity
            assert np.allclose(result.similarity, alone, atol=1e-6)  # sums of a pass of many round elsewhere


def test_one_piece_of_work_has_its_turn_among_the_hundred_that_came_before():
    order, started, go = [], threading.Event(), threading.Event()

    def work(piece):
        order.append(piece)
        started.set()
        assert go.wait(30)

    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(2) as callers:
        many = callers.submit(lambda: list(in_turn(pool, 1, work, range(100), turn_s=0)))
        assert started.wait(30)
        one = callers.submit(lambda: list(in_turn(pool, 1, work, ["late"])))
        until(lambda: pool._work_queue.qsize() >= 1)
        go.set()
        assert one.result(30) == [None]
        assert len(many.result(30)) == 100
    assert order.index("late") <= 2
    assert sorted(piece for piece in order if piece != "late") == list(range(100))


def test_a_piece_of_work_that_fails_ends_the_others_before_they_are_done():
    done = []

    def work(piece):
        if piece == 3:
            raise ValueError("a bad piece")
        done.append(piece)

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="a bad piece"):
        list(in_turn(pool, 1, work, range(100)))
    assert len(done) < 8
