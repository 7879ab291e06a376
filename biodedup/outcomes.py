"""The four outcomes of an encounter, each with its meaning, its exit code, and the operator's next step.

Owns this table, and the older words for these outcomes that tables still use. Never decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from biodedup.values import Outcome


@dataclass(frozen=True)
class Meaning:
    """meaning, action: sentences that begin in lower case. exit_code: the exit code of a command that ends with this outcome."""

    meaning: str
    exit_code: int
    action: str


MEANINGS: Mapping[Outcome, Meaning] = {
    "unique": Meaning("no enrolled subject and no open case is the same person; the subject is enrolled", 0, "nothing"),
    "duplicate": Meaning(
        "the same person is enrolled under another id; nothing is enrolled",
        10,
        "issue no second identity; look up the enrolled subject",
    ),
    "review": Meaning(
        "it is not certain whether this is an enrolled person; a case waits", 11, "a trained person judges the case"
    ),
    "refused": Meaning(
        "captures are missing or unusable; nothing is enrolled",
        12,
        "follow the reason: capture again, or repair the record, and send it again",
    ),
}

OLDER_WORDS: Mapping[str, Outcome] = {"enrolled": "unique", "adjudicate": "review"}
"""Older word -> outcome. The column `status` of `enroll-batch`, `kit ingest` and `status` keeps these words."""


def outcome_of(word: str) -> Outcome | None:
    """The outcome that a status word names, or None."""
    return cast(Outcome, word) if word in MEANINGS else OLDER_WORDS.get(word)
