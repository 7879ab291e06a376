"""`evaluate`: figures that can be counted again from the tables beside them, and what an official sees."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli import app
from biodedup.jobs.evaluation import plots
from biodedup.jobs.evaluation.comparisons import compare_all
from biodedup.jobs.evaluation.labelled import Labelled
from biodedup.jobs.shared.progress import silent
from tests.support.images import jpeg
from tests.support.vectors import SFACE, again, people

pytestmark = pytest.mark.slow

MODELS = {"face": SFACE, "right_index": "external-128"}
NAMED = [f"--model-id={column}={model_id}" for column, model_id in MODELS.items()]
SUBJECTS, VISITS = 40, 3


def templates(path: Path, *, refused: int = 0, fingers: bool = False) -> Path:
    """40 subjects, three encounters each; the second half of them score worse, as a poorer sensor would make them. The first `refused`
    subjects' second encounters have no template; the last five subjects come once."""
    first = people(SUBJECTS)
    rows = []
    for visit in range(VISITS):
        vectors = first if visit == 0 else again(first, 0.75, seed=visit)
        poor = first if visit == 0 else again(first, 0.3, seed=10 + visit)
        for i in range(SUBJECTS if visit == 0 else SUBJECTS - 5):
            vector = (vectors if i < 20 else poor)[i].tolist()
            row = {"subject_id": f"s{i}", "sex": "fm"[i % 2], "age": 20 + i, "sensor": "good" if i < 20 else "poor"}
            row["face"] = None if visit == 1 and i < refused else vector
            if fingers:
                row["right_index"] = again(first, 0.6, seed=20 + visit)[i].tolist() if i % 4 else None
            rows.append(row)
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def rows(folder: Path, name: str) -> list[dict]:
    return pa.parquet.read_table(folder / f"r.{name}.parquet").to_pylist()


def test_verification_is_what_an_independent_count_of_raw_similarities_says(tmp_path):
    source = templates(tmp_path / "t.parquet", refused=4)
    found = jobs.evaluate(source, tmp_path / "r.json", model_id=MODELS, replicates=100).document
    given = pa.parquet.read_table(source).to_pylist()
    kept = [row for row in given if row["face"] is not None]
    vectors = np.array([row["face"] for row in kept], np.float32)
    label = np.array([row["subject_id"] for row in kept])
    a, b = np.triu_indices(len(kept), 1)
    similarity = np.sum(vectors[a] * vectors[b], axis=1)
    mated = label[a] == label[b]
    assert found["counts"]["mated_pairs"] == mated.sum()
    assert found["counts"]["nonmated_pairs"] == found["counts"]["nonmated_pairs_possible"] == (~mated).sum()
    assert found["counts"]["mated_pairs_lost"] == 4 * 2
    for row in found["verification"]["at_fmr"]:
        allowed = int(row["target"] * (~mated).sum())
        limit = np.sort(similarity[~mated])[::-1][allowed]  # the first stranger who is not to be let in
        misses = int((similarity[mated] <= limit).sum())
        assert row["fmr"]["events"] == allowed
        assert (row["fnmr"]["events"], row["fnmr"]["trials"]) == (misses, mated.sum())
        assert row["fnmr_with_failures"]["events"] == misses + 8
    written = rows(tmp_path, "pairs")
    raw = {(r["encounter_a"], r["encounter_b"]): (r["similarity"], r["mated"], r["position"]) for r in written}
    names = [f"row {i + 1}" for i, row in enumerate(given) if row["face"] is not None]
    assert len(raw) == len(a)
    for i in range(0, len(a), 97):
        value, mate, position = raw[names[a[i]], names[b[i]]]
        assert (mate, position) == (mated[i], "face")
        assert value == pytest.approx(similarity[i], abs=1e-6)


