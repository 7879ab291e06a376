"""A gallery that seals and merges after a handful of people."""

from __future__ import annotations

import numpy as np

import biodedup as bd

from .vectors import SFACE, again, people

PEOPLE = np.linalg.qr(people(64, seed=5).T)[0].T.astype(np.float32)
"""Persons as unlike as can be: cosine 0 for every pair, so that no two of them ever look like one."""


def small(seal_rows: int = 4, merge_fan: int = 2, *, background: bool = False) -> bd.Config:
    return bd.Config(gallery=bd.GalleryConfig(seal_rows, merge_fan, background))


def enroll(engine: bd.Engine, i: int, **more: object) -> bd.Decision:
    return engine.enroll(
        bd.Encounter(f"s{i}", templates={"face": PEOPLE[i]}, encounter_id=f"e{i}", model_id=SFACE, **more)
    )


def nearest(engine: bd.Engine, i: int, **more: object) -> str:
    return str(engine.search({"face": again(PEOPLE[i : i + 1], 0.8)}, k=1, **more).ids[0, 0])
