"""Chooses the calibration of each model in one gallery.

Owns the look-up from model_id to `Calibration`. Never fits a card's table (`fitting.py`).

- A model with a card has the card's table, shifted and scaled to this gallery's impostor scores, which depend on the camera, the scanner
  and the population. Nearly all pairs of a gallery's subjects are impostor pairs; the few mated pairs score far higher and are left out.
- Embeddings of a model without a card (bring your own) are calibrated on the gallery alone.
- Minutiae of an unknown extractor have the table of the configured extractor, and their scores always count as extrapolated. Minutiae of
  another extractor without a calibration are refused. (Measured: LEADER's minutiae with MINDTCT's table. At a nominal FMR of 0.1 at most
  0.031 of the impostor pairs match, at 0.01 at most 0.0028; FVC2002 DB1-4_B and UareU, 2026-11.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

from biodedup.capture.minutiae.batch import standard_records
from biodedup.capture.minutiae.record import standard, view_of
from biodedup.config import EXTERNAL_MINUTIAE
from biodedup.embed.cards import ModelCard, joint_id
from biodedup.errors import InvalidInput
from biodedup.match.scores.calibration import Calibration
from biodedup.values import Float32, Template

EXTERNAL = "external-"
"""Prefix of the model_id of embeddings that came without a model."""

SAMPLE_SIZE = 1024
_MEASURE_MIN, _MOVE_MIN = 256, 32
"""Minimum number of subjects to measure a table on, and to move a card's table. With fewer subjects the card's impostor scores are the
better estimate."""
CHECKED_PEOPLE = 200
"""Number of subjects from which a moved table counts as checked. 256 rows have so many subjects even if some are removed or lack the
column."""
_CARD_ERROR_SD = {"face-embedding": 1.6, "finger-embedding": 0.5, "minutiae": 0.5}
"""Kind of card -> the assumed largest shift of its table, in standard deviations of the impostor scores."""
_MOVED_ERROR_SD = 0.5
"""The same for a table that was moved to the gallery."""
_ERROR_STRETCH = 1.1
"""The assumed largest ratio between the standard deviations of impostor scores in the gallery and in the table."""
_CARD_PAIRS = 400
"""Weight of the card's standard deviation, in pairs. It differs by some percent between data sets."""
_MATES_DB, _MATES_SHARE_MAX = 40.0, 0.05
"""The score by the card from which a pair may be mated, and the largest share of such pairs that may be left out."""
_DEFAULT_SD = 0.1
"""Standard deviation of non-mated cosines until there are enough rows: SFace's 0.096 rounded up (LFW, 2026-11)."""
_TAIL_FREEDOM = 30.0
"""Degrees of freedom of Student's t. It fits SFace's table from 0.3 to 1 within 6 dB, in units of its standard deviation (2026-12)."""
_MATED_MEAN, _MATED_SD = 0.65, 0.15
"""Mean and standard deviation of mated cosines of face models like SFace (LFW, 2026-11)."""


@dataclass(frozen=True, eq=False)
class WithMinutiae:
    """The calibrations of minutiae that add to a finger's embedding. minutiae: of the minutiae alone. both: of the sum of the llr_db of
    embedding and minutiae."""

    minutiae: Calibration
    both: Calibration


@dataclass(frozen=True, eq=False)
class ImpostorSample:
    """Random subjects of a gallery. Nearly all pairs of them are impostor pairs. key: changes if the subjects change. vectors(): their
    embeddings, float32 (count, d)."""

    key: Hashable
    count: int
    vectors: Callable[[], Float32]


NO_SAMPLE = ImpostorSample(None, 0, lambda: np.zeros((0, 1), np.float32))
SampleOf = Callable[[str], ImpostorSample]
"""model_id -> up to SAMPLE_SIZE subjects with embeddings of this model."""


