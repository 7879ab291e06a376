"""Result values as JSON, as one line, as a table and as HTML; never with biometric data."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json

import numpy as np
import pyarrow as pa
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.common.described import Described, Tabular
from biodedup.texts import KnownId
from tests.support.cases import CONFIG, Clock, sent
from tests.support.minutiae import record, strewn
from tests.support.vectors import SFACE, again, people

(ANNA, BELLA) = people(2)
RECORD = record(strewn(30, seed=1))
NOT_RESULTS = {"Encounter", "Trace", "Config", "Policy", "CaptureConfig", "FaceConfig", "FingerConfig"}
NOT_RESULTS |= {
    "GalleryConfig",
    "IsolationConfig",
    "SearchConfig",
    "LogConfig",
    "LabelConfig",
    "ClusterConfig",
    "KeyProvider",
    "Principal",
}
NO_JOB_RESULTS = {"Progress", "TableOptions", "Backlog"}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """One of each kind, from a small gallery."""
    folder = tmp_path_factory.mktemp("values")
    with bd.Engine.open(folder / "g", CONFIG, clock=Clock()) as engine:
        templates = {"face": bd.Template("face", SFACE, ANNA, quality=0.9), "right_index": RECORD}
        engine.enroll(bd.Encounter("anna", templates=templates, encounter_id="e1", groups=["north"]))
        review = engine.enroll(sent(KnownId("<b>bella</b>\u200c"), again(ANNA, 0.5), "e2"))
        link = bd.Link(("anna", "bella"), 93.21, True, review.candidates[0].evidence)
        missing = bd.Missing("right_index", "bandaged")
        yield [
            review,
            engine.enroll(bd.Encounter("carla", [missing], encounter_id="e3")),
            engine.case("e2"),
            engine.search({"face": np.stack([ANNA, BELLA])}, k=3),
            engine.subject("anna"),
            next(engine.subjects()),
            engine.encounters("anna")[0],
            engine.verify(sent(None, again(ANNA, 0.9), None), "anna"),
            engine.policies()[0],
            engine.templates("anna")["right_index"],
            bd.Cluster(("anna", "bella"), (link,), 93.21),
            jobs.load(engine, [pa.record_batch({"subject_id": ["dora"], "face": [BELLA.tolist()]})], model_id=SFACE),
            jobs.list_cases(engine),
            jobs.find_duplicates(engine, folder / "d.parquet"),
            bd.compare(*[bd.Template("face", SFACE, ANNA)] * 2),
            engine.adjudicate("e2", "same", "A. Officer"),
            *engine.verdicts(),
            bd.Refusal("face", "blurred", measured=float("inf")),
            missing,
            link,
        ]


def test_every_public_result_has_the_forms():
    public = {name: getattr(bd, name) for name in bd.__all__ if dataclasses.is_dataclass(getattr(bd, name))}
    assert {name for name, kind in public.items() if not issubclass(kind, Described)} == NOT_RESULTS & public.keys()
    of_jobs = {name: getattr(jobs, name) for name in jobs.__all__ if inspect.isclass(getattr(jobs, name))}
    assert {name for name, kind in of_jobs.items() if not issubclass(kind, Described)} == NO_JOB_RESULTS
    for kind in (bd.Decision, bd.Case, bd.SearchResult, bd.Cluster, bd.Subject):
        assert issubclass(kind, Tabular)


def test_json_is_one_line_of_the_same_document(values):
    for value in values:
        line = value.to_json()
        assert json.loads(line) == value.to_dict(), value
        assert line.isprintable() and "\u200c" not in line


def test_the_repr_is_one_short_line(values):
    for value in values:
        if type(value).__module__.startswith("biodedup.values."):
            assert len(repr(value)) < 260 and repr(value).isprintable(), repr(value)
    review, refused, case, found, anna, *_ = map(repr, values)
    assert review.startswith(
        "Decision(review, subject_id='<b>bella</b>\\u200c', encounter_id='e2', 1 candidate, best='anna' at "
    )
    assert refused.startswith("Decision(refused, subject_id='carla', encounter_id='e3', 0 candidates")
    assert case.startswith("Case('e2', subject_id='<b>bella</b>\\u200c', ") and "1 to be judged" in case
    assert found.startswith("SearchResult(2 probes, k=3, gallery_version=")
    assert anna == "Subject('anna', 1 encounter, 1 decision)"


def test_no_form_holds_biometric_data(values):
    numbers = [f"{x:.4f}"[:6] for x in np.abs(ANNA[np.abs(ANNA) > 0.05][:8]).tolist()]
    assert sum(number in str(ANNA.tolist()) for number in numbers) >= 3  # a vector would be seen
    for value in values:
        forms = [value.to_json(), repr(value)]
        if isinstance(value, Tabular):
            forms += [value._repr_html_(), str(value.to_arrow().to_pylist())]
        for form in forms:
            assert (
                "embedding" not in form.replace("embeddings", "") and "FMR\\u0000" not in form and "FMR\x00" not in form
            )
            assert sum(number in form for number in numbers) < 3, value


def test_what_a_template_is_stays(values):
    subject = next(value for value in values if isinstance(value, bd.Subject)).to_dict()
    assert subject["encounters"][0]["templates"]["face"] == {
        "column": "face",
        "model_id": SFACE,
        "quality": pytest.approx(0.9),
        "provenance": [],
    }
    assert subject["enrolled"] and subject["groups"] == ["north"]


def test_numbers_that_json_cannot_hold_are_null(values):
    assert next(value for value in values if isinstance(value, bd.Refusal)).to_dict()["measured"] is None


def test_html_is_escaped(values):
    page = values[2]._repr_html_()
    assert "<b>" not in page and "&lt;b&gt;" in page and "\u200c" not in page
    assert page.startswith("<table><caption>Case(") and "to be judged" in page


def test_rows_become_tables(values):
    review, _, case, found, subject, *_ = values
    (row,) = review.to_arrow().to_pylist()
    assert (row["rank"], row["subject_id"], row["kind"]) == (1, "anna", "same_person")
    assert row["low_db"] <= row["score_db"] <= row["high_db"] and row["evidence"].startswith("face ")
    assert case.to_arrow().column("to_be_judged").to_pylist() == [True]
    rows = found.to_arrow()
    assert rows.schema.names == ["probe", "rank", "subject_id", "similarity"]
    assert [r["subject_id"] for r in rows.to_pylist()] == [name for name in found.ids.reshape(-1) if name]
    assert subject.to_arrow().column("columns").to_pylist() == ["face;right_index"]
    assert bd.Cluster((), (), 0.0).to_arrow().num_rows == 0
    cluster = next(value for value in values if isinstance(value, bd.Cluster))
    assert cluster.to_arrow().column("subject_b").to_pylist() == ["bella"]


@pytest.mark.skipif(importlib.util.find_spec("pandas") is not None, reason="pandas is installed")
def test_without_pandas_the_error_says_what_to_do(values):
    with pytest.raises(bd.InvalidInput, match="pip install pandas"):
        values[0].to_pandas()
