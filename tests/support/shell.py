"""The command line: in a process of its own, or, in a tenth of the time, in that of the tests."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from biodedup.cli import main


def run(*arguments: object, cwd: Path) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "biodedup.cli", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


def run_here(*arguments: object, cwd: Path) -> tuple[int, str, str]:
    """As `run`, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    logger = logging.getLogger("biodedup")
    handlers, level = list(logger.handlers), logger.level
    argv = ["biodedup", *map(str, arguments)]
    with chdir(cwd), patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            logger.handlers[:] = handlers
            logger.setLevel(level)
    return code, out.getvalue(), err.getvalue()
