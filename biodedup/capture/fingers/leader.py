"""Extracts minutiae with LEADER, a neural network that is more accurate than MINDTCT, and slower.

Owns the session of ONNX Runtime, the network's input, and the decoding of its output maps. Never judges quality.
`models/prepare_leader.py` names the source of the network.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.fingers.nbis_parts import MINUTIAE_MAX
from biodedup.capture.minutiae.record import MinutiaeRecord
from biodedup.values import Float32

if TYPE_CHECKING:
    import onnxruntime

CONFIDENCE_MIN = 0.2
"""Minimum confidence of a minutia. It is low because small prints need every minutia. Equal error rates of BOZORTH3 at 0.2, 0.3, 0.4 and
0.6 (the authors' choice): 2.7, 4.9, 4.9, 5.1 % on FVC2002 DB1_B; 0.9, 2.0, 1.8, 0.4 % on DB2_B; 6.7, 6.7, 7.3, 30 % on DB3_B; 0.9, 2.0, 2.4,
15.5 % on DB4_B (2026-11)."""

_SIDE_MULTIPLE = 32
_NEIGHBOURHOOD = np.ones((7, 7), np.uint8)


Weights: TypeAlias = Path | Callable[[], bytes]
"""The file of the weights, or a function that returns their content."""


class Leader:
    """The network. It is loaded at the first image. Thread-safe. A call runs on a single thread, because captures run in parallel."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._lock = threading.Lock()
        self._session: onnxruntime.InferenceSession | None = None

    def __call__(self, grey: NDArray[np.uint8]) -> MinutiaeRecord:
        """Minutiae of a 500 dpi image, uint8 (h, w)."""
        return record_of(self.maps(grey))

    def maps(self, grey: NDArray[np.uint8]) -> Float32:
        """The network's output, float32 (4, h, w): confidence in a minutia at each pixel, cosine and sine of its direction (not normalised),
        probability of an ending rather than a bifurcation."""
        height, width = grey.shape
        top, left = (-height % _SIDE_MULTIPLE) // 2, (-width % _SIDE_MULTIPLE) // 2
        bottom, right = -height % _SIDE_MULTIPLE - top, -width % _SIDE_MULTIPLE - left
        padded = cv2.copyMakeBorder(grey, top, bottom, left, right, cv2.BORDER_CONSTANT, value=int(grey[0, 0]))
        (out,) = self._loaded().run(None, {"image": np.asarray(padded, np.float32)[None, None]})
        return np.asarray(out[0, :, top : top + height, left : left + width], np.float32)

    def _loaded(self) -> onnxruntime.InferenceSession:
        with self._lock:
            if self._session is None:
                import onnxruntime  # imported here: its threads would keep a forked child from exiting

                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = options.inter_op_num_threads = 1
                options.log_severity_level = 3
                options.enable_cpu_mem_arena = False  # the arena would keep the memory of each image size
                weights = self._weights if isinstance(self._weights, Path) else self._weights()
                self._session = onnxruntime.InferenceSession(
                    weights, sess_options=options, providers=["CPUExecutionProvider"]
                )
            return self._session


def record_of(maps: Float32) -> MinutiaeRecord:
    """The minutiae at the maxima of the smoothed confidence, at most MINUTIAE_MAX. maps: the result of `Leader.maps`."""
    _, height, width = maps.shape
    smooth = cv2.GaussianBlur(maps[0], (5, 5), 0, borderType=cv2.BORDER_CONSTANT)
    highest = cv2.dilate(smooth, _NEIGHBOURHOOD)
    y, x = np.nonzero((smooth == highest) & (smooth >= CONFIDENCE_MIN))
    _, cosine, sine, ending = maps[:, y, x]
    words = np.empty((len(x), 3), ">u2")
    words[:, 0] = np.where(ending >= 0.5, 1, 2) << 14 | x
    words[:, 1] = y
    angle = np.round(np.arctan2(sine, cosine) * (256 / (2 * np.pi))).astype(int) & 255
    words[:, 2] = angle << 8 | np.clip(np.round(100 * smooth[y, x]), 1, 100).astype(int)
    return MinutiaeRecord(width, height, words.tobytes()).strongest(MINUTIAE_MAX)
