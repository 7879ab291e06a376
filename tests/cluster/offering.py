"""A front-end process of test_torture.py: offers people to a register, and notes each answer in a file before it goes on.

Arguments: URL, segment store, number of this front-end, how many people, the file of answers.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

import biodedup as bd
from tests.support.vectors import SFACE, again, people

POLICY = bd.Policy(duplicate_db=58, review_db=58)


def encounter(front_end: int, person: int, vector: np.ndarray) -> bd.Encounter:
    """Each front-end has its own name and its own picture of a person; the same ones each time that it is started."""
    face = bd.Template("face", SFACE, again(vector, 0.9, seed=[front_end, person]))
    return bd.Encounter(f"s{person}-{front_end}", templates={"face": face}, encounter_id=f"e{person}-{front_end}")


class FrontEnd:
    """An engine that is opened when it is first used. Calls are repeated until they are answered."""

    def __init__(self, url: str, store: str) -> None:
        self._url = url
        self._config = bd.Config(
            policy=POLICY, cluster=bd.ClusterConfig(segments=store, deadline_ms=30_000, poll_ms=20)
        )
        self._engine: bd.Engine | None = None

    def call(self, method: str, *given: object) -> object:
        while True:
            try:
                if self._engine is None:
                    self._engine = bd.Engine.open(self._url, self._config)
                return getattr(self._engine, method)(*given)
            except bd.RetryableError:
                time.sleep(0.02)


def main(url: str, store: str, number: int, count: int, answers: str) -> None:
    order = np.random.default_rng([number, os.getpid()]).permutation(count)
    vectors, front_end = people(count), FrontEnd(url, store)
    with open(answers, "a") as noted:
        for done, person in enumerate(order.tolist()):
            decision = front_end.call("enroll", encounter(number, person, vectors[person]))
            noted.write(f"{person} {decision.subject_id} {decision.encounter_id} {decision.outcome}\n")
            noted.flush()
            if done == count // 2:
                front_end.call("seal")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