def test_searches_are_what_an_independent_count_says(tmp_path):
    source = templates(tmp_path / "t.parquet", refused=4)
    found = jobs.evaluate(source, tmp_path / "r.json", model_id=MODELS, replicates=100).document["identification"]
    given = pa.parquet.read_table(source).to_pylist()
    gallery = np.array([row["face"] for row in given[:SUBJECTS]], np.float32)
    ranks, mate, stranger = [], [], []
    for number, row in enumerate(given):
        subject = int(row["subject_id"][1:])
        single = subject >= SUBJECTS - 5
        if row["face"] is None or (number < SUBJECTS and not single):
            continue
        similarity = gallery @ np.array(row["face"], np.float32)
        others = np.delete(similarity, subject)
        stranger.append(others.max())
        if not single:
            mate.append(similarity[subject])
            ranks.append(1 + int((others >= similarity[subject]).sum()))
    assert found["gallery_subjects"] == SUBJECTS
    assert found["mated_searches"] == len(mate) == 35 * 2 - 4
    assert found["mated_searches_with_failures"] == 35 * 2
    assert found["nonmated_searches"] == len(stranger) == 35 * 2 - 4 + 5
    assert found["cmc"]["found"][:5] == [sum(rank <= k for rank in ranks) for k in range(1, 6)]
    (tenth, *_) = found["at_fpir"]
    limit = np.sort(stranger)[::-1][int(0.1 * len(stranger))]
    assert tenth["fpir"]["events"] == int(0.1 * len(stranger))
    assert tenth["fnir"]["events"] == sum(value <= limit for value in mate)
    assert tenth["fnir_with_failures"]["events"] == tenth["fnir"]["events"] + 4
    table = rows(tmp_path, "searches")
    assert sum(row["mate_rank"] == 1 for row in table) == found["cmc"]["found"][0]
    at = found["at_policy"][0]
    assert at["threshold_db"] == bd.Policy().thresholds_db(SUBJECTS)[0] == 50.0  # the floor
    counted = [row for row in table if row["mate_enrolled"] and row["searched"]]
    assert at["fnir"]["events"] == sum(row["mate_db"] < at["threshold_db"] for row in counted)


def test_a_poorer_sensor_is_distinguished_and_small_groups_are_marked(tmp_path):
    found = jobs.evaluate(
        templates(tmp_path / "t.parquet"), tmp_path / "r.json", model_id=MODELS, replicates=200
    ).document["groups"]
    sensors = {row["group"]: row for row in found["columns"]["sensor"]}
    assert sensors["poor"]["fnmr"]["difference"]["interval"][0] > 0
    assert sensors["good"]["fnmr"]["difference"]["interval"][1] < 0
    assert sensors["poor"]["fnir"]["value"] > sensors["good"]["fnir"]["value"]
    assert not sensors["good"]["small"]
    assert sensors["two groups"]["fnmr"]["trials"] == 0  # a subject's encounters are all of one sensor here
    assert sensors["two groups"]["fmr"]["trials"] + sum(sensors[g]["fmr"]["trials"] for g in ("good", "poor")) == (
        sum(range(110)) - 35 * 3
    )
    assert [row["group"] for row in found["columns"]["age"]][:1] == ["20 to 28"]
    assert all(row["small"] for row in found["columns"]["age"] if row["subjects"])
    sexes = {row["group"]: row for row in found["columns"]["sex"]}
    assert sexes["f"]["fnmr"]["difference"]["interval"][0] < 0 < sexes["f"]["fnmr"]["difference"]["interval"][1]


def test_evidence_is_stated_alone_and_together(tmp_path):
    source = templates(tmp_path / "t.parquet", fingers=True)
    found = jobs.evaluate(source, tmp_path / "r.json", model_id=MODELS, replicates=50).document
    assert [(one["column"], one["evidence"]) for one in found["alone"]] == [
        ("face", "similarity"),
        ("right_index", "similarity"),
    ]
    assert found["verification"]["equal_error_rate"]["value"] < found["alone"][0]["equal_error_rate"] / 2
    written = rows(tmp_path, "pairs")
    both = [row for row in written if row["right_index_similarity"] is not None]
    assert both and all(row["position"] is None and row["similarity"] is None for row in both)
    alone = [row for row in written if row["right_index_similarity"] is None]
    assert alone and all(row["position"] == "face" for row in alone)


