"""The exceptions of biodedup, in three branches.

* `CallerError`: the call is wrong; the same call will fail again.
* `RetryableError`: nothing is wrong with the call; try again later.
* `DataDamaged`: stored data cannot be trusted; run `biodedup doctor`.

A poor capture is never an exception but a `Refusal` value. Error texts say what is wrong, the value that was given, the
value that is wanted, and what to do next. They hold no biometric data.
"""

from __future__ import annotations

from biodedup.texts import shown


class BiodedupError(Exception):
    """Every exception that biodedup raises on purpose."""

    def __str__(self) -> str:
        """One line without hidden characters, safe to print and to log with any id or file name in it."""
        return shown(super().__str__())


class CallerError(BiodedupError, ValueError):
    """The call is wrong; the same call will fail again."""


class RetryableError(BiodedupError):
    """Nothing is wrong with the call; try again later."""


class DataDamaged(BiodedupError):
    """Stored data cannot be trusted."""


class InvalidInput(CallerError):
    """A value of the wrong type, shape or range."""


class ModelMismatch(CallerError):
    """Templates of two models, or of two dimensions, cannot be compared."""


class ModelCardError(CallerError):
    """A model card or its weights are missing or inconsistent."""


class SubjectExists(CallerError):
    """The subject_id is already enrolled."""


class UnknownSubject(CallerError):
    """The subject_id is not enrolled."""


class EncounterConflict(CallerError):
    """The encounter_id was used before, with other content."""


class NotAGallery(CallerError):
    """The folder is not a biodedup gallery, or is a gallery of another format version."""


class PolicyMismatch(CallerError):
    """A gallery was opened with a policy that differs from its stored policy."""


class IndexMismatch(CallerError):
    """A gallery was opened with an index engine that differs from its stored engine."""


class KeyMismatch(CallerError):
    """The key does not fit the gallery: an encrypted gallery was opened without its key, or an unencrypted gallery with a key."""


class EngineClosed(CallerError):
    """The engine was closed."""


class NotAllowed(CallerError):
    """The caller's roles, or the gallery's rules, do not allow this call. Nothing was done."""


class UnknownKit(CallerError):
    """A batch file is signed by a key that is not trusted."""


class GalleryBusy(RetryableError):
    """Another process holds the gallery for writing."""


class StorageUnavailable(RetryableError):
    """The disk refused a read or a write: full, read-only, or failing. Nothing was acknowledged."""


class OutOfMemory(RetryableError):
    """The machine has too little free memory. Nothing was acknowledged, and the engine stays usable."""


class CaptureUnavailable(RetryableError):
    """A capture's file is absent or cannot be read. The encounter was not recorded. reason: the reason of a refusal, such as `missing_file`."""

    def __init__(self, text: str, reason: str = "unreadable") -> None:
        super().__init__(text)
        self.reason = reason


class BudgetExhausted(RetryableError):
    """The caller has used up its calls, or all callers together have used up the calls for this subject (`Policy`). A service answers with
    HTTP 429.

    retry_after_s: the time in seconds after which the same call may be made again, for the header `Retry-After`.
    """

    def __init__(self, text: str, retry_after_s: float = 0.0) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class LockedOut(BudgetExhausted):
    """The scores of the caller's failed verifications of a subject rose step by step (hill climbing). The caller may not verify this subject
    until the lock-out ends. `Engine.alarms` lists it."""


class ApprovalNeeded(RetryableError):
    """The call needs two people. It was stored as a request and not carried out; another principal has to approve it. number: the request's
    number."""

    def __init__(self, text: str, number: int = 0) -> None:
        super().__init__(text)
        self.number = number


NOT_TAKEN = (CallerError, CaptureUnavailable)
"""Errors that concern a single encounter of a batch. The encounter is not recorded."""


class GalleryDamaged(DataDamaged):
    """The gallery's files contradict themselves."""


class BatchDamaged(DataDamaged):
    """A field kit's batch file is not what the kit signed."""
