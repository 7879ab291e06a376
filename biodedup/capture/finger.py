"""Turns finger captures into samples: resamples to 500 dpi, finds ridges, checks quality, extracts minutiae.

Owns resampling, the quality gate for fingers, the interface of minutiae extractors, and the import of ready-made records. Never decodes
files and never compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.arguments import checked
from biodedup.capture.formats import Pixels
from biodedup.capture.leader import Leader
from biodedup.capture.minutiae_record import (
    MinutiaeRecord,
    best_views,
    position_code,
    standard,
    view_of,
    write_record,
    write_views,
)
from biodedup.capture.nbis_parts import extract
from biodedup.config import EXTERNAL_MINUTIAE, FingerConfig
from biodedup.errors import InvalidInput
from biodedup.trace import tracing
from biodedup.values import Float32, Refusal, Template

DPI = 500
MM_PER_PIXEL = 25.4 / DPI
SCANNER_DPI_MIN = 250.0
"""A file that states less does not state its scanner's resolution: image editors write 72 and 96."""

_BLOCK_PX = 16
_CONTRAST_MIN = 12.0  # standard deviation of grey levels within a block
_COHERENCE_MIN = 0.4  # of the gradient's direction within 3 x 3 blocks; FVC2002 and UareU, 2026-11

MinutiaeExtractor = Callable[[NDArray[np.uint8]], tuple[MinutiaeRecord, float]]
"""uint8 (h, w) at 500 dpi -> minutiae and NFIQ 2 score. Raises ValueError if it finds no ridges."""


def minutiae_extractor(name: str, weights: Path | None) -> MinutiaeExtractor:
    """The extractor of this name. weights: the path of its weights, if it has any."""
    if name == "leader" and weights is not None:
        return Leader(weights)
    if name == "mindtct":
        return extract
    raise InvalidInput(f"minutiae extractor {name!r} is not known; use mindtct, or leader with its weights")


@dataclass(frozen=True, eq=False)
class FingerSample:
    """An accepted capture. grey: uint8 (h, w) at 500 dpi; minutiae: a record of ISO/IEC 19794-2:2005; quality: NFIQ 2.
    provenance: what was corrected of the file's metadata."""

    position: str
    grey: NDArray[np.uint8] = field(repr=False)
    minutiae: bytes = field(repr=False)
    quality: float
    provenance: tuple[str, ...] = ()


class FingerReader:
    """Reads finger samples. Thread-safe."""

    def __init__(self, config: FingerConfig, weights: Path | None = None) -> None:
        self._config = config
        self._extract = minutiae_extractor(config.minutiae, weights)

    def read(self, pixels: Pixels, position: str, dpi: float | None) -> FingerSample | Refusal:
        """The sample, or a refusal. dpi: stated by the caller; None takes the file's, or 500."""
        config = self._config
        grey, scan_dpi = pixels.grey, dpi or scanner_dpi(pixels.dpi)
        # checked before resampling: 7,000 pixels at a stated 72 dpi would fill 2 GB
        side_px = round(max(grey.shape) * DPI / scan_dpi)
        if side_px > config.side_px_max:
            return Refusal(
                position, "too_large", "pixels at 500 dpi; is the stated dpi right?", side_px, config.side_px_max
            )
        grey = resampled(grey, scan_dpi)
        ridges = ridge_blocks(grey)
        if grey.size * MM_PER_PIXEL**2 > config.area_mm2_max:  # larger than one finger: crop to the ridges
            grey, ridges = around_ridges(grey, ridges)
            whole_mm2 = grey.size * MM_PER_PIXEL**2
            if whole_mm2 > config.area_mm2_max:
                detail = "mm2 around the ridges; is the stated dpi right, and is it one finger?"
                return Refusal(position, "too_large_area", detail, round(whole_mm2, 1), config.area_mm2_max)
        if (steps := tracing()) is not None:
            steps.add("ridges", position, image=grey, blocks=ridges)
        area_mm2 = float(np.count_nonzero(ridges)) * (_BLOCK_PX * MM_PER_PIXEL) ** 2
        if area_mm2 == 0:
            return Refusal(position, "no_ridges", "mm2 of ridges", 0.0, config.area_mm2_min)
        if area_mm2 < config.area_mm2_min:
            return Refusal(position, "too_small_area", "mm2 of ridges", round(area_mm2, 1), config.area_mm2_min)
        share = ridge_period_share(grey, ridges)
        if steps is not None:
            steps.add("quality", position, checks=_checks(config, area_mm2=area_mm2, ridge_share=share))
        if share < config.ridge_share_min:
            return Refusal(
                position, "no_ridges", "share of energy at ridge periods", round(share, 3), config.ridge_share_min
            )
        try:
            record, nfiq2 = self._extract(grey)
        except ValueError:
            return Refusal(position, "no_ridges", "the minutiae extractor found nothing to work on")
        if steps is not None:
            steps.add("quality", position, checks=_checks(config, minutiae=record.count, nfiq2=nfiq2))
        if record.count < config.minutiae_min:
            return Refusal(position, "few_minutiae", "minutiae", record.count, config.minutiae_min)
        if nfiq2 < config.nfiq2_min:
            return Refusal(position, "low_quality", "NFIQ 2", nfiq2, config.nfiq2_min)
        minutiae = write_record(record, position_code(position), int(min(max(nfiq2, 0), 100)))
        return FingerSample(position, grey, minutiae, nfiq2)

    def take(self, content: bytes, position: str) -> Template | Refusal:
        """The template of a minutiae record, or a refusal. position: `unknown` takes the record's."""
        try:
            view = view_of(content, position)
        except InvalidInput as error:
            return Refusal(position, "unsound_record", str(error))
        if view.record.count < self._config.minutiae_min:
            return Refusal(position, "few_minutiae", "minutiae", view.record.count, self._config.minutiae_min)
        model_id, corrected = self._config.record_model_id, view.record.provenance
        return Template(view.position, model_id, None, standard(view), view.quality, corrected)