def test_scores_are_those_of_the_librarys_own_comparison():
    vectors = people(6)
    mates = again(vectors, 0.6)
    made = [
        Labelled(f"{i}/{v}", str(i), templates={"face": bd.Template("face", "external-128", rows[i])})
        for v, rows in enumerate((vectors, mates))
        for i in range(6)
    ]
    pairs = compare_all(made, bd.Config(), np.random.default_rng(0), nonmated_max=10**6, progress=silent).pairs
    assert len(pairs.a) == 66
    for at in range(0, 66, 5):
        a, b = (made[int(side[at])].templates["face"] for side in (pairs.a, pairs.b))
        score = bd.compare(a, b)
        assert pairs.raw["face", "similarity"][at] == pytest.approx(score.similarity, abs=1e-6)


def test_many_pairs_of_impostors_are_sampled_by_seed_and_it_is_said(tmp_path):
    source = templates(tmp_path / "t.parquet")
    whole = jobs.evaluate(source, tmp_path / "w.json", model_id=MODELS, replicates=20).document
    one, same, other = (
        jobs.evaluate(source, tmp_path / "r.json", model_id=MODELS, replicates=20, nonmated_max=800, seed=seed).document
        for seed in (1, 1, 2)
    )
    assert one["counts"]["nonmated_pairs_sampled"]
    assert 650 < one["counts"]["nonmated_pairs"] < 950
    assert one["counts"]["mated_pairs"] == whole["counts"]["mated_pairs"]
    assert (
        one["identification"]["at_policy"][0]["fpir"]["events"]
        == (whole["identification"]["at_policy"][0]["fpir"]["events"])
    )
    assert {k: v for k, v in one.items() if k != "made_at"} == {k: v for k, v in same.items() if k != "made_at"}
    assert (
        one["counts"]["nonmated_pairs"] != other["counts"]["nonmated_pairs"]
        or one["calibration"] != other["calibration"]
    )


@pytest.fixture
def album(tmp_path: Path, portrait: np.ndarray) -> Path:
    """One real face under two names: nothing else is a false match; and a black picture. Names that HTML would have to escape."""
    for name, image in {
        "<anna>/1.jpg": portrait,
        "<anna>/2.jpg": portrait[:, ::-1],
        "bella/1.jpg": (portrait * 0.7).astype(np.uint8),
        "bella/2.jpg": portrait[:400, 80:400],
        "carla/1.jpg": (portrait * 0.05).astype(np.uint8),
    }.items():
        (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "album" / name).write_bytes(jpeg(np.ascontiguousarray(image)))
    return tmp_path / "album"


class _Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]


def test_the_report_is_one_page_without_scripts_and_shows_the_worst_pairs(album, monkeypatch):
    out = album.parent / "r.json"
    found = jobs.evaluate(album, out, report=album.parent / "r.html", replicates=20).document
    page = (album.parent / "r.html").read_text()
    read = _Page(page)
    assert "script" not in read.tags
    assert "anna" not in read.tags and "&lt;anna&gt;" in page
    assert all(link.startswith(("data:image/jpeg", "#")) for link in read.links)
    assert sum(link.startswith("data:") for link in read.links) == 2 * (4 + 2)
    assert read.tags.count("svg") == 4
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>', "", page, flags=re.S)
    assert found["counts"]["mated_pairs"] == 2
    assert found["failure_to_enrol"]["captures_declined"] == [{"column": "face", "reason": "too_dark", "count": 1}]
    assert found["worst"]["false_matches"][0]["score_db"] > 60
    assert json.loads(out.read_text())["counts"] == found["counts"]
    # again, from the templates that were kept
    monkeypatch.setattr(bd.Extractor, "extract", lambda self, captures: pytest.fail("extracted again"))
    assert jobs.evaluate(album, out, replicates=20).document["verification"] == found["verification"]


