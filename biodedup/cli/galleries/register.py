"""Defines the commands that copy a gallery from a folder into PostgreSQL and back: gallery import, gallery export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from biodedup.cli.base import Panel, app
from biodedup.cli.opening import settings
from biodedup.cli.options import ConfigOption, JsonOption
from biodedup.cli.printing import counted, finish
from biodedup.config import ClusterConfig
from biodedup.errors import InvalidInput
from biodedup.gallery.files.filesystem import LocalStorage, Storage

gallery = typer.Typer(no_args_is_help=True, help="Copy a gallery between a folder and PostgreSQL.")
app.add_typer(gallery, name="gallery", rich_help_panel=Panel.GALLERY)

SegmentsOption = Annotated[
    str | None,
    typer.Option(
        "--segments",
        metavar="ADDRESS",
        help="Place of the segments: file:///folder or s3://bucket/folder; default: [cluster] of the settings.",
    ),
]
_URL = "postgresql://user@host/database?gallery=NAME"


@gallery.command("import")
def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The gallery's folder; no process may write it meanwhile.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="URL", help=f"The new register: {_URL}")],
    segments: SegmentsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a gallery from a folder to a register in PostgreSQL. Templates are copied unchanged, and the folder is not changed."""
    moved = _moving().import_gallery(folder, to, _cluster(segments, config), _storage(config))
    _finish(moved, f"imported from {folder}", as_json)


@gallery.command()
def export(
    url: Annotated[str, typer.Argument(metavar="URL", help=f"The register: {_URL}")],
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="An absent or empty folder.")],
    segments: SegmentsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy one version of a register to a gallery in a folder. The register may be in use."""
    moved = _moving().export_gallery(url, to, _cluster(segments, config), _storage(config))
    _finish(moved, f"exported to {to}", as_json)


def _moving() -> Any:
    try:
        from biodedup.cluster import moving  # other commands need no psycopg
    except ImportError as error:
        raise InvalidInput(f"a register in PostgreSQL needs {error.name}; pip install 'biodedup[cluster]'") from error
    return moving


def _cluster(segments: str | None, file: Path | None) -> ClusterConfig:
    if segments is not None:
        return ClusterConfig(segments=segments)
    stated = settings(None, file).config.cluster
    if stated is None:
        raise InvalidInput(
            "the place of the segments is not stated; pass --segments file:///folder, or set [cluster] segments in the settings"
        )
    return stated


def _storage(file: Path | None) -> Storage:
    """The storage, with the key of an encrypted gallery if the settings state one."""
    return LocalStorage(settings(None, file).config.keys)


def _finish(moved: Any, done: str, as_json: bool) -> None:
    text = f"{done}: version {moved.version}, {counted(moved.rows, 'row')}, {counted(moved.segments, 'segment')} ({moved.byte_count:,} bytes)"
    finish(asdict(moved), text, as_json)
