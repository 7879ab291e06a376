"""Pairs that a scan lets through: compared exactly, and put in order."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biodedup.gallery.files.codes import dequantise, quantise
from biodedup.search.native.exact_pairs import compared, ranked


@pytest.mark.slow
@given(st.integers(0, 60), st.integers(1, 5), st.data())
def test_pairs_are_ranked_by_probe_and_value_and_then_by_row(count, probes, data):
    which = np.array(data.draw(st.lists(st.integers(0, probes - 1), min_size=count, max_size=count)), np.int32)
    values = st.one_of(st.sampled_from([-1.0, -0.0, 0.0, 0.5, -np.inf, np.inf]), st.floats(-1, 1, width=32))
    value = np.array(data.draw(st.lists(values, min_size=count, max_size=count)), np.float32)
    rows = np.array(data.draw(st.permutations(range(count))), np.int64)
    order, rank = ranked(which, value, rows, probes)
    assert order.tolist() == sorted(range(count), key=lambda i: (which[i], -value[i], rows[i]))
    seen = which[order].tolist()
    assert rank.tolist() == [seen[:i].count(probe) for i, probe in enumerate(seen)]


def test_pairs_are_compared_as_vectors_are_and_each_cell_is_read_once():
    rng = np.random.default_rng(0)
    codes, norms = quantise(rng.standard_normal((50, 96), np.float32))
    read = []
    column = SimpleNamespace(codes_at=lambda cells: read.extend(cells) or (codes[cells], norms[cells]))
    cells = np.sort(rng.integers(0, 50, 400))
    which = rng.integers(0, 7, 400)
    probes = rng.standard_normal((7, 96), np.float32)
    found = compared(column, cells, probes, which)
    assert np.allclose(found, np.einsum("ij,ij->i", dequantise(codes, norms)[cells], probes[which]), atol=1e-5)
    assert read == np.unique(cells).tolist()
    assert len(compared(column, cells[:0], probes, which[:0])) == 0
