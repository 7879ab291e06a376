"""A join by buckets: whom it compares, what it misses, and that it says the truth about that."""

import shutil
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import biodedup as bd
from biodedup import jobs
from biodedup.config import SearchConfig
from biodedup.gallery.files import codes as coding
from biodedup.gallery.files.codec import measured_laws
from biodedup.gallery.segments.part import ScannedRows
from biodedup.match.scores.calibration import Calibration
from biodedup.search.native import pair_kernel
from biodedup.search.native.signs import LEVELS
from biodedup.search.native.tables import limits_of, tables_of
from biodedup.search.selfjoin import buckets as buckets_module
from biodedup.search.selfjoin.bucket_join import rows_outside
from biodedup.search.selfjoin.buckets import choose, from_high_nibbles
from biodedup.testing import internals
from tests.support.vectors import again, people

pytestmark = pytest.mark.slow

ROWS = 40_000
LEAST = 0.75


NOTHING = np.zeros((0, 1, 64), np.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 700), st.integers(1, 18), st.integers(1, 3), st.data())
def test_the_kernel_compares_members_as_numpy_does(members, steps, planes, data):
    rng = np.random.default_rng(members)
    scanned, size = 8 * steps, 300
    codes = [rng.integers(1, 256, (size, scanned)).astype(np.uint8) for _ in range(planes)]
    columns = [
        ScannedRows(
            NOTHING, NOTHING, coding.high_nibbles(some, scanned), rng.uniform(100, 600, 320).astype(np.float32), 1.0
        )
        for some in codes
    ]
    places = np.sort(rng.choice(planes * size, min(members, planes * size), replace=False))
    numbers, cells = (places // size).astype(np.int32), (places % size).astype(np.int32)
    tables = data.draw(st.integers(1, scanned // 4))
    cut = data.draw(st.floats(-0.2, 0.3))
    sign_cut = data.draw(st.floats(-0.2, 0.3))
    one, other, passed = pair_kernel.similar_pairs(columns, numbers, cells, tables, sign_cut, cut)

    mine = np.array([codes[n][c] for n, c in zip(numbers, cells, strict=True)], np.uint8).reshape(-1, scanned)
    norms = np.array([columns[n].norms[c] for n, c in zip(numbers, cells, strict=True)], np.float32)
    vectors = coding.dequantise((mine & 240) + np.uint8(8), norms)
    halves = 2 * (mine >> 4).astype(np.float32) - 15
    filled, steps_of, middles = tables_of(halves[:, : 4 * tables].reshape(-1, tables, 4), LEVELS)
    least = (sign_cut * np.sqrt(4 * tables) * norms / 8).astype(np.float32)
    sums = np.zeros((4, len(mine), len(mine)), np.int64)
    for t in range(tables):
        entry = ((mine[:, 4 * t : 4 * t + 4] >= 128) * (1, 2, 4, 8)).sum(axis=1)
        sums[t // (filled.shape[1] // 4)] += filled[:, t, entry]
    means = (((sums[0] + sums[1] + 1) >> 1) + ((sums[2] + sums[3] + 1) >> 1) + 1) >> 1
    similarity = vectors @ vectors.T
    later = np.triu(np.ones((len(mine), len(mine)), bool), 1)

    def by_signs(slack):
        """Floats that add up in another order may lie at another side of a limit or a cut."""
        limits = limits_of(least + np.float32(1e-3 * slack) * steps_of, steps_of, middles).astype(int)
        return later & (means >= limits[:, None])

    def pairs(slack):
        return by_signs(slack) & (similarity >= cut + 1e-5 * slack)

    found = np.zeros_like(later)
    found[one, other] = True
    assert found.sum() == len(one), "each pair once"
    assert not (found & ~pairs(-1)).any() and not (pairs(1) & ~found).any()
    assert by_signs(1).sum() <= passed <= by_signs(-1).sum()


@pytest.fixture
def small(monkeypatch):
    """Buckets for galleries and times that a test has: nothing else is cheaper, and few pairs say what is missed."""
    monkeypatch.setattr(buckets_module, "ROWS_MIN", 1_000)
    monkeypatch.setattr(buckets_module, "_WORTH", 1e9)
    monkeypatch.setattr(buckets_module, "_PAIRS", 16_000)
    monkeypatch.setattr(buckets_module, "_TRIED", 1_024)
    monkeypatch.setattr(buckets_module, "_THRESHOLDS", (2.0, 2.4))
    monkeypatch.setattr(buckets_module, "measured_laws", partial(measured_laws, pairs=1_000))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """ROWS people, in segments, the journal and a small segment that has no codes; 400 of them twice, at cosines from 0.5 up; some are
    removed."""
    folder = tmp_path_factory.mktemp("buckets") / "g"
    first = people(ROWS)
    cosines = np.linspace(0.5, 0.95, 400)
    second = np.concatenate([again(first[i : i + 1], c, seed=i) for i, c in enumerate(cosines)])
    config = bd.Config(gallery=bd.GalleryConfig(seal_rows=25_000, background=False))
    with bd.Engine.open(folder, config) as engine:
        engine.add_templates([f"a{i}" for i in range(ROWS)], {"face": first})
        engine.maintain()
        engine.add_templates([f"b{i}" for i in range(200)], {"face": second[:200]})
        internals(engine).gallery.seal()
        engine.add_templates([f"b{i}" for i in range(200, 300)], {"face": second[200:300]})
        engine.add_templates([f"b{i}" for i in range(300, 400)], {"face": second[300:]})
        for gone in ("a390", "b391"):
            engine.remove(gone)
    return folder, cosines


def links(clusters):
    return {frozenset(link.subject_ids): link for cluster in clusters for link in cluster.links}


def threshold_db(engine):
    calibration = internals(engine).comparer.calibration(engine.info()["columns"]["face"]["model_id"])
    return float(calibration.score_db(np.array([LEAST]))[0])


def joined(folder, config=None, **changed):
    with bd.Engine.open(folder, config or bd.Config(**changed), read_only=True) as engine:
        return links(engine.find_duplicates(threshold_db=threshold_db(engine)))


def test_a_join_by_buckets_finds_what_a_join_of_all_pairs_finds(gallery, small, monkeypatch):
    folder, cosines = gallery
    called = []
    real = pair_kernel.similar_pairs
    monkeypatch.setattr(pair_kernel, "similar_pairs", lambda *given: called.append(1) or real(*given))
    by_buckets = joined(folder)
    assert called
    called.clear()
    whole = joined(folder, search=SearchConfig(miss_risk=0))
    assert not called
    assert by_buckets.keys() <= whole.keys()
    assert len(whole) > 100
    assert len(by_buckets) >= len(whole) - 1  # of some two hundred a thousandth
    assert all(by_buckets[pair].score_db == pytest.approx(whole[pair].score_db, abs=1e-3) for pair in by_buckets)
    certain = {frozenset((f"a{i}", f"b{i}")) for i, c in enumerate(cosines) if c > 0.77 and i not in (390, 391)}
    assert certain <= by_buckets.keys()


def test_a_row_in_no_bucket_is_compared_with_all_rows(gallery, small):
    folder, cosines = gallery
    with bd.Engine.open(folder, read_only=True) as engine:
        snapshot = internals(engine).gallery.snapshot()
        buckets = internals(engine).join.buckets(snapshot, threshold_db(engine))
        outside = rows_outside(snapshot, "face", buckets, snapshot.live_rows())
        tiles = list(engine.join(threshold_db=threshold_db(engine)))
    assert 0 < len(outside) < 1_000 and outside.max() == ROWS + 399
    assert [tile.done for tile in tiles] == sorted(tile.done for tile in tiles) and tiles[-1].done == tiles[-1].total
    found = {frozenset(link.subject_ids) for tile in tiles if tile.done <= len(outside) for link in tile.links}
    assert {frozenset((f"a{i}", f"b{i}")) for i in range(300, 390) if cosines[i] > 0.77} <= found
    # nobody is done with before everybody is
    assert {tile.reached[0] for tile in tiles[:-1]} == {0} and tiles[-1].reached[0] == ROWS + 400


def test_an_interrupted_join_by_caps_ends_as_if_it_had_not_been(gallery, small, tmp_path):
    folder, _ = gallery
    steps = []

    def stop(stage, done, total):
        steps.append(done)
        if len(steps) == 4:
            raise KeyboardInterrupt

    with bd.Engine.open(folder, read_only=True) as engine:
        given = {"threshold_db": threshold_db(engine)}
        whole = jobs.find_duplicates(engine, tmp_path / "whole.parquet", **given)
        with pytest.raises(KeyboardInterrupt):
            jobs.find_duplicates(engine, tmp_path / "cut.parquet", **given, progress=stop)
    with bd.Engine.open(folder, read_only=True) as engine:
        jobs.find_duplicates(engine, tmp_path / "cut.parquet", **given, progress=lambda *told: steps.append(told[1]))
    assert steps == sorted(set(steps)), "no step twice"
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert len(links(whole.clusters)) > 100


def test_an_audit_by_buckets_goes_on_with_a_changed_gallery_and_misses_no_pair(gallery, small, tmp_path):
    folder, cosines = gallery
    shutil.copytree(folder, tmp_path / "g")
    listed = [f"a{i}" for i in range(ROWS) if i != 390]
    (tmp_path / "roll.csv").write_text("subject_id\n" + "\n".join(listed))
    steps = []

    def stop(stage, done, total):
        steps.append(done)
        if stage == "comparing" and len(steps) > 3:
            raise KeyboardInterrupt

    with bd.Engine.open(tmp_path / "g") as engine:
        given = (engine, tmp_path / "roll.csv", tmp_path / "out.parquet")
        with pytest.raises(KeyboardInterrupt):
            jobs.audit(*given, threshold_db=threshold_db(engine), progress=stop)
        engine.remove("a0")
        result = jobs.audit(*given, threshold_db=threshold_db(engine))
    found = {(finding.subject_id, finding.other_id) for finding in result.findings}
    assert {(f"a{i}", f"b{i}") for i, c in enumerate(cosines) if c > 0.77 and i not in (390, 391)} <= found


@pytest.fixture(scope="module")
def column(gallery):
    folder, _ = gallery
    with bd.Engine.open(folder, read_only=True) as engine:
        part = internals(engine).gallery.snapshot().parts[0]
        calibration = internals(engine).comparer.calibration(engine.info()["columns"]["face"]["model_id"])
        yield part.columns["face"], calibration


def test_caps_miss_no_more_mates_than_they_say(column, small):
    face, calibration = column
    buckets = choose(face, ROWS, calibration, LEAST, 2e-3)
    assert 0 < buckets.miss_bound <= 2e-3 and buckets.drawn == 8_000
    similarity = calibration.mated_similarities(np.random.default_rng(1).random(20_000), min_similarity=LEAST)
    assert similarity.min() >= LEAST - 1e-3
    one = people(20_000, seed=77)
    other = np.concatenate([again(one[i : i + 1], c, seed=i) for i, c in enumerate(similarity)])
    a, b = (from_high_nibbles(face.codec.rotate(some)) for some in (one, other))
    towards = face.codec.rotate(buckets.directions)
    missed = 0
    for low in range(0, len(a), 2_000):
        near, far = (some[low : low + 2_000] @ towards.T >= buckets.min_similarity for some in (a, b))
        met = (near & far).any(axis=1)
        by_signs = buckets.signs.estimates(a[low : low + 2_000], b[low : low + 2_000]) >= buckets.sign_cut
        by_nibbles = np.einsum("ij,ij->i", a[low : low + 2_000], b[low : low + 2_000]) >= buckets.cut
        missed += int((~(met & by_signs & by_nibbles)).sum())
    assert 0 < missed <= binom.ppf(0.999, 20_000, 2e-3)


def test_fewer_caps_suffice_where_more_may_be_missed_or_mates_are_nearer(column, small):
    face, calibration = column
    strict, lax, near = (
        choose(face, ROWS, calibration, *given) for given in ((LEAST, 1e-3), (LEAST, 5e-2), (0.85, 1e-3))
    )
    assert lax.share < strict.share and near.share < strict.share


def test_nothing_is_left_out_where_nothing_may_be_missed_or_mates_were_never_measured(column, small, monkeypatch):
    face, calibration = column
    assert choose(face, ROWS, calibration, LEAST, 0) is None
    unmeasured = Calibration(
        calibration.score,
        calibration.llr_knots_db,
        calibration.nonmated_knots_db,
        60.0,
        "assumed",
        mates_measured=False,
    )
    assert choose(face, ROWS, unmeasured, LEAST, 1e-3) is None
    assert choose(face, 999, calibration, LEAST, 1e-3) is None, "too few rows"
    monkeypatch.setattr(buckets_module, "_WORTH", 1e-3)
    assert choose(face, ROWS, calibration, LEAST, 1e-3) is None, "dearer than everybody with everybody"
