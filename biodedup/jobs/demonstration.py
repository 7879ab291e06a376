"""`demo`: enrols synthetic subjects and one real portrait, detects re-captures of the portrait, and measures searches.

Owns a seeded population of synthetic templates, the portrait that scikit-image ships, re-captures of it, and generated fingers. Downloads
nothing. Every number that it prints is measured in the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage import data

from biodedup.common.described import Described
from biodedup.config import Config, LogConfig
from biodedup.embed.cards import load_card
from biodedup.engine import Engine
from biodedup.synthetic import draw_impression, draw_master
from biodedup.synthetic.vectors import mates_of, population
from biodedup.values import Decision, Encounter, Face, Finger


@dataclass(frozen=True)
class DemoResult(Described):
    """The result of a demonstration. decisions: (name of the encounter, decision); mates_first: share of searches whose mate is the first
    candidate; agrees_with_numpy: share of searches whose first candidate is that of numpy's exact search."""

    subjects: int
    load_seconds: float
    decisions: tuple[tuple[str, Decision], ...]
    probes: int
    probes_per_second: float
    mates_first: float
    agrees_with_numpy: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "subjects": self.subjects,
            "load_seconds": round(self.load_seconds, 2),
            "decisions": [
                {
                    "capture": name,
                    "outcome": decision.outcome,
                    "best_subject_id": decision.best.subject_id if decision.best else None,
                    "best_score_db": round(decision.best.score_db, 1) if decision.best else None,
                    "refusals": [refusal.reason for refusal in decision.refusals],
                }
                for name, decision in self.decisions
            ],
            "probes": self.probes,
            "probes_per_second": round(self.probes_per_second),
            "mates_first": self.mates_first,
            "agrees_with_numpy": self.agrees_with_numpy,
        }


