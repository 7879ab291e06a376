"""Times the constants of a scan in `biodedup/search/costs.py` on this machine.

    python benchmarks/costs.py                  a million rows, some minutes
    python benchmarks/costs.py --instructions avx2   of another set of instructions that this processor has
    python benchmarks/costs.py --rows 20000     the smoke size; keeps no result

One thread scans one sealed segment of random rows. The model of the planner is a sum of costs (`RowCosts`), so the constants are the
least-squares solution of many timed scans, none of them negative:

    without tables, a row and probe = numbers x number, in a batch
    with tables, a row and probe    = tables x table + share that passes x compared + (bytes x octet + share fetched x fetched) / probes

`one_column` of `MultiColumnCosts`: a scan without tables of one column, in table look-ups. The other constants are fitted to what
`columns.py` and `selfjoin.py` time. Put figures of an idle machine into `costs.py`; a wrong one makes a search slower, never incomplete.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from report import model_ids, record
from scipy.optimize import nnls

import biodedup as bd
from biodedup.search import costs
from biodedup.search.native import scan_kernel
from biodedup.search.native.column_statistics import classes_of
from biodedup.search.native.dot_kernel import INSTRUCTIONS, available
from biodedup.search.native.scan_kernel import ScanProbes
from biodedup.search.native.scanner import Probes, Scanner, Unit
from biodedup.synthetic.vectors import population
from biodedup.testing import internals

ROWS, DIMENSION, PIECE = 1_000_000, 128, 1 << 16
PROBES = (1, 16, 256)
TABLES = (16, 32, 64)
SHARES = (0.0, 0.002, 0.01)
REPEATED = 3


def build(folder: Path, rows: int) -> None:
    vectors = population(rows, seed=5)
    with bd.Engine.open(folder) as engine:
        for low in range(0, rows, PIECE):
            names = [f"s{row}" for row in range(low, min(low + PIECE, rows))]
            engine.add_templates(names, {"face": vectors[low : low + PIECE]}, model_id=model_ids("face", DIMENSION))
        engine.compact()


def timed_ns(scanner: Scanner, unit: Unit, probes: ScanProbes) -> float:
    """Nanoseconds of the processor that each further row takes, by probe. No row reaches the cut-offs, so nothing is collected."""
    cuts = np.full(len(probes), 2.0, np.float32)
    half = replace(unit, last=unit.last // 2)
    seconds = {"whole": [], "half": []}
    for _ in range(REPEATED):
        for name, cells in (("whole", unit), ("half", half)):
            started = time.process_time()
            scanner.above([cells], probes, cuts, most=1000)
            seconds[name].append(time.process_time() - started)
    return (min(seconds["whole"]) - min(seconds["half"])) / (unit.last - half.last) / len(probes) * 1e9


def measure(folder: Path, instructions: str) -> dict[str, Any]:
    scanner = Scanner(1)
    kernels = partial(scan_kernel.scan, kernels=scan_kernel.make_scans(instructions))
    try:
        with patch.object(scan_kernel, "scan", kernels), bd.Engine.open(folder, read_only=True) as engine:
            parts = internals(engine).gallery.snapshot().parts
            column = next(part.columns["face"] for part in parts if part.count)
            unit = Unit(column, 0, 0, column.count, np.zeros(0, np.uint64))
            drawn = [Probes(column.codec, population(count, seed=6)) for count in PROBES]
            scanned = column.codec.scanned
            number = min(timed_ns(scanner, unit, probes.untabled()) for probes in drawn) / scanned
            if instructions not in costs.ROW_COSTS:
                return {"instructions": instructions, "number, ns": round(number, 4)}
            equations, nanoseconds = [], []
            for tables in TABLES:
                classes = classes_of(column, tables)
                for probes in drawn:
                    for share in SHARES:
                        limits = limits_passing(classes, probes, share)
                        tabled = classes.tabled(probes.untabled(), probes.rotated, limits)
                        passing = classes.share_passing(limits, probes.rotated)
                        count = len(probes.codes)
                        once = classes.octets / count, min(1.0, passing * count) / count
                        equations.append((classes.tables, passing, *once))
                        nanoseconds.append(timed_ns(scanner, unit, tabled))
    finally:
        scanner.close()
    timed = np.maximum(nanoseconds, 1e-3)  # relative errors count: a single probe costs ten times what one of many does
    (table, compared, octet, fetched), _ = nnls(np.array(equations) / timed[:, None], np.ones(len(timed)))
    return {
        "instructions": instructions,
        "table, ns": round(table, 4),
        "compared, ns": round(compared, 1),
        "octet, ns": round(octet, 4),
        "fetched, ns": round(fetched, 1),
        "number, ns": round(number, 4),
        "one_column, look-ups": round(number * scanned / table, 1) if table else "-",
        "stated in costs.py": asdict(costs.ROW_COSTS[instructions]),
    }


def limits_passing(classes: Any, probes: Probes, share: float) -> np.ndarray:
    """The limit that about this share of unrelated rows reaches, the same for all probes; float32 (q,)."""
    low, high = -1.0, 3.0
    for _ in range(40):
        middle = (low + high) / 2
        limits = np.full(len(probes.codes), middle, np.float32)
        low, high = (middle, high) if classes.share_passing(limits, probes.rotated) > share else (low, middle)
    return np.full(len(probes.codes), high, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=ROWS)
    parser.add_argument(
        "--instructions", choices=available(), default=INSTRUCTIONS, help="of those that this processor has"
    )
    arguments = parser.parse_args()
    rows = int(arguments.rows)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        build(Path(folder) / "g", rows)
        record("costs", {"rows": rows} | measure(Path(folder) / "g", arguments.instructions), keep=rows == ROWS)


if __name__ == "__main__":
    main()
