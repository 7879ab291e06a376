"""Draws the diagrams of the design pages as SVG files, which open offline: `python docs/_ext/diagrams.py`.

Owns docs/_static/architecture.svg and docs/_static/enrolment.svg. The pages show the files; the build of the site does not run this.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STATIC = Path(__file__).parents[1] / "_static"
INK, PALE, FILL, STORE = "#1f2d3d", "#5b6b7b", "#eaf2fb", "#fdf3e1"


def text(
    x: float, y: float, words: str, size: int = 20, *, anchor: str = "middle", ink: str = INK, weight: str = "400"
) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{ink}" font-weight="{weight}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, title: str, under: str = "", *, fill: str = FILL) -> str:
    """A rectangle with a title, and a smaller line under it."""
    middle = x + width / 2
    first = y + height / 2 + (7 if not under else -4)
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>']
    parts.append(text(middle, first, title, weight="600"))
    if under:
        parts.append(text(middle, first + 23, under, 17, ink=PALE))
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
        box(215, 20, 710, 64, "cli", "commands, exit codes"),
        box(215, 104, 710, 64, "jobs", "bulk enrolment, deduplication, evaluation, kits, merging, health"),
        box(215, 188, 710, 64, "engine", "prepare, search, decide, enrol, review, load"),
        box(215, 292, 345, 64, "embed", "model cards, networks, workers"),
        box(215, 376, 345, 64, "synthetic", "fingerprints of no real person"),
        box(215, 460, 345, 64, "capture", "reading, formats, quality gate"),
        box(580, 292, 345, 64, "search", "shards, scan, re-ranking, self-join"),
        box(580, 376, 345, 64, "gallery", "journal, segments, encryption"),
        box(580, 460, 345, 64, "match", "exact comparison, fusion"),
        box(
            215,
            564,
            710,
            64,
            "config, values, errors, trace, common",
            "settings, the values that travel, the error tree",
        ),
        box(10, 292, 170, 64, "models/", "cards and weights", fill=STORE),
        box(960, 376, 170, 64, "gallery folder", "SQLite, columns", fill=STORE),
        box(960, 188, 170, 64, "cluster", "many front-ends"),
        box(960, 282, 170, 64, "PostgreSQL", "segment store", fill=STORE),
        arrow((925, 220), (960, 220)),
        arrow((1045, 252), (1045, 282)),
        arrow((215, 324), (180, 324)),
        arrow((925, 408), (960, 408)),
        arrow((570, 84), (570, 104)),
        arrow((570, 168), (570, 188)),
    ]
    for x in (387, 752):
        parts += [arrow((x, low), (x, high)) for low, high in ((252, 292), (356, 376), (440, 460), (524, 564))]
    save("architecture.svg", 1140, 648, "Packages of biodedup: each may use those below it", parts)


STEPS = [
    ("engine/engine.py", "Engine.enroll: the public call"),
    ("engine/enrol.py", "answered before? then the same answer"),
    ("engine/prepare.py", "captures become a probe"),
    ("embed/extractor.py", "batches captures, runs the networks"),
    ("capture/faces/face.py or fingers/finger.py", "decoded, aligned; quality gate"),
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
        text(235, 30, "without the lock", weight="600"),
        text(735, 30, "under the writer's lock", weight="600"),
    ]
    left, right = STEPS[:8], STEPS[8:]
    for column, (steps, x) in enumerate(((left, 10), (right, 510))):
        for number, (module, does) in enumerate(steps):
            y = 50 + 84 * number
            parts.append(box(x, y, 450, 64, module, does, fill=STORE if module.startswith("gallery") else FILL))
            if number:
                parts.append(arrow((x + 225, y - 20), (x + 225, y)))
        if column == 0:
            parts.append(arrow((460, 50 + 84 * 7 + 32), (485, 50 + 84 * 7 + 32), (485, 82), (510, 82)))
    parts.append(arrow((735, 50 + 84 * 3 + 64), (735, 50 + 84 * 4 + 20)))
    parts.append(text(735, 50 + 84 * 4 + 44, "the decision is returned"))
    save("enrolment.svg", 970, 730, "The modules that one enrolment passes", parts)


if __name__ == "__main__":
    STATIC.mkdir(exist_ok=True)
    architecture()
    enrolment()
