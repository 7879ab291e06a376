"""Defines the options that several commands have, and parses their values.

Owns names, help texts and parsers. Never opens a gallery.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from biodedup.errors import InvalidInput
from biodedup.values import COLUMNS, Capture, Face, Finger, Missing


class RegisterUrl(str):
    """The URL of a register in PostgreSQL, given in place of a gallery's folder."""


def gallery_of(given: str | Path) -> Path | RegisterUrl:
    """Parses `--gallery`. given: a text, or the default as a Path."""
    is_register = isinstance(given, str) and given.startswith(("postgresql:", "postgres:"))
    return RegisterUrl(given) if is_register else Path(given)


def refuse_register(gallery: Any) -> Any:
    """The callback of options that accept only a folder. Raises InvalidInput for the URL of a register."""
    if isinstance(gallery, RegisterUrl):
        raise InvalidInput(
            "this command needs a gallery in a folder, but a register in PostgreSQL was named; copy the register to a folder with "
            "`biodedup gallery export URL --to FOLDER`, and name the folder"
        )
    return gallery


FolderOption = Annotated[
    Path,
    typer.Option(
        "--gallery",
        "-g",
        envvar="BIODEDUP_GALLERY",
        metavar="FOLDER",
        parser=gallery_of,
        callback=refuse_register,
        help="The gallery's folder; enroll and load create it.",
    ),
]


GalleryOption = Annotated[
    Any,  # a Path or a RegisterUrl
    typer.Option(
        "--gallery",
        "-g",
        envvar="BIODEDUP_GALLERY",
        metavar="FOLDER|URL",
        parser=gallery_of,
        help="The gallery's folder, which enroll and load create; or a register, postgresql://user@host/database?gallery=NAME, which needs "
        "the table `cluster` in the settings.",
    ),
]


PersonOption = Annotated[
    str, typer.Option("--by", help="The person who runs the command; one of `identities`, if the settings name any.")
]


PurposeOption = Annotated[
    str,
    typer.Option(
        "--purpose",
        help="The purpose of the call, for the audit log; needs --by. With --by, a command that only reads opens the gallery for writing, "
        "to record the call.",
    ),
]


SignOption = Annotated[
    Path | None,
    typer.Option(
        "--sign",
        help="The private key of the person of --by (`biodedup log key`). It signs requests and approvals of actions that need two people.",
    ),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads for extraction and search.")]


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Settings file, TOML. Default: the file named in BIODEDUP_CONFIG, or biodedup.toml beside the gallery.",
    ),
]


FaceOption = Annotated[list[Path] | None, typer.Option("--face", help="A face image.")]


FingerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--finger", metavar="[POSITION=]PATH", help="A finger image or minutiae record, such as right_index=ri.wsq."
    ),
]


MissingOption = Annotated[
    list[str] | None,
    typer.Option("--missing", metavar="POSITION=REASON", help="A capture that cannot be taken, and the reason."),
]


DpiOption = Annotated[
    float | None, typer.Option("--dpi", help="Resolution of the finger images, if the files state none.")
]


EncounterOption = Annotated[
    str | None,
    typer.Option(
        "--encounter-id",
        help="The id of the encounter. If it is sent again with the same content, it gets the same decision.",
    ),
]


GroupOption = Annotated[
    list[str] | None, typer.Option("--group", help="A group of the subject, or a group to search. Repeatable.")
]


WaitOption = Annotated[
    float,
    typer.Option(
        "--wait", metavar="SECONDS", min=0, help="How long to wait while another process holds the gallery for writing."
    ),
]


AcrossOption = Annotated[
    bool,
    typer.Option(
        "--across-positions", help="Compare each finger with fingers of all positions, in case labels are wrong."
    ),
]


ModelIdOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-id",
        metavar="[COLUMN=]ID",
        help="The model of the embeddings (lists of floats), such as arcface-r50-1; needed if the gallery has no model for the column yet.",
    ),
]


IndexOption = Annotated[
    list[str] | None,
    typer.Option(
        "--index",
        metavar="[COLUMN=]ENGINE",
        help="The index engine of a new gallery: native, or faiss:FACTORY, such as faiss:IVF2048,PQ64x4fs. Repeatable by column.",
    ),
]


RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Do the work on a Ray cluster: host:port, or auto for the cluster that this machine belongs to. The result is the same.",
    ),
]


DEFAULT_GALLERY = Path("gallery")


def model_ids(texts: list[str] | None) -> str | dict[str, str] | None:
    """Parses `--model-id`: one model_id for all columns, or column -> model_id."""
    by_column = {}
    for text in texts or ():
        column, separator, model_id = text.partition("=")
        if not separator or column not in COLUMNS:
            if len(texts or ()) > 1:
                raise InvalidInput(
                    f"--model-id {text} does not name a column; with several, write COLUMN=ID, such as face={text}"
                )
            return text
        by_column[column] = model_id
    return by_column or None


def index_engines(texts: list[str] | None) -> str | dict[str, str] | None:
    """Parses `--index`: one index engine for all columns, or column -> engine."""
    by_column = {}
    for text in texts or ():
        column, separator, spec = text.partition("=")
        if not separator or column not in (*COLUMNS, "*"):
            if len(texts or ()) > 1:
                raise InvalidInput(
                    f"--index {text} does not name a column; with several, write COLUMN=ENGINE, such as face={text}"
                )
            return text
        by_column[column] = spec
    return by_column or None


def _position(written: str) -> str:
    """A position by any name that tables may use, such as RI; a name that is not known is returned unchanged."""
    from biodedup.jobs.manifests.fields import (
        Unusable,
        position_of,
    )  # imported here, so that --help does not load pyarrow

    try:
        return position_of(written) if written else written
    except Unusable:
        return written


def captures_of(
    faces: list[Path] | None, fingers: list[str] | None, missing: list[str] | None, dpi: float | None
) -> list[Capture]:
    """The captures of the options `--face`, `--finger`, `--missing` and `--dpi`. Raises InvalidInput if there is none."""
    captures: list[Capture] = [Face(path) for path in faces or ()]
    for text in fingers or ():
        position, separator, path = text.partition("=")
        captures.append(Finger(path, _position(position), dpi) if separator else Finger(text, dpi=dpi))
    for text in missing or ():
        position, _, reason = text.partition("=")
        captures.append(Missing(_position(position), reason or "not stated"))
    if all(isinstance(capture, Missing) for capture in captures):
        raise InvalidInput("no capture was given; pass --face PATH or --finger POSITION=PATH")
    return captures
