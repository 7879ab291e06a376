"""Turns finger captures into samples: resamples them to 500 dpi, finds ridges, checks the quality, extracts minutiae.

Owns resampling, the quality gate for fingers, the interface of minutiae extractors, and the import of ready-made records. Never decodes
files and never compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.fingers import nbis_parts
from biodedup.capture.fingers.frame import unframed
from biodedup.capture.fingers.leader import Leader, Weights
from biodedup.capture.fingers.one_pass import Print, one_pass
from biodedup.capture.fingers.resampling import DPI, MM_PER_PIXEL, resampled, scanner_dpi
from biodedup.capture.fingers.ridge_distance import Judged, judged
from biodedup.capture.fingers.ridge_minutiae import record_of
from biodedup.capture.minutiae.record import (
    MinutiaeRecord,
    best_views,
    position_code,
    standard,
    view_of,
    write_record,
    write_views,
)
from biodedup.capture.pictures.formats import Pixels
from biodedup.capture.pictures.resolution import RIDGE_MM
from biodedup.common import quality as quality_scale
from biodedup.common.arguments import checked
from biodedup.config import EXTERNAL_MINUTIAE, FingerConfig
from biodedup.errors import InvalidInput
from biodedup.trace import tracing
from biodedup.values import Float32, Refusal, Template

_BLOCK_PX = 16
_CONTRAST_MIN = 12.0  # standard deviation of grey levels within a block
_COHERENCE_MIN = 0.4  # coherence of the gradient within 3 x 3 blocks; FVC2002 and UareU, 2026-11

MinutiaeExtractor = Callable[[NDArray[np.uint8], Print], MinutiaeRecord]
"""(picture, uint8 (h, w) at 500 dpi; its `Print`) -> minutiae. Raises ValueError for a picture that it cannot process."""

Passed: TypeAlias = tuple[NDArray[np.uint8], Print, tuple[str, ...]]
"""A picture at 500 dpi, its `Print`, and sentences about corrected metadata."""


def minutiae_extractor(name: str, weights: Weights | None) -> MinutiaeExtractor:
    """The minutiae extractor of this name. weights: its weights, or None."""
    if name == "skeleton":
        return lambda grey, print_: record_of(print_.minutiae, grey.shape)
    if name == "leader" and weights is not None:
        leader = Leader(weights)
        return lambda grey, print_: leader(grey)
    if name == "mindtct":
        return lambda grey, print_: nbis_parts.extract(grey)
    raise InvalidInput(f"minutiae extractor {name!r} is not known; use skeleton, mindtct, or leader with its weights")


@dataclass(frozen=True, eq=False)
class FingerSample:
    """An accepted capture.

    minutiae: a record of ISO/IEC 19794-2:2005; its quality, 0 to 100, is the NFIQ 2 score if `FingerConfig.nfiq2` is set, otherwise
    `Measures.score`. quality: as in `Template`. print: its ridges and minutiae. provenance: sentences about corrected metadata of the file.
    """

    position: str
    minutiae: bytes = field(repr=False)
    quality: float
    print: Print = field(repr=False)
    provenance: tuple[str, ...] = ()


class FingerReader:
    """Reads finger samples. Thread-safe."""

    def __init__(self, config: FingerConfig, weights: Weights | None = None) -> None:
        self._config = config
        self._extract = minutiae_extractor(config.minutiae, weights)

    def read(self, pixels: Pixels, position: str, dpi: float | None) -> FingerSample | Refusal:
        """The sample, or a refusal. dpi: stated by the caller; None: the file's value, or 500."""
        passed = self._pass(pixels, position, dpi)
        if isinstance(passed, Refusal):
            return passed
        grey, print_, note = passed
        if (steps := tracing()) is not None:
            steps.add("ridges", position, image=grey, blocks=ridge_blocks(grey))
        if (refusal := self._not_a_print(print_, position)) is not None:
            return refusal
        try:
            record = self._extract(grey, print_)
            nfiq2 = nbis_parts.nfiq2(around_ridges(grey, ridge_blocks(grey))[0]) if self._config.nfiq2 else None
        except ValueError:
            detail = f"{self._config.minutiae}{' or NFIQ 2' * self._config.nfiq2} cannot work on a picture of this size or content"
            return Refusal(position, "component_limit", detail, max(grey.shape))
        if (refusal := self._too_poor(print_, record, nfiq2, position)) is not None:
            return refusal
        quality = print_.measures.quality if nfiq2 is None else quality_scale.of_nfiq2(nfiq2)
        stated = print_.measures.score if nfiq2 is None else nfiq2
        minutiae = write_record(record, position_code(position), int(min(max(stated, 0), 100)))
        return FingerSample(position, minutiae, quality, print_, note)

    def _pass(self, pixels: Pixels, position: str, dpi: float | None) -> Passed | Refusal:
        """The picture at 500 dpi and its `Print`. A resolution may contradict the ridges. If the caller states it, the picture is refused. If
        the file states it, it is replaced by 500 or 1,000 dpi if that fits, because image editors change it; otherwise the picture is refused."""
        scan_dpi = dpi or scanner_dpi(pixels.dpi)
        picture = unframed(pixels.grey)
        found = judged(picture, scan_dpi)
        said = "the stated" if scan_dpi in (dpi, pixels.dpi) else "the assumed"
        if found.doubtful if dpi is None else found.better is not None:
            return _contradicted(found, position, scan_dpi, said)
        notes: tuple[str, ...] = ()
        if found.better is not None:
            verb = "states" if pixels.dpi == scan_dpi else "would have"
            notes = (f"{verb} {scan_dpi:.0f} dpi, where its ridges are no finger's; taken as {found.better:g}",)
            scan_dpi = found.better
        grey = self._at_500_dpi(picture, position, scan_dpi)
        if isinstance(grey, Refusal):
            return grey
        print_ = one_pass(grey)
        # a picture without regular waves, such as a photograph, is refused by the gate; only a picture of ridges has a wrong resolution
        if found.impossible and (
            found.mm(scan_dpi) < RIDGE_MM or print_.measures.certainty >= self._config.certainty_min
        ):
            return _contradicted(found, position, scan_dpi, said)
        return grey, print_, notes

    def _at_500_dpi(self, grey: NDArray[np.uint8], position: str, dpi: float) -> NDArray[np.uint8] | Refusal:
        """The picture at 500 dpi, cropped to the ridges if it is larger than a finger."""
        config = self._config
        # checked before resampling: 7,000 pixels at a stated 72 dpi would need 2 GB
        side_px = round(max(grey.shape) * DPI / dpi)
        if side_px > config.side_px_max:
            return Refusal(
                position, "too_large", "pixels at 500 dpi; is the stated dpi right?", side_px, config.side_px_max
            )
        grey = resampled(grey, dpi)
        if grey.size * MM_PER_PIXEL**2 <= config.area_mm2_max:
            return grey
        grey, _ = around_ridges(grey, ridge_blocks(grey))
        whole_mm2 = grey.size * MM_PER_PIXEL**2
        if whole_mm2 > config.area_mm2_max:
            detail = "mm2 around the ridges; is the stated dpi right, and is it one finger?"
            return Refusal(position, "too_large_area", detail, round(whole_mm2, 1), config.area_mm2_max)
        if not grey.size:
            return Refusal(position, "no_ridges", "mm2 of ridges", 0.0, config.area_mm2_min)
        return grey

    def _not_a_print(self, print_: Print, position: str) -> Refusal | None:
        """The refusal of a picture with no ridges, too few ridges, or several fingers; otherwise None."""
        config, measures = self._config, print_.measures
        certainty, area_mm2 = round(measures.certainty, 3), round(measures.area_mm2, 1)
        if (steps := tracing()) is not None:
            steps.add("quality", position, checks=_checks(config, certainty=certainty, area_mm2=area_mm2))
        if certainty < config.certainty_min or not area_mm2:
            return Refusal(position, *_REFUSALS["certainty"], certainty, config.certainty_min)
        if area_mm2 < config.area_mm2_min:
            return Refusal(position, *_REFUSALS["area_mm2"], area_mm2, config.area_mm2_min)
        if measures.fingers > 1:
            return Refusal(
                position, "several_fingers", "regions of ridges; send one finger a picture", measures.fingers, 1
            )
        return None

    def _too_poor(self, print_: Print, record: MinutiaeRecord, nfiq2: float | None, position: str) -> Refusal | None:
        """The refusal of a print of too low quality, or None."""
        measured: dict[str, float] = {"minutiae": record.count, "quality": print_.measures.quality}
        if nfiq2 is not None:
            measured["nfiq2"] = nfiq2
        checks = _checks(self._config, **measured)
        if (steps := tracing()) is not None:
            steps.add("quality", position, checks=checks)
        missed = [check for check in checks if check[-1]]
        return Refusal(position, *missed[0][:4]) if missed else None

    def take(self, content: bytes, position: str) -> Template | Refusal:
        """The template of a minutiae record, or a refusal. position: `unknown` stands for the position in the record."""
        try:
            view = view_of(content, position)
        except InvalidInput as error:
            return Refusal(position, "unsound_record", str(error))
        if view.record.count < self._config.minutiae_min:
            return Refusal(position, "few_minutiae", "minutiae", view.record.count, self._config.minutiae_min)
        model_id, corrected = self._config.record_model_id, view.record.provenance
        quality = quality_scale.from_stored(view.position, view.quality)
        return Template(view.position, model_id, None, standard(view), quality, corrected)


