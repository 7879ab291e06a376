"""Where a command gets a passphrase from: a file descriptor, an environment variable, or the terminal.

Never takes one as an argument, which every process of the machine can read, and never prints one.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from biodedup.errors import InvalidInput

PassphraseFd = Annotated[
    int | None,
    typer.Option("--passphrase-fd", metavar="N", help="Read the passphrase from this file descriptor, its first line."),
]
KIT_VARIABLE, CENTRE_VARIABLE = "BIODEDUP_KIT_PASSPHRASE", "BIODEDUP_CENTRE_PASSPHRASE"
_BYTES_MAX = 4096


def passphrase(what: str, variable: str, fd: int | None, *, confirm: bool = False) -> str:
    """what: whose passphrase it is; variable: of the environment; confirm: a new one, which is asked for twice. Raises InvalidInput."""
    if fd is not None:
        try:
            with os.fdopen(os.dup(fd), "rb") as file:
                return file.readline(_BYTES_MAX).rstrip(b"\r\n").decode()
        except (OSError, UnicodeDecodeError):
            raise InvalidInput(
                f"no passphrase could be read from file descriptor {fd}; open it, as in `--passphrase-fd 3 3<file`"
            ) from None
    if variable in os.environ:
        return os.environ[variable]
    if sys.stdin.isatty():
        return str(typer.prompt(f"Passphrase of {what}", hide_input=True, confirmation_prompt=confirm, err=True))
    raise InvalidInput(f"{what} needs a passphrase; set {variable}, or name a file descriptor with --passphrase-fd")
