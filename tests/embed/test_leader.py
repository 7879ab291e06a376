"""LEADER behind the extractors' seam: its maps, its templates, and that they mix with no other's."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import biodedup as bd
from biodedup.capture.fingers.leader import CONFIDENCE_MIN, Leader, record_of
from biodedup.capture.fingers.nbis_parts import MINUTIAE_MAX
from biodedup.capture.minutiae.record import read_record
from biodedup.embed.cards import minutiae_card
from tests.support.images import finger

pytestmark = pytest.mark.slow

CONFIG = bd.Config(finger=bd.FingerConfig(minutiae="leader"))
EXTRACTOR = bd.Extractor(CONFIG)
NETWORK = Leader(minutiae_card("leader").weights)


def maps(points: list[tuple[int, int, float]], degrees: float = 0.0, ending: float = 1.0) -> np.ndarray:
    """Maps of 100 x 120 with these confidences at x, y, as the network would give them."""
    out = np.zeros((4, 100, 120), np.float32)
    for x, y, confidence in points:
        out[0, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] = confidence / 2
        out[0, y, x] = confidence
    out[1], out[2], out[3] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), ending
    return out


def rows(found: np.ndarray) -> list[tuple[int, int, int, int]]:
    """kind, x, y, angle of each minutia of a record of maps."""
    words = np.frombuffer(record_of(found).body, ">u2").reshape(-1, 3).astype(int)
    return [(int(a) >> 14, int(a) & 0x3FFF, int(b), int(c) >> 8) for a, b, c in words]


def test_maxima_become_minutiae_with_their_direction_and_kind():
    assert rows(maps([(30, 20, 0.9), (90, 96, 0.8)], degrees=90)) == [(1, 30, 20, 64), (1, 90, 96, 64)]
    assert rows(maps([(3, 3, 0.9)], degrees=-90, ending=0.1)) == [(2, 3, 3, 192)]
    assert rows(maps([(30, 20, 0.9)], degrees=-0.1)) == [(1, 30, 20, 0)]


def test_of_two_that_are_close_together_the_surer_one_counts():
    assert rows(maps([(30, 20, 0.5), (33, 20, 0.9)])) == [(1, 33, 20, 0)]
    assert rows(maps([(30, 20, CONFIDENCE_MIN / 2)])) == []


def test_maps_without_a_shape_give_no_more_than_can_be_compared():
    assert record_of(np.ones((4, 100, 120), np.float32)).count <= MINUTIAE_MAX


def test_impressions_of_one_finger_score_far_above_those_of_two():
    a, again, other = EXTRACTOR.extract(
        [bd.Finger(finger(1)), bd.Finger(finger(1, shift=(9, -6), degrees=7, noise_seed=1)), bd.Finger(finger(2))]
    )
    assert a.model_id == "finger256-3+leader-1"
    assert read_record(a.minutiae).count >= 8
    assert a.quality == bd.Extractor().extract([bd.Finger(finger(1))])[0].quality  # NFIQ 2 is NBIS's
    mated, nonmated = bd.compare(a, again), bd.compare(a, other)
    assert mated.minutiae > 3 * nonmated.minutiae
    assert mated.score_db > 30 > nonmated.score_db


@pytest.mark.parametrize("shape", [(41, 57), (32, 64), (97, 40)])
def test_an_image_of_any_size_gives_maps_of_its_size(shape):
    found = NETWORK.maps(np.full(shape, 200, np.uint8))
    assert found.shape == (4, *shape)
    assert np.isfinite(found).all()


def test_threads_get_what_one_thread_gets():
    images = [finger(seed)[:128, :128] for seed in range(3)]
    alone = [NETWORK.maps(image) for image in images]
    with ThreadPoolExecutor(3) as pool:
        for found, expected in zip(pool.map(NETWORK.maps, images), alone, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_minutiae_of_two_extractors_are_never_mixed(tmp_path):
    by_network, by_skeleton = (e.extract([bd.Finger(finger(1))])[0] for e in (EXTRACTOR, bd.Extractor()))
    with pytest.raises(bd.ModelMismatch):
        bd.compare(by_network, by_skeleton)
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.enroll(bd.Encounter("anna", templates={"unknown": by_network}))
        with pytest.raises(bd.CallerError):
            engine.identify(bd.Encounter(templates={"unknown": by_skeleton}))
    with pytest.raises(bd.ModelMismatch):
        bd.Engine.open(tmp_path / "g")


def test_an_extractor_needs_its_own_card_and_sound_weights(tmp_path):
    with pytest.raises(bd.InvalidInput, match="leader, mindtct, skeleton"):
        bd.Extractor(bd.Config(finger=bd.FingerConfig(minutiae="magic")))
    card = shutil.copy(minutiae_card("leader").path, tmp_path)
    for finger_config in (
        bd.FingerConfig(minutiae_model=str(card)),
        bd.FingerConfig(minutiae="leader", minutiae_model=str(card)),
    ):
        with pytest.raises(bd.ModelCardError):  # of another extractor; without its weights
            bd.Extractor(bd.Config(finger=finger_config))
    (tmp_path / "leader.onnx").write_bytes(b"other weights")
    with pytest.raises(bd.ModelCardError, match="sha256"):
        bd.Extractor(bd.Config(finger=bd.FingerConfig(minutiae="leader", minutiae_model=str(card))))
