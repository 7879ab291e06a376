"""Searches, commits and other writes in a random order, and for each decision what an exhaustive comparison at its commit decides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import biodedup as bd
from biodedup.embed.cards import joint_id, load_card, minutiae_card
from biodedup.search.searcher import CandidateSet, SnapshotRows
from biodedup.testing import internals

from .minutiae import moved, record, strewn
from .vectors import SFACE, again, people

FINGER, MINUTIAE = joint_id(load_card("finger256"), minutiae_card("skeleton")), minutiae_card("skeleton").model_id
COLUMNS = ("left_index", "right_index", "right_thumb")
PERSONS = 8
FACES = people(PERSONS, seed=3)
FINGERS = {column: people(PERSONS, seed=10 + i, dimension=256) for i, column in enumerate(COLUMNS)}
PRINTS = {(person, c): strewn(30, 100 * person + i) for person in range(PERSONS) for i, c in enumerate(COLUMNS)}
SHAPES = {
    "face": [("face",)],
    "fingers": [COLUMNS],
    "minutiae": [COLUMNS[:1], COLUMNS[:2]],
    "face and fingers": [("face", *COLUMNS)],
    "face, fingers or both": [("face",), ("face", *COLUMNS), COLUMNS[:2], ("face", COLUMNS[2])],
    "model without a card": [("face",), ("face", *COLUMNS[:1])],
}


def captured(rng: random.Random, kind: str) -> dict[str, bd.Template]:
    """Captures of a person; some are of another person, or filed as another finger."""
    person, templates = rng.randrange(PERSONS), {}
    for column in rng.choice(SHAPES[kind]):
        owner = person if rng.random() < 0.85 else rng.randrange(PERSONS)
        seed = rng.randrange(10**6)
        if column == "face":
            vector = again(FACES[owner], rng.choice([0.99, 0.7, 0.55, 0.45, 0.35, 0.25]), seed)
            templates[column] = bd.Template(column, "no card" if kind == "model without a card" else SFACE, vector)
            continue
        shown = column if rng.random() < 0.9 else rng.choice(COLUMNS)
        noise = np.zeros((30, 4))
        noise[:, :2] = np.random.default_rng(seed).normal(0, rng.choice([0, 2, 6]), (30, 2))
        minutiae = record(moved(PRINTS[owner, shown] + noise, rng.uniform(-20, 20)))
        vector = again(FINGERS[shown][owner], rng.choice([0.98, 0.75, 0.6]), seed)
        alone = kind == "minutiae"
        templates[column] = bd.Template(column, MINUTIAE if alone else FINGER, None if alone else vector, minutiae)
    return templates


def strong(decision: bd.Decision) -> dict[Any, float]:
    return {(c.rows, c.kind, c.case): c.score_db for c in decision.candidates if c.kind}


def differ(a: bd.Decision, b: bd.Decision) -> bool:
    """Rows that are sealed between two comparisons score a fraction of a decibel more or less."""
    near = [abs(s - limit) < 0.3 for d in (a, b) for s in strong(d).values() for limit in (a.duplicate_db, a.review_db)]
    same = (a.outcome, a.reasons) == (b.outcome, b.reasons) and strong(a).keys() == strong(b).keys()
    return not any(near) and not (same and all(abs(score - strong(b)[key]) < 0.3 for key, score in strong(a).items()))


def watch(engine: bd.Engine, checked: Counter[str]) -> None:
    """From now on, each decision inside a transaction is compared with that on all rows of its snapshot. Counts them by outcome."""
    enrolment = internals(engine).enrolment
    decide = enrolment.decide

    def both(transaction: Any, probe: Any, found: Any, seen: Any, request: Any, case: Any = None, **more: Any) -> Any:
        decision, now = decide(transaction, probe, found, seen, request, case, **more), transaction.snapshot()
        rows = np.sort(np.concatenate([now.live_rows(), now.pending_rows]))
        compared = seen.searcher.compare(probe.templates, SnapshotRows(now), rows, (), seen.across)
        exhaustive = CandidateSet(compared, across=seen.across)
        afresh = replace(seen, snapshot=now)  # nothing was added since, so that nothing is searched for
        expected = decide(transaction, probe, exhaustive, afresh, request, case, **more)
        checked[decision.outcome] += 1
        assert not differ(decision, expected), (decision, expected)
        return decision

    enrolment.decide = both  # type: ignore[method-assign]


def play(engines: Sequence[bd.Engine], kind: str, seed: int, steps: int = 25) -> Counter[str]:
    """One history of the front-ends of a gallery. Returns how many decisions had which outcome."""
    rng, checked, prepared, across = random.Random(seed), Counter[str](), [], seed % 4 == 0
    for engine in engines:
        watch(engine, checked)

    def encounter(name: str = "") -> bd.Encounter:
        return bd.Encounter(name or f"n{rng.randrange(14)}", templates=captured(rng, kind), groups=(rng.choice("ab"),))

    def step(engine: bd.Engine) -> None:
        known, enrolment, gallery = engine.subject_ids(), internals(engine).enrolment, internals(engine).gallery
        one, cases = rng.choice(known or ["nobody"]), list(engine.cases())
        match rng.choice(
            ("many", "many", "search", "search", "search", "update", "row", "drop", "remove", "judge", "seal")
        ):
            case "many":
                list(engine.enroll_many([encounter() for _ in range(rng.randrange(1, 5))], across_positions=across))
            case "search":
                prepared.append((engine, enrolment.search([encounter() for _ in range(rng.randrange(1, 4))], across)))
            case "update":
                prepared.append((engine, enrolment.search([encounter(one)], across, replaces=True)))
            case "row" if known:
                with gallery.transaction() as transaction:
                    transaction.add_encounter(one, captured(rng, kind), f"row{rng.random()}", ())
            case "drop" if len(rows := gallery.snapshot().rows_under(one)) > 1:
                with gallery.transaction() as transaction:
                    transaction.remove_rows([rng.choice(rows)])
            case "remove" if known:
                engine.remove(one)
            case "judge" if cases:
                case, ruling = rng.choice(cases), rng.choice(("same", "different", "different"))
                candidates = [candidate.key for candidate in case.undecided]
                engine.adjudicate(case.encounter_id, ruling, "me", candidate=rng.choice(candidates or [None]))
            case "seal":
                engine.seal()

    for _ in range(steps):
        try:
            step(rng.choice(engines))
            while len(prepared) > 3 or (prepared and rng.random() < 0.3):
                engine, batch = prepared.pop(rng.randrange(len(prepared)))
                internals(engine).enrolment.commit(batch)
        except bd.CallerError:
            pass  # another front-end, or an earlier step, enrolled or removed the subject
    return checked
