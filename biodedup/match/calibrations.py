"""Which calibration belongs to which model.

Owns the look-up from model_id to `Calibration`, and declines minutiae for which there is none. A model with a card brings its own
table; embeddings of a model that nobody described (bring your own) are calibrated on the gallery itself, where nearly all pairs
are non-mated. Minutiae of an unknown extractor take the table of the minutiae in use, and no such score counts as measured.
(LEADER's minutiae, read by MINDTCT's table, as if nobody knew who found them: strangers reach a nominal FMR of 0.1 in at most
0.031, 0.01 in at most 0.0028 of the pairs of FVC2002 DB1-4_B and UareU, 2026-11.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtri

from biodedup.capture.minutiae_record import standard, view_of
from biodedup.config import EXTERNAL_MINUTIAE
from biodedup.embed.cards import ModelCard, joint_id
from biodedup.errors import InvalidInput
from biodedup.match.calibration import Calibration
from biodedup.values import Float32, Template

EXTERNAL = "external-"
"""Prefix of the model_id of embeddings that came without a model."""

SAMPLE_SIZE = 2048
_SAMPLE_MIN = 256
_DEFAULT_SD = 0.1  # of non-mated cosines, until there are enough rows: SFace's 0.096 rounded up (LFW, 2026-11)
_MATED_MEAN, _MATED_SD = 0.65, 0.15  # of mated cosines, as face models of this kind have them (LFW, 2026-11)


@dataclass(frozen=True, eq=False)
class WithMinutiae:
    """What a finger's embedding and its minutiae say together: `both` is of the sum of both llr_db."""

    minutiae: Calibration
    both: Calibration


class Calibrations:
    """Calibrations by model_id. sample: model_id -> up to SAMPLE_SIZE embeddings of the gallery, float32 (n, d). Of several cards of
    minutiae the last one lends its table to unknown extractors."""

    def __init__(self, cards: Sequence[ModelCard], sample: Callable[[str], Float32]) -> None:
        self._known = {card.model_id: Calibration.from_card(card.calibration) for card in cards if card.calibration}
        for card in cards:
            if card.kind == "minutiae" and card.model_id in self._known:
                self._known[EXTERNAL_MINUTIAE] = replace(self._known[card.model_id], measured_db=0.0)
        self._with_minutiae = {}
        for card in cards:
            for minutiae in cards if card.kind == "finger-embedding" else ():
                if minutiae.kind == "minutiae" and {card.model_id, minutiae.model_id} <= self._known.keys():
                    known = joint_id(card, minutiae)
                    self._known[known] = self._known[card.model_id]
                    if minutiae.model_id in card.both:
                        both = Calibration.from_card(card.both[minutiae.model_id])
                        self._with_minutiae[known] = WithMinutiae(self._known[minutiae.model_id], both)
        self._sample = sample
        self._measured: dict[tuple[str, int], Calibration] = {}
        self._lock = threading.Lock()

    def sound(self, template: Template) -> Template:
        """The template, its record in the form that galleries store. Raises InvalidInput for an unsound record, and where nothing is
        known of how its extractor's minutiae score."""
        if template.minutiae is None:
            return template
        if template.model_id not in self._known:
            raise InvalidInput(
                f"minutiae of {template.model_id!r} have no calibration here; name the configured extractor's model_id, or "
                f"{EXTERNAL_MINUTIAE!r}"
            )
        return replace(template, minutiae=standard(view_of(template.minutiae, template.column)))

    def with_minutiae(self, model_id: str) -> WithMinutiae | None:
        """How minutiae add to this model's embeddings; None where no card says so, and embeddings are compared alone."""
        return self._with_minutiae.get(model_id)

    def of(self, model_id: str) -> Calibration:
        known = self._known.get(model_id)
        if known is not None:
            return known
        if (model_id, SAMPLE_SIZE) in self._measured:  # it will not change any more
            return self._measured[model_id, SAMPLE_SIZE]
        vectors = self._sample(model_id)
        # measured anew each time the gallery has doubled, so that a calibration depends on the gallery's rows alone
        size = 1 << (len(vectors).bit_length() - 1) if len(vectors) >= _SAMPLE_MIN else 0
        with self._lock:
            if (model_id, size) not in self._measured:
                self._measured[model_id, size] = from_embeddings(vectors[:size])
            return self._measured[model_id, size]


def from_embeddings(vectors: Float32) -> Calibration:
    """A calibration from unlabelled embeddings, float32 (n, d) unit rows: a normal law for non-mated cosines.

    Its spread is the wider of the measured standard deviation and the one that the share of 1e-3 implies, since tails
    are heavier than the bulk. With too few rows, a spread wider than that of the face models in use.
    """
    mean, sd, pairs = 0.0, _DEFAULT_SD, 1
    if len(vectors):
        cosines = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)].astype(np.float64)
        pairs = len(cosines)
        mean = float(cosines.mean())
        sd = max(float(cosines.std()), float(np.quantile(cosines, 0.999) - mean) / float(ndtri(0.999)))
    score = np.linspace(-1.0, 1.0, 201)
    llr = 10 / np.log(10) * (_log_normal(score, _MATED_MEAN, _MATED_SD) - _log_normal(score, mean, sd))
    llr[: llr.argmin()] = llr.min()  # mates' law is the wider one: far on the strangers' side it would win again
    return Calibration.from_card(
        {
            "score": score.tolist(),
            "llr_db": np.maximum.accumulate(np.clip(llr, -30, None)).tolist(),
            "nonmated_db": (-10 / np.log(10) * log_ndtr((mean - score) / sd)).tolist(),
            "measured_db": float(10 * np.log10(pairs)),
            "source": f"{pairs} pairs of unlabelled embeddings",
            "mates_measured": False,
        }
    )


def _log_normal(x: NDArray[np.float64], mean: float, sd: float) -> NDArray[np.float64]:
    """Logarithm of a normal density, but for the constant that ratios lose. (scipy.stats takes a second to import.)"""
    return np.asarray(-0.5 * ((x - mean) / sd) ** 2 - np.log(sd))
