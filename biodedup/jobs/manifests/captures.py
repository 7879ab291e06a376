"""Finds the captures of a job on disk: in a folder of images, or in a manifest (a table) with one row for each capture.

Owns the format of such a source, the report of skipped files and rows, and the digest that tells a resumed job whether files changed. Never
decodes an image.

1. Everything that is skipped is reported. Files that are not images are counted by suffix, and the first 1,000 are named with the reason.
   Rows that cannot be used are named by their number.
2. A bad cell makes only its row unusable. An unusual file name makes nothing unusable.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biodedup.errors import InvalidInput
from biodedup.jobs.manifests.fields import CaptureCell, Unusable, capture_of, check_fields, id_of, located, subject_of
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.manifests.tables import TableFile
from biodedup.texts import shown, writable
from biodedup.values import Capture, Face, Finger, Refusal

IMAGE_SUFFIXES = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".j2c", ".jpx", ".jpf", ".bmp", ".dib", ".tif", ".tiff"),
        *(".wsq", ".pgm", ".ppm", ".pbm", ".pnm", ".webp", ".gif"),
    )
)  # fmt: skip
RESERVED = ("subject_id", "path", "position", "dpi", "encounter_id")
"""Columns of a manifest that this module reads. Other columns describe the subject or the capture."""

_APPLE_DOUBLE, _NO_SUFFIX = "._*", "no suffix"
_MAGIC = (
    *(b"\x89PNG", b"\xff\xd8\xff", b"\xff\xa0\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ", b"GIF8", b"II*\0", b"MM\0*"),
)  # fmt: skip
_NAMED_MAX = 1000
_FILES_LISTED = 10
_RAW_SUFFIXES = frozenset(
    (".cr2", ".nef", ".arw", ".dng", ".orf", ".rw2", ".pef", ".srw")
)  # TIFF files by their first bytes
_PORTABLE = re.compile(rb"P[1-6]\s+[\d#]")
_OTHER_KINDS = (
    *((b"%PDF", "a PDF"), (b"PK\3\4", "a ZIP archive or an office document"), (b"\xd0\xcf\x11\xe0", "an office document")),
    *((b"Rar!", "a RAR archive"), (b"7z\xbc\xaf", "a 7z archive"), (b"FMR\0", "a minutiae record"), (b"FIR\0", "an ISO finger record")),
    *((b"FAC\0", "an ISO face record"), (b"8BPS", "a Photoshop file"), (b"SQLite", "a database")),
)  # fmt: skip
_MEDIA = {
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"mif1": "HEIC",
    b"msf1": "HEIC",
    b"avif": "AVIF",
    b"crx ": "a raw photograph",
}


@dataclass(frozen=True)
class RefusedRow:
    """A row of a manifest that cannot be used. subject_id: None if the row has no usable id."""

    number: int
    subject_id: str | None
    refusal: Refusal

    @property
    def sentence(self) -> str:
        return f"row {self.number} refused: {self.refusal.detail or self.refusal.reason}"


@dataclass(frozen=True)
class LeftOut:
    """Files and rows that a job skipped. files: suffix -> number of files; reasons: path -> reason, for the first 1,000 files."""

    files: Mapping[str, int] = field(default_factory=dict)
    rows: tuple[RefusedRow, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.files or self.rows)

    def sentences(self, rows_max: int = 20, files_max: int = _FILES_LISTED) -> list[str]:
        """The report as sentences. rows_max, files_max: how many rows and files it names."""
        report = [row.sentence for row in self.rows[:rows_max]]
        if len(self.rows) > rows_max:
            report.append(f"... and {len(self.rows) - rows_max:,} more rows")
        if self.files:
            count = sum(self.files.values())
            by_suffix = ", ".join(f"{suffix} {n:,}" for suffix, n in self.files.items())
            report.append(f"{count:,} file{'s' if count > 1 else ''} left out: {by_suffix}")
        report += [f"  {path}: {why}" for path, why in list(self.reasons.items())[:files_max]]
        return report

    def to_dict(self) -> dict[str, Any]:
        """The report, JSON-ready. It names at most the first 1,000 rows."""
        rows = [
            {"row": r.number, "subject_id": r.subject_id, "reason": r.refusal.reason, "detail": r.refusal.detail}
            for r in self.rows[:_NAMED_MAX]
        ]
        files = {"files_left_out": dict(self.files), "left_out_files": dict(self.reasons)}
        return files | {"rows_refused": len(self.rows), "refused_rows": rows}


@dataclass(frozen=True)
class Row:
    """One capture of a manifest. other_columns: name -> cell, for columns that are not in `RESERVED`."""

    number: int
    subject_id: str
    capture: Face | Finger
    encounter_id: str | None = None
    other_columns: dict[str, Any] = field(default_factory=dict)


# folders ------------------------------------------------------------------------------------------------------------


def images_of(folder: Path) -> tuple[dict[str, Path], LeftOut]:
    """Finds the images in a folder. Returns (name -> path relative to the folder, in a fixed order; the skipped files).

    A file is an image by its suffix, or else by its first bytes. The name is the relative path with `/`; bytes that are not UTF-8 are written
    as `\\xe9`.
    """
    found: dict[str, Path] = {}
    left_out: Counter[str] = Counter()
    reasons: dict[str, str] = {}

    def leave_out(path: Path, kind: str, why: str) -> None:
        left_out[kind] += 1
        if len(reasons) < _NAMED_MAX:
            reasons[shown(path.relative_to(folder))] = why

    for path in _files(folder, leave_out):
        suffix = path.suffix.lower()
        if path.name.startswith("._"):
            leave_out(path, _APPLE_DOUBLE, "a file that macOS writes beside each file on a memory stick")
            continue
        why = None if suffix in IMAGE_SUFFIXES else no_image(path)
        if why is not None:
            leave_out(path, shown(suffix[:20]) or _NO_SUFFIX, why)
            continue
        relative = path.relative_to(folder)
        name = writable(relative.as_posix())
        while name in found:  # a file name with a real backslash can look like an escaped byte of another name
            name += "~"
        found[name] = relative
    return found, LeftOut(dict(sorted(left_out.items(), key=lambda entry: (-entry[1], entry[0]))), reasons=reasons)


def _files(folder: Path, leave_out: Callable[[Path, str, str], None]) -> Iterator[Path]:
    """All files below a folder, sorted. Linked and unreadable folders are passed to leave_out(path, kind, reason)."""

    def unreadable(error: OSError) -> None:
        leave_out(Path(error.filename), "unreadable folder", "the folder cannot be read; check its permissions")

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders.sort()
        for linked in filter(os.path.islink, _in(parent, folders)):
            leave_out(Path(linked), "linked folder", "a link to a folder is not followed")
        yield from map(Path, _in(parent, sorted(names)))


def _in(parent: str, names: Sequence[str]) -> list[str]:
    return [os.path.join(parent, name) for name in names]


def is_image(path: Path) -> bool:
    """Whether the first bytes of a file are those of an image format that is read."""
    return no_image(path) is None


def no_image(path: Path) -> str | None:
    """The reason why a file is not a readable image, by its first bytes; None if it is an image."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "not a file"
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return "the file cannot be read"
    if path.suffix.lower() in _RAW_SUFFIXES:
        return "a raw photograph, which is not read; save it as JPEG or PNG"
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)
    if head.startswith(_MAGIC) or _PORTABLE.match(head) or bitmap or (head[:4] == b"RIFF" and head[8:] == b"WEBP"):
        return None
    if head[4:8] == b"ftyp":
        return f"{_MEDIA.get(head[8:12], 'a video')}, which is not read; save it as JPEG or PNG"
    kind = next((kind for mark, kind in _OTHER_KINDS if head.startswith(mark)), None)
    return (
        "empty"
        if not head
        else "its first bytes are not those of an image"
        if kind is None
        else f"{kind}, not an image"
    )


