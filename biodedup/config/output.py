"""Settings of printed and logged text: the register's words for outcomes, and the log.

Owns their defaults and their ranges. Never writes a log message.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from biodedup.common.arguments import check_fields
from biodedup.config.ranges import check_range
from biodedup.errors import InvalidInput
from biodedup.outcomes import MEANINGS, outcome_of
from biodedup.values import check_text

_LABEL_LENGTH_MAX = 40


@dataclass(frozen=True)
class LabelConfig:
    """The register's own words for the four outcomes, in printed lines, pages, and the column `label` of tables. JSON and the column
    `outcome` keep the library's words. Empty: the library's word."""

    unique: str = ""
    """The subject is enrolled."""
    duplicate: str = ""
    """The same person is enrolled under another id."""
    review: str = ""
    """A case waits for a person's verdict."""
    refused: str = ""
    """Captures are missing or unusable."""

    def __post_init__(self) -> None:
        check_fields(self)
        for outcome in MEANINGS:
            word = getattr(self, outcome)
            check_text(word, f"label {outcome}", _LABEL_LENGTH_MAX)
            if "\n" in word or word != word.strip():
                raise InvalidInput(f"label {outcome} is {word!r}, wanted one line without spaces around it")
        words = [self.of(outcome) for outcome in MEANINGS]
        if len(set(words)) < len(words):
            raise InvalidInput(
                f"unique, duplicate, review, refused are {', '.join(words)}, wanted four different words"
            )

    def of(self, outcome: str) -> str:
        """The label of an outcome, or of an older word for it (`enrolled`, `adjudicate`). Returns any other text unchanged."""
        known = outcome_of(outcome)
        return outcome if known is None else getattr(self, known) or known


@dataclass(frozen=True)
class LogConfig:
    """Settings of the loggers `biodedup.*`; docs/reference/logging.md lists their messages. No setting makes them log biometric data."""

    ids: bool = False
    """Whether messages about decisions, verdicts and removals name the encounter_id and subject_id."""
    slow_search_ms: float = 5_000.0
    """Time in milliseconds from which a search is logged as a warning of `biodedup.search`. It includes the wait for other searches."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, 0, inf, "slow_search_ms")
