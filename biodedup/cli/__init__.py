"""The command line of biodedup. Each command calls one method of the engine or one job.

Owns the entry point. Never decides anything itself. `commands.py` lists the commands, `base.py` holds what they share, and each other module
holds a group of them. They are imported when `main` runs or `app` is first used, so that Ctrl-C is handled from the start.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["app", "main"]

_INTERRUPTED = 130  # `base.Exit.INTERRUPTED`, which may not be imported yet


def main() -> None:
    """The entry point: runs the command of `sys.argv` and exits with its code, 130 after Ctrl-C at any moment."""
    try:
        from biodedup.cli.commands import run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(_INTERRUPTED)


def __getattr__(name: str) -> Any:
    if name == "app":
        from biodedup.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
