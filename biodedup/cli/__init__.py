"""The command line: a thin mirror of the engine and the jobs.

Owns the entry point. Never decides anything itself. What commands share is in `base.py`; each other module holds some commands.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import biodedup
from biodedup.cli import audit, calibrate, evaluate, explain, gallery, kit, merge, policy, subjects
from biodedup.cli import bulk as register
from biodedup.cli import cases as adjudicate
from biodedup.cli.base import app, complain, exit_code, print_json, say
from biodedup.errors import BiodedupError
from biodedup.memory import out_of_memory

__all__ = [
    "adjudicate",
    "app",
    "audit",
    "calibrate",
    "evaluate",
    "explain",
    "gallery",
    "kit",
    "main",
    "merge",
    "policy",
    "register",
    "subjects",
]


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        say(biodedup.__version__)
        raise typer.Exit()


def main() -> None:
    """The entry point: runs a command and turns the error tree into exit codes."""
    as_json = "--json" in sys.argv
    try:
        app()
    except (BiodedupError, MemoryError) as raised:
        error = raised if isinstance(raised, BiodedupError) else out_of_memory(raised)
        if as_json:
            print_json({"error": {"type": type(error).__name__, "text": str(error)}})
        complain(f"error: {error}")
        sys.exit(exit_code(error))
