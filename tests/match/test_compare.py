"""One finger, two kinds of evidence: embedding and minutiae add up where a card says how, and either counts alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biodedup.match.compare import Comparer, TemplateCandidates, compare_templates, pairings
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.calibrations import WithMinutiae
from biodedup.match.scores.fusion import fused_score_db
from biodedup.values import Template


def law(scale: float, measured_db: float = 60.0) -> Calibration:
    """score_db and llr_db grow with the raw score."""
    raw = np.linspace(-200.0, 200.0, 3)
    return Calibration(raw, raw * scale, np.maximum(raw * scale, 0.0), measured_db, "made up")


COSINE, MINUTIAE, BOTH = law(50.0), law(2.0), law(0.9, 40.0)


class Scores:
    """Gives each candidate the score that its record spells."""

    def compare_pairs(self, probes, candidates, which):
        return np.array([float(record) for record in candidates], np.float32)


def comparer(both: bool = True) -> Comparer:
    return Comparer(lambda _: COSINE, Scores(), lambda _: WithMinutiae(MINUTIAE, BOTH) if both else None)


def template(cosine: float, minutiae: bytes | None) -> Template:
    """At this cosine to the probe (1, 0)."""
    return Template("left_index", "m", np.array([cosine, np.sqrt(1 - cosine**2)], np.float32), minutiae)


PROBE = {"left_index": template(1.0, b"0")}


def test_embedding_and_minutiae_add_their_evidence_and_the_sum_is_calibrated_again():
    found = comparer().compare(PROBE, TemplateCandidates({"left_index": template(0.6, b"10")}), [0])[0]
    part = found.evidence[0]
    assert part.similarity == pytest.approx(0.6) and part.minutiae == 10
    assert found.llr_db == pytest.approx(0.9 * (50 * 0.6 + 2 * 10), rel=1e-5)
    assert found.score_db == pytest.approx(45.0, rel=1e-5)
    assert found.extrapolated  # past the 40 dB that were measured of the sum, though each alone was measured to 60


def test_minutiae_decide_between_two_that_embed_alike():
    candidates = TemplateCandidates({"left_index": template(0.5, b"1")}, {"left_index": template(0.5, b"30")})
    assert [one.row for one in comparer().compare(PROBE, candidates, [0, 1])] == [1, 0]


@pytest.mark.parametrize("probe_has", [True, False])
def test_without_minutiae_on_one_side_the_embedding_counts_alone(probe_has):
    mine, theirs = (b"5", None) if probe_has else (None, b"5")
    found = comparer().compare(
        {"left_index": template(1.0, mine)}, TemplateCandidates({"left_index": template(0.6, theirs)}), [0]
    )[0]
    assert found.evidence[0].minutiae is None
    assert found.llr_db == pytest.approx(30.0, rel=1e-5) and not found.extrapolated


def test_without_a_card_that_says_how_minutiae_stay_out_of_it():
    found = comparer(both=False).compare(PROBE, TemplateCandidates({"left_index": template(0.6, b"10")}), [0])[0]
    assert found.evidence[0].minutiae is None and found.llr_db == pytest.approx(30.0, rel=1e-5)


def test_two_templates_compare_by_both():
    score = compare_templates(comparer(), template(1.0, b"0"), template(0.6, b"10"))
    assert score.similarity == pytest.approx(0.6) and score.minutiae == 10
    assert score.llr_db == pytest.approx(45.0, rel=1e-5)


def test_fingers_add_up_with_the_law_that_each_was_compared_by():
    probe = {name: Template(name, "m", *args) for name, args in {
        "left_index": (np.array([1.0, 0.0], np.float32), b"0"),
        "left_thumb": (np.array([1.0, 0.0], np.float32), None),
    }.items()}  # fmt: skip
    candidate = {name: Template(name, "m", np.array([0.6, 0.8], np.float32), b"10") for name in probe}
    found = comparer().compare(probe, TemplateCandidates(candidate), [0])[0]
    assert found.llr_db == pytest.approx(45.0 + 30.0, rel=1e-5)
    assert {part.column: part.minutiae for part in found.evidence} == {"left_index": 10.0, "left_thumb": None}


COLUMNS = ("face", "left_index", "left_thumb", "unknown")


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_ranking_is_what_adding_up_capture_by_capture_gives(seed, both):
    rng = np.random.default_rng(seed)
    vector = np.array([1.0, 0.0], np.float32)

    def one(record: bool, cosine: float, column: str) -> Template:
        minutiae = str(rng.integers(0, 40)).encode() if record and column != "face" else None
        return Template(column, "m", np.array([cosine, np.sqrt(1 - cosine**2)], np.float32), minutiae)

    def some() -> list[str]:
        return [column for column in COLUMNS if rng.random() < 0.6] or ["face"]

    probe = {
        column: Template(column, "m", vector, b"0" if column != "face" and rng.random() < 0.7 else None)
        for column in some()
    }
    candidates = [{c: one(rng.random() < 0.7, rng.uniform(-0.3, 0.9), c) for c in some()} for _ in range(12)]
    law = {True: BOTH, False: COSINE}
    wanted = {}
    for row, candidate in enumerate(candidates):
        parts = []
        for group in pairings(tuple(probe), tuple(candidate)):
            tried = []
            for mine, theirs in group:
                cosine = float(candidate[theirs].embedding @ vector)
                adds = both and probe[mine].minutiae is not None and candidate[theirs].minutiae is not None
                raw = COSINE.llr_db(cosine) + MINUTIAE.llr_db(float(candidate[theirs].minutiae)) if adds else cosine
                tried.append((float(law[adds].llr_db(raw)), float(law[adds].score_db(raw)), law[adds]))
            llr_db, score_db, used = max(tried, key=lambda part: part[0])
            less = 10 * np.log10(len(tried))
            parts.append((llr_db - less, max(score_db - less, 0.0), used))
        sum_db = sum(llr_db for llr_db, *_ in parts)
        if len(parts) == 1:
            wanted[row] = parts[0][1], sum_db
        elif parts:
            wanted[row] = float(fused_score_db(sum_db, [used for *_, used in parts])[0]), sum_db
    found = comparer(both).compare(probe, TemplateCandidates(*candidates), range(12))
    assert {one.row for one in found} == set(wanted)
    assert [(-one.score_db, -one.llr_db, one.row) for one in found] == sorted(
        (-o.score_db, -o.llr_db, o.row) for o in found
    )
    for one in found:  # a sum at the edge of a step of the table may fall on either side, as it is added up
        assert one.score_db == pytest.approx(wanted[one.row][0], abs=1.0)
        assert one.llr_db == pytest.approx(wanted[one.row][1], rel=1e-6)
        assert one.llr_db == pytest.approx(sum(part.llr_db for part in one.evidence))


def test_two_rankings_of_disjoint_rows_are_one():
    candidates = [{"left_index": template(cosine, None)} for cosine in (0.3, 0.9, 0.5, 0.7)]
    first, second = (comparer().compare(PROBE, TemplateCandidates(*candidates), rows) for rows in ([0, 1], [2, 3]))
    whole = first.with_others(second)
    assert [one.row for one in whole] == [1, 3, 2, 0]
    assert [one.row for one in whole.reaching(30)] == [1, 3]
    assert [one.row for one in whole[1:3]] == [3, 2] and whole[-1].row == 0
