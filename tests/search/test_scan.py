"""The codes, the kernel and the search over shards, each against an obvious oracle in numpy."""

import ast
import dataclasses
import sys
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher
from scipy.stats import binom, norm

import biodedup as bd
from biodedup.config import SearchConfig
from biodedup.errors import GalleryDamaged
from biodedup.gallery.files import codes as coding
from biodedup.gallery.files.codec import ErrorLaw, estimates, make_codec, measured_laws
from biodedup.gallery.segments.part import ScannedRows
from biodedup.search import costs
from biodedup.search.native import column_statistics as population
from biodedup.search.native import dot_kernel, scan_kernel
from biodedup.search.native.classes import Classes, ClassValues
from biodedup.search.native.estimator import by_nibbles as nibble_estimates
from biodedup.search.native.scan_kernel import ScanProbes
from biodedup.search.native.scanner import Probes, Scanner, paired
from biodedup.search.native.signs import LEVELS, Signs
from biodedup.search.native.table_tile import TableKind
from biodedup.search.native.tables import limits_of, tables_of
from biodedup.search.shards import faiss as faiss_engine
from biodedup.search.shards import native
from biodedup.search.shards.base import ShardHits, ShardQuery
from biodedup.search.shards.fan_out import FanOut
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals

pytestmark = pytest.mark.slow

NOTHING = np.zeros(0, np.uint64)


def unit(count, dimension, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, dimension), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# codes -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # the first one compiles
@given(st.integers(1, 300), st.integers(1, 5), st.integers(0, 12), st.lists(st.integers(0, 300), max_size=5))
def test_codes_come_back_from_their_halves_however_they_were_cut_into_pieces(count, steps, more, cuts):
    scanned, width = 8 * steps, 8 * steps + more
    codes = np.random.default_rng(count).integers(1, 256, (count, width)).astype(np.uint8)
    numbers = codes[:, :scanned].astype(int) - 128
    for bits_of, expected in (
        (coding.sign_bits, numbers >= 0),
        (coding.outer_bits, 10_000 * scanned * numbers**2 > 9_604 * (numbers**2).sum(axis=1, keepdims=True)),
    ):
        pieces = np.split(codes, sorted(c for c in cuts if c <= count))
        blocks = np.concatenate(list(coding.bit_blocks(bits_of(piece, scanned) for piece in pieces)))
        assert blocks.shape == (coding.blocks_of(count), steps, 64)
        bits = np.unpackbits(blocks.transpose(0, 2, 1).reshape(-1, steps), axis=1, bitorder="little")
        assert np.array_equal(bits[:count], expected) and not bits[count:].any()
    high, rest = coding.high_nibbles(codes, scanned), coding.low_nibbles(codes, scanned)
    assert high.shape == (count, scanned // 2) and rest.shape == (count, scanned // 2 + more)
    assert np.array_equal(coding.join_nibbles(high, rest), codes)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 140))
def test_a_vector_and_its_code_are_the_same_but_for_rounding(dimension):
    vectors = unit(50, dimension, dimension)
    codec = make_codec(dimension, [vectors])
    again = codec.decode(*codec.encode(vectors))
    assert np.einsum("ij,ij->i", vectors, again).min() > 0.9995
    assert np.allclose(codec.rotate(vectors) @ codec.rotate(vectors).T, vectors @ vectors.T, atol=1e-5)


def test_vectors_whose_numbers_are_uneven_are_estimated_as_well_as_even_ones():
    rng = np.random.default_rng(3)
    sparse = np.maximum(rng.standard_normal((4_000, 128)) - 1, 0) * rng.lognormal(0, 1.5, 128)
    sparse = (sparse / np.linalg.norm(sparse, axis=1, keepdims=True)).astype(np.float32)
    codec = make_codec(128, [sparse])
    assert codec.law.source == "sample"
    assert max(codec.law.sd) < 0.0115  # 0.0093 for isotropic vectors
    plain = estimates(np.eye(128, dtype=np.float32), 128, sparse[:2000], sparse[2000:])
    true = np.einsum("ij,ij->i", sparse[:2000], sparse[2000:])
    turned = estimates(codec.rotation, 128, sparse[:2000], sparse[2000:])
    assert (turned - true).std() < (plain - true).std()


def test_a_codec_for_many_numbers_scans_the_axes_that_vary():
    rng = np.random.default_rng(4)
    inner = rng.standard_normal((9_000, 70)) @ np.linalg.qr(rng.standard_normal((256, 70)))[0].T
    vectors = inner + 0.02 * rng.standard_normal((9_000, 256))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    codec = make_codec(256, [vectors])
    assert codec.training_rows == 4_500 and not codec.provisional
    assert codec.scanned <= 96
    assert make_codec(256, [vectors[:100]]).provisional


def test_axes_that_were_made_of_a_sample_are_not_measured_on_it():
    rng = np.random.default_rng(4)
    uneven = np.geomspace(1, 0.1, 256) * rng.standard_normal((29_000, 256))
    uneven = (uneven / np.linalg.norm(uneven, axis=1, keepdims=True)).astype(np.float32)
    codec = make_codec(256, [uneven[:9_000]])
    assert codec.scanned < 256
    one, other = uneven[9_000:19_000], uneven[19_000:]
    other = other - np.einsum("ij,ij->i", one, other)[:, None] * one
    mates = 0.5 * one + np.sqrt(0.75) * other / np.linalg.norm(other, axis=1, keepdims=True)
    off = estimates(codec.rotation, codec.scanned, one, mates.astype(np.float32)) - 0.5
    assert abs(off.mean() - (codec.law.mean[5] - 0.5)) < 0.05 * codec.law.sd[5]
    assert off.std() == pytest.approx(codec.law.sd[5], rel=0.04)


