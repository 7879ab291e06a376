"""What a cell of a table means: ids, positions of fingers, resolution, groups, times.

Owns the words that are understood, one parser for the tables of all jobs. Never opens a file.

1. Ids are text, letter by letter as they are written: never a number, a truth value or "nothing" (`0012`, `1e5`, `NA`, `true`).
2. A cell that cannot be used raises `Unusable`, with a reason of `jobs/outcomes.py` and a detail that names the column; what it costs
   (a row, an encounter) is for the job to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from math import isfinite
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from biodedup.errors import InvalidInput
from biodedup.texts import ID_LENGTH_MAX, id_problem_kind, shown
from biodedup.values import (
    COLUMNS,
    FINGER_POSITIONS,
    Finger,
    Missing,
    Refusal,
    check_encounter_id,
    check_groups,
    check_id,
)

GROUP_COLUMNS = ("group", "groups")
KNOWN = (
    "subject_id", "encounter_id", "captured_at", "path", "image", "position", "dpi", "missing", *GROUP_COLUMNS, "district", "entry",
    *COLUMNS,
)  # fmt: skip
"""Columns that have a meaning in some job."""

UNREADABLE = "\ufffd"
"""What stands in a text where bytes were no UTF-8."""

_PATH_LENGTH_MAX = 4_096
_CODE = re.compile(r"(?:(?:finger|fgp)[\s_-]*)?0*([0-9]{1,2})(?:\.0+)?", re.IGNORECASE)
_DPI = re.compile(r"(\d+(?:[.,]\d*)?)\s*(?:dpi|ppi)?", re.IGNORECASE)


class Unusable(Exception):
    """Why a cell, and with it a row or an encounter, is refused before anything of it is read."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.refusal = Refusal("encounter", reason, detail)


def column_name(written: str) -> str:
    """A known column's own name, however it is capitalised and spaced (`Subject ID`, `right-index`); another one as it is written."""
    name = written.strip().removeprefix("\ufeff").strip()
    folded = re.sub(r"[\s_-]+", "_", name).lower()
    return folded if folded in KNOWN else name


def text_of(cell: Any, column: str) -> str | None:
    """The text of a cell, None where it is empty. Whole numbers of a typed table are text as well."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    if cell is None or cell == "":
        return None
    if not isinstance(cell, str):
        raise Unusable("wrong_type", f"{column} is of type {type(cell).__name__}, wanted text")
    if UNREADABLE in cell:
        raise Unusable("not_utf8", f"{column} is not UTF-8 text: {_quoted(cell)}")
    return cell


def id_of(cells: Mapping[str, Any], column: str) -> str | None:
    """A usable id, or None where there is none."""
    text = text_of(cells.get(column), column)
    if text is not None:
        try:
            check_encounter_id(text) if column == "encounter_id" else check_id(text, column)
        except InvalidInput as error:
            raise Unusable("unusable_id", str(error)) from None
    return text


def id_problems(cells: Any) -> NDArray[np.object_]:
    """object (n,): why each text of an Arrow array is no id, '' where it is one; of a null, that it is empty."""
    length = pc.utf8_length(cells)
    plain = pc.and_(
        pc.and_(pc.string_is_ascii(cells), pc.utf8_is_printable(cells)), pc.less_equal(length, ID_LENGTH_MAX)
    )
    trimmed = pc.and_(pc.equal(pc.ascii_trim_whitespace(cells), cells), pc.greater(length, 0))
    usable = pc.fill_null(pc.and_(plain, trimmed), False).to_numpy(zero_copy_only=False)
    problems = np.full(len(cells), "", object)
    for i in np.flatnonzero(~usable).tolist():
        problems[i] = id_problem_kind(cells[i].as_py() or "")
    return problems


def subject_of(cells: Mapping[str, Any]) -> str:
    """The subject_id of a row that has to have one."""
    subject_id = id_of(cells, "subject_id")
    if subject_id is None:
        raise Unusable("no_subject_id", "the cell is empty")
    return subject_id


def path_of(cell: Any, column: str = "path") -> str | None:
    """The path of a file, None where the cell is empty."""
    if isinstance(cell, int):
        raise Unusable("wrong_type", f"{column} is of type {type(cell).__name__}, wanted a path")
    path = text_of(cell, column)
    if path is not None and ("\0" in path or len(path) > _PATH_LENGTH_MAX):
        raise Unusable("wrong_type", f"{column} is no path of a file: {_quoted(path)}")
    return path


def position_of(cell: Any) -> str:
    """`face`, or the position of a finger: by its name (`right_index`, `Right Index`, `index finger, right`), or by its code of ISO/IEC
    19794-2 and of ANSI/NIST (FGP), 0 to 10, 11 and 12 for plain thumbs. An empty cell is a face."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # a typed column of numbers with gaps
    text = text_of(cell, "position")
    if text is None:
        return "face"
    code = _CODE.fullmatch(text.strip())
    position = _NAMES.get(_folded(text)) if code is None else _POSITION_OF_CODE.get(code[1])
    if position is None:
        raise Unusable(
            "unknown_position", f"position is {_quoted(text)}, wanted {', '.join(COLUMNS)}, or a code from 0 to 12"
        )
    return position


