"""Converts result values to JSON, tables and HTML for notebooks, without biometric data.

Owns the rules of these forms, as mixin classes. Never interprets a value: each class states its columns and rows.

1. Fields that are marked `biometric` are left out, and so are all bytes and numpy arrays.
2. Numbers that JSON does not support (infinity, NaN) become null.
3. HTML is escaped, and invisible characters are shown as escapes.
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
"""The metadata of a dataclass field that holds a capture, a vector or minutiae."""
JSON_NAMES = {"label_penalty_db": "charge_db"}
"""Field -> its name in JSON, for fields that were renamed after results had been stored."""
_OMITTED = object()


class Described:
    """Mixin for a result value that can be written as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON, without biometric data."""
        return document_of(self)

    def to_json(self) -> str:
        """`to_dict` as one line of JSON, without invisible characters."""
        return json_line(self.to_dict())


class Tabular(Described):
    """Mixin for a result value with rows. Notebooks show it as a table."""

    _columns: ClassVar[Mapping[str, str]] = {}
    """column -> its Arrow type."""

    def _rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows: column -> value."""
        raise NotImplementedError

    def to_arrow(self) -> Any:
        """The rows as a `pyarrow.Table`."""
        import pyarrow as pa  # here, so that `biodedup --help` does not load it

        rows = self._rows()
        return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in self._columns.items()})

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`. Raises InvalidInput if pandas is not installed; this library does not require it."""
        if find_spec("pandas") is None:
            raise InvalidInput("pandas is not installed; run `pip install pandas`, or use to_arrow()")
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
    """The plain values of a dataclass, as `Described.to_dict` returns them."""
    pairs = (
        (JSON_NAMES.get(field.name, field.name), _plain(getattr(value, field.name)))
        for field in fields(value)
        if not field.metadata.get("biometric")
    )
    return {name: plain for name, plain in pairs if plain is not _OMITTED}


def _plain(value: Any) -> Any:
    """A value in the form for JSON; _OMITTED for biometric data."""
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
