"""The right to export templates.

Owns the check of this right and its log message. Never reads a template.
"""

from __future__ import annotations

from biodedup.config import Config
from biodedup.engine.log import EngineLog
from biodedup.errors import NotAllowed


def note_export(config: Config, what: str, *, caller: str = "", subject_id: str = "") -> None:
    """Logs an export of templates. what: a description without ids; caller: "" for the program itself. Raises NotAllowed if
    `Config.allow_template_export` forbids it."""
    allowed = config.allow_template_export
    if allowed is False:
        raise NotAllowed(
            f"templates must not leave the gallery, asked for {what}; set Config(allow_template_export=True) to allow it"
        )
    stated = allowed is True or (config.identities is None and config.keys is None)
    EngineLog(config.log).handed_out(what, stated=stated, caller=caller, subject_id=subject_id)
