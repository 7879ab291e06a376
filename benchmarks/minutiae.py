"""Compares the minutiae matcher with BOZORTH3: error rates on real fingerprints, and the time of a comparison.

    python benchmarks/minutiae.py            # every set of fingers, and BOZORTH3 on the same pairs
    python benchmarks/minutiae.py --smoke    # made-up minutiae, no data

Mated: all pairs of a finger's impressions. EER: against first impressions across fingers, as FVC does. FNMR at an FMR: against all
impressions across fingers. BOZORTH3, which takes hundreds of times as long, compares at most --peer-pairs of each kind, drawn at
random; the matcher compares those once more. Refused captures are left out and counted. Times: of one thread's processor, the least
of several rounds of ten probes with the same forty records (BOZORTH3: one round), reading the records included.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from report import data_folder, record

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from biodedup.capture.minutiae.record import MinutiaeRecord, write_record
from biodedup.match.prints.minutiae import CylinderMatcher, MinutiaeMatcher
from tests.support.bozorth import Bozorth3

Scores = NDArray[np.float32]
Pairs = NDArray[np.int64]  # (n, 2), indices of records, in order of the first


def scores_of(matcher: MinutiaeMatcher, records: list[bytes], pairs: Pairs) -> Scores:
    found = np.zeros(len(pairs), np.float32)
    for probe in np.unique(pairs[:, 0]).tolist():
        at = np.flatnonzero(pairs[:, 0] == probe)
        found[at] = matcher.compare(records[probe], [records[i] for i in pairs[at, 1].tolist()])
    return found


def equal_error_rate(mated: Scores, nonmated: Scores) -> float:
    thresholds = np.unique(np.concatenate([mated, nonmated]))
    fnmr = np.searchsorted(np.sort(mated), thresholds) / len(mated)
    fmr = 1 - np.searchsorted(np.sort(nonmated), thresholds) / len(nonmated)
    at = int(np.argmin(np.abs(fnmr - fmr)))
    return float((fnmr[at] + fmr[at]) / 2)


def fnmr_at(mated: Scores, nonmated: Scores, fmr: float) -> float:
    """Share of mates that do not score more than all but a share fmr of the non-mates."""
    return float(np.mean(mated <= np.quantile(nonmated, 1 - fmr, method="higher")))


def milliseconds(matcher: MinutiaeMatcher, records: list[bytes], rounds: int) -> float:
    """A comparison: the least mean of some rounds, each of the first ten records with all."""
    matcher.compare(records[0], records[:2])
    taken = []
    for _ in range(rounds):
        start = time.thread_time()
        for probe in records[:10]:
            matcher.compare(probe, records)
        taken.append((time.thread_time() - start) / len(records[:10]) / len(records) * 1e3)
    return min(taken)


def measure(name: str, fingers: list[list[bytes]], peer_pairs: int) -> dict[str, object]:
    """Figures of a set. fingers: records of each finger's impressions."""
    records = [one for impressions in fingers for one in impressions]
    finger = np.repeat(np.arange(len(fingers)), [len(impressions) for impressions in fingers])
    first = np.append(True, finger[1:] != finger[:-1])
    a, b = np.triu_indices(len(records), 1)
    pairs, same = np.stack([a, b], axis=1), finger[a] == finger[b]
    mated, nonmated, firsts = pairs[same], pairs[~same], pairs[~same & first[a] & first[b]]
    ours, peer = CylinderMatcher(), Bozorth3()
    scores, impostors, strangers_first = (scores_of(ours, records, some) for some in (mated, nonmated, firsts))
    samples = [drawn(some, peer_pairs) for some in (mated, nonmated, firsts)]
    again, peers = ([scores_of(matcher, records, some) for some in samples] for matcher in (ours, peer))
    figures: dict[str, object] = {
        f"{name}: mated, non-mated pairs": f"{len(mated)}, {len(nonmated)}",
        f"{name}: EER, %": per_cent(equal_error_rate(scores, strangers_first)),
        f"{name}: EER, %, sample": per_cent(equal_error_rate(again[0], again[2])),
        f"{name}: EER, %, sample, BOZORTH3": per_cent(equal_error_rate(peers[0], peers[2])),
        f"{name}: FNMR at FMR 0.01, 0.001, %": [per_cent(fnmr_at(scores, impostors, fmr)) for fmr in (1e-2, 1e-3)],
        f"{name}: FNMR at FMR 0.01, %, sample": per_cent(fnmr_at(again[0], again[1], 0.01)),
        f"{name}: FNMR at FMR 0.01, %, sample, BOZORTH3": per_cent(fnmr_at(peers[0], peers[1], 0.01)),
    }
    some = records[:: max(len(records) // 40, 1)][:40]
    ms, peer_ms = milliseconds(ours, some, 10), milliseconds(peer, some, 1)
    figures |= {f"{name}: ms a comparison": round(ms, 4), f"{name}: times as fast as BOZORTH3": round(peer_ms / ms)}
    return figures


def drawn(pairs: Pairs, most: int) -> Pairs:
    chosen = np.random.default_rng(0).choice(len(pairs), min(most, len(pairs)), replace=False)
    return pairs[np.sort(chosen)]


def per_cent(share: float) -> float:
    return round(100 * share, 2)


def made_up(fingers: int, impressions: int) -> list[list[bytes]]:
    """Records of minutiae strewn at random, each impression a little displaced and with some minutiae lost."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(fingers):
        rows = np.column_stack([rng.integers(20, 300, (40, 2)), rng.integers(0, 256, 40), rng.integers(1, 100, 40)])
        found.append([as_record(rows[rng.random(40) < 0.85] + rng.integers(-2, 3, 4)) for _ in range(impressions)])
    return found


def as_record(rows: NDArray[np.int64]) -> bytes:
    x, y, angle, quality = rows.T
    body = np.stack([0x40 | (x >> 8), x & 255, y >> 8, y & 255, angle & 255, np.maximum(quality, 0)], axis=1)
    return write_record(MinutiaeRecord(320, 320, body.astype(np.uint8).tobytes()), 0, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--peer-pairs", type=int, default=1000, help="pairs of a kind and set that BOZORTH3 compares")
    arguments = parser.parse_args()
    if arguments.smoke:
        record("minutiae", measure("made up", made_up(6, 3), 40), keep=False)
        return
    from measure_finger_card import SETS, read_set

    figures: dict[str, object] = {}
    for name, dpi in SETS.items():
        fingers, refused, total = read_set(data_folder() / "fingers" / name, dpi)
        found = {f"{name}: refused": f"{refused} of {total}"}
        found |= measure(name, list(fingers.values()), arguments.peer_pairs)
        figures |= found
        print(f"{name} is done", file=sys.stderr, flush=True)
    own = [figures[f"{name}: EER, %"] for name in SETS if name.startswith("fvc2002")]
    figures["FVC2002 DB1-4_B: mean EER, %"] = round(float(np.mean(own)), 2)
    peers = [figures[f"{name}: EER, %, sample, BOZORTH3"] for name in SETS if name.startswith("fvc2002")]
    figures["FVC2002 DB1-4_B: mean EER, %, BOZORTH3"] = round(float(np.mean(peers)), 2)
    record("minutiae", figures, keep=True)


if __name__ == "__main__":
    main()
