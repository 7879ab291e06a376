"""What a join says before it begins: how many pairs impostors make, and how long it takes."""

import json
from math import comb

import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.cli import printing
from biodedup.search.selfjoin.estimate import SECONDS_WARNED, duration, estimate_of, rounded
from tests.support.vectors import SFACE, people


@pytest.mark.parametrize(
    ("subjects", "threshold_db"), [(2, 40.0), (1_000, 30.0), (100_000, 40.0), (200_000_000, 113.0)]
)
def test_impostors_make_the_compared_pairs_times_the_false_match_rate(subjects, threshold_db):
    estimate = estimate_of(subjects, threshold_db, 1, faces_only=True)
    assert estimate.pairs == comb(subjects, 2)
    assert estimate.impostor_pairs == pytest.approx(subjects * (subjects - 1) / 2 * 10 ** (-threshold_db / 10))


def test_listed_subjects_are_compared_with_all_and_each_pair_counts_once():
    everyone = range(30)
    pairs = {frozenset((a, b)) for a in range(7) for b in everyone if a != b}
    assert estimate_of(30, 40.0, 1, faces_only=True, listed=7).pairs == len(pairs)
    assert estimate_of(30, 40.0, 1, faces_only=True, listed=0).warnings() == []


def test_a_low_threshold_or_a_long_join_is_warned_about_and_an_ordinary_one_is_not():
    (many,) = estimate_of(20_000, 40.0, 1, faces_only=True).warnings()
    assert "at 40.0 dB impostors are expected to make 20,000 of the 199,990,000 pairs" in many and "from 84 dB" in many
    both = estimate_of(1_000_000, 40.0, 1, faces_only=True).warnings()
    assert len(both) == 2 and "takes about" in both[1]
    assert estimate_of(20_000, 100.0, 1, faces_only=True).warnings() == []
    long = estimate_of(200_000, 100.0, 11, faces_only=False)
    assert long.seconds > SECONDS_WARNED and len(long.warnings()) == 1


def test_a_lower_threshold_never_takes_less_time():
    seconds = [estimate_of(50_000, db, 1, faces_only=True).seconds for db in range(120, 0, -5)]
    assert seconds == sorted(seconds)


def test_counts_and_times_are_reported_in_few_figures():
    assert [rounded(count) for count in (499_995.0, 10.2, 3.0, 0.00312)] == ["500,000", "10", "3", "0.0031"]
    assert [duration(s) for s in (0.2, 61, 720, 12_600)] == ["1 s", "61 s", "12 min", "3.5 h"]


@pytest.fixture
def engine(tmp_path):
    with bd.Engine.open(tmp_path / "g", bd.Config()) as engine:
        engine.add_templates([f"s{i}" for i in range(300)], {"face": people(300)}, model_id=SFACE)
        yield engine


@pytest.mark.slow
def test_the_job_warns_before_it_compares_and_its_result_states_the_number(engine, tmp_path):
    told = []
    result = jobs.find_duplicates(engine, tmp_path / "p.csv", threshold_db=10.0, progress=lambda *one: told.append(one))
    stage, done, total = told[0]
    assert stage.startswith("warning: at 10.0 dB impostors are expected to make 4,500 of the 44,850 pairs")
    assert (done, total) == (0, 300)
    assert all(stage == "comparing" for stage, _, _ in told[1:])
    assert result.summary()["pairs_expected_by_chance"] == 4_480
    assert "impostors are expected to make 4,500" in result.plan
    told.clear()
    usual = jobs.find_duplicates(engine, tmp_path / "p.csv", progress=lambda *one: told.append(one))
    assert [stage for stage, _, _ in told] == ["comparing"]
    assert 0 < usual.summary()["pairs_expected_by_chance"] < 1


@pytest.mark.slow
def test_an_audit_warns_before_it_compares(engine, tmp_path):
    (tmp_path / "roll.csv").write_text("subject_id\n" + "".join(f"s{i}\n" for i in range(200)))
    told = []
    jobs.audit(engine, tmp_path / "roll.csv", tmp_path / "a.csv", threshold_db=10.0, progress=lambda *one: told.append(one[0]))  # fmt: skip
    assert told[0].startswith("warning: at 10.0 dB impostors are expected to make 4,000 of the 39,900 pairs")


@pytest.mark.slow
def test_a_merge_warns_before_it_compares(engine, tmp_path):
    engine.close()
    told = []
    jobs.merge([tmp_path / "g"], tmp_path / "m.parquet", min_db=10.0, progress=lambda *one: told.append(one[0]))
    assert any(stage.startswith("warning: at 10.0 dB impostors") for stage in told[: told.index("comparing")])


@pytest.mark.slow
def test_a_deduplication_states_the_number_in_its_summary(tmp_path, portrait):
    from tests.support.images import jpeg

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(jpeg(portrait))
    jobs.dedup(tmp_path, tmp_path / "out" / "o.csv", threshold_db=20.0)
    assert json.loads((tmp_path / "out" / "o.summary.json").read_text())["pairs_expected_by_chance"] == 0.01


def test_the_command_line_prints_a_warning_at_once(capsys):
    with printing.progress_bar() as progress:
        progress("warning: this takes 3 h", 0, 10)
        assert "warning: this takes 3 h" in capsys.readouterr().err
