"""Settings of face and finger extraction, and limits that a capture must meet.

Owns their defaults and their ranges. Never decodes a capture.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

from biodedup.common.arguments import check_fields
from biodedup.config.ranges import check_not_empty, check_range
from biodedup.devices import check_devices
from biodedup.errors import InvalidInput
from biodedup.values import check_id

EXTERNAL_MINUTIAE = "external-minutiae"
"""The model_id of minutiae whose extractor is unknown."""


@dataclass(frozen=True)
class FaceConfig:
    """The face model, the face detector, and the limits of the face quality gate."""

    model: str = "sface"
    """Name of a shipped model card, or path of your own card (`*.toml`). A card without weights calibrates ready-made embeddings. A gallery
    column holds templates of one model; a second model needs a second gallery."""
    model_folder: Path | None = None
    """Folder of the model cards. None: the cards in the package."""
    detector: str = "yunet"
    """Name of the face detector's card. The package has one detector, YuNet."""
    pad: str | None = None
    """Path of a card (`*.toml`) of kind `pad` (presentation attack detection): a network that tells living faces from photographs, screens
    and masks. Faces below its limit are refused as `presentation_attack`. None: no presentation attack detection. The package has no such
    network."""
    detector_confidence_min: float = 0.6
    """Detector confidence, 0 to 1, from which a face is reported. It is lower than confidence_min, so that the refusal of a doubtful face
    can say what is wrong with it."""
    confidence_min: float = 0.8
    """Detector confidence, 0 to 1, below which a face is refused. The lowest confidence among LFW's faces is 0.85; pictures without a face
    reach 0.7."""
    detector_side_px: int = 320
    """Longer side, in pixels, to which a picture is scaled for the detector. If no face is found, the detector runs again at 640 pixels."""
    quality_min: float = 0.68
    """Minimum `Template.quality` of a face: the probability, 0 to 1, that a comparison with another capture of the person passes at FMR
    1e-4. A face with signs of noise, patterns or covering needs a higher quality. 0.68 refuses 0.5 % of LFW and none of MEDS, ORL and Yale.
    Raise it if an operator can capture again (`docs/guides/captures.md` has the curve)."""
    several_share_max: float = 0.6
    """Maximum prominence of a picture's second face, as a share of the first face's prominence; above it the picture is refused. Prominence
    is the area of the face's box, weighted by its distance from the picture's centre. In LFW, chosen faces whose picture has a share of 0.5
    to 0.6 still match their mates, so that 0.6 refuses few of them. At a share of 0.6 one face is 1.3 times as long as the other. Raise it
    for pictures taken in crowds."""
    eye_distance_px_min: float = 20.0
    """Minimum distance between the eyes, in pixels of the capture."""
    sharpness_min: float = 0.1
    """Minimum sharpness of the aligned face: the standard deviation of its Laplacian divided by that of its grey levels."""
    brightness_min: float = 14.0
    """Minimum mean grey level, 0 to 255, of the aligned face. The limit finds lost light, not dark skin: mugshots at 15 still score 0.6 with
    their mates (MEDS). LFW darkened to 10 %, mean 12, loses six times as many mates at 0.35."""
    brightness_max: float = 230.0
    """Maximum mean grey level, 0 to 255, of the aligned face."""
    yaw_deg_max: float = 60.0
    """Maximum yaw (turn of the head to a side), in degrees. In LFW, faces with a yaw of 45 to 60 degrees and enough `quality` match their
    mates (all seven in 1,600 faces, 2026-11)."""
    roll_deg_max: float = 60.0
    """Maximum roll (tilt of the head), in degrees. Alignment removes the roll, so that it harms less than yaw."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, 0, 1, "detector_confidence_min", "confidence_min", "quality_min", "several_share_max")
        check_range(self, 0, 255, "brightness_min", "brightness_max")
        check_range(self, 0, 180, "yaw_deg_max", "roll_deg_max")
        check_range(self, 0, inf, "eye_distance_px_min", "sharpness_min")
        check_range(self, 1, inf, "detector_side_px")
        check_not_empty(self, "model", "detector")
        if self.brightness_min > self.brightness_max:
            raise InvalidInput(
                f"brightness_min is {self.brightness_min}, wanted at most brightness_max, {self.brightness_max}"
            )


@dataclass(frozen=True)
class FingerConfig:
    """The finger models, and the limits of the finger quality gate."""

    minutiae: str = "skeleton"
    """The minutiae extractor. `skeleton` uses the ridge map that the embedding needs anyway. `mindtct` (NBIS), which galleries of earlier
    builds have, is slower and less accurate. `leader`, a network, is more accurate and takes twenty times as long."""
    minutiae_model: str | None = None
    """Path of your own model card (`*.toml`) for this extractor, with another calibration. None: the card in the package."""
    model: str | None = "finger256"
    """The finger embedding: name of a shipped model card, or path of your own card. None: templates hold minutiae alone, and a search
    compares every row by its minutiae."""
    record_model_id: str = EXTERNAL_MINUTIAE
    """The model_id of ready-made minutiae records, which do not state their extractor. By default such records are compared only with each
    other. To compare them with this configuration's minutiae, too, set it to the model_id of its extractor."""
    area_mm2_min: float = 20.0
    """Minimum area covered by ridges, in mm2."""
    certainty_min: float = 0.32
    """Minimum certainty, 0 to 1, that the picture shows friction ridges."""
    minutiae_min: int = 8
    """Minimum number of minutiae."""
    side_px_max: int = 2500
    """Maximum side in pixels at 500 dpi: 127 mm, longer than a finger or a slap of four fingers. A larger picture states a wrong dpi."""
    area_mm2_max: float = 3000.0
    """Maximum area, in mm2, of the rectangle around the ridges. A finger rolled from nail to nail takes 40 x 38 mm, 1,520 mm2. The limit
    bounds time: extraction of minutiae takes about 0.9 s for 1,000 mm2 and grows faster than the area, to 20 s for 127 x 127 mm (2026-11)."""
    quality_min: float = 0.09
    """Minimum `Template.quality` of a finger: the probability, 0 to 1, that a comparison with another capture of the finger passes at FMR
    1e-4. Raise it if operators can capture a finger again."""
    nfiq2: bool = False
    """Whether NFIQ 2 (ISO/IEC 29794-4) predicts the quality of templates and of records. It takes five times as long as the rest of a
    finger's extraction."""
    nfiq2_min: float = 2.0
    """Minimum NFIQ 2 score, 0 to 100, if `nfiq2` is True."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, 0, inf, "area_mm2_min", "minutiae_min", "nfiq2_min")
        check_range(self, 0, 1, "certainty_min", "quality_min")
        check_range(self, 1, inf, "side_px_max")
        check_not_empty(self, "minutiae")
        check_id(self.record_model_id, "record_model_id")


@dataclass(frozen=True)
class CaptureConfig:
    """Limits that a capture must meet before it is decoded, and the known capture devices."""

    pixels_max: int = 16_000_000
    """Maximum number of pixels. A slap of four fingers at 1000 dpi has 10 million, a ten-print card at 500 dpi 16 million, a passport
    photograph one million. JPEGs of faces may have eight times as many pixels, as telephones make them: they are decoded at a half or a
    quarter of their size, which is still larger than the network's input."""
    side_px_min: int = 40
    """Minimum length of each side, in pixels."""
    bytes_max: int = 100_000_000
    """Maximum size of a file, in bytes. Nothing beyond this size is read."""
    devices: dict[str, str] | None = None
    """device_id -> Ed25519 public key, 64 hexadecimal digits. Verdicts (`Face.device`) count if one of these devices signed them. None: no
    verdict counts."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.devices is not None:
            check_devices(self.devices)
        check_range(self, 1, inf, "pixels_max", "side_px_min", "bytes_max")


@dataclass(frozen=True)
class IsolationConfig:
    """Limits of the worker processes that decode captures and extract templates. A hostile capture can only harm its own worker."""

    capture_s_max: float = 10.0
    """Seconds of processor time that a capture may take. The limit by the clock is six times as long, so that a busy machine refuses no
    capture. A face takes 0.06 s, a finger 0.2 s, a finger with `leader` 1 s. Raise it on a slow machine."""
    memory_bytes_max: int = 1 << 30
    """Memory, in bytes, that a worker may use in addition to its libraries and models, which take 150 MB. A picture of `pixels_max` pixels
    takes up to 500 MB."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.capture_s_max <= 86_400:
            raise InvalidInput(f"capture_s_max is {self.capture_s_max!r}, wanted seconds, above 0 and at most a day")
        if self.memory_bytes_max < 1 << 28:
            raise InvalidInput(f"memory_bytes_max is {self.memory_bytes_max}, wanted at least {1 << 28}")
