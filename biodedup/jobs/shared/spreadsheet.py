"""Protects CSV against formula injection: an apostrophe is put before a text that a spreadsheet would run as a formula.

Owns the rule (OWASP, "CSV Injection") and its inverse, which readers apply. Never opens a file, and never changes a number.

A formula begins with `=`, `+`, `-`, `@`, a tab or a line end, or with the full-width forms of these characters. A text that already has
apostrophes before such a character gets another one, so that reading returns the original text.
"""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
import pyarrow.compute

_FORMULA_STARTS = "[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"
_FORMULA = f"^('*{_FORMULA_STARTS})"
_ESCAPED = re.compile(f"^'(?='*{_FORMULA_STARTS})")


def escaped_formulas(table: pa.Table) -> pa.Table:
    """The table with protected texts and column names."""
    columns = [_escaped(column) if _is_text(column.type) else column for column in table.columns]
    return pa.table(columns, escaped_names(table.schema).names)


def escaped_names(schema: pa.Schema) -> pa.Schema:
    """The schema with protected column names."""
    return pa.schema([field.with_name(re.sub(_FORMULA, r"'\1", field.name)) for field in schema])


def unescaped(text: str) -> str:
    """The original text of a protected cell."""
    return _ESCAPED.sub("", text)


def unescaped_cells(texts: Any) -> Any:
    """`unescaped` for an Arrow array of strings."""
    return pa.compute.replace_substring_regex(texts, pattern=f"^'('*{_FORMULA_STARTS})", replacement=r"\1")


def _escaped(column: Any) -> Any:
    text = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
    return pa.compute.replace_substring_regex(text, pattern=_FORMULA, replacement=r"'\1")


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
