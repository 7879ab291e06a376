"""Every benchmark at smoke size, so that none of them rots."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.bench


@pytest.mark.parametrize(
    ("arguments", "told", "real_data"),
    [
        (["captures.py", "--smoke"], "faces a second", False),
        (["chain.py", "--smoke"], "many a commit: ratio", False),
        (["subject_keys.py", "--smoke"], "a record: us to seal", False),
        (["tamper.py", "--smoke"], "random: undetected                       0", False),
        (["leaks.py", "--smoke"], "found encrypted                          0", False),
        (["front_ends.py", "--smoke"], "enrolments a second", False),
        (["nodes.py", "faults", "--smoke"], "node killed: incomplete or failed        0", False),
        (["nodes.py", "upgrade", "--smoke"], "incomplete                               0", False),
        (["nodes.py", "overhead", "--smoke"], "same answers                             True", False),
        (["nodes.py", "rebuild", "--smoke"], "all replicas serve, first search complete, s", False),
        (["cluster_scaling.py", "--smoke"], "most nodes that make a search faster", False),
        (["replay.py", "--smoke"], "the same picture: share found", False),
        (["renewable.py", "--rows", "1000", "--rounds", "1"], "linked by comparing rows: 0.0", False),
        (["face_gate.py", "--smoke"], "negative {'accepted': 0", False),
        (["fresh_gallery.py", "--smoke"], "0 of 56 first encounters duplicate", False),
        (["synthetic.py", "--smoke"], "generated: ridge period", False),
        (["calibration.py", "--smoke"], "generated fingers, both: FMR at 20 dB", False),
        (["finger_quality.py", "--smoke"], "one pass: rank correlation", False),
        (["minutiae.py", "--smoke"], "made up: EER, %                          0.0", False),
        (["decision.py", "--candidates", "300", "--rounds", "20"], "decision, ms", False),
        (["scale.py", "--subjects", "5000"], "recall@10                                1.0", False),
        (["ektp.py", "--subjects", "300", "--smoke"], "all: FNIR at the policy's threshold      0.0", False),
        (["storage.py", "--subjects", "20000"], "open and first search, s", False),
        (
            ["speed.py", "--rows", "30000", "--mates", "26", "--seconds", "0.05"],
            "mates, candidates, at 0.5 and above      1.0",
            False,
        ),
        (
            ["speed.py", "--rows", "40000", "--mates", "26", "--seconds", "0.05", "--index", "faiss:IVF64,PQ64x4fs"],
            "batch 256, times FAISS IVF64,PQ64x4fs",
            False,
        ),
        (["encryption.py", "--subjects", "20000"], "same answers                             True", False),
        (["costs.py", "--rows", "20000"], "number, ns", False),
        (["national.py", "--rows", "150000"], "mates at 0.8: first / in 10 / in 100", False),
        (["selfjoin.py", "--rows", "20000"], "of those, found                          1.0", False),
        (
            ["merge.py", "--districts", "3", "--rows", "1000", "--kills", "1"],
            "same bytes after the kills               True",
            False,
        ),
        (["columns.py", "--rows", "70000", "--mates", "256", "--risks", "1e-3"], "independent: miss risk 0.001", False),
        (["swap.py", "--rows", "2000", "--probes", "4"], "labels told 0; 4; 4 of 4", False),
        (["bulk.py", "--smoke"], "enrolled people found again   30 of 30", False),
        (["histories.py", "--operations", "150"], "violations                               0", False),
        (["torture.py", "--kills", "2"], "unreadable                               0", False),
        (["torture.py", "--kills", "2", "--encrypted"], "unreadable                               0", False),
        (["accuracy.py", "faces", "--limit", "12"], "FNMR at FMR 0.001", True),
        (["accuracy.py", "fused", "--limit", "2", "--seeds", "1"], "seed 0, all: mate first", True),
        (["fingers.py", "verify", "--limit", "2"], "FVC2002 mean: EER both", True),
        (["fingers.py", "identify", "--limit", "2", "--fillers", "20"], "mate in the first 1 %", True),
        (["accuracy.py", "chimeras", "--limit", "2", "--seeds", "1"], "second duplicate or review", True),
    ],
    ids=lambda value: " ".join(value[:2]).removesuffix("--smoke") if isinstance(value, list) else None,
)
def test_a_benchmark_runs_at_smoke_size_and_states_its_figure(request, tmp_path, arguments, told, real_data):
    if real_data:
        os.environ["BIODEDUP_DATA"] = str(request.getfixturevalue("data_folder"))
    done = subprocess.run(
        [sys.executable, BENCHMARKS / arguments[0], *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
