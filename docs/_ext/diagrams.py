"""Draws the diagrams of the design pages as SVG files, which open offline: `python docs/_ext/diagrams.py`.

Owns docs/_static/architecture.svg and docs/_static/enrolment.svg. The pages show the files; the build of the site does not run this.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STATIC = Path(__file__).parents[1] / "_static"
INK, PALE, FILL, STORE = "#1f2d3d", "#5b6b7b", "#eaf2fb", "#fdf3e1"


def text(
    x: float, y: float, words: str, size: int = 14, *, anchor: str = "middle", ink: str = INK, weight: str = "400"
) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{ink}" font-weight="{weight}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, title: str, under: str = "", *, fill: str = FILL) -> str:
    """A rectangle with a title, and a smaller line under it."""
    middle = x + width / 2
    first = y + height / 2 + (5 if not under else -3)
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>']
    parts.append(text(middle, first, title, weight="600"))
    if under:
        parts.append(text(middle, first + 18, under, 12, ink=PALE))
    return "".join(parts)


def arrow(*points: tuple[float, float]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'


def save(name: str, width: int, height: int, title: str, parts: list[str]) -> None:
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
    )
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">'
    )
    body = [
        start,
        f"<title>{escape(title)}</title>",
        head,
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *parts,
    ]
    (STATIC / name).write_text("\n".join([*body, "</svg>", ""]))


def architecture() -> None:
    """The packages as layers; each may use those below it."""
    parts = [
        box(190, 20, 760, 50, "cli", "commands, exit codes"),
        box(190, 90, 760, 50, "jobs", "bulk enrolment, deduplication, evaluation, kits, merging, health: resumable"),
        box(190, 160, 760, 50, "engine", "prepare, search, decide, enrol, review, load"),
        box(190, 250, 370, 50, "embed", "model cards, networks, worker processes"),
        box(190, 320, 370, 50, "synthetic", "fingerprints of no real person"),
        box(190, 390, 370, 50, "capture", "reading, formats, quality gate"),
        box(580, 250, 370, 50, "search", "shards, scan, re-ranking, self-join"),
        box(580, 320, 370, 50, "gallery", "journal, sealed segments, encryption, repair"),
        box(580, 390, 370, 50, "match", "exact comparison, calibration, fusion"),
        box(
            190,
            480,
            760,
            50,
            "config, values, errors, trace, common",
            "settings, the values that travel, the error tree",
        ),
        box(20, 250, 130, 50, "models/", "cards and weights", fill=STORE),
        box(990, 320, 130, 50, "gallery folder", "SQLite, columns", fill=STORE),
        box(990, 160, 130, 50, "cluster", "register, front-ends"),
        box(990, 240, 130, 60, "PostgreSQL", "and segment store", fill=STORE),
        arrow((950, 185), (990, 185)),
        arrow((1055, 210), (1055, 240)),
        arrow((190, 275), (150, 275)),
        arrow((950, 345), (990, 345)),
        arrow((570, 70), (570, 90)),
        arrow((570, 140), (570, 160)),
    ]
    for x in (375, 765):
        parts += [arrow((x, low), (x, high)) for low, high in ((210, 250), (300, 320), (370, 390), (440, 480))]
    save("architecture.svg", 1140, 550, "Packages of biodedup: each may use those below it", parts)


STEPS = [
    ("engine/engine.py", "Engine.enroll: the public call"),
    ("engine/enrol.py", "answered before? then the same answer"),
    ("engine/prepare.py", "captures become a probe"),
    ("embed/extractor.py", "batches captures, runs the networks"),
    ("capture/faces/face.py, capture/fingers/finger.py", "decoded, aligned; quality gate"),
    ("engine/search.py", "callers who wait share one pass"),
    ("search/searcher.py", "candidates of the newest snapshot"),
    ("match/compare.py", "every capture, exactly; score in dB"),
    ("engine/search.py", "rows that were added since"),
    ("engine/decide.py", "thresholds of the policy in force"),
    ("match/judgement.py", "outcome, reasons, kinds of resemblance"),
    ("gallery/transaction.py", "row and decision, one sync of the disk"),
]


def enrolment() -> None:
    """The modules that one enrolment passes, in their order: without the lock on the left, under it on the right."""
    parts = [
        text(235, 34, "without the lock", 15, weight="600"),
        text(735, 34, "under the writer's lock", 15, weight="600"),
    ]
    left, right = STEPS[:8], STEPS[8:]
    for column, (steps, x) in enumerate(((left, 40), (right, 540))):
        for number, (module, does) in enumerate(steps):
            y = 50 + 68 * number
            parts.append(box(x, y, 390, 50, module, does, fill=STORE if module.startswith("gallery") else FILL))
            if number:
                parts.append(arrow((x + 195, y - 18), (x + 195, y)))
        if column == 0:
            parts.append(arrow((430, 50 + 68 * 7 + 25), (485, 50 + 68 * 7 + 25), (485, 75), (540, 75)))
    parts.append(arrow((735, 50 + 68 * 3 + 50), (735, 50 + 68 * 4 + 20)))
    parts.append(text(735, 50 + 68 * 4 + 40, "the decision is returned", 14))
    save("enrolment.svg", 970, 610, "The modules that one enrolment passes", parts)


if __name__ == "__main__":
    STATIC.mkdir(exist_ok=True)
    architecture()
    enrolment()
