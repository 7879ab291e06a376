"""Checks a whole Arrow column of ids.

Owns which texts are ids there, and the texts of refusals. `jobs/manifests/fields.py` gives a single cell the same meaning.
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
"""What is no id, since a program wrote it over ids: pattern -> the refusal. Several people would share it, or one have two ids."""


def ids_of(cells: Any, column: str) -> tuple[Any, NDArray[np.object_]]:
    """(an Arrow array of strings; object (n,): why each is not a usable id, '' where it is one).

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
    """bool (n,): which texts of an Arrow array are numbers that a spreadsheet rounded, as `3.17E+15`."""
    return mask(pc.match_substring_regex(texts, ROUNDED))


def utf8_of(texts: Any) -> Any:
    """An Arrow array of strings in which bytes that are not UTF-8 are replaced by `UNREADABLE`."""
    try:
        return texts.cast(pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        contents = texts.cast(pa.binary()).to_pylist()
        return pa.array([None if c is None else c.decode("utf-8", "replace") for c in contents], pa.string())


def _id_problems(texts: Any) -> NDArray[np.object_]:
    """object (n,): why each text of an Arrow array is no id, '' where it is one. A null is an empty id."""
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
    """bool (n,); False for a null."""
    return np.asarray(pc.fill_null(cells, False).to_numpy(zero_copy_only=False), bool)
