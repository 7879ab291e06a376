"""The shipped finger network: one finger's prints lie near each other, whatever way they were put down."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import biodedup as bd
from biodedup.capture.fingers.oriented import RIDGE_DPI
from biodedup.capture.fingers.ridges import ridge_map
from biodedup.embed.cards import load_card
from biodedup.embed.finger_input import FingerInput, finger_input
from biodedup.embed.finger_network import FingerNetwork
from biodedup.errors import ModelCardError
from biodedup.synthetic import draw_impression, draw_master

pytestmark = pytest.mark.slow

FINGERS, IMPRESSIONS = 6, 4
STRANGERS_MINUTIAE = 5
"""A score that none of 198 comparisons of generated strangers reached."""


def given(image: np.ndarray) -> FingerInput:
    return finger_input(ridge_map(image))


@pytest.fixture(scope="module")
def network() -> FingerNetwork:
    return FingerNetwork(load_card("finger256"), 1)


@pytest.fixture(scope="module")
def prints() -> list[list[np.ndarray]]:
    rng = np.random.default_rng(11)
    masters = [draw_master(rng) for _ in range(FINGERS)]
    return [[draw_impression(rng, master, RIDGE_DPI).image for _ in range(IMPRESSIONS)] for master in masters]


def test_impressions_of_a_finger_are_nearer_than_those_of_two(network, prints):
    vectors = network.embed([given(image) for finger in prints for image in finger])
    assert vectors.shape == (FINGERS * IMPRESSIONS, 256) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    owner = np.repeat(np.arange(FINGERS), IMPRESSIONS)
    upper = np.triu_indices(len(vectors), 1)
    cosines, same = (vectors @ vectors.T)[upper], (owner[:, None] == owner)[upper]
    assert np.median(cosines[same]) > 0.55 > 0.5 > np.quantile(cosines[~same], 0.99)


def test_a_mirrored_print_is_another_finger(network, prints):
    """(So the network does look at where things are, not only at how many there are.) A whorl's is an alike one."""
    for finger in prints:
        mirrored = np.ascontiguousarray(finger[0][:, ::-1])
        plain, mirror, *others = network.embed([given(image) for image in (finger[0], mirrored, *finger[1:])])
        assert plain @ mirror < min(plain @ other for other in others)
        assert plain @ mirror < 0.6


def test_a_print_moved_on_the_glass_stays_the_same(network, prints):
    for finger in prints:
        image = finger[0]
        moved = np.full((image.shape[0] + 40, image.shape[1] + 60), int(np.median(image[:8])), np.uint8)
        moved[25 : 25 + image.shape[0], 40 : 40 + image.shape[1]] = image
        plain, shifted = network.embed([given(image), given(moved)])
        assert plain @ shifted > 0.8


def test_a_batch_embeds_as_one_print_at_a_time_does(network, prints):
    inputs = [given(image) for finger in prints for image in finger][:11]
    together = network.embed(inputs)
    alone = np.concatenate([network.embed([one]) for one in inputs])
    assert np.abs(together - alone).max() < 1e-5
    assert network.embed([]).shape == (0, 256)


def test_a_finger_template_carries_its_embedding_and_its_minutiae(prints):
    config = bd.Config(finger=bd.FingerConfig(model="finger256"))
    rng = np.random.default_rng(5)
    image = draw_impression(rng, draw_master(rng)).image
    (template,) = bd.Extractor(config).extract([bd.Finger(image, position="left_index")])
    assert isinstance(template, bd.Template)
    assert template.embedding is not None and template.embedding.shape == (256,)
    assert template.minutiae is not None and template.model_id == "finger256-3+skeleton-1"


def test_a_card_whose_network_takes_something_else_is_refused():
    with pytest.raises(ModelCardError, match="the network takes"):
        FingerNetwork(load_card("sface"), 1)


def test_a_finger_alone_finds_its_subject_by_both_kinds_of_evidence(tmp_path):
    rng = np.random.default_rng(21)
    masters = [draw_master(rng) for _ in range(5)]

    def asked(ask: Callable[[bd.Encounter], bd.Decision], finger: int) -> bd.Decision:
        """About one impression after another, until one is good enough."""
        while True:
            capture = bd.Finger(draw_impression(rng, masters[finger]).image, position="right_index")
            decision = ask(bd.Encounter(f"s{finger}", captures=[capture]))
            if decision.outcome != "refused":
                return decision

    with bd.Engine.open(tmp_path / "g") as engine:
        assert [asked(engine.enroll, finger).outcome for finger in range(4)] == ["unique"] * 4
        column = engine.info()["columns"]["right_index"]
        assert column["dimension"] == 256 and column["subjects"] == 4
        outcomes: list[str] = []
        for finger in range(4):
            found = asked(engine.identify, finger)
            assert found.best.score_db > found.duplicate_db
            # in a gallery of four the cards are not checked: a person judges a score that is not far above the threshold
            assert (found.outcome, found.reasons) in (("duplicate", ()), ("review", ("uncalibrated",)))
            outcomes.append(found.outcome)
            assert found.best.subject_id == f"s{finger}"
            (part,) = found.best.evidence
            assert part.similarity > 0.4 and part.minutiae > 0.9 * STRANGERS_MINUTIAE
        assert "duplicate" in outcomes
        assert asked(engine.identify, 4).outcome == "unique"
    with bd.Engine.open(tmp_path / "g") as engine:  # read from the journal, the minutiae are there as well
        assert asked(engine.identify, 2).best.evidence[0].minutiae > STRANGERS_MINUTIAE