class Calibrations:
    """Calibrations by model_id. Thread-safe.

    sample_of: the sample of subjects for a look-up that passes no sample. use_gallery_impostors: whether a card's table is moved to this
    gallery's impostor scores (`Policy.use_gallery_impostors`). If there are several minutiae cards, the last card's table serves unknown
    extractors.
    """

    def __init__(
        self,
        cards: Sequence[ModelCard],
        sample_of: SampleOf = lambda model_id: NO_SAMPLE,
        *,
        use_gallery_impostors: Callable[[], bool] = lambda: True,
    ) -> None:
        self._known = {card.model_id: Calibration.from_card(card.calibration) for card in cards if card.calibration}
        self._error_sd = {card.model_id: _CARD_ERROR_SD.get(card.kind, 0.0) for card in cards}
        self._error_sd[EXTERNAL_MINUTIAE] = _CARD_ERROR_SD["minutiae"]
        for card in cards:
            if card.kind == "minutiae" and card.model_id in self._known:
                self._known[EXTERNAL_MINUTIAE] = replace(self._known[card.model_id], measured_db=0.0)
        self._with_minutiae: dict[str, tuple[WithMinutiae, WithMinutiae]] = {}
        for embedding in (card for card in cards if card.kind == "finger-embedding"):
            for minutiae in (card for card in cards if card.kind == "minutiae"):
                if {embedding.model_id, minutiae.model_id} <= self._known.keys():
                    self._add_joint(embedding, minutiae)
        self._replay = {card.model_id: card.replay for card in cards if card.replay is not None}
        self._replay |= {
            joint: self._replay[embedding]
            for embedding in tuple(self._replay)
            for joint in self._known
            if joint.startswith(f"{embedding}+")
        }
        self._sample_of = sample_of
        self._use_gallery_impostors = use_gallery_impostors
        of_minutiae = {EXTERNAL_MINUTIAE, *(card.model_id for card in cards if card.kind == "minutiae")}
        self._minutiae = {
            model_id: self._known[model_id].widened(self._error_sd[model_id], _ERROR_STRETCH)
            for model_id in of_minutiae & self._known.keys()
        }
        self._measured: dict[str, tuple[Hashable, Calibration]] = {}
        self._lock = threading.Lock()

    def _add_joint(self, embedding: ModelCard, minutiae: ModelCard) -> None:
        """Adds the model of templates with this embedding and these minutiae."""
        joint = joint_id(embedding, minutiae)
        self._known[joint] = self._known[embedding.model_id]
        self._error_sd[joint] = self._error_sd[embedding.model_id]
        if minutiae.model_id in embedding.both:
            alone = self._known[minutiae.model_id]
            both = Calibration.from_card(embedding.both[minutiae.model_id])
            widened = both.widened(self._error_sd[joint], _ERROR_STRETCH)
            self._with_minutiae[joint] = WithMinutiae(alone, both), WithMinutiae(alone, widened)

    def sound(self, template: Template) -> Template:
        """The template with its minutiae record in the form that galleries store. Raises InvalidInput for an invalid record, and for
        minutiae of an extractor without a calibration."""
        if template.minutiae is None:
            return template
        self.require_minutiae(template.model_id)
        _, content, bad = standard_records(
            np.array([0, len(template.minutiae)]), np.frombuffer(template.minutiae, np.uint8), template.column
        )
        if bad[0] or not len(content):
            # slower; its error says what is wrong with the record
            return replace(template, minutiae=standard(view_of(template.minutiae, template.column)))
        record = content.tobytes()
        return template if record == template.minutiae else replace(template, minutiae=record)

    def replay_of(self, model_id: str) -> float | None:
        """The similarity from which two embeddings of this model count as copies of one picture; None if the card states none."""
        return self._replay.get(model_id)

    def require_minutiae(self, model_id: str) -> None:
        """Raises InvalidInput for minutiae of an extractor without a calibration."""
        if model_id not in self._known:
            raise InvalidInput(
                f"minutiae of {model_id!r} have no calibration here; name the configured extractor's model_id, or "
                f"{EXTERNAL_MINUTIAE!r}"
            )

    def with_minutiae(self, model_id: str, sample_of: SampleOf | None = None) -> WithMinutiae | None:
        """The calibrations of minutiae that add to this model's embeddings; None if no card has them, so that embeddings are compared
        alone. They are unchecked as long as the embeddings' table is unchecked."""
        checked_and_unchecked = self._with_minutiae.get(model_id)
        return None if checked_and_unchecked is None else checked_and_unchecked[self.of(model_id, sample_of).unchecked]

    def of(self, model_id: str, sample_of: SampleOf | None = None) -> Calibration:
        """The calibration of a model. sample_of: the gallery's subjects to measure it on; None: the constructor's."""
        if model_id in self._minutiae:
            return self._minutiae[model_id]
        known = self._known.get(model_id)
        sample = (sample_of or self._sample_of)(model_id)
        if sample.count < (_MEASURE_MIN if known is None else _MOVE_MIN):
            sample = NO_SAMPLE
        with self._lock:
            last_key, calibration = self._measured.get(model_id, (None, None))
            key = sample.key, self._use_gallery_impostors()
            if calibration is None or last_key != key:
                if known is None:
                    calibration = from_embeddings(sample.vectors())
                else:
                    calibration = self._in_gallery(model_id, known, sample)
                self._measured[model_id] = key, calibration
            return calibration

    def _in_gallery(self, model_id: str, known: Calibration, sample: ImpostorSample) -> Calibration:
        """A card's table in this gallery: moved to its impostor scores, and `unchecked` as long as the sample is small."""
        widened = known.widened(self._error_sd[model_id], _ERROR_STRETCH)
        if not sample.count:
            return widened
        vectors = sample.vectors()
        similarity = (vectors @ vectors.T)[np.triu_indices(sample.count, 1)]
        in_gallery = moved(known, similarity, f"{known.source}; moved to {sample.count} of the gallery's own people")
        if in_gallery is known:  # too many pairs score like mates
            return widened
        checked = sample.count >= CHECKED_PEOPLE
        if self._use_gallery_impostors():
            error_sd = min(_MOVED_ERROR_SD, self._error_sd[model_id])
            return in_gallery if checked else in_gallery.widened(error_sd, _ERROR_STRETCH)
        return known if checked and _fits(known, in_gallery) else widened


