"""Reads when the newest decisions were made, and warns when the clock goes backwards.

Owns the reading of these dates. Never decides: a decision stands whatever its date.
"""

from __future__ import annotations

import logging
import re
import threading
import zlib
from collections.abc import Callable
from math import isfinite
from numbers import Real

from biodedup.errors import InvalidInput
from biodedup.gallery.snapshot import Snapshot

BACK_S = 1.0
"""A clock that is set by less than this is kept in step, not set back."""
_LOOKED_AT = 65_536
_DATE = re.compile(rb'"decided_at":([0-9][0-9.e+]*)')
_ANSWER_BYTES_MAX = 1 << 26
_log = logging.getLogger("biodedup.gallery")


def dates(snapshot: Snapshot, count: int = _LOOKED_AT) -> list[float]:
    """The dates of the newest decisions, oldest first, in seconds."""
    found: list[list[float]] = []
    for part in reversed(snapshot.parts):
        answers = part.answers
        low = max(0, answers.count - count)
        if answers.count:
            texts = map(_inflated, answers.texts(low, answers.count).to_pylist())
            found.append([float(date[1]) for text in texts if (date := _DATE.search(text)) is not None])
        count -= answers.count - low
        if count <= 0:
            break
    return [date for some in reversed(found) for date in some if date > 0]


def _inflated(data: bytes) -> bytes:
    """The text of an answer; empty for a damaged one, which raises where it is read as an answer."""
    try:
        return zlib.decompressobj().decompress(data, _ANSWER_BYTES_MAX)
    except zlib.error:
        return b""


def date_notes(snapshot: Snapshot, now: float) -> list[str]:
    """What is odd about the dates of the newest decisions, in words."""
    newest, back, count = 0.0, 0.0, 0
    found = dates(snapshot)
    for date in found:
        if newest - date > BACK_S:
            back, count = max(back, newest - date), count + 1
        newest = max(newest, date)
    notes = []
    if count:
        notes.append(
            f"{count:,} of the newest {len(found):,} decisions are dated before one that was made earlier, by up to {back:,.0f} s: the "
            "clock was set back"
        )
    if newest - now > BACK_S:
        notes.append(f"the newest decision is dated {newest - now:,.0f} s after this machine's clock: set the clock")
    return notes


def finite(clock: Callable[[], float]) -> Callable[[], float]:
    """The clock, which raises InvalidInput in place of a time that is no finite number: such a date would be stored for ever."""

    def told() -> float:
        now = clock()
        if isinstance(now, bool) or not isinstance(now, Real) or not isfinite(now):
            raise InvalidInput(
                f"the clock gives {now!r}; wanted the time in seconds, a finite number. Nothing was recorded"
            )
        return float(now)

    return told


class NotedClock:
    """A clock that warns, in the log `biodedup.gallery`, when it tells a time before the newest decision's. Thread-safe."""

    def __init__(self, clock: Callable[[], float], snapshot: Callable[[], Snapshot]) -> None:
        self._clock = clock
        self._snapshot = snapshot
        self._newest: float | None = None
        self._behind = False
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            if self._newest is None:
                self._newest = max(dates(self._snapshot(), 256), default=0.0)
            now = self._clock()
            behind = self._newest - now > BACK_S
            if behind and not self._behind:
                _log.warning(
                    "the clock is %.0f s behind the newest decision; decisions are dated by it all the same: set the clock",
                    self._newest - now,
                )
            self._behind = behind
            self._newest = max(self._newest, now)
            return now
