"""People of a face and ten fingers with minutiae, and decisions of two engines in a form that can be compared."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import numpy as np

import biodedup as bd
from biodedup.embed.cards import joint_id, load_card, minutiae_card
from biodedup.values import FINGER_POSITIONS
from tests.support.minutiae import moved, record, strewn
from tests.support.vectors import SFACE, again, people

FINGER = joint_id(load_card("finger256"), minutiae_card("skeleton"))
TEN = tuple(column for column in FINGER_POSITIONS if column != "unknown")
COUNT = 60


def enrolled() -> list[dict[str, bd.Template]]:
    rng = np.random.default_rng(0)
    embeddings = {column: people(COUNT, seed=i, dimension=256) for i, column in enumerate(TEN)}
    faces, prints = people(COUNT, seed=99), [strewn(40, seed) for seed in range(25)]

    def finger(i: int, column: str) -> bd.Template:
        rows = prints[rng.integers(len(prints))] + np.append(rng.normal(0, 20, (40, 2)), np.zeros((40, 2)), axis=1)
        return bd.Template(column, FINGER, embeddings[column][i], record(moved(rows, rng.uniform(-30, 30))), 0.6)

    faced = [bd.Template("face", SFACE, face) for face in faces]
    return [{"face": faced[i], **{column: finger(i, column) for column in TEN}} for i in range(COUNT)]


PEOPLE = enrolled()


def later(person: dict[str, bd.Template], columns, cosine: float = 0.7, seed: int = 5) -> dict[str, bd.Template]:
    """Other captures of these columns of a person: the same minutiae, and embeddings at this cosine."""
    return {c: replace(person[c], embedding=again(person[c].embedding[None], cosine, seed)[0]) for c in columns}


def rounded(value):
    """The same with floats to nine decimals: the tables of intervals differ in their last bits between two engines."""
    if is_dataclass(value):
        return type(value).__name__, [rounded(getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, (tuple, list)):
        return [rounded(one) for one in value]
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 9) if isinstance(value, float) else value
