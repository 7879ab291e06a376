"""The sample of a gallery's subjects on which its calibrations are measured.

Owns the draw of the sample for each snapshot. Never computes a calibration (`match/scores/calibrations.py` does).

A search, its scores and its decision use the sample of the searched snapshot.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from biodedup.gallery.gallery import Gallery
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.scores.calibrations import SAMPLE_SIZE, ImpostorSample, SampleOf


class GallerySamples:
    """Samples of one gallery. Thread-safe."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._drawn: dict[str, tuple[int, str, NDArray[np.int64]]] = {}
        """model_id -> (gallery version, column, rows) of the last draw."""

    def latest(self, model_id: str) -> ImpostorSample:
        """The sample of the newest snapshot."""
        return self._sample(self._gallery.snapshot(), model_id)

    def of(self, snapshot: Snapshot) -> SampleOf:
        """The samples of a published snapshot, by model_id."""
        return partial(self._sample, snapshot)

    def _sample(self, snapshot: Snapshot, model_id: str) -> ImpostorSample:
        version, column, rows = self._drawn.get(model_id, (-1, "", np.zeros(0, np.int64)))
        if version != snapshot.version:
            column, rows = snapshot.drawn(model_id, SAMPLE_SIZE)
            self._drawn[model_id] = snapshot.version, column, rows
        key = column, rows.tobytes(), snapshot.sealed_before(rows)  # sealing rounds vectors
        return ImpostorSample(key, len(rows), lambda: snapshot.embeddings(rows, column))