def _fits(known: Calibration, in_gallery: Calibration) -> bool:
    """Whether a card's unmoved table fits the gallery's impostor scores."""
    (mean, sd), (gallery_mean, gallery_sd) = known.nonmated_moments, in_gallery.nonmated_moments
    return gallery_mean < mean + _MOVED_ERROR_SD / 2 * sd and gallery_sd < _ERROR_STRETCH * sd


def moved(known: Calibration, similarity: ArrayLike, source: str) -> Calibration:
    """A card's table, shifted and scaled to a gallery's impostor scores. similarity: float (n,), of pairs of its subjects.

    Returns `known` itself if too many pairs score like mates, as in a folder with few people and many pictures of each person.
    """
    cosines = np.asarray(similarity, np.float64)
    impostors = cosines[known.score_db(cosines) < _MATES_DB]
    if len(impostors) < (1 - _MATES_SHARE_MAX) * len(cosines):
        return known
    weight = len(impostors) / (len(impostors) + _CARD_PAIRS)
    sd = np.sqrt(weight * impostors.var() + (1 - weight) * known.nonmated_moments[1] ** 2)
    return known.with_impostors(float(impostors.mean()), float(sd), source)


def from_embeddings(vectors: Float32) -> Calibration:
    """A calibration from unlabelled embeddings, float32 (n, d) unit rows: Student's t distribution of non-mated cosines.

    The tail is not measured. Real tails fall more slowly than the tail of a normal distribution, by which a similarity would seem rarer
    than it is. The standard deviation is the larger of two: the measured value, and the value that the 1e-3 quantile implies. Without rows
    it is larger than that of the usual face models. The table is always `unchecked`, so that no decision rests on it alone.
    """
    mean, sd, pairs = 0.0, _DEFAULT_SD, 1
    if len(vectors):
        cosines = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)].astype(np.float64)
        pairs = len(cosines)
        mean = float(cosines.mean())
        sd = max(float(cosines.std()), float(np.quantile(cosines, 0.999) - mean) / float(stdtrit(_TAIL_FREEDOM, 0.999)))
    score = np.linspace(-1.0, 1.0, 201)
    z = (score - mean) / sd
    impostors = -(_TAIL_FREEDOM + 1) / 2 * np.log1p(z**2 / _TAIL_FREEDOM) - np.log(sd)
    llr = 10 / np.log(10) * (-0.5 * ((score - _MATED_MEAN) / _MATED_SD) ** 2 - np.log(_MATED_SD) - impostors)
    # the mated distribution is wider, so that the ratio would rise again far below the impostor scores
    llr[: llr.argmin()] = llr.min()
    table = {
        "score": score.tolist(),
        "llr_db": np.maximum.accumulate(np.clip(llr, -30, None)).tolist(),
        "nonmated_db": (-10 * np.log10(stdtr(_TAIL_FREEDOM, -z))).tolist(),
        "measured_db": float(10 * np.log10(pairs)),
        "source": f"{pairs} pairs of unlabelled embeddings" if len(vectors) else "no calibration: assumed",
        "mates_measured": False,
    }
    return replace(Calibration.from_card(table), unchecked=True)
