"""One finger, two kinds of evidence: embedding and minutiae add up where a card says how, and either counts alone."""

from __future__ import annotations

import numpy as np
import pytest

from biodedup.match.calibration import Calibration
from biodedup.match.calibrations import WithMinutiae
from biodedup.match.compare import Comparer, InHand, compare_templates
from biodedup.values import Template


def law(scale: float, measured_db: float = 60.0) -> Calibration:
    """score_db and llr_db grow with the raw score."""
    raw = np.linspace(-200.0, 200.0, 3)
    return Calibration(raw, raw * scale, np.maximum(raw * scale, 0.0), measured_db, "made up")


COSINE, MINUTIAE, BOTH = law(50.0), law(2.0), law(0.9, 40.0)


class Scores:
    """Gives each candidate the score that its record spells."""

    def compare(self, probe, candidates):
        return np.array([float(record) for record in candidates], np.float32)


def comparer(both: bool = True) -> Comparer:
    return Comparer(lambda _: COSINE, Scores(), lambda _: WithMinutiae(MINUTIAE, BOTH) if both else None)


def template(cosine: float, minutiae: bytes | None) -> Template:
    """At this cosine to the probe (1, 0)."""
    return Template("left_index", "m", np.array([cosine, np.sqrt(1 - cosine**2)], np.float32), minutiae)


PROBE = {"left_index": template(1.0, b"0")}


def test_embedding_and_minutiae_add_their_evidence_and_the_sum_is_calibrated_again():
    found = comparer().compare(PROBE, InHand({"left_index": template(0.6, b"10")}), [0])[0]
    part = found.evidence[0]
    assert part.similarity == pytest.approx(0.6) and part.minutiae == 10
    assert found.llr_db == pytest.approx(0.9 * (50 * 0.6 + 2 * 10), rel=1e-5)
    assert found.score_db == pytest.approx(45.0, rel=1e-5)
    assert found.extrapolated  # past the 40 dB that were measured of the sum, though each alone was measured to 60


def test_minutiae_decide_between_two_that_embed_alike():
    candidates = InHand({"left_index": template(0.5, b"1")}, {"left_index": template(0.5, b"30")})
    assert [one.row for one in comparer().compare(PROBE, candidates, [0, 1])] == [1, 0]


@pytest.mark.parametrize("probe_has", [True, False])
def test_without_minutiae_on_one_side_the_embedding_counts_alone(probe_has):
    mine, theirs = (b"5", None) if probe_has else (None, b"5")
    found = comparer().compare({"left_index": template(1.0, mine)}, InHand({"left_index": template(0.6, theirs)}), [0])[
        0
    ]
    assert found.evidence[0].minutiae is None
    assert found.llr_db == pytest.approx(30.0, rel=1e-5) and not found.extrapolated


def test_without_a_card_that_says_how_minutiae_stay_out_of_it():
    found = comparer(both=False).compare(PROBE, InHand({"left_index": template(0.6, b"10")}), [0])[0]
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
    found = comparer().compare(probe, InHand(candidate), [0])[0]
    assert found.llr_db == pytest.approx(45.0 + 30.0, rel=1e-5)
    assert {part.column: part.minutiae for part in found.evidence} == {"left_index": 10.0, "left_thumb": None}
