"""The right to hand out templates.

Owns when it applies. Never reads a template.
"""

from __future__ import annotations

from biodedup.config import Config
from biodedup.engine.log import EngineLog
from biodedup.errors import NotAllowed


def note_export(config: Config, what: str, *, caller: str = "", subject_id: str = "") -> None:
    """Logs that templates are handed out. what: which, in words without ids; caller: "" for the program itself. Raises NotAllowed where
    `Config.allow_template_export` forbids it."""
    allowed = config.allow_template_export
    if allowed is False:
        raise NotAllowed(
            f"no templates are handed out, asked for {what}; set Config(allow_template_export=True) where they may leave the gallery"
        )
    stated = allowed is True or (config.identities is None and config.keys is None)
    EngineLog(config.log).handed_out(what, stated=stated, caller=caller, subject_id=subject_id)
