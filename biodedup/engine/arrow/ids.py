"""Checks a whole Arrow column of ids.

Owns the rules for ids in such a column, and the texts of refusals. `jobs/manifests/fields.py` has the same rules for a single cell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from biodedup.errors import InvalidInput
from biodedup.texts import ID_LENGTH_MAX, id_problem_kind

UNREADABLE = "\ufffd"
"""Replaces bytes that are not UTF-8 (U+FFFD, the replacement character)."""
ROUNDED = r"^[0-9]+([.,][0-9]+)?[Ee]\+[0-9]+$"
WAS_ROUNDED = "was rounded by a spreadsheet; format the column as text"
SPOILT = {
    ROUNDED: WAS_ROUNDED,
    r"^[0-9]{8,}[.,]0+$": "has decimals, as ids have that a program took for numbers; write the column as text",
    r"^#(N/A|REF!|VALUE!|NAME\?|DIV/0!|NUM!|NULL!|SPILL!|CALC!|#+)$": "is an error of a spreadsheet; repair the cell",
}
"""Texts that a program wrote in place of ids: pattern -> the refusal. Several people may have the same such text, or one person two ids."""


def ids_of(cells: Any, column: str) -> tuple[Any, NDArray[np.object_]]:
    """Returns (the ids, an Arrow array of strings; object (n,): why each is not usable, '' for a usable id).

    cells: an Arrow array of strings or whole numbers. Raises InvalidInput for another type.
    """
    kind = cells.type
    if pa.types.is_dictionary(kind):
        cells = cells.dictionary_decode()
        kind = cells.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (is_text or pa.types.is_integer(kind)):
        raise InvalidInput(f"column {column} is of type {kind}; wanted strings")
    texts = utf8_of(cells.cast(pa.string()))
    problems = _id_problems(texts)
    wrong = np.flatnonzero(problems != "")
    problems[wrong] = [f"{column} is not usable: it {problem}" for problem in problems[wrong]]
    for pattern, problem in SPOILT.items():
        problems[mask(pc.match_substring_regex(texts, pattern))] = f"{column} {problem}"
    problems[mask(pc.match_substring(texts, UNREADABLE))] = f"{column} is not UTF-8 text"
    return texts, problems


def were_rounded(texts: Any) -> NDArray[np.bool_]:
    """bool (n,): whether each text of an Arrow array is a number that a spreadsheet rounded, such as `3.17E+15`."""
    return mask(pc.match_substring_regex(texts, ROUNDED))


def utf8_of(texts: Any) -> Any:
    """Returns an Arrow array of strings, with `UNREADABLE` in place of bytes that are not UTF-8."""
    try:
        return texts.cast(pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        contents = texts.cast(pa.binary()).to_pylist()
        return pa.array([None if c is None else c.decode("utf-8", "replace") for c in contents], pa.string())


def _id_problems(texts: Any) -> NDArray[np.object_]:
    """object (n,): why each text of an Arrow array is not an id, '' for an id. A null is an empty id."""
    length = pc.utf8_length(texts)
    plain = pc.and_(
        pc.and_(pc.string_is_ascii(texts), pc.utf8_is_printable(texts)), pc.less_equal(length, ID_LENGTH_MAX)
    )
    trimmed = pc.and_(pc.equal(pc.ascii_trim_whitespace(texts), texts), pc.greater(length, 0))
    problems = np.full(len(texts), "", object)
    for i in np.flatnonzero(~mask(pc.and_(plain, trimmed))).tolist():
        problems[i] = id_problem_kind(texts[i].as_py() or "")
    return problems


def mask(cells: Any) -> NDArray[np.bool_]:
    """Converts an Arrow array of booleans to bool (n,). A null becomes False."""
    return np.asarray(pc.fill_null(cells, False).to_numpy(zero_copy_only=False), bool)
