"""Defines the common options of commands that read tables: the form of the table, and `--check`.

Owns these options, and how a check is printed. Never reads a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biodedup.cli.exits import Exit
from biodedup.cli.printing import complain, finish
from biodedup.errors import InvalidInput

if TYPE_CHECKING:
    from biodedup.jobs import Checked, TableOptions

EncodingOption = Annotated[
    str | None,
    typer.Option("--encoding", metavar="NAME", help="Encoding of the CSV file, such as cp1252; default: detected."),
]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="NAME=HEADER", help="A column's name in the file, such as subject_id=NIK. Repeatable."
    ),
]
DateFormatOption = Annotated[
    str | None,
    typer.Option(
        "--date-format", metavar="FORM", help="Format of captured_at, such as %d/%m/%Y; default: ISO 8601 or seconds."
    ),
]
IgnoreColumnsOption = Annotated[
    bool, typer.Option("--ignore-columns", help="Accept and ignore columns that are unknown or look misspelt.")
]
CheckOption = Annotated[
    bool,
    typer.Option(
        "--check", help="Only check the table, row by row; change nothing. Exit code 12: some rows are refused."
    ),
]


def table_options(
    source: Path,
    encoding: str | None = None,
    columns: list[str] | None = None,
    date_format: str | None = None,
    ignore_columns: bool = False,
) -> TableOptions:
    """The `TableOptions` of a command. Prints a note if the encoding of the source is guessed."""
    from biodedup.jobs import TableOptions

    mapped: dict[str, str] = {}
    for text in columns or ():
        name, separator, header = text.partition("=")
        if not separator or name.strip() in mapped:
            raise InvalidInput(
                f"--column {text} is not NAME=HEADER, or repeats a name; write such as subject_id=NIK, each once"
            )
        mapped[name.strip()] = header
    options = TableOptions(encoding, mapped, date_format, ignore_columns)
    if encoding is None:
        _note_guess(source)
    return options


def _note_guess(source: Path) -> None:
    from biodedup.jobs.manifests.tables import CSV_SUFFIXES
    from biodedup.jobs.manifests.text_form import detected

    if source.suffix.lower() in CSV_SUFFIXES and source.is_file() and detected(source)[1]:
        complain(f"{source} is read as Windows-1252, guessed from its letters; name another encoding with --encoding")


def finish_check(checked: Checked, as_json: bool) -> None:
    """Prints the report of a check, and exits."""
    finish(checked.to_dict(), checked.sentences(), as_json)
    raise typer.Exit(Exit.REFUSED if checked.refused else Exit.DONE)
