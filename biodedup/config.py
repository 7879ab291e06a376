"""Settings: frozen, units in their names, checked when they are made.

Owns which settings there are, their defaults and their ranges. Never looks for a file (`settings.py` does) and never touches a gallery,
which keeps its own policy. No default depends on the machine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite, log10
from pathlib import Path
from typing import Any

from biodedup.errors import InvalidInput
from biodedup.required import SENT, check_required
from biodedup.tables import made, read_toml, typed
from biodedup.values import check_id

EXTERNAL_MINUTIAE = "external-minutiae"
"""The model_id of minutiae of an unknown extractor."""


@dataclass(frozen=True)
class FaceConfig:
    """Face model and the limits of its quality gate."""

    model: str = "sface"
    """Name of a shipped model card, or the path of a card (`*.toml`) of your own; without weights it calibrates embeddings that
    come ready made."""
    model_folder: Path | None = None
    """Folder of model cards; None: the cards that the package ships."""
    detector: str = "yunet"
    detector_confidence_min: float = 0.6
    """From here on the detector reports a face, so that a refusal can say what is wrong with it."""
    confidence_min: float = 0.8
    """From here on it is believed: LFW's lowest is 0.85; what is no face reaches 0.7."""
    detector_side_px: int = 320
    several_share_max: float = 0.5
    """A second face of at least this share of the first one's prominence (area, less away from the centre) is ambiguous."""
    eye_distance_px_min: float = 20.0
    sharpness_min: float = 0.1
    """Standard deviation of the Laplacian over that of the grey levels, aligned face."""
    brightness_min: float = 14.0
    brightness_max: float = 230.0
    """Mean grey level of the aligned face. The lower limit is for lost light, not for dark skin: mugshots at 15 still
    score 0.6 with their mates (MEDS); LFW darkened to 10 %, mean 12, loses six times as many mates at 0.35."""
    yaw_deg_max: float = 45.0
    roll_deg_max: float = 60.0

    def __post_init__(self) -> None:
        _check(self, 0, 1, "detector_confidence_min", "confidence_min", "several_share_max")
        _check(self, 0, 255, "brightness_min", "brightness_max")
        _check(self, 0, 180, "yaw_deg_max", "roll_deg_max")
        _check(self, 0, inf, "eye_distance_px_min", "sharpness_min")
        _check(self, 1, inf, "detector_side_px")
        _check_text(self, "model", "detector")
        if self.brightness_min > self.brightness_max:
            raise InvalidInput(
                f"brightness_min is {self.brightness_min}, wanted at most brightness_max, {self.brightness_max}"
            )


@dataclass(frozen=True)
class FingerConfig:
    """Finger extraction and the limits of its quality gate."""

    minutiae: str = "mindtct"
    """The minutiae extractor: `mindtct`, or `leader`, a network that is more accurate and takes several times as long."""
    minutiae_model: str | None = None
    """Path of a model card (`*.toml`) of your own for this extractor, with another calibration; None: the shipped one."""
    model: str | None = "finger256"
    """The embedding: name of a shipped model card, or path of one of your own; None: templates hold minutiae alone."""
    record_model_id: str = EXTERNAL_MINUTIAE
    """The model_id of minutiae records that come ready made, which do not say who extracted them. By default they compare with one
    another alone; naming this extractor's model_id declares that they compare with its minutiae, too."""
    area_mm2_min: float = 20.0
    """Area covered by ridges."""
    ridge_share_min: float = 0.5
    """Share of spectral energy at the periods that ridges have."""
    minutiae_min: int = 8
    side_px_max: int = 2500
    """At 500 dpi, 127 mm: longer than any finger, or a slap of four."""
    area_mm2_max: float = 3000.0
    """Area of the rectangle around the ridges. A finger rolled from nail to nail takes 40 x 38 mm, 1,520. Minutiae take about 0.9 s for
    1,000 mm2 and more than in proportion for larger ones: 20 s for 127 x 127 mm (2026-11)."""
    nfiq2_min: float = 2.0

    def __post_init__(self) -> None:
        _check(self, 0, inf, "area_mm2_min", "minutiae_min", "nfiq2_min")
        _check(self, 0, 1, "ridge_share_min")
        _check(self, 1, inf, "side_px_max")
        _check_text(self, "minutiae")
        check_id(self.record_model_id, "record_model_id")


@dataclass(frozen=True)
class CaptureConfig:
    """Limits on what is decoded at all."""

    pixels_max: int = 16_000_000
    """More pixels than this are refused before decoding. A slap of four fingers at 1000 dpi has 10 million, a whole ten-print card at 500
    dpi 16, a passport photograph one. JPEGs of faces may have eight times as many, as telephones make: they are decoded at a half or a
    quarter of their size, which leaves a face more pixels than the network takes."""
    side_px_min: int = 40
    bytes_max: int = 100_000_000

    def __post_init__(self) -> None:
        _check(self, 1, inf, "pixels_max", "side_px_min", "bytes_max")


