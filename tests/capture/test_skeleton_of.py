"""The skeleton of a cropped image is the skeleton of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.morphology import skeletonize

from biodedup.capture.fingers.skeleton import skeleton_of


@pytest.mark.parametrize("seed", range(12))
def test_a_skeleton_is_the_same_wherever_the_ridges_lie_in_the_image(seed):
    rng = np.random.default_rng(seed)
    dark = np.zeros((70, 90), bool)
    height, width = rng.integers(8, 60, 2)
    y, x = rng.integers(0, 70 - height + 1), rng.integers(0, 90 - width + 1)  # also at the edges
    dark[y : y + height, x : x + width] = (
        np.sin(np.arange(width) * 0.6 + np.arange(height)[:, None] * 0.3 * rng.random()) > 0
    )
    dark[y : y + height, x : x + width] |= rng.random((height, width)) < 0.1
    assert np.array_equal(skeleton_of(dark), skeletonize(dark))


def test_an_image_without_ridges_has_no_skeleton():
    assert not skeleton_of(np.zeros((5, 7), bool)).any()