def no_images(folder: Path, left_out: LeftOut) -> InvalidInput:
    """The error for a folder without images."""
    report = "".join(f"; {sentence}" for sentence in left_out.sentences(files_max=0))
    return InvalidInput(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){report}; name another folder")


def label_of(relative: Path) -> str | None:
    """The name of the first-level folder of an image; None if the image is not in a subfolder."""
    return writable(relative.parts[0]) if len(relative.parts) > 1 else None


# manifests ----------------------------------------------------------------------------------------------------------


def read_rows(
    manifest: Path, options: TableOptions = DEFAULT_OPTIONS, *, carried: bool = False
) -> tuple[list[Row], LeftOut]:
    """Reads a manifest with one row for each capture. Returns (the usable rows, the refused rows).

    Required columns: subject_id and path (relative to the manifest). Optional columns: position (`face`, or the position of a finger), dpi and
    encounter_id. carried: further columns, which describe the subject, are kept. Raises InvalidInput if the file is not such a manifest.
    """
    table = TableFile(manifest, options)
    absent = {"subject_id", "path"} - set(table.names)
    if absent:
        raise InvalidInput(
            f"{manifest} lacks the columns {sorted(absent)}; it has {table.names}. Map each to its name in the file: --column subject_id=NAME"
        )
    options.check_columns(table.names, (*RESERVED, "missing"), manifest, carried=carried)
    rows: list[Row] = []
    refused: list[RefusedRow] = []
    for number, cells in table.rows():
        subject_id = None
        try:
            check_fields(cells)
            subject_id = subject_of(cells)
            rows.append(_row(number, subject_id, cells, manifest.parent))
        except Unusable as error:
            refused.append(RefusedRow(number, subject_id, error.refusal))
    return rows, LeftOut(rows=tuple(refused))


def _row(number: int, subject_id: str, cells: Mapping[str, Any], folder: Path) -> Row:
    cell = capture_of(cells)
    if not isinstance(cell, CaptureCell) or not isinstance(cell.source, str):
        raise Unusable("no_capture", "the row names no path")
    capture = cell.capture(located(folder, cell.source))
    other_columns = {name: value for name, value in cells.items() if name not in RESERVED}
    return Row(number, subject_id, capture, id_of(cells, "encounter_id"), other_columns)


def mark_of(name: str, captures: Sequence[Capture]) -> str:
    """A digest of some captures that changes with the size or time of a file, so that a resumed job knows which work is done."""
    digest = hashlib.sha256(name.encode())
    for capture in captures:
        assert isinstance(capture, (Face, Finger)) and isinstance(capture.data, Path), "these captures are files"
        digest.update(f"\0{capture.column}\0{getattr(capture, 'dpi', None)}\0".encode() + os.fsencode(capture.data))
        try:
            status = capture.data.stat()
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}".encode())
        except OSError:
            digest.update(b"\0absent")
    return digest.hexdigest()
