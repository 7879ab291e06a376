"""The calibration of each model in one gallery.

Owns the look-up from model_id to `Calibration`. Refuses minutiae without a calibration.

- A model with a card has the card's table, shifted and scaled to this gallery's impostor scores: these depend on the camera, the
  scanner and the population, and nearly all pairs of a gallery's subjects are impostor pairs. The few mated pairs score far higher and
  are left out.
- Embeddings of a model without a card (bring your own) are calibrated on the gallery alone.
- Minutiae of an unknown extractor take the table of the configured extractor, and no such score counts as measured. (LEADER's minutiae
  read by MINDTCT's table: impostor pairs reach a nominal FMR of 0.1 in at most 0.031, and 0.01 in at most 0.0028 of the pairs of FVC2002
  DB1-4_B and UareU, 2026-11.)
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
_SAMPLE_MIN, _OWN_MIN = 256, 32
"""Least numbers of subjects to measure a table on, and to move a card's table. With fewer the card's impostor scores are the better
estimate."""
CHECKED_PEOPLE = 200
"""Subjects from which a moved table counts as checked. 256 rows have so many even if some are removed or lack the column."""
_OFF_SD = {"face-embedding": 1.6, "finger-embedding": 0.5, "minutiae": 0.5}
_OFF_MOVED_SD, _OFF_STRETCH = 0.5, 1.1
"""By how many standard deviations a table may be shifted, and how far stretched: a card's, by its kind, and one that was moved."""
_CARD_PAIRS = 400  # weight of the card's deviation, in pairs: it differs by some percent from set to set
_MATES_DB, _MATES_MOST = (
    40.0,
    0.05,
)  # score by the card from which a pair may be mated; share of such pairs that may be left out
_DEFAULT_SD = 0.1  # of non-mated cosines, until there are enough rows: SFace's 0.096 rounded up (LFW, 2026-11)
_TAIL_FREEDOM = (
    30.0  # of Student's t: SFace's table from 0.3 to 1, in its own standard deviations, within 6 dB (2026-12)
)
_MATED_MEAN, _MATED_SD = 0.65, 0.15  # of mated cosines, as face models of this kind have them (LFW, 2026-11)


@dataclass(frozen=True, eq=False)
class WithMinutiae:
    """Calibration of a finger's embedding and minutiae together: `both` calibrates the sum of their llr_db."""

    minutiae: Calibration
    both: Calibration


@dataclass(frozen=True, eq=False)
class ImpostorSample:
    """Random subjects of a gallery; nearly all pairs of them are impostor pairs. key: changes with the subjects; vectors(): their
    embeddings, float32 (count, d)."""

    key: Hashable
    count: int
    vectors: Callable[[], Float32]


NO_SAMPLE = ImpostorSample(None, 0, lambda: np.zeros((0, 1), np.float32))
SampleOf = Callable[[str], ImpostorSample]
"""model_id -> up to SAMPLE_SIZE subjects with embeddings of this model."""


