"""Protects CSV against formula injection: a text that a spreadsheet would run gets an apostrophe, which is removed on reading.

Owns which texts these are (OWASP, "CSV Injection"). Never opens a file. Numbers are left alone.

A formula begins with `=`, `+`, `-`, `@`, a tab or a line end, or with the wide forms of these signs. A text that itself begins with
apostrophes before such a sign gets one more, so that reading returns what was written.
"""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
import pyarrow.compute

_STARTS = "[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"
_ARMED = f"^('*{_STARTS})"
_DISARMED = re.compile(f"^'(?='*{_STARTS})")


def disarmed(table: pa.Table) -> pa.Table:
    """The table with harmless texts and column names."""
    columns = [_disarmed(column) if _is_text(column.type) else column for column in table.columns]
    return pa.table(columns, disarmed_schema(table.schema).names)


def disarmed_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with harmless column names."""
    return pa.schema([field.with_name(re.sub(_ARMED, r"'\1", field.name)) for field in schema])


def rearmed(text: str) -> str:
    """A cell as it was before `disarmed`."""
    return _DISARMED.sub("", text)


def rearmed_cells(texts: Any) -> Any:
    """As `rearmed`, of an Arrow array of strings."""
    return pa.compute.replace_substring_regex(texts, pattern=f"^'('*{_STARTS})", replacement=r"\1")


def _disarmed(column: Any) -> Any:
    text = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
    return pa.compute.replace_substring_regex(text, pattern=_ARMED, replacement=r"'\1")


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
