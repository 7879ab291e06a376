"""The cost of the hash chain over the commits and of the audit log: the same work with and without them, in turns, in processor time.

    python benchmarks/chain.py            a minute of one core
    python benchmarks/chain.py --smoke    little work, once; keeps no result

Without the chain: the calls that hash rows and write links do nothing. Without the audit log: `Config(audit="none")`; with it, `all`; the
chain is there in both. Searches are 1:N with one face. Subjects have a face vector each. The galleries are in a temporary folder,
so that the disk counts little where that folder is in memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from report import model_ids, record

import biodedup as bd
from biodedup.gallery.catalogue.chain_writer import ChainWriter
from biodedup.synthetic.vectors import population


def encounters(vectors: np.ndarray[Any, Any], prefix: str) -> list[bd.Encounter]:
    (model_id,) = set(model_ids("face", vectors.shape[1]).values())
    return [
        bd.Encounter(f"{prefix}{i}", templates={"face": vector}, model_id=model_id) for i, vector in enumerate(vectors)
    ]


def one_by_one(engine: bd.Engine, sent: list[bd.Encounter]) -> None:
    for encounter in sent:
        engine.enroll(encounter)


def together(engine: bd.Engine, sent: list[bd.Encounter]) -> None:
    for _ in engine.enroll_many(sent):
        pass


def timed(
    work: Callable[[bd.Engine, list[bd.Encounter]], None], sent: list[bd.Encounter], *, chain: bool
) -> tuple[float, float]:
    """(ms of the processor an encounter, us a row to open the gallery again)."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        if not chain:
            for name in ("put", "drop", "extend"):
                patches.enter_context(patch.object(ChainWriter, name, lambda *given: None))
        config = bd.Config(gallery=bd.GalleryConfig(background=False))
        with bd.Engine.open(Path(folder) / "g", config) as engine:
            started = time.process_time()
            work(engine, sent)
            took = time.process_time() - started
        started = time.process_time()
        bd.Engine.open(Path(folder) / "g", config, read_only=True).close()
        opened = time.process_time() - started
    return 1e3 * took / len(sent), 1e6 * opened / len(sent)


def searches(engine: bd.Engine, sent: list[bd.Encounter]) -> None:
    for encounter in sent:
        engine.identify(encounter)


def audited(
    work: Callable[[bd.Engine, list[bd.Encounter]], None], sent: list[bd.Encounter], folder: str, audit: str
) -> float:
    """ms of the processor an encounter, the last commit of the audit log included."""
    config = bd.Config(gallery=bd.GalleryConfig(background=False), audit=audit)
    with bd.Engine.open(Path(folder) / ("searched" if work is searches else f"enrolled-{audit}"), config) as engine:
        started = time.process_time()
        work(engine, sent)
        engine.close()
        return 1e3 * (time.process_time() - started) / len(sent)


def audit_figures(sent: list[bd.Encounter], turns: int) -> dict[str, Any]:
    figures = {}
    for name, work in {"one a commit": one_by_one, "many a commit": together, "searches": searches}.items():
        taken = []
        for _ in range(turns + 1):
            with tempfile.TemporaryDirectory() as folder:
                with bd.Engine.open(Path(folder) / "searched") as engine:
                    together(engine, sent)
                taken.append([audited(work, sent, folder, audit) for audit in ("none", "all")])
        known = np.array(taken[1:])  # the first one warms
        without, there = np.median(known, axis=0)
        figures[f"audit log, {name}: ms an encounter without, with"] = f"{without:.3f}, {there:.3f}"
        figures[f"audit log, {name}: ratio, median of the turns"] = round(
            float(np.median(known[:, 1] / known[:, 0])), 3
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    count, turns = (40, 1) if options.smoke else (600, 7)
    vectors = population(count)
    figures: dict[str, Any] = {}
    for name, work in {"one a commit": one_by_one, "many a commit": together}.items():
        sent = encounters(vectors, "s")
        timed(work, sent[:20], chain=True)  # warm
        taken = np.array([[timed(work, sent, chain=chain) for chain in (False, True)] for _ in range(turns)])
        without, there = np.median(taken, axis=0)
        figures[f"{name}: ms an enrolment without, with"] = f"{without[0]:.2f}, {there[0]:.2f}"
        figures[f"{name}: ratio, median of the turns"] = round(float(np.median(taken[:, 1, 0] / taken[:, 0, 0])), 3)
        figures[f"{name}: opening, us a row without, with"] = f"{without[1]:.0f}, {there[1]:.0f}"
    figures |= audit_figures(encounters(vectors, "s"), turns)
    record("chain", figures, keep=not options.smoke)


if __name__ == "__main__":
    main()
