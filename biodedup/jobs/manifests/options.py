"""What a caller says about a table that the table itself does not: its encoding, its names of columns, and its form of dates.

Owns the options and their checks. Never opens a file.
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from biodedup.errors import InvalidInput
from biodedup.jobs.manifests.fields import KNOWN, column_name

_NEAR = 0.85
_CLOCK = datetime(2024, 12, 31, 23, 58, 59)


@dataclass(frozen=True)
class TableOptions:
    """encoding: of a CSV file, as `cp1252`; None detects it. columns: our name of a column -> its name in the file, as
    `{"subject_id": "NIK"}`. date_format: of the texts in captured_at, as `%d/%m/%Y`; None reads ISO 8601 and seconds.
    ignore_columns: columns that are not known, or look misspelt, are no error."""

    encoding: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    date_format: str | None = None
    ignore_columns: bool = False

    def __post_init__(self) -> None:
        """Raises InvalidInput."""
        if self.encoding is not None:
            _check_encoding(self.encoding)
        for name, written in self.columns.items():
            if name not in KNOWN:
                raise InvalidInput(f"column {name!r} is not known; wanted one of {', '.join(KNOWN)}")
            if not isinstance(written, str) or not written.strip():
                raise InvalidInput(f"column {name} has no name in the file; write it as {name}=NAME")
        if len(set(self.columns.values())) < len(self.columns):
            raise InvalidInput(f"the columns {dict(self.columns)} name one column of the file twice; name each once")
        if self.date_format is not None:
            _check_date_format(self.date_format)

    def names(self, written: Iterable[str], path: Path | str, known: Collection[str] = KNOWN) -> list[str]:
        """The names by which jobs know the columns of a file. Raises InvalidInput for a mapped column that is absent, and for repetitions."""
        given = list(written)
        mapped: dict[str, str] = {}
        for name, own in self.columns.items():
            alike = [one for one in given if _bare(one) == _bare(own)]
            alike = alike or [one for one in given if _bare(one).casefold() == _bare(own).casefold()]
            if len(alike) != 1:
                raise InvalidInput(f"{path} has no column {own!r} for {name}; it has {list(map(_bare, given))}")
            mapped[alike[0]] = name
        names = [mapped.get(one) or column_name(one, known) for one in given]
        if len(set(names)) < len(names):
            raise InvalidInput(
                f"{path} repeats a column name, one of {names} is there twice; give each column a name of its own"
            )
        return names

    def check_columns(self, names: Iterable[str], used: Collection[str], path: Path | str, *, carried: bool) -> None:
        """Raises InvalidInput for a column that the job would leave out without a word. used: columns with a meaning in this job; carried:
        others are carried along, so that only those are wrong that look like a misspelt name."""
        if self.ignore_columns:
            return
        others = [name for name in names if name not in used]
        for name in others:
            near = difflib.get_close_matches(re.sub(r"[\s_-]+", "_", name).lower(), [*used], 1, _NEAR)
            if near and name not in KNOWN:
                raise InvalidInput(
                    f"{path} has a column {name!r}, which is not known; did you mean {near[0]}? Rename it, map it as --column {near[0]}="
                    f"{name}, or pass --ignore-columns"
                )
        unknown = [name for name in others if name not in _HARMLESS]
        if unknown and not carried:
            raise InvalidInput(
                f"{path} has columns that are not known here: {', '.join(map(repr, unknown))}; known are {', '.join(used)}. Map them, as "
                f"--column subject_id={unknown[0]}, or leave them out with --ignore-columns"
            )


DEFAULT_OPTIONS = TableOptions()

_HARMLESS = frozenset(("encounter_id", "captured_at", "group", "groups", "district", "entry"))
"""Columns of other jobs that say nothing about a capture."""


def _bare(written: str) -> str:
    return written.strip().removeprefix("\ufeff").strip()


def _check_encoding(encoding: str) -> None:
    try:
        text = codecs.lookup(encoding)._is_text_encoding
    except (LookupError, TypeError, ValueError):
        text = False
    if not text:
        raise InvalidInput(f"encoding {encoding!r} is not known; wanted a name such as utf-8, utf-16 or cp1252")


def _check_date_format(form: str) -> None:
    try:
        day = datetime.strptime(_CLOCK.strftime(form), form).date()
    except ValueError:
        day = None
    if day != _CLOCK.date():
        raise InvalidInput(
            f"the date format {form!r} does not tell year, month and day; write it as %d/%m/%Y, or %Y-%m-%d %H:%M"
        )
