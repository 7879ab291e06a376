"""Log messages of the engine: decisions, verdicts, loads, removals, policies and slow searches.

Owns the text of these messages. They never contain biometric data, scores, paths of captures, or the names of people who judged. They
contain ids only if `LogConfig.ids` is set. docs/reference/logging.md lists them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from biodedup.config import LogConfig
from biodedup.texts import shown
from biodedup.values import Decision

_engine = logging.getLogger("biodedup.engine")
_search = logging.getLogger("biodedup.search")


@dataclass(frozen=True)
class EngineLog:
    """Writes the messages of one engine. Call it only after the commit is durable. Thread-safe."""

    config: LogConfig

    def decided(self, operation: str, decision: Decision, *, level: int = logging.INFO) -> None:
        """A decision was made. operation: `enroll`, `update`, ..."""
        if not _engine.isEnabledFor(level):
            return
        why = "".join(f", {reason}" for reason in decision.reasons)
        why += "".join(f", {refusal.column} {refusal.reason}" for refusal in decision.refusals)
        _engine.log(
            level,
            "decision: %s is %s%s%s; %d candidates of %d subjects, version %d%s",
            operation,
            decision.outcome,
            why,
            ", incomplete" if decision.incomplete else "",
            len(decision.candidates),
            decision.gallery_size,
            decision.gallery_version,
            self._named(subject=decision.subject_id, encounter=decision.encounter_id),
        )

    def judged(self, ruling: str, decision: Decision, closed: int) -> None:
        """A verdict was recorded. decision: the present decision of the case; closed: the number of linked cases that it closed as well."""
        if _engine.isEnabledFor(logging.INFO):
            named = self._named(subject=decision.subject_id, encounter=decision.encounter_id)
            _engine.info(
                "verdict: %s, the case is %s; %d linked cases closed%s", ruling, decision.outcome, closed, named
            )

    def loaded(self, added: int, present: int, conflicting: int, refused: int = 0) -> None:
        _engine.info(
            "loaded without a search: %d subjects added, %d present, %d conflicting, %d refused",
            added,
            present,
            conflicting,
            refused,
        )

    def removed(self, subject_ids: Sequence[str]) -> None:
        _engine.info("removed %d subjects%s", len(subject_ids), self._named(subjects=" ".join(subject_ids)))

    def policy_set(self, version: int) -> None:
        _engine.info("policy: version %d is in force", version)

    def locked_out(self, caller: str, subject_id: str) -> None:
        """A caller was locked out. `Engine.alarms` names the caller and the subject."""
        named = self._named(caller=caller, subject=subject_id)
        _engine.error(
            "alarm: a caller is locked out from a subject, because its failed verifications approach it%s", named
        )

    def asked(self, action: str, number: int, *, approved: bool) -> None:
        """A call that needs two people was stored as a request, or a second person approved it."""
        state = "is approved by a second person" if approved else "waits for a second person"
        _engine.info("request %d: %s %s", number, action, state)

    def handed_out(self, what: str, *, stated: bool, caller: str = "", subject_id: str = "") -> None:
        """Templates left the gallery. what: a description without ids; stated: whether the export is allowed explicitly, or nothing needs
        protection."""
        named = self._named(caller=caller, subject=subject_id)
        if stated:
            _engine.info("templates are handed out: %s%s", what, named)
        else:
            _engine.warning("templates are handed out: %s; state Config(allow_template_export=...)%s", what, named)

    def searched_again(self) -> None:
        """At a commit, candidates of the search were removed or do not count, so that all rows are searched again."""
        _search.debug("second round: all rows are searched again at the commit, because candidates do not count")

    @contextmanager
    def timed(self, probes: int, rows: int) -> Iterator[None]:
        """Warns if the search in the block takes longer than `LogConfig.slow_search_ms`. probes, rows: their numbers, for the message."""
        began = time.perf_counter()
        yield
        took_ms = 1000 * (time.perf_counter() - began)
        if took_ms > self.config.slow_search_ms:
            limit_ms = self.config.slow_search_ms
            _search.warning(
                "slow search: %.0f ms for %d probes in %d rows, limit %g ms", took_ms, probes, rows, limit_ms
            )

    def _named(self, **ids: str | None) -> str:
        """The ids as the end of a message; empty unless `LogConfig.ids` is set."""
        if not self.config.ids:
            return ""
        return "".join(f"; {name} {shown(value)}" for name, value in ids.items() if value)
