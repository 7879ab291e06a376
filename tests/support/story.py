"""The life of a gallery, in steps that a test may draw."""

from __future__ import annotations

from dataclasses import replace

import biodedup as bd
from tests.support.cases import sent
from tests.support.minutiae import record, strewn
from tests.support.vectors import SFACE, again, people

PEOPLE = people(24, seed=3)


class Story:
    """Steps of a gallery's life, each with what is at hand then."""

    def __init__(self, engine: bd.Engine) -> None:
        self.engine = engine
        self.encounter_ids: list[str] = []

    def _next(self) -> str:
        self.encounter_ids.append(f"e{len(self.encounter_ids)}")
        return self.encounter_ids[-1]

    def enroll(self, i: int) -> None:
        groups = [["north"], ["north", "south"], []][i % 3]
        quality = [0.75, None][i % 2]
        face = bd.Template("face", SFACE, PEOPLE[i], quality=quality)
        minutiae = record(strewn(20, seed=i))
        templates = {"face": face, "right_index": minutiae} if i % 4 == 0 else {"face": face}
        encounter = bd.Encounter(f"s{i}", templates=templates, encounter_id=self._next(), groups=groups)
        if f"s{i}" not in self.engine:
            self.engine.enroll(encounter)

    def resemble(self, i: int) -> None:
        name = self._next()
        if f"s{i}" in self.engine:
            self.engine.enroll(sent(f"r{name}", again(PEOPLE[i], 0.5, seed=1000 + i), name, groups=["east"]))

    def update(self, i: int) -> None:
        name = self._next()
        if f"s{i}" in self.engine:
            self.engine.update(sent(f"s{i}", again(PEOPLE[i], 0.9, seed=2000 + i), name))

    def replace(self, i: int) -> None:
        name = self._next()
        if f"s{i}" in self.engine:
            self.engine.update(sent(f"s{i}", PEOPLE[i], name), replace=True, reason="a trial")

    def refuse(self, i: int) -> None:
        name = self._next()
        self.engine.enroll(bd.Encounter(f"n{name}", [bd.Missing("face", "bandaged")], encounter_id=name))

    def judge(self, i: int) -> None:
        for case in list(self.engine.cases())[:1]:
            ruling = ("same", "different", "recapture")[i % 3]
            keys = [candidate.key for candidate in case.undecided]
            if keys or ruling != "same":
                try:
                    self.engine.adjudicate(case, ruling, "A. Officer", candidate=keys[0] if ruling == "same" else None)
                except (bd.SubjectExists, bd.UnknownSubject):
                    pass

    def load(self, i: int) -> None:
        ids, vectors = [f"l{i}-{j}" for j in range(5)], people(5, seed=100 + i)
        self.engine.load_templates(ids, {"face": vectors}, groups=[["west"]] * 5, encounter_id=self._next())

    def remove(self, i: int) -> None:
        ids = self.engine.subject_ids()
        if ids:
            self.engine.remove(ids[i % len(ids)])

    def seal(self, i: int) -> None:
        self.engine.seal()

    def maintain(self, i: int) -> None:
        self.engine.maintain()

    def policy(self, i: int) -> None:
        self.engine.set_policy(
            replace(self.engine.policy, verify_fmr=10.0 ** -(2 + i % 4)), by="A. Officer", reason="t"
        )
