"""Imports all command modules, runs a command, and turns its errors into exit codes.

Owns the list of command modules. Never decides anything. No command module imports numba, faiss, onnxruntime or cv2 before a command runs, so
that `--help` is quick.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

import biodedup
from biodedup.cli import bulk, cases, duplicates, explain, measure, subjects
from biodedup.cli.base import app
from biodedup.cli.exits import exit_code
from biodedup.cli.galleries import cluster, gallery, keys, log, looking, policy, receipt, register, retention
from biodedup.cli.kits import kit
from biodedup.cli.printing import complain, print_json, say
from biodedup.common.memory import out_of_memory
from biodedup.errors import BiodedupError, InvalidInput

__all__ = [
    "app",
    "bulk",
    "cases",
    "cluster",
    "duplicates",
    "explain",
    "gallery",
    "keys",
    "kit",
    "log",
    "looking",
    "measure",
    "policy",
    "receipt",
    "register",
    "retention",
    "run",
    "subjects",
]


_LOG_VARIABLE, _LOG_LEVELS = "BIODEDUP_LOG", ("DEBUG", "INFO", "WARNING", "ERROR")


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        say(biodedup.__version__)
        raise typer.Exit()


def _show_log(level: str) -> None:
    """Sends log messages of at least this level to standard error. Raises InvalidInput for an unknown level."""
    if level not in _LOG_LEVELS:
        raise InvalidInput(f"{_LOG_VARIABLE} is {level!r}, wanted one of {', '.join(_LOG_LEVELS)}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("biodedup")
    logger.addHandler(handler)
    logger.setLevel(level)


def run() -> None:
    """Runs the command of `sys.argv`. An error is printed, and its branch of the error tree sets the exit code."""
    as_json = "--json" in sys.argv
    try:
        _show_log(os.environ.get(_LOG_VARIABLE) or "WARNING")
        app()
    except (BiodedupError, MemoryError) as raised:
        error = raised if isinstance(raised, BiodedupError) else out_of_memory(raised)
        if as_json:
            print_json({"error": {"type": type(error).__name__, "text": str(error)}})
        complain(f"error: {error}")
        sys.exit(exit_code(error))
