"""The columns of a gallery: the face, and the finger positions.

Owns their names, their order, and the bit of each in a mask of columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from biodedup.errors import InvalidInput

FINGER_POSITIONS = (
    "right_thumb",
    "right_index",
    "right_middle",
    "right_ring",
    "right_little",
    "left_thumb",
    "left_index",
    "left_middle",
    "left_ring",
    "left_little",
    "unknown",
)
"""Ten positions, in the order of the codes 1 to 10 of ISO/IEC 19794-2, and `unknown`."""

COLUMNS = ("face", *FINGER_POSITIONS)
"""The gallery's columns. A row (an encounter) has at most one template in each."""

BIT = {column: 1 << index for index, column in enumerate(COLUMNS)}
"""Column -> its bit in a mask of columns."""


def check_position(position: str, allowed: Sequence[str]) -> None:
    """Raises InvalidInput unless the position is in `allowed`."""
    if position not in allowed:
        raise InvalidInput(f"position {position!r} is not known; use one of {', '.join(allowed)}")
