"""Writes the HTML pages of jobs: each page is one file without scripts, which can be read offline.

Owns the common layout (`templates/base.html`) and the filters of the templates. Never decides the content. Texts are escaped, and hidden
characters are made visible.
"""

from __future__ import annotations

import base64
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from biodedup.jobs.shared.files import write_text
from biodedup.texts import shown


def write_page(path: Path, template: str, **content: Any) -> None:
    """Renders a template of `templates/`. Values other than `Markup` are escaped. Raises StorageUnavailable."""
    write_text(PAGES.get_template(template).render(**content), path)


def picture(image: NDArray[np.uint8], *, side_px_max: int = 480) -> Markup:
    """An image, grey (h, w) or RGB (h, w, 3), as a data URL for the `src` of an <img>. It is biometric data: only a page that the caller
    requested may hold it."""
    scale = min(1.0, side_px_max / max(image.shape[:2]))
    if scale < 1:
        image = np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
    encoded = cv2.imencode(".jpg", image[..., ::-1] if image.ndim == 3 else image, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    return Markup("data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode())


def drawing(figure: Any) -> Markup:
    """A matplotlib figure as inline SVG. The same figure always gives the same bytes."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "biodedup", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


def _visible(value: Any) -> Any:
    """A value that a template prints, with its hidden characters made visible. `Markup` is unchanged: its texts were treated before."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else shown(value, keep="\n\t")


def _thousands(number: float) -> str:
    return f"{number:,}"


def _percent(share: float | None, digits: int = 2) -> str:
    return "" if share is None else f"{share * 100:.{digits}f} %"


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


PAGES = Environment(
    loader=PackageLoader("biodedup.jobs.shared"),
    autoescape=True,
    finalize=_visible,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters |= {"thousands": _thousands, "percent": _percent, "db": _decibels, "moment": _moment}
