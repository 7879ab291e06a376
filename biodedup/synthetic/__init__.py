"""Synthetic fingerprints for tests, demonstrations, benchmarks and the training of the finger embedding.

The caller passes in the random number generator.

    rng = numpy.random.default_rng(7)
    master = draw_master(rng)
    images = [draw_impression(rng, master).image for _ in range(8)]
"""

from biodedup.synthetic.impressions import Impression, draw_impression
from biodedup.synthetic.masters import Master, Pattern, draw_master

__all__ = ["Impression", "Master", "Pattern", "draw_impression", "draw_master"]
