"""Minutiae against minutiae: the matcher agrees with its oracle, and nothing that a record may hold holds it up."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from biodedup.errors import InvalidInput
from biodedup.match.prints.local_structures import empty_print, prepare
from biodedup.match.prints.minutiae import CylinderMatcher
from tests.support import minutiae_oracle
from tests.support.bozorth import Bozorth3
from tests.support.minutiae import moved, record, strewn

matcher = CylinderMatcher()
compare = matcher.compare


def body(content: bytes) -> bytes:
    return content[28:-2]


def again(rows: np.ndarray, seed: int, noise: float = 2.0, lost: float = 0.2) -> np.ndarray:
    """Another impression: some minutiae lost, some new, all a little displaced."""
    rng = np.random.default_rng(seed)
    kept = rows[rng.random(len(rows)) >= lost]
    kept = kept + np.column_stack([rng.normal(0, noise, (len(kept), 3)), np.zeros(len(kept))])
    new = strewn(round(lost * len(rows)), seed + 1)
    return rng.permutation(np.concatenate([kept, new]))


@pytest.mark.parametrize("degrees", [0, 7, 45, 90, 180, -133])
def test_a_turned_and_shifted_print_scores_far_above_another_finger(degrees):
    rows = strewn(40)
    other = moved(again(rows, 5), degrees, (31, -17))
    same, stranger = compare(record(rows), [record(other), record(strewn(40, seed=1))])
    assert same > 30 > 5 > stranger


def test_a_print_and_itself_score_ten_times_the_root_of_their_minutiae():
    for count in (20, 40, 64):
        rows = strewn(count, spread=250)
        whole = compare(record(rows), [record(rows)])[0]
        assert 0.9 * 10 * count**0.5 <= whole <= 10 * count**0.5


def test_lost_and_spurious_minutiae_lower_the_score_step_by_step():
    rows = strewn(45)
    means = [
        np.mean(compare(record(rows), [record(again(rows, seed, lost=lost)) for seed in range(8)]))
        for lost in (0, 0.1, 0.3, 0.5, 0.7)
    ]
    assert means == sorted(means, reverse=True)
    assert means[3] > 8  # half of them: still above strangers
    strangers = [record(strewn(45, seed)) for seed in range(100, 140)]
    assert means[3] > max(compare(record(rows), strangers))


def test_elastic_distortion_is_followed():
    rows = strewn(45)
    bent = rows.copy()
    bent[:, 0] += 14 * np.sin(rows[:, 1] / 60)
    bent[:, 1] += 10 * np.cos(rows[:, 0] / 70)
    assert compare(record(rows), [record(bent)])[0] > 25


def test_the_order_of_rows_says_nothing():
    rows = strewn(90)
    a, other = record(rows), record(again(rows, 3))
    shuffled = record(np.random.default_rng(0).permutation(rows))
    assert compare(a, [other])[0] == compare(shuffled, [other])[0]


pairs = st.builds(
    lambda count, seed, degrees, spread, related, lost, noise: (
        strewn(count, seed, spread),
        moved(again(strewn(count, seed, spread), seed + 9, noise, lost), degrees, (degrees / 9, 11))
        if related
        else strewn(max(count - 3, 0), seed + 1, spread),
    ),
    st.integers(0, 24),
    st.integers(0, 2**20),
    st.floats(-180, 180),
    st.sampled_from([1, 60, 160, 300]),
    st.booleans(),
    st.floats(0, 0.6),
    st.floats(0, 5),
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(pairs)
@example((strewn(70), moved(again(strewn(70), 1), 30)))
@example((strewn(30, spread=1), strewn(25, spread=1)))
def test_scores_are_those_of_the_oracle_to_the_last_bit_and_symmetric(two):
    a, b = map(record, two)
    expected = minutiae_oracle.score(body(a), body(b))
    assert compare(a, [b])[0] == expected
    assert compare(b, [a])[0] == expected


def test_cells_of_a_cylinder_are_those_of_the_oracle():
    content = np.frombuffer(body(record(strewn(50))), np.uint8)
    prepared = empty_print()
    prepare(content, 0, 50, prepared)
    minutiae = [tuple(int(row[i]) for row in (prepared.x, prepared.y, prepared.angle)) for i in range(50)]
    found = [
        {(p, q, s) for p in range(8) for q in range(8) for s in range(6) if int(cells[s]) >> (8 * p + q) & 1}
        for cells in prepared.cells[:50]
    ]
    assert found == minutiae_oracle.cylinders(minutiae)


def test_threads_and_batches_score_as_one_at_a_time():
    prints = [strewn(40, seed) for seed in range(40)]
    records = [record(again(rows, seed)) for rows in prints for seed in range(3)]
    probe = record(prints[0])
    alone = [compare(probe, [one])[0] for one in records]
    several = CylinderMatcher(3)
    assert compare(probe, records).tolist() == alone
    assert several.compare(probe, records).tolist() == alone
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: several.compare(probe, records).tolist() == alone, range(12)))
    several.close()


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 2, 3, 64, 65, 255])
@pytest.mark.parametrize("spread", [1, 40, 300])
def test_no_record_takes_long(count, spread):
    hostile = record(strewn(count, spread=spread))
    one_way = strewn(count, spread=spread)
    one_way[:, 2] = 7
    candidates = [hostile, record(one_way), record(strewn(40)), record(strewn(0))] * 5
    probe = hostile if spread > 40 or count < 40 else record(strewn(255, spread=300))
    compare(probe, candidates)
    start = time.thread_time()
    scores = compare(probe, candidates)
    assert time.thread_time() - start < 0.02 * len(candidates)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()


def test_no_candidates_no_scores():
    assert compare(record(strewn(40)), []).shape == (0,)


def test_an_unsound_record_is_refused_wherever_it_stands():
    sound = record(strewn(30))
    for damaged in (b"", sound[:-3], b"XYZ" + sound[3:]):
        with pytest.raises(InvalidInput, match=";"):
            compare(sound, [sound, damaged, sound])
        with pytest.raises(InvalidInput, match=";"):
            compare(damaged, [sound])


def test_a_minutia_outside_of_the_image_does_not_count_and_bytes_behind_a_record_are_ignored():
    sound = record(strewn(30))
    outside = sound[:28] + b"\x7f\xff\x7f\xff" + sound[32:]
    whole, behind, fewer = compare(sound, [sound, sound + b"\1", outside]).tolist()
    assert behind == whole > fewer > 0


def test_a_record_in_another_form_scores_as_the_plain_one():
    rows = strewn(30)
    plain, other = record(rows), record(again(rows, 4))
    # with extended data, which `read_record` skips
    extra = other[:-2] + b"\0\x06\1\1\0\6ab"
    extended = extra[:8] + len(extra).to_bytes(4, "big") + extra[12:]
    assert compare(plain, [other, extended, other]).tolist() == [compare(plain, [other])[0]] * 3


@pytest.mark.slow
def test_bozorth3_stands_behind_the_same_seam():
    rows = strewn(40)
    same, stranger = Bozorth3().compare(record(rows), [record(moved(rows, 5, (9, 4))), record(strewn(40, seed=1))])
    assert same > 100 > 20 > stranger


@pytest.mark.parametrize("spread", [1, 40, 60])
def test_more_minutiae_in_one_place_than_a_finger_has_are_refused_by_bozorth3(spread):
    crowd = record(strewn(255, spread=spread))
    with pytest.raises(InvalidInput, match="extract it again"):
        Bozorth3().compare(crowd, [crowd])