@dataclass(frozen=True)
class IsolationConfig:
    """Limits of the worker processes that decode and extract, so that a hostile capture costs itself alone."""

    capture_s_max: float = 10.0
    """Seconds of the processor that a capture may take, and six times as many by the clock, so that a busy machine refuses nobody. A face
    takes 0.06, a finger 0.2, with `leader` 1."""
    memory_bytes_max: int = 1 << 30
    """Memory of a worker beyond what its libraries take, models included: those take 150 MB, a picture of `pixels_max` up to 500."""

    def __post_init__(self) -> None:
        if not 0 < self.capture_s_max <= 86_400:
            raise InvalidInput(f"capture_s_max is {self.capture_s_max!r}, wanted seconds, above 0 and at most a day")
        if self.memory_bytes_max < 1 << 28:
            raise InvalidInput(f"memory_bytes_max is {self.memory_bytes_max}, wanted at least {1 << 28}")


@dataclass(frozen=True)
class Policy:
    """What decisions are made by; a gallery keeps its own. Thresholds follow from target error rates at the present gallery size N.

    fpir: the share of searches of strangers that may come out `duplicate`. FMR = FPIR / N, independence assumed; in decibels
    10 log10(N / FPIR). review_fpir is the wider band: what lies between goes to a person. fnir_review: the share of mates that may score
    below the review threshold. Where captures are too few to keep to it, as one face is among many millions, the threshold is lowered
    for that search until they do; then somebody nearly always reaches it, and nobody is cleared who could not have been recognised. The
    default asks only that a mate be rather found than missed. duplicate_db and review_db, where given, are fixed thresholds instead.
    duplicate_floor_db: the least threshold of any automatic `duplicate`, also of a fixed one. A gallery of ten asks for 40 dB, which
    strangers of another camera than the model card's reach (MEDS 46, Yale 41, ORL 61 dB; UareU's fingers 49); as far as is sure (see
    match/calibrations.py) they reach 44 dB.
    trust_extrapolation: False sends to review what would be `duplicate` by a score beyond the measured pairs. own_strangers: from 32
    people on, a face's or a finger's embeddings are calibrated by how alike this gallery's strangers are, and not those that the model's
    card was measured on; False: scores are those of `biodedup.compare`.

    required: what an encounter has to bring before a subject is enrolled or updated; otherwise it is `refused` as `incomplete`, and may
    be sent again under its encounter_id. A sequence of
      `sent`           every capture that was sent can be used (the default). Of two sound captures of one finger the better one counts;
      `face`, `right_index`, ...   this capture;
      `N fingers`      so many fingers of any position, N from 1 to 10.
    `biodedup.Missing` excuses a column. Fingers that it states are taken off the ten that `N fingers` may ask for: of somebody with one
    finger left, `2 fingers` asks for that one. An empty sequence requires nothing.
    """

    fpir: float = 1e-3
    review_fpir: float = 5e-3
    fnir_review: float = 0.5
    duplicate_db: float | None = None
    review_db: float | None = None
    duplicate_floor_db: float = 50.0
    verify_fmr: float = 1e-4
    trust_extrapolation: bool = True
    own_strangers: bool = True
    required: tuple[str, ...] = (SENT,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "required", check_required(self.required))
        for name in ("fpir", "review_fpir", "fnir_review", "verify_fmr"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise InvalidInput(f"{name} is {value}, wanted a rate between 0 and 1")
        for name in ("duplicate_db", "review_db"):
            value = getattr(self, name)
            if value is not None and not isfinite(value):
                raise InvalidInput(f"{name} is {value}, wanted a finite number of decibels, or None")
        if self.review_fpir < self.fpir:
            raise InvalidInput(f"review_fpir {self.review_fpir} is below fpir {self.fpir}; review is the wider band")
        if self.duplicate_db is not None and self.review_db is not None and self.review_db > self.duplicate_db:
            raise InvalidInput(
                f"review_db {self.review_db} is above duplicate_db {self.duplicate_db}; review is the wider band"
            )
        if not self.duplicate_floor_db >= 0:
            raise InvalidInput(f"duplicate_floor_db is {self.duplicate_floor_db}, wanted 0 or more")

    def thresholds_db(self, gallery_size: int) -> tuple[float, float]:
        """(duplicate, review) thresholds in dB for a gallery of this many subjects."""
        size = max(gallery_size, 1)
        duplicate = max(self.link_db(size), self.duplicate_floor_db)
        review = self.review_db if self.review_db is not None else 10 * log10(size / self.review_fpir)
        return duplicate, min(review, duplicate)

    def link_db(self, gallery_size: int) -> float:
        """From where on a join links two subjects: the duplicate threshold without its floor. A link decides nothing by itself."""
        return self.duplicate_db if self.duplicate_db is not None else 10 * log10(max(gallery_size, 1) / self.fpir)


@dataclass(frozen=True)
class SearchConfig:
    """How far a search goes."""

    candidates: int = 100
    """Rows that the face scan hands to rescoring with every capture, a probe."""
    finger_rows_max: int = 5_000
    """Rows without a comparable face whose fingers are compared one by one; more than that makes a search incomplete."""
    returned: int = 10
    """Candidates kept in a decision."""
    miss_risk: float = 1e-3
    """The probability that the scan of a column loses a row that an exact comparison of everybody would find; 0 leaves nothing
    to chance, and takes longer."""
    capture_correlation: float = 0.3
    """Assumed between how well any two captures of a subject match their mates (ranks, on a normal scale): who has one poor finger
    often has several. A plan over several columns is made for it."""

    across_positions: bool = False
    """Compare each finger with fingers of all positions, so that a wrong label hides nobody: m x n comparisons of each row for m
    fingers of a probe and n of the gallery, in n passes; ten by ten take about twice as long as ten. A call may say otherwise; a join goes by what is said here."""

    def __post_init__(self) -> None:
        for name in ("candidates", "finger_rows_max", "returned"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted at least 1")
        if not 0 <= self.miss_risk < 0.5:
            raise InvalidInput(f"miss_risk is {self.miss_risk}, wanted a probability of at least 0 and less than 0.5")
        if not 0 <= self.capture_correlation < 1:
            raise InvalidInput(f"capture_correlation is {self.capture_correlation}, wanted at least 0 and less than 1")


@dataclass(frozen=True)
class GalleryConfig:
    """When rows move from the journal to sealed segments, and when segments are merged."""

    seal_rows: int = 16_384
    """Rows and encounters in the journal (and, exact, in memory) that are sealed together."""
    merge_fan: int = 8
    """Neighbouring segments of one size that become one of the next."""
    background: bool = True
    """Seal and merge on a thread of the engine's own; otherwise only when `compact` or a bulk load asks for it."""
    segment_rows: int = 1 << 24
    """Rows of a segment that is not merged further: bounds the disk and the time that a merge needs."""
    encounters_max: int = 3
    """Rows (encounters) that a subject keeps, chosen by quality and spread over time; more where each has a column of its own."""

    def __post_init__(self) -> None:
        for name, minimum in (("seal_rows", 1), ("merge_fan", 2), ("segment_rows", 1), ("encounters_max", 1)):
            if getattr(self, name) < minimum:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted at least {minimum}")


@dataclass(frozen=True)
class Config:
    """Everything that can be set. `threads` bounds each of extraction and search; it is never guessed.

    policy: of a gallery that is created; None: the default one. An existing gallery decides by the policy that it keeps, and to open it
    with another one is a mistake (`Engine.open`).
    """

    face: FaceConfig = field(default_factory=FaceConfig)
    finger: FingerConfig = field(default_factory=FingerConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    policy: Policy | None = None
    search: SearchConfig = field(default_factory=SearchConfig)
    gallery: GalleryConfig = field(default_factory=GalleryConfig)
    threads: int = 2
    batch_size: int = 32
    """Captures embedded, and encounters committed, together."""
    isolation: IsolationConfig | None = None
    """None: captures are decoded in this process, within the limits of `capture`. Otherwise in `threads` worker processes with limits of
    their own, as jobs and the command line do; a program that asks for it guards its main module by `if __name__ == "__main__"`."""

    def __post_init__(self) -> None:
        for name in ("threads", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, wanted at least 1")

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """The settings of a TOML file, which has the names that these classes have, `[face]`, `[search]`, ... being tables; what it does not
        name has its default. Relative paths start from the file's folder; "" stands for None. Raises InvalidInput, which names the
        file and the setting."""
        path = Path(path)
        return made(cls, typed(cls, read_toml(path), str(path), path.parent), str(path))

    @property
    def stated_policy(self) -> Policy:
        """The policy, or the default one: what counts where there is no gallery."""
        return self.policy or Policy()

    def with_policy(self) -> Config:
        """The same with its policy stated."""
        return replace(self, policy=self.stated_policy)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy with the policy stated, as the gallery stores it."""
        return asdict(
            self.with_policy(), dict_factory=lambda items: {k: str(v) if isinstance(v, Path) else v for k, v in items}
        )


def _check(settings: object, minimum: float, maximum: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not minimum <= value <= maximum or value == inf:
            wanted = f"at least {minimum}" if maximum == inf else f"{minimum} to {maximum}"
            raise InvalidInput(f"{name} is {value}, wanted {wanted}")


def _check_text(settings: object, *names: str) -> None:
    for name in names:
        if not getattr(settings, name):
            raise InvalidInput(f"{name} is empty, wanted a name")
