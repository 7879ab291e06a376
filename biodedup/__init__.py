"""biodedup: finds a person enrolled twice.

Captures become templates, templates a gallery, and every new encounter is compared with everybody in it. `__all__` is
the public interface; everything else may change.
"""

from biodedup.capture.finger import read_minutiae, write_minutiae
from biodedup.config import CaptureConfig, Config, FaceConfig, FingerConfig, GalleryConfig, Policy, SearchConfig
from biodedup.embed.extractor import Extractor
from biodedup.engine import Engine, compare
from biodedup.errors import (
    BiodedupError,
    CallerError,
    DataDamaged,
    EncounterConflict,
    EngineClosed,
    GalleryBusy,
    GalleryDamaged,
    InvalidInput,
    ModelCardError,
    ModelMismatch,
    NotAGallery,
    OutOfMemory,
    RetryableError,
    StorageUnavailable,
    SubjectExists,
    UnknownSubject,
)
from biodedup.trace import Trace, explain
from biodedup.values import (
    COLUMNS,
    FINGER_POSITIONS,
    Candidate,
    Case,
    Cluster,
    Decision,
    Encounter,
    Evidence,
    Face,
    Finger,
    Link,
    Missing,
    Refusal,
    Score,
    SearchResult,
    Template,
    Verdict,
    Verification,
)

__version__ = "0.2.0"

__all__ = [
    "COLUMNS",
    "FINGER_POSITIONS",
    "BiodedupError",
    "CallerError",
    "Candidate",
    "CaptureConfig",
    "Case",
    "Cluster",
    "Config",
    "DataDamaged",
    "Decision",
    "Encounter",
    "EncounterConflict",
    "Engine",
    "EngineClosed",
    "Evidence",
    "Extractor",
    "Face",
    "FaceConfig",
    "Finger",
    "FingerConfig",
    "GalleryBusy",
    "GalleryConfig",
    "GalleryDamaged",
    "InvalidInput",
    "Link",
    "Missing",
    "ModelCardError",
    "ModelMismatch",
    "NotAGallery",
    "OutOfMemory",
    "Policy",
    "Refusal",
    "RetryableError",
    "Score",
    "SearchConfig",
    "SearchResult",
    "StorageUnavailable",
    "SubjectExists",
    "Template",
    "Trace",
    "UnknownSubject",
    "Verdict",
    "Verification",
    "__version__",
    "compare",
    "explain",
    "read_minutiae",
    "write_minutiae",
]