class Calibrations:
    """Calibrations by model_id. Thread-safe.

    sample_of: the sample of subjects for look-ups that name none. use_gallery_impostors: whether cards' tables are moved to this gallery's impostor
    scores. Of several minutiae cards the last one's table is used for unknown extractors.
    """

    def __init__(
        self,
        cards: Sequence[ModelCard],
        sample_of: SampleOf = lambda model_id: NO_SAMPLE,
        *,
        use_gallery_impostors: Callable[[], bool] = lambda: True,
    ) -> None:
        self._known = {card.model_id: Calibration.from_card(card.calibration) for card in cards if card.calibration}
        self._off_sd = {card.model_id: _OFF_SD.get(card.kind, 0.0) for card in cards}
        self._off_sd[EXTERNAL_MINUTIAE] = _OFF_SD["minutiae"]
        for card in cards:
            if card.kind == "minutiae" and card.model_id in self._known:
                self._known[EXTERNAL_MINUTIAE] = replace(self._known[card.model_id], measured_db=0.0)
        self._with_minutiae: dict[str, tuple[WithMinutiae, WithMinutiae]] = {}
        for card in cards:
            for minutiae in cards if card.kind == "finger-embedding" else ():
                if minutiae.kind == "minutiae" and {card.model_id, minutiae.model_id} <= self._known.keys():
                    known = joint_id(card, minutiae)
                    self._known[known] = self._known[card.model_id]
                    self._off_sd[known] = self._off_sd[card.model_id]
                    if minutiae.model_id in card.both:
                        both = Calibration.from_card(card.both[minutiae.model_id])
                        doubted = both.doubted(self._off_sd[known], _OFF_STRETCH)
                        of = self._known[minutiae.model_id]
                        self._with_minutiae[known] = WithMinutiae(of, both), WithMinutiae(of, doubted)
        self._replay = {card.model_id: card.replay for card in cards if card.replay is not None}
        self._replay |= {
            known: self._replay[embedding]
            for embedding in tuple(self._replay)
            for known in self._known
            if known.startswith(f"{embedding}+")
        }
        self._sample_of = sample_of
        self._use_gallery_impostors = use_gallery_impostors
        of_minutiae = {EXTERNAL_MINUTIAE, *(card.model_id for card in cards if card.kind == "minutiae")}
        self._minutiae = {
            model_id: self._known[model_id].doubted(self._off_sd[model_id], _OFF_STRETCH)
            for model_id in of_minutiae & self._known.keys()
        }
        self._measured: dict[str, tuple[Hashable, Calibration]] = {}
        self._lock = threading.Lock()

    def sound(self, template: Template) -> Template:
        """The template with its record in the form that galleries store. Raises InvalidInput for an unsound record, and for minutiae of
        an extractor without a calibration."""
        if template.minutiae is None:
            return template
        self.require_minutiae(template.model_id)
        _, content, bad = standard_records(
            np.array([0, len(template.minutiae)]), np.frombuffer(template.minutiae, np.uint8), template.column
        )
        if bad[0] or not len(content):
            return replace(
                template, minutiae=standard(view_of(template.minutiae, template.column))
            )  # says what is wrong
        record = content.tobytes()
        return template if record == template.minutiae else replace(template, minutiae=record)

    def replay_of(self, model_id: str) -> float | None:
        """The similarity from which two embeddings of this model are taken for copies of one picture; None where the card has none."""
        return self._replay.get(model_id)

    def require_minutiae(self, model_id: str) -> None:
        """Raises InvalidInput for minutiae of an extractor without a calibration."""
        if model_id not in self._known:
            raise InvalidInput(
                f"minutiae of {model_id!r} have no calibration here; name the configured extractor's model_id, or "
                f"{EXTERNAL_MINUTIAE!r}"
            )

    def with_minutiae(self, model_id: str, sample_of: SampleOf | None = None) -> WithMinutiae | None:
        """How minutiae add to this model's embeddings; None if no card says so, and embeddings are compared alone. The sum's table is
        unchecked while the embeddings' table is."""
        found = self._with_minutiae.get(model_id)
        return None if found is None else found[self.of(model_id, sample_of).unchecked]

    def of(self, model_id: str, sample_of: SampleOf | None = None) -> Calibration:
        """The calibration of a model. sample_of: the gallery's subjects to measure it on; None: as the constructor was given."""
        if model_id in self._minutiae:
            return self._minutiae[model_id]
        known = self._known.get(model_id)
        sample = (sample_of or self._sample_of)(model_id)
        if sample.count < (_SAMPLE_MIN if known is None else _OWN_MIN):
            sample = NO_SAMPLE
        with self._lock:
            last_key, calibration = self._measured.get(model_id, (None, None))
            key = sample.key, self._use_gallery_impostors()
            if calibration is None or last_key != key:
                calibration = (
                    from_embeddings(sample.vectors()) if known is None else self._here(model_id, known, sample)
                )
                self._measured[model_id] = key, calibration
            return calibration

    def _here(self, model_id: str, known: Calibration, sample: ImpostorSample) -> Calibration:
        """A card's table in this gallery: moved to its impostor scores, and `unchecked` while the sample is too small."""
        doubted = known.doubted(self._off_sd[model_id], _OFF_STRETCH)
        if not sample.count:
            return doubted
        vectors = sample.vectors()
        similarity = (vectors @ vectors.T)[np.triu_indices(sample.count, 1)]
        there = moved(known, similarity, f"{known.source}; moved to {sample.count} of the gallery's own people")
        if there is known:  # too many pairs score like mates
            return doubted
        checked = sample.count >= CHECKED_PEOPLE
        if self._use_gallery_impostors():
            return there if checked else there.doubted(min(_OFF_MOVED_SD, self._off_sd[model_id]), _OFF_STRETCH)
        return known if checked and _near(known, there) else doubted


def _near(known: Calibration, there: Calibration) -> bool:
    """Whether a card's table, unmoved, fits the gallery's impostor scores well enough."""
    (mean, sd), (own_mean, own_sd) = known.nonmated_law, there.nonmated_law
    return own_mean < mean + _OFF_MOVED_SD / 2 * sd and own_sd < _OFF_STRETCH * sd


def moved(known: Calibration, similarity: ArrayLike, source: str) -> Calibration:
    """A card's table, shifted and scaled to a gallery's impostor scores. similarity: float (n,), of pairs of its subjects.

    Returns `known` itself if too many pairs score like mates, as in a folder with few people and many pictures of each.
    """
    cosines = np.asarray(similarity, np.float64)
    impostors = cosines[known.score_db(cosines) < _MATES_DB]
    if len(impostors) < (1 - _MATES_MOST) * len(cosines):
        return known
    own = len(impostors) / (len(impostors) + _CARD_PAIRS)
    sd = np.sqrt(own * impostors.var() + (1 - own) * known.nonmated_law[1] ** 2)
    return known.with_impostors(float(impostors.mean()), float(sd), source)


def from_embeddings(vectors: Float32) -> Calibration:
    """A calibration from unlabelled embeddings, float32 (n, d) unit rows: Student's t distribution of non-mated cosines.

    The tail is not measured. Real tails fall more slowly than a normal distribution's, which would make a similarity seem rarer than it
    is. The spread is the larger of the measured standard deviation and the one that the 1e-3 quantile implies; with too few rows, one
    wider than that of the face models in use. Always `unchecked`, so that no decision rests on it alone.
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
    llr[: llr.argmin()] = (
        llr.min()
    )  # mates spread wider, so that their density would exceed again far below the impostors
    table = {
        "score": score.tolist(),
        "llr_db": np.maximum.accumulate(np.clip(llr, -30, None)).tolist(),
        "nonmated_db": (-10 * np.log10(stdtr(_TAIL_FREEDOM, -z))).tolist(),
        "measured_db": float(10 * np.log10(pairs)),
        "source": f"{pairs} pairs of unlabelled embeddings" if len(vectors) else "no calibration: assumed",
        "mates_measured": False,
    }
    return replace(Calibration.from_card(table), unchecked=True)
