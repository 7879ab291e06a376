"""The exceptions of biodedup: one tree, three branches.

A poor capture is never an exception: it is a `Refusal` value. Texts say what, got, wanted, next, and hold no biometric data.

* `CallerError`: your mistake; the same call will fail again.
* `RetryableError`: nothing is wrong with the call; try again later.
* `DataDamaged`: stored data cannot be trusted; see `biodedup doctor`.
"""

from __future__ import annotations

from biodedup.texts import shown


class BiodedupError(Exception):
    """Every exception that biodedup raises on purpose."""

    def __str__(self) -> str:
        """One line, safe to print and to log whatever ids and file names are in it."""
        return shown(super().__str__())


class CallerError(BiodedupError, ValueError):
    """Your mistake."""


class RetryableError(BiodedupError):
    """Try again."""


class DataDamaged(BiodedupError):
    """Stored data cannot be trusted."""


class InvalidInput(CallerError):
    """A value of the wrong type, shape or range."""


class ModelMismatch(CallerError):
    """Templates of two models, or of two dimensions, do not compare."""


class ModelCardError(CallerError):
    """A model card or its weights are missing or inconsistent."""


class SubjectExists(CallerError):
    """The subject_id is already enrolled."""


class UnknownSubject(CallerError):
    """The subject_id is not enrolled."""


class EncounterConflict(CallerError):
    """The encounter_id was used before, with other content."""


class NotAGallery(CallerError):
    """The folder is not a biodedup gallery, or one of another format version."""


class PolicyMismatch(CallerError):
    """A gallery was opened with another policy than the one that it keeps."""


class EngineClosed(CallerError):
    """The engine was closed."""


class UnknownKit(CallerError):
    """A batch file is signed by a key that is not among the trusted ones."""


class GalleryBusy(RetryableError):
    """Another process holds the gallery for writing."""


class StorageUnavailable(RetryableError):
    """The disk refused a read or a write: full, read-only, or failing. Nothing was acknowledged."""


class OutOfMemory(RetryableError):
    """The machine's memory did not suffice. Nothing was acknowledged, and the engine stays usable."""


class CaptureUnavailable(RetryableError):
    """A capture's file is absent or cannot be read. Nothing was recorded of its encounter. reason: as of a refusal."""

    def __init__(self, text: str, reason: str = "unreadable") -> None:
        super().__init__(text)
        self.reason = reason


NOT_TAKEN = (CallerError, CaptureUnavailable)
"""What costs one encounter of a batch, and is not recorded."""


class GalleryDamaged(DataDamaged):
    """The gallery's files contradict themselves."""


class BatchDamaged(DataDamaged):
    """A field kit's batch file is not what the kit signed."""
