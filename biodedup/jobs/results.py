"""Result files: tables, JSON and HTML pages, replaced whole and never half-written.

Owns how a result reaches the disk, and the look that all pages share (`templates/base.html`). Pages are one file each, open
without a network, and run no scripts. Never decides what is in them.

What is written is data: pages and JSON have hidden characters as escapes, and a cell that a spreadsheet would run as a formula gets
an apostrophe before it (`jobs/spreadsheet.py`; our own readers take it away again). Parquet has every text as it is.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from biodedup.errors import InvalidInput
from biodedup.gallery.gallery import translated
from biodedup.gallery.private import create_private
from biodedup.jobs.spreadsheet import disarmed
from biodedup.texts import json_text, shown


def check_table_name(path: Path) -> None:
    """Before hours of work: raises InvalidInput for a name that `write_table` could not write."""
    if path.suffix not in (".parquet", ".csv"):
        raise InvalidInput(f"the result is named {path.name}; end it with .parquet or .csv")


def write_table(table: pa.Table, path: Path) -> None:
    """As Parquet or CSV, by the name. Raises StorageUnavailable."""
    check_table_name(path)
    with translated(f"writing {path}"), new_file(path) as temporary:
        if path.suffix == ".csv":
            pa.csv.write_csv(disarmed(table), temporary)
        else:
            pa.parquet.write_table(table, temporary)


def write_text(text: str, path: Path) -> None:
    """Raises StorageUnavailable."""
    with translated(f"writing {path}"), new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(document: Any, path: Path) -> None:
    """Raises StorageUnavailable."""
    write_text(json_text(document), path)


def write_page(path: Path, template: str, **content: Any) -> None:
    """Renders a page of `templates/`. What is not `Markup` is escaped. Raises StorageUnavailable."""
    write_text(_PAGES.get_template(template).render(**content), path)


def picture(image: NDArray[np.uint8], *, side_px_max: int = 480) -> Markup:
    """An image, grey (h, w) or RGB (h, w, 3), for the `src` of an <img>. It is biometric data: for pages that were asked for."""
    scale = min(1.0, side_px_max / max(image.shape[:2]))
    if scale < 1:
        image = np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
    encoded = cv2.imencode(".jpg", image[..., ::-1] if image.ndim == 3 else image, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    return Markup("data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode())


def drawing(figure: Any) -> Markup:
    """A matplotlib figure as inline SVG, the same for the same figure."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "biodedup", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """An empty file of its owner's alone, which gets its name when it is written and synced, and is removed after a failure."""
    temporary = path.with_name(f".{path.stem}.new{path.suffix}")
    os.close(create_private(temporary))
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _visible(value: Any) -> Any:
    """What a template is about to print, with its hidden characters shown; what is HTML already was made of such."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else shown(value, keep="\n\t")


def _thousands(number: float) -> str:
    return f"{number:,}"


def _percent(share: float | None, digits: int = 2) -> str:
    return "" if share is None else f"{share * 100:.{digits}f} %"


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


_PAGES = Environment(
    loader=PackageLoader("biodedup.jobs"),
    autoescape=True,
    finalize=_visible,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters |= {"thousands": _thousands, "percent": _percent, "db": _decibels, "moment": _moment}