def dpi_of(cell: Any) -> float | None:
    """Dots per inch, as `500`, `500.0` or `500 dpi`; None where the cell is empty."""
    if isinstance(cell, str):
        cell = cell.strip()
    if cell is None or cell == "":
        return None
    try:
        if isinstance(cell, str):
            found = _DPI.fullmatch(cell)
            if found is None:
                raise ValueError("no number")
            cell = found[1].replace(",", ".")
        if isinstance(cell, bool):
            raise TypeError("a truth value")
        dpi = float(cell)
        Finger(b"", dpi=dpi)
    except (TypeError, ValueError):
        raise Unusable("wrong_type", f"dpi is {_quoted(cell)}, wanted a number from 72 to 4000") from None
    return dpi


def missing_of(position: str, cell: Any) -> Missing | None:
    """Why a capture cannot be had; None where the cell is empty."""
    reason = text_of(cell, "missing")
    try:
        return None if reason is None else Missing(position, reason)
    except InvalidInput as error:
        raise Unusable("wrong_type", f"missing: {error}") from None


def groups_of(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The groups that rows name in `group` and `groups`: `a;b`, `a|b`, or lists of texts."""
    named: set[str] = set()
    for cells in rows:
        for column in GROUP_COLUMNS:
            named.update(split_groups(cells.get(column), column))
    try:
        return check_groups(named)
    except InvalidInput as error:
        raise Unusable("unusable_id", str(error)) from None


def split_groups(cell: Any, column: str = "groups") -> list[str]:
    """The names in one cell, not checked."""
    if isinstance(cell, list):
        return [name for part in cell if (name := text_of(part, column)) is not None]
    text = text_of(cell, column)
    return [] if text is None else [part.strip() for part in text.replace("|", ";").split(";") if part.strip()]


def moment_of(cell: Any) -> float | None:
    """Seconds since 1970 of a time, a date, a number, or a text: ISO 8601, or seconds. UTC where no zone is said. None where it is nothing
    of the kind: a clock's word never keeps a record out."""
    try:
        if isinstance(cell, str):
            try:
                cell = float(cell)
            except ValueError:
                cell = datetime.fromisoformat(cell.strip())
        if isinstance(cell, date) and not isinstance(cell, datetime):
            cell = datetime(cell.year, cell.month, cell.day)
        if isinstance(cell, datetime):
            return (cell if cell.tzinfo else cell.replace(tzinfo=UTC)).timestamp()
        return float(cell) if isinstance(cell, (int, float)) and isfinite(cell) else None
    except (ValueError, OverflowError):
        return None


def _quoted(cell: Any) -> str:
    """A cell for an error text; never more than a glance of it."""
    if not isinstance(cell, (str, int, float)):
        return type(cell).__name__
    text = shown(cell)
    return repr(text if len(text) <= 40 else text[:40] + "...") if isinstance(cell, str) else text


def _folded(text: str) -> str:
    """The letters of a position's name, in the order hand, finger."""
    words = [word for word in re.split(r"[\s_,-]+", text.casefold()) if word not in ("", "finger", "hand")]
    joined = "".join(words).removesuffix("finger")
    for hand in ("right", "left"):
        if joined.endswith(hand):
            joined = hand + joined.removesuffix(hand).removesuffix("finger")
    return joined


_POSITION_OF_CODE = {
    **{str(code): position for code, position in enumerate(FINGER_POSITIONS[:10], start=1)},
    **{"0": "unknown", "11": "right_thumb", "12": "left_thumb"},
}
_NAMES = {
    **{position.replace("_", ""): position for position in COLUMNS},
    **{f"{hand}{name}": f"{hand}_little" for hand in ("right", "left") for name in ("pinky", "pinkie")},
    "portrait": "face",
}
