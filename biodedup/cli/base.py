"""Defines the Typer application `app`, to which every command module adds its commands.

Owns the general help text and the order of the commands. Never runs a command.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import typer
from typer.core import TyperGroup

from biodedup.cli.exits import Exit
from biodedup.cli.printing import complain


class Panel(StrEnum):
    """Headings of `biodedup --help`, in this order."""

    SUBJECTS = "Enrol and search"
    GALLERY = "A gallery"
    JOBS = "Jobs"
    KITS = "Field kits"
    CARE = "Quality and care"
    SETTINGS = "Settings"


class _Commands(TyperGroup):
    """The commands in the order of their panels."""

    def list_commands(self, ctx: Any) -> list[str]:
        panels = list(Panel)
        return sorted(
            super().list_commands(ctx),
            key=lambda name: panels.index(Panel(getattr(self.commands[name], "rich_help_panel", Panel.GALLERY))),
        )

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(Exit.INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Finds a person enrolled twice.\n\nExit codes: 0 done, unique or accepted; 1 unexpected failure; 2 your mistake; "
    "3 try again later; 4 data damaged; 10 duplicate, or duplicates found; 11 review; 12 refused; 13 not accepted; "
    "130 interrupted.",
)
