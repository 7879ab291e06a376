"""The four outcomes of an encounter: what each means, the exit code of a command that ends with it, and what an operator does.

Owns this table, and the older words for the same outcomes that tables keep. Never decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from biodedup.values import Outcome


@dataclass(frozen=True)
class Meaning:
    """meaning, action: sentences without a capital; exit_code: of a command whose result is this outcome."""

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
        "captures are missing or cannot be used; nothing is enrolled",
        12,
        "follow the reason: capture again, or repair the record, and send it again",
    ),
}

OLDER_WORDS: Mapping[str, Outcome] = {"enrolled": "unique", "adjudicate": "review"}
"""Words of the column `status` of `enroll-batch`, of `kit ingest` and of `status`, which stay as they are in JSON and tables."""


def outcome_of(word: str) -> Outcome | None:
    """The outcome that a status stands for; None for a status of another kind."""
    return cast(Outcome, word) if word in MEANINGS else OLDER_WORDS.get(word)