@pytest.mark.parametrize("dimension", [256, 512])
def test_of_many_numbers_that_all_vary_the_nearest_impostors_are_found_without_comparing_every_row(
    scanner, fan_out, monkeypatch, dimension
):
    whole = []
    monkeypatch.setattr(native.NativeShard, "_scan_exactly", lambda self, pieces, *_: whole.extend(pieces))
    vectors = unit(60_000, dimension)
    codec = make_codec(dimension, [vectors[:16_384]])
    shards = shards_of(vectors, scanner, codec=codec)
    probes = unit(20, dimension, 5)
    found = fan_out.nearest(shards, probes, ShardQuery("face", 10, len(vectors), 1e-4))
    rows, _ = exact(probes, shards, 10)
    assert (found.rows == rows).mean() > 0.98  # neighbours a rounding error apart may change places
    assert not whole and found.compared < 0.02 * len(vectors) * len(probes)


def test_the_measured_error_holds_for_pairs_that_did_not_set_it():
    codec = make_codec(128, [unit(4_000, 128)])
    gallery = unit(50_000, 128, 8)
    for risk in (1e-2, 1e-3):
        z, measured = codec.law.margin(risk)
        assert measured
        assert codec.law.risk_bound(sum(value < -z for value in codec.law.lowest)) <= risk
        for similarity in (0.35, 0.6):
            probes = mates_of(gallery, np.full(len(gallery), similarity), seed=9)
            seen = estimates(codec.rotation, codec.scanned, probes, gallery)
            missed = seen < codec.law.cut(np.full(len(gallery), similarity, np.float32), z)
            assert missed.sum() <= binom.ppf(0.999, len(gallery), risk)
    z, measured = codec.law.margin(1e-7)
    assert not measured and z == norm.isf(1e-7)


def test_no_miss_among_so_many_bounds_the_rate_at_three_in_so_many():
    law = ErrorLaw((0.0, 1.0), (0.0, 1.0), (0.01, 0.01), 10_000, (-4.0, -3.0), "sample")
    assert law.risk_bound(0) == pytest.approx(3 / 10_000, rel=0.01)
    assert law.margin(3.1e-4) == (4.0, True)
    assert law.margin(2.9e-4)[1] is False


def test_a_law_and_its_inverse_agree():
    law = ErrorLaw((0.0, 0.5, 1.0), (0.0, 0.45, 0.9), (0.02, 0.02, 0.01), 10, (), "sample")
    wanted = np.linspace(-0.3, 0.95, 30, dtype=np.float32)
    assert np.allclose(law.similarity_at(law.cut(wanted, 3), 3), wanted, atol=2e-3)


# the kernel ------------------------------------------------------------------------------------------------------


NO_BITS = np.zeros((0, 0, 64), np.uint8)
SCANS = {name: scan_kernel.make_scans(name) for name in dot_kernel.available()}


