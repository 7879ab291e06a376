"""Several columns searched together, against an exact sum of evidence in numpy."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import ndtri

import biodedup as bd
from biodedup.match.scores.calibrations import from_embeddings
from biodedup.search.multicolumn import plan as multicolumn_plan
from biodedup.search.multicolumn import scan as multicolumn_scan
from biodedup.search.native.scanner import Collected
from biodedup.search.searcher import Searcher
from biodedup.search.shards import faiss as faiss_engine
from biodedup.search.shards import native
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals
from tests.support.laws import FACE, FINGER

pytestmark = pytest.mark.slow

COLUMNS = ("face", "left_index", "right_index")
ROWS = 12_000


POLICY = bd.Policy(duplicate_db=110, review_db=106)


def unit(count, seed):
    vectors = np.random.default_rng(seed).standard_normal((count, 128), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def everybody():
    """Row 1,002 is row 1,001 once more."""
    vectors = {column: unit(ROWS, i) for i, column in enumerate(COLUMNS)}
    for one in vectors.values():
        one[1_002] = mates_of(one[1_001:1_002], np.array([0.8]))[0]
    return vectors


@pytest.fixture
def engine(tmp_path, monkeypatch, everybody):
    """Rows of three kinds: 8,000 have all columns, 2,400 no left index, 1,600 a face alone; some of each are removed."""
    monkeypatch.setattr(multicolumn_plan, "ROWS_MIN", 2_000)
    config = bd.Config(gallery=bd.GalleryConfig(background=False), policy=POLICY)
    with bd.Engine.open(tmp_path / "g", config) as engine:
        kinds = {(0, 8_000): COLUMNS, (8_000, 10_400): ("face", "right_index"), (10_400, ROWS): ("face",)}
        for (low, high), columns in kinds.items():
            names = [f"s{row}" for row in range(low, high)]
            engine.add_templates(names, {column: everybody[column][low:high] for column in columns})
        engine.compact()
        for row in range(0, ROWS, 1_000):
            engine.remove(f"s{row}")
        laws = {"external-128": FINGER}
        monkeypatch.setattr(
            internals(engine).comparer, "_calibration_of", lambda model_id, *_: laws.get(model_id, FACE)
        )
        yield engine


def mates(everybody, rows, seed, columns=COLUMNS):
    rng = np.random.default_rng(seed)
    drawn = {c: rng.normal(0.66 if c == "face" else 0.475, 0.12, len(rows)).clip(-0.2, 0.97) for c in columns}
    return {c: mates_of(everybody[c][rows], drawn[c], seed=seed + i) for i, c in enumerate(columns)}


def evidence(everybody, probes):
    """llr_db of every probe with every row that has all the columns, float64 (q, 8000)."""
    laws = {column: FACE if column == "face" else FINGER for column in COLUMNS}
    return sum(laws[c].llr_db((probes[c] @ everybody[c][:8_000].T).astype(np.float64)) for c in COLUMNS)


def test_rows_are_searched_by_what_they_have_and_a_plan_says_how(engine):
    plan = internals(engine).searcher.multicolumn_query(internals(engine).gallery.snapshot(), COLUMNS)
    assert set(plan.plans) == {frozenset(COLUMNS), frozenset({"face", "right_index"})}
    for choice in plan.plans.values():
        assert choice.cost < len(choice.columns)
        assert choice.miss_bound <= 1e-3
    text = engine.plan(COLUMNS).explain()
    assert "8,000 rows that have all of them are searched in all at once" in text
    assert "face: all of 1,600 other rows are looked at" in text
    assert "right_index: all of 0 other rows" in text


def test_candidates_are_those_with_the_most_evidence_in_all_columns(engine, everybody):
    snapshot, searcher = internals(engine).gallery.snapshot(), internals(engine).searcher
    rows = np.arange(1, 6_001, 10)
    probes = mates(everybody, rows, 5)
    plan = replace(searcher.multicolumn_query(snapshot, COLUMNS), k=5)
    plan = replace(plan, plans={frozenset(COLUMNS): plan.plans[frozenset(COLUMNS)]})
    found, failures = searcher.fan_out.multicolumn(searcher.shards(snapshot), probes, plan)
    assert not failures and found.rows_scanned == 8_000
    exact = evidence(everybody, probes)
    theirs = exact[found.which, found.rows]
    assert np.abs(found.llr_db - theirs).max() < 2  # eight bits of rounding, at some ten decibels each 0.01
    best = {}
    for probe, row in zip(found.which.tolist(), found.rows.tolist(), strict=True):
        best.setdefault(probe, row)
    strong = np.flatnonzero(exact[np.arange(len(rows)), rows] > 60)
    assert len(strong) > 500
    missed = [i for i in strong.tolist() if best.get(i) != rows[i]]
    assert len(missed) <= 3  # of a risk of a thousandth


def test_all_that_reach_a_floor_are_reported_and_removed_or_foreign_rows_are_not(engine, everybody):
    snapshot, searcher = internals(engine).gallery.snapshot(), internals(engine).searcher
    probes = {column: np.repeat(everybody[column][[1_000, 1_001]], 3, axis=0) for column in COLUMNS}
    plan = replace(searcher.multicolumn_query(snapshot, COLUMNS), k=1, floor_llr_db=100.0)
    found, _ = searcher.fan_out.multicolumn(searcher.shards(snapshot), probes, plan)
    assert found.rows[found.which > 2].tolist() == [1_001, 1_002] * 3
    assert 1_000 not in found.rows
    late = replace(plan, from_row=5_000)
    found, _ = searcher.fan_out.multicolumn(searcher.shards(snapshot), probes, late)
    assert found.rows.min() >= 5_000


def test_a_row_that_reaches_the_floor_is_found_though_its_estimate_is_lower(engine, everybody):
    snapshot, searcher = internals(engine).gallery.snapshot(), internals(engine).searcher
    rows = np.arange(1, 8_000, 4)
    rows = rows[rows % 1_000 != 0]
    probes = mates(everybody, rows, 21)
    exact = evidence(everybody, probes)[np.arange(len(rows)), rows]
    found_share = []
    for floor in (100.0, 140.0, 180.0, 220.0):
        plan = replace(searcher.multicolumn_query(snapshot, COLUMNS), k=0, floor_llr_db=floor)
        near = np.flatnonzero((exact > floor + 1) & (exact < floor + 25))
        found, _ = searcher.fan_out.multicolumn(searcher.shards(snapshot), probes, plan)
        pairs = set(zip(found.which.tolist(), found.rows.tolist(), strict=True))
        found_share += [(i, int(rows[i])) in pairs for i in near.tolist()]
    assert len(found_share) > 400
    assert np.mean(found_share) > 0.99


def test_impostors_that_are_all_alike_neither_fill_the_memory_nor_hide_a_mate(tmp_path, monkeypatch):
    monkeypatch.setattr(multicolumn_plan, "ROWS_MIN", 2_000)
    monkeypatch.setattr(multicolumn_scan, "_PAIRS_PER_UNIT", 1 << 14)
    held = []
    real = Collected._joined
    monkeypatch.setattr(
        Collected, "_joined", lambda some: held.append(sum(len(p[0]) for p in some._pieces)) or real(some)
    )
    one = {c: unit(1, 50 + i) for i, c in enumerate(COLUMNS)}
    alike = {c: mates_of(np.repeat(one[c], 5_000, axis=0), np.full(5_000, 0.97), seed=i) for i, c in enumerate(COLUMNS)}
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=POLICY)) as engine:
        engine.add_templates([f"s{i}" for i in range(5_000)], alike)
        engine.compact()
        monkeypatch.setattr(internals(engine).comparer, "_calibration_of", lambda model_id, *_: FACE)
        snapshot, searcher = internals(engine).gallery.snapshot(), internals(engine).searcher
        assert searcher.multicolumn_query(snapshot, COLUMNS) is None  # it would not choose so by itself
        choice = multicolumn_plan.MultiColumnPlan(
            COLUMNS, (2,) * 3, (48,) * 3, (1.0,) * 3, 0.5, 1.0, 0.0, 1_000, 0, (0.1,) * 3, 0.1
        )
        laws = {column: multicolumn_plan.LlrTable.of(FACE) for column in COLUMNS}
        plan = multicolumn_plan.MultiColumnQuery({frozenset(COLUMNS): choice}, laws, k=20)
        probes = {c: alike[c][:32] for c in COLUMNS}
        found, _ = searcher.fan_out.multicolumn(searcher.shards(snapshot), probes, plan)
        first = found.rows[np.searchsorted(found.which, np.arange(32))]
        assert first.tolist() == list(range(32))
        assert np.bincount(found.which).max() <= plan.k
    assert len(held) > 2 and max(held) < 50_000  # of 160,000 pairs


def test_a_shard_that_fails_makes_a_search_in_several_columns_incomplete(engine, everybody, monkeypatch):
    monkeypatch.setattr(faiss_engine, "shares", lambda parts: [[part] for part in parts])
    engine.add_templates(["late"], {c: unit(1, 70 + i) for i, c in enumerate(COLUMNS)})
    real = native.NativeShard.search_multicolumn

    def failing(self, probes, plan):
        if any(part.first_row == 0 for part in self._parts):
            raise bd.GalleryDamaged("unreadable")
        return real(self, probes, plan)

    monkeypatch.setattr(native.NativeShard, "search_multicolumn", failing)
    decision = engine.enroll(bd.Encounter("new", templates={c: unit(1, 80 + i)[0] for i, c in enumerate(COLUMNS)}))
    assert decision.outcome == "review" and decision.incomplete


def test_a_part_that_is_merged_away_is_forgotten(engine, everybody):
    engine.identify(bd.Encounter(templates={c: everybody[c][5] for c in COLUMNS}))
    part = weakref.ref(max(internals(engine).gallery.snapshot().parts, key=lambda part: part.count))
    engine.remove("s77")
    engine.compact()
    gc.collect()
    assert part() is None


def test_a_decision_is_the_same_as_from_every_column_by_itself(engine, everybody, monkeypatch):
    rows = np.arange(7, 12_000, 397)
    probes = mates(everybody, rows, 11)
    encounters = [bd.Encounter(templates={c: probes[c][i] for c in COLUMNS}) for i in range(len(rows))]
    ours = [engine.identify(encounter) for encounter in encounters]
    monkeypatch.setattr(Searcher, "multicolumn_query", lambda *_: None)
    theirs = [engine.identify(encounter) for encounter in encounters]
    told = [[(c.subject_id, round(c.score_db, 2)) for c in d.candidates[:1] if c.score_db > 40] for d in ours]
    assert told == [[(c.subject_id, round(c.score_db, 2)) for c in d.candidates[:1] if c.score_db > 40] for d in theirs]
    assert [d.outcome for d in ours] == [d.outcome for d in theirs]
    assert sum(bool(one) for one in told) > 20
    assert not any(decision.incomplete for decision in ours)


def test_rows_are_searched_together_only_where_mates_were_measured(engine, everybody, monkeypatch):
    unlabelled = from_embeddings(everybody["face"][:2_048])
    assert not unlabelled.mates_measured
    monkeypatch.setattr(internals(engine).comparer, "_calibration_of", lambda model_id, *_: unlabelled)
    assert internals(engine).searcher.multicolumn_query(internals(engine).gallery.snapshot(), COLUMNS) is None
    assert "other rows" not in engine.plan(COLUMNS).explain()


def test_groups_are_kept_apart_in_a_search_multicolumn(tmp_path, everybody, monkeypatch):
    monkeypatch.setattr(multicolumn_plan, "ROWS_MIN", 2_000)
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=POLICY)) as engine:
        for low, group in ((0, "north"), (4_000, "south")):
            some = [bd.Encounter(f"s{row}", groups=(group,), templates={c: everybody[c][row] for c in COLUMNS}) for row in range(low, low + 200)]  # fmt: skip
            engine.import_captures(some)
            names = [f"s{row}" for row in range(low + 200, low + 4_000)]
            engine.add_templates(names, {c: everybody[c][low + 200 : low + 4_000] for c in COLUMNS})
        engine.compact()
        laws = {"external-128": FINGER}
        monkeypatch.setattr(
            internals(engine).comparer, "_calibration_of", lambda model_id, *_: laws.get(model_id, FACE)
        )
        probe = bd.Encounter(templates={c: everybody[c][4_100] for c in COLUMNS})
        assert internals(engine).searcher.multicolumn_query(internals(engine).gallery.snapshot(), COLUMNS) is not None
        assert engine.identify(probe, groups={"south"}).best.subject_id == "s4100"
        north = engine.identify(probe, groups={"north"})
        assert north.best is None or north.best.score_db < 60


def test_an_unlabelled_calibration_gives_impostors_no_evidence_for_being_mates():
    llr_db = from_embeddings(unit(2_048, 3)).llr_db(np.array([-1.0, -0.3, 0.0, 0.3, 0.7]))
    assert (llr_db[:3] < -20).all() and (np.diff(llr_db) >= 0).all() and llr_db[4] > 60


def test_a_plan_leaves_out_what_costs_least_and_loses_no_more_mates_than_the_risk(engine):
    one = max(
        multicolumn_plan.largest_groups(internals(engine).gallery.snapshot(), COLUMNS).values(),
        key=lambda some: some.count,
    )
    laws = {column: FACE if column == "face" else FINGER for column in COLUMNS}
    draw = multicolumn_plan.Draw(one, laws, 2e-3, 60.0, 0.3)
    some, every = (2,) * len(COLUMNS), draw.most
    fewer = {c: tuple(n - (i == c) for i, n in enumerate(some)) for c in range(len(COLUMNS))}
    for groups in (every, some, *fewer.values()):
        reaching = draw._z(groups)[draw._to_choose]
        shares = draw.shares(groups)
        assert 0 < shares[0] < shares[1] < shares[2]
        lost = (reaching < -ndtri(shares[0]) - 1e-6).sum()
        assert draw._may_lose - 1 <= lost <= draw._may_lose < 2e-3 * len(reaching)
        assert draw.bound(groups, shares[2]) < draw.bound(groups, shares[0])
    without = {c: draw.shares(groups)[0] for c, groups in fewer.items()}
    assert max(without, key=without.get) == COLUMNS.index("face"), "a face says most"
    assert min(without.values()) > draw.shares(some)[0] > draw.shares(every)[0]
    assert multicolumn_plan.Draw(one, laws, 1e-6, 60.0, 0.3).shares(some) == [], "too few mates to tell"
