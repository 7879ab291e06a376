"""Compares the minutiae of one probe with those of many candidates.

Owns the interface `MinutiaeMatcher`, its implementation, and its threads. Never extracts minutiae, and never parses their records
(`capture/minutiae/record.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numba
import numpy as np
from numpy.typing import NDArray

from biodedup.capture.minutiae.record import MINUTIA_BYTES, read_record
from biodedup.match.prints.alignment import best_pairs, compare, workspace
from biodedup.match.prints.local_structures import Prepared, empty_print, prepare

_CHUNK = 32
"""Candidates in a thread's unit of work: some milliseconds."""


class MinutiaeMatcher(Protocol):
    def compare_pairs(
        self, probes: Sequence[bytes], candidates: Sequence[bytes], which: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Scores float32 (n,) of candidates[i] with probes[which[i]]: at least 0, higher is more alike. which: int64 (n,), ascending.
        Raises InvalidInput for an invalid record."""


class CylinderMatcher:
    """Matches by Minutia Cylinder-Code (`local_structures.py`), alignment, and the share of paired minutiae (`alignment.py`).

    The score is symmetric, and the same on every machine and with any number of threads. Impostor pairs score 1 to 5; a print scores at
    most 80 with itself. Thread-safe.
    """

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "biodedup-minutiae")  # threads start with the first work

    def compare_pairs(
        self, probes: Sequence[bytes], candidates: Sequence[bytes], which: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        scores = np.zeros(len(candidates), np.float32)
        content, bodies = _bodies([*probes, *candidates])
        of_probes, of_candidates = bodies[which], bodies[len(probes) :]

        def work(start: int) -> None:
            part = slice(start, start + chunk)
            prints = empty_print(), empty_print()
            compare(content, of_probes[part], of_candidates[part], prints, workspace(), scores[part])

        in_caller = self._threads == 1 or len(candidates) <= _CHUNK
        chunk = max(len(candidates), 1) if in_caller else _CHUNK
        starts = range(0, len(candidates), chunk)
        for _ in map(work, starts) if in_caller else self._pool.map(work, starts):
            pass
        return scores

    def compare(self, probe: bytes, candidates: Sequence[bytes]) -> NDArray[np.float32]:
        """Scores float32 (n,) of one probe with candidates."""
        return self.compare_pairs([probe], candidates, np.zeros(len(candidates), np.int64))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


def matched(probe: bytes, candidate: bytes) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The minutiae that `CylinderMatcher` pairs in two records, for display: (pairs, motion).

    pairs: int64 (k, 2), the row of each minutia in the probe's record and in the candidate's. motion: float64 (4,), the rigid motion from the
    probe to the candidate: cosine, sine, shift; x' = x cosine + y sine + shift[0], y' = y cosine - x sine + shift[1]. Raises InvalidInput for
    an invalid record.
    """
    content, bodies = _bodies([probe, candidate])
    prints = empty_print(), empty_print()
    for print_, (start, count) in zip(prints, bodies.tolist(), strict=True):
        prepare(content, start, count, print_)
    pairs, motion = best_pairs(*prints)
    for side, print_ in enumerate(prints):
        pairs[:, side] = _rows(print_, content, *bodies[side])[pairs[:, side]]
    return pairs[np.argsort(pairs[:, 0], kind="stable")], motion


def _rows(print_: Prepared, content: NDArray[np.uint8], start: int, count: int) -> NDArray[np.int64]:
    """The row in the record's body of each minutia of the print. A print is sorted, and has only the strongest minutiae."""
    body = content[start : start + MINUTIA_BYTES * count].reshape(-1, MINUTIA_BYTES).astype(np.int64)
    x, y = (((body[:, at] & 63) << 8) | body[:, at + 1] for at in (0, 2))
    value = (y << 30) | (x << 16) | (body[:, 4] << 8) | body[:, 5]
    order, kept = np.argsort(value, kind="stable"), print_.row[: print_.size[0]]
    among_equals = np.arange(len(kept)) - np.searchsorted(kept, kept)
    return np.asarray(order[np.searchsorted(value[order], kept) + among_equals], np.int64)


def _bodies(records: Sequence[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The position of each record's minutiae: (content uint8; start and count of each record's body, int64 (n, 2)). Raises InvalidInput.

    Records in the usual form are found by `_find_plain`. `read_record`, which takes longer than a comparison, reads the others.
    """
    content = np.frombuffer(b"".join(records), np.uint8)
    ends = np.cumsum(np.fromiter(map(len, records), np.int64, len(records)))
    starts, counts = np.zeros((2, len(records)), np.int64)
    _find_plain(content, ends, starts, counts)
    others = np.flatnonzero(counts < 0).tolist()
    if len(others):
        bodies = [read_record(records[i]).body for i in others]
        lengths = np.array([len(body) for body in bodies], np.int64)
        starts[others] = len(content) + np.cumsum(lengths) - lengths
        counts[others] = lengths // MINUTIA_BYTES
        content = np.frombuffer(b"".join([*records, *bodies]), np.uint8)
    return content, np.stack([starts, counts], axis=1)


_PLAIN = np.frombuffer(b"FMR\0 20\0", np.uint8)
_HEADER, _END = 28, 2


@numba.njit(nogil=True, cache=True)
def _find_plain(content: Any, ends: Any, starts: Any, counts: Any) -> None:
    """Finds the bodies of records of a single view at 500 dpi, without extended data, with all minutiae inside the image. The count of any
    other record is -1."""
    start = 0
    for i in range(ends.shape[0]):
        starts[i], counts[i] = start + _HEADER, _plain_count(content, start, ends[i])
        start = ends[i]


@numba.njit(nogil=True, cache=True)
def _plain_count(content: Any, start: int, end: int) -> int:
    if end - start < _HEADER + _END:
        return -1
    for i in range(8):
        if content[start + i] != _PLAIN[i]:
            return -1
    count = int(np.int64(content[start + 27]))
    length = _HEADER + 6 * count + _END
    if end - start != length or _word(content, start + 8) != 0 or _word(content, start + 10) != length:
        return -1
    width, height = _word(content, start + 14), _word(content, start + 16)
    if _word(content, start + 18) != 197 or _word(content, start + 20) != 197 or content[start + 22] != 1:
        return -1
    if _word(content, end - 2) != 0 or width == 0 or height == 0:
        return -1
    for i in range(count):
        at = start + _HEADER + 6 * i
        if _word(content, at) & 0x3FFF >= width or _word(content, at + 2) & 0x3FFF >= height:
            return -1
    return count


@numba.njit(nogil=True, cache=True)
def _word(content: Any, at: int) -> int:
    return int((np.int64(content[at]) << 8) | np.int64(content[at + 1]))
