"""Rows of the journal compared in all columns at once, against an exact sum of evidence in numpy."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import biodedup as bd
from biodedup.embed.cards import shipped_cards
from biodedup.match.scores.calibrations import Calibrations
from biodedup.match.scores.fusion import STEP_DB, mass_of
from biodedup.match.staged import lone_fingers_missed
from biodedup.search.multicolumn.plan import is_journal, llr_of_score
from biodedup.search.searcher import Searcher
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals
from tests.support.laws import FACE, FINGER

COLUMNS = ("face", "left_index", "right_index")
ROWS = 900
POLICY = bd.Policy(duplicate_db=110, review_db=106)


def unit(count, seed):
    vectors = np.random.default_rng(seed).standard_normal((count, 128), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


EVERYBODY = {column: unit(ROWS, i) for i, column in enumerate(COLUMNS)}


def has(column, row):
    """All have a face, but for every tenth; two of three a left index, and half a right one."""
    return {"face": row % 10 != 9, "left_index": row % 3 != 2, "right_index": row % 2 == 0}[column]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Rows of many kinds in the journal; every hundredth is removed, and the last third is of another group."""
    config = bd.Config(gallery=bd.GalleryConfig(background=False), policy=POLICY)
    with bd.Engine.open(tmp_path_factory.mktemp("joint") / "g", config) as engine:
        kept = [row for row in range(ROWS) if any(has(column, row) for column in COLUMNS)]
        encounters = [
            bd.Encounter(
                f"s{row}",
                groups=("north" if row < 600 else "south",),
                templates={column: EVERYBODY[column][row] for column in COLUMNS if has(column, row)},
            )
            for row in kept
        ]
        engine.import_captures(encounters)
        engine.remove(*[f"s{row}" for row in range(0, ROWS, 100)])
        parts = internals(engine)
        with pytest.MonkeyPatch.context() as patch:
            laws = {parts.gallery.snapshot().models["face"].model_id: FACE}
            patch.setattr(parts.comparer, "_calibration_of", lambda model_id, *_: laws.get(model_id, FINGER))
            yield engine


def oracle(probe, low=0, north=False):
    """row -> sum of evidence, of rows that share two columns or more with the probe."""
    sums = {}
    for row in range(low, 600 if north else ROWS):
        shared = [column for column in COLUMNS if has(column, row)]
        if len(shared) > 1 and row % 100:
            cosines = [(column, float(EVERYBODY[column][row] @ probe[column])) for column in shared]
            sums[row] = sum(float((FACE if c == "face" else FINGER).llr_db([x])[0]) for c, x in cosines)
    return sums


