"""Parses the cells of a manifest: ids, finger positions, resolution, times, groups, paths and column names.

Every reader of a table takes the meaning of a cell from here, so that one row means the same in all jobs. Never opens a file.

1. Ids are text and keep every letter: `0012`, `1e5`, `NA` and `true` are ids; one with spaces around it is refused. A typed table's whole number is the id of its digits. An id
   that a spreadsheet rounded (`3.17E+15`), gave decimals (`31712345.0`; `1.0` is an id) or replaced by an error (`#N/A`) is refused.
2. A cell that cannot be used raises `Unusable`, with a reason of `enrolment/outcomes.py` and a detail that names the column. The job decides
   what that costs: a row or an encounter.
3. `engine.arrow.ids.ids_of` gives a whole Arrow column the meaning that `id_of` gives one cell.
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
"""Columns that have a meaning in some job."""

_PATH_LENGTH_MAX = 4_096
_CODE = re.compile(r"(?:(?:finger|fgp)[\s_-]*)?0*([0-9]{1,2})(?:\.0+)?", re.IGNORECASE)
_DPI = re.compile(r"(\d+(?:[.,]\d*)?)\s*(?:dpi|ppi)?", re.IGNORECASE)


class Unusable(Exception):
    """A cell cannot be used. refusal: why; its row or encounter is refused with it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.refusal = Refusal("encounter", reason, detail)


@dataclass(frozen=True)
class CaptureCell:
    """The capture of a row. source: a path, or the content of an image or a minutiae record; position: `face` or a finger's."""

    position: str
    source: str | bytes
    dpi: float | None

    def capture(self, data: CaptureData) -> Face | Finger:
        """data: what the source points to."""
        return Face(data) if self.position == "face" else Finger(data, self.position, self.dpi)


# rows ---------------------------------------------------------------------------------------------------------------


def check_fields(cells: Mapping[str, Any]) -> None:
    """Raises Unusable for a line that does not fit the table, which a reader gives as a row without cells."""
    if not cells:
        raise Unusable("malformed_row", "the line has another number of fields than the header")


def subject_of(cells: Mapping[str, Any]) -> str:
    """The subject_id of a row that must have one. Raises Unusable."""
    subject_id = id_of(cells, "subject_id")
    if subject_id is None:
        raise Unusable("no_subject_id", "subject_id is empty")
    return subject_id


def capture_of(cells: Mapping[str, Any], *, images: bool = False) -> CaptureCell | Missing | None:
    """The capture of a row, from its columns path, position and dpi; or the reason in `missing` why there is none; or None where the row
    names neither. images: the column image may hold the content itself. Raises Unusable."""
    position, path, dpi = position_of(cells.get("position")), path_of(cells.get("path")), dpi_of(cells.get("dpi"))
    missing = missing_of(position, cells.get("missing"))
    image = (cells.get("image") or None) if images else None
    if image is not None and not isinstance(image, bytes):
        raise Unusable("wrong_type", f"image is of type {type(image).__name__}, wanted bytes")
    source = image or path
    if source and missing:
        raise Unusable(
            "invalid_input",
            f"it has both {'a path' if path else 'an image'} and a reason why {position} is missing; leave one of them empty",
        )
    return CaptureCell(position, source, dpi) if source else missing


def column_name(written: str, known: Collection[str] = KNOWN) -> str:
    """The name of a known column, in any capitals and spacing (`Subject ID`, `right-index`); any other name without spaces around it."""
    name = written.strip().removeprefix("\ufeff").strip()
    folded = re.sub(r"[\s_-]+", "_", name).lower()
    return folded if folded in known else name


# cells --------------------------------------------------------------------------------------------------------------


def text_of(cell: Any, column: str) -> str | None:
    """The text of a cell, None where it is empty. Whole numbers of a typed table are text as well."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    if cell is None or cell == "":
        return None
    if not isinstance(cell, str):
        raise Unusable("wrong_type", f"{column} is of type {type(cell).__name__}, wanted text")
    if UNREADABLE in cell:
        raise Unusable(
            "not_utf8",
            f"{column} is not UTF-8 text: {_quoted(cell)}; is the file in another encoding, name it (--encoding)",
        )
    return cell


def id_of(cells: Mapping[str, Any], column: str) -> str | None:
    """A usable id, or None where the cell is empty."""
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
    """The path of a file, None where the cell is empty."""
    if isinstance(cell, int):
        raise Unusable("wrong_type", f"{column} is of type {type(cell).__name__}, wanted a path")
    path = text_of(cell, column)
    if path is not None and ("\0" in path or len(path) > _PATH_LENGTH_MAX):
        raise Unusable("wrong_type", f"{column} is no path of a file: {_quoted(path)}")
    return path


def located(folder: Path, written: str) -> Path:
    """The file that a path names, relative to the folder of its table. If it does not exist, the path is read as Windows writes it
    (`faces\\a.jpg`), and with accented letters as macOS writes them (NFD) and as others do (NFC)."""
    plain = folder / written
    if written.isascii() and "\\" not in written:
        return plain
    slashed = written.replace("\\", "/")
    forms = (written, slashed, unicodedata.normalize("NFC", slashed), unicodedata.normalize("NFD", slashed))
    return next((folder / form for form in forms if os.path.lexists(folder / form)), plain)


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
    """The stated reason why there is no capture at a position; None where the cell is empty."""
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


def moment_of(cell: Any, date_format: str | None = None) -> float | None:
    """Seconds since 1970 of a time, a date, a number, or a text: ISO 8601, or seconds. UTC where no zone is stated. None where it is no time:
    a wrong clock never keeps a record out. A number of 20,000 to 80,000 is no time: it is the day number of a spreadsheet (1954 to 2119). date_format: of texts, as the caller declares it; one of another form raises Unusable."""
    if isinstance(cell, str) and date_format is not None and cell.strip():
        try:
            cell = datetime.strptime(cell.strip(), date_format)
        except ValueError:
            raise Unusable("wrong_type", f"captured_at is {_quoted(cell)}, wanted the form {date_format}") from None
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
        plain = isinstance(cell, (int, float)) and isfinite(cell) and not 20_000 <= cell <= 80_000
        return float(cell) if plain else None
    except (ValueError, OverflowError):
        return None


def _quoted(cell: Any) -> str:
    """A cell for an error text, at most 40 characters of it."""
    if not isinstance(cell, (str, int, float)):
        return type(cell).__name__
    text = shown(cell)
    return repr(text if len(text) <= 40 else text[:40] + "...") if isinstance(cell, str) else text


def _folded(text: str) -> str:
    """The letters of a position's name, hand first and finger second."""
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
    # `RI`, `R Index`: hand and finger by their first letters
    **{f"{hand[0]}{name[0]}": f"{hand}_{name}" for hand in ("right", "left") for name in _FINGERS},
    **{f"{hand[0]}{name}": f"{hand}_{name}" for hand in ("right", "left") for name in _FINGERS},
    **{f"{hand}{name}": f"{hand}_little" for hand in ("right", "left") for name in ("pinky", "pinkie", "small")},
    **{f"{hand}fore": f"{hand}_index" for hand in ("right", "left")},
    "portrait": "face",
}
