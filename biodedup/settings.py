"""Finds the settings in effect, and the source of each: command line, files, environment, defaults.

Owns the sources and their order. Never opens a gallery, which stores its own policy.

The sources, from the strongest to the weakest:

1. the command line;
2. the file named by `--config`;
3. the file named by the environment variable BIODEDUP_CONFIG;
4. `biodedup.toml` beside the gallery's folder, in the same parent folder;
5. the defaults.

Each setting is looked up separately: if a source does not name it, the next source counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biodedup.common.tables import flat, made, read_toml, typed
from biodedup.config import Config

FILE_NAME = "biodedup.toml"
VARIABLE = "BIODEDUP_CONFIG"
COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class Settings:
    """The settings in effect. sources: dotted name -> the source of each setting that is not a default."""

    config: Config = field(default_factory=Config)
    sources: Mapping[str, str] = field(default_factory=dict)


def settings_for(
    gallery: Path | None = None,
    file: Path | None = None,
    *,
    given: Mapping[str, Any] | None = None,
    usual: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """The settings for a gallery, or for work without a gallery.

    file: the file of `--config`. given: dotted name -> value of the command line, None if it was not stated. usual: dotted name -> default
    of the command.

    Raises InvalidInput, which names the file and the setting.
    """
    values = dict(usual or {})
    sources = dict.fromkeys(values, f"{DEFAULT} of this command")
    config = made(Config, values)
    for path, source in _files(gallery, file, environ):
        named = typed(Config, read_toml(path), str(path), path.parent)
        values |= named
        sources |= dict.fromkeys(named, source)
        config = made(Config, values, str(path))  # checked here, so that an error names this file
    stated = {name: value for name, value in (given or {}).items() if value is not None}
    if stated:
        values |= stated
        sources |= dict.fromkeys(stated, COMMAND_LINE)
        config = made(Config, values, COMMAND_LINE)
    return Settings(config, sources)


def listed(settings: Settings) -> dict[str, tuple[Any, str]]:
    """Dotted name -> (value, source) of every setting except the policy's."""
    return {
        name: (value, settings.sources.get(name, DEFAULT))
        for name, value in flat(settings.config).items()
        if not name.startswith("policy.")
    }


def _files(gallery: Path | None, file: Path | None, environ: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    """(path, name of the source), from the weakest to the strongest."""
    if gallery is not None:
        beside = Path(os.path.abspath(gallery)).parent / FILE_NAME
        if beside.exists():
            yield beside, str(beside)
    if environ.get(VARIABLE):
        yield Path(environ[VARIABLE]), f"{environ[VARIABLE]} ({VARIABLE})"
    if file is not None:
        yield file, f"{file} (--config)"
