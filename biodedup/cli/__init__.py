"""The command line of biodedup. Each command calls one method of the engine or one job.

Owns the entry point. Never decides anything. `commands.py` imports all command modules; `base.py` defines the application, `options.py` common
options, `opening.py` how galleries are opened, and `printing.py` how results are printed. These modules are imported when `main` runs or `app`
is first used, so that Ctrl-C is handled from the start.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

__all__ = ["app", "main"]

_INTERRUPTED = 130  # `exits.Exit.INTERRUPTED`, which may not be imported yet


def main() -> None:
    """The entry point: runs the command of `sys.argv` and exits with its code. Ctrl-C at any time exits with 130."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold keys and templates
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
