"""Parses the cells of input tables: ids, finger positions, resolutions, times, groups, paths and column names.

Owns the meaning of a cell, so that a row means the same in all jobs. Never opens a file.

1. Ids are text and keep every letter: `0012`, `1e5`, `NA` and `true` are ids. An id with spaces around it is refused. In a typed table, a whole
   number is the id with its digits. An id is refused if a spreadsheet rounded it (`3.17E+15`), gave it decimals (`31712345.0`; but `1.0` is
   an id) or replaced it by an error (`#N/A`).
2. A cell that cannot be used raises `Unusable` with a reason of `enrolment/outcomes.py` and a detail that names the column. The job refuses
   the row, or the encounter.
3. `engine.arrow.ids.ids_of` parses a whole Arrow column by the same rules as `id_of` parses a cell.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from biodedup.engine.arrow.ids import SPOILT, UNREADABLE
from biodedup.errors import InvalidInput
from biodedup.texts import shown
from biodedup.values import (
    COLUMNS,
    FINGER_POSITIONS,
    CaptureData,
    Face,
    Finger,
    Missing,
    Refusal,
    check_encounter_id,
    check_groups,
    check_id,
)

GROUP_COLUMNS = ("group", "groups")
ID_COLUMNS = ("subject_id", "encounter_id")
KNOWN = (
    "subject_id", "encounter_id", "captured_at", "path", "image", "position", "dpi", "missing", *GROUP_COLUMNS, "district", "entry",
    *COLUMNS,
)  # fmt: skip
"""All columns that at least one job reads."""

_PATH_LENGTH_MAX = 4_096
_CODE = re.compile(r"(?:(?:finger|fgp)[\s_-]*)?0*([0-9]{1,2})(?:\.0+)?", re.IGNORECASE)
_DPI = re.compile(r"(\d+(?:[.,]\d*)?)\s*(?:dpi|ppi)?", re.IGNORECASE)


class Unusable(Exception):
    """A cell cannot be used. refusal: the refusal of its row or encounter."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.refusal = Refusal("encounter", reason, detail)


@dataclass(frozen=True)
class CaptureCell:
    """The capture of a row. source: a path, or the content of an image or a minutiae record; position: `face` or a finger position."""

    position: str
    source: str | bytes
    dpi: float | None

    def capture(self, data: CaptureData) -> Face | Finger:
        """The capture as a value. data: the content of the source, or its path."""
        return Face(data) if self.position == "face" else Finger(data, self.position, self.dpi)


# rows ---------------------------------------------------------------------------------------------------------------


def check_fields(cells: Mapping[str, Any]) -> None:
    """Raises Unusable for a row without cells: readers return one for a line whose fields do not fit the header."""
    if not cells:
        raise Unusable("malformed_row", "the line and the header have different numbers of fields")


def subject_of(cells: Mapping[str, Any]) -> str:
    """The subject_id of a row that must have one. Raises Unusable."""
    subject_id = id_of(cells, "subject_id")
    if subject_id is None:
        raise Unusable("no_subject_id", "subject_id is empty")
    return subject_id


def capture_of(cells: Mapping[str, Any], *, images: bool = False) -> CaptureCell | Missing | None:
    """The capture of a row, from its columns path, position and dpi. If the row has no path but a reason in `missing`, returns that; if it has
    neither, None. images: the column image may hold the content of the capture. Raises Unusable."""
    position, path, dpi = position_of(cells.get("position")), path_of(cells.get("path")), dpi_of(cells.get("dpi"))
    missing = missing_of(position, cells.get("missing"))
    image = (cells.get("image") or None) if images else None
    if image is not None and not isinstance(image, bytes):
        raise Unusable("wrong_type", f"image is of type {type(image).__name__}, wanted bytes")
    source = image or path
    if source and missing:
        raise Unusable(
            "invalid_input",
            f"the row has both {'a path' if path else 'an image'} and a reason why {position} is missing; leave one of them empty",
        )
    return CaptureCell(position, source, dpi) if source else missing


def column_name(written: str, known: Collection[str] = KNOWN) -> str:
    """The library's name of a known column, whatever its capitals and separators (`Subject ID`, `right-index`). Another name is only stripped
    of spaces around it."""
    name = written.strip().removeprefix("\ufeff").strip()
    folded = re.sub(r"[\s_-]+", "_", name).lower()
    return folded if folded in known else name


# cells --------------------------------------------------------------------------------------------------------------