def hits(engine, probes, **changes):
    parts = internals(engine)
    snapshot = parts.gallery.snapshot()
    query = replace(parts.searcher.multicolumn_query(snapshot, COLUMNS), lone_db={}, **changes)
    found, failures = parts.searcher.fan_out.multicolumn(parts.searcher.shards(snapshot), probes, query)
    assert not failures
    names = [int(name[1:]) for name in snapshot.subject_ids(found.rows.tolist())]
    return [
        [(row, db) for i, row, db in zip(found.which, names, found.llr_db.tolist(), strict=True) if i == probe]
        for probe in range(len(next(iter(probes.values()))))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("north", [False, True])
@pytest.mark.parametrize("k", [1, 20, 5_000])
def test_the_candidates_are_those_with_the_most_evidence_in_all_columns(engine, k, north):
    probes = {column: unit(3, 40 + i) for i, column in enumerate(COLUMNS)}
    groups = frozenset({"north"}) if north else None
    for number, ours in enumerate(hits(engine, probes, k=k, groups=groups)):
        exact = oracle({column: vectors[number] for column, vectors in probes.items()}, north=north)
        best = sorted(exact.values(), reverse=True)[:k]
        assert len(ours) == len(best)
        assert np.allclose([db for _, db in ours], best, atol=0.1)
        assert all(abs(exact[row] - db) < 0.1 for row, db in ours)


def test_all_rows_from_a_floor_on_are_returned_and_none_before_the_first_row(engine):
    probes = {column: EVERYBODY[column][301:302] for column in COLUMNS}
    exact = oracle({column: vectors[0] for column, vectors in probes.items()}, low=250)
    first = internals(engine).gallery.snapshot().rows_under("s250")[0]
    (ours,) = hits(engine, probes, k=0, floor_llr_db=-60.0, from_row=first)
    assert 301 in dict(ours)
    near = {row for row, db in exact.items() if abs(db + 60) < 0.1}
    assert {row for row, _ in ours} - near == {row for row, db in exact.items() if db >= -60} - near


def test_a_finger_that_agrees_alone_makes_its_row_a_candidate(engine):
    parts = internals(engine)
    snapshot = parts.gallery.snapshot()
    query = replace(parts.searcher.multicolumn_query(snapshot, COLUMNS), k=3)
    assert set(query.lone_db) == {"left_index", "right_index"}
    probes = {column: unit(40, 60 + i) for i, column in enumerate(COLUMNS)}
    rows = np.arange(4, 244, 6)  # all have all columns
    probes["right_index"] = mates_of(EVERYBODY["right_index"][rows], np.full(40, 0.6), seed=8)
    found, _ = parts.searcher.fan_out.multicolumn(parts.searcher.shards(snapshot), probes, query)
    names = snapshot.subject_ids(found.rows.tolist())
    of_lone = {(int(i), name) for i, name, lone in zip(found.which, names, found.lone, strict=True) if lone}
    wanted = {(i, f"s{row}") for i, row in enumerate(rows.tolist()) if row % 100}
    assert wanted <= of_lone
    assert len(of_lone) - len(wanted) < 40 * 2 * 2 * 5  # about five impostors of each finger


def test_decisions_are_those_of_every_column_by_itself(engine, monkeypatch):
    rng = np.random.default_rng(4)
    encounters = []
    for row in rng.integers(0, ROWS, 40).tolist():
        templates = {
            column: mates_of(EVERYBODY[column][row : row + 1], rng.uniform(0.3, 0.9, 1), seed=row)[0]
            for column in COLUMNS
            if rng.random() < 0.8
        }
        encounters += [bd.Encounter(templates=templates)] if templates else []

    def told():
        decisions = [engine.identify(encounter) for encounter in encounters]
        reaching = [[(c.subject_id, c.score_db, c.kind) for c in d.candidates if c.kind] for d in decisions]
        return [decision.outcome for decision in decisions], reaching

    ours = told()
    monkeypatch.setattr(Searcher, "multicolumn_query", lambda *_: None)
    assert ours == told()
    assert {"duplicate", "unique"} <= set(ours[0])


def test_sealed_columns_without_codes_are_not_taken_for_the_journal(engine):
    (*_, tail) = internals(engine).gallery.snapshot().parts
    assert is_journal(tail, COLUMNS) and not is_journal(tail, ("left_thumb",))
    assert not is_journal(SimpleNamespace(columns=tail.columns), COLUMNS)


def test_a_plan_says_what_is_compared_at_once_and_which_fingers_it_misses(engine):
    text = engine.plan(COLUMNS).explain()
    assert "rows of the journal are compared exactly in all of them at once" in text
    assert "face: all of" in text and "other rows are looked at" in text


def test_the_evidence_of_a_score_is_that_of_the_least_similarity_that_reaches_it():
    for score_db in (0.0, 10.0, 33.0):
        grid = np.linspace(-1, 1, 20_001)
        least = grid[np.argmax(FINGER.score_db(grid) >= score_db)]
        assert llr_of_score(FINGER, score_db) == pytest.approx(float(FINGER.llr_db([least])[0]), abs=1e-4)
    assert llr_of_score(FINGER, 1e6) == np.inf


def test_the_share_of_missed_fingers_is_that_of_drawn_ones():
    known = Calibrations(shipped_cards())
    adds = known.with_minutiae("finger256-3+skeleton-1")
    alone, rng = known.of("finger256-3+skeleton-1"), np.random.default_rng(1)
    drawn = []
    for law in (alone, adds.minutiae):
        first, mass = mass_of(law, "mated")
        drawn.append((first + rng.choice(len(mass), 200_000, p=mass / mass.sum())) * STEP_DB)
    reaching = adds.both.llr_db(drawn[0] + drawn[1]) >= 78
    for from_db in (-5.0, 5.0, 17.0, 29.0):
        share = np.mean(drawn[0][reaching] < from_db)
        assert lone_fingers_missed(alone, adds, 78, from_db) == pytest.approx(share, abs=4e-3)
