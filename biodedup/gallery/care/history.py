"""Reads the dates of the newest decisions, and warns if the clock is behind them.

Owns the reading of these dates. Never refuses: a decision is valid with any date.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from math import isfinite
from numbers import Real

from biodedup.errors import GalleryDamaged, InvalidInput
from biodedup.gallery.answers import inflated
from biodedup.gallery.snapshot import Snapshot

BACK_S = 1.0
"""A smaller step back is ignored: the clock is being synchronised."""
_LOOKED_AT = 65_536
_DATE = re.compile(rb'"decided_at":([0-9][0-9.e+]*)')
_log = logging.getLogger("biodedup.gallery")


def dates(snapshot: Snapshot, count: int = _LOOKED_AT) -> list[float]:
    """The dates of the newest `count` decisions, oldest first, in seconds since 1970."""
    found: list[list[float]] = []
    for part in reversed(snapshot.parts):
        answers = part.answers
        low = max(0, answers.count - count)
        if answers.count:
            texts = map(_text_or_empty, answers.texts(low, answers.count).to_pylist())
            found.append([float(date[1]) for text in texts if (date := _DATE.search(text)) is not None])
        count -= answers.count - low
        if count <= 0:
            break
    return [date for some in reversed(found) for date in some if date > 0]


def _text_or_empty(data: bytes) -> bytes:
    """The text of an answer; empty for a damaged one, which raises an error when it is read as an answer."""
    try:
        return inflated(data)
    except GalleryDamaged:
        return b""


def date_notes(snapshot: Snapshot, now: float) -> list[str]:
    """Notes on suspicious dates of the newest decisions. now: in seconds since 1970."""
    newest, back, count = 0.0, 0.0, 0
    found = dates(snapshot)
    for date in found:
        if newest - date > BACK_S:
            back, count = max(back, newest - date), count + 1
        newest = max(newest, date)
    notes = []
    if count:
        notes.append(
            f"{count:,} of the newest {len(found):,} decisions have an earlier date than a previous decision, by up to {back:,.0f} s: the "
            "clock was set back"
        )
    if newest - now > BACK_S:
        notes.append(
            f"the date of the newest decision is {newest - now:,.0f} s ahead of this machine's clock: set the clock"
        )
    return notes


def finite(clock: Callable[[], float]) -> Callable[[], float]:
    """The same clock, which raises InvalidInput for a time that is not a finite number: such a date would be stored for ever."""

    def checked_time() -> float:
        now = clock()
        if isinstance(now, bool) or not isinstance(now, Real) or not isfinite(now):
            raise InvalidInput(
                f"the clock returned {now!r}, wanted the time in seconds, a finite number; nothing was recorded; correct the clock"
            )
        return float(now)

    return checked_time


class NotedClock:
    """A clock that warns, in the log `biodedup.gallery`, if it is behind the newest decision. Thread-safe."""

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
                    "the clock is %.0f s behind the newest decision; new decisions get its time nevertheless: set the clock",
                    self._newest - now,
                )
            self._behind = behind
            self._newest = max(self._newest, now)
            return now