_REFUSALS = {
    "certainty": ("no_ridges", "certainty that the picture shows friction ridges"),
    "area_mm2": ("too_small_area", "mm2 of ridges"),
    "minutiae": ("few_minutiae", "minutiae"),
    "quality": ("low_quality", quality_scale.MEANING),
    "nfiq2": ("low_quality", "NFIQ 2"),
}


def _contradicted(found: Judged, position: str, dpi: float, said: str) -> Refusal:
    """The refusal of a resolution that the ridges contradict. measured, limit: mm between ridges at it, and at the one that fits, or of a
    typical finger. said: whether the resolution is stated or assumed."""
    detail, limit = f"mm between ridges at {said} {dpi:.0f} dpi", RIDGE_MM
    better = found.better or (None if found.impossible else float(DPI))
    if better is not None:
        detail, limit = f"{detail}; {better:g} dpi fits", round(found.mm(better), 3)
    else:
        detail += "; state the scanner's dpi"
    return Refusal(position, "resolution", detail, round(found.mm(dpi), 3), limit)


def _checks(config: FingerConfig, **measured: float) -> tuple[tuple[str, str, float, float, bool], ...]:
    """(reason, detail, measured, limit, missed) of each measured value."""
    limits = {name: float(getattr(config, f"{name}_min")) for name in measured}
    return tuple((*_REFUSALS[name], value, limits[name], value < limits[name]) for name, value in measured.items())