def text_of(cell: Any, column: str) -> str | None:
    """The text of a cell; None if it is empty. A whole number of a typed table becomes text."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    if cell is None or cell == "":
        return None
    if not isinstance(cell, str):
        raise Unusable("wrong_type", f"{column} is of type {type(cell).__name__}, wanted text")
    if UNREADABLE in cell:
        raise Unusable(
            "not_utf8",
            f"{column} is not UTF-8 text: {_quoted(cell)}; if the file has another encoding, name it with --encoding",
        )
    return cell


def id_of(cells: Mapping[str, Any], column: str) -> str | None:
    """The id in a cell; None if the cell is empty. Raises Unusable."""
    text = text_of(cells.get(column), column)
    if text is not None:
        for pattern, problem in SPOILT.items():
            if re.fullmatch(pattern, text):
                raise Unusable("unusable_id", f"{column} {problem}")
        try:
            check_encounter_id(text) if column == "encounter_id" else check_id(text, column)
        except InvalidInput as error:
            raise Unusable("unusable_id", str(error)) from None
    return text


def path_of(cell: Any, column: str = "path") -> str | None:
    """The path in a cell; None if the cell is empty. Raises Unusable."""
    if isinstance(cell, int):
        raise Unusable("wrong_type", f"{column} is of type {type(cell).__name__}, wanted a path")
    path = text_of(cell, column)
    if path is not None and ("\0" in path or len(path) > _PATH_LENGTH_MAX):
        raise Unusable("wrong_type", f"{column} is not a file path: {_quoted(path)}")
    return path


def located(folder: Path, written: str) -> Path:
    """The file of a path that is relative to the folder of its table. If no such file exists, the path is tried with the separators of Windows
    (`faces\\a.jpg`), and with accented letters in the Unicode forms NFC and NFD (macOS)."""
    plain = folder / written
    if written.isascii() and "\\" not in written:
        return plain
    slashed = written.replace("\\", "/")
    forms = (written, slashed, unicodedata.normalize("NFC", slashed), unicodedata.normalize("NFD", slashed))
    return next((folder / form for form in forms if os.path.lexists(folder / form)), plain)


def position_of(cell: Any) -> str:
    """The position of a capture: `face`, or a finger by its name (`right_index`, `Right Index`, `index finger, right`) or by its code of
    ISO/IEC 19794-2 and ANSI/NIST (FGP): 0 to 10, and 11 and 12 for plain thumbs. An empty cell means a face. Raises Unusable."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # pandas writes a column of whole numbers as floats if cells are empty
    text = text_of(cell, "position")
    if text is None:
        return "face"
    code = _CODE.fullmatch(text.strip())
    position = _NAMES.get(_folded(text)) if code is None else _POSITION_OF_CODE.get(code[1])
    if position is None:
        raise Unusable(
            "unknown_position",
            f"position is {_quoted(text)}, wanted {', '.join(COLUMNS)}, or a finger code from 0 to 12",
        )
    return position


def dpi_of(cell: Any) -> float | None:
    """The resolution in dots per inch, written as `500`, `500.0` or `500 dpi`; None if the cell is empty. Raises Unusable."""
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
    """The stated reason why a position has no capture; None if the cell is empty. Raises Unusable."""
    reason = text_of(cell, "missing")
    try:
        return None if reason is None else Missing(position, reason)
    except InvalidInput as error:
        raise Unusable("wrong_type", f"missing: {error}") from None


def groups_of(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The groups in the columns `group` and `groups` of some rows: `a;b`, `a|b`, or lists of texts. Raises Unusable."""
    named: set[str] = set()
    for cells in rows:
        for column in GROUP_COLUMNS:
            named.update(split_groups(cells.get(column), column))
    try:
        return check_groups(named)
    except InvalidInput as error:
        raise Unusable("unusable_id", str(error)) from None


def split_groups(cell: Any, column: str = "groups") -> list[str]:
    """The names of groups in one cell, not validated."""
    if isinstance(cell, list):
        return [name for part in cell if (name := text_of(part, column)) is not None]
    text = text_of(cell, column)
    return [] if text is None else [part.strip() for part in text.replace("|", ";").split(";") if part.strip()]


def moment_of(cell: Any, date_format: str | None = None) -> float | None:
    """The time in a cell, in seconds since 1970. Texts are ISO 8601 or seconds; times without a zone are UTC.

    None if the cell is not a time: a wrong clock never makes a record unusable. A number from 20,000 to 80,000 is not a time, since it is the
    day number of a spreadsheet (1954 to 2119). date_format: the declared format of texts; a text in another format raises Unusable.
    """
    if isinstance(cell, str) and date_format is not None and cell.strip():
        try:
            cell = datetime.strptime(cell.strip(), date_format)
        except ValueError:
            raise Unusable("wrong_type", f"captured_at is {_quoted(cell)}, wanted the format {date_format}") from None
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
        is_time = isinstance(cell, (int, float)) and isfinite(cell) and not 20_000 <= cell <= 80_000
        return float(cell) if is_time else None
    except (ValueError, OverflowError):
        return None


def _quoted(cell: Any) -> str:
    """The first 40 characters of a cell, for an error message."""
    if not isinstance(cell, (str, int, float)):
        return type(cell).__name__
    text = shown(cell)
    return repr(text if len(text) <= 40 else text[:40] + "...") if isinstance(cell, str) else text


def _folded(text: str) -> str:
    """A position's name in lower-case letters: the hand first, then the finger."""
    words = [word for word in re.split(r"[\s_.,-]+", text.casefold()) if word not in _WORDS_WITHOUT_MEANING]
    joined = "".join(_INDONESIAN.get(word, word) for word in words).removesuffix("finger")
    for hand in ("right", "left"):
        if joined.endswith(hand):
            joined = hand + joined.removesuffix(hand).removesuffix("finger")
    return joined


_POSITION_OF_CODE = {
    **{str(code): position for code, position in enumerate(FINGER_POSITIONS[:10], start=1)},
    **{"0": "unknown", "11": "right_thumb", "12": "left_thumb"},
}
_FINGERS = ("thumb", "index", "middle", "ring", "little")
_WORDS_WITHOUT_MEANING = ("", "finger", "hand", "jari", "tangan")
_INDONESIAN = {
    **{"kanan": "right", "kiri": "left", "jempol": "thumb", "ibu": "thumb", "telunjuk": "index", "tengah": "middle"},
    **{"manis": "ring", "kelingking": "little", "wajah": "face"},
}
_NAMES = {
    **{position.replace("_", ""): position for position in COLUMNS},
    # abbreviations: `RI`, `R Index`
    **{f"{hand[0]}{name[0]}": f"{hand}_{name}" for hand in ("right", "left") for name in _FINGERS},
    **{f"{hand[0]}{name}": f"{hand}_{name}" for hand in ("right", "left") for name in _FINGERS},
    **{f"{hand}{name}": f"{hand}_little" for hand in ("right", "left") for name in ("pinky", "pinkie")},
    "portrait": "face",
}