@pytest.mark.parametrize("instructions", dot_kernel.available())
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 20), st.booleans(), st.data())
def test_the_kernel_without_tables_finds_what_numpy_finds(instructions, count, steps, probes, with_removed, data):
    rng = np.random.default_rng(count)
    codes = rng.integers(1, 256, (count, 8 * steps)).astype(np.uint8)
    high, blocks = coding.high_nibbles(codes, 8 * steps), coding.blocks_of(count)
    norms = rng.uniform(100, 600, 64 * blocks).astype(np.float32)
    probe = rng.integers(-127, 128, (probes, 8 * steps)).astype(np.int8)
    parameters = np.stack([rng.uniform(0, 0.02, probes), rng.uniform(-50, 50, probes)], axis=1).astype(np.float32)
    cuts = rng.uniform(-5, 5, probes).astype(np.float32)
    first, last = sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count))))
    live = rng.random(64 * blocks) < 0.7
    bits = np.packbits(live, bitorder="little").view(np.uint64) if with_removed else NOTHING
    stored = ScannedRows(NO_BITS, NO_BITS, high, norms, norms.min())
    asked = ScanProbes(
        codes=paired([probe]),
        parameters=parameters[None],
        evidence=np.zeros((1, 0), np.float32),
        tables=np.zeros((probes, 0, 16), np.uint8),
        places=np.zeros((probes, 0), np.int32),
        limits=np.zeros(probes, np.uint8),
        used=np.zeros(1, np.int64),
        kind=TableKind.CLASSES,
    )
    out = (np.empty(asked.room, np.int32), np.empty(asked.room, np.int64), np.empty(asked.room, np.float32))
    ours, block, compared = {}, 0, 0
    while block < -(-last // 64):
        number, block, some = scan_kernel.scan(
            columns=[stored],
            members=None,
            live=bits,
            span=(first, last),
            start=block,
            probes=asked,
            cuts=cuts,
            out=out,
            kernels=SCANS[instructions],
        )
        compared += some
        for p, cell, value in zip(*(array[:number].tolist() for array in out), strict=True):
            ours[p, cell] = value
    dots = (probe.astype(np.int64) @ (codes >> 4).astype(np.int64).T).astype(np.float32)
    values = parameters[:, :1] * (dots - parameters[:, 1:]) / norms[:count]
    counted = np.arange(count) >= first
    counted &= (np.arange(count) < last) & (live[:count] | (not with_removed))
    assert compared == probes * counted.sum()
    passed = (values >= cuts[:, None]) & counted
    assert set(ours) == set(zip(*(array.tolist() for array in np.nonzero(passed)), strict=True))
    assert all(values[pair] == value for pair, value in ours.items())


def test_no_kernel_keeps_an_array_s_address_longer_than_the_array():
    """numba frees an array after its last use by name; who reads there by address then reads what another thread has written."""
    root = Path(bd.__file__).parent
    functions = [
        (path.name, node)
        for path in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("njit" in ast.unparse(one) for one in node.decorator_list)
    ]
    assert len(functions) > 40
    for file, function in functions:
        given_names = {argument.arg for argument in function.args.args}
        for node in ast.walk(function):
            if not (isinstance(node, ast.Attribute) and ast.unparse(node).endswith(".ctypes.data")):
                continue
            array = node.value.value
            while not isinstance(array, ast.Name):
                array = array.value
            later = [
                use.lineno
                for use in ast.walk(function)
                if isinstance(use, ast.Name) and use.id == array.id and use.lineno > node.lineno
            ]
            assert array.id in given_names or later, f"{file}, {function.name}: {array.id}"


def test_no_kernel_that_is_kept_on_disk_closes_over_compiled_functions():
    modules = [module for name, module in sys.modules.items() if name.startswith("biodedup.")]
    kernels = {one for module in modules for one in vars(module).values() if isinstance(one, Dispatcher)}
    assert {scan_kernel._scan, scan_kernel._scan_all} <= kernels
    assert [one for one in kernels if one.py_func.__closure__] == []  # else each process would compile it anew


# searching -------------------------------------------------------------------------------------------------------


class Column:
    """A coded column in memory."""

    full = True

    def __init__(self, vectors, codec):
        self.codec, self.count, self.dimension = codec, len(vectors), vectors.shape[1]
        self.codes, norms = codec.encode(vectors)
        self.signs, self.outer = (
            np.concatenate(list(coding.bit_blocks([bits(self.codes, codec.scanned)])))
            for bits in (coding.sign_bits, coding.outer_bits)
        )
        self.high = coding.high_nibbles(self.codes, codec.scanned)
        self.norms = np.zeros(64 * len(self.signs), np.float32)
        self.norms[: self.count] = norms
        self.read = 0

    def scanned(self, low, high):
        first, last = low // 64, -(-high // 64)
        rows = slice(64 * first, 64 * last)
        blocks, norm_min = slice(first, last), self.norms[: self.count].min()
        return ScannedRows(self.signs[blocks], self.outer[blocks], self.high[rows], self.norms[rows], norm_min)

    def coded(self, codec, low, high):
        return self.codes[low:high], self.norms[low:high]

    def codes_at(self, cells):
        self.read += len(cells)
        return self.codes[cells], self.norms[cells]

    def release(self, *, forget):
        pass

    def vectors(self, low, high):
        return self.codec.decode(self.codes[low:high], self.norms[low:high])

    def vectors_at(self, cells):
        return self.codec.decode(self.codes[cells], self.norms[cells])

    def cell_range(self, low, high):
        return low, high

    def positions(self, low, high):
        return np.arange(low, high)


class Part:
    def __init__(self, vectors, codec, first_row):
        self.columns = {"face": Column(vectors, codec)}
        self.first_row, self.count, self.end_row = first_row, len(vectors), first_row + len(vectors)

    def rows(self, positions):
        return positions + self.first_row

    def position_range(self, low, high):
        low, high = np.clip((low - self.first_row, high - self.first_row), 0, self.count)
        return int(low), int(high)


class Snapshot:
    version = 7
    streamed = frozenset()

    def __init__(self):
        self.parts = []

    def mask(self, part, groups=None, hidden=frozenset()):
        return None

    def live_bits(self, part, column, groups=None, hidden=frozenset()):
        return NOTHING


@pytest.fixture(scope="module")
def scanner():
    scanner = Scanner(2)
    yield scanner
    scanner.close()


@pytest.fixture
def fan_out():
    fan_out = FanOut()
    yield fan_out
    fan_out.close()


def shards_of(vectors, scanner, pieces=2, codec=None):
    codec = codec or make_codec(vectors.shape[1], [vectors])
    snapshot, first = Snapshot(), 0
    for piece in np.array_split(vectors, pieces):
        snapshot.parts.append(Part(piece, codec, first))
        first += len(piece)
    return [native.NativeShard(snapshot, [part], scanner) for part in snapshot.parts]


def exact(probes, shards, k):
    parts = [part for one in shards for part in one._parts]
    stored = np.concatenate([part.columns["face"].vectors(0, part.count) for part in parts])
    similarity, rows = faiss.knn(probes, stored, k, metric=faiss.METRIC_INNER_PRODUCT)
    return rows, similarity


@pytest.mark.parametrize("dimension", [64, 128])
@pytest.mark.parametrize("miss_risk", [1e-4, 0.0])
def test_the_nearest_are_those_of_an_exact_search(scanner, fan_out, dimension, miss_risk):
    vectors = unit(80_000, dimension)
    shards = shards_of(vectors, scanner)
    probes = np.concatenate([mates_of(vectors[:10], np.full(10, 0.5)), unit(10, dimension, 5)])
    found = fan_out.nearest(shards, probes, ShardQuery("face", 10, len(vectors), miss_risk))
    rows, similarity = exact(probes, shards, 10)
    whole = np.isclose(found.similarity, similarity, atol=1e-5).all(axis=1)
    # of 200 neighbours at a risk of 1e-4 one is lost in two runs of a hundred, and with it the places behind it of its probe
    assert np.count_nonzero(~whole) <= (1 if miss_risk else 0)
    assert (found.rows[whole] == rows[whole]).mean() > 0.99  # neighbours a rounding error apart may change places
    assert found.rows_scanned == len(vectors)
    assert found.compared < 0.1 * len(vectors) * len(probes)


def test_a_gallery_that_is_not_normal_at_all_is_searched_as_exactly(scanner, fan_out):
    """Ten thousand copies of nearly one vector: many more rows reach the cut than the normal law says."""
    rng = np.random.default_rng(0)
    vectors = unit(60_000, 128)
    vectors[20_000:50_000] = vectors[0] + 0.02 * rng.standard_normal((30_000, 128), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    shards = shards_of(vectors, scanner)
    probes = np.concatenate([vectors[:1], vectors[25_000:25_003], unit(4, 128, 6)])
    found = fan_out.nearest(shards, probes, ShardQuery("face", 20, len(vectors), 1e-4))
    _, similarity = exact(probes, shards, 20)
    assert np.allclose(found.similarity, similarity, atol=1e-5)


@pytest.mark.parametrize("guess", [0.5, 0.95])
def test_where_the_sample_misleads_a_second_round_finds_the_rest(scanner, fan_out, monkeypatch, guess):
    """At 0.5 some reach the guess, at 0.95 nobody does."""
    vectors = unit(50_000, 128)
    shards = shards_of(vectors, scanner)
    probes = unit(5, 128, 6)
    monkeypatch.setattr(population.Population, "reached_by", lambda self, probes, share: np.full(5, guess, np.float32))
    monkeypatch.setattr(scanner, "exact_above", None)  # whose result nothing bounds
    found = fan_out.nearest(shards, probes, ShardQuery("face", 10, len(vectors), 1e-4))
    _, similarity = exact(probes, shards, 10)
    assert np.allclose(found.similarity, similarity, atol=1e-5)


def test_more_rows_above_a_similarity_than_can_be_collected_are_found_all_the_same(scanner, fan_out, monkeypatch):
    monkeypatch.setattr(native, "_HITS_MAX", 20)
    vectors = unit(50_000, 128)
    shards = shards_of(vectors, scanner)
    least = np.full(3, 0.2, np.float32)
    found = fan_out.reached(
        shards, unit(3, 128, 6), ShardQuery("face", 0, len(vectors), 1e-3, min_similarity=least)
    ).found
    _, similarity = exact(unit(3, 128, 6), shards, 1_500)
    assert [len(rows) for rows, _ in found] == (similarity >= 0.2).sum(axis=1).tolist()


def test_all_rows_from_a_similarity_on_are_found(scanner, fan_out):
    vectors = unit(60_000, 128)
    shards = shards_of(vectors, scanner, 3)
    probes = unit(6, 128, 6)
    least = np.full(6, 0.3, np.float32)
    found = fan_out.reached(shards, probes, ShardQuery("face", 0, len(vectors), 1e-5, min_similarity=least)).found
    rows, similarity = exact(probes, shards, 300)
    for (ours, values), theirs, all_values in zip(found, rows, similarity, strict=True):
        kept = values >= 0.3
        assert set(ours[kept].tolist()) == set(theirs[all_values >= 0.3].tolist())
        assert (np.diff(values) <= 0).all()


def told(found, least):
    return {(i, row) for i, (rows, values) in enumerate(found) for row in rows[values >= least].tolist()}


def counting_scans(monkeypatch):
    """The number of tables of each call of the kernel."""
    calls = []
    real = scan_kernel.scan
    monkeypatch.setattr(
        scan_kernel, "scan", lambda **given: calls.append(given["probes"].tables.shape[1]) or real(**given)
    )
    return calls


def test_probes_are_searched_by_tables_and_find_the_pairs_of_a_scan_of_all_rows(scanner, fan_out, monkeypatch):
    monkeypatch.setattr(
        costs, "ROW_COSTS", {dot_kernel.INSTRUCTIONS: costs.ROW_COSTS["avx2"]}
    )  # whatever the processor
    vectors = unit(50_000, 128)
    shards = shards_of(vectors, scanner)
    probes = mates_of(vectors[:600], np.linspace(0.45, 0.95, 600))
    plan = ShardQuery("face", 0, len(vectors), 1e-3, min_similarity=np.full(600, 0.6, np.float32))
    for some in (slice(None), slice(1)):  # one shard measures, and the other scans without tables meanwhile
        fan_out.reached(shards, probes[some], replace(plan, min_similarity=plan.min_similarity[some]))
    calls = counting_scans(monkeypatch)
    by_tables = fan_out.reached(shards, probes, plan).found
    one = fan_out.reached(shards, probes[-1:], replace(plan, min_similarity=plan.min_similarity[:1])).found
    assert min(calls) > 0
    assert told(one, 0.6) == {(0, row) for i, row in told(by_tables, 0.6) if i == 599}
    assert {(i, i) for i in range(200, 600)} <= told(by_tables, 0.6)
    calls.clear()
    exactly = fan_out.reached(shards, probes, replace(plan, miss_risk=0.0)).found
    assert max(calls) == 0
    assert told(by_tables, 0.6) == told(exactly, 0.6)
    calls.clear()
    fan_out.reached(shards, probes, replace(plan, min_similarity=np.full(600, 0.2, np.float32)))
    assert not calls  # too many unrelated rows would pass


@pytest.mark.parametrize(("dimension", "tables"), [(96, 24), (128, 24), (128, 64), (256, 64)])
def test_the_nearest_of_many_probes_are_those_of_an_exact_search(scanner, fan_out, monkeypatch, dimension, tables):
    vectors = unit(150_000, dimension)
    shards = shards_of(vectors, scanner)
    probes = np.concatenate([mates_of(vectors[:30], np.linspace(0.4, 0.9, 30)), unit(11, dimension, 5)])
    calls = counting_scans(monkeypatch)
    monkeypatch.setattr(native, "_cheapest", lambda column, *_: population.classes_of(column, tables))
    found = fan_out.nearest(shards, probes, ShardQuery("face", 2, len(vectors), 1e-3))
    assert min(calls) > 0
    rows, similarity = exact(probes, shards, 2)
    assert np.isclose(found.similarity, similarity, atol=1e-5).mean() > 0.99
    assert (found.rows[:30, 0] == rows[:30, 0]).all()


ESTIMATORS = [
    pytest.param(lambda sample: Signs(sample, 128), 0.797, id="signs"),
    pytest.param(lambda sample: Signs(sample, 128, 0.5), 0.797, id="half of the signs"),
    *(
        pytest.param(lambda sample, n=n: Classes(ClassValues(sample, 128), n), 0.88, id=f"{n} tables of classes")
        for n in (24, 40, 64)
    ),
]


@pytest.mark.parametrize(("made", "kept"), ESTIMATORS)
def test_estimates_by_tables_rise_with_similarity(made, kept):
    estimator = made(unit(4_000, 128))
    law = estimator.error_distributions[0]
    assert law.mean[10] == pytest.approx(kept, abs=0.12)
    assert (np.diff(law.mean) > 0).all()


@pytest.mark.parametrize("tables", [24, 40, 64])
def test_estimates_by_classes_are_dot_products_with_what_classes_stand_for_and_foreseen_for_unrelated_rows(tables):
    one, other = unit(400, 128, 1), unit(400, 128, 2)
    classes = Classes(ClassValues(unit(4_000, 128), 128), tables)
    codes = coding.quantise(other)[0].astype(int) - 128
    outer = 10_000 * 128 * codes**2 > 9_604 * (codes**2).sum(axis=1, keepdims=True)
    low, high = np.unique(classes._values.levels)[2:]
    stands_for = np.where(codes >= 0, 1, -1) * np.where(outer, high, low)
    expected = np.zeros(400)
    for i in range(400):
        energy = (one[i] ** 2).reshape(-1, 2).sum(axis=1)
        best = np.argsort(-energy, kind="stable")[:tables]
        seen = np.isin(np.arange(128) // 2, best)
        expected[i] = (one[i] * stands_for[i])[seen].sum() / (one[i][seen] ** 2).sum() / np.sqrt(128)
    off = classes.estimates(one, other) - expected
    assert (off - off.mean()).std() < 0.01
    assert abs(off.mean()) < 0.005
    mean, sd = classes.unrelated(one[:20])
    seen = np.array(
        [classes.estimates(np.repeat(one[i : i + 1], 20_000, axis=0), unit(20_000, 128, 3)) for i in range(20)]
    )
    assert np.allclose(mean, seen.mean(axis=1), atol=0.01)
    assert np.allclose(sd, seen.std(axis=1), rtol=0.1)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_leading_signs_are_scaled_to_stand_for_all_and_foreseen_for_unrelated_rows(share):
    one, other = unit(400, 128, 1), unit(400, 128, 2)
    some, leading = Signs(unit(4_000, 128), 128, share), int(128 * share)
    assert (some.tables, some.octets) == (leading // 4, leading // 8)
    signs = np.where(coding.quantise(other)[0].astype(int) >= 128, 1, -1)
    energy = (one[:, :leading] ** 2).sum(axis=1) if share < 1 else 1
    expected = (one * signs)[:, :leading].sum(axis=1) / energy / np.sqrt(128)
    assert np.abs(some.estimates(one, other) - expected).max() < 0.03
    mean, sd = some.unrelated(one[:20])
    seen = np.array(
        [some.estimates(np.repeat(one[i : i + 1], 20_000, axis=0), unit(20_000, 128, 3)) for i in range(20)]
    )
    assert np.allclose(mean, seen.mean(axis=1), atol=0.02)
    assert np.allclose(sd, seen.std(axis=1), rtol=0.1)


@pytest.mark.parametrize(("tables", "kept"), [(32, 0.87), (48, 0.92), (64, 0.94)])
def test_the_pairs_in_which_a_probe_is_largest_keep_most_of_the_correlation(tables, kept):
    probes, vectors = unit(20_000, 128, 1), unit(20_000, 128, 2)
    estimates = Classes(ClassValues(unit(4_000, 128), 128), tables).estimates(probes, vectors)
    assert np.corrcoef(estimates, np.einsum("ij,ij->i", probes, vectors))[0, 1] == pytest.approx(kept, abs=0.01)


def test_no_sum_of_tables_overflows_a_byte():
    one, other = unit(400, 128, 1), unit(400, 128, 2)
    for numbers, levels in (
        (np.concatenate([one, other[:, :32]], axis=1).reshape(400, -1, 4), LEVELS),
        (one[:, :120].reshape(400, -1, 2), ClassValues(unit(4_000, 128), 128).levels),
    ):
        tables, steps, middles = tables_of(numbers, levels)
        assert tables.shape == (400, numbers.shape[1], 16)
        quarters = tables.max(axis=2).astype(int).reshape(400, 4, -1).sum(axis=2)
        assert 200 < quarters.max() <= 255
        assert np.allclose(quarters.sum(axis=1) * steps, 2 * middles, rtol=0.05)
        assert limits_of(middles * 5, steps, middles).min() == 255  # out of reach, and no wrap-around


def test_a_table_has_an_entry_for_every_combination_of_signs():
    numbers = unit(20, 32, 3).reshape(20, 8, 4)
    tables, steps, _ = tables_of(numbers, LEVELS)
    entries = np.arange(16)
    expected = np.zeros((20, 8, 16), np.float32)
    for b in range(4):
        expected += np.abs(numbers[:, :, b, None]) + numbers[:, :, b, None] * np.where(entries >> b & 1, 1, -1)
    assert np.abs(tables - expected / steps[:, None, None]).max() <= 0.501


@pytest.mark.parametrize(("made", "kept"), ESTIMATORS)
def test_no_more_pairs_are_lost_to_tables_and_nibbles_together_than_the_risk(made, kept):
    estimator = made(unit(4_000, 128))
    by_tables, by_nibbles = estimator.error_distributions
    margin, measured = by_tables.margin(1e-3)
    assert measured and by_nibbles.margin(1e-3) == (margin, True)
    gallery = unit(50_000, 128, 8)
    for similarity in (0.35, 0.6):
        probes = mates_of(gallery, np.full(len(gallery), similarity), seed=9)
        level = np.full(len(gallery), similarity, np.float32)
        lost = estimator.estimates(probes, gallery) < by_tables.cut(level, margin)
        lost |= nibble_estimates(128)(probes, gallery) < by_nibbles.cut(level, margin)
        assert 0 < lost.sum() <= binom.ppf(0.999, len(gallery), 1e-3)


def test_a_margin_for_two_steps_counts_what_either_loses():
    vectors = unit(2_000, 64)

    def some(seed):
        """An estimate that is far too low for one pair in two hundred, others each time."""
        return lambda one, other: (
            np.einsum("ij,ij->i", one, other)
            - (np.random.default_rng([seed, int(abs(1e6 * one[0, 0]))]).random(len(one)) < 0.005)
        )

    def lowest(*estimates):
        laws = measured_laws(estimates, vectors, "sample", np.random.default_rng(3))
        assert len({law.lowest for law in laws}) == 1
        return np.array(laws[0].lowest)

    both = lowest(some(1), some(2))
    assert np.array_equal(both, lowest(some(2), some(1)))
    for alone in (lowest(some(1)), lowest(some(2))):
        assert (both <= alone).all() and (both < alone).any()


@pytest.mark.parametrize("instructions", dot_kernel.available())
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 3), st.integers(1, 20), st.booleans(), st.booleans(), st.data())
def test_the_kernel_with_tables_finds_what_numpy_finds(instructions, count, columns, probes, mapped, summed, data):
    rng = np.random.default_rng(count)
    in_order = data.draw(st.booleans())  # one probe that looks at all signs
    if in_order:
        columns, probes, mapped = 1, 1, False
    classes = columns == 1 and not mapped and not in_order and data.draw(st.booleans())
    kind = TableKind.CLASSES if classes else TableKind.SIGNS
    scanned = [
        32 * data.draw(st.integers(1, 4)) if in_order else 8 * data.draw(st.integers(1, 18)) for _ in range(columns)
    ]
    used = [some // 2 if kind == TableKind.CLASSES else data.draw(st.integers(0, some // 4)) for some in scanned]
    if in_order:
        used = [scanned[0] // 4]
    if not sum(used):
        used[0] = 1
    cells = 2 * count if mapped else count
    codes = [rng.integers(1, 256, (cells, some)).astype(np.uint8) for some in scanned]
    signs, outer = (
        [np.concatenate(list(coding.bit_blocks([bits(some, n)]))) for some, n in zip(codes, scanned, strict=True)]
        for bits in (coding.sign_bits, coding.outer_bits)
    )
    high = [coding.high_nibbles(some, n) for some, n in zip(codes, scanned, strict=True)]
    norms = [rng.uniform(100, 600, 64 * len(plane)).astype(np.float32) for plane in signs]
    members = np.stack([np.sort(rng.permutation(cells)[:count]) for _ in range(columns)]).astype(np.int32)
    which = members if mapped else np.tile(np.arange(count), (columns, 1))
    asked = [rng.integers(-127, 128, (probes, some)).astype(np.int8) for some in scanned]
    looked_at = used[0] if in_order else 4 * data.draw(st.integers(1, 10))
    places = rng.integers(0, sum(used), (probes, looked_at)).astype(np.int32)
    if in_order:
        places = np.arange(looked_at, dtype=np.int32)[None]
    tables = rng.integers(0, 255 // (looked_at // 4) + 1, (probes, looked_at, 16)).astype(np.uint8)
    limits = rng.integers(0, 160, probes).astype(np.uint8)
    parameters = np.stack([rng.uniform(0, 0.02, (columns, probes)), rng.uniform(-50, 50, (columns, probes))], axis=2)
    parameters = parameters.astype(np.float32)
    evidence = rng.uniform(-30, 30, (columns, 201 if summed or columns > 1 else 0)).astype(np.float32)
    cuts = rng.uniform(-5, 5, probes).astype(np.float32)
    first, last = sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count))))
    live = rng.random(-(-count // 64) * 64) < 0.7
    alive = np.packbits(live, bitorder="little").view(np.uint64)

    ours, block, passed = {}, 0, 0
    given = ScanProbes(
        codes=paired(asked),
        parameters=parameters,
        evidence=evidence,
        tables=tables,
        places=places,
        limits=limits,
        used=np.array(used),
        kind=kind,
    )
    found = (np.empty(given.room, np.int32), np.empty(given.room, np.int64), np.empty(given.room, np.float32))
    while block < -(-last // 64):
        number, block, some = scan_kernel.scan(
            columns=[ScannedRows(*planes, planes[3].min()) for planes in zip(signs, outer, high, norms, strict=True)],
            members=members if mapped else None,
            live=alive,
            span=(first, last),
            start=block,
            probes=given,
            cuts=cuts,
            out=found,
            kernels=SCANS[instructions],
        )
        passed += some
        for p, row, value in zip(*(array[:number].tolist() for array in found), strict=True):
            ours[p, row] = value

    entries, totals = [], np.zeros((probes, count), np.float32)
    for c in range(columns):
        mine = codes[c][which[c]]
        numbers = mine.astype(int) - 128
        wide = 10_000 * scanned[c] * numbers**2 > 9_604 * (numbers**2).sum(axis=1, keepdims=True)
        for t in range(used[c]):
            of_table = slice(kind * t, kind * (t + 1))
            entry = ((numbers[:, of_table] >= 0) << np.arange(kind)).sum(axis=1)
            if kind == TableKind.CLASSES:
                entry |= (wide[:, of_table] << np.arange(2, 4)).sum(axis=1)
            entries.append(entry)
        dots = (asked[c].astype(np.int64) @ (mine >> 4).astype(np.int64).T).astype(np.float32)
        value = parameters[c, :, :1] * (dots - parameters[c, :, 1:]) / norms[c][which[c]]
        if evidence.shape[1]:
            value = evidence[c][np.clip(np.rint((value + np.float32(1)) * np.float32(100)).astype(int), 0, 200)]
        totals += value
    sums = np.zeros((4, probes, count), np.int64)
    for p in range(probes):
        for i in range(looked_at):
            sums[i // (looked_at // 4), p] += tables[p, i, entries[places[p, i]]]
    means = (((sums[0] + sums[1] + 1) >> 1) + ((sums[2] + sums[3] + 1) >> 1) + 1) >> 1
    reached = (means >= limits[:, None]) & live[:count]
    reached[:, :first] = reached[:, last:] = False
    assert passed == reached.sum()
    reached &= totals >= cuts[:, None]
    assert set(ours) == set(zip(*(array.tolist() for array in np.nonzero(reached)), strict=True))
    assert all(abs(totals[pair] - value) < 1e-4 for pair, value in ours.items())


def test_a_shard_that_fails_makes_the_search_incomplete_and_the_others_answer(scanner, fan_out):
    class Broken:
        def search(self, probes, plan):
            raise GalleryDamaged("a disk died")

    vectors = unit(40_000, 128)
    good, _ = shards_of(vectors, scanner)
    found = fan_out.nearest([good, Broken()], vectors[:3], ShardQuery("face", 5, len(vectors), 1e-3))
    assert found.failures == ("shard 1: a disk died",)
    assert found.rows[:, 0].tolist() == [0, 1, 2]


def test_a_shard_elsewhere_needs_no_more_than_search(fan_out):
    class Elsewhere:
        def search(self, probes, plan):
            which = np.arange(len(probes))
            return ShardHits(
                which, which + 100, np.ones(len(probes), np.float32), np.zeros(len(probes), np.float32), 3, 1
            )

    found = fan_out.nearest([Elsewhere()], unit(2, 8), ShardQuery("face", 1, 10, 0.1))
    assert found.rows.tolist() == [[100], [101]]


def test_a_decision_over_a_gallery_of_which_a_segment_cannot_be_read_is_never_unique(tmp_path, monkeypatch):
    vectors = unit(300, 128)
    with bd.Engine.open(tmp_path / "g", bd.Config(gallery=bd.GalleryConfig(seal_rows=64, background=False))) as engine:
        engine.add_templates([f"s{i}" for i in range(300)], {"face": vectors})
        engine.maintain()
        real = native.NativeShard.search

        def failing(self, probes, plan):
            if any(part.first_row == 0 for part in self._parts):
                raise GalleryDamaged("unreadable")
            return real(self, probes, plan)

        monkeypatch.setattr(native.NativeShard, "search", failing)
        with pytest.raises(GalleryDamaged):  # all of it is one shard
            engine.search({"face": vectors[:1]})
        monkeypatch.setattr(faiss_engine, "shares", lambda parts: [[part] for part in parts])
        decision = engine.enroll(bd.Encounter("new", templates={"face": unit(1, 128, 77)[0]}))
        assert decision.outcome == "review" and decision.incomplete
        assert engine.search({"face": vectors[:1]}).incomplete


def test_an_estimate_is_never_further_off_than_the_stated_bound():
    vectors, codec = unit(5_000, 128), make_codec(128, [])
    column = Column(vectors, codec)
    probes = Probes(codec, unit(50, 128, 3))
    dots = (probes.codes.astype(np.int64) @ (column.codes >> 4).astype(np.int64).T).astype(np.float64)
    norms = column.norms[: column.count]
    true = probes.rotated @ coding.dequantise(column.codes, norms).T
    at_most = 16 * probes.scales[:, None] * (dots - (probes.middle - probes.slack)[:, None]) / norms
    assert (true <= at_most + probes.rounding[:, None]).all()


def test_removed_rows_and_other_groups_are_left_out_inside_the_scan(tmp_path):
    vectors = unit(40_000, 64)
    with bd.Engine.open(tmp_path / "g", bd.Config(gallery=bd.GalleryConfig(background=False))) as engine:
        names = [f"s{i}" for i in range(len(vectors))]
        groups = [["even" if i % 2 == 0 else "odd"] for i in range(len(vectors))]
        engine.add_templates(names, {"face": vectors}, groups=groups)
        assert engine.search({"face": vectors[:4]}, k=1).ids[:, 0].tolist() == ["s0", "s1", "s2", "s3"]
        assert engine.search({"face": vectors[:4]}, k=1, groups=["odd"]).ids[[1, 3], 0].tolist() == ["s1", "s3"]
        for group, parity in (("odd", 1), ("even", 0)):
            ids, similarity = engine.search({"face": vectors[:20]}, k=5, groups=[group])
            among = np.arange(parity, len(vectors), 2)
            best, _ = faiss.knn(vectors[:20], vectors[among], 5, metric=faiss.METRIC_INNER_PRODUCT)
            assert np.allclose(similarity, best, atol=0.004)
            assert all(int(name[1:]) % 2 == parity for name in ids.reshape(-1))
        engine.remove("s2")
        assert engine.search({"face": vectors[2:3]}, k=1).ids[0, 0] != "s2"
        engine.compact()
        assert engine.search({"face": vectors[:4]}, k=1).ids[[0, 1, 3], 0].tolist() == ["s0", "s1", "s3"]


def test_search_settings_are_checked():
    with pytest.raises(bd.InvalidInput, match="miss_risk"):
        SearchConfig(miss_risk=0.7)
    assert dataclasses.replace(SearchConfig(), miss_risk=0.0).miss_risk == 0


def test_a_plan_says_what_is_looked_at_and_what_may_be_missed_and_why(tmp_path):
    with bd.Engine.open(tmp_path / "g", bd.Config(gallery=bd.GalleryConfig(background=False))) as engine:
        engine.add_templates([f"s{i}" for i in range(20_000)], {"face": unit(20_000, 128)})
        engine.add_templates(["t"], {"face": unit(1, 128, 3)})
        plan = engine.plan()
        (face,) = plan.columns
        assert (face.rows, face.coded_rows, face.scanned_bytes, face.share) == (20_001, 20_000, 32, 1.0)
        assert 0 < face.miss_bound <= 1e-3
        text = plan.explain()
        assert "all of 20,001 rows are looked at, 1 of them exactly, 20,000 by 32 bytes" in text
        assert f"{face.checked:,} pairs set aside" in text
        assert "sample vectors" in text
        with pytest.raises(bd.InvalidInput, match="toe"):
            engine.plan(["toe"])
    for miss_risk, words in ((0.0, "no row can be missed"), (1e-9, "too few to confirm")):
        config = bd.Config(search=SearchConfig(miss_risk=miss_risk))
        with bd.Engine.open(tmp_path / "g", config, read_only=True) as engine:
            assert words in engine.plan().explain()


def test_deletes_a_reopening_and_merges_change_no_answer(tmp_path):
    vectors = unit(60_000, 128)
    probes = mates_of(vectors[:300], np.linspace(0.35, 0.8, 300))
    removed = set(range(0, 300, 7))
    config = bd.Config(gallery=bd.GalleryConfig(seal_rows=8_192, background=False))
    answers = []

    def ask(engine):
        result = engine.search({"face": probes}, k=20)
        answers.append((result.ids.tolist(), result.similarity.tobytes()))

    with bd.Engine.open(tmp_path / "g", config) as engine:
        for low in range(0, 60_000, 20_000):
            names = [f"s{row}" for row in range(low, low + 20_000)]
            engine.add_templates(names, {"face": vectors[low : low + 20_000]})
            engine.maintain()
        for row in removed:
            engine.remove(f"s{row}")
        ask(engine)
    with bd.Engine.open(tmp_path / "g", config) as engine:
        ask(engine)
        parts = len(internals(engine).gallery.snapshot().parts)
        engine.compact()
        assert len(internals(engine).gallery.snapshot().parts) < parts
        assert not len(internals(engine).gallery.snapshot().tombstones)
        ask(engine)
    assert answers[0] == answers[1] == answers[2]
    similarity = probes @ vectors.T
    similarity[:, sorted(removed)] = -1
    best = [f"s{row}" for row in similarity.argmax(axis=1)]
    ours = [ids[0] for ids in answers[0][0]]
    assert [a for a, b in zip(ours, best, strict=True) if a != b] == []


def test_a_sealed_column_holds_the_bits_and_nibbles_of_its_codes(tmp_path):
    with bd.Engine.open(tmp_path / "g", bd.Config(gallery=bd.GalleryConfig(background=False))) as engine:
        engine.add_templates([f"s{i}" for i in range(9_000)], {"face": unit(9_000, 128)})
        engine.compact()
        (part,) = (part for part in internals(engine).gallery.snapshot().parts if part.count)
        column = part.columns["face"]
        stored, (codes, norms) = column.scanned(0, 9_000), column.codes_at(np.arange(9_000))
        for bits_of, plane in ((coding.sign_bits, stored.signs), (coding.outer_bits, stored.outer)):
            assert np.array_equal(np.concatenate(list(coding.bit_blocks([bits_of(codes, 128)]))), plane)
        assert not np.array_equal(stored.signs, stored.outer)
        assert np.array_equal(coding.high_nibbles(codes, 128), stored.high)
        assert np.array_equal(stored.norms[:9_000], norms) and stored.norm_min == norms.min()


def test_while_one_search_measures_the_laws_of_tables_others_scan_without_them(monkeypatch):
    class Column:
        count = 1_000_000
        codec = make_codec(128, [])

    column, asked = Column(), []

    def measured(*given):
        asked.append(given)
        if len(asked) == 1:  # another search comes meanwhile
            assert native._cheapest(column, 0.5, 1, 1e-3, 1_000_000) is None
        return "tables"

    monkeypatch.setattr(native, "INSTRUCTIONS", "avx2")
    monkeypatch.setattr(native, "_measured", measured)
    monkeypatch.setattr(costs, "CLASSES_MEASURED_NS", 0)
    assert [native._cheapest(column, 0.5, 1, 1e-3, 1_000_000) for _ in range(3)] == ["tables"] * 3
    assert len(asked) == 1


def test_the_largest_column_of_a_codec_stands_for_all_of_its_columns(scanner):
    shards = shards_of(unit(30_001, 64), scanner)
    columns = [part.columns["face"] for shard in shards for part in shard._parts]
    assert columns[0].count > columns[1].count
    assert all(shard._largest_like(column, "face") is columns[0] for shard, column in zip(shards, columns, strict=True))


def test_laws_of_tables_are_measured_once_scans_have_cost_as_much(monkeypatch):
    class Column:
        count = 1_000_000
        codec = make_codec(128, [])

    def population_of(column):
        raise LookupError("measured")

    column, a_probe_ns = Column(), 1e6 * costs.ROW_COSTS["avx2"].of_all(128, 1)
    monkeypatch.setattr(native, "INSTRUCTIONS", "avx2")
    monkeypatch.setattr(native, "population_of", population_of)
    monkeypatch.setattr(costs, "CLASSES_MEASURED_NS", 5.5 * a_probe_ns)
    assert [native._cheapest(column, 0.5, probes, 1e-3, 1_000_000) for probes in (1, 1, 1, 1)] == [None] * 4
    with pytest.raises(LookupError, match="measured"):
        native._cheapest(column, 0.5, 4, 1e-3, 1_000_000)