@checked
def read_minutiae(content: bytes, model_id: str = EXTERNAL_MINUTIAE) -> dict[str, Template]:
    """Position -> template, from a minutiae record of one or several fingers. Of several views of a finger the best view is taken.

    model_id: the extractor of the minutiae; the default stands for an unknown extractor. Raises InvalidInput for an invalid record.
    """
    return {
        position: Template(
            position,
            model_id,
            None,
            standard(view),
            quality_scale.from_stored(position, view.quality),
            view.record.provenance,
        )
        for position, view in best_views(content).items()
    }


def write_minutiae(templates: Iterable[Template], *, version: int = 2005) -> bytes:
    """A record of ISO/IEC 19794-2 with a view for each template. version: 2005 or 2011. Raises InvalidInput."""
    if isinstance(templates, (Mapping, Template, str, bytes)) or not hasattr(templates, "__iter__"):
        raise InvalidInput(
            f"write_minutiae takes a sequence of templates, got {type(templates).__name__}; write templates.values(), or [template]"
        )
    given = []
    for template in templates:
        if not isinstance(template, Template):
            raise InvalidInput(
                f"a minutiae record is made of Template, got {type(template).__name__}; leave out the refusals"
            )
        given.append((template.column, template.minutiae))
    if not given or not all(record for _, record in given):
        raise InvalidInput("a minutiae record is made of templates that have minutiae; pass at least one")
    return write_views([view_of(record, column) for column, record in given if record], version=version)


def ridge_blocks(grey: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether each 16-pixel block shows ridges, bool (h // 16, w // 16): it has contrast and a common direction.

    The measure is the coherence of the squared gradient: Bazen and Gerez, "Systematic methods for the computation of the directional fields
    and singular points of fingerprints", 2002.
    """
    rows, columns = grey.shape[0] // _BLOCK_PX, grey.shape[1] // _BLOCK_PX
    if not rows or not columns:
        return np.zeros((rows, columns), bool)
    image: Float32 = cv2.GaussianBlur(  # type: ignore[assignment]  # cv2's stubs know no float32
        grey[: rows * _BLOCK_PX, : columns * _BLOCK_PX].astype(np.float32), (0, 0), 1.0
    )
    gx = np.asarray(cv2.Sobel(image, cv2.CV_32F, 1, 0), np.float32)
    gy = np.asarray(cv2.Sobel(image, cv2.CV_32F, 0, 1), np.float32)

    def per_block(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(cv2.resize(values, (columns, rows), interpolation=cv2.INTER_AREA), np.float32)

    xx, yy, xy = per_block(gx * gx), per_block(gy * gy), per_block(gx * gy)
    xx, yy, xy = (np.asarray(cv2.blur(values, (3, 3)), np.float32) for values in (xx, yy, xy))
    coherence = np.sqrt((xx - yy) ** 2 + 4 * xy**2) / np.maximum(xx + yy, 1e-6)
    deviation = np.sqrt(np.maximum(per_block(image * image) - np.square(per_block(image)), 0))
    return np.asarray((deviation >= _CONTRAST_MIN) & (coherence >= _COHERENCE_MIN), np.bool_)


def around_ridges(grey: NDArray[np.uint8], ridges: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The picture and its blocks, cropped to the ridges with a margin of two blocks."""
    bounds = []
    for axis in (1, 0):
        at = np.flatnonzero(ridges.any(axis=axis))
        bounds.append(slice(max(at[0] - 2, 0), at[-1] + 3) if at.size else slice(0, 0))
    rows, columns = (slice(_BLOCK_PX * b.start, _BLOCK_PX * b.stop) for b in bounds)
    return np.ascontiguousarray(grey[rows, columns]), ridges[bounds[0], bounds[1]]
