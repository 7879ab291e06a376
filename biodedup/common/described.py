"""Turns result values into JSON, tables and HTML for notebooks, without biometric data.

Owns the rules of these forms, as mixins of the values. Never knows what a value means: each says its columns and its rows.

1. A field that is marked `biometric`, and bytes and arrays of numbers anywhere, are left out.
2. Numbers that JSON cannot hold (infinity, NaN) are null.
3. HTML is escaped, and hidden characters are shown as escapes.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.util import find_spec
from math import isfinite
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any, ClassVar

from biodedup.errors import InvalidInput
from biodedup.texts import json_line, shown

BIOMETRIC = {"biometric": True}
"""Metadata of a field that holds a capture, a vector or minutiae."""
JSON_NAMES = {"label_penalty_db": "charge_db"}
"""Fields that have another name in JSON: the name that stored decisions and results have."""
_OMITTED = object()


class Described:
    """A result value that JSON can hold."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without biometric data."""
        return document_of(self)

    def to_json(self) -> str:
        """`to_dict` as one line of JSON, without hidden characters."""
        return json_line(self.to_dict())


class Tabular(Described):
    """A result value with rows. Notebooks show it as a table."""

    _columns: ClassVar[Mapping[str, str]] = {}
    """column -> its type in Arrow."""

    def _rows(self) -> Sequence[Mapping[str, Any]]:
        """A value for each column."""
        raise NotImplementedError

    def to_arrow(self) -> Any:
        """Its rows as a `pyarrow.Table`."""
        import pyarrow as pa  # here, so that help texts need not load it

        rows = self._rows()
        return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in self._columns.items()})

    def to_pandas(self) -> Any:
        """Its rows as a `pandas.DataFrame`. Raises InvalidInput without pandas, which is no requirement of this library."""
        if find_spec("pandas") is None:
            raise InvalidInput("pandas is not installed; `pip install pandas`, or use to_arrow()")
        return self.to_arrow().to_pandas()

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{_cell(name.replace('_', ' '))}</th>" for name in self._columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{_cell(row[name])}</td>' for name in self._columns)}</tr>" for row in self._rows()
        )
        return (
            f"<table><caption>{_cell(repr(self))}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return html.escape(shown(text))


def document_of(value: Any) -> dict[str, Any]:
    """A dataclass as `Described.to_dict` gives it."""
    pairs = (
        (JSON_NAMES.get(field.name, field.name), _plain(getattr(value, field.name)))
        for field in fields(value)
        if not field.metadata.get("biometric")
    )
    return {name: plain for name, plain in pairs if plain is not _OMITTED}


def _plain(value: Any) -> Any:
    """As JSON holds it; _OMITTED for what is biometric."""
    if value is None or isinstance(value, (bool, str)):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if isfinite(value) else None
    if isinstance(value, Described):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return document_of(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        pairs = ((str(key), _plain(item)) for key, item in value.items())
        return {key: plain for key, plain in pairs if plain is not _OMITTED}
    if isinstance(value, Set):
        return sorted(plain for plain in map(_plain, value) if plain is not _OMITTED)
    if isinstance(value, (list, tuple)):
        return [plain for plain in map(_plain, value) if plain is not _OMITTED]
    return _OMITTED
