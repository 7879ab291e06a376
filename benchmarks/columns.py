"""A search of several columns at once, a face and three fingers: its cost and its miss rate.

    python benchmarks/columns.py --folder /somewhere            20 million subjects; 11 GB of disk, an hour or two
    python benchmarks/columns.py --rows 150000 --mates 1024     the smoke size; keeps no result

Strangers are isotropic. Mates: the face's cosines have the quantiles of SFace on LFW (1 % below 0.346, 5 % below 0.466, half below
0.667); a finger's are normal with mean 0.475 and deviation 0.152, which puts a mate first among 6,252 fingers in 85 % and
among the first hundred in 97 %, as a first fixed-length fingerprint embedding did. `independent`: a subject's four cosines are
drawn independently. `correlated`: their ranks have a normal copula with correlation 0.3, as if all captures of a person were poor.

Plans are made for several miss risks, from calibrations with these distributions that assume independent columns. Batches of a plan take
turns with batches of three other searches: of the face column alone for its 100 nearest rows, whose time is the unit of `cost`; of the same
without signs, a plain scan of all high nibbles; and of FAISS `IVF2048,PQ64x4fs` on the face column, all lists probed. `missed`: mates that
are not among the candidates, the 40 rows with the most evidence. `reaching`: of the mates whose own evidence reaches the review
threshold, FPIR 0.005.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import faiss
import numpy as np
from report import record
from scipy.stats import norm

import biodedup as bd
from biodedup.common.intervals import exact_interval
from biodedup.match.scores.calibration import Calibration
from biodedup.search.shards import native
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals

ROWS, DIMENSION, BATCH, PROBES, K = 20_000_000, 128, 1 << 16, 256, 100
COLUMNS = ("face", "left_index", "right_index", "right_middle")
RISKS = (1e-2, 3e-3, 2e-3, 1e-3, 3e-4)
FINGER = (0.475, 0.152)
CORRELATION = 0.3
STRANGERS_SD = DIMENSION**-0.5


def batch(index: int, rows: int, column: int) -> np.ndarray:
    vectors = np.random.default_rng([17, index, column]).standard_normal((rows, DIMENSION), np.float32)
    return vectors / np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]


def build(gallery: Path, rows: int) -> None:
    with bd.Engine.open(gallery) as engine:
        for index, low in enumerate(range(0, rows, BATCH)):
            count = min(BATCH, rows - low)
            if low + count > len(engine):
                names = [f"s{row}" for row in range(low, low + count)]
                engine.add_templates(
                    names,
                    {name: batch(index, count, i) for i, name in enumerate(COLUMNS)},
                    model_id=f"external-{DIMENSION}",
                )
        engine.compact()


def face_cosines(u: np.ndarray) -> np.ndarray:
    """The quantiles that are known, and straight lines through them on normal paper."""
    known, cosines = norm.ppf([0.01, 0.05, 0.5]), [0.346, 0.466, 0.667]
    z = norm.ppf(u)
    below = cosines[0] + (z - known[0]) * (cosines[1] - cosines[0]) / (known[1] - known[0])
    above = cosines[1] + (z - known[1]) * (cosines[2] - cosines[1]) / (known[2] - known[1])
    return np.clip(np.where(z < known[1], below, above), -0.3, 0.98)


def finger_cosines(u: np.ndarray) -> np.ndarray:
    return np.clip(FINGER[0] + FINGER[1] * norm.ppf(u), -0.3, 0.98)


def cosines(count: int, correlation: float, seed: int) -> np.ndarray:
    """float64 (4, count)."""
    rng = np.random.default_rng(seed)
    common, own = rng.standard_normal(count), rng.standard_normal((len(COLUMNS), count))
    u = norm.cdf(np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own)
    return np.array([face_cosines(u[0]), *map(finger_cosines, u[1:])])


def calibration(law: Any) -> Calibration:
    """Of a law of mated cosines, given as its quantile function; impostors are normal."""
    u = np.linspace(0, 1, 20_001)[1:-1]
    edges = np.linspace(-1.005, 1.005, 202)
    mass = np.diff(np.interp(edges, law(u), u, left=0, right=1))
    mass = np.convolve(mass, norm.pdf(np.arange(-8, 9), 0, 2.5), "same")
    score = (edges[1:] + edges[:-1]) / 2
    with np.errstate(divide="ignore"):
        llr_db = 10 * np.log10(mass / mass.sum()) - 10 / np.log(10) * (
            norm.logpdf(score, 0, STRANGERS_SD) + np.log(0.01)
        )
    lowest = int(np.argmin(np.where(score < 0.3, llr_db, np.inf)))
    llr_db[:lowest] = llr_db[lowest]
    nonmated_db = -10 / np.log(10) * norm.logsf(score, 0, STRANGERS_SD)
    top = int(np.argmax(np.isneginf(llr_db) & (score > 0.5))) or len(score)
    return Calibration.from_card(
        {
            "score": score[:top],
            "llr_db": np.maximum.accumulate(np.clip(llr_db, -30, None))[:top],
            "nonmated_db": nonmated_db[:top],
            "measured_db": 60.0,
            "source": "the law that the mates are drawn from",
        }
    )


def peer(rows: int) -> Any:
    """FAISS, with the faces alone."""
    lists = 2048 if rows >= 5_000_000 else 64
    index = faiss.index_factory(DIMENSION, f"IVF{lists},PQ64x4fs", faiss.METRIC_INNER_PRODUCT)
    index.train(batch(0, min(BATCH, rows), 0))
    for number, low in enumerate(range(0, rows, BATCH)):
        index.add(batch(number, min(BATCH, rows - low), 0))
    index.nprobe = lists
    return index


def rate(missed: np.ndarray) -> str:
    """A share and its 95 % interval (Clopper and Pearson)."""
    k, n = int(missed.sum()), len(missed)
    low, high = exact_interval(k, n)
    return f"{k / n:.2e} [{low:.1e}, {high:.1e}]" if n else "-"


def measure(gallery: Path, mates: int, risks: Sequence[float]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with bd.Engine.open(gallery, read_only=True) as engine:
        snapshot, searcher = internals(engine).gallery.snapshot(), internals(engine).searcher
        figures["rows"] = rows = len(engine)
        index = peer(rows)
        face_id = snapshot.models["face"].model_id
        laws = {face_id: calibration(face_cosines), snapshot.models[COLUMNS[1]].model_id: calibration(finger_cosines)}
        internals(engine).comparer._calibration_of = lambda model_id, *_: laws[model_id]
        ids = [snapshot.models[name].model_id for name in COLUMNS]
        review_llr_db = internals(engine).comparer.llr_reaching(engine.policy.thresholds_db(rows)[1], ids)
        shards = searcher.shards(snapshot)
        whose = np.random.default_rng(1).permutation(min(BATCH, rows))[:mates]
        own = [batch(0, min(BATCH, rows), i)[whose] for i in range(len(COLUMNS))]
        for kind, correlation in (("independent", 0.0), ("correlated", CORRELATION)):
            drawn = cosines(len(whose), correlation, seed=3)
            probes = {n: mates_of(own[i], drawn[i], seed=40 + i) for i, n in enumerate(COLUMNS)}
            llr_db = sum(laws[ids[i]].llr_db(drawn[i]) for i in range(len(COLUMNS)))
            reaching = np.asarray(llr_db) >= review_llr_db
            figures[f"{kind}: mates; of these reach the review threshold"] = f"{len(whose)}; {reaching.mean():.4f}"
            face_missed, face_seconds = np.zeros(len(whose), bool), []
            for low in range(0, len(whose), PROBES):
                some = slice(low, low + PROBES)
                started = time.perf_counter()
                found = searcher.nearest(snapshot, "face", probes["face"][some], K).rows
                face_seconds.append(time.perf_counter() - started)
                face_missed[some] = ~(found == whose[some, None]).any(axis=1)
            scan = float(np.median(face_seconds))
            figures[f"{kind}: the face's codes alone: probes/s; missed"] = (
                f"{PROBES / scan:.1f}; {rate(face_missed)}; reaching: {rate(face_missed[reaching])}"
            )
            for risk in risks:
                searcher._planner._plans.clear()
                searcher._config = searcher._planner._config = replace(searcher._config, miss_risk=risk)
                plan = searcher.multicolumn_query(snapshot, COLUMNS)
                if plan is None:
                    figures[f"{kind}: miss risk {risk:g}"] = "no plan"
                    continue
                (choice,) = plan.plans.values()
                searcher.fan_out.multicolumn(
                    shards, {n: p[:PROBES] for n, p in probes.items()}, plan
                )  # laws are measured
                missed, ours, theirs, plain, raw, passed = np.zeros(len(whose), bool), [], [], [], [], 0
                for low in range(0, len(whose), PROBES):
                    some = slice(low, low + PROBES)
                    started = time.perf_counter()
                    result, _ = searcher.fan_out.multicolumn(shards, {n: p[some] for n, p in probes.items()}, plan)
                    ours.append(time.perf_counter() - started)
                    if low // PROBES % 4 == 0:
                        started = time.perf_counter()
                        searcher.nearest(snapshot, "face", probes["face"][some], K)
                        theirs.append(time.perf_counter() - started)
                        with patch.object(native, "_cheapest", lambda *_: None):
                            started = time.perf_counter()
                            searcher.nearest(snapshot, "face", probes["face"][some], K)
                            plain.append(time.perf_counter() - started)
                        started = time.perf_counter()
                        index.search(probes["face"][some], K)
                        raw.append(time.perf_counter() - started)
                    mine = whose[some]
                    hit = result.which[result.rows == mine[result.which]]
                    missed[some] = ~np.isin(np.arange(len(mine)), hit)
                    passed += result.passed
                cost = float(np.median(ours) / np.median(theirs))
                share = passed / len(whose) / rows
                figures[f"{kind}: miss risk {risk:g}"] = (
                    f"cost {cost:.2f} (foreseen {choice.cost:.2f}; {np.median(ours) / np.median(plain):.2f} of a scan "
                    f"without signs, {np.median(ours) / np.median(raw):.2f} of FAISS's), {PROBES / np.median(ours):.1f} probes/s; signs "
                    f"{'+'.join(map(str, choice.signs))}, share {share:.1e}; missed {rate(missed)}; "
                    f"reaching: {rate(missed[reaching])}; planned below {choice.miss_bound:.1e}; "
                    f"product of single columns' {prod(choice.single):.1e}"
                )
                print(f"{kind} {risk:g}: {figures[f'{kind}: miss risk {risk:g}']}", flush=True)
        figures["the last plan"] = engine.plan(COLUMNS).explain().splitlines()[0]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=ROWS)
    parser.add_argument("--mates", type=int, default=10_240)
    parser.add_argument("--risks", type=float, nargs="*", default=RISKS)
    parser.add_argument("--folder", type=Path, help="keep the gallery here, and use what is there")
    arguments = parser.parse_args()
    rows = int(arguments.rows)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as temporary:
        gallery = (arguments.folder or Path(temporary)) / f"{rows}.columns"
        build(gallery, rows)
        record("columns", measure(gallery, arguments.mates, arguments.risks), keep=rows == ROWS)


if __name__ == "__main__":
    main()
