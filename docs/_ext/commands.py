"""Writes `reference/commands.md` from the command line's own definitions, before the site is built.

Typer carries its own copy of click, so that extensions which read click commands (sphinx-click) do not know its commands.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer
from sphinx.application import Sphinx

HEAD = """# Commands

Generated from the command line. `--help` of each command says the same. [Exit codes](schemas.md#exit-codes) are the same for all.

"""


def _plain(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")


def _kind(parameter: Any) -> str:
    """PATH, TEXT, ...: what an option takes."""
    if not hasattr(parameter, "type_descriptor"):  # of Typer before 0.26
        return str(parameter.type.name).upper()
    kind = parameter.type_descriptor.annotation
    kind = (get_args(kind) or (kind,))[0]
    return {"str": "TEXT", "int": "INTEGER", "float": "NUMBER"}.get(kind.__name__, kind.__name__.upper())


def _rows(command: Any) -> Iterator[tuple[str, str]]:
    for parameter in command.params:
        if parameter.name in ("install_completion", "show_completion", "help") or getattr(parameter, "hidden", False):
            continue
        is_argument = parameter.param_type_name == "argument"
        name = parameter.metavar or parameter.name.upper() if is_argument else ", ".join(parameter.opts)
        if not is_argument and not getattr(parameter, "is_flag", False):
            name += " " + (parameter.metavar or _kind(parameter))
        told = [_plain(getattr(parameter, "help", ""))]
        if parameter.required:
            told.append("Required.")
        elif parameter.default is not None and str(parameter.default) not in ("False", "", "[]", "()"):
            told.append(f"Default: `{parameter.default}`.")
        if getattr(parameter, "envvar", None):
            told.append(f"Environment: `{parameter.envvar}`.")
        yield f"`{name}`".replace("|", "\\|"), " ".join(filter(None, told))


def _section(command: Any, path: str, level: int) -> Iterator[str]:
    if hasattr(command, "commands"):
        if path != "biodedup":
            yield f"{'#' * level} {path}\n\n{_plain(command.help)}\n"
        for name in sorted(command.commands):
            yield from _section(command.commands[name], f"{path} {name}", level + (path != "biodedup"))
        return
    yield f"{'#' * level} {path}\n\n{_plain(command.help)}\n"
    rows = list(_rows(command))
    if rows:
        yield "| | |\n|---|---|\n" + "".join(f"| {name} | {told} |\n" for name, told in rows)


def write(app: Sphinx) -> None:
    from biodedup.cli import app as cli

    text = HEAD + "\n".join(_section(typer.main.get_command(cli), "biodedup", 2))
    page = Path(app.srcdir) / "reference" / "commands.md"
    if not page.exists() or page.read_text() != text:
        page.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