def recaptures(portrait: NDArray[np.uint8]) -> dict[str, bytes]:
    """Imitated re-captures of a portrait: other framing, light, angle and compression. portrait: RGB, uint8 (h, w, 3). Returns name -> encoded
    image."""
    height, width = portrait.shape[:2]
    rotation = cv2.getRotationMatrix2D((width / 2, height / 3), 8, 1.0)
    images = {
        "cropped": portrait[: int(0.6 * height), int(0.2 * width) : int(0.75 * width)],
        "darker": (portrait * 0.55).astype(np.uint8),
        "brighter": np.clip(portrait * 1.3 + 10, 0, 255).astype(np.uint8),
        "rotated 8 degrees": cv2.warpAffine(portrait, rotation, (width, height), borderMode=cv2.BORDER_REPLICATE),
        "smaller": cv2.resize(portrait, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
        "mirrored": portrait[:, ::-1],
    }
    sent = {name: _jpeg(np.asarray(image, np.uint8), 85) for name, image in images.items()}
    return sent | {"JPEG quality 20": _jpeg(portrait, 20)}


def poor_captures(portrait: NDArray[np.uint8]) -> dict[str, bytes]:
    """Captures that the quality gate has to refuse: name -> encoded image."""
    return {
        "out of focus": _jpeg(np.asarray(cv2.GaussianBlur(portrait, (0, 0), 14), np.uint8), 85),
        "underexposed": _jpeg((portrait * 0.06).astype(np.uint8), 85),
        "without a face": _jpeg(portrait[-120:, :120], 85),
    }


def with_fingers() -> list[tuple[str, Encounter]]:
    """Encounters with a generated finger and a synthetic face, as (name, encounter): two persons, and the first person again."""
    rng = np.random.default_rng(7)
    first, second = draw_master(rng), draw_master(rng)
    faces = population(2, seed=3)
    again = mates_of(faces[:1], np.array([0.6]))[0]
    sent = (
        ("a face and a finger", "person-1", faces[0], first),
        ("another face and finger", "person-2", faces[1], second),
        ("the first person again", "impostor", again, first),
    )
    return [
        (
            name,
            Encounter(
                subject_id,
                [Finger(draw_impression(rng, master).image, position="right_index")],
                {"face": face},
                encounter_id=f"demo/{subject_id}",
            ),
        )
        for name, subject_id, face, master in sent
    ]


def demo(
    folder: Path,
    config: Config | None = None,
    *,
    subjects: int = 100_000,
    probes: int = 2_000,
    say: Callable[[str], None] = lambda text: None,
) -> DemoResult:
    """Runs the demonstration in an empty gallery folder. say: called with each line of the report."""
    with Engine.open(
        folder, config or Config(log=LogConfig(slow_search_ms=600_000))
    ) as engine:  # the first search compiles
        vectors = population(subjects)
        load_seconds = _load(engine, vectors)
        say(f"{len(engine):,} synthetic subjects loaded, durable, in {load_seconds:.1f} s")
        decisions = _enrol_portraits(engine, say)
        searched = _search(engine, vectors, min(probes, subjects))
        say(
            f"{searched['probes']:,} probes at mated cosines (mean 0.64): {searched['probes_per_second']:,.0f} searches a second; "
            f"the mate is first for {searched['mates_first']:.2%}; same first candidate as numpy's exact search: "
            f"{searched['agrees_with_numpy']:.2%}"
        )
        return DemoResult(subjects=subjects, load_seconds=load_seconds, decisions=decisions, **searched)


def _load(engine: Engine, vectors: NDArray[np.float32]) -> float:
    """Enrols a subject for each row of the vectors. Returns the duration in seconds."""
    model_id, started = load_card(engine.config.face.model).model_id, time.perf_counter()
    for first in range(0, len(vectors), 20_000):
        part = vectors[first : first + 20_000]
        names = [f"synthetic-{i:06d}" for i in range(first, first + len(part))]
        engine.add_templates(names, {"face": part}, model_id=model_id)
    return time.perf_counter() - started


def _enrol_portraits(engine: Engine, say: Callable[[str], None]) -> tuple[tuple[str, Decision], ...]:
    portrait = np.asarray(data.astronaut(), np.uint8)  # type: ignore[no-untyped-call]
    decisions: list[tuple[str, Decision]] = []

    def enroll(name: str, encounter: Encounter) -> None:
        decision = engine.enroll(encounter)
        decisions.append((name, decision))
        say(f"  {name:<28} {_described(decision)}")

    say("a portrait is enrolled for the first time")
    enroll("portrait", _of_face("astronaut", _jpeg(portrait, 95)))
    say("the same person tries again under other names")
    for number, (name, image) in enumerate(recaptures(portrait).items(), start=1):
        enroll(f"portrait, {name}", _of_face(f"impostor-{number}", image))
    say("poor captures")
    for number, (name, image) in enumerate(poor_captures(portrait).items(), start=1):
        enroll(f"portrait, {name}", _of_face(f"poor-{number}", image))
    say("generated fingers with synthetic faces")
    for name, encounter in with_fingers():
        enroll(name, encounter)
    return tuple(decisions)


def _search(engine: Engine, vectors: NDArray[np.float32], probes: int) -> dict[str, Any]:
    """Searches mates of random rows, and compares the first candidates with numpy's exact search."""
    rng = np.random.default_rng(2)
    rows = rng.choice(len(vectors), probes, replace=False)
    mates = mates_of(vectors[rows], np.clip(rng.normal(0.64, 0.12, probes), 0.3, 0.98))
    started = time.perf_counter()
    ids, _ = engine.search({"face": mates}, k=10)
    seconds = time.perf_counter() - started
    oracle = np.concatenate([np.argmax(block @ vectors.T, axis=1) for block in np.array_split(mates, 40)])
    first_mates, first_of_oracle = (
        np.array([f"synthetic-{i:06d}" for i in numbers], object) for numbers in (rows, oracle)
    )
    return {
        "probes": probes,
        "probes_per_second": probes / seconds,
        "mates_first": float(np.mean(ids[:, 0] == first_mates)),
        "agrees_with_numpy": float(np.mean(ids[:, 0] == first_of_oracle)),
    }


def _of_face(subject_id: str, image: bytes) -> Encounter:
    return Encounter(subject_id, [Face(image)], encounter_id=f"demo/{subject_id}")


def _described(decision: Decision) -> str:
    if decision.outcome == "refused":
        refusal = decision.refusals[0]
        measured = "" if refusal.measured is None else f" (measured {refusal.measured:.3g}, limit {refusal.limit:.3g})"
        return f"refused: {refusal.reason}{measured}"
    if decision.best is None or decision.outcome == "unique":
        return decision.outcome
    if decision.outcome == "review":
        return f"review: {decision.best.kind.replace('_', ' ') or decision.reasons[0]}, {decision.best.subject_id}"
    return f"{decision.outcome} of {decision.best.subject_id} at {decision.best.score_db:.0f} dB"


def _jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return encoded.tobytes()
