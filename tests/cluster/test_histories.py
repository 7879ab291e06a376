"""Random histories of several processes are linearizable, and the check of them can fail."""

from __future__ import annotations

import pytest

from tests.cluster.histories import run, violations


def call(kind: str, answer: str, version: int, at: float, **more: object) -> dict:
    about = {
        "kind": kind,
        "call": f"0-{at}",
        "person": 1,
        "subject": "s1-0",
        "best": None,
        "began": at,
        "ended": at + 0.5,
    }
    committed = {"committed": version} if answer in ("unique", "duplicate", "review") else {}
    return {**about, "answer": answer, "version": version, **committed, **more}


ENROLLED, SECOND = call("enroll", "unique", 1, 0.0), {"subject": "s1-1"}


@pytest.mark.parametrize(
    "history, broken",
    [
        ([ENROLLED, call("enroll", "duplicate", 2, 1.0, best="s1-0", **SECOND)], ""),
        ([ENROLLED, call("remove", "removed", 2, 1.0), call("enroll", "unique", 3, 2.0, **SECOND)], ""),
        ([ENROLLED, call("odd", "review", 2, 1.0), call("adjudicate", "refused", 3, 2.0, call="0-1.0")], ""),
        ([ENROLLED, call("update", "UnknownSubject", 0, 0.2)], ""),  # at the same time
        ([ENROLLED, call("enroll", "unique", 2, 1.0, **SECOND)], "wanted duplicate"),  # a person enrolled twice
        ([ENROLLED, call("update", "UnknownSubject", 1, 1.0)], "wanted unique"),
        ([ENROLLED, call("update", "UnknownSubject", 0, 1.0)], "after a call at 1 had ended"),  # a stale answer
        ([ENROLLED, call("enroll", "unique", 2, 1.0, call="0-0.0")], "sent again, another answer"),
        ([ENROLLED, call("enroll", "duplicate", 3, 1.0, best="s1-0", **SECOND)], "version 2 is of no call"),
        ([ENROLLED, call("enroll", "unique", 1, 0.2, person=2, subject="s2-0")], "two commits of one version"),
        ([ENROLLED, call("enroll", "duplicate", 2, 1.0, best="s2-0", **SECOND)], "of another person"),
    ],
)
def test_a_history_that_no_sequence_of_calls_explains_is_told(history, broken):
    problems = violations([dict(one) for one in history])
    assert any(broken in text for text in problems) if broken else not problems


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_calls_of_several_processes_are_linearizable(postgres, tmp_path):
    counts = run(postgres.url("history"), tmp_path, seed=3, processes=2, operations=80)
    assert counts["enroll: unique"] > 0
