"""All settings of biodedup, as frozen dataclasses that check their values when they are made.

Owns the names of the settings, their defaults and their ranges. Never looks for a settings file (`settings.py` does), and never opens a
gallery, which stores its own policy.

1. No default depends on the machine.
2. The name of a setting ends in its unit.
"""

from biodedup.config.captures import EXTERNAL_MINUTIAE, CaptureConfig, FaceConfig, FingerConfig, IsolationConfig
from biodedup.config.config import Config
from biodedup.config.gallery import ClusterConfig, GalleryConfig, SearchConfig
from biodedup.config.output import LabelConfig, LogConfig
from biodedup.config.policy import Policy

__all__ = [
    "EXTERNAL_MINUTIAE",
    "CaptureConfig",
    "ClusterConfig",
    "Config",
    "FaceConfig",
    "FingerConfig",
    "GalleryConfig",
    "IsolationConfig",
    "LabelConfig",
    "LogConfig",
    "Policy",
    "SearchConfig",
]
