"""Merges the registers of districts: compares found duplicates with an exact search, false links with their expected number, and killed runs with an
undisturbed run.

    python benchmarks/merge.py                                     20 galleries of 50,000; ten runs killed at random
    python benchmarks/merge.py --folder /somewhere                 keeps the galleries, and uses what is there
    python benchmarks/merge.py --districts 4 --rows 1000 --kills 2 the smoke size; keeps no result

Planted: one in a hundred subjects of each district is enrolled again in another one, at a cosine from the mated distribution measured on
faces (normal, mean 0.66 and deviation 0.115, at most 0.98: median and 5 % point of SFace on LFW). Exact search in float32 says which
pairs reach the policy's threshold for the merged size, which the gallery's own calibration turns into a similarity: of all planted pairs
and all links that the merge made, and of `--sample` subjects against everybody (all against all would take hours at the full size).
Pairs of impostors above it are expected, too: pairs compared times the false match rate of the threshold. A killed run is a process of its own,
killed by SIGKILL at random moments and started again until it ends; its files must be those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import filecmp
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from report import model_ids, record
from scipy.stats import poisson

import biodedup as bd
from biodedup.synthetic.vectors import mates_of, population
from biodedup.testing import internals

DISTRICTS, ROWS, KILLS, SHARE = 20, 50_000, 10, 0.01
FILES = ("merge.parquet", "merge.pairs.parquet", "merge.collisions.parquet", "merge.summary.json", "merge.html")
TILE = 4_096


def people(district: int, districts: int, rows: int) -> np.ndarray:
    """float32 (rows, 128). The first hundredth of a district are doubles of the last hundredth of the district before it."""
    mine = population(rows, seed=100 + district)
    count = int(rows * SHARE)
    before = population(rows, seed=100 + (district - 1) % districts)[-count:]
    cosines = np.clip(np.random.default_rng(500 + district).normal(0.66, 0.115, count), 0.0, 0.98)
    mine[:count] = mates_of(before, cosines, seed=900 + district)
    return mine


def name(district: int, row: int) -> str:
    return f"{district:03d}{row:07d}"


def build(folder: Path, districts: int, rows: int) -> list[Path]:
    folders = [folder / f"district-{district:03d}" for district in range(districts)]
    for district, gallery in enumerate(folders):
        with bd.Engine.open(gallery) as engine:
            if not len(engine):
                ids = [name(district, row) for row in range(rows)]
                engine.add_templates(ids, {"face": people(district, districts, rows)}, model_id=model_ids("face", 128))
                engine.maintain()
    return folders


def exact(
    districts: int, rows: int, similarity: float, sample: int, named: set[frozenset[str]]
) -> dict[frozenset[str], float]:
    """Similarities by float32 products: of the named pairs, and of those that reach this one between a sample and everybody."""
    everybody = np.concatenate([people(district, districts, rows) for district in range(districts)])

    def pair_of(one: int, other: int) -> frozenset[str]:
        return frozenset(name(*divmod(row, rows)) for row in (one, other))

    def row_of(subject: str) -> int:
        return int(subject[:3]) * rows + int(subject[3:])

    found: dict[frozenset[str], float] = {}
    for pair in named:
        one, other = map(row_of, pair)
        found[pair] = float(everybody[one] @ everybody[other])
    chosen = np.unique(np.linspace(0, len(everybody) - 1, min(sample, len(everybody))).astype(np.int64))
    for low in range(0, len(chosen), TILE):
        tile = chosen[low : low + TILE]
        for start in range(0, len(everybody), TILE):
            near = everybody[tile] @ everybody[start : start + TILE].T
            for i, j in np.argwhere(near >= similarity).tolist():
                if tile[i] != start + j:
                    found[pair_of(int(tile[i]), start + j)] = float(near[i, j])
    return found


def run(folders: list[Path], out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "biodedup.cli", "merge", *map(str, folders), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ends(process: subprocess.Popen[bytes]) -> None:
    _, told = process.communicate()
    if process.returncode not in (0, 10):
        sys.exit(f"merge ended with {process.returncode}: {told.decode()}")


def killed(folders: list[Path], folder: Path, kills: int, seconds: float, rng: random.Random) -> int:
    """One merge, killed so often, then left alone. Returns how many kills came while it ran."""
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for _ in range(kills):
        process = run(folders, folder / "merge.parquet")
        try:
            process.communicate(timeout=rng.uniform(0.1, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            done += 1
    ends(run(folders, folder / "merge.parquet"))
    return done


def measure(folder: Path, districts: int, rows: int, kills: int, seed: int, sample: int) -> dict[str, Any]:
    folders = build(folder / "galleries", districts, rows)
    shutil.rmtree(folder / "whole", ignore_errors=True)
    shutil.rmtree(folder / "killed", ignore_errors=True)
    (folder / "whole").mkdir()
    started = time.perf_counter()
    ends(run(folders, folder / "whole" / "merge.parquet"))
    seconds = time.perf_counter() - started
    told = pq.read_table(folder / "whole" / "merge.pairs.parquet", filters=[("strength", "==", "duplicate")])
    ours = {frozenset(pair) for pair in zip(*(told[f"subject_id_{side}"].to_pylist() for side in "ab"), strict=True)}
    total = districts * rows
    threshold_db, _ = bd.Policy().thresholds_db(total)
    with bd.Engine.open(folder / "whole" / "merge.parquet.work" / "gallery", read_only=True) as engine:
        probe = bd.Template("face", engine.info()["columns"]["face"]["model_id"], population(1)[0])
        levels = np.linspace(0.2, 1, 80_001, dtype=np.float32)
        similarity = float(levels[np.argmax(internals(engine).comparer.score_db(probe, levels) >= threshold_db)])
    count = int(rows * SHARE)
    planted = {
        frozenset((name(district, i), name((district - 1) % districts, rows - count + i)))
        for district in range(districts)
        for i in range(count)
    }
    theirs = exact(districts, rows, similarity, sample, planted | ours)
    reached = {pair for pair, near in theirs.items() if near >= similarity}
    expected = total * (total - 1) / 2 * 10 ** (-threshold_db / 10)
    false = len(ours - planted)
    begun = time.perf_counter()
    rng = random.Random(seed)
    done = killed(folders, folder / "killed", kills, seconds / (2 * max(kills, 1)), rng)
    same = all(filecmp.cmp(folder / "whole" / one, folder / "killed" / one, shallow=False) for one in FILES)
    return {
        "districts x subjects": f"{districts} x {rows}",
        "planted doubles; subjects searched exactly": f"{len(planted)}; {min(sample, total)}",
        "threshold, dB; as a similarity": f"{threshold_db:.1f}; {similarity:.4f}",
        "seconds": round(seconds, 1),
        "found of all planted": round(len(ours & planted) / len(planted), 4),
        "exact search finds of them": round(len(reached & planted) / len(planted), 4),
        "links; of exact search": f"{len(ours)}; {len(reached)}",
        "found of those of exact search": round(len(ours & reached) / max(len(reached), 1), 5),
        "lacking; beyond": f"{len(reached - ours)}; {len(ours - reached)}",
        "of those lacking or beyond, further from it": sum(abs(theirs[p] - similarity) > 0.005 for p in reached ^ ours),
        "false links; expected by the threshold": f"{false}; {expected:.2f}",
        "probability of so many false links or more": round(float(poisson.sf(false - 1, expected)), 4),
        "kills": done,
        "same bytes after the kills": same,
        "seconds with the kills": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--districts", type=int, default=DISTRICTS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=20_000, help="subjects that are searched exactly")
    parser.add_argument("--folder", type=Path, help="keep the galleries here, and use what is there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure(
            folder, arguments.districts, arguments.rows, arguments.kills, arguments.seed, arguments.sample
        )
        record("merge", figures, keep=(arguments.districts, arguments.rows) == (DISTRICTS, ROWS))


if __name__ == "__main__":
    main()
