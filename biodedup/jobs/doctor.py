"""`doctor`: can the installation and a gallery be trusted?

Owns the list of checks. Never repairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from biodedup.embed.cards import shipped_cards
from biodedup.engine import Engine
from biodedup.errors import BiodedupError


@dataclass(frozen=True)
class Report:
    """checked: what was found sound; problems: what was not."""

    checked: tuple[str, ...]
    problems: tuple[str, ...]


def examine(gallery: Path | None) -> Report:
    """Verifies the digest of every shipped model and, with a gallery, every page and every rule of its tables.

    Raises what opening a gallery raises: NotAGallery, GalleryDamaged, StorageUnavailable.
    """
    checked, problems = [], []
    for card in shipped_cards():
        try:
            card.verify()
            checked.append(f"model {card.model_id}")
        except BiodedupError as error:
            problems.append(str(error))
    if gallery is not None:
        with Engine.open(gallery, read_only=True) as engine:
            found = engine.problems()
            if found:
                problems.extend(f"gallery {gallery}: {problem}" for problem in found)
            else:
                checked.append(f"gallery {gallery}: {len(engine):,} subjects, version {engine.gallery_version}")
    return Report(tuple(checked), tuple(problems))
