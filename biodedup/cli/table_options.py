"""Options that commands on tables share: how a table is written, and `--check`.

Owns these options and how a check is printed. Never reads a table itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biodedup.cli.base import Exit, complain, finish
from biodedup.errors import InvalidInput

if TYPE_CHECKING:
    from biodedup.jobs import Checked, TableOptions

EncodingOption = Annotated[
    str | None,
    typer.Option("--encoding", metavar="NAME", help="Encoding of the CSV file, as cp1252; default: detected."),
]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="NAME=HEADER", help="A column's header in the file, as subject_id=NIK. Repeatable."
    ),
]
DateFormatOption = Annotated[
    str | None,
    typer.Option(
        "--date-format", metavar="FORM", help="Form of captured_at, as %d/%m/%Y; default: ISO 8601 or seconds."
    ),
]
IgnoreColumnsOption = Annotated[
    bool, typer.Option("--ignore-columns", help="Columns that are not known, or look misspelt, are no error.")
]
CheckOption = Annotated[
    bool,
    typer.Option("--check", help="Only check the table, row by row; change nothing. Exit code 12: rows are refused."),
]


def table_options(
    source: Path,
    encoding: str | None = None,
    columns: list[str] | None = None,
    date_format: str | None = None,
    ignore_columns: bool = False,
) -> TableOptions:
    """The options of a command. Says so where the encoding of the source is a guess."""
    from biodedup.jobs import TableOptions

    mapped: dict[str, str] = {}
    for text in columns or ():
        name, separator, header = text.partition("=")
        if not separator or name.strip() in mapped:
            raise InvalidInput(f"--column {text} is not understood; write NAME=HEADER once for each, as subject_id=NIK")
        mapped[name.strip()] = header
    options = TableOptions(encoding, mapped, date_format, ignore_columns)
    if encoding is None:
        _tell_guess(source)
    return options


def _tell_guess(source: Path) -> None:
    from biodedup.jobs.manifests.tables import CSV_SUFFIXES
    from biodedup.jobs.manifests.text_form import detected

    if source.suffix.lower() in CSV_SUFFIXES and source.is_file() and detected(source)[1]:
        complain(f"{source} is read as Windows-1252, by its letters; name another encoding with --encoding")


def finish_check(checked: Checked, as_json: bool) -> None:
    """Prints a check, and exits."""
    finish(checked.to_dict(), checked.sentences(), as_json)
    raise typer.Exit(Exit.REFUSED if checked.refused else Exit.DONE)