def test_without_matplotlib_a_report_is_refused_before_any_work_and_numbers_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    source = templates(tmp_path / "t.parquet")
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ["evaluate", str(source), "-o", "r.json", *NAMED])
    assert isinstance(refused.exception, bd.InvalidInput)
    assert "pip install 'biodedup[report]'" in str(refused.exception)
    assert list(tmp_path.iterdir()) == [source]
    done = CliRunner().invoke(app, ["evaluate", str(source), "-o", "r.json", *NAMED, "--no-report", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["counts"]["subjects"] == SUBJECTS
    assert CliRunner().invoke(app, ["evaluate", str(source), "-o", "r.json", *NAMED, "--no-report"]).exit_code == 0
    assert not (tmp_path / "r.html").exists()


def test_captures_of_one_encounter_are_fused(tmp_path, portrait):
    for name, image in {"a": portrait, "b": portrait[:, ::-1], "dark": portrait * 0.03}.items():
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(np.ascontiguousarray(image.astype(np.uint8))))
    (tmp_path / "m.csv").write_text(
        "subject_id,path,encounter_id,sensor\nanna,a.jpg,1,x\nanna,dark.jpg,1,y\nanna,b.jpg,2,x\nbella,b.jpg,1,x\n"
    )
    found = jobs.evaluate(tmp_path / "m.csv", tmp_path / "r.json", replicates=20)
    assert [(one.encounter_id, len(one.captures)) for one in found.comparisons.encounters] == [
        ("anna/1", 2),
        ("anna/2", 1),
        ("bella/1", 1),
    ]
    assert found.comparisons.encounters[0].groups == {"sensor": "x + y"}
    assert (found.document["counts"]["mated_pairs"], found.document["counts"]["nonmated_pairs"]) == (1, 2)
    assert found.document["failure_to_enrol"]["rate"]["events"] == 0


def test_what_is_wrong_with_a_source_is_said(tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.csv").write_text("subject_id,path\na,x.jpg\na,y.jpg\n")
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "noise.parquet").write_text("no")
    ragged = pa.table({"subject_id": ["a", "b"], "face": [[1.0], [0.6, 0.8]]})
    pa.parquet.write_table(ragged, tmp_path / "ragged.parquet")
    pa.parquet.write_table(pa.table({"subject_id": ["a"], "face": ["x"]}), tmp_path / "kind.parquet")
    for name, text in {
        "absent": "does not exist",
        "flat": "is not in a subject's subfolder",
        "empty": "no images",
        "one.csv": "two or more",
        "columns.csv": "lacks the columns",
        "noise.parquet": "not a readable table",
        "ragged.parquet": "one dimension",
        "kind.parquet": "list of float32",
    }.items():
        with pytest.raises(bd.InvalidInput, match=text):
            jobs.evaluate(tmp_path / name, tmp_path / "r.json")
    with pytest.raises(bd.InvalidInput, match="end the name with"):
        jobs.evaluate(tmp_path / "flat", tmp_path / "r.txt")


def test_unsound_templates_count_as_failures_to_enrol(tmp_path):
    vectors = people(4)
    vectors[1] *= 2
    cells = [*vectors.tolist(), [float("nan")] * 128]
    table = pa.table(
        {"subject_id": list("abcde"), "face": cells, "right_thumb": [None, b"no record", None, None, None]}
    )
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    found = jobs.evaluate(tmp_path / "t.parquet", tmp_path / "r.json", model_id=MODELS, replicates=20).document
    assert found["failure_to_enrol"]["rate"]["events"] == 2
    assert {(row["column"], row["reason"]) for row in found["failure_to_enrol"]["captures_declined"]} == {
        ("face", "not_a_unit_vector"),
        ("right_thumb", "unsound_record"),
    }
    assert found["verification"]["at_policy"] is None  # nobody came twice
    assert found["identification"]["nonmated_searches"] == 3


def test_a_source_without_errors_is_drawn_too(tmp_path):
    vectors = people(8)
    table = pa.table(
        {"subject_id": [f"s{i % 8}" for i in range(16)], "face": [*vectors.tolist(), *again(vectors, 0.95).tolist()]}
    )
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    jobs.evaluate(
        tmp_path / "t.parquet", tmp_path / "r.json", model_id=MODELS, report=tmp_path / "r.html", replicates=20
    )
    assert (tmp_path / "r.html").read_text().count("no threshold has errors of both types") == 2
