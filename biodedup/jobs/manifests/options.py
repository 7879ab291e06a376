"""Options for reading an input table: its encoding, the names of its columns, and its date format.

Owns the options and their validation. Never opens a file.
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

_SIMILAR = 0.85
"""Similarity (difflib's ratio) from which on an unknown column counts as a misspelt known column."""
_SAMPLE_TIME = datetime(2024, 12, 31, 23, 58, 59)


@dataclass(frozen=True)
class TableOptions:
    """Options for reading an input table.

    encoding: encoding of a CSV file, such as `cp1252`; None detects it. columns: the library's name of a column -> its name in the file, such as
    `{"subject_id": "NIK"}`. date_format: format of texts in captured_at, such as `%d/%m/%Y`; None reads ISO 8601 and seconds.
    ignore_columns: unknown columns and columns that look misspelt are accepted and ignored.
    """

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
        """The library's names of the columns of a file. written: their names in the file. Raises InvalidInput if a mapped column is absent,
        and if a name is repeated."""
        in_file = list(written)
        mapped: dict[str, str] = {}
        for name, mapped_name in self.columns.items():
            matching = [each for each in in_file if _bare(each) == _bare(mapped_name)]
            matching = matching or [each for each in in_file if _bare(each).casefold() == _bare(mapped_name).casefold()]
            if len(matching) != 1:
                raise InvalidInput(
                    f"{path} has no column {mapped_name!r} for {name}; it has {list(map(_bare, in_file))}"
                )
            mapped[matching[0]] = name
        names = [mapped.get(each) or column_name(each, known) for each in in_file]
        if len(set(names)) < len(names):
            raise InvalidInput(f"{path} repeats a column name; it has {names}. Give each column its own name")
        return names

    def check_columns(self, names: Iterable[str], used: Collection[str], path: Path | str, *, carried: bool) -> None:
        """Raises InvalidInput for a column that the job would ignore silently.

        used: the columns that this job reads. carried: the job keeps other columns as metadata, so that only a name that looks like a misspelt
        known name is an error.
        """
        if self.ignore_columns:
            return
        others = [name for name in names if name not in used]
        for name in others:
            similar = difflib.get_close_matches(re.sub(r"[\s_-]+", "_", name).lower(), [*used], 1, _SIMILAR)
            if similar and name not in KNOWN:
                raise InvalidInput(
                    f"{path} has an unknown column {name!r}; did you mean {similar[0]}? Rename it, map it with --column {similar[0]}="
                    f"{name}, or pass --ignore-columns"
                )
        unknown = [name for name in others if name not in _HARMLESS]
        if unknown and not carried:
            raise InvalidInput(
                f"{path} has unknown columns: {', '.join(map(repr, unknown))}; known columns are {', '.join(used)}. Map them, such as "
                f"--column subject_id={unknown[0]}, or ignore them with --ignore-columns"
            )


DEFAULT_OPTIONS = TableOptions()

_HARMLESS = frozenset(("encounter_id", "captured_at", "group", "groups", "district", "entry"))
"""Columns that only other jobs read, and that do not change the meaning of a capture. Every job may ignore them."""


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
        day = datetime.strptime(_SAMPLE_TIME.strftime(form), form).date()
    except ValueError:
        day = None
    if day != _SAMPLE_TIME.date():
        raise InvalidInput(
            f"the date format {form!r} does not state year, month and day; write it such as %d/%m/%Y, or %Y-%m-%d %H:%M"
        )
