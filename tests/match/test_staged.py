"""Staged evidence: minutiae are compared only where they may change the decision, and the decision is that of comparing them all."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from biodedup.common.vectors import dot_products
from biodedup.config import Policy
from biodedup.embed.cards import joint_id, load_card, minutiae_card, shipped_cards
from biodedup.engine.decide import first_of
from biodedup.match.candidates import JoinedCandidates, TemplateCandidates
from biodedup.match.compare import Comparer
from biodedup.match.judgement import judge
from biodedup.match.ranked import Ranked, ScoreModel
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.calibrations import Calibrations
from biodedup.match.scores.fusion import STEP_DB, llr_reaching
from biodedup.match.staged import LONE_FINGER_LOSS, TILTS, Stage, log_means_of
from biodedup.values import FINGER_POSITIONS, Template

FACE, FINGER = load_card("sface").model_id, joint_id(load_card("finger256"), minutiae_card("skeleton"))
TEN = tuple(column for column in FINGER_POSITIONS if column != "unknown")
RISK, SHOWN, DUPLICATE_DB, REVIEW_DB = 1e-3, 10, 64.8, 57.8  # the policy's thresholds for 3,000 subjects
SMALL = 1e-4  # a risk for which no limit was measured
CORRELATION = 0.6  # of embedding and minutiae of a finger: 0.64 on real ones (FVC2002 DB1-4_B and UareU, 2026-11)
KNOWN = Calibrations(shipped_cards())


class Records:
    """A matcher whose candidates' records spell their score, and a count of its comparisons."""

    def __init__(self) -> None:
        self.count = 0

    def compare_pairs(self, probes, candidates, which):
        self.count += len(candidates)
        return np.array([float(record) for record in candidates], np.float32)


def compared(probe, candidates, stage=None, **more) -> tuple[Ranked, int]:
    matcher = Records()
    comparer = Comparer(KNOWN.of, matcher, KNOWN.with_minutiae)
    ranked = comparer.compare(probe, TemplateCandidates(*candidates), range(len(candidates)), stage=stage, **more)
    assert ranked.compared == matcher.count
    return ranked, matcher.count


def capture(column: str, cosine: float, minutiae: float | None) -> Template:
    """At this cosine to a probe's (1, 0)."""
    model = FACE if column == "face" else FINGER
    vector = np.array([cosine, np.sqrt(1 - cosine**2)], np.float32)
    record = None if column == "face" or minutiae is None else repr(minutiae).encode()
    return Template(column, model, vector, record)


def probe_of(columns) -> dict[str, Template]:
    return {column: capture(column, 1.0, 0.0) for column in columns}


@cache
def quantiles(model: str, mated: bool) -> tuple[np.ndarray, np.ndarray]:
    """(ascending shares, raw scores) of a calibration's impostors or mates."""
    calibration = KNOWN.with_minutiae(FINGER).minutiae if model == "minutiae" else KNOWN.of(model)
    grid = np.linspace(calibration.score[0], calibration.score[-1], 20_001)
    mass = -np.diff(10 ** (-calibration.score_db(grid) / 10), append=0.0)
    mass *= 10 ** (calibration.llr_db(grid) / 10) if mated else 1.0
    return np.cumsum(mass) / mass.sum(), grid


def drawn(rng: np.random.Generator, columns, mated=()) -> dict[str, Template]:
    """A candidate from the calibrations' distributions. mated: columns that are of the probe's person."""

    def score(model: str, column: str) -> float:
        return float(np.interp(rng.random(), *quantiles(model, column in mated)))

    return {c: capture(c, score(FACE if c == "face" else FINGER, c), score("minutiae", c)) for c in columns}


def shown(ranked: Ranked, count: int = SHOWN):
    """The outcome, and what is shown of each candidate."""
    there = np.ones(len(ranked), bool)
    candidates, _ = first_of(
        ranked, (count, count), there, ranked.resembling(REVIEW_DB, DUPLICATE_DB), lambda row: False
    )
    verdict = judge(candidates, DUPLICATE_DB, REVIEW_DB, band_db=REVIEW_DB)
    return verdict.outcome, verdict.kinds, candidates


