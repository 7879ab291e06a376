"""Encounters that go to review, and a clock that counts its calls."""

from __future__ import annotations

import numpy as np

import biodedup as bd

CONFIG = bd.Config(
    policy=bd.Policy(duplicate_db=70, review_db=30),
    gallery=bd.GalleryConfig(seal_rows=8, merge_fan=2, background=False),
)
"""A cosine of 0.5 scores 61 dB: review. 0.9: 106 dB, of which 74 are sure in a small gallery: duplicate."""


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def sent(subject_id: str, vector: np.ndarray, encounter_id: str, **more: object) -> bd.Encounter:
    return bd.Encounter(subject_id, templates={"face": vector}, encounter_id=encounter_id, **more)


def names(candidates) -> list[str]:
    return [candidate.subject_id for candidate in candidates]