def _checks(config: FingerConfig, **measured: float) -> tuple[tuple[str, str, float, float, bool], ...]:
    """(reason, detail, measured, limit, missed) of each figure, for a trace."""
    told = {
        "area_mm2": ("too_small_area", "mm2 of ridges"),
        "ridge_share": ("no_ridges", "share of energy at ridge periods"),
        "minutiae": ("few_minutiae", "minutiae"),
        "nfiq2": ("low_quality", "NFIQ 2"),
    }
    limits = {name: float(getattr(config, f"{name}_min")) for name in measured}
    return tuple((*told[name], value, limits[name], value < limits[name]) for name, value in measured.items())


@checked
def read_minutiae(content: bytes, model_id: str = EXTERNAL_MINUTIAE) -> dict[str, Template]:
    """position -> template, from a minutiae record of one or several fingers; of several views of a finger the best is taken.

    model_id: the extractor of the minutiae; by default an unknown one. Raises InvalidInput for an unsound record.
    """
    return {
        position: Template(position, model_id, None, standard(view), view.quality, view.record.provenance)
        for position, view in best_views(content).items()
    }


def write_minutiae(templates: Iterable[Template], *, version: int = 2005) -> bytes:
    """One record of ISO/IEC 19794-2 with one view for each template. version: 2005 or 2011. Raises InvalidInput."""
    if isinstance(templates, (Mapping, Template, str, bytes)) or not hasattr(templates, "__iter__"):
        raise InvalidInput(
            f"write_minutiae takes a sequence of templates, got {type(templates).__name__}; write templates.values(), or [template]"
        )
    given = []
    for template in templates:
        if not isinstance(template, Template):
            raise InvalidInput(
                f"a minutiae record is made of Template, got {type(template).__name__}; leave out what was refused"
            )
        given.append((template.column, template.minutiae))
    if not given or not all(record for _, record in given):
        raise InvalidInput("a minutiae record is made of templates that have minutiae; pass one or more of these")
    return write_views([view_of(record, column) for column, record in given if record], version=version)


def scanner_dpi(stated: float | None) -> float:
    """The file's resolution if it is plausible for a scanner, else 500."""
    return stated if stated is not None and stated >= SCANNER_DPI_MIN else float(DPI)


def resampled(grey: NDArray[np.uint8], dpi: float, wanted_dpi: float = DPI) -> NDArray[np.uint8]:
    """The image at another resolution. uint8 (h, w) in and out; within 1 % it stays as it is."""
    factor = wanted_dpi / dpi
    if abs(factor - 1) < 0.01:
        return grey
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(grey, None, fx=factor, fy=factor, interpolation=interpolation), np.uint8)


def ridge_blocks(grey: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which 16-pixel blocks show ridges, that is, contrast and one direction. bool (h // 16, w // 16).

    Coherence of the squared gradient: Bazen and Gerez, "Systematic methods for the computation of the directional fields
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


def ridge_period_share(grey: NDArray[np.uint8], ridges: NDArray[np.bool_]) -> float:
    """Share of the ridge blocks' spectral energy that lies at periods of 5 to 15 pixels, as ridges at 500 dpi have.

    Measured in windows of 32 pixels around the blocks, against periods from 32 down to 2 pixels; 0..1.
    """
    half = _BLOCK_PX // 2
    padded = cv2.copyMakeBorder(grey, half, half + _BLOCK_PX, half, half + _BLOCK_PX, cv2.BORDER_REFLECT)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32))[::_BLOCK_PX, ::_BLOCK_PX]
    chosen = windows[: ridges.shape[0], : ridges.shape[1]][ridges].astype(np.float32)
    if not len(chosen):
        return 0.0
    hann = np.hanning(32).astype(np.float32)
    chosen = (chosen - chosen.mean(axis=(1, 2), keepdims=True)) * hann[:, None] * hann
    energy = np.abs(np.fft.rfft2(chosen)) ** 2
    frequency = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.rfftfreq(32)[None])
    inside = (frequency >= 1 / 15) & (frequency <= 1 / 5)
    return float(np.median(energy[:, inside].sum(axis=1) / np.maximum(energy.sum(axis=(1, 2)), 1e-9)))