STAGE, EVERYTHING = (Stage(SHOWN, REVIEW_DB, risk, DUPLICATE_DB) for risk in (RISK, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("fingers", [1, 2, 4, 10])
def test_decisions_on_impostors_and_mates_are_those_of_comparing_everything(fingers):
    rng, columns = np.random.default_rng(fingers), ("face", *TEN[:fingers])
    outcomes = []
    for _ in range(40):
        candidates = [drawn(rng, columns) for _ in range(200)]
        if rng.random() < 0.3:
            mated = columns if rng.random() < 0.5 else columns[: rng.integers(1, len(columns) + 1)]
            candidates[int(rng.integers(200))] = drawn(rng, columns, mated)
        everything, _ = compared(probe_of(columns), candidates, EVERYTHING)
        staged, _ = compared(probe_of(columns), candidates, STAGE)
        assert shown(staged) == shown(everything)
        outcomes.append(shown(everything)[0])
    assert len(set(outcomes)) > 1


@pytest.mark.slow
def test_an_impostor_costs_a_twentieth_of_all_minutiae():
    rng, columns = np.random.default_rng(0), ("face", *TEN)
    candidates = [drawn(rng, columns) for _ in range(1000)]
    _, count = compared(probe_of(columns), candidates, STAGE)
    assert SHOWN * len(TEN) < count < 500
    assert compared(probe_of(columns), candidates)[1] == 1000 * len(TEN)


SCORES = st.one_of(st.none(), st.floats(0, 40))


@st.composite
def people(draw):
    columns = st.lists(st.sampled_from(("face", "unknown", *TEN[:4])), min_size=1, max_size=4, unique=True)
    cosines = st.floats(-0.25, 1.0)
    probe = probe_of(draw(columns))
    candidates = draw(
        st.lists(columns.flatmap(lambda cs: st.tuples(*(st.builds(capture, st.just(c), cosines, SCORES) for c in cs))))
    )
    candidates = [{template.column: template for template in candidate} for candidate in candidates]
    subjects = np.array(draw(st.lists(st.integers(0, 3), min_size=len(candidates), max_size=len(candidates))), np.int64)
    return probe, candidates, draw(st.sampled_from([None, subjects])), draw(st.booleans())


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(people(), st.integers(0, 3), st.sampled_from([0.0, SMALL, RISK, 0.4]))
def test_what_is_returned_has_the_scores_of_comparing_everything(drawn_people, first, risk):
    probe, candidates, subjects, across = drawn_people
    more = {"subjects": subjects, "across": across}
    everything, _ = compared(probe, candidates, Stage(first, 30.0, 0.0, 40.0), **more)
    staged, _ = compared(probe, candidates, Stage(first, 30.0, risk, 40.0), **more)
    whole = {one.row: one for one in everything}
    assert [whole[one.row] for one in staged] == list(staged)
    before = dict(zip(everything.rows.tolist(), everything.by_embeddings.T.tolist(), strict=True))
    assert [before[row] for row in staged.rows.tolist()] == staged.by_embeddings.T.tolist()
    assert len(staged) >= min(first, len(everything))
    resembling = everything.rows[everything.resembling(REVIEW_DB, DUPLICATE_DB)]
    if set(resembling.tolist()) <= set(staged.rows.tolist()):  # none is missed
        assert shown(staged, first) == shown(everything, first)
    if risk < RISK:
        assert list(staged) == list(everything) == list(compared(probe, candidates, **more)[0])


def test_the_first_by_their_embeddings_are_known_in_full():
    rng, columns = np.random.default_rng(3), ("face", *TEN[:3])
    candidates = [drawn(rng, columns) for _ in range(100)]
    alone = [{c: capture(c, float(t.embedding[0]), None) for c, t in one.items()} for one in candidates]
    by_embeddings = compared(probe_of(columns), alone)[0].rows[:SHOWN].tolist()
    staged, _ = compared(probe_of(columns), candidates, STAGE)
    assert set(by_embeddings) <= set(staged.rows.tolist())


@pytest.mark.slow
def test_a_finger_that_alone_agrees_is_found_among_impostors():
    rng, columns = np.random.default_rng(5), ("face", *TEN)
    candidates = [drawn(rng, columns) for _ in range(300)]
    for finger in TEN:
        candidates[7] = drawn(rng, columns) | {finger: capture(finger, 0.8, 45.0)}
        staged, _ = compared(probe_of(columns), candidates, STAGE)
        outcome, kinds, found = shown(staged)
        assert (outcome, found[kinds.index("shared_finger")].row) == ("review", 7)
        assert shown(compared(probe_of(columns), candidates, EVERYTHING)[0]) == shown(staged)


def of_one_person(rng: np.random.Generator, finger: str) -> Template:
    """A mate's finger: how well embedding and minutiae agree has the correlation of real ones."""
    common, own = rng.standard_normal(1), rng.standard_normal(2)
    ranks = ndtr(np.sqrt(CORRELATION) * common + np.sqrt(1 - CORRELATION) * own)
    cosine, minutiae = (np.interp(r, *quantiles(m, True)) for r, m in zip(ranks, (FINGER, "minutiae"), strict=True))
    return capture(finger, float(cosine), float(minutiae))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fingers", "gallery_size"), [(1, 6000), (2, 6000), (10, 100), (10, 1000), (10, 6000), (10, 60_000)]
)
def test_fingers_that_agree_alone_are_hardly_ever_left_out(fingers, gallery_size):
    rng, columns = np.random.default_rng(gallery_size + fingers), ("face", *TEN[:fingers])
    candidates = [drawn(rng, columns) | {TEN[0]: of_one_person(rng, TEN[0])} for _ in range(3000)]
    duplicate_db, review_db = Policy().thresholds_db(gallery_size)
    everything, _ = compared(probe_of(columns), candidates)
    staged, _ = compared(probe_of(columns), candidates, Stage(0, review_db, RISK, duplicate_db))
    resembling = everything.rows[everything.resembling(review_db, duplicate_db)]
    assert len(resembling) > 500
    assert len(set(resembling.tolist()) - set(staged.rows.tolist())) <= LONE_FINGER_LOSS * len(resembling)


@pytest.mark.slow
@pytest.mark.parametrize("fingers", [1, 2, 10])
def test_mates_that_reach_the_threshold_are_hardly_ever_left_out(fingers):
    rng, columns, count, risk = np.random.default_rng(fingers), ("face", *TEN[:fingers]), 1500, 0.05
    candidates = [drawn(rng, columns, columns) for _ in range(count)]
    everything, _ = compared(probe_of(columns), candidates)
    staged, _ = compared(probe_of(columns), candidates, Stage(0, REVIEW_DB, risk))
    reaching = {one.row for one in everything.reaching(REVIEW_DB)}
    assert len(reaching - set(staged.rows.tolist())) <= risk * len(reaching)


@pytest.mark.slow
@pytest.mark.parametrize("embeddings_db", [(-15.0, -10.0), (-13.0,) * 6, (5.0, -15.0, 20.0), (30.0,)])
def test_chernoffs_bound_holds_for_the_minutiae_of_impostors(embeddings_db):
    model = ScoreModel(KNOWN.of(FINGER), KNOWN.with_minutiae(FINGER))
    first, mass = np.zeros(1), np.ones(1)
    for llr_db in embeddings_db:  # exactly: the distribution of each finger, convolved
        values, shares = _impostors(model.with_minutiae.minutiae, model.with_minutiae.both, llr_db)
        sums = (first[:, None] + values).ravel()
        steps, where = np.unique(np.round(sums / STEP_DB), return_inverse=True)
        first, mass = steps * STEP_DB, np.bincount(where, (mass[:, None] * shares).ravel())
    log_means = sum(log_means_of(model, np.array([llr_db]))[0] for llr_db in embeddings_db)
    for least_db in np.arange(-100.0, 150.0, 10.0):
        bound = np.exp(np.minimum((log_means - TILTS * least_db).min(), 0.0))
        assert mass[first >= least_db + len(embeddings_db) * STEP_DB].sum() <= bound + 1e-15


def _impostors(minutiae: Calibration, both: Calibration, llr_db: float) -> tuple[np.ndarray, np.ndarray]:
    shares, grid = quantiles("minutiae", False)
    values = np.round(both.llr_db(llr_db + minutiae.llr_db(grid)) / STEP_DB) * STEP_DB
    steps, where = np.unique(values, return_inverse=True)
    return steps, np.bincount(where, np.diff(shares, prepend=0.0))


@pytest.mark.slow
def test_all_that_may_reach_a_joins_threshold_are_compared():
    rng, columns, threshold_db = np.random.default_rng(9), ("face", *TEN[:4]), REVIEW_DB
    calibrations = (KNOWN.of(FACE), *(KNOWN.with_minutiae(FINGER).both,) * 4)
    assert llr_reaching(threshold_db, calibrations) < 0  # so that an impostor may reach it, too
    candidates = [drawn(rng, columns, columns if rng.random() < 0.1 else ()) for _ in range(400)]
    everything, full = compared(probe_of(columns), candidates)
    staged, count = compared(probe_of(columns), candidates, Stage(0, threshold_db, RISK))
    assert staged.reaching(threshold_db) == everything.reaching(threshold_db) != []
    assert count < full / 2


@st.composite
def searches(draw):
    """Probes of one gallery with the candidates of each."""
    columns = st.lists(st.sampled_from(("face", "unknown", *TEN[:3])), min_size=1, max_size=3, unique=True)
    record = st.one_of(st.none(), st.floats(0, 40))
    person = columns.flatmap(
        lambda cs: st.tuples(*(st.builds(capture, st.just(c), st.floats(-0.25, 1.0), record) for c in cs))
    )
    gallery = [{t.column: t for t in row} for row in draw(st.lists(person, min_size=1, max_size=8))]
    kinds = draw(st.lists(columns.map(lambda cs: {c: draw(record) for c in cs}), min_size=1, max_size=2))
    cosine = st.floats(-0.25, 1.0)
    probes = [
        {column: capture(column, draw(cosine), minutiae) for column, minutiae in draw(st.sampled_from(kinds)).items()}
        for _ in range(draw(st.integers(1, 5)))
    ]
    some = st.lists(st.integers(0, len(gallery) - 1), unique=True).map(sorted)
    rows = [np.array(draw(some), np.int64) for _ in probes]
    subjects = [draw(st.sampled_from([None, np.arange(len(r)) // 2])) for r in rows]
    above = st.sampled_from([None, (5.0, 0.0), (20.0, 10.0)])
    risk = draw(st.sampled_from([0.0, RISK]))
    stages = [Stage(draw(st.integers(0, 2)), 30.0, risk, 40.0, above=draw(above)) for _ in probes]
    return probes, gallery, rows, subjects, draw(st.sampled_from([stages, [None] * len(probes)])), draw(st.booleans())


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(searches())
def test_probes_that_are_compared_together_score_as_each_alone(drawn_searches):
    probes, gallery, rows, subjects, stages, across = drawn_searches
    comparer, source = Comparer(KNOWN.of, Records(), KNOWN.with_minutiae), TemplateCandidates(*gallery)
    together = comparer.compare_each(probes, source, rows, across=across, subjects=subjects, stages=stages)
    for probe, some, of_probe, stage, ranked in zip(probes, rows, subjects, stages, together, strict=True):
        alone = comparer.compare(probe, source, some, across=across, subjects=of_probe, stage=stage)
        assert list(ranked) == list(alone)
        assert ranked.by_embeddings.tolist() == alone.by_embeddings.tolist()
        assert ranked.compared == alone.compared


def test_a_cosine_is_the_same_to_the_last_bit_in_any_company():
    rng = np.random.default_rng(6)
    for dimension in (2, 127, 128, 512):
        vectors, probes = (unit(rng.standard_normal((40, dimension))) for _ in range(2))
        which = np.sort(rng.integers(0, 40, 40))
        together = dot_products(vectors, probes[:, None], which)[:, 0]
        alone = [
            dot_products(vectors[i : i + 1], probes[which[i]][None, None], np.zeros(1, np.int64)) for i in range(40)
        ]
        for_one = [dot_products(vectors, probes[which[i]][None, None], np.zeros(40, np.int64))[i] for i in range(40)]
        assert together.tolist() == [one.item() for one in alone] == [one.item() for one in for_one]


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_candidates_of_two_sources_are_those_of_one():
    rng, columns = np.random.default_rng(8), ("face", *TEN[:2])
    people = [drawn(rng, columns) for _ in range(9)]
    joined = JoinedCandidates(TemplateCandidates(*people[:5]), TemplateCandidates(*people[5:]), 5)
    comparer, rows = Comparer(KNOWN.of, Records(), KNOWN.with_minutiae), np.arange(9)
    probe = probe_of(columns)
    assert list(comparer.compare(probe, joined, rows)) == list(
        comparer.compare(probe, TemplateCandidates(*people), rows)
    )
